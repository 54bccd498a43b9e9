"""Guards minia3/checkpoints/save.py: transformers and minia3 load what is saved, bit for bit."""

import json
import os
import stat
import weakref

import pytest
import torch
from checkpoint_folders import (
    SOURCE,
    TARGET,
    have_the_same_bits,
    randomize_weights,
    transformers_class,
    weight_dtypes,
)
from conftest import LLAMA_PEERS, PEERS, Peer, logits, off, randomize
from safetensors.torch import load_file

import minia3
from minia3.adapters.lora import add_lora, save_lora
from minia3.adapters.merge import merge_files
from minia3.checkpoints.known_models import base_of
from minia3.checkpoints.save import save_tensors


@pytest.mark.parametrize("name", PEERS)
def test_transformers_loads_a_saved_model_with_nothing_missing_or_left_over(
    peer, loaded, tmp_path, name
):
    folder = tmp_path / "deep" / "folder"
    minia3.save_model(loaded(name, seed=0), folder)  # random vectors, which are not saved
    model, info = transformers_class(name).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    theirs = Peer(name, None, model.eval())
    assert torch.equal(theirs.logits(SOURCE, None, TARGET), peer(name).logits(SOURCE, None, TARGET))
    assert model.generation_config.eos_token_id == peer(name).model.generation_config.eos_token_id
    if name not in LLAMA_PEERS:
        assert model.generation_config.decoder_start_token_id == 0


@pytest.mark.parametrize("name", PEERS)
def test_a_saved_model_comes_back_bit_for_bit(loaded, tmp_path, name):
    model = loaded(name, dtype=torch.bfloat16)
    minia3.save_model(model, tmp_path)
    again = minia3.load_model(tmp_path)
    assert weight_dtypes(again) == {torch.bfloat16}
    assert have_the_same_bits(again, model)
    assert again.config == model.config


def test_transformers_reads_the_dtype_that_was_saved(loaded, tmp_path):
    minia3.save_model(loaded("t5-v1.0", dtype=torch.bfloat16), tmp_path)
    model = transformers_class("t5-v1.0").from_pretrained(tmp_path, dtype="auto")
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["t5-v1.1", "llama-mha"])
def test_large_models_are_saved_in_shards_and_old_files_do_not_hide_new_ones(
    loaded, tmp_path, monkeypatch, name
):
    first = loaded(name)
    second = randomize_weights(loaded(name), 1)
    third = randomize_weights(loaded(name), 2)
    minia3.save_model(first, tmp_path)
    monkeypatch.setattr("minia3.checkpoints.save.SHARD_BYTES", 15_000)
    minia3.save_model(second, tmp_path)

    files = sorted(tmp_path.glob("*.safetensors"))
    sizes = [sum(x.nbytes for x in load_file(file).values()) for file in files]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(files) > 2
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert max(sizes) <= 15_000
    assert index["metadata"]["total_size"] == sum(sizes)
    assert have_the_same_bits(minia3.load_model(tmp_path), second)
    model, info = transformers_class(name).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    theirs = Peer(name, None, model.eval()).logits(SOURCE, None, TARGET)
    assert off(logits(second, SOURCE, None, TARGET), theirs) < 1e-5

    monkeypatch.undo()
    minia3.save_model(third, tmp_path)
    assert have_the_same_bits(minia3.load_model(tmp_path), third)


def test_files_that_no_reader_takes_for_weights_stay(loaded, tmp_path):
    shards = ("model-00001-of-00002.safetensors", "pytorch_model-00002-of-00002.bin")
    indices = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
    others = ["model-backup.safetensors", "model.fp16.safetensors", "pytorch_model_old.bin"]
    for name in (*shards, *indices, *others, "pytorch_model.bin"):
        (tmp_path / name).write_text("{}")
    minia3.save_model(loaded("t5-v1.0"), tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*model*")) == sorted(
        [*others, "model.safetensors"]
    )


def test_weights_may_be_saved_over_the_files_that_they_are_mapped_from(copy):
    folder = copy("llama-gqa")
    model = randomize(minia3.load_model(folder))
    logits_before = logits(model, SOURCE, None, TARGET)
    weights_before = {name: value.clone() for name, value in model.state_dict().items()}
    merged = minia3.merge(model)
    minia3.save_model(merged, folder)
    assert torch.equal(logits(model, SOURCE, None, TARGET), logits_before)
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights_before[name])
    assert have_the_same_bits(minia3.load_model(folder), merged)


class FakeTokenizer:
    def save(self, folder):
        (folder / "tokenizer.json").write_text("{}")


def test_saving_leaves_only_whole_files_that_others_may_read(loaded, tmp_path):
    minia3.save_model(loaded("t5-v1.0"), tmp_path, FakeTokenizer())
    found = sorted(path.name for path in tmp_path.iterdir())
    expected = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    assert found == expected
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == 0o666 & ~mask


def test_a_model_is_not_saved_over_an_adapter_or_a_run(loaded, tmp_path):
    """transformers would apply the adapter to the merged model; the run could not be resumed."""
    model = loaded("llama-gqa", seed=0)
    minia3.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="adapter: found an adapter, which transformers would"):
        minia3.save_model(minia3.merge(model), tmp_path / "adapter")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="run: found the folder of a run, whose"):
        minia3.save_model(model, run)
    assert (run / "config.json").read_text() == "{}"


