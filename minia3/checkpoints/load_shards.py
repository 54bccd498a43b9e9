"""Load a model that is divided among processes. Each process reads only its rows of a tensor.

The files are memory-mapped: slicing a tensor of a file reads nothing, and copying the slice reads
its pages alone. So no process ever holds the whole model. If a tensor has to be
dequantized (GGUF), joined (Meta's shards) or unpacked (torch's old format) before it can be sliced,
it is whole for that moment, one tensor at a time.

Shapes: O outputs and I inputs of a linear.
"""

import torch

from minia3.checkpoints.nf4_files import ALL_ROWS, PackedEntry, read_as
from minia3.checkpoints.place import (
    check_weight,
    place_linear,
    place_ones,
    place_parameter,
    read_codes,
)
from minia3.files.progress import progress
from minia3.model.quantized import QUANTIZED, NF4Linear, is_quantizable
from minia3.model.shard import is_divided, shard


def place_shards(model, stored, dtype, shards, quantize=None, check_finite=False):
    """Divide a model that is on the meta device, and read what this process holds of its weights.

    stored: our name of each weight -> (its name in the checkpoint, its Entry). The other arguments
    are those of `load_model`. No weight requires a gradient.
    """
    kinds = {}  # name of a weight -> the class of its linear, if it is a quantized one
    for name, (_, entry) in stored.items():
        kind = kind_of_linear(model, name, entry, quantize)
        if kind is not None:
            kinds[name] = kind
            place_linear(model, name, meta_linear(kind, entry.shape))
    shard(model, shards)

    device = shards.mesh.device_type
    for name, (stored_name, entry) in progress(stored.items(), total=len(stored)):
        kind = kinds.get(name)
        rows = shards.rows(entry.shape[0])
        if kind is NF4Linear and isinstance(entry, PackedEntry):
            parts = read_codes(entry, stored_name, check_finite)
            place_codes(model, name, [part[rows] for part in parts])
            continue
        is_whole = kind is None and not is_divided(model.get_parameter(name))
        if is_whole:
            rows = ALL_ROWS
        weight = read_as(entry, dtype, rows)
        if check_finite:
            check_weight(weight, stored_name)
        if is_whole:
            weight = weight.to(device).contiguous()
            place_parameter(model, name, weight, requires_grad=False)
        elif kind is None:
            place_rows(model, name, weight)
        else:
            place_codes(model, name, quantized_rows(kind, weight))
    place_ones(model, device)


def kind_of_linear(model, name, entry, quantize):
    """Return the class of the quantized linear that the weight `name` belongs to, or None."""
    if isinstance(entry, PackedEntry) and quantize is None:
        quantize = "nf4"
    if quantize is None or not is_quantizable(model, name):
        return None
    return QUANTIZED[quantize]


def meta_linear(kind, shape):
    """Return a quantized linear for a weight of this shape, (O, I), on the meta device."""
    n_outputs, n_inputs = shape
    codes, scales = kind.quantize(torch.zeros(1, n_inputs))
    return kind(
        torch.empty(n_outputs, codes.shape[1], dtype=codes.dtype, device="meta"),
        torch.empty(n_outputs, scales.shape[1], dtype=scales.dtype, device="meta"),
    )


def quantized_rows(kind, weight):
    """Return the codes and scales of some rows of a weight, which may be none."""
    if len(weight) > 0:
        return kind.quantize(weight)
    codes, scales = kind.quantize(weight.new_zeros(1, weight.shape[1]))
    return codes[:0], scales[:0]


def place_codes(model, name, codes_and_scales):
    """Place this process's rows of the quantized linear with the weight `name`."""
    codes, scales = codes_and_scales
    place = name.removesuffix(".weight")
    place_rows(model, f"{place}.codes", codes)
    place_rows(model, f"{place}.scales", scales)


def place_rows(model, name, rows):
    """Make `rows` this process's part of the divided parameter `name`."""
    shape = model.get_parameter(name).shape
    rows = rows.to(model.shards.rows_device).contiguous()
    place_parameter(model, name, model.shards.join(rows, shape), requires_grad=False)
