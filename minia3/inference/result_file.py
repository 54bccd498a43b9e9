"""A file of results, .jsonl or .csv, which another run of the same command completes.

If the process is stopped, the same command counts the finished lines and continues after them.
"""

import csv
import io
import json
from typing import NamedTuple

from minia3.files.lock import lock_folder
from minia3.files.processes import from_first


class Layout(NamedTuple):
    """What the lines of a file of results look like."""

    to_csv: bool  # otherwise they are JSON objects
    kinds: tuple[tuple[str, ...], ...]  # the names of each kind of row. A csv has only one kind.


def write_results(path, lines, layout):
    """Write a file of results, or complete it: count its finished lines, and append the others.

    If the process was killed, the last line may be incomplete: it is cut, and the other lines stay
    as they are. They are not compared with the model or the rows: the caller must use the same.

    lines: a function from the number of a row to an iterator of the lines from this row on. Those
    of a csv begin with the header, if the number is 0. It is written with the first row. Each row
    is written before the next one is asked for.

    Return how many rows the file had already, and whether it has others now.
    Raise ValueError if another process is writing the file, or if it holds something else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():  # a device or a pipe, which holds nothing
        with path.open("wb", buffering=0) as device:
            return 0, write_lines(path, device, lines(from_first(0))) > 0
    # Without a buffer, so that nothing is left in it, to be written again, if the disk is full.
    with lock_folder(path.parent, path.name), path.open("a+b", buffering=0) as file:
        check_first_line(path, file, layout)
        n_rows, n_bytes = count_finished(path, layout.to_csv)
        file.truncate(n_bytes)
        new_lines = iter(lines(from_first(n_rows)))
        if layout.to_csv and n_rows == 0:
            new_lines = with_header(new_lines)
        return n_rows, write_lines(path, file, new_lines) > 0


def follow(lines):
    """Help another process that calls `write_results`: answer this process's share of the rows."""
    for _ in lines(from_first(None)):
        pass


def write_lines(path, file, lines):
    """Write each line whole, or not at all, and return how many there were.

    Raise OSError with the path if the disk is full.
    """
    n_lines = 0
    for line in lines:
        n_lines += 1
        rest = line.encode()
        n_written = 0
        try:
            while rest:  # a disk that is nearly full takes a part of a line
                n_bytes = file.write(rest)
                n_written += n_bytes
                rest = rest[n_bytes:]
        except OSError as error:
            if file.seekable() and n_written:
                file.truncate(file.tell() - n_written)
            raise OSError(error.errno, error.strerror, str(path)) from None
    return n_lines


def with_header(lines):
    """Yield the lines of a csv, with its header and its first row in a single text.

    So a mistake in the first row leaves an empty file. A header would stay behind, and the next
    command, with other columns, would be refused for it.
    """
    header = next(lines)
    yield header + next(lines, "")
    yield from lines


def check_first_line(path, file, layout):
    """Raise ValueError if the first line of a file, which may be cut short, is not one of these
    results.

    This keeps results from being appended to a file with other columns, or to some other file.
    """
    if layout.to_csv:
        expected = csv_line(layout.kinds[0]).encode()
    else:
        first_name = layout.kinds[0][0]
        expected = f"{{{json.dumps(first_name)}: ".encode()
    file.seek(0)
    found = file.read(len(expected))
    is_result = expected.startswith(found)
    if is_result and not layout.to_csv:
        file.seek(0)
        found = file.readline()
        is_result = not found.endswith(b"\n") or names_in(found) in layout.kinds
    if not is_result:
        message = f"{path} is not a file of these results: it begins with {found!r:.80}"
        names = " or ".join(map(", ".join, layout.kinds))
        raise ValueError(f"{message}, expected {names}. Give another --out, or remove it")


def names_in(line):
    """Return the names in a line if it is a JSON object, or None."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return tuple(row) if isinstance(row, dict) else None


def count_finished(path, to_csv):
    """Return how many complete rows a file has, and how many bytes it has up to their end.

    A csv's header without rows does not count, because it is written again.
    """
    n_header_lines = 1 if to_csv else 0
    n_lines = 0
    n_bytes = 0
    n_quotes = 0
    n_read = 0
    with path.open("rb") as file:
        for line in file:
            n_read += len(line)
            n_quotes += line.count(b'"')
            # A quoted text of a csv may hold line breaks: the quote is open if their number is odd.
            is_open = to_csv and n_quotes % 2 == 1
            if line.endswith(b"\n") and not is_open:
                n_lines += 1
                n_bytes = n_read
    if n_lines <= n_header_lines:
        return 0, 0
    return n_lines - n_header_lines, n_bytes


def csv_line(cells):
    """Return a line of a .csv file. None is an empty cell, and whatever is not a text is JSON."""
    texts = []
    for cell in cells:
        if cell is None:
            texts.append("")
        elif isinstance(cell, str):
            texts.append(cell)
        else:
            texts.append(json.dumps(cell))
    line = io.StringIO()
    csv.writer(line).writerow(texts)
    return line.getvalue()
