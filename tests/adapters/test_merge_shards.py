"""Merging, saving and exporting a model that is divided among processes."""

import filecmp

import pytest
import torch
from conftest import randomize
from ranks import my_shards, on_ranks
from torch_version import divides_a_base, divides_a_quantized_base

import minia3
from minia3.adapters.lora import add_lora
from minia3.checkpoints import save
from minia3.model.shard import gathered, is_divided

NAMES = ("t5-v1.0", "t5-deep-decoder", "llama-odd", "qwen2", "qwen3")


def merged_tensors(folders, out):
    """Merge divided models, save them, and return name -> tensor of each, gathered."""
    save.SHARD_BYTES = 20_000  # so that there are several files
    found = []
    for i, folder in enumerate(folders):
        model = randomize(minia3.load_model(folder, n_adapters=2, shards=my_shards()))
        before = {name: gathered(p).clone() for name, p in model.named_parameters()}
        merged = minia3.merge(model, 1)
        assert not merged.training
        minia3.save_model(merged, out / str(i))
        minia3.save_model(model, out / f"{i}-base")
        for name, p in model.named_parameters():
            assert torch.equal(gathered(p), before[name])
            assert is_divided(p) == ("blocks." in name and not name.endswith(".scale"))
        found.append({name: gathered(p) for name, p in merged.named_parameters()})
    return found


@divides_a_base
@pytest.mark.slow
@pytest.mark.parametrize(
    ("n_processes", "names"),
    # Rows of llama-odd that 6 processes cannot divide evenly: the last has none of 10 keys.
    [(2, NAMES), (6, ("t5-deep-decoder", "llama-odd"))],
)
def test_a_divided_model_is_merged_and_saved_with_the_bits_of_a_whole_one(
    n_processes, names, peer, tmp_path, monkeypatch
):
    monkeypatch.setattr(save, "SHARD_BYTES", 20_000)
    folders = [peer(name).folder for name in names]
    out = tmp_path / "divided"
    results = on_ranks(n_processes, merged_tensors, folders, out)
    for i, folder in enumerate(folders):
        whole = randomize(minia3.load_model(folder, n_adapters=2))
        merged = minia3.merge(whole, 1)
        for found in results:
            for name, p in merged.named_parameters():
                assert torch.equal(found[i][name], p), (folder, name)
        minia3.save_model(merged, tmp_path / str(i))
        minia3.save_model(whole, tmp_path / f"{i}-base")
        for name in (str(i), f"{i}-base"):
            files = sorted(path.name for path in (tmp_path / name).iterdir())
            assert files == sorted(path.name for path in (out / name).iterdir())
            assert len(files) > 3
            _, differ, missing = filecmp.cmpfiles(tmp_path / name, out / name, files, shallow=False)
            assert not differ
            assert not missing


def refused(folder):
    """Return what a divided model says to what it cannot do."""
    messages = []
    plain = minia3.load_model(folder, shards=my_shards())
    quantized = minia3.load_model(folder, quantize="int8", shards=my_shards())
    for call in (
        lambda: add_lora(plain),
        lambda: minia3.merge(quantized),
        lambda: minia3.save_model(quantized, "unused"),
    ):
        with pytest.raises(ValueError) as error:  # noqa: PT011 (the test looks at the message)
            call()
        messages.append(str(error.value))
    return messages


@divides_a_quantized_base
@pytest.mark.slow
def test_what_a_divided_base_cannot_do_is_refused_in_one_line(peer):
    for messages in on_ranks(2, refused, peer("llama-gqa").folder):
        expected = ("this one is divided", "merge the files", "this base is quantized")
        for message, part in zip(messages, expected, strict=True):
            assert part in message
            assert "\n" not in message
