"""Guards the blocks that T5 and LLaMA share, each against its equation written out by hand in float64: attention is a
softmax, grouped heads are repeated heads, a rotation depends on distance alone, and (IA)^3 folds into the weights."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minia3.model.blocks import ACTIVATIONS, Attention, FeedForward, RMSNorm, rotate
from minia3.model.llama import Llama, LlamaConfig
from minia3.model.sequence_state import mask_to_bias

ROW_0 = torch.zeros(2, dtype=torch.long)


def random_attention(n_heads, n_kv_heads, d_head=6, scale=0.3, dropout=0.0):
    torch.manual_seed(n_heads)
    attention = (
        Attention(10, n_heads, n_kv_heads, d_head, scale, dropout, n_adapters=1).double().eval()
    )
    for parameter in attention.parameters():
        parameter.data = torch.randn_like(parameter)
    return attention


def random_input(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def written_out(a, x, memory, bias):
    """softmax(scale * Q (l_k * K)^T + bias) (l_v * V) W_o, one head of one row at a time."""
    group = a.q.weight.shape[0] // a.k.weight.shape[0]
    rows = []
    for b in range(len(x)):
        q, k, v = (
            x[b] @ a.q.weight.T,
            a.l_k.scale[0] * (memory[b] @ a.k.weight.T),
            a.l_v.scale[0] * (memory[b] @ a.v.weight.T),
        )
        heads = []
        for h in range(q.shape[1] // a.d_head):
            mine, shared = (
                slice(h * a.d_head, (h + 1) * a.d_head),
                slice(h // group * a.d_head, (h // group + 1) * a.d_head),
            )
            scores = a.scale * q[:, mine] @ k[:, shared].T + bias[b % len(bias), h % bias.shape[1]]
            heads.append(scores.softmax(dim=-1) @ v[:, shared])
        rows.append(torch.cat(heads, dim=1) @ a.o.weight.T)
    return torch.stack(rows)


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(4, 4), (4, 2), (6, 2), (3, 1)])
def test_attention_is_the_softmax_written_out(n_heads, n_kv_heads):
    attention = random_attention(n_heads, n_kv_heads)
    x, memory, bias = (
        random_input(2, 3, 10),
        random_input(2, 5, 10, seed=1),
        random_input(2, n_heads, 3, 5, seed=2),
    )
    found = attention(x, attention.kv(memory, ROW_0), bias)
    assert torch.allclose(found, written_out(attention, x, memory, bias), atol=1e-12)
    no_bias = torch.zeros(1, 1, 3, 5, dtype=torch.float64)
    assert torch.allclose(
        attention(x, attention.kv(memory, ROW_0)),
        written_out(attention, x, memory, no_bias),
        atol=1e-12,
    )


@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_the_causal_flag_is_the_causal_mask(n_kv_heads):
    attention, x = random_attention(4, n_kv_heads), random_input(2, 5, 10)
    bias = mask_to_bias(torch.ones(5, 5, dtype=torch.bool).tril(), torch.float64)[None, None]
    kv = attention.kv(x, ROW_0)
    assert torch.allclose(
        attention(x, kv, causal=True), written_out(attention, x, x, bias), atol=1e-12
    )
    assert torch.allclose(attention(x, kv, bias), written_out(attention, x, x, bias), atol=1e-12)


def test_grouped_heads_are_heads_whose_keys_and_values_are_repeated():
    grouped, full = random_attention(6, 2), random_attention(6, 6)
    full.q, full.o = grouped.q, grouped.o

    def repeat(x):
        return x.unflatten(0, (2, 6)).repeat_interleave(3, dim=0).flatten(0, 1)

    for name in ("k", "v"):
        getattr(full, name).weight.data = repeat(getattr(grouped, name).weight)
        getattr(full, f"l_{name}").scale.data = repeat(getattr(grouped, f"l_{name}").scale[0])[None]
    x = random_input(2, 4, 10)
    found = grouped(x, grouped.kv(x, ROW_0), causal=True)
    assert torch.allclose(found, full(x, full.kv(x, ROW_0), causal=True), atol=1e-12)


def rotation_at(positions, d_head=8):
    config = LlamaConfig(8, d_head, 8, 1, 1, 1, 8, rope_theta=100.0)
    return Llama(config).double().rotation(torch.tensor([positions]), torch.float64)


@given(i=st.integers(0, 50), j=st.integers(0, 50), shift=st.integers(0, 50))
@settings(deadline=None, max_examples=30)
def test_the_score_of_rotated_queries_and_keys_depends_on_their_distance_only(i, j, shift):
    q, k = random_input(1, 1, 1, 8), random_input(1, 1, 1, 8, seed=1)

    def score(i, j):
        return (rotate(q, rotation_at([i])) * rotate(k, rotation_at([j]))).sum()

    assert abs(score(i, j) - score(i + shift, j + shift)) < 1e-5  # angles are made in float32
    assert torch.allclose(rotate(q, rotation_at([i])).norm(), q.norm(), atol=1e-6)


def test_a_rotation_turns_pairs_that_are_half_a_head_apart_by_position_times_frequency():
    x, position = random_input(1, 1, 1, 8), 7
    found = rotate(x, rotation_at([position]))[0, 0, 0]
    for pair in range(4):
        angle = position * 100.0 ** (-2 * pair / 8)
        turned = torch.complex(x[0, 0, 0, pair], x[0, 0, 0, pair + 4]) * complex(
            math.cos(angle), math.sin(angle)
        )
        assert torch.allclose(
            torch.stack((found[pair], found[pair + 4])), torch.view_as_real(turned), atol=1e-6
        )


def test_l_k_comes_before_the_rotation_so_that_it_folds_into_the_keys_weights():
    attention, folded = random_attention(4, 2), random_attention(4, 2)
    folded.k.weight.data = attention.l_k.scale[0][:, None] * attention.k.weight
    folded.l_k.scale.data.fill_(1.0)
    x, rotation = random_input(2, 5, 10), rotation_at([0, 1, 2, 3, 4], d_head=6)
    found = attention(x, attention.kv(x, ROW_0, rotation), causal=True, rotation=rotation)
    expected = folded(x, folded.kv(x, ROW_0, rotation), causal=True, rotation=rotation)
    assert torch.allclose(found, expected, atol=1e-12)
    attention.l_k.scale.data.fill_(1.0)
    unscaled = attention(x, attention.kv(x, ROW_0, rotation), causal=True, rotation=rotation)
    assert not torch.allclose(found, unscaled, atol=1e-2)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_l_ff_scales_what_goes_into_the_down_projection(activation, gated):
    torch.manual_seed(0)
    ffn = FeedForward(5, 7, activation, gated, 0.0, n_adapters=1).double()
    for parameter in ffn.parameters():
        parameter.data = torch.randn_like(parameter)
    assert (ffn.l_ff.scale < 0).any(), "before a ReLU, a negative factor would be another function"
    x = random_input(2, 3, 5)
    z = x @ ffn.gate.weight.T
    act = {
        "relu": z.clamp(min=0),
        "gelu": 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
        "silu": z / (1 + (-z).exp()),
    }[activation]
    hidden = act * (x @ ffn.up.weight.T) if gated else act
    expected = (ffn.l_ff.scale[0] * hidden) @ ffn.down.weight.T
    assert torch.allclose(ffn(x, ROW_0), expected, atol=1e-12)


def test_the_norm_divides_by_the_root_of_the_mean_square():
    norm = RMSNorm(6, eps=0.5).double()
    norm.weight.data = random_input(6)
    x = random_input(2, 3, 6, seed=1)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 0.5).sqrt() * norm.weight
    assert torch.allclose(norm(x), expected, atol=1e-14)


def test_the_norm_of_bfloat16_is_computed_in_float32():
    norm, x = (
        RMSNorm(512, eps=1e-6).bfloat16(),
        torch.randn(8, 512, generator=torch.Generator().manual_seed(0)).bfloat16(),
    )
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.equal(norm(x), exact.bfloat16())


def test_dropout_of_attention_falls_on_the_weights_in_training_alone(monkeypatch):
    attention, x = random_attention(4, 4, dropout=0.25), random_input(2, 3, 10)
    seen = []
    original = attention

    def spy(*args, dropout_p, **options):
        seen.append(dropout_p)
        return original(*args, dropout_p=dropout_p, **options)

    monkeypatch.setattr("minia3.model.blocks.attention", spy)
    for mode in (True, False):
        attention.train(mode)
        attention(x, attention.kv(x, ROW_0))
    assert seen == [0.25, 0.0]
