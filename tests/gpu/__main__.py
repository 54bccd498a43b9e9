"""Check on a GPU what only a GPU can show, and write one JSON and one table.

    python -m tests.gpu --json gpu.json             at most ten minutes, on the first GPU
    python -m tests.gpu --device cuda:1 --only attention,cuda_graphs
    python -m tests.gpu --device cpu --json dry.json    a dry run: tiny models; do the checks work?

The exit code is 1 if a check fails. Checks that do not begin within the ten minutes are left out.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

from minia3.training.device import available_devices, choose_device
from tests.benchmarks.names import some_of
from tests.gpu import measures, numbers, runs
from tests.gpu.place import Place

CHECKS = {  # the quick ones first; whether they need a folder
    "waiting": (numbers.waiting, False),
    "copies": (numbers.copies, False),
    "attention": (numbers.attention, False),
    "fused": (numbers.fused, False),
    "precision": (numbers.precision, False),
    "training": (numbers.training, False),
    "deterministic": (runs.deterministic, True),
    "out_of_memory": (runs.out_of_memory, True),
    "all_cards": (runs.all_cards, True),
    "divided": (runs.divided, True),
    "compiled": (numbers.compiled, False),
    "cuda_graphs": (numbers.cuda_graphs, False),
    "performance": (measures.performance, False),
    "largest": (measures.largest, False),
}
MOST_SECONDS = 570  # when the last check may begin


def make_parser():
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", help="default: the first GPU; cpu: a dry run")
    parser.add_argument(
        "--only", type=some_of(CHECKS), default=",".join(CHECKS), help="default: %(default)s"
    )
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--seconds", type=float, default=MOST_SECONDS, help="default: %(default)s")
    return parser


def main(argv=None):
    """Return the exit code: 1 if a check failed."""
    args = make_parser().parse_args(argv)
    if args.device is None and available_devices()[0] == "cpu":
        print("there is no GPU here; --device cpu is a dry run", file=sys.stderr)
        return 2
    device, _ = choose_device(args.device)
    place = Place(device, is_dry=device.type == "cpu")
    results = {
        "device": place.name,
        "devices": place.n_devices,
        "torch": torch.__version__,
        "is_dry": place.is_dry,
        "checks": {},
    }
    print(f"{place.name}, torch {torch.__version__}{', dry run' * place.is_dry}\n")
    print("| check | result | seconds |\n|---|---|---|", flush=True)
    started = time.perf_counter()
    for name in args.only:
        result = {"result": "left out: the time is up"}
        if time.perf_counter() - started < args.seconds:
            result = run_check(name, place)
        results["checks"][name] = result
        print(f"| {name} | {result['result']} | {result.get('seconds', 0):.0f} |", flush=True)
        if args.json:  # after each check, because the next one may end the process
            args.json.write_text(json.dumps(results, indent=2) + "\n")
    print("\n" + table(results["checks"]))
    return int(any(check["result"].startswith("failed") for check in results["checks"].values()))


def run_check(name, place):
    """Return what a check has found, or why it failed. Nothing that it raises ends the others."""
    check, needs_folder = CHECKS[name]
    started = time.perf_counter()
    figures = {}
    result = "passed"
    try:
        with tempfile.TemporaryDirectory() as folder:
            figures = check(place, Path(folder)) if needs_folder else check(place)
    except Exception as error:
        result = f"failed: {type(error).__name__}: {error}".replace("\n", " ")[:300]
    return {"result": result, "seconds": time.perf_counter() - started, "figures": figures}


def table(checks):
    """Return all figures as one Markdown table."""
    lines = ["| figure | value |", "|---|---|"]
    for name, check in checks.items():
        for title, value in flatten(check.get("figures", {})):
            shown = f"{value:.4g}" if isinstance(value, float) else f"{value}"
            lines.append(f"| {name}: {title} | {shown} |")
    return "\n".join(lines)


def flatten(figures, prefix=""):
    """Yield (title, value) for nested dicts."""
    for title, value in figures.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{title}, ")
        else:
            yield f"{prefix}{title}", value


if __name__ == "__main__":
    sys.exit(main())
