"""Read the rows of .csv and .tsv files: a header, and cells with commas or tabs between them."""

import csv
import re
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import BinaryIO

from minia3.tasks.json_rows import parse_json
from minia3.tasks.text_lines import MAX_ROW_BYTES, LineReader, number_rows

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
# For Excel, some programs write the delimiter into a line before the header.
EXCEL_LINE = re.compile(r'sep=(?:([^"\s]|\t)|.)\s*', re.IGNORECASE)


class BlankRow(dict):
    """A row whose cells are all empty. Spreadsheets write many of them after the last row."""


class ChoicesCell(str):
    """A cell of the column `choices`. `parse_choices` makes a list of it for a task that picks one
    of the choices, or names an item. To another task, it is a text like that of any cell.
    """


def read_cell_rows(
    file: BinaryIO, suffix: str, keep_empty: bool
) -> Iterator[tuple[int, dict | ValueError]]:
    """Yield (line number, row or error) for each row of a .csv or .tsv file.

    Rows of empty cells at the end of the file are left out (see `blank_row`). If another row
    follows, they count, because otherwise its result would stand a row too high.

    keep_empty: an empty cell is an empty text, and not missing; and spaces before a quote stay.
    """
    lines = LineReader(file)
    header, records = open_cells(lines, suffix, skips_spaces=not keep_empty)
    parse = partial(parse_cells, header=header, keep_empty=keep_empty)
    blank = {}
    blank_lines = array("q")  # and not their rows, because a small .gz may hold millions of them
    for number, row in number_rows(lines, records, parse):
        if isinstance(row, BlankRow):
            blank = row
            blank_lines.append(number)
            continue
        for blank_line in blank_lines:
            yield blank_line, dict(blank)
        del blank_lines[:]
        yield number, row


def read_header(file: BinaryIO, suffix: str) -> list[str]:
    """Return the names of the columns of a .csv or .tsv file."""
    header, _ = open_cells(LineReader(file), suffix)
    return header


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
        excel_line = EXCEL_LINE.fullmatch(first_lines[0])
        if excel_line:
            first_lines = [next(filled, "")]
        declared = excel_line and excel_line[1]
        dialect = {**CSV, "delimiter": declared or find_delimiter(first_lines, rest)}
    all_lines = chain(first_lines, rest)
    # `map`, because a generator would end at the first wrong row.
    if suffix != ".csv" or not skips_spaces:
        records = map(next_cells, repeat(csv.reader(all_lines, **dialect)))
        return take_header(records), records
    # A Dialect, because this is a reader for each row, and each would make one out of a dict.
    read = partial(read_spaced_cells, rest=all_lines, dialect=csv.reader([], **dialect).dialect)
    header = take_header(map(read, all_lines))
    return header, map(partial(read, n_cells=len(header)), all_lines)


def next_cells(records: Iterator[list[str]]) -> list[str]:
    """Return the next record of a reader of the csv module. Raise ValueError if it is wrong."""
    try:
        return next(records)
    except csv.Error as error:
        raise ValueError(explain_csv(error)) from None


def explain_csv(error: csv.Error) -> str:
    """Return what an error of the csv module means, because its own words are for programmers."""
    text = str(error)
    for part, meaning in CSV_ERRORS.items():
        if part in text:
            return meaning
    return text


def read_spaced_cells(
    line: str, rest: Iterator[str], dialect: csv.Dialect, n_cells: int | None = None
) -> list[str]:
    """Return the cells of the row that begins with a line of a .csv file.

    People put a space after a comma, as in `1, "a, b"`. Then the csv module reads three cells, with
    quotes in two of them. So the spaces before a cell are left out if the whole cell is in quotes.

    Such a row is taken only if it has one line and `n_cells` cells (None: any number). Otherwise,
    the csv module reads the line as it is, and the lines of `rest` that it needs to end the row.
    """
    end = re.escape(dialect.delimiter)
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
    return next_cells(csv.reader(chain([line], rest), dialect))


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


def take_header(records: Iterator[list[str]]) -> list[str]:
    """Return the names of the columns. Raise ValueError if the first line is not a header."""
    cells = next(filter(None, records), [])
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


