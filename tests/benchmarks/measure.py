"""How two sides are measured: they alternate in one process, so that what else the machine does meanwhile hits both."""

import ctypes
import gc
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class Bench(NamedTuple):
    """How the lines of a table are measured."""

    quick: bool
    rounds: int
    roof: "Roof"

    def time(self, ours, theirs, tokens=None, products=None):
        """A row of the table. tokens: what one call of `ours` reads or writes; then its share of the roof is counted,
        or, where `products` is its matrix products alone, its time over theirs. They take their turns with the sides.
        """
        sides = {"ours": ours, "theirs": theirs} | (
            {"products": products or self.roof} if tokens else {}
        )
        times = alternate(sides, self.rounds, warm_up=0 if self.quick else 2)
        row = summary(times)
        if tokens:
            row["tokens_per_second"] = tokens / row["ours"]
            alone = statistics.median(times["products"])
            if products:
                row |= {
                    f"{side}_over_products": row[side] / alone for side in ("ours", "theirs")
                } | {"products": alone}
            else:
                row |= {"flops": flops(ours), "peak_flops": self.roof.flops / alone}
                row["roof"] = row["flops"] / row["ours"] / row["peak_flops"]
        return row


def seconds(function):
    synchronize()
    began = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - began


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def alternate(sides, rounds, warm_up=2):
    """sides: name -> function. -> name -> seconds of each round. Who begins changes from round to round."""
    for _ in range(warm_up):
        for function in sides.values():
            function()
    times = {name: [] for name in sides}
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            for name in list(sides)[:: 1 if i % 2 == 0 else -1]:
                times[name].append(seconds(sides[name]))
    finally:
        gc.enable()
    return times


def summary(times):
    """What is published of the rounds of "ours" and "theirs", in seconds.

    `ratio` is that of the medians, theirs / ours: above one, theirs takes longer. `spread` is the middle half of the
    rounds' own ratios.
    """
    ratios = [b / a for a, b in zip(times["ours"], times["theirs"], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    row = compare(statistics.median(times["ours"]), statistics.median(times["theirs"]), "s")
    row |= {f"{side}_min": min(times[side]) for side in ("ours", "theirs")}
    return row | {"spread": [low, high], "rounds": len(ratios)}


def compare(ours, theirs, unit):
    """Also for quantities that do not move from round to round."""
    return {"unit": unit, "ours": ours, "theirs": theirs, "ratio": theirs / ours}


def kept_for_backward(forward, model):
    """Bytes of the tensors that autograd keeps of `forward()`, each storage once, those of weights left out."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage  # held, so that no other gets its address
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


def attention_flops(q_shape, k_shape, *_, **__):
    """Two products for each query head. (torch counts a GPU's fused attention, and not yet the CPU's.)"""
    return 4 * math.prod(q_shape) * k_shape[2]


def attention_backward_flops(_, q_shape, k_shape, *__, **___):
    """Five products: the scores again, and the gradients of values, probabilities, queries and keys."""
    return 10 * math.prod(q_shape) * k_shape[2]


CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


def flops(function):
    """FLOPs of all matrix products of `function()`, the backward's among them."""
    from torch.utils.flop_counter import (
        FlopCounterMode,
    )  # loads torch's compiler, which processes measured here do not

    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        function()
    return counter.get_total_flops()


class Products(TorchDispatchMode):
    """Records the matrix products of what runs inside, with one input for each shape; a call runs these alone."""

    def __init__(self):
        super().__init__()
        self.inputs, self.pairs = {}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten.mm.default:
            self.pairs.append((self.inputs.setdefault(args[0].shape, args[0]), args[1]))
        return func(*args, **kwargs or {})

    def __call__(self):
        for a, b in self.pairs:
            a @ b


def products(function):
    """A function that computes the matrix products with weights of `function()`, and nothing else."""
    with Products() as recorded:
        function()
    return recorded


def peak_memory(device):
    """Bytes: the most that torch has held on the GPU; or this process's largest resident set (Linux alone)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024  # ru_maxrss would begin with the parent's


def peak_beyond(function, device):
    """Bytes: the most memory that `function()` takes beyond what is there before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system
        Path("/proc/self/clear_refs").write_text("5")
    before = peak_memory(device)  # reset: what there is now
    function()
    return peak_memory(device) - before


def child(code):
    """Run Python code in a process of its own: -> what it printed."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return done.stdout


class Roof:
    """An (n, n) x (n, n) matrix product: the FLOP/s that a step's are a part of."""

    def __init__(self, dtype, n, device="cpu"):
        self.a, self.b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        self.flops = 2 * n**3

    def __call__(self):
        self.a @ self.b
