"""Chapter 6, merging: a row of vectors folds into the weights, in memory or from file to file.

    W_k <- diag(l_k) W_k        W_v <- diag(l_v) W_v        W_down <- W_down diag(l_ff)

and W_q, W_o, W_up, W_gate as W_k, where there is a vector; LoRA is added before. The base is never divided: who wants
it back still has it.

Shapes: D width of a vector.
"""

from contextlib import suppress
from pathlib import Path

import torch

from minia3 import files, load, tokenizer
from minia3.adapters import fitting, read_adapter, row_of
from minia3.lora import LoRA
from minia3.sites import SITES


def merge(model, adapter=0):
    """A new model with row `adapter` folded into its weights, LoRA too where there is any, and one row of ones.

    The product is made in float32 at least and rounded once. Tensors that do not change are shared with `model`, which
    stays as it is. The new one has no name: adapters that are trained on it are not the base's. ValueError for a row
    that is not there.
    """
    vectors, merged = row_of(model, adapter), load.build(model.config)
    for name in dict(merged.named_parameters()):  # a new model has neither LoRA nor vectors of sites.py
        p, module = model.get_parameter(name), model.get_submodule(name.rpartition(".")[0])
        new = module.merged() if isinstance(module, LoRA) else p.detach()
        new = torch.ones_like(p[:1]) if name.endswith(".scale") else fold(name, new, vectors).to(p.dtype)
        load.place(merged, name, new, p.requires_grad)
    merged.made_of = getattr(model, "name_or_path", getattr(model, "made_of", None))
    return merged.to(model.embed.weight.device).train(model.training)


def fold(name, weight, vectors):
    """The parameter `name` with its vector folded in; `weight` itself where it has none."""
    module, _, part = name.removesuffix(".weight").rpartition(".")
    own = (f"{module}.l_{site}" for site, linear in SITES.items() if linear == part)
    l_D = next((vectors[vector] for vector in own if vector in vectors), None)
    if l_D is None:
        return weight
    factor, folded = l_D.reshape((1, -1) if part == "down" else (-1, 1)).expand_as(weight), torch.empty_like(weight)
    parts = (x.split(32) for x in (weight, factor, folded))  # so many rows stay in the cache: four times as fast
    for old, by, new in zip(*parts, strict=True):
        torch.mul(old, by, out=new)  # in float32 at least, rounded once
    if not all(x.isfinite() for x in folded.aminmax()):  # a NaN would be both
        raise ValueError(f"{name} with its vector folded in is not finite in {weight.dtype}: take a wider dtype")
    return folded


def merge_files(name_or_path, adapter, out):
    """Fold an adapter (see `read_adapter`) into a checkpoint (see `load_model`) and write it to the new folder `out`.

    The bits are those of load_model, load_adapter, merge and save_model, and are read back; in memory is one shard.
    ValueError where `out` is not empty; and, leaving nothing, for what cannot be read or fit, or is read back changed.
    """
    out = Path(out)
    if out.is_file() or (out.is_dir() and any(not x.name.startswith(".") for x in out.iterdir())):
        raise ValueError(f"{out}: exists and is not empty; give a new folder")
    model, stored, dtype = load.opened(name_or_path)
    vectors, path = fitting(model, read_adapter(adapter), adapter), files.find(name_or_path)
    words = tokenizer.tokenizer_at(path)

    def part(ours, p):
        theirs, entry = stored[ours]
        return theirs, p.numel() * dtype.itemsize, lambda: fold(ours, entry.read().to(dtype), vectors).contiguous()

    parts = [part(ours, p) for ours, p in model.named_parameters() if ours in stored]
    try:
        with files.writing_folder(out) as temporary:
            load.save_others(temporary, model, dtype, words)
            load.save_tensors(temporary, parts)
            written = load.read(temporary)[1]
            for name, _, expected in parts:
                if not torch.equal(written[name].read().view(torch.uint8), expected().view(torch.uint8)):
                    raise ValueError(f"{out}: {name} was read back with other bits than were written")
    finally:
        with suppress(OSError):  # not empty: it succeeded
            out.rmdir()
