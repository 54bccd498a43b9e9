"""To be written."""

import dataclasses
import json
import os
import platform
import subprocess
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

import minia3
from minia3.files.lock import lock_folder
from minia3.files.read import read_json
from minia3.files.write import write_json
from minia3.training.checkpoint import load_checkpoint

PARTS = ("config.json", "metrics.jsonl", "checkpoint.pt", "adapter", "adapters", "model")


def run_name(config):
    """The default name of a run's folder: <model>-<task>-<method>-<seed>, where need be with several values, and lr.

    Of a mixture the method is ia3-one.
    """
    lists = [x if isinstance(x, tuple) else (x,) for x in (config.task, config.seed, config.lr)]
    lists[0], parts = [Path(task).stem for task in lists[0]], []
    for values in lists:
        text = ",".join(map(str, values))
        parts.append(
            f"{values[0]}+{len(values) - 1}" if len(text) > 50 and len(values) > 1 else text
        )
    method = config.method + "-one" * (config.adapters == "one" and len(lists[0]) > 1)
    return "-".join(
        [Path(config.model).name, parts[0], method, *parts[1 : 3 if len(lists[2]) > 1 else 2]]
    )


def open_run(config, check):
    """-> config, the run's folder (None: nothing is written), its last checkpoint (None: there is none), its lock.

    check: raises ValueError for a config that cannot be.
    """
    if config.resume is not None:
        if config != type(config)(resume=config.resume):
            raise ValueError(
                "--resume goes alone: all other flags come from the config.json of its folder"
            )
        folder = Path(config.resume)
        raw = {
            key: tuple(x) if isinstance(x, list) else x
            for key, x in read_run_config(folder).items()
        }
        config = type(config)(**{key: raw[key] for key in vars(config) if key in raw})
        check(config)
        held = lock_folder(folder)
        return config, folder, load_checkpoint(folder), held
    check(config)
    if config.out is None and config.eval_only:
        return config, None, None, None
    config.out = config.out or str(Path("runs", run_name(config)))
    folder = Path(config.out)
    return config, folder, None, begin_run(folder, dataclasses.asdict(config))


def begin_run(folder, values):
    """Make the folder of a new run, with its config.json: -> its lock. `values`: of all flags.

    Raises ValueError where `folder` cannot be made or written to, and where it holds a run.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = lock_folder(folder)
        if found := ", ".join(name for name in PARTS if (folder / name).exists()):
            raise ValueError(
                f"{folder} holds a run already ({found}): use --resume or another --out, or remove it"
            )
        write_json(folder / "config.json", values | environment())
    except OSError as error:
        raise ValueError(
            f"--out is {str(folder)!r}, expected a folder to write to: {error.strerror}"
        ) from None
    return held


def discard_run(folder):
    """Undo `begin`, where a run ended before it measured anything: the next try finds the place free."""
    if not (folder / "metrics.jsonl").exists():
        for name in ("config.json", ".lock"):
            (folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # it held other files before
            folder.rmdir()


def read_run_config(folder):
    """The flags of a run, and what else its config.json holds. Raises ValueError for a folder that holds no run."""
    try:
        config = read_json(folder / "config.json")
        if not {"model", "task"} <= config.keys():
            raise ValueError(f"{folder / 'config.json'} is that of something else")
    except ValueError as error:
        raise ValueError(f"expected the folder of a run: {error}") from None
    return config


def record_data(folder, checksums):
    """Add the data's checksums to config.json. Raises ValueError where a run that goes on began with other data."""
    config = read_run_config(folder)
    if config.get("data", checksums) != checksums:
        raise ValueError(
            f"{folder}: the task's files have changed since this run began: put them back, or begin anew"
        )
    write_json(folder / "config.json", config | {"data": checksums})


def environment():
    """What a result depends on beside the flags: versions, and the commit of the repository that the code is in."""
    commit = None
    with suppress(OSError, subprocess.CalledProcessError):  # no git, or no repository
        git = [
            "git",
            "-C",
            str(Path(__file__).parent),
            "describe",
            "--always",
            "--dirty",
            "--abbrev=40",
            "--exclude=*",
        ]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    return {"minia3": minia3.__version__, "git_commit": commit, "versions": versions}


class Metrics:
    """metrics.jsonl. What lies past its first `size` bytes, where the run goes on, is cut."""

    def __init__(self, folder, size):
        self.path = folder / "metrics.jsonl" if folder else None
        if folder and self.path.exists():
            os.truncate(self.path, min(size, self.path.stat().st_size))

    def write(self, **values):
        """Add a line: -> bytes so far."""
        if self.path is None:
            return 0
        with self.path.open("a") as file:  # closed, and so flushed, line by line
            file.write(json.dumps(values) + "\n")
        return self.path.stat().st_size
