"""The walkthrough runs, its predictions hold, and the notebook has the same cells and outputs.

The cells run in one namespace, without a kernel, so the test needs nothing but matplotlib.
"""

import io
import json
import os
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest

import minia3

DOCS = Path(minia3.__file__).parent.parent / "docs"
SOURCE = DOCS / "walkthrough.py"
NOTEBOOK = DOCS / "walkthrough.ipynb"
MAX_BYTES = 1_500_000
N_CHAPTERS = 8
NUMBER = re.compile(r"-?\d[\d,]*\.?\d*(?:e[+-]\d+)?")


def read_cells(path):
    """Return the cells of a file in the percent format as pairs of kind and text."""
    parts = re.split(r"^# %%( \[markdown\])?\n", path.read_text(encoding="utf-8"), flags=re.M)
    cells = []
    for marker, body in zip(parts[1::2], parts[2::2], strict=True):
        text = body.strip("\n")
        if marker:
            text = re.sub(r"^# ?", "", text, flags=re.M)
        cells.append(("markdown" if marker else "code", text))
    return cells


def read_notebook():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run the cells. Return the names that they define, and what each cell of code prints."""
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="matplotlib, which draws, is missing")
    pyplot.switch_backend("Agg")
    folder = tmp_path_factory.mktemp("anywhere")
    names = {"__name__": "walkthrough"}
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # it must run from anywhere
        for kind, text in read_cells(SOURCE):
            if kind == "code":
                with redirect_stdout(io.StringIO()) as out:
                    exec(compile(text, str(SOURCE), "exec"), names)
                printed.append(out.getvalue())
            pyplot.close("all")
    assert os.listdir(folder) == []
    return names, printed


@pytest.mark.slow
def test_the_predictions_of_the_walkthrough_hold(run):
    names, _ = run
    assert names["trained"] > names["unasked"]


def words_and_numbers(text):
    """Return a text with # in place of each number, however it is aligned, and the numbers."""
    numbers = [float(number.replace(",", "")) for number in NUMBER.findall(text)]
    return " ".join(NUMBER.sub("#", text).split()), numbers


@pytest.mark.slow
def test_the_notebook_shows_what_the_cells_print(run):
    """Of what follows from training, only the words: there, rounding may grow."""
    _, printed = run
    cells = [cell for cell in read_notebook()["cells"] if cell["cell_type"] == "code"]
    is_trained = False
    for cell, text in zip(cells, printed, strict=True):
        source = "".join(cell["source"])
        shown = "".join("".join(output.get("text", "")) for output in cell["outputs"])
        words, numbers = words_and_numbers(text)
        shown_words, shown_numbers = words_and_numbers(shown)
        assert words == shown_words, source
        is_trained = is_trained or "optimizer.step()" in source
        if not is_trained:
            assert numbers == pytest.approx(shown_numbers, rel=0.02, abs=0.002), source
    assert is_trained


def test_the_notebook_has_the_cells_of_the_source():
    cells = []
    for cell in read_notebook()["cells"]:
        cells.append((cell["cell_type"], "".join(cell["source"])))
    assert cells == read_cells(SOURCE)


def test_what_the_walkthrough_says_of_the_studies_is_what_they_say():
    text = " ".join(read_cells(SOURCE)[-1][1].split())
    said = re.search(
        r"stays at (\d+)% at 0.003 and reaches (\d+)% at 0.03. "
        r"LoRA's median over five seeds is (\d+)%",
        text,
    )
    studies = (DOCS / "studies.md").read_text(encoding="utf-8")
    xor = {}
    for line in studies.partition("### Methods")[2].splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) > 6 and cells[1] in ("ia3, lr 0.003", "ia3, lr 0.03", "lora"):
            xor.setdefault(cells[1], round(float(cells[6].split()[0])))
    found = [xor["ia3, lr 0.003"], xor["ia3, lr 0.03"], xor["lora"]]
    assert [int(figure) for figure in said.groups()] == found


def test_every_code_cell_is_short_and_has_a_paragraph_before_it():
    cells = read_cells(SOURCE)
    previous_kind = None
    for kind, text in cells:
        if kind == "code":
            assert previous_kind == "markdown", text
            assert len(text.splitlines()) <= 25, text
        previous_kind = kind


def test_every_chapter_predicts_and_asserts():
    text = "\n".join(f"{kind}\n{text}" for kind, text in read_cells(SOURCE))
    chapters = re.split(r"^## \d+\. ", text, flags=re.M)[1:]
    assert len(chapters) == N_CHAPTERS
    for chapter in chapters:
        assert "**Predict" in chapter, chapter[:80]
        assert re.search(r"^ *assert ", chapter, re.M), chapter[:80]


def test_the_notebook_is_small_and_the_same_on_every_machine():
    assert NOTEBOOK.stat().st_size < MAX_BYTES
    notebook = read_notebook()
    assert set(notebook["metadata"]) == {"kernelspec"}
    outputs = []
    for cell in notebook["cells"]:
        assert cell["metadata"] == {}
        outputs += cell.get("outputs", [])
    kinds = {output["output_type"] for output in outputs}
    assert kinds == {"stream", "display_data"}  # no error
    printed = "".join("".join(output.get("text", "")) for output in outputs)
    assert not re.search(r"(^|\s)/\w+/", printed)  # no absolute path
    assert "Warning" not in printed


def test_every_picture_of_the_walkthrough_exists():
    for name in re.findall(r"!\[.*?\]\((.*?)\)", SOURCE.read_text(encoding="utf-8")):
        assert (DOCS / name).exists(), name
