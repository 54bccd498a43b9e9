"""A study: runs that differ in a few flags, described by a TOML file.

out = "runs/shots"                   # each run gets a folder in this one

[flags]                              # of every run, as in a file of --config
model = "tiny-t5"
seed = [0, 1, 2]                     # several values: adapters of one run

[each]                               # a run for each combination
shots = [4, 16]                      # of these values

[each.method]                        # and of these sets of flags
ia3 = {}
lora = {method = "lora", lr = 3e-3}

[runs.none]                          # and one more run
method = "none"

These are the runs shots4-ia3, shots4-lora, shots16-ia3, shots16-lora and none. No torch is needed,
so mistakes are answered at once.
"""

import dataclasses
import difflib
import os
import re
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path

from minia3.files.home import expand_home
from minia3.files.read import reading
from minia3.training.command_line import (
    check_length,
    complete,
    expand_paths,
    parse_flags,
    put_over,
)
from minia3.training.config import Config
from minia3.training.config_file import as_flag, find_field, read_toml
from minia3.training.flags import as_tuple, flag_words, kinds_of, option
from minia3.training.rules import check_config
from minia3.training.run_folder import RUNS, check_same_flags, short_value
from minia3.training.shown_commands import TEXTS

PARTS = ("out", "flags", "each", "runs")
OF_THE_STUDY = ("out", "resume", "config", "or_resume")  # fields that a run cannot choose
NAME = re.compile(r"[\w.,+-]+")  # so that it is the name of a folder everywhere


@dataclasses.dataclass
class StudyRun:
    """A run of a study: its name, and the flags that are given to train.py."""

    name: str
    flags: dict  # name of the field -> value
    origin: Path  # the file of the study

    @property
    def folder(self):
        return Path(self.flags["out"])

    @property
    def has_begun(self):
        return (self.folder / "config.json").exists()

    @property
    def config(self):
        """The flags as train.py knows them, with their defaults."""
        return Config(**self.flags)

    def check(self):
        """Raise ValueError if the flags are not those of a run.

        From here on, the values are those that the command line of `--list` gives: a learning rate
        of 1 is 1.0, because numbers are parts of the names of adapters.
        """
        with reading(f"{self.origin}: {self.name}"):
            check_config(self.config)
            check_length(self.flags)
            self.flags = parse_flags(given_words(self.flags))

    def check_begun(self):
        """Raise ValueError if the run in the folder has other flags than this one."""
        check_same_flags(self.folder, Config(**expand_paths(self.flags)))

    def resolve(self):
        """Return the flags of the run that is there, or of a new one. See `resume_if_begun`."""
        return complete({**self.flags, "or_resume": True})


@dataclasses.dataclass
class Choice:
    """A value of a list in [each], or a set of flags."""

    label: str  # a part of the names of the runs that have it
    flags: dict  # name of the field -> value


def given_words(flags):
    """Return flags (name of the field -> value) as words of a command line."""
    # With `is`, because 0 equals False, and a zero is a value.
    names = [name for name, value in flags.items() if value is not None and value is not False]
    return flag_words(Config(**flags), names)


# Reading


def read_studies(paths, given, only="*"):
    """Return the runs of several studies as a list of StudyRun, each study in its order.

    given: the flags that are typed, which replace those of the files: name of the field -> value.
    `out` among them is the folder of the study. only: a pattern of the names of the runs that are
    meant, such as "ia3-*". Raise ValueError in one line for a mistake.
    """
    if len(paths) > 1 and "out" in given:
        raise ValueError(f"--out is the folder of one study, found {len(paths)} studies")
    if {"resume", "config"} & given.keys():
        raise ValueError("--resume and --config are for one run: a study continues its runs itself")
    all_runs = []
    for path in paths:
        all_runs += read_study(Path(path), given)
    names = [run.name for run in all_runs]
    runs = [run for run in all_runs if fnmatchcase(run.name, only)]
    if not runs:
        found = f"--only is {only!r}, and no run has such a name"
        raise ValueError(f"{found}: expected a pattern of some of {', '.join(names):.300}")
    for run in runs:
        run.check()
    check_distinct(runs)
    return runs


def read_study(path, given):
    """Return the runs of a study, which are not checked. Raise ValueError for other mistakes."""
    content = read_toml(path)
    for name in content:
        check_part(path, name)
    out = given.get("out", content.get("out", str(RUNS / path.stem)))
    if not isinstance(out, str) or not out:
        raise ValueError(f"{path}: out is {out!r}, expected a folder")
    out = expand_home(out)
    shared = read_flags(path, "[flags]", content.get("flags", {}))
    found = [*read_product(path, content, shared), *read_explicit(path, content)]
    if not found:
        raise ValueError(f"{path}: there are no runs: give lists in [each], or [runs.NAME]")
    runs = []
    for choice in found:
        flags = put_over(put_over(shared, choice.flags), given)
        flags["out"] = str(Path(out, choice.label))
        runs.append(StudyRun(choice.label, flags, path))
    return runs


def check_part(path, name):
    """Raise ValueError unless a study has a part of this name."""
    if name in PARTS:
        return
    found = f"{path}: a study has no part {name!r}"
    if name.replace("-", "_") in {field.name for field in dataclasses.fields(Config)}:
        raise ValueError(f"{found}: a flag belongs in [flags], [each] or [runs.NAME]")
    similar = difflib.get_close_matches(name, PARTS, n=1)
    hint = f"did you mean {similar[0]}?" if similar else f"expected one of {', '.join(PARTS)}"
    raise ValueError(f"{found}: {hint}")


