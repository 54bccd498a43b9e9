"""Copy what the CPU has prepared to the device of a model, without waiting for the copy.

    to_device        to the device
    start_reading    back to the CPU, so that only this copy is waited for

A GPU works through a queue, which the CPU fills ahead of time. A copy that the CPU waits for lets
the queue run empty, because such a copy begins only when all work before it is done. A copy within
the queue would make the GPU wait instead. So copies to a CUDA GPU have a queue (a stream) of
their own: the tensors of a batch arrive while the GPU still computes the batch before.
"""

from contextlib import contextmanager
from functools import cache

import torch


@contextmanager
def cpu_as_default():
    """In this context, tensors are made on the CPU unless another device is given.

    In PyTorch this is so unless torch.set_default_device was called. Only then is it changed here,
    because this slows down each operation.
    """
    if torch.empty(0).device.type == "cpu":
        yield
        return
    with torch.device("cpu"):
        yield


def to_device(x, device):
    """Return x as a tensor on the device, if possible without waiting until it is there."""
    is_on_cpu = x.device.type == "cpu"
    if is_on_cpu and device.type == "cuda":
        return copy_on_side_stream(x, device)
    # On Apple's and Intel's GPUs, nothing keeps x alive until it has been copied (for Intel's, see
    # intel/torch-xpu-ops#5217).
    is_lasting = device.type not in ("mps", "xpu")
    return x.to(device, non_blocking=is_on_cpu and is_lasting)


def copy_on_side_stream(x, device):
    """Return a copy of x on a CUDA device, which is made while the device computes."""
    computing = torch.cuda.current_stream(device)
    copying = side_stream(device)
    with torch.cuda.stream(copying):
        # CUDA copies in the background only from pinned memory, which the system does not move.
        copy = x.pin_memory().to(device, non_blocking=True)
    computing.wait_stream(copying)  # The GPU waits there if it must. The CPU does not.
    # Otherwise, a later copy could get the memory of this one while the GPU has yet to read it:
    # the memory belongs to the stream that copies, and Python frees it ahead of time.
    copy.record_stream(computing)
    return copy


@cache
def side_stream(device):
    """Return the stream on which copies to a CUDA device are made."""
    return torch.cuda.Stream(device)


def start_reading(x):
    """Begin to copy x to the CPU. Return a function that waits for the copy, and returns it.

    A CUDA GPU may be given other work before the function is called. `x.cpu()` would come after
    that work in the GPU's queue, and so wait for it, too.
    """
    if x.device.type != "cuda":
        return x.cpu
    copy = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True)
    copy.copy_(x, non_blocking=True)
    is_there = torch.cuda.Event()
    is_there.record(torch.cuda.current_stream(x.device))

    def read():
        is_there.synchronize()
        return copy

    return read
