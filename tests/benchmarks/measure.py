"""How two sides are measured.

They alternate in one process, so that other work on the machine slows both of them. Memory is
counted in bytes: of the tensors that autograd keeps, or of a whole process.
"""

import ctypes
import gc
import math
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minia3.training.device import device_module

aten = torch.ops.aten


@dataclass
class Row:
    """One row of the table. The names of its fields are those of the published JSON."""

    unit: str  # "s" or "B"
    ours: float  # a time is the median of the rounds
    theirs: float
    ratio: float  # theirs / ours: above 1, theirs takes more
    # Of times only:
    ours_min: float | None = None
    theirs_min: float | None = None
    spread: list | None = (
        None  # quartiles of the ratios of the rounds: where their middle half lies
    )
    rounds: int | None = None
    # Of times for which the number of tokens is known:
    tokens_per_second: float | None = None  # ours
    flops: int | None = None  # of one call of ours
    peak_flops: float | None = None  # per second, of the roof
    roof: float | None = None  # our FLOP/s as a part of peak_flops
    # Of times beside the matrix products of ours alone, in place of the three above:
    ours_over_products: float | None = None
    theirs_over_products: float | None = None
    products: float | None = None
    # Of all lines; None if the line has no goal:
    goal: float | None = None

    def published(self):
        """Return the row as a dict for JSON, without the fields that it does not have."""
        fields = asdict(self)
        return {name: x for name, x in fields.items() if x is not None or name == "goal"}


@dataclass(frozen=True)
class Bench:
    """How the lines of a table are measured."""

    quick: bool
    rounds: int
    roof: "Roof"

    def time(self, ours, theirs, n_tokens=None, products=None):
        """Time two functions, and return a Row.

        n_tokens: what one call of `ours` reads or writes. If it is given, the row also says how
        near `ours` comes to the roof, or, if `products` (the matrix products of `ours`) are given,
        how much longer each side takes than these. Roof and products take turns with the sides.
        """
        sides = {"ours": ours, "theirs": theirs}
        if n_tokens is not None:
            sides["products"] = products or self.roof
        n_warm_ups = 0 if self.quick else 2
        times = alternate(sides, self.rounds, n_warm_ups)
        row = summarize(times["ours"], times["theirs"])
        if n_tokens is None:
            return row

        row.tokens_per_second = n_tokens / row.ours
        seconds_of_products = statistics.median(times["products"])
        if products is None:
            row.flops = count_flops(ours)
            row.peak_flops = self.roof.flops / seconds_of_products
            row.roof = row.flops / row.ours / row.peak_flops
        else:
            row.products = seconds_of_products
            row.ours_over_products = row.ours / row.products
            row.theirs_over_products = row.theirs / row.products
        return row


# Time


def seconds(function):
    """Return how long one call takes. It ends when the GPU has done all work."""
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def synchronize():
    if hasattr(torch, "accelerator") and torch.accelerator.is_available():  # from torch 2.6 on
        torch.accelerator.synchronize()
    elif torch.cuda.is_available():
        torch.cuda.synchronize()


def alternate(sides, n_rounds, n_warm_ups=2):
    """Return the seconds of each round of each side. sides: name to function.

    The order turns round after each round, so that no side always follows the same one.
    """
    for _ in range(n_warm_ups):
        for function in sides.values():
            function()
    order = list(sides)
    times = {name: [] for name in sides}
    gc.collect()
    gc.disable()  # because a collection would fall into the time of one side
    try:
        for _ in range(n_rounds):
            for name in order:
                times[name].append(seconds(sides[name]))
            order.reverse()
    finally:
        gc.enable()
    return times


def summarize(our_times, their_times):
    """Return the Row of two lists of seconds, one for each round."""
    row = compare(statistics.median(our_times), statistics.median(their_times), "s")
    row.ours_min = min(our_times)
    row.theirs_min = min(their_times)
    row.rounds = len(our_times)
    ratios = [theirs / ours for ours, theirs in zip(our_times, their_times, strict=True)]
    if len(ratios) == 1:
        row.spread = ratios * 2
    else:
        low, _, high = statistics.quantiles(ratios, n=4)
        row.spread = [low, high]
    return row


def compare(ours, theirs, unit):
    """Return the Row of two numbers, such as of bytes, which are the same in every round."""
    return Row(unit, ours, theirs, ratio=theirs / ours)


# Matrix products


class Roof:
    """A product of two (n, n) matrices. The FLOP/s that it reaches are the most to hope for."""

    def __init__(self, dtype, n, device="cpu"):
        self.a = torch.randn(n, n, device=device).to(dtype)
        self.b = torch.randn(n, n, device=device).to(dtype)
        self.flops = 2 * n**3

    def __call__(self):
        self.a @ self.b


class Products(TorchDispatchMode):
    """Records the matrix products that run inside of it. A call runs these products alone.

    One input is kept for each shape, because the weights are what takes time to read.
    """

    def __init__(self):
        super().__init__()
        self.inputs = {}
        self.pairs = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten.mm.default:
            x, weight = args
            x = self.inputs.setdefault(x.shape, x)
            self.pairs.append((x, weight))
        return func(*args, **kwargs or {})

    def __call__(self):
        for x, weight in self.pairs:
            x @ weight


def record_products(function):
    """Return a function that computes the matrix products of `function()` with weights alone."""
    with Products() as products:
        function()
    return products


def attention_flops(q_shape, k_shape, *_, **__):
    """Return the FLOPs of the two products of each query head.

    torch counts the fused attention of a GPU, but not yet that of a CPU.
    """
    return 4 * math.prod(q_shape) * k_shape[2]


def attention_backward_flops(_, q_shape, k_shape, *__, **___):
    """Return the FLOPs of five products per query head.

    They are the scores again, and the gradients of values, probabilities, queries and keys.
    """
    return 10 * math.prod(q_shape) * k_shape[2]


CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


def count_flops(function):
    """Return the FLOPs of all matrix products of `function()`, also of its backward pass."""
    # Imported here, because it loads torch's compiler, which processes that are measured do not.
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        function()
    return counter.get_total_flops()


# Memory


def kept_for_backward(forward, model):
    """Return the bytes of the tensors that autograd keeps of `forward()`.

    Each storage counts once, and the parameters of `model` do not count.
    """
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage  # which stays alive, so its address stays its own
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


def peak_memory(device):
    """Return the most bytes that torch has held on the GPU, or this process in memory (Linux)."""
    module = device_module(torch.device(device))
    if module is not None:
        return module.max_memory_allocated(device)
    # VmHWM and not ru_maxrss, because the latter starts with the peak of the parent process.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM: memory is measured on Linux only")


def peak_beyond(function, device):
    """Return the bytes that `function()` takes at its peak beyond what was there before it."""
    module = device_module(torch.device(device))
    if module is not None:
        module.reset_peak_memory_stats(device)
    else:
        ctypes.CDLL(None).malloc_trim(0)  # gives what is free back to the system
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to what there is now
    before = peak_memory(device)
    function()
    return peak_memory(device) - before


# Processes


def run_program(program):
    """Run a Python program in another process, and return what it prints."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return done.stdout
