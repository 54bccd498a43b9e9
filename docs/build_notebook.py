"""Execute docs/walkthrough.py, and write docs/walkthrough.ipynb with its outputs.

    pip install -e '.[plot]' jupytext nbclient ipykernel
    python docs/build_notebook.py

`jupytext --to ipynb --execute` does nearly the same. It also writes times, random cell ids and the
version of Python, so that the file would change at every call.
"""

import os
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def build_notebook(source):
    """Return the executed notebook of a file in the percent format."""
    notebook = jupytext.read(source)
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
    )
    # Warnings name paths of this machine (tqdm's, if ipywidgets is not installed).
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    client.execute(cwd=source.parent, env=environment)
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL})
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02}"
        cell.metadata = nbformat.from_dict({})
    return notebook


def main():
    notebook = build_notebook(HERE / "walkthrough.py")
    path = HERE / "walkthrough.ipynb"
    path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8", newline="\n")
    print(f"{path.name}: {len(notebook.cells)} cells, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
