"""Run both sides of a job as processes, in turns, and time them from start to end.

On a shared machine, the second ten minutes may be slower than the first. So the sides do not run
one after the other: one is stopped while the other runs, and they change every few seconds.
"""

import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
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
    # Run the processes of a side with a Runner, and wait for them.
    ours: Callable[["Runner"], None]
    theirs: Callable[["Runner"], None]
    # Say in a few words what agrees. Raise AssertionError if the results do not.
    agreement: Callable[[], str]
    # The FLOPs of our matrix products.
    flops: float
    # What else a reader should know, such as latencies. Called after the last round.
    notes: Callable[[], str] = str
    # Whether a process may be stopped for a while. One that reads a clock may not.
    may_stop: bool = True


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
    """Starts processes that see the same threads, the same caches and no network.

    It runs one process at a time, which `stop` pauses and `go_on` continues.
    """

    # All runners share it. It is held to start a process, to signal it, and to see if it has ended.
    lock = threading.Lock()

    def __init__(self, setting, cache):
        self.n_rounds = setting.rounds
        self.before_words = []  # of the command line: see `seconds_of_kernels`
        self.process = None
        self.is_stopped = False
        self.has_ended = False
        self.cpu_seconds = 0.0  # of all cores, of the processes that have ended
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
        """Run Python with the words, and wait. Raise RuntimeError if that fails, or after `end`."""
        command = [sys.executable, *map(str, [*self.before_words, *words])]
        with tempfile.TemporaryFile("w+") as printed:
            with self.lock:
                if self.has_ended:
                    raise RuntimeError("the other side has failed")
                self.process = subprocess.Popen(
                    command, env=self.environment, stdout=printed, stderr=printed, text=True
                )
                if self.is_stopped:
                    self.process.send_signal(signal.SIGSTOP)
            while (returncode := self.poll()) is None:
                time.sleep(0.01)
            if returncode:
                printed.seek(0)
                raise RuntimeError(f"{' '.join(command)}: {printed.read()[-3000:]}")

    def poll(self):
        """Return how the process has ended, and count what it computed; None if it goes on."""
        with self.lock:
            before = cpu_of_children()
            returncode = self.process.poll()
            self.cpu_seconds += cpu_of_children() - before
            if returncode is not None:
                self.process = None
        return returncode

    def stop(self):
        """Pause the process, and those that are started later."""
        self.is_stopped = True
        self.send(signal.SIGSTOP)

    def go_on(self):
        self.is_stopped = False
        self.send(signal.SIGCONT)

    def end(self):
        """Kill the process if there is one, and start no more."""
        self.has_ended = True
        self.send(signal.SIGKILL)

    def send(self, number):
        with self.lock:
            if self.process is not None:
                self.process.send_signal(number)

    def script(self, name, **flags):
        """Run a script of their side."""
        self("-c", RUN_SCRIPT, SIDES / name, *as_words(flags))

    def seconds_of_kernels(self, job):
        """Do our side again, in each round. Return the least seconds of its kernels (timed.py)."""
        times = []
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "seconds"
            for _ in range(self.n_rounds):
                self.before_words = ["-m", "tests.benchmarks.jobs.timed", file]
                job.ours(self)
                self.before_words = []
                times.append(float(file.read_text()))
        return min(times)


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


def run_job(job, setting, cache):
    """Return the Outcome of a job. Who begins changes each round."""
    times = {"ours": [], "theirs": []}
    cpu_times = {"ours": [], "theirs": []}
    order = ["ours", "theirs"]
    for _ in range(setting.rounds):
        runners = {side: Runner(setting, cache) for side in order}
        sides = {side: getattr(job, side) for side in order}
        seconds_of_a_turn = setting.turns if job.may_stop else None
        for side, n_seconds in run_in_turns(sides, runners, seconds_of_a_turn).items():
            times[side].append(n_seconds)
            cpu_times[side].append(runners[side].cpu_seconds)
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


def run_in_turns(sides, runners, seconds_of_a_turn):
    """Return the seconds that each side ran, without those in which it was stopped.

    sides: name to function of a Runner. seconds_of_a_turn: None lets each side run to its end.
    """
    times = dict.fromkeys(sides, 0.0)
    with ThreadPoolExecutor(len(sides)) as pool:
        try:
            for runner in runners.values():
                runner.stop()
            running = {side: pool.submit(run, runners[side]) for side, run in sides.items()}
            while running:
                for side, outcome in list(running.items()):
                    begin = time.perf_counter()
                    runners[side].go_on()
                    wait([outcome], seconds_of_a_turn)
                    runners[side].stop()
                    times[side] += time.perf_counter() - begin
                    if outcome.done():
                        outcome.result()  # raises what the side has raised
                        del running[side]
        finally:
            for runner in runners.values():
                runner.end()
    return times


def cpu_of_children():
    """Return the seconds that the processes which have ended have computed."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