def test_an_adapter_is_not_saved_over_a_model_or_a_run(loaded, tmp_path):
    """transformers would apply it to the model there, which may hold it already."""
    model = loaded("llama-gqa", seed=0)
    minia3.save_model(minia3.merge(model), tmp_path / "model")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    (run / "metrics.jsonl").write_text("")
    contents = {path: sorted(path.iterdir()) for path in (tmp_path / "model", run)}

    def save(folder):
        minia3.save_adapter(model, folder)

    def save_a_lora(folder):
        other = loaded("llama-gqa")
        add_lora(other)
        save_lora(other, folder)

    hyperparameters = tmp_path / "mine" / "config.json"
    hyperparameters.parent.mkdir()
    hyperparameters.write_text('{"lr": 0.003}')
    for save_there in (save, save_a_lora):
        save_there(hyperparameters.parent)
        with pytest.raises(ValueError, match="model: found a model, to which transformers would"):
            save_there(tmp_path / "model")
        with pytest.raises(ValueError, match="run: found the folder of a run, whose config"):
            save_there(run)
    assert {path: sorted(path.iterdir()) for path in contents} == contents


@pytest.mark.filterwarnings("error:.*task.json was left as it is")
def test_a_task_file_that_stays_is_a_warning(loaded, tmp_path):
    """It may be of the adapter or model that was there before."""
    model = loaded("llama-gqa", seed=0)
    for name, save in (("adapter", minia3.save_adapter), ("model", minia3.save_model)):
        save(model, tmp_path / name)
        task_file = tmp_path / name / "task.json"
        task_file.write_text("{}")
        with pytest.warns(UserWarning, match=f"{name}/task.json was left as it is"):
            save(model, tmp_path / name)
        assert task_file.read_text() == "{}"


def test_a_chat_template_of_the_folder_stays_if_its_tokenizer_stays(loaded, tmp_path):
    template = tmp_path / "chat_template.jinja"
    template.write_text("{{ messages }}")
    minia3.save_model(loaded("llama-gqa"), tmp_path)
    assert template.read_text() == "{{ messages }}"
    minia3.save_model(loaded("llama-gqa"), tmp_path, FakeTokenizer())
    assert not template.exists()


def test_a_folder_names_the_known_model_that_it_was_made_from(loaded, copy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = loaded("t5-v1.0")

    def saved_name(name, folder):
        model.name_or_path = name
        minia3.save_model(model, folder)
        return json.loads((tmp_path / folder / "config.json").read_text()).get("_name_or_path")

    assert saved_name("t5-base", "first") == "t5-base"
    assert saved_name("first", "second") == "t5-base"  # a folder hands the name on
    assert saved_name("some/where", "other") is None
    assert saved_name(None, "other") is None
    assert base_of("second") == "t5-base"
    for name in ("other", "t5-base", "nowhere", str(copy("t5-v1.0"))):
        assert base_of(name) == name
    # A killed process has written this folder, and not yet moved the files to their places.
    os.mkdir("killed")
    os.rename("second", "killed/.written")
    assert base_of("killed") == "t5-base"


@pytest.mark.filterwarnings("ignore:.*repetition_penalty=1.1. generate writes without it")
def test_what_is_made_of_a_model_is_written_with_its_defaults_in_other_programs(copy, tmp_path):
    transformers = pytest.importorskip("transformers", reason="another program")
    base = copy("llama-gqa")
    defaults = {"do_sample": True, "temperature": 0.6, "top_k": 7, "repetition_penalty": 1.1}
    defaults |= {"pad_token_id": 3, "bos_token_id": 5}  # config.json has others
    file = base / "generation_config.json"
    raw = json.loads(file.read_text())
    file.write_text(json.dumps(raw | defaults))
    model = minia3.load_model(base)
    minia3.save_adapter(model, tmp_path / "adapter")
    merge_files(base, tmp_path / "adapter", tmp_path / "merged file by file")
    minia3.save_model(model, tmp_path / "saved")
    minia3.save_model(minia3.merge(minia3.merge(model)), tmp_path / "merged")
    for name in ("saved", "merged", "merged file by file"):
        found = transformers.GenerationConfig.from_pretrained(tmp_path / name)
        assert {key: getattr(found, key) for key in defaults} == defaults
        assert found.eos_token_id == raw["eos_token_id"]


@pytest.mark.filterwarnings("ignore:.*no_repeat_ngram_size=3. generate writes without it")
def test_what_is_made_of_an_older_model_is_written_with_the_defaults_of_its_config(copy, tmp_path):
    transformers = pytest.importorskip("transformers", reason="another program")
    defaults = {"num_beams": 4, "no_repeat_ngram_size": 3, "max_length": 70}
    base = copy("t5-v1.0", **defaults)
    (base / "generation_config.json").unlink()
    minia3.save_model(minia3.load_model(base), tmp_path)
    found = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert {key: getattr(found, key) for key in defaults} == defaults


# Shards


def read_index(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text())


def test_tensors_are_not_read_before_their_shard_is_written(tmp_path, monkeypatch):
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


def test_a_tensor_that_is_not_contiguous_is_written_correctly(tmp_path):
    transposed = torch.arange(12.0).view(3, 4).T
    save_tensors(tmp_path, [("x", 48, lambda: transposed)])
    assert torch.equal(load_file(tmp_path / "model.safetensors")["x"], transposed)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
