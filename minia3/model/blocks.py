"""The transformer block that T5 and LLaMA share, with (IA)^3 in its three places.

Attention is two calls. `kv(memory, context)` makes keys and values, and (IA)^3 scales them there.
`forward(x, kv, context)` queries them. Self-attention is `kv` of its own input, cross-attention is
`kv` of the encoder's output, and a cache is what `kv` is appended to. So no line here asks which
kind of attention or which architecture it is. What differs between architectures is a number or a
module at construction, or a tensor in the `Context` of a call (sequence_state.py).

Shapes: B batch, L query length, M memory length, D model, H query heads, G key/value heads, K head
width, F feed-forward. A packed batch (packing.py) consists of rows of one token: B counts tokens,
and L is 1. `Attention` unpacks such a batch, and packs the result. There, what may be packed has a
name without a suffix, because within one function B cannot count both tokens and rows.
"""

import torch
from torch import nn

from minia3.model.activations import ACTIVATIONS
from minia3.model.attend import attend
from minia3.model.gated_hidden import gated_hidden
from minia3.model.ia3 import IA3
from minia3.model.linear import Linear
from minia3.model.recompute import rms_norm


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight, in float32 or wider (Zhang & Sennrich, 1910.07467)."""

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


class Unscaled(nn.Module):
    """A place for a vector beyond the paper (`--sites`, see more_vectors.py). It scales nothing."""

    def forward(self, x, adapter):
        return x


def rotate(x_BHLK, rotation):
    """Turn each pair (x_i, x_{i + K/2}) by the angle of its position.

    RoPE, Su et al. 2021, arXiv 2104.09864, equation 34. rotation: cos and sin (B or 1, 1, L, K),
    the first half of sin negated; None for T5, which does not rotate. The entries of a pair are
    half a head apart, as in Hugging Face's files. In Meta's files and in GGUF they are neighbors,
    so the readers permute W_q and W_k.
    """
    if rotation is None:
        return x_BHLK
    cos_B1LK, sin_B1LK = rotation
    partner_BHLK = x_BHLK.roll(x_BHLK.shape[-1] // 2, dims=-1)
    return x_BHLK * cos_B1LK + partner_BHLK * sin_B1LK


class Attention(nn.Module):
    """(softmax(scale q (l_k * k)^T + bias) (l_v * v)) W_o, for n_heads query heads.

    Several of them may share a key/value head (Ainslie et al. 2023, arXiv 2305.13245). Without l_k
    and l_v: Vaswani et al. 2017, arXiv 1706.03762. scale: d_head ** -0.5 in LLaMA, 1 in T5.
    """

    def __init__(self, d_model, n_heads, n_kv_heads, d_head, scale, dropout, n_adapters):
        super().__init__()
        self.q = Linear(d_model, n_heads * d_head, bias=False)
        self.k = Linear(d_model, n_kv_heads * d_head, bias=False)
        self.v = Linear(d_model, n_kv_heads * d_head, bias=False)
        self.o = Linear(n_heads * d_head, d_model, bias=False)
        self.l_k = IA3(n_kv_heads * d_head, n_adapters, keeps_result=True)
        self.l_v = IA3(n_kv_heads * d_head, n_adapters, keeps_result=True)
        self.l_q = Unscaled()
        self.l_o = Unscaled()
        self.q_norm = nn.Identity()  # Qwen3 has a norm of each head here (llama.py)
        self.k_norm = nn.Identity()
        self.d_head = d_head
        self.scale = scale
        self.dropout = nn.Dropout(dropout)  # of the attention weights; `attend` applies it

    def kv(self, memory, context):
        """Return the keys and values (B, G, M, K) of `memory` (B, M, D), scaled by (IA)^3.

        The keys are scaled before they are normalized (Qwen3) and rotated, because only then does
        l_k fold into W_k.
        """
        k = self.l_k(self.k(memory), context.adapter_B)
        v = self.l_v(self.v(memory), context.adapter_B)

        k_BGMK = self.split_heads(context.packing.for_attention(k))
        v_BGMK = self.split_heads(context.packing.for_attention(v))
        return rotate(self.k_norm(k_BGMK), context.rotation), v_BGMK

    def forward(self, x, kv, context):
        """Return (B, L, D): what the queries of `x` find in `kv`, the keys and values so far."""
        k_BGMK, v_BGMK = kv
        q = self.l_q(self.q(x), context.adapter_B)

        q_BHLK = self.split_heads(context.packing.for_attention(q))
        q_BHLK = rotate(self.q_norm(q_BHLK), context.rotation)

        dropout = self.dropout.p if self.training else 0.0
        out_BHLK = attend(q_BHLK, k_BGMK, v_BGMK, context, dropout=dropout, scale=self.scale)
        out = context.packing.from_attention(out_BHLK.transpose(1, 2).flatten(2))
        return self.l_o(self.o(out), context.adapter_B)

    def split_heads(self, x):
        """Return x (B, L, heads * K) as (B, heads, L, K)."""
        return x.unflatten(-1, (-1, self.d_head)).transpose(1, 2)


class FeedForward(nn.Module):
    """(l_ff * act(x W_gate)) W_down, or, if gated, (l_ff * act(x W_gate) * (x W_up)) W_down.

    Gated: Shazeer 2020, arXiv 2002.05202. (W_gate has this name even if it gates nothing.) l_ff
    scales the input of the down projection, the only place that is right for ReLU, GEGLU and SwiGLU
    alike: scaling before a ReLU differs if an entry is negative, and some trained entries are.
    """

    def __init__(self, d_model, d_ff, activation, gated, dropout, n_adapters):
        super().__init__()
        self.gate = Linear(d_model, d_ff, bias=False)
        self.up = None
        self.down = Linear(d_ff, d_model, bias=False)
        self.l_ff = IA3(d_ff, n_adapters)  # T-Few's code has none in T5 v1.0
        if gated:
            self.up = Linear(d_model, d_ff, bias=False)
            self.l_gate = Unscaled()
            self.l_up = Unscaled()
        else:
            self.l_wi = Unscaled()  # T5 v1.0 calls the linear `gate` wi
        self.activation = ACTIVATIONS[activation]
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BLD, adapter_B):
        gate_BLF = self.gate(x_BLD)
        if self.up is None:
            # If no gradient is recorded, nothing else reads the gate, so it may be overwritten.
            in_place = not torch.is_grad_enabled()
            h_BLF = self.hidden(self.l_wi(gate_BLF, adapter_B), None, adapter_B, in_place)
        else:
            gate_BLF = self.l_gate(gate_BLF, adapter_B)
            up_BLF = self.l_up(self.up(x_BLD), adapter_B)
            # This is self.hidden(...), but it keeps two tensors for the backward pass, not four.
            h_BLF = gated_hidden(self, gate_BLF, up_BLF, adapter_B)
        return self.down(self.dropout(h_BLF))

    def hidden(self, gate_BLF, up_BLF, adapter_B, in_place):
        """Return the hidden activations (B, L, F), scaled by l_ff. up_BLF is None if not gated.

        in_place: whether this may overwrite gate_BLF.
        """
        h_BLF = self.activation.apply(gate_BLF, in_place)
        if up_BLF is not None:
            h_BLF = h_BLF.mul_(up_BLF) if in_place else h_BLF * up_BLF
        return self.l_ff(h_BLF, adapter_B)


class Block(nn.Module):
    """x + self-attention(x), then x + cross-attention(x) if there is any, then x + feed-forward(x).

    A norm comes before each part (pre-norm). `cross` is None in an encoder and in LLaMA.
    """

    def __init__(self, attn, cross, ffn, d_model, eps, dropout):
        super().__init__()
        self.attn_norm = RMSNorm(d_model, eps)
        self.attn = attn
        self.cross_norm = RMSNorm(d_model, eps) if cross else None
        self.cross = cross
        self.ffn_norm = RMSNorm(d_model, eps)
        self.ffn = ffn
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BLD, context, cache, kv_only=False):
        """Append keys and values to `cache`. Return the output (B, L, D), or `cache.kv` if kv_only.

        kv_only: stop after the keys and values, and return them. (Nothing reads the output of a
        prompt's last block. shard.py says why they must be returned.)
        """
        h_BLD = self.attn_norm(x_BLD)
        kv = cache.append(*self.attn.kv(h_BLD, context))
        if kv_only:
            return cache.kv
        x_BLD = x_BLD + self.dropout(self.attn(h_BLD, kv, context))

        if self.cross is not None:
            # Rows that share a source query it as one row, so its keys and values are not copied.
            n_sources = len(context.cross.source_lengths or cache.cross_kv[0])
            h = self.cross_norm(x_BLD).unflatten(0, (n_sources, -1)).flatten(1, 2)
            h = self.cross(h, cache.cross_kv, context.cross)
            x_BLD = x_BLD + self.dropout(h.view_as(x_BLD))

        h_BLD = self.ffn_norm(x_BLD)
        return x_BLD + self.dropout(self.ffn(h_BLD, context.adapter_B))


def blocks_of(model):
    """Return the blocks of all stacks of a model."""
    return [module for module in model.modules() if isinstance(module, Block)]
