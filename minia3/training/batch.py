"""One forward pass for the examples of several cells.

Shapes: B examples, C choices, L tokens of a choice.
"""

import math

import torch

from minia3.model.to_device import to_device
from minia3.tasks.batches import collate
from minia3.training.losses import LOSSES, count_terms, total_loss
from minia3.training.replicas import share_of_step


class MixedBatch:
    """The examples of one step: all of the first cell's, then all of the second's, and so on."""

    def __init__(self, cells, step, has_rows):
        """has_rows: whether the model has a row of vectors for each of several cells."""
        self.cells = cells
        self.pairs = []  # (cell, example)
        self.n_terms = {}  # cell -> the `count_terms` of all its examples in the step
        self.has_rows = has_rows
        for cell in cells:
            examples = cell.batches[step]
            self.pairs += [(cell, example) for example in examples]
            whole = collate(examples)
            self.n_terms[cell] = count_terms(whole.target_mask_BCL, whole.label_B)

    @property
    def n_tokens(self):
        """How many tokens the step reads or scores, without padding."""
        total = 0
        for _, example in self.pairs:
            total += len(example.source) + sum(map(len, example.targets))
        return total

    def split(self, size=None):
        """Yield micro-batches of at most `size` examples, or one if `size` is None.

        Their losses, and those of the other processes, add up to the losses of the step.
        """
        for pairs in share_of_step(self.pairs, size or len(self.pairs)):
            if pairs:
                yield MicroBatch(pairs, self.n_terms, self.has_rows)
            else:
                # Other processes have one more part, and this one must make as many passes. So it
                # reads an example whose losses are divided by infinity, which adds 0.
                no_weight = dict.fromkeys(self.cells, dict.fromkeys(LOSSES, math.inf))
                yield MicroBatch(self.pairs[:1], no_weight, self.has_rows)


class MicroBatch:
    """The examples of one forward pass. The examples of each cell are contiguous."""

    def __init__(self, pairs, n_terms, has_rows):
        self.cells = [cell for cell, _ in pairs]  # the owner of each example
        self.batch = collate([example for _, example in pairs])
        self.n_terms = n_terms
        self.row_B = None  # the model's only row
        if has_rows:
            self.row_B = torch.tensor([cell.row for cell in self.cells])

    def losses(self, logp_BCL):
        """Return a dict from each cell to the part of its loss that comes from these examples."""
        # For all cells at once, because a copy of a few numbers takes as long as one of many.
        mask_BCL = to_device(self.batch.target_mask_BCL, logp_BCL.device)
        label_B = to_device(self.batch.label_B, logp_BCL.device)
        losses = {}
        for cell in dict.fromkeys(self.cells):
            first = self.cells.index(cell)
            rows = slice(first, first + self.cells.count(cell))
            names = cell.config.losses.split(",")
            losses[cell] = total_loss(
                logp_BCL[rows], mask_BCL[rows], label_B[rows], names, self.n_terms[cell]
            )
        return losses
