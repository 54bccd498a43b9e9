"""A single 16-bit query on a CPU gets our own attention; PyTorch computes everything else."""

import pytest
import torch
import torch.nn.functional as F

from minia3.model.attend import attend
from minia3.model.sequence_state import mask_to_bias

HEADS_AND_BIASES = [
    (4, 4, None),
    (4, 4, "per head"),
    (4, 4, "per row"),
    (6, 2, None),
    (6, 2, "per row"),
    (3, 1, None),
    (3, 1, "per row"),
]


@pytest.fixture
def pytorch_is_forbidden(monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)


def make_inputs(n_heads, n_kv_heads, bias_kind, dtype):
    """Return one query for each of 5 rows, and 31 columns of a longer cache."""
    torch.manual_seed(0)
    q_BHLK = torch.randn(5, n_heads, 1, 16).to(dtype)
    k_BGMK = torch.randn(5, n_kv_heads, 40, 16).to(dtype)[:, :, :31]
    v_BGMK = torch.randn(5, n_kv_heads, 40, 16).to(dtype)[:, :, :31]
    is_seen_B11M = torch.rand(5, 1, 1, 31) < 0.7
    biases = {
        None: None,
        "per head": torch.randn(1, n_heads, 1, 31).to(dtype),
        "per row": mask_to_bias(is_seen_B11M, dtype),
    }
    return q_BHLK, k_BGMK, v_BGMK, biases[bias_kind]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n_heads", "n_kv_heads", "bias_kind"), HEADS_AND_BIASES)
def test_one_query_is_as_close_to_float64_as_with_pytorch(
    n_heads, n_kv_heads, bias_kind, dtype, request
):
    inputs = make_inputs(n_heads, n_kv_heads, bias_kind, dtype)
    options = {"scale": 0.7, "enable_gqa": n_heads != n_kv_heads}
    wide_inputs = [x if x is None else x.double() for x in inputs]
    exact = F.scaled_dot_product_attention(*wide_inputs, **options)
    theirs = F.scaled_dot_product_attention(*inputs, **options)
    request.getfixturevalue("pytorch_is_forbidden")
    with torch.no_grad():
        ours = attend(*inputs, scale=0.7)
    assert ours.dtype == dtype
    assert ours.shape == inputs[0].shape
    assert (ours - exact).norm() < 2 * (theirs - exact).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_query_with_dropout_is_left_to_pytorch(dtype):
    inputs = make_inputs(4, 4, None, dtype)
    with torch.no_grad():
        plain = attend(*inputs)
        dropped = attend(*inputs, dropout=0.9)
    assert (dropped - plain).norm() > plain.norm()


@pytest.mark.parametrize("n_queries", [1, 3])
@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(4, 4), (6, 2)])
def test_attention_equals_the_equation(n_heads, n_kv_heads, n_queries):
    torch.manual_seed(1)
    q_BHLK = torch.randn(2, n_heads, n_queries, 8, dtype=torch.float64)
    k_BGMK = torch.randn(2, n_kv_heads, 5, 8, dtype=torch.float64)
    v_BGMK = torch.randn(2, n_kv_heads, 5, 8, dtype=torch.float64)
    bias_BHLM = torch.randn(2, n_heads, n_queries, 5, dtype=torch.float64)
    n_sharing = n_heads // n_kv_heads
    k_BHMK = k_BGMK.repeat_interleave(n_sharing, dim=1)
    v_BHMK = v_BGMK.repeat_interleave(n_sharing, dim=1)
    weights_BHLM = (0.3 * q_BHLK @ k_BHMK.mT + bias_BHLM).softmax(-1)
    found = attend(q_BHLK, k_BGMK, v_BGMK, bias_BHLM, scale=0.3)
    torch.testing.assert_close(found, weights_BHLM @ v_BHMK)
