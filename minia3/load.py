"""Chapter 6. Loading, in four steps: read, rename, check, copy; and the same backwards, to export.

    theirs (a folder, a GGUF, the hub)  --files.py-->  name, Entry  --names.py-->  our name  --check-->  the model

The model is built on the meta device, without memory; each tensor then goes straight to its place.
"""

import difflib
from dataclasses import replace
from functools import reduce

import torch
from safetensors.torch import save_file
from torch import nn

from minia3 import files, gguf_file, meta_files, names
from minia3.config import from_hf, to_hf
from minia3.ia3 import vectors
from minia3.llama import Llama
from minia3.models import known
from minia3.t5 import T5, T5Config

SHARD_BYTES = 5 * 10**9
N_SHOWN = 20  # tensors that do not fit; the others are counted
STALE = ("model*.safetensors*", "pytorch_model*.bin*", "chat_template.jinja")  # what an older checkpoint may have left
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def load_model(name_or_path, *, dtype=None, device="cpu", n_adapters=1):
    """A T5 or LLaMA with its weights and `n_adapters` rows of ones, in eval mode.

    name_or_path: a folder (Hugging Face's layout or Meta's of LLaMA), a .gguf file, a known name (`t5-base`), a hub id.
    dtype: None keeps what is stored, but float16 T5 and quantised GGUF become float32. Vectors are float32 in any case.
    On the CPU, weights whose dtype stays as stored are mapped from the file, not copied.
    Raises ValueError for what cannot be found or read, and for tensors that do not fit: all of them at once.
    """
    if n_adapters < 1:
        raise ValueError(f"n_adapters must be at least 1, found {n_adapters}")
    model, stored, dtype = opened(name_or_path, dtype, n_adapters)
    for name, (_, entry) in stored.items():
        place(model, name, entry.read().to(device=device, dtype=dtype).contiguous())
    for name, vector in vectors(model).items():
        place(model, f"{name}.scale", torch.ones(vector.shape, dtype=torch.float32, device=device))
    return model.to(device).eval()


def opened(name_or_path, dtype=None, n_adapters=1):
    """`load_model`, unread: a model on the meta device, our name -> (theirs, Entry) of its weights, and their dtype."""
    if dtype not in (None, *FLOATS):
        raise ValueError(f"dtype must be None or one of {', '.join(map(str, FLOATS))}, found {dtype!r}")
    path = files.find(name_or_path)
    config, entries = read(path)
    is_t5 = isinstance(config, T5Config)
    if dtype == torch.float16 and is_t5:
        raise ValueError("T5 overflows in float16 (activations beyond 65,504): use bfloat16 or float32")
    own = "shared.weight" if is_t5 else "model.embed_tokens.weight"
    inputs = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight") if is_t5 else ()
    copies = inputs if config.own_head else (*inputs, "lm_head.weight")
    if own not in entries and (there := [name for name in copies if name in entries]):
        entries[own] = entries.pop(there[0])
    embed = entries.get(own)
    for name in copies if embed else ():  # some files keep copies
        same = name in entries and entries[name][:2] == embed[:2] and torch.equal(entries[name].read(), embed.read())
        if same:
            del entries[name]
        elif name in entries and name in inputs:
            raise ValueError(f"{path}: {name} is not the copy of shared.weight that it should be")
    model = build(replace(config, own_head="lm_head.weight" in entries or config.own_head), n_adapters)
    model.name_or_path, stored = str(name_or_path), matched(model, entries, path)
    if dtype is None:
        dtype = reduce(torch.promote_types, (entry.dtype for _, entry in stored.values()))
        dtype = torch.float32 if is_t5 and dtype == torch.float16 else dtype
    return model, stored, dtype


def build(config, n_adapters=1):
    """The model of a config on the meta device: shapes without memory."""
    with torch.device("meta"):
        return (T5 if isinstance(config, T5Config) else Llama)(config, n_adapters)


def read(path, weights=True):
    """A folder or .gguf file -> its config, and Hugging Face's name -> Entry. Without `weights` there may be none."""
    meta = (path / "params.json").exists() and not (path / "config.json").exists()
    form = gguf_file if path.is_file() else meta_files if meta else None
    raw, entries = form.read(path) if form else (files.read_json(path / "config.json"), {})
    generation = path / "generation_config.json"  # what it says of the end goes before the config
    ends = files.read_json(generation).get("eos_token_id") if generation.exists() else None
    with files.reading(path):
        config = from_hf(raw if ends is None else raw | {"eos_token_id": ends})
    for name, entry in entries.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            entries[name] = in_halves(entry, config.n_heads if "q_proj" in name else config.n_kv_heads)
    for file in files.weight_files(path) if weights and not form else []:
        for name, entry in files.tensors(file).items():
            if entries.setdefault(name, entry) is not entry:
                raise ValueError(f"{file}: {name} is in another shard too")
    return config, entries


