"""Turn examples into padded tensors, and choose the rows of each training step.

Shapes: B batch, M source length, C choices, L target length, N texts, S length of a text.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from minia3.tasks.examples import Example


class Batch(NamedTuple):
    """Examples as tensors, padded on the right. A mask is True for real tokens.

    The mask of targets is True for tokens that are scored. In a conversation, there are real tokens
    between them that are not: the model reads these, too.
    """

    source_BM: torch.Tensor  # long
    mask_BM: torch.Tensor  # bool
    target_BCL: torch.Tensor  # long
    target_mask_BCL: torch.Tensor  # bool; all False for a choice that an example does not have
    label_B: torch.Tensor  # long; -1: unlabeled


def collate(examples: Sequence[Example]) -> Batch:
    """Return the examples as one batch.

    Raise ValueError if the source or a target of an example is missing or empty, because all of it
    would be masked.
    """
    for i, example in enumerate(examples):
        if not (example.source and example.targets and all(example.targets)):
            raise ValueError(
                f"example {i} of the batch: expected a source and at least one target, "
                f"each with at least one token; found {example!r:.80}"
            )
    n_choices = max(len(example.targets) for example in examples)
    targets = []
    for example in examples:
        targets += example.targets
        targets += [[]] * (n_choices - len(example.targets))
    source_BM, mask_BM = pad([example.source for example in examples])
    target_NL, target_mask_NL = pad(targets)
    for i, example in enumerate(examples):
        if example.is_scored is not None:
            n_tokens = len(example.targets[0])
            is_scored_L = torch.tensor(example.is_scored)
            target_mask_NL[i * n_choices, :n_tokens] = is_scored_L
    return Batch(
        source_BM,
        mask_BM,
        target_NL.view(len(examples), n_choices, -1),
        target_mask_NL.view(len(examples), n_choices, -1),
        torch.tensor([example.label for example in examples]),
    )


class Texts(NamedTuple):
    """Texts as tensors, padded on the right. A mask is True for the tokens of its name."""

    ids_BS: torch.Tensor  # long
    is_real_BS: torch.Tensor  # bool
    is_scored_BS: torch.Tensor  # bool


def join(batch: Batch) -> Texts:
    """Return each source of a batch and its only target as one text.

    A text ends with the last token that is scored.
    """
    ids_BS = torch.cat((batch.source_BM, batch.target_BCL[:, 0]), dim=1)
    is_scored_BL = batch.target_mask_BCL[:, 0]
    # Sums from the right: how many scored tokens there are from each place to the end.
    n_still_scored_BL = is_scored_BL.flip(1).cumsum(1).flip(1)
    is_real_BS = torch.cat((batch.mask_BM, n_still_scored_BL > 0), dim=1)
    is_scored_BS = torch.cat((torch.zeros_like(batch.mask_BM), is_scored_BL), dim=1)

    # Move the padding between a source and its target to the end of the text.
    longest = int(is_real_BS.sum(dim=1).max())
    real_first_BS = is_real_BS.int().argsort(dim=1, descending=True, stable=True)[:, :longest]
    return Texts(*(x.gather(1, real_first_BS) for x in (ids_BS, is_real_BS, is_scored_BS)))


def pad(texts: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ids of N texts, padded on the right (N, L), and the mask of real tokens (N, L).

    Padding is id 0 whatever the tokenizer says. Because padding is masked, any id that has an
    embedding will do, and in some checkpoints the pad token has no embedding.
    """
    longest = max(len(ids) for ids in texts)
    ids_NL = torch.tensor([ids + [0] * (longest - len(ids)) for ids in texts])
    length_N1 = torch.tensor([[len(ids)] for ids in texts])
    return ids_NL, torch.arange(longest) < length_N1


def order(n_rows: int, batch_size: int, seed: int) -> Callable[[int], list[int]]:
    """Return a function from a step to the indices of its rows.

    The indices depend only on the seed and the step, so a resumed run needs no state for them.

    Each epoch is a new permutation of all rows, and a batch may begin in one epoch and end in the
    next: every batch has `batch_size` rows, and all rows come equally often. (T-Few's loader
    shuffles too, but it drops the last batch of an epoch if the batch is not full, even if there is
    no other batch.)
    """

    @lru_cache(2)  # a batch that is no larger than an epoch lies in at most two epochs
    def permutation(epoch):
        # NumPy guarantees RandomState's stream: it is the same on all machines, in all versions.
        return np.random.RandomState([seed, epoch]).permutation(n_rows).tolist()

    def rows_of_step(step):
        first = step * batch_size
        return [permutation(i // n_rows)[i % n_rows] for i in range(first, first + batch_size)]

    return rows_of_step
