"""Data sets of the `datasets` library: from the hub, or from a folder that `save_to_disk` wrote.

Both are .arrow files on this machine, which `row_files` reads as it reads every other file. No code
of a data set is ever run: the extra [data] asks for a `datasets` that cannot run code.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

from minia3.files.read import one_line, read_json, reading
from minia3.files.streams import is_terminal
from minia3.tasks.names import list_names
from minia3.tasks.row_files import rows_suffix
from minia3.tasks.split_files import (
    HUB_PREFIX,
    N_SHOWN,
    SIDE_FILES,
    SPLIT_OF_NAME,
    SPLITS,
    FoundFiles,
    resembled_split,
)

TIMEOUT = 10  # seconds to wait for the first answer of the hub


def find_hub_files(name: str) -> FoundFiles:
    """Return the files of a data set on the hub, after a download if they are not in the cache.

    name: hf:user/name or hf:user/name:config, with the splits that are meant if they have other
        names, as in hf:user/name:train=train_r1:test=test_r1. What follows hf: is given to
        `datasets.load_dataset`, so the path of a folder is possible, too.

    Raise ValueError, in one line, if the data set cannot be loaded or has no such split.
    """
    repo, config, chosen = parse_name(name)
    with reading(name, extra="data"):
        import datasets
    problem = find_network_problem(repo)
    try:
        with quiet(), offline_if(bool(problem)):
            # Not in memory, because the rows are read from the files of the cache.
            found = datasets.load_dataset(repo, config, keep_in_memory=False)
    except Exception as error:  # the library and the hub raise many kinds
        reason = one_line(error)
        if problem:
            reason = f"not in the cache, and the hub cannot be reached ({problem}). "
            reason += "Without a network, give the path of a folder"
        raise ValueError(f"{name}: {reason}") from None
    files = {}
    for split, rows in found.items():
        files[split] = [Path(entry["filename"]) for entry in rows.cache_files]
    return assign_splits(name, files, chosen)


def parse_name(name: str) -> tuple[str, str | None, dict[str, list[str]]]:
    """Return the repository and the configuration in a name, and the splits that it chooses.

    The splits are a dict: our split -> the names of those that it has, in order.
    """
    repo, *parts = name.removeprefix(HUB_PREFIX).split(":")
    configs = []
    chosen = {}
    for part in parts:
        split, is_choice, text = part.partition("=")
        if not is_choice:
            configs.append(part)
        elif split in SPLITS and split not in chosen:
            chosen[split] = text.split("+")
        else:
            raise ValueError(
                f"{name}: expected :train=, :validation= or :test=, each at most once and with the "
                f"name of a split; found {part!r:.80}"
            )
    if not repo or len(configs) > 1:
        raise ValueError(f"{name}: expected {HUB_PREFIX}user/name or {HUB_PREFIX}user/name:config")
    return repo, "".join(configs) or None, chosen


def find_network_problem(repo: str) -> str:
    """Return why the hub cannot be reached, or "" if it can, or if the data set is a folder."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if os.path.isdir(repo):
        return ""
    try:
        HfApi().dataset_info(repo, timeout=TIMEOUT)
    except (HfHubHTTPError, ValueError):
        return ""  # the hub, or the check of the name, says that there is no such data set
    except Exception as error:  # of the HTTP library, which differs between versions
        return one_line(error)
    return ""


