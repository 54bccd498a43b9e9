"""To be written."""

import torch
import torch.nn.functional as F
from torch import nn

from minia3.model.ia3 import IA3
from minia3.model.recompute import Recomputed, RMSNormed, attention, keeps_less

ACTIVATIONS = {
    "relu": F.relu,
    "gelu": nn.GELU(approximate="tanh"),  # T5 v1.1's "gelu" is the tanh approximation
    "silu": F.silu,
}


class Embedding(nn.Embedding):
    def reset_parameters(self):
        if (
            not self.weight.is_meta
        ):  # there is nothing to fill, and there torch would load its compiler to do it: 1 s
            super().reset_parameters()


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight, in float32 at least (arXiv 1910.07467)."""

    def forward(self, x):
        return RMSNormed.apply(x, self.weight, self.eps) if keeps_less() else super().forward(x)


def rotate(x_BHLK, rotation):
    """Rotate each pair (x_i, x_{i + K/2}) by its position's angle (RoPE, arXiv 2104.09864, eq. 34).

    The two are half a head apart, as in Hugging Face's files. Meta's own files and GGUF pair neighbours (2i, 2i + 1):
    their W_q and W_k are permuted on the way in.
    """
    cos_B1LK, sin_B1LK = rotation
    low, high = x_BHLK.chunk(2, dim=-1)
    return x_BHLK * cos_B1LK + torch.cat((-high, low), dim=-1) * sin_B1LK


class Attention(nn.Module):
    """Attention with `n_kv_heads` key/value heads, each serving n_heads / n_kv_heads query heads (arXiv 2305.13245)."""

    def __init__(self, d_model, n_heads, n_kv_heads, d_head, scale, dropout, n_adapters):
        super().__init__()
        self.q = nn.Linear(d_model, n_heads * d_head, bias=False)
        self.k = nn.Linear(d_model, n_kv_heads * d_head, bias=False)
        self.v = nn.Linear(d_model, n_kv_heads * d_head, bias=False)
        self.o = nn.Linear(n_heads * d_head, d_model, bias=False)
        self.l_k = IA3(n_kv_heads * d_head, n_adapters)
        self.l_v = IA3(n_kv_heads * d_head, n_adapters)
        self.d_head, self.scale, self.grouped, self.dropout = (
            d_head,
            scale,
            n_heads != n_kv_heads,
            dropout,
        )

    def kv(self, memory, adapter, rotation=None, packing=None):
        """Keys and values (B, G, M, K) of what is attended to: scaled by l_k and l_v, then rotated.

        memory (B, M, D) and adapter (B,); or (T, 1, D) and (T,), packed.
        """
        k_BGMK = self.heads(
            self.l_k(self.k(memory), adapter), packing
        )  # before the rotation: so it folds into W_k
        v_BGMK = self.heads(self.l_v(self.v(memory), adapter), packing)
        return (k_BGMK if rotation is None else rotate(k_BGMK, rotation)), v_BGMK

    def forward(self, x, kv, bias_BHLM=None, causal=False, rotation=None, packing=None):
        k_BGMK, v_BGMK = kv
        q_BHLK = self.heads(self.q(x), packing)
        out_BHLK = attention(  # F.scaled_dot_product_attention
            q_BHLK if rotation is None else rotate(q_BHLK, rotation),
            k_BGMK,
            v_BGMK,
            attn_mask=bias_BHLM,
            is_causal=causal,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.scale,
            enable_gqa=self.grouped,
        )
        out = out_BHLK.transpose(1, 2).flatten(2)
        return self.o(packing.pack(out) if packing else out)

    def heads(self, x, packing):
        return (
            (packing.unpack(x) if packing else x).unflatten(-1, (-1, self.d_head)).transpose(1, 2)
        )


class FeedForward(nn.Module):
    """act(x W_gate) W_down, or (act(x W_gate) * x W_up) W_down where it is gated (arXiv 2002.05202).

    l_ff scales the input of the down projection: the one place that is right for ReLU, GEGLU and SwiGLU alike.
    """

    def __init__(self, d_model, d_ff, activation, gated, dropout, n_adapters):
        super().__init__()
        self.gate = nn.Linear(d_model, d_ff, bias=False)
        self.up = nn.Linear(d_model, d_ff, bias=False) if gated else None
        self.down = nn.Linear(d_ff, d_model, bias=False)
        self.l_ff = IA3(d_ff, n_adapters)
        self.activation, self.dropout = ACTIVATIONS[activation], nn.Dropout(dropout)

    def forward(self, x_BLD, adapter_B):
        gate_BLF, up_BLF = self.gate(x_BLD), None if self.up is None else self.up(x_BLD)
        if (
            self.up is None or not keeps_less() or torch.compiler.is_compiling()
        ):  # which keeps less by itself
            h_BLF = self.hidden(gate_BLF, up_BLF, adapter_B)
        else:  # the backward computes these products again: two tensors are kept for it in place of four
            h_BLF = Recomputed.apply(self.hidden, self.l_ff.scale, gate_BLF, up_BLF, adapter_B)
        return self.down(self.dropout(h_BLF))

    def hidden(self, gate_BLF, up_BLF, adapter_B):
        h_BLF = self.activation(gate_BLF)
        if up_BLF is not None:
            h_BLF = h_BLF * up_BLF
        return self.l_ff(h_BLF, adapter_B)


class Block(nn.Module):
    """x + self-attention, then + cross-attention where `cross` is present, then + feed-forward; norms come before."""

    def __init__(self, attn, cross, ffn, d_model, eps, dropout):
        super().__init__()
        self.attn_norm, self.attn = RMSNorm(d_model, eps), attn
        self.cross_norm, self.cross = (RMSNorm(d_model, eps), cross) if cross else (None, None)
        self.ffn_norm, self.ffn = RMSNorm(d_model, eps), ffn
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BLD, context, cache, asked=True):
        c, h_BLD = context, self.attn_norm(x_BLD)
        kv = cache.append(*self.attn.kv(h_BLD, c.adapter_B, c.rotation, c.packing))
        if not asked:  # what comes after the last keys and values of a prompt goes nowhere
            return None
        x_BLD = x_BLD + self.dropout(
            self.attn(h_BLD, kv, c.bias_BHLM, c.causal, c.rotation, c.packing)
        )
        if self.cross is not None:
            h = (
                self.cross_norm(x_BLD).unflatten(0, (len(cache.memory[0]), -1)).flatten(1, 2)
            )  # rows may share a source
            x_BLD = x_BLD + self.dropout(
                self.cross(h, cache.memory, c.memory_bias_B11M).view_as(x_BLD)
            )
        return x_BLD + self.dropout(self.ffn(self.ffn_norm(x_BLD), c.adapter_B))
