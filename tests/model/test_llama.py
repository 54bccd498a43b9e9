"""LLaMA: its logits equal those of transformers, for every form of the model and in three dtypes.

The padding may be anywhere. The rotation follows config.json, in its old form and in its new form.
"""

import json
from dataclasses import replace

import pytest
import torch
from conftest import (
    LLAMA3_ROPE,
    LLAMA_PEERS,
    Peer,
    bfloat16_errors,
    double,
    logits,
    make,
    off,
    tokens,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import minia3
from minia3.model.llama import Llama, LlamaConfig, rotation_frequencies

# Padding on the right, on the left, on both sides and in between; no padding; a single real token.
MASK = torch.tensor(
    [
        [True] * 5 + [False] * 4,
        [False] * 3 + [True] * 6,
        [False, True, True] + [False] * 6,
        [True, False, False] * 3,
        [True] * 9,
        [False] * 4 + [True] + [False] * 4,
    ]
)


@pytest.mark.parametrize("name", LLAMA_PEERS)
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
def test_logits_are_those_of_transformers(peer, loaded, name, mask):
    source = tokens(6, 9)
    target = tokens(6, 6, seed=1)
    found = logits(loaded(name), source, mask, target)
    assert off(found, peer(name).logits(source, mask, target)) < 1e-5


@pytest.mark.parametrize("name", ["llama-odd", "llama3"])
def test_logits_of_long_texts_are_those_of_transformers(peer, loaded, name):
    source = tokens(2, 150)
    target = tokens(2, 150, seed=1)
    found = logits(loaded(name), source, None, target)
    assert off(found, peer(name).logits(source, None, target)) < 1e-5


@pytest.mark.parametrize("name", LLAMA_PEERS)
def test_logits_in_float64_are_those_of_transformers_in_float64(loaded, name):
    source = tokens(6, 9)
    target = tokens(6, 6, seed=1)
    theirs = Peer(name, None, double(make(name))).logits(source, MASK, target)
    found = logits(loaded(name, dtype=torch.float64), source, MASK, target)
    assert found.dtype == torch.float64
    assert off(found, theirs) < 1e-12


@pytest.mark.parametrize("name", ["llama-gqa", "llama3"])
def test_logits_in_bfloat16_are_as_near_the_exact_ones_as_those_of_transformers(peer, name):
    ours, theirs, scale = bfloat16_errors(peer, name, tokens(6, 9), MASK, tokens(6, 20, seed=1))
    assert 0 < ours < 1.5 * theirs
    assert ours < 0.05 * scale


@pytest.mark.parametrize("name", ["llama-mha", "llama3"])
def test_a_prompt_of_one_token_leaves_an_empty_cache_that_works(peer, loaded, name):
    model = loaded(name)
    source = tokens(3, 1)
    target = tokens(3, 4, seed=1)
    expected = peer(name).logits(source, None, target)
    state = model.start(source)
    assert state.length == 0
    assert torch.equal(state.start, source)
    assert off(logits(model, source, None, target), expected) < 1e-5
    mask = torch.tensor([[False, True, False]]).expand(3, 3)
    padded = torch.cat((tokens(3, 1, seed=2), source, tokens(3, 1, seed=3)), dim=1)
    assert model.start(padded, mask).length == 0
    assert off(logits(model, padded, mask, target), expected) < 1e-5


def test_the_target_starts_with_the_last_real_token(loaded):
    source = tokens(6, 9)
    state = loaded("llama-gqa").start(source, MASK)
    last_tokens = [row[mask][-1] for row, mask in zip(source, MASK, strict=True)]
    assert torch.equal(state.start[:, 0], torch.stack(last_tokens))


@given(
    n_before=st.integers(1, 5),
    n_after=st.integers(0, 5),
    n_real=st.integers(1, 5),
    value=st.integers(0, 60),
)
@settings(deadline=None, max_examples=10)
def test_neither_the_amount_nor_the_content_of_padding_matters(
    loaded, n_before, n_after, n_real, value
):
    model = loaded("llama-gqa")
    real = tokens(1, n_real)
    target = tokens(1, 3, seed=1)
    left = torch.full((1, n_before), value)
    right = torch.full((1, n_after), value)
    source = torch.cat((left, real, right), dim=1)
    mask = torch.tensor([[False] * n_before + [True] * n_real + [False] * n_after])
    assert off(logits(model, source, mask, target), logits(model, real, None, target)) < 1e-5


@pytest.mark.parametrize(
    ("theta", "rope"),
    [
        (10000.0, None),
        (500000.0, (8.0, 1.0, 4.0, 8192)),
        (500000.0, (32.0, 1.0, 4.0, 8192)),
        (500.0, (8.0, 1.0, 4.0, 16)),
        (1000.0, (4.0, 2.0, 16.0, 100)),
    ],
)
@pytest.mark.parametrize("d_head", [10, 64, 128])
def test_frequencies_are_those_of_transformers(theta, rope, d_head):
    import transformers

    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    rope_parameters = {"rope_theta": theta}
    if rope is not None:
        rope_parameters |= {"rope_type": "llama3", **dict(zip(names, rope, strict=True))}
    config = transformers.LlamaConfig(
        hidden_size=d_head,
        num_attention_heads=1,
        head_dim=d_head,
        rope_parameters=rope_parameters,
    )
    expected = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config).inv_freq
    plain = LlamaConfig(d_head, d_head, 1, 1, 1, 1, 1, rope_theta=theta)
    scaled = replace(plain, rope_scaling=rope)
    assert torch.equal(rotation_frequencies(scaled), expected)
    # The same scaling in GGUF's form
    factors = tuple((rotation_frequencies(plain) / expected).tolist())
    divided = replace(plain, rope_factors=factors)
    assert torch.allclose(rotation_frequencies(divided), expected, rtol=1e-6, atol=0)


