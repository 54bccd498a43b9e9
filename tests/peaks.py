"""What the tensors of a real pass take, for comparison with what was planned on fake tensors."""

import torch

from minia3.tasks.batches import Batch
from minia3.training.memory_plan import MemoryCounter


def peak_beyond_weights(model, shape, function):
    """Return the most bytes that tensors take while function(batch) runs, beyond the weights.

    shape: (B, M, C, L) of a batch without padding.
    """
    n, m, c, length = shape
    batch = Batch(
        torch.ones(n, m, dtype=torch.long),
        torch.ones(n, m, dtype=torch.bool),
        torch.ones(n, c, length, dtype=torch.long),
        torch.ones(n, c, length, dtype=torch.bool),
        torch.zeros(n, dtype=torch.long),
    )
    counter = MemoryCounter()
    for tensor in (*model.parameters(), batch.source_BM, batch.target_BCL):
        counter.add(tensor)
    n_before = counter.now
    with counter:
        function(batch)
    return counter.peak - n_before
