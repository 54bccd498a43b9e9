"""Make a command line from a dataclass: a field is a flag, with its type, default, help and limits.

    @dataclass
    class Config:
        lr: float | tuple = flag(3e-3, "peak learning rate", above=0)  # --lr 3e-3, --lr 1e-3,1e-2

The type says how a value is read. With `| tuple`, commas separate several values, which make a
grid: one adapter for each combination. With `| None`, a flag may be left out.
"""

import argparse
import dataclasses
import difflib
import itertools
import json
import math
import os
import re
from itertools import product
from pathlib import Path
from typing import get_args

from minia3.files.home import expand_home
from minia3.files.messages import shorten


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises ValueError instead of exiting, and guesses what was meant."""

    # A flag of other programs, or of an earlier version -> what to say. {run} is its value.
    advice = {}  # noqa: RUF012 (each parser gets its own)
    # Flags whose values are separated by commas.
    list_flags = ()

    def error(self, message):
        raise ValueError(f"{message} (see {self.prog} --help)")

    def parse_words(self, words):
        """Return the arguments of a command line. Raise ValueError if a word has no meaning."""
        args, unknown = self.parse_known_intermixed_args(words)
        if unknown:
            message = f"{unknown[0]!r} is neither a flag nor the value of a flag"
            self.error(message + self.guess(unknown[0], words))
        return args

    def guess(self, word, words):
        """Return what the user may have meant by an unknown word: "" or ": ..."."""
        typed, _, value = word.partition("=")
        advice = self.advice.get(typed.replace("_", "-"))
        if advice is not None:
            if not value:
                value = next(iter(words[words.index(word) + 1 :]), "-")
            run = "FOLDER"
            if not value.startswith("-"):  # or it is the next flag
                path = Path(value)
                run = path.parent if path.suffix == ".pt" else path
            return f": {advice.format(run=run)}"
        positionals = [action.dest for action in self._get_positional_actions()]
        if typed.removeprefix("--") in positionals:
            order = " ".join(positionals).upper()
            return f": give its value alone, as in {self.prog} {order}"
        if typed.startswith("-"):
            known = re.findall(r"--[a-z][\w-]*", self.format_usage())
            similar = difflib.get_close_matches(typed, known, n=1)
            return f": did you mean {similar[0]}?" if similar else ""
        # A word after the value of a flag, as in `--seed 1 2 3`.
        before = words[: words.index(word)]
        flags = [previous for previous in before if previous.startswith("--")]
        if flags and flags[-1] in self.list_flags:
            values = words[words.index(flags[-1]) + 1 :]
            values = itertools.takewhile(lambda value: not value.startswith("-"), values)
            return f": commas separate several values, as in {flags[-1]} {','.join(values)}"
        return ""


def flag(default, help, also=(), alone=None, has_parts=False, **limits):
    """Return a field of the dataclass.

    also: other names of the flag. alone: the value if the flag is typed without one; None: it needs
    one. has_parts: whether its value is a text with commas between its parts. limits: limits of its
    value; `is_within` knows their names.
    """
    metadata = {"help": help, "also": also, "alone": alone, "limits": limits}
    metadata["has_parts"] = has_parts or "some_of" in limits
    return dataclasses.field(default=default, metadata=metadata)


def option(name):
    """Return a field's name as it is typed: "--batch-size" for "batch_size"."""
    return "--" + name.replace("_", "-")


# Reading a command line


def add_flags(parser, config_class, groups, helps=None):
    """Add a flag for each field of a dataclass. A flag that is not typed has no value.

    groups: the first field of each group of the help -> the title of the group.
    helps: name of a field -> its help, if it is not that of the field.
    """
    helps = helps or {}
    group = parser
    list_flags = []
    for field in dataclasses.fields(config_class):
        if field.name in groups:
            group = parser.add_argument_group(groups[field.name])
        names = [option(field.name), *field.metadata["also"]]
        text = helps.get(field.name, help_text(field))
        group.add_argument(*names, default=argparse.SUPPRESS, help=text, **reading_options(field))
        if tuple in kinds_of(field) or field.metadata["has_parts"]:
            list_flags += names
    parser.list_flags = list_flags


def help_text(field):
    """Return a field's help with its default. If the default is None, the help explains it."""
    if field.default is None:
        return field.metadata["help"]
    default = "no" if field.default is False else field.default
    return f"{field.metadata['help']} (default: {default})"


