"""`minia3.train`: a run from Python, in a notebook or in a thread."""

import gc
import os
import signal
import threading
from pathlib import Path
from typing import NamedTuple

from minia3.files.streams import some_output
from minia3.training.command_line import complete
from minia3.training.config_file import as_flag, find_field
from minia3.training.loop import load_loop
from minia3.training.shown_commands import CALL
from minia3.training.signals import Stopped
from minia3.training.start import run_config

ONE_AT_A_TIME = threading.Lock()  # torch's settings and random numbers belong to the process


class Trained(NamedTuple):
    """What a run leaves."""

    results: list[dict]  # the final lines of metrics.jsonl, one per adapter and task
    folder: Path | None  # None if nothing was written


def train(model=None, task=None, **flags):
    """Run what `python train.py` runs. Return its results and its folder.

    model, task, flags: the flags of train.py, with _ for -, as in `batch_size=4`; `python train.py
    --help` explains them. A list makes a grid, as commas do: `seed=[0, 1]`.

    Raise ValueError for a mistake, and Failed (a RuntimeError) if the loss becomes NaN. On the main
    thread, an interrupt finishes the step and saves it before it raises KeyboardInterrupt. Settings
    of torch, its random numbers and the handlers of signals stay as they were, but compile=True
    raises a limit of torch's compiler for the rest of the process, and offload=True starts a
    process group of torch.distributed and, if it is the first to use CUDA, leaves its card the
    current one. Runs in several threads take turns.
    """
    config = complete(given_flags({"model": model, "task": task, **flags}))
    loop = load_loop()
    with ONE_AT_A_TIME:
        try:
            with some_output():
                run = run_config(config, loop.run_grid, CALL)
        except Stopped as stop:
            number = stop.number
        else:
            return Trained(run.finals, run.folder)
        finally:
            gc.collect()  # before another model is loaded, see `run_grid` in train.py
    # Now the signal does what it would have done without us.
    signal.raise_signal(number)
    raise KeyboardInterrupt


def given_flags(flags):
    """Return the flags that are not None, as the command line would read them."""
    given = {}
    for name, value in flags.items():
        field = find_field(name, "minia3.train")
        if value is not None:
            is_path = isinstance(value, os.PathLike)
            given[field.name] = as_flag(field, without_classes(value), is_single=is_path)
    return given


def as_python(value):
    """Return numbers and arrays of NumPy, torch and pandas as numbers and lists of Python."""
    return value.tolist() if hasattr(value, "tolist") else value


def without_classes(value):
    """Return the value of a flag with texts in place of paths, and Python's numbers and lists."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    value = as_python(value)
    if isinstance(value, list | tuple | range):
        return [without_classes(part) for part in value]
    return value
