"""Flags from a file, for --config: the config.json of a run, or TOML.

model = "t5-base"
task = ["rte", "cb"]
batch-size = 16
"""

import dataclasses
import difflib
import json
from pathlib import Path

from minia3.files.read import read_json, reading
from minia3.training.config import ADVICE
from minia3.training.flags import join_parts, option, read_text

# What config.json holds besides flags, and flags that belong to one run only.
NOT_FLAGS = ("minia3", "git_commit", "versions", "data", "weights")
OF_ONE_RUN = ("out", "resume", "config")
# Flags of one value, a text whose parts may be a list in a file
TEXTS_OF_PARTS = ("labels", "losses", "sites", "layers", "where", "eval_prompt", "log_to")
EARLIER_NAMES = {"checkpoint": "recompute"}


def read_config_file(path, config_class):
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
        return flags_of_record(content, config_class, path)
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    values = {}
    for typed, value in content.items():
        name = field_name(typed, config_class, path)
        if name in ("config", "resume"):
            raise ValueError(f"{path}: a file cannot name another --config or --resume")
        if name in values:
            raise ValueError(f"{path} has {option(name)} twice")
        values[name] = as_flag(value, name)
        if isinstance(value, str):
            values[name] = read_text(fields[name], value)  # "0,1"
    return values


def flags_of_record(content, config_class, path):
    """Return the flags of a run's config.json that another run can take over."""
    values = {}
    for name, value in recorded_flags(content, path).items():
        if name not in OF_ONE_RUN:
            values[field_name(name, config_class, path)] = value
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
            values[EARLIER_NAMES.get(name, name)] = as_flag(value)
    if values.get("method") == "ia3" and values.get("optimizer") != "adamw":
        values.pop("weight_decay", None)  # an earlier version took it, and Adafactor ignored it
    return values


def as_flag(value, name=None):
    """Return a value of a file as a flag has it: several values are a tuple.

    name: of the field, if a list may also stand for a text with commas, as in `labels`.
    """
    if not isinstance(value, list):
        return value
    if name in TEXTS_OF_PARTS:
        return join_parts(value)
    return tuple(value)


def field_name(name, config_class, origin):
    """Return the name of a flag's field. A flag may be written as on the command line."""
    found = name.removeprefix("--").replace("-", "_")
    fields = dataclasses.fields(config_class)
    for field in fields:
        if option(found) in (option(field.name), *field.metadata["also"]):
            return field.name
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
