"""Attention with a backward pass of plain products, for training on short texts on a CPU.

The forward pass is PyTorch's. Its backward pass takes seven times as long as that, in 16-bit
dtypes. For texts of up to about 200 tokens, the products below take a third to nine tenths of its
time, and they keep less for it: neither the output nor the sums of the softmax.

    S = scale q k^T + bias                  W = softmax(S)           out = W v
    dv = W^T dout                           dW = dout v^T
    dS = W * (dW - sum(W * dW))             dq = scale dS k          dk = scale dS^T q

(Dao et al. 2022, arXiv 2205.14135, appendix B.2. Here dx is the gradient of x.) The backward pass
computes W again, for a few rows at a time, so that it stays in a core's cache.

Shapes: B batch, L query length, M memory length, H query heads, G key/value heads, N query heads
per key/value head (H / G), Q queries of N heads (N * L), K head width, P pairs of a row and a
key/value head (B * G).
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# Scores of a row, or of a few rows at once: 1.6 MB in float32. With more, PyTorch is faster.
MOST_SCORES = 400_000


def has_short_texts(q_BHLK, k_BGMK, bias_BHLM, dropout):
    """Return whether `attend_to_short_texts` can compute this, and faster than PyTorch.

    It has no dropout, and no gradient of the bias, which only full fine-tuning of a T5 asks for. A
    plan of memory (memory_plan.py) runs on tensors of another type, and gets what a GPU keeps.
    """
    is_plain = type(q_BHLK) is torch.Tensor and not torch.compiler.is_compiling()
    if not is_plain or not torch.is_grad_enabled() or dropout:
        return False
    if bias_BHLM is not None and bias_BHLM.requires_grad:
        return False
    is_narrow = q_BHLK.dtype in (torch.bfloat16, torch.float16)
    is_short = 0 < n_scores_of_row(q_BHLK, k_BGMK) <= MOST_SCORES
    return is_narrow and is_short and q_BHLK.device.type == "cpu"


def n_scores_of_row(q_BHLK, k_BGMK):
    return q_BHLK[0, :, :, 0].numel() * k_BGMK.shape[2]


def attend_to_short_texts(q_BHLK, k_BGMK, v_BGMK, bias_BHLM, is_causal, scale):
    """Return what `fused` in attend.py returns, without dropout."""
    return _ShortAttention.apply(q_BHLK, k_BGMK, v_BGMK, bias_BHLM, is_causal, scale)


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BHLK, k_BGMK, v_BGMK, bias_BHLM, is_causal, scale):
        ctx.save_for_backward(q_BHLK, k_BGMK, v_BGMK, bias_BHLM)
        ctx.is_causal = is_causal
        ctx.scale = scale
        return F.scaled_dot_product_attention(
            q_BHLK,
            k_BGMK,
            v_BGMK,
            attn_mask=bias_BHLM,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=q_BHLK.shape[1] != k_BGMK.shape[1],
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BHLK):
        q_BHLK, k_BGMK, v_BGMK, bias_BHLM = ctx.saved_tensors
        # Each core has a cache of its own.
        n_at_once = torch.get_num_threads() * MOST_SCORES // n_scores_of_row(q_BHLK, k_BGMK)
        bias_BHLM = finite_bias(bias_BHLM, ctx.is_causal, q_BHLK, k_BGMK)
        tensors = (q_BHLK, k_BGMK, v_BGMK, grad_BHLK, bias_BHLM)
        rows = zip(*(x.split(n_at_once) for x in tensors), strict=True)
        gradients = [gradients_of_rows(*x, ctx.scale) for x in rows]
        grad_q, grad_k, grad_v = map(torch.cat, zip(*gradients, strict=True))
        return grad_q, grad_k, grad_v, None, None, None


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


def gradients_of_rows(q_BHLK, k_BGMK, v_BGMK, grad_BHLK, bias_BHLM, scale):
    """Return the gradients of queries, keys and values, for that of the output."""
    n_rows, n_heads, n_queries, d_head = q_BHLK.shape
    n_columns = k_BGMK.shape[2]

    # The query heads that share a key/value head are queries of that head.
    n_pairs = n_rows * k_BGMK.shape[1]
    q_PQK = q_BHLK.reshape(n_pairs, -1, d_head)
    grad_PQK = grad_BHLK.reshape(n_pairs, -1, d_head)
    k_PMK = k_BGMK.reshape(n_pairs, n_columns, d_head)
    v_PMK = v_BGMK.reshape(n_pairs, n_columns, d_head)

    # Scores and weights are float32 or wider. What is multiplied by 16-bit tensors is rounded.
    wide = torch.promote_types(q_BHLK.dtype, torch.float32)
    scores_PQM = (q_PQK.to(wide) * scale) @ k_PMK.to(wide).mT
    scores_PQM.view(n_rows, n_heads, n_queries, n_columns).add_(bias_BHLM)
    weights_PQM = scores_PQM.softmax(-1)
    grad_v_PMK = weights_PQM.to(v_PMK.dtype).mT @ grad_PQK

    grad_weights_PQM = (grad_PQK @ v_PMK.mT).to(wide)
    grad_scores_PQM = torch._softmax_backward_data(grad_weights_PQM, weights_PQM, -1, wide)
    grad_scores_PQM = grad_scores_PQM.to(q_PQK.dtype)
    grad_q_PQK = (grad_scores_PQM @ k_PMK).mul_(scale)
    grad_k_PMK = (grad_scores_PQM.mT @ q_PQK).mul_(scale)
    return grad_q_PQK.view_as(q_BHLK), grad_k_PMK.view_as(k_BGMK), grad_v_PMK.view_as(v_BGMK)
