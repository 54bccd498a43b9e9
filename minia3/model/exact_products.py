"""Float32 products of bfloat16 tensors on a CPU, in less than half the time, and as exact.

Attention needs scores in float32: rounded to bfloat16, they would make three times the error. But
PyTorch's product of two bfloat16 tensors rounds its result to bfloat16, and a product of float32
tensors cannot use the processor's instruction for bfloat16.

oneDNN, which computes PyTorch's products on a CPU, can be allowed to round the factors of a float32
product to bfloat16. Factors that have come from bfloat16 do not change. It adds up in float32.
"""

from contextlib import contextmanager

import torch

from minia3.model.processor import TORCH, has_tiles, is_only_thread


def has_exact_products():
    """Return whether this was measured to be faster: AVX-512 with bfloat16, without tiles.

    On a processor with tiles, it has not been measured. Older releases of PyTorch may not know what
    the processor can do.
    """
    if TORCH < (2, 13) or has_tiles():
        return False
    return torch.cpu.get_capabilities().get("avx512_bf16", False)


HAS_EXACT_PRODUCTS = has_exact_products()


def are_products_exact(dtype):
    """Return whether `exact_products` makes products faster.

    It does not while another thread runs: the permission is for the whole process, and would round
    the factors of the other thread's products.
    """
    return HAS_EXACT_PRODUCTS and dtype == torch.bfloat16 and is_only_thread()


@contextmanager
def exact_products(dtype):
    """Multiply float32 tensors as if they were bfloat16 while in this context, if that is faster.

    dtype: what the factors had before they became float32. Nothing happens if it is not bfloat16.
    """
    if not are_products_exact(dtype):
        yield
        return
    products = torch.backends.mkldnn.matmul
    precision = products.fp32_precision
    try:
        products.fp32_precision = "bf16"
        yield
    finally:
        products.fp32_precision = precision
