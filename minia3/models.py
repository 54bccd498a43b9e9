"""Chapter 6, the known models: short name -> hub repository, family and sizes. Their table is models.json.

A row has what `Known` and its config have; it may be `like` one above, and say only what differs. From the sizes
`python -m minia3 info NAME` answers without a network; `load_model` always reads the checkpoint's own config.json.
A test compares the counts that come out with those of the papers.
"""

import json
import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

from minia3.llama import LlamaConfig
from minia3.t5 import T5Config

EMBEDDED = Path(__file__).resolve().parent.parent / "data" / "tiny-t5"


class Known(NamedTuple):
    repo: str  # on the hub; for the embedded model, the folder
    family: str  # what it was pre-trained on: see `seen` in tasks.py
    config: T5Config | LlamaConfig


@cache
def table():
    """Short name -> Known."""
    rows, models = json.loads(Path(__file__).with_suffix(".json").read_text("utf-8")), {}
    for short, row in rows.items():
        row = rows[short] = rows.get(row.pop("like", None), {}) | row
        sizes = {key: tuple(x) if isinstance(x, list) else x for key, x in row.items() if key not in Known._fields}
        kind = T5Config if "n_decoder_layers" in row else LlamaConfig
        models[short] = Known(row.get("repo", str(EMBEDDED)), row["family"], kind(**sizes))
    return models


def hub_name(name):
    """The hub repository of a known name; any other name, and the embedded model's, as it is."""
    row = known(name)
    return row.repo if row and row.repo != str(EMBEDDED) else name


def known(name):
    """The table's row for a short name or a hub id, in any case; None where it has none.

    Nor where a folder of that name holds a model: that goes first.
    """
    name = str(name)
    row = next((row for short, row in table().items() if name.lower() in (short, row.repo.lower())), None)
    there = any(os.path.exists(os.path.join(name, file)) for file in ("config.json", "params.json"))
    return None if there and name != str(EMBEDDED) else row
