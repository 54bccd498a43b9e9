"""Names of columns, files and labels: what makes two spellings one, and how messages show names."""

import difflib
import unicodedata
from collections.abc import Iterable


def fold_case(name: str) -> str:
    """Return what the spellings of a name have in common, whatever their case and the form of their
    accents: macOS and some spreadsheets write the two characters e and U+0301 for an é.
    """
    return unicodedata.normalize("NFC", name.strip().lower())


def list_names(names: Iterable[str], most: int | None = None) -> str:
    """Return names in one line, with commas between them, whatever characters they have.

    most: how many of them are shown; the others are counted. None: all of them.
    """
    names = list(names)
    shown = []
    for name in names[:most]:
        is_visible = name.isprintable() and bool(name.strip())
        text = name if is_visible else repr(name)
        shown.append(text)
    text = ", ".join(shown)
    n_others = len(names) - len(shown)
    return f"{text} and {n_others} more" if n_others else text


def name_value(name: str, value: object, most: int) -> str:
    """Return the beginning of a message: which value a column has. most: how many characters."""
    if value is None:  # no such column, null in JSON, or an empty cell of a table
        return f"{name!r} has no value"
    return f"{name!r} is {value!r:.{most}}"


def nearest_of(name: str, names: Iterable[str]) -> str:
    """Return what a message says after an unknown name: which names there are, and the nearest."""
    near = difflib.get_close_matches(name.lower(), names, n=1)
    hint = f": did you mean {near[0]!r}?" if near else ""
    return f"; the columns are {list_names(names):.200}{hint}"
