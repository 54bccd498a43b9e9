"""Chapter 6, the tables. Checkpoint names -> ours, one literal table per architecture; PEFT's and T-Few's for adapters.

`{}` is the layer's number. None: a tensor that is knowingly passed over, with the reason beside it. Export reads the
same tables backwards; a test demands that the right-hand sides are exactly the model's parameters.
"""

# fmt: off
T5 = {
    "shared.weight":                                                             "embed.weight",
    "encoder.embed_tokens.weight":                                               None,  # a copy of shared (load.py)
    "decoder.embed_tokens.weight":                                               None,  # a copy of shared (load.py)
    "encoder.block.{}.layer.0.layer_norm.weight":                                "encoder.blocks.{}.attn_norm.weight",
    "encoder.block.{}.layer.0.SelfAttention.q.weight":                           "encoder.blocks.{}.attn.q.weight",
    "encoder.block.{}.layer.0.SelfAttention.k.weight":                           "encoder.blocks.{}.attn.k.weight",
    "encoder.block.{}.layer.0.SelfAttention.v.weight":                           "encoder.blocks.{}.attn.v.weight",
    "encoder.block.{}.layer.0.SelfAttention.o.weight":                           "encoder.blocks.{}.attn.o.weight",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight":      "encoder.position.weight",
    "encoder.block.{}.layer.1.layer_norm.weight":                                "encoder.blocks.{}.ffn_norm.weight",
    "encoder.block.{}.layer.1.DenseReluDense.wo.weight":                         "encoder.blocks.{}.ffn.down.weight",
    "encoder.final_layer_norm.weight":                                           "encoder.norm.weight",
    "decoder.block.{}.layer.0.layer_norm.weight":                                "decoder.blocks.{}.attn_norm.weight",
    "decoder.block.{}.layer.0.SelfAttention.q.weight":                           "decoder.blocks.{}.attn.q.weight",
    "decoder.block.{}.layer.0.SelfAttention.k.weight":                           "decoder.blocks.{}.attn.k.weight",
    "decoder.block.{}.layer.0.SelfAttention.v.weight":                           "decoder.blocks.{}.attn.v.weight",
    "decoder.block.{}.layer.0.SelfAttention.o.weight":                           "decoder.blocks.{}.attn.o.weight",
    "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight":      "decoder.position.weight",
    "decoder.block.{}.layer.1.layer_norm.weight":                                "decoder.blocks.{}.cross_norm.weight",
    "decoder.block.{}.layer.1.EncDecAttention.q.weight":                         "decoder.blocks.{}.cross.q.weight",
    "decoder.block.{}.layer.1.EncDecAttention.k.weight":                         "decoder.blocks.{}.cross.k.weight",
    "decoder.block.{}.layer.1.EncDecAttention.v.weight":                         "decoder.blocks.{}.cross.v.weight",
    "decoder.block.{}.layer.1.EncDecAttention.o.weight":                         "decoder.blocks.{}.cross.o.weight",
    "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight":    None,  # of older files, unused
    "decoder.block.{}.layer.2.layer_norm.weight":                                "decoder.blocks.{}.ffn_norm.weight",
    "decoder.block.{}.layer.2.DenseReluDense.wo.weight":                         "decoder.blocks.{}.ffn.down.weight",
    "decoder.final_layer_norm.weight":                                           "decoder.norm.weight",
    "lm_head.weight":                                                            "head.weight",
}

T5_PLAIN = {
    "encoder.block.{}.layer.1.DenseReluDense.wi.weight":                         "encoder.blocks.{}.ffn.gate.weight",
    "decoder.block.{}.layer.2.DenseReluDense.wi.weight":                         "decoder.blocks.{}.ffn.gate.weight",
}

T5_GATED = {
    "encoder.block.{}.layer.1.DenseReluDense.wi_0.weight":                       "encoder.blocks.{}.ffn.gate.weight",
    "encoder.block.{}.layer.1.DenseReluDense.wi_1.weight":                       "encoder.blocks.{}.ffn.up.weight",
    "decoder.block.{}.layer.2.DenseReluDense.wi_0.weight":                       "decoder.blocks.{}.ffn.gate.weight",
    "decoder.block.{}.layer.2.DenseReluDense.wi_1.weight":                       "decoder.blocks.{}.ffn.up.weight",
}

