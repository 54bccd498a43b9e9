"""Read the rows of a file: .jsonl, .json, .csv, .tsv, .parquet and .arrow, and each of them in .gz.

A file is read piece by piece, so it may be larger than the memory. A bad row does not stop the
reading. A ValueError takes the place of the row, so one message can name all bad rows of all files.
"""

import csv
import gzip
import io
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from minia3.files.read import reading
from minia3.tasks.json_rows import as_row, is_json_lines, parse_json, read_json_rows
from minia3.tasks.table_rows import label_names, open_table, read_table_rows
from minia3.tasks.text_lines import MAX_ROW_BYTES, LineReader

CSV = {"strict": True}  # an error for a quote that is never closed
TSV = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
DELIMITERS = (",", ";", "\t")  # that a .csv file may have

# What an error of the csv module has in its text -> what it means.
CSV_ERRORS = {
    "expected after": 'text follows a closing quote: put the whole cell into quotes, and write "" '
    "for each quote in it",
    "new-line character": "a line end \\r without \\n: save the file with the line ends of Unix or "
    "Windows, or put the cell into quotes",
    "unexpected end of data": "a quote is never closed",
}
# For Excel alone, some programs write the delimiter into a line before the header.
EXCEL_LINE = re.compile(r"sep=.\s*", re.IGNORECASE)

TABLES = (".parquet", ".arrow")  # pyarrow reads them
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", *TABLES)
FORMATS = ".jsonl, .json, .csv, .tsv or .parquet, or each of them with .gz"

# What to do about files that people have, and that are not read.
REMEDIES = {
    (".xlsx", ".xls", ".ods"): "save the sheet as .csv, in UTF-8",
    (".zip", ".tar", ".tgz", ".7z", ".bz2", ".xz", ".zst"): "unpack it",
    (".ndjson", ".jl"): "name it .jsonl",
    (".pkl", ".pickle", ".feather", ".orc", ".avro", ".pq"): "save it as .parquet",
    (".txt", ".tab"): "name it .tsv if its columns have tabs between them",
}

# A .gz file may hold this many times its size, and 16 MB more, because a small file may hold the
# same row many times. (Texts shrink to a quarter. Zeros shrink to a thousandth, and fill the disk
# or the memory of whoever unpacks them.)
MAX_INFLATION = 100
FREE_BYTES = 1 << 24


class ChoicesCell(str):
    """A cell of the column `choices`. `parse_choices` makes a list of it for a task that picks one
    of the choices, or names an item. To another task, it is a text like that of any cell.
    """


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

    A byte order mark, Windows line ends and blank lines are ignored. A row that is larger than
    16 MB, or not UTF-8, or not JSON in a .json file, is the last to be read. Raise ValueError if
    the file cannot be opened or is damaged, or if its suffix or its header is wrong.
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
            elif suffix in (".csv", ".tsv"):
                yield from read_cells(LineReader(file), suffix, keep_empty)
            else:
                lines = LineReader(file)
                yield from number_rows(lines, iter(lines), parse_line, is_blank_line)


