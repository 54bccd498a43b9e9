"""Load a task: find or download its files, read them, and divide their rows into splits."""

import difflib
import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, product
from pathlib import Path

import numpy as np

from minia3.files.home import expand_home
from minia3.files.read import sha256
from minia3.tasks.columns import (
    ColumnFlags,
    Understanding,
    check_fields,
    has_columns,
    understand,
    with_flags,
    with_label_names,
)
from minia3.tasks.download import download, file_names, remove_leftovers
from minia3.tasks.known_tasks import SHIPPED, known_tasks, list_known_tasks
from minia3.tasks.library_data import find_hub_files, find_saved_files
from minia3.tasks.prompts import final_field, fold, list_names
from minia3.tasks.row_files import not_read, read_label_names, rows_suffix
from minia3.tasks.rows import FileRow, check_files, describe_empty, empty_columns, read_files
from minia3.tasks.split_files import (
    HUB_PREFIX,
    SPLIT_OF_NAME,
    TASK_FILE,
    FoundFiles,
    describe_missing_path,
    find_split_files,
    looks_like_path,
    nearest_entries,
    short_name,
)
from minia3.tasks.task import METRICS, Task, TaskSpec
from minia3.tasks.task_file import find_task_file, read_task_file
from minia3.tasks.text_lines import MAX_ROW_BYTES

N_FOLDS = 5


@dataclass
class Splits:
    """The rows of a task while it is loaded."""

    name: str
    files: list[Path]  # all files that were read
    train: list[dict] = field(default_factory=list)
    validation: list[dict] = field(default_factory=list)
    test: list[dict] = field(default_factory=list)
    validation_name: str = "validation"
    notes: list[str] = field(default_factory=list)
    is_divided: bool = False  # True if there was only train, which was split in three
    is_shuffled: bool = False  # True if train is in the order of T-Few's published split

    def set_rows(self, rows: dict[str, list[dict]]):
        self.train = rows.get("train", [])
        self.validation = rows.get("validation", [])
        self.test = rows.get("test", [])

    def all_rows(self) -> Iterator[dict]:
        return chain(self.train, self.validation, self.test)

    def first_row(self) -> dict:
        return next(self.all_rows())

    def checksums(self) -> dict[str, str]:
        """Return the sha256 of each file, by its path below the folder that holds them all."""
        folders = [os.path.abspath(path.parent) for path in self.files]
        folder = os.path.commonpath(folders)
        return {Path(os.path.relpath(path, folder)).as_posix(): sha256(path) for path in self.files}

    def hold_out(self, rows: list[dict]):
        """Move rows from train to validation."""
        held_out = {row["idx"] for row in rows}
        self.validation = rows
        self.train = [row for row in self.train if row["idx"] not in held_out]


def load_task(  # noqa: PLR0913 (what to load, and what a user says about the columns)
    name_or_path: str | Path,
    data_dir: str | Path = "data",
    shots: int | None = None,
    seed: int = 0,
    *,
    input: str | None = None,
    target: str | None = None,
    labels: str | Sequence[str] | None = None,
    metric: str | None = None,
    like: TaskSpec | None = None,
) -> Task:
    """Load a known task by its name, or a user's rows: from a file, a folder, a task file or the
    hub.

    A known task is read from `<data_dir>/<name>`, after a download if the files are not there. If
    that fails, T-Few's published few-shot splits are read from `<data_dir>/few_shot`.

    A user's rows have columns with the usual names (COLUMN_SETS in columns.py), or `input`,
    `target` and `labels` say what they mean, such as "{title}: {body}", "{answer}" and ("negative",
    "positive"). `metric` is one of METRICS in task.py. A task file says the same (task_file.py).
    `like` is what an adapter has learned: rows that have its columns, and about which nothing else
    is said, are put into its words.

    `read_rows` says which files are read. A folder has files named train, validation (or val, dev,
    valid) and test, or comes from `save_to_disk` of the `datasets` library. "hf:user/name" and
    "hf:user/name:config" are data sets of the hub (see `find_hub_files`). If there is only one
    file, or only train, its rows are split in three.

    shots: train only on T-Few's few-shot split: the first `shots` rows (SST-2: of each class) after
    a shuffle by `seed`.

    RAFT hides the labels of its test rows, so a fifth of its 50 train rows is held out as
    validation, and five consecutive seeds hold out each row once. With shots=50 all rows are
    trained on, and none are held out.

    Raise ValueError, in one line, if there is no such task, or if its files or rows are not as
    expected.
    """
    check_arguments(name_or_path, shots, seed)
    name = str(expand_home(name_or_path))
    data_dir = expand_home(data_dir)
    flags = ColumnFlags(input, target, labels, metric)
    splits, spec, columns = load_splits(name, flags, data_dir, shots, seed, like)
    note_hidden_labels(splits)
    if shots is not None:
        splits.train = draw_shots(splits, spec, shots, seed)
    task = make_task(splits, spec, columns)
    # A known task may have no rows to report on: if a run trains on all 50 rows of RAFT, no labeled
    # row is left.
    if not spec.is_published:
        task.check_evaluation()
    return task


