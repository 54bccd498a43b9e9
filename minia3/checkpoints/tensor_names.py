"""To be written."""

from minia3.model import t5

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


def expand(table, n_layers):
    """Every concrete name of `table` for `n_layers` layers: theirs -> ours (or None), in the table's order."""
    pairs = {}
    for theirs, ours in table.items():
        for layer in range(n_layers) if "{}" in theirs else [0]:
            pairs[theirs.replace("{}", str(layer))] = ours and ours.replace("{}", str(layer))
    return pairs




def name_table(model):
    """Checkpoint name -> ours (None: passed over), for exactly the parameters that this model has."""
    c, is_t5 = model.config, isinstance(model, t5.T5)
    table = T5 | (T5_GATED if c.gated else T5_PLAIN) if is_t5 else LLAMA
    table = expand(table, max(c.n_layers, c.n_decoder_layers) if is_t5 else c.n_layers)
    parameters = dict(model.named_parameters())
    return {theirs: ours for theirs, ours in table.items() if ours is None or ours in parameters}
