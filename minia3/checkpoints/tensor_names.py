"""The names of tensors in checkpoints, and ours: one literal table per architecture.

`{}` stands for the number of a layer. None on the right-hand side marks a tensor that is ignored on
purpose, with the reason beside it. `save_model` reads the same tables from right to left. A test
demands that each right-hand side is a parameter of the model. adapters/vector_names.py has the
names of PEFT's and T-Few's vectors.
"""

from typing import NamedTuple

from minia3.model.t5 import T5 as T5Model

# fmt: off
T5 = {
    "shared.weight":                                                            "embed.weight",
    "encoder.embed_tokens.weight":                                              None,  # a copy of shared: see copies.py
    "decoder.embed_tokens.weight":                                              None,  # a copy of shared: see copies.py
    "encoder.block.{}.layer.0.layer_norm.weight":                               "encoder.blocks.{}.attn_norm.weight",
    "encoder.block.{}.layer.0.SelfAttention.q.weight":                          "encoder.blocks.{}.attn.q.weight",
    "encoder.block.{}.layer.0.SelfAttention.k.weight":                          "encoder.blocks.{}.attn.k.weight",
    "encoder.block.{}.layer.0.SelfAttention.v.weight":                          "encoder.blocks.{}.attn.v.weight",
    "encoder.block.{}.layer.0.SelfAttention.o.weight":                          "encoder.blocks.{}.attn.o.weight",
    "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight":    "encoder.bias_tables.{}.weight",  # umT5: in every layer
    "encoder.block.{}.layer.1.layer_norm.weight":                               "encoder.blocks.{}.ffn_norm.weight",
    "encoder.block.{}.layer.1.DenseReluDense.wo.weight":                        "encoder.blocks.{}.ffn.down.weight",
    "encoder.final_layer_norm.weight":                                          "encoder.norm.weight",
    "decoder.block.{}.layer.0.layer_norm.weight":                               "decoder.blocks.{}.attn_norm.weight",
    "decoder.block.{}.layer.0.SelfAttention.q.weight":                          "decoder.blocks.{}.attn.q.weight",
    "decoder.block.{}.layer.0.SelfAttention.k.weight":                          "decoder.blocks.{}.attn.k.weight",
    "decoder.block.{}.layer.0.SelfAttention.v.weight":                          "decoder.blocks.{}.attn.v.weight",
    "decoder.block.{}.layer.0.SelfAttention.o.weight":                          "decoder.blocks.{}.attn.o.weight",
    "decoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight":    "decoder.bias_tables.{}.weight",  # umT5: in every layer
    "decoder.block.{}.layer.1.layer_norm.weight":                               "decoder.blocks.{}.cross_norm.weight",
    "decoder.block.{}.layer.1.EncDecAttention.q.weight":                        "decoder.blocks.{}.cross.q.weight",
    "decoder.block.{}.layer.1.EncDecAttention.k.weight":                        "decoder.blocks.{}.cross.k.weight",
    "decoder.block.{}.layer.1.EncDecAttention.v.weight":                        "decoder.blocks.{}.cross.v.weight",
    "decoder.block.{}.layer.1.EncDecAttention.o.weight":                        "decoder.blocks.{}.cross.o.weight",
    "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight":   None,  # in older files; T5 uses it nowhere
    "decoder.block.{}.layer.2.layer_norm.weight":                               "decoder.blocks.{}.ffn_norm.weight",
    "decoder.block.{}.layer.2.DenseReluDense.wo.weight":                        "decoder.blocks.{}.ffn.down.weight",
    "decoder.final_layer_norm.weight":                                          "decoder.norm.weight",
    "lm_head.weight":                                                           "head.weight",
}

# The feed-forward of v1.0: one matrix before the activation.
T5_PLAIN = {
    "encoder.block.{}.layer.1.DenseReluDense.wi.weight":                        "encoder.blocks.{}.ffn.gate.weight",
    "decoder.block.{}.layer.2.DenseReluDense.wi.weight":                        "decoder.blocks.{}.ffn.gate.weight",
}

# The feed-forward of v1.1: `wi_0` is activated and multiplied by `wi_1`.
T5_GATED = {
    "encoder.block.{}.layer.1.DenseReluDense.wi_0.weight":                      "encoder.blocks.{}.ffn.gate.weight",
    "encoder.block.{}.layer.1.DenseReluDense.wi_1.weight":                      "encoder.blocks.{}.ffn.up.weight",
    "decoder.block.{}.layer.2.DenseReluDense.wi_0.weight":                      "decoder.blocks.{}.ffn.gate.weight",
    "decoder.block.{}.layer.2.DenseReluDense.wi_1.weight":                      "decoder.blocks.{}.ffn.up.weight",
}
# fmt: on


