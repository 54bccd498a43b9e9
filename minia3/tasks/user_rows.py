"""Read a user's rows: find their files, understand their columns, and check them."""

import os
from collections import Counter
from itertools import chain, groupby
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from minia3.tasks.column_flags import ColumnFlags, with_label_names
from minia3.tasks.columns import Columns
from minia3.tasks.csv_rows import QuotedCells
from minia3.tasks.format_strings import final_field
from minia3.tasks.known_tasks import SHIPPED
from minia3.tasks.labels import INTEGER, count_labels
from minia3.tasks.library_data import find_hub_files, find_saved_files
from minia3.tasks.names import fold_case, list_names
from minia3.tasks.row_files import not_read, read_label_names, rows_suffix
from minia3.tasks.rows import FileRow, check_files, describe_empty, empty_columns, read_files
from minia3.tasks.split_files import (
    HUB_PREFIX,
    TASK_FILE,
    FoundFiles,
    find_split_files,
    unknown_task,
)
from minia3.tasks.task import TaskSpec
from minia3.tasks.understanding import Understanding, check_fields, has_columns, understand

# A note, if an adapter says how rows are put into words
LEARNED_WORDS = "the rows get the learned prompt and words (task.json)"


class UserRows(NamedTuple):
    """A user's rows, in the splits that their files are."""

    rows: dict[str, list[dict]]  # checked, of each split
    files: list[Path]  # all files that were read
    understanding: Understanding
    notes: list[str]


def read_user_rows(
    name: str, spec: TaskSpec, task_file: Path | None, flags: ColumnFlags, like: TaskSpec | None
) -> UserRows:
    """Return a user's rows, and how their columns were understood.

    name, like: see `load_task`. spec: what the task file says, if there is one, or TaskSpec().
    Raise ValueError if anything is wrong.
    """
    files, notes = find_files(name, spec, task_file)
    rows = read_files(files, keep_empty=False)
    notes = [*notes, *note_quotes(files, rows)]
    understanding = understand_rows(files, rows, spec, flags, like)
    notes += understanding.notes
    paths = list(chain.from_iterable(files.values()))
    if task_file is not None:
        paths.append(task_file)  # so that a resumed run finds out if it has changed
    elif not spec.shipped and Path(name, TASK_FILE).is_file():
        notes.append(f"{Path(name, TASK_FILE)} has no key of a task file: not used")
    checked = check_files(rows, files, understanding.spec)
    return UserRows(checked, paths, understanding, notes)


# Their files


def find_files(name: str, spec: TaskSpec, task_file: Path | None) -> FoundFiles:
    """Return the files of each split. Raise ValueError if there are none."""
    if spec.files:
        return FoundFiles(dict(spec.files), [])
    if spec.path:
        name = str(spec.path)
    if name.startswith(HUB_PREFIX):
        return find_hub_files(name)
    if spec.shipped:
        path = SHIPPED / spec.shipped
    elif os.path.exists(name):  # unlike Path.exists, this accepts any text, even a null byte
        path = Path(name)
    else:
        raise ValueError(unknown_task(name))
    if (path / "adapter_config.json").is_file():
        raise ValueError(
            f"{path} has no rows: its task.json says what an adapter has learned. Give a file of "
            f"rows as --task, with --adapter {path}"
        )
    if path.is_dir():
        return find_saved_files(path, task_file) or find_split_files(path, task_file)
    if not rows_suffix(path):
        raise not_read(path)
    return FoundFiles({"train": [path]}, [])


# Their columns


def understand_rows(
    files: dict[str, list[Path]],
    rows: dict[str, list[FileRow]],
    spec: TaskSpec,
    flags: ColumnFlags,
    like: TaskSpec | None,
) -> Understanding:
    """Return how the columns of a user's files are understood: by the rows of train, if there are
    any. If no row can be read, nothing is understood, and `check_files` says why.
    """
    for split, paths in files.items():  # train comes first
        good_rows = [found.row for found in rows[split] if isinstance(found.row, dict)]
        if good_rows:
            label_names = read_label_names(paths[0])
            is_like = like is not None and has_columns(good_rows, like)
            if is_like:
                spec = with_label_names(like, names_of_labels(paths[0], like))
                spec = spec._replace(is_learned=True)
            else:
                check_fields(good_rows, spec.fields, str(paths[0]))
            found = understand(good_rows, spec, flags, label_names, str(paths[0]))
            check_label_names(files, rows, found.spec)
            if is_like:
                found.notes.append(LEARNED_WORDS)
            return found
    return Understanding(spec, "", [])


