"""Attention written as plain products, for a CPU: short texts in bfloat16, and dropout.

There, PyTorch's kernel takes up to twice as long as the products below, and its backward pass up to
three times as long. They keep less for the backward pass, too: neither the output nor the sums of
the softmax.

    S = scale q k^T + bias                  W = softmax(S)           out = W v
    dv = W^T dout                           dW = dout v^T
    dS = W * (dW - sum(W * dW))             dq = scale dS k          dk = scale dS^T q

(Dao et al. 2022, arXiv 2205.14135, appendix B.2. Here dx is the gradient of x.) Both passes compute
W for a few rows at a time, so that it stays in a core's cache.

In the forward pass, PyTorch's kernel is the faster one for a single short row, and on a processor
without fast scores (exact_products.py). So it is in both passes for long texts: with 12 heads, more
than 387 tokens, or 182 without fast scores. In float16, PyTorch is faster, at least on a processor
without instructions for it.

Dropout replaces W by W * Z in `out` and in `dv`, and multiplies dW by Z, whose entries are 0 or
1 / (1 - dropout). PyTorch has no kernel of this for a CPU: it computes and keeps W, W * Z and a
mask. So with dropout, both passes are these products, whatever the length of the texts and in
float32, too, and only the mask is kept.

tests/benchmarks/attention.py compares the times.

Shapes: B batch, L query length, M memory length, H query heads, G key/value heads, N query heads
per key/value head (H / G), Q queries of N heads (N * L), K head width, P pairs of a row and a
key/value head (B * G).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from minia3.model import exact_products

# Scores of a few rows at once (1.6 MB in float32). If a single row has more, and there is no
# dropout, then PyTorch is faster.
MOST_SCORES = 400_000
MOST_SCORES_IF_EXACT = 1_800_000  # the same limit where products are exact
LEAST_QUERIES = 48  # of a single row: with fewer, PyTorch's forward pass is faster


def products_are_faster(q_BHLK, k_BGMK, bias_BHLM, dropout):
    """Return whether `attend_by_products` can compute this, and faster than PyTorch.

    It has no gradient of the bias, which only full fine-tuning of a T5 asks for. A plan of memory
    (memory_plan.py) runs on fake tensors. Without dropout, it counts what PyTorch's kernels keep,
    as a GPU has them.
    """
    is_plain = type(q_BHLK) is torch.Tensor or (dropout > 0 and isinstance(q_BHLK, FakeTensor))
    if not is_plain or torch.compiler.is_compiling():
        return False
    if not torch.is_grad_enabled() and (dropout > 0 or not is_forward_faster(q_BHLK)):
        return False
    if bias_BHLM is not None and bias_BHLM.requires_grad:
        return False
    n_scores = n_scores_of_row(q_BHLK, k_BGMK)
    is_empty = len(q_BHLK) * n_scores == 0
    if is_empty or q_BHLK.device.type != "cpu" or q_BHLK.dtype == torch.float16:
        return False
    most_scores = MOST_SCORES
    if exact_products.are_products_exact(q_BHLK.dtype):
        most_scores = MOST_SCORES_IF_EXACT
    return dropout > 0 or (q_BHLK.dtype == torch.bfloat16 and n_scores <= most_scores)


def is_forward_faster(q_BHLK):
    """Return whether the products of the forward pass are faster than PyTorch, without dropout."""
    n_rows, _, n_queries, _ = q_BHLK.shape
    is_large = n_rows > 1 or n_queries >= LEAST_QUERIES
    return is_large and exact_products.are_products_exact(q_BHLK.dtype)


def n_scores_of_row(q_BHLK, k_BGMK):
    return q_BHLK.shape[1] * q_BHLK.shape[2] * k_BGMK.shape[2]


def attend_by_products(q_BHLK, k_BGMK, v_BGMK, bias_BHLM, is_causal, dropout, scale):
    """Return what `fused` in attend.py returns."""
    options = Options(is_causal, dropout, scale)
    return _PlainAttention.apply(q_BHLK, k_BGMK, v_BGMK, bias_BHLM, options)


class Options(NamedTuple):
    is_causal: bool
    dropout: float
    scale: float


class _PlainAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BHLK, k_BGMK, v_BGMK, bias_BHLM, options):
        ctx.options = options
        is_kept_BHLM = None
        if options.dropout > 0:
            # PyTorch draws in the same way, so with the same seed it keeps the same weights.
            scores_shape = (*q_BHLK.shape[:3], k_BGMK.shape[2])
            is_kept_BHLM = q_BHLK.new_empty(scores_shape, dtype=torch.bool)
            is_kept_BHLM.bernoulli_(1 - options.dropout)
        ctx.save_for_backward(q_BHLK, k_BGMK, v_BGMK, bias_BHLM, is_kept_BHLM)
        if options.dropout == 0 and not is_forward_faster(q_BHLK):
            return F.scaled_dot_product_attention(
                q_BHLK,
                k_BGMK,
                v_BGMK,
                attn_mask=bias_BHLM,
                is_causal=options.is_causal,
                scale=options.scale,
                enable_gqa=q_BHLK.shape[1] != k_BGMK.shape[1],
            )
        bias_BHLM = finite_bias(bias_BHLM, options.is_causal, q_BHLK, k_BGMK)
        rows = a_few_rows(q_BHLK, k_BGMK, v_BGMK, bias_BHLM, is_kept_BHLM)
        with without_autocast():
            return torch.cat([outputs_of_rows(*x, options) for x in rows])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BHLK):
        q_BHLK, k_BGMK, v_BGMK, bias_BHLM, is_kept_BHLM = ctx.saved_tensors
        bias_BHLM = finite_bias(bias_BHLM, ctx.options.is_causal, q_BHLK, k_BGMK)
        rows = a_few_rows(q_BHLK, k_BGMK, v_BGMK, bias_BHLM, is_kept_BHLM, grad_BHLK)
        with without_autocast():
            gradients = [gradients_of_rows(*x, ctx.options) for x in rows]
        grad_q, grad_k, grad_v = map(torch.cat, zip(*gradients, strict=True))
        return grad_q, grad_k, grad_v, None, None


def without_autocast():
    """Return a context in which float32 products stay so, whatever the user's own loop asks for."""
    return torch.autocast("cpu", enabled=False)


