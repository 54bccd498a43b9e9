"""Where a model runs: the device, the dtype of its weights, and the memory that it took."""

import os
import sys
from contextlib import suppress

import torch

from minia3.files.read import one_line

# With fewer parameters than this, sharing an operation among cores takes longer than the operation.
SMALL_MODEL = 10**7


def choose_device(name):
    """Return the device, and why it was chosen. Raise ValueError if there is no such device."""
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda"), torch.cuda.get_device_name()
        return torch.device("cpu"), "no CUDA GPU found"
    try:
        torch.ones(1, device=name).tolist()
    except (RuntimeError, AssertionError) as error:
        expected = "expected a device that PyTorch can use, such as cpu"
        raise ValueError(f"--device is {name!r}, {expected}: {one_line(error)}") from None
    return torch.device(name), "as asked"


def choose_dtype(config, device):
    """Return the dtype of the weights.

    The vectors are float32 whatever the dtype of the base is.
    """
    if config.dtype is not None:
        return getattr(torch, config.dtype)
    # Full fine-tuning updates the weights themselves, and in bfloat16 small updates are lost.
    if device.type == "cpu" or config.method == "full":
        return torch.float32
    return torch.bfloat16


def use_deterministic_kernels():
    """Make equal runs give equal bits on a GPU, too."""
    torch.use_deterministic_algorithms(True)
    # torch refuses cuBLAS without this, because cuBLAS is not deterministic otherwise.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def limit_threads(n_parameters):
    """Use a single thread for a small model."""
    if n_parameters < SMALL_MODEL:
        torch.set_num_threads(1)


def peak_memory(device):
    """Return the peak memory in bytes: what torch held on a GPU, or what the process took.

    Return 0 if the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(ImportError):  # Windows does not have this module
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, others KiB
    return 0
