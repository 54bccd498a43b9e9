"""Linear layers that multiply in the faster order.

    x W^T = (W x^T)^T

Both sides take the same operations. But the product of a few rows takes about as long as reading
the weight from memory. oneDNN, which computes PyTorch's products of bfloat16, reads the weight
faster if it is the first factor: on a processor with tiles for bfloat16 (AMX), one core reads 10 to
15 GB/s instead of 7 to 11. On one without tiles, most products take longer in this order.
"""

import torch
import torch.nn.functional as F
from torch import nn

from minia3.model.processor import HAS_TILES

MOST_ROWS = 64  # of 96 rows, some products gain less than copying the result takes


class Linear(nn.Linear):
    """x W^T + b, as nn.Linear computes it."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


def linear(x, weight, bias=None):
    """Return F.linear(x, weight, bias)."""
    if bias is None and is_faster_with_weight_first(x, weight):
        return linear_with_weight_first(x, weight)
    return F.linear(x, weight, bias)


def is_faster_with_weight_first(x, weight):
    if not HAS_TILES or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    is_bfloat16_on_cpu = x.device.type == "cpu" and x.dtype == weight.dtype == torch.bfloat16
    return is_bfloat16_on_cpu and 1 <= x.shape[:-1].numel() <= MOST_ROWS


def linear_with_weight_first(x, weight):
    """Return F.linear(x, weight) for a few rows of x."""
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) == 1:
        return torch.mv(weight, rows[0]).view(*x.shape[:-1], -1)
    # Contiguous, because what follows would read a transposed result more slowly.
    return (weight @ rows.T).T.contiguous().view(*x.shape[:-1], -1)
