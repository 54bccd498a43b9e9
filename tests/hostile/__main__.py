"""Damage files of every format that minia3 reads, and print a table of how reading them ends.

    python -m tests.hostile                              5,000 cases
    python -m tests.hostile --cases 100000 --seed 7
    python -m tests.hostile --only GGUF --number 12      repeat one case, and show what it raises

Every case is in one of three columns: refused in one line, read as an honest reader reads it, or a
failure. The exit code is 1 if there is a failure. Linux only, because cases are forked and limited.
"""

import argparse
import math
import sys
import tempfile
from pathlib import Path

from tests.hostile.campaign import make_case, read_or_refuse, run_target
from tests.hostile.damage_targets import TARGETS


def make_parser():
    parser = argparse.ArgumentParser(
        prog="python -m tests.hostile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", type=int, default=5000, help="of all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help=f"some of {','.join(TARGETS)}")
    parser.add_argument("--number", type=int, help="repeat this case of --only")
    return parser


def main(argv=None):
    """Return the exit code: 1 if a case failed."""
    parser = make_parser()
    args = parser.parse_args(argv)
    names = args.only.split(",") if args.only else list(TARGETS)
    unknown = sorted(set(names) - set(TARGETS))
    if unknown:
        parser.error(f"there is no target {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    if args.number is not None:
        return repeat(names[0], args.number, args.seed)
    return run_all(names, args.cases, args.seed)


def run_all(names, n_cases, seed):
    """Run the cases of all targets, each with its share, and print a line for each target."""
    n_usual = sum(TARGETS[name].n_cases for name in names)
    print(f"{'format':<16} {'cases':>7} {'refused':>8} {'read':>7} {'failures':>8} {'seconds':>8}")
    tallies = []
    for name in names:
        n_of_target = math.ceil(n_cases * TARGETS[name].n_cases / n_usual)
        with tempfile.TemporaryDirectory() as folder:
            tally = run_target(name, n_of_target, seed, Path(folder))
        tallies.append(tally)
        print_line(tally)
    for tally in tallies:
        for failure in tally.failures:
            print(f"{tally.target} {failure}")
    return int(any(tally.failures for tally in tallies))


def print_line(tally):
    print(
        f"{tally.target:<16} {tally.n_cases:>7,} {tally.n_refused:>8,} {tally.n_read:>7,} "
        f"{len(tally.failures):>8,} {tally.seconds:>8.0f}",
        flush=True,
    )


def repeat(name, number, seed):
    """Run one case in this process, so that an exception shows its traceback."""
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder, "whole")
        whole.mkdir()
        TARGETS[name].make(whole)
        scratch = Path(folder, "scratch")
        print(make_case(name, number, seed, whole, scratch))
        print(read_or_refuse(TARGETS[name], scratch))
    return 0


if __name__ == "__main__":
    sys.exit(main())
