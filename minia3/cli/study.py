"""`study`: carry out the runs that a file describes, alone or with other workers.

A worker is a process that makes runs one after the other. Workers need no common scheduler, and
know nothing of each other: the lock of a run's folder keeps a second worker out of it, and what
stands in the folder says how far the run is.
"""

import argparse
import gc
import os
import re
import shlex
import sys
from collections import Counter

from minia3.cli.arguments import positive
from minia3.cli.terminal import show
from minia3.files.lock import FolderLocked
from minia3.files.messages import message_of, part_of, plural
from minia3.training import command_line
from minia3.training.config import Config
from minia3.training.run_folder import RunExists
from minia3.training.shown_commands import COMMAND
from minia3.training.study_file import given_words, read_studies

TITLE = "Carry out the runs that a file describes, or a share of them"
EXAMPLE = "minia3 study study.toml --run 1/6"
STATES = ("finished", "failed", "damaged", "begun", "to come")
LEFT = "left to another worker"  # what may become of a run
N_WORKERS = 1
HOURS = 24
HELPS = {  # of flags that mean something else for a study, or nothing
    "out": "folder of all runs (default: `out` of the file, or runs/<name of the file>)",
    "resume": argparse.SUPPRESS,  # refused, because a study continues its runs itself
    "or_resume": argparse.SUPPRESS,
    "config": argparse.SUPPRESS,
}


def add_arguments(parser):
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="a study: a .toml file. Without --list, --run or --submit, the state of its runs is "
        "printed",
    )
    actions = parser.add_mutually_exclusive_group()
    actions.add_argument(
        "--list",
        action="store_true",
        help="print the command line of each run, to run it elsewhere",
    )
    actions.add_argument(
        "--run",
        dest="share",
        nargs="?",
        type=read_share,
        const=(1, 1),
        metavar="i/n",
        help="carry out the runs: the i-th of n shares, or all. Skip runs that are finished, or "
        "that another worker is working on",
    )
    actions.add_argument(
        "--submit",
        metavar="CLUSTER",
        help="start workers with submitit: slurm, slurm:PARTITION, or local",
    )
    parser.add_argument(
        "--only",
        default="*",
        metavar="PATTERN",
        help="take only runs whose names match, as in --only 'ia3-*' (default: all runs)",
    )
    parser.add_argument(
        "--workers",
        type=positive(int),
        help=f"how many workers --submit starts (default: {N_WORKERS})",
    )
    parser.add_argument(
        "--hours",
        type=positive(float),
        help=f"time limit of a worker of --submit, in hours (default: {HOURS})",
    )
    # The flags of train.py replace those of the file in every run.
    command_line.add_arguments(parser, HELPS)


def read_share(text):
    """Return (i, n) of "i/n"."""
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a share such as 2/6; to carry out all runs, put --run after the file"
        )
    i, n = map(int, match.groups())
    if not 1 <= i <= n:
        raise argparse.ArgumentTypeError(f"{text} is not a share: i is from 1 to n")
    return i, n


def run(args):
    for flag, value in (("--workers", args.workers), ("--hours", args.hours)):
        if value is not None and not args.submit:
            raise ValueError(f"{flag} is for --submit, which starts workers: give it, too")
    given = {name: value for name, value in vars(args).items() if name in Config.__annotations__}
    runs = read_studies(args.files, given, args.only)
    if args.list:
        for study_run in runs:
            show(line_of(study_run))
    elif args.share:
        i, n = args.share
        make_runs(runs, runs[i - 1 :: n])
    elif args.submit:
        from minia3.cli.submit import submit

        for study_run in runs:  # a worker does so, too, but it may be queued for hours
            study_run.resolve()
        words = ["study", *args.files, *given_words(given), "--only", args.only, "--run"]
        folder = runs[0].folder.parent / "workers"
        submit(args.submit, words, folder, args.workers or N_WORKERS, args.hours or HOURS)
    else:
        show_states(runs)


def line_of(study_run):
    """Return the command line of a run. Raise ValueError if it would be more than one line."""
    words = [*COMMAND.split(), *given_words(study_run.flags), "--or-resume"]
    line = shlex.join(words)
    if len(line.splitlines()) > 1:
        raise ValueError(
            f"{study_run.origin}: {study_run.name} has a flag of several lines, which --list "
            "cannot print in one: use --run"
        )
    return line


# Making runs


