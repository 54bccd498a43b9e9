"""Chapter 5. What a running sequence carries: outside the modules, made fresh for each batch, never optional.

`State` is what `model.start` returns and `model.step` moves on; `Cache` is one block's part of it; `Context` is what
all blocks of one call share. A training step uses a fresh state like any other.

Shapes: B batch, L query length, M memory length, H query heads, G key/value heads, K head width.
"""

from dataclasses import dataclass, field, replace

import torch


@dataclass
class Context:
    """One call's masks, positions and adapter rows, the same for every block."""

    adapter_B: torch.Tensor
    bias_BHLM: torch.Tensor | None = None  # added to the scores: masks (-inf) and T5's relative positions
    causal: bool = False  # SDPA's own causal mask: right only where L = M
    rotation: tuple | None = None  # cos, sin (B or 1, 1, L, K)
    memory_bias_B11M: torch.Tensor | None = None  # the source's padding, for cross-attention


@dataclass
class Cache:
    """One block's keys and values, scaled and rotated: `kv` grows with each step, `memory` is the encoder's."""

    kv: tuple | None = None
    memory: tuple | None = None

    def append(self, k_BGMK, v_BGMK):
        if self.kv is not None:
            k_BGMK, v_BGMK = torch.cat((self.kv[0], k_BGMK), dim=2), torch.cat((self.kv[1], v_BGMK), dim=2)
        self.kv = (k_BGMK, v_BGMK)
        return self.kv


@dataclass
class State:
    """A batch of sequences under way.

    start: (B, 1) the token that begins the target.
    length: columns of the self-attention cache so far.
    mask_BM: which of these columns are real; None where all are.
    """

    start: torch.Tensor
    adapter_B: torch.Tensor
    caches: list
    length: int = 0
    mask_BM: torch.Tensor | None = None
    memory_bias_B11M: torch.Tensor | None = field(default=None, kw_only=True)

    def repeat(self, c):
        """A new state whose rows b*c ... b*c + c - 1 go on from row b of this one."""

        def rows(x):
            return None if x is None else x.repeat_interleave(c, dim=0)

        def pair(kv):
            return None if kv is None else (rows(kv[0]), rows(kv[1]))

        return replace(
            self,
            start=rows(self.start),
            adapter_B=rows(self.adapter_B),
            caches=[Cache(pair(cache.kv), pair(cache.memory)) for cache in self.caches],
            mask_BM=rows(self.mask_BM),
            memory_bias_B11M=rows(self.memory_bias_B11M),
        )


def mask_to_bias(mask, dtype):
    """0 where `mask` is True, -inf elsewhere, in the queries' dtype: another may be silently misread on the CPU."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, float("-inf"))


def causal_mask(length, total, device):
    """(L, M) bool: the last `length` of `total` positions each see those up to themselves."""
    return torch.ones(length, total, dtype=torch.bool, device=device).tril(total - length)


def check_start(source_BM, mask_BM, adapter, n_adapters):
    """The arguments of `start`, checked: -> adapter_B (long).

    Raises ValueError for an empty source, a mask of another shape, a row without a real token, and adapters which the
    model does not have (negative ones too).
    """
    if source_BM.dim() != 2 or 0 in source_BM.shape:
        raise ValueError(f"source must be (batch, length) ids with at least one token, found {tuple(source_BM.shape)}")
    if mask_BM is not None:
        if mask_BM.shape != source_BM.shape or mask_BM.dtype != torch.bool:
            raise ValueError(
                f"mask must be bool {tuple(source_BM.shape)}, found {mask_BM.dtype} {tuple(mask_BM.shape)}"
            )
        empty = (~mask_BM.any(dim=1)).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"source rows {empty} have no real token: mask them in the batch, or give them one")
    batch = source_BM.shape[0]
    rows = torch.as_tensor(0 if adapter is None else adapter, device=source_BM.device)
    if rows.dtype not in (torch.int64, torch.int32) or rows.shape not in ((), (batch,)):
        raise ValueError(f"adapter must be None, an int or ({batch},) long, found {adapter!r}")
    if adapter is not None and (rows.min() < 0 or rows.max() >= n_adapters):
        raise ValueError(f"adapter {adapter!r} is out of range: the model has rows 0 to {n_adapters - 1}")
    return rows.long().expand(batch)
