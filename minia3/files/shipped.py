"""Find what ships with minia3: train.py, and the embedded model and task of data/.

In a clone these lie beside the package, where people read them. A wheel has copies of them inside
the package, in the folder `shipped` (see pyproject.toml).
"""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def find_shipped(name):
    """Return the Path of `train.py` or `data`."""
    inside = PACKAGE / "shipped" / name
    return inside if inside.exists() else PACKAGE.parent / name
