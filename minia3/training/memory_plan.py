"""To be written."""

import weakref

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minia3.checkpoints.load import build_model, place_parameter
from minia3.inference.scoring import logprobs
from minia3.model.ia3 import freeze, vectors

# What glibc's malloc, on a CPU, keeps of the memory that is freed. Pieces above 32 MB go back to the system, the end of
# the heap beyond twice that. Holes between what is held do not: about an eighth of all but the weights, as measured
# at the points FIT of tests/benchmarks/memory.py.
HEAP_END, HOLES = 64 << 20, 1 / 8


class Held(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive: `now`, and the most so far, `peak`."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.count(x.untyped_storage())
        return result

    def count(self, storage):
        key, n_bytes = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive[key] = weakref.finalize(storage, self.forget, key, n_bytes)
            self.now += n_bytes
            self.peak = max(self.peak, self.now)

    def forget(self, key, n_bytes):
        del self.alive[key]
        self.now -= n_bytes


def planned_memory(config, dtype, batch, length, train, target=8):
    """(bytes that tensors take at the most, bytes that malloc keeps besides): a training step, or reading and a token.

    The model runs on tensors that have shapes and no numbers, with the CPU's kernels. Their sum is what a process takes
    that does this again and again, beyond Python and torch; a GPU has the former. (glibc kept more of a run of train.py
    on t5-base, 0.8 GB, and none of it with MALLOC_TRIM_THRESHOLD_=1000000 in the environment.)
    """
    with FakeTensorMode(), torch.set_grad_enabled(train):
        model = build_model(config).train(train)
        for name, p in [*model.named_parameters()]:
            place_parameter(
                model,
                name,
                torch.empty(p.shape, dtype=torch.float32 if name.endswith(".scale") else dtype),
            )
        freeze(model)
        tokens, held = torch.zeros(batch, max(length, target), dtype=torch.long), Held()
        for p in model.parameters():
            held.count(p.untyped_storage())
        weights = held.now
        with held:
            state = model.start(tokens[:, :length])
            if train:
                logprobs(model, state, tokens[:, :target]).sum().backward()
            else:
                model.step(state.start, state)
    moments = (
        4 * sum(vector.numel() for vector in vectors(model).values()) * train
    )  # Adafactor's, one for each number
    peak = max(held.peak, held.now + moments)
    return peak, min(HEAP_END, peak - weights) + int(HOLES * (peak - weights))
