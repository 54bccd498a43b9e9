"""What the tests of train.py share: small random models, rows of words, and runs.

A run happens in this process (`run`, `resume`). If it is killed, it happens in another process
(`start`, `finish`).
"""

import contextlib
import functools
import json
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import torch

# The first AdamW of a process imports this, which takes seconds. The server below does so once, and
# the processes that are forked from it do not.
import torch._dynamo
from forked import forget_shared_lock, print_into
from words import N_IDS, word_tokenizer

import minia3
from minia3.checkpoints.load import build_model
from minia3.checkpoints.place import place_parameter
from minia3.files import write as file_writing
from minia3.model.llama import LlamaConfig
from minia3.model.t5 import T5Config
from minia3.training import run_folder
from minia3.training.checkpoint import load_checkpoint
from minia3.training.run import Run

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402 (train.py is beside the package, not in it)

CONFIGS = {
    "t5": T5Config(24, 6, 40, 2, 2, 4, N_IDS),
    "llama": LlamaConfig(24, 6, 40, 2, 4, 2, N_IDS, pad_id=0, eos_ids=(1,), bos_id=None),
    # nf4 needs widths that are multiples of 64.
    "t5-wide": T5Config(64, 16, 64, 1, 1, 4, N_IDS),
    "llama-wide": LlamaConfig(64, 16, 64, 1, 4, 4, N_IDS, pad_id=0, eos_ids=(1,), bos_id=None),
}
TIMES = {"seconds", "examples_per_second", "tokens_per_second", "memory_bytes", "peak_memory_bytes"}
TRACED_FILES = {
    str(ROOT / "train.py"),
    file_writing.__file__,
    *map(str, (ROOT / "minia3" / "training").glob("*.py")),
}


# Models and tasks


@functools.cache
def home():
    """The folder of what these tests share. It is removed when Python ends."""
    return tempfile.TemporaryDirectory(prefix="minia3-tests-")


@functools.cache
def model(name, seed=0):
    """Return the folder of a random model of CONFIGS, whose tokenizer knows words w3, w4 ..."""
    folder = Path(home().name, f"{name}-{seed}")
    generator = torch.Generator().manual_seed(seed)
    new = build_model(CONFIGS[name])
    for key, parameter in list(new.named_parameters()):
        scale = 1.0 if "embed" in key or "bias_tables" in key else 0.3
        values = scale * torch.randn(parameter.shape, generator=generator)
        place_parameter(new, key, values + key.endswith("norm.weight"))
    minia3.save_model(new, folder, word_tokenizer(ends=name.startswith("t5")))
    return folder


def without_weights(name, folder):
    """Return the folder of a model that has a config alone, so that loading its weights fails."""
    folder.mkdir()
    shutil.copy(model(name) / "config.json", folder)
    return folder


def rows(n, n_choices=(2,), seed=0):
    """Return n rows with as many choices as `n_choices` says in turns. 0 stands for a target."""
    rng = random.Random(seed)

    def text(longest):
        return " ".join(f"w{rng.randrange(3, N_IDS)}" for _ in range(rng.randint(1, longest)))

    made = []
    for i in range(n):
        n_choices_of_row = n_choices[i % len(n_choices)]
        row = {"input": text(8)}
        if n_choices_of_row:
            # The first word makes the choices differ.
            row["choices"] = [f"w{3 + k} {text(3)}" for k in range(n_choices_of_row)]
            row["label"] = rng.randrange(n_choices_of_row)
        else:
            row["target"] = text(3)
        made.append(row)
    return made


def write(folder, **splits):
    """Write rows as the splits of a user's task, and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, split_rows in splits.items():
        lines = [json.dumps(row) + "\n" for row in split_rows]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return folder


@functools.cache
def task(n_choices=(2,)):
    """Return the folder of a task: 20 rows to train on, 10 to validate, 12 to test."""
    made = rows(42, n_choices)
    name = "-".join(map(str, n_choices))
    folder = Path(home().name, f"task-{name}")
    return write(folder, train=made[:20], validation=made[20:30], test=made[30:])


MIXED_SIZES = {"small": 6, "large": 40}


@functools.cache
def mixed_tasks():
    """Return the paths of two tasks of different sizes, and of different choices: --task."""
    folder = Path(home().name, "mixture")
    for n_choices, (name, n) in enumerate(MIXED_SIZES.items(), 2):
        made = rows(n + 20, (n_choices,), seed=n)
        write(folder / name, train=made[:n], validation=made[n : n + 8], test=made[n + 8 :])
    return ",".join(str(folder / name) for name in MIXED_SIZES)


# Runs in this process

# git takes as long as several steps, and what it finds does not change while tests run.
known_commit = functools.cache(run_folder.git_commit)


def words(out, *flags, **values):
    """Return the command line of a short run into `out` on the random T5 and its task.

    values: flags that differ from this; None leaves a flag out.
    """
    defaults = {"model": model("t5"), "task": task(), "device": "cpu"}
    defaults |= {"steps": 6, "batch_size": 4, "eval_batch_size": 64, "out": out}
    typed = []
    for name, value in {**defaults, **values}.items():
        if value is not None:
            typed += [f"--{name.replace('_', '-')}", str(value)]
    return [*typed, *flags]


def run(arguments):
    """Call `train.main` and return its exit code. The state of this process stays as it was."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    n_threads = torch.get_num_threads()
    environ = dict(os.environ)
    try:
        commit = mock.patch.object(run_folder, "git_commit", known_commit)
        with torch.random.fork_rng(devices=[]), commit:
            return train.main([str(word) for word in arguments])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        torch.set_num_threads(n_threads)
        torch.use_deterministic_algorithms(False)
        os.environ.clear()
        os.environ.update(environ)


