"""The activations of the feed-forwards, and how gradients pass through them.

An activation may overwrite its input, because new memory takes time on a CPU. It computes the same
numbers either way.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Activation(NamedTuple):
    """A function of each entry on its own."""

    apply: Callable  # (x, in_place) -> its values; in_place: whether it may overwrite x
    gradient: Callable  # (gradient of the values, x) -> gradient of x, for use without autograd


def relu_gradient(grad, x):
    return torch.ops.aten.threshold_backward(grad, x, 0)


def gelu(x, in_place):
    """The tanh approximation, of T5 v1.1. PyTorch has no function that overwrites x with it."""
    return F.gelu(x, approximate="tanh")


def gelu_gradient(grad, x):
    return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")


def silu_gradient(grad, x):
    return torch.ops.aten.silu_backward(grad, x)


ACTIVATIONS = {
    "relu": Activation(F.relu, relu_gradient),
    "gelu": Activation(gelu, gelu_gradient),
    "silu": Activation(F.silu, silu_gradient),
}
