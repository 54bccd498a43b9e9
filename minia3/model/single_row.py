"""Products of a single row of bfloat16, as fast as memory delivers the weights.

To write one token of one text, a model reads each of its weights once, and this takes most of the
time. On a CPU, PyTorch leaves products of bfloat16 to oneDNN. That of PyTorch 2.13 and 2.14 reads
the weights for a single row at about half the speed of the memory, and PyTorch's own product reads
them up to twice as fast. For two rows it gains at most a fifth, and from three rows on it loses:
512 rows take nine times as long. From PyTorch 2.15 on, oneDNN is the faster one for a single row,
too, and so it is on a processor with tiles for bfloat16 (AMX).
"""

from contextlib import contextmanager

import torch

from minia3.model.processor import TORCH, has_tiles, is_only_thread


def has_fast_product():
    """Return whether PyTorch's own product of a single row is faster than oneDNN's here.

    Measured with AVX-512, with tiles (PyTorch 2.13) and without (2.13, 2.14 and 2.15). Old releases
    have no fast product of their own for x86 (pytorch/pytorch#139208), and other processors have
    not been measured.
    """
    if not (2, 13) <= TORCH < (2, 15):
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return not has_tiles()


HAS_FAST_PRODUCT = has_fast_product()


@contextmanager
def fast_products(n_rows, weight):
    """Compute products of `n_rows` rows without oneDNN while in this context, if that is faster.

    weight: any weight of the model, which tells the dtype and the device.
    """
    if not is_faster_without_onednn(n_rows, weight):
        yield
        return
    was_enabled = torch.backends.mkldnn.enabled
    try:
        torch.backends.mkldnn.enabled = False
        yield
    finally:
        torch.backends.mkldnn.enabled = was_enabled


def is_faster_without_onednn(n_rows, weight):
    """Return whether oneDNN should be off for products of `n_rows` rows with such a weight."""
    is_on_cpu = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    # The switch is for the whole process, and would make the products of other threads slow.
    return HAS_FAST_PRODUCT and n_rows == 1 and is_on_cpu and is_only_thread()
