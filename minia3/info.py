"""Chapter 9, info: what a model is, what an adapter of it weighs, and the memory that both take."""

import weakref
from dataclasses import asdict

import torch
from safetensors.torch import save
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minia3 import files
from minia3.adapters import peft_tensors
from minia3.generation import logprobs
from minia3.ia3 import freeze, vectors
from minia3.load import build, place, read
from minia3.models import known
from minia3.t5 import T5Config

# What glibc's malloc, on a CPU, keeps of the memory that is freed. Pieces above 32 MB go back to the system, the end of
# the heap beyond twice that. Holes between what is held do not: about an eighth of all but the weights, as measured
# at the points FIT of tests/benchmarks/memory.py.
HEAP_END, HOLES = 64 << 20, 1 / 8


def info(name_or_path, batch=8, length=128):
    """Yield (title, text) lines about a model from its config alone; a known name needs no network.

    batch, length: of the sources whose memory is planned. Raises ValueError for a name that leads nowhere, and for a
    model that minia3 does not run. The memory comes last, and takes up to half a minute.
    """
    if batch < 1 or length < 1:
        raise ValueError(f"batch and length are {batch} and {length}, expected at least 1")
    row = known(name_or_path)
    c = row.config if row else read(files.find(name_or_path, weights=False), weights=False)[0]
    model = build(c)
    adapter = sum(vector.numel() for vector in vectors(model).values())
    base = sum(p.numel() for p in model.parameters()) - adapter
    yield "model", row.repo if row else str(name_or_path)
    yield "architecture", "T5: encoder-decoder" if isinstance(c, T5Config) else "LLaMA: decoder-only"
    yield from ((name, str(value)) for name, value in asdict(c).items() if value is not None)
    yield "parameters", f"{base:,}"
    yield "adapter", f"{adapter:,} numbers, {adapter / base:.3%} of the base"
    ones = {name: torch.ones(vector.shape[1]) for name, vector in vectors(model).items()}
    yield "its file", size(len(save(peft_tensors(ones))))
    for dtype in (torch.float32, torch.bfloat16):
        serve, train = (size(sum(peak_memory(c, dtype, batch, length, train))) for train in (False, True))
        yield str(dtype).removeprefix("torch."), f"{serve} to serve, {train} to train"
    yield "", f"for {batch} sources of {length} tokens: to serve, when they are read and the first token is written; to"
    yield "", "train, in a step with targets of 8. It is the most that tensors take, weights included, and what malloc"
    yield (
        "",
        "keeps on a CPU at first. Python and torch take 0.3 GB more, and malloc may keep more later (see the README)",
    )


def size(n_bytes):
    return f"{n_bytes / 1e9:,.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.2f} MB"


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


def peak_memory(config, dtype, batch, length, train, target=8):
    """(bytes that tensors take at the most, bytes that malloc keeps besides): a training step, or reading and a token.

    The model runs on tensors that have shapes and no numbers, with the CPU's kernels. Their sum is what a process takes
    that does this again and again, beyond Python and torch; a GPU has the former. (glibc kept more of a run of train.py
    on t5-base, 0.8 GB, and none of it with MALLOC_TRIM_THRESHOLD_=1000000 in the environment.)
    """
    with FakeTensorMode(), torch.set_grad_enabled(train):
        model = build(config).train(train)
        for name, p in [*model.named_parameters()]:
            place(model, name, torch.empty(p.shape, dtype=torch.float32 if name.endswith(".scale") else dtype))
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
    moments = 4 * sum(vector.numel() for vector in vectors(model).values()) * train  # Adafactor's, one for each number
    peak = max(held.peak, held.now + moments)
    return peak, min(HEAP_END, peak - weights) + int(HOLES * (peak - weights))
