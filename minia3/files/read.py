"""To be written."""

import json
from contextlib import contextmanager
from pathlib import Path


def read_json(path):
    """The object in a JSON file. Raises ValueError, in one line, where there is none."""
    with reading(path):
        value = json.loads(Path(path).read_bytes())
        if not isinstance(value, dict):
            raise ValueError(f"expected a JSON object, found {type(value).__name__}")
    return value


@contextmanager
def reading(where, damage="damaged or cut short", extra=None):
    """Whatever goes wrong while a file of others is read becomes a ValueError of one line that begins with `where`.

    A plain ValueError keeps its message; `damage` is what any other tells. `extra` of minia3: for imports in between.
    """
    try:
        yield
    except (
        BaseException
    ) as error:  # tokenizers raises plain Exceptions, and a panic of its Rust code is not even one
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        why = one_line(error)
        if extra and isinstance(error, ImportError):
            why = f"{why}: pip install 'minia3[{extra}]'"
        elif (
            type(error) is not ValueError
        ):  # of others, the first sentence: torch goes on to advise weights_only=False
            why = f"{damage}: {type(error).__name__}: {why.split('. ')[0]}"
        known = not_what_it_says(where) if isinstance(where, Path) and not where.is_dir() else ""
        raise ValueError(f"{where}: {known or why}") from None


def not_what_it_says(path):
    """What the first bytes of a file tell, where it is not what its name says; else an empty string."""
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        return "not found" if isinstance(error, FileNotFoundError) else one_line(error)
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer in place of the file: run `git lfs pull`"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "an HTML page in place of the file: the download went wrong"
    return "" if head else "the file is empty"


def one_line(error):
    return " ".join(str(error).split())[:300] or type(error).__name__
