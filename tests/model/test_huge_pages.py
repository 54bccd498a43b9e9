"""Weights in huge pages are the same weights, and the same parameters."""

import copy
import errno
import mmap
import re
from pathlib import Path
from unittest.mock import Mock

import pytest
import running
import torch
from torch import nn

import minia3
from minia3.inference.decoding import generate
from minia3.model import huge_pages
from minia3.model.huge_pages import ALIGNMENT, huge_page_bytes, move_to_huge_pages
from tests.benchmarks.inference import Ids

PAGE = 1 << 21  # bytes: a huge page of x86


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Stand in for the system's settings. Return their folder."""
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    (tmp_path / "hpage_pmd_size").write_text(f"{PAGE}\n")
    monkeypatch.setattr(huge_pages, "SETTINGS", tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["t5", "llama"])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_moved_model_writes_the_same_texts(name, quantize, settings):
    model = minia3.load_model(running.model(name), quantize=quantize)
    prompts = [[5, 6, 7], [8, 9]]
    expected = generate(model, Ids(), prompts, max_new_tokens=5)
    assert move_to_huge_pages(model)
    assert generate(model, Ids(), prompts, max_new_tokens=5) == expected


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_the_parameters_stay_the_same_objects_with_the_same_numbers(name, settings):
    model = minia3.load_model(running.model(name))
    minia3.freeze(model)
    before = dict(model.named_parameters(remove_duplicate=False))
    numbers = {key: weight.clone() for key, weight in before.items()}
    places = {key: weight.data_ptr() for key, weight in before.items()}
    trained = {key for key, weight in before.items() if weight.requires_grad}
    assert trained

    assert move_to_huge_pages(model)

    after = dict(model.named_parameters(remove_duplicate=False))
    assert list(after) == list(before)
    for key, weight in after.items():
        assert weight is before[key]
        assert torch.equal(weight, numbers[key])
        assert weight.requires_grad == (key in trained)
        assert weight.data_ptr() != places[key]
        assert weight.data_ptr() % ALIGNMENT == 0


def test_no_two_weights_overlap_and_the_first_one_begins_a_page(settings):
    module = nn.ParameterList([torch.ones(3), torch.ones(40, 2), torch.ones(0), torch.ones(1)])
    assert move_to_huge_pages(module)
    with torch.no_grad():
        for i, weight in enumerate(module):
            weight.fill_(i)
    assert [weight.unique().tolist() for weight in module] == [[0.0], [1.0], [], [3.0]]
    assert module[0].data_ptr() % PAGE == 0


def test_a_moved_model_can_be_trained_copied_and_saved(settings, tmp_path):
    model = minia3.load_model(running.model("t5"))
    with torch.inference_mode():
        assert move_to_huge_pages(model)
    minia3.save_model(copy.deepcopy(model), tmp_path / "saved")
    saved = minia3.load_model(tmp_path / "saved")
    for key, weight in model.named_parameters():
        assert torch.equal(saved.get_parameter(key), weight)

    minia3.freeze(model)
    state = model.start(torch.tensor([[5, 6]]))
    # With a single token, attention has nothing to choose, and keys have no gradient.
    model.step(torch.tensor([[0, 5]]), state).sum().backward()
    assert all(vector.grad.any() for vector in minia3.vectors(model).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int8])
def test_every_dtype_can_be_moved(dtype, settings):
    weight = torch.arange(6).to(dtype).view(2, 3)
    module = nn.ParameterList([nn.Parameter(weight.clone(), requires_grad=False)])
    assert move_to_huge_pages(module)
    assert module[0].dtype == dtype
    assert torch.equal(module[0], weight)


def test_only_a_model_on_the_cpu_is_moved(settings):
    mixed = nn.ParameterList([torch.ones(2), torch.ones(2, device="meta")])
    place = mixed[0].data_ptr()
    assert not move_to_huge_pages(mixed)
    assert mixed[0].data_ptr() == place


class Divided(torch.Tensor):
    """Stands in for the weight of a model that is divided among processes (a DTensor)."""


def test_a_divided_model_is_not_moved(settings):
    weight = nn.Parameter(torch.ones(2).as_subclass(Divided))
    place = weight.data_ptr()
    assert not move_to_huge_pages(nn.ParameterList([weight]))
    assert weight.data_ptr() == place


@pytest.mark.parametrize("name", ["enabled", "hpage_pmd_size"])
def test_without_settings_nothing_is_moved(name, settings):
    assert huge_page_bytes() == PAGE
    (settings / name).unlink()
    assert not move_to_huge_pages(nn.Linear(2, 2))


def test_if_they_are_switched_off_or_unknown_nothing_is_moved(settings, monkeypatch):
    module = nn.Linear(2, 2)
    (settings / "enabled").write_text("always madvise [never]\n")
    assert not move_to_huge_pages(module)
    (settings / "enabled").write_text("[always] madvise never\n")
    assert move_to_huge_pages(module)
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    assert not move_to_huge_pages(module)


def test_without_memory_for_copies_nothing_is_moved(settings, monkeypatch):
    module = nn.Linear(2, 2)
    place = module.weight.data_ptr()
    monkeypatch.setattr(mmap, "mmap", Mock(side_effect=OSError(errno.ENOMEM, "no memory")))
    assert not move_to_huge_pages(module)
    assert module.weight.data_ptr() == place


@pytest.mark.skipif(huge_page_bytes() is None, reason="needs a Linux with huge pages")
def test_the_system_is_asked_for_huge_pages():
    module = nn.Linear(2, 2)
    assert "hg" not in flags_at(module.weight.data_ptr())
    assert move_to_huge_pages(module)
    assert "hg" in flags_at(module.weight.data_ptr())


def flags_at(address):
    """Return the flags of the mapping that holds an address, such as "hg" (huge pages)."""
    is_there = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            first, end = (int(bound, 16) for bound in bounds.groups())
            is_there = first <= address < end
        elif is_there and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise ValueError(f"no mapping holds {address:x}")