def check_arguments(name_or_path, shots, seed):
    """Raise ValueError if an argument of `load_task` is of another kind."""
    if not isinstance(name_or_path, str | os.PathLike):
        raise ValueError(
            "expected the name of a task or a path, found an object of the kind "
            f"{type(name_or_path).__name__}: write its rows into a .parquet or .jsonl file first"
        )
    n_shots = 0 if shots is None else shots
    for name, value in (("shots", n_shots), ("seed", seed)):
        if not hasattr(value, "__index__"):
            raise ValueError(f"{name} is {value!r:.40}, expected an integer")


def make_task(splits: Splits, spec: TaskSpec, columns: str) -> Task:
    answer = spec.answer_of(splits.first_row())
    return Task(
        name=splits.name,
        train=splits.train,
        validation=splits.validation,
        test=splits.test,
        prompts=spec.prompts,
        metric=choose_metric(splits.name, answer, spec),
        seen=spec.seen,
        checksums=splits.checksums(),
        notes=splits.notes,
        split=splits.validation_name,
        answer=answer,
        columns=columns,
        spec=spec,
        is_divided=splits.is_divided,
    )


def load_splits(
    name: str,
    flags: ColumnFlags,
    data_dir: str | Path,
    shots: int | None,
    seed: int,
    like: TaskSpec | None,
) -> tuple[Splits, TaskSpec, str]:
    """Return a task's rows, its TaskSpec, and how a user's columns were understood."""
    spec = known_tasks().get(name)
    if spec is None:
        spec = read_task_file_of(name)
    if spec.is_published:
        spec = with_flags(spec, flags)
        return load_known_task(name, spec, data_dir, shots, seed), spec, ""
    if spec != TaskSpec() or flags._replace(metric=None) != ColumnFlags():
        like = None  # because something else is said
    splits, understanding = load_user_task(name, spec, flags, like)
    columns = "" if spec.shipped else understanding.line
    return splits, understanding.spec, columns


# A user's rows, and the task that comes with the repository


def read_task_file_of(name: str) -> TaskSpec:
    """Return what a task file says: the file `name`, or task.json in the folder `name`.

    Without a task file, nothing is said.
    """
    path = find_task_file(name)
    return TaskSpec() if path is None else read_task_file(path)


