"""Guards the border: a damaged file ends in a ValueError of one line, or in what an honest reading
of it gives.

It never ends in another exception, a crash, a hang, gigabytes, or a wrong model. What is read is in
damage_targets.py, what happens to it in mutations.py.

Each target has a tenth of its cases here. `python -m tests.hostile` has these cases and more, and
repeats one. .ci/run runs it with another seed, so that no case runs twice.
"""

import pickle
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import minia3
from minia3.checkpoints.load import read_checkpoint
from minia3.checkpoints.tokenizer import Tokenizer
from minia3.files.tensors import read_tensors
from minia3.training.checkpoint import load_checkpoint
from tests.hostile.damage_targets import (
    TARGETS,
    Target,
    adapter_model,
    make_adapter,
    make_llama,
    make_llama_config,
    make_meta,
    make_shards,
    make_t5_config,
    make_unigram,
    read_object,
    write_json,
)

LACKING = "cases are limited by means that Windows lacks"
campaign = pytest.importorskip("tests.hostile.campaign", reason=LACKING)
program = pytest.importorskip("tests.hostile.__main__", reason=LACKING)

# Python 3.12 warns because pyarrow has threads from its import on. It makes them anew in a fork.
FORKS = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.mark.slow
@FORKS
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit on memory is Linux's")
@pytest.mark.parametrize("name", TARGETS)
def test_a_damaged_file_is_refused_in_one_line_or_read_as_it_is(name, tmp_path):
    n_cases = TARGETS[name].n_cases // 10
    tally = campaign.run_target(name, n_cases, 0, tmp_path, stops_early=True)
    report = "\n".join(tally.failures)
    repeat = f"python -m tests.hostile --only '{name}' --number NUMBER"
    assert not tally.failures, f"{report}\nTo repeat a case: {repeat}"
    assert tally.n_refused + tally.n_read == tally.n_cases
    assert tally.n_refused > 0, "some damage is noticed"


def test_one_case_can_be_repeated(capsys):
    assert program.main(["--only", "JSONL", "--number", "3"]) == 0
    first = capsys.readouterr().out
    assert program.main(["--only", "JSONL", "--number", "3"]) == 0
    assert capsys.readouterr().out == first
    assert first.splitlines()[-1] in (campaign.REFUSED, campaign.READ)


@FORKS
def test_a_case_that_fails_is_counted_and_told(tmp_path, monkeypatch, capsys):
    def read(folder):
        if (folder / "rows.jsonl").read_bytes() != whole:
            raise KeyError("wrong")

    def make(folder):
        (folder / "rows.jsonl").write_bytes(whole)

    whole = b'{"input": "a", "target": "b"}\n' * 3
    monkeypatch.setitem(TARGETS, "JSONL", Target(make, read, 5))
    assert program.main(["--only", "JSONL", "--cases", "5"]) == 1
    table = capsys.readouterr().out
    assert "KeyError: 'wrong'" in table
    columns = table.splitlines()[1].split()
    assert columns[:4] == ["JSONL", "5", "0", str(5 - int(columns[4]))]


# Pickles


class Code:
    """An object whose pickle creates the file `path` when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def read_run_checkpoint(path):
    return load_checkpoint(path.parent)


def read_adapter_file(path):
    return minia3.load_adapter(adapter_model(), path)


@pytest.mark.parametrize("form", ["plain", "zip", "old"])
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("pytorch_model.bin", read_tensors),
        ("adapter_model.bin", read_adapter_file),
        ("finish.pt", read_adapter_file),
        ("checkpoint.pt", read_run_checkpoint),
    ],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_would_run_code_does_not(tmp_path, name, read, form):
    path = tmp_path / name
    marker = tmp_path / "ran"
    if form == "plain":
        path.write_bytes(pickle.dumps({"a": Code(marker)}))
    else:
        tensors = {"a": torch.ones(2), "b": Code(marker)}
        torch.save(tensors, path, _use_new_zipfile_serialization=form == "zip")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z"):
        read(path)
    assert not marker.exists()


# What the fuzz has found, or what was found beside it: the smallest case of each


def change_json(path, **changes):
    write_json(path, read_object(path) | changes)


def rename_tensor(path, name):
    tensors = load_file(path)
    renamed = {name: tensors.pop(min(tensors))}
    save_file(renamed | tensors, path)


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (make_t5_config, {"tie_word_embeddings": "no"}),
        (make_t5_config, {"scale_decoder_outputs": [0]}),
        (make_llama_config, {"tie_word_embeddings": 4.5}),
        (make_llama_config, {"pad_token_id": "x"}),
        (make_llama_config, {"bos_token_id": [1]}),
    ],
)
def test_a_config_with_a_value_of_another_type_is_refused(tmp_path, make, changes):
    make(tmp_path)
    read_checkpoint(tmp_path, weights=False)
    change_json(tmp_path / "config.json", **changes)
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z"):
        read_checkpoint(tmp_path, weights=False)


def two_shards_with_one_name(folder):
    make_shards(folder)
    first, *_, last = sorted(folder.glob("model-*.safetensors"))
    name = min(load_file(first))
    save_file(load_file(last) | {name: load_file(first)[name] + 1}, last)
    minia3.load_model(folder)


def a_name_of_two_lines(folder):
    make_llama(folder)
    rename_tensor(folder / "model.safetensors", "a\nb")
    minia3.load_model(folder)


def a_name_of_two_lines_in_an_adapter(folder):
    make_adapter(folder)
    rename_tensor(folder / "adapter_model.safetensors", "a\nb")
    minia3.load_adapter(adapter_model(), folder)


def a_key_of_two_lines(folder):
    make_meta(folder)
    change_json(folder / "params.json", **{"a\nb": 1})
    minia3.load_model(folder)


def a_shard_whose_name_is_too_long(folder):
    make_shards(folder)
    change_json(folder / "model.safetensors.index.json", weight_map={"a": "x" * 5000})
    minia3.load_model(folder)


def a_shard_whose_name_has_two_lines(folder):
    make_shards(folder)
    change_json(folder / "model.safetensors.index.json", weight_map={"a": "x\ny"})
    minia3.load_model(folder)


def a_hundred_thousand_sentinels(folder):
    make_unigram(folder)
    change_json(folder / "tokenizer_config.json", extra_ids=100_000)
    Tokenizer.from_folder(folder)


def a_checkpoint_that_is_a_text(folder):
    torch.save("x", folder / "checkpoint.pt")
    load_checkpoint(folder)


@pytest.mark.parametrize(
    "read",
    [
        two_shards_with_one_name,
        a_name_of_two_lines,
        a_name_of_two_lines_in_an_adapter,
        a_key_of_two_lines,
        a_shard_whose_name_is_too_long,
        a_shard_whose_name_has_two_lines,
        a_hundred_thousand_sentinels,
        a_checkpoint_that_is_a_text,
    ],
)
def test_a_case_that_was_found_is_refused_in_one_line(tmp_path, read):
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z"):
        read(tmp_path)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "..", "", "a/b.safetensors", "a\0b"]
)
def test_an_index_cannot_name_a_file_outside_its_folder(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    make_shards(folder)
    shard = "model-00001-of-00004.safetensors"
    (folder / shard).rename(tmp_path / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    escaped = name.replace("\0", "\\u0000")
    index.write_text(index.read_text().replace(shard, escaped))
    with pytest.raises(ValueError, match=r"\A[^\n]*model\.safetensors\.index\.json: [^\n]+\Z"):
        minia3.load_model(folder)
