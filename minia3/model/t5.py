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
class T5Config:
    d_model: int
    d_head: int  # n_heads * d_head need not be d_model: t5-3b and t5-11b
    d_ff: int
    n_layers: int
    n_decoder_layers: int
    n_heads: int
    vocab_size: int
    activation: str = "relu"
    gated: bool = False
    own_head: bool = False  # False: the head is the embedding
    scale_logits: bool = True
    n_buckets: int = 32
    max_distance: int = 128
    dropout: float = 0.1
    eps: float = 1e-6
    pad_id: int = 0
    eos_ids: tuple = (1,)
    start_id: int = 0


class Stack(nn.Module):
    """The encoder or the decoder: blocks, a final norm, and the table of relative positions that all blocks share."""

    def __init__(self, c, n_layers, decoder, n_adapters):
        super().__init__()
        attention = (c.d_model, c.n_heads, c.n_heads, c.d_head, 1.0, c.dropout, n_adapters)

        def block():
            attn, cross = Attention(*attention), Attention(*attention) if decoder else None
            ffn = FeedForward(c.d_model, c.d_ff, c.activation, c.gated, c.dropout, n_adapters)
            return Block(attn, cross, ffn, c.d_model, c.eps, c.dropout)

        self.blocks = nn.ModuleList(block() for _ in range(n_layers))
        self.norm = RMSNorm(c.d_model, c.eps)
        self.dropout = nn.Dropout(c.dropout)
        self.position = Embedding(c.n_buckets, c.n_heads)
        self.max_distance, self.bidirectional = c.max_distance, not decoder

    def forward(self, x_BLD, context, caches):
        x_BLD = self.dropout(x_BLD)
        for block, cache in zip(self.blocks, caches, strict=True):
            x_BLD = block(x_BLD, context, cache)
        return self.dropout(self.norm(x_BLD))

    def bias(self, position_L, position_M):
        """(1, H, L, M): the bias of each position of the queries towards each of the keys."""
        distance_LM = position_M - position_L[:, None]
        bucket_LM = distance_bucket(
            distance_LM, self.bidirectional, self.position.num_embeddings, self.max_distance
        )
        return self.position(bucket_LM).permute(2, 0, 1).unsqueeze(0)


def distance_bucket(distance_LM, bidirectional, n_buckets, max_distance):
    """Distance (key minus query) -> bucket: half of them exact, the rest in logarithmic steps up to `max_distance`.

    As `_relative_position_bucket` of Mesh TensorFlow's T5, down to its float32 logarithm.
    """
    n_buckets = n_buckets // 2 if bidirectional else n_buckets  # half of them for each direction
    first = (distance_LM > 0) * n_buckets if bidirectional else 0
    distance_LM = distance_LM.abs() if bidirectional else (-distance_LM).clamp(min=0)
    exact = n_buckets // 2
    ratio_LM = torch.log(distance_LM.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far_LM = (exact + (ratio_LM * (n_buckets - exact)).long()).clamp(max=n_buckets - 1)
    return first + torch.where(distance_LM < exact, distance_LM, far_LM)


class T5(nn.Module):
    def __init__(self, config, n_adapters=1):
        super().__init__()
        self.config, self.n_adapters = config, n_adapters
        self.embed = Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config, config.n_layers, False, n_adapters)
        self.decoder = Stack(config, config.n_decoder_layers, True, n_adapters)
        self.head = (
            nn.Linear(config.d_model, config.vocab_size, bias=False) if config.own_head else None
        )

    def start(self, source, mask=None, adapter=None):
        """Read the source: -> the State from which `step` writes the target. See `State`.

        source (B, M) ids; mask (B, M) bool, True = real, None = all; adapter None (row 0), an int or (B,) long.
        Raises ValueError for an empty source or row, and for an adapter that is not there.
        """
        adapter_B = check_start(source, mask, adapter, self.n_adapters)
        x, adapter, memory_bias_B11M, packing = self.embed(source), adapter_B, None, None
        position_M = torch.arange(source.shape[1], device=source.device)
        bias_BHMM = self.encoder.bias(position_M, position_M)
        if mask is not None:
            mask_B11M, packing = (
                mask.to(source.device)[:, None, None, :],
                Packing(mask, source.device),
            )
            memory_bias_B11M = mask_to_bias(mask_B11M, x.dtype)
            x, adapter, bias_BHMM = (
                packing.pack(x),
                of_rows(adapter_B, packing.row_T),
                bias_BHMM + memory_bias_B11M,
            )
        memory = self.encoder(
            x, Context(adapter, bias_BHMM, packing=packing), [Cache() for _ in self.encoder.blocks]
        )
        kvs = (block.cross.kv(memory, adapter, packing=packing) for block in self.decoder.blocks)
        caches = [
            Cache(memory=tuple(x.contiguous() for x in kv)) for kv in kvs
        ]  # a head in one piece: read often
        start_B1 = torch.full_like(source[:, :1], self.config.start_id)
        return State(
            start_B1, adapter_B, caches, source.new_zeros(2, 0), memory_bias_B11M=memory_bias_B11M
        )

    def step(self, tokens, state):
        """Append tokens (B, L) to the target: -> logits (B, L, V) of the token after each; `state` moves on."""
        return self.logits(self.read(tokens, state))

    def read(self, tokens, state):
        tokens_BL = state.fold(tokens)
        x_BLD, n = self.embed(tokens_BL), tokens_BL.shape[1]
        bias_BHLM = self.decoder.bias(state.column_2M[0, -n:], state.column_2M[0])
        if n > 1:
            bias_BHLM = bias_BHLM + mask_to_bias(state.seen(n), x_BLD.dtype)
        context = Context(state.adapter_B, bias_BHLM, memory_bias_B11M=state.memory_bias_B11M)
        return self.decoder(x_BLD, context, state.caches).view(*tokens.shape, -1)

    def logits(self, x, weight=None):
        x = x * self.config.d_model**-0.5 if self.config.scale_logits else x
        return F.linear(x, (self.head or self.embed).weight if weight is None else weight)
