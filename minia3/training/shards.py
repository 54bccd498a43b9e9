"""Whether a run divides its frozen base among processes: --shard, --offload, and by default."""

import atexit

from minia3.checkpoints.load import open_checkpoint, packed_names
from minia3.files.processes import (
    FOREVER,
    choose_backend,
    close_connections,
    gathered,
    hold_together,
    n_processes,
)
from minia3.model.shard import Shards
from minia3.training.choices import TRAINED_ALONE
from minia3.training.device import device_module, free_memory

ALL = 0  # the value of --shard without a number

# A model whose weights take less of the memory than this is not planned, because it takes seconds.
SMALL_SHARE = 0.1


def choose_shards(config, device, dtype):
    """Return the Shards of a run, or None if every process holds the whole model.

    The model is also divided, among all processes, if it would not fit on one of their devices.
    Raise the errors of `make_shards`.
    """
    n_per_copy = config.shard
    if n_per_copy is None and not fits(config, device, dtype):
        n_per_copy = ALL
    if config.resume is not None and n_processes() == 1:
        n_per_copy = 1  # a divided run may be resumed by one process, with more memory
    return make_shards(n_per_copy, config.offload, device)


def make_shards(n_per_copy, offload, device):
    """Return the Shards for the values of --shard and --offload, or None if both are absent.

    All processes must call this. Raise ValueError if --shard does not suit their number.
    """
    if n_per_copy == ALL:
        n_per_copy = n_processes()
        if n_per_copy == 1 and not offload:
            raise ValueError(
                "--shard divides a model among processes, and there is one: start several "
                "(torchrun --nproc-per-node N ...), or keep the weights on the CPU with --offload"
            )
    n_per_copy = n_per_copy or 1
    hold_together(n_per_copy)
    if n_per_copy == 1 and not offload:
        return None
    return Shards(make_mesh(device, n_per_copy), offload)


def fits(config, device, dtype):
    """Return whether the device of every process holds the whole model while an example trains.

    A single process cannot divide the model, so it need not find out, and the answer is True.
    """
    can_divide = config.method not in TRAINED_ALONE and not config.compile
    if n_processes() == 1 or not can_divide:
        return True
    memory = free_memory(device)
    is_enough = memory is None or is_enough_memory(config, dtype, memory)
    return all(gathered(is_enough))  # because all of them must decide alike


def is_enough_memory(config, dtype, memory):
    """Return whether `memory` bytes hold the whole model while an example trains."""
    model, stored, _ = open_checkpoint(config.model)
    n_entries = sum(parameter.numel() for parameter in model.parameters())
    if n_entries * dtype.itemsize < SMALL_SHARE * memory:
        return True
    # Imported late, because `generate` and `predict` divide models, too, and plan nothing.
    from minia3.training.device_plan import fits_one_device

    packed = packed_names(model, stored)
    return fits_one_device(model.config, dtype, config, memory, packed)


def make_mesh(device, n_per_copy):
    """Return the DeviceMesh of the processes that hold a copy of the model with this one.

    `device` becomes the current one of this process.
    """
    import torch.distributed
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    if not torch.distributed.is_initialized():  # --offload in a process that is alone
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(choose_backend(), store=store, rank=0, world_size=1)
        atexit.register(close_connections)  # or NCCL would print a warning when Python ends
    module = device_module(device)
    if device.index is not None and hasattr(module, "set_device"):
        # A mesh has a kind of device and no index, so FSDP2 computes on the current one.
        module.set_device(device.index)
    if n_per_copy == n_processes():
        return init_device_mesh(device.type, (n_per_copy,))
    # A mesh would give its groups torch's timeouts: 10 minutes with NCCL, and 30 with gloo.
    group, _ = torch.distributed.new_subgroups(n_per_copy, timeout=FOREVER)
    return DeviceMesh.from_group(group, device.type)
