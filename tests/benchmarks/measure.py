"""How two sides are measured: they alternate in one process, so that what else the machine does meanwhile hits both."""

import gc
import statistics
import subprocess
import sys
import time

import torch


def seconds(function):
    synchronize()
    began = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - began


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def alternate(ours, theirs, rounds, warm_up=2):
    """-> what is published of `rounds` rounds, in seconds. Who begins changes from round to round.

    `ratio` is that of the medians, theirs / ours: above one, theirs takes longer. `spread` is the middle half of the
    rounds' own ratios.
    """
    for _ in range(warm_up):
        ours(), theirs()
    times = ([], [])
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            for side in (0, 1) if i % 2 == 0 else (1, 0):
                times[side].append(seconds((ours, theirs)[side]))
    finally:
        gc.enable()
    ratios = [b / a for a, b in zip(*times, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
    ours, theirs = map(statistics.median, times)
    return {
        "unit": "s",
        "ours": ours,
        "theirs": theirs,
        "ours_min": min(times[0]),
        "theirs_min": min(times[1]),
        "ratio": theirs / ours,
        "spread": [low, high],
        "rounds": rounds,
    }


def compare(ours, theirs, unit):
    """Quantities that do not move from round to round, in the same form."""
    return {"unit": unit, "ours": ours, "theirs": theirs, "ratio": theirs / ours}


def kept_for_backward(forward, model):
    """Bytes of the tensors that autograd keeps of `forward()`, each storage once, those of frozen weights left out."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters() if not p.requires_grad}
    kept = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage  # held, so that no other gets its address
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


def child(code):
    """Run Python code in a process of its own: -> what it printed."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return done.stdout


def peak_flops(dtype, n, rounds=3):
    """FLOP/s of an (n, n) x (n, n) matrix product: the roof that a step is compared with."""
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    a @ b
    return 2 * n**3 / min(seconds(lambda: a @ b) for _ in range(rounds))
