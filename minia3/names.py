"""Chapter 6, the tables. Checkpoint names -> ours, one literal table per architecture, and PEFT's names for adapters.

`{}` is the layer's number. None: a tensor that is knowingly passed over, with the reason beside it. Export reads the
same tables backwards; a test demands that the right-hand sides are exactly the model's parameters.
"""

# fmt: off
T5 = {
    "shared.weight":                                                             "embed.weight",
    "encoder.embed_tokens.weight":                                               None,  # a copy of shared
    "decoder.embed_tokens.weight":                                               None,  # a copy of shared
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

LLAMA = {
    "model.embed_tokens.weight":                         "embed.weight",
    "model.layers.{}.input_layernorm.weight":            "blocks.{}.attn_norm.weight",
    "model.layers.{}.self_attn.q_proj.weight":           "blocks.{}.attn.q.weight",
    "model.layers.{}.self_attn.k_proj.weight":           "blocks.{}.attn.k.weight",
    "model.layers.{}.self_attn.v_proj.weight":           "blocks.{}.attn.v.weight",
    "model.layers.{}.self_attn.o_proj.weight":           "blocks.{}.attn.o.weight",
    "model.layers.{}.self_attn.rotary_emb.inv_freq":     None,  # in older files; computed from the config
    "model.layers.{}.post_attention_layernorm.weight":   "blocks.{}.ffn_norm.weight",
    "model.layers.{}.mlp.gate_proj.weight":              "blocks.{}.ffn.gate.weight",
    "model.layers.{}.mlp.up_proj.weight":                "blocks.{}.ffn.up.weight",
    "model.layers.{}.mlp.down_proj.weight":              "blocks.{}.ffn.down.weight",
    "model.norm.weight":                                 "norm.weight",
    "lm_head.weight":                                    "head.weight",
}

# PEFT scales the output of k and v, stored as (d, 1), and the input of the down projection, stored as (1, d).
PEFT_T5 = {
    "base_model.model.encoder.block.{}.layer.0.SelfAttention.k.ia3_l":       "encoder.blocks.{}.attn.l_k",
    "base_model.model.encoder.block.{}.layer.0.SelfAttention.v.ia3_l":       "encoder.blocks.{}.attn.l_v",
    "base_model.model.encoder.block.{}.layer.1.DenseReluDense.wi_1.ia3_l":   "encoder.blocks.{}.ffn.l_ff",
    "base_model.model.encoder.block.{}.layer.1.DenseReluDense.wo.ia3_l":     "encoder.blocks.{}.ffn.l_ff",
    "base_model.model.decoder.block.{}.layer.0.SelfAttention.k.ia3_l":       "decoder.blocks.{}.attn.l_k",
    "base_model.model.decoder.block.{}.layer.0.SelfAttention.v.ia3_l":       "decoder.blocks.{}.attn.l_v",
    "base_model.model.decoder.block.{}.layer.1.EncDecAttention.k.ia3_l":     "decoder.blocks.{}.cross.l_k",
    "base_model.model.decoder.block.{}.layer.1.EncDecAttention.v.ia3_l":     "decoder.blocks.{}.cross.l_v",
    "base_model.model.decoder.block.{}.layer.2.DenseReluDense.wi_1.ia3_l":   "decoder.blocks.{}.ffn.l_ff",
    "base_model.model.decoder.block.{}.layer.2.DenseReluDense.wo.ia3_l":     "decoder.blocks.{}.ffn.l_ff",
}

PEFT_LLAMA = {
    "base_model.model.model.layers.{}.self_attn.k_proj.ia3_l":   "blocks.{}.attn.l_k",
    "base_model.model.model.layers.{}.self_attn.v_proj.ia3_l":   "blocks.{}.attn.l_v",
    "base_model.model.model.layers.{}.mlp.down_proj.ia3_l":      "blocks.{}.ffn.l_ff",
}
# fmt: on


def expand(table, n_layers):
    """Every concrete name of `table` for `n_layers` layers: theirs -> ours (or None), in the table's order."""
    pairs = {}
    for theirs, ours in table.items():
        for layer in range(n_layers) if "{}" in theirs else [0]:
            pairs[theirs.replace("{}", str(layer))] = ours and ours.replace("{}", str(layer))
    return pairs
