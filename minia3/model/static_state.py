"""A state whose tensors keep their shapes, so that each step of decoding is the same computation.

A step of a State appends to its caches, so its shapes grow with each token. A CPU must then tell a
GPU at each step what to compute, operation by operation, and with a single row this takes longer
than computing it. Here the caches have their final length from the start, and a mask hides the
columns that are still empty. torch.compile(mode="reduce-overhead") records such a step once, as a
CUDA graph, and the GPU replays it. (gpt-fast decodes in this way.)

Shapes: B batch, L query length (1), M memory length (columns), G key/value heads, K head width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from minia3.model.sequence_state import Cache, State


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
    def make(cls, state, n_more):
        """Return a state that continues `state` by at most `n_more` tokens.

        `state` must have read a token, so that its caches exist. It stays as it is.
        """
        # Rows that share columns get their own copies of them.
        state = state.select(torch.arange(len(state.start)))
        n_columns = state.length + n_more
        column_1 = state.start.new_full((1,), state.length)
        caches = []
        for cache in state.caches:
            kv = tuple(F.pad(x, (0, 0, 0, n_columns - x.shape[2])) for x in cache.filled())
            caches.append(StaticCache(kv, cache.cross_kv, n_columns, column_1=column_1))
        mask_BM = torch.ones_like(state.token_M, dtype=torch.bool)[None]
        if state.mask_BM is not None:
            mask_BM = state.mask_BM
        changed = {
            "caches": caches,
            "token_M": torch.arange(n_columns, device=column_1.device),
            "length": n_columns,
            "mask_BM": F.pad(mask_BM, (0, n_more), value=True),
            "column_1": column_1,
            # `decode_compiled` checks them, because a step would be compiled again for others.
            "adapter_numbers": (),
        }
        return cls(**vars(state) | changed)

    def append_columns(self, tokens_B1):
        return tokens_B1  # there is room, and `advance` counts

    def prepare_decoding(self):
        """Do nothing: `make` got a state that was prepared, or padded a copy of it by `select`."""

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
