"""T5: an encoder that reads the source, and a decoder that writes the target.

Raffel et al. 2019, arXiv 1910.10683. Three things differ from other transformers:

- Scores are not divided by sqrt(d_head), because T5's initialization makes up for it.
- The order of tokens comes from a learned bias that is added to the scores: one number per head and
  bucket of distances. The table of the first block serves all blocks of a stack, except in umT5,
  which has a table in every block.
- In v1.0 the head is the embedding, and the decoder's output is scaled by d_model ** -0.5 before
  the head. v1.1 (flan-T5, T0, mT5) does not scale, and has its own head.

Shapes: B batch, L query length, M memory length, D model, H heads, V vocabulary.
"""

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import nn

from minia3.model.attend import aligned
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
class T5Config:
    """The sizes of a T5, and what differs between its versions."""

    d_model: int
    d_head: int  # n_heads * d_head need not be d_model: see t5-3b and t5-11b
    d_ff: int
    n_layers: int  # of the encoder
    n_decoder_layers: int
    n_heads: int
    vocab_size: int
    activation: str = "relu"
    gated: bool = False
    own_head: bool = False  # False: the head is the embedding
    scale_logits: bool = True  # as in v1.0
    own_positions: bool = False  # True: each block has its own table of biases, as in umT5
    n_buckets: int = 32
    max_distance: int = 128
    dropout: float = 0.1
    eps: float = 1e-6
    pad_id: int = 0
    eos_ids: tuple = (1,)
    start_id: int = 0


