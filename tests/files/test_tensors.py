"""Guards minia3/files/tensors.py: both kinds of weight files return the tensors that were saved,
and a file that holds anything else is refused.

tests/hostile/ damages such files.
"""

import json
import os
import pickle
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from minia3.files.tensors import DTYPES, FLOATS, SMALL, Entry, is_small, read_tensors

TENSORS = {
    "a": torch.arange(6.0).view(2, 3),
    "b.c": torch.tensor([0.5, -2.0], dtype=torch.bfloat16),
    "half": torch.tensor([1.0, 65504.0], dtype=torch.float16),
    "double": torch.tensor([0.1], dtype=torch.float64),
    "scalar": torch.tensor(3.0),
    "none": torch.zeros(0, 4),
}


def save_bin(tensors, path):
    torch.save(tensors, path)


def save_old_bin(tensors, path):
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


WRITERS = {
    "safetensors": (save_file, "model.safetensors"),
    "bin": (save_bin, "pytorch_model.bin"),
    "old-bin": (save_old_bin, "pytorch_model.bin"),
}


@pytest.mark.parametrize("as_a_whole", [False, True])
@pytest.mark.parametrize("kind", WRITERS)
def test_each_kind_of_file_returns_the_tensors_that_were_saved(tmp_path, kind, as_a_whole):
    write, name = WRITERS[kind]
    write(TENSORS, tmp_path / name)
    entries = read_tensors(tmp_path / name, as_a_whole)
    assert entries.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        entry = entries[name]
        assert isinstance(entry, Entry)
        assert (entry.shape, entry.dtype) == (tuple(tensor.shape), tensor.dtype)
        found = entry.read()
        assert found.dtype == tensor.dtype
        if as_a_whole:  # for a caller who wants vectors
            found, tensor = found.flatten(), tensor.flatten()
        assert torch.equal(found, tensor)


def test_tensors_that_shared_memory_still_share_it(tmp_path):
    both = torch.randn(2, 3)
    torch.save({"both": both, "first": both[0]}, tmp_path / "pytorch_model.bin")
    entries = read_tensors(tmp_path / "pytorch_model.bin")
    assert torch.equal(entries["first"].read(), both[0])
    shared = entries["first"].read().untyped_storage().data_ptr()
    assert entries["both"].read().untyped_storage().data_ptr() == shared


@pytest.mark.parametrize("save", [save_bin, save_old_bin])
def test_a_tensor_with_two_names_is_read_as_two(tmp_path, save):
    twice = torch.arange(6.0).view(2, 3)
    parameter = torch.nn.Parameter(twice)
    save({"a": parameter, "b": parameter, "c": twice}, tmp_path / "pytorch_model.bin")
    read = [entry.read() for entry in read_tensors(tmp_path / "pytorch_model.bin").values()]
    for i, tensor in enumerate(read):
        assert torch.equal(tensor, twice + i)  # the others have not changed it
        for other in read[i:]:
            other += 1


def test_both_ways_to_read_a_safetensors_file_have_the_same_order(tmp_path):
    """Otherwise, a message about the first of several problems would name another one each time."""
    tensors = {f"{n % 7}.{n}": torch.ones(2) for n in range(40)}
    save_file(tensors, tmp_path / "a.safetensors")
    for as_a_whole in (False, True):
        assert list(read_tensors(tmp_path / "a.safetensors", as_a_whole)) == sorted(tensors)


def test_a_small_file_that_is_read_as_a_whole_may_change_afterwards(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(3)}, path)
    entry = read_tensors(path, as_a_whole=True)["a"]
    path.write_bytes(save({"a": torch.zeros(3)}))
    assert entry.read().tolist() == [1, 1, 1]


def write_zeros(path, n_numbers):
    """Write a .safetensors file of zeros, which are a hole in the file and take no room on disk."""
    tensor = {"dtype": "F32", "shape": [n_numbers], "data_offsets": [0, 4 * n_numbers]}
    header = json.dumps({"a": tensor}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, 8 + len(header) + 4 * n_numbers)