# LLaMA's, without ".weight": Hugging Face's names, llama.cpp's, Meta's, the axis on which Meta's shards split it, ours.
LLAMA_TENSORS = [
    ("model.embed_tokens", "token_embd", "tok_embeddings", 1, "embed"),  # from Llama 3 on, 0
    ("model.layers.{}.input_layernorm", "blk.{}.attn_norm", "layers.{}.attention_norm", None, "blocks.{}.attn_norm"),
    ("model.layers.{}.self_attn.q_proj", "blk.{}.attn_q", "layers.{}.attention.wq", 0, "blocks.{}.attn.q"),
    ("model.layers.{}.self_attn.k_proj", "blk.{}.attn_k", "layers.{}.attention.wk", 0, "blocks.{}.attn.k"),
    ("model.layers.{}.self_attn.v_proj", "blk.{}.attn_v", "layers.{}.attention.wv", 0, "blocks.{}.attn.v"),
    ("model.layers.{}.self_attn.o_proj", "blk.{}.attn_output", "layers.{}.attention.wo", 1, "blocks.{}.attn.o"),
    ("model.layers.{}.post_attention_layernorm", "blk.{}.ffn_norm", "layers.{}.ffn_norm", None, "blocks.{}.ffn_norm"),
    ("model.layers.{}.mlp.gate_proj", "blk.{}.ffn_gate", "layers.{}.feed_forward.w1", 0, "blocks.{}.ffn.gate"),
    ("model.layers.{}.mlp.up_proj", "blk.{}.ffn_up", "layers.{}.feed_forward.w3", 0, "blocks.{}.ffn.up"),
    ("model.layers.{}.mlp.down_proj", "blk.{}.ffn_down", "layers.{}.feed_forward.w2", 1, "blocks.{}.ffn.down"),
    ("model.norm", "output_norm", "norm", None, "norm"),
    ("lm_head", "output", "output", 0, "head"),
]
LLAMA = {f"{theirs}.weight": f"{ours}.weight" for theirs, *_, ours in LLAMA_TENSORS}
LLAMA["model.layers.{}.self_attn.rotary_emb.inv_freq"] = None  # in older files; computed from the config

# PEFT's name of a vector is its module's; it scales the output, as (d, 1), or of wo and down_proj the input, as (1, d):
#     base_model.model.encoder.block.{}.layer.0.SelfAttention.k.ia3_l    is    encoder.blocks.{}.attn.l_k
#     base_model.model.model.layers.{}.mlp.down_proj.ia3_l               is    blocks.{}.ffn.l_ff
VECTORS = {
    **{"k": "l_k", "v": "l_v", "q": "l_q", "o": "l_o", "wi": "l_wi", "wi_0": "l_gate", "wi_1": "l_up", "wo": "l_ff"},
    **{"k_proj": "l_k", "v_proj": "l_v", "q_proj": "l_q", "o_proj": "l_o"},
    **{"gate_proj": "l_gate", "up_proj": "l_up", "down_proj": "l_ff"},
}
PEFT = {
    f"base_model.model.{theirs.removesuffix('.weight')}.ia3_l": ours.rsplit(".", 2)[0] + "." + VECTORS[module]
    for theirs, ours in (T5_PLAIN | T5_GATED | T5 | LLAMA).items()
    if (module := theirs.split(".")[-2]) in VECTORS
}
TFEW = {  # T-Few's, all (d, 1), are read and never written. To scale wi_1's output alone is to scale wo's input: l_ff
    theirs.removeprefix("base_model.model.").replace("ia3_l", "multi_lora_b"): ours.replace("l_up", "l_ff")
    for theirs, ours in PEFT.items()
    if theirs.endswith((".k.ia3_l", ".v.ia3_l", ".wi_1.ia3_l"))
}
# fmt: on


def expand(table, n_layers):
    """Every concrete name of `table` for `n_layers` layers: theirs -> ours (or None), in the table's order."""
    pairs = {}
    for theirs, ours in table.items():
        for layer in range(n_layers) if "{}" in theirs else [0]:
            pairs[theirs.replace("{}", str(layer))] = ours and ours.replace("{}", str(layer))
    return pairs
