"""What the tests of train.py share: small random models, rows in their words, runs in this process and in others."""

import contextlib
import functools
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
from multiprocessing import forkserver
from pathlib import Path

import torch
import torch._dynamo  # as the first AdamW does, in seconds: here once, and not in each of the processes
from tqdm import tqdm
from words import N_IDS, word_tokenizer

import minia3
from minia3.checkpoints.load import build_model, place_parameter
from minia3.files import write
from minia3.model.llama import LlamaConfig
from minia3.model.t5 import T5Config
from minia3.training import cell, checkpoint, run_folder

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402 (beside the package, not in it)

CONFIGS = {
    "t5": T5Config(24, 6, 40, 2, 2, 4, N_IDS),
    "llama": LlamaConfig(24, 6, 40, 2, 4, 2, N_IDS, pad_id=0, eos_ids=(1,), bos_id=None),
}
TIMES = {"seconds", "examples_per_second", "tokens_per_second", "memory_bytes", "peak_memory_bytes"}
TRACED = (
    str(ROOT / "train.py"),
    cell.__file__,
    run_folder.__file__,
    checkpoint.__file__,
    write.__file__,
)


@functools.cache
def home():
    return tempfile.TemporaryDirectory(prefix="minia3-tests-")  # goes when Python ends


@functools.cache
def model(name, seed=0):
    """The folder of a random model of CONFIGS with a tokenizer of words."""
    folder, generator = Path(home().name, f"{name}-{seed}"), torch.Generator().manual_seed(seed)
    new = build_model(CONFIGS[name])
    for key, p in list(new.named_parameters()):
        scale = 1.0 if "embed" in key or "position" in key else 0.3
        place_parameter(
            new,
            key,
            scale * torch.randn(p.shape, generator=generator) + key.endswith("norm.weight"),
        )
    minia3.save_model(new, folder, word_tokenizer(ends=name == "t5"))
    return folder


def rows(n, n_choices=(2,), seed=0):
    """Rows with as many choices as `n_choices` says by turns; 0 stands for a target."""
    rng = random.Random(seed)

    def text(longest):
        return " ".join(f"w{rng.randrange(3, N_IDS)}" for _ in range(rng.randint(1, longest)))

    made = []
    for i in range(n):
        c = n_choices[i % len(n_choices)]
        row = {"input": text(8)}
        if c:
            choices = [f"w{3 + k} {text(3)}" for k in range(c)]  # the first word keeps them apart
            row |= {"choices": choices, "label": rng.randrange(c)}
        else:
            row |= {"target": text(3)}
        made.append(row)
    return made


def write(folder, **splits):
    """A folder of own rows: -> its path."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, part in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


@functools.cache
def task(n_choices=(2,)):
    """The folder of a task: 20 rows to train on, 10 to validate, 12 to test."""
    made = rows(42, n_choices)
    name = "-".join(map(str, n_choices))
    return write(
        Path(home().name, f"task-{name}"), train=made[:20], validation=made[20:30], test=made[30:]
    )


def words(out, *flags, **values):
    """A command line: of a short run into `out` on the random T5 and its task, unless `values` say otherwise."""
    default = {"model": model("t5"), "task": task(), "device": "cpu"}
    values = {**default, "steps": 12, "batch_size": 4, "eval_batch_size": 64, "out": out, **values}
    named = [
        w
        for key, v in values.items()
        if v is not None
        for w in (f"--{key.replace('_', '-')}", str(v))
    ]
    return [*named, *flags]


def run(arguments):
    """`train.main`: -> its exit code. Signals, threads and other state of the process stay as they were."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads, environ = torch.get_num_threads(), dict(os.environ)
    try:
        with torch.random.fork_rng(devices=[]):
            return train.main([str(word) for word in arguments])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
        os.environ.clear()
        os.environ.update(environ)


def resume(folder):
    return run(["--resume", folder])


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def outcome(folder):
    """What two equal runs have in common: the adapters' bytes, and all numbers of metrics.jsonl that are not times."""
    lines = [
        {key: value for key, value in line.items() if key not in TIMES} for line in metrics(folder)
    ]
    return tuple(path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))), lines


def fails(arguments, capsys, *parts, code=2):
    """The command line ends with `code` and one line on stderr with these parts in it."""
    capsys.readouterr()
    assert run(arguments) == code
    err = capsys.readouterr().err
    assert err.startswith("train.py: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    for part in parts:
        assert str(part) in err, err


def contents(folder):
    """Path -> bytes of all files."""
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@contextlib.contextmanager
def at_line(n, act):
    """Call `act` before the n-th line of train.py, runs.py and files.py that runs, counted from `train.run` on.

    Gives a list of the lines that ran so far.
    """
    ran = []

    def line(frame, event, _):
        if event == "line":
            ran.append((os.path.basename(frame.f_code.co_filename), frame.f_lineno))
            if len(ran) == n:
                act()
        return line

    def call(frame, event, _):
        code = frame.f_code
        return line if code.co_filename in TRACED and (ran or code is train.run.__code__) else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        yield ran
    finally:
        sys.settrace(before)


def kill_self(number=signal.SIGKILL):
    os.kill(os.getpid(), number)


# Runs in other processes: forked from a server that has imported torch once


@functools.cache
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["running"])
    before = dict(os.environ)
    paths = [str(Path(__file__).parent), str(ROOT)]
    os.environ.update(PYTHONPATH=os.pathsep.join(paths), OMP_NUM_THREADS="1")
    forkserver.ensure_running()
    os.environ.clear()
    os.environ.update(before)
    return context


def start(arguments, log, prepare=None):
    """`train.main` in a process of its own, its output in the file `log`; `prepare` is called there first."""
    arguments = [str(word) for word in arguments]
    process = processes().Process(target=child, args=(arguments, str(log), prepare))
    process.start()
    return process


def finish(process):
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def child(arguments, log, prepare):
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    tqdm.set_lock(threading.RLock())  # its own outlives a process that is killed
    with prepare() if prepare else contextlib.nullcontext():
        code = train.main(arguments)
    sys.exit(code)
