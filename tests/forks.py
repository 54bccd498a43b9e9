"""`python ...` as a fork of a process that has imported torch and, for benchmarks, the peers.

Imports are most of what a short program computes: two seconds for torch, three more for the peers.
A fork is a process with the words, the folder and the environment of the program, and it ends as
the program would end. But variables that are read when Python starts or a module is imported, such
as OMP_NUM_THREADS, MALLOC_ARENA_MAX and HF_HOME, have no effect on it.
"""

import atexit
import functools
import importlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from forked import forget_shared_lock, print_into, run_as_python
from running import ROOT, home, processes
from several import TORCHRUN, fork_workers

PEERS = (
    "peft",
    "transformers.models.llama.modeling_llama",
    "transformers.models.t5.modeling_t5",
    "transformers.trainer_seq2seq",
    "datasets",
)
NAMES_PEERS = re.compile(r"tests.benchmarks|peft|transformers")  # of a word: a name, path, program
Popen = subprocess.Popen


def fork_python(monkeypatch):
    """Let `subprocess` start forks for commands that start this Python."""
    monkeypatch.setattr(subprocess, "Popen", start)


def start(command, **options):
    """Return a Fork if a command starts this Python, and else what `subprocess` returns."""
    if command[0] == sys.executable:
        return Fork(command, **options)
    return Popen(command, **options)


class Fork:
    """What `subprocess.run`, and the tests, use of a subprocess.Popen. Output is text."""

    def __init__(self, command, cwd=None, env=None, stdout=None, stderr=None, text=True):
        self.args = command
        self.returncode = None
        self.streams = (stdout, stderr)
        self.folder = tempfile.TemporaryDirectory()
        self.files = [Path(self.folder.name, name) for name in ("stdout", "stderr")]
        environment = dict(os.environ if env is None else env)
        self.pid = ask("start", command[1:], str(cwd or os.getcwd()), environment, self.files)

    def poll(self):
        if self.returncode is None:
            self.returncode = ask("poll", self.pid)
            if self.returncode is not None:
                self.fill_files()
        return self.returncode

    def fill_files(self):
        """Write what was printed into the files that were given for it."""
        for stream, file in zip(self.streams, self.files, strict=True):
            if hasattr(stream, "write"):
                stream.write(file.read_text())

    def wait(self, timeout=60):
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.002)
        return self.returncode

    def communicate(self, _=None, timeout=None):
        self.wait(timeout or 60)
        printed = []
        for stream, file in zip(self.streams, self.files, strict=True):
            printed.append(file.read_text() if stream == subprocess.PIPE else None)
        return printed

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.wait()
        self.folder.cleanup()


# The server


def ask(*request):
    pipe = server()
    pipe.send(request)
    return pipe.recv()


@functools.cache
def server():
    """Return a pipe to the process whose forks are the programs."""
    pipe, its_end = multiprocessing.Pipe()
    environment = {"HF_HOME": home().name, "HF_HUB_OFFLINE": "1"}
    process = processes().Process(target=serve, args=(its_end, environment))
    process.start()
    its_end.close()
    atexit.register(pipe.send, ("end",))
    return pipe


def serve(pipe, environment):
    """Start forks and poll them, until this process is told to end or nobody can ask any more."""
    os.environ.update(environment)
    sys.modules["bitsandbytes"] = None  # PEFT would import it, which takes a second
    fork = multiprocessing.get_context("fork")
    forks = {}
    while True:
        try:
            word, *arguments = pipe.recv()
        except EOFError:
            return
        if word == "end":
            return
        if word == "start":
            if any(NAMES_PEERS.search(word) for word in arguments[0]):
                import_peers()
            process = fork.Process(target=run_program, args=arguments)
            process.start()
            forks[process.pid] = process
            pipe.send(process.pid)
        else:
            (pid,) = arguments
            pipe.send(forks[pid].exitcode)


@functools.cache
def import_peers():
    for name in PEERS:
        importlib.import_module(name)


def run_program(words, folder, environment, output):
    """Do what `python WORDS` does."""
    print_into(*output)
    forget_shared_lock()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    # Without what this server sees, and with what the program would see.
    seen_here = (str(ROOT), str(ROOT / "tests"))
    path = [place for place in sys.path if place not in seen_here]
    sys.path[:] = [*environment.get("PYTHONPATH", "").split(os.pathsep), *path]
    if tuple(words[:2]) == TORCHRUN:
        fork_workers(int(words[words.index("--nproc-per-node") + 1]))
    run_as_python(words)
