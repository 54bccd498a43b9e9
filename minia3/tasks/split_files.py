"""Find the files of a user's data set: a file, or the files of a folder by the names of splits."""

import difflib
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from minia3.files.read import broken_link, check_link
from minia3.tasks.known_tasks import known_tasks, list_known_tasks
from minia3.tasks.names import list_names
from minia3.tasks.row_files import FORMATS, remedy, rows_stem, rows_suffix

# Name of a file without its suffix -> the split that it holds. The long names are StoryCloze's, and
# test_unlabeled is RAFT's.
SPLIT_OF_NAME = {
    "train": "train",
    "validation": "validation",
    "val": "validation",
    "dev": "validation",
    "valid": "validation",
    "test": "test",
    "test_unlabeled": "test",
    "cloze_test_val__spring2016 - cloze_test_ALL_val": "train",
    "cloze_test_test__spring2016 - cloze_test_ALL_test": "test",
}
SPLITS = ("train", "validation", "test")
CHOICE = re.compile(f":({'|'.join(SPLITS)})=")  # as in hf:user/name:test=test_r1

HELD_OUT_FOLD = "the held-out fold"  # the name of RAFT's rows to report on
TASK_FILE = "task.json"  # see task_file.py
HUB_PREFIX = "hf:"  # as in hf:user/name and hf:user/name:config

# A file with one of these words in its name, or with a word much like it, was meant to be a split.
LOOKALIKES = {
    "train": ("train", "training", "trainset"),
    "validation": (
        "validation",
        "validate",
        "valid",
        "val",
        "dev",
        "development",
        "eval",
        "evaluation",
    ),
    "test": ("test", "testing", "testset", "devtest", "holdout"),
}
LIKENESS = 0.82  # of `difflib`: "tests" is like "test", and "latest" is not

# The hub divides the rows of a split among several files: train-00000-of-00002.parquet.
SHARD_NUMBER = re.compile(r"-\d{5}-of-")
SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})", re.DOTALL)
# Until 2023, a hash of the part followed: train-00000-of-00001-b42a775f407cee45.parquet.
SHARD_HASH = re.compile(r"(-\d{5}-of-\d{5})-[0-9a-f]{16}")

# .json files that do not hold rows.
SIDE_FILES = (
    TASK_FILE,
    "config.json",
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
)

# Endings of files that hold no rows, whatever their names are: programs, texts about the data,
# pictures, settings and models. (Other endings are unknown, so such a file may hold rows.)
NO_ROWS = (
    *(".py", ".pyc", ".ipynb", ".sh", ".bat", ".r", ".js"),
    *(".md", ".rst", ".html", ".pdf", ".docx", ".log"),
    *(".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp"),
    *(".yaml", ".yml", ".toml", ".ini", ".cfg", ".lock"),
    *(".pt", ".pth", ".ckpt", ".safetensors", ".gguf"),
)

EXPECTED = f"files named train, validation (or val, dev, valid) and test, as {FORMATS}"
N_SHOWN = 5  # names in a message

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


class FoundFiles(NamedTuple):
    """The files of a data set."""

    files: dict[str, list[Path]]  # of each split, in order
    notes: list[str]  # what a run should tell its user about the files


def short_name(name: str) -> str:
    """Return a name for a task that is a file, a folder, or a data set of the hub."""
    if name.startswith(HUB_PREFIX):
        repo = name.removeprefix(HUB_PREFIX)
        if os.path.isabs(repo):  # a folder that is read as if it were on the hub
            repo = os.path.basename(os.path.normpath(repo))
        return CHOICE.sub("-", repo).replace(":", "-")
    path = Path(os.path.abspath(name))
    if path.name == TASK_FILE:
        path = path.parent
    return rows_stem(path) if rows_suffix(path) else path.name


# A folder of files


