"""An adapter that is written as a DoRA computes in PEFT what it computes here, and what PEFT
computes for it as (IA)^3. What is no DoRA is refused."""

import json

import pytest
import torch
from conftest import LLAMA_PEERS, Peer, double, logits, make, off, randomize, tokens
from safetensors.torch import load_file, save_file

import minia3
from minia3.adapters.dora import factors_of_linears, magnitude, write_dora
from minia3.adapters.peft_files import read_adapter
from minia3.adapters.rows import row_of

SOURCE = tokens(3, 7)
TARGET = tokens(3, 5, seed=1)
MASK = torch.tensor([[True] * 7, [False, False] + [True] * 5, [True] * 4 + [False] * 3])
GATED_T5 = ["t5-v1.1", "t5-deep-decoder", "t5-unscaled", "mt5", "byt5", "umt5", "flan-ul2", "t0"]
LLAMAS = [name for name in LLAMA_PEERS if name != "qwen2"]
GATED = [*GATED_T5, *LLAMAS]


def model_with_adapter(folder, name, sites=("k", "v", "ff"), **options):
    """Return our model of `make(name)` with a random adapter; some entries are 0, and some < 0."""
    make(name).save_pretrained(folder / "base")
    model = minia3.load_model(folder / "base", **options)
    if set(sites) - {"k", "v", "ff"}:
        from minia3.model.more_vectors import add_vectors, possible_vectors

        wanted = [n for n in possible_vectors(model) if n.rpartition(".l_")[2] in sites]
        add_vectors(model, wanted)
    randomize(model, 5)
    with torch.no_grad():
        for vector in minia3.vectors(model).values():
            vector[:, ::5] = 0.0
    return model


def as_dora(folder, model):
    """Write the model's adapter to folder/dora, by way of a PEFT folder of (IA)^3."""
    minia3.save_adapter(model, folder / "ia3")
    write_dora(folder / "dora", read_adapter(folder / "ia3"), folder / "base", folder / "ia3")
    return folder / "dora"


def in_peft(folder, name, adapter):
    import peft

    return peft.PeftModel.from_pretrained(make(name), adapter).eval()


def peft_logits(model, folder, name):
    return Peer(name, folder, model).logits(SOURCE, MASK, TARGET)


@pytest.mark.parametrize("name", GATED)
def test_peft_computes_the_same_with_the_dora(tmp_path, name, recwarn):
    model = model_with_adapter(tmp_path, name)
    theirs = in_peft(tmp_path, name, as_dora(tmp_path, model))
    assert not [w for w in recwarn if "missing" in str(w.message)]
    assert {layer.use_dora["default"] for layer in lora_layers(theirs)} == {True}
    found = peft_logits(theirs, tmp_path, name)
    assert off(found, logits(model, SOURCE, MASK, TARGET)) < 2e-5
    as_ia3 = in_peft(tmp_path, name, tmp_path / "ia3")
    assert off(found, peft_logits(as_ia3, tmp_path, name)) < 2e-5
    base = minia3.load_model(tmp_path / "base")
    assert off(found, logits(base, SOURCE, MASK, TARGET)) > 1e-2, "an adapter changes something"


@pytest.mark.parametrize(
    ("name", "kinds"),
    [("t5-v1.1", ["k", "v", "wi_1"]), ("llama-gqa", ["k_proj", "up_proj", "v_proj"])],
)
def test_the_config_names_kinds_of_linears_and_not_each_linear(tmp_path, name, kinds):
    folder = as_dora(tmp_path, model_with_adapter(tmp_path, name))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_modules"] == kinds


@pytest.mark.parametrize("name", ["t5-v1.1", "flan-ul2", "llama-gqa", "mistral", "qwen3"])
def test_in_float64_both_are_one_function(tmp_path, name):
    model = model_with_adapter(tmp_path, name, dtype=torch.float64)
    folder = as_dora(tmp_path, model)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    theirs = double(in_peft(tmp_path, name, folder))
    factors = factors_of_linears(model, row_of(model, 0))
    assert len(factors) == len(lora_layers(theirs))
    for layer, (linear, factor) in zip(lora_layers(theirs), in_their_order(factors), strict=True):
        weight = model.get_parameter(f"{linear}.weight").detach()
        assert torch.equal(weight, layer.base_layer.weight)
        stored = layer.lora_magnitude_vector["default"].weight
        exact = magnitude(weight, factor, linear)
        assert off(stored, exact) < 1e-7, "the file has it in float32"
        stored.data.copy_(exact)
    found = peft_logits(theirs, tmp_path, name)
    assert off(found, logits(model, SOURCE, MASK, TARGET)) < 1e-12


def lora_layers(model):
    return [module for module in model.modules() if hasattr(module, "use_dora")]


def in_their_order(factors):
    """Return (linear, factor) in the order of transformers' modules: keys, values, feed-forward."""
    return sorted(factors.items(), key=lambda item: order_of(item[0]))


def order_of(linear):
    stack, _, rest = linear.rpartition("blocks.")
    layer, part, kind = rest.split(".")
    return stack != "encoder.", int(layer), ["attn", "cross", "ffn"].index(part), kind


