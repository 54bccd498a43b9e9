"""What this PyTorch and the processor can do, for code that chooses the faster of two ways."""

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