def find_split_files(folder: Path, task_file: Path | None = None) -> FoundFiles:
    """Return the files in a folder that are named like splits.

    task_file: which describes the task and so holds no rows, whatever its name is.

    Raise ValueError if there are none, if a split has several or not all of its parts, or if a
    split is missing and there is a file with nearly its name.
    """
    try:
        found = [path for path in folder.iterdir() if path != task_file]
        entries = sorted(path for path in found if not path.name.startswith("."))
    except OSError as error:
        raise ValueError(f"{folder}: {error.strerror}") from None
    candidates = {split: {} for split in SPLITS}  # split -> name without number -> files
    unused = []
    for path in entries:
        name, _ = divide_name(path)
        split = SPLIT_OF_NAME.get(name.lower())
        if split:
            check_link(path)
        if split and rows_suffix(path) and path.is_file():
            kind = SHARD_NUMBER.sub("-*-of-", without_hash(path.name))
            candidates[split].setdefault(kind, []).append(path)
        else:
            unused.append(path)
    files = {}
    for split, kinds in candidates.items():
        if kinds:
            files[split] = choose_kind(folder, split, list(kinds.values()))
    if not files:
        raise ValueError(describe_folder(folder, entries))
    return FoundFiles(files, describe_unused(unused, files))


def divide_name(path: Path) -> tuple[str, int]:
    """Return the name of a split's file without its suffix, and the number of the split's files."""
    stem = without_hash(rows_stem(path))
    match = SHARD.fullmatch(stem)
    if match is None:
        return stem, 1
    return match[1], int(match[2])


def without_hash(name: str) -> str:
    """Return the name of a part as it would be without its hash."""
    return SHARD_HASH.sub(r"\1", name)


def choose_kind(folder: Path, split: str, kinds: list[list[Path]]) -> list[Path]:
    """Return the files of a split. Raise ValueError if there are two kinds, or too few of one."""
    paths = kinds[0]
    if len(kinds) > 1:
        raise ValueError(
            f"{folder} has {paths[0].name} and {kinds[1][0].name}: keep one of them as {split}"
        )
    _, n_expected = divide_name(paths[0])
    names = ", ".join(path.name for path in paths[:N_SHOWN])
    if len({without_hash(path.name) for path in paths}) < len(paths):
        raise ValueError(f"{folder} has a part of {split} twice, from two uploads: {names}")
    if len(paths) != n_expected:
        raise ValueError(
            f"{folder}: expected {n_expected} files of {split}, found {len(paths)}: {names}"
        )
    return paths


def describe_folder(folder: Path, entries: list[Path]) -> str:
    """Return the message for a folder without splits."""
    if not entries:
        return f"{folder}: the folder is empty; expected {EXPECTED}"
    found = list_names((path.name for path in entries), N_SHOWN)
    hint = ""
    for path in entries:
        split = SPLIT_OF_NAME.get(path.name.lower())
        if path.is_dir() and split:
            hint = f"; {path.name} is a folder: {advise_split(path, split)}"
            break
        if path.is_dir() and has_splits(path):
            hint = f"; {path} has such files"
            break
        if path.is_file() and rows_suffix(path):
            hint = "; a single file is given by its path"
    return f"{folder}: expected {EXPECTED}; found {found}{hint}"


def has_splits(folder: Path) -> bool:
    with suppress(OSError):
        return any(divide_name(path)[0].lower() in SPLIT_OF_NAME for path in folder.iterdir())
    return False


def describe_unused(paths: list[Path], files: dict[str, list[Path]]) -> list[str]:
    """Return a note that names the files and folders of rows that are not used, if there are any.

    Raise ValueError if a name is nearly that of a split that is missing. It may be a typo, and a
    run without its own test rows would report on others.
    """
    names = []
    for path in paths:
        has_no_rows = path.suffix.lower() in NO_ROWS and path.is_file()
        if path.name in SIDE_FILES or has_no_rows:
            continue
        split = resembled_split(path)
        if split and split not in files:
            raise ValueError(
                f"{path}: not the name of a split, and there is no file of {split}: "
                f"{advise_split(path, split)}, or move it elsewhere"
            )
        if split or may_hold_rows(path):
            names.append(path.name)
    if not names:
        return []
    return [f"not used, because not named like a split: {list_names(names, N_SHOWN)}"]


def may_hold_rows(path: Path) -> bool:
    """Return whether an entry of a folder is a file of rows, also in a format that is not read, or
    a folder with such files.
    """
    if path.is_dir():
        with suppress(OSError):
            return any(is_file_of_rows(entry) for entry in path.iterdir())
        return False
    return is_file_of_rows(path)


