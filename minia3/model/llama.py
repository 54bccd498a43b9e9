"""To be written."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from minia3.model.blocks import Attention, Block, Embedding, FeedForward, RMSNorm
from minia3.model.packing import Packing
from minia3.model.sequence_state import Cache, Context, State, check_start, mask_to_bias, of_rows


@dataclass(frozen=True)
class LlamaConfig:
    d_model: int
    d_head: int
    d_ff: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    own_head: bool = True  # False: the head is the embedding
    eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: tuple | None = (
        None  # Llama 3.1: (factor, low_freq_factor, high_freq_factor, original length)
    )
    rope_factors: tuple | None = (
        None  # GGUF's form of the same: what each inverse frequency is divided by
    )
    max_length: int = 2048
    dropout: float = 0.0  # of the attention alone
    pad_id: int | None = None
    eos_ids: tuple = (2,)
    bos_id: int | None = 1


def inverse_frequencies(config):
    """(P,) float32: how far each pair of a head turns per position, in radians.

    theta ** (-2i / K). Llama 3.1 was stretched to long texts: pairs that turn slowly over the original length are
    slowed down by `factor`, fast ones are kept, and those between are blended.
    """
    frequency_P = 1.0 / config.rope_theta ** (
        torch.arange(0, config.d_head, 2).float() / config.d_head
    )
    if config.rope_factors is not None:
        return frequency_P / torch.tensor(config.rope_factors)
    if config.rope_scaling is None:
        return frequency_P
    factor, low, high, original = config.rope_scaling
    turns_P = original * frequency_P / (2 * math.pi)
    kept_P = ((turns_P - low) / (high - low)).clamp(0, 1)
    return kept_P * frequency_P + (1 - kept_P) * frequency_P / factor


class Llama(nn.Module):
    def __init__(self, config, n_adapters=1):
        super().__init__()
        self.config, self.n_adapters, c = config, n_adapters, config
        self.embed = Embedding(c.vocab_size, c.d_model)

        def block():
            attn = Attention(
                c.d_model, c.n_heads, c.n_kv_heads, c.d_head, c.d_head**-0.5, c.dropout, n_adapters
            )
            ffn = FeedForward(c.d_model, c.d_ff, "silu", True, 0.0, n_adapters)
            return Block(attn, cross=None, ffn=ffn, d_model=c.d_model, eps=c.eps, dropout=0.0)

        self.blocks = nn.ModuleList(block() for _ in range(c.n_layers))
        self.norm = RMSNorm(c.d_model, c.eps)
        self.head = nn.Linear(c.d_model, c.vocab_size, bias=False) if c.own_head else None
        with torch.device("cpu"):  # real numbers even where the model is built on the meta device
            self.register_buffer("frequency", inverse_frequencies(c), persistent=False)

    def start(self, source, mask=None, adapter=None):
        """Read the prompt up to each row's last real token, wherever the padding lies: -> State.

        `state.start` is that last token, which is not yet in the cache. Arguments and errors as T5's.
        """
        adapter_B = check_start(source, mask, adapter, self.n_adapters)
        start_B1, read_BL, mask_BL, packing = source[:, -1:], source[:, :-1], None, None
        if (
            mask is not None
        ):  # real tokens first: then the causal mask alone keeps them from seeing the padding
            order_BM = mask.int().argsort(dim=1, descending=True, stable=True)
            source_BM, last_B1 = (
                source.gather(1, order_BM.to(source.device)),
                mask.sum(dim=1, keepdim=True) - 1,
            )
            start_B1, read_BL = (
                source_BM.gather(1, last_B1.to(source.device)),
                source_BM[:, : int(last_B1.max())],
            )
            mask_BL = torch.arange(read_BL.shape[1], device=mask.device) < last_B1
            packing, mask_BL = Packing(mask_BL, source.device), mask_BL.to(source.device)
        state = State(start_B1, adapter_B, [Cache() for _ in self.blocks], source.new_zeros(2, 0))
        if read_BL.shape[1] > 0:  # a prompt of one token leaves the cache empty
            self.read(read_BL, state, packing, asked=False)
            state.mask_BM = mask_BL
        return state

    def step(self, tokens, state):
        """Go on with tokens (B, L): -> logits (B, L, V) of the token after each; `state` moves on."""
        return self.logits(self.read(tokens, state))

    def logits(self, x, weight=None):
        return F.linear(x, (self.head or self.embed).weight if weight is None else weight)

    def read(self, tokens, state, packing=None, asked=True):
        tokens_BL = state.fold(tokens)
        x, n = self.embed(tokens_BL), tokens_BL.shape[1]
        position_BL, bias_BHLM = state.column_2M[:1, -n:], None
        if state.mask_BM is not None:  # padded columns neither count as positions nor are seen
            position_BL = position_BL - (~state.mask_BM).sum(dim=1, keepdim=True)
            state.mask_BM = torch.cat(
                (state.mask_BM, torch.ones_like(tokens_BL, dtype=torch.bool)), dim=1
            )
            bias_BHLM = mask_to_bias(
                (state.mask_BM[:, None, :] & state.seen(n)).unsqueeze(1), x.dtype
            )
        elif 1 < n < state.column_2M.shape[1]:
            bias_BHLM = mask_to_bias(state.seen(n)[None, None], x.dtype)
        adapter, rotation = state.adapter_B, self.rotation(position_BL, x.dtype)
        x, adapter = (packing.pack(x), of_rows(adapter, packing.row_T)) if packing else (x, adapter)
        context = Context(
            adapter, bias_BHLM, bias_BHLM is None and n > 1, rotation, packing=packing
        )
        for block, cache in zip(self.blocks, state.caches, strict=True):
            x = block(x, context, cache, asked or block is not self.blocks[-1])
        return self.norm(x).view(*tokens.shape, -1) if asked else None

    def rotation(self, position_BL, dtype):
        """cos and sin (B, 1, L, K) of every position's angles: made in float32, then cast."""
        angle_BLP = position_BL[..., None].float() * self.frequency.float()
        angle_B1LK = torch.cat((angle_BLP, angle_BLP), dim=-1).unsqueeze(1)
        return angle_B1LK.cos().to(dtype), angle_B1LK.sin().to(dtype)
