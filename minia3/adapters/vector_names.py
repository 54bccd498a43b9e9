"""The names that PEFT and T-Few give to vectors, and ours.

PEFT names a vector after the linear whose output it scales. At `wo` and `down_proj`, the
vector scales the input instead. `{}` stands for the layer:

    base_model.model.encoder.block.{}.layer.0.SelfAttention.k.ia3_l    encoder.blocks.{}.attn.l_k
    base_model.model.model.layers.{}.mlp.down_proj.ia3_l               blocks.{}.ffn.l_ff

A vector on an output has the shape (D, 1) in a file, and one on an input has (1, D).
"""

import re

# Linear in Hugging Face's T5: our vector.
T5 = {
    "encoder.block.{}.layer.0.SelfAttention.q": "encoder.blocks.{}.attn.l_q",
    "encoder.block.{}.layer.0.SelfAttention.k": "encoder.blocks.{}.attn.l_k",
    "encoder.block.{}.layer.0.SelfAttention.v": "encoder.blocks.{}.attn.l_v",
    "encoder.block.{}.layer.0.SelfAttention.o": "encoder.blocks.{}.attn.l_o",
    "encoder.block.{}.layer.1.DenseReluDense.wo": "encoder.blocks.{}.ffn.l_ff",
    "decoder.block.{}.layer.0.SelfAttention.q": "decoder.blocks.{}.attn.l_q",
    "decoder.block.{}.layer.0.SelfAttention.k": "decoder.blocks.{}.attn.l_k",
    "decoder.block.{}.layer.0.SelfAttention.v": "decoder.blocks.{}.attn.l_v",
    "decoder.block.{}.layer.0.SelfAttention.o": "decoder.blocks.{}.attn.l_o",
    "decoder.block.{}.layer.1.EncDecAttention.q": "decoder.blocks.{}.cross.l_q",
    "decoder.block.{}.layer.1.EncDecAttention.k": "decoder.blocks.{}.cross.l_k",
    "decoder.block.{}.layer.1.EncDecAttention.v": "decoder.blocks.{}.cross.l_v",
    "decoder.block.{}.layer.1.EncDecAttention.o": "decoder.blocks.{}.cross.l_o",
    "decoder.block.{}.layer.2.DenseReluDense.wo": "decoder.blocks.{}.ffn.l_ff",
}
T5_PLAIN = {  # v1.0
    "encoder.block.{}.layer.1.DenseReluDense.wi": "encoder.blocks.{}.ffn.l_wi",
    "decoder.block.{}.layer.2.DenseReluDense.wi": "decoder.blocks.{}.ffn.l_wi",
}
T5_GATED = {  # v1.1, flan-T5, T0, mT5
    "encoder.block.{}.layer.1.DenseReluDense.wi_0": "encoder.blocks.{}.ffn.l_gate",
    "encoder.block.{}.layer.1.DenseReluDense.wi_1": "encoder.blocks.{}.ffn.l_up",
    "decoder.block.{}.layer.2.DenseReluDense.wi_0": "decoder.blocks.{}.ffn.l_gate",
    "decoder.block.{}.layer.2.DenseReluDense.wi_1": "decoder.blocks.{}.ffn.l_up",
}
LLAMA = {
    "model.layers.{}.self_attn.q_proj": "blocks.{}.attn.l_q",
    "model.layers.{}.self_attn.k_proj": "blocks.{}.attn.l_k",
    "model.layers.{}.self_attn.v_proj": "blocks.{}.attn.l_v",
    "model.layers.{}.self_attn.o_proj": "blocks.{}.attn.l_o",
    "model.layers.{}.mlp.gate_proj": "blocks.{}.ffn.l_gate",
    "model.layers.{}.mlp.up_proj": "blocks.{}.ffn.l_up",
    "model.layers.{}.mlp.down_proj": "blocks.{}.ffn.l_ff",
}
VECTOR_OF_LINEAR = T5 | T5_PLAIN | T5_GATED | LLAMA

PREFIX = "base_model.model."
SUFFIX = ".ia3_l"
PEFT = {f"{PREFIX}{linear}{SUFFIX}": ours for linear, ours in VECTOR_OF_LINEAR.items()}

# PEFT's names of vectors that scale an input end in one of these.
INPUT_VECTORS = (".wo.ia3_l", ".down_proj.ia3_l")


def t_few_names():
    """Return a dict from T-Few's name of each vector, in its finish.pt, to ours.

    T-Few scales the outputs of k, v and wi_1, never an input. On a gated T5, to scale the output of
    wi_1 is to scale the input of wo: both are one factor of the same product, so it is our l_ff.
    """
    table = {}
    for linear, ours in VECTOR_OF_LINEAR.items():
        if linear.endswith((".k", ".v", ".wi_1")):
            table[f"{linear}.multi_lora_b"] = ours.replace("l_up", "l_ff")
    return table


TFEW = t_few_names()

READ = PEFT | TFEW  # T-Few's names are read, and never written
WRITE = {ours: theirs for theirs, ours in PEFT.items()}

LAYER = re.compile(r"\.(0|[1-9][0-9]{0,3})\.")


def rename(name, table):
    """Return what `table` calls `name`, or None if it does not have it.

    The names of the table have {} in place of the layer, which is the first number in `name`.
    """
    layer = LAYER.search(name)
    if layer is None:
        return None
    pattern = name.replace(layer[0], ".{}.", 1)
    if pattern not in table:
        return None
    return table[pattern].replace("{}", layer[1])
