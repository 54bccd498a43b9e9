"""Attack everything that minia3 reads and writes, and print one table of how that ends.

    python -m tests.hostile                                       5,000 damaged files
    python -m tests.hostile --cases 100000 --seed 7
    python -m tests.hostile --cases 0 --kills 1000                kills of all that writes
    python -m tests.hostile --cases 5000 --kills 100 --faults --numbers 30
    python -m tests.hostile --only GGUF --number 12               repeat one case

A damaged file is refused in one line or read as an honest reader reads it. What was killed or
disturbed ends in one line, and the same command again leaves what it leaves undisturbed, to the
bit. Random models have the numbers of transformers and PEFT. All else is a failure, and with one
the exit code is 1. Linux only, because cases are forked and limited.
"""

import argparse
import gc
import math
import os
import sys
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: a fork has no other threads

from tests.hostile.campaign import make_case, read_or_refuse, run_target
from tests.hostile.damage_targets import TARGETS
from tests.hostile.deeds import DEEDS
from tests.hostile.faults import FAULTS, run_fault, run_faults
from tests.hostile.kills import KillCampaign, repeat_kill, run_kills
from tests.hostile.numbers import check_case, run_numbers
from tests.hostile.processes import warm_up
from tests.hostile.scenes import SCENES, play, play_scenes

NUMBERS = "numbers"
GROUPS = {"damage": TARGETS, "kill": DEEDS, "fault": FAULTS, "scene": SCENES, NUMBERS: [NUMBERS]}


def make_parser():
    parser = argparse.ArgumentParser(
        prog="python -m tests.hostile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", type=int, default=5000, help="damaged files of all formats")
    parser.add_argument("--kills", type=int, default=0, help="of all that writes")
    parser.add_argument(
        "--faults", type=int, nargs="?", const=1, default=0, help="rounds of faults (no number: 1)"
    )
    parser.add_argument("--numbers", type=int, default=0, help="random models to compare")
    parser.add_argument("--seed", type=int, default=0)
    names = [name for group in GROUPS.values() for name in group]
    parser.add_argument("--only", help=f"some of {','.join(names)}")
    parser.add_argument("--number", type=int, help="repeat this case of --only")
    return parser


def main(argv=None):
    """Return the exit code: 1 if a case failed."""
    parser = make_parser()
    args = parser.parse_args(argv)
    chosen = args.only.split(",") if args.only else None
    groups = {}
    for group, names in GROUPS.items():
        groups[group] = [name for name in names if chosen is None or name in chosen]
    unknown = set(chosen or []).difference(*groups.values())
    if unknown:
        parser.error(f"there is no {', '.join(sorted(unknown))}; --help lists what there is")
    if args.number is not None:
        return repeat(groups, args.number, args.seed)
    return run_all(groups, args)


def run_all(groups, args):
    """Run everything, and print a line for each name and each failure."""
    print(f"{'what':<16} {'cases':>7} {'refused':>8} {'right':>7} {'failures':>8} {'seconds':>8}")
    tallies = damage(groups["damage"], args.cases, args.seed)
    if args.kills or args.faults or args.numbers:
        warm_up()
        gc.freeze()  # or each child would look at what is imported here for garbage, and copy it
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.numbers and groups[NUMBERS]:
            tallies.append(run_numbers(args.numbers, args.seed, folder))
            print_line(tallies[-1])
        if args.kills or args.faults:
            tallies += disturb(groups, args, folder)
    gc.unfreeze()  # or triton would list on stderr what was not freed
    n_cases = sum(tally.n_cases for tally in tallies)
    n_failures = sum(len(tally.failures) for tally in tallies)
    print(f"{n_cases:,} cases, {n_failures:,} failures")
    for tally in tallies:
        for failure in tally.failures:
            print(f"{tally.target} {failure}")
    return int(n_failures > 0)


def damage(names, n_cases, seed):
    """Read damaged files of all formats, each with its share."""
    n_usual = sum(TARGETS[name].n_cases for name in names)
    tallies = []
    for name in names if n_cases else []:
        n_of_target = math.ceil(n_cases * TARGETS[name].n_cases / n_usual)
        with tempfile.TemporaryDirectory() as folder:
            tally = run_target(name, n_of_target, seed, Path(folder))
        tallies.append(tally)
        print_line(tally)
    return tallies


def disturb(groups, args, folder):
    """Kill what writes, let it meet faults, and play scenes."""
    campaign = KillCampaign(folder)
    tallies = []
    try:
        if args.kills:
            tallies += run_kills(campaign, groups["kill"], args.kills, args.seed, print_line)
        if args.faults:
            tallies += run_faults(campaign, groups["fault"], args.seed, args.faults, print_line)
            tallies += play_scenes(campaign, groups["scene"], args.seed, args.faults, print_line)
    finally:
        campaign.close()
    return tallies


def print_line(tally):
    print(
        f"{tally.target:<16} {tally.n_cases:>7,} {tally.n_refused:>8,} {tally.n_read:>7,} "
        f"{len(tally.failures):>8,} {tally.seconds:>8.0f}",
        flush=True,
    )


def repeat(groups, number, seed):
    """Run one case of the chosen names, and show what happens."""
    for name in groups["damage"]:
        repeat_damage(name, number, seed)
    with tempfile.TemporaryDirectory() as folder:
        for _ in groups[NUMBERS]:
            check_case(seed, number, Path(folder))
        others = groups["kill"] + groups["fault"] + groups["scene"]
        if others:
            warm_up()
            campaign = KillCampaign(Path(folder))
            for name in groups["kill"]:
                print(repeat_kill(campaign, name, number, seed))
            for name in groups["fault"]:
                print(run_fault(campaign, name, number, seed))
            for name in groups["scene"]:
                print(play(campaign, name, number, seed))
            campaign.close()
    return 0


def repeat_damage(name, number, seed):
    """Read one damaged file in this process, so that an exception shows its traceback."""
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder, "whole")
        whole.mkdir()
        TARGETS[name].make(whole)
        scratch = Path(folder, "scratch")
        print(make_case(name, number, seed, whole, scratch))
        print(read_or_refuse(TARGETS[name], scratch))


if __name__ == "__main__":
    sys.exit(main())
