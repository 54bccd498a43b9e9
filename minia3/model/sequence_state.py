"""The state of running sequences. It is kept outside the modules, and each batch has its own.

    State     what `model.start` returns and `model.step` advances: the whole batch
    Cache     one block's keys and values
    Context   what all blocks of one call share: masks, positions, adapters

Training, scoring and decoding use them alike, so no block asks whether there is a cache.

Several rows may continue one source: the choices of a question, samples, beams. T5's rows share the
keys and values that cross-attention makes of the source, and which never change. LLaMA's rows share
the prompt's keys and values, and each row adds its own. All of these are kept side by side in one
row of the cache:

    column    0  1  2  3     4  5  6     7  8  9
    owner_M  -1 -1 -1 -1     0  0  0     1  1  1      prompt (shared), then row 0's, then row 1's
    token_M   0  1  2  3     4  5  6     4  5  6      the place of the token in its sequence

A mask lets each token see the prompt and the earlier tokens of its own row. No keys are copied.

Shapes: B batch (of sources), R rows that continue them, L query length, M memory length (columns),
N some of the columns (new ones, or those that one row sees), H query heads, G key/value heads, K
head width, T real tokens of all sources.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from minia3.model.adapter_rows import adapter_numbers, find_rows
from minia3.model.attend import aligned, zero_bias
from minia3.model.packing import NO_PACKING, NoPacking, Packing
from minia3.model.to_device import to_device

# The most entries of a bias of attention: 4 GB in float32. They grow with the square of a length.
MAX_BIAS = 1 << 30

SPARE_COLUMNS = 64  # that a cache gets when it grows, so that most steps copy nothing


@dataclass
class Context:
    """The masks, positions and adapters of one call, which the blocks of a stack share."""

    # For each example, or for each token of a packed batch, a row of the vectors; (1,): one for all
    adapter_B: torch.Tensor
    # Models pass NO_PACKING explicitly: torch.compile would break its graph at this default.
    packing: Packing | NoPacking = NO_PACKING
    bias_BHLM: torch.Tensor | None = None  # added to the scores: masks (-inf), T5's biases
    is_causal: bool = False  # use PyTorch's causal mask, which is right only if L = M
    rotation: tuple | None = None  # LLaMA's positions: cos and sin (B or 1, 1, L, K)
    cross: "Context | None" = None  # the context of cross-attention, if there is any
    # In cross-attention to sources that lie end to end: how many tokens each of them has
    source_lengths: list | None = None


@dataclass
class Cache:
    """One block's keys and values (B, G, M, K), scaled and rotated.

    kv: for self-attention. The first `length` columns are filled, and the others are spare room.
    cross_kv: for cross-attention, made once from the encoder's output. None in LLaMA.
    make_cross_kv: a function that makes `cross_kv` when it is first needed, if it is not there yet.

    On a CPU, rows of a source may lie end to end, (1, G, T, K): those of `cross_kv` until decoding
    begins, and those of `kv` while a LLaMA reads its prompts (packing.py).
    """

    kv: tuple | None = None
    cross_kv: tuple | None = None
    length: int = 0
    make_cross_kv: Callable | None = None

    def ensure_cross_kv(self):
        """Make `cross_kv` if it is not there yet, and return it."""
        if self.cross_kv is None and self.make_cross_kv is not None:
            self.cross_kv = self.make_cross_kv()
        return self.cross_kv

    def append(self, k_BGLK, v_BGLK):
        """Add columns, and return all keys and values so far."""
        new = (k_BGLK, v_BGLK)
        first = self.length
        self.length += k_BGLK.shape[2]
        if self.kv is None:
            self.kv = new
        elif torch.is_grad_enabled():
            # Copy, because the backward pass may still need what the old tensors hold.
            pairs = zip(self.kv, new, strict=True)
            self.kv = tuple(torch.cat((old[:, :, :first], x), dim=2) for old, x in pairs)
        else:
            self._make_room(first)
            for old, x in zip(self.kv, new, strict=True):
                old[:, :, first : self.length] = x
        return self.filled()

    def filled(self):
        """Return `kv` without its spare room, so that two states never write into the same room."""
        if self.kv is None:
            return None
        return tuple(x[:, :, : self.length] for x in self.kv)

    def _make_room(self, n_filled):
        if self.kv[0].shape[2] < self.length:
            n_more = self.length - n_filled + SPARE_COLUMNS
            # The longer tensors stay in the graph, because a later step may need the gradients of
            # the columns so far. Steps write into the spare room, which no backward pass reads.
            with torch.inference_mode(False), torch.enable_grad():
                self.kv = tuple(F.pad(x[:, :, :n_filled], (0, 0, 0, n_more)) for x in self.kv)


@dataclass
class State:
    """A batch of sequences that are being continued."""

    start: torch.Tensor  # (R, 1): the token that begins each target
    adapter_B: torch.Tensor  # for each row of the caches, a row of the vectors; (1,): one for all
    caches: list  # one per block
    token_M: torch.Tensor  # the place of each column's token in its sequence (see above)
    # The row to which each column belongs; -1: all rows share it. It stays on the CPU, because
    # `select` reads it, and reading it from a GPU would wait for the GPU.
    owner_M: torch.Tensor
    length: int = 0  # columns that a row sees so far, padding included
    mask_BM: torch.Tensor | None = None  # which columns are real; None: all of them
    n_padding: tuple = ()  # columns of padding in each row of the caches; (): none
    memory_bias_B11M: torch.Tensor | None = None  # for cross-attention: the source's padding
    # How `cross_kv` lies in the caches: padded, or end to end
    source_packing: Packing | NoPacking = NO_PACKING
    n_sharing: int = 1  # rows that share one row of the caches
    adapter_numbers: tuple = ()  # those that the caller gave, each once: see adapter_rows.py
    is_stepping: bool = False  # from `append_columns` to `end_step`
    n_source: int = 0  # the `length` when `start` returned this state

    def check_adapters(self, model):
        """Raise ValueError if an adapter was removed or replaced while its vectors were read.

        Another thread may do so at any time, and the logits would be those of another adapter.
        """
        find_rows(self.adapter_numbers, model)

    def ensure_all_cross_kv(self):
        """Make all keys and values of the source now, and not each block's when the block runs."""
        for cache in self.caches:
            cache.ensure_cross_kv()

    def check_tokens(self, tokens):
        """Raise ValueError if these are not tokens (R, L) for each row, or if the last step failed.

        After an error (out of memory, Ctrl-C), only some of the blocks may have read its tokens, so
        what follows would be wrong.
        """
        if self.is_stepping:
            raise ValueError("the last step of this state failed halfway: start again")
        n_rows = len(self.start)
        if tokens.dim() != 2 or len(tokens) != n_rows or tokens.shape[1] == 0:
            expected = f"expected tokens for each of {n_rows} rows"
            raise ValueError(f"{expected}, found {tuple(tokens.shape)}")

    def check_at_start(self):
        """Raise ValueError if a target was begun, because `start` must come before its tokens."""
        if self.length > self.n_source:
            raise ValueError(
                "this state has read tokens of a target: start again, and give each target a "
                "state.repeat(1) of its own"
            )

    def append_columns(self, tokens_RL):
        """Add columns for the next tokens, and return the tokens as the blocks read them.

        tokens_RL (R, L) becomes (R / n_sharing, n_sharing * L): rows that share a cache row stand
        side by side in it. Raise the ValueError of `check_tokens`. If another step is to follow,
        the caller calls `end_step` once this one has succeeded.
        """
        self.check_tokens(tokens_RL)
        self.is_stepping = True
        n_tokens = tokens_RL.shape[1]
        column_N = torch.arange(self.n_sharing * n_tokens, device=tokens_RL.device)
        self.token_M = torch.cat((self.token_M, self.length + column_N % n_tokens))
        new_owner_N = torch.arange(self.n_sharing, device="cpu").repeat_interleave(n_tokens)
        self.owner_M = torch.cat((self.owner_M, new_owner_N))
        self.length += n_tokens
        tokens = tokens_RL.reshape(-1, self.n_sharing * n_tokens)
        if self.mask_BM is not None:  # these tokens are real
            is_real = torch.ones_like(tokens, dtype=torch.bool)
            self.mask_BM = torch.cat((self.mask_BM, is_real), dim=1)
        return tokens

    def end_step(self):
        """Say that the step has succeeded, so that another one may follow."""
        self.is_stepping = False

    def longest(self):
        """Return the number of real tokens of the longest row so far."""
        return self.length - min(self.n_padding, default=0)

    def query_columns(self, x, n_queries):
        """Return the columns (..., L) of x (..., M) that were appended last: those of the queries.

        A StaticState finds them elsewhere (static_state.py).
        """
        return x[..., -n_queries:]

    def needs_mask(self, n_queries):
        """Return whether there are columns that some query must not see.

        A single query comes last, so it sees all of them. (A StaticState has empty columns.)
        """
        return n_queries > 1

    def cross_context(self):
        """Return the Context of cross-attention, in which rows that share a source ask together."""
        lengths = self.source_packing.lengths
        n_sources = len(lengths or self.caches[0].ensure_cross_kv()[0])
        n_cache_rows = len(self.start) // self.n_sharing
        # Rows that share a source also share an adapter, so the first of them speaks for all.
        adapter_B = self.adapter_B[:: n_cache_rows // n_sources]
        return Context(adapter_B, NO_PACKING, self.memory_bias_B11M, source_lengths=lengths)

    def prepare_decoding(self):
        """Pad the keys and values of the source, and make them contiguous.

        So each step of decoding, in which every row has a single query, reads them faster.
        """
        # Record gradients, because a later step may need those of the source.
        with torch.inference_mode(False), torch.enable_grad():
            for cache in self.caches:
                padded = self.source_packing.padded_kv(cache.ensure_cross_kv())
                cache.cross_kv = tuple(x.contiguous() for x in padded)
        self.source_packing = NO_PACKING

    def positions(self):
        """Return (B, M), or (1, M) without padding: the position of each column in its text.

        The padding of a prompt counts as no position. It stands at the prompt's end (`start` moves
        it there), so it comes before every token that follows the prompt.
        """
        if self.mask_BM is None:
            return self.token_M[None]
        return self.token_M - (~self.mask_BM).cumsum(dim=1)

    def causal_mask(self, n_queries):
        """Return (L, M) bool: whether each of the last `n_queries` columns may see each column."""
        query_token_L = self.token_M[-n_queries:]
        is_past_LM = self.token_M <= query_token_L[:, None]
        if self.n_sharing == 1:
            return is_past_LM
        owner_M = to_device(self.owner_M, self.token_M.device)
        is_shared_M = owner_M < 0
        is_same_row_LM = owner_M == owner_M[-n_queries:, None]
        return is_past_LM & (is_shared_M | is_same_row_LM)

    def repeat(self, c):
        """Return a new state whose rows b*c ... b*c + c - 1 continue row b of this state.

        Neither state sees the other's later tokens. No keys or values are copied, unless rows
        share a cache row already: then each of them gets its own copy first.
        """
        if self.n_sharing > 1:
            return self.select(torch.arange(len(self.start), device="cpu")).repeat(c)
        rows_R = torch.arange(len(self.start), device=self.start.device).repeat_interleave(c)
        # Record gradients, because a later step of any of the rows may need those of the columns.
        with torch.inference_mode(False), torch.enable_grad():
            caches = [replace(cache, kv=cache.filled()) for cache in self.caches]
        if self.length == 0:
            # Nothing is cached yet, so there is nothing to share, and each row gets a cache row.
            adapter_B = pick_adapters(self.adapter_B, rows_R)
            return replace(self, start=self.start[rows_R], caches=caches, adapter_B=adapter_B)
        owner_M = torch.full_like(self.owner_M, -1)
        return replace(self, start=self.start[rows_R], caches=caches, owner_M=owner_M, n_sharing=c)

    def select(self, rows_R):
        """Return a new state whose row i continues row rows_R[i] of this state.

        rows_R: (R,) long; on the CPU, so that nothing waits for a GPU. Neither state sees the
        other's later tokens.
        """
        selection = Selection(self, rows_R)
        caches = []
        for cache in self.caches:
            kv = cross_kv = None
            if cache.kv is not None:
                kv = tuple(selection.columns_of(x, axis=2) for x in cache.kv)
            if cache.ensure_cross_kv() is not None:
                padded = self.source_packing.padded_kv(cache.cross_kv)
                cross_kv = tuple(selection.shared_rows_of(x) for x in padded)
            caches.append(Cache(kv, cross_kv, self.length))
        memory_bias_B11M = selection.shared_rows_of(self.memory_bias_B11M)
        if memory_bias_B11M is not self.memory_bias_B11M:
            memory_bias_B11M = aligned(memory_bias_B11M)
        return replace(
            self,
            start=self.start[selection.rows_R],
            adapter_B=pick_adapters(self.adapter_B, selection.rows_R // self.n_sharing),
            caches=caches,
            token_M=selection.token_M,
            owner_M=selection.owner_M,
            mask_BM=selection.columns_of(self.mask_BM, axis=1),
            n_padding=selection.numbers_of(self.n_padding),
            memory_bias_B11M=memory_bias_B11M,
            source_packing=NO_PACKING,
            n_sharing=1,
        )


class Selection:
    """The indices of the rows rows_R in a state's tensors, and of the columns that they see.

    A tensor may have fewer rows than the state, because several rows of the state share one of its
    rows (one source, or one row of the caches).

    The indices are computed on the CPU, so that nothing waits for a GPU, and copied once for all
    blocks.
    """

    def __init__(self, state, rows_R):
        self.cpu_rows_R = rows_R.cpu()
        self.device = state.start.device
        self.rows_R = to_device(self.cpu_rows_R, self.device)
        self.n_rows = len(state.start)
        self.n_sharing = state.n_sharing
        self.serving = {}  # n_served -> the result of `serving_rows`
        self.token_M = state.token_M
        self.owner_M = state.owner_M
        if self.n_sharing > 1:
            columns = columns_of_rows(state.owner_M, self.n_sharing)
            self.column_RN = to_device(columns[self.cpu_rows_R % self.n_sharing], self.device)
            self.token_M = state.token_M[to_device(columns[0], self.device)]
            self.owner_M = state.owner_M[columns[0]]

    def serving_rows(self, x):
        """Return the indices of the rows of `x` that serve rows_R, and whether they are all of x.

        Each row of x serves n_rows / len(x) rows.
        """
        n_served = self.n_rows // len(x)
        if n_served not in self.serving:
            serving = rows_that_serve(self.cpu_rows_R, n_served)
            is_all = torch.equal(serving, torch.arange(len(x), device="cpu"))
            self.serving[n_served] = to_device(serving, self.device), is_all
        return self.serving[n_served]

    def rows_of(self, x):
        """Return a copy of the rows of `x` that serve rows_R."""
        if x is None:
            return None
        serving, _ = self.serving_rows(x)
        return x[serving]

    def shared_rows_of(self, x):
        """Return the rows of `x` that serve rows_R: x itself, if they are all its rows, in order.

        x: a tensor into which no step writes. A beam search selects at each step, and usually its
        beams change places, but its sources stay.
        """
        if x is None:
            return None
        serving, is_all = self.serving_rows(x)
        return x if is_all else x[serving]

    def numbers_of(self, numbers):
        """Return the numbers of rows_R. numbers: one for each row of the caches, or () for none.

        They are a tuple, because a step must not read them from a GPU.
        """
        if not numbers:
            return ()
        return tuple(numbers[row] for row in (self.cpu_rows_R // self.n_sharing).tolist())

    def columns_of(self, x, axis):
        """Return the rows rows_R of x, each with the columns that it sees. axis: of the columns."""
        if x is None or self.n_sharing == 1:
            return self.rows_of(x)
        # This is not index_select, because a GPU sums its gradient in no fixed order.
        source_R1 = (self.rows_R // self.n_sharing)[:, None]
        return x.transpose(1, axis)[source_R1, self.column_RN].transpose(1, axis)


def columns_of_rows(owner_M, n_sharing):
    """Return (n_sharing, N): the columns that each row sees, the shared ones and its own."""
    columns = []
    for row in range(n_sharing):
        is_seen_M = (owner_M < 0) | (owner_M == row)
        columns.append(is_seen_M.nonzero()[:, 0])
    return torch.stack(columns)


def rows_that_serve(rows_R, n_served):
    """Return which rows of a tensor to take for rows_R. Each of its rows serves `n_served` rows.

    In general, that is one row for each of rows_R. If rows_R is made of runs of `n_served` rows
    with the same source, one row for each run is enough, and beams still share it.
    """
    source_R = rows_R // n_served
    first_of_each = source_R[::n_served]
    if torch.equal(source_R, first_of_each.repeat_interleave(n_served)):
        return first_of_each
    return source_R


def pick_adapters(adapter_B, rows):
    """Return the adapters of these rows. One adapter for the whole batch stays (1,)."""
    if len(adapter_B) == 1:
        return adapter_B
    return adapter_B[rows]


def check_bias(*shape):
    """Raise ValueError before a bias of this shape, (..., L, M), fills the memory."""
    n_numbers = math.prod(shape)
    if n_numbers > MAX_BIAS:
        raise ValueError(
            f"attention from {shape[-2]:,} to {shape[-1]:,} tokens needs a bias of {n_numbers:,} "
            f"numbers, expected at most {MAX_BIAS:,}: lower the batch size, or shorten the texts "
            "(in train.py and predict: --max-length, --max-target-length)"
        )


def mask_to_bias(mask, dtype):
    """Return a bias: 0 for True and -inf for False. dtype: that of the queries (see attend.py)."""
    return zero_bias(mask.shape, dtype, mask.device).masked_fill_(~mask, float("-inf"))


def check_start(source_BM, mask_BM, adapter, model):
    """Check the arguments of `start`, and return what its State says of adapters.

    That is adapter_B, the rows of the vectors, and adapter_numbers, from which they came.

    Raise ValueError if the source is empty, if the mask has the wrong shape or dtype, if a row has
    no real token, or if an adapter does not exist or was removed (see adapter_rows.py).
    """
    if source_BM.dim() != 2 or 0 in source_BM.shape:
        expected = "source must be (batch, length) ids with at least one token"
        raise ValueError(f"{expected}, found {tuple(source_BM.shape)}")
    if mask_BM is not None:
        check_mask(mask_BM, tuple(source_BM.shape))
    numbers = adapter_numbers(adapter, len(source_BM))
    rows = find_rows(numbers, model)
    if len(set(rows)) == 1:
        rows = rows[:1]  # because a single row need not be looked up for each token
    adapter_B = to_device(torch.tensor(rows, device="cpu"), source_BM.device)
    return adapter_B, tuple(set(numbers))


def check_mask(mask_BM, shape):
    """Raise ValueError if a mask is not bool of this shape, or if a row has no real token."""
    if mask_BM.shape != shape or mask_BM.dtype != torch.bool:
        found = f"{mask_BM.dtype} {tuple(mask_BM.shape)}"
        raise ValueError(f"mask must be bool {shape}, found {found}")
    empty_rows = (~mask_BM.any(dim=1)).nonzero().flatten().tolist()
    if empty_rows:
        advice = "leave them out of the batch, or give each a token"
        raise ValueError(f"source rows {empty_rows} have no real token: {advice}")
