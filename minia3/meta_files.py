"""Chapter 6, Meta's own files: params.json and consolidated.00.pth ..., presented as a Hugging Face LLaMA checkpoint.

Each shard holds its part of every matrix: some of its rows where a layer's output is split, some of its columns where
the input is. Norms are in each. The source is Meta's code: model.py of meta-llama/llama and of meta-llama/llama3.
"""

import re
from functools import partial

import torch

from minia3 import files
from minia3.names import LLAMA_TENSORS

NAMES = {f"{meta}.weight": (f"{hf}.weight", axis) for hf, _, meta, axis, _ in LLAMA_TENSORS}  # others keep theirs
PARAMS = {"dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
          "n_kv_heads": "num_key_value_heads", "norm_eps": "rms_norm_eps", "rope_theta": "rope_theta"}  # fmt: skip
ALSO = {"vocab_size", "use_scaled_rope", "multiple_of", "ffn_dim_multiplier"}  # the last two are in the shape of w1
LLAMA3 = {"bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "max_position_embeddings": 8192}
SCALED = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip


def config(folder):
    """A Hugging Face config.json of model_type "llama". Raises ValueError where files are missing or do not fit.

    Llama 3.2 slows positions down 32-fold, 3.1 8-fold, and params.json does not say which (converters ask their user).
    Here the head tells: that of 3.2's text models is a copy of the embedding.
    """
    return read(folder)[0]


def tensors(folder):
    """Hugging Face name -> Entry of every tensor but rope.freqs. `read()` joins that tensor alone. ValueError too."""
    return read(folder)[1]


def read(folder):
    params, paths = files.read_json(folder / "params.json"), sorted(folder.glob("consolidated.*.pth"))
    if unknown := params.keys() - PARAMS.keys() - ALSO:
        raise ValueError(f"{folder / 'params.json'} asks for what minia3 does not do: {sorted(unknown)}")
    if not paths:
        raise ValueError(f"{folder}: params.json, but no consolidated.00.pth")
    shards = [files.tensors(path) for path in paths]
    kinds = [{name: part[:2] for name, part in shard.items()} for shard in shards]
    if others := [path for path, kind in zip(paths, kinds, strict=True) if kind != kinds[0]]:
        raise ValueError(f"{others[0]}: expected tensors of the names, shapes and dtypes of those in {paths[0].name}")
    n_heads, dim, entries = params.get("n_heads"), params.get("dim"), {}
    heads = {"attention.wq.weight": n_heads, "attention.wk.weight": params.get("n_kv_heads", n_heads)}
    for name, (shape, dtype) in kinds[0].items():
        layer = re.search(r"\.([0-9]+)\.|$", name)[1] or ""
        hf_name, axis = NAMES.get(name.replace(f".{layer}.", ".{}.", 1), (name, None))
        axis = 0 if name == "tok_embeddings.weight" and shape[1:] == (dim,) else axis
        shape = tuple(n * len(shards) if i == axis else n for i, n in enumerate(shape))
        joined = partial(join, [shard[name] for shard in shards], axis, heads.get(name.split(".", 2)[-1]))
        entries[hf_name.replace("{}", layer)] = files.Entry(shape, dtype, joined)

    def rows(name):
        return entries[name].shape[0] if name in entries and entries[name].shape else None

    if (n_rows := rows("model.layers.0.self_attn.q_proj.weight")) != dim:
        found = f"{len(paths)} shards join to {n_rows} rows of attention.wq.weight"
        raise ValueError(f"{folder}: {found}, expected dim={dim!r}: is a shard missing?")
    head, embed = (shards[0].get(name) for name in ("output.weight", "tok_embeddings.weight"))
    tied = not head or (bool(embed) and head[:2] == embed[:2] and torch.equal(head.read(), embed.read()))
    hf = {"model_type": "llama", "tie_word_embeddings": tied, "bos_token_id": 1, "max_position_embeddings": 4096}
    hf |= {theirs: params[ours] for ours, theirs in PARAMS.items() if ours in params}
    hf |= {"vocab_size": params.get("vocab_size", -1), "intermediate_size": rows("model.layers.0.mlp.gate_proj.weight")}
    if hf["vocab_size"] == -1:
        hf["vocab_size"] = rows("model.embed_tokens.weight")
    if hf["vocab_size"] == 128256:
        hf |= LLAMA3
    if "rope.freqs" in entries:
        hf["head_dim"] = 2 * (rows("rope.freqs") or 0)
        del entries["rope.freqs"]
    if params.get("use_scaled_rope"):
        hf |= {"max_position_embeddings": 131072, "rope_scaling": SCALED | {"factor": 32.0 if tied else 8.0}}
    return hf, entries


def join(parts, axis, n_heads):
    x = parts[0].read() if axis is None else torch.cat([part.read() for part in parts], axis)
    if n_heads:  # its rows in Hugging Face's order, as in gguf_file.read_tensor
        return x.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).reshape(x.shape)
    return x
