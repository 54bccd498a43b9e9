"""Guards mixtures: each is its equation, 1 changes nothing, and what does not match is refused."""

import math
import re

import pytest
import torch
from conftest import Peer, equal_tensors, logits, make, off, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

import minia3
from minia3.adapters.mix import MIX, mix
from minia3.adapters.peft_files import read_adapter, write_adapter
from minia3.adapters.rows import save_adapter

A = "blocks.0.attn.l_k"
B = "blocks.1.ffn.l_ff"

entries = st.lists(st.floats(0.125, 8.0, width=32), min_size=3, max_size=3)
weights = st.floats(-2.0, 2.0)


@given(
    parts=st.lists(st.tuples(entries, weights), min_size=1, max_size=4),
    equation=st.sampled_from(list(MIX)),
)
@settings(deadline=None, max_examples=60)
def test_a_mixture_is_its_equation(parts, equation):
    mixed = mix([({A: torch.tensor(l_D)}, w) for l_D, w in parts], equation)
    for i, found in enumerate(mixed[A].tolist()):
        pairs = [(l_D[i], w) for l_D, w in parts]
        expected = {
            "average": 1 + sum(w * (x - 1) for x, w in pairs),
            "product": math.prod(1 + w * (x - 1) for x, w in pairs),
            "power": math.prod(x**w for x, w in pairs),
        }[equation]
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert mixed[A].dtype == torch.float32


@pytest.mark.parametrize("equation", MIX)
def test_an_entry_of_1_changes_nothing_and_a_missing_vector_counts_as_ones(equation):
    a = {A: torch.tensor([0.3, 2.0, 1.1])}
    b = {B: torch.tensor([0.7, 5.0])}
    identity = {name: torch.ones_like(x) for name, x in (a | b).items()}
    assert equal_tensors(mix([(a, 1.0)], equation), a)
    assert equal_tensors(mix([(a, 1.0), (b, 1.0)], equation), a | b)
    assert equal_tensors(mix([(a, 1.0), (identity, 0.7)], equation), identity | a)
    assert equal_tensors(mix([(a, 0.0), (b, 0.0)], equation), identity)
    assert equal_tensors(mix([(identity, 0.3), (identity, -2.0)], equation), identity)
    assert equal_tensors(mix([(a, 0.5), (b, 0.25)], equation), mix([(b, 0.25), (a, 0.5)], equation))
    assert mix([(a, 0.5), (b, 0.25)], equation)[A].tolist() == mix([(a, 0.5)], equation)[A].tolist()


def test_the_default_is_the_average_and_two_halves_of_an_adapter_are_the_adapter():
    a = {A: torch.tensor([-0.3, 0.0, 1.1])}
    assert equal_tensors(mix([(a, 0.5), (a, 0.5)]), a)
    assert mix([(a, 2.0)])[A].tolist() == pytest.approx([-1.6, -1.0, 1.2])


@pytest.mark.parametrize(
    ("parts", "equation", "message"),
    [
        (
            [({A: torch.tensor([1.0, -0.5])}, 1.0)],
            "power",
            f"{A} at 1: a power needs positive entries, found [-0.5]",
        ),
        (
            [({A: torch.tensor([1.0, 2.0])}, 1.0), ({A: torch.tensor([0.0, 2.0])}, 1.0)],
            "power",
            f"{A} at 0: ",
        ),
        (
            [({A: torch.tensor([1.0, 3e38])}, 9.0)],
            "average",
            f"{A} at 1: not finite: the average of [3",
        ),
        # Not the fault of an entry: a square and a power of 0 are numbers.
        ([({A: torch.tensor([-0.5])}, 2.0)], "power", "a power needs positive entries, found"),
        ([({A: torch.tensor([1e30])}, 2.0)], "power", "not finite: the power of [1.0000000"),
        ([({A: torch.tensor([1.0])}, math.nan)], "product", "the weights are [nan], expected fin"),
        (
            [({A: torch.tensor([1.0])}, 1.0), ({A: torch.tensor([1.0])}, math.inf)],
            "average",
            "the weights are [1.0, inf], expected finite numbers",
        ),
        (
            [({A: torch.ones(2)}, 1.0), ({A: torch.ones(3)}, 1.0)],
            "average",
            f"do not mix: {A} of [2, 3] entries",
        ),
        (
            [({A: torch.ones(2)}, 1.0), ({A: torch.ones(1)}, 1.0)],
            "average",
            f"do not mix: {A} of [1, 2] entries",
        ),
        (
            [({A: torch.ones(2)}, 1.0), ({f"encoder.{A}": torch.ones(2)}, 1.0)],
            "average",
            f"do not mix: {A}, and encoder.{A}",
        ),
        (
            [({A: torch.ones(2)}, 1.0)],
            "mean",
            "average, product, power, found 1 adapter and 'mean'",
        ),
        ([], "average", "found 0 adapters"),
    ],
)
def test_adapters_that_cannot_be_mixed_are_refused_with_the_entry(parts, equation, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        mix(parts, equation)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["t5-v1.1", "llama-gqa"])
def test_a_mixture_of_files_loads_here_and_in_peft(loaded, tmp_path, name):
    import peft

    source = tokens(4, 7)
    target = tokens(4, 5, seed=1)
    mask = torch.arange(7) < torch.tensor([[7], [5], [4], [1]])
    folders = [tmp_path / "a", tmp_path / "b"]
    for seed, folder in enumerate(folders):
        save_adapter(loaded(name, seed=seed), folder)
    mixed = mix([(read_adapter(folder).vectors, 0.5) for folder in folders])
    write_adapter(tmp_path / "mixed", mixed)
    model = loaded(name)
    minia3.load_adapter(model, tmp_path / "mixed")
    assert equal_tensors({n: v[0] for n, v in minia3.vectors(model).items()}, mixed)
    theirs = peft.PeftModel.from_pretrained(make(name), tmp_path / "mixed").eval()
    expected = Peer(name, None, theirs).logits(source, mask, target)
    assert off(logits(model, source, mask, target), expected) < 1e-5
