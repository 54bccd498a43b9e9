"""Read Meta's own files of a LLaMA as if they were a checkpoint of Hugging Face.

    params.json             sizes, and little else
    consolidated.00.pth     the first shard; consolidated.01.pth ... the others

Meta runs a model on as many GPUs as it has shards, and each shard holds the part for its GPU. If a
layer's output is divided among the GPUs, a shard holds some rows of the matrix (wq, wk, wv, w1, w3,
output). If its input is divided, a shard holds some columns (wo, w2). Norms are whole in each
shard. The source is Meta's model.py, in meta-llama/llama and in meta-llama/llama3.

params.json leaves out what Meta's code hard-wires. `read_meta` infers it from the tensors:

    begin and end   An embedding of 128,256 rows is Llama 3's, whose tokenizer has other ids.
    tied head       The small models of Llama 3.2 are tied: their files store the embedding twice.
    scaling         `use_scaled_rope` is set for Llama 3.1, which slows the rotation down 8-fold,
                    and for Llama 3.2, which slows it down 32-fold. params.json does not tell them
                    apart (converters ask their user), but the head does: Llama 3.2 is tied.
    longest text    It is 2,048 tokens in Llama 1 and 4,096 in Llama 2. Nothing tells them apart,
                    so we take 4,096.
"""

import torch

from minia3.checkpoints.copies import is_copy
from minia3.checkpoints.layout import META_WEIGHTS
from minia3.checkpoints.rotation_layout import neighbors_to_halves
from minia3.checkpoints.tensor_names import LLAMA_TENSORS, expand
from minia3.files.read import read_json
from minia3.files.tensors import Entry, read_tensors

# Meta's names -> Hugging Face's names. Other tensors keep their names, and load.py refuses them,
# because they match no parameter.
META_TENSORS = [tensor for tensor in LLAMA_TENSORS if tensor.meta is not None]
NAMES = {f"{tensor.meta}.weight": f"{tensor.hugging_face}.weight" for tensor in META_TENSORS}
EMBED = "model.embed_tokens.weight"
W_Q = "model.layers.0.self_attn.q_proj.weight"
W_1 = "model.layers.0.mlp.gate_proj.weight"

# The last word of a name -> the axis that shards split, or None.
SHARD_AXES = {tensor.meta.split(".")[-1]: tensor.shard_axis for tensor in META_TENSORS}

# Keys of params.json -> keys of config.json.
PARAMS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "vocab_size": "vocab_size",
}
# Keys that are understood but not copied. The last two determine the width of W_1, and so does the
# shape of W_1.
OTHER_PARAMS = {"use_scaled_rope", "multiple_of", "ffn_dim_multiplier"}

LLAMA_3_VOCAB_SIZE = 128256
LLAMA_3 = {
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],  # end of text, of message and of turn
    "max_position_embeddings": 8192,
}
SCALED_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read_meta(folder):
    """Return the content of a config.json with model_type "llama", and a dict from Hugging Face's
    names to the Entry of each tensor. `Entry.read()` joins the parts of one tensor.

    Raise ValueError if files are missing or damaged, do not belong together, or ask for a feature
    that is not supported.
    """
    params = read_params(folder)
    paths = sorted(folder.glob(META_WEIGHTS))
    if not paths:
        paths = [folder / "consolidated.00.pth"]  # `read_shards` reports that it is not found
    shards = read_shards(paths)
    entries = join_shards(shards, params.get("dim"))

    n_rows = {name: entry.shape[0] for name, entry in entries.items() if entry.shape}
    if n_rows.get(W_Q) != params.get("dim"):
        found = f"{len(paths)} shards join to {n_rows.get(W_Q)} rows of attention.wq.weight"
        expected = f"dim={params.get('dim')!r}"
        raise ValueError(f"{folder}: {found}, expected {expected}: is a shard missing?")

    config = make_config(params, n_rows, is_tied=has_tied_head(shards[0]))
    if entries.pop("rope.freqs", None) is not None:
        # Llama 1's files hold the frequencies of the rotation: one per pair of a head's entries.
        config["head_dim"] = 2 * n_rows.get("rope.freqs", 0)
    n_heads = config.get("num_attention_heads")
    n_kv_heads = config.get("num_key_value_heads") or n_heads  # Llama 1 and 2-7B lack the key
    return config, neighbors_to_halves(entries, n_heads, n_kv_heads)


def read_params(folder):
    path = folder / "params.json"
    params = read_json(path)
    unknown = params.keys() - PARAMS.keys() - OTHER_PARAMS
    if unknown:
        raise ValueError(f"{path} asks for what minia3 does not support: {sorted(unknown)}")
    return params


def read_shards(paths):
    """Return a dict from names to Entries for each shard. Raise ValueError if two shards differ."""
    shards = [read_tensors(path) for path in paths]
    for path, shard in zip(paths, shards, strict=True):
        if kinds(shard) != kinds(shards[0]):
            expected = f"the names, shapes and dtypes of {paths[0].name}"
            raise ValueError(f"{path}: expected {expected}")
    return shards


def kinds(shard):
    return {name: (entry.shape, entry.dtype) for name, entry in shard.items()}


def join_shards(shards, d_model):
    """Return a dict from Hugging Face's names to the Entry of each whole tensor."""
    table = expand(NAMES, len(shards[0]))  # a model has fewer layers than tensors
    entries = {}
    for name in shards[0]:
        parts = [shard[name] for shard in shards]
        axis = shard_axis(name, parts[0].shape, d_model)
        entries[table.get(name, name)] = join(parts, axis)
    return entries


def shard_axis(name, shape, d_model):
    """Return the axis that the shards split, or None if each shard holds the whole tensor."""
    # Llama 1 and 2 split the embedding by columns. Llama 3 splits it by rows, and then the rows are
    # whole.
    if name == "tok_embeddings.weight" and shape[1:] == (d_model,):
        return 0
    return SHARD_AXES.get(name.removesuffix(".weight").split(".")[-1])


def join(parts, axis):
    first = parts[0]
    if axis is None:
        return first
    # A damaged shard may lack this axis. Its shape is refused later.
    shape = [n * len(parts) if i == axis else n for i, n in enumerate(first.shape)]

    def read():
        return torch.cat([part.read() for part in parts], axis)

    return Entry(tuple(shape), first.dtype, read)


def has_tied_head(shard):
    """Return whether the head is the embedding, which means that it is missing or a copy.

    The first shard is enough, because Llama 3, whose small models are tied, splits both by rows.
    """
    head = shard.get("output.weight")
    embed = shard.get("tok_embeddings.weight")
    if head is None:
        return True
    return embed is not None and is_copy(head, embed)


def make_config(params, n_rows, is_tied):
    """Return the content of a config.json.

    n_rows: the number of rows of each joined tensor, by Hugging Face's names.
    """
    config = {
        "model_type": "llama",
        "tie_word_embeddings": is_tied,
        "bos_token_id": 1,
        "max_position_embeddings": 4096,
        "intermediate_size": n_rows.get(W_1),
    }
    config |= {theirs: params[key] for key, theirs in PARAMS.items() if key in params}
    if params.get("vocab_size", -1) == -1:  # Llama 1 and 2 leave it to the tokenizer
        config["vocab_size"] = n_rows.get(EMBED)
    if config["vocab_size"] == LLAMA_3_VOCAB_SIZE:
        config |= LLAMA_3
    if params.get("use_scaled_rope"):
        factor = 32.0 if is_tied else 8.0
        config["max_position_embeddings"] = 131072
        config["rope_scaling"] = SCALED_ROPE | {"factor": factor}
    return config
