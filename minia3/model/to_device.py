"""Copy what the CPU has prepared to the device of a model, and go on at once.

What a GPU computes is a queue, and the CPU fills it ahead of time. A copy that the CPU waits for
lets the queue run empty, because such a copy begins only when all work before it is done.
"""


def to_device(x, device):
    """Return x as a tensor on the device, without waiting until it is there."""
    is_on_cpu = x.device.type == "cpu"
    if is_on_cpu and device.type == "cuda":
        # CUDA copies in the background only from pinned memory, which the system does not move.
        x = x.pin_memory()
    # On Apple's GPU, nothing keeps x alive until it has been copied.
    is_lasting = device.type != "mps"
    return x.to(device, non_blocking=is_on_cpu and is_lasting)
