"""torchrun: start several processes as torchrun does, and end as they end.

If a process fails, torchrun itself prints a traceback and forty lines, and its exit code is 1,
whatever that of the process is. A process cannot change this, so this command calls torchrun.
"""

import logging

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

    logging.disable(logging.ERROR)  # the processes say themselves what is wrong
    try:
        torchrun.run(torchrun.parse_args(args.script))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
    except SignalException as stop:
        return 128 + stop.sigval
    return 0
