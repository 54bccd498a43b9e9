"""One forward pass for the examples of several cells.

Shapes: B examples, C choices, L tokens of a choice, A adapters: the rows of the model's vectors, K
facts about an example.
"""

import torch

from minia3.model.shard import is_sharded
from minia3.model.to_device import to_device
from minia3.tasks.batches import collate
from minia3.training.losses import count_terms_of, losses_of_examples
from minia3.training.replicas import share_of_step

# The C library gives a block of 32 MB or more back to the system when it is freed, and the next one
# waits for new, zeroed pages.
LARGE_BLOCK = 1 << 25  # bytes


def choose_micro_batch_size(group):
    """Return how many examples a forward pass of a group reads, or None for all of a step.

    On a GPU, a large pass is a fast one. On a CPU, the passes of a grid are kept so small that the
    widest tensors, those inside the feed-forwards, stay below LARGE_BLOCK: in a single pass,
    fifteen adapters of t5-base with eight examples each take 1.5 times as long, and five times the
    memory. A pass has at least as many examples as a step of one adapter.
    """
    config = group.config
    if config.micro_batch_size is not None:
        return config.micro_batch_size
    is_grid_on_cpu = len(group.cells) > 1 and group.device.type == "cpu"
    has_costly_passes = is_sharded(group.model)  # because each pass gathers all weights
    if not is_grid_on_cpu or has_costly_passes:
        return None
    bytes_per_token = group.model.config.d_ff * group.model.embed.weight.itemsize
    longest = 1
    for cell in group.cells:
        for example in cell.batches.examples.values():
            longest = max(longest, example.n_tokens)
    return max(config.batch_size, (LARGE_BLOCK - 1) // (bytes_per_token * longest))


class MixedBatch:
    """The examples of one step: all of the first cell's, then all of the second's, and so on."""

    def __init__(self, cells, step, n_rows):
        """n_rows: how many rows of vectors the model has."""
        self.cells = cells
        self.pairs = []  # (cell, example)
        self.n_terms = {}  # cell -> how many terms each loss has in its examples of the step
        self.n_rows = n_rows
        for cell in cells:
            examples = cell.batches[step]
            self.pairs += [(cell, example) for example in examples]
            self.n_terms[cell] = count_terms_of(examples, cell.config.losses.split(","))

    @property
    def n_tokens(self):
        """How many tokens the step reads or scores, without padding."""
        return sum(example.n_tokens for _, example in self.pairs)

    def split(self, size=None):
        """Yield micro-batches of at most `size` examples, or one if `size` is None.

        Their losses, and those of the other processes, add up to the losses of the step.
        """
        for pairs in share_of_step(self.pairs, size or len(self.pairs)):
            # Other processes may have one more part, and this one must make as many passes. Then it
            # reads any example, which does not count.
            is_counted = bool(pairs)
            yield MicroBatch(pairs or self.pairs[:1], self.n_terms, self.n_rows, is_counted)


class MicroBatch:
    """The examples of one forward pass. The examples of each cell are contiguous."""

    def __init__(self, pairs, n_terms, n_rows, is_counted=True):
        """pairs: some of those of a MixedBatch, which also has n_terms and n_rows.

        is_counted: whether the losses of these examples count. Otherwise they are 0.
        """
        cells = [cell for cell, _ in pairs]  # the owner of each example
        self.inputs = collate([example for _, example in pairs])
        self.loss_names = list(n_terms[cells[0]])  # all cells of a run have the same losses
        self.n_rows = n_rows
        self.is_counted = is_counted
        rows = torch.tensor([cell.row for cell in cells])
        self.row_B = rows  # the argument `adapter` of `start`
        if n_rows == 1:
            self.row_B = None  # all examples use the only row that the model has
        # What the losses need to know of each example: its label, its adapter, and how many terms
        # each loss has. These facts are one tensor, because copying a few numbers to a GPU takes as
        # long as copying many.
        facts = [self.inputs.label_B, rows]
        for name in self.loss_names:
            facts.append(torch.tensor([n_terms[cell][name] for cell in cells]))
        self.facts_KB = torch.stack(facts)

    def losses(self, logp_BCL):
        """Return (A,): what these examples add to the loss of each cell, at the cell's row."""
        if not self.is_counted:
            # Every score becomes 0, whose gradient is 0 even if the score is NaN.
            everywhere = torch.ones_like(logp_BCL, dtype=torch.bool)
            return logp_BCL.masked_fill(everywhere, 0.0).sum().expand(self.n_rows)
        device = logp_BCL.device
        mask_BCL = to_device(self.inputs.target_mask_BCL, device)
        label_B, row_B, *counts = to_device(self.facts_KB, device)
        n_terms = dict(zip(self.loss_names, counts, strict=True))
        loss_B = losses_of_examples(logp_BCL, mask_BCL, label_B, n_terms)
        return loss_B.new_zeros(self.n_rows).index_add(0, row_B, loss_B)
