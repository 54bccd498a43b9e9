"""Guards the way between files and rows: a row comes back bit for bit, a row that does not exist is
refused, and another base is a warning."""

import json
import os
import re
import warnings

import numpy as np
import pytest
import torch
from conftest import equal_tensors, randomize
from safetensors.torch import load_file
from test_peft_files import refused

import minia3
from minia3.adapters.rows import copy_row, load_adapter, row_of, save_adapter


@pytest.mark.parametrize("name", ["t5-v1.1", "t5-wide", "llama-odd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_comes_back_bit_for_bit_whatever_the_dtype_of_the_base(loaded, tmp_path, name, dtype):
    model = loaded(name, n_adapters=2, seed=3, dtype=dtype)
    again = loaded(name, n_adapters=2, dtype=dtype)
    save_adapter(model, tmp_path, adapter=0)
    load_adapter(again, tmp_path, adapter=1)
    for n, vector in minia3.vectors(again).items():
        assert torch.equal(vector[1], minia3.vectors(model)[n][0])
        assert torch.equal(vector[0], torch.ones_like(vector[0]))


def test_the_saved_row_of_a_float64_model_is_float32(loaded, tmp_path):
    save_adapter(loaded("t5-v1.0").double(), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_a_row_of_a_model_is_a_view_that_needs_no_gradient(loaded):
    model = loaded("t5-v1.0", n_adapters=2)
    for name, l_D in row_of(model, 1).items():
        l_D += 1
        assert (
            minia3.vectors(model)[name].tolist()[0][0],
            minia3.vectors(model)[name].tolist()[1][0],
        ) == (1.0, 2.0)


def test_the_copies_of_a_row_do_not_change_with_the_model(loaded):
    model = loaded("t5-v1.0", n_adapters=2, seed=3)
    copies = copy_row(model, 1)
    expected = {name: l_D.clone() for name, l_D in row_of(model, 1).items()}
    randomize(model, seed=4)
    assert equal_tensors(copies, expected)


def test_loading_walks_once_through_the_modules_and_reads_the_file_as_a_whole(
    loaded, tmp_path, monkeypatch
):
    """To walk, and to read tensor by tensor, took most of the time."""
    model = loaded("t5-v1.0", seed=3)
    expected = {name: vector.detach().clone() for name, vector in minia3.vectors(model).items()}
    save_adapter(model, tmp_path)
    walks = []

    def vectors(module):
        walks.append(module)
        return minia3.vectors(module)

    again = loaded("t5-v1.0")
    monkeypatch.setattr("minia3.adapters.rows.vectors", vectors)
    monkeypatch.setattr(type(model), "named_modules", None)
    monkeypatch.setattr("minia3.files.tensors.safe_open", None)
    load_adapter(again, tmp_path)
    assert walks == [again]
    for name, vector in minia3.vectors(again).items():
        assert torch.equal(vector, expected[name])


@pytest.mark.parametrize("adapter", [-1, 2])
def test_a_row_that_is_not_there_is_refused(loaded, tmp_path, adapter):
    model = loaded("t5-v1.0", n_adapters=2)
    with pytest.raises(ValueError, match="out of range: the model has rows 0 to 1"):
        save_adapter(model, tmp_path / "x", adapter)
    assert not (tmp_path / "x").exists()
    save_adapter(model, tmp_path / "good")
    assert "out of range" in refused(model, tmp_path / "good", adapter=adapter)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (True, "is not an int"),
        (False, "is not an int"),
        (np.True_, "is not an int"),
        (torch.tensor(True), "is not an int"),
        (1.0, "is not an int"),
        (torch.tensor([1]), "is not an int"),
        ("rte", "adapter is 'rte', expected rows of the model (Adapters.rows returns the rows of"),
        (None, "adapter is None, expected rows of the model"),
    ],
)
def test_a_row_that_is_not_an_int_is_refused(loaded, tmp_path, adapter, message):
    model = loaded("t5-v1.0", n_adapters=2)
    save_adapter(model, tmp_path / "good")
    assert message in refused(model, tmp_path / "good", adapter=adapter)
    with pytest.raises(ValueError, match=re.escape(message)):
        minia3.merge(model, adapter)


@pytest.mark.parametrize("kind", [np.int64, np.uint8, torch.tensor, np.array])
def test_a_row_may_be_an_integer_of_numpy_or_torch(loaded, tmp_path, kind):
    """`generate` took them, and `save_adapter` refused what it gets from `Adapters.rows`."""
    model = loaded("t5-v1.0", n_adapters=2, seed=3)
    source = torch.tensor([[5, 6]])
    expected = model.start(source, None, 1)
    assert torch.equal(model.start(source, None, kind(1)).adapter_B, expected.adapter_B)
    save_adapter(model, tmp_path, kind(1))
    load_adapter(model, tmp_path, kind(0))
    for vector in minia3.vectors(model).values():
        assert torch.equal(vector[0], vector[1])
    merged = minia3.merge(model, kind(1))
    assert equal_tensors(merged.state_dict(), minia3.merge(model, 1).state_dict())


def test_another_name_of_the_base_is_a_warning_and_another_spelling_is_not(loaded, tmp_path):
    model = loaded("t5-v1.0")
    for saved, name, warns in (
        ("t5-base", "t5-large", True),
        ("t5-base", "t5-base", False),
        ("google-t5/t5-base", "t5-base", False),
        (str(model.name_or_path), str(model.name_or_path), False),
        (str(model.name_or_path), f"{model.name_or_path}/", False),
        (str(model.name_or_path), os.path.relpath(model.name_or_path), False),
        ("tiny-t5", "tiny-t5", False),
    ):
        model.name_or_path = saved
        save_adapter(model, tmp_path)
        model.name_or_path = name
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            load_adapter(model, tmp_path)
        assert [str(w.message) for w in seen] == (
            [f"{tmp_path} was trained on google-t5/t5-base, and this model is t5-large"]
            if warns
            else []
        )


def test_the_name_that_peft_needs_to_find_the_base_is_written(loaded, tmp_path):
    model = loaded("t5-v1.0")
    for name, expected in (
        ("flan-t5-base", "google/flan-t5-base"),
        ("some/one", "some/one"),
        ("a/b/c", "a/b/c"),
        ("/home/me/b/", "b"),  # the folders of this machine are nobody's business
    ):
        model.name_or_path = name
        save_adapter(model, tmp_path)
        assert (
            json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"]
            == expected
        )


def test_a_base_without_its_place_is_no_other_base(loaded, tmp_path, recwarn):
    model = loaded("t5-v1.0")
    model.name_or_path = str(tmp_path / "base")
    save_adapter(model, tmp_path / "adapter")
    load_adapter(model, tmp_path / "adapter")
    assert not recwarn.list
    model.name_or_path = str(tmp_path / "other")
    with pytest.warns(UserWarning, match="was trained on base, and this model is"):
        load_adapter(model, tmp_path / "adapter")


def test_models_of_one_name_in_two_repositories_are_two_bases(loaded, tmp_path):
    model = loaded("t5-v1.0")
    model.name_or_path = "one/model"
    save_adapter(model, tmp_path)
    model.name_or_path = "another/model"
    with pytest.warns(UserWarning, match="trained on one/model, and this model is another/model"):
        load_adapter(model, tmp_path)
