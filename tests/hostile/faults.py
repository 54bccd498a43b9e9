"""Take something away from the deeds while they write: the disk, permissions, descriptors, memory.

A deed must then do what it does without the fault, or end with an exit code and one line that says
why, and never with a traceback. Afterwards the same command (a training resumes) must leave what it
leaves without a fault, as after a kill.

A case is named by (seed, fault, number). Its number says which deed it is.
"""

import math
import operator
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from tests.hostile.campaign import Tally
from tests.hostile.deeds import DEEDS
from tests.hostile.kills import Watch, difference, is_change, results_in
from tests.hostile.processes import last_line, run_process

MEGABYTE = 1 << 20


def fill_disk(rng, reference, folder):
    """From some change on, nothing new fits on the disk, or only files of some bytes."""
    change = rng.randrange(reference.n_changes)
    if rng.random() < 0.5:
        longest = int(np.exp(rng.uniform(0, np.log(reference.n_bytes))))
        limits = (longest, resource.RLIM_INFINITY)
        Watch(folder, change, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))
    else:
        Refusal(folder, change, OSError(28, "No space left on device"), creates)


def forbid_changes(rng, reference, folder):
    """From some change on, the folder is read-only."""
    change = rng.choice([0, rng.randrange(reference.n_changes)])
    Refusal(folder, change, PermissionError(13, "Permission denied"))


def break_disk(rng, reference, folder):
    """One change fails, and the next ones do not."""
    Refusal(folder, rng.randrange(reference.n_changes), OSError(5, "Input/output error"), lasts=1)


def take_descriptors(rng, reference, folder):
    """Let only a few more files be open at a time."""
    n_open = len(os.listdir("/proc/self/fd"))
    n_files = n_open + rng.choice([0, 1, 2, 3, 5, 8, 13])
    resource.setrlimit(resource.RLIMIT_NOFILE, (n_files, n_files))


def take_memory(rng, reference, folder):
    """Leave some megabytes."""
    status = Path("/proc/self/status").read_text()
    n_bytes = int(re.search(r"VmSize:\s+(\d+) kB", status)[1]) * 1024
    limit = n_bytes + int(MEGABYTE * 2 ** rng.uniform(-4, 6))
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def interrupt(rng, reference, folder):
    """Ctrl-C, or the SIGTERM of a cluster, at some change."""
    number = rng.choice([signal.SIGINT, signal.SIGTERM])
    change = rng.randrange(reference.n_changes)
    Watch(folder, change, lambda: os.kill(os.getpid(), number))


def remove_folder(rng, reference, folder):
    """Somebody removes what is being written."""
    change = rng.randrange(1, reference.n_changes)
    Watch(folder, change, lambda: remove_all(folder))


def remove_all(folder):
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def turn_clock(rng, reference, folder):
    """The clock begins in 1970, jumps backward, or goes to 2106."""
    real = time.time
    offset = rng.choice([-real(), -1e6, 2**32])
    jumps = rng.choice([0, 3600])
    calls = iter(range(1 << 60))
    time.time = lambda: max(real() + offset - jumps * next(calls), 0.0)
    time.time_ns = lambda: int(time.time() * 1e9)


def mix_up_environment(rng, reference, folder):
    """No home, another language, narrow permissions of new files, and no terminal's size."""
    for name in ("HOME", "USER", "LANG", "TERM", "COLUMNS", "PATH"):
        os.environ.pop(name, None)
    os.environ["LC_ALL"] = rng.choice(["C", "tr_TR.UTF-8", "none"])
    os.environ["TMPDIR"] = rng.choice(["/nowhere", str(folder.parent)])
    torch.set_default_dtype(rng.choice([torch.float32, torch.float64, torch.bfloat16]))
    sys.stdin = None


class Refusal:
    """Lets changes of a folder fail, from a change on."""

    def __init__(self, folder, change, error, applies=is_change, lasts=10**9):
        self.error = error
        self.applies = applies
        self.n_left = lasts
        self.is_on = False
        Watch(folder, change, self.begin)
        self.folder = str(folder)
        sys.addaudithook(self.notice)

    def begin(self):
        self.is_on = True

    def notice(self, event, arguments):
        if not self.is_on or not self.n_left or not self.applies(event, arguments):
            return
        path = arguments[0]
        if isinstance(path, str | bytes | os.PathLike):
            path = os.fsdecode(path)
            if path.startswith(self.folder) or not os.path.isabs(path):
                self.n_left -= 1
                raise type(self.error)(*self.error.args, path)


def creates(event, arguments):
    if event == "open":
        return is_change(event, arguments)
    return event in ("os.mkdir", "os.link", "os.symlink")


