"""Guards what keeps less for the backward, and what compiles: results and gradients are those of the plain lines."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import minia3
from minia3.checkpoints.load import build_model
from minia3.inference.scoring import choice_logprobs
from minia3.model.blocks import Block, FeedForward, RMSNorm
from minia3.model.recompute import recompute, recompute_blocks, rms_norm
from minia3.model.sequence_state import mask_to_bias
from minia3.tasks.batches import Batch
from minia3.training.losses import total_loss
from minia3.training.memory_plan import Held
from tests.benchmarks.measure import kept_for_backward

NAMES = ["t5-v1.0", "t5-v1.1", "llama-gqa"]


def batch_of(lengths, n_choices=2, n_target=4, seed=0):
    """Padded where the lengths differ."""
    source, target = (
        tokens(len(lengths), max(lengths), seed=seed),
        tokens(len(lengths), n_choices, n_target, seed=seed + 1),
    )
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    n_real = torch.arange(len(lengths) * n_choices).view(len(lengths), n_choices, 1) % n_target + 1
    return Batch(
        source,
        mask,
        target,
        torch.arange(n_target) < n_real,
        torch.arange(len(lengths)) % n_choices,
    )


def loss_of(model, batch):
    return total_loss(choice_logprobs(model, batch), batch.target_mask_BCL, batch.label_B)


def gradients(model, batch, seed=0):
    """The loss, and the gradient of every vector."""
    model.zero_grad()
    torch.manual_seed(seed)  # dropout's
    loss = loss_of(model, batch)
    loss.backward()
    return [loss.detach(), *(vector.grad for vector in minia3.vectors(model).values())]


def same(found, expected, **tolerance):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 9), st.booleans())
@settings(max_examples=15, deadline=None)
def test_the_norm_s_gradients_are_right(rows, length, width, frozen):
    x = torch.randn(rows, length, width, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(width, dtype=torch.float64, requires_grad=not frozen)
    assert torch.autograd.gradcheck(lambda x, weight: RMSNormed.apply(x, weight, 1e-3), (x, weight))


@pytest.mark.parametrize("name", NAMES)
def test_the_plain_lines_have_the_same_results_and_keep_more(loaded, name, monkeypatch):
    model, batch = loaded(name).double().train(), batch_of((9, 5, 7))
    found, kept = gradients(model, batch), kept_for_backward(lambda: loss_of(model, batch), model)
    monkeypatch.setattr("minia3.model.recompute.PLAIN", True)
    for function in (Recomputed, RMSNormed):
        monkeypatch.setattr(function, "apply", None)  # nobody asks for it
    same(gradients(model, batch), found, rtol=1e-12, atol=1e-12)
    assert kept_for_backward(lambda: loss_of(model, batch), model) > kept


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", ["t5-v1.0", "t5-v1.1"])
def test_attention_under_dropout_is_torch_s_and_keeps_less(loaded, name, whole, monkeypatch):
    """With what it drops, and what is drawn after it. (T5's bias has a gradient where the whole model is trained.)"""
    model, batch = loaded(name).double().train(), batch_of((9, 5, 7))
    model.requires_grad_() if whole else minia3.freeze(model)

    def found():
        model.zero_grad()
        torch.manual_seed(0)
        loss = loss_of(model, batch)
        loss.backward()
        return [
            loss.detach(),
            torch.rand(3),
            *(p.grad for p in model.parameters() if p.grad is not None),
        ]

    ours, kept = found(), kept_for_backward(lambda: loss_of(model, batch), model)
    monkeypatch.setattr("minia3.model.blocks.attention", F.scaled_dot_product_attention)
    same(found(), ours, rtol=1e-10, atol=1e-10)
    assert kept_for_backward(lambda: loss_of(model, batch), model) > kept


@pytest.mark.parametrize("masked", [False, True])
def test_attention_under_dropout_is_torch_s_in_bfloat16_too(masked):
    q_BHLK, k_BHMK, v_BHMK, grad_BHLK = (
        torch.randn(3, 4, n, 8, dtype=torch.bfloat16, requires_grad=True) for n in (5, 7, 7, 5)
    )
    seen_B11M = torch.arange(7) < torch.tensor([7, 2, 4])[:, None, None, None]
    how = {
        "attn_mask": mask_to_bias(seen_B11M, torch.bfloat16) if masked else None,
        "is_causal": False,
    }
    how |= {"dropout_p": 0.4, "scale": 0.5, "enable_gqa": False}

    def found(attention):
        torch.manual_seed(0)
        out_BHLK = attention(q_BHLK, k_BHMK, v_BHMK, **how)
        return out_BHLK, *torch.autograd.grad(out_BHLK, (q_BHLK, k_BHMK, v_BHMK), grad_BHLK)

    same(found(attention), found(F.scaled_dot_product_attention), rtol=0.03, atol=0.03)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "groups", "masked"),
    [
        (4, 4, None),
        (4, 4, "heads"),
        (4, 4, "rows"),
        (6, 2, None),
        (6, 2, "rows"),
        (3, 1, None),
        (3, 1, "rows"),
    ],
)
def test_one_query_is_answered_as_near_to_float64_as_by_torch_s_attention(
    heads, groups, masked, dtype, monkeypatch
):
    """It asks columns of a longer cache."""
    torch.manual_seed(0)
    q_BHLK = torch.randn(5, heads, 1, 16).to(dtype)
    k_BGMK, v_BGMK = (torch.randn(5, groups, 40, 16).to(dtype)[:, :, :31] for _ in range(2))
    seen_B11M = torch.rand(5, 1, 1, 31) < 0.7
    bias = {
        None: None,
        "heads": torch.randn(1, heads, 1, 31).to(dtype),
        "rows": mask_to_bias(seen_B11M, dtype),
    }[masked]
    how = {"scale": 0.7, "enable_gqa": heads != groups, "dropout_p": 0.0, "is_causal": False}
    wide = [x if x is None else x.double() for x in (q_BHLK, k_BGMK, v_BGMK, bias)]
    exact = F.scaled_dot_product_attention(*wide, **how)
    theirs = F.scaled_dot_product_attention(q_BHLK, k_BGMK, v_BGMK, bias, **how)
    with torch.no_grad():  # dropout is not left out, if that is asked for
        dropped = attention(q_BHLK, k_BGMK, v_BGMK, attn_mask=bias, **how | {"dropout_p": 0.9})
    assert (dropped - exact).norm() > exact.norm()
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda: None)  # nobody asks it
    with torch.no_grad():
        ours = attention(q_BHLK, k_BGMK, v_BGMK, attn_mask=bias, **how)
    assert ours.dtype == dtype
    assert ours.shape == q_BHLK.shape
    assert (ours - exact).norm() < 2 * (theirs - exact).norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_norm_is_torch_s_and_so_are_its_gradients(dtype):
    theirs, ours = nn.RMSNorm(24, 1e-6, dtype=dtype), RMSNorm(24, 1e-6, dtype=dtype)
    nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    x, grad = torch.randn(3, 5, 24).to(dtype), torch.randn(3, 5, 24).to(dtype)
    found, expected = [], []
    for norm, results in ((ours, found), (theirs, expected)):
        own = x.clone().requires_grad_()
        out = norm(own)
        out.backward(grad)
        results += [out.detach(), own.grad, norm.weight.grad]
    same(found, expected)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), found[0])


