"""Run a program, and write how many seconds its kernels take.

python -m tests.benchmarks.jobs.timed FILE train.py --steps 10
python -m tests.benchmarks.jobs.timed FILE -m minia3 predict ...

The kernels are matrix products, attention, norms and elementwise operators, as in the table of the
other benchmarks. On a CPU, an operator has ended when its call returns, so the seconds are those of
the calls. But each call also takes a few microseconds because of this program. So what an operator
takes for a single entry is subtracted from each, and the result is rather too small than too large.
"""

import runpy
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from minia3.model import attend, plain_attention, recompute
from tests.benchmarks.measure import is_elementwise
from tests.benchmarks.patched_mode import PatchedMode

N_ROUNDS = 5  # in which the cost of a call is measured
N_CALLS = 1000

PRODUCTS = ("aten::mm", "aten::mv", "aten::bmm", "aten::addmm", "aten::baddbmm")
PRODUCTS_AND_ATTENTION = (*PRODUCTS, "aten::_scaled_dot_product")


class KernelSeconds(PatchedMode):
    """Adds up the seconds of the kernels that are called while this is active."""

    def __init__(self):
        super().__init__()
        self.seconds = 0.0
        self.n_calls = 0
        self.is_within = False  # one of `replaced_functions`

    def replaced_functions(self):
        """Return the functions of norms, and attention that is written out, which count."""
        norm = recompute._RMSNorm
        gradients_of_rows = plain_attention.gradients_of_rows
        return (
            (F, "rms_norm", self.counted(F.rms_norm)),
            (recompute, "normalized", self.counted(recompute.normalized)),
            (norm, "backward", staticmethod(self.counted(norm.backward))),
            (attend, "attend_with_one_query", self.counted(attend.attend_with_one_query)),
            (attend, "attend_by_products", self.counted(attend.attend_by_products)),
            (plain_attention, "gradients_of_rows", self.counted(gradients_of_rows)),
        )

    def counted(self, function):
        """Return `function`, all of whose operators count."""

        def run(*args, **options):
            self.is_within = True
            out = function(*args, **options)
            self.is_within = False
            return out

        return run

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        begin = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        n_seconds = time.perf_counter() - begin
        if self.is_within or is_kernel(func):
            self.seconds += n_seconds
            self.n_calls += 1
        return out


def is_kernel(func):
    """Return whether this operator of torch is a product, attention, or elementwise."""
    return func.name().startswith(PRODUCTS_AND_ATTENTION) or is_elementwise(func)


def seconds_of_a_call():
    """Return the seconds of a kernel that has almost nothing to compute, as they are counted."""
    times = []
    x = torch.ones(1)
    for _ in range(N_ROUNDS):
        with KernelSeconds() as kernels:
            for _ in range(N_CALLS):
                x.mul(x)
        times.append(kernels.seconds / N_CALLS)
    return statistics.median(times)


def main():
    file, *words = sys.argv[1:]
    kernels = KernelSeconds()
    try:
        with kernels:
            run(words)
    finally:  # programs end by SystemExit
        seconds = kernels.seconds - kernels.n_calls * seconds_of_a_call()
        Path(file).write_text(f"{seconds}\n")


def run(words):
    """Do what `python` does with these words."""
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main()