def check_label_names(files: dict[str, list[Path]], rows: dict[str, list[FileRow]], spec: TaskSpec):
    """Raise ValueError if two files have different names for the integers of the label, or if it is
    unclear whether a file without names has the integers or the names.

    If each file was encoded by itself, a label that it lacks moves the integers of the others.
    """
    if not spec.labels:
        return
    first_path = None
    first_names = []
    for path in chain.from_iterable(files.values()):
        names = names_of_labels(path, spec)
        if names and first_path is None:
            first_path = path
            first_names = names
        n_common = min(len(names), len(first_names))
        if names[:n_common] != first_names[:n_common]:
            raise ValueError(
                f"the integers of {spec.label_field!r} stand for {list_names(first_names):.80} in "
                f"{first_path}, and for {list_names(names):.80} in {path}: encode the labels of "
                "all files together, or leave them as words"
            )
    check_unnamed(rows, spec, first_path, first_names)


def check_unnamed(
    rows: dict[str, list[FileRow]], spec: TaskSpec, named: Path | None, names: list[str]
):
    """Raise ValueError if a label of a file without names may be an integer, or the name of another
    one: a data set may call its 0 "1".

    named: a file whose integers have these names.
    """
    unclear = {name for i, name in enumerate(names) if INTEGER.fullmatch(name) and name != str(i)}
    if not unclear:
        return
    for path, found in groupby(chain.from_iterable(rows.values()), key=attrgetter("path")):
        good_rows = [row for _, _, row in found if isinstance(row, dict)]
        counts, _ = count_labels(Columns(good_rows, spec.fields, "").values(spec.label_field))
        keys = [key for key in counts if key in unclear]
        if keys and not names_of_labels(path, spec):
            raise ValueError(
                f"{spec.label_field!r} is {keys[0]} in {path}, which may be an integer that stands "
                f"for one of the names {list_names(names):.80} of {named}, or one of these names: "
                "save the rows of all files in one format"
            )


def names_of_labels(path: Path, spec: TaskSpec) -> list[str]:
    """Return the names that a file gives to the integers of the label, or an empty list."""
    columns = {new_name: name for name, new_name in spec.fields.items()}
    label_column = fold_case(columns.get(spec.label_field, spec.label_field))
    for column, names in read_label_names(path).items():
        if fold_case(column) == label_column:
            return names
    return []


# Notes on what looks like a mistake, and may be none


def note_quotes(files: dict[str, list[Path]], rows: dict[str, list[FileRow]]) -> list[str]:
    """Return notes if programs, such as pandas or Excel, have put cells of a .tsv into quotes."""
    paths = {path for path in chain.from_iterable(files.values()) if rows_suffix(path) == ".tsv"}
    quoted = QuotedCells()
    for found in chain.from_iterable(rows.values()):
        if isinstance(found.row, dict) and found.path in paths:
            quoted.add(found.path, found.row)
    return quoted.notes()


def note_gaps(rows: list[dict], spec: TaskSpec) -> list[str]:
    """Return notes on inputs that end in white space, and on input columns that are empty."""
    n_empty = Counter()
    for row in rows:
        n_empty.update(empty_columns(row, spec.prompts[0]))
    return note_white_space(rows, spec) + describe_empty(n_empty)


def note_white_space(rows: list[dict], spec: TaskSpec) -> list[str]:
    """Return a note on how many inputs end in white space. The answer would then follow two spaces,
    because the tokenizer puts a space before it.
    """
    name = final_field(spec.prompts[0].text)
    if spec.messages or name is None:
        return []
    values = [str(row.get(name)) for row in rows]
    n_inputs = sum(value != value.rstrip() for value in values)
    if not n_inputs:
        return []
    return [
        f"{n_inputs} inputs end in white space: leave it out, "
        "because the tokenizer puts a space before the answer"
    ]
