"""Attention as plain products is PyTorch's attention, has its gradients, and keeps less."""

import pytest
import torch
import torch.nn.functional as F
from batches import batch_of, gradients, same
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import minia3
from minia3.model import attend as attend_module
from minia3.model import exact_products, plain_attention
from minia3.model.plain_attention import attend_by_products, products_are_faster
from minia3.model.sequence_state import mask_to_bias
from tests.benchmarks.measure import kept_for_backward

N_ROWS = 5
HEADS = [(4, 4), (6, 2), (3, 1)]
BIASES = [None, "causal", "per head", "per row"]


@pytest.fixture(params=[False, True], ids=["forward by PyTorch", "forward by products"])
def both_forward_passes(request, monkeypatch):
    choose_forward_pass(request.param, monkeypatch)


def choose_forward_pass(are_exact, monkeypatch):
    """Let this run as on a processor that has exact products of bfloat16 tensors, or has not."""
    monkeypatch.setattr(
        exact_products,
        "are_products_exact",
        lambda dtype: are_exact and dtype == torch.bfloat16,
    )


def make_inputs(n_heads, n_kv_heads, bias_kind, dtype):
    """Return queries, keys, values, a bias, and whether attention is causal."""
    torch.manual_seed(0)
    n_queries = 12 if bias_kind == "causal" else 7
    # As the model makes them: heads that lie side by side, not contiguous.
    q_BHLK = torch.randn(N_ROWS, n_queries, n_heads, 8).to(dtype).transpose(1, 2)
    k_BGMK = torch.randn(N_ROWS, 12, n_kv_heads, 8).to(dtype).transpose(1, 2)
    v_BGMK = torch.randn(N_ROWS, 12, n_kv_heads, 8).to(dtype).transpose(1, 2)
    is_seen_B1LM = torch.rand(N_ROWS, 1, n_queries, 12) < 0.7
    is_seen_B1LM[..., 0] = True
    biases = {
        "per head": torch.randn(1, n_heads, n_queries, 12).to(dtype),
        "per row": mask_to_bias(is_seen_B1LM, dtype),
    }
    qkv = [x.requires_grad_() for x in (q_BHLK, k_BGMK, v_BGMK)]
    return qkv, biases.get(bias_kind), bias_kind == "causal"


def gradients_of(function, qkv, bias, is_causal, dropout=0.0):
    """Return the output, and the gradients of queries, keys and values."""
    out_BHLK = function(*qkv, bias, is_causal, dropout, 0.3)
    generator = torch.Generator().manual_seed(1)
    grad_BHLK = torch.randn(out_BHLK.shape, generator=generator).to(out_BHLK.dtype)
    return [out_BHLK.detach(), *torch.autograd.grad(out_BHLK, qkv, grad_BHLK)]


def by_pytorch(q_BHLK, k_BGMK, v_BGMK, bias_BHLM, is_causal, dropout, scale):
    options = {"attn_mask": bias_BHLM, "is_causal": is_causal, "dropout_p": dropout, "scale": scale}
    n_sharing = q_BHLK.shape[1] // k_BGMK.shape[1]
    k_BHMK = k_BGMK.repeat_interleave(n_sharing, dim=1)
    v_BHMK = v_BGMK.repeat_interleave(n_sharing, dim=1)
    return F.scaled_dot_product_attention(q_BHLK, k_BHMK, v_BHMK, **options)


