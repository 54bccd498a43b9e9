"""Weights in huge pages, which a processor reads faster.

To write a token, a CPU reads nearly every weight once. It must also find out where each page of
memory is. A page has 4 kB, so hundreds of megabytes are a hundred thousand pages, which it looks up
again for each token. Linux also has huge pages (2 MB on most processors) for programs that ask.
Lookups are slow in a virtual machine: in ours, one core reads 14.5 GB/s from huge pages, and 9 GB/s
from small ones. A few rows of bfloat16 gain most. Products of float32 gain little. Training and
long prompts gain nothing, because there each weight is read once for many tokens.

A mapped file lies in small pages. So the weights are copied, and then every process has its own.
"""

import mmap
from pathlib import Path

import torch

SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
ALIGNMENT = 64  # bytes, as PyTorch aligns its own tensors


# A tensor that is made in torch.inference_mode can never be changed or trained outside of it.
@torch.inference_mode(False)
def move_to_huge_pages(model):
    """Copy the parameters of a model on the CPU into huge pages. Return whether this was done.

    It is not done if a parameter is on another device or divided among processes, if the system
    grants no huge pages (it is not Linux, or they are switched off), or no memory (`ulimit -v`).

    The parameters stay the same objects. No other thread may use the model meanwhile. The system
    can drop the pages of a mapped file when memory gets scarce, but not the copies.
    """
    page = huge_page_bytes()
    weights = [weight for weight in model.parameters() if weight.nbytes > 0]
    if page is None or not all(map(is_plain, weights)):
        return False
    n_bytes = sum(padded_bytes(weight) for weight in weights)
    try:
        memory = mmap.mmap(-1, n_bytes + page, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        return False
    address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    offset = -address % page  # of the first huge page
    for weight in weights:
        copy = torch.frombuffer(memory, dtype=weight.dtype, count=weight.numel(), offset=offset)
        weight.data = copy.view(weight.shape).copy_(weight.data)
        offset += padded_bytes(weight)
    return True


def is_plain(weight):
    """Return whether this is a tensor in the memory of the CPU, and not a part of one."""
    return weight.device.type == "cpu" and type(weight.data) is torch.Tensor


def huge_page_bytes():
    """Return the size of a huge page, or None if this system grants none on request."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # not Linux
        return None
    try:
        choice = (SETTINGS / "enabled").read_text()  # such as "always [madvise] never"
        n_bytes = int((SETTINGS / "hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return None
    return None if "[never]" in choice else n_bytes


def padded_bytes(weight):
    """Return the bytes of a tensor, rounded up so that the next tensor is aligned."""
    return -(-weight.nbytes // ALIGNMENT) * ALIGNMENT
