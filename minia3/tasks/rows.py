"""Check the rows of files. One message names all bad rows of all files."""

import math
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, groupby
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from minia3.files.messages import plural
from minia3.tasks.columns import is_conversation, names_in_task
from minia3.tasks.csv_rows import ChoicesCell, parse_choices
from minia3.tasks.format_strings import (
    check_items,
    column_of,
    field_names,
    label_of,
    plain_names,
    root_of,
    roots_of,
    value_of,
)
from minia3.tasks.labels import (
    INTEGER,
    LEARNED_LABELS,
    find_choice,
    find_label,
    find_user_label,
    label_text,
)
from minia3.tasks.messages import (
    SYSTEM_COLUMNS,
    check_messages,
    find_system_column,
    has_answer,
    in_openai_form,
    parse_tools,
)
from minia3.tasks.names import list_names, name_value, nearest_of
from minia3.tasks.prompts import Prompt, render
from minia3.tasks.row_files import column_names, read_rows
from minia3.tasks.task import TaskSpec

MAX_PROBLEMS = 5  # in one error message; the others are counted
PREDICTED = "predicted"  # the split of rows that are to be answered, whose answers do not matter
OPTIONAL = "input"  # the column that a file may lack: not every file of instructions has it


class FileRow(NamedTuple):
    """A row, and where it stands in a file."""

    path: Path
    number: int  # counts from 1; 0: the file has no rows
    row: dict | ValueError


def read_files(files: dict[str, list[Path]], keep_empty: bool) -> dict[str, list[FileRow]]:
    """Return the rows of each file, as they are. `files` and the result have splits as keys."""
    rows = {}
    for split, paths in files.items():
        rows[split] = []
        for path in paths:
            n_before = len(rows[split])
            rows[split] += [FileRow(path, *found) for found in read_rows(path, keep_empty)]
            if len(rows[split]) == n_before:
                rows[split].append(FileRow(path, 0, ValueError("no rows")))
    return rows


def check_files(
    rows: dict[str, list[FileRow]], files: dict[str, list[Path]], spec: TaskSpec
) -> dict[str, list[dict]]:
    """Return the checked rows of each split, and empty the lists of `rows`.

    Raise one ValueError for everything that is wrong with any row of any file.
    """
    checked = {}
    problems = []
    for split in files:
        checked[split], problems_of_split = check_split(rows[split], spec, split)
        problems += problems_of_split
    if not spec.is_published:
        problems += find_mixed_kinds(checked, files, spec)
    if len(problems) > MAX_PROBLEMS:
        n_others = len(problems) - MAX_PROBLEMS
        problems = [*problems[:MAX_PROBLEMS], f"and {n_others} more"]
    if problems:
        raise ValueError("; ".join(problems))
    return checked


def check_split(rows: list[FileRow], spec: TaskSpec, split: str) -> tuple[list[dict], list[str]]:
    """Return the good rows of a split, and a message for each bad one. Empty the list `rows`,
    because a large file should not be in the memory twice.
    """
    checked = []
    problems = []
    paths = dict.fromkeys(found.path for found in rows)
    columns = {path: column_names(path) for path in paths}
    lacking = find_lacking_files(rows, columns, spec)
    for path, found in groupby(rows, key=attrgetter("path")):
        columns[path] = columns[path] or find_rivals((row for _, _, row in found), spec)
    rows.reverse()
    while rows:
        path, number, row = rows.pop()
        try:
            checked.append(normalize_row(row, spec, split, len(checked), columns[path]))
        except ValueError as error:
            place = f"{path}:{number}" if number else path
            problems.append(f"{place}: {error}")
    return checked, problems or lacking


def find_mixed_kinds(
    rows: dict[str, list[dict]], files: dict[str, list[Path]], spec: TaskSpec
) -> list[str]:
    """Return a message if some rows have a target and others choices. (A task has one metric.)"""
    answers = [spec.answer_of(row) for row in chain.from_iterable(rows.values())]
    n_targets = answers.count("target")
    if n_targets in (0, len(answers)):
        return []
    names = ", ".join(map(str, chain.from_iterable(files.values())))
    return [
        f"{names}: {n_targets} rows have 'target', the others 'choices': expected rows of one kind"
    ]


