"""Export a model in the layout of Hugging Face.

This uses the tables of tensor_names.py and config.py in the opposite direction.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from minia3.checkpoints.config import to_hf
from minia3.checkpoints.hub import local_path
from minia3.checkpoints.known_models import base_of, known_base
from minia3.checkpoints.layout import (
    STALE_TOKENIZER_FILES,
    WEIGHT_FILES,
    check_new_model,
    warn_of_task_file,
)
from minia3.checkpoints.tensor_names import name_table
from minia3.files.home import expand_home
from minia3.files.processes import is_first
from minia3.files.progress import progress
from minia3.files.write import write_new_json, writing_folder
from minia3.model.ia3 import refuse_wrapper
from minia3.model.quantized import quantized_linears
from minia3.model.shard import gathered, is_sharded

SHARD_BYTES = 5 * 10**9

# Files of an older checkpoint in the same folder. If they stayed, they could be read in place of
# the new files. No reader looks for other names, such as model-backup.safetensors, so these stay.
STALE = (*WEIGHT_FILES, "model-*-of-*.safetensors", "pytorch_model-*-of-*.bin")

# The keys of config.json that generate() of transformers looks for in generation_config.json.
TOKEN_IDS = ("eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id")


class UnreadTensor(NamedTuple):
    n_bytes: int
    read: Callable[[], torch.Tensor]


def save_model(model, folder, tokenizer=None):
    """Write the base weights, without the vectors, as a folder that transformers loads.

    Weights are written in shards of at most 5 GB. With a `tokenizer`, its files are written too,
    and its end token is one of the model's. Otherwise the files of the folder's tokenizer stay.
    The folder changes only when everything is written (see `writing_folder`). If the model is
    divided among processes, all of them call this, and the first one writes. It gathers one tensor
    at a time, and keeps those of a shard.

    Raise ValueError if the base is quantized, if the model is in a wrapper, such as that of
    torch.compile, or if the folder holds an adapter or a run. Warn if a task.json stays there.
    """
    write_model(model, folder, tokenizer)
    warn_of_task_file(expand_home(folder))


def write_model(model, folder, tokenizer=None):
    """Do what `save_model` does, for a caller that takes care of task.json: do not warn of it."""
    refuse_wrapper(model)
    folder = Path(expand_home(folder))
    check_new_model(folder)
    if quantized_linears(model):
        raise ValueError(
            "a checkpoint holds plain weights, and this base is quantized: load it without "
            "quantize, or call minia3.model.quantized.dequantize and then minia3.merge"
        )
    names = {ours: theirs for theirs, ours in name_table(model).items()}
    parts = []
    for ours, parameter in model.named_parameters():
        if ours in names:
            parts.append((names[ours], parameter.nbytes, partial(gathered, parameter)))
    if is_sharded(model) and not is_first():
        save_tensors(None, parts)
        return
    stale = STALE
    if tokenizer is not None:
        stale = STALE + STALE_TOKENIZER_FILES
    with writing_folder(folder, replaces=stale) as temporary:
        save_others(temporary, model, model.embed.weight.dtype, tokenizer)
        save_tensors(temporary, parts)


def save_others(folder, model, dtype, tokenizer):
    """Write config.json, generation_config.json and, unless `tokenizer` is None, its files.

    Our `generate` also ends a text at the tokenizer's end token, with which targets are trained.
    Other programs know only the end tokens that the two configs name, so it is one of these.
    """
    config = model.config
    eos_id = getattr(tokenizer, "eos_id", None)
    if eos_id is not None and eos_id not in config.eos_ids:
        config = replace(config, eos_ids=(*config.eos_ids, eos_id))
    raw = to_hf(config, dtype)
    name = getattr(model, "name_or_path", getattr(model, "made_of", None))
    path = local_path(name) if name else None
    if path and known_base(path):
        # With this key, the model gets the prompts that its base knows from pre-training.
        raw["_name_or_path"] = str(base_of(path))
    write_new_json(folder / "config.json", raw)
    ids = {key: raw[key] for key in TOKEN_IDS if raw.get(key) is not None}
    defaults = getattr(model, "generation_defaults", {})
    write_new_json(folder / "generation_config.json", ids | defaults)
    if tokenizer is not None:
        tokenizer.save(folder)


def save_tensors(folder, parts):
    """Write tensors as safetensors, with an index if there are several shards.

    parts: for each tensor, its name, its number of bytes and a function that returns it. The
    functions are called shard by shard, so only one shard is in memory at a time. folder: None
    calls the functions in the same order, for another process, and writes nothing.
    """
    from huggingface_hub import split_state_dict_into_shards_factory  # imported late: see hub.py

    unread = {name: UnreadTensor(n_bytes, read) for name, n_bytes, read in parts}
    shards = split_state_dict_into_shards_factory(
        unread,
        get_storage_size=lambda tensor: tensor.n_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    for file, names in shards.filename_to_tensors.items():
        tensors = {}
        for name in progress(names, total=len(names)):
            tensor = unread[name].read()
            if folder is not None:
                tensors[name] = tensor.cpu().contiguous()
        if folder is not None:
            save_file(tensors, folder / file, {"format": "pt"})
        del tensors  # before the tensors of the next shard are read
    if shards.is_sharded and folder is not None:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        write_new_json(folder / "model.safetensors.index.json", index)
