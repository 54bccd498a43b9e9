"""The files of a checkpoint's folder, in the layout of Hugging Face.

    config.json                     sizes and features of the model (config.py)
    generation_config.json          token ids that end a text; these win over config.json's
    model.safetensors               all weights, or
    model.safetensors.index.json    the names of the shards, model-00001-of-00002.safetensors ...
    tokenizer.json                  the tokenizer; some of its settings are in other files

A folder with params.json and consolidated.*.pth is in Meta's layout instead (meta.py).
"""

import os
from pathlib import Path

from minia3.files.read import read_json

# A folder with either file holds a model: in Hugging Face's layout, or in Meta's.
CONFIG_FILES = ("config.json", "params.json")

# The first file that exists holds the weights. Safetensors come first, because they cannot hold
# code.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

# The first file that exists holds the vectors of an adapter.
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")

# The vocabulary of a BPE over bytes. Its merges are in a file beside it.
VOCABULARY_FILE = "vocab.json"
MERGES_FILE = "merges.txt"

# The first file that exists holds the tokenizer. The second and the third are in sentencepiece's
# format: T5's and LLaMA's. The last is CodeT5's. (ByT5 has none of these.)
TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer.model", VOCABULARY_FILE)

# Settings of the tokenizer. All of these files are read, and if two disagree, the later file wins.
SETTINGS_FILES = ("generation_config.json", "special_tokens_map.json", "tokenizer_config.json")

# A chat template in a file of its own, as newer writers store it.
CHAT_TEMPLATE_FILE = "chat_template.jinja"

# Token -> id. In older tokenizers, this file holds the tokens that were added to sentencepiece's
# pieces.
ADDED_TOKENS_FILE = "added_tokens.json"


def weight_files(folder):
    """Return the paths of the files that hold a checkpoint's weights.

    Raise ValueError if the folder holds no weights, or lacks a shard that the index names.
    """
    existing = [folder / name for name in WEIGHT_FILES if (folder / name).exists()]
    if not existing:
        found = sorted(path.name for path in folder.iterdir())[:8] or "nothing"
        expected = ", ".join(WEIGHT_FILES)
        raise ValueError(f"{folder}: expected one of {expected}; the folder holds {found}")
    first = existing[0]
    paths = [folder / name for name in shard_names(first)]
    # os.path.exists, because Path.exists raises OSError if a name is too long for the file system.
    missing = [path.name for path in paths if not os.path.exists(path)]
    if missing:
        raise ValueError(f"{first}: names shards that are not there: {', '.join(missing):.300}")
    return paths


def shard_names(first):
    """Return the names of all files that hold weights. first: the path of an index, or of the only
    file.

    Raise ValueError if the index is damaged, or names a file outside of its folder.
    """
    if first.suffix != ".json":
        return [first.name]
    weight_map = read_json(first).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    wrong = [name for name in names if not is_plain_file_name(name)]
    if wrong or not names:
        expected = "a weight_map from tensors to files of this folder"
        raise ValueError(f"{first}: expected {expected}, found {wrong or weight_map!r:.200}")
    return sorted(set(names))


def is_plain_file_name(name):
    return isinstance(name, str) and name == Path(name).name and name not in ("", "..")