# The columns of a file


def expected_names(spec: TaskSpec) -> list[str]:
    """Return the names of the fields that the task uses."""
    if spec.messages:
        return [spec.messages, "tools", *SYSTEM_COLUMNS]
    names = [spec.label_field, column_of(spec.label_field)]
    for prompt in spec.prompts:
        names += roots_of(prompt.templates)
        if not prompt.choices and not prompt.target:
            names += ("choices", "target")
    return names


def task_names(columns: Iterable[str], spec: TaskSpec) -> dict[str, str]:
    """Return the columns of a file that a task keeps: name in the file -> name in the task."""
    expected = () if spec.is_published else expected_names(spec)
    return names_in_task(tuple(columns), tuple(spec.fields.items()), tuple(expected))


def check_columns(columns: Iterable[str], spec: TaskSpec):
    """Raise ValueError if a user's file lacks a column that the model reads.

    columns: of the file, as it spells them. A column may be empty in a row, and then the model
    reads the others. But a file without the column was meant for something else, or misspells it.
    """
    if spec.is_published or spec.messages or spec.span_field:
        return  # each row is checked
    found = task_names(columns, spec).values()
    for prompt in spec.prompts:
        for name in plain_names(prompt.text):
            if name not in found and name != OPTIONAL:
                raise ValueError(
                    f"there is no column {name!r}, which the model reads (it may be empty)"
                    f"{nearest_of(name, columns)}"
                )


def find_lacking_files(
    rows: list[FileRow], columns: Mapping[Path, list[str]], spec: TaskSpec
) -> list[str]:
    """Return a message for each file that lacks a column of the input.

    columns: of each file, see `column_names`. A file of JSON has the columns of all of its rows.
    """
    messages = []
    for path, found in groupby(rows, key=attrgetter("path")):
        try:
            check_columns(columns[path] or columns_of_rows(row for _, _, row in found), spec)
        except ValueError as error:
            messages.append(f"{path}: {error}")
    return messages


def columns_of_rows(rows: Iterable[dict | ValueError]) -> list[str]:
    """Return the columns that any row has."""
    columns = {}
    for row in rows:
        if isinstance(row, dict):
            columns |= dict.fromkeys(row)
    return list(columns)


def find_rivals(rows: Iterable[dict | ValueError], spec: TaskSpec) -> list[str]:
    """Return the columns that share a row with a column for which the task has the same name.

    They are two columns in the whole file of JSON: `Label` does not stand in for `label` in a row
    that lacks it. If no row has both, they are two spellings of one column.
    """
    found = {}
    for columns in dict.fromkeys(tuple(row) for row in rows if isinstance(row, dict)):
        names = {column: task_names([column], spec)[column] for column in columns}
        n_columns = Counter(names.values())
        found |= dict.fromkeys(column for column in columns if n_columns[names[column]] > 1)
    return list(found)


def empty_columns(row: dict, prompt: Prompt) -> list[str]:
    """Return the columns that the model reads and that are empty in a checked row of a user.

    An instruction often has no input or context, so these columns do not count.
    """
    names = field_names(prompt.text)
    optional = {OPTIONAL}
    if "instruction" in names:
        optional.add("context")
    return [name for name in names if row.get(name) == "" and name not in optional]


def describe_empty(n_rows: Mapping[str, int]) -> list[str]:
    """Return a note on each column that is empty in some rows, because the file may be damaged.

    n_rows: in how many rows each column is empty.
    """
    return [f"{name!r} is empty in {n} {plural(n, 'row')}" for name, n in n_rows.items()]


# A row