def load_user_task(
    name: str, spec: TaskSpec, flags: ColumnFlags, like: TaskSpec | None
) -> tuple[Splits, Understanding]:
    """Return a user's rows, and how their columns were understood."""
    task_file = find_task_file(name)
    files, notes = files_of(name, spec, task_file)
    rows = read_files(files, keep_empty=False)
    notes = [*notes, *note_quotes(files, rows)]
    understanding = understand_rows(files, rows, spec, flags, like)
    checked = check_files(rows, files, understanding.spec)
    paths = list(chain.from_iterable(files.values()))
    splits = Splits(short_name(name), paths, notes=[*notes, *understanding.notes])
    if task_file is not None:
        splits.files.append(task_file)  # so that a resumed run finds out if it has changed
    elif Path(name, TASK_FILE).is_file():
        splits.notes.append(f"{Path(name, TASK_FILE)} has no key of a task file: not used")
    if list(checked) == ["train"]:
        origin = str(spec.path or name)
        checked = split_in_three(checked["train"], origin)
        splits.is_divided = True
        splits.notes.append(
            f"{origin} is split into train, validation and test, the same way each time"
        )
    splits.set_rows(checked)
    note_white_space(splits, understanding.spec)
    note_empty_fields(splits, understanding.spec)
    return splits, understanding


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
            else:
                check_fields(good_rows, spec.fields, str(paths[0]))
            found = understand(good_rows, spec, flags, label_names, str(paths[0]))
            check_label_names(files, found.spec)
            if is_like:
                found.notes.append("the rows are put into the words that were learned (task.json)")
            return found
    return Understanding(spec, "", [])


