"""Guards minia3/model/quantized.py: a quantized model is the plain model with the weights that its
codes mean, in the forward and in the backward pass, and keeps nothing of them in between.
"""

import copy
import importlib
import sys
from unittest import mock

import pytest
import torch
from conftest import logits, make, off, randomize, tokens
from optional import require_bitsandbytes
from test_compile import compile_blocks
from torch import nn

import minia3
from minia3.inference.scoring import logprobs
from minia3.model.blocks import Block
from minia3.model.linear import Linear
from minia3.model.quantized import (
    NF4_BLOCK,
    QUANTIZED,
    Int8Linear,
    NF4Linear,
    bitsandbytes_functions,
    dequantize,
    quantized_linears,
)
from minia3.model.recompute import recompute_blocks
from minia3.training.memory_plan import MemoryCounter

KINDS = ["int8", "nf4"]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
# nf4 needs widths that are multiples of 64.
WIDE = {
    "t5-v1.0": {"d_model": 64, "d_kv": 16, "d_ff": 128},
    "t5-v1.1": {"d_model": 64, "d_kv": 16, "d_ff": 128},
    "llama-gqa": {"hidden_size": 64, "intermediate_size": 128},
    "qwen2": {"hidden_size": 64, "intermediate_size": 128},  # with biases
    "qwen3": {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16},
}

SOURCE = tokens(3, 7)
MASK = torch.tensor([[True] * 7, [False, False] + [True] * 5, [True] * 4 + [False] * 3])
TARGET = tokens(3, 5, seed=1)


def skip_without_bitsandbytes(kind):
    if kind == "nf4":
        require_bitsandbytes()