def normalize_row(
    row: dict | ValueError, spec: TaskSpec, split: str, number: int, columns: Iterable[str] = ()
) -> dict:
    """Return a row with an integer `label` (-1: unlabeled) and an integer `idx`.

    number: the `idx` of the row, if its file has none that is an integer. columns: of its file, see
    `column_names` and `find_rivals`.

    Raise ValueError if something is wrong with the row. If the row is itself a ValueError (see
    `read_rows`), raise it. Only rows of the split "test" may lack a label. The answers of the split
    PREDICTED are not read.
    """
    if isinstance(row, ValueError):
        raise row
    # A row lacks the columns in which its cells are empty, and no other column takes their place.
    names = task_names(dict.fromkeys((*columns, *row)), spec)
    row = {names[column]: value for column, value in row.items() if column in names}
    with naming_columns(names | dict(spec.fields)):
        if spec.span_field:
            unpack_spans(row, spec.span_field)
        if not spec.is_published:
            normalize_user_row(row, spec, split, set(names.values()))
        label = -1
        if split != PREDICTED:
            label = read_label(row, spec, may_be_hidden=split == "test")
        row["label"] = label
        row["idx"] = read_idx(row.get("idx"), number)
        if spec.is_published:
            # The first prompt uses every field that any prompt of the task uses (a test says so).
            render(spec.prompts[0], row)
        else:
            check_prompts(row, spec, split)
            write_items(row, spec.prompts)
    return row


@contextmanager
def naming_columns(fields: Mapping[str, str]) -> Iterator[None]:
    """Give a message that begins with the name of a field the name of its column in the file.

    fields: name in the file -> name in the task.
    """
    try:
        yield
    except ValueError as error:
        message = str(error)
        for column, field in fields.items():
            if message.startswith((f"{field!r} is ", f"{field!r} has ")):
                message = repr(column) + message.removeprefix(repr(field))
                break
        raise ValueError(message) from None


def read_idx(value, number: int) -> int:
    """Return a row's `idx` if it is an integer, also as a text of a .csv file, or else `number`.

    pandas writes an integer beside an empty cell as 100.0.
    """
    is_number = isinstance(value, str | int | float) and not isinstance(value, bool)
    text = label_text(value) if is_number else None
    return int(text) if text and INTEGER.fullmatch(text) else number


def read_label(row: dict, spec: TaskSpec, may_be_hidden: bool) -> int:
    """Return the label of a row as an integer, or -1 if it is hidden."""
    field = spec.label_field
    if spec.is_published:
        return find_label(row.get(field), spec.labels, field, may_be_hidden)
    if spec.answer_of(row) == "messages":
        return 0 if has_answer(row["messages"]) else -1
    if spec.answer_of(row) == "target":
        return 0  # the text to write is the only choice, and the right one
    if spec.labels:
        value = label_of(row, field)
        advice = LEARNED_LABELS if spec.is_learned else ""
        return find_user_label(value, spec.labels, spec.prompts[0], field, may_be_hidden, advice)
    return find_choice(label_of(row, field), row["choices"], field, may_be_hidden)


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


# The fields of a user's row


def normalize_user_row(row: dict, spec: TaskSpec, split: str, in_file: Container[str]):
    """Give a user's row empty texts in place of missing ones. Raise ValueError if it lacks a text
    that it should have.

    in_file: the columns of its file, by their names in the task.
    """
    if spec.answer_of(row) == "messages":
        normalize_conversation(row, split)
        return
    row.pop("messages", None)  # a column that is not used
    list_choices(row, spec)
    if not spec.prompts[0].choices and not spec.prompts[0].target:
        letters = unpack_choices(row)
        if split != PREDICTED:
            find_letter(row, spec.label_field, letters)
    for prompt in spec.prompts:
        check_input(row, prompt, in_file)
        if prompt.choices or split != PREDICTED:
            for text in prompt.choices or (prompt.target,):
                to_texts(row, plain_names(text), in_file)
    first = spec.prompts[0]
    if not first.choices and not first.target:
        check_own_answer(row, split, in_file)


