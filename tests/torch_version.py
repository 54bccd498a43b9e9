"""What a test may expect of the release of PyTorch that it runs on."""

import pytest
import torch

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))

# What PyTorch's attention keeps, and how many tensors it makes, differs between its releases.
counted_with_this_torch = pytest.mark.skipif(
    TORCH < (2, 13),
    reason="the numbers were counted with torch 2.13; older kernels keep other tensors",
)
