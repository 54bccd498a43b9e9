"""To be written."""

import difflib
import hashlib
import os
from pathlib import Path

import numpy as np

from minia3.tasks.download import download
from minia3.tasks.known_tasks import SHIPPED, known_tasks
from minia3.tasks.rows import read_splits
from minia3.tasks.task import Task, TaskSpec

SPLITS = {  # -> names of the file; the last ones are RAFT's and StoryCloze's
    "train": ("train", "cloze_test_val__spring2016 - cloze_test_ALL_val"),
    "validation": ("validation", "val", "dev"),
    "test": ("test", "test_unlabeled", "cloze_test_test__spring2016 - cloze_test_ALL_test"),
}
FOLDS = 5  # of RAFT's train rows: it hides the labels of the test rows


def load_task(
    name_or_path: str, data_dir: str = "data", shots: int | None = None, seed: int = 0
) -> Task:
    """A known task by its name, or a user's own rows: a .jsonl or .csv file, or a folder with train, validation, test.

    A known task is read from `<data_dir>/<name>`, and downloaded to there first if need be; where that fails, T-Few's
    published splits are read from `<data_dir>/few_shot`. Own rows are {"input", "target"} or {"input", "choices",
    "label"}; train alone is split in three. `shots`: train is T-Few's few-shot split, the first `shots` rows (of SST-2,
    of each class) after a shuffle by `seed`. RAFT's test labels are hidden: a fifth of its 50 train rows is held out,
    another for each of five seeds in a row, or with shots=50 none. Raises ValueError, in one line.
    """
    name, notes = str(name_or_path), []
    spec = known_tasks().get(name, TaskSpec())
    files = find_files(name, spec, data_dir, seed, notes)
    known, split = bool(spec.labels), "T-Few's other splits" if seed in files else "validation"
    rows = read_splits(
        {split: files[split] for split in files if split != "validation" or not spec.dev_ids}, spec
    )
    checksums = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files.values()
    }
    if seed in files:
        drawn = {row["idx"] for row in rows[seed]}
        others = {
            row["idx"]: row for part in rows.values() for row in part if row["idx"] not in drawn
        }
        rows = {"train": rows[seed], "validation": list(others.values())}
    elif not known and list(rows) == ["train"]:
        rows = split_rows(rows["train"], files["train"])
        notes.append(
            f"{files['train']} is split into train, validation and test, the same way each time"
        )
    train, validation, test = (rows.get(split, []) for split in SPLITS)
    own = [] if known else [*train, *validation, *test]
    metric = "exact_match" if own and "target" in own[0] else spec.metric
    name = (
        name
        if known
        else os.path.basename(os.path.abspath(name)).removesuffix(".jsonl").removesuffix(".csv")
    )
    if n := sum(row["input"] != row["input"].rstrip() for row in own):
        notes.append(
            f"{n} inputs end in white space: leave it out, the tokenizer puts a space before the answer"
        )
    n_hidden = sum(row["label"] < 0 for row in test)
    if spec.dev_ids:
        ids = {tuple(line.split()) for line in files["validation"].read_text("utf-8").splitlines()}
        validation = [row for row in train if tuple(map(row.get, spec.dev_ids)) in ids]
    elif known and n_hidden and not validation and shots != len(train):
        validation = [
            train[i]
            for i in np.random.RandomState(0).permutation(len(train))[seed % FOLDS :: FOLDS]
        ]
        notes.append(
            f"fold {seed % FOLDS + 1} of {FOLDS} is held out: {FOLDS} seeds in a row report on each row once"
        )
    if not rows.get("validation"):  # then they are rows of train
        held = {row["idx"] for row in validation}
        train = [row for row in train if row["idx"] not in held]
    if n_hidden and validation:
        notes.append(
            f"{n_hidden} of {len(test)} test rows have no label: results are on validation"
        )
    if shots is not None:
        labels = range(len(spec.labels)) if spec.per_class else ()
        parts = [[row for row in train if row["label"] == label] for label in labels] or [train]
        if not (n := min(map(len, parts))) >= shots >= 1:
            raise ValueError(
                f"{name}: expected 1 to {n} shots{' of a label' * bool(labels)}, found {shots}"
            )
        # T-Few's `np.random.seed(seed); np.random.shuffle(rows)`: the same stream, but the global state stays as it is.
        for part in [] if seed in files else parts:
            np.random.RandomState(seed).shuffle(part)
        train = [row for part in parts for row in part[:shots]]
    task = Task(
        name, train, validation, test, spec.prompts, metric, spec.seen, checksums, notes, split
    )
    _ = known or task.evaluation  # raises where there is nothing to report on
    return task


def find_files(name, spec, data_dir, seed, notes):
    """Paths by split, of a known task or of a user's file or folder; or by seed, of T-Few's published splits."""
    path, suffixes = Path(SHIPPED, spec.shipped) if spec.shipped else Path(name), (".jsonl", ".csv")
    if spec.sources:
        path, names = (
            Path(data_dir, name),
            [Path(file) for source in spec.sources for file in source.files],
        )
        suffixes = {file.suffix for file in names}
        needed = {
            "train",
            "validation" if {file.stem for file in names} & {*SPLITS["validation"]} else "test",
        }
        try:
            if not needed <= find_splits(path, suffixes).keys():
                download(spec.sources, path)
        except ValueError as error:
            folder = Path(data_dir, "few_shot", spec.few_shot or name, f"{spec.shots}_shot")
            files = {
                int(file.stem.removesuffix("_seed")): file
                for file in sorted(folder.glob("*_seed.jsonl"))
            }
            if seed not in files:
                raise ValueError(
                    f"{error}{'; published are seeds ' * bool(files)}{sorted(files) or ''}"
                ) from None
            notes.append(
                f"{error}; so this is T-Few's published split, evaluated on those of the other seeds"
            )
            return files
    elif not (spec.shipped or os.path.exists(name)):
        hint = "".join(
            f"did you mean {x!r}? "
            for x in difflib.get_close_matches(name.lower(), known_tasks(), n=1)
        )
        raise ValueError(
            f"{name!r} is no task, file or folder: {hint}Known tasks: {', '.join(known_tasks())}"
        )
    if (
        files := find_splits(path, suffixes)
        if path.is_dir()
        else {"train": path}
        if path.suffix in suffixes
        else {}
    ):
        return files
    raise ValueError(
        f"{path}: expected a .jsonl or .csv file, or a folder of train, validation (val, dev) and test"
    )


def find_splits(folder, suffixes):
    files = {}
    for split, names in SPLITS.items():
        for path in (folder / (name + suffix) for name in names for suffix in suffixes):
            if path.is_file() and files.setdefault(split, path) != path:
                raise ValueError(
                    f"{folder} has {files[split].name} and {path.name}: keep one of them as {split}"
                )
    return files


def split_rows(rows, path):
    """80/10/10, at least one row each, in the file's order; not by the run's seed: all seeds test on the same rows."""
    if len(rows) < 3:
        raise ValueError(
            f"{path}: too few rows to split ({len(rows)}): give a folder with train, validation, test"
        )
    shuffled, n = np.random.RandomState(0).permutation(len(rows)), max(1, len(rows) // 10)
    parts = {"train": shuffled[2 * n :], "validation": shuffled[:n], "test": shuffled[n : 2 * n]}
    return {split: [rows[i] for i in sorted(part)] for split, part in parts.items()}
