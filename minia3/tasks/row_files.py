"""Read the rows of a file: .jsonl, .json, .csv, .tsv, .parquet and .arrow, and each of them in .gz.

A file is read piece by piece, so it may be larger than the memory. A bad row does not stop the
reading. A ValueError takes the place of the row, so one message can name all bad rows of all files.
"""

import gzip
import io
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from minia3.files.read import reading
from minia3.tasks.csv_rows import read_cell_rows, read_header
from minia3.tasks.json_rows import is_json_lines, read_json_lines, read_json_rows
from minia3.tasks.table_rows import label_names, open_table, read_table_rows

TABLES = (".parquet", ".arrow")  # pyarrow reads them
CELLS = (".csv", ".tsv")
SUFFIXES = (".jsonl", ".json", *CELLS, *TABLES)
FORMATS = ".jsonl, .json, .csv, .tsv or .parquet, or each of them with .gz"

# What to do about files that people have, and that are not read.
REMEDIES = {
    (".xlsx", ".xls", ".ods"): "save the sheet as .csv, in UTF-8",
    (".zip", ".tar", ".tgz", ".7z", ".bz2", ".xz", ".zst"): "unpack it",
    (".ndjson", ".jl"): "name it .jsonl",
    (".pkl", ".pickle", ".feather", ".orc", ".avro", ".pq"): "save it as .parquet",
    (".txt", ".tab"): "name it .tsv if it has a header, and tabs between its columns",
}

# A .gz file may hold this many times its size, and 16 MB more, because a small file may hold the
# same row many times. (Texts shrink to a quarter. Zeros shrink to a thousandth, and fill the disk
# or the memory of whoever unpacks them.)
MAX_INFLATION = 100
FREE_BYTES = 1 << 24


def rows_suffix(path: Path) -> str:
    """Return the suffix of a file of rows, in lower case and without .gz, or "" if it has none."""
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    return suffix if suffix in SUFFIXES else ""


def rows_stem(path: Path) -> str:
    """Return the name of a file of rows without its suffix and .gz."""
    name = path.name
    if name.lower().endswith(".gz"):
        name = name[:-3]
    return name.removesuffix(Path(name).suffix)


def remedy(path: Path) -> str:
    """Return what to do about a file that people have, and that is not read, or ""."""
    for suffixes, text in REMEDIES.items():
        if path.suffix.lower() in suffixes:
            return text
    return ""


def not_read(path: Path) -> ValueError:
    """Return the error for a file whose suffix is not one that we read."""
    found = f"{path.suffix} is not read" if path.suffix else "the name has no suffix"
    advice = f": {remedy(path)}" if remedy(path) else ""
    return ValueError(f"{path}: {found}{advice}; expected {FORMATS}")


def read_rows(
    path: str | Path, keep_empty: bool = False
) -> Iterator[tuple[int, dict | ValueError]]:
    """Yield (number, dict or ValueError) for each row of a file.

    The number is that of the row's first line in a .jsonl, .csv or .tsv file, and in other files
    that of the row. Both count from 1.

    - .jsonl (and a file without a suffix): a JSON object on each line.
    - .json: a list of objects, or an object with such a list; otherwise the same as .jsonl.
    - .csv: a header, and cells with commas between them, or semicolons, or tabs. An empty cell
      counts as missing. A cell of `choices` (or `Choices`) is a ChoicesCell.
      The spaces before a quoted cell are left out, see `read_spaced_cells`.
    - .tsv: a header, and cells with tabs between them. Quotes are ordinary characters.
    - .parquet and .arrow: see `read_table_rows`.

    keep_empty: an empty cell is an empty text, and not missing; and spaces before a quote stay.

    A byte order mark, Windows line ends and blank lines are ignored (but see `blank_row`). A row
    that is larger than 16 MB, or not UTF-8, or not JSON in a .json file, is the last to be read.
    Raise ValueError if the file cannot be opened or is damaged, or if its suffix or its header is
    wrong.
    """
    path = Path(path)
    suffix = rows_suffix(path)
    if path.suffix and not suffix:
        raise not_read(path)
    if path.is_dir():
        raise ValueError(f"{path}: a folder; expected a file, {FORMATS}")
    with reading(path, extra="data"):
        if suffix == ".json":
            with open_file(path) as file:
                if is_json_lines(file):
                    suffix = ".jsonl"
        with open_file(path) as file:
            if suffix in TABLES:
                yield from read_table_rows(file, suffix, keep_empty)
            elif suffix == ".json":
                yield from read_json_rows(file)
            elif suffix in CELLS:
                yield from read_cell_rows(file, suffix, keep_empty)
            else:
                yield from read_json_lines(file)


# Opening


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file to read its bytes, after unpacking if its name ends in .gz."""
    # Standard input may be a socket, which cannot be opened once more.
    is_stream = path == Path("/dev/stdin") and not path.is_file()
    with open(0, "rb", closefd=False) if is_stream else path.open("rb") as file:
        if path.suffix.lower() != ".gz":
            yield file
            return
        n_packed = path.stat().st_size
        with gzip.GzipFile(fileobj=file) as unpacked:
            limited = LimitedFile(unpacked, FREE_BYTES + MAX_INFLATION * n_packed)
            content = io.BufferedReader(limited)
            if rows_suffix(path) not in TABLES:
                yield content
                return
            with tempfile.TemporaryFile() as copy:  # because a parquet file is read from its end
                shutil.copyfileobj(content, copy)
                yield copy


class LimitedFile(io.RawIOBase):
    """A file that raises ValueError if more than `n_bytes` bytes are read from it."""

    def __init__(self, file: BinaryIO, n_bytes: int):
        self.file = file
        self.n_bytes = n_bytes
        self.n_left = n_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        content = self.file.read(len(buffer))
        self.n_left -= len(content)
        if self.n_left < 0:
            raise ValueError(
                f"more than {self.n_bytes} bytes after unpacking, expected at most {MAX_INFLATION} "
                "times the size of the file and 16 MB more: if that is right, unpack it with gunzip"
            )
        buffer[: len(content)] = content
        return len(content)


# Columns


def column_names(path: str | Path) -> list[str]:
    """Return the names of a file's columns, or an empty list if each row has its own, as in JSON.

    Raise ValueError if the file is damaged.
    """
    path = Path(path)
    suffix = rows_suffix(path)
    with reading(path, extra="data"), open_file(path) as file:
        if suffix in TABLES:
            _, schema = open_table(file, suffix)
            return list(schema.names)
        if suffix in CELLS:
            return read_header(file, suffix)
    return []


def read_label_names(path: str | Path) -> dict[str, list[str]]:
    """Return the names of the labels that a file of the `datasets` library has, by their column.

    Only .parquet and .arrow files have any. Raise ValueError if the file is damaged.
    """
    path = Path(path)
    suffix = rows_suffix(path)
    if suffix not in TABLES:
        return {}
    with reading(path, extra="data"), open_file(path) as file:
        return label_names(file, suffix)
