"""Compare minia3 with transformers + PEFT, every pair in alternation, as JSON and as a table.

python -m tests.benchmarks --json run.json      all lines; an hour on one core
python -m tests.benchmarks --only steps,kept
python -m tests.benchmarks --device cuda --models t5-large,t0-3b,llama-3.2-1b,llama-2-7b
python -m tests.benchmarks --quick              every line once on tiny models: does it work
python -m tests.benchmarks --threads 1 --publish
                                                all lines, into the tables of the documents
python -m tests.benchmarks table A.json B.json  several runs side by side, as Markdown
python -m tests.benchmarks jobs --help          whole jobs, from the start of a process to its end

The JSON is written after every line. The same command continues a run that was interrupted. If
the run has ended, it measures the lines again that other work has disturbed (they have a star), and
keeps for each row the figures beside which the machine was calmer.

Training reads 8 sources of 128 tokens, or of lengths like RTE's, with targets of 8. Generation
writes 32 tokens after 128. Both sides take turns with a product of two 4096 x 4096 matrices, the
roof, so each row says how fast the machine was.
"""

import argparse
import itertools
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch

from minia3.checkpoints.known_models import KNOWN_MODELS
from tests.benchmarks import table
from tests.benchmarks.jobs import command as jobs
from tests.benchmarks.lines import COMPILES, LINES, goal_of
from tests.benchmarks.machine import commit, describe_machine, versions
from tests.benchmarks.measure import Bench, Roof
from tests.benchmarks.names import some_of
from tests.benchmarks.pairs import Pair
from tests.benchmarks.record import begin_or_continue

COMMANDS = {"table": table.main, "jobs": jobs.main}


def make_parser():
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="tiny models, one round")
    parser.add_argument(
        "--models",
        type=some_of(KNOWN_MODELS),
        default="t5-base,smollm2-135m",
        help=f"comma-separated names from {', '.join(KNOWN_MODELS)} (default: %(default)s)",
    )
    parser.add_argument(
        "--only",
        type=some_of(LINES),
        default=",".join(LINES),
        help="comma-separated lines (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=30,
        help="for the rounds of one row, of which there are 3 to 21 (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch chooses)")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the weights"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, xpu ... (default: cpu)")
    files = parser.add_mutually_exclusive_group()
    files.add_argument("--json", type=Path, help="file for the result")
    files.add_argument(
        "--publish",
        action="store_true",
        help="write the result of today with this release of torch into "
        "tests/benchmarks/published/, and all results that are there into the README and "
        "docs/performance.md",
    )
    return parser


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        COMMANDS[argv[0]](argv[1:])
    else:
        parser = make_parser()
        args = parser.parse_args(argv)
        if args.quick and args.publish:
            parser.error("--quick measures nothing that may be published")
        measure(args)


def measure(args):
    if args.threads:
        torch.set_num_threads(args.threads)
    path = args.json
    if args.publish:
        path = table.published_file(date.today(), torch.__version__, args.device)
    try:
        record = begin_or_continue(settings_of(args), path)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(table.heading([record]), flush=True)
    print(table.column_names([record]), flush=True)

    dtype = getattr(torch, args.dtype)
    roof_size = 256 if args.quick else 4096
    roof = Roof(dtype, roof_size, args.device)
    if record.best_roof is not None:
        roof.least_seconds = roof.flops / record.best_roof  # how fast the machine has been
    bench = Bench(args.quick, args.seconds, roof)
    with tempfile.TemporaryDirectory() as scratch:
        for model, line in in_order(args.models, args.only):
            if not record.has(f"{model}, {line}"):
                pair = Pair(model, Path(scratch), args.quick, dtype, args.device)
                measure_line(bench, pair, line, record)
    print(table.summary([record]))
    if args.publish:
        table.write_pages()


def in_order(models, lines):
    """Return each (model, line), model by model, but lines that compile after all others.

    The compiler leaves threads behind, and beside other threads, a CPU generates a single text more
    slowly (minia3/model/single_row.py).
    """
    return sorted(itertools.product(models, lines), key=lambda pair: pair[1] in COMPILES)


def settings_of(args):
    """Return what is measured and on what, as the JSON says it."""
    return {
        "commit": commit(),
        "machine": describe_machine(args.device),
        "versions": versions(),
        "device": args.device,
        "threads": torch.get_num_threads(),
        "dtype": args.dtype,
        "quick": args.quick,
        "seconds_per_row": args.seconds,
    }


def measure_line(bench, pair, line, record):
    """Measure and print the rows of a line, and add them to the Record."""
    try:
        for title, row in LINES[line](bench, pair):
            goal = goal_of(title, pair.is_t5)
            row.goal = goal.ratio
            row.goal_share = goal.share
            row.line = f"{pair.name}, {line}"
            title = f"{pair.name}, {title}"
            record.add(title, row)
            print(table.table_row(title, [record]), flush=True)
    except torch.OutOfMemoryError:  # of a GPU
        print(f"| {pair.name}, {line}: out of memory |", flush=True)
    record.complete(f"{pair.name}, {line}")


if __name__ == "__main__":
    main()
