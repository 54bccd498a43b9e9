"""What nothing can beat on this machine: the floors of lines that are not bounded by products.

python -m tests.benchmarks.floors [--threads 1]

Each function returns the best of some rounds, because other work on the machine only slows them.
The roof of matrix products is in measure.py, because it takes turns with the work that it bounds.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

from minia3.model.huge_pages import move_to_huge_pages
from tests.benchmarks.measure import run_program, seconds

N_ROUNDS = 5
BEYOND_CACHE = 1 << 29  # bytes: several times what the caches of a processor hold
PIECE = 1 << 20  # bytes that are read or written at once


def memory_read_bytes_per_second(n_bytes=BEYOND_CACHE, n_rounds=N_ROUNDS):
    """Return how fast torch's threads read memory that is in no cache, in huge pages if it can be.

    At batch 1, decoding reads every weight once per token, and cannot be faster than this.
    """
    weight = nn.Parameter(torch.ones(n_bytes // 4), requires_grad=False)
    move_to_huge_pages(nn.ParameterList([weight]))
    weight.sum()
    return weight.nbytes / best_seconds(weight.sum, n_rounds)


def file_write_seconds(n_bytes, folder, n_rounds=N_ROUNDS, is_synced=False):
    """Return the seconds to write a file of `n_bytes`, and to remove it.

    Without is_synced, it may lie in the memory of the system when the time ends, as the files do
    that `save_model` and transformers write. With it, it is on the disk.
    """
    path = Path(folder, "floor")
    piece = b"\x01" * PIECE

    def write():
        with path.open("wb", buffering=0) as file:
            for first in range(0, n_bytes, len(piece)):
                file.write(piece[: n_bytes - first])
            if is_synced:
                os.fsync(file.fileno())
        path.unlink()

    return best_seconds(write, n_rounds)


def file_read_seconds(n_bytes, folder, n_rounds=N_ROUNDS, is_cached=True):
    """Return the seconds to read a file of `n_bytes` into memory that is already there.

    Without is_cached, the system forgets it first, and it comes from the disk (Linux).
    """
    path = Path(folder, "floor")
    path.write_bytes(bytes(n_bytes))
    piece = bytearray(PIECE)

    def read():
        with path.open("rb", buffering=0) as file:
            while file.readinto(piece):
                pass

    def forget():
        with path.open("rb") as file:
            os.fsync(file.fileno())  # only what is on the disk can be forgotten
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    times = []
    for _ in range(n_rounds):
        if not is_cached:
            forget()
        times.append(seconds(read))
    path.unlink()
    return min(times)


def copy_file(source, target):
    """Write a file again, as fast as a program can that looks at nothing, and remove the copy."""
    piece = bytearray(PIECE)
    with source.open("rb", buffering=0) as old, target.open("wb", buffering=0) as new:
        while n_bytes := old.readinto(piece):
            new.write(memoryview(piece)[:n_bytes])
    target.unlink()


def import_seconds(module="torch", n_rounds=N_ROUNDS):
    """Return the seconds of a Python process that imports one module, from its start to its end."""
    return best_seconds(lambda: run_program(f"import {module}"), n_rounds)


def best_seconds(function, n_rounds):
    return min(seconds(function) for _ in range(n_rounds))


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.floors",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch chooses)")
    parser.add_argument(
        "--file-bytes", type=int, default=446_000_000, help="of the file (default: t5-base's)"
    )
    parser.add_argument("--memory-bytes", type=int, default=BEYOND_CACHE)
    parser.add_argument("--rounds", type=int, default=N_ROUNDS)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    n_rounds = args.rounds
    read = memory_read_bytes_per_second(args.memory_bytes, n_rounds)
    print(f"read memory: {read / 1e9:.1f} GB/s")
    with tempfile.TemporaryDirectory() as folder:
        for is_synced, place in ((False, "memory of the system"), (True, "disk")):
            n_seconds = file_write_seconds(args.file_bytes, folder, n_rounds, is_synced)
            print_rate(f"write a file, to the {place}", args.file_bytes, n_seconds)
        for is_cached, place in ((True, "memory of the system"), (False, "disk")):
            if is_cached or sys.platform.startswith("linux"):
                n_seconds = file_read_seconds(args.file_bytes, folder, n_rounds, is_cached)
                print_rate(f"read a file, from the {place}", args.file_bytes, n_seconds)
    for module in ("sys", "torch"):
        print(f"a process that imports {module}: {import_seconds(module, n_rounds):.2f} s")


def print_rate(title, n_bytes, n_seconds):
    print(f"{title}: {n_seconds:.3f} s, {n_bytes / n_seconds / 1e9:.2f} GB/s")


if __name__ == "__main__":
    main()
