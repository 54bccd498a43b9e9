"""What glibc's malloc keeps of the memory of a training process, by its settings (Linux).

python -m tests.benchmarks.allocator                       t5-small, some minutes
python -m tests.benchmarks.allocator --models t5-base
python -m tests.benchmarks.allocator --quick               a tiny model: does it work

Each setting runs in processes of its own, in alternation. They train in float32 on batches of 8
sources of 64 to 128 tokens with two choices. For each process, this measures the peak memory beyond
what it had after a step of a tiny model, and the processor time per step, which other work on the
machine hardly changes.
"""

import argparse
import statistics

from minia3.checkpoints.known_models import KNOWN_MODELS
from minia3.files.program import KEPT
from tests.benchmarks.measure import alternate, run_program
from tests.benchmarks.names import some_of

# Title: variables of the environment, whether to give memory back after each step
SETTINGS = {
    "as it is": ({}, False),
    "MALLOC_TRIM_THRESHOLD_=1000000": ({"MALLOC_TRIM_THRESHOLD_": "1000000"}, False),
    "MALLOC_MMAP_THRESHOLD_=1000000": ({"MALLOC_MMAP_THRESHOLD_": "1000000"}, False),
    "MALLOC_MMAP_THRESHOLD_=4000000": ({"MALLOC_MMAP_THRESHOLD_": "4000000"}, False),
    "MALLOC_MMAP_THRESHOLD_=8000000": ({"MALLOC_MMAP_THRESHOLD_": "8000000"}, False),
    "MALLOC_MMAP_THRESHOLD_=16000000": ({"MALLOC_MMAP_THRESHOLD_": "16000000"}, False),
    "as in `minia3 predict`": (
        {"MALLOC_MMAP_THRESHOLD_": str(KEPT), "MALLOC_TRIM_THRESHOLD_": str(KEPT)},
        False,
    ),
    "MALLOC_ARENA_MAX=1": ({"MALLOC_ARENA_MAX": "1"}, False),
    "THP_MEM_ALLOC_ENABLE=1": ({"THP_MEM_ALLOC_ENABLE": "1"}, False),
    "malloc_trim(0) after each step": ({}, True),
}

PROGRAM = """
import ctypes, statistics, time
from dataclasses import replace
from random import Random

import torch
from minia3.checkpoints.load import build_model
from minia3.checkpoints.place import place_parameter
from minia3.inference.scoring import choice_logprobs
from minia3.model.ia3 import freeze
from minia3.tasks.batches import collate
from minia3.training.losses import total_loss
from tests.benchmarks.measure import peak_memory
from tests.benchmarks.pairs import config_of, random_examples

torch.set_num_threads(1)
random = Random(0)

def make_model(config):
    model = build_model(config).train()
    for name, p in list(model.named_parameters()):
        place_parameter(model, name, torch.full(p.shape, 0.01))
    freeze(model)
    return model

def step(model, longest, n_examples):
    lengths = [random.randint(longest // 2, longest) for _ in range(n_examples - 1)]
    examples = random_examples([*lengths, longest], 2, 8, model.config.vocab_size)
    batch = collate(examples)
    begun = time.process_time()
    logp_BCL = choice_logprobs(model, batch)
    total_loss(logp_BCL, batch.target_mask_BCL, batch.label_B).backward()
    if {is_trimmed}:
        ctypes.CDLL(None).malloc_trim(0)
    return time.process_time() - begun

step(make_model(config_of({name!r}, quick=True)), 16, 2)
model = make_model(config_of({name!r}, {quick}))
open("/proc/self/clear_refs", "w").write("5")
before = peak_memory("cpu")
times = [step(model, 128, 8) for _ in range({n_steps})]
print(peak_memory("cpu") - before, statistics.median(times[1:]))
"""


def measured(name, setting, quick, n_steps):
    """Return the bytes that a process takes at its peak, and its seconds per step."""
    environ, is_trimmed = SETTINGS[setting]
    program = PROGRAM.format(name=name, quick=quick, n_steps=n_steps, is_trimmed=is_trimmed)
    n_bytes, n_seconds = run_program(program, OMP_NUM_THREADS="1", **environ).split()
    return int(n_bytes), float(n_seconds)


def print_table(name, quick, n_steps, n_rounds):
    found = {setting: [] for setting in SETTINGS}

    def measure(setting):
        found[setting].append(measured(name, setting, quick, n_steps))

    sides = {setting: lambda setting=setting: measure(setting) for setting in SETTINGS}
    alternate(sides, n_rounds, n_warm_ups=0)
    print(f"\n| {name}, float32, training | peak | time per step |\n|---|---|---|")
    plain = found["as it is"]
    for setting, results in found.items():
        peak = statistics.median(n_bytes for n_bytes, _ in results)
        ratios = [seconds / first for (_, seconds), (_, first) in zip(results, plain, strict=True)]
        cells = [setting, f"{peak / 1e6:,.0f} MB", f"{statistics.median(ratios):.2f} times"]
        print(f"| {' | '.join(cells)} |", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.allocator",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model, two steps, one round")
    parser.add_argument(
        "--models", type=some_of(KNOWN_MODELS), default="t5-small", help="(default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=5, help="of each process (default: 5)")
    parser.add_argument("--rounds", type=int, default=3, help="of all settings (default: 3)")
    args = parser.parse_args(argv)
    for name in args.models:
        if args.quick:
            print_table(name, True, n_steps=2, n_rounds=1)
        else:
            print_table(name, False, args.steps, args.rounds)


if __name__ == "__main__":
    main()
