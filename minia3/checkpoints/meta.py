"""To be written."""

import torch

from minia3.checkpoints.tensor_names import LLAMA_TENSORS, expand
from minia3.files.read import read_json
from minia3.files.tensors import Entry, read_tensors

NAMES = {
    f"{meta}.weight": f"{hf}.weight" for hf, _, meta, *_ in LLAMA_TENSORS
}  # others keep theirs
AXES = {meta.split(".")[-1]: axis for _, _, meta, axis, _ in LLAMA_TENSORS}
PARAMS = {"dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
          "n_kv_heads": "num_key_value_heads", "norm_eps": "rms_norm_eps", "rope_theta": "rope_theta",
          "vocab_size": "vocab_size"}  # fmt: skip
ALSO = {
    "use_scaled_rope",
    "multiple_of",
    "ffn_dim_multiplier",
}  # the last two are in the shape of w1
LLAMA3 = {
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "max_position_embeddings": 8192,
}
SCALED = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip


def read_meta(folder):
    """A folder -> a config.json of model_type "llama" as dict, and Hugging Face name -> Entry of every tensor.

    `Entry.read()` joins that tensor alone. Raises ValueError where files are missing or do not fit.
    Llama 3.2 slows positions down 32-fold, 3.1 8-fold, and params.json does not say which (converters ask their user).
    Here the head tells: that of 3.2's text models is a copy of the embedding.
    """
    params = read_json(folder / "params.json")
    if unknown := params.keys() - PARAMS.keys() - ALSO:
        raise ValueError(
            f"{folder / 'params.json'} asks for what minia3 does not do: {sorted(unknown)}"
        )
    paths = sorted(folder.glob("consolidated.*.pth")) or [
        folder / "consolidated.00.pth"
    ]  # which is then not found
    shards = [read_tensors(path) for path in paths]
    kinds = [{name: part[:2] for name, part in shard.items()} for shard in shards]
    if others := [path for path, kind in zip(paths, kinds, strict=True) if kind != kinds[0]]:
        raise ValueError(
            f"{others[0]}: expected tensors of the names, shapes and dtypes of those in {paths[0].name}"
        )
    dim, table = (
        params.get("dim"),
        expand(NAMES, len(kinds[0])),
    )  # there are no more layers than tensors

    def entry(name, shape, dtype):
        parts, axis = (
            [shard[name] for shard in shards],
            AXES.get(name.removesuffix(".weight").split(".")[-1]),
        )
        axis = 0 if name == "tok_embeddings.weight" and shape[1:] == (dim,) else axis
        shape = tuple(n * len(parts) if i == axis else n for i, n in enumerate(shape))
        whole = (
            parts[0].read
            if axis is None
            else lambda: torch.cat([part.read() for part in parts], axis)
        )
        return Entry(shape, dtype, whole)

    entries = {table.get(name, name): entry(name, *kind) for name, kind in kinds[0].items()}
    rows = {name: entry.shape[0] for name, entry in entries.items() if entry.shape}
    if (n_rows := rows.get("model.layers.0.self_attn.q_proj.weight")) != dim:
        found = f"{len(paths)} shards join to {n_rows} rows of attention.wq.weight"
        raise ValueError(f"{folder}: {found}, expected dim={dim!r}: is a shard missing?")
    head, embed = (shards[0].get(name) for name in ("output.weight", "tok_embeddings.weight"))
    tied = not head or (
        bool(embed) and head[:2] == embed[:2] and torch.equal(head.read(), embed.read())
    )
    hf = {
        "model_type": "llama",
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "max_position_embeddings": 4096,
    }
    hf |= {theirs: params[ours] for ours, theirs in PARAMS.items() if ours in params}
    hf["intermediate_size"] = rows.get("model.layers.0.mlp.gate_proj.weight")
    if params.get("vocab_size", -1) == -1:
        hf["vocab_size"] = rows.get("model.embed_tokens.weight")
    if hf["vocab_size"] == 128256:
        hf |= LLAMA3
    if entries.pop("rope.freqs", None):
        hf["head_dim"] = 2 * rows.get("rope.freqs", 0)
    if params.get("use_scaled_rope"):
        hf |= {
            "max_position_embeddings": 131072,
            "rope_scaling": SCALED | {"factor": 32.0 if tied else 8.0},
        }
    return hf, entries
