"""Compare minia3 with transformers + PEFT, every pair in alternation, as JSON and as a table.

python -m tests.benchmarks --json bench.json    all lines; about an hour on one core (--threads 1)
python -m tests.benchmarks --only steps,kept
python -m tests.benchmarks --device cuda --models t5-large,t0-3b,llama-3.2-1b,llama-2-7b
python -m tests.benchmarks --quick              every line once on tiny models: does it work
python -m tests.benchmarks jobs --help          whole jobs, from the start of a process to its end

Training reads 8 sources of 128 tokens, or of lengths like RTE's, with targets of 8. Generation
writes 32 tokens after 128. The last column is our FLOP/s as a part of what a product of two 4096 x
4096 matrices reaches in the same rounds. For generation it is our time and theirs, each divided by
that of the same matrix products alone.
"""

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path

import torch

from minia3.checkpoints.known_models import KNOWN_MODELS
from minia3.training.device import device_module
from tests.benchmarks.jobs import command as jobs
from tests.benchmarks.lines import LINES, goal_of
from tests.benchmarks.measure import Bench, Roof
from tests.benchmarks.pairs import Pair

HEAD = """
| line | ours | theirs | theirs / ours (middle half of the rounds) | goal | of the roof |
|---|---|---|---|---|---|"""


def make_parser():
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help="tiny models, one round")
    parser.add_argument(
        "--models",
        default="t5-base,smollm2-135m",
        help=f"comma-separated names from {', '.join(KNOWN_MODELS)} (default: %(default)s)",
    )
    parser.add_argument(
        "--only", default=",".join(LINES), help="comma-separated lines (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each pair (default: 7)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch chooses)")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the weights"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, xpu ... (default: cpu)")
    parser.add_argument("--json", type=Path, help="file for the result")
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    result = {
        "machine": machine(args.device),
        "device": args.device,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "dtype": args.dtype,
        "rows": {},
    }
    print(", ".join(f"{name}: {value}" for name, value in result.items() if value), flush=True)
    print(HEAD, flush=True)

    roof_size = 256 if args.quick else 4096
    n_rounds = 1 if args.quick else args.rounds
    bench = Bench(args.quick, n_rounds, Roof(dtype, roof_size, args.device))
    for model in args.models.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            pair = Pair(model, Path(scratch), args.quick, dtype, args.device)
            for title, row in measure_lines(bench, pair, args.only.split(",")):
                result["rows"][title] = row.published()
        if args.json:  # after each model, because the next one may fail
            args.json.write_text(json.dumps(result, indent=2) + "\n")


def measure_lines(bench, pair, lines):
    """Measure and print the rows of a model. Yield (title, Row)."""
    for line in lines:
        try:
            for title, row in LINES[line](bench, pair):
                row.goal = goal_of(title, pair.is_t5)
                title = f"{pair.name}, {title}"
                print(table_row(title, row), flush=True)
                yield title, row
        except torch.OutOfMemoryError:  # of a GPU
            print(f"| {pair.name}, {line}: out of memory |||||", flush=True)


def versions():
    """Return the versions of what is compared. transformers stays quiet from here on."""
    import peft
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return {module.__name__: module.__version__ for module in (torch, transformers, peft)}


def machine(device):
    module = device_module(torch.device(device))
    if module is not None:
        return module.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def table_row(title, row):
    """Return a row of the Markdown table."""
    ratio = f"{row.ratio:.2f}"
    if row.spread is not None:
        low, high = row.spread
        ratio += f" ({low:.2f} to {high:.2f})"
    goal = "" if row.goal is None else f"{row.goal:g}"
    roof = ""
    if row.roof is not None:
        roof = f"{row.roof:.0%}"
    elif row.products is not None:
        roof = f"{row.ours_over_products:.2f} x, theirs {row.theirs_over_products:.2f} x"
    ours = with_unit(row.ours, row.unit)
    theirs = with_unit(row.theirs, row.unit)
    return f"| {title} | {ours} | {theirs} | {ratio} | {goal} | {roof} |"


def with_unit(amount, unit):
    """Return seconds or bytes as a text in s, ms or MB."""
    if unit == "B":
        megabytes = amount / 1e6
        return f"{megabytes:,.0f} MB" if megabytes >= 10 else f"{megabytes:.3g} MB"
    return f"{amount:.2f} s" if amount >= 1 else f"{amount * 1e3:.3g} ms"


if __name__ == "__main__":
    if sys.argv[1:2] == ["jobs"]:
        jobs.main(sys.argv[2:])
    else:
        main()
