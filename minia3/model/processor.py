"""What this PyTorch and the processor can do, for code that chooses the faster of two ways."""

import threading

import torch

MAJOR, MINOR, *_ = torch.__version__.split(".")
TORCH = (int(MAJOR), int(MINOR))


def has_tiles():
    """Return whether the CPU multiplies tiles of bfloat16 (AMX), and this PyTorch uses them.

    What follows from it was measured with PyTorch 2.13. Older releases may not know the answer.
    """
    if TORCH < (2, 13):
        return False
    capabilities = torch.cpu.get_capabilities()
    return capabilities.get("amx_bf16", False)


HAS_TILES = has_tiles()


# The names of threads that make no products: tqdm's, which every progress bar starts, and the one
# that reads the next rows for `predict` (files/ahead.py). If the second counted, then the last bits
# of an answer would depend on whether the rows had been read by then.
HARMLESS_THREADS = ("tqdm_monitor", "read_ahead")


def is_only_thread():
    """Return whether no other thread of Python could make products.

    Some of PyTorch's switches are for the whole process.
    """
    names = [thread.name for thread in threading.enumerate()]
    return sum(name not in HARMLESS_THREADS for name in names) == 1
