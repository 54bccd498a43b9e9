"""What `info --devices` answers: does a model fit, what takes the memory, and how to run it."""

import math
import shlex
import textwrap
from contextlib import suppress
from typing import NamedTuple

import torch

from minia3.cli.terminal import format_size
from minia3.model.quantized import check_widths
from minia3.training.choices import QUANTIZED
from minia3.training.device_plan import Plan, recipe_shape
from minia3.training.shards import ALL
from minia3.training.shown_commands import COMMAND

DTYPE = torch.bfloat16  # of weights that are not quantized, as by default on a GPU
MOST_DEVICES = 64  # that an advice may ask for, unless there are more already

PART_TITLES = {
    "weights": "the base",
    "vectors": "with gradients and moments",
    "activations": "at the peak of a step, with --recompute",
    "unsharded": "for a moment: blocks that run, a dequantized weight",
}

NOTE = (
    "Figures are per device, {dtypes}. A tenth of the memory must stay free: for PyTorch "
    "itself, and for the gaps that the allocator leaves."
)
NOTE_WIDTH = 100


class Devices(NamedTuple):
    """What the user has, and asks for."""

    n_devices: int
    memory: float  # bytes of each
    quantize: str | None
    shard: int | None  # how many devices share a copy of the base, or ALL; None: as a run chooses
    offload: bool

    def check(self):
        """Raise ValueError if nothing can be planned for these devices."""
        if self.n_devices < 1 or not 0 < self.memory < math.inf:
            found = f"--devices is {self.n_devices} and --memory is {self.memory / 1e9:g}"
            raise ValueError(f"info: {found}, expected at least 1 device and more than 0 GB")
        if self.shard is None:
            return
        if self.shard == ALL and self.n_devices == 1 and not self.offload:
            raise ValueError("info: --shard divides the base among devices, but --devices is 1")
        if self.shard < 0 or self.n_devices % (self.shard or self.n_devices):
            found = f"info: --shard is {self.shard} and --devices is {self.n_devices}"
            raise ValueError(f"{found}, expected a number that divides --devices")


def device_lines(name, model, devices, batch, length, packed):
    """Yield (title, text) lines: the plan for a batch of `batch` sources of `length` tokens.

    name: what --model is given. model: one on the meta device. devices: a Devices. The base is
    divided if that is asked for, or if a device cannot hold it, as in a run. packed: see `Plan`.
    """
    n_examples = math.ceil(batch / devices.n_devices)  # of the device that has the most
    shape = recipe_shape(n_examples, length)
    plan = Plan(model.config, DTYPE, devices.quantize, packed=packed)
    n_shards = choose_shards(plan, devices, shape)
    on_device = plan.on_device(n_shards, shape, devices.offload)
    answer = "yes" if on_device.fits(devices.memory) else "no"

    stored_kind = "nf4" if packed else None
    kind = devices.quantize or stored_kind
    base = f"{kind or 'bfloat16'} base, {place_of_base(devices, n_shards)}"
    yield "devices", f"{devices.n_devices} of {format_size(devices.memory)}: {base}"
    yield "fits", f"{answer}: {format_size(on_device.total)} for {n_examples} x {length} tokens"
    yield from part_lines(plan, devices, n_shards, on_device)
    largest = plan.largest_batch(n_shards, shape, devices.memory, devices.offload)
    yield "largest batch", f"{largest * devices.n_devices:,} ({largest:,} on each device)"
    if largest > 0:
        sizes = ["--batch-size", batch, "--max-length", length]
        if largest < n_examples:
            sizes += ["--micro-batch-size", largest]  # of each process
        yield "command", shlex.join(map(str, command(name, devices, n_shards) + sizes))
    else:
        yield "instead", advice(model, devices, shape, packed)
    dtypes = "in bfloat16 except for the vectors"
    if kind:
        dtypes = f"with blocks in {kind}, vectors in float32, the rest in bfloat16"
    for line in textwrap.wrap(NOTE.format(dtypes=dtypes), NOTE_WIDTH):
        yield "", line


