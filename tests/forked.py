"""What a forked process does to be a program of its own."""

import os
import runpy
import sys
import threading
from pathlib import Path

from tqdm import tqdm


def print_into(out, err, buffering=-1):
    """Append what this process prints to the files `out` and `err`. buffering: see `open`."""
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    options = {"buffering": buffering, "encoding": "utf-8", "closefd": False}
    sys.stdout = open(1, "w", **options)  # noqa: SIM115
    sys.stderr = open(2, "w", **options)  # noqa: SIM115


def forget_shared_lock():
    """Let this process write its bars of progress without the lock of all forked processes.

    A process that is killed may never release that lock.
    """
    tqdm.set_lock(threading.RLock())


def run_as_python(words):
    """Do what `python WORDS` does: run a text (-c), a module (-m) or a script."""
    first, *rest = words
    if first == "-c":
        text = rest.pop(0)
        sys.argv = ["-c", *rest]
        sys.path.insert(0, "")
        exec(compile(text, "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.argv = rest
        sys.path.insert(0, os.getcwd())
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        sys.path.insert(0, str(Path(first).resolve().parent))
        runpy.run_path(first, run_name="__main__")
