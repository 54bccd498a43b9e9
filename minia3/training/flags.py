"""To be written."""

import argparse
import dataclasses
import difflib
import os
from itertools import product
from typing import get_args

TESTS = {
    "one_of": lambda value, limit: value in limit,
    "some_of": lambda value, limit: {*(x := value.split(","))} <= {*limit} and len({*x}) == len(x),
    "at_least": lambda value, limit: value >= limit,
    "above": lambda value, limit: limit < value < float("inf"),
    "below": lambda value, limit: value < limit,
}


class Parser(argparse.ArgumentParser):
    """Raises ValueError where argparse prints how a command is used, and exits."""

    def error(self, message):
        raise ValueError(f"{message} (--help explains all flags)")


def flag(default, help, also=(), **limits):
    """A field of the dataclass. also: other names of the flag; limits: names of TESTS."""
    return dataclasses.field(
        default=default, metadata={"help": help, "also": also, "limits": limits}
    )


def option(name):
    return "--" + name.replace("_", "-")


def several(kind):
    """What reads a text: one value of `kind`, or with commas between them, where it is no path, a tuple."""

    def read(text):
        values = tuple(kind(part) for part in ([text] if os.path.exists(text) else text.split(",")))
        return values if len(values) > 1 else values[0]

    read.__name__ = kind.__name__  # argparse's errors name it
    return read


def expand_grid(config, whole=()):
    """-> the names of the fields that hold several values, and a config of one value each for each cell of the grid.

    whole: fields whose values stay together.
    """
    axes = {
        name: x for name, x in vars(config).items() if isinstance(x, tuple) and name not in whole
    }
    return list(axes), [
        dataclasses.replace(config, **dict(zip(axes, x, strict=True)))
        for x in product(*axes.values())
    ]


def flag_words(config, names):
    """The flags `names` with their values, as they are typed."""
    found = [(option(name), getattr(config, name)) for name in names]
    texts = [(name, x if isinstance(x, tuple) else (x,)) for name, x in found]
    return [
        word
        for name, x in texts
        for word in ([name] if x[0] is True else [name, ",".join(map(str, x))])
    ]


def parse_flags(cls, argv, description):
    """The command line as an instance of `cls`. Raises ValueError for an unknown flag, and a word that is no value."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog="train.py", description=description, formatter_class=raw, allow_abbrev=False
    )
    for field in dataclasses.fields(cls):
        (kind, *others), default = get_args(field.type) or (field.type,), field.default
        read = several(kind) if tuple in others else kind
        how = {"action": "store_true"} if kind is bool else {"type": read, "metavar": kind.__name__}
        help = field.metadata["help"] + (
            "" if default is None else f" (default: {'no' if default is False else default})"
        )
        parser.add_argument(
            option(field.name), *field.metadata["also"], default=default, help=help, **how
        )
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(
            unknown[0].partition("=")[0], map(option, vars(values)), n=1
        )
        hint = "".join(f": did you mean {name}?" for name in near)
        parser.error(f"{unknown[0]!r} is no flag, nor the value of one{hint}")
    return cls(**vars(values))


def check_flags(config):
    """Raise ValueError for the first field whose value is of another type, empty or out of its limits."""
    for field in dataclasses.fields(config):
        values, kinds = getattr(config, field.name), get_args(field.type) or (field.type,)
        for value in (
            values if tuple in kinds and isinstance(values, tuple) and values else [values]
        ):
            found = f"{option(field.name)} is {value!r}, expected"
            if (
                value == ""
                or isinstance(value, tuple)
                or not isinstance(value, kinds + (int,) * (float in kinds))
            ):
                raise ValueError(f"{found} {kinds[0].__name__}")
            for name, limit in field.metadata["limits"].items() if value is not None else ():
                if not TESTS[name](value, limit):
                    told = (
                        ",".join(limit) + ", none twice" * (name == "some_of")
                        if isinstance(limit, tuple)
                        else limit
                    )
                    raise ValueError(f"{found} {name.replace('_', ' ')} {told}")
