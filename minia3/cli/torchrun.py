"""torchrun: start several processes as torchrun does, and end as they end.

If a process fails, torchrun itself prints a traceback and forty lines, and its exit code is 1,
whatever that of the process is. A process cannot change this, so this command calls torchrun.
"""

import logging
import os
import signal
import sys
from contextlib import contextmanager
from importlib.machinery import PathFinder

from minia3.files.read import one_line
from minia3.files.streams import print_error

# Seconds in which processes must end after a signal. torchrun kills them after 30 seconds, but with
# --method full, a run may take longer to save its state: three times as many bytes as the model.
SHUTDOWN_TIMEOUT = 600

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
    # Otherwise torch prints a stack of calls of C++ if a process ends before another one.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_TIMEOUT))
    from torch.distributed import DistNetworkError
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    options = torchrun.parse_args(args.script)
    check_script(options)
    n_processes = torchrun.determine_local_world_size(options.nproc_per_node)
    if n_processes < 1:
        given = options.nproc_per_node
        raise ValueError(f"torchrun: --nproc-per-node is {given}, expected at least 1 process")
    if n_processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        # torchrun logs this, too, but `without_logging` leaves it out.
        print_error(
            f"minia3: torchrun: each of {n_processes} processes computes on the CPU with a single "
            "thread: set OMP_NUM_THREADS for more"
        )
    try:
        with without_logging():
            torchrun.run(options)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print_error(f"minia3: torchrun: {describe_end(rank, -failure.exitcode)}")
            return 128 - failure.exitcode
        return failure.exitcode
    except SignalException as stop:
        return 128 + stop.sigval
    except DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise OSError(
            "torchrun: its port is in use, perhaps by another run on this machine: give "
            "--standalone, which takes a free one, or another --master-port"
        ) from None
    except RendezvousError as error:
        reason = one_line(error.__cause__ or error)
        message = "torchrun: the machines of this run cannot reach each other"
        raise OSError(f"{message}: {reason}") from None
    return 0


def describe_end(rank, number):
    """Return that a signal has ended a process, which could not say so itself.

    The other processes only know that it is gone, or that torchrun has told them to stop.
    """
    text = f"process {rank} was ended by signal {number} ({signal.strsignal(number)})"
    if number == signal.SIGKILL:
        text += ", which the system sends if memory runs out"
    return text


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