def in_halves(entry, n_heads):
    """A q or k of GGUF or Meta: there rows 0 and 1, 2 and 3 ... of a head rotate together, here 0 and d/2 ..."""
    return entry._replace(read=lambda: entry.read().unflatten(0, (n_heads, -1, 2)).transpose(1, 2).reshape(entry.shape))


def name_table(model):
    """Checkpoint name -> ours (None: passed over), for exactly the parameters that this model has."""
    c, t5 = model.config, isinstance(model, T5)
    table = names.T5 | (names.T5_GATED if c.gated else names.T5_PLAIN) if t5 else names.LLAMA
    table = names.expand(table, max(c.n_layers, c.n_decoder_layers) if t5 else c.n_layers)
    parameters = dict(model.named_parameters())
    return {theirs: ours for theirs, ours in table.items() if ours is None or ours in parameters}


def matched(model, entries, path):
    """Our name -> (theirs, Entry). One ValueError for all that is left over, missing, of another shape or no float."""
    table, stored, problems = name_table(model), {}, []
    for name in sorted(entries.keys() | table.keys()):
        entry, ours = entries.get(name), table.get(name)
        if name not in table:
            near = difflib.get_close_matches(name, table, n=1) if len(problems) < N_SHOWN else []  # each takes a while
            problems.append(f"{name} is left over" + (f" (nearest known: {near[0]})" if near else ""))
        elif ours and entry is None:
            problems.append(f"{name} is missing")
        elif ours and entry.shape != (shape := tuple(model.get_parameter(ours).shape)):
            problems.append(f"{name} has shape {entry.shape}, expected {shape}")
        elif ours and entry.dtype not in FLOATS:
            problems.append(f"{name} is stored as {entry.dtype}, expected a float")
        elif ours:
            stored[ours] = name, entry
    if problems:
        shown = "; ".join(problems[:N_SHOWN]) + " ..." * (len(problems) > N_SHOWN)
        raise ValueError(f"{path}: {len(problems)} tensors do not fit the config: {shown}")
    return stored


def place(model, name, tensor, requires_grad=True):
    """Put `tensor` where the parameter `name` is."""
    module, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(module), attribute, nn.Parameter(tensor, requires_grad))


def save_model(model, folder, tokenizer=None):
    """Write the base weights (no vectors) in the Hugging Face layout, as transformers reads it.

    Weights go in shards of 5 GB at most; with `tokenizer`, its files too. See `files.writing_folder` for what is there.
    """
    theirs = {ours: name for name, ours in name_table(model).items()}
    parts = [(theirs[ours], p.nbytes, p.detach) for ours, p in model.named_parameters() if ours in theirs]
    with files.writing_folder(folder, replaces=STALE) as temporary:
        save_others(temporary, model, model.embed.weight.dtype, tokenizer)
        save_tensors(temporary, parts)


def save_others(folder, model, dtype, tokenizer):
    """Write config.json, generation_config.json and the files of a tokenizer, which may be None."""
    raw, name = to_hf(model.config, dtype), getattr(model, "name_or_path", getattr(model, "made_of", None))
    if name and known(base := files.base_of(name)):  # so that it is asked in the words that the base knows
        raw["_name_or_path"] = str(base)
    ids = ("eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id")
    files.write_json(folder / "config.json", raw)
    files.write_json(folder / "generation_config.json", {key: raw[key] for key in ids if raw.get(key) is not None})
    if tokenizer is not None:
        tokenizer.save(folder)


def save_tensors(folder, parts):
    """Write parts (name, number of bytes, function -> tensor) in shards, of which one at a time is in memory."""
    from huggingface_hub import split_state_dict_into_shards_factory as split

    parts = {name: (n_bytes, read) for name, n_bytes, read in parts}
    options = {"filename_pattern": "model{suffix}.safetensors", "get_storage_size": lambda part: part[0]}
    shards = split(parts, max_shard_size=SHARD_BYTES, **options)
    for file, shard in shards.filename_to_tensors.items():
        save_file({name: parts[name][1]().contiguous() for name in shard}, folder / file, {"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        files.write_json(folder / "model.safetensors.index.json", index)