def list_choices(row: dict, spec: TaskSpec):
    """Make lists of the cells of choices, if the task picks one of them or names an item."""
    cells = {name for name, value in row.items() if isinstance(value, ChoicesCell)}
    if "choices" in spec.fields.values() and is_text(row.get("choices")):
        cells.add("choices")  # the column has another name in the file, so `read_rows` did not know
    if not cells:
        return
    first = spec.prompts[0]
    lists = set() if first.choices or first.target else {"choices"}
    for text in chain.from_iterable(prompt.templates for prompt in spec.prompts):
        lists |= {root_of(name) for name in field_names(text) if root_of(name) != name}
    for name in cells & lists:
        row[name] = parse_choices(row[name])


def unpack_choices(row: dict) -> list[str]:
    """Make a list of an object of choices and their letters, and return the letters.

    ARC, CommonsenseQA and OpenBookQA have {"text": ["red", "blue"], "label": ["A", "B"]}.
    """
    choices = row.get("choices")
    if not isinstance(choices, dict) or choices.keys() != {"text", "label"}:
        return []
    letters = choices["label"]
    are_pairs = isinstance(choices["text"], list) and isinstance(letters, list)
    if not are_pairs or len(letters) != len(choices["text"]):
        return []
    row["choices"] = choices["text"]
    return [str(letter).strip() for letter in letters]  # which may be numbers


def find_letter(row: dict, label_field: str, letters: list[str]):
    """Put the position of the right choice in place of its letter. A label may also be its words.

    Raise ValueError for the text of a number that is no letter: it could count from 0 or from 1.
    """
    label = label_of(row, label_field)
    is_scalar = isinstance(label, str | int | float)
    right = label_text(label) if is_scalar else None
    if right in letters:
        row[label_field] = letters.index(right)
        return
    is_number = isinstance(label, str) and INTEGER.fullmatch(right or "")
    if letters and is_number and right != "-1":
        raise ValueError(
            f"{label_field!r} is {label!r}, expected the letter of a choice: "
            f"{list_names(letters):.80}"
        )


def check_input(row: dict, prompt: Prompt, in_file: Container[str]):
    """Raise ValueError if the fields of a prompt's text are not texts, or all of them are empty.

    A field may be empty if another one is not, such as the input of an instruction.
    """
    names = plain_names(prompt.text)
    filled = [name for name in names if not is_missing(row.get(name))]
    if filled:
        for name in names:
            if is_missing(row.get(name)):
                row[name] = ""
        names = [name for name in names if row[name] != ""]
    to_texts(row, names, in_file, advice=" (--input says what the model reads)")


def to_texts(row: dict, names: Iterable[str], in_file: Container[str], advice: str = ""):
    """Make texts of the numbers and booleans in these fields. Raise ValueError for anything else.

    in_file: see `normalize_user_row`. advice: what the message says if there is no such column.
    """
    for name in names:
        value = row.get(name)
        if is_number(value):
            row[name] = label_text(value)  # "3" for 3.0, and "true" for True
        elif not is_text(value):
            found = ""
            if name not in row and name not in in_file:
                found = nearest_of(name, row) + advice
            elif is_conversation(value):
                found = "; a conversation has all of its turns in one column, 'messages'"
            elif isinstance(value, list) and value:
                found = f"; {{{name}[0]}} names its first item"
            elif isinstance(value, dict) and value:
                found = f"; {{{name}[{next(iter(value))}]}} names an item of it"
            expected = f"expected a text that is not empty{found}"
            raise ValueError(f"{name_value(name, value, 80)}, {expected}")


def check_own_answer(row: dict, split: str, in_file: Container[str]):
    """Raise ValueError unless a row has either a target or choices of its own."""
    if split == PREDICTED:
        row.pop("target", None)
        if row.get("choices") is None:
            row.pop("choices", None)
            return
    for name, other in (("target", "choices"), ("choices", "target")):
        if row.get(name) is None and row.get(other) is not None:
            row.pop(name, None)
    if ("target" in row) == ("choices" in row):
        raise ValueError(
            f"expected either 'target', or 'choices' and 'label'; found {list(row)!r:.100}"
        )
    if "target" in row:
        to_texts(row, ["target"], in_file)
    elif not are_choices(row["choices"]):
        raise ValueError(
            f"'choices' is {row['choices']!r:.80}, "
            "expected a list of texts that differ and are not empty"
        )