class LlamaTensor(NamedTuple):
    """One tensor of LLaMA in all formats. Each name has an ending, but not in this table."""

    hugging_face: str
    gguf: str  # llama.cpp's name
    meta: str | None  # None: no model of Meta's has it
    shard_axis: int | None  # the axis that Meta's shards split; None: each shard holds all of it
    ours: str
    ending: str = "weight"


# fmt: off
LLAMA_TENSORS = [LlamaTensor(*row) for row in [
    # Hugging Face                                llama.cpp             Meta
    # axis  ours
    ("model.embed_tokens",                        "token_embd",         "tok_embeddings",             1,    "embed"),  # see read_meta
    ("model.layers.{}.input_layernorm",           "blk.{}.attn_norm",   "layers.{}.attention_norm",   None, "blocks.{}.attn_norm"),
    ("model.layers.{}.self_attn.q_proj",          "blk.{}.attn_q",      "layers.{}.attention.wq",     0,    "blocks.{}.attn.q"),
    ("model.layers.{}.self_attn.k_proj",          "blk.{}.attn_k",      "layers.{}.attention.wk",     0,    "blocks.{}.attn.k"),
    ("model.layers.{}.self_attn.v_proj",          "blk.{}.attn_v",      "layers.{}.attention.wv",     0,    "blocks.{}.attn.v"),
    ("model.layers.{}.self_attn.o_proj",          "blk.{}.attn_output", "layers.{}.attention.wo",     1,    "blocks.{}.attn.o"),
    ("model.layers.{}.post_attention_layernorm",  "blk.{}.ffn_norm",    "layers.{}.ffn_norm",         None, "blocks.{}.ffn_norm"),
    ("model.layers.{}.mlp.gate_proj",             "blk.{}.ffn_gate",    "layers.{}.feed_forward.w1",  0,    "blocks.{}.ffn.gate"),
    ("model.layers.{}.mlp.up_proj",               "blk.{}.ffn_up",      "layers.{}.feed_forward.w3",  0,    "blocks.{}.ffn.up"),
    ("model.layers.{}.mlp.down_proj",             "blk.{}.ffn_down",    "layers.{}.feed_forward.w2",  1,    "blocks.{}.ffn.down"),
    ("model.norm",                                "output_norm",        "norm",                       None, "norm"),
    ("lm_head",                                   "output",             "output",                     0,    "head"),
    # Qwen2
    ("model.layers.{}.self_attn.q_proj",          "blk.{}.attn_q",      None,                         None, "blocks.{}.attn.q", "bias"),
    ("model.layers.{}.self_attn.k_proj",          "blk.{}.attn_k",      None,                         None, "blocks.{}.attn.k", "bias"),
    ("model.layers.{}.self_attn.v_proj",          "blk.{}.attn_v",      None,                         None, "blocks.{}.attn.v", "bias"),
    # Qwen3
    ("model.layers.{}.self_attn.q_norm",          "blk.{}.attn_q_norm", None,                         None, "blocks.{}.attn.q_norm"),
    ("model.layers.{}.self_attn.k_norm",          "blk.{}.attn_k_norm", None,                         None, "blocks.{}.attn.k_norm"),
]]
# fmt: on
LLAMA = {f"{t.hugging_face}.{t.ending}": f"{t.ours}.{t.ending}" for t in LLAMA_TENSORS}
# Older files hold the frequencies of the rotation, which follow from the config.
LLAMA["model.layers.{}.self_attn.rotary_emb.inv_freq"] = None


def expand(table, n_layers):
    """Return `table` with one line per layer in place of each line with `{}`."""
    expanded = {}
    for theirs, ours in table.items():
        if "{}" not in theirs:
            expanded[theirs] = ours
            continue
        for layer in range(n_layers):
            name = theirs.replace("{}", str(layer))
            expanded[name] = None if ours is None else ours.replace("{}", str(layer))
    return expanded


def name_table(model):
    """Return a dict from the names in a checkpoint to ours, for the parameters of this model.

    The names of tensors that are ignored are in the dict too, with None.
    """
    config = model.config
    if not isinstance(model, T5Model):
        table = expand(LLAMA, config.n_layers)
    elif config.gated:
        table = expand(T5 | T5_GATED, max(config.n_layers, config.n_decoder_layers))
    else:
        table = expand(T5 | T5_PLAIN, max(config.n_layers, config.n_decoder_layers))
    # A tied model has no head, and a T5's two stacks may differ in depth.
    parameters = dict(model.named_parameters())
    return {theirs: ours for theirs, ours in table.items() if ours is None or ours in parameters}