@pytest.mark.parametrize(("n_at_once", "n_threads"), [(1, 1), (2, 1), (2, 2), (N_ROWS, 1)])
@pytest.mark.parametrize("bias_kind", BIASES)
@pytest.mark.parametrize(("n_heads", "n_kv_heads"), HEADS)
def test_the_gradients_are_those_of_pytorch(
    n_heads, n_kv_heads, bias_kind, n_at_once, n_threads, monkeypatch
):
    qkv, bias, is_causal = make_inputs(n_heads, n_kv_heads, bias_kind, torch.float64)
    n_scores = n_heads * qkv[0].shape[2] * 12
    monkeypatch.setattr(plain_attention, "MOST_SCORES", n_at_once * n_scores // n_threads)
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    original = plain_attention.gradients_of_rows
    n_rows = []

    def spy(q_BHLK, *others):
        n_rows.append(len(q_BHLK))
        return original(q_BHLK, *others)

    monkeypatch.setattr(plain_attention, "gradients_of_rows", spy)
    found = gradients_of(attend_by_products, qkv, bias, is_causal)
    torch.testing.assert_close(found, gradients_of(by_pytorch, qkv, bias, is_causal))
    assert sum(n_rows) == N_ROWS
    assert n_rows[0] == n_at_once


@pytest.mark.usefixtures("both_forward_passes")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias_kind", BIASES)
@pytest.mark.parametrize(("n_heads", "n_kv_heads"), HEADS)
def test_in_16_bits_they_are_close_to_those_of_float64(n_heads, n_kv_heads, bias_kind, dtype):
    qkv, bias, is_causal = make_inputs(n_heads, n_kv_heads, bias_kind, dtype)
    ours = gradients_of(attend_by_products, qkv, bias, is_causal)
    wide_qkv = [x.detach().double().requires_grad_() for x in qkv]
    wide_bias = bias if bias is None else bias.double()
    exact = gradients_of(by_pytorch, wide_qkv, wide_bias, is_causal)
    for our, exactly in zip(ours, exact, strict=True):
        assert our.dtype == dtype
        # Four times what one rounding is off at most.
        assert (our - exactly).norm() < 2 * torch.finfo(dtype).eps * exactly.norm()


@pytest.mark.usefixtures("both_forward_passes")
def test_a_query_that_sees_nothing_leaves_all_gradients_finite():
    qkv, _, _ = make_inputs(4, 4, "per row", torch.bfloat16)
    is_seen_BLM = torch.ones(N_ROWS, 7, 12, dtype=torch.bool)
    is_seen_BLM[1, 2] = False
    bias = mask_to_bias(is_seen_BLM[:, None], torch.bfloat16)
    out_BHLK = attend_by_products(*qkv, bias, False, 0.0, 0.3)
    is_read_BHLK = torch.ones_like(out_BHLK)
    is_read_BHLK[1, :, 2] = 0.0
    found = torch.autograd.grad(out_BHLK, qkv, is_read_BHLK)

    def without_the_query(*qkv_and_options):
        out_BHLK = by_pytorch(*qkv_and_options)
        return out_BHLK[1:2, :, [0, 1, 3, 4, 5, 6]]

    row = without_the_query(*qkv, None, False, 0.0, 0.3)
    expected = torch.autograd.grad(row, qkv, torch.ones_like(row))
    for gradient, expected_gradient in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient[1], expected_gradient[1], rtol=0.02, atol=0.02)
        assert gradient.isfinite().all()


@pytest.mark.usefixtures("both_forward_passes")
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_nothing_but_the_inputs_and_the_mask_of_dropout_is_kept(dropout):
    qkv, bias, is_causal = make_inputs(6, 2, "per row", torch.bfloat16)
    n_kept = kept_for_backward(
        lambda: attend_by_products(*qkv, bias, is_causal, dropout, 0.3), nn.Module()
    )
    mask_bytes = N_ROWS * 6 * 7 * 12 if dropout else 0
    assert n_kept == sum(x.nbytes for x in (*qkv, bias)) + mask_bytes


@pytest.mark.parametrize("bias_kind", BIASES)
@pytest.mark.parametrize(("n_heads", "n_kv_heads"), HEADS)
def test_dropout_leaves_out_the_weights_that_pytorch_leaves_out(
    n_heads, n_kv_heads, bias_kind, monkeypatch
):
    qkv, bias, is_causal = make_inputs(n_heads, n_kv_heads, bias_kind, torch.float64)
    n_scores = n_heads * qkv[0].shape[2] * 12
    monkeypatch.setattr(plain_attention, "MOST_SCORES", 2 * n_scores // torch.get_num_threads())
    results = []
    for function in (attend_by_products, by_pytorch):
        torch.manual_seed(1)
        results.append(gradients_of(function, qkv, bias, is_causal, dropout=0.4))
    torch.testing.assert_close(*results)
    without = gradients_of(by_pytorch, qkv, bias, is_causal)
    assert not torch.allclose(results[0][0], without[0], rtol=0.1), "there was no dropout"


@pytest.mark.usefixtures("both_forward_passes")
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_autocast_changes_nothing(dropout):
    """A user's own loop may call both passes within it."""
    qkv, bias, is_causal = make_inputs(6, 2, "per row", torch.bfloat16)
    results = []
    for is_enabled in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_enabled):
            results.append(gradients_of(attend_by_products, qkv, bias, is_causal, dropout=dropout))
    same(*results, rtol=0, atol=0)


