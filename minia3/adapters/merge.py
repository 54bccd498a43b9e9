"""Merging: fold an adapter into the weights, so that it costs nothing when the model runs.

    W_k <- diag(l_k) W_k        W_v <- diag(l_v) W_v        W_down <- W_down diag(l_ff)

A vector that scales an output scales its bias, too: b_k <- l_k b_k (Qwen2). The norms of queries
and keys come after the vectors (Qwen3), so they do not change.

A product is computed in float32 at least, and rounded once to the dtype of the weight. Nothing is
ever divided, so an entry of 0 is an entry like any other, and there is no way back but the base
model.
"""

from functools import partial
from pathlib import Path

import torch

from minia3.adapters.fold import check_folded, fold, fold_rows
from minia3.adapters.lora import LoRA
from minia3.adapters.merge_quantized import merge_quantized, quantized_entries
from minia3.adapters.peft_files import read_adapter
from minia3.adapters.rows import copy_row, fitting_vectors, warn_of_bases
from minia3.checkpoints.hub import find
from minia3.checkpoints.load import build_model, open_checkpoint, read_checkpoint
from minia3.checkpoints.load_shards import place_rows
from minia3.checkpoints.nf4_files import read_as
from minia3.checkpoints.place import place_parameter
from minia3.checkpoints.save import save_others, save_tensors
from minia3.checkpoints.tokenizer import find_tokenizer
from minia3.files.progress import progress
from minia3.files.write import check_free, writing_new_folder
from minia3.model.quantized import quantized_linears
from minia3.model.shard import is_divided, is_sharded, shard


@torch.inference_mode(False)  # see `load_model`
def merge(model, adapter=0):
    """Return a new model with row `adapter` folded into its weights, and one row of ones.

    `model` stays as it is, and shares the tensors that do not change with the new model. The new
    model has no name, because adapters that are trained on it are not adapters of the base.

    A LoRA is folded in, too. A quantized base stays quantized, and l_ff may stay a vector that is
    not ones (merge_quantized.py). If a base is divided among processes, all of them must call this,
    and the new base is divided as well.

    Raise ValueError if there is no such row, if a product is not finite, or if a base is both
    quantized and divided.
    """
    vectors = copy_row(model, adapter)
    if quantized_linears(model):
        if is_sharded(model):
            advice = "merge the files of its checkpoint instead (minia3 merge)"
            raise ValueError(f"a base that is quantized and divided among processes: {advice}")
        return finish_merge(model, merge_quantized(model, vectors))
    merged = build_model(model.config)
    if is_sharded(model):
        shard(merged, model.shards)
    # The names are those of a plain model: without LoRA, and without vectors of more_vectors.py.
    names = [name for name, _ in merged.named_parameters()]
    for name in names:
        place, _, kind = name.rpartition(".")
        module = model.get_submodule(place)
        parameter = getattr(module, kind)
        if is_divided(parameter):
            place_rows(merged, name, fold_rows(name, parameter, vectors, model.shards))
            continue
        if name.endswith(".scale"):
            tensor = torch.ones_like(parameter[:1])
        else:
            tensor = fold_with_lora(name, module, vectors)
        place_parameter(merged, name, tensor, parameter.requires_grad)
    return finish_merge(model, merged)


def finish_merge(model, merged):
    """Move a merged model to the device of `model`, copy its mode, and record the origin."""
    # For `save_model`, which writes which known model this was made of.
    merged.made_of = getattr(model, "name_or_path", getattr(model, "made_of", None))
    merged.generation_defaults = getattr(model, "generation_defaults", {})
    if not is_sharded(merged):  # its buffers and rows are in their places already
        merged.to(model.embed.weight.device)
    return merged.train(model.training)


def fold_with_lora(name, module, vectors):
    """Return what `fold` returns for a parameter of `module`, after adding the module's LoRA."""
    kind = name.rpartition(".")[2]
    parameter = getattr(module, kind).detach()
    if not isinstance(module, LoRA) or kind != "weight":
        return fold(name, parameter, vectors)
    folded = fold(name, module.merged(), vectors).to(parameter.dtype)
    check_folded(name, folded)
    return folded


def merge_files(
    name_or_path, adapter, out, *, dtype=None, quantize=None, out_dtype=None, change=None
):
    """Fold an adapter into a checkpoint, and write the result to the new folder `out`.

    name_or_path, dtype: see `load_model`; adapter: see `read_adapter`. The result has the same bits
    as load_model, load_adapter, merge and save_model write, but only one shard is in memory at a
    time. All tensors are read back and compared.
    quantize: fold the adapter into the weights as int8 or nf4 rounds them ("int8" or "nf4"; see
        merge_quantized.py), because an adapter trained beside a quantized base has learned to
        correct its rounding. The rounding depends on `dtype`, so give that of the training.
    out_dtype: to which the merged weights are rounded in the end (default: dtype).
    change: a function of the model without weights and its tokenizer (None if it has none). It is
        called before they are saved, and may change what is saved beside the weights.

    Raise ValueError, and leave nothing, if `out` is not empty, if something cannot be read or does
    not fit, or if the disk gives back other bits.
    """
    out = Path(out)
    check_free(out)
    model, stored, dtype = open_checkpoint(name_or_path, dtype)
    adapter_file = read_adapter(adapter)
    vectors = fitting_vectors(model, adapter_file, adapter)
    warn_of_bases(model, {adapter: adapter_file.base})
    tokenizer = find_tokenizer(find(name_or_path))
    if change is not None:
        change(model, tokenizer)
    if quantize is not None:
        stored = quantized_entries(model, stored, dtype, quantize)
    out_dtype = out_dtype or dtype
    tensors = folded_tensors(model, stored, dtype, vectors, out_dtype)
    with writing_new_folder(out) as temporary:
        save_others(temporary, model, out_dtype, tokenizer)
        save_tensors(temporary, tensors)
        check_written(out, temporary, tensors)


def folded_tensors(model, stored, dtype, vectors, out_dtype):
    """Return (name in the checkpoint, bytes, function that makes the tensor) of each parameter."""

    def make(name, entry):
        return fold(name, read_as(entry, dtype), vectors).to(out_dtype).contiguous()

    tensors = []
    for name, parameter in model.named_parameters():
        if name in stored:
            stored_name, entry = stored[name]
            n_bytes = parameter.numel() * out_dtype.itemsize
            tensors.append((stored_name, n_bytes, partial(make, name, entry)))
    return tensors


def check_written(out, folder, tensors):
    """Raise ValueError if a tensor in `folder` does not have the bits that were written there."""
    _, written = read_checkpoint(folder)
    for name, _, make in progress(tensors, total=len(tensors)):
        found = written[name].read()
        if not torch.equal(found.view(torch.uint8), make().view(torch.uint8)):
            raise ValueError(f"{out}: {name} was read back with different bits from those written")
