"""To be written."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from minia3.model.packing import Packing


@dataclass
class Context:
    """One call's masks, positions and adapter rows, the same for every block."""

    adapter_B: torch.Tensor  # (T,) where the call is packed; (1,) where one serves all
    bias_BHLM: torch.Tensor | None = (
        None  # added to the scores: masks (-inf) and T5's relative positions
    )
    causal: bool = False  # SDPA's own causal mask: right only where L = M
    rotation: tuple | None = None  # cos, sin (B or 1, 1, L, K)
    memory_bias_B11M: torch.Tensor | None = None  # the source's padding, for cross-attention
    packing: Packing | None = None


@dataclass
class Cache:
    """One block's keys and values, scaled and rotated: `kv`, with `length` columns filled; `memory`, the encoder's."""

    kv: tuple | None = None
    memory: tuple | None = None
    length: int = 0

    def append(self, k_BGLK, v_BGLK):
        """-> all keys and values so far. Without gradients they are written into room that is made for 64 at a time."""
        old, new, first = self.kv, (k_BGLK, v_BGLK), self.length
        self.length += k_BGLK.shape[2]
        if old is None:
            self.kv = new
        elif (
            torch.is_grad_enabled()
        ):  # the graph may still need what it has read: nothing is written over
            self.kv = tuple(
                torch.cat((x[:, :, :first], y), dim=2) for x, y in zip(old, new, strict=True)
            )
        else:
            if old[0].shape[2] < self.length:
                self.kv = tuple(
                    F.pad(x[:, :, :first], (0, 0, 0, self.length - first + 64)) for x in old
                )
            for x, y in zip(self.kv, new, strict=True):
                x[:, :, first : self.length] = y
        return tuple(x[:, :, : self.length] for x in self.kv)


