"""Check the rows of files.

One message names all bad rows of all files.
"""

from itertools import chain
from pathlib import Path

from minia3.tasks.prompts import check_fields
from minia3.tasks.row_files import read_rows
from minia3.tasks.task import TaskSpec

MAX_PROBLEMS = 5  # in one error message; the others are counted


def read_files(files: dict[str, list[Path]], spec: TaskSpec) -> dict[str, list[dict]]:
    """Return the checked rows of each split. `files` and the result have the splits as their keys.

    Raise one ValueError for everything that is wrong with any row of any file.
    """
    rows = {}
    problems = []
    for split, paths in files.items():
        rows[split] = []
        for path in paths:
            problems += read_file(path, spec, split, rows[split])
    if spec.has_user_rows:
        problems += find_mixed_kinds(rows, files)
    if len(problems) > MAX_PROBLEMS:
        n_others = len(problems) - MAX_PROBLEMS
        problems = [*problems[:MAX_PROBLEMS], f"and {n_others} more"]
    if problems:
        raise ValueError("; ".join(problems))
    return rows


def read_file(path: Path, spec: TaskSpec, split: str, rows: list[dict]) -> list[str]:
    """Append the good rows of a file to those of its split. Return a message for each bad row."""
    n_before = len(rows)
    problems = []
    for number, row in read_rows(path, keep_empty=not spec.has_user_rows):
        try:
            rows.append(check_row(row, spec, split, len(rows)))
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}")
    if len(rows) == n_before and not problems:
        problems.append(f"{path}: no rows")
    return problems


def find_mixed_kinds(rows: dict[str, list[dict]], files: dict[str, list[Path]]) -> list[str]:
    """Return a message if some rows have a target and others choices. (A task has one metric.)"""
    has_target = ["target" in row for row in chain.from_iterable(rows.values())]
    n_targets = sum(has_target)
    if n_targets in (0, len(has_target)):
        return []
    names = ", ".join(map(str, chain.from_iterable(files.values())))
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
    if spec.has_user_rows:
        check_user_row(row)
    row["label"] = read_label(row, spec, may_be_hidden=split == "test")
    if type(row.get("idx")) is not int:  # not isinstance, because a bool is an instance of int
        row["idx"] = number
    # The first prompt uses every field that any prompt of the task uses (a test says so).
    check_fields(spec.prompts[0], row)
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
