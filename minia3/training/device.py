"""To be written."""

import sys
from contextlib import suppress

import torch

from minia3.files.read import one_line


def choose_device(name):
    """-> the device, and why this one. Raises ValueError for one that is not there."""
    if name is None:
        found = torch.cuda.is_available()
        return torch.device(
            "cuda" if found else "cpu"
        ), torch.cuda.get_device_name() if found else "no CUDA GPU found"
    try:
        torch.ones(1, device=name).tolist()
        return torch.device(name), "as asked"
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device is {name!r}, expected cpu or cuda: {one_line(error)}") from None


def peak_memory(device):
    """Bytes: the most that torch held on a CUDA device; on the CPU, the largest resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(ImportError):  # Windows has none
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )
    return 0