class Stack(nn.Module):
    """The encoder or the decoder: blocks, a final norm, and tables of position biases."""

    def __init__(self, config, n_layers, is_decoder, n_adapters):
        super().__init__()
        blocks = [make_block(config, is_decoder, n_adapters) for _ in range(n_layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = RMSNorm(config.d_model, config.eps)
        self.dropout = nn.Dropout(config.dropout)
        n_tables = n_layers if config.own_positions else 1
        tables = [nn.Embedding(config.n_buckets, config.n_heads) for _ in range(n_tables)]
        self.bias_tables = nn.ModuleList(tables)
        self.max_distance = config.max_distance
        self.is_bidirectional = not is_decoder

    def forward(self, x, context, distance_LM, caches=None):
        """Return the output, and append keys and values to the blocks' caches.

        x, output: (B, L, D); or packed, (real tokens, 1, D). caches: one per block, or None in an
        encoder, whose keys and values nobody reads again.
        context: its bias is the mask, to which the biases of positions are added here.
        distance_LM: the position of each key minus the position of each query.
        """
        bucket_LM = self.bucket(distance_LM)
        mask_bias = context.bias_BHLM
        x = self.dropout(x)
        for i, block in enumerate(self.blocks):
            cache = Cache() if caches is None else caches[i]
            # With gradients, this may make the source's keys and values now: see `cross_cache`.
            cache.ensure_cross_kv()
            # A block without a table uses the bias of the block before it.
            if i < len(self.bias_tables):
                context = replace(context, bias_BHLM=self.bias(i, bucket_LM, mask_bias))
            x = block(x, context, cache)
        return self.dropout(self.norm(x))

    def bucket(self, distance_LM):
        """Return the bucket (L, M) of each distance in this stack: see `distance_bucket`."""
        n_buckets = self.bias_tables[0].num_embeddings
        return distance_bucket(distance_LM, self.is_bidirectional, n_buckets, self.max_distance)

    def bias(self, i, bucket_LM, mask_bias):
        """Return (1 or B, H, L, M): the biases of table i, plus `mask_bias` if there is one."""
        bias_BHLM = self.bias_tables[i](bucket_LM).permute(2, 0, 1).unsqueeze(0)
        if mask_bias is not None:
            bias_BHLM = bias_BHLM + mask_bias
        return aligned(bias_BHLM)  # once for all blocks


def make_block(config, is_decoder, n_adapters):
    c = config
    n_kv_heads = c.n_heads  # none is shared
    scale = 1.0  # the scores are not scaled
    sizes = (c.d_model, c.n_heads, n_kv_heads, c.d_head, scale, c.dropout, n_adapters)
    attn = Attention(*sizes)
    cross = Attention(*sizes) if is_decoder else None
    ffn = FeedForward(c.d_model, c.d_ff, c.activation, c.gated, c.dropout, n_adapters)
    return Block(attn, cross, ffn, c.d_model, c.eps, c.dropout)


def distance_bucket(distance_LM, is_bidirectional, n_buckets, max_distance):
    """Return the bucket (L, M) of each distance (position of the key minus position of the query).

    Half of the buckets hold one distance each; the others grow in logarithmic steps up to
    max_distance. The encoder divides the buckets between both directions; the decoder only looks
    back. This equals `_relative_position_bucket` of Mesh TensorFlow's T5, down to its float32
    logarithm.
    """
    if is_bidirectional:
        n_buckets = n_buckets // 2
        first_bucket = (distance_LM > 0) * n_buckets  # the second half: keys after the query
        distance_LM = distance_LM.abs()
    else:
        first_bucket = 0
        distance_LM = (-distance_LM).clamp(min=0)
    n_exact = n_buckets // 2
    ratio_LM = torch.log(distance_LM.clamp(min=1).float() / n_exact)
    ratio_LM = ratio_LM / math.log(max_distance / n_exact)
    far_LM = (n_exact + (ratio_LM * (n_buckets - n_exact)).long()).clamp(max=n_buckets - 1)
    return first_bucket + torch.where(distance_LM < n_exact, distance_LM, far_LM)


def cross_cache(cross, memory, context):
    """Return a Cache with the keys and values that cross-attention makes of the encoder's output.

    With gradients, they are made just before their block runs. The backward pass goes the other
    way, so it holds the gradients of one block's keys and values at a time, and not those of all
    blocks.
    """
    if not torch.is_grad_enabled():
        return Cache(cross_kv=cross.kv(memory, context))

    # All steps share them, and they have gradients even if the first step has none. Several caches
    # may have this function: `State.repeat` copies a cache, often before its `cross_kv` is made. So
    # the function remembers what it has made, or each copy would make its own.
    @functools.cache
    def make_cross_kv():
        with torch.inference_mode(False), torch.enable_grad():
            return cross.kv(memory, context)

    return Cache(make_cross_kv=make_cross_kv)


class T5(nn.Module):
    """An encoder-decoder with `n_adapters` adapters: `start` encodes, and `step` decodes."""

    def __init__(self, config, n_adapters=1):
        super().__init__()
        self.config = config
        self.n_adapters = n_adapters
        self.row_generations = {}  # how many adapters a row had before: see adapter_rows.py
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config, config.n_layers, is_decoder=False, n_adapters=n_adapters)
        n_decoder_layers = config.n_decoder_layers
        self.decoder = Stack(config, n_decoder_layers, is_decoder=True, n_adapters=n_adapters)
        self.head = None
        if config.own_head:
            self.head = Linear(config.d_model, config.vocab_size, bias=False)

    def start(self, source, mask=None, adapter=None):
        """Encode the source, and return the State from which `step` writes the target.

        source: (B, M) ids. mask: (B, M) bool, True = real; None: all of it. adapter: None (row 0 of
        the vectors), an int for all rows, or (B,) long. `state.start` is the decoder's start token.
        Raise ValueError if the source or a row of it is empty or too long, if the mask is not of
        its shape, or if an adapter does not exist.
        """
        adapter_B, adapter_numbers = check_start(source, mask, adapter, self)

        x = self.embed(source)
        packing = NO_PACKING
        memory_bias_B11M = None
        if mask is not None:
            packing = Packing(mask, source.device, self.encoder.blocks[0])
            mask_B11M = to_device(mask, source.device)[:, None, None, :]
            memory_bias_B11M = mask_to_bias(mask_B11M, x.dtype)

        mask_bias = memory_bias_B11M
        if packing.lengths is not None:
            mask_bias = None  # rows that lie end to end have no padding to hide
        n_biases = 1 if mask_bias is None else len(source)  # without a mask, one serves all rows
        check_bias(n_biases, self.config.n_heads, source.shape[1], source.shape[1])
        context = Context(packing.adapters(adapter_B), packing, mask_bias)
        position_M = torch.arange(source.shape[1], device=source.device)
        distance_MM = position_M - position_M[:, None]
        memory = self.encoder(packing.pack(x), context, distance_MM)

        caches = [cross_cache(block.cross, memory, context) for block in self.decoder.blocks]
        return State(
            start=torch.full_like(source[:, :1], self.config.start_id),
            adapter_B=adapter_B,
            caches=caches,
            token_M=source.new_zeros(0),
            owner_M=torch.zeros(0, dtype=torch.long, device="cpu"),
            adapter_numbers=adapter_numbers,
            memory_bias_B11M=memory_bias_B11M,
            source_packing=packing,
        )

    def step(self, tokens, state):
        """Append tokens (B, L) to the target, and return the logits (B, L, V) after each token.

        This advances `state`. Raise ValueError if there are no tokens, too many, or tokens for
        another number of rows, or if the last step of `state` failed halfway.
        """
        logits_BLV = self.logits(self.run_blocks(tokens, state))
        state.end_step()
        return logits_BLV

    def run_blocks(self, tokens, state):
        """Append tokens (B, L) to the target, and return what the head reads (B, L, D)."""
        tokens_BL = state.append_columns(tokens)
        n_queries = tokens_BL.shape[1]
        if n_queries == 1 and not torch.is_grad_enabled():
            state.prepare_decoding()
        check_bias(self.config.n_heads, n_queries, len(state.token_M))
        x_BLD = self.embed(tokens_BL)
        mask_bias_11LM = None
        if state.needs_mask(n_queries):
            mask_11LM = state.causal_mask(n_queries)[None, None]
            mask_bias_11LM = mask_to_bias(mask_11LM, x_BLD.dtype)
        cross = state.cross_context()
        context = Context(state.adapter_B, NO_PACKING, mask_bias_11LM, cross=cross)
        distance_LM = state.token_M - state.query_columns(state.token_M, n_queries)[:, None]
        x_BLD = self.decoder(x_BLD, context, distance_LM, state.caches)
        state.check_adapters(self)  # another thread may have removed one meanwhile
        if self.config.scale_logits:  # T5 v1.0, whose head is the embedding
            x_BLD = x_BLD * self.config.d_model**-0.5
        return x_BLD.view(*tokens.shape, -1)

    def logits(self, x):
        """Return the logits (..., V) of what the head reads (..., D)."""
        return linear(x, self.head_weight)

    def check_lengths(self, n_source, n_targets):
        """Raise ValueError if texts of these lengths need too large a bias of attention.

        n_source: tokens of the source. n_targets: a list, the tokens of each target. Each head has
        its own bias for each pair of tokens.
        """
        longest = max([n_source, *n_targets])
        check_bias(self.config.n_heads, longest, longest)

    @property
    def head_weight(self):
        """Return the weight (V, D) of the head: its own, or the embedding's."""
        return self.embed.weight if self.head is None else self.head.weight
