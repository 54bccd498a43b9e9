"""The activations of the feed-forwards.

An activation may overwrite its input, because new memory takes time on a CPU. It computes the same
numbers either way.
"""

import torch.nn.functional as F


def gelu(x, in_place):
    """The tanh approximation, of T5 v1.1. PyTorch has no function that overwrites x with it."""
    return F.gelu(x, approximate="tanh")


# Each takes x, and whether it may overwrite x.
ACTIVATIONS = {"relu": F.relu, "gelu": gelu, "silu": F.silu}