# Opening


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file to read its bytes, after unpacking if its name ends in .gz."""
    with path.open("rb") as file:
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
    """A file that raises ValueError instead of giving more than so many bytes."""

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


# Lines and cells


def number_rows(
    lines: LineReader, records: Iterator, parse: Callable, is_blank: Callable
) -> Iterator[tuple[int, dict | ValueError]]:
    """Yield (line number, row or error). A record is a line, or the list of its cells.

    is_blank: a function of a record. Blank ones are passed over.
    """
    while True:
        number = lines.begin_row()
        try:
            record = next(records, None)
            if record is None:
                return
            if is_blank(record):
                continue
            row = parse(record)
        except ValueError as error:
            row = ValueError(str(error))
        except csv.Error as error:
            row = ValueError(explain_csv(error))
        yield number, row


def explain_csv(error: csv.Error) -> str:
    """Return what an error of the csv module means, because its own words are for programmers."""
    text = str(error)
    for part, meaning in CSV_ERRORS.items():
        if part in text:
            return meaning
    return text


def is_blank_line(line: str) -> bool:
    return not line.strip()


def parse_line(line: str) -> dict:
    row = as_row(parse_json(line))
    if isinstance(row, ValueError):
        raise ValueError(f"{row}; a file with a list of objects is named .json")
    return row


def read_cells(
    lines: LineReader, suffix: str, keep_empty: bool
) -> Iterator[tuple[int, dict | ValueError]]:
    """Yield (line number, row or error) for a file with a header and cells."""
    header, records = open_cells(lines, suffix, skips_spaces=not keep_empty)
    parse = partial(parse_cells, header=header, keep_empty=keep_empty)

    def is_blank(cells):
        # In a file with a single column, "" is an empty cell. An empty line has no cell at all.
        is_row = len(header) == 1 and cells == [""]
        return not is_row and not any(map(str.strip, cells))

    yield from number_rows(lines, records, parse, is_blank)


def open_cells(
    lines: LineReader, suffix: str, skips_spaces: bool = True
) -> tuple[list[str], Iterator[list[str]]]:
    """Return the header of a file, and an iterator of the cells of each row.

    skips_spaces: whether the spaces before a quoted cell of a .csv file are left out.
    """
    allow_long_cells()
    rest = iter(lines)
    filled = filter(str.strip, rest)
    first_lines = [next(filled, "")]
    dialect = TSV
    if suffix == ".csv":
        if EXCEL_LINE.fullmatch(first_lines[0]):
            first_lines = [next(filled, "")]
        dialect = {**CSV, "delimiter": find_delimiter(first_lines, rest)}
    all_lines = chain(first_lines, rest)
    if suffix != ".csv" or not skips_spaces:
        records = csv.reader(all_lines, **dialect)
        return read_header(records), records
    # A Dialect, because this is a reader for each row, and each would make one out of a dict.
    read = partial(read_spaced_cells, rest=all_lines, dialect=csv.reader([], **dialect).dialect)
    header = read_header(map(read, all_lines))
    # `map`, because a generator would end at the first wrong row.
    return header, map(partial(read, n_cells=len(header)), all_lines)


def read_spaced_cells(
    line: str, rest: Iterator[str], dialect: csv.Dialect, n_cells: int | None = None
) -> list[str]:
    """Return the cells of the row that begins with a line of a .csv file.

    People put a space after a comma, as in `1, "a, b"`. Then the csv module reads three cells, with
    quotes in two of them. So the spaces before a cell are left out if the whole cell is in quotes.

    Such a row is taken only if it has one line and `n_cells` cells (None: any number). Otherwise,
    the csv module reads the line as it is, and the lines of `rest` that it needs to end the row.
    """
    end = dialect.delimiter
    if ' "' in line and re.search(f'(?:^|{end}) +"', line):
        quoted_cell = f'"[^"]*(?:""[^"]*)*"(?=[{end}\r\n]|\\Z)'
        other_cell = f"[^{end}]*"
        # The groups are all of a cell but the spaces before its quotes.
        cell = f"(^|{end})(?: *({quoted_cell})|({other_cell}))"
        without_spaces = re.sub(cell, r"\1\2\3", line)
        with suppress(csv.Error):
            cells = next(csv.reader([without_spaces], dialect))
            if n_cells in (None, len(cells)):
                return cells
    return next(csv.reader(chain([line], rest), dialect))


def allow_long_cells():
    """Let the csv module read a cell that is as long as a row may be. By default, it refuses cells
    of more than 131,072 characters.

    The module has one limit for the whole process. It is not put back, because another thread may
    be reading a file, too.
    """
    csv.field_size_limit(max(MAX_ROW_BYTES, csv.field_size_limit()))


def find_delimiter(lines: list[str], rest: Iterator[str]) -> str:
    """Return the delimiter that divides a header into the most cells. If in doubt, a comma.

    lines: the first line of the file. If a quoted cell of the header has line breaks, the lines
    that complete it are taken from `rest` and appended.
    """
    n_cells = {}
    for delimiter in DELIMITERS:
        records = csv.reader(read_on(lines, rest), delimiter=delimiter, strict=True)
        try:
            n_cells[delimiter] = len(next(records, []))
        except csv.Error:
            n_cells[delimiter] = 0  # such as a quote in the middle of a cell
    return max(DELIMITERS, key=n_cells.get)


def read_on(lines: list[str], rest: Iterator[str]) -> Iterator[str]:
    """Yield the lines, and then those of `rest`, which become lines, too."""
    yield from lines
    for line in rest:
        lines.append(line)
        yield line


def read_header(records: Iterator[list[str]]) -> list[str]:
    """Return the names of the columns. Raise ValueError if the first line is not a header."""
    try:
        cells = next(filter(None, records), [])
    except csv.Error as error:
        raise ValueError(explain_csv(error)) from None
    header = [name.strip() for name in cells]
    n_nameless = header.count("")
    if n_nameless > 1:  # a spreadsheet writes them if there is something beside the table
        raise ValueError(
            f"{n_nameless} columns have no name: delete them, or name them; found {header!r:.80}"
        )
    has_repeats = len(set(header)) < len(header)
    if not header or has_repeats:
        raise ValueError(f"expected a header, and no name twice; found {header!r:.80}")
    return header


def parse_cells(cells: list[str], header: list[str], keep_empty: bool) -> dict:
    if cells == header:
        raise ValueError("found the header again, expected a row: remove this line")
    if len(cells) != len(header):
        raise ValueError(
            f"expected {len(header)} cells, as in the header; found {len(cells)}: {cells!r:.80}"
        )
    row = dict(zip(header, cells, strict=True))
    if not keep_empty:
        row = {name: cell for name, cell in row.items() if cell}
    for name, cell in row.items():
        if name.lower() == "choices" and cell:
            row[name] = ChoicesCell(cell)
    return row


def parse_choices(cell: str) -> list:
    """Return the choices in a cell: a JSON list, or texts with | between them."""
    if cell.startswith("["):
        try:
            return parse_json(cell)
        except ValueError as error:
            raise ValueError(
                f"the choices begin with '[', so they are read as a JSON list: {error} (pandas "
                "writes lists in another form: save the rows as .jsonl or .parquet)"
            ) from None
    return [choice.strip() for choice in cell.split("|")]


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
        if suffix in (".csv", ".tsv"):
            header, _ = open_cells(LineReader(file), suffix)
            return header
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