@pytest.mark.parametrize(
    "trained", [("gate", "scale"), ("gate",), ("scale",), ("up", "scale"), ("gate", "up", "scale")]
)
@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_a_gated_feed_forward_has_the_gradients_of_its_plain_lines(activation, trained):
    ffn = FeedForward(6, 10, activation, True, 0.0, n_adapters=3).double()
    nn.init.normal_(ffn.l_ff.scale)
    given = {"scale": ffn.l_ff.scale, "gate": ffn.gate.weight, "up": ffn.up.weight}
    ffn.requires_grad_(False)
    for name in trained:
        given[name].requires_grad_(True)
    x, adapter = torch.randn(4, 3, 6, dtype=torch.float64), torch.tensor([2, 0, 1, 2])
    weight = torch.randn(4, 3, 6, dtype=torch.float64)
    plain = ffn.down(ffn.hidden(ffn.gate(x), ffn.up(x), adapter))
    wanted = [given[name] for name in trained]
    torch.testing.assert_close(ffn(x, adapter), plain)
    same(
        torch.autograd.grad((ffn(x, adapter) * weight).sum(), wanted),
        torch.autograd.grad((plain * weight).sum(), wanted),
    )


def test_what_is_computed_again_passes_gradcheck_and_keeps_its_inputs_alone():
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def run(x, weight):
        return Recomputed.apply(lambda x: (x * weight).tanh().exp() * x, weight, x)

    assert torch.autograd.gradcheck(run, (x, weight))
    module = nn.Module()
    assert kept_for_backward(lambda: run(x, weight), module) == x.nbytes


