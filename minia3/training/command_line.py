"""From the words of a command line to checked flags. No torch, so mistakes are answered at once."""

import argparse
import dataclasses
import os
import sys
from pathlib import Path

from minia3 import __version__
from minia3.files.home import expand_home
from minia3.files.messages import message_of
from minia3.files.processes import has_several_processes
from minia3.files.streams import print_error
from minia3.training.config import ADVICE, GROUPS, Config
from minia3.training.config_file import read_config_file
from minia3.training.flags import Parser, add_flags, option
from minia3.training.rules import check_config
from minia3.training.run_folder import check_same_flags, restore_flags
from minia3.training.shown_commands import MAY_DIFFER
from minia3.training.trackers import check_trackers

TITLE = "Train (IA)^3 vectors for a task on a frozen T5 or LLaMA, and evaluate before and after"
EXAMPLES = """\
examples:
  {program}                                     the small model and task that come with minia3
  {program} --model t5-base --task rte          a real model and a real task
  {program} --model t5-base --task rte,cb --seed 0,1    four adapters, trained together
  {program} --resume runs/t5-base-rte-ia3-0     continue a run that was stopped"""

# Flags that are a path, or may be one
PATHS = ("model", "task", "chat_template", "adapter", "data_dir", "out", "resume", "config")


def read_command_line(words, program):
    """Return the Config of a command line: the flags, over those of --config or --resume.

    program: what the user types before the flags. Raise ValueError in one line if a flag is wrong.
    --help and --version print, and raise SystemExit.
    """
    return complete(parse_flags(words, program))


def parse_flags(words, program="train.py"):
    """Return the flags that a command line gives: name of the field -> value."""
    parser = Parser(
        prog=program,
        description=TITLE,
        epilog=EXAMPLES.format(program=program),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # because the next version may have another flag that fits
    )
    add_arguments(parser)
    return vars(parser.parse_words(words))


def add_arguments(parser, helps=None):
    """Declare the flags of a run. helps: see `add_flags`."""
    parser.add_argument("--version", action="version", version=f"minia3 {__version__}")
    parser.advice = ADVICE
    add_flags(parser, Config, GROUPS, helps)


def complete(given):
    """Return the Config of the flags that are given. Raise ValueError if they do not go together.

    given: name of the field -> value. --config and --resume name a file and a folder with others.
    """
    given = expand_paths(given)
    for name in ("config", "resume"):  # which are used before `check_config`
        if not isinstance(given.get(name), str | os.PathLike | None):
            raise ValueError(f"{option(name)} is {given[name]!r:.80}, expected str")
    if given.get("resume") is not None:
        config = restore_flags(given)
    else:
        check_length(given)
        flags = put_over(flags_of_file(given), given)
        config = Config(**flags)
        config.config = None  # because config.json has the flags themselves
        if config.or_resume:
            config = resume_if_begun(config, flags)
    if config.log_to == "none":
        config.log_to = None  # also if the run that is resumed had some
    check_config(config)
    check_given_shard(given)
    check_trackers(config.log_to)
    return config


def expand_paths(flags):
    """Return flags (name of the field -> value) in which no path begins with ~."""
    expanded = dict(flags)
    for name in PATHS:
        if name in flags:
            expanded[name] = expand_home(flags[name])
    return expanded


def resume_if_begun(config, flags):
    """Return the flags of the run in --out if there is one, and else those of `config`.

    flags: those that are given, with their values. Those in MAY_DIFFER replace those of the run.
    Raise ValueError if there is no --out, or if the run there has other flags.
    """
    if config.out is None:
        raise ValueError("--or-resume looks for a run in the folder of --out: give --out, too")
    check_config(config)  # before its flags are used
    folder = Path(config.out)
    if not (folder / "config.json").exists():
        return dataclasses.replace(config, or_resume=False)  # which config.json should not have
    check_same_flags(folder, config)
    given = {name: flags.get(name) for name in MAY_DIFFER}
    config = restore_flags({"resume": config.out, **given})
    return dataclasses.replace(config, or_resume=True)


def check_given_shard(given):
    """Raise ValueError if one process resumes a run with a --shard that it cannot follow.

    This is about a --shard that is typed with --resume. That of config.json is no mistake, because
    a process with more memory may hold the whole base of a run that was divided.
    """
    if given.get("resume") is None or given.get("shard") in (None, 1) or has_several_processes():
        return
    if given["shard"] == 0 and given.get("offload"):  # 0: --shard without a number
        return
    raise ValueError(
        "--shard divides a model among processes, and there is one: start several "
        "(torchrun --nproc-per-node N ...), or leave --shard out"
    )


def check_length(given):
    if "steps" in given and given.get("epochs") is not None:
        raise ValueError("--epochs takes the place of --steps: give one of them")


def flags_of_file(given):
    """Return the flags in the file of --config, if one is given."""
    if given.get("config") is None:
        return {}
    values = expand_paths(read_config_file(given["config"]))
    check_length(values)
    return values


def put_over(flags, given):
    """Return `flags` with the flags `given` in their place: name of the field -> value.

    --steps and --epochs take each other's place.
    """
    kept = dict(flags)
    for name, other in (("steps", "epochs"), ("epochs", "steps")):
        if name in given:
            kept.pop(other, None)
    return kept | given


def exit_on_mistakes(words, program):
    """Print the help, or what is wrong with the flags, and exit. Return if nothing is wrong.

    Call this before torch is imported, which takes seconds. One of several processes returns at
    once: they must end together, so the first one speaks when all have met.
    """
    if has_several_processes():
        return
    try:
        read_command_line(words, program)
    except ValueError as error:
        print_error(error_line(program, error))
        sys.exit(2)


def error_line(program, error):
    """Return "train.py: ..." in one line."""
    return f"{program.removeprefix('python ')}: {message_of(error)}"