def a_few_rows(q_BHLK, k_BGMK, *tensors):
    """Yield a few rows of all tensors, then the next ones, and so on. None stays None."""
    n_caches = torch.get_num_threads()  # each core has one
    if isinstance(q_BHLK, FakeTensor):
        n_caches = 1  # a plan of memory is the same on every machine
    n_at_once = max(n_caches * MOST_SCORES // n_scores_of_row(q_BHLK, k_BGMK), 1)
    for first in range(0, len(q_BHLK), n_at_once):
        rows = slice(first, first + n_at_once)
        yield [x if x is None else x[rows] for x in (q_BHLK, k_BGMK, *tensors)]


def finite_bias(bias_BHLM, is_causal, q_BHLK, k_BGMK):
    """Return what is added to the scores, with very low numbers in the place of -inf.

    A query that sees nothing would have no softmax. Nobody reads its result, and it has no
    gradient, so it may see everything.
    """
    n_rows, _, n_queries, _ = q_BHLK.shape
    n_columns = k_BGMK.shape[2]
    if bias_BHLM is None:
        bias_BHLM = q_BHLK.new_zeros(1, 1, n_queries, n_columns)
        if is_causal:
            bias_BHLM = bias_BHLM.fill_(float("-inf")).triu(1)
    bias_BHLM = bias_BHLM.clamp(min=torch.finfo(bias_BHLM.dtype).min)
    return bias_BHLM.expand(n_rows, -1, -1, -1)


def outputs_of_rows(q_BHLK, k_BGMK, v_BGMK, bias_BHLM, is_kept_BHLM, options):
    """Return what attention returns. is_kept_BHLM: None, or the weights that dropout keeps."""
    weights_BHLM = attention_weights(q_BHLK, k_BGMK, bias_BHLM, options.scale)
    if is_kept_BHLM is not None:
        weights_BHLM.mul_(is_kept_BHLM)
    n_pairs = k_BGMK.shape[0] * k_BGMK.shape[1]
    out_PQK = in_pairs(weights_BHLM.to(v_BGMK.dtype), n_pairs) @ in_pairs(v_BGMK, n_pairs)
    if is_kept_BHLM is not None:
        out_PQK.div_(1 - options.dropout)
    return out_PQK.view_as(q_BHLK)


def gradients_of_rows(q_BHLK, k_BGMK, v_BGMK, bias_BHLM, is_kept_BHLM, grad_BHLK, options):
    """Return the gradients of queries, keys and values, for that of the output."""
    weights_BHLM = attention_weights(q_BHLK, k_BGMK, bias_BHLM, options.scale)
    kept_BHLM = weights_BHLM
    if is_kept_BHLM is not None:
        kept_BHLM = weights_BHLM.clone().mul_(is_kept_BHLM)
        grad_BHLK = grad_BHLK / (1 - options.dropout)
    n_pairs = k_BGMK.shape[0] * k_BGMK.shape[1]
    q_PQK = in_pairs(q_BHLK, n_pairs)
    k_PMK = in_pairs(k_BGMK, n_pairs)
    v_PMK = in_pairs(v_BGMK, n_pairs)
    grad_PQK = in_pairs(grad_BHLK, n_pairs)

    # What is multiplied by 16-bit tensors is rounded.
    grad_v_PMK = in_pairs(kept_BHLM.to(v_PMK.dtype), n_pairs).mT @ grad_PQK
    grad_weights_PQM = (grad_PQK @ v_PMK.mT).to(weights_BHLM.dtype)
    grad_weights_BHLM = grad_weights_PQM.view_as(weights_BHLM)
    if is_kept_BHLM is not None:
        grad_weights_BHLM.mul_(is_kept_BHLM)
    grad_scores_BHLM = torch._softmax_backward_data(
        grad_weights_BHLM, weights_BHLM, -1, weights_BHLM.dtype
    )
    grad_scores_PQM = in_pairs(grad_scores_BHLM.to(q_PQK.dtype), n_pairs)
    grad_q_PQK = (grad_scores_PQM @ k_PMK).mul_(options.scale)
    grad_k_PMK = (grad_scores_PQM.mT @ q_PQK).mul_(options.scale)
    return grad_q_PQK.view_as(q_BHLK), grad_k_PMK.view_as(k_BGMK), grad_v_PMK.view_as(v_BGMK)


def attention_weights(q_BHLK, k_BGMK, bias_BHLM, scale):
    """Return softmax(scale q k^T + bias) (B, H, L, M), in float32 or wider."""
    wide = torch.promote_types(q_BHLK.dtype, torch.float32)
    n_pairs = k_BGMK.shape[0] * k_BGMK.shape[1]
    q_PQK = in_pairs(q_BHLK, n_pairs).to(wide)
    k_PMK = in_pairs(k_BGMK, n_pairs).to(wide)
    with exact_products.exact_products(q_BHLK.dtype):
        scores_PQM = q_PQK @ k_PMK.mT
    scores_BHLM = scores_PQM.view(*q_BHLK.shape[:3], k_BGMK.shape[2])
    torch.add(bias_BHLM, scores_BHLM, alpha=scale, out=scores_BHLM)
    return scores_BHLM.softmax(-1)


def in_pairs(x_BHLK, n_pairs):
    """Return (P, Q, K): the query heads that share a key/value head are queries of that head."""
    return x_BHLK.reshape(n_pairs, -1, x_BHLK.shape[-1])
