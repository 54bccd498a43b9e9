"""To be written."""

from contextlib import suppress
from pathlib import Path

import torch

from minia3.adapters.lora import LoRA
from minia3.adapters.peft_files import read_adapter
from minia3.adapters.rows import fitting_vectors, row_of
from minia3.checkpoints.hub import find
from minia3.checkpoints.load import build_model, open_checkpoint, place_parameter, read_checkpoint
from minia3.checkpoints.save import save_others, save_tensors
from minia3.checkpoints.tokenizer import find_tokenizer
from minia3.files.write import writing_folder
from minia3.model.more_vectors import SITES


def merge(model, adapter=0):
    """A new model with row `adapter` folded into its weights, LoRA too where there is any, and one row of ones.

    The product is made in float32 at least and rounded once. Tensors that do not change are shared with `model`, which
    stays as it is. The new one has no name: adapters that are trained on it are not the base's. ValueError for a row
    that is not there.
    """
    vectors, merged = row_of(model, adapter), build_model(model.config)
    for name in dict(
        merged.named_parameters()
    ):  # a new model has neither LoRA nor vectors of sites.py
        p, module = model.get_parameter(name), model.get_submodule(name.rpartition(".")[0])
        new = module.merged() if isinstance(module, LoRA) else p.detach()
        new = (
            torch.ones_like(p[:1])
            if name.endswith(".scale")
            else fold(name, new, vectors).to(p.dtype)
        )
        place_parameter(merged, name, new, p.requires_grad)
    merged.made_of = getattr(model, "name_or_path", getattr(model, "made_of", None))
    return merged.to(model.embed.weight.device).train(model.training)


def fold(name, weight, vectors):
    """The parameter `name` with its vector folded in; `weight` itself where it has none."""
    module, _, part = name.removesuffix(".weight").rpartition(".")
    own = (f"{module}.l_{site}" for site, linear in SITES.items() if linear == part)
    l_D = next((vectors[vector] for vector in own if vector in vectors), None)
    if l_D is None:
        return weight
    factor, folded = (
        l_D.reshape((1, -1) if part == "down" else (-1, 1)).expand_as(weight),
        torch.empty_like(weight),
    )
    parts = (
        x.split(32) for x in (weight, factor, folded)
    )  # so many rows stay in the cache: four times as fast
    for old, by, new in zip(*parts, strict=True):
        torch.mul(old, by, out=new)  # in float32 at least, rounded once
    if not all(x.isfinite() for x in folded.aminmax()):  # a NaN would be both
        raise ValueError(
            f"{name} with its vector folded in is not finite in {weight.dtype}: take a wider dtype"
        )
    return folded


def merge_files(name_or_path, adapter, out):
    """Fold an adapter (see `read_adapter`) into a checkpoint (see `load_model`) and write it to the new folder `out`.

    The bits are those of load_model, load_adapter, merge and save_model, and are read back; in memory is one shard.
    ValueError where `out` is not empty; and, leaving nothing, for what cannot be read or fit, or is read back changed.
    """
    out = Path(out)
    if out.is_file() or (out.is_dir() and any(not x.name.startswith(".") for x in out.iterdir())):
        raise ValueError(f"{out}: exists and is not empty; give a new folder")
    model, stored, dtype = open_checkpoint(name_or_path)
    vectors, path = fitting_vectors(model, read_adapter(adapter), adapter), find(name_or_path)
    words = find_tokenizer(path)

    def part(ours, p):
        theirs, entry = stored[ours]
        return (
            theirs,
            p.numel() * dtype.itemsize,
            lambda: fold(ours, entry.read().to(dtype), vectors).contiguous(),
        )

    parts = [part(ours, p) for ours, p in model.named_parameters() if ours in stored]
    try:
        with writing_folder(out) as temporary:
            save_others(temporary, model, dtype, words)
            save_tensors(temporary, parts)
            written = read_checkpoint(temporary)[1]
            for name, _, expected in parts:
                if not torch.equal(
                    written[name].read().view(torch.uint8), expected().view(torch.uint8)
                ):
                    raise ValueError(
                        f"{out}: {name} was read back with other bits than were written"
                    )
    finally:
        with suppress(OSError):  # not empty: it succeeded
            out.rmdir()
