"""Guards the layout of a folder: which files hold the weights, and which indexes are refused."""

import json
from pathlib import Path

import pytest
from checkpoint_folders import have_the_same_bits, refusal

import minia3
from minia3.checkpoints.hub import find_adapter
from minia3.checkpoints.layout import local_weights


def test_safetensors_are_read_even_if_there_is_a_bin_too(loaded, copy):
    folder = copy("t5-v1.0")
    (folder / "pytorch_model.bin").write_text("not looked at")
    assert have_the_same_bits(minia3.load_model(folder), loaded("t5-v1.0"))


@pytest.mark.parametrize("file", ["metrics.jsonl", "checkpoint.pt"])
def test_a_model_beside_the_files_of_another_trainer_is_a_model(loaded, copy, file):
    folder = copy("t5-v1.0")
    (folder / file).write_text("{}")
    assert have_the_same_bits(minia3.load_model(folder), loaded("t5-v1.0"))
    assert "found a model, expected an adapter" in refusal(find_adapter, folder)


def weight_map(*files):
    return {"weight_map": {f"tensor {i}": file for i, file in enumerate(files)}}


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (
            weight_map("../elsewhere.safetensors"),
            "files of this folder, found ['../elsewhere.safetensors']",
        ),
        (weight_map("/etc/passwd"), "found ['/etc/passwd']"),
        (weight_map("sub/x.safetensors"), "found ['sub/x.safetensors']"),
        (weight_map(".."), "found ['..']"),
        (weight_map(""), "found ['']"),
        (
            weight_map("one.safetensors", "two.safetensors"),
            "not there: one.safetensors, two.safetensors",
        ),
        (weight_map(1), "expected a weight_map from tensors to files"),
        (weight_map(), "expected a weight_map"),
        ({}, "expected a weight_map"),
        ([], "expected a JSON object, found list"),
    ],
)
def test_an_index_that_leads_nowhere_is_refused(copy, index, message):
    folder = copy("t5-v1.0")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert message in refusal(minia3.load_model, folder)


def test_a_folder_without_a_checkpoint_is_refused(copy, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert f"{empty}: found an empty folder, expected" in refusal(minia3.load_model, empty)
    folder = copy("t5-v1.0")
    (folder / "model.safetensors").unlink()
    message = refusal(minia3.load_model, folder)
    assert "expected model.safetensors or pytorch_model.bin, whole or in shards" in message
    assert "found a folder with config.json, generation_config.json" in message


def test_a_broken_link_is_named_as_such_and_not_looked_for_on_the_hub(copy, tmp_path, monkeypatch):
    """A copy of a folder of the hub's cache has such links in place of its files."""
    monkeypatch.chdir(tmp_path)
    link = Path("org", "name")
    link.parent.mkdir()
    link.symlink_to("../blobs/1")
    for find in (minia3.load_model, find_adapter):
        assert refusal(find, link) == f"{link}: a broken link to ../blobs/1"

    folder = copy("t5-v1.0")
    (folder / ".#rows").symlink_to("somebody@example")  # as Emacs locks a file
    (folder / "model.safetensors").unlink()
    assert "a broken link" not in refusal(minia3.load_model, folder)
    (folder / "model.safetensors").symlink_to("../blobs/1")
    expected = "found model.safetensors, a broken link to ../blobs/1, expected model.safetensors"
    assert expected in refusal(minia3.load_model, folder)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("../blobs/2")
    assert "found config.json, a broken link to ../blobs/2" in refusal(minia3.load_model, folder)


def test_the_weights_of_a_model_on_this_machine_are_found(copy, tmp_path):
    folder = copy("t5-v1.0")
    file = tmp_path / "model.gguf"
    file.touch()
    assert local_weights(folder) == [folder / "model.safetensors"]
    assert local_weights(file) == [file]
    assert local_weights("org/name") == local_weights("t5-base") == []
    for name in ("params.json", "consolidated.01.pth", "consolidated.00.pth"):
        (tmp_path / name).touch()
    paths = [tmp_path / "consolidated.00.pth", tmp_path / "consolidated.01.pth"]
    assert local_weights(tmp_path) == paths
