"""The folder of a run: its name, its config.json, and its metrics.jsonl.

config.json      all flags, versions, and the checksums of the data
metrics.jsonl    a line per event: before, train, eval, final, failed
checkpoint.pt    see checkpoint.py
adapter/         the result; for a grid adapters/<cell>/, for full fine-tuning model/
"""

import dataclasses
import json
import os
import platform
import subprocess
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from minia3 import __version__
from minia3.files.lock import lock_folder, remove_lock
from minia3.files.read import read_json
from minia3.files.write import write_json

CONTENTS = ("config.json", "metrics.jsonl", "checkpoint.pt", "adapter", "adapters", "model")
LONGEST_NAME = 50  # characters of a list of values; a longer one is abbreviated


def default_folder(config):
    """Return runs/<model>-<task>-<method>-<seed>, with commas between several values."""
    return Path("runs", run_name(config))


def run_name(config):
    tasks = [Path(task).stem for task in as_tuple(config.task)]
    method = config.method
    if config.adapters == "one" and len(tasks) > 1:
        method += "-one"  # not the folder of a grid of the same tasks
    parts = [Path(config.model).name, join_values(tasks), method]
    parts.append(join_values(as_tuple(config.seed)))
    if len(as_tuple(config.lr)) > 1:
        parts.append(join_values(as_tuple(config.lr)))
    return "-".join(parts)


def as_tuple(value):
    return value if isinstance(value, tuple) else (value,)


def join_values(values):
    """Return "a,b,c", or "a+2" if that would be too long."""
    text = ",".join(map(str, values))
    if len(text) > LONGEST_NAME and len(values) > 1:
        return f"{values[0]}+{len(values) - 1}"
    return text


# Beginning, continuing and undoing a run


def begin_run(folder, config):
    """Make the folder of a new run with its config.json, and return its lock.

    Raise ValueError if the folder cannot be made or written to, or if it holds a run already.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(folder)
        found = [name for name in CONTENTS if (folder / name).exists()]
        if found:
            raise ValueError(
                f"{folder} holds a run already ({', '.join(found)}): "
                "use --resume or another --out, or remove it"
            )
        write_json(folder / "config.json", dataclasses.asdict(config) | environment())
    except OSError as error:
        raise ValueError(
            f"--out is {str(folder)!r}, expected a folder to write to: {error.strerror}"
        ) from None
    return lock


def discard_run(folder):
    """Undo `begin_run` if nothing was evaluated yet, so that the user can try again."""
    if (folder / "metrics.jsonl").exists():
        return
    for name in ("config.json", ".lock"):
        remove_lock(folder / name)
    with suppress(OSError):  # the folder is not empty: it held other files before
        folder.rmdir()


def restore_flags(asked):
    """Return the flags of the run in the folder --resume.

    Raise ValueError if other flags are given.
    """
    config_class = type(asked)
    if asked != config_class(resume=asked.resume):
        raise ValueError(
            "--resume takes no other flags: they come from the config.json of its folder"
        )
    folder = Path(asked.resume)
    saved = read_run_config(folder)
    if saved.get("similar_lengths"):
        raise ValueError(
            f"{folder}: this run uses --similar-lengths, which only an earlier version has: "
            "finish it with that version"
        )
    if "checkpoint" in saved:
        saved["recompute"] = saved["checkpoint"]  # the flag's earlier name
    values = {}
    for field in dataclasses.fields(config_class):
        if field.name in saved:
            value = saved[field.name]
            values[field.name] = tuple(value) if isinstance(value, list) else value
    return config_class(**values | {"resume": asked.resume})


def read_run_config(folder):
    """Return the config.json of a run: its flags, and more.

    Raise ValueError if the folder does not hold a run.
    """
    try:
        config = read_json(folder / "config.json")
        if not {"model", "task"} <= config.keys():
            raise ValueError(f"{folder / 'config.json'} was not written by train.py")
    except ValueError as error:
        raise ValueError(f"expected the folder of a run: {error}") from None
    return config


def record_data(folder, checksums):
    """Add the checksums of the data to config.json.

    Raise ValueError if a resumed run finds other checksums there.
    """
    config = read_run_config(folder)
    if config.get("data", checksums) != checksums:
        raise ValueError(
            f"{folder}: the task's files have changed since this run began: "
            "restore them, or begin a new run"
        )
    write_json(folder / "config.json", config | {"data": checksums})


def environment():
    """Return what a result depends on besides the flags: versions, and the commit of this code."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    return {"minia3": __version__, "git_commit": git_commit(), "versions": versions}


def git_commit():
    """Return the commit of this file's repository, with -dirty if files differ from it, or None."""
    command = ["git", "-C", str(Path(__file__).parent)]
    command += ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(OSError, subprocess.CalledProcessError):  # there is no git, or no repository
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None


class Metrics:
    """metrics.jsonl. Without a folder, nothing is written."""

    def __init__(self, folder, n_bytes):
        """Cut what an interrupted run wrote after its last checkpoint: all beyond `n_bytes`."""
        self.path = folder / "metrics.jsonl" if folder else None
        if folder and self.path.exists():
            os.truncate(self.path, min(n_bytes, self.path.stat().st_size))

    def write(self, **values):
        """Add a line, and return how many bytes the file has."""
        if self.path is None:
            return 0
        with self.path.open(
            "a", encoding="utf-8"
        ) as file:  # closed after each line, so that it is on disk
            file.write(json.dumps(values) + "\n")
        return self.path.stat().st_size
