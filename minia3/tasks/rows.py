"""Read rows from .jsonl, .csv and .tsv files, and check them.

A file is read line by line, so it may be larger than the memory. A bad row does not stop the
reading. A ValueError takes the place of the row, so one message can name all bad rows of all files.
"""

import csv
import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from minia3.tasks.messages import check_messages, has_answer
from minia3.tasks.prompts import check_fields
from minia3.tasks.task import TaskSpec

DIALECTS = {
    ".csv": {"strict": True},  # an error for a quote that is never closed
    ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE},
}
MAX_ROW_BYTES = 1 << 24  # 16 MB
MAX_PROBLEMS = 5  # in one error message; the others are counted

# Reading files


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
    path: str | Path, column: str | None = "input"
) -> Iterator[tuple[int, dict | ValueError]]:
    """Yield (number of the first line, dict or ValueError) for each row of a file.

    - .jsonl (and any other name): a JSON object on each line.
    - .csv: a header, and cells with commas between them. An empty cell counts as missing. `choices`
      is a JSON list, or texts with | between them.
    - .tsv: a header, and cells with tabs between them. Quotes are ordinary characters.

    column: a name that the header must have; None accepts any header, and keeps empty cells.

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
                header = read_header(records, column)
                parse = partial(parse_cells, header=header, keep_empty=column is None)
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


def read_header(records: Iterator[list[str]], column: str | None) -> list[str]:
    """Return the names of the columns. Raise ValueError if the first line is not a header."""
    header = next(filter(None, records), [])
    has_repeats = len(set(header)) < len(header)
    is_without_column = column is not None and column not in header
    if not header or has_repeats or is_without_column:
        expected = "a header" if column is None else f"a header with {column!r}"
        raise ValueError(f"expected {expected}, and no name twice; found {header!r:.80}")
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


def read_files(files: dict[str, Path], spec: TaskSpec) -> dict[str, list[dict]]:
    """Return the checked rows of each file. `files` and the result have the splits as their keys.

    Raise one ValueError for everything that is wrong with any row of any file.
    """
    rows = {}
    problems = []
    for split, path in files.items():
        rows[split], problems_of_file = read_file(path, spec, split)
        problems += problems_of_file
    if spec.has_user_rows:
        problems += find_mixed_kinds(rows, files)
    if len(problems) > MAX_PROBLEMS:
        n_others = len(problems) - MAX_PROBLEMS
        problems = [*problems[:MAX_PROBLEMS], f"and {n_others} more"]
    if problems:
        raise ValueError("; ".join(problems))
    return rows


def read_file(path: Path, spec: TaskSpec, split: str) -> tuple[list[dict], list[str]]:
    """Return the good rows of a file, and a message for each bad one."""
    column = "input" if spec.has_user_rows else None
    rows = []
    problems = []
    for number, row in read_rows(path, column):
        try:
            rows.append(check_row(row, spec, split, len(rows)))
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}")
    if not rows and not problems:
        problems.append(f"{path}: no rows")
    return rows, problems


def find_mixed_kinds(rows: dict[str, list[dict]], files: dict[str, Path]) -> list[str]:
    """Return a message if some rows have a target and others choices. (A task has one metric.)"""
    has_target = ["target" in row for row in chain.from_iterable(rows.values())]
    n_targets = sum(has_target)
    if n_targets in (0, len(has_target)):
        return []
    names = ", ".join(map(str, files.values()))
    return [
        f"{names}: {n_targets} rows have 'target', the others 'choices': expected rows of one kind"
    ]


# Checking rows


def check_row(row: dict | ValueError, spec: TaskSpec, split: str, number: int) -> dict:
    """Return a row with an integer `label` (-1: unlabeled) and an integer `idx`.

    number: the `idx` of the row, if it has none in its file.

    Raise ValueError if something is wrong with the row. If the row is itself a ValueError (see
    `read_rows`), raise it. Only rows of the split "test" may lack a label.
    """
    if isinstance(row, ValueError):
        raise row
    row = {spec.fields.get(name, name): value for name, value in row.items()}
    if spec.span_field:
        unpack_spans(row, spec.span_field)
    if spec.has_user_rows and "messages" in row:
        return check_chat_row(row, split, number)
    if spec.has_user_rows:
        check_user_row(row)
    row["label"] = read_label(row, spec, may_be_hidden=split == "test")
    if type(row.get("idx")) is not int:  # not isinstance, because a bool is an instance of int
        row["idx"] = number
    # The first prompt uses every field that any prompt of the task uses (a test says so).
    check_fields(spec.prompts[0], row)
    return row


def check_chat_row(row: dict, split: str, number: int) -> dict:
    """Return a row of messages with `label` 0, or -1 if it has no answer, and an integer `idx`."""
    check_messages(row, needs_answer=split != "test")
    row["label"] = 0 if has_answer(row["messages"]) else -1
    if type(row.get("idx")) is not int:
        row["idx"] = number
    return row


def check_user_row(row: dict):
    """Raise ValueError if a user's row lacks a text that it should have."""
    if ("target" in row) == ("choices" in row):
        raise ValueError(
            f"expected either 'target', or 'choices' and 'label'; found {list(row)!r:.100}"
        )
    texts = {"input": row.get("input")}
    if "target" in row:
        texts["target"] = row["target"]
    for name, text in texts.items():
        if not is_text(text):
            raise ValueError(f"{name!r} is {text!r:.80}, expected a text that is not empty")
    if "choices" in row and not are_choices(row["choices"]):
        raise ValueError(
            f"'choices' is {row['choices']!r:.80}, "
            "expected a list of texts that differ and are not empty"
        )


