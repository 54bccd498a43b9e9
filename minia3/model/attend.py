"""Attention itself: softmax(scale * q k^T + bias) v.

PyTorch computes it (`F.scaled_dot_product_attention`), usually in one call. On a CPU, rows that lie
end to end, without their padding, take one call each (packing.py). And there, PyTorch's kernel is
slow for some kinds of attention, which are plain products instead:

- a single query per row, as in decoding: in 16-bit dtypes (but not in bfloat16 on a processor with
  tiles for it, Intel's AMX), and in float32 for many rows;
- short texts in bfloat16, and dropout (plain_attention.py).

Shapes: B batch, L query length, M memory length, H query heads, G key/value heads, N query heads
per key/value head (H / G), Q queries of N heads (N * L), K head width, T real tokens of a batch.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from minia3.model.plain_attention import attend_by_products, products_are_faster
from minia3.model.processor import HAS_TILES, TORCH

LEAST_ROWS = 16  # with this many rows or more, plain products are faster in float32

ALIGNMENT = 8  # a GPU reads this many entries of a bias at once

# From torch 2.9 on, PyTorch prefers cuDNN's attention on an H100, H200 or B200.
PREFERS_CUDNN = TORCH >= (2, 9)
OTHER_KERNELS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def attend(q_BHLK, k_BGMK, v_BGMK, context, *, dropout, scale):
    """Return (B, H, L, K): for each query, the values weighted by its scores.

    H must be a multiple of G. context: its `bias_BHLM` is added to the scores, and must have the
    dtype of the queries, because on a CPU another dtype is silently misread. Its `is_causal` asks
    for PyTorch's causal mask, which is right only if L = M. If it has lengths, rows lie end to end
    (packing.py): queries, keys and values (1, heads, T, K) in self-attention; only keys and values
    in cross-attention.
    """
    if context.packing.lengths is not None:
        return attend_within_rows(q_BHLK, k_BGMK, v_BGMK, context, dropout, scale)
    if context.source_lengths is not None:
        return attend_to_sources(q_BHLK, k_BGMK, v_BGMK, context.source_lengths, dropout, scale)
    bias_BHLM = context.bias_BHLM
    if is_decoding_on_cpu(q_BHLK, dropout):
        return attend_with_one_query(q_BHLK, k_BGMK, v_BGMK, bias_BHLM, scale)
    return fused(q_BHLK, k_BGMK, v_BGMK, bias_BHLM, context.is_causal, dropout, scale)


def attend_within_rows(q_1HTK, k_1GTK, v_1GTK, context, dropout, scale):
    """Return what `attend` returns for self-attention, if the rows lie end to end.

    On a CPU, long rows take about as long one by one as all at once, and here they have no padding.
    Short rows would take longer one by one: see LEAST_COLUMNS in packing.py.
    """
    lengths = context.packing.lengths
    # These are pieces and not x[:, :, a:b], whose gradient would be all zeros but for one row.
    pieces = [x.split(lengths, dim=2) for x in (q_1HTK, k_1GTK, v_1GTK)]
    rows = []
    for n, q, k, v in zip(lengths, *pieces, strict=True):
        bias = context.bias_BHLM
        if bias is not None:
            bias = bias[:, :, :n, :n]  # for all rows alike, because each begins at position 0
        rows.append(fused(q, k, v, bias, context.is_causal, dropout, scale))
    return torch.cat(rows, dim=2)


def attend_to_sources(q_BHLK, k_1GTK, v_1GTK, lengths, dropout, scale):
    """Return what `attend` returns for cross-attention, if the sources lie end to end.

    Row b of the queries sees all of source b, which has lengths[b] tokens. A bias is not needed,
    because there is no padding to hide.
    """
    pieces = (q_BHLK.split(1), k_1GTK.split(lengths, dim=2), v_1GTK.split(lengths, dim=2))
    rows = [fused(q, k, v, None, False, dropout, scale) for q, k, v in zip(*pieces, strict=True)]
    return torch.cat(rows)


def is_decoding_on_cpu(q_BHLK, dropout):
    """Return whether `attend_with_one_query` can compute this, and is faster than PyTorch.

    `attend_with_one_query` has no dropout, and records no gradient.
    """
    is_plain = not (dropout or torch.is_grad_enabled() or torch.compiler.is_compiling())
    n_rows, _, n_queries, _ = q_BHLK.shape
    is_slow = q_BHLK.dtype == torch.float16
    if q_BHLK.dtype == torch.bfloat16:
        is_slow = not HAS_TILES  # with tiles, PyTorch takes a quarter to a half of our time
    if q_BHLK.dtype == torch.float32:
        is_slow = n_rows >= LEAST_ROWS
    return is_plain and is_slow and n_queries == 1 and q_BHLK.device.type == "cpu"


def attend_with_one_query(q_BH1K, k_BGMK, v_BGMK, bias, scale):
    """Return what `attend` returns for one query per row.

    In bfloat16, without tiles, this takes a half to a ninth of the time of PyTorch's kernel, and in
    float32, with many rows, mostly two thirds to nine tenths.

    The N query heads that share a key/value head become N queries of that head, so a single matrix
    product serves them all. `bias` may differ between query heads only if N = 1 (T5). A mask is the
    same for all heads, and broadcasts over N.
    """
    n_rows, n_kv_heads, _, _ = k_BGMK.shape
    q_BGNK = q_BH1K.reshape(n_rows, n_kv_heads, -1, q_BH1K.shape[3])
    scores_BGNM = (q_BGNK.float() * scale) @ k_BGMK.float().mT
    if bias is not None:
        scores_BGNM.add_(bias)
    weights_BGNM = scores_BGNM.softmax(-1)
    if n_rows == 1:  # without oneDNN, bfloat16 is slower here; with it, only long texts would gain
        v_BGMK = v_BGMK.float()
    out_BGNK = weights_BGNM.to(v_BGMK.dtype) @ v_BGMK
    return out_BGNK.to(q_BH1K.dtype).view_as(q_BH1K)


def fused(q_BHLK, k_BGMK, v_BGMK, bias_BHLM, is_causal, dropout, scale):
    """Return what `attend` returns, by PyTorch's function or by ours, whichever is faster."""
    # An `if`, because an older torch.compile does not take a comparison of sizes as a bool.
    if products_are_faster(q_BHLK, k_BGMK, bias_BHLM, dropout):
        return attend_by_products(q_BHLK, k_BGMK, v_BGMK, bias_BHLM, is_causal, dropout, scale)
    has_groups = False
    if q_BHLK.shape[1] != k_BGMK.shape[1]:
        has_groups = True
    if has_groups and needs_equal_heads(q_BHLK, bias_BHLM):
        return ungrouped(q_BHLK, k_BGMK, v_BGMK, bias_BHLM, is_causal, dropout, scale)
    options = {
        "attn_mask": bias_BHLM,
        "is_causal": is_causal,
        "dropout_p": dropout,
        "scale": scale,
        "enable_gqa": has_groups,
    }
    if prefers_cudnn(q_BHLK.device):
        with without_cudnn():
            return F.scaled_dot_product_attention(q_BHLK, k_BGMK, v_BGMK, **options)
    return F.scaled_dot_product_attention(q_BHLK, k_BGMK, v_BGMK, **options)


