"""Guards minia3/checkpoints/save.py: tensors go into shards, one shard in memory at a time."""

import json
import weakref

import torch
from safetensors.torch import load_file

from minia3.checkpoints.save import save_tensors


def read_index(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text())


def test_tensors_are_read_when_their_shard_is_written_and_not_before(tmp_path, monkeypatch):
    monkeypatch.setattr("minia3.checkpoints.save.SHARD_BYTES", 80)  # two tensors fill it
    references = []
    n_alive = []

    def read(i):
        tensor = torch.full((10,), float(i))
        references.append(weakref.ref(tensor))
        n_alive.append(sum(reference() is not None for reference in references))
        return tensor

    parts = [(f"x{i}", 40, lambda i=i: read(i)) for i in range(7)]
    save_tensors(tmp_path, parts)
    assert max(n_alive) == 2
    index = read_index(tmp_path)
    assert index["metadata"] == {"total_size": 280}
    for i in range(7):
        file = index["weight_map"][f"x{i}"]
        assert file == f"model-{i // 2 + 1:05d}-of-00004.safetensors"
        saved = load_file(tmp_path / file)[f"x{i}"]
        assert torch.equal(saved, torch.full((10,), float(i)))


def test_a_tensor_larger_than_a_shard_has_a_shard_to_itself(tmp_path, monkeypatch):
    monkeypatch.setattr("minia3.checkpoints.save.SHARD_BYTES", 100)
    save_tensors(tmp_path, [(f"x{n}", 4 * n, lambda n=n: torch.ones(n)) for n in (10, 50, 16)])
    files = read_index(tmp_path)["weight_map"].values()
    assert sorted(files) == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
    ]


def test_a_tensor_that_is_not_contiguous_is_written_as_it_reads(tmp_path):
    transposed = torch.arange(12.0).view(3, 4).T
    save_tensors(tmp_path, [("x", 48, lambda: transposed)])
    assert torch.equal(load_file(tmp_path / "model.safetensors")["x"], transposed)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
