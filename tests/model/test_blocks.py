"""The blocks that T5 and LLaMA share: each part is compared with its equation in float64.

Attention is a softmax, grouped heads are repeated heads, rotated scores depend only on the
distance, and (IA)^3 folds into the weights.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minia3.model.activations import ACTIVATIONS
from minia3.model.blocks import Attention, Block, FeedForward, RMSNorm, rotate
from minia3.model.llama import Llama, LlamaConfig
from minia3.model.packing import NO_PACKING
from minia3.model.sequence_state import Cache, Context, mask_to_bias

ROW_0 = torch.zeros(2, dtype=torch.long)


def randomize(module):
    for parameter in module.parameters():
        parameter.data = torch.randn_like(parameter)
    return module


def random_attention(n_heads, n_kv_heads, d_head=6, scale=0.3, dropout=0.0):
    torch.manual_seed(n_heads)
    attention = Attention(10, n_heads, n_kv_heads, d_head, scale, dropout, n_adapters=1)
    return randomize(attention.double().eval())


def random_input(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def attend_to(attention, x, memory, **options):
    """Return what `x` finds in `memory`, with the masks and positions of a Context."""
    context = Context(ROW_0, NO_PACKING, **options)
    return attention(x, attention.kv(memory, context), context)


def written_out(attention, x, memory, bias):
    """Return softmax(scale * Q (l_k * K)^T + bias) (l_v * V) W_o, one head of one row at a time."""
    n_sharing = attention.q.weight.shape[0] // attention.k.weight.shape[0]
    d_head = attention.d_head
    rows = []
    for b in range(len(x)):
        q = x[b] @ attention.q.weight.T
        k = attention.l_k.scale[0] * (memory[b] @ attention.k.weight.T)
        v = attention.l_v.scale[0] * (memory[b] @ attention.v.weight.T)
        heads = []
        for h in range(q.shape[1] // d_head):
            query_columns = slice(h * d_head, (h + 1) * d_head)
            kv_head = h // n_sharing
            kv_columns = slice(kv_head * d_head, (kv_head + 1) * d_head)
            scores = attention.scale * q[:, query_columns] @ k[:, kv_columns].T
            scores = scores + bias[b % len(bias), h % bias.shape[1]]
            heads.append(scores.softmax(dim=-1) @ v[:, kv_columns])
        rows.append(torch.cat(heads, dim=1) @ attention.o.weight.T)
    return torch.stack(rows)


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(4, 4), (4, 2), (6, 2), (3, 1)])
def test_attention_is_the_softmax_written_out(n_heads, n_kv_heads):
    attention = random_attention(n_heads, n_kv_heads)
    x = random_input(2, 3, 10)
    memory = random_input(2, 5, 10, seed=1)
    bias = random_input(2, n_heads, 3, 5, seed=2)
    no_bias = torch.zeros(1, 1, 3, 5, dtype=torch.float64)
    found = attend_to(attention, x, memory, bias_BHLM=bias)
    assert_equal(found, written_out(attention, x, memory, bias))
    found = attend_to(attention, x, memory)
    assert_equal(found, written_out(attention, x, memory, no_bias))


@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_the_causal_flag_is_the_causal_mask(n_kv_heads):
    attention = random_attention(4, n_kv_heads)
    x = random_input(2, 5, 10)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    bias = mask_to_bias(mask, torch.float64)[None, None]
    expected = written_out(attention, x, x, bias)
    assert_equal(attend_to(attention, x, x, is_causal=True), expected)
    assert_equal(attend_to(attention, x, x, bias_BHLM=bias), expected)


def test_grouped_heads_are_heads_with_repeated_keys_and_values():
    grouped = random_attention(6, 2)
    full = random_attention(6, 6)
    full.q = grouped.q
    full.o = grouped.o

    def repeat(x):
        return x.unflatten(0, (2, 6)).repeat_interleave(3, dim=0).flatten(0, 1)

    full.k.weight.data = repeat(grouped.k.weight)
    full.v.weight.data = repeat(grouped.v.weight)
    full.l_k.scale.data = repeat(grouped.l_k.scale[0])[None]
    full.l_v.scale.data = repeat(grouped.l_v.scale[0])[None]
    x = random_input(2, 4, 10)
    found = attend_to(grouped, x, x, is_causal=True)
    assert_equal(found, attend_to(full, x, x, is_causal=True))


def rotation_at(positions, d_head=8):
    config = LlamaConfig(8, d_head, 8, 1, 1, 1, 8, rope_theta=100.0)
    return Llama(config).double().rotation(torch.tensor([positions]), torch.float64)


@given(i=st.integers(0, 50), j=st.integers(0, 50), shift=st.integers(0, 50))
@settings(deadline=None, max_examples=30)
def test_the_score_of_a_rotated_query_and_key_depends_only_on_their_distance(i, j, shift):
    q = random_input(1, 1, 1, 8)
    k = random_input(1, 1, 1, 8, seed=1)

    def score(i, j):
        return (rotate(q, rotation_at([i])) * rotate(k, rotation_at([j]))).sum()

    assert abs(score(i, j) - score(i + shift, j + shift)) < 1e-5  # the angles are float32
    assert torch.allclose(rotate(q, rotation_at([i])).norm(), q.norm(), atol=1e-6)


def test_a_rotation_turns_pairs_that_are_half_a_head_apart_by_position_times_frequency():
    x = random_input(1, 1, 1, 8)
    position = 7
    found = rotate(x, rotation_at([position]))[0, 0, 0]
    for pair in range(4):
        angle = position * 100.0 ** (-2 * pair / 8)
        turn = complex(math.cos(angle), math.sin(angle))
        expected = torch.complex(x[0, 0, 0, pair], x[0, 0, 0, pair + 4]) * turn
        found_pair = torch.stack((found[pair], found[pair + 4]))
        assert torch.allclose(found_pair, torch.view_as_real(expected), atol=1e-6)


def test_without_a_rotation_nothing_is_rotated():
    x = random_input(1, 1, 1, 8)
    assert rotate(x, None) is x


def test_l_k_comes_before_the_rotation_so_it_folds_into_the_weights_of_the_keys():
    attention = random_attention(4, 2)
    folded = random_attention(4, 2)
    folded.k.weight.data = attention.l_k.scale[0][:, None] * attention.k.weight
    folded.l_k.scale.data.fill_(1.0)
    x = random_input(2, 5, 10)
    options = {"is_causal": True, "rotation": rotation_at([0, 1, 2, 3, 4], d_head=6)}
    found = attend_to(attention, x, x, **options)
    assert_equal(found, attend_to(folded, x, x, **options))
    attention.l_k.scale.data.fill_(1.0)
    unscaled = attend_to(attention, x, x, **options)
    assert not torch.allclose(found, unscaled, atol=1e-2)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_l_ff_scales_the_input_of_the_down_projection(activation, gated):
    torch.manual_seed(0)
    ffn = randomize(FeedForward(5, 7, activation, gated, 0.0, n_adapters=1).double())
    assert (ffn.l_ff.scale < 0).any(), "before a ReLU, a negative factor is another function"
    x = random_input(2, 3, 5)
    z = x @ ffn.gate.weight.T
    activations = {
        "relu": z.clamp(min=0),
        "gelu": 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
        "silu": z / (1 + (-z).exp()),
    }
    hidden = activations[activation]
    if gated:
        hidden = hidden * (x @ ffn.up.weight.T)
    expected = (ffn.l_ff.scale[0] * hidden) @ ffn.down.weight.T
    assert_equal(ffn(x, ROW_0), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_two_feed_forwards_share_no_module(activation):
    """A hook on the modules of a model must not see another model run."""
    first = FeedForward(5, 7, activation, True, 0.0, n_adapters=1)
    second = FeedForward(5, 7, activation, True, 0.0, n_adapters=1)
    assert not set(first.modules()) & set(second.modules())


def test_the_norm_divides_by_the_root_of_the_mean_square():
    norm = RMSNorm(6, eps=0.5).double()
    norm.weight.data = random_input(6)
    x = random_input(2, 3, 6, seed=1)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 0.5).sqrt() * norm.weight
    assert_equal(norm(x), expected)


def test_the_norm_of_bfloat16_is_computed_in_float32():
    norm = RMSNorm(512, eps=1e-6).bfloat16()
    x = torch.randn(8, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    narrow = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()

    def share_off(found):
        return (found != exact.bfloat16()).float().mean()

    assert share_off(narrow) > 0.05
    # Not 0, because processors differ in the last bit of float32, which may decide the rounding.
    assert share_off(norm(x)) < 0.002


@pytest.mark.parametrize(
    ("has_cross", "n_sharing"), [(False, 1), (True, 1), (True, 2)], ids=["self", "cross", "shared"]
)
def test_a_block_adds_what_each_part_makes_of_its_normalized_input(has_cross, n_sharing):
    """n_sharing: rows that share a source."""
    attn = random_attention(4, 4)
    cross = random_attention(2, 2) if has_cross else None
    ffn = FeedForward(10, 14, "relu", False, 0.0, n_adapters=1)
    block = randomize(Block(attn, cross, ffn, 10, 0.5, 0.0).double().eval())
    x = random_input(2 * n_sharing, 3, 10)
    memory = random_input(2, 5, 10, seed=1)
    memory_bias = random_input(2, 1, 1, 5, seed=2)
    cross_context = Context(ROW_0, NO_PACKING, memory_bias)
    cache = Cache()
    if has_cross:
        cache.cross_kv = cross.kv(memory, cross_context)
    context = Context(ROW_0[:1], NO_PACKING, is_causal=True, cross=cross_context)
    found = block(x, context, cache)

    def normalized(norm, x):
        return x / (x.pow(2).mean(-1, keepdim=True) + 0.5).sqrt() * norm.weight

    mask = torch.ones(3, 3, dtype=torch.bool).tril()
    h = normalized(block.attn_norm, x)
    expected = x + written_out(attn, h, h, mask_to_bias(mask, torch.float64)[None, None])
    if has_cross:
        h = normalized(block.cross_norm, expected)
        source = torch.arange(2).repeat_interleave(n_sharing)  # of each row
        expected = expected + written_out(cross, h, memory[source], memory_bias[source])
    h = normalized(block.ffn_norm, expected)
    hidden = ffn.l_ff.scale[0] * (h @ ffn.gate.weight.T).clamp(min=0)
    assert_equal(found, expected + hidden @ ffn.down.weight.T)


def test_attention_drops_weights_only_in_training(monkeypatch):
    attention = random_attention(4, 4, dropout=0.25)
    x = random_input(2, 3, 10)
    rates = []

    def spy(q_BHLK, *_, dropout, **options):
        rates.append(dropout)
        return q_BHLK

    monkeypatch.setattr("minia3.model.blocks.attend", spy)
    for is_training in (True, False):
        attention.train(is_training)
        attend_to(attention, x, x)
    assert rates == [0.25, 0.0]