def part_lines(plan, devices, n_shards, on_device):
    """Yield the lines about the parts of a DevicePlan, and about what --offload keeps elsewhere."""
    titles = dict(PART_TITLES)
    if devices.offload:
        titles["weights"] = "what belongs to no block"
    for name, n_bytes in on_device._asdict().items():
        yield name, f"{format_size(n_bytes)} ({titles[name]})"
    if devices.offload:
        each = plan.on_cpu(n_shards, is_pinned=True)
        total = format_size(each * devices.n_devices)
        yield "on the CPU", f"{format_size(each)} for each device, {total} for all of them"


def choose_shards(plan, devices, shape):
    """Return how many devices divide the base; with 1, each holds the whole. As in a run.

    One example decides, because a batch that is too large is a matter for --micro-batch-size.
    """
    if devices.shard is not None:
        return devices.shard or devices.n_devices
    alone = plan.on_device(1, shape._replace(n_examples=1))
    return 1 if alone.fits(devices.memory) else devices.n_devices


def place_of_base(devices, n_shards):
    """Return where the base is, in words."""
    place = "whole for each" if devices.offload else "whole on each"
    if n_shards == devices.n_devices > 1:
        place = "divided among them"
    elif n_shards > 1:
        place = f"a copy for every {n_shards}"
    return f"{place}, on the CPU" if devices.offload else place


def command(name, devices, n_shards):
    """Return the words of the command line of the run, without the sizes of its batches."""
    words = COMMAND.split()  # and not train.py, which only a clone has
    if devices.n_devices > 1:
        words = ["torchrun", "--nproc-per-node", devices.n_devices, "-m", *words]
    words += ["--model", name, "--task", "TASK", "--dtype", "bfloat16", "--recompute"]
    if devices.quantize:
        words += ["--quantize", devices.quantize]
    if devices.shard:
        words += ["--shard", devices.shard]
    elif n_shards > 1:
        words += ["--shard"]
    if devices.offload:
        words += ["--offload"]
    return words


def advice(model, devices, shape, packed):
    """Return what to do if not even one example on each device fits.

    A smaller base comes first, then more devices, then both. In these cases the base is divided
    among all devices. --offload, which is slow, comes last, and changes nothing else.
    """
    first = shape._replace(n_examples=1)
    kinds = tuple(dict.fromkeys((devices.quantize, *possible_kinds(model))))
    plans = {kind: Plan(model.config, DTYPE, kind, packed=packed) for kind in kinds}

    def fits(kind, n_shards, offload=devices.offload):
        return plans[kind].on_device(n_shards, first, offload).fits(devices.memory)

    ways = []
    n_shards = devices.shard or devices.n_devices
    if fits(devices.quantize, n_shards, offload=True):
        ways.append("--offload fits, and is slow")
    n_devices = devices.n_devices
    while n_devices <= max(MOST_DEVICES, devices.n_devices):
        for kind in kinds:
            if fits(kind, n_devices):
                ways.insert(0, f"{flags_of_advice(devices, kind, n_devices)} fits")
                return "; ".join(ways)
        n_devices *= 2
    return "; ".join(ways) or "use devices with more memory, or a smaller model"


def possible_kinds(model):
    """Return the values of --quantize that suit the widths of a model."""
    kinds = []
    for kind in QUANTIZED:
        with suppress(ValueError):
            check_widths(model, kind)
            kinds.append(kind)
    return kinds


def flags_of_advice(devices, kind, n_devices):
    """Return the flags that change the plan: to a base of this kind, and this number of devices."""
    words = []
    if n_devices != devices.n_devices:
        words += ["--devices", str(n_devices)]
    if kind != devices.quantize:
        words += ["--quantize", kind]
    if devices.shard:
        words += ["--shard"]  # among all of them
    return " ".join(words)