@dataclass
class State:
    """A batch of sequences under way. From one source, and from what is read before `repeat`, several rows may go on.

    start: (R, 1) the token that begins the target.
    adapter_B: the row of vectors of each, or (1,) where one serves all.
    sharing: so many rows are read as one, one after the other, for the sake of the columns that they share.
    column_2M: the columns of the self-attention's caches: which token each is, and of which of these rows (-1: of all).
    length: tokens of a row so far.
    mask_BM: which of the columns are real; None where all are.
    """

    start: torch.Tensor
    adapter_B: torch.Tensor
    caches: list
    column_2M: torch.Tensor
    length: int = 0
    mask_BM: torch.Tensor | None = None
    memory_bias_B11M: torch.Tensor | None = None
    sharing: int = 1

    def fold(self, tokens_RL):
        """The next tokens of the rows, as they are read: (B, sharing * L). Their columns are counted in."""
        (n_rows, length), c = tokens_RL.shape, self.sharing
        if n_rows != len(self.start) or length == 0:
            raise ValueError(
                f"expected tokens for each of {len(self.start)} rows, found {tuple(tokens_RL.shape)}"
            )
        new = torch.arange(c * length, device=tokens_RL.device)
        self.column_2M = torch.cat(
            (self.column_2M, torch.stack((self.length + new % length, new // length))), dim=1
        )
        self.length += length
        return tokens_RL.reshape(-1, c * length)

    def seen(self, n):
        """(n, M) bool: what the last n columns see: their own row's, and what is of all, up to themselves."""
        token_M, row_M = self.column_2M
        return (token_M <= token_M[-n:, None]) & ((row_M < 0) | (row_M == row_M[-n:, None]))

    def select(self, rows_R):
        """A new state whose row i goes on from row rows_R[i] (R,) long of this one; neither sees the other's steps."""
        own = [
            ((self.column_2M[1] < 0) | (self.column_2M[1] == i)).nonzero()[:, 0]
            for i in range(self.sharing)
        ]
        column_RN = torch.stack(own)[rows_R % self.sharing]

        def pick(
            x, axis=None
        ):  # axis: of the columns. Not by index_select, whose gradient a GPU sums in any order
            if x is None:
                return None
            of_R = rows_R // (
                n := len(self.start) // len(x)
            )  # one that serves n rows may go on to, as under beams
            if axis is None or self.sharing == 1:
                return x[of_R[::n] if torch.equal(of_R, of_R[::n].repeat_interleave(n)) else of_R]
            return x.transpose(1, axis)[of_R[:, None], column_RN].transpose(1, axis)

        kvs = [cache.kv and tuple(pick(x, 2) for x in cache.kv) for cache in self.caches]
        memories = [cache.memory and tuple(pick(x) for x in cache.memory) for cache in self.caches]
        caches = [Cache(kv, memory, self.length) for kv, memory in zip(kvs, memories, strict=True)]
        new = {
            "memory_bias_B11M": pick(self.memory_bias_B11M),
            "mask_BM": pick(self.mask_BM, 1),
            "sharing": 1,
        }
        new |= {
            "start": self.start[rows_R],
            "adapter_B": of_rows(self.adapter_B, rows_R // self.sharing),
        }
        return replace(self, caches=caches, column_2M=self.column_2M[:, own[0]], **new)

    def repeat(self, c):
        """A new state whose rows b*c ... b*c + c - 1 go on from row b of this one. No keys and values are copied."""
        if self.sharing > 1:
            return self.select(torch.arange(len(self.start), device=self.start.device)).repeat(c)
        rows = torch.arange(len(self.start), device=self.start.device).repeat_interleave(c)
        caches = [
            Cache(x.kv and tuple(y[:, :, : x.length] for y in x.kv), x.memory, x.length)
            for x in self.caches
        ]
        if self.length == 0:  # no columns are shared
            return replace(
                self, start=self.start[rows], caches=caches, adapter_B=of_rows(self.adapter_B, rows)
            )
        column_2M = torch.stack((self.column_2M[0], -torch.ones_like(self.column_2M[1])))
        return replace(self, start=self.start[rows], caches=caches, column_2M=column_2M, sharing=c)


def of_rows(adapter_B, rows):
    """The adapters of some rows; one that serves the whole batch, (1,), serves them too."""
    return adapter_B if len(adapter_B) == 1 else adapter_B[rows]


def mask_to_bias(mask, dtype):
    """0 where `mask` is True, -inf elsewhere, in the queries' dtype: another may be silently misread on the CPU."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(
        ~mask, float("-inf")
    )


def check_start(source_BM, mask_BM, adapter, n_adapters):
    """The arguments of `start`, checked: -> adapter_B (long), of (1,) where one serves all.

    Raises ValueError for an empty source, a mask of another shape, a row without a real token, and adapters which the
    model does not have (negative ones too).
    """
    if source_BM.dim() != 2 or 0 in source_BM.shape:
        raise ValueError(
            f"source must be (batch, length) ids with at least one token, found {tuple(source_BM.shape)}"
        )
    if mask_BM is not None:
        if mask_BM.shape != source_BM.shape or mask_BM.dtype != torch.bool:
            raise ValueError(
                f"mask must be bool {(*source_BM.shape,)}, found {mask_BM.dtype} {(*mask_BM.shape,)}"
            )
        if empty := (~mask_BM.any(dim=1)).nonzero().flatten().tolist():
            raise ValueError(
                f"source rows {empty} have no real token: mask them in the batch, or give them one"
            )
    rows = torch.as_tensor(0 if adapter is None else adapter)
    if rows.dtype not in (torch.int64, torch.int32) or rows.shape not in ((), source_BM.shape[:1]):
        raise ValueError(
            f"adapter must be None, an int or {tuple(source_BM.shape[:1])} long, found {adapter!r}"
        )
    if not all(0 <= row < n_adapters for row in rows.flatten().tolist()):
        raise ValueError(
            f"adapter {adapter!r} is out of range: the model has rows 0 to {n_adapters - 1}"
        )
    return rows.long().reshape(-1).to(source_BM.device)
