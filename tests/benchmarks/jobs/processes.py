"""Run both sides of a job as processes, in alternation, and time them from start to end."""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SIDES = Path(__file__).parent / "sides"
RUN_SCRIPT = """
import runpy, sys
sys.modules["bitsandbytes"] = None  # see measure.py
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass
class Job:
    """A job that both sides do."""

    title: str
    goal: float  # the least that theirs / ours should be
    ours: Callable[[], None]  # runs our processes, and waits for them
    theirs: Callable[[], None]
    # Say in a few words what agrees. Raise AssertionError if the results do not.
    agreement: Callable[[], str]
    # The FLOPs of our matrix products.
    flops: float
    # What else a reader should know, such as latencies. Called after the last round.
    notes: Callable[[], str] = str


@dataclass
class Outcome:
    """What a job took: the medians of the rounds, in seconds."""

    title: str
    goal: float
    ours: float
    theirs: float
    ratio: float  # the median of the rounds
    ratios: list[float]
    our_cpu: float  # seconds of all cores, which other work on the machine changes less
    their_cpu: float
    agreed: str
    notes: str


class Runner:
    """Starts processes that see the same threads, the same caches and no network."""

    def __init__(self, setting, cache):
        self.before_words = []  # of the command line: see `seconds_of_kernels`
        self.environment = os.environ | {
            "OMP_NUM_THREADS": str(setting.threads),
            "RAYON_NUM_THREADS": str(setting.threads),  # of tokenizers
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(SIDES)]),
            "HF_HOME": str(cache),
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "TOKENIZERS_PARALLELISM": "true",
        }

    def __call__(self, *words):
        """Run Python with the words, and wait. Raise RuntimeError if the process fails."""
        command = [sys.executable, *map(str, [*self.before_words, *words])]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr[-3000:]}")

    def script(self, name, **flags):
        """Run a script of their side."""
        self("-c", RUN_SCRIPT, SIDES / name, *as_words(flags))

    def seconds_of_kernels(self, job):
        """Do our side once more. Return the seconds of its products, attention and norms."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "seconds"
            self.before_words = ["-m", "tests.benchmarks.jobs.timed", file]
            job.ours()
            self.before_words = []
            return float(file.read_text())


def as_words(flags):
    """Return flags as words of a command line. A flag that is True has no value."""
    words = []
    for name, value in flags.items():
        if value is False:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words.append(str(value))
    return words


def run_job(job, n_rounds):
    """Return the Outcome of a job. The sides take turns, and who begins changes each round."""
    times = {"ours": [], "theirs": []}
    cpu_times = {"ours": [], "theirs": []}
    order = ["ours", "theirs"]
    for _ in range(n_rounds):
        for side in order:
            begin = time.perf_counter()
            begin_cpu = cpu_of_children()
            getattr(job, side)()
            times[side].append(time.perf_counter() - begin)
            cpu_times[side].append(cpu_of_children() - begin_cpu)
        order.reverse()
    ratios = [theirs / ours for ours, theirs in zip(times["ours"], times["theirs"], strict=True)]
    return Outcome(
        title=job.title,
        goal=job.goal,
        ours=statistics.median(times["ours"]),
        theirs=statistics.median(times["theirs"]),
        ratio=statistics.median(ratios),
        ratios=ratios,
        our_cpu=statistics.median(cpu_times["ours"]),
        their_cpu=statistics.median(cpu_times["theirs"]),
        agreed=job.agreement(),
        notes=job.notes(),
    )


def cpu_of_children():
    """Return the seconds that the processes which have ended have computed."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
