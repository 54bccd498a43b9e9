"""Whatever keeps less for the backward pass has the results and gradients of the plain lines."""

import copy
import pickle

import pytest
import torch
from batches import batch_of, gradients, loss_of, same
from conftest import randomize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import minia3
from minia3.inference.decoding import decode_tokens
from minia3.model.activations import ACTIVATIONS
from minia3.model.blocks import FeedForward, RMSNorm, blocks_of
from minia3.model.gated_hidden import gated_hidden
from minia3.model.ia3 import IA3
from minia3.model.recompute import recompute, recompute_blocks, rms_norm, scale_keeping_result
from tests.benchmarks.measure import kept_for_backward

NAMES = ["t5-v1.0", "t5-v1.1", "llama-gqa"]


def plainly_scaled(x, l_BD):
    return x * l_BD.to(x.dtype).unsqueeze(1)


def plainly_gated(ffn, gate_BLF, up_BLF, adapter_B):
    return ffn.hidden(gate_BLF, up_BLF, adapter_B, in_place=False)


def plainly_normed(x, weight_D, eps):
    return nn.functional.rms_norm(x, weight_D.shape, weight_D, eps)


PLAIN_LINES = {
    "blocks.gated_hidden": plainly_gated,
    "blocks.rms_norm": plainly_normed,
    "ia3.scale_keeping_result": plainly_scaled,
}


@pytest.mark.parametrize("place", PLAIN_LINES)
@pytest.mark.parametrize("name", NAMES)
def test_each_plain_line_has_the_same_results_and_keeps_more(loaded, name, place, monkeypatch):
    model = loaded(name).double()
    batch = batch_of((9, 5, 7))

    def count_kept():
        # Scaled keys and values share memory with what attention keeps only if it keeps them: on a
        # CPU it does so without dropout, and without padding in short rows.
        model.eval()
        return kept_for_backward(lambda: loss_of(model, batch_of((9, 9, 9))), model)

    n_kept = count_kept()
    expected = gradients(model.train(), batch)
    monkeypatch.setattr(f"minia3.model.{place}", PLAIN_LINES[place])
    same(gradients(model, batch), expected, rtol=1e-12, atol=1e-12)
    n_kept_plainly = count_kept()
    if (name, place) == ("t5-v1.0", "blocks.gated_hidden"):  # its feed-forwards are not gated
        assert n_kept_plainly == n_kept
    else:
        assert n_kept_plainly > n_kept


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_norm_keeps_its_input_and_one_number_per_row(dtype):
    norm = RMSNorm(24, 1e-6, dtype=dtype)
    x = torch.randn(3, 5, 24).to(dtype).requires_grad_()
    wide = torch.promote_types(dtype, torch.float32)
    n_bytes = x.nbytes + 3 * 5 * wide.itemsize
    assert kept_for_backward(lambda: norm(x), norm) == n_bytes


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 9), st.booleans())
@settings(max_examples=15, deadline=None)
def test_the_gradients_of_the_norm_pass_gradcheck(n_rows, length, width, is_frozen):
    x = torch.randn(n_rows, length, width, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(width, dtype=torch.float64, requires_grad=not is_frozen)
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 1e-3), (x, weight))


def heads(n_rows):
    """Return queries (B, H, L, K) as attention has them, which are not contiguous."""
    return torch.randn(n_rows, 5, 2, 24).transpose(1, 2)


def tokens(n_rows):
    return torch.randn(n_rows, 5, 24)


def test_a_large_norm_without_gradients_works_under_vmap(monkeypatch):
    x = torch.randn(3, 5, 24)
    weight = torch.randn(24)
    expected = rms_norm(x, weight, 1e-6)
    monkeypatch.setattr("minia3.model.recompute.N_IN_CACHE", 0)
    with torch.no_grad():
        found = torch.func.vmap(lambda x: rms_norm(x, weight, 1e-6))(x)
    torch.testing.assert_close(found, expected)


# All at once, or 2, 4 or 1 of the 15 vectors of tokens, or of the 30 vectors of heads.
IN_PIECES = pytest.mark.parametrize("n_in_cache", [2**16, 2 * 24, 4 * 24, 0])