def read_flags(path, place, table):
    """Return the flags of a table: name of the field -> value. A list is a tuple."""
    if not isinstance(table, dict):
        raise ValueError(f"{path}: {place} is {table!r:.80}, expected flags and their values")
    flags = {}
    for typed, value in table.items():
        field = read_field(path, place, typed)
        if field.name in flags:
            raise ValueError(f"{path}: {place} has {option(field.name)} twice")
        flags[field.name] = read_value(path, f"{place} {typed}", field, value)
    return flags


def read_field(path, place, typed):
    """Return the field of a flag. Raise ValueError if there is none, or if it is not for a run."""
    field = find_field(typed, f"{path}: {place}")
    if field.name in OF_THE_STUDY:
        raise ValueError(
            f"{path}: {place} has {option(field.name)}, which is not for the runs of a study: "
            "`out` at the top of the file names the folder of all runs"
        )
    return field


def read_value(path, place, field, value):
    """Return the value of a flag (see `as_flag`). place: where the file has it."""
    if value == []:
        raise ValueError(f"{path}: {place} is an empty list")
    parts = value if isinstance(value, list) else []
    for part in parts:
        if tuple in kinds_of(field) and "," in str(part):
            raise ValueError(
                f"{path}: {place} has {part!r:.80} in a list, and on a command line the comma "
                "would divide it"
            )
    return as_flag(field, value)


def read_product(path, content, shared):
    """Return a Choice for each combination of what [each] lists. Without [each], there is none."""
    if "each" not in content:
        return []
    each = content["each"]
    if not isinstance(each, dict) or not each:
        raise ValueError(f"{path}: [each] is {each!r:.80}, expected lists of values")
    axes = []
    origins = dict.fromkeys(shared, "[flags]")  # field -> where it has a value already
    for typed, values in each.items():
        if isinstance(values, dict):
            axes.append(read_sets(path, typed, values))
            place = f"[each.{typed}]"
        else:
            axes.append(read_list(path, typed, values, origins))
            place = "[each]"
        note_origins(path, axes[-1], place, origins)
    return [combine(choices) for choices in product(*axes)]


def read_list(path, typed, values, origins):
    """Return a Choice for each value of a flag in [each]."""
    field = read_field(path, "[each]", typed)
    if not isinstance(values, list) or not values:
        raise ValueError(
            f"{path}: [each] {typed} is {values!r:.80}, expected a list of values: "
            "a run for each of them"
        )
    name = field.name
    if name in origins:
        raise ValueError(f"{path}: {option(name)} is in {origins[name]} and in [each]: choose one")
    choices = []
    for entry in values:
        value = read_value(path, f"[each] {typed}", field, entry)
        choices.append(Choice(label_of(name, value), {name: value}))
    return choices


def read_sets(path, typed, sets):
    """Return a Choice for each named set of flags. A set may replace what [flags] says."""
    if not sets:
        raise ValueError(f"{path}: [each.{typed}] is empty, expected named sets of flags")
    choices = []
    for label, table in sets.items():
        check_name(path, label)
        choices.append(Choice(label, read_flags(path, f"[each.{typed}] {label}", table)))
    return choices


def note_origins(path, choices, place, origins):
    """Note that the flags of an axis have values. Raise ValueError if another axis sets them."""
    for name in combine(choices).flags:
        before = origins.get(name, "[flags]")
        if before != "[flags]":
            raise ValueError(f"{path}: {option(name)} is in {before} and in {place}: choose one")
        origins[name] = place


def combine(choices):
    flags = {}
    for choice in choices:
        flags |= choice.flags
    return Choice("-".join(choice.label for choice in choices), flags)


def read_explicit(path, content):
    """Return a Choice for each table [runs.NAME]."""
    tables = content.get("runs", {})
    if not isinstance(tables, dict):
        raise ValueError(f"{path}: runs is {tables!r:.80}, expected tables [runs.NAME]")
    choices = []
    for label, table in tables.items():
        check_name(path, label)
        choices.append(Choice(label, read_flags(path, f"[runs.{label}]", table)))
    return choices


def check_name(path, label):
    if not NAME.fullmatch(label) or set(label) <= {"."}:
        raise ValueError(
            f"{path}: {label!r:.80} cannot name a folder: use letters, digits and . , + - _"
        )


def label_of(name, value):
    """Return how a value is written in the name of a run: "shots4", "lora", "same-colour".

    A number needs its flag beside it. A path or a word does not, nor does a number for a flag that
    also takes words, such as --layers.
    """
    texts = tuple(str(part) for part in as_tuple(value))
    if name not in TEXTS:  # in which a slash begins no path
        # `abspath` also gives "." a name.
        texts = tuple(text and os.path.basename(os.path.abspath(text)) for text in texts)
    label = short_value(texts)
    is_text = all(isinstance(part, str) for part in as_tuple(value))
    return label if is_text else name.replace("_", "") + label.lower()


def check_distinct(runs):
    """Raise ValueError if two runs have the same folder, or do the same."""
    seen = {}
    for run in runs:
        marks = (
            ("have the same folder", str(run.folder).casefold()),
            ("are the same run", repr(dataclasses.replace(run.config, out=None))),
        )
        for text, mark in marks:
            if mark in seen:
                raise ValueError(f"two runs {text}: {seen[mark]} and {run.folder}")
            seen[mark] = run.folder
