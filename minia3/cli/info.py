"""To be written."""

from dataclasses import asdict

import torch
from safetensors.torch import save

from minia3.adapters.peft_files import peft_tensors
from minia3.checkpoints.hub import find
from minia3.checkpoints.known_models import known_model
from minia3.checkpoints.load import build_model, read_checkpoint
from minia3.model.ia3 import vectors
from minia3.model.t5 import T5Config
from minia3.training.memory_plan import planned_memory


def info(name_or_path, batch=8, length=128):
    """Yield (title, text) lines about a model from its config alone; a known name needs no network.

    batch, length: of the sources whose memory is planned. Raises ValueError for a name that leads nowhere, and for a
    model that minia3 does not run. The memory comes last, and takes up to half a minute.
    """
    if batch < 1 or length < 1:
        raise ValueError(f"batch and length are {batch} and {length}, expected at least 1")
    row = known_model(name_or_path)
    c = row.config if row else read_checkpoint(find(name_or_path, weights=False), weights=False)[0]
    model = build_model(c)
    adapter = sum(vector.numel() for vector in vectors(model).values())
    base = sum(p.numel() for p in model.parameters()) - adapter
    yield "model", row.repo if row else str(name_or_path)
    yield (
        "architecture",
        "T5: encoder-decoder" if isinstance(c, T5Config) else "LLaMA: decoder-only",
    )
    yield from ((name, str(value)) for name, value in asdict(c).items() if value is not None)
    yield "parameters", f"{base:,}"
    yield "adapter", f"{adapter:,} numbers, {adapter / base:.3%} of the base"
    ones = {name: torch.ones(vector.shape[1]) for name, vector in vectors(model).items()}
    yield "its file", size(len(save(peft_tensors(ones))))
    for dtype in (torch.float32, torch.bfloat16):
        serve, train = (
            size(sum(planned_memory(c, dtype, batch, length, train))) for train in (False, True)
        )
        yield str(dtype).removeprefix("torch."), f"{serve} to serve, {train} to train"
    yield (
        "",
        f"for {batch} sources of {length} tokens: to serve, when they are read and the first token is written; to",
    )
    yield (
        "",
        "train, in a step with targets of 8. It is the most that tensors take, weights included, and what malloc",
    )
    yield (
        "",
        "keeps on a CPU at first. Python and torch take 0.3 GB more, and malloc may keep more later (see the README)",
    )


def size(n_bytes):
    return f"{n_bytes / 1e9:,.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.2f} MB"
