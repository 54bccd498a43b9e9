"""Merging into a quantized base: the vectors fold into the scales, and the codes stay as they are.

A scale belongs to (a part of) a row of a weight, which is an output of its linear:

    l_k, l_v, l_q, l_o, l_up, l_gate     scale the outputs of their linears: scales <- l * scales
    l_ff of a gated feed-forward         act(gate) * (l_ff * up): folds into the scales of `up`
    l_ff of T5 v1.0                      scales the inputs of `down`, which its scales cannot hold,
                                         so it stays a vector

A checkpoint may leave some linears plain. Their weights are folded as in a plain base (fold.py). If
`up` is plain and `down` is not, l_ff stays a vector as well.

In exact arithmetic, all of these compute the same as the vectors. In floating point, the products
are rounded once.

No file format keeps such scales, so what is written to files has plain weights: those that the
codes stand for (`quantized_entries`). Then l_ff folds into `down` as well.

Shapes: D entries of a vector.
"""

from functools import partial

import torch

from minia3.adapters.fold import check_folded, fold
from minia3.checkpoints.load import build_model
from minia3.checkpoints.nf4_files import PackedEntry, read_as
from minia3.checkpoints.place import place_parameter
from minia3.files.tensors import Entry
from minia3.model.quantized import QUANTIZED, QuantizedLinear, is_quantizable, quantized_linears
from minia3.model.site_names import SITES


def merge_quantized(model, vectors):
    """Return a new model with `vectors` folded into its linears.

    vectors: name -> (D,), see `copy_row`. Quantized linears get other scales. Linears that the
    checkpoint has left plain (bitsandbytes' llm_int8_skip_modules) get other weights. The new model
    has one row of vectors: ones, but for each l_ff that cannot be folded. It shares the codes with
    `model`, which stays as it is. Raise the errors of `merge`.

    `merged.keeps_vectors`: whether it needs its row, because an l_ff was not folded.
    """
    merged = build_model(model.config)
    left = dict(vectors)
    for name, linear in quantized_linears(model).items():
        place, _, kind = name.rpartition(".")
        scaling = []
        for vector_name in scaling_vectors(model.get_submodule(place), place, kind):
            if vector_name in vectors:
                scaling.append(left.pop(vector_name))
        folded = fold_into_scales(name, linear, scaling, model.embed.weight.dtype)
        setattr(merged.get_submodule(place), kind, folded)

    kept = {name: l_D for name, l_D in left.items() if scales_quantized(merged, name)}
    for name, _ in list(merged.named_parameters()):
        if isinstance(merged.get_submodule(name.rpartition(".")[0]), QuantizedLinear):
            continue
        parameter = model.get_parameter(name)
        if name.endswith(".scale"):
            ones = torch.ones_like(parameter[:1])
            tensor = kept.get(name.removesuffix(".scale"), ones).view_as(ones).clone()
        else:
            tensor = fold(name, parameter.detach(), left)
        place_parameter(merged, name, tensor, parameter.requires_grad)
    merged.keeps_vectors = any((l_D != 1).any() for l_D in kept.values())
    return merged


def fold_into_scales(name, linear, scaling, dtype):
    """Return the quantized linear `name` with vectors folded into its scales and its bias.

    scaling: the vectors (D,) that scale its outputs. dtype: of the weight when it is computed.
    Raise ValueError if a number of this weight or of the bias is not finite.
    """
    scales = linear.scales
    bias = linear.bias
    for l_D in scaling:
        scales = scales * l_D[:, None]
        bias = scaled_bias(bias, l_D)
    folded = type(linear)(linear.codes, scales, bias)
    if scaling:
        check_folded(f"{name}.weight", folded.to_linear(dtype).weight)
        if bias is not None:
            check_folded(f"{name}.bias", bias)
    return folded


def scales_quantized(model, vector_name):
    """Return whether a vector scales the outputs or the inputs of a quantized linear."""
    place, _, site = vector_name.rpartition(".l_")
    return isinstance(model.get_submodule(f"{place}.{SITES[site]}"), QuantizedLinear)


def scaling_vectors(module, place, kind):
    """Return the names of the vectors that scale the outputs of the linear `kind` of a module."""
    names = [f"{place}.l_{site}" for site, linear in SITES.items() if linear == kind != "down"]
    is_gated = getattr(module, "up", None) is not None
    if kind == "up" and is_gated:
        names.append(f"{place}.l_ff")
    return names


def scaled_bias(bias, l_D):
    if bias is None:
        return None
    return torch.nn.Parameter((bias.detach() * l_D).to(bias.dtype), bias.requires_grad)


def quantized_entries(model, stored, dtype, quantize):
    """Return `stored` with entries that read what a quantized base makes of the weights.

    stored: see `open_checkpoint`. dtype: of the weights before they are quantized and after they
    are dequantized. Weights that are stored in nf4 stay as they are, unless they become int8.
    """
    entries = dict(stored)
    for name, (stored_name, entry) in stored.items():
        is_quantized_already = isinstance(entry, PackedEntry) and quantize == "nf4"
        if is_quantizable(model, name) and not is_quantized_already:
            read = partial(read_quantized, entry, dtype, QUANTIZED[quantize])
            entries[name] = (stored_name, Entry(entry.shape, entry.dtype, read))
    return entries


def read_quantized(entry, dtype, linear_class):
    weight = read_as(entry, dtype)
    return linear_class.from_weight(weight).to_linear(dtype).weight.detach()
