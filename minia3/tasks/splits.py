"""Load a task: find or download its files, read them, and divide their rows into splits."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np

from minia3.files.home import expand_home
from minia3.files.read import sha256
from minia3.tasks.column_flags import ColumnFlags, with_flags
from minia3.tasks.download import find_or_download
from minia3.tasks.format_strings import roots_of
from minia3.tasks.known_tasks import known_tasks
from minia3.tasks.rows import check_files, read_files
from minia3.tasks.split_files import HELD_OUT_FOLD, short_name
from minia3.tasks.task import METRICS, Task, TaskSpec
from minia3.tasks.task_file import find_task_file, read_task_file
from minia3.tasks.text_lines import MAX_ROW_BYTES
from minia3.tasks.understanding import Understanding
from minia3.tasks.user_rows import LEARNED_WORDS, note_gaps, read_user_rows

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
    depends_on_seed: bool = False  # True if the seed decides which rows are in validation

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
    is said, are put into its words. So are the rows of a known task that has its labels, too.

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
        metric=choose_metric(splits.name, answer, spec),
        checksums=splits.checksums(),
        notes=splits.notes,
        split=splits.validation_name,
        answer=answer,
        columns=columns,
        spec=spec,
        is_divided=splits.is_divided,
        depends_on_seed=splits.depends_on_seed,
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
    task_file = None
    if spec is None:
        task_file = find_task_file(name)
        spec = TaskSpec() if task_file is None else read_task_file(task_file)
    if spec.is_published:
        spec = with_flags(spec, flags)
        splits = load_known_task(name, spec, data_dir, shots, seed)
        if like is not None and flags.input is None and flags.labels is None:
            spec = with_learned_words(spec, splits, flags, like)
        return splits, spec, ""
    if spec != TaskSpec() or flags._replace(metric=None) != ColumnFlags():
        like = None  # because something else is said
    splits, understanding = load_user_task(name, spec, task_file, flags, like)
    columns = "" if spec.shipped else understanding.line
    return splits, understanding.spec, columns


# A user's rows, and the task that comes with the repository


def load_user_task(
    name: str, spec: TaskSpec, task_file: Path | None, flags: ColumnFlags, like: TaskSpec | None
) -> tuple[Splits, Understanding]:
    """Return a user's rows, and how their columns were understood. See `read_user_rows`."""
    found = read_user_rows(name, spec, task_file, flags, like)
    splits = Splits(short_name(name), found.files, notes=found.notes)
    rows = found.rows
    if list(rows) == ["train"]:
        origin = str(spec.path or name)
        rows = split_in_three(rows["train"], origin)
        splits.is_divided = True
        splits.notes.append(
            f"{origin} is split into train, validation and test, the same way each time"
        )
    splits.set_rows(rows)
    splits.notes += note_gaps(list(splits.all_rows()), found.understanding.spec)
    return splits, found.understanding


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


def with_learned_words(
    spec: TaskSpec, splits: Splits, flags: ColumnFlags, like: TaskSpec
) -> TaskSpec:
    """Return a known task in the words that an adapter has learned, if it has the adapter's labels
    and columns.

    They differ from the task's own if --input or --labels was given in training.
    """
    is_same_label = like.label_field == spec.label_field
    used = roots_of(chain.from_iterable(prompt.templates for prompt in like.prompts))
    has_columns = splits.first_row().keys() >= set(used)
    if not (is_same_label and tuple(like.labels) == tuple(spec.labels) and has_columns):
        return spec
    if like.prompts != spec.prompts:
        splits.notes.append(LEARNED_WORDS)
    metric = flags.metric or like.metric or spec.metric
    return spec._replace(prompts=like.prompts, metric=metric)


def read_known_files(files: dict[str, Path], spec: TaskSpec) -> dict[str, list[dict]]:
    paths = {split: [path] for split, path in files.items()}
    return check_files(read_files(paths, keep_empty=True), paths, spec)


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
    splits.depends_on_seed = True
    splits.validation_name = HELD_OUT_FOLD
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
        depends_on_seed=True,
    )


# Every task


def note_hidden_labels(splits: Splits):
    n_hidden = sum(row["label"] < 0 for row in splits.test)
    if n_hidden and splits.validation:
        splits.notes.append(
            f"{n_hidden} of {len(splits.test)} test rows have no label: results are on "
            f"{splits.validation_name}"
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
    if not splits.train:
        raise ValueError(f"{splits.name}: there are no rows of train to draw --shots {shots} from")
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