def test_the_old_and_the_new_form_of_rope_in_config_json_make_the_same_model(peer, copy):
    import transformers

    source = tokens(2, 40)
    target = tokens(2, 5, seed=1)
    expected = peer("llama3").logits(source, None, target)
    scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    folder = copy("llama3", rope_parameters=None, rope_scaling=scaling, rope_theta=500.0)
    assert off(logits(minia3.load_model(folder), source, None, target), expected) < 1e-5
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    assert off(Peer("llama3", folder, theirs).logits(source, None, target), expected) < 1e-5
    raw = json.loads((folder / "config.json").read_text())
    raw["rope_scaling"]["type"] = raw["rope_scaling"].pop("rope_type")  # the oldest key
    (folder / "config.json").write_text(json.dumps(raw))
    assert off(logits(minia3.load_model(folder), source, None, target), expected) < 1e-5
    del raw["rope_scaling"]
    (folder / "config.json").write_text(json.dumps(raw))
    assert off(logits(minia3.load_model(folder), source, None, target), expected) > 1e-3


def test_frequencies_stay_float32_in_a_bfloat16_model(loaded):
    model = loaded("llama3", dtype=torch.bfloat16)
    assert torch.equal(model.frequency, rotation_frequencies(model.config))
    assert "frequency" not in model.state_dict()
    for dtype in (torch.float16, torch.float64, torch.bfloat16):
        assert torch.equal(model.to(dtype).frequency, rotation_frequencies(model.config))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_model_that_gets_empty_memory_has_its_frequencies(loaded, device):
    """They are in no state dict, so nothing else would fill them."""
    model = loaded("llama3", seed=0)
    other = Llama(model.config).to(device).to_empty(device="cpu")
    assert torch.equal(other.frequency, rotation_frequencies(model.config))
    other.load_state_dict(model.state_dict())
    source = tokens(2, 5)
    target = tokens(2, 3, seed=1)
    expected = logits(model, source, None, target)
    assert torch.equal(logits(other.eval(), source, None, target), expected)


def test_dropout_in_training_affects_only_attention_as_in_transformers(copy):
    import transformers

    folder = copy("llama-gqa", attention_dropout=0.3)
    source = tokens(3, 7)
    target = tokens(3, 1, seed=1)
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder)
    ours = minia3.load_model(folder).train()
    torch.manual_seed(0)
    expected = theirs.train()(input_ids=target).logits
    torch.manual_seed(0)
    found = ours.step(target, ours.start(source[:, :1]))
    assert off(found, expected) < 1e-5
    torch.manual_seed(0)
    expected = theirs(input_ids=source).logits
    torch.manual_seed(0)
    assert off(ours.step(source, ours.start(source[:, :1])), expected) < 1e-5
    assert off(expected, theirs.eval()(input_ids=source).logits) > 0.01, "there was no dropout"
