"""Products of a single row go without oneDNN, and nobody else's do."""

import io
import threading

import pytest
import torch
import torch.nn.functional as F
from tqdm import tqdm

from minia3.files.ahead import read_ahead
from minia3.inference.decoding import generate, stream
from minia3.model import single_row
from minia3.model.single_row import fast_products
from tests.benchmarks.inference import Ids

WEIGHT = torch.ones(2, 2, dtype=torch.bfloat16)


def has_onednn():
    return torch.backends.mkldnn.enabled


@pytest.fixture(autouse=True)
def every_processor(monkeypatch):
    """Let these tests run as on a processor whose own product is fast, in their only thread."""
    monkeypatch.setattr(single_row, "HAS_FAST_PRODUCT", True)
    monkeypatch.setattr(threading, "enumerate", lambda: [threading.current_thread()])
    assert has_onednn()
    yield
    assert has_onednn()


@pytest.mark.parametrize(
    ("n_rows", "weight", "expected"),
    [
        (1, WEIGHT, False),
        (2, WEIGHT, True),
        (1, WEIGHT.float(), True),
        (1, WEIGHT.half(), True),
        (1, WEIGHT.to("meta"), True),
    ],
)
def test_a_single_row_of_bfloat16_on_a_cpu_goes_without_onednn(n_rows, weight, expected):
    with fast_products(n_rows, weight):
        assert has_onednn() == expected


@pytest.mark.parametrize(
    ("name", "expected"), [("worker", True), ("tqdm_monitor", False), ("read_ahead", False)]
)
def test_no_other_thread_that_computes_loses_onednn(name, expected, monkeypatch):
    both = [threading.current_thread(), threading.Thread(name=name)]
    monkeypatch.setattr(threading, "enumerate", lambda: both)
    with fast_products(1, WEIGHT):
        assert has_onednn() == expected


def test_the_thread_of_a_progress_bar_is_known_by_its_name():
    with tqdm(total=1, disable=False, file=io.StringIO()) as bar:
        assert bar.monitor.name == "tqdm_monitor"


def test_the_thread_that_reads_rows_is_known_by_its_name():
    """Otherwise what is written in bfloat16 would depend on how fast the rows are read."""
    (thread,) = read_ahead(threading.current_thread() for _ in range(1))
    assert thread.name == "read_ahead"


def test_a_processor_without_a_fast_product_keeps_onednn(monkeypatch):
    monkeypatch.setattr(single_row, "HAS_FAST_PRODUCT", False)
    with fast_products(1, WEIGHT):
        assert has_onednn()


@pytest.mark.parametrize(
    ("version", "instructions", "has_tiles", "expected"),
    [
        ((2, 13), "AVX512", False, True),
        ((2, 13), "AVX512", True, False),
        ((2, 13), "AVX2", False, False),
        ((2, 12), "AVX512", False, False),
        ((2, 14), "AVX512", False, True),
        ((2, 15), "AVX512", False, False),
    ],
)
def test_which_processors_have_a_fast_product(
    version, instructions, has_tiles, expected, monkeypatch
):
    monkeypatch.setattr(single_row, "TORCH", version)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    found = {"amx_bf16": has_tiles}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert single_row.has_fast_product() == expected


def test_onednn_is_as_before_after_an_error_and_if_it_was_off():
    with pytest.raises(KeyError), fast_products(1, WEIGHT):
        raise KeyError
    assert has_onednn()
    torch.backends.mkldnn.enabled = False
    with fast_products(1, WEIGHT):
        pass
    assert not has_onednn()
    torch.backends.mkldnn.enabled = True


@pytest.mark.parametrize("n_rows", [1, 64])
def test_both_products_are_as_close_to_float64(n_rows):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n_rows, 512, generator=generator).bfloat16()
    weight = torch.randn(256, 512, generator=generator).bfloat16()
    expected = F.linear(x.double(), weight.double())
    with fast_products(n_rows, weight):
        found = F.linear(x, weight)
    for product in (found, F.linear(x, weight)):
        error = (product - expected).norm() / expected.norm()
        assert error < 0.003  # what rounding the result does: 2^-9 at most for each entry


# Decoding


@pytest.fixture(params=["t5-v1.0", "llama-gqa"])
def model(loaded, request):
    return loaded(request.param, seed=0, dtype=torch.bfloat16)


@pytest.fixture
def seen(model, monkeypatch):
    """Return a list of (rows, whether there is oneDNN) for each step of the model."""
    steps = []
    step = model.step

    def look(tokens, state):
        steps.append((len(tokens), has_onednn()))
        return step(tokens, state)

    monkeypatch.setattr(model, "step", look)
    return steps


def test_a_step_of_one_row_goes_without_onednn_and_that_of_two_with_it(model, seen):
    generate(model, Ids(), [[3, 4, 5]], max_new_tokens=3)
    assert set(seen) == {(1, False)}
    seen.clear()
    generate(model, Ids(), [[3, 4, 5], [6, 7]], max_new_tokens=1)
    assert seen == [(2, True)]


def test_a_caller_between_two_tokens_has_onednn(model, seen):
    for _ in stream(model, Ids(), [3, 4, 5], max_new_tokens=3):
        assert has_onednn()
    assert set(seen) == {(1, False)}


def test_logits_of_one_row_are_as_close_to_float64_as_with_onednn(model):
    source = torch.tensor([[3, 4, 5, 6]])
    found = {}
    with torch.no_grad():
        for n_rows in (1, 2):  # as many as `fast_products` is told, so 2 is with oneDNN
            state = model.start(source)
            with fast_products(n_rows, model.embed.weight):
                found[n_rows] = model.step(state.start, state).double()
        model.to(torch.float64)
        state = model.start(source)
        exact = model.step(state.start, state)
    errors = {n_rows: (x - exact).norm() / exact.norm() for n_rows, x in found.items()}
    assert 0 < errors[1] < 1.5 * errors[2]
