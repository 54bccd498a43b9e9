"""To be written."""

import re

from minia3.checkpoints.tensor_names import LLAMA, T5, T5_GATED, T5_PLAIN

# PEFT's name of a vector is its module's; it scales the output, as (d, 1), or of wo and down_proj the input, as (1, d):
#     base_model.model.encoder.block.{}.layer.0.SelfAttention.k.ia3_l    is    encoder.blocks.{}.attn.l_k
#     base_model.model.model.layers.{}.mlp.down_proj.ia3_l               is    blocks.{}.ffn.l_ff
VECTORS = {
    **{
        "k": "l_k",
        "v": "l_v",
        "q": "l_q",
        "o": "l_o",
        "wi": "l_wi",
        "wi_0": "l_gate",
        "wi_1": "l_up",
        "wo": "l_ff",
    },
    **{"k_proj": "l_k", "v_proj": "l_v", "q_proj": "l_q", "o_proj": "l_o"},
    **{"gate_proj": "l_gate", "up_proj": "l_up", "down_proj": "l_ff"},
}
PEFT = {
    f"base_model.model.{theirs.removesuffix('.weight')}.ia3_l": ours.rsplit(".", 2)[0]
    + "."
    + VECTORS[module]
    for theirs, ours in (T5_PLAIN | T5_GATED | T5 | LLAMA).items()
    if (module := theirs.split(".")[-2]) in VECTORS
}
TFEW = {  # T-Few's, all (d, 1), are read and never written. To scale wi_1's output alone is to scale wo's input: l_ff
    theirs.removeprefix("base_model.model.").replace("ia3_l", "multi_lora_b"): ours.replace(
        "l_up", "l_ff"
    )
    for theirs, ours in PEFT.items()
    if theirs.endswith((".k.ia3_l", ".v.ia3_l", ".wi_1.ia3_l"))
}
READ = PEFT | TFEW
WRITE = {ours: theirs for theirs, ours in PEFT.items()}
INPUTS = (
    ".wo.ia3_l",
    ".down_proj.ia3_l",
)  # these scale what goes in, as (1, d); all others what comes out, as (d, 1)


def rename(name, table):
    """`name` through a table with {} for the layer, the first number in a name; None where it is not in there."""
    layer = re.search(r"\.(0|[1-9][0-9]{0,3})\.", name)
    found = layer and table.get(name.replace(layer[0], ".{}.", 1))
    return found and found.replace("{}", layer[1])