def check_label_names(files: dict[str, list[Path]], spec: TaskSpec):
    """Raise ValueError if two files have different names for the integers of the label.

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


def names_of_labels(path: Path, spec: TaskSpec) -> list[str]:
    """Return the names that a file gives to the integers of the label, or an empty list."""
    columns = {new_name: name for name, new_name in spec.fields.items()}
    label_column = fold(columns.get(spec.label_field, spec.label_field))
    for column, names in read_label_names(path).items():
        if fold(column) == label_column:
            return names
    return []


def files_of(name: str, spec: TaskSpec, task_file: Path | None) -> FoundFiles:
    """Return the files of each split. Raise ValueError if there are none."""
    if spec.files:
        return FoundFiles(dict(spec.files), [])
    if spec.path:
        name = str(spec.path)
    return find_user_files(name, spec, task_file)


def find_user_files(name: str, spec: TaskSpec, task_file: Path | None) -> FoundFiles:
    """Return the files of each split. Raise ValueError if there are none."""
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


def unknown_task(name: str) -> str:
    """Return the message for a name that is neither a known task nor a path."""
    # A name such as raft/overruling has a slash, but is no path.
    groups = {known.split("/")[0] for known in known_tasks() if "/" in known}
    if looks_like_path(name) and name.split("/")[0] not in groups:
        return describe_missing_path(name)
    message = f"{name!r} is not a known task, a file or a folder"
    entries = nearest_entries(Path(name))  # a folder has no suffix, so its name may be any word
    candidates = [*difflib.get_close_matches(name.lower(), known_tasks(), n=1), *entries]
    if candidates:
        return f"{message}; did you mean {str(candidates[0])!r}?"
    return f"{message}. Known tasks: {list_known_tasks()}"


def split_in_three(rows: list[dict], origin: str) -> dict[str, list[dict]]:
    """Divide rows 80/10/10, at least one row each, and keep the file's order.

    The run's seed plays no part, so that runs with different seeds are tested on the same rows.
    """
    if len(rows) < 3:
        raise ValueError(
            f"{origin}: too few rows to split ({len(rows)}): "
            "give a folder with train, validation and test"
        )
    shuffled = np.random.RandomState(0).permutation(len(rows))
    n = max(1, len(rows) // 10)
    indices = {
        "train": sorted(shuffled[2 * n :]),
        "validation": sorted(shuffled[:n]),
        "test": sorted(shuffled[n : 2 * n]),
    }
    return {split: [rows[i] for i in indices[split]] for split in indices}


def note_quotes(files: dict[str, list[Path]], rows: dict[str, list[FileRow]]) -> list[str]:
    """Return a note in a list if a program, such as pandas, has put cells of a .tsv into quotes."""
    paths = {path for path in chain.from_iterable(files.values()) if rows_suffix(path) == ".tsv"}
    n_cells = 0
    for found in chain.from_iterable(rows.values()):
        if isinstance(found.row, dict) and found.path in paths:
            n_cells += sum(map(is_quoted, found.row.values()))
    if not n_cells:
        return []
    are_quoted = "cell of .tsv files is" if n_cells == 1 else "cells of .tsv files are"
    return [
        f"{n_cells} {are_quoted} in quotes, with each quote inside doubled. The model reads all of "
        "these quotes: name the file .csv to leave them out"
    ]


def is_quoted(cell) -> bool:
    is_in_quotes = isinstance(cell, str) and cell.startswith('"') and cell.endswith('"')
    return is_in_quotes and '""' in cell[1:-1]


def note_white_space(splits: Splits, spec: TaskSpec):
    """Note how many inputs end in white space. The answer would then follow two spaces, because the
    tokenizer puts a space before it.
    """
    if spec.messages:
        return
    name = final_field(spec.prompts[0].text)
    if name is None:
        return
    values = [str(row.get(name)) for row in splits.all_rows()]
    n_inputs = sum(value != value.rstrip() for value in values)
    if n_inputs:
        splits.notes.append(
            f"{n_inputs} inputs end in white space: leave it out, "
            "because the tokenizer puts a space before the answer"
        )


def note_empty_fields(splits: Splits, spec: TaskSpec):
    """Add a note on how many rows have an empty input column."""
    n_empty = Counter()
    for row in splits.all_rows():
        n_empty.update(empty_columns(row, spec.prompts[0]))
    splits.notes += describe_empty(n_empty)


# Known tasks


def load_known_task(
    name: str, spec: TaskSpec, data_dir: str | Path, shots: int | None, seed: int
) -> Splits:
    try:
        files = find_or_download(spec, Path(data_dir, name))
    except ValueError as error:
        return load_published_split(name, spec, data_dir, seed, error)
    splits = Splits(name, list(files.values()))
    dev_ids = set()
    if spec.dev_id_fields and not has_label_column(files["validation"], spec):
        dev_ids = read_dev_ids(files.pop("validation"))
    splits.set_rows(read_known_files(files, spec))
    if dev_ids:
        splits.hold_out(select_dev_rows(splits.train, spec, dev_ids))
    if is_fold_needed(splits, shots):
        hold_out_fold(splits, seed)
    return splits


def read_known_files(files: dict[str, Path], spec: TaskSpec) -> dict[str, list[dict]]:
    paths = {split: [path] for split, path in files.items()}
    return check_files(read_files(paths, keep_empty=True), paths, spec)


def find_or_download(spec: TaskSpec, folder: Path) -> dict[str, Path]:
    """Return the file of each split, after a download if a file that is needed is missing."""
    names = [Path(name) for name in file_names(spec.sources)]
    suffixes = {name.suffix for name in names}
    has_validation = any(SPLIT_OF_NAME.get(name.stem) == "validation" for name in names)
    needed = {"train", "validation"} if has_validation else {"train", "test"}
    files = find_splits(folder, suffixes)
    if not needed <= files.keys():
        download(spec.sources, folder)
        files = find_splits(folder, suffixes)
        if not needed <= files.keys():
            found = ", ".join(sorted(files)) or "nothing"
            raise ValueError(
                f"{folder}: downloaded files were removed, only {found} is left: run this again"
            )
    else:
        remove_leftovers(folder)
    return files


def find_splits(folder: Path, suffixes: Collection[str]) -> dict[str, Path]:
    """Return the file of each split in the folder. Raise ValueError if a split has two files."""
    files = {}
    for (name, split), suffix in product(SPLIT_OF_NAME.items(), suffixes):
        path = folder / f"{name}{suffix}"
        if not path.is_file():
            continue
        if split in files:
            names = f"{files[split].name} and {path.name}"
            raise ValueError(f"{folder} has {names}: keep one of them as {split}")
        files[split] = path
    return files


def has_label_column(path: Path, spec: TaskSpec) -> bool:
    """Return whether a file begins with a header that names the label. In GLUE's own folder of
    MRPC, dev.tsv has whole rows.
    """
    with path.open("rb") as file:
        header = file.readline(MAX_ROW_BYTES)
    return spec.label_field.encode() in header


def read_dev_ids(path: Path) -> set[tuple[str, ...]]:
    """Return the ids on each line of MRPC's validation file, which holds nothing else."""
    lines = path.read_text("utf-8").splitlines()
    return {tuple(line.split()) for line in lines}


