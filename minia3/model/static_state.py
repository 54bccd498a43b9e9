"""A state whose tensors keep their shapes, so that each step of decoding is the same computation.

A step of a State appends to its caches, so its shapes grow with each token. A CPU must then tell a
GPU at each step what to compute, operation by operation, and with a single row this takes longer
than computing it. Here the caches have their final length from the start, and a mask hides the
columns that are still empty. torch.compile(mode="reduce-overhead") records such a step once, as a
CUDA graph, and the GPU replays it. (gpt-fast decodes in this way.)

Batches share a compiled step if their shapes are equal, so numbers of columns are rounded up. They
share its CUDA graph if their tensors have the same addresses, too, so a Room keeps the memory.

Shapes: B batch, L query length (1), M memory length (columns), G key/value heads, K head width.
"""

import math
import weakref
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from minia3.model.sequence_state import Cache, State

unused_rooms = weakref.WeakKeyDictionary()  # a model -> its Room, if no state is in it


def rounded_up(n):
    """Return a number of columns, `n` or more: 64, 128, 256, 512, 1024, 2048, 3072 and so on."""
    unit = min(max(64, 1 << (n - 1).bit_length()), 1024)
    return math.ceil(n / unit) * unit


class Room:
    """The memory of a model's StaticStates, for one after the other.

    Each tensor of a state has its own piece of memory here, so those of the next state get the same
    addresses, unless they need a larger piece.
    """

    def __init__(self):
        self.pieces = {}

    @classmethod
    @contextmanager
    def borrow(cls, model):
        """Lend the Room of a model. A second stream that is read meanwhile gets another one."""
        room = unused_rooms.pop(model, None) or cls()
        try:
            yield room
        finally:
            unused_rooms[model] = room

    def place(self, name, x, n, axis=0, empty=0):
        """Return a copy of x in a piece, with `n` entries along an axis, the rest `empty`."""
        shape = (*x.shape[:axis], n, *x.shape[axis + 1 :])
        size = math.prod(shape)
        piece = self.pieces.get(name)
        is_like_x = piece is not None and (piece.dtype, piece.device) == (x.dtype, x.device)
        if not is_like_x or len(piece) < size:
            piece = self.pieces[name] = x.new_empty(size)
        # The last state may have left NaN here, and no mask hides NaN.
        placed = piece[:size].view(shape).fill_(empty)
        placed.narrow(axis, 0, x.shape[axis]).copy_(x)
        return placed

    def place_kv(self, name, kv, n_columns):
        """Return copies of keys and values with so many columns, or None if there are none."""
        if kv is None:
            return None
        return tuple(self.place(f"{name} {i}", x, n_columns, axis=2) for i, x in enumerate(kv))


@dataclass
class StaticCache(Cache):
    """One block's keys and values, with room for all tokens to come."""

    column_1: torch.Tensor | None = None  # (1,): where the next token goes; all blocks share it

    def append(self, k_BG1K, v_BG1K):
        """Write one column, and return all of them, with those that are not filled yet."""
        for cached, new in zip(self.kv, (k_BG1K, v_BG1K), strict=True):
            cached.index_copy_(2, self.column_1, new)
        return self.kv


@dataclass
class StaticState(State):
    """A State with a fixed number of columns. Call `advance` after each step of one token.

    `length` and token_M cover all columns from the start: a number or a shape that changed with
    each step would make torch compile each step again. So a LLaMA warns at once if the text may
    become too long.
    """

    column_1: torch.Tensor | None = None

    @classmethod
    def make(cls, state, n_more, room, max_length=math.inf):
        """Return a state that continues `state` by at most `n_more` tokens, in a Room.

        `state` must have read a token, so that its caches exist. It stays as it is. max_length: the
        number of columns is not rounded up beyond this.
        """
        # Rows that share columns get their own copies of them.
        state = state.select(torch.arange(len(state.start)))
        n_needed = state.length + n_more
        n_columns = max(n_needed, min(rounded_up(n_needed), max_length))
        column_1 = room.place("column", state.start.new_full((1,), state.length), 1)
        memory_bias_B11M, n_source = place_memory_bias(state, room)
        caches = []
        for i, cache in enumerate(state.caches):
            kv = room.place_kv(f"target {i}", cache.filled(), n_columns)
            cross_kv = room.place_kv(f"source {i}", cache.cross_kv, n_source)
            caches.append(StaticCache(kv, cross_kv, n_columns, column_1=column_1))
        token_M = room.place("token", state.token_M, n_columns)
        token_M.copy_(torch.arange(n_columns, device=token_M.device))
        is_real = state.mask_BM
        if is_real is None:
            is_real = token_M.new_ones(len(state.start), state.length, dtype=torch.bool)
        changed = {
            "caches": caches,
            "token_M": token_M,
            "length": n_columns,
            "mask_BM": room.place("mask", is_real, n_columns, axis=1, empty=True),
            "adapter_B": room.place("adapter", state.adapter_B, len(state.adapter_B)),
            "memory_bias_B11M": memory_bias_B11M,
            "n_padding": (),  # a step would be compiled again for other numbers
            "column_1": column_1,
            # `decode_compiled` checks them, because a step would be compiled again for others.
            "adapter_numbers": (),
        }
        return cls(**vars(state) | changed)

    def append_columns(self, tokens_B1):
        return tokens_B1  # there is room, and `advance` counts

    def end_step(self):
        """Do nothing: `append_columns` has begun nothing. A compiled step sets no attribute."""

    def prepare_decoding(self):
        """Do nothing: `make` has called `select`, which pads. A compiled step prepares nothing."""

    def advance(self):
        """Count the token that the last step has read."""
        self.column_1 += 1

    def query_columns(self, x, n_queries):
        return x.index_select(-1, self.column_1)

    def needs_mask(self, n_queries):
        return True

    def causal_mask(self, n_queries):
        """Return (1, M) bool: the columns that are filled, with that of the current token."""
        return (self.token_M <= self.column_1)[None]

    def tensors_that_stay(self):
        """Return all tensors that a step reads, or changes in place. Their addresses stay."""
        tensors = [self.column_1, self.token_M, self.mask_BM, self.adapter_B]
        if self.memory_bias_B11M is not None:
            tensors.append(self.memory_bias_B11M)
        for cache in self.caches:
            tensors += [*cache.kv, *(cache.cross_kv or ())]
        return tensors


def place_memory_bias(state, room):
    """Return the bias of cross-attention and its number of columns, or None and 0 in a LLaMA.

    The bias hides the padding of the sources, and the columns that were added by rounding up.
    """
    cross_kv = state.caches[0].cross_kv
    if cross_kv is None:
        return None, 0
    n_rows, _, n_source, _ = cross_kv[0].shape
    bias_B11M = state.memory_bias_B11M
    if bias_B11M is None:
        bias_B11M = cross_kv[0].new_zeros(n_rows, 1, 1, n_source)
    n_columns = rounded_up(n_source)
    return room.place("source", bias_B11M, n_columns, axis=3, empty=-math.inf), n_columns
