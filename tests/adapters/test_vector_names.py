"""Guards the tables of names. A vector has one name in PEFT, and T-Few's vectors have a place."""

import re

from conftest import LLAMA_PEERS, PEERS

import minia3
from minia3.adapters.vector_names import PEFT, TFEW, WRITE, rename
from minia3.checkpoints.tensor_names import LLAMA, T5, T5_GATED, T5_PLAIN, expand
from minia3.model.more_vectors import possible_vectors
from minia3.model.site_names import SITES


def test_peft_names_a_vector_after_a_linear():
    prefix = "base_model.model."
    assert (
        PEFT[prefix + "decoder.block.{}.layer.1.EncDecAttention.v.ia3_l"]
        == "decoder.blocks.{}.cross.l_v"
    )
    assert (
        PEFT[prefix + "encoder.block.{}.layer.1.DenseReluDense.wo.ia3_l"]
        == "encoder.blocks.{}.ffn.l_ff"
    )
    assert (
        PEFT[prefix + "encoder.block.{}.layer.1.DenseReluDense.wi_1.ia3_l"]
        == "encoder.blocks.{}.ffn.l_up"
    )
    assert (
        PEFT[prefix + "encoder.block.{}.layer.1.DenseReluDense.wi.ia3_l"]
        == "encoder.blocks.{}.ffn.l_wi"
    )
    assert PEFT[prefix + "model.layers.{}.mlp.down_proj.ia3_l"] == "blocks.{}.ffn.l_ff"
    assert (
        TFEW["decoder.block.{}.layer.2.DenseReluDense.wi_1.multi_lora_b"]
        == "decoder.blocks.{}.ffn.l_ff"
    )
    assert (len(PEFT), len(TFEW)) == (27, 8)


def test_the_tables_have_one_name_for_each_vector(loaded):
    for name in PEERS:
        ours = set(minia3.vectors(loaded(name)))
        is_t5 = name not in LLAMA_PEERS
        peft = {
            theirs: ours for theirs, ours in PEFT.items() if ours.startswith("blocks.") != is_t5
        }
        for names_of_ours in (ours, possible_vectors(loaded(name)).keys()):
            values = [n for n in expand(peft, 3).values() if n in names_of_ours]
            assert sorted(values) == sorted(names_of_ours)
            assert {WRITE[re.sub(r"\d+", "{}", n)] for n in names_of_ours} <= peft.keys()
        if is_t5:
            assert sorted(n for n in expand(TFEW, 3).values() if n in ours) == sorted(ours)


def test_a_vector_stands_at_the_linear_that_it_scales():
    """The table of vectors agrees with the table of weights, line by line."""
    weights = {**T5, **T5_PLAIN, **T5_GATED, **LLAMA}
    for peft_name, vector in PEFT.items():
        linear = peft_name.removeprefix("base_model.model.").removesuffix(".ia3_l")
        place, _, site = vector.rpartition(".l_")
        assert weights[f"{linear}.weight"] == f"{place}.{SITES[site]}.weight"


def test_a_name_is_renamed_with_its_layer_and_an_unknown_name_gives_none():
    prefix = "base_model.model.model.layers"
    assert rename(f"{prefix}.31.mlp.down_proj.ia3_l", PEFT) == "blocks.31.ffn.l_ff"
    assert rename("blocks.0.attn.l_k", WRITE) == f"{prefix}.0.self_attn.k_proj.ia3_l"
    for layer in ("01", "12345", "x", "-1"):
        assert rename(f"{prefix}.{layer}.mlp.down_proj.ia3_l", PEFT) is None
    assert rename(f"{prefix}.0.mlp.down.ia3_l", PEFT) is None