def reading_options(field):
    """Return the arguments of add_argument that say how the field's value is read."""
    kind = kinds_of(field)[0]
    if kind is bool:
        return {"action": "store_true"}
    read = kind
    if tuple in kinds_of(field):
        read = list_reader(kind)
    options = {"type": read, "metavar": kind.__name__}
    alone = field.metadata["alone"]
    if alone is not None:
        options |= {"nargs": "?", "const": alone}
    return options


def list_reader(kind):
    """Return a function that reads "a,b" as a tuple, and "a" or an existing path as one value."""

    def read(text):
        if os.path.exists(expand_home(text)):  # a path may have a comma in it
            return kind(text)
        values = tuple(kind(part) for part in text.split(","))
        return values if len(values) > 1 else values[0]

    read.__name__ = kind.__name__  # argparse names it in an error
    return read


def read_text(field, text, is_single=False):
    """Return the value of a text as the command line reads it, if the flag may have several values.

    is_single: whether the text is a single value, whatever commas it has. Any other text stays as
    it is, and `check_flags` refuses it.
    """
    kinds = kinds_of(field)
    if tuple not in kinds:
        return text
    read = kinds[0] if is_single else list_reader(kinds[0])
    try:
        return read(text)
    except ValueError:
        return text


def kinds_of(field):
    """Return the types of a field: (int, NoneType) for `int | None`."""
    return get_args(field.type) or (field.type,)


def as_tuple(value):
    """Return the values of a flag that may have several."""
    return value if isinstance(value, tuple) else (value,)


def join_parts(parts):
    """Join the parts of a flag such as --labels into the text that one types.

    Commas separate the parts. If a part has a comma or begins with [, the text is a JSON list.
    """
    texts = list(map(str, parts))
    # Commas would not keep these texts apart, or they would be taken for JSON themselves.
    if any("," in text or text.startswith("[") for text in texts):
        return json.dumps(texts)  # which only --labels reads
    return ",".join(texts)


# Checking values


def check_flags(config):
    """Raise ValueError for the first field with a value of the wrong type or beyond its limits."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        values = [value]
        if tuple in kinds_of(field) and isinstance(value, tuple) and value:
            values = value
        for value in values:
            check_value(field, value)


def check_value(field, value):
    """Raise ValueError if a field's value has the wrong type, is empty, or is beyond a limit."""
    kinds = kinds_of(field)
    accepted = (*kinds, int) if float in kinds else kinds
    has_kind = isinstance(value, accepted)
    if isinstance(value, bool):  # to Python, True is also an int
        has_kind = bool in kinds
    # From Python, this may be a whole model or task, whose text has many lines.
    shown = shorten(" ".join(repr(value).split()), 200)
    found = f"{option(field.name)} is {shown}, expected"
    # The kind comes first, because a table of pandas refuses to be compared.
    if not has_kind or isinstance(value, tuple) or value == "":
        raise ValueError(f"{found} {kinds[0].__name__}")
    if value is None:
        return
    for limit_name, limit in field.metadata["limits"].items():
        if not is_within(limit_name, limit, value):
            kind = "a finite number " if value == math.inf else ""
            raise ValueError(f"{found} {kind}{describe_limit(limit_name, limit)}")


def is_within(limit_name, limit, value):
    """Return whether a value is within a limit.

    NaN is within no limit of numbers, because comparisons with it are false.
    """
    if limit_name == "one_of":
        return value in limit
    if limit_name == "some_of":
        parts = value.split(",")
        return set(parts) <= set(limit) and len(set(parts)) == len(parts)
    if limit_name == "at_least":
        return value >= limit
    if limit_name == "above":
        return limit < value < math.inf
    return value < limit  # below


def describe_limit(limit_name, limit):
    words = limit_name.replace("_", " ")
    if limit_name == "some_of":
        return f"{words} {','.join(limit)}, each at most once"
    if limit_name == "one_of":
        return f"{words} {','.join(limit)}"
    return f"{words} {limit}"


# Writing a command line, and grids


def flag_words(config, names):
    """Return the flags `names` and their values as words of a command line."""
    words = []
    for name in names:
        value = getattr(config, name)
        text = ",".join(map(str, as_tuple(value)))
        if value is True:
            words.append(option(name))
        elif text.startswith("-"):
            words.append(f"{option(name)}={text}")  # or the value would be taken for a flag
        else:
            words += [option(name), text]
    return words


def expand_grid(config, axes):
    """Return a config for each combination of the values of `axes`, the names of some fields."""
    configs = []
    for values in product(*(getattr(config, name) for name in axes)):
        changes = dict(zip(axes, values, strict=True))
        configs.append(dataclasses.replace(config, **changes))
    return configs
