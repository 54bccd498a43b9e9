"""Chapter 6. Loading, in four steps: read, rename, check, copy; and the same backwards, to export.

    theirs (a folder, a GGUF, the hub)  --files.py-->  name, Entry  --names.py-->  our name  --check-->  the model

The model is built on the meta device, without memory; each tensor then goes straight to its place.
"""

import difflib
from dataclasses import replace
from functools import reduce
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from minia3 import files, names
from minia3.config import from_hf, to_hf, token_ids
from minia3.ia3 import vectors
from minia3.llama import Llama
from minia3.t5 import T5, T5Config

SHARD_BYTES = 5 * 10**9
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def load_model(name_or_path, *, dtype=None, device="cpu", n_adapters=1):
    """A T5 or LLaMA with its weights and `n_adapters` rows of ones, in eval mode.

    name_or_path: a folder in the Hugging Face layout, a .gguf file, a known name (`t5-base`) or a hub id.
    dtype: None keeps what is stored, but float16 T5 and quantised GGUF become float32. Vectors are float32 in any case.
    On the CPU, weights whose dtype stays as stored are mapped from the file, not copied.
    Raises ValueError for what cannot be found or read, and for tensors that do not fit: all of them at once.
    """
    if n_adapters < 1:
        raise ValueError(f"n_adapters must be at least 1, found {n_adapters}")
    if dtype not in (None, *FLOATS):
        raise ValueError(f"dtype must be None or one of {', '.join(map(str, FLOATS))}, found {dtype!r}")
    path = files.find(name_or_path)
    config = read_config(path)
    is_t5 = isinstance(config, T5Config)
    if dtype == torch.float16 and is_t5:
        raise ValueError("T5 overflows in float16 (activations beyond 65,504): use bfloat16 or float32")
    entries = read_entries(path)
    maybe_tied = not config.own_head
    model = build(replace(config, own_head="lm_head.weight" in entries or config.own_head), n_adapters)
    table = name_table(model)
    check(model, table, entries, path)
    if dtype is None:
        stored = reduce(torch.promote_types, (entry.dtype for name, entry in entries.items() if table[name]))
        dtype = torch.float32 if is_t5 and stored == torch.float16 else stored
    for name, entry in entries.items():
        if table[name] is not None:
            place(model, table[name], entry.read().to(device=device, dtype=dtype).contiguous())
    for name, vector in vectors(model).items():
        place(model, f"{name}.scale", torch.ones(vector.shape, dtype=torch.float32, device=device))
    if maybe_tied and model.head is not None and torch.equal(model.head.weight, model.embed.weight):
        model.head, model.config = None, config  # a copy of the embedding, as some files keep it
    model.name_or_path = str(name_or_path)
    return model.to(device).eval()


def build(config, n_adapters=1):
    """The model of a config on the meta device: shapes without memory."""
    with torch.device("meta"):
        return (T5 if isinstance(config, T5Config) else Llama)(config, n_adapters)


def read_config(path):
    """The config of a checkpoint's folder or .gguf file, with the end tokens of its generation_config.json."""
    if path.is_file():
        from minia3 import gguf_file

        raw = gguf_file.config(path)
    else:
        raw = files.read_json(path / "config.json")
    try:
        config = from_hf(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    generation = path / "generation_config.json"
    eos = files.read_json(generation).get("eos_token_id") if generation.exists() else None
    return config if eos is None else replace(config, eos_ids=token_ids(eos))


def read_entries(path):
    """Checkpoint name -> Entry of every tensor of a folder or .gguf file."""
    if path.is_file():
        from minia3 import gguf_file

        return gguf_file.tensors(path)
    return {name: entry for file in files.weight_files(path) for name, entry in files.tensors(file).items()}


def name_table(model):
    """Checkpoint name -> ours (None: passed over), for exactly the parameters that this model has."""
    c = model.config
    if isinstance(model, T5):
        table = names.T5 | (names.T5_GATED if c.gated else names.T5_PLAIN)
        table = names.expand(table, max(c.n_layers, c.n_decoder_layers))
    else:
        table = names.expand(names.LLAMA, c.n_layers)
    parameters = dict(model.named_parameters())
    return {theirs: ours for theirs, ours in table.items() if ours is None or ours in parameters}


def check(model, table, entries, path):
    """Raise one ValueError that names every tensor which is left over, missing, of another shape or no float."""
    parameters = dict(model.named_parameters())
    wanted = {ours: theirs for theirs, ours in table.items() if ours is not None}
    filled = {table[name] for name in entries if name in table}
    problems = []
    for name in entries.keys() - table.keys():
        near = difflib.get_close_matches(name, table, n=1)
        problems.append(f"{name} is left over" + (f" (nearest known: {near[0]})" if near else ""))
    problems += [f"{theirs} is missing" for ours, theirs in wanted.items() if ours not in filled]
    for name in sorted(entries.keys() & table.keys()):
        if table[name] is None:
            continue
        found, expected = entries[name], tuple(parameters[table[name]].shape)
        if found.shape != expected:
            problems.append(f"{name} has shape {found.shape}, expected {expected}")
        elif found.dtype not in FLOATS:
            problems.append(f"{name} is stored as {found.dtype}, expected a float")
    if problems:
        raise ValueError(f"{path}: {len(problems)} tensors do not fit the config: {'; '.join(sorted(problems))}")


def place(model, name, tensor):
    """Put `tensor` where the parameter `name` is."""
    module, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(module), attribute, nn.Parameter(tensor))


def save_model(model, folder, tokenizer=None):
    """Write the base weights (no vectors) in the Hugging Face layout, as transformers reads it.

    Weights go in shards of 5 GB at most; with `tokenizer`, its files too. Files are replaced one by one, whole.
    """
    folder = Path(folder)
    raw = to_hf(model.config, model.embed.weight.dtype)
    theirs = {ours: name for name, ours in name_table(model).items() if ours is not None}
    shards, size = [{}], 0
    for ours, parameter in model.named_parameters():
        if ours in theirs:
            n_bytes = parameter.numel() * parameter.element_size()
            if shards[-1] and size + n_bytes > SHARD_BYTES:
                shards, size = [*shards, {}], 0
            shards[-1][theirs[ours]] = parameter.detach()
            size += n_bytes
    index = {}
    for i, shard in enumerate(shards):
        name = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        with files.replacing(folder / name) as temporary:
            save_file(shard, temporary, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        total = sum(p.numel() * p.element_size() for shard in shards for p in shard.values())
        files.write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index}
        )
        (folder / "model.safetensors").unlink(missing_ok=True)  # an older one would be read in place of the shards
    generation = {key: raw[key] for key in ("eos_token_id", "pad_token_id", "bos_token_id") if raw.get(key) is not None}
    if isinstance(model, T5):
        generation["decoder_start_token_id"] = raw["decoder_start_token_id"]
    files.write_json(folder / "generation_config.json", generation)
    if tokenizer is not None:
        tokenizer.save(folder)
    files.write_json(folder / "config.json", raw)
