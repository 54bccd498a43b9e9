"""Chapter 9, flags: a command line and its --help from one dataclass, each field made by `flag`."""

import argparse
import dataclasses
import difflib
from typing import get_args

TESTS = {
    "one_of": lambda value, limit: value in limit,
    "at_least": lambda value, limit: value >= limit,
    "above": lambda value, limit: limit < value < float("inf"),
    "below": lambda value, limit: value < limit,
}


def flag(default, help, **limits):
    """A field of the dataclass. limits: names of TESTS."""
    return dataclasses.field(default=default, metadata={"help": help, "limits": limits})


def option(field):
    return "--" + field.name.replace("_", "-")


def parse(cls, argv, description):
    """The command line as an instance of `cls`. Raises ValueError for an unknown flag, and a word that is no value."""

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            unknown = message.removeprefix("unrecognized arguments: ")
            names = [option(field) for field in dataclasses.fields(cls)]
            near = difflib.get_close_matches(unknown.split()[0].split("=")[0], names, n=1) if unknown != message else []
            raise ValueError(f"{message}{f'; did you mean {near[0]}?' if near else ''} (--help explains all flags)")

    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="train.py", description=description, formatter_class=raw, allow_abbrev=False)
    for field in dataclasses.fields(cls):
        kind, help = (get_args(field.type) or (field.type,))[0], field.metadata["help"]
        if kind is bool:
            parser.add_argument(option(field), action="store_true", help=help)
        else:
            help += "" if field.default is None else f" (default: {field.default})"
            parser.add_argument(option(field), type=kind, default=field.default, help=help, metavar=kind.__name__)
    return cls(**vars(parser.parse_args(argv)))


def check(config):
    """Raise ValueError for the first field whose value is of another type or out of its limits."""
    for field in dataclasses.fields(config):
        value, kinds = getattr(config, field.name), get_args(field.type) or (field.type,)
        if not isinstance(value, kinds + (int,) * (float in kinds)):
            raise ValueError(f"{option(field)} is {value!r}, expected {' or '.join(kind.__name__ for kind in kinds)}")
        for name, limit in field.metadata["limits"].items() if value is not None else ():
            if not TESTS[name](value, limit):
                raise ValueError(f"{option(field)} is {value!r}, expected {name.replace('_', ' ')} {limit}")
