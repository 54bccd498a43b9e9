"""Run damaged files through their readers, in forked processes, and count how that ends.

A case ends well if the file is refused in a ValueError of one line, or if what was read is what an
honest reading of the damaged file gives. It must not end in another exception, a crash, a hang, or
gigabytes.

One thing cannot be promised: a file that is cut *while* it is mapped ends the process with SIGBUS,
in torch and safetensors as here. Replace files by renaming them, as everything in minia3 does; a
mapped file then stays whole.
"""

import os
import random
import re
import resource
import shutil
import signal
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from tests.hostile.damage_targets import TARGETS, check_one_line
from tests.hostile.mutations import mutate

SECONDS = 5  # that one case may take on the CPU
MEGABYTES = 300  # that one case may fill
MEMORY = 4 << 30  # bytes that a process may ask for, filled or not

REFUSED = "refused"
READ = "read"


@dataclass
class Tally:
    """How the cases of a target ended."""

    target: str
    n_cases: int = 0
    n_refused: int = 0
    n_read: int = 0
    failures: list = field(default_factory=list)  # "number: what was done: what went wrong"
    seconds: float = 0.0

    def add(self, line):
        """Count a line that a process wrote: "number outcome", or the text of a failure."""
        number, _, outcome = line.partition(" ")
        if outcome == REFUSED:
            self.n_refused += 1
        elif outcome == READ:
            self.n_read += 1
        elif number.endswith(":"):
            self.failures.append(line)


def run_target(name, n_cases, seed, folder, stops_early=False):
    """Return the Tally of cases 0, 1, 2 ... of a target. folder: an empty folder to work in.

    stops_early: stop after the process in which a case fails.
    """
    whole = folder / "whole"
    scratch = folder / "scratch"
    whole.mkdir()
    target = TARGETS[name]
    target.make(whole)
    target.read(shutil.copytree(whole, scratch))  # the whole files are read, and are right

    tally = Tally(name, n_cases)
    began = time.monotonic()
    first = 0
    while first < n_cases and not (stops_early and tally.failures):
        numbers = range(first, n_cases)
        lines, status = run_process(name, numbers, seed, whole, scratch)
        for line in lines:
            tally.add(line)
        last = max(int(re.match(r"\d+", line)[0]) for line in lines)
        if status:
            reason = f"ended the process with status {status} (27: more than {SECONDS} s of CPU)"
            tally.failures.append(f"{last}: {reason}")
        first = last + 1
    tally.seconds = time.monotonic() - began
    return tally


def run_process(name, numbers, seed, whole, scratch):
    """Run cases in a forked process. Return the lines that it wrote, and its status."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            run_cases(name, numbers, seed, whole, scratch, writing)
        finally:
            os._exit(1)
    os.close(writing)
    with open(reading) as pipe:
        lines = pipe.read().splitlines()
    _, status = os.waitpid(process, 0)
    return lines, status


def run_cases(name, numbers, seed, whole, scratch, pipe):
    """Run cases, and never return. Write a line to `pipe` before and after each of them."""
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # Rust prints notes, and its panics, which become ValueErrors
        os.dup2(nowhere, stream)
    warnings.simplefilter("ignore")
    status = Path("/proc/self/status").read_text()
    limit = int(re.search(r"VmSize:\s+(\d+) kB", status)[1]) * 1024 + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for number in numbers:
        os.write(pipe, f"{number}\n".encode())
        # These signals end the process. The second is for a case that waits for something.
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.setitimer(signal.ITIMER_REAL, 20 * SECONDS)
        action, outcome = run_case(name, number, seed, whole, scratch)
        line = f"{number} {outcome}"
        if outcome not in (REFUSED, READ):
            line = f"{number}: {action}: {outcome}"
        os.write(pipe, f"{line}\n".encode("utf-8", "replace"))
    os._exit(0)


def run_case(name, number, seed, whole, scratch):
    """Return what was done to the files, and REFUSED, READ, or what went wrong."""
    action = make_case(name, number, seed, whole, scratch)
    before = peak_memory()
    try:
        outcome = read_or_refuse(TARGETS[name], scratch)
        n_megabytes = (peak_memory() - before) // 1024
        assert n_megabytes < MEGABYTES, f"{n_megabytes} MB of memory"
    except BaseException as error:  # a panic of Rust is not even an Exception
        message = (str(error).splitlines() or ["wrong"])[0]
        if not isinstance(error, AssertionError):
            message = f"{type(error).__name__}: {message}"
        return action, message[:300]
    return action, outcome


def make_case(name, number, seed, whole, scratch):
    """Put the damaged files of a case into `scratch`, and return what was done to them."""
    rng = random.Random(f"{seed} {name} {number}")
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(whole, scratch)
    return mutate(rng, scratch)


def read_or_refuse(target, folder):
    try:
        target.read(folder)
    except ValueError as error:
        check_one_line(error)
        return REFUSED
    return READ


def peak_memory():
    """Return the most that this process has had, in kB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
