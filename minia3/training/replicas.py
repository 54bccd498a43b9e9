"""Several processes train as one: each computes a share of a step, and one sum makes them equal.

Every process has the whole model, all cells, and the same batches. In a step it reads every n-th
example, divides by the counts of the whole batch, and so has a part of the gradient. The parts are
added up in a flat tensor (in several, one after the other, if they are many), after the
processes have told each other whether to stop. From there on, all of them do the same: clip,
update, stop. Only the first one writes.

There is no wrapper around the model: DistributedDataParallel hooks into `forward`, and the models
here are called through `start` and `step`, so it would silently add up nothing.

Shapes: A adapters: the cells of the group.
"""

import functools
import math

import numpy as np
import torch

from minia3.files.processes import (
    add_over_processes,
    from_first,
    is_first,
    n_processes,
    overwrite_by_first,
    rank,
)

# Bytes that are added up at once. The vectors of (IA)^3 are fewer, and with --method full, a copy
# of all gradients would be as large as the model.
PORTION = 64 * 2**20


def share_of_step(pairs, size):
    """Return this process's share of the examples of a step, in parts of at most `size`.

    All processes have equally many parts. The last one is empty if only other shares need it.
    """
    share = pairs[rank() :: n_processes()]
    n_largest = math.ceil(len(pairs) / n_processes())
    starts = range(0, n_largest, size)
    return [share[start : start + size] for start in starts]


def seed_dropout(seed, step):
    """Let each process draw its own dropout in a step, and the same again if the run is resumed.

    If there is one process, change nothing: its checkpoints have the state of torch's generator.
    """
    if n_processes() > 1:
        mixed = np.random.SeedSequence((seed, step, rank()))  # unrelated for neighboring numbers
        torch.manual_seed(int(mixed.generate_state(1)[0]))


def state_from_first(state):
    """Return the state that the first process has, in a tree of dicts and lists, on the CPU.

    Each tensor is sent as it is, because the state of --method full is three times as large as the
    model, and `from_first` would pickle it.
    """
    if n_processes() == 1:
        return state
    outline = from_first(map_tensors(without_values, state))
    if is_first():
        map_tensors(overwrite_by_first, state)
        return state
    return map_tensors(receive, outline)


def map_tensors(function, state):
    """Return a state with function(tensor) in place of each tensor, always in the same order."""
    if isinstance(state, torch.Tensor):
        return function(state)
    if isinstance(state, dict):
        return {name: map_tensors(function, value) for name, value in state.items()}
    if isinstance(state, list):
        return [map_tensors(function, value) for value in state]
    return state


def without_values(tensor):
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def receive(outline):
    """Return a tensor that the first process sends. outline: from `without_values`."""
    tensor = torch.empty_like(outline, device="cpu")
    overwrite_by_first(tensor)
    return tensor


def sum_step(parameters, loss_A, n_parts, signal):
    """Add up the gradients and the losses of a step over all processes.

    parameters: those that have gradients get the sums. loss_A: the losses of the cells, which get
    theirs. n_parts: how many parts of the batch this process has read. signal: the number of the
    signal that asks it to stop, or None.

    Return the number of the signal that any process has got, or None. Raise RuntimeError if the
    processes have not read the same number of parts.
    """
    # The CPUs exchange these by themselves, so none of them waits for its GPU. And they find out
    # that a process has ended, for which a sum of GPUs would wait forever.
    reports = torch.zeros(2, n_processes(), dtype=torch.long, device="cpu")
    reports[0, rank()] = n_parts
    reports[1, rank()] = signal or 0
    add_over_processes(reports)
    n_parts_of_each, signals = reports.tolist()
    if len(set(n_parts_of_each)) > 1:
        raise RuntimeError(f"the processes have read {n_parts_of_each} parts of one step")

    pieces = [p.grad for p in parameters if p.grad is not None]
    pieces.append(loss_A)
    dtype = functools.reduce(torch.promote_types, [piece.dtype for piece in pieces])  # the widest
    for portion in portions(pieces, PORTION // dtype.itemsize):
        add_portion(portion, dtype)
    return max(signals) or None


def portions(pieces, n_most):
    """Yield lists of tensors which together are `pieces`, and share their memory.

    n_most: entries of a list. Only a tensor that is not contiguous may have more.
    """
    portion = []
    n_entries = 0
    for piece in pieces:
        chunks = [piece]
        if piece.is_contiguous():  # otherwise its flat form would be a copy
            chunks = piece.view(-1).split(n_most)
        for chunk in chunks:
            if portion and n_entries + chunk.numel() > n_most:
                yield portion
                portion = []
                n_entries = 0
            portion.append(chunk)
            n_entries += chunk.numel()
    yield portion


def add_portion(pieces, dtype):
    """Add up tensors over all processes, in place. dtype: in which they are added."""
    flat = torch.cat([piece.flatten().to(dtype) for piece in pieces])
    add_over_processes(flat)
    sums = flat.split([piece.numel() for piece in pieces])
    shaped = [total.view(piece.shape) for piece, total in zip(pieces, sums, strict=True)]
    torch._foreach_copy_(pieces, shaped)
