"""Put weights into a model that was built without any: on the meta device."""

import torch
from torch import nn

from minia3.model.ia3 import vectors
from minia3.model.quantized import QUANTIZED, is_quantizable


def place_weight(model, name, weight, quantize):
    """Put a weight of the base into the model, quantized if it belongs to a linear of a block."""
    if quantize is not None and is_quantizable(model, name):
        place_linear(model, name, QUANTIZED[quantize].from_weight(weight))
    else:
        place_parameter(model, name, weight)


def place_linear(model, name, linear):
    """Put a quantized linear in the place of the one with the weight `name`, and keep its bias."""
    parent_name, _, attribute = name.removesuffix(".weight").rpartition(".")
    parent = model.get_submodule(parent_name)
    linear.bias = getattr(parent, attribute).bias
    setattr(parent, attribute, linear)


def check_weight(weight, name):
    """Raise ValueError if a weight holds NaN or an infinite number."""
    n_bad = int((~weight.isfinite()).sum())
    if n_bad:
        raise ValueError(
            f"{name} has {n_bad:,} of {weight.numel():,} numbers that are NaN or infinite: the "
            "checkpoint is damaged, or its dtype is too narrow"
        )


def read_codes(entry, name, check_finite):
    """Return the codes and the scales of a PackedEntry (nf4_files.py).

    If `check_finite` is set, raise ValueError if a scale is NaN or infinite. (Every code is a
    number.)
    """
    codes, scales = entry.read_codes()
    if check_finite:
        check_weight(scales, f"{name}.absmax")
    return codes, scales


def place_parameter(model, name, tensor, requires_grad=True):
    """Replace the parameter `name` of the model by a new parameter that holds `tensor`."""
    module, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(module), attribute, nn.Parameter(tensor, requires_grad))


def place_ones(model, device):
    """Make all vectors the identity: ones in float32, whatever the dtype of the base is."""
    for name, vector in vectors(model).items():
        identity = torch.ones(vector.shape, dtype=torch.float32, device=device)
        place_parameter(model, f"{name}.scale", identity)
