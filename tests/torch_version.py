"""What a test may expect of the release of PyTorch that it runs on."""

import pytest
import torch

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))

# What PyTorch's attention keeps, and how many tensors it makes, differs between its releases.
counted_with_this_torch = pytest.mark.skipif(
    TORCH < (2, 13),
    reason="the numbers were counted with torch 2.13; older kernels keep other tensors",
)

divides_a_base = pytest.mark.skipif(
    TORCH < (2, 7), reason="torch 2.7 is the first to divide a base"
)
divides_a_quantized_base = pytest.mark.skipif(
    TORCH < (2, 12), reason="torch 2.12 is the first to divide a quantized base"
)
