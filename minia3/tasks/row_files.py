"""Read the rows of a file: .jsonl, .csv and .tsv.

A file is read line by line, so it may be larger than the memory. A bad row does not stop the
reading. A ValueError takes the place of the row, so one message can name all bad rows of all files.
"""

import csv
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

DIALECTS = {
    ".csv": {"strict": True},  # an error for a quote that is never closed
    ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE},
}
MAX_ROW_BYTES = 1 << 24  # 16 MB


class LineReader:
    """The lines of a file as text. It counts the lines, and limits the bytes of a row.

    A row of a csv file may have several lines, so the limit is on the bytes since `begin_row`. No
    file can fill the memory, neither with an endless line nor with a quote that is never closed.
    """

    def __init__(self, file: BinaryIO):
        self.file = file
        self.n_lines = 0
        self.n_row_bytes = 0

    def begin_row(self) -> int:
        """Return the number of the next line, which begins a row."""
        self.n_row_bytes = 0
        return self.n_lines + 1

    def __iter__(self) -> Iterator[str]:
        """Yield the lines.

        A line that is too long or not UTF-8 is the last, because a generator ends when it raises.
        (After half a line, the line numbers would be wrong. A file in another encoding should cause
        one error, and not an error for each line.)
        """
        while True:
            # Only \n ends a line, because a text in a row may contain other line ends, such as
            # U+2028.
            line = self.file.readline(MAX_ROW_BYTES + 1)
            if not line:
                return
            self.n_lines += 1
            self.n_row_bytes += len(line)
            if self.n_row_bytes > MAX_ROW_BYTES:
                raise ValueError(
                    f"a row of more than {MAX_ROW_BYTES} bytes: is a line end or a quote missing?"
                )
            yield self.decode(line)

    def decode(self, line: bytes) -> str:
        is_first = self.n_lines == 1
        encoding = "utf-8-sig" if is_first else "utf-8"  # "sig" drops the byte order mark
        try:
            return line.decode(encoding)
        except UnicodeDecodeError as error:
            raise ValueError(f"{error}: save the file as UTF-8") from None


def read_rows(
    path: str | Path, keep_empty: bool = False
) -> Iterator[tuple[int, dict | ValueError]]:
    """Yield (number of the first line, dict or ValueError) for each row of a file.

    - .jsonl (and any other name): a JSON object on each line.
    - .csv: a header, and cells with commas between them. An empty cell counts as missing. `choices`
      is a JSON list, or texts with | between them.
    - .tsv: a header, and cells with tabs between them. Quotes are ordinary characters.

    keep_empty: an empty cell is an empty text, and not missing.

    A byte order mark, Windows line ends and blank lines are ignored. A row that is larger than
    16 MB or not UTF-8 is the last to be read. Raise ValueError if the file cannot be opened, or its
    header is wrong.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            lines = LineReader(file)
            if path.suffix in DIALECTS:
                records = csv.reader(lines, **DIALECTS[path.suffix])
                header = read_header(records)
                parse = partial(parse_cells, header=header, keep_empty=keep_empty)
            else:
                records = iter(lines)
                parse = parse_line
            yield from parse_records(lines, records, parse)
    except (OSError, ValueError, csv.Error) as error:
        reason = getattr(error, "strerror", error)
        raise ValueError(f"{path}: {reason}") from None


def parse_records(
    lines: LineReader, records: Iterator, parse: Callable
) -> Iterator[tuple[int, dict | ValueError]]:
    """Yield (line number, row or error). A record is a line, or the list of its cells."""
    while True:
        number = lines.begin_row()
        try:
            record = next(records, None)
            if record is None:
                return
            is_blank = not any(part.strip() for part in record)  # of characters, or of cells
            if is_blank:
                continue
            row = parse(record)
        except (ValueError, csv.Error) as error:
            row = ValueError(str(error))
        yield number, row


def parse_line(line: str) -> dict:
    row = parse_json(line)
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, found {line[:40]!r}")
    return row


def parse_json(text: str):
    try:
        value = json.loads(text)
        # JSON can spell half a surrogate pair ("\ud83d"), which is not a character, and which no
        # tokenizer accepts.
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", error)
        raise ValueError(f"not JSON: {reason}: {text[:40]!r}") from None
    return value


def read_header(records: Iterator[list[str]]) -> list[str]:
    """Return the names of the columns. Raise ValueError if the first line is not a header."""
    header = next(filter(None, records), [])
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
    choices = row.get("choices")
    if choices:
        row["choices"] = parse_choices(choices)
    return row


def parse_choices(cell: str) -> list:
    if cell.startswith("["):
        return parse_json(cell)
    return [choice.strip() for choice in cell.split("|")]
