"""Run a program, and write how many seconds its matrix products and its attention take.

python -m tests.benchmarks.jobs.timed FILE train.py --steps 10
python -m tests.benchmarks.jobs.timed FILE -m minia3 predict ...

On a CPU, an operator has ended when its call returns, so the seconds are those of the calls. The
whole program takes longer than it does without this.
"""

import runpy
import sys
import time
from pathlib import Path

from torch.utils._python_dispatch import TorchDispatchMode

KERNELS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::_scaled_dot_product")


class KernelSeconds(TorchDispatchMode):
    """Adds up the seconds of the kernels that are called while this is active."""

    def __init__(self):
        super().__init__()
        self.seconds = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        begin = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        if func.name().startswith(KERNELS):
            self.seconds += time.perf_counter() - begin
        return out


def main():
    file, *words = sys.argv[1:]
    kernels = KernelSeconds()
    try:
        with kernels:
            run(words)
    finally:  # programs end by SystemExit
        Path(file).write_text(f"{kernels.seconds}\n")


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
