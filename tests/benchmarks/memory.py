"""python -m tests.benchmarks.memory: what `python -m minia3 info` plans, and what a process takes, at four points.

Measured is the largest resident set of a process, beyond what it has after steps of a tiny model: its weights are
random numbers in memory, not mapped files. glibc's malloc keeps much of what is freed, in holes. Its share in the plan
was fitted to other points than these (`--fit` has those). The last columns are of tensors alone, and of a process that
is told to give memory back (MALLOC_TRIM_THRESHOLD_=1000000), which costs time.

python -m tests.benchmarks.memory --largest 4 [--device cuda]: the largest known model that trains (bfloat16, 8 x 128)
within 4 GB of a process's own memory or, on a GPU, of the card's.
"""

import argparse
import bisect
import os
import subprocess
import sys
from pathlib import Path

import torch

from minia3.checkpoints.known_models import known_models
from minia3.checkpoints.load import build_model
from minia3.cli.info import size
from minia3.model.t5 import T5Config
from minia3.training.memory_plan import planned_memory

POINTS = [  # model, dtype, batch, length, whether it trains
    ("flan-t5-base", "float32", 2, 512, True),
    ("t5-large", "bfloat16", 8, 256, False),
    ("smollm2-135m", "float32", 16, 96, True),
    ("tinyllama-1.1b", "bfloat16", 4, 128, False),
]
FIT = [  # the constants of malloc in info.py are from these
    ("t5-small", "float32", 8, 128, True),
    ("t5-base", "float32", 8, 128, True),
    ("t5-base", "float32", 4, 256, True),
    ("t5-base", "bfloat16", 8, 128, True),
    ("t5-base", "bfloat16", 16, 256, True),
    ("flan-t5-base", "bfloat16", 8, 256, True),
    ("smollm2-135m", "float32", 8, 128, True),
    ("smollm2-135m", "float32", 2, 512, True),
    ("smollm2-135m", "bfloat16", 8, 128, True),
    ("smollm2-135m", "bfloat16", 8, 256, True),
    ("t5-small", "bfloat16", 16, 512, False),
    ("t5-base", "float32", 8, 128, False),
    ("t5-base", "bfloat16", 8, 512, False),
    ("flan-t5-base", "float32", 8, 256, False),
    ("smollm2-135m", "float32", 4, 256, False),
    ("smollm2-135m", "float32", 8, 512, False),
    ("smollm2-135m", "bfloat16", 16, 512, False),
]
STEP = """
import resource
from dataclasses import replace

import torch
from minia3.generation import logprobs
from minia3.ia3 import freeze
from minia3.llama import LlamaConfig
from minia3.load import build, place
from minia3.t5 import T5Config

def steps(config, batch, length):
    model = build(config).train({train})
    for name, p in list(model.named_parameters()):
        place(model, name, torch.full(p.shape, 0.01, dtype=torch.float32 if name.endswith(".scale") else {dtype}))
    freeze(model.to({device!r}))
    tokens = torch.ones(batch, length, dtype=torch.long, device={device!r})
    for _ in range(3):  # the first makes the holes, and those after it find them
        state = model.start(tokens)
        if {train}:
            logprobs(model, state, tokens[:, :8]).sum().backward()
        else:
            model.step(state.start, state)
        del state

def peak():
    if {device!r} == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

torch.set_grad_enabled({train})
if {limit} and {device!r} == "cuda":
    torch.cuda.set_per_process_memory_fraction(min(1.0, {limit} / torch.cuda.get_device_properties(0).total_memory))
elif {limit}:
    resource.setrlimit(resource.RLIMIT_DATA, ({limit}, {limit}))
steps(replace({config}, d_model=64, d_head=32, d_ff=64, n_heads=2, vocab_size=64, **{small}), 2, 16)  # torch is read in
open("/proc/self/clear_refs", "w").write("5")
before = peak()
steps({config}, {batch}, {length})
print(peak() - before)
"""


def measured(config, dtype, batch, length, train, trim=False, device="cpu", limit=0):
    """Bytes that a process takes (Linux alone), or its tensors on a GPU; None where `limit` bytes are not enough."""
    small = {"n_layers": 1} | (
        {"n_decoder_layers": 1} if isinstance(config, T5Config) else {"n_kv_heads": 2}
    )
    given = {"config": config, "dtype": dtype, "batch": batch, "length": length, "train": train}
    code = STEP.format(small=small, device=device, limit=limit, **given)
    environ = (
        os.environ
        | {"OMP_NUM_THREADS": "1"}
        | ({"MALLOC_TRIM_THRESHOLD_": "1000000"} if trim else {})
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environ, capture_output=True, text=True
    )
    if done.returncode and any(
        word in done.stderr for word in ("out of memory", "allocate memory", "MemoryError")
    ):
        return None
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return int(done.stdout)


def planned_and_measured(points):
    print(
        "| step | planned | measured | tensors alone | measured without malloc's holes |\n|---|---|---|---|---|"
    )
    for name, dtype, batch, length, train in points:
        given = known_models()[name].config, getattr(torch, dtype), batch, length, train
        tensors, malloc = planned_memory(*given)
        cells = [f"{name}, {dtype}, {batch} x {length}, {'training' if train else 'serving'}"]
        for planned, trim in ((tensors + malloc, False), (tensors, True)):
            found = measured(*given, trim=trim)
            cells += [size(planned), f"{size(found)} ({planned / found:.2f})"]
        print(f"| {' | '.join(cells)} |", flush=True)


def largest(limit, device):
    """The known model with most weights that trains within `limit` bytes: tried by bisection, a process each."""

    def weights(name):
        return sum(p.numel() for p in build_model(known_models()[name].config).parameters())

    def fails(name):
        found = measured(
            known_models()[name].config, torch.bfloat16, 8, 128, True, device=device, limit=limit
        )
        print(
            f"{name}: {weights(name):,} numbers, {'out of memory' if found is None else size(found)}",
            flush=True,
        )
        return found is None

    names = sorted(known_models(), key=weights)
    first = bisect.bisect_left(names, True, key=fails)
    print(f"the largest that trains in {size(limit)}: {names[first - 1] if first else 'none'}")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.memory", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--fit", action="store_true", help="the points that the constants of malloc are from"
    )
    parser.add_argument(
        "--largest", type=float, metavar="GB", help="the largest model that trains in so much"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="for --largest")
    args = parser.parse_args(argv)
    if args.largest:
        largest(int(args.largest * 1e9), args.device)
    else:
        planned_and_measured(FIT if args.fit else POINTS)


if __name__ == "__main__":
    main()
