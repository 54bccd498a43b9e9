"""Linears of a frozen base in 8 or 4 bits. (IA)^3 trains beside them as beside any other base.

Nothing of the base trains, so a weight is needed only to be multiplied with. It is kept as small
codes and scales, and is expanded only for the moment of a product:

    y = x W^T            in the forward pass
    dx = dy W            in the backward pass, for which W is made a second time

    int8    w = code * scale, with a code from -127 to 127, and a scale for each row of W
    nf4     w = level[code] * scale, with 16 levels that suit a normal distribution, and a scale for
            each 64 entries of a row (QLoRA: Dettmers et al. 2023, arXiv 2305.14314). The functions
            are those of bitsandbytes.

Codes and scales are plain parameters, with a row for each row of W. So they move, are saved and are
sharded like any other parameter. Scales stay float32 or wider whatever the dtype of the model.

Shapes: O outputs, I inputs, C codes of a row, N scales of a row.
"""

import importlib
import logging
import sys

import torch
import torch.nn.functional as F
from torch import nn

from minia3.model.ia3 import keep_wide
from minia3.model.linear import Linear

INT8_MAX = 127
NF4_BLOCK = 64  # entries that share a scale


class Product(torch.autograd.Function):
    """x W^T for a quantized W. Nothing is kept for the backward pass but what the module holds."""

    @staticmethod
    def forward(ctx, x, codes, scales, dequantize):
        ctx.save_for_backward(codes, scales)
        ctx.dequantize = dequantize
        return F.linear(x, dequantize(codes, scales, x.dtype))

    @staticmethod
    def backward(ctx, grad_y):
        codes, scales = ctx.saved_tensors
        return grad_y @ ctx.dequantize(codes, scales, grad_y.dtype), None, None, None


class QuantizedLinear(nn.Module):
    """y = x W^T + bias, for a W that is kept as codes and scales."""

    def __init__(self, codes, scales, bias=None):
        super().__init__()
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.register_parameter("bias", bias)
        self.out_features = len(codes)

    def forward(self, x):
        y = Product.apply(x, self.codes, self.scales, self.dequantize)
        if self.bias is not None:
            y = y + self.bias
        return y

    def _apply(self, fn, recurse=True):
        """Do what `model.to(...)` or `model.half()` asks for, but keep float32 or wider scales."""

        def apply(x):
            return keep_wide(fn, x) if x is self.scales else fn(x)

        return super()._apply(apply, recurse)

    @classmethod
    def from_weight(cls, weight_OI, bias=None):
        """Return the linear with the weight (O, I), quantized on the device that it is on."""
        return cls(*cls.quantize(weight_OI), bias)

    def to_linear(self, dtype):
        """Return a plain linear with the weight (O, I) that the codes and scales stand for."""
        weight_OI = self.dequantize(self.codes, self.scales, dtype)
        n_outputs, n_inputs = weight_OI.shape
        linear = Linear(n_inputs, n_outputs, bias=False, device="meta")
        linear.weight = nn.Parameter(weight_OI, requires_grad=False)
        linear.bias = self.bias
        return linear


class Int8Linear(QuantizedLinear):
    """A byte for each entry of W. scales: (O, 1) float32."""

    @staticmethod
    def quantize(weight_OI):
        weight_OI = weight_OI.float()
        scale_O1 = weight_OI.abs().amax(dim=1, keepdim=True) / INT8_MAX
        scale_O1 = scale_O1.masked_fill(scale_O1 == 0, 1.0)  # a row of zeros
        return (weight_OI / scale_O1).round().to(torch.int8), scale_O1

    @staticmethod
    def dequantize(codes_OI, scale_O1, dtype):
        # In place, so that the weight is in memory once. A copy, because to() may return the codes.
        return codes_OI.to(dtype, copy=True).mul_(scale_O1.to(dtype))


class NF4Linear(QuantizedLinear):
    """Half a byte for each entry of W, two in a code. scales: (O, I / 64) float32."""

    @staticmethod
    def quantize(weight_OI):
        quantize_4bit = bitsandbytes_functions().quantize_4bit
        n_outputs, n_inputs = weight_OI.shape
        check_nf4_width(n_inputs)
        codes, state = quantize_4bit(
            weight_OI.float().contiguous(), blocksize=NF4_BLOCK, quant_type="nf4"
        )
        return codes.view(n_outputs, -1), state.absmax.view(n_outputs, -1)

    @staticmethod
    def dequantize(codes_OC, scale_ON, dtype):
        functions = bitsandbytes_functions()
        n_outputs, n_codes = codes_OC.shape
        known_dtype = torch.float32 if dtype == torch.float64 else dtype
        # Without `code`, the table of levels: the kernel has its own, and another one would have to
        # be copied to a GPU for each product.
        state = functions.QuantState(
            absmax=scale_ON.flatten().float(),
            shape=torch.Size((n_outputs, 2 * n_codes)),
            blocksize=NF4_BLOCK,
            quant_type="nf4",
            dtype=known_dtype,
        )
        return functions.dequantize_4bit(codes_OC.reshape(-1, 1), state).to(dtype)


def check_nf4_width(n_inputs):
    """Raise ValueError if the rows of a weight would not be whole blocks."""
    if n_inputs % NF4_BLOCK != 0:
        expected = f"a multiple of {NF4_BLOCK}, so that no two rows share a scale"
        raise ValueError(f"nf4 of a weight with {n_inputs} inputs: expected {expected}")


def bitsandbytes_functions():
    """Return bitsandbytes.functional. Raise ValueError if it is not installed."""
    try:
        if "bitsandbytes" not in sys.modules:
            import_without_kernels()
        from bitsandbytes import functional
    except ImportError as error:
        raise ValueError(f"nf4 needs bitsandbytes: {error}: pip install 'minia3[quant]'") from None
    return functional


def import_without_kernels():
    """Import bitsandbytes without its fast products for CPUs. We use torch's products instead.

    On a CPU with bfloat16, the import would download them from the hub, if it found the package
    `kernels` (which transformers 5.25 brings). Without the package, it only warns.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    found = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # to import it fails, as if it were not installed
    try:
        importlib.import_module("bitsandbytes")
    finally:
        del sys.modules["kernels"]
        if found is not None:
            sys.modules["kernels"] = found


# What `load_model(quantize=...)` accepts. minia3/training/choices.py repeats the names.
QUANTIZED = {"int8": Int8Linear, "nf4": NF4Linear}


def quantized_linears(model):
    """Return a dict from the name of each quantized linear of a model to the linear."""
    linears = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            linears[name] = module
    return linears


@torch.inference_mode(False)  # as in `load_model`
def dequantize(model, dtype):
    """Replace the quantized linears of a model by plain ones of a dtype."""
    for name, linear in quantized_linears(model).items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, linear.to_linear(dtype))


def is_quantizable(model, name):
    """Return whether the parameter `name` is the weight of a linear of a block. The head stays."""
    module_name, _, kind = name.rpartition(".")
    is_linear = type(model.get_submodule(module_name)) is Linear
    return is_linear and "blocks." in module_name and kind == "weight"


def check_widths(model, kind):
    """Raise ValueError if linears of the blocks cannot be of a kind of `QUANTIZED`. None is none.

    model: one whose linears are plain, as those on the meta device.
    """
    if kind != "nf4":
        return
    for name, parameter in model.named_parameters():
        if is_quantizable(model, name):
            check_nf4_width(parameter.shape[1])
