"""LLaMA: only a decoder, which reads the prompt and continues it.

Touvron et al. 2023, arXiv 2302.13971. The blocks are T5's without cross-attention. The feed-forward
is gated by SiLU, scores are divided by sqrt(d_head), and order comes from rotating queries and
keys. Several query heads may share one key/value head (from Llama 2 70B on, arXiv 2307.09288).
Mistral adds a window, Qwen2 biases of q, k and v, and Qwen3 norms of queries and keys.

Shapes: B batch, L query length, M memory length, D model, H query heads, K head width, P pairs of
entries in a head (K / 2), V vocabulary.
"""

import math
import warnings
from dataclasses import dataclass

import torch
from torch import nn

from minia3.model.blocks import Attention, Block, FeedForward, RMSNorm
from minia3.model.linear import Linear, linear
from minia3.model.packing import NO_PACKING, Packing
from minia3.model.sequence_state import (
    Cache,
    Context,
    State,
    check_bias,
    check_start,
    mask_to_bias,
)
from minia3.model.to_device import to_device


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a LLaMA, and what differs between the families."""

    d_model: int
    d_head: int
    d_ff: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    own_head: bool = True  # False: the head is the embedding
    qkv_bias: bool = False  # Qwen2: the linears q, k and v have a bias
    qk_norm: bool = False  # Qwen3: each head of the queries and of the keys has a norm
    window: int | None = None  # Mistral: a token sees itself and the window - 1 tokens before it
    eps: float = 1e-6
    rope_theta: float = 10000.0
    # Llama 3.1: (factor, low_freq_factor, high_freq_factor, original length)
    rope_scaling: tuple | None = None
    # The same scaling as GGUF stores it: the divisor of each frequency
    rope_factors: tuple | None = None
    # Tokens of the longest text that it was trained on; a longer one gives a warning
    max_length: int = 2048
    dropout: float = 0.0  # of the attention weights only
    pad_id: int | None = None
    eos_ids: tuple = (2,)
    bos_id: int | None = 1


def rotation_frequencies(config):
    """Return (P,) float32: the angle by which each pair of a head turns per position, in radians.

    For pair i it is theta ** (-2i / K). Llama 3.1 was stretched to longer texts: pairs that turn
    slowly over the original length are slowed down by `factor`, fast pairs are kept, and the pairs
    between them are blended, as in `_compute_llama3_parameters` of transformers.
    """
    exponent_P = torch.arange(0, config.d_head, 2).float() / config.d_head
    frequency_P = 1.0 / config.rope_theta**exponent_P
    if config.rope_factors is not None:
        return frequency_P / torch.tensor(config.rope_factors, dtype=torch.float32)
    if config.rope_scaling is None:
        return frequency_P
    factor, low, high, original_length = config.rope_scaling
    turns_P = original_length / (2 * math.pi / frequency_P)  # rounded as in transformers
    kept_P = ((turns_P - low) / (high - low)).clamp(0, 1)
    return kept_P * frequency_P + (1 - kept_P) * frequency_P / factor


def make_block(config, n_adapters):
    c = config
    scale = c.d_head**-0.5
    attn = Attention(c.d_model, c.n_heads, c.n_kv_heads, c.d_head, scale, c.dropout, n_adapters)
    if c.qkv_bias:
        attn.q = Linear(c.d_model, c.n_heads * c.d_head)
        attn.k = Linear(c.d_model, c.n_kv_heads * c.d_head)
        attn.v = Linear(c.d_model, c.n_kv_heads * c.d_head)
    if c.qk_norm:
        attn.q_norm = RMSNorm(c.d_head, c.eps)
        attn.k_norm = RMSNorm(c.d_head, c.eps)
    ffn = FeedForward(c.d_model, c.d_ff, "silu", gated=True, dropout=0.0, n_adapters=n_adapters)
    return Block(attn, cross=None, ffn=ffn, d_model=c.d_model, eps=c.eps, dropout=0.0)


class Llama(nn.Module):
    """A decoder with `n_adapters` adapters: `start` reads the prompt, and `step` continues it."""

    def __init__(self, config, n_adapters=1):
        super().__init__()
        self.config = config
        self.n_adapters = n_adapters
        self.row_generations = {}  # how many adapters a row had before: see adapter_rows.py
        self.has_warned = False  # of a text that is too long
        # 1 if sharded (shard.py): `start` must make a pass even for a prompt of one token.
        self.n_read_at_least = 0
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        blocks = [make_block(config, n_adapters) for _ in range(config.n_layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = RMSNorm(config.d_model, config.eps)
        self.head = None
        if config.own_head:
            self.head = Linear(config.d_model, config.vocab_size, bias=False)
        self.make_frequency("cpu")

    def make_frequency(self, device):
        """Compute the angle by which each pair turns per position, and put it on a device."""
        with torch.device("cpu"):  # so it has values even if the model is built on the meta device
            frequency = rotation_frequencies(self.config)
        self.register_buffer("frequency", frequency.to(device), persistent=False)

    def _apply(self, fn, recurse=True):
        """Do what `model.to(...)` or `model.half()` asks for, but compute the frequencies again.

        In bfloat16, they would be off by up to 1/512, which is two positions after 1,000 tokens.
        And `model.to_empty(...)` leaves arbitrary numbers in them, which no state dict replaces.
        """
        super()._apply(fn, recurse)
        self.make_frequency(self.frequency.device)
        return self

    def start(self, source, mask=None, adapter=None):
        """Read each prompt except for its last real token, and return the State.

        `state.start` is that last token, because the first `step` reads it. The padding may be
        anywhere. The arguments and the errors are those of T5.start.
        """
        adapter_B, adapter_numbers = check_start(source, mask, adapter, self)
        if mask is None:
            packing = NO_PACKING
            is_read_BL = None
            n_padding = ()
            read_BL = source[:, :-1]
            start_B1 = source[:, -1:]
        else:
            # Move the real tokens to the front, because then the causal mask is enough to hide the
            # padding from them.
            order_BM = mask.int().argsort(dim=1, descending=True, stable=True)
            source_BM = source.gather(1, to_device(order_BM, source.device))
            n_read_B1 = mask.sum(dim=1, keepdim=True) - 1  # so many tokens stand before the last
            last_B1 = to_device(n_read_B1, source.device)
            start_B1 = source_BM.gather(1, last_B1)
            n_read = n_read_B1.flatten().tolist()
            n_columns = max(self.n_read_at_least, *n_read)
            n_padding = tuple(n_columns - n for n in n_read)
            read_BL = source_BM[:, :n_columns]
            mask_BL = torch.arange(read_BL.shape[1], device=mask.device) < n_read_B1
            packing = Packing(mask_BL, source.device, self.blocks[0])
            is_read_BL = to_device(mask_BL, source.device)

        state = State(
            start=start_B1,
            adapter_B=adapter_B,
            caches=[Cache() for _ in self.blocks],
            token_M=source.new_zeros(0),
            owner_M=torch.zeros(0, dtype=torch.long, device="cpu"),
            adapter_numbers=adapter_numbers,
        )
        if read_BL.shape[1] > 0:  # a prompt of one token leaves the cache empty
            self.run_blocks(read_BL, state, packing, kv_only=True)
            state.end_step()
            for cache in state.caches:
                cache.kv = packing.padded_kv(cache.kv)
                cache.length = state.length  # for rows end to end, it was that of all rows
            state.mask_BM = is_read_BL  # for the tokens that follow
            state.n_padding = n_padding
            state.n_source = state.length
        return state

    def step(self, tokens, state):
        """Continue with tokens (B, L), and return the logits (B, L, V) of what follows each token.

        This advances `state`. The errors are those of T5.step.
        """
        logits_BLV = self.logits(self.run_blocks(tokens, state))
        state.end_step()
        return logits_BLV

    def run_blocks(self, tokens, state, packing=NO_PACKING, kv_only=False, keeps_kv=True):
        """Continue with tokens (B, L), and return what the head reads (B, L, D).

        packing: the Packing that leaves out the padding of a prompt. kv_only: fill the caches, and
        return None, because nothing else of a prompt is needed. The last block then stops after its
        keys and values. keeps_kv: False if no step follows, so that nothing reads a block's keys
        and values once the block has run.
        """
        tokens_BL = state.append_columns(tokens)
        self.warn_if_too_long(state.longest())
        x_BLD = self.embed(tokens_BL)
        context = self.context(tokens_BL, state, packing, x_BLD.dtype)
        x = packing.pack(x_BLD)
        last_block = self.blocks[-1]
        for block, cache in zip(self.blocks, state.caches, strict=True):
            x = block(x, context, cache, kv_only and block is last_block)
            if not keeps_kv:
                cache.kv = None
        if kv_only:
            return None
        state.check_adapters(self)  # another thread may have removed one meanwhile
        return packing.unpack(self.norm(x)).view(*tokens.shape, -1)

    def warn_if_too_long(self, length):
        """Warn, once for this model, if a sequence is longer than those that it was trained on."""
        if length > self.config.max_length and not self.has_warned:
            self.has_warned = True
            warnings.warn(
                f"a text of {length:,} tokens is beyond the {self.config.max_length:,} positions "
                "that the model was made for (max_position_embeddings): what it makes of the rest "
                "may be nonsense",
                stacklevel=2,
            )

    def context(self, tokens_BL, state, packing, dtype):
        """Return the Context of the tokens that were just appended to `state`."""
        n_queries = tokens_BL.shape[1]
        n_columns = len(state.token_M)
        position_BM = state.positions()
        position_BL = state.query_columns(position_BM, n_queries)

        # A bias hides the padding of a prompt that was read before, and what lies beyond the
        # window. It also replaces PyTorch's causal mask if several tokens continue a text, because
        # that mask is right only if L = M.
        window = self.config.window
        is_beyond_window = window is not None and state.length > window
        bias_BHLM = None
        if state.mask_BM is not None or is_beyond_window or 1 < n_queries < n_columns:
            check_bias(len(position_BM), n_queries, n_columns)
            is_seen_BLM = state.causal_mask(n_queries)[None]
            if state.mask_BM is not None:
                is_seen_BLM = is_seen_BLM & state.mask_BM[:, None, :]
            if is_beyond_window:
                distance_BLM = position_BL[:, :, None] - position_BM[:, None, :]
                is_seen_BLM = is_seen_BLM & (distance_BLM < window)
            bias_BHLM = mask_to_bias(is_seen_BLM.unsqueeze(1), dtype)
        return Context(
            packing.adapters(state.adapter_B),
            packing,
            bias_BHLM,
            is_causal=bias_BHLM is None and n_queries > 1,
            rotation=self.rotation(packing.positions_for_attention(position_BL), dtype),
        )

    def rotation(self, position_BL, dtype):
        """Return the cos and sin (B, 1, L, K) of each position's angles, from float32 angles.

        (x, y) turns into (x cos - y sin, y cos + x sin), so the first half of sin is negative.
        """
        angle_BLP = position_BL[..., None].float() * self.frequency
        cos_B1LP = angle_BLP.cos().to(dtype).unsqueeze(1)
        sin_B1LP = angle_BLP.sin().to(dtype).unsqueeze(1)
        return torch.cat((cos_B1LP, cos_B1LP), dim=-1), torch.cat((-sin_B1LP, sin_B1LP), dim=-1)

    def logits(self, x):
        """Return the logits (..., V) of what the head reads (..., D)."""
        return linear(x, self.head_weight)

    def check_lengths(self, n_source, n_targets):
        """Raise ValueError if texts of these lengths need too large a bias of attention.

        n_source: tokens of the prompt. n_targets: a list, the tokens of each target. A text is read
        with PyTorch's causal mask and needs no bias, unless it is longer than the window. Several
        choices need a bias, because they follow a prompt that was read before.
        """
        longest = max(n_targets, default=0)
        n_tokens = n_source + longest
        window = self.config.window
        if window is not None and n_tokens > window:
            check_bias(n_tokens, n_tokens)
        if len(n_targets) > 1:
            check_bias(longest, n_tokens)

    @property
    def head_weight(self):
        """Return the weight (V, D) of the head: its own, or the embedding's."""
        return self.embed.weight if self.head is None else self.head.weight
