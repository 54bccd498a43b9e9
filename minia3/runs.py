"""Chapter 9, what surrounds the loop: the run's folder, its metrics and checkpoints, and how a run is stopped.

config.json      all flags, versions, commit, checksums of the data
metrics.jsonl    an object a line; the last one is the result
checkpoint.pt    all that a run needs to go on as if it had never stopped
adapter/         the vectors, as PEFT keeps them
"""

import io
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

import minia3
from minia3 import files, flags

MEASURING = ("data_dir", "dtype", "max_length", "max_new_tokens", "eval_prompt")  # flags that a result depends on


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


def lock(folder):
    """Hold `folder` until the returned file is closed. Raises ValueError where another process holds it."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    file = open(folder / ".lock", "w")  # noqa: SIM115 (stays open as long as the run lasts)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(f"{folder}: another run is writing there") from None
    return file


def begin(folder, values):
    """Make the folder of a new run, with its config.json: -> its lock. `values`: of all flags.

    Raises ValueError where `folder` cannot be made or written to, and where it holds a run.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = lock(folder)
        names = ("config.json", "metrics.jsonl", "checkpoint.pt", "adapter")
        if found := [name for name in names if (folder / name).exists()]:
            raise ValueError(
                f"{folder} holds a run already ({', '.join(found)}): go on with --resume, give another --out, "
                "or remove the folder"
            )
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
    except ValueError as error:
        raise ValueError(f"expected the folder of a run: {error}") from None
    if not {"model", "task"} <= config.keys():
        raise ValueError(f"expected the folder of a run: {folder / 'config.json'} is that of something else")
    return config


def record_data(folder, checksums):
    """Add the data's checksums to config.json. Raises ValueError where a run that goes on began with other data."""
    config = read_config(folder)
    if config.get("data", checksums) != checksums:
        raise ValueError(f"{folder}: the task's files have changed since this run began: put them back, or begin anew")
    files.write_json(folder / "config.json", config | {"data": checksums})


def environment():
    """What a result depends on beside the flags: versions, and the commit of the repository that the code is in."""

    def git(*words):
        try:
            where = Path(__file__).parent
            return subprocess.run(["git", *words], cwd=where, capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    commit = git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    return {"minia3": minia3.__version__, "git_commit": commit or None, "versions": versions}


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
    buffer = io.BytesIO()  # torch's own writer hides what the disk says
    torch.save(state, buffer)
    with files.replacing(folder / "checkpoint.pt") as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_checkpoint(folder):
    """The last checkpoint of a run, or None. Raises ValueError where it is damaged."""
    path = folder / "checkpoint.pt"
    try:
        return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
    except Exception as error:  # of many kinds
        why = files.not_what_it_says(path) or files.one_line(error)
        raise ValueError(f"{path}: damaged; without it, the run begins anew: {why}") from None


def random_state():
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_random_state(state):
    torch.set_rng_state(state["cpu"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def peak_memory(device):
    """Bytes: the most that torch held on a CUDA device; on the CPU, the largest resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def describe(metric, result):
    auc = "" if result["auc"] is None else f", AUC {result['auc']:.2f}"
    return f"{metric} {result['accuracy']:.1%}{auc}"


def report(config, folder, final):
    cut = f", {final['rows_cut']} of them cut to {config.max_length} tokens" if final["rows_cut"] else ""
    print(f"\n{final['task']}: {final['rows']} rows of {final['split']}{cut}")
    print(f"  {final['metric']:<12}{final['accuracy_before']:.1%}", end="")
    print(f" before, {final['accuracy']:.1%} after" if final["trainable"] else "")
    if final["auc"] is not None:
        print(f"  {'AUC':<12}{final['auc_before']:.2f}", end="")
        print(f" before, {final['auc']:.2f} after" if final["trainable"] else "")
    print(f"  {'memory':<12}{final['peak_memory_bytes'] / 1e6:,.0f} MB at the most")
    if final["trainable"]:
        share = final["trainable"] / final["total"]
        print(f"  {'trained':<12}{final['trainable']:,} of {final['total']:,} numbers ({share:.3%})")
        print(f"  {'time':<12}{final['seconds']:.0f} s for {final['steps']} steps")
        print(f"  {'adapter':<12}{folder / 'adapter'}")
        names = ["model", "task", *(name for name in MEASURING if getattr(config, name) != getattr(type(config), name))]
        words = [*flags.words(config, names), "--adapter", str(folder / "adapter"), "--eval-only"]
        print(f"  {'use it':<12}python train.py {shlex.join(words)}")
