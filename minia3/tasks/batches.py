"""To be written."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from minia3.tasks.examples import Example

WINDOW = 32  # steps


class Batch(NamedTuple):
    source_BM: torch.Tensor  # long, padded on the right
    mask_BM: torch.Tensor  # bool, False on padding
    target_BCL: torch.Tensor  # long, padded on the right
    target_mask_BCL: torch.Tensor  # bool, False on padding and on choices that a row does not have
    label_B: torch.Tensor  # long, -1 where there is none


def collate(examples: Sequence[Example]) -> Batch:
    """Examples as tensors. Raises ValueError where one has nothing to read, or nothing to score: all is masked."""
    if bad := [
        n for n, one in enumerate(examples) if not (one.source and one.targets and all(one.targets))
    ]:
        raise ValueError(
            f"example {bad[0]} of the batch has no target, or a source or target of no tokens"
        )
    n_choices = max(len(example.targets) for example in examples)
    source_BM, mask_BM = pad([example.source for example in examples])
    targets, masks = pad(
        [t for e in examples for t in e.targets + [[]] * (n_choices - len(e.targets))]
    )
    target_BCL, target_mask_BCL = (x.view(len(examples), n_choices, -1) for x in (targets, masks))
    return Batch(
        source_BM,
        mask_BM,
        target_BCL,
        target_mask_BCL,
        torch.tensor([example.label for example in examples]),
    )


def pad(lists):
    """(N, longest) ids, padded on the right, and their mask. Any id would do: a pad token may have no embedding."""
    length = max(map(len, lists))
    mask = torch.arange(length) < torch.tensor([[len(ids)] for ids in lists])
    return torch.tensor([ids + [0] * (length - len(ids)) for ids in lists]), mask


def order(
    n_rows: int, batch_size: int, seed: int, lengths: Sequence[int] | None = None
) -> Callable[[int], list[int]]:
    """step -> indices of its batch's rows: a function of (seed, step) and nothing else, so resuming needs no state.

    Every epoch is a new permutation, and batches run on over its end: each has `batch_size` rows, and all rows come
    equally often. (T-Few's loader shuffles too, but drops an epoch's last batch if it is not full, even the only one.)
    lengths: of the rows; then WINDOW steps share their rows out by length, and come in a random order.
    """
    of = lru_cache(2)(
        lambda epoch: np.random.RandomState([seed, epoch]).permutation(n_rows)
    )  # numpy froze its streams

    def rows(step):
        window, nth = divmod(step, n_steps := 1 if lengths is None else WINDOW)
        places = [
            divmod(window * n_steps * batch_size + i, n_rows) for i in range(n_steps * batch_size)
        ]
        drawn = sorted(
            (int(of(epoch)[n]) for epoch, n in places),
            key=lambda row: lengths[row] if lengths else 0,
        )
        nth = np.random.RandomState([seed, 2, window]).permutation(n_steps)[nth]
        return drawn[nth * batch_size : (nth + 1) * batch_size]

    return rows