def are_choices(value) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(map(is_text, value)) and len(set(map(str.strip, value))) == len(value)


def normalize_conversation(row: dict, split: str):
    """Give the messages of a row OpenAI's form, and the system message of a column beside them.
    Make a list of the row's tools.

    Raise ValueError if they are not a conversation, or if there is no answer to learn.
    """
    row.setdefault("messages", None)
    if isinstance(row["messages"], list):
        messages = list(map(in_openai_form, row["messages"]))
        system_column = find_system_column(row, messages)
        if messages and system_column:
            messages = [{"role": "system", "content": row[system_column]}, *messages]
        row["messages"] = messages
    if "tools" in row:
        row["tools"] = parse_tools(row["tools"])
    check_messages(row, needs_answer=split not in ("test", PREDICTED))


def is_missing(value) -> bool:
    is_nan = isinstance(value, float) and math.isnan(value)
    return value is None or is_nan or (isinstance(value, str) and not value.strip())


def is_number(value) -> bool:
    """Return whether a value is a number or a boolean, and not NaN."""
    return isinstance(value, int | float) and not is_missing(value)


def is_text(value) -> bool:
    return isinstance(value, str) and bool(value.strip())


# A row in the words of its prompts


def check_prompts(row: dict, spec: TaskSpec, split: str):
    """Raise ValueError if a user's row lacks a field of a prompt, or has no text in it."""
    if spec.answer_of(row) == "messages":
        return
    for prompt in spec.prompts:
        if split == PREDICTED:
            prompt = without_target(prompt, row)
        render(prompt, row)
        check_values(prompt, row)


def check_values(prompt: Prompt, row: dict):
    """Raise ValueError if a prompt would put a null or a list into words, or write an empty text.

    `normalize_user_row` has checked the columns that are used as a whole. This is about their
    items: {answers[text]} may be a list, which would become "['Denver']".
    """
    answers = prompt.choices or (prompt.target,)
    for text in (prompt.text, *answers):
        for name in field_names(text):
            check_items(row, name)
            value = value_of(row, name)
            if not is_number(value) and not isinstance(value, str):
                advice = f"; {{{name}[0]}} is its first item" if isinstance(value, list) else ""
                raise ValueError(f"{name_value(name, value, 80)}, expected a text{advice}")
    kind = "choice" if prompt.choices else "target"
    for text in filter(None, answers):
        if not text.format_map(row).strip():
            raise ValueError(f"the {kind} {text!r:.60} is empty, expected a text")


def without_target(prompt: Prompt, row: dict) -> Prompt:
    """Return the prompt for a row that is to be answered.

    If the answer is a text, the target becomes "?", because a row cannot be put into words without
    a target. Nothing reads this one.
    """
    has_choices = prompt.choices or "choices" in row
    if prompt.target or not has_choices:
        return prompt._replace(target="?")
    return prompt


def write_items(row: dict, prompts: Iterable[Prompt]):
    """Turn numbers into texts in the lists and objects that prompts index, as in {answers[0]}."""
    templates = chain.from_iterable(prompt.templates for prompt in prompts)
    for name in chain.from_iterable(map(field_names, templates)):
        root = root_of(name)
        if root != name and isinstance(row.get(root), list | dict):
            row[root] = with_texts(row[root])


def with_texts(value):
    """Return a value of JSON with texts in place of its numbers, however deep they are."""
    if isinstance(value, list):
        return [with_texts(entry) for entry in value]
    if isinstance(value, dict):
        return {name: with_texts(entry) for name, entry in value.items()}
    return label_text(value) if is_number(value) else value