@contextmanager
def offline_if(is_offline: bool) -> Iterator[None]:
    """Let the `datasets` library look only into its cache.

    If it does not know that there is no network, it tries six times, which takes half a minute.
    """
    import datasets

    was_offline = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = was_offline or is_offline
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings of the libraries, and their progress bars unless there is a terminal."""
    import datasets

    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    had_bars = not datasets.are_progress_bars_disabled()
    if not is_terminal(sys.stderr):
        datasets.disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if had_bars:
            datasets.enable_progress_bars()


def find_saved_files(folder: Path, task_file: Path | None = None) -> FoundFiles | None:
    """Return the files of a folder that `save_to_disk` wrote, or None if it is another folder.

    task_file: a task file that may be in the folder, too.
    """
    index = folder / "dataset_dict.json"
    if index.is_file():
        files = {}
        with reading(index, damage="not the index of `save_to_disk`"):
            for split in read_json(index)["splits"]:
                files[split] = read_state(folder / split / "state.json")
    elif (folder / "state.json").is_file():
        files = {"train": read_state(folder / "state.json")}
    else:
        return None
    found = assign_splits(folder, files, chosen={})
    return found._replace(notes=[*found.notes, *note_other_files(folder, task_file)])


def note_other_files(folder: Path, task_file: Path | None) -> list[str]:
    """Return a note in a list if somebody put files of rows into a folder of `save_to_disk`."""
    names = []
    for path in sorted(folder.iterdir()):
        # The library keeps data-*.arrow and cache-*.arrow there.
        has_rows = rows_suffix(path) not in ("", ".arrow") and path.name not in SIDE_FILES
        is_hidden = path.name.startswith(".")
        if has_rows and not is_hidden and path != task_file:
            names.append(path.name)
    if not names:
        return []
    shown = list_names(names, N_SHOWN)
    return [f"not used, because {folder} is a data set of `save_to_disk`: {shown}"]


def read_state(path: Path) -> list[Path]:
    """Return the files of one split that `save_to_disk` wrote, in order."""
    with reading(path, damage="not the state of a data set of `save_to_disk`"):
        entries = read_json(path)["_data_files"]
        return [path.parent / entry["filename"] for entry in entries]


def assign_splits(
    origin: str | Path, files: dict[str, list[Path]], chosen: dict[str, list[str]]
) -> FoundFiles:
    """Return the files of train, validation and test, out of the splits of a data set.

    chosen: see `parse_name`. Raise ValueError if a chosen split does not exist, if one is chosen
    twice, if there are several splits and we know none of them, or if train is the only one that we
    know and another is meant for validation or test.
    """
    names = name_splits(origin, files, chosen)
    used = list(chain.from_iterable(names.values()))
    unused = [name for name in files if name not in used]
    if not names:
        found = list_names(unused, N_SHOWN) or "none"
        raise ValueError(
            f"{origin}: expected splits named train, validation and test; found {found}"
            f"{advise_choice(origin, unused)}"
        )
    if list(names) == ["train"]:
        check_other_splits(origin, unused)
    notes = []
    if unused:
        notes.append(f"splits of {origin} that are not used: {list_names(unused, N_SHOWN)}")
    found = {}
    for split in SPLITS:
        if split in names:
            found[split] = list(chain.from_iterable(files[name] for name in names[split]))
    return FoundFiles(found, notes)


def name_splits(
    origin: str | Path, files: dict[str, list[Path]], chosen: dict[str, list[str]]
) -> dict[str, list[str]]:
    """Return a dict: our split -> its names in the data set. See `assign_splits`.

    Splits that are not chosen are found by their names. If a data set has a single split, that
    split is train, unless its name is one that we know (such as test).
    """
    names = dict(chosen)
    taken = list(chain.from_iterable(names.values()))
    for name in taken:
        if name not in files:
            found = ", ".join(files)
            raise ValueError(f"{origin}: there is no split {name!r:.80}; there are {found:.500}")
        if taken.count(name) > 1:
            raise ValueError(f"{origin}: the split {name!r} is chosen twice, expected it once")
    for name, split in SPLIT_OF_NAME.items():
        if name in files and name not in taken:
            names.setdefault(split, [name])
    if len(files) == 1 and not names:
        return {"train": list(files)}
    return names


def check_other_splits(origin: str | Path, names: list[str]):
    """Raise ValueError if a split beside train has nearly the name of validation or of test.

    A run would report on some rows of train, and not on that split.
    """
    meant = [name for name in names if resembled_split(Path(name)) in ("validation", "test")]
    if meant:
        raise ValueError(
            f"{origin}: expected splits named validation or test beside train; found "
            f"{list_names(meant, N_SHOWN)}{advise_choice(origin, meant)}"
        )


def advise_choice(origin: str | Path, names: list[str]) -> str:
    """Return how to say which of the splits `names` are meant."""
    if not str(origin).startswith(HUB_PREFIX):
        return (
            ": save those that you mean under these names, with "
            "`datasets.DatasetDict(train=..., test=...).save_to_disk(FOLDER)`, and give the folder"
        )
    parts = []
    for name in names:
        split = resembled_split(Path(name)) or "train"
        if not any(part.startswith(f":{split}=") for part in parts):
            parts.append(f":{split}={name}")
    return f": choose those that you mean, as in {origin}{''.join(parts)}"