def is_near(expected, found):
    """Return whether two results are equal but for rounding.

    MKL computes a product in another way if it gets no memory for its buffers, so the last bits of
    a run under a limit of memory may differ.
    """
    if isinstance(expected, dict):
        return expected.keys() == found.keys() and all(
            is_near(value, found[name]) for name, value in expected.items()
        )
    if isinstance(expected, list):
        return len(expected) == len(found) and all(map(is_near, expected, found))
    if isinstance(expected, float):
        return math.isclose(expected, found, rel_tol=1e-3, abs_tol=1e-4)
    if isinstance(expected, bytes) and expected != found:
        return are_near_tensors(expected, found)
    return expected == found


def are_near_tensors(expected, found):
    """Return whether two contents of files are tensors that are equal but for rounding."""
    try:
        tensors = safetensors.torch.load(expected)
        found = safetensors.torch.load(found)
    except safetensors.SafetensorError:  # other files
        return False
    return tensors.keys() == found.keys() and all(
        torch.allclose(x, found[name], rtol=1e-3, atol=1e-4) for name, x in tensors.items()
    )


@dataclass(frozen=True)
class Fault:
    begin: Callable  # (rng, reference, folder): called in the process of the deed
    exit_codes: tuple = (1, 2)  # with which a deed may end, besides 0
    is_equal: Callable = operator.eq  # compares what a file has with what it should have


FAULTS = {
    "disk full": Fault(fill_disk),
    "read-only": Fault(forbid_changes),
    "disk error": Fault(break_disk),
    "descriptors": Fault(take_descriptors),
    # A library in Rust aborts the process if it gets no memory, which is no worse than a kill.
    "memory": Fault(take_memory, exit_codes=(1, 2, -signal.SIGABRT), is_equal=is_near),
    "signals": Fault(interrupt, exit_codes=(1, 130, 143, -signal.SIGTERM)),
    "folder removed": Fault(remove_folder),
    "clocks": Fault(turn_clock, exit_codes=()),
    "environment": Fault(mix_up_environment, exit_codes=()),
}


def run_fault(campaign, name, number, seed):
    """Run a deed under a fault, and again without it.

    Return whether it succeeded under the fault, and what went wrong, or None.
    """
    deed_name = list(DEEDS)[number % len(DEEDS)]
    deed = DEEDS[deed_name]
    reference = campaign.refer(deed_name)
    rng = random.Random(f"{seed} {name} {number}")
    campaign.begin(deed)

    def run():
        FAULTS[name].begin(rng, reference, campaign.scratch)
        return deed.run(campaign.inputs, campaign.scratch)

    code, printed = run_process(run)
    is_equal = FAULTS[name].is_equal
    wrong = check_ending(code, printed, FAULTS[name])
    # Nobody notices a folder that is removed at the very end.
    if not wrong and code == 0 and name != "folder removed":
        wrong = difference(reference.results, results_of(campaign.scratch), is_equal)
    if not wrong and code:
        if name == "folder removed":
            campaign.begin(deed)
            deed = replace(deed, again=None)
        wrong = campaign.do_again(deed, reference, is_equal)
    return code == 0, wrong and f"{deed_name}: {wrong}"


def results_of(folder):
    try:
        return results_in(folder)
    except ValueError as error:
        return {"unreadable": str(error)}


def check_ending(code, printed, fault):
    """Return what is wrong with how a process ended, or None."""
    if code < 0 and code in fault.exit_codes:
        return None
    last = last_line(printed)
    ending = f"exit code {code}: {last}"
    for mark in ("Traceback", "Exception ignored", "panicked", "terminate called"):
        if mark in printed:
            return f"{mark}: {ending}"
    if code not in (0, *fault.exit_codes):
        return ending
    if code in (1, 2) and not re.match(r"(train\.py|minia3): .", last):
        return f"no reason: {ending}"
    return None


def run_faults(campaign, names, seed, n_rounds, show):
    """Run every fault with every deed `n_rounds` times, and return a Tally for each fault."""
    tallies = []
    for name in names:
        n_cases = n_rounds * len(DEEDS)
        tally = Tally(name, n_cases)
        began = time.monotonic()
        for number in range(n_cases):
            was_done, wrong = run_fault(campaign, name, number, seed)
            if wrong:
                tally.failures.append(f"{number}: {wrong}")
            elif was_done:
                tally.n_read += 1
            else:
                tally.n_refused += 1
        tally.seconds = time.monotonic() - began
        show(tally)
        tallies.append(tally)
    return tallies