@IN_PIECES
@pytest.mark.parametrize("make_x", [tokens, heads])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_and_its_gradients_equal_those_of_pytorch(dtype, make_x, n_in_cache, monkeypatch):
    monkeypatch.setattr("minia3.model.recompute.N_IN_CACHE", n_in_cache)
    ours = RMSNorm(24, 1e-6, dtype=dtype)
    nn.init.normal_(ours.weight)
    # In half precision, PyTorch's norm rounds on the way, and not the same in each release. So it
    # computes in float32 what ours has to be before its one rounding.
    exact_dtype = torch.promote_types(dtype, torch.float32)
    theirs = nn.RMSNorm(24, 1e-6, dtype=exact_dtype)
    theirs.load_state_dict(ours.state_dict())
    x = make_x(3).to(dtype)
    grad = make_x(3).to(dtype)

    def results(norm):
        leaf = x.clone().to(norm.weight.dtype).requires_grad_()
        out = norm(leaf)
        out.backward(grad.to(norm.weight.dtype))
        return out.detach().to(dtype), leaf.grad.to(dtype), norm.weight.grad.to(dtype)

    found = results(ours)
    same(found, results(theirs))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), found[0])


@IN_PIECES
@pytest.mark.parametrize("has_grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_overwrites_neither_its_input_nor_the_gradient(
    dtype, has_grad, n_in_cache, monkeypatch
):
    """float32 is not converted to float32, so there the norm begins with its input itself."""
    monkeypatch.setattr("minia3.model.recompute.N_IN_CACHE", n_in_cache)
    norm = RMSNorm(24, 1e-6, dtype=dtype)
    x = tokens(3).to(dtype).requires_grad_(has_grad)
    grad = tokens(3).to(dtype)
    before = x.detach().clone()
    grad_before = grad.clone()
    with torch.set_grad_enabled(has_grad):
        out = norm(x)
    if has_grad:
        out.backward(grad)
    assert torch.equal(x.detach(), before)
    assert torch.equal(grad, grad_before)
    assert torch.equal(norm.weight.detach(), torch.ones(24, dtype=dtype))


@IN_PIECES
def test_the_norm_of_nothing_is_nothing_and_has_no_gradient(n_in_cache, monkeypatch):
    monkeypatch.setattr("minia3.model.recompute.N_IN_CACHE", n_in_cache)
    norm = RMSNorm(24, 1e-6)
    x = tokens(0).requires_grad_()
    norm(x).backward(tokens(0))
    assert x.grad.shape == (0, 5, 24)
    assert torch.equal(norm.weight.grad, torch.zeros(24))
    with torch.no_grad():
        assert norm(x).shape == (0, 5, 24)


@IN_PIECES
@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
)
def test_the_norm_and_its_gradients_have_the_dtypes_of_its_input_and_its_weight(
    dtypes, n_in_cache, monkeypatch
):
    monkeypatch.setattr("minia3.model.recompute.N_IN_CACHE", n_in_cache)
    x = tokens(3).to(dtypes[0]).requires_grad_()
    weight_D = torch.randn(24).to(dtypes[1]).requires_grad_()
    out = rms_norm(x, weight_D, 1e-6)
    expected = plainly_normed(x.float(), weight_D.float(), 1e-6)
    torch.testing.assert_close(out, expected.to(x.dtype))
    out.sum().backward()
    assert (x.grad.dtype, weight_D.grad.dtype) == dtypes


ROWS = [torch.tensor([2, 0, 1, 2]), torch.tensor([1])]


def gated_feed_forward(activation):
    ffn = FeedForward(6, 10, activation, gated=True, dropout=0.0, n_adapters=3).double()
    nn.init.normal_(ffn.l_ff.scale)
    return ffn


def plain_feed_forward(ffn, x, adapter):
    return ffn.down(plainly_gated(ffn, ffn.gate(x), ffn.up(x), adapter))