@pytest.mark.parametrize("name", ["t5-v1.1", "llama-odd"])
def test_vectors_on_other_linears_and_on_the_same_one_are_factors_too(tmp_path, name):
    sites = ("k", "v", "ff", "q", "o", "up", "gate")
    model = model_with_adapter(tmp_path, name, sites)
    theirs = in_peft(tmp_path, name, as_dora(tmp_path, model))
    expected = logits(model, SOURCE, MASK, TARGET)
    assert off(peft_logits(theirs, tmp_path, name), expected) < 2e-5
    names = {n.split(".")[-2] for n in load_file(tmp_path / "dora/adapter_model.safetensors")}
    assert not names & {"wo", "down_proj"}


def test_an_adapter_of_some_layers_is_a_dora_of_these_linears_only(tmp_path):
    model = model_with_adapter(tmp_path, "llama-gqa")
    vectors = {n: v for n, v in row_of(model, 0).items() if n.startswith("blocks.1.")}
    adapter = read_adapter_of(tmp_path, vectors)
    write_dora(tmp_path / "dora", adapter, tmp_path / "base", "x")
    theirs = in_peft(tmp_path, "llama-gqa", tmp_path / "dora")
    assert len(lora_layers(theirs)) == 3
    minia3.load_adapter(model, tmp_path / "ia3")
    expected = logits(model, SOURCE, MASK, TARGET)
    assert off(peft_logits(theirs, tmp_path, "llama-gqa"), expected) < 2e-5


def read_adapter_of(folder, vectors):
    from minia3.adapters.peft_files import write_adapter

    write_adapter(folder / "ia3", vectors)
    return read_adapter(folder / "ia3")


def test_an_adapter_of_ones_is_the_base(tmp_path):
    model_with_adapter(tmp_path, "llama-gqa")
    model = minia3.load_model(tmp_path / "base")
    theirs = in_peft(tmp_path, "llama-gqa", as_dora(tmp_path, model))
    expected = logits(model, SOURCE, MASK, TARGET)
    assert off(peft_logits(theirs, tmp_path, "llama-gqa"), expected) < 1e-6


# What is no DoRA


@pytest.mark.parametrize("name", ["t5-v1.0", "t5-wide"])
def test_without_a_gate_l_ff_has_no_place(tmp_path, name):
    model = model_with_adapter(tmp_path, name)
    with pytest.raises(ValueError, match=r"l_ff scales the input of a linear, because the feed-fo"):
        as_dora(tmp_path, model)
    assert not (tmp_path / "dora").exists()


def test_without_a_gate_keys_and_values_have_one(tmp_path):
    model = model_with_adapter(tmp_path, "t5-v1.0")
    for vector_name, vector in row_of(model, 0).items():
        if vector_name.endswith("l_ff"):
            vector.fill_(1.0)
    vectors = {n: v for n, v in row_of(model, 0).items() if not n.endswith("l_ff")}
    write_dora(tmp_path / "dora", read_adapter_of(tmp_path, vectors), tmp_path / "base", "x")
    theirs = in_peft(tmp_path, "t5-v1.0", tmp_path / "dora")
    expected = logits(model, SOURCE, MASK, TARGET)
    assert off(peft_logits(theirs, tmp_path, "t5-v1.0"), expected) < 2e-5


def test_a_bias_that_is_scaled_is_refused_because_dora_does_not_scale_it(tmp_path):
    model = model_with_adapter(tmp_path, "qwen2")
    with pytest.raises(ValueError, match=r"l_k scales the bias of blocks\.0\.attn\.k, too"):
        as_dora(tmp_path, model)


def test_a_row_of_zeros_is_refused_because_dora_divides_by_its_norm(tmp_path):
    model = model_with_adapter(tmp_path, "llama-gqa")
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][7] = 0.0
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"row 7 of model\.layers\.1\.mlp\.up_proj is zero"):
        as_dora(tmp_path, model)


def test_a_magnitude_beyond_float32_is_refused_by_name(tmp_path):
    """It was written as infinity."""
    model = model_with_adapter(tmp_path, "llama-gqa", ("k", "v", "ff", "up"))
    with torch.no_grad():
        for site in ("l_up", "l_ff"):
            minia3.vectors(model)[f"blocks.1.ffn.{site}"][0, 7] = 1e20
    with pytest.raises(
        ValueError, match=r"row 7 of model\.layers\.1\.mlp\.up_proj has a magnitude"
    ):
        as_dora(tmp_path, model)
    assert not (tmp_path / "dora").exists()


def test_an_adapter_of_another_base_is_refused(tmp_path):
    model = model_with_adapter(tmp_path, "llama-gqa")
    minia3.save_adapter(model, tmp_path / "ia3")
    make("llama-odd").save_pretrained(tmp_path / "other")
    adapter = read_adapter(tmp_path / "ia3")
    with pytest.raises(ValueError, match="an adapter of another base"):
        write_dora(tmp_path / "dora", adapter, tmp_path / "other", tmp_path / "ia3")