HEADS = [
    *NAMES,
    "t5-unscaled",
    "llama-tied",
]  # scaled embedding, own head, own head; embedding as it is, twice


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_logits_in_pieces_of_the_vocabulary_are_the_same_and_so_are_the_gradients(
    name, full, loaded, monkeypatch
):
    """Of the vectors; or of all weights, the head or embedding among them, and of what the head reads."""
    model, batch = loaded(name, seed=0).double(), batch_of((7, 3, 5))
    minia3.freeze(model)
    model.requires_grad_(full) if full else None

    def found():
        return [*gradients(model, batch), *(p.grad for p in model.parameters() if p.requires_grad)]

    expected, (n_tokens, n_ids) = (
        found(),
        (int(batch.target_mask_BCL.sum()), model.embed.num_embeddings),
    )
    monkeypatch.setattr("minia3.inference.scoring.PIECE", 4 * (8 * n_tokens + 7))
    sizes, logits = [], model.logits
    model.logits = lambda x, weight: sizes.append((len(x), len(weight))) or logits(x, weight)
    same(found(), expected, rtol=1e-12, atol=1e-12)
    pieces = [(n_tokens, 8)] * (n_ids // 8) + [(n_tokens, n_ids % 8)]
    assert sizes == pieces + pieces[::-1]  # forward, and again for the backward


@pytest.mark.parametrize("grad", [False, True])
def test_no_tensor_has_every_token_s_logits_for_every_id(grad, loaded, monkeypatch):
    config, batch = (
        replace(loaded("t5-v1.1").config, vocab_size=2000),
        batch_of((2, 3, 1), n_choices=9),
    )
    model, n_logits = build_model(config).bfloat16(), int(batch.target_mask_BCL.sum()) * 2000
    minia3.freeze(model)
    for piece, large in ((n_logits, True), (n_logits // 4, False)):
        monkeypatch.setattr("minia3.inference.scoring.PIECE", piece)
        with torch.set_grad_enabled(grad), Largest() as found:
            loss = loss_of(model, batch)
            loss.backward() if grad else None
        assert (found.numel >= n_logits) == large


class Largest(TorchDispatchMode):
    """The most numbers that a tensor has."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max(
            [self.numel, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))]
        )
        return out


def test_bfloat16_gradients_in_many_pieces_are_as_near_to_float64_s_as_in_one(loaded, monkeypatch):
    """What the head reads gets a part of its gradient from each piece: they add up in float32."""
    x, found = torch.randn(12, 4, 24, generator=torch.Generator().manual_seed(0)).bfloat16(), []
    for dtype, piece in ((torch.float64, 1 << 24), (torch.bfloat16, 1 << 24), (torch.bfloat16, 1)):
        model, batch = (
            loaded("t5-v1.1", seed=0, dtype=torch.bfloat16).to(dtype),
            batch_of((7, 3, 5), n_choices=4),
        )
        monkeypatch.setattr("minia3.inference.scoring.PIECE", piece)
        minia3.freeze(model)
        own = x.to(dtype, copy=True).requires_grad_()
        monkeypatch.setattr(model, "read", lambda tokens, state, own=own: own)
        loss_of(model, batch).backward()
        found.append(own.grad.double())
    plain, pieces = ((other - found[0]).norm() for other in found[1:])
    assert 0 < pieces < 1.5 * plain


def many_choices():
    """Rows with 77 choices, 76 and 1, of 1 to 4 tokens."""
    batch = batch_of((7, 3, 5), n_choices=77)
    n_own = torch.tensor([77, 76, 1])[:, None, None]
    mask = batch.target_mask_BCL & (torch.arange(77)[:, None] < n_own)
    return batch._replace(target_mask_BCL=mask, label_B=torch.tensor([76, 0, 0]))


@pytest.mark.parametrize("name", NAMES)
def test_many_choices_in_pieces_are_the_same_and_so_are_the_gradients(name, loaded, monkeypatch):
    model, batch, adapter = (
        loaded(name, n_adapters=2, seed=0).double(),
        many_choices(),
        torch.tensor([1, 0, 1]),
    )
    minia3.freeze(model)

    def found():
        model.zero_grad()
        logp = choice_logprobs(model, batch, adapter)
        total_loss(logp, batch.target_mask_BCL, batch.label_B).backward()
        with torch.no_grad():
            scored = choice_logprobs(model, batch, adapter)
        return [logp.detach(), scored, *(vector.grad for vector in minia3.vectors(model).values())]

    expected, read, reads = found(), model.read, []
    model.read = lambda tokens, *rest, **options: (
        reads.append(tuple(tokens.shape)) or read(tokens, *rest, **options)
    )
    for texts, side_by_side, sizes in (
        (69, 99, [23, 23, 23, 8]),
        (1, 99, [1] * 77),
        (3 * 77, 77, [77]),
        (3 * 77, 30, [30, 30, 17]),
    ):
        monkeypatch.setattr("minia3.inference.scoring.TOKENS", 4 * texts)
        monkeypatch.setattr("minia3.inference.scoring.SIDE_BY_SIDE", 4 * side_by_side)
        reads.clear()
        same(found(), expected, rtol=1e-12, atol=1e-12)
        again = sizes[::-1] if len(sizes) > 1 else []  # for the backward
        targets = [(3 * n, 4) for n in [*sizes, *again, *sizes]]
        assert [shape for shape in reads if shape != (3, 6)] == targets  # (3, 6): a LLaMA's prompts
        assert len(reads) - len(targets) == (0 if name.startswith("t5") else 2)


@pytest.mark.parametrize("name", NAMES)
def test_more_pieces_of_choices_take_no_more_memory_than_their_ids_and_results(
    name, loaded, monkeypatch
):
    """The backward keeps a piece's ids alone; and there is one piece's work at a time, then and without gradients."""
    model, batches = loaded(name, seed=0), {n: batch_of((7, 3), n_choices=n) for n in (8, 80, 160)}
    minia3.freeze(model)
    monkeypatch.setattr("minia3.inference.scoring.TOKENS", 16 * 4)
    kept, trained, scored = {}, {}, {}
    for n, batch in batches.items():
        kept[n] = kept_for_backward(lambda batch=batch: choice_logprobs(model, batch).sum(), model)
        with Held() as held:
            choice_logprobs(model, batch).sum().backward()
        with torch.no_grad(), Held() as held_without:
            choice_logprobs(model, batch)
        trained[n], scored[n] = held.peak, held_without.peak
    ids = 2 * 80 * 4 * (8 + 1)  # bytes of the ids and the mask of 80 choices more
    assert kept[160] - kept[80] == ids < kept[8] / 20
    assert trained[160] - trained[80] < 2 * ids
    assert scored[160] - scored[80] < 2 * ids
    assert kept[80] < kept[8] / 4  # in one piece it keeps all


@pytest.mark.parametrize("name", NAMES)
def test_checkpointed_blocks_give_the_same_bits_under_dropout_and_keep_less(name, loaded):
    model, batch = loaded(name, seed=0).train(), batch_of((30, 12, 25))
    minia3.freeze(model)
    expected, kept = (
        gradients(model, batch),
        kept_for_backward(lambda: loss_of(model, batch), model),
    )
    for block in (module for module in model.modules() if isinstance(module, Block)):
        recompute_blocks([block])
    same(gradients(model, batch), expected, rtol=0, atol=0)
    assert kept_for_backward(lambda: loss_of(model, batch), model) < kept / 2.5
    text = minia3.generation.tokens(
        model.eval(), model.start(batch.source_BM, batch.mask_BM), 4, set()
    )
    for block in (module for module in model.modules() if isinstance(module, Block)):
        del block.forward
    assert list(text) == list(
        minia3.generation.tokens(model, model.start(batch.source_BM, batch.mask_BM), 4, set())
    )


def compiled(model, backend):
    torch.compiler.reset()
    torch._dynamo.config.cache_size_limit = 64  # as train.py has it
    for block in (module for module in model.modules() if isinstance(module, Block)):
        block.compile(
            dynamic=True, fullgraph=True, backend=backend
        )  # fullgraph: a break in a graph is an error
    return model


@pytest.mark.parametrize("name", ["t5-v1.1", "llama-gqa"])
def test_a_step_has_no_graph_break_and_other_lengths_compile_nothing_anew(name, loaded):
    model, graphs = loaded(name, seed=0).train(), []
    minia3.freeze(model)
    compiled(model, lambda graph, _: graphs.append(graph) or graph.forward)
    # Sizes that are equal when a graph is made are one to the compiler: here none is another's, or one of the model's.
    gradients(model, batch_of((15, 5, 9, 16, 13)))
    gradients(model, batch_of((18,) * 7))  # nothing is padded: other graphs
    n = len(graphs)
    assert n > 0
    for lengths in ((4, 9, 2, 2), (12, 3), (8, 8), (5, 5, 5), (30, 1, 1, 1, 1, 2, 9)):
        gradients(model, batch_of(lengths, seed=len(lengths)))
    assert len(graphs) == n
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["t5-v1.1", "llama-gqa"])
def test_compiled_is_plain(name, loaded):
    model, batch = loaded(name, seed=0), batch_of((7, 3, 5))
    minia3.freeze(model)
    expected = gradients(model, batch)
    same(gradients(compiled(model, "aot_eager"), batch), expected)
    torch.compiler.reset()
