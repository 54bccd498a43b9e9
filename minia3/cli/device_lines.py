"""What `info --devices` answers: does a model fit, what takes the memory, and how to run it."""

import math
from typing import NamedTuple

import torch

from minia3.cli.terminal import format_size
from minia3.training.choices import QUANTIZED
from minia3.training.device_plan import Plan, recipe_shape

DTYPE = torch.bfloat16  # of weights that are not quantized, as by default on a GPU
MOST_DEVICES = 64  # that an advice may ask for

PART_TITLES = {
    "weights": "the base",
    "vectors": "with gradients and moments",
    "activations": "at the peak of a step, with --recompute",
    "unsharded": "whole for a moment: blocks that run, a dequantized weight",
}

NOTE = """\
Per device. In bfloat16 but for the vectors. A tenth of the memory must stay free: for PyTorch
itself, and for the gaps that the allocator leaves."""


class Devices(NamedTuple):
    """What the user has, and asks for."""

    n_devices: int
    memory: float  # bytes of each
    quantize: str | None
    shard: bool  # divide the base, also if it would fit

    def check(self):
        """Raise ValueError if nothing can be planned for these devices."""
        if self.n_devices < 1 or not 0 < self.memory < math.inf:
            found = f"--devices is {self.n_devices} and --memory is {self.memory / 1e9:g}"
            raise ValueError(f"info: {found}, expected at least 1 device and more than 0 GB")
        if self.shard and self.n_devices == 1:
            raise ValueError("info: --shard divides the base among devices, but --devices is 1")


def device_lines(name, model_config, devices, batch, length):
    """Yield (title, text) lines: the plan for a batch of `batch` sources of `length` tokens.

    name: what --model is given. devices: a Devices. The base is divided if that is asked for, or if
    a device cannot hold it, as in a run.
    """
    n_examples = -(-batch // devices.n_devices)  # of the device that has the most
    shape = recipe_shape(n_examples, length)
    plan = Plan(model_config, DTYPE, devices.quantize)
    n_shards = choose_shards(plan, devices, shape)
    on_device = plan.on_device(n_shards, shape)
    fits = on_device.fits(devices.memory)

    share = "divided among them" if n_shards > 1 else "whole on each"
    kept = devices.quantize or "bfloat16"
    yield "devices", f"{devices.n_devices} of {format_size(devices.memory)}: {kept} base, {share}"
    answer = "yes" if fits else "no"
    yield "fits", f"{answer}: {format_size(on_device.total)} for {n_examples} x {length} tokens"
    for title, n_bytes in on_device._asdict().items():
        yield title, f"{format_size(n_bytes)} ({PART_TITLES[title]})"
    largest = plan.largest_batch(n_shards, shape, devices.memory)
    yield "largest batch", f"{largest * devices.n_devices:,} ({largest:,} on each device)"
    if largest > 0:
        sizes = ["--batch-size", batch, "--max-length", length]
        if largest < n_examples:
            sizes += ["--micro-batch-size", largest]  # of each process
        yield "command", " ".join(map(str, command(name, devices, n_shards) + sizes))
    else:
        yield "instead", advice(model_config, devices, shape)
    for line in NOTE.splitlines():
        yield "", line


def choose_shards(plan, devices, shape):
    """Return how many devices divide the base: all of them, or 1 if each holds the whole.

    One example decides, because a batch that is too large is a matter for --micro-batch-size.
    """
    alone = plan.on_device(1, shape._replace(n_examples=1))
    if devices.shard or not alone.fits(devices.memory):
        return devices.n_devices
    return 1


def command(name, devices, n_shards):
    """Return the words of the command line of the run, without the sizes of its batches."""
    words = ["python"]
    if devices.n_devices > 1:
        words = ["torchrun", "--nproc-per-node", devices.n_devices]
    words += ["train.py", "--model", name, "--task", "TASK", "--dtype", "bfloat16", "--recompute"]
    if devices.quantize:
        words += ["--quantize", devices.quantize]
    if n_shards > 1:
        words += ["--shard"]
    return words


def advice(model_config, devices, shape):
    """Return what to do if not even one example on each device fits.

    A smaller base comes first, then more devices, then both.
    """
    first = shape._replace(n_examples=1)
    kinds = tuple(dict.fromkeys((devices.quantize, *QUANTIZED)))
    plans = {kind: Plan(model_config, DTYPE, kind) for kind in kinds}
    n_devices = devices.n_devices
    while n_devices <= MOST_DEVICES:
        for kind, plan in plans.items():
            if plan.on_device(n_devices, first).fits(devices.memory):
                flags = f"--quantize {kind}" if kind != devices.quantize else ""
                more = f"--devices {n_devices}" if n_devices != devices.n_devices else ""
                return f"{more} {flags} fits".strip()
        n_devices *= 2
    return "take devices with more memory, or a smaller model"
