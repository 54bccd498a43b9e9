"""torchrun: start several processes as torchrun does, and end as they end.

torchrun itself reports a traceback of its own and forty lines whenever one of its processes fails,
and its exit code is 1 whatever theirs is. A process has no say in that, so this command calls
torchrun from outside.
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
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.ERROR)  # the processes say themselves what is wrong
    try:
        run.run(run.parse_args(args.script))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
    except SignalException as stop:
        return 128 + stop.sigval
    return 0