@pytest.mark.parametrize(("n_numbers", "is_read"), [(SMALL // 4 - 100, True), (SMALL // 4, False)])
def test_only_a_small_file_is_read_as_a_whole(tmp_path, n_numbers, is_read):
    path = tmp_path / "a.safetensors"
    write_zeros(path, n_numbers)
    tracemalloc.start()
    entries = read_tensors(path, as_a_whole=True)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (peak >= path.stat().st_size) == is_read
    assert peak < 3 * SMALL
    assert entries["a"].shape == (n_numbers,)
    assert entries["a"].read().count_nonzero() == 0


def test_a_device_is_never_read_as_a_whole():
    """It says that it has no bytes, and some devices never end."""
    assert not is_small(Path(os.devnull))


def test_only_floats_have_the_dtypes_of_weights(tmp_path):
    """A caller that needs a float refuses every dtype that is not in FLOATS."""
    integers = {"n": torch.arange(3), "flags": torch.tensor([True])}
    save_file(integers, tmp_path / "a.safetensors")
    torch.save(integers, tmp_path / "a.bin")
    for as_a_whole in (False, True):
        entries = read_tensors(tmp_path / "a.safetensors", as_a_whole)
        assert (entries["n"].dtype, entries["flags"].dtype) == ("I64", "BOOL")
    for entry in (*entries.values(), *read_tensors(tmp_path / "a.bin").values()):
        assert entry.dtype not in FLOATS
    assert set(DTYPES.values()) == set(FLOATS)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ([torch.ones(2)], "found list"),
        (torch.ones(2), "found Tensor"),
        ({"model": {"a": torch.ones(2)}}, "found 'model': dict"),
        ({"a": torch.ones(2), "step": 3}, "found 'step': int"),
        ({1: torch.ones(2)}, "found the name 1"),
        ({"a\nb": torch.ones(2)}, r"found the name 'a\\nb'"),
        ({"a": torch.eye(2).to_sparse()}, "found 'a': Tensor"),
        ({"a": torch.ones(2, device="meta")}, "found 'a': Tensor"),
        ({"a": torch.ones(1).expand(10**12)}, "found 'a': Tensor"),
    ],
)
def test_a_bin_that_is_not_a_dict_of_plain_tensors_is_refused(tmp_path, value, found):
    path = tmp_path / "pytorch_model.bin"
    torch.save(value, path)
    expected = f"^{path}: expected a dict from names to tensors, {found}$"
    with pytest.raises(ValueError, match=expected):
        read_tensors(path)


@pytest.mark.parametrize("as_a_whole", [False, True])
def test_a_tensor_name_of_two_lines_is_refused_in_safetensors(tmp_path, as_a_whole):
    save_file({"a\nb": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"^[^\n]*a\.safetensors: [^\n]*the name 'a\\nb'$"):
        read_tensors(tmp_path / "a.safetensors", as_a_whole)


@pytest.mark.parametrize("as_a_whole", [False, True])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_file_with_the_suffix_of_another_kind_is_refused(tmp_path, as_a_whole):
    save_file(TENSORS, tmp_path / "a.bin")
    torch.save(TENSORS, tmp_path / "a.safetensors")
    (tmp_path / "b.bin").write_bytes(pickle.dumps({"a": object()}))
    (tmp_path / "empty.safetensors").touch()
    for name, reason in [
        ("a.bin", "damaged, or more than tensors: "),
        ("b.bin", "damaged, or more than tensors: UnpicklingError: "),
        ("a.safetensors", "damaged or cut short: SafetensorError: "),
        ("empty.safetensors", "the file is empty"),
        ("c.bin", "not found"),
        ("c.safetensors", "not found"),
    ]:
        with pytest.raises(ValueError, match=rf"^{tmp_path / name}: {reason}[^\n]*$"):
            read_tensors(tmp_path / name, as_a_whole)