def is_text(value) -> bool:
    return isinstance(value, str) and bool(value.strip())


def are_choices(value) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(map(is_text, value)) and len(set(value)) == len(value)


def read_label(row: dict, spec: TaskSpec, may_be_hidden: bool) -> int:
    """Return the label of a row as an integer, or -1 if it is hidden."""
    if not spec.has_user_rows:
        return find_label(row.get(spec.label_field), spec.labels, spec.label_field, may_be_hidden)
    if "target" in row:
        return 0  # the target is the only choice, and the right one
    indices = [str(i) for i in range(len(row["choices"]))]
    return find_label(row.get("label"), indices, "label", may_be_hidden)


def find_label(value, labels: list[str], field: str, may_be_hidden: bool) -> int:
    """Return the index of a label, or -1 if it is hidden. Raise ValueError if it is neither."""
    lower_labels = [label.lower() for label in labels]
    text = str(value).lower()  # files have 1, true, "true" and "True"
    if text in lower_labels:
        return lower_labels.index(text)
    if type(value) is int and 0 <= value < len(labels):  # T-Few's published splits hold the index
        return value
    if may_be_hidden and text in ("none", "-1", ""):
        return -1
    raise ValueError(f"{field!r} is {value!r:.40}, expected one of {', '.join(labels):.80}")


def unpack_spans(row: dict, field: str):
    """Replace WSC's object `field` by its entries, and spell the two spans as in the text.

    This follows the "fixed" variant of WSC, on which T-Few trains: if a span does not occur in the
    text, it takes the spelling at the span's index in the text, provided that only the case, line
    breaks or a full stop differ.
    """
    try:
        row |= row.pop(field, {})
        for prefix in ("span1", "span2"):
            span = row[f"{prefix}_text"]
            normalized = span.rstrip(".").replace("\n", " ")
            words_from_index = row["text"].split()[row[f"{prefix}_index"] :]
            text_at_index = " ".join(words_from_index)[: len(normalized)]
            if span not in row["text"] and text_at_index.lower() == normalized.lower():
                row[f"{prefix}_text"] = text_at_index
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        names = "span1_text, span1_index, span2_text and span2_index"
        raise ValueError(f"expected 'text', and {field!r} with {names} ({error})") from None