@pytest.fixture(params=KINDS)
def kind(request):
    skip_without_bitsandbytes(request.param)
    return request.param


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A function from a name to the folder of a random model whose widths suit nf4."""

    def get(name):
        folder = tmp_path_factory.getbasetemp() / f"wide-{name}"
        if not folder.exists():
            make(name, **WIDE[name]).save_pretrained(folder)
        return folder

    return get


def random_weight(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) / 11


# One linear


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_and_its_gradient_are_those_of_the_weight_that_the_codes_mean(kind, dtype):
    bias = nn.Parameter(random_weight(96).to(dtype))
    quantized = QUANTIZED[kind].from_weight(random_weight(96, 128).to(dtype), bias)
    plain = quantized.to_linear(dtype)
    x = torch.randn(2, 5, 128, dtype=dtype, requires_grad=True)
    y = quantized(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    expected = plain(x)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), x)
    assert y.dtype == dtype
    assert off(y.detach(), expected.detach()) <= 4 * torch.finfo(dtype).eps
    assert torch.equal(gradient, expected_gradient)


def test_an_int8_entry_is_off_by_at_most_half_a_step_and_the_largest_of_a_row_is_exact():
    weight_OI = random_weight(96, 128)
    weight_OI[5] = 0
    linear = Int8Linear.from_weight(weight_OI)
    found_OI = linear.to_linear(torch.float64).weight
    assert ((found_OI - weight_OI).abs() <= linear.scales * 0.5001).all()
    assert torch.allclose(found_OI.abs().amax(1).float(), weight_OI.abs().amax(1))
    assert (found_OI[5] == 0).all()
    assert (linear.scales > 0).all(), "0 / 0 has no code"


def test_nf4_is_bitsandbytes_nf4():
    functional = require_bitsandbytes()
    weight_OI = random_weight(96, 128)
    codes, state = functional.quantize_4bit(weight_OI, blocksize=NF4_BLOCK, quant_type="nf4")
    expected_OI = functional.dequantize_4bit(codes, state)
    linear = NF4Linear.from_weight(weight_OI)
    assert torch.equal(linear.to_linear(torch.float32).weight, expected_OI)
    assert torch.equal(linear.codes.flatten(), codes.flatten())


def test_a_row_of_codes_belongs_to_a_row_of_the_weight(kind):
    """So a part of the rows, such as a shard, is quantized as the whole is."""
    weight_OI = random_weight(96, 128)
    whole = QUANTIZED[kind].from_weight(weight_OI)
    part = QUANTIZED[kind].from_weight(weight_OI[32:64])
    assert torch.equal(part.codes, whole.codes[32:64])
    assert torch.equal(part.scales, whole.scales[32:64])


def test_a_16_bit_weight_is_quantized_as_its_float32_copy_is(kind):
    weight_OI = random_weight(96, 128).bfloat16()
    found = QUANTIZED[kind].from_weight(weight_OI)
    expected = QUANTIZED[kind].from_weight(weight_OI.float())
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scales, expected.scales)
    assert found.scales.dtype == torch.float32


def test_nothing_of_a_quantized_linear_trains(kind):
    linear = QUANTIZED[kind].from_weight(random_weight(96, 128))
    assert [name for name, p in linear.named_parameters() if p.requires_grad] == []
    assert not linear.to_linear(torch.float32).weight.requires_grad


def test_nf4_refuses_rows_that_would_share_a_scale():
    require_bitsandbytes()
    with pytest.raises(ValueError, match="nf4 of a weight with 24 inputs: expected a multiple"):
        NF4Linear.from_weight(random_weight(96, 24))


def test_without_bitsandbytes_nf4_names_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        ValueError, match=r"nf4 needs bitsandbytes: .*: pip install 'minia3\[quant\]'"
    ):
        NF4Linear.from_weight(random_weight(64, 64))


@mock.patch.dict(sys.modules)
@pytest.mark.parametrize("is_imported", [False, True])
def test_bitsandbytes_is_imported_without_kernels_of_the_hub(tmp_path, monkeypatch, is_imported):
    """The real bitsandbytes asks for them only on some processors, so this is another package."""
    (tmp_path / "bitsandbytes").mkdir()
    (tmp_path / "bitsandbytes" / "__init__.py").write_text("import kernels\n")
    (tmp_path / "kernels.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("bitsandbytes", "bitsandbytes.functional", "kernels"):
        sys.modules.pop(name, None)
    kernels = importlib.import_module("kernels") if is_imported else None
    with pytest.raises(ValueError, match="nf4 needs bitsandbytes: import of kernels halted"):
        bitsandbytes_functions()
    assert sys.modules.get("kernels") is kernels
    assert importlib.import_module("kernels").__file__ == str(tmp_path / "kernels.py")


def test_nothing_but_the_parameters_is_kept_for_the_backward_pass(kind):
    linear = QUANTIZED[kind].from_weight(random_weight(96, 128))
    parameters = {parameter.data_ptr() for parameter in linear.parameters()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        linear(torch.randn(4, 128, requires_grad=True))
    assert kept
    assert {tensor.data_ptr() for tensor in kept} <= parameters


# Whole models


def gradients(model):
    """Return name -> gradient of each vector, for the mean log-probability of the target."""
    minia3.freeze(model)
    model.zero_grad()
    logp_BL = logprobs(model, model.start(SOURCE, MASK), TARGET)
    logp_BL.mean().backward()
    return {name: vector.grad.clone() for name, vector in minia3.vectors(model).items()}


@pytest.mark.parametrize("name", WIDE)
def test_a_quantized_model_is_the_plain_model_with_the_weights_that_its_codes_mean(
    folders, kind, name
):
    quantized = minia3.load_model(folders(name), dtype=torch.float64, quantize=kind)
    randomize(quantized, seed=1)
    plain = copy.deepcopy(quantized)
    dequantize(plain, torch.float64)
    assert not quantized_linears(plain)
    n_linears = sum(type(module) is Linear for module in plain.modules())
    n_heads = int(plain.head is not None)
    assert len(quantized_linears(quantized)) == n_linears - n_heads > 10

    found = logits(quantized, SOURCE, MASK, TARGET)
    assert off(found, logits(plain, SOURCE, MASK, TARGET)) < 1e-12
    expected = gradients(plain)
    for vector_name, gradient in gradients(quantized).items():
        assert off(gradient, expected[vector_name]) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_stay_float32_in_a_model_that_becomes_narrow(folders, kind, dtype):
    """And its biases become narrow, because a product has the dtype of its input."""
    model = minia3.load_model(folders("qwen2"), quantize=kind)
    scales = {name: linear.scales.clone() for name, linear in quantized_linears(model).items()}
    for name, linear in quantized_linears(model.to(dtype)).items():
        assert linear.scales.dtype == torch.float32
        assert torch.equal(linear.scales, scales[name])
        assert linear.bias is None or linear.bias.dtype == dtype
    assert logits(model, SOURCE, MASK, TARGET).dtype == dtype
    for linear in quantized_linears(model.double()).values():
        assert linear.scales.dtype == torch.float64


@pytest.mark.parametrize("name", ["t5-v1.0", "llama-gqa"])
def test_recomputation_gives_the_same_gradients(folders, kind, name):
    model = minia3.load_model(folders(name), dtype=torch.float64, quantize=kind).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    expected = gradients(model)
    recompute_blocks([module for module in model.modules() if isinstance(module, Block)])
    for vector_name, gradient in gradients(model).items():
        assert off(gradient, expected[vector_name]) < 1e-12


@pytest.mark.parametrize("name", ["t5-v1.1", "llama-gqa"])
def test_the_base_takes_about_a_byte_or_half_a_byte_for_each_weight(folders, kind, name):
    model = minia3.load_model(folders(name), quantize=kind)
    for linear in quantized_linears(model).values():
        n_weights = linear.to_linear(torch.float32).weight.numel()
        n_bytes = sum(parameter.nbytes for parameter in linear.parameters())
        assert n_bytes / n_weights < {"int8": 1.07, "nf4": 0.57}[kind]


class RealMemoryCounter(MemoryCounter):
    """Counts no tensors on the meta device, which take no memory."""

    def add(self, tensor):
        if not tensor.is_meta:
            super().add(tensor)


def test_the_plain_model_is_never_in_memory_while_a_quantized_one_is_loaded(tmp_path, kind):
    """In float64, because a weight that keeps its dtype is mapped and takes no memory."""
    make("llama-gqa", **WIDE["llama-gqa"], num_hidden_layers=10).save_pretrained(tmp_path)
    counter = RealMemoryCounter()
    with counter:
        model = minia3.load_model(tmp_path, dtype=torch.float64, quantize=kind)
    n_bytes = sum(parameter.nbytes for parameter in model.parameters())
    largest = 128 * 64 * torch.float64.itemsize  # of the linears
    assert n_bytes < counter.peak < n_bytes + 8 * largest
    plain = minia3.load_model(tmp_path, dtype=torch.float64)
    assert sum(parameter.nbytes for parameter in plain.parameters()) > 2 * counter.peak


def test_a_base_that_is_dequantized_in_inference_mode_trains_outside_of_it(folders):
    with torch.inference_mode():
        model = minia3.load_model(folders("llama-gqa"), quantize="int8")
        dequantize(model, torch.float32)
    assert all(gradient.abs().max() > 0 for gradient in gradients(model).values())


@pytest.mark.slow
def test_a_block_compiles_to_the_same_numbers(tmp_path):
    """On a Qwen2, whose linears are those with a bias and those without.

    One block, because to compile a block takes seconds. What else a model has is compiled in
    test_compile.py, and that there is a graph for all lengths.
    """
    make("qwen2", **WIDE["qwen2"], num_hidden_layers=1).save_pretrained(tmp_path)
    model = randomize(minia3.load_model(tmp_path, quantize="int8"), seed=1)
    expected = gradients(model)
    compile_blocks(model, "aot_eager", dynamic=False)
    for vector_name, gradient in gradients(model).items():
        assert off(gradient, expected[vector_name]) < 1e-4


def test_an_unknown_kind_is_refused(folders):
    with pytest.raises(ValueError, match="quantize is 'int4', expected one of int8, nf4"):
        minia3.load_model(folders("llama-gqa"), quantize="int4")