def select_dev_rows(rows: list[dict], spec: TaskSpec, dev_ids: set[tuple[str, ...]]) -> list[dict]:
    """Return the rows with these ids."""
    selected = []
    for row in rows:
        ids = tuple(row.get(name) for name in spec.dev_id_fields)
        if ids in dev_ids:
            selected.append(row)
    return selected


def is_fold_needed(splits: Splits, shots: int | None) -> bool:
    """Return whether rows to report on must come from train (RAFT), and the shots leave some."""
    has_hidden = any(row["label"] < 0 for row in splits.test)
    return has_hidden and not splits.validation and shots != len(splits.train)


def hold_out_fold(splits: Splits, seed: int):
    """Hold out the fold that the seed selects. The folds are the same for every seed."""
    fold = seed % N_FOLDS
    shuffled = np.random.RandomState(0).permutation(len(splits.train))
    splits.hold_out([splits.train[i] for i in shuffled[fold::N_FOLDS]])
    splits.notes.append(
        f"fold {fold + 1} of {N_FOLDS} is held out: "
        f"{N_FOLDS} consecutive seeds report on each row once"
    )


def load_published_split(
    name: str, spec: TaskSpec, data_dir: str | Path, seed: int, error: ValueError
) -> Splits:
    """Load T-Few's published few-shot split of a seed. The rows of other seeds are validation.

    Raise a ValueError with the message of `error`, which says why the data set itself is not
    available, if there is no such split.
    """
    folder = Path(data_dir, "few_shot", spec.few_shot or name, f"{spec.shots}_shot")
    files = {
        int(path.stem.removesuffix("_seed")): path for path in sorted(folder.glob("*_seed.jsonl"))
    }
    if seed not in files:
        hint = f"; T-Few published splits for the seeds {sorted(files)}" if files else ""
        raise ValueError(f"{error}{hint}") from None
    rows = read_known_files(files, spec)
    train = rows.pop(seed)
    train_ids = {row["idx"] for row in train}
    rows_by_id = {row["idx"]: row for row in chain.from_iterable(rows.values())}  # splits overlap
    return Splits(
        name,
        list(files.values()),
        train,
        validation=[row for idx, row in rows_by_id.items() if idx not in train_ids],
        validation_name="T-Few's other splits",
        notes=[f"{error}; so T-Few's published split is used, with the other seeds as validation"],
        is_shuffled=True,
    )


# Every task


def note_hidden_labels(splits: Splits):
    n_hidden = sum(row["label"] < 0 for row in splits.test)
    if n_hidden and splits.validation:
        splits.notes.append(
            f"{n_hidden} of {len(splits.test)} test rows have no label: results are on validation"
        )


def draw_shots(splits: Splits, spec: TaskSpec, shots: int, seed: int) -> list[dict]:
    """Return T-Few's few-shot split of train: the first rows, or the first of each label, after a
    shuffle.
    """
    pools = [splits.train]
    if spec.per_class:
        pools = [[] for _ in spec.labels]
        for row in splits.train:
            pools[row["label"]].append(row)
    n_available = min(map(len, pools))
    if not 1 <= shots <= n_available:
        unit = "shots of each label" if spec.per_class else "shots"
        raise ValueError(f"{splits.name}: expected 1 to {n_available} {unit}, found {shots}")
    drawn = []
    for pool in pools:
        if not splits.is_shuffled:
            # T-Few calls np.random.seed(seed); np.random.shuffle(rows). This draws the same random
            # numbers, but leaves the global generator alone.
            np.random.RandomState(seed).shuffle(pool)
        drawn += pool[:shots]
    return drawn


def choose_metric(name: str, answer: str, spec: TaskSpec) -> str:
    """Return the metric of a task. Raise ValueError if it does not suit how rows are answered."""
    suitable = METRICS[answer]
    metric = spec.metric or suitable[0]
    if metric not in suitable:
        kinds = {"choices": "choices", "target": "texts to write", "messages": "conversations"}
        raise ValueError(
            f"{name}: the metric is {metric!r}, expected one of {', '.join(suitable)}, "
            f"because its rows have {kinds[answer]}"
        )
    return metric
