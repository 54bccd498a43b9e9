"""Begin and end a run: what `python train.py`, `minia3 train` and `minia3.train` do alike.

Each of the three hands over `run_grid` of train.py, because no module imports train.py.
"""

import sys

import torch

from minia3.training.announce import announcing_warnings
from minia3.training.command_line import error_line, read_command_line
from minia3.training.command_lines import resume_command
from minia3.training.process_state import unchanged_process
from minia3.training.run import Failed, Run
from minia3.training.signals import Signals, Stopped


def run_command_line(words, run_grid, program):
    """Return the exit code: 0, 2 for a user's mistake, 1 for a failure, 128 + n for signal n."""
    try:
        run_config(read_command_line(words, program), run_grid, program)
        return 0
    except Stopped as stop:
        return 128 + stop.number
    except (torch.OutOfMemoryError, Failed, OSError, ValueError) as error:
        message = str(error)
        if isinstance(error, torch.OutOfMemoryError):
            message = f"{message:.200}: lower --micro-batch-size or --eval-batch-size"
        print(error_line(program, message), file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


def run_config(config, run_grid, program):
    """Run what the flags say, and return the Run. The process stays as it was.

    Raise ValueError for a user's mistake, Failed if the training failed, Stopped after a signal.
    """
    run = None
    try:
        with unchanged_process(), announcing_warnings(), Signals() as signals:
            run = Run(config, signals, program)
            run_grid(run, config)
        return run
    except Stopped:
        advice = ""
        if run and run.folder:
            advice = f"; to continue: {resume_command(program, run.folder)}"
        print(f"stopped{advice}", file=sys.stderr)
        raise
    except (torch.OutOfMemoryError, Failed, OSError, ValueError):
        if run:
            run.discard_if_new()
        raise
    finally:
        if run:
            run.close()