@pytest.mark.parametrize("adapter", ROWS, ids=["mixed rows", "one row"])
@pytest.mark.parametrize("n_in_cache", [0, 25, 70, 10**6])
@pytest.mark.parametrize(
    "trained", [("gate", "scale"), ("gate",), ("scale",), ("up", "scale"), ("gate", "up", "scale")]
)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_gated_feed_forward_has_the_gradients_of_its_plain_lines(
    activation, trained, n_in_cache, adapter, monkeypatch
):
    monkeypatch.setattr("minia3.model.gated_hidden.N_IN_CACHE", n_in_cache)
    ffn = gated_feed_forward(activation)
    parameters = {"scale": ffn.l_ff.scale, "gate": ffn.gate.weight, "up": ffn.up.weight}
    wanted = [parameters[name] for name in trained]
    ffn.requires_grad_(False)
    for parameter in wanted:
        parameter.requires_grad_(True)
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    weight = torch.randn(4, 3, 6, dtype=torch.float64)
    plain = plain_feed_forward(ffn, x, adapter)
    torch.testing.assert_close(ffn(x, adapter), plain)
    found = torch.autograd.grad((ffn(x, adapter) * weight).sum(), wanted)
    same(found, torch.autograd.grad((plain * weight).sum(), wanted))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_gradients_of_a_gated_feed_forward_pass_gradcheck(activation):
    """Also if the gradient that arrives is not contiguous."""
    torch.manual_seed(0)  # no entry of a ReLU may be next to 0
    ffn = gated_feed_forward(activation)
    adapter = torch.tensor([1, 0])
    x = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ffn(x.transpose(0, 1), adapter).transpose(0, 1), x)


