"""Flags that come from a file or from Python.

For --config, the file is a run's config.json, or TOML:

model = "t5-base"
task = ["rte", "cb"]
batch-size = 16
"""

import dataclasses
import difflib
import json
from pathlib import Path

from minia3.files.read import read_json, reading
from minia3.training.config import ADVICE, Config
from minia3.training.flags import join_parts, option, read_text

# What config.json holds besides flags, and flags that belong to one run only.
NOT_FLAGS = (
    *("minia3", "git_commit", "versions", "continued_with"),
    *("data", "weights", "adapter_files"),
)
OF_ONE_RUN = ("out", "resume", "config")
# Flags of one value, a text whose parts may be a list in a file
TEXTS_OF_PARTS = ("labels", "losses", "sites", "layers", "where", "eval_prompt", "log_to")
EARLIER_NAMES = {"checkpoint": "recompute"}


def read_config_file(path):
    """Return the flags in a file: name of the field -> value.

    Raise ValueError if the file is neither JSON nor TOML, or names a flag that does not exist.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "config.json"  # of a run
    if path.suffix == ".toml":
        content = read_toml(path)
    elif path.suffix == ".json":
        content = read_json(path)
    else:
        raise ValueError(f"--config is {str(path)!r}, expected a .toml or .json file")
    if "versions" in content:  # a run wrote it
        return flags_of_record(content, path)
    values = {}
    for typed, value in content.items():
        field = find_field(typed, path)
        if field.name in ("config", "resume"):
            raise ValueError(f"{path}: a file cannot name another --config or --resume")
        if field.name in values:
            raise ValueError(f"{path} has {option(field.name)} twice")
        values[field.name] = as_flag(field, value)
    return values


def flags_of_record(content, path):
    """Return the flags of a run's config.json that another run can take over."""
    values = {}
    for name, value in recorded_flags(content, path).items():
        if name not in OF_ONE_RUN:
            values[find_field(name, path).name] = value
    if values.get("epochs") is not None:
        values.pop("steps", None)  # the run has worked out how many steps its epochs are
    return values


def recorded_flags(content, path):
    """Return the flags in the content of a run's config.json.

    Raise ValueError if an earlier version trained in a way that this version cannot.
    """
    if content.get("similar_lengths"):
        raise ValueError(
            f"{path}: this run uses --similar-lengths, which only an earlier version has: "
            "finish it with that version"
        )
    values = {}
    for name, value in content.items():
        if name not in (*NOT_FLAGS, "similar_lengths"):
            if isinstance(value, list):  # JSON has no tuples
                value = tuple(value)
            values[EARLIER_NAMES.get(name, name)] = value
    if values.get("method") == "ia3" and values.get("optimizer") != "adamw":
        values.pop("weight_decay", None)  # an earlier version took it, and Adafactor ignored it
    return values


def as_flag(field, value, is_single=False):
    """Return a flag's value for what a file or Python has in its place.

    A text with commas may be several values, as on the command line, unless it is in a list or
    `is_single`. A list is a tuple or, for a flag that is a text with several parts, this text. A
    list of a single value is the value.
    """
    if isinstance(value, str):
        return read_text(field, value, is_single)
    if field.name in TEXTS_OF_PARTS and type(value) in (int, float):
        return str(value)  # `layers = 1` is --layers 1
    if not isinstance(value, list | tuple | range):
        return value
    if field.name in TEXTS_OF_PARTS:
        return join_parts(value)
    values = tuple(as_flag(field, part, is_single=True) for part in value)
    return values[0] if len(values) == 1 else values


def find_field(name, origin):
    """Return the field of a flag, which may be written as on the command line.

    origin: where the flag is. Raise ValueError if there is no such flag.
    """
    found = name.removeprefix("--").replace("-", "_")
    fields = dataclasses.fields(Config)
    for field in fields:
        if option(found) in (option(field.name), *field.metadata["also"]):
            return field
    message = f"{origin}: unknown flag {json.dumps(name)}"
    advice = ADVICE.get(option(found))
    if advice:
        raise ValueError(f"{message}: {advice.format(run='FOLDER')}")
    similar = difflib.get_close_matches(found, [field.name for field in fields], n=1)
    if similar:
        message += f": did you mean {similar[0]}?"
    raise ValueError(message)


def read_toml(path):
    """Return the content of a TOML file."""
    try:
        import tomllib
    except ImportError:  # Python 3.10
        try:
            import tomli as tomllib
        except ImportError:
            raise ValueError(
                f"{path}: Python 3.10 reads TOML after `pip install tomli`; or give a .json file"
            ) from None
    with reading(path, "not TOML"):
        # Windows' editor puts a mark before the text, which "utf-8-sig" passes over.
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
