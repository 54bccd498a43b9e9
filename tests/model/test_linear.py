"""A few rows of bfloat16 are multiplied with the weight first, if the processor has tiles."""

import pytest
import torch
import torch.nn.functional as F

from minia3.inference.decoding import generate
from minia3.model import linear as linear_module
from minia3.model import processor
from minia3.model.linear import MOST_ROWS, Linear, linear
from tests.benchmarks.inference import Ids

SHAPES = [(1, 1), (1, 1, 1), (2, 1), (2, 3, 1), (MOST_ROWS, 1), (1, MOST_ROWS)]


@pytest.fixture(autouse=True)
def with_tiles(monkeypatch):
    """Let these tests run as on a processor with tiles, whatever this one has."""
    monkeypatch.setattr(linear_module, "HAS_TILES", True)


@pytest.fixture
def seen(monkeypatch):
    """Return a list of the shapes that were multiplied with the weight first."""
    shapes = []
    compute = linear_module.linear_with_weight_first

    def look(x, weight):
        shapes.append(tuple(x.shape))
        return compute(x, weight)

    monkeypatch.setattr(linear_module, "linear_with_weight_first", look)
    return shapes


def make_inputs(*shape, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, 512, generator=generator).to(dtype)
    return x, torch.randn(256, 512, generator=generator).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_both_orders_are_as_close_to_float64(shape, seen):
    x, weight = make_inputs(*shape)
    exact = F.linear(x.double(), weight.double())
    with torch.no_grad():
        found = linear(x, weight)
    assert seen == [x.shape]
    assert found.dtype == torch.bfloat16
    assert found.is_contiguous()
    for product in (found, F.linear(x, weight)):
        error = (product - exact).norm() / exact.norm()
        assert error < 0.003  # what rounding the result does: 2^-9 at most for each entry


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((MOST_ROWS + 1, 1), torch.bfloat16),
        ((2, MOST_ROWS), torch.bfloat16),
        ((0, 1), torch.bfloat16),
        ((1, 1), torch.float32),
        ((1, 1), torch.float16),
    ],
)
def test_many_rows_and_other_dtypes_are_left_to_pytorch(shape, dtype, seen):
    x, weight = make_inputs(*shape, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert not seen


def test_gradients_biases_and_other_devices_are_left_to_pytorch(seen):
    x, weight = make_inputs(1, 1)
    assert torch.equal(linear(x, weight), F.linear(x, weight))  # gradients are recorded
    bias = torch.ones(256, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
        assert linear(x.to("meta"), weight.to("meta")).shape == (1, 1, 256)
    assert not seen


def test_without_tiles_everything_is_left_to_pytorch(seen, monkeypatch):
    monkeypatch.setattr(linear_module, "HAS_TILES", False)
    x, weight = make_inputs(1, 1)
    with torch.no_grad():
        assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert not seen


@pytest.mark.parametrize(
    ("version", "capabilities", "expected"),
    [
        ((2, 13), {"amx_tile": True, "amx_bf16": True}, True),
        ((2, 13), {"amx_tile": True, "amx_bf16": False}, False),
        ((2, 13), {}, False),
        ((2, 12), {"amx_tile": True, "amx_bf16": True}, False),
    ],
)
def test_which_processors_have_tiles(version, capabilities, expected, monkeypatch):
    monkeypatch.setattr(processor, "TORCH", version)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert processor.has_tiles() == expected


# Models


@pytest.fixture(params=["t5-v1.0", "t5-v1.1", "llama-gqa"])
def model(loaded, request):
    return loaded(request.param, seed=0, dtype=torch.bfloat16)


def test_all_linears_of_a_step_take_part_and_so_does_the_head(model, monkeypatch):
    called = [model.head_weight]
    for module in model.modules():
        if isinstance(module, Linear):
            module.register_forward_hook(lambda module, *_: called.append(module.weight))
    compute = linear_module.linear_with_weight_first
    first = []

    def look(x, weight):
        first.append(weight)
        return compute(x, weight)

    with torch.no_grad():
        state = model.start(torch.tensor([[3, 4, 5, 6]]))
        del called[1:]
        monkeypatch.setattr(linear_module, "linear_with_weight_first", look)
        model.step(state.start, state)
    assert {id(weight) for weight in first} == {id(weight) for weight in called}
    assert len(first) == len(called) > 10


@pytest.mark.parametrize("n_rows", [1, 3])
def test_logits_are_as_close_to_float64_in_both_orders(model, n_rows, monkeypatch):
    source = torch.tensor([[3, 4, 5, 6]]).expand(n_rows, -1)

    def logits():
        state = model.start(source)
        return model.step(state.start, state).double()

    with torch.no_grad():
        first = logits()
        monkeypatch.setattr(linear_module, "HAS_TILES", False)
        plain = logits()
        model.to(torch.float64)
        exact = logits()
    assert 0 < (first - exact).norm() < 1.5 * (plain - exact).norm()


def test_texts_are_written_with_the_weight_first(model, seen):
    generate(model, Ids(), [[3, 4, 5]], max_new_tokens=3)
    assert (1, 1, model.config.d_model) in seen
