"""To be written."""

import difflib
from dataclasses import replace
from functools import reduce

import torch
from torch import nn

from minia3.checkpoints.config import from_hf
from minia3.checkpoints.gguf import read_gguf
from minia3.checkpoints.hub import find
from minia3.checkpoints.layout import weight_files
from minia3.checkpoints.meta import read_meta
from minia3.checkpoints.tensor_names import name_table
from minia3.files.read import read_json, reading
from minia3.files.tensors import FLOATS, read_tensors
from minia3.model.ia3 import vectors
from minia3.model.llama import Llama
from minia3.model.t5 import T5, T5Config

N_SHOWN = 20  # tensors that do not fit; the others are counted


def load_model(name_or_path, *, dtype=None, device="cpu", n_adapters=1):
    """A T5 or LLaMA with its weights and `n_adapters` rows of ones, in eval mode.

    name_or_path: a folder (Hugging Face's layout or Meta's of LLaMA), a .gguf file, a known name (`t5-base`), a hub id.
    dtype: None keeps what is stored, but float16 T5 and quantised GGUF become float32. Vectors are float32 in any case.
    On the CPU, weights whose dtype stays as stored are mapped from the file, not copied.
    Raises ValueError for what cannot be found or read, and for tensors that do not fit: all of them at once.
    """
    if n_adapters < 1:
        raise ValueError(f"n_adapters must be at least 1, found {n_adapters}")
    model, stored, dtype = open_checkpoint(name_or_path, dtype, n_adapters)
    for name, (_, entry) in stored.items():
        place_parameter(model, name, entry.read().to(device=device, dtype=dtype).contiguous())
    for name, vector in vectors(model).items():
        place_parameter(
            model, f"{name}.scale", torch.ones(vector.shape, dtype=torch.float32, device=device)
        )
    return model.to(device).eval()


def open_checkpoint(name_or_path, dtype=None, n_adapters=1):
    """`load_model`, unread: a model on the meta device, our name -> (theirs, Entry) of its weights, and their dtype."""
    if dtype not in (None, *FLOATS):
        raise ValueError(
            f"dtype must be None or one of {', '.join(map(str, FLOATS))}, found {dtype!r}"
        )
    path = find(name_or_path)
    config, entries = read_checkpoint(path)
    is_t5 = isinstance(config, T5Config)
    if dtype == torch.float16 and is_t5:
        raise ValueError(
            "T5 overflows in float16 (activations beyond 65,504): use bfloat16 or float32"
        )
    own = "shared.weight" if is_t5 else "model.embed_tokens.weight"
    inputs = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight") if is_t5 else ()
    copies = inputs if config.own_head else (*inputs, "lm_head.weight")
    if own not in entries and (there := [name for name in copies if name in entries]):
        entries[own] = entries.pop(there[0])
    embed = entries.get(own)
    for name in copies if embed else ():  # some files keep copies
        same = (
            name in entries
            and entries[name][:2] == embed[:2]
            and torch.equal(entries[name].read(), embed.read())
        )
        if same:
            del entries[name]
        elif name in entries and name in inputs:
            raise ValueError(f"{path}: {name} is not the copy of shared.weight that it should be")
    model = build_model(
        replace(config, own_head="lm_head.weight" in entries or config.own_head), n_adapters
    )
    model.name_or_path, stored = str(name_or_path), match_tensors(model, entries, path)
    if dtype is None:
        dtype = reduce(torch.promote_types, (entry.dtype for _, entry in stored.values()))
        dtype = torch.float32 if is_t5 and dtype == torch.float16 else dtype
    return model, stored, dtype


def build_model(config, n_adapters=1):
    """The model of a config on the meta device: shapes without memory."""
    with torch.device("meta"):
        return (T5 if isinstance(config, T5Config) else Llama)(config, n_adapters)


def read_checkpoint(path, weights=True):
    """A folder or .gguf file -> its config, and Hugging Face's name -> Entry. Without `weights` there may be none."""
    meta = (path / "params.json").exists() and not (path / "config.json").exists()
    form = read_gguf if path.is_file() else read_meta if meta else None
    raw, entries = form(path) if form else (read_json(path / "config.json"), {})
    generation = path / "generation_config.json"  # what it says of the end goes before the config
    ends = read_json(generation).get("eos_token_id") if generation.exists() else None
    with reading(path):
        config = from_hf(raw if ends is None else raw | {"eos_token_id": ends})
    for name, entry in entries.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            entries[name] = in_halves(
                entry, config.n_heads if "q_proj" in name else config.n_kv_heads
            )
    for file in weight_files(path) if weights and not form else []:
        for name, entry in read_tensors(file).items():
            if entries.setdefault(name, entry) is not entry:
                raise ValueError(f"{file}: {name} is in another shard too")
    return config, entries


def in_halves(entry, n_heads):
    """A q or k of GGUF or Meta: there rows 0 and 1, 2 and 3 ... of a head rotate together, here 0 and d/2 ..."""
    return entry._replace(
        read=lambda: (
            entry.read().unflatten(0, (n_heads, -1, 2)).transpose(1, 2).reshape(entry.shape)
        )
    )


def match_tensors(model, entries, path):
    """Our name -> (theirs, Entry). One ValueError for all that is left over, missing, of another shape or no float."""
    table, stored, problems = name_table(model), {}, []
    for name in sorted(entries.keys() | table.keys()):
        entry, ours = entries.get(name), table.get(name)
        if name not in table:
            near = (
                difflib.get_close_matches(name, table, n=1) if len(problems) < N_SHOWN else []
            )  # each takes a while
            problems.append(
                f"{name} is left over" + (f" (nearest known: {near[0]})" if near else "")
            )
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


def place_parameter(model, name, tensor, requires_grad=True):
    """Put `tensor` where the parameter `name` is."""
    module, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(module), attribute, nn.Parameter(tensor, requires_grad))
