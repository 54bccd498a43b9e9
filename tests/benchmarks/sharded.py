"""Measure what the tensors of a process take while several processes train over a divided base.

    python -m tests.benchmarks.sharded --processes 4

In some cases --offload keeps the rows in the memory of the CPU (on which everything is, here), or
every two processes hold a copy. For each case, print the planned and the measured bytes of a
process. The bytes are those that the allocator of the CPU was asked for, counted by PyTorch's
profiler, so they are the same on every machine. The smallest peak of five steps counts,
because in some steps one more block is whole for a moment.
"""

import argparse
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from minia3.checkpoints.known_models import KNOWN_MODELS
from minia3.checkpoints.load import build_model
from minia3.checkpoints.place import place_parameter, place_weight
from minia3.files.processes import join, leave, n_processes
from minia3.model.ia3 import freeze
from minia3.model.shard import shard
from minia3.training.config import Config
from minia3.training.device_plan import Plan
from minia3.training.memory_plan import StepShape, score_without_padding
from minia3.training.prepare import prepare_model
from minia3.training.shards import make_shards
from tests.ports import reserved_port

CONFIGS = {
    "llama": replace(
        KNOWN_MODELS["smollm2-135m"].config,
        d_model=1024,
        d_ff=2816,
        n_layers=10,
        n_heads=16,
        n_kv_heads=8,
        vocab_size=2048,
    ),
    "t5": replace(KNOWN_MODELS["t5-large"].config, n_layers=5, n_decoder_layers=5, vocab_size=2048),
}
# A source of one token leaves LLaMA's cache empty, so that only the target runs through the blocks.
SHAPES = {"llama": StepShape(2, 1, 1, 64), "t5": StepShape(2, 64, 1, 8)}

# For tests: a quarter as wide and as long, so that all parts of the plan keep their shares. One of
# them has so few layers that a plan without one block is noticed.
QUARTER = {"d_model": 256, "d_ff": 704, "n_heads": 4, "vocab_size": 512}
CONFIGS["small llama"] = replace(CONFIGS["llama"], n_kv_heads=2, **QUARTER)
CONFIGS["small t5"] = replace(CONFIGS["t5"], **QUARTER)
CONFIGS["shallow llama"] = replace(CONFIGS["small llama"], n_layers=3)
SHAPES["small llama"] = SHAPES["shallow llama"] = StepShape(2, 1, 1, 16)
SHAPES["small t5"] = StepShape(2, 16, 1, 2)


class Case(NamedTuple):
    """A base that is measured."""

    kind: str  # of CONFIGS
    quantize: str | None = None
    offload: bool = False
    n_per_copy: int | None = None  # processes that hold a copy of the base; None: all

    @property
    def title(self):
        title = f"{self.kind}, {self.quantize or 'bfloat16'}"
        if self.offload:
            title += ", --offload"
        if self.n_per_copy:
            title += f", --shard {self.n_per_copy}"
        return title


CASES = [
    Case("llama"),
    Case("llama", "int8"),
    Case("llama", "nf4"),
    Case("t5"),
    Case("t5", "int8"),
    Case("llama", offload=True),
    Case("llama", n_per_copy=2),
]
FLAGS = Config(recompute=True)
# In some steps of four processes, one more block is whole for a moment. The least of these counts.
N_STEPS = 5


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args(argv)
    # A base that nobody divides is not planned here.
    cases = [case for case in CASES if case.offload or args.processes > (case.n_per_copy or 1)]
    print(f"| base, {args.processes} processes | parameters, MB | planned, MB | measured, MB |")
    print("|---|---|---|---|")
    for case, (whole, planned, measured) in measure(args.processes, cases).items():
        numbers = " | ".join(f"{n_bytes / 1e6:.1f}" for n_bytes in (whole, planned, measured))
        print(f"| {case.title} | {numbers} |")


def measure(world_size, cases):
    """Return case -> (bytes of the whole base, planned and measured bytes of the first process)."""
    with tempfile.TemporaryDirectory() as folder, reserved_port() as port:
        results = Path(folder, "results.json")
        arguments = (world_size, port, cases, results)
        torch.multiprocessing.spawn(run_process, arguments, nprocs=world_size)
        measured = json.loads(results.read_text())
    found = {}
    for case, n_bytes in zip(cases, measured, strict=True):
        found[case] = (*planned_bytes(case, world_size), n_bytes)
    return found


def planned_bytes(case, world_size):
    """Return (bytes of the whole base, planned bytes of a process)."""
    plan = Plan(CONFIGS[case.kind], torch.bfloat16, case.quantize, FLAGS)
    n_shards = case.n_per_copy or world_size
    planned = plan.on_device(n_shards, SHAPES[case.kind], case.offload).total
    if case.offload:  # the device is the CPU, so the rows are here, and are not copied
        planned += plan.on_cpu(n_shards) - plan.copied_rows(n_shards)
    return plan.base.n_bytes, planned


def run_process(rank, world_size, port, cases, results):
    environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in environ.items()})
    os.environ["WORLD_SIZE"] = str(world_size)
    torch.set_num_threads(1)
    join()
    measured = measured_bytes_of_all(cases)
    if rank == 0:
        results.write_text(json.dumps(measured))
    leave()


def measured_bytes_of_all(cases, n_steps=N_STEPS):
    return [measured_bytes(case, n_steps) for case in cases]


def measured_bytes(case, n_steps):
    """Return the bytes of the parameters of this process, and of what a step takes beside them."""
    shape = SHAPES[case.kind]
    model = model_to_train(CONFIGS[case.kind], case.quantize)
    prepare_model(model, FLAGS)
    n_per_copy = case.n_per_copy or n_processes()
    shard(model, make_shards(n_per_copy, case.offload, torch.device("cpu")))
    n_parameters = sum(local(parameter).nbytes for parameter in model.parameters())
    source_BM = torch.zeros(shape.n_examples, shape.source_length, dtype=torch.long)
    target_BCL = torch.zeros(shape.n_examples, 1, shape.target_length, dtype=torch.long)

    def step():
        score_without_padding(model, source_BM, target_BCL).backward()
        model.zero_grad()

    step()  # in which FSDP prepares itself
    peaks = []
    for _ in range(n_steps):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step()
        peaks.append(peak_of(profiler))
    return n_parameters + min(peaks)


def model_to_train(config, quantize):
    """Return a model with weights in bfloat16 or quantized, ready to train."""
    model = build_model(config)
    for name, parameter in list(model.named_parameters()):
        if name.endswith(".scale"):
            place_parameter(model, name, torch.ones(parameter.shape))
            continue
        weight = torch.full(parameter.shape, 0.01, dtype=torch.bfloat16)
        place_weight(model, name, weight, quantize)
    freeze(model)
    return model.train()


def local(parameter):
    """Return the rows of a parameter that this process has."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def peak_of(profiler):
    """Return the most bytes that were allocated at once while a profiler ran."""
    changes = []
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            changes.append((event.start_ns(), event.nbytes()))
    now = 0
    peak = 0
    for _, n_bytes in sorted(changes):
        now += n_bytes
        peak = max(peak, now)
    return peak


if __name__ == "__main__":
    main()
