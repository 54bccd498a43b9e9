"""Chapter 9, what surrounds the loop: the run's folder, its metrics and checkpoints, and how a run is stopped.

config.json      all flags, versions, commit, checksums of the data
metrics.jsonl    an object a line; those of "event": "final" are the results
checkpoint.pt    all that a run needs to go on as if it had never stopped
adapter/         the vectors, as PEFT keeps them; of full fine-tuning model/; of a grid adapters/ with one for each cell
"""

import dataclasses
import io
import json
import os
import platform
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

import minia3
from minia3 import files
from minia3.backward import checkpointed
from minia3.blocks import Attention, Block
from minia3.files import lock

PARTS = ("config.json", "metrics.jsonl", "checkpoint.pt", "adapter", "adapters", "model")


class Failed(Exception):
    """A run that cannot go on, and what to try."""


class Stopped(BaseException):
    """A signal asked to stop: its number."""


class Signals:
    """Ctrl-C and SIGTERM raise Stopped: at once, but within a step (`in_step`) at its end: none is half done."""

    def __init__(self):
        self.in_step, self.number = False, None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self)

    def __call__(self, number, frame):
        self.number = number
        self.check()

    def check(self):
        if self.number is not None and not self.in_step:
            raise Stopped(self.number)


def name(config):
    """The default name of a run's folder: <model>-<task>-<method>-<seed>, where need be with several values, and lr.

    Of a mixture the method is ia3-one.
    """
    lists = [x if isinstance(x, tuple) else (x,) for x in (config.task, config.seed, config.lr)]
    lists[0], parts = [Path(task).stem for task in lists[0]], []
    for values in lists:
        text = ",".join(map(str, values))
        parts.append(f"{values[0]}+{len(values) - 1}" if len(text) > 50 and len(values) > 1 else text)
    method = config.method + "-one" * (config.adapters == "one" and len(lists[0]) > 1)
    return "-".join([Path(config.model).name, parts[0], method, *parts[1 : 3 if len(lists[2]) > 1 else 2]])


def open_run(config, check):
    """-> config, the run's folder (None: nothing is written), its last checkpoint (None: there is none), its lock.

    check: raises ValueError for a config that cannot be.
    """
    if config.resume is not None:
        if config != type(config)(resume=config.resume):
            raise ValueError("--resume goes alone: all other flags come from the config.json of its folder")
        folder = Path(config.resume)
        raw = {key: tuple(x) if isinstance(x, list) else x for key, x in read_config(folder).items()}
        config = type(config)(**{key: raw[key] for key in vars(config) if key in raw})
        check(config)
        held = lock(folder)
        return config, folder, load_checkpoint(folder), held
    check(config)
    if config.out is None and config.eval_only:
        return config, None, None, None
    config.out = config.out or str(Path("runs", name(config)))
    folder = Path(config.out)
    return config, folder, None, begin(folder, dataclasses.asdict(config))


def begin(folder, values):
    """Make the folder of a new run, with its config.json: -> its lock. `values`: of all flags.

    Raises ValueError where `folder` cannot be made or written to, and where it holds a run.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = lock(folder)
        if found := ", ".join(name for name in PARTS if (folder / name).exists()):
            raise ValueError(f"{folder} holds a run already ({found}): use --resume or another --out, or remove it")
        files.write_json(folder / "config.json", values | environment())
    except OSError as error:
        raise ValueError(f"--out is {str(folder)!r}, expected a folder to write to: {error.strerror}") from None
    return held


def discard(folder):
    """Undo `begin`, where a run ended before it measured anything: the next try finds the place free."""
    if not (folder / "metrics.jsonl").exists():
        for name in ("config.json", ".lock"):
            (folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # it held other files before
            folder.rmdir()


def read_config(folder):
    """The flags of a run, and what else its config.json holds. Raises ValueError for a folder that holds no run."""
    try:
        config = files.read_json(folder / "config.json")
        if not {"model", "task"} <= config.keys():
            raise ValueError(f"{folder / 'config.json'} is that of something else")
    except ValueError as error:
        raise ValueError(f"expected the folder of a run: {error}") from None
    return config


def record_data(folder, checksums):
    """Add the data's checksums to config.json. Raises ValueError where a run that goes on began with other data."""
    config = read_config(folder)
    if config.get("data", checksums) != checksums:
        raise ValueError(f"{folder}: the task's files have changed since this run began: put them back, or begin anew")
    files.write_json(folder / "config.json", config | {"data": checksums})


def environment():
    """What a result depends on beside the flags: versions, and the commit of the repository that the code is in."""
    commit = None
    with suppress(OSError, subprocess.CalledProcessError):  # no git, or no repository
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
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


def save_checkpoint(folder, state):
    if folder is None:  # nothing is written
        return
    buffer = io.BytesIO()  # torch's own writer hides what the disk says
    torch.save(state, buffer)
    with files.replacing(folder / "checkpoint.pt") as temporary:
        temporary.write_bytes(buffer.getbuffer())


def finish(folder, saved, whole):
    """The last checkpoint, without what only going on needs; of a whole model that would be four times its size."""
    gone = ("optimizers", "random") + ("vectors", "cells") * whole
    save_checkpoint(folder, {key: x for key, x in saved.items() if key not in gone} | {"finished": True})


def load_checkpoint(folder):
    """The last checkpoint of a run, or None. Raises ValueError where it is damaged."""
    path = folder / "checkpoint.pt"
    with files.reading(path, "damaged; without it, the run begins anew"):
        state = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
        if state is not None and not (state["finished"] or {"done", "metrics"} <= state.keys()):
            raise TypeError("not the state of a run")
        return state


def prepare(model, config):
    """How the model's modules are to train, as the flags say."""
    if config.compile:
        torch._dynamo.config.cache_size_limit = 64  # graphs of a block: first or last, padded or not, training or not
    for module in model.modules():
        if config.dropout is not None and isinstance(module, torch.nn.Dropout | Attention):
            setattr(module, "dropout" if isinstance(module, Attention) else "p", config.dropout)
        if config.checkpoint and isinstance(module, Block):
            module.forward = checkpointed(module.forward)
        if config.compile and isinstance(module, Block):
            module.compile(dynamic=True)


def values(vectors):
    return {name: vector.detach().cpu().clone() for name, vector in vectors.items()}


def set_values(vectors, saved):
    for name, value in saved.items():
        vectors[name].data.copy_(value)


def finite(vectors):
    return all(bool(x.isfinite().all()) for x in vectors.values())


def random_state():
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_random_state(state):
    torch.set_rng_state(state["cpu"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def choose_device(name):
    """-> the device, and why this one. Raises ValueError for one that is not there."""
    if name is None:
        found = torch.cuda.is_available()
        return torch.device("cuda" if found else "cpu"), torch.cuda.get_device_name() if found else "no CUDA GPU found"
    try:
        torch.ones(1, device=name).tolist()
        return torch.device(name), "as asked"
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device is {name!r}, expected cpu or cuda: {files.one_line(error)}") from None


def peak_memory(device):
    """Bytes: the most that torch held on a CUDA device; on the CPU, the largest resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(ImportError):  # Windows has none
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return 0
