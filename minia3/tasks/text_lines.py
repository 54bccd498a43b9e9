"""Read a file as UTF-8 text. If it is not UTF-8, say what it probably is."""

import re
from collections.abc import Callable, Iterator
from typing import BinaryIO

from minia3.files.read import problem_of_content

MAX_ROW_BYTES = 1 << 24  # 16 MB

# The first bytes of files that are often given a wrong name -> what they are.
MAGIC = {
    b"\x1f\x8b": "a gzip file: add .gz to its name",
    b"PK\x03\x04": "a zip or Excel file: save the table as .csv",
    b"PAR1": "a parquet file: name it .parquet",
    b"\xff\xfe": "UTF-16: save the file as UTF-8, as `iconv -f utf-16 -t utf-8 OLD > NEW` does",
    b"\xfe\xff": "UTF-16: save the file as UTF-8, as `iconv -f utf-16 -t utf-8 OLD > NEW` does",
}


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
            is_first = self.n_lines == 1
            if is_first and problem_of_content(line):
                raise ValueError(problem_of_content(line))
            yield decode(line, is_first)


def number_rows(
    lines: LineReader, records: Iterator, parse: Callable
) -> Iterator[tuple[int, dict | ValueError]]:
    """Yield (line number, row or error) for each record: a line, or the list of its cells.

    parse: a function from a record to its row, or to None if the record is blank.
    """
    while True:
        number = lines.begin_row()
        try:
            record = next(records, None)
            if record is None:
                return
            row = parse(record)
        except ValueError as error:
            row = ValueError(str(error))
        if row is not None:
            yield number, row


def decode(line: bytes, is_first: bool) -> str:
    """Return bytes as text. Raise ValueError if they are not UTF-8, or hold a null byte."""
    encoding = "utf-8-sig" if is_first else "utf-8"  # "sig" drops the byte order mark
    try:
        text = line.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(explain_bytes(line, is_first, error)) from None
    if "\0" in text:
        # UTF-16 without a byte order mark looks like this, and so does a file that a crash left.
        null_byte = "a null byte: expected text in UTF-8, so save the file as UTF-8"
        raise ValueError(explain_beginning(line, is_first) or null_byte)
    return text


def explain_beginning(content: bytes, is_first: bool) -> str:
    """Return what a file is whose first bytes are known, or an empty text."""
    if is_first:
        for magic, meaning in MAGIC.items():
            if content.startswith(magic):
                return f"not UTF-8, but {meaning}"
    return ""


def explain_bytes(content: bytes, is_first: bool, error: UnicodeDecodeError) -> str:
    """Return what the bytes are instead of UTF-8, and what to do.

    is_first: whether the bytes are the beginning of a file.
    """
    known = explain_beginning(content, is_first)
    if known:
        return known
    byte = content[error.start]
    # Texts of Windows in Latin letters are cp1252, which has all letters of latin-1. As latin-1,
    # their dashes and curly quotes would become control characters.
    before = re.sub(rb"[^ -~]", b"?", content[max(0, error.start - 20) : error.start]).decode()
    return (
        f"not UTF-8: byte 0x{byte:02x} after {before!r}; save the file as UTF-8 "
        "(if it is from Windows: `iconv -f cp1252 -t utf-8 OLD > NEW`)"
    )
