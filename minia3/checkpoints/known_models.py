"""To be written."""

import json
import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

from minia3.files.read import read_json
from minia3.model.llama import LlamaConfig
from minia3.model.t5 import T5Config

EMBEDDED = Path(__file__).resolve().parents[2] / "data" / "tiny-t5"


class KnownModel(NamedTuple):
    repo: str  # on the hub; for the embedded model, the folder
    family: str  # what it was pre-trained on: see `seen` in tasks.py
    config: T5Config | LlamaConfig


@cache
def known_models():
    """Short name -> Known."""
    rows, models = json.loads(Path(__file__).with_name("models.json").read_text("utf-8")), {}
    for short, row in rows.items():
        row = rows[short] = rows.get(row.pop("like", None), {}) | row
        sizes = {
            key: tuple(x) if isinstance(x, list) else x
            for key, x in row.items()
            if key not in KnownModel._fields
        }
        kind = T5Config if "n_decoder_layers" in row else LlamaConfig
        models[short] = KnownModel(row.get("repo", str(EMBEDDED)), row["family"], kind(**sizes))
    return models


def hub_name(name):
    """The hub repository of a known name; any other name, and the embedded model's, as it is."""
    row = known_model(name)
    return row.repo if row and row.repo != str(EMBEDDED) else name


def known_model(name):
    """The table's row for a short name or a hub id, in any case; None where it has none.

    Nor where a folder of that name holds a model: that goes first.
    """
    name = str(name)
    row = next(
        (row for short, row in known_models().items() if name.lower() in (short, row.repo.lower())),
        None,
    )
    there = any(os.path.exists(os.path.join(name, file)) for file in ("config.json", "params.json"))
    return None if there and name != str(EMBEDDED) else row


def base_of(name_or_path):
    """The known model that a folder says it was made of (config.json's _name_or_path); any other name as it is."""
    config = Path(name_or_path, "config.json")
    base = read_json(config).get("_name_or_path") if config.is_file() else name_or_path
    return base if known_model(base) else name_or_path