def make_runs(runs, share):
    """Make the runs of a share, one after the other.

    runs: all runs of the study, whose flags are checked first. Runs that nobody has begun come
    first, because a run that has begun may have killed its worker: for example, if memory ran out.
    Raise RuntimeError at the end if some of them failed, and SystemExit if a signal stops one.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError(
            "a worker of a study is one process, and torchrun has started "
            f"{os.environ['WORLD_SIZE']}: put torchrun in front of each line of --list instead"
        )
    for study_run in runs:
        study_run.resolve()
    queue = sorted(share, key=lambda study_run: study_run.has_begun)
    outcomes = {}  # folder -> what became of its run
    for study_run in queue:
        outcomes[study_run.folder] = make_run(study_run)
    for study_run in queue:  # again, because the worker that made it may have been killed since
        if outcomes[study_run.folder] == LEFT:
            outcomes[study_run.folder] = make_run(study_run)
    counts = Counter(outcomes.values())
    failed = [str(folder) for folder, outcome in outcomes.items() if outcome == "failed"]
    show(", ".join(f"{count} {outcome}" for outcome, count in counts.items()) or "0 runs")
    if failed:
        names = ", ".join(failed)
        n_failed = part_of(len(failed), len(share), "run")
        raise RuntimeError(f"{n_failed} failed, see above: {names:.300}")


def make_run(study_run):
    """Make a run, or continue it. Return what became of it, in words that follow a number."""
    from minia3.files.streams import lasting_output, print_error
    from minia3.training.loop import load_loop
    from minia3.training.outcomes import results_of_finished
    from minia3.training.run import Failed
    from minia3.training.signals import Stopped
    from minia3.training.start import run_config

    loop = load_loop()
    with lasting_output():
        try:
            config = study_run.resolve()
            outcome = "finished before"
            # Not from checkpoint.pt: with --method full, it is three times as large as the model.
            if not study_run.has_begun or results_of_finished(study_run.folder) is None:
                show(f"== {study_run.folder}")
                run_config(config, loop.run_grid, COMMAND, is_program=True)
                outcome = "finished now"
            if state_of(study_run) == "failed":
                raise Failed(
                    f"{study_run.folder}: some of its adapters failed, as metrics.jsonl says, and "
                    "the others have their results: to make this run again, correct its flags and "
                    "remove its folder"
                )
            return outcome
        except FolderLocked:
            show("another worker is working on this run")
            return LEFT
        except Stopped as stop:
            # The run has said how to continue it alone.
            print_error("minia3: the same command continues the study")
            sys.exit(128 + stop.number)
        except (RuntimeError, OSError, ValueError) as error:  # RuntimeError: Failed, and torch's
            if isinstance(error, RunExists) and study_run.has_begun:
                return make_run(study_run)  # another worker has begun it since we looked
            if not isinstance(error, Failed | OSError | ValueError):
                if has_lost_device(error):
                    raise
                error = RuntimeError(f"{study_run.folder}: {error}")  # torch names no run
            print_error(command_line.error_line(COMMAND, error))
            return "failed"
        finally:
            gc.collect()  # before the next model is loaded, see `run_grid` in train.py


def has_lost_device(error):
    """Return whether an error of torch means that this process can use its accelerator no more."""
    import torch

    kinds = getattr(torch, "AcceleratorError", ())  # torch 2.5 has none
    return isinstance(error, kinds) or "CUDA error" in str(error)


# States


def show_states(runs):
    """Print a line for each run, how many runs there are in each state, and which have other flags.

    A run may have other flags because the file has changed since, or because some were typed. Say
    of each damaged run why it is.
    """
    counts = Counter()
    damages = []
    differences = []
    for study_run in runs:
        try:
            state = state_of(study_run)
        except ValueError as error:
            state = "damaged"
            damages.append(message_of(error))
        counts[state] += 1
        show(f"{state:<9} {study_run.folder}")
        if state not in ("to come", "damaged"):
            try:
                study_run.check_begun()
            except ValueError as error:
                differences.append(str(error))
    for damage in damages:
        show(f"note      {damage}")
    if differences:
        n = len(differences)
        show(f"note      {n} {plural(n, 'run')} not of this study: {differences[0]}")
    parts = [f"{counts[state]} {state}" for state in STATES if state in counts]
    show(f"{len(runs)} {plural(len(runs), 'run')}: {', '.join(parts)}")


def state_of(study_run):
    """Return one of STATES, whatever the flags of the run in the folder are.

    It is read from the run's files, so it is true at any time. Raise ValueError if they are
    damaged.
    """
    from minia3.cli.results import errors_in_one_line
    from minia3.files.read import read_json
    from minia3.training.metrics_file import read_metrics
    from minia3.training.outcomes import all_have_ended, outcomes_of

    if not study_run.has_begun:
        return "to come"
    folder = study_run.folder
    with errors_in_one_line(folder):
        lines = read_metrics(folder / "metrics.jsonl")
        has_ended = all_have_ended(lines, read_json(folder / "config.json"))
    if not has_ended:
        return "begun"
    if "failed" in outcomes_of(lines).values():
        return "failed"
    return "finished"
