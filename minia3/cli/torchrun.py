"""torchrun: start several processes as torchrun does, and end as they end.

If a process fails, torchrun itself prints a traceback and forty lines, and its exit code is 1,
whatever that of the process is. A process cannot change this, so this command calls torchrun.
"""

import logging
import os
import sys
from contextlib import contextmanager
from importlib.machinery import PathFinder

from minia3.files.read import one_line

TITLE = "Start a run in several processes, with torchrun's flags"
EXAMPLE = "minia3 torchrun --nproc-per-node 4 train.py --model t5-base --task rte"


def add_arguments(parser):
    parser.add_argument(
        "script",
        nargs="+",
        help="torchrun's flags (`torchrun --help` lists them), a script or `-m` and a module, and "
        "its own flags",
    )


def run(args):
    """Return the exit code of the process that failed first, or 0. A signal n is 128 + n."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    options = torchrun.parse_args(args.script)
    check_script(options)
    try:
        with without_logging():
            torchrun.run(options)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
    except SignalException as stop:
        return 128 + stop.sigval
    except RendezvousError as error:
        reason = one_line(error.__cause__ or error)
        raise OSError(f"torchrun: the machines of this run do not meet: {reason}") from None
    return 0


def check_script(options):
    """Raise ValueError if there is no such script or module: each process would say so itself.

    options: what torchrun has read from its command line.
    """
    name = options.training_script
    if options.no_python:  # it is a program, and may be anywhere on the PATH
        return
    if not options.module:
        if not os.path.exists(name):
            raise ValueError(f"torchrun: there is no script {name}")
        return
    # Of a.b, only a is looked for, because looking for b would import a.
    if PathFinder.find_spec(name.partition(".")[0], [os.getcwd(), *sys.path]) is None:
        raise ValueError(f"torchrun: there is no module {name}")


@contextmanager
def without_logging():
    """Let torchrun log nothing in the block: its processes say themselves what is wrong."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