def prefers_cudnn(device):
    """Return whether PyTorch may choose cuDNN's attention before its own."""
    return PREFERS_CUDNN and device.type == "cuda"


def without_cudnn():
    """Return a context in which PyTorch does not choose cuDNN's attention.

    cuDNN prepares itself anew for each shape, half a second forward and half a second backward, and
    the shapes of our batches differ, as does that of each token that is decoded. And cuDNN's
    gradients under a bias may be NaN if all scores of a query are below -88
    (pytorch/pytorch#196678, and NVIDIA/cudnn-frontend#1072 after that was fixed).
    """
    if torch.compiler.is_compiling():
        return sdpa_kernel(OTHER_KERNELS)  # which torch.compile understands, unlike the switch
    return cudnn_switched_off()


@contextmanager
def cudnn_switched_off():
    """Do what `sdpa_kernel` does for a single kernel, in a sixteenth of its time.

    The others stay as the user has chosen them. The switch is for the whole process. If two threads
    meet here, one of them may still get cuDNN's attention, or it may stay switched off.
    """
    was_on = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was_on)


def needs_equal_heads(q_BHLK, bias_BHLM):
    """Return whether PyTorch may have no fused attention for heads that share a key/value head.

    On a GPU, only flash attention has it in all releases, and takes neither a bias nor float32.
    Without a kernel, PyTorch would keep the scores of all pairs of tokens, in float32.
    """
    is_on_gpu = q_BHLK.device.type != "cpu"
    return is_on_gpu and (bias_BHLM is not None or q_BHLK.dtype == torch.float32)


def ungrouped(q_BHLK, k_BGMK, v_BGMK, bias_BHLM, is_causal, dropout, scale):
    """Return what `fused` returns, with as many query heads as key/value heads.

    The queries of the N heads that share a key/value head become Q = N * L queries of one head. So
    the bias must be the same for all heads, and is repeated N times. With PyTorch's causal mask,
    which does not suit such queries, keys and values are repeated instead.
    """
    n_heads_per_kv_head = q_BHLK.shape[1] // k_BGMK.shape[1]
    if is_causal:
        k_BHMK = k_BGMK.repeat_interleave(n_heads_per_kv_head, dim=1)
        v_BHMK = v_BGMK.repeat_interleave(n_heads_per_kv_head, dim=1)
        return fused(q_BHLK, k_BHMK, v_BHMK, bias_BHLM, is_causal, dropout, scale)
    q_BGQK = q_BHLK.unflatten(1, (-1, n_heads_per_kv_head)).flatten(2, 3)
    bias = bias_BHLM
    if bias is not None and q_BHLK.shape[2] > 1:  # a bias of one row serves any number of queries
        bias = aligned(bias.unsqueeze(2).expand(-1, -1, n_heads_per_kv_head, -1, -1)).flatten(2, 3)
    out_BGQK = fused(q_BGQK, k_BGMK, v_BGMK, bias, is_causal, dropout, scale)
    return out_BGQK.reshape(q_BHLK.shape)


def zero_bias(shape, dtype, device):
    """Return zeros (..., M) in the layout that fused attention needs of a bias on a GPU.

    There the entries of a row must be neighbors, or PyTorch does not fuse attention. And a row must
    begin at a multiple of ALIGNMENT, or PyTorch copies the bias in each block, and the backward
    pass keeps all the copies. A CPU takes any layout.
    """
    n_columns = shape[-1]
    n_spare = 0
    if device.type != "cpu":
        n_spare = -n_columns % ALIGNMENT
    zeros = torch.zeros(*shape[:-1], n_columns + n_spare, dtype=dtype, device=device)
    return zeros[..., :n_columns]


def aligned(bias):
    """Return a bias (..., M) in the layout of `zero_bias`."""
    if bias.device.type == "cpu":
        return bias
    return zero_bias(bias.shape, bias.dtype, bias.device).copy_(bias)
