"""Divide a frozen base among processes: each process holds some rows of every weight (FSDP2).

Before a block runs, its weights are gathered from all processes, and afterwards they are dropped
again. So a process holds its rows, and up to two whole blocks: the one that runs, and the next one
while it is gathered (docs/scale.md). Zhao et al. 2023, arXiv 2304.11277.

In the backward pass, FSDP2 gathers a block's weights when a gradient reaches what the block has
returned. Of the last block that reads a prompt, only the keys and values are used. So it returns
them (`kv_only` in blocks.py).

    a block                     is gathered when it runs, forward or backward
    cross-attention's k and v   are gathered together, when the keys and values of the encoder's
                                output are made, before their block runs
    the rest                    is whole in every process: the embedding, the head, the last norm,
                                T5's tables of biases, and the vectors, which train

All processes take part in gathering. If one of them runs a block more often than the others, it
gets rows of another block, or waits forever, and no error says so. So all processes must make the
same passes, in the same order. Before each pass, they compare how many they have made.
"""

import math
import warnings
from functools import partial
from typing import Any, NamedTuple

import torch

from minia3.model.blocks import blocks_of
from minia3.model.ia3 import IA3


class Shards(NamedTuple):
    """The processes that hold one copy of a model together."""

    mesh: Any  # a DeviceMesh of one dimension
    offload: bool = False  # keep the rows in the memory of the CPU until their block runs

    @property
    def rows_device(self):
        """The device on which the rows are kept."""
        return "cpu" if self.offload else self.mesh.device_type

    def rows(self, n_rows):
        """Return which rows of a weight with `n_rows` this process holds, as a slice.

        The last processes may hold fewer rows, or none.
        """
        n_each = math.ceil(n_rows / self.mesh.size())
        first = min(self.mesh.get_local_rank() * n_each, n_rows)
        return slice(first, min(first + n_each, n_rows))

    def join(self, rows, shape):
        """Return a weight as a DTensor. rows: what this process holds of it. shape: of all rows."""
        from torch.distributed.tensor import DTensor, Shard

        # `from_local` moves rows to the device of the mesh, also those that --offload keeps on the
        # CPU. It does not move rows without values.
        are_elsewhere = rows.device.type != self.mesh.device_type
        local = rows.to("meta") if are_elsewhere else rows
        stride = torch.empty(shape, device="meta").stride()
        weight = DTensor.from_local(
            local, self.mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride
        )
        if are_elsewhere:
            weight = torch.empty_like(weight, device=rows.device)
            weight.to_local().copy_(rows)
        return weight


def shard(model, shards):
    """Divide the blocks of `model` among the processes of `shards`.

    The model may still be on the meta device, and get its weights later (load_shards.py). Raise
    ValueError if torch is too old.
    """
    check_torch(model)
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
    from torch.distributed.fsdp import register_fsdp_forward_method as register

    # FSDP2 warns that an output that is a view must not be changed in place. Here, only caches are
    # written into, and only if there are no gradients.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    policy = OffloadPolicy()
    if shards.offload:
        policy = CPUOffloadPolicy(pin_memory=shards.mesh.device_type != "cpu")
    options = {
        "mesh": shards.mesh,
        "offload_policy": policy,
        "ignored_params": whole_parameters(model),
    }
    for block in blocks_of(model):
        if block.cross is not None:
            fully_shard([block.cross.k, block.cross.v], **options)
        fully_shard(block, **options)
    fully_shard(model, **options)
    # FSDP2 gathers around `forward`, which these models do not have.
    register(model, "run_blocks")
    # It would also move all tensors that it sees among the arguments to a GPU, and wait for that.
    # `start` reads masks and adapter rows on the CPU, so FSDP2 sees a function without arguments.
    start = model.start
    model.call = lambda function: function()
    register(model, "call")
    model.start = lambda *args, **options: model.call(partial(start, *args, **options))
    model.shards = shards
    model.n_read_at_least = 1  # so that a LLaMA makes a pass even for prompts of one token
    count_passes(model)


def check_torch(model):
    """Raise ValueError if torch is too old to divide a model."""
    oldest = (2, 7)  # the first that can leave parameters whole
    kind = "a base"
    if any(not parameter.is_floating_point() for parameter in model.parameters()):
        oldest = (2, 12)  # the first that can divide integers
        kind = "a quantized base"
    version = tuple(int(number) for number in torch.__version__.split(".")[:2])
    if version < oldest:
        needed = ".".join(map(str, oldest))
        raise ValueError(
            f"--shard and --offload of {kind} need torch {needed} or newer, found "
            f"{torch.__version__}"
        )


def is_sharded(model):
    """Return whether the model is divided among processes."""
    return getattr(model, "shards", None) is not None


def whole_parameters(model):
    """Return the set of the parameters that are not divided."""
    divided = set()
    for block in blocks_of(model):
        divided |= set(block.parameters())
    for module in model.modules():
        if isinstance(module, IA3):
            divided.discard(module.scale)
    return set(model.parameters()) - divided


def is_divided(parameter):
    """Return whether a parameter of a sharded model is divided."""
    return hasattr(parameter, "full_tensor")  # of a DTensor, whose import takes a second


def gathered(parameter):
    """Return the whole tensor of a parameter, on the CPU if it has to be gathered.

    All processes must call this for the same parameters, in the same order.
    """
    tensor = parameter.detach()
    if is_divided(tensor):
        tensor = tensor.full_tensor().cpu()
    return tensor


# Passes


def count_passes(model):
    """Let `model.n_passes` count passes through its stacks, with a comparison before each one."""
    model.n_passes = 0

    def begin_pass(*_):
        model.n_passes += 1
        compare_passes(model.shards, model.n_passes)

    for name, module in model.named_modules():
        if name.endswith("blocks.0"):
            module.register_forward_pre_hook(begin_pass, prepend=True)  # before FSDP2's own hook


def reset_passes(model):
    """Return how many passes the model has made since the last call, and count from 0 again.

    Raise RuntimeError if the processes have made different numbers of passes.
    """
    n_passes = model.n_passes
    # Negative, so that it never equals the number that another process gives before its next pass.
    compare_passes(model.shards, -n_passes)
    model.n_passes = 0
    return n_passes


def compare_passes(shards, n_passes, number=0):
    """Check that the processes of `shards` have made equally many passes, and exchange a number.

    Return the list of the numbers that the processes give: 0 before a pass, or a positive one that
    all of them need to know. Raise RuntimeError if they have made different numbers of passes, or
    if only some give 0.
    """
    here = torch.tensor([n_passes, number])
    found = [torch.zeros_like(here) for _ in range(shards.mesh.size())]
    torch.distributed.all_gather(found, here, group=shards.mesh.get_group())
    passes, numbers = torch.stack(found).T.tolist()
    if len(set(passes)) > 1 or 0 < numbers.count(0) < len(numbers):
        raise RuntimeError(
            "the processes that share a copy of the model are out of step: their passes are "
            f"{passes}"
        )
    return numbers
