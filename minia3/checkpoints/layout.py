"""To be written."""

import os
from pathlib import Path

from minia3.files.read import read_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "spiece.model",
    "tokenizer.model",
)  # of a tokenizer: the first that is there
SETTINGS_FILES = (
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)  # its settings: the last wins
CHAT_TEMPLATE_FILE = "chat_template.jinja"
ADDED_TOKENS_FILE = (
    "added_tokens.json"  # token -> id: what older tokenizers put behind sentencepiece's pieces
)
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json",  # the first that is there
                "pytorch_model.bin", "pytorch_model.bin.index.json")  # fmt: skip
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def weight_files(folder):
    """The files that hold a checkpoint's weights. Raises ValueError where the folder has none, or lacks a shard."""
    first = next((folder / file for file in WEIGHT_FILES if (folder / file).exists()), None)
    if first is None:
        found = sorted(path.name for path in folder.iterdir())[:8] or "nothing"
        raise ValueError(
            f"{folder}: expected one of {', '.join(WEIGHT_FILES)}; the folder holds {found}"
        )
    paths = [folder / name for name in shard_names(first)]
    if missing := [
        path.name for path in paths if not os.path.exists(path)
    ]:  # nor a name that is too long
        raise ValueError(f"{first}: names shards that are not there: {', '.join(missing):.300}")
    return paths


def shard_names(first):
    """The names of all shards, of which the index tells; `first` alone where it is none."""
    if first.suffix != ".json":
        return [first.name]
    parts = read_json(first).get("weight_map")
    names = [*parts.values()] if isinstance(parts, dict) else []
    wrong = [
        x for x in names if not (isinstance(x, str) and x == Path(x).name and x not in ("", ".."))
    ]
    if wrong or not names:
        what = "a weight_map from tensors to files of this folder"
        raise ValueError(f"{first}: expected {what}, found {wrong or parts!r:.200}")
    return sorted(set(names))
