"""Runs in several processes that torchrun starts.

Python takes seconds to import torch. So torchrun itself, and the processes that it starts, are
forked from the server of running.py, which has imported torch already. `call_python` starts all of
them as a user does.
"""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import running
from forked import forget_shared_lock, print_into, run_as_python
from running import ROOT
from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import (
    SubprocessHandler,
)

TORCHRUN = ("-m", "torch.distributed.run")
OURS = ("-m", "minia3", "torchrun")  # which ends as the processes do
SECONDS = 120  # that a run of these tests may take


def torchrun_words(n_processes, arguments, torchrun=OURS, machines=("--standalone",)):
    """Return what follows `python` on the command line that starts several processes.

    machines: flags of torchrun that say which machines there are, and which one this is.
    """
    count = [*machines, "--nproc-per-node", n_processes]
    return [str(word) for word in (*torchrun, *count, *arguments)]


def call_python(n_processes, *arguments):
    """Start a script, or `-m` a module, as a user does, and return what `finish` returns."""
    process = subprocess.run(
        [sys.executable, *torchrun_words(n_processes, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    return process.returncode, process.stdout, process.stderr


# Forked processes


class Torchrun:
    """A process of torchrun, which has begun to start a script, or `-m` a module.

    n_starts: how often torchrun may start its processes.
    """

    def __init__(self, n_processes, *arguments, cwd=ROOT, n_starts=1, **options):
        self.folder = tempfile.TemporaryDirectory()
        self.out = Path(self.folder.name, "out")
        self.err = Path(self.folder.name, "err")
        words = torchrun_words(n_processes, arguments, **options)
        target = (words, n_starts * n_processes, cwd, str(self.out), str(self.err))
        self.process = running.processes().Process(target=be_torchrun, args=target)
        self.process.start()

    def send_signal(self, number):
        os.kill(self.process.pid, number)

    def wait_for(self, text):
        """Wait until the run has printed a text."""
        deadline = time.monotonic() + SECONDS
        while not (self.out.exists() and text in self.out.read_text()):
            assert self.process.is_alive(), f"{text!r} was not printed: {self.err.read_text()}"
            assert time.monotonic() < deadline, f"{text!r} was not printed in time"
            time.sleep(0.02)

    def pid_of_rank(self, rank):
        """Return the number that the system gives to the process with this rank (Linux only)."""
        pid = self.process.pid
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            if Path(f"/proc/{child}/comm").read_text() == f"rank {rank}\n":
                return int(child)
        raise AssertionError(f"there is no process of rank {rank}")

    def finish(self):
        """Wait for the end, and return (exit code, what was printed, errors)."""
        self.process.join(SECONDS)
        assert self.process.exitcode is not None, self.err.read_text()
        return self.process.exitcode, self.out.read_text(), self.err.read_text()


def call(n_processes, *arguments, **options):
    return Torchrun(n_processes, *arguments, **options).finish()


def be_torchrun(words, n_processes, cwd, out, err):
    """Run torchrun in this process, which has just been forked, and end with its exit code."""
    print_into(out, err, buffering=1)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup, with which CI may run
    os.chdir(cwd)
    os.environ.update(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    fork_workers(n_processes)
    run_as_python(words)


def fork_workers(n_processes):
    """Let the torchrun that this process is about to run start forks of this process.

    They are forked before torchrun has threads, because a fork copies only one thread.
    """
    workers = [Worker() for _ in range(n_processes)]

    def begin_worker(handler, command, environ):
        python, unbuffered, *words = command
        assert (python, unbuffered) == (sys.executable, "-u")
        return workers.pop(0).begin(words, environ)

    SubprocessHandler._popen = begin_worker


class Worker:
    """A forked process that waits until torchrun starts it.

    To torchrun it is a subprocess.Popen, so it has those methods that torchrun calls.
    """

    def __init__(self):
        context = multiprocessing.get_context("fork")
        receiver, self.sender = context.Pipe(duplex=False)
        self.process = context.Process(target=be_worker, args=(receiver,), daemon=True)
        self.process.start()
        self.pid = self.process.pid

    def begin(self, words, environ):
        self.sender.send((words, environ))
        return self

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout):
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked process", timeout)


def be_worker(receiver):
    """Wait for a command line and its environment, and run it as Python would."""
    os.setsid()  # as torchrun does, which sends signals to the group of a process
    words, environ = receiver.recv()
    os.environ.clear()
    os.environ.update(environ)
    with contextlib.suppress(OSError):  # only Linux has it
        Path("/proc/self/comm").write_text(f"rank {environ['RANK']}")
    forget_shared_lock()
    run_as_python(words)