def resume(folder):
    return run(["--resume", folder])


def quoted(path):
    """Return a path as it stands in a command line that a run shows, which a user may copy."""
    return shlex.quote(str(path))


def fails(arguments, capsys, *parts, code=2):
    """Assert that the command line ends with `code` and one line on stderr that has these parts."""
    capsys.readouterr()
    assert run(arguments) == code
    err = capsys.readouterr().err
    assert err.startswith("train.py: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    for part in parts:
        assert str(part) in err, err


# What a run has written


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder, name):
    """Return the lines of metrics.jsonl about one kind of event."""
    return [line for line in metrics(folder) if line["event"] == name]


def outcome(folder):
    """Return what two equal runs share: the bytes of all adapters, and metrics except for times."""
    lines = []
    for line in metrics(folder):
        lines.append({name: value for name, value in line.items() if name not in TIMES})
    adapters = [path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))]
    return tuple(adapters), lines


def last_vectors(folder):
    """Return the vectors in a run's last checkpoint: (A, D), in the dtype of their training."""
    return load_checkpoint(folder).group["parameters"]


def contents(folder):
    """Return the bytes of all files in a folder, by path."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder): path.read_bytes() for path in files}


# Interruptions

name_of = functools.cache(os.path.basename)


@contextlib.contextmanager
def at_line(n, act):
    """Call `act` before the n-th line that a run executes, from `train.run_grid` to `Run.close`.

    (When a run is closed, signals do again what they did before it.) Only lines of train.py,
    minia3/training and the writing of files count. Yield a list of the lines that were executed so
    far, as (file name, line number).
    """
    executed = []
    is_running = False

    def trace_line(frame, event, _):
        if event == "line":
            executed.append((name_of(frame.f_code.co_filename), frame.f_lineno))
            if len(executed) == n:
                act()
        return trace_line

    def trace_call(frame, event, _):
        nonlocal is_running
        code = frame.f_code
        if code.co_filename not in TRACED_FILES:  # nearly all calls, and so the first question
            return None
        if code is train.run_grid.__code__:
            is_running = True
        if code is Run.close.__code__:
            is_running = False
        return trace_line if is_running else None

    before = sys.gettrace()
    sys.settrace(trace_call)
    try:
        yield executed
    finally:
        sys.settrace(before)


def kill_self(number=signal.SIGKILL):
    os.kill(os.getpid(), number)


# Runs in other processes, which are forked from a server that has imported torch


@functools.cache
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    before = dict(os.environ)
    paths = [str(Path(__file__).parent), str(ROOT)]
    os.environ.update(PYTHONPATH=os.pathsep.join(paths), OMP_NUM_THREADS="1")
    forkserver.ensure_running()
    os.environ.clear()
    os.environ.update(before)
    return context


def in_new_process(function, *arguments):
    """Call a function of a module in a new process with one thread, and return what it returns."""
    receiving, sending = processes().Pipe(duplex=False)
    process = processes().Process(target=send_result, args=(sending, function, arguments))
    process.start()
    sending.close()
    try:
        return receiving.recv()
    except EOFError:
        raise AssertionError(f"{function.__name__} ended with {finish(process)}") from None


def send_result(sending, function, arguments):
    torch.set_num_threads(1)
    sending.send(function(*arguments))


def start(arguments, log, prepare=None):
    """Start `train.main` in another process, and return the process.

    log: the file for its output. prepare: makes a context in which it runs there.
    """
    arguments = [str(word) for word in arguments]
    process = processes().Process(target=run_in_child, args=(arguments, str(log), prepare))
    process.start()
    return process


def finish(process):
    """Wait for a process, and return its exit code."""
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def run_in_child(arguments, log, prepare):
    print_into(log, log)
    forget_shared_lock()
    context = contextlib.nullcontext() if prepare is None else prepare()
    with context:
        code = train.main(arguments, is_program=True)
    sys.exit(code)
