"""Attention with a backward pass of plain products, for training on a CPU.

Without dropout, the forward pass is PyTorch's. Its backward pass takes seven times as long as that,
in bfloat16. For short texts (180 tokens with 12 heads), the products below are faster, and they
keep less: neither the output nor the sums of the softmax.

    S = scale q k^T + bias                  W = softmax(S)           out = W v
    dv = W^T dout                           dW = dout v^T
    dS = W * (dW - sum(W * dW))             dq = scale dS k          dk = scale dS^T q

(Dao et al. 2022, arXiv 2205.14135, appendix B.2. Here dx is the gradient of x.) The backward pass
computes W again, for a few rows at a time, so that it stays in a core's cache.

Dropout replaces W by W * Z in `out` and in `dv`, and multiplies dW by Z, whose entries are 0 or
1 / (1 - dropout). PyTorch has no kernel of this for a CPU: it computes and keeps W, W * Z and a
mask. So with dropout, the forward pass is written here, too, and keeps only the mask, whatever the
length of the texts.

tests/benchmarks/attention.py compares the times. In float16, PyTorch is faster, at least on a
processor without instructions for it.

Shapes: B batch, L query length, M memory length, H query heads, G key/value heads, N query heads
per key/value head (H / G), Q queries of N heads (N * L), K head width, P pairs of a row and a
key/value head (B * G).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

# Scores of a row, or of a few rows at once (1.6 MB in float32). With more, and without dropout,
# PyTorch is faster.
MOST_SCORES = 400_000


def is_faster_in_training(q_BHLK, k_BGMK, bias_BHLM, dropout):
    """Return whether `attend_in_training` can compute this, and faster than PyTorch.

    It has no gradient of the bias, which only full fine-tuning of a T5 asks for. A plan of memory
    (memory_plan.py) runs on fake tensors. Without dropout, it counts what PyTorch's kernels keep,
    as a GPU has them.
    """
    is_plain = type(q_BHLK) is torch.Tensor or (dropout > 0 and isinstance(q_BHLK, FakeTensor))
    if not is_plain or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    if bias_BHLM is not None and bias_BHLM.requires_grad:
        return False
    n_scores = n_scores_of_row(q_BHLK, k_BGMK)
    is_empty = len(q_BHLK) * n_scores == 0
    if is_empty or q_BHLK.device.type != "cpu" or q_BHLK.dtype == torch.float16:
        return False
    return dropout > 0 or (q_BHLK.dtype == torch.bfloat16 and n_scores <= MOST_SCORES)


def n_scores_of_row(q_BHLK, k_BGMK):
    return q_BHLK.shape[1] * q_BHLK.shape[2] * k_BGMK.shape[2]


def attend_in_training(q_BHLK, k_BGMK, v_BGMK, bias_BHLM, is_causal, dropout, scale):
    """Return what `fused` in attend.py returns."""
    options = Options(is_causal, dropout, scale)
    return _TrainingAttention.apply(q_BHLK, k_BGMK, v_BGMK, bias_BHLM, options)


class Options(NamedTuple):
    is_causal: bool
    dropout: float
    scale: float


class _TrainingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BHLK, k_BGMK, v_BGMK, bias_BHLM, options):
        ctx.options = options
        if options.dropout == 0:
            ctx.save_for_backward(q_BHLK, k_BGMK, v_BGMK, bias_BHLM, None)
            return F.scaled_dot_product_attention(
                q_BHLK,
                k_BGMK,
                v_BGMK,
                attn_mask=bias_BHLM,
                is_causal=options.is_causal,
                scale=options.scale,
                enable_gqa=q_BHLK.shape[1] != k_BGMK.shape[1],
            )
        scores_shape = (*q_BHLK.shape[:3], k_BGMK.shape[2])
        # PyTorch draws in the same way, so with the same seed it keeps the same weights.
        is_kept_BHLM = q_BHLK.new_empty(scores_shape, dtype=torch.bool)
        is_kept_BHLM.bernoulli_(1 - options.dropout)
        ctx.save_for_backward(q_BHLK, k_BGMK, v_BGMK, bias_BHLM, is_kept_BHLM)
        bias_BHLM = finite_bias(bias_BHLM, options.is_causal, q_BHLK, k_BGMK)
        rows = a_few_rows(q_BHLK, k_BGMK, v_BGMK, bias_BHLM, is_kept_BHLM)
        with without_autocast():
            return torch.cat([attend_with_dropout(*x, options) for x in rows])

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


def attend_with_dropout(q_BHLK, k_BGMK, v_BGMK, bias_BHLM, is_kept_BHLM, options):
    """Return what attention returns if it keeps only these weights."""
    weights_BHLM = attention_weights(q_BHLK, k_BGMK, bias_BHLM, options.scale)
    weights_BHLM.mul_(is_kept_BHLM)
    n_pairs = k_BGMK.shape[0] * k_BGMK.shape[1]
    out_PQK = in_pairs(weights_BHLM.to(v_BGMK.dtype), n_pairs) @ in_pairs(v_BGMK, n_pairs)
    return out_PQK.div_(1 - options.dropout).view_as(q_BHLK)


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
    q_PQK = in_pairs(q_BHLK, n_pairs).to(wide) * scale
    scores_PQM = q_PQK @ in_pairs(k_BGMK, n_pairs).to(wide).mT
    scores_BHLM = scores_PQM.view(*q_BHLK.shape[:3], k_BGMK.shape[2])
    return scores_BHLM.add_(bias_BHLM).softmax(-1)


def in_pairs(x_BHLK, n_pairs):
    """Return (P, Q, K): the query heads that share a key/value head are queries of that head."""
    return x_BHLK.reshape(n_pairs, -1, x_BHLK.shape[-1])