@pytest.mark.parametrize("adapter", ROWS, ids=["mixed rows", "one row"])
def test_the_gradient_of_l_ff_in_bfloat16_is_as_exact_as_that_of_the_plain_lines(
    adapter, monkeypatch
):
    monkeypatch.setattr("minia3.model.gated_hidden.N_IN_CACHE", 20)  # two tokens
    torch.manual_seed(0)
    exact = gated_feed_forward("silu")
    narrow = copy.deepcopy(exact).bfloat16()  # its vectors are float32
    exact.load_state_dict(narrow.state_dict())
    x = torch.randn(4, 64, 6).bfloat16()
    grad = torch.randn(4, 64, 6).bfloat16()

    def gradient_of_l(ffn, forward, dtype):
        out = forward(ffn, x.to(dtype), adapter)
        return torch.autograd.grad(out, ffn.l_ff.scale, grad.to(dtype))[0].double()

    expected = gradient_of_l(exact, FeedForward.forward, torch.float64)
    found = gradient_of_l(narrow, FeedForward.forward, torch.bfloat16)
    plain = gradient_of_l(narrow, plain_feed_forward, torch.bfloat16)
    assert (found - expected).norm() < 1.2 * (plain - expected).norm()
    assert (found - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_without_gradients_a_gated_feed_forward_overwrites_its_gate_and_nothing_else(activation):
    ffn = gated_feed_forward(activation)
    gate = torch.randn(4, 3, 10, dtype=torch.float64)
    up = torch.randn(4, 3, 10, dtype=torch.float64)
    row_0 = torch.tensor([0])
    plain = plainly_gated(ffn, gate.clone(), up, row_0)
    before = up.clone()
    with torch.no_grad():
        found = gated_hidden(ffn, gate, up, row_0)
    torch.testing.assert_close(found, plain.detach(), rtol=0, atol=0)
    assert torch.equal(up, before)
    if activation != "gelu":  # PyTorch has no function that overwrites x with it
        assert found.data_ptr() == gate.data_ptr()


@pytest.mark.parametrize("adapter", [[1], [1, 0]])
def test_the_backward_pass_of_a_gated_feed_forward_overwrites_nothing(adapter):
    ffn = gated_feed_forward("silu").float()
    gate = torch.randn(2, 3, 10, requires_grad=True)
    up = torch.randn(2, 3, 10, requires_grad=True)
    grad = torch.randn(2, 3, 10)
    inputs = [gate, up, ffn.l_ff.scale]
    before = [x.detach().clone() for x in (*inputs, grad)]
    out = gated_hidden(ffn, gate, up, torch.tensor(adapter))
    first = torch.autograd.grad(out, inputs, grad, retain_graph=True)
    same([*inputs, grad], before, rtol=0, atol=0)
    same(torch.autograd.grad(out, inputs, grad), first, rtol=0, atol=0)


def test_a_gated_feed_forward_of_no_tokens_has_gradients_of_zero():
    ffn = gated_feed_forward("silu")
    out = ffn(torch.empty(0, 3, 6, dtype=torch.float64), torch.tensor([0]))
    out.sum().backward()
    assert out.shape == (0, 3, 6)
    assert not ffn.l_ff.scale.grad.any()


def test_recompute_passes_gradcheck_and_keeps_only_its_inputs():
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def run(x, weight):
        return recompute(lambda x, weight: (x * weight).tanh().exp() * x, x, weight)

    assert torch.autograd.gradcheck(run, (x, weight))
    assert kept_for_backward(lambda: run(x, weight), nn.Module()) == x.nbytes + weight.nbytes


def test_recompute_without_gradients_is_the_plain_call():
    results = []
    with torch.no_grad():
        found = recompute(lambda x: results.append(2 * x) or results[-1], torch.ones(2))
    assert found is results[0]


@pytest.mark.parametrize("kind", ["norm", "feed-forward", "function"])
def test_second_derivatives_of_what_is_computed_again_are_refused(kind):
    x = torch.randn(2, 4, requires_grad=True)
    weight = torch.randn(4)
    ffn = FeedForward(4, 4, "silu", gated=True, dropout=0.0, n_adapters=1)

    def run(x):
        if kind == "norm":
            return rms_norm(x, weight, 1e-3)
        if kind == "feed-forward":
            up = weight.expand(1, 2, 4)
            return gated_hidden(ffn, x.view(1, 2, 4), up, torch.tensor([0]))
        return recompute(torch.tanh, x)

    (grad_x,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad_x.square().sum().backward()
    (grad_x,) = torch.autograd.grad(run(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad_x.square().sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_recomputed_blocks_have_the_same_bits_under_dropout_and_keep_less(name, loaded):
    model = loaded(name, seed=0).train()
    batch = batch_of((30, 12, 25))
    minia3.freeze(model)
    expected = gradients(model, batch)
    n_kept = kept_for_backward(lambda: loss_of(model, batch), model)
    recompute_blocks(blocks_of(model))
    same(gradients(model, batch), expected, rtol=0, atol=0)
    assert kept_for_backward(lambda: loss_of(model, batch), model) < n_kept / 2.5

    def decode():
        return list(decode_tokens(model, model.start(batch.source_BM, batch.mask_BM), 4, set()))

    model.eval()
    tokens = decode()
    for block in blocks_of(model):
        del block.forward  # which leaves the forward of the class
    assert decode() == tokens


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_of_a_recomputed_model_recomputes_its_own_blocks(name, copied, loaded):
    model = loaded(name, seed=0)
    batch = batch_of((7, 3, 5))
    recompute_blocks(blocks_of(model))
    n_kept = kept_for_backward(lambda: loss_of(model, batch), model)
    of_copy = randomize(copied(model), seed=1)
    expected = gradients(loaded(name, seed=1), batch)
    same(gradients(of_copy, batch), expected, rtol=0, atol=0)
    assert kept_for_backward(lambda: loss_of(of_copy, batch), of_copy) == n_kept


# Scaled keys and values

ENTRIES = [0.0, -0.0, 1e-30, -1e-3, 0.7, -1.0, 1.0, 1e4]
MIXED = torch.tensor([1, 0, 0])


def scaled_with_gradients(scale, adapter_B, dtype):
    """Return the result of `scale`, and the gradients of x and of the rows of a vector."""
    torch.manual_seed(0)
    vector = IA3(len(ENTRIES), n_adapters=2)
    row = torch.tensor(ENTRIES)
    vector.scale.data = torch.stack((row, row.flip(0)))
    if dtype == torch.float64:
        vector.double()
    x = torch.randn(3, 5, len(ENTRIES)).to(dtype).requires_grad_()
    out = scale(x.clone(), vector.scale[adapter_B])
    out.backward(torch.randn(out.shape).to(dtype))
    return out.detach(), x.grad, vector.scale.grad


@pytest.mark.parametrize("adapter_B", [torch.tensor([1]), MIXED], ids=["one row", "mixed rows"])
@pytest.mark.parametrize(
    ("dtype", "rtol"),
    [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 0.03)],
)
def test_what_keeps_its_result_has_the_gradients_of_the_plain_line(adapter_B, dtype, rtol):
    """Also if an entry is 0, and if it is so small that its square is 0."""
    found = scaled_with_gradients(scale_keeping_result, adapter_B, dtype)
    expected = scaled_with_gradients(plainly_scaled, adapter_B, dtype)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("adapter_B", [torch.tensor([1]), MIXED], ids=["one row", "mixed rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_what_keeps_its_result_is_wrong_by_one_rounding(adapter_B, dtype):
    """A term is rounded to the dtype, in the scaled result and in its product with the gradient.

    The sum of the terms is one of float32.
    """
    generator = torch.Generator().manual_seed(0)
    vector = IA3(64, n_adapters=2)
    vector.scale.data = torch.randn(2, 64, generator=generator).bfloat16().float()
    x = torch.randn(3, 100, 64, generator=generator).bfloat16()
    grad = torch.randn(3, 100, 64, generator=generator).bfloat16()
    copy = x.to(dtype, copy=True)
    scale_keeping_result(copy, vector.scale[adapter_B]).backward(grad.to(dtype))

    exact = torch.zeros(2, 64, dtype=torch.float64)
    exact.index_add_(0, adapter_B.expand(3), (grad.double() * x.double()).sum(1))
    error = (vector.scale.grad - exact).norm() / exact.norm()
    assert error < torch.finfo(dtype).eps

    l_BD = vector.scale.detach()[adapter_B].to(dtype)
    terms_BLD = grad.to(dtype) * (x.to(dtype) * l_BD.unsqueeze(1))
    rounded = torch.zeros(2, 64, dtype=torch.float64)
    rounded.index_add_(0, adapter_B.expand(3), terms_BLD.double().sum(1) / l_BD.double())
    assert (vector.scale.grad - rounded).norm() / rounded.norm() < 1e-5


def test_gradients_of_what_keeps_its_result_pass_gradcheck():
    vector = IA3(4, n_adapters=2).double()
    vector.scale.data = torch.tensor([[1.0, 0.0, -2.0, 0.5], [0.0, 1.0, 3.0, -0.1]]).double()
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, _: scale_keeping_result(x.clone(), vector.scale[MIXED]), (x, vector.scale)
    )


def test_second_derivatives_of_what_keeps_its_result_are_refused():
    x = torch.ones(1, 2, 4, requires_grad=True)
    l_BD = torch.ones(1, 4, requires_grad=True)
    (grad_x,) = torch.autograd.grad(
        scale_keeping_result(x.clone(), l_BD).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad_x.sum().backward()


def test_what_keeps_its_result_shares_it_with_whoever_needs_it_too():
    vector = IA3(8)
    x = torch.randn(3, 5, 8, requires_grad=True)
    row_0 = torch.tensor([0])

    def square(scale):
        return kept_for_backward(lambda: scale(x.clone(), vector.scale[row_0]).square(), vector)

    n_small = 2 * 8 * 4  # the entries
    assert x.nbytes <= square(scale_keeping_result) <= x.nbytes + n_small
    assert square(plainly_scaled) >= 2 * x.nbytes


@pytest.mark.parametrize("has_bias", [False, True])
def test_what_keeps_its_result_takes_no_new_memory(has_bias):
    """With a bias, PyTorch's linear returns a view."""
    vector = IA3(8, keeps_result=True)
    k_BLD = nn.Linear(4, 8, bias=has_bias)(torch.randn(3, 5, 4))
    scaled_BLD = vector(k_BLD, torch.tensor([0]))
    assert scaled_BLD.data_ptr() == k_BLD.data_ptr()
    k_BLD.sum().backward()  # what was overwritten is the result, with its history
    assert vector.scale.grad is not None


@pytest.mark.parametrize("name", [*NAMES, "qwen2"])
def test_backward_hooks_around_keys_and_values_change_nothing(name, loaded):
    model = loaded(name).double().train()
    batch = batch_of((9, 5, 7))
    expected = gradients(model, batch)
    seen = set()
    for place, module in model.named_modules():
        if place.endswith((".k", ".v", ".l_k", ".l_v")):
            module.register_full_backward_hook(lambda *_, place=place: seen.add(place))
    same(gradients(model, batch), expected, rtol=1e-12, atol=1e-12)
    assert len(seen) == 4 * sum(name.endswith(".l_k") for name in minia3.vectors(model))


def test_of_a_vector_that_does_not_train_only_the_entries_are_kept():
    vector = IA3(8).requires_grad_(False)
    x = torch.randn(3, 5, 8, requires_grad=True)
    assert (
        kept_for_backward(lambda: scale_keeping_result(x, vector.scale[torch.tensor([0])]), vector)
        <= 8 * 4
    )
