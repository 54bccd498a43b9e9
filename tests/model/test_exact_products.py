"""Float32 products of bfloat16 tensors are exact, and nobody else's products are rounded."""

import threading

import pytest
import torch

from minia3.model import exact_products
from minia3.model.processor import TORCH

# `fp32_precision` came with torch 2.9, and oneDNN rounds only on a processor that can.
pytestmark = pytest.mark.skipif(TORCH < (2, 9), reason="needs torch 2.9")


@pytest.fixture(autouse=True)
def every_processor(monkeypatch):
    """Let these tests run as on a processor where this is faster, in their only thread."""
    monkeypatch.setattr(exact_products, "HAS_EXACT_PRODUCTS", True)
    monkeypatch.setattr(threading, "enumerate", lambda: [threading.current_thread()])
    before = precision()
    yield
    assert precision() == before


def precision():
    return torch.backends.mkldnn.matmul.fp32_precision


@pytest.mark.parametrize(
    ("dtype", "expected"), [(torch.bfloat16, True), (torch.float32, False), (torch.float16, False)]
)
def test_only_factors_that_were_bfloat16_may_be_rounded(dtype, expected):
    with exact_products.exact_products(dtype):
        assert (precision() == "bf16") == expected


def test_no_product_of_another_thread_is_rounded(monkeypatch):
    both = [threading.current_thread(), threading.Thread(name="worker")]
    monkeypatch.setattr(threading, "enumerate", lambda: both)
    with exact_products.exact_products(torch.bfloat16):
        assert precision() != "bf16"


def test_the_precision_is_as_before_after_an_error():
    with pytest.raises(KeyError), exact_products.exact_products(torch.bfloat16):
        raise KeyError


@pytest.mark.parametrize("chosen", ["ieee", "tf32", "bf16"])
def test_what_the_user_has_chosen_stays(chosen):
    before = precision()
    torch.backends.mkldnn.matmul.fp32_precision = chosen
    with exact_products.exact_products(torch.bfloat16):
        pass
    assert precision() == chosen
    torch.backends.mkldnn.matmul.fp32_precision = before


@pytest.mark.parametrize("n_columns", [8, 135])
def test_the_product_is_as_exact_as_in_float32(n_columns):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 135, 64, generator=generator).bfloat16()
    y = torch.randn(6, 64, n_columns, generator=generator).bfloat16()
    with exact_products.exact_products(torch.bfloat16):
        found = x.float() @ y.float()
    expected = x.double() @ y.double()
    # Far below 2^-9, the error of a result that is rounded to bfloat16.
    assert (found - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize(
    ("version", "instructions", "expected"),
    [
        ((2, 13), {"avx512_bf16": True}, True),
        ((2, 15), {"avx512_bf16": True}, True),
        ((2, 12), {"avx512_bf16": True}, False),
        ((2, 13), {"avx512_bf16": True, "amx_bf16": True}, False),
        ((2, 13), {"avx512_bf16": False}, False),
        ((2, 13), {}, False),
    ],
)
def test_where_it_is_used(version, instructions, expected, monkeypatch):
    monkeypatch.setattr(exact_products, "TORCH", version)
    monkeypatch.setattr(exact_products, "has_tiles", lambda: "amx_bf16" in instructions)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions, raising=False)
    assert exact_products.has_exact_products() == expected
