"""Measure what a process takes to load a model that is divided, and how fast it trains and writes.

    python -m tests.benchmarks.divided FOLDER
    torchrun --nproc-per-node 2 -m tests.benchmarks.divided FOLDER --shard

The model is loaded in another dtype than it is stored in, because weights that keep their dtype are
mapped from the file, and take no memory of the process on a CPU. Memory is the anonymous memory of
the first process, as Linux counts it. The first step is not counted.
"""

import argparse
import time

import torch
import torch.distributed.fsdp  # before anything is measured, because it takes memory of its own

import minia3
from minia3.files.processes import add_over_processes, is_first, join, leave, n_processes, rank
from minia3.inference.decoding import decode_tokens
from minia3.model.blocks import blocks_of
from minia3.model.recompute import recompute_blocks
from minia3.training.shards import ALL, make_shards
from tests.anonymous_memory import anonymous, sampling

BATCH, LENGTH, N_TARGET = 4, 32, 8
N_STEPS = 2
N_TOKENS = 4


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--shard", action="store_true")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args(argv)
    join()
    shards = make_shards(ALL if args.shard else None, False, torch.device("cpu"))
    before = anonymous()
    with sampling() as samples:
        model = minia3.load_model(args.model, dtype=getattr(torch, args.dtype), shards=shards)
    loaded = anonymous() - before
    minia3.freeze(model)
    recompute_blocks(blocks_of(model))
    seconds = [seconds_of_step(model) for _ in range(1 + N_STEPS)]
    speed = tokens_per_second(model)
    if is_first():
        print(
            f"{n_processes()} processes: loading takes {loaded / 1e6:.0f} MB (at most "
            f"{(max(samples) - before) / 1e6:.0f} MB), a step {min(seconds[1:]):.2f} s, and "
            f"{speed:.1f} tokens a second are written"
        )
    leave()


def seconds_of_step(model):
    """Return the seconds of a forward and backward pass, in which each process has its examples."""
    source_BM = torch.randint(3, 1000, (BATCH, LENGTH))[rank() :: n_processes()]
    target_BL = torch.randint(3, 1000, (len(source_BM), N_TARGET))
    started = time.perf_counter()
    minia3.logprobs(model, model.start(source_BM), target_BL).sum().backward()
    for vector in minia3.vectors(model).values():
        add_over_processes(vector.grad)
    model.zero_grad()
    return time.perf_counter() - started


def tokens_per_second(model):
    """Return how many tokens of one text are written in a second."""
    started = time.perf_counter()
    with torch.no_grad():
        state = model.start(torch.arange(3, 35)[None])
    written = list(decode_tokens(model, state, N_TOKENS, set()))
    return len(written) / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