def is_file_of_rows(path: Path) -> bool:
    is_other = bool(remedy(path)) and path.suffix.lower() != ".txt"  # which is mostly prose
    has_rows = bool(rows_suffix(path)) or is_other
    return has_rows and path.name not in SIDE_FILES and not path.name.startswith(".")


def advise_split(path: Path, split: str) -> str:
    """Return what to do about a file or a folder that was perhaps meant to be a split."""
    if path.is_dir():
        return f"put its rows into a file {split}.csv"
    if rows_suffix(path):
        ending = path.name.removeprefix(rows_stem(path))  # with .gz
        return f"name it {split}{ending}"
    return remedy(path) or f"if it holds rows, name it {split}.csv, or as its format is called"


def resembled_split(path: Path) -> str | None:
    """Return the split that the name of a file was meant to be, or None."""
    for word in re.findall("[a-z]+", path.name.lower()):
        for split, lookalikes in LOOKALIKES.items():
            if difflib.get_close_matches(word, lookalikes, n=1, cutoff=LIKENESS):
                return split
    return None


# Names of tasks that do not exist


def check_names(names: Sequence[str]):
    """Raise ValueError if some of several names of tasks are wrong. It names each of them, because
    commas may have divided a single path.
    """
    wrong = []
    for name in names:
        is_known = name in known_tasks() or name.startswith(HUB_PREFIX)
        if not is_known and not os.path.exists(name):
            wrong.append(unknown_task(name))
    if wrong and len(names) > 1:
        problems = "; ".join(wrong)
        raise ValueError(
            f"{len(wrong)} of the {len(names)} tasks of --task cannot be found (commas divide "
            f"them): {problems}"
        )


def unknown_task(name: str) -> str:
    """Return the message for a name that is neither a known task nor a path."""
    # A name such as raft/overruling has a slash, but is not a path.
    groups = {known.split("/")[0] for known in known_tasks() if "/" in known}
    is_path = looks_like_path(name) and name.split("/")[0] not in groups
    if is_path or os.path.islink(name):
        return describe_missing_path(name)
    message = f"{name!r} is not a known task, a file or a folder"
    entries = nearest_entries(Path(name))  # a folder has no suffix, so its name may be any word
    candidates = [*difflib.get_close_matches(name.lower(), known_tasks(), n=1), *entries]
    if candidates:
        return f"{message}; did you mean {str(candidates[0])!r}?"
    return f"{message}. Known tasks: {list_known_tasks()}"


def looks_like_path(name: str) -> bool:
    """Return whether a name has a slash, or a suffix of a file with data."""
    return "/" in name or os.sep in name or bool(rows_suffix(Path(name)) or remedy(Path(name)))


def describe_missing_path(name: str) -> str:
    """Return the message for a path that does not exist, with the nearest one that does."""
    path = Path(name)
    if "*" in name:
        return (
            f"{name}: no such file or folder, and * is no pattern here: give a folder whose files "
            "are named like splits, or a task file with a list of 'files'"
        )
    missing = path
    # The first part that does not exist is the one with the typo.
    while not os.path.exists(missing.parent):
        missing = missing.parent
    if broken_link(missing):
        return f"{name}: no such file or folder, because {missing} is {broken_link(missing)}"
    hint = ""
    if missing != path:
        hint = f", because there is no {missing}"
        if HUB_ID.fullmatch(name) and not rows_suffix(path):
            hint += f" (a data set of the hub is hf:{name})"
    for entry in nearest_entries(missing):
        whole = entry / Path(name).relative_to(missing)
        near = whole if os.path.exists(whole) else entry
        hint += f"; did you mean {near}?"
    return f"{name}: no such file or folder{hint}"


def nearest_entries(path: Path) -> list[Path]:
    """Return the entry of the path's folder that has the nearest name, or an empty list."""
    names = []
    with suppress(OSError):
        names = os.listdir(path.parent)
    return [path.parent / near for near in difflib.get_close_matches(path.name, names, n=1)]
