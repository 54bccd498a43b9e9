"""Chapter 9, info: what a model is, what an adapter of it weighs, and what it takes to run it."""

from dataclasses import asdict

import torch
from safetensors.torch import save

from minia3 import files
from minia3.adapters import peft_tensors
from minia3.generation import logprobs
from minia3.ia3 import freeze, vectors
from minia3.load import build, read_config
from minia3.models import known
from minia3.t5 import T5Config


def info(name_or_path, batch=8, length=128, target=8):
    """Yield (title, text) lines about a model from its config alone; a known name needs no network.

    batch, length, target: of the training step whose memory is estimated. Raises ValueError for a name that leads
    nowhere, and for a model that minia3 does not run.
    """
    row = known(name_or_path)
    c = row.config if row else read_config(files.find(name_or_path, weights=False))
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
        serve = base * dtype.itemsize + 4 * adapter
        train = serve + 2 * 4 * adapter + kept_for_backward(c, dtype, batch, length, target)
        yield str(dtype).removeprefix("torch."), f"{size(serve)} to serve, {size(train)} to train"
    yield "", "to serve: weights and an adapter, no caches; to train, at most: also its gradient, Adafactor's state,"
    yield "", f"and what backward needs of {batch} sources of {length} tokens with targets of {target}"


def size(n_bytes):
    return f"{n_bytes / 1e9:,.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.2f} MB"


def kept_for_backward(config, dtype, batch, length, target):
    """Bytes that autograd keeps of a training step's forward pass, counted on the meta device: nothing is computed.

    Attention is counted with its (B, H, L, M) weights; a fused kernel, where there is one, does not keep them.
    """
    model = build(config).to("meta")
    for name, parameter in model.named_parameters():
        if not name.endswith(".scale"):  # vectors stay float32
            parameter.data = parameter.data.to(dtype)
    freeze(model)
    weights, kept = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def pack(x):
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        source, targets = (torch.zeros(batch, n, dtype=torch.long, device="meta") for n in (length, target))
        logprobs(model, model.start(source), targets)
    return sum(storage.nbytes() for storage in kept.values())