def test_second_derivatives_are_refused():
    qkv, bias, is_causal = make_inputs(4, 4, None, torch.float64)
    out_BHLK = attend_by_products(*qkv, bias, is_causal, 0.0, 0.3)
    (grad_q, *_) = torch.autograd.grad(out_BHLK.square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad_q.sum().backward()


@pytest.mark.parametrize("has_gradients", [False, True])
def test_with_exact_products_pytorch_computes_nothing_of_short_texts(has_gradients, monkeypatch):
    choose_forward_pass(True, monkeypatch)
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)
    qkv, bias, is_causal = make_inputs(6, 2, "per row", torch.bfloat16)
    with torch.set_grad_enabled(has_gradients):
        out_BHLK = attend_module.fused(*qkv, bias, is_causal, 0.0, 0.3)
    assert out_BHLK.requires_grad == has_gradients


SHORT = (1, 2, 3, 8)


@pytest.mark.parametrize(
    ("expected", "changes"),
    [
        (True, {}),
        (False, {"dtype": torch.float16}),
        (False, {"dtype": torch.float16, "dropout": 0.1}),
        (True, {"bias": torch.zeros(1, 1, 3, 3)}),
        (False, {"dtype": torch.float32}),  # PyTorch is faster
        (False, {"shape": (1, 2, 448, 8)}),  # 401,408 scores
        (False, {"shape": (1, 2, 0, 8)}),  # a row without tokens
        (False, {"shape": (0, 2, 3, 8)}),  # no row
        (True, {"dtype": torch.float32, "dropout": 0.1}),  # PyTorch has no kernel
        (True, {"shape": (1, 2, 448, 8), "dropout": 0.1}),
        (False, {"bias": torch.zeros(1, 1, 3, 3, requires_grad=True)}),
        (False, {"device": "meta"}),
        (False, {"has_gradients": False}),  # a single row with three queries
        (False, {"has_gradients": False, "has_exact": True}),
        (True, {"has_gradients": False, "has_exact": True, "shape": (2, 2, 3, 8)}),
        (True, {"has_gradients": False, "has_exact": True, "shape": (1, 2, 48, 8)}),
        (False, {"has_gradients": False, "has_exact": False, "shape": (2, 2, 48, 8)}),
        (True, {"has_gradients": False, "has_exact": True, "shape": (2, 2, 948, 8)}),
        (False, {"has_gradients": False, "has_exact": True, "shape": (2, 2, 949, 8)}),
        (True, {"has_exact": True, "shape": (1, 2, 948, 8)}),  # 1,797,408 scores
        (False, {"has_exact": True, "shape": (1, 2, 949, 8)}),  # 1,801,202
    ],
)
def test_it_is_used_on_a_cpu_where_it_is_faster(expected, changes, monkeypatch):
    choose_forward_pass(changes.get("has_exact", False), monkeypatch)
    options = {"dtype": torch.bfloat16, "device": "cpu"}
    options |= {name: changes[name] for name in options if name in changes}
    q_BHLK = torch.zeros(changes.get("shape", SHORT), **options)
    with torch.set_grad_enabled(changes.get("has_gradients", True)):
        found = products_are_faster(
            q_BHLK, q_BHLK, changes.get("bias"), changes.get("dropout", 0.0)
        )
    assert found == expected


def test_a_plan_of_memory_counts_it_only_under_dropout():
    with FakeTensorMode():
        q_BHLK = torch.zeros(SHORT, dtype=torch.bfloat16)
        assert not products_are_faster(q_BHLK, q_BHLK, None, 0.0)
        assert products_are_faster(q_BHLK, q_BHLK, None, 0.1)


@pytest.mark.parametrize("is_padded_first", [False, True])
@pytest.mark.parametrize("name", ["t5-v1.0", "umt5", "llama-gqa", "mistral"])
def test_a_model_has_the_same_gradients_with_it(name, is_padded_first, loaded, monkeypatch):
    model = loaded(name).double()
    minia3.freeze(model)  # the bias, too
    batch = batch_of((9, 5, 1))
    if is_padded_first:
        batch = batch._replace(mask_BM=batch.mask_BM.flip(1))
    expected = gradients(model, batch)
    n_rows = []

    def attend_to_all(q_BHLK, *others):
        n_rows.append(len(q_BHLK))
        return attend_by_products(q_BHLK, *others)

    monkeypatch.setattr(attend_module, "products_are_faster", lambda *_: True)
    monkeypatch.setattr(attend_module, "attend_by_products", attend_to_all)
    same(gradients(model, batch), expected, rtol=1e-10, atol=1e-12)
    assert max(n_rows) >= 3
