"""Chapter 9, what surrounds the loop: the run's folder, its metrics and checkpoints, and how a run is stopped.

config.json      all flags, versions, commit, checksums of the data
metrics.jsonl    an object a line; the last one is the result
checkpoint.pt    all that a run needs to go on as if it had never stopped
adapter/         the vectors, as PEFT keeps them
"""

import json
import platform
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import minia3
from minia3 import files


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
            number, self.number = self.number, None
            raise Stopped(number)


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
    """metrics.jsonl. What lies past `step`, where the run goes on, is cut (None: all of it)."""

    def __init__(self, folder, step):
        self.path = folder / "metrics.jsonl" if folder else None
        if folder and self.path.exists():
            kept = []
            for text in self.path.read_bytes().splitlines():
                try:
                    line = json.loads(text)
                except ValueError:  # the last line, if the run was killed while writing it
                    break
                if step is not None and line["step"] <= step:
                    kept.append(json.dumps(line) + "\n")
            with files.replacing(self.path) as temporary:
                temporary.write_text("".join(kept))

    def write(self, **values):
        if self.path:
            with self.path.open("a") as file:  # closed, and so flushed, line by line
                file.write(json.dumps(values) + "\n")


def save_checkpoint(folder, state):
    with files.replacing(folder / "checkpoint.pt") as temporary:
        torch.save(state, temporary)


def load_checkpoint(folder):
    """The last checkpoint of a run, or None."""
    path = folder / "checkpoint.pt"
    return torch.load(path, weights_only=True) if path.exists() else None


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
