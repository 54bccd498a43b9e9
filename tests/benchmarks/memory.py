"""Compare the memory that `python -m minia3 info` plans with the memory that a process takes.

python -m tests.benchmarks.memory
python -m tests.benchmarks.memory --largest 4 [--device cuda]

The second command finds the largest known model that trains (bfloat16, 8 x 128) in 4 GB of memory:
of the process or, on a GPU, of the card.

The plan counts tensors. What a process takes is its largest resident set, beyond what it had after
steps of a tiny model. The weights are random numbers in memory and not mapped files. A process
takes more than its tensors, because glibc's malloc keeps some of what is freed. So each line is
measured twice: with malloc as it is, and told to give memory back, which costs time
(MALLOC_TRIM_THRESHOLD_=1000000).
"""

import argparse
import bisect
import os
import subprocess
import sys
from pathlib import Path

import torch

from minia3.checkpoints.known_models import KNOWN_MODELS
from minia3.checkpoints.load import build_model
from minia3.cli.terminal import format_size
from minia3.model.t5 import T5Config
from minia3.training.memory_plan import planned_memory

POINTS = [  # model, dtype, batch, length, whether it trains
    ("flan-t5-base", "float32", 2, 512, True),
    ("t5-large", "bfloat16", 8, 256, False),
    ("smollm2-135m", "float32", 16, 96, True),
    ("tinyllama-1.1b", "bfloat16", 4, 128, False),
]
TRIM = {"MALLOC_TRIM_THRESHOLD_": "1000000"}

# The program of a process that is measured. It runs a tiny model first, so that torch is read in.
STEPS = """
import resource
from dataclasses import replace

import torch
from minia3.checkpoints.load import build_model
from minia3.checkpoints.place import place_parameter
from minia3.inference.scoring import logprobs
from minia3.model.ia3 import freeze
from minia3.model.llama import LlamaConfig
from minia3.model.t5 import T5Config

def steps(config, batch, length):
    model = build_model(config).train({train})
    for name, p in list(model.named_parameters()):
        dtype = torch.float32 if name.endswith(".scale") else {dtype}
        # At once on the device, because the memory of the CPU may be smaller.
        weight = torch.full(p.shape, 0.01, dtype=dtype, device={device!r})
        place_parameter(model, name, weight)
    freeze(model.to({device!r}))  # with its buffers
    tokens = torch.ones(batch, length, dtype=torch.long, device={device!r})
    for _ in range(3):  # the first one makes the holes that malloc keeps, and the others find them
        state = model.start(tokens)
        if {train}:
            logprobs(model, state, tokens[:, :8]).sum().backward()
        else:
            model.step(state.start, state)
        del state

def peak():
    if {device!r} != "cpu":
        return getattr(torch, {device!r}).max_memory_allocated()
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return 1024 * int(line.split()[1])

torch.set_grad_enabled({train})
if {limit} and {device!r} != "cpu":
    module = getattr(torch, {device!r})
    card = module.get_device_properties(0).total_memory
    module.set_per_process_memory_fraction(min(1.0, {limit} / card))
elif {limit}:
    resource.setrlimit(resource.RLIMIT_DATA, ({limit}, {limit}))
tiny = dict(d_model=64, d_head=32, d_ff=64, n_heads=2, vocab_size=64, n_layers=1)
steps(replace({config}, **tiny, **{tiny_kind}), 2, 16)
open("/proc/self/clear_refs", "w").write("5")
before = peak()
steps({config}, {batch}, {length})
print(peak() - before)
"""


def measured(config, dtype, batch, length, train, *, environ=(), device="cpu", limit=0):
    """Return the bytes that a process takes (on Linux), or its tensors on a GPU.

    Return None if `limit` bytes are not enough. environ: variables that the process gets.
    """
    tiny_kind = {"n_kv_heads": 2}
    if isinstance(config, T5Config):
        tiny_kind = {"n_decoder_layers": 1}
    program = STEPS.format(
        config=config,
        dtype=dtype,
        batch=batch,
        length=length,
        train=train,
        tiny_kind=tiny_kind,
        device=device,
        limit=limit,
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", **dict(environ)},
        capture_output=True,
        text=True,
    )
    if done.returncode == 0:
        return int(done.stdout)
    messages = ("out of memory", "allocate memory", "MemoryError")
    if any(message in done.stderr for message in messages):
        return None
    raise RuntimeError(done.stderr[-2000:])


def print_plans(points):
    """Print a Markdown table of what was planned and what processes took."""
    print("| step | planned | measured, giving memory back | measured |\n|---|---|---|---|")
    for name, dtype, batch, length, train in points:
        given = KNOWN_MODELS[name].config, getattr(torch, dtype), batch, length, train
        planned = planned_memory(*given)
        kind = "training" if train else "serving"
        cells = [f"{name}, {dtype}, {batch} x {length}, {kind}", format_size(planned)]
        for environ in (TRIM, {}):
            found = measured(*given, environ=environ)
            cells.append(f"{format_size(found)} ({found / planned:.2f} of the plan)")
        print(f"| {' | '.join(cells)} |", flush=True)


def n_parameters(name):
    """Return how many parameters a known model has."""
    return sum(p.numel() for p in build_model(KNOWN_MODELS[name].config).parameters())


def print_largest(limit, device):
    """Print the known model with most parameters that trains within `limit` bytes.

    Models are tried by bisection, each in a process.
    """

    def fails(name):
        config = KNOWN_MODELS[name].config
        found = measured(config, torch.bfloat16, 8, 128, True, device=device, limit=limit)
        outcome = "out of memory" if found is None else format_size(found)
        print(f"{name}: {n_parameters(name):,} parameters, {outcome}", flush=True)
        return found is None

    names = sorted(KNOWN_MODELS, key=n_parameters)
    n_fitting = bisect.bisect_left(names, True, key=fails)
    largest = names[n_fitting - 1] if n_fitting else "none"
    print(f"the largest that trains in {format_size(limit)}: {largest}")


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--largest", type=float, metavar="GB", help="find the largest model that trains in this"
    )
    parser.add_argument("--device", default="cpu", help="for --largest: cpu, cuda, xpu ...")
    args = parser.parse_args(argv)
    if args.largest:
        print_largest(int(args.largest * 1e9), args.device)
    else:
        print_plans(POINTS)


if __name__ == "__main__":
    main()