def parse_cells(cells: list[str], header: list[str], keep_empty: bool) -> dict | None:
    """Return a row, or None if there is nothing in the line."""
    if not any(map(str.strip, cells)):
        return blank_row(cells, header, keep_empty)
    # The header of a second file that was appended may begin with a byte order mark.
    if [cell.removeprefix("\ufeff").strip() for cell in cells] == header:
        raise ValueError("found the header again, expected a row: remove this line")
    if len(cells) != len(header):
        raise ValueError(
            f"expected {len(header)} cells, as in the header; found {len(cells)}: {cells!r:.80}"
        )
    row = dict(zip(header, cells, strict=True))
    if not keep_empty:
        row = {name: cell for name, cell in row.items() if cell}
    for name, cell in row.items():
        if name.lower() == "choices":
            row[name] = ChoicesCell(cell)
    return row


def blank_row(cells: list[str], header: list[str], keep_empty: bool) -> dict | None:
    """Return the row of a line without texts, or None if the line has fewer cells than a row.

    In a file with a single column, an empty line is a row, too, because a sheet with an empty cell
    is written so. pandas writes "" for the cell, which is a row also at the end of the file.
    """
    if len(header) > 1 and len(cells) != len(header):
        return None
    row = dict.fromkeys(header, "") if keep_empty else {}
    return row if cells == [""] else BlankRow(row)


def parse_choices(cell: str) -> list | dict:
    """Return the choices in a cell: a JSON list, or ARC's object, or texts with | between them."""
    if cell.startswith(("[", "{'", '{"')):
        try:
            return parse_json(cell)
        except ValueError as error:
            raise ValueError(
                f"the choices begin with {cell[0]!r}, so they are read as JSON: {error} (pandas "
                "writes lists in another form: save the rows as .jsonl or .parquet)"
            ) from None
    return [choice.strip() for choice in cell.split("|")]


class QuotedCells:
    """Counts the cells of .tsv files that a program has put into quotes, which the model reads."""

    def __init__(self):
        self.n_doubled = 0  # cells in which each quote of the text is doubled, as pandas writes
        # (file, column) -> cells in quotes that have a comma. Excel writes these, even with tabs.
        self.n_with_comma = Counter()
        self.others = set()  # columns with a comma outside quotes, or with quotes for no reason
        self.n_divided = Counter()  # file -> cells with line breaks, if it has a single column
        self.divided = set()  # files in which such a cell has begun
        self.tables = set()  # files with several columns, in which a part of a row is an error

    def add(self, path: Path, row: dict):
        """Count the cells of a row. path: its .tsv file."""
        if len(row) > 1:
            self.tables.add(path)
        for name, cell in row.items():
            self.add_part(path, cell)
            is_quoted = len(cell) > 1 and cell.startswith('"') and cell.endswith('"')
            if is_quoted and '""' in cell[1:-1]:
                self.n_doubled += 1
            elif is_quoted and "," in cell:
                self.n_with_comma[path, name] += 1
            elif is_quoted or "," in cell:
                self.others.add((path, name))

    def add_part(self, path: Path, cell: str):
        """Count the cell that ends here, if a file with a single column has it in several rows."""
        if path in self.tables or cell.count('"') % 2 == 0:
            return
        if path in self.divided:
            self.divided.remove(path)
            self.n_divided[path] += cell.endswith('"')
        elif cell.startswith('"'):
            self.divided.add(path)

    def notes(self) -> list[str]:
        """Return a note for each program that seems to have written the files."""
        n_excel = sum(n for key, n in self.n_with_comma.items() if key not in self.others)
        n_divided = sum(n for path, n in self.n_divided.items() if path not in self.tables)
        counts = {
            "with each quote inside doubled": self.n_doubled,
            "as Excel puts cells that have a comma": n_excel,
            "with line breaks, which end rows here": n_divided,
        }
        notes = []
        for reason, n_cells in counts.items():
            are_quoted = "cell of .tsv files is" if n_cells == 1 else "cells of .tsv files are"
            if n_cells:
                notes.append(
                    f"{n_cells} {are_quoted} in quotes, {reason}. The model reads all of these "
                    "quotes: name the file .csv to leave them out"
                )
        return notes
