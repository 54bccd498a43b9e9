"""Processes that are forked from this one, which has imported torch, so that each starts at once.

This process must have no threads of its own when it forks, because a child has none of them and
would wait for them. So nothing is computed here: models are made in children, too.
"""

import contextlib
import importlib
import os
import pkgutil
import signal
import sys
import traceback

import torch

# The first AdamW of a process imports this, which takes seconds.
import torch._dynamo
from forked import forget_shared_lock
from tqdm import tqdm

import minia3
from minia3.training import run_folder

SECONDS = 60  # that a process may take


def warm_up():
    """Import what the children need, and let them find the same commit of this code."""
    torch.set_num_threads(1)
    sys.dont_write_bytecode = True
    tqdm.monitor_interval = 0  # else a thread
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["no_proxy"] = "127.0.0.1"
    for module in pkgutil.walk_packages(minia3.__path__, "minia3."):
        if not module.name.endswith(("__main__", "template_worker")):
            importlib.import_module(module.name)
    # git takes longer than a run, and finds another state of the code while somebody works on it.
    run_folder.git_commit = lambda: None


def start_process(act, output=None):
    """Call `act` in a forked process, and return its id. Its exit code is what `act` returns.

    output: a file descriptor (default: nowhere).
    """
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        lead_output_to(os.open(os.devnull, os.O_WRONLY) if output is None else output)
        code = act() or 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def lead_output_to(output):
    """Lead standard output and standard error there, and let signals end this process."""
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    for number in (signal.SIGALRM, signal.SIGPROF, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    forget_shared_lock()


def finish(pid):
    """Wait for a process. Return its exit code, or minus the number of the signal that ended it."""
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def run_process(act):
    """Call `act` in a forked process and wait for it. Return its exit code, and what it printed.

    A process that takes more than SECONDS ends with the signal of an alarm.
    """

    def act_in_time():
        os.close(reading)
        signal.alarm(SECONDS)
        return act()

    # Not a file, because a limit on the length of files, or a full disk, would hold for it, too.
    reading, writing = os.pipe()
    pid = start_process(act_in_time, writing)
    os.close(writing)
    with open(reading, encoding="utf-8", errors="replace") as pipe:
        printed = pipe.read()
    return finish(pid), printed


def last_line(printed):
    lines = printed.splitlines()
    return lines[-1][:300] if lines else "(nothing printed)"
