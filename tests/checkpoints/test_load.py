"""Guards the border where checkpoints come in and go out: every form of file gives the same bits, what does not fit is
refused in one line that says what was found, nothing that a file holds is run, and transformers reads what is saved."""

import json
import os
import pickle
import stat
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import LLAMA_PEERS, PEERS, Peer, logits, make, off, randomize, tokens
from safetensors.torch import load_file, save_file

import minia3
from minia3.checkpoints.config import to_hf
from minia3.checkpoints.hub import find
from minia3.checkpoints.known_models import KNOWN_MODELS, base_of, known_model
from minia3.checkpoints.load import build_model
from minia3.checkpoints.tensor_names import LLAMA, T5, T5_GATED, T5_PLAIN, expand, name_table
from minia3.cli.info import info
from minia3.files.read import read_json
from minia3.files.write import replacing, write_json

SOURCE, TARGET = tokens(2, 7), tokens(2, 4, seed=1)


def same_bits(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )


def refusal(call, *arguments, **options):
    """The message of the ValueError, which must be one line."""
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the callers look at it)
        call(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# The tables of names


@pytest.mark.parametrize("name", PEERS)
def test_the_table_names_every_parameter_once_and_every_tensor_of_transformers(loaded, peer, name):
    model = loaded(name)
    pairs = [(theirs, ours) for theirs, ours in name_table(model).items() if ours is not None]
    parameters = [n for n, _ in model.named_parameters() if n.split(".")[-1] != "scale"]
    assert sorted(ours for _, ours in pairs) == sorted(parameters)
    assert {theirs for theirs, _ in pairs} == load_file(
        peer(name).folder / "model.safetensors"
    ).keys()


@pytest.mark.parametrize(
    "name", ["t5-base", "flan-t5-small", "t0-11b", "llama-2-7b", "llama-3.2-1b", "smollm2-135m"]
)
def test_the_table_names_every_parameter_of_the_known_models(name):
    model = build_model(KNOWN_MODELS[name].config)
    ours = [ours for ours in name_table(model).values() if ours is not None]
    assert sorted(ours) == sorted(
        n for n, _ in model.named_parameters() if n.split(".")[-1] != "scale"
    )


def test_every_line_of_the_tables_is_used_by_some_model(loaded):
    used = {n for name in PEERS for n in name_table(loaded(name))}
    for one in (T5, T5_PLAIN, T5_GATED, LLAMA):
        assert expand(one, 1).keys() <= used


# Every form of file


def write(folder, tensors, form):
    """`tensors` as the only weights of `folder`, in one of the forms that published checkpoints have."""
    for file in folder.glob("*model*"):
        file.unlink()
    halves = [dict(list(tensors.items())[i::2]) for i in range(2)]
    suffix = "safetensors" if "safetensors" in form else "bin"
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    save = {
        "safetensors": save_file,
        "bin": torch.save,
        "old bin": lambda x, path: torch.save(x, path, _use_new_zipfile_serialization=False),
    }[form.removeprefix("sharded ")]
    if not form.startswith("sharded"):
        save(tensors, folder / f"{stem}.{suffix}")
        return
    index = {}
    for i, half in enumerate(halves):
        save(half, folder / f"{stem}-{i}.{suffix}")
        index |= dict.fromkeys(half, f"{stem}-{i}.{suffix}")
    (folder / f"{stem}.{suffix}.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )


FORMS = ["safetensors", "sharded safetensors", "bin", "sharded bin", "old bin"]


@pytest.mark.parametrize("name", ["t5-v1.1", "llama-tied"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_file_gives_the_same_bits(loaded, copy, name, form):
    folder = copy(name)
    write(folder, load_file(folder / "model.safetensors"), form)
    model = minia3.load_model(folder)
    assert same_bits(model, loaded(name))
    assert torch.equal(
        logits(model, SOURCE, None, TARGET), logits(loaded(name), SOURCE, None, TARGET)
    )


def test_shards_as_transformers_writes_them(loaded, tmp_path):
    make("llama-gqa").save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert same_bits(minia3.load_model(tmp_path), loaded("llama-gqa"))


def test_safetensors_are_read_where_there_is_a_bin_too(loaded, copy):
    folder = copy("t5-v1.0")
    (folder / "pytorch_model.bin").write_text("not looked at")
    assert same_bits(minia3.load_model(folder), loaded("t5-v1.0"))


@pytest.mark.parametrize("name", ["t5-v1.0", "t5-unscaled", "llama-tied"])
def test_a_head_that_is_a_copy_of_the_embedding_is_dropped(loaded, copy, name):
    folder = copy(name)
    tensors = load_file(folder / "model.safetensors")
    embed = tensors["model.embed_tokens.weight" if name in LLAMA_PEERS else "shared.weight"]
    write(folder, tensors | {"lm_head.weight": embed.clone()}, "safetensors")
    model = minia3.load_model(folder)
    assert model.head is None
    assert model.config == loaded(name).config
    assert same_bits(model, loaded(name))


@pytest.mark.parametrize("name", ["t5-v1.0", "t5-unscaled", "llama-tied"])
def test_a_head_that_differs_from_the_embedding_is_kept_whatever_the_config_says(copy, name):
    import transformers

    folder = copy(name)
    head = torch.randn(61, 24)
    write(folder, load_file(folder / "model.safetensors") | {"lm_head.weight": head}, "safetensors")
    model = minia3.load_model(folder)
    assert torch.equal(model.head.weight, head)
    assert model.config.own_head
    kind = (
        transformers.AutoModelForCausalLM
        if name in LLAMA_PEERS
        else transformers.AutoModelForSeq2SeqLM
    )
    theirs = Peer(name, folder, kind.from_pretrained(folder).eval())
    assert off(logits(model, SOURCE, None, TARGET), theirs.logits(SOURCE, None, TARGET)) < 1e-5


@pytest.mark.parametrize("name", ["t5-v1.1", "llama-mha"])
def test_a_head_of_its_own_may_equal_the_embedding(copy, name):
    folder = copy(name)
    tensors = load_file(folder / "model.safetensors")
    embed = tensors["model.embed_tokens.weight" if name in LLAMA_PEERS else "shared.weight"]
    write(folder, tensors | {"lm_head.weight": embed.clone()}, "safetensors")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": False}))
    assert minia3.load_model(folder).head is not None


def test_what_older_files_hold_beside_the_weights_is_passed_over(loaded, copy):
    folder = copy("t5-v1.0")
    tensors = load_file(folder / "model.safetensors")
    extra = {
        f"{stack}.embed_tokens.weight": tensors["shared.weight"].clone()
        for stack in ("encoder", "decoder")
    }
    extra["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.randn(
        32, 4
    )
    write(folder, tensors | extra, "bin")
    assert same_bits(minia3.load_model(folder), loaded("t5-v1.0"))
    folder = copy("llama-mha")
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.randn(3) for i in range(2)}
    write(folder, load_file(folder / "model.safetensors") | extra, "bin")
    assert same_bits(minia3.load_model(folder), loaded("llama-mha"))


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("t5-v1.0", "encoder.embed_tokens.weight"),
        ("t5-v1.0", "decoder.embed_tokens.weight"),
        ("t5-v1.0", "lm_head.weight"),
        ("llama-tied", "lm_head.weight"),
    ],
)
def test_the_one_copy_of_a_tied_embedding_may_have_any_of_its_names(loaded, copy, model, name):
    folder = copy(model)
    tensors, own = (
        load_file(folder / "model.safetensors"),
        "shared" if model == "t5-v1.0" else "model.embed_tokens",
    )
    tensors[name] = tensors.pop(f"{own}.weight")
    write(folder, tensors, "safetensors")
    assert same_bits(minia3.load_model(folder), loaded(model))


def test_a_folder_says_of_which_known_model_it_was_made(loaded, copy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = loaded("t5-v1.0")
    for name, base in (
        ("t5-base", "t5-base"),
        ("one", "t5-base"),
        ("some/where", None),
        (None, None),
    ):
        model.name_or_path = name
        minia3.save_model(model, "one" if base else "other")
        raw = json.loads((tmp_path / ("one" if base else "other") / "config.json").read_text())
        assert raw.get("_name_or_path") == base
    assert base_of("one") == "t5-base"  # and so, one from the other
    for name in ("other", "t5-base", "nowhere", str(copy("t5-v1.0"))):
        assert base_of(name) == name


@pytest.mark.parametrize("name", ["t5-v1.0", "t5-v1.1"])
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_a_copy_of_the_embedding_that_differs_is_refused(copy, name, stack):
    folder = copy(name)
    tensors = load_file(folder / "model.safetensors")
    other = tensors["shared.weight"].clone()
    other[3, 5] += 1
    write(folder, tensors | {f"{stack}.embed_tokens.weight": other}, "safetensors")
    assert f"{stack}.embed_tokens.weight is not the copy of shared.weight" in refusal(
        minia3.load_model, folder
    )


@pytest.mark.parametrize("name", ["t5-v1.0", "t5-v1.1", "llama-gqa"])
def test_a_model_can_be_pickled(loaded, name):
    model = loaded(name)
    assert same_bits(pickle.loads(pickle.dumps(model)), model)


def test_the_ends_of_generation_config_go_before_those_of_config(copy):
    folder = copy("llama-mha", eos_token_id=4)
    assert minia3.load_model(folder).config.eos_ids == (2,), (
        "transformers wrote 2 into generation_config.json"
    )
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert minia3.load_model(folder).config.eos_ids == (7, 8)
    (folder / "generation_config.json").write_text("{}")
    assert minia3.load_model(folder).config.eos_ids == (4,)


def test_the_factors_that_stand_for_a_gguf_are_not_taken_from_a_config_json(loaded, copy):
    model = minia3.load_model(copy("llama-mha", rope_factors=["x"]))
    assert model.config == loaded("llama-mha").config


# Dtypes


def as_dtype(folder, dtype):
    write(
        folder,
        {n: x.to(dtype) for n, x in load_file(folder / "model.safetensors").items()},
        "safetensors",
    )
    return folder


def dtypes(model):
    vectors = {f"{name}.scale" for name in minia3.vectors(model)}
    assert {p.dtype for n, p in model.named_parameters() if n in vectors} == {torch.float32}
    return {p.dtype for n, p in model.named_parameters() if n not in vectors}


@pytest.mark.parametrize(
    ("name", "stored", "expected"),
    [
        ("t5-v1.0", torch.float32, torch.float32),
        ("t5-v1.0", torch.bfloat16, torch.bfloat16),
        ("t5-v1.1", torch.float16, torch.float32),
        ("llama-gqa", torch.float16, torch.float16),
        ("llama-gqa", torch.bfloat16, torch.bfloat16),
        ("llama-gqa", torch.float64, torch.float64),
    ],
)
def test_without_a_dtype_what_is_stored_is_kept_except_float16_in_t5(copy, name, stored, expected):
    folder = as_dtype(copy(name), stored)
    tensors, model = load_file(folder / "model.safetensors"), minia3.load_model(folder)
    assert dtypes(model) == {expected}
    table = name_table(model)
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[table[n]], x.to(expected)) for n, x in tensors.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["t5-v1.1", "llama-gqa"])
def test_the_dtype_asked_for_is_the_dtype_of_every_weight_but_the_vectors(loaded, name, dtype):
    assert dtypes(loaded(name, dtype=dtype)) == {dtype}


def test_files_of_mixed_dtypes_take_the_widest(copy):
    folder = copy("t5-v1.0")
    tensors = load_file(folder / "model.safetensors")
    tensors = {n: x.bfloat16() if "Attention" in n else x for n, x in tensors.items()}
    write(folder, tensors, "safetensors")
    assert dtypes(minia3.load_model(folder)) == {torch.float32}


def test_float16_is_refused_for_t5_with_the_reason_and_taken_for_llama(loaded):
    assert "T5 overflows in float16" in refusal(loaded, "t5-v1.0", dtype=torch.float16)
    assert dtypes(loaded("llama-mha", dtype=torch.float16)) == {torch.float16}


def test_the_default_dtype_of_torch_does_not_reach_the_vectors(loaded):
    torch.set_default_dtype(torch.float64)
    try:
        assert dtypes(loaded("llama-mha")) == {torch.float32}
    finally:
        torch.set_default_dtype(torch.float32)


def test_options_that_make_no_sense_are_refused(peer):
    folder = peer("t5-v1.0").folder
    assert "n_adapters must be at least 1, found 0" in refusal(
        minia3.load_model, folder, n_adapters=0
    )
    assert "dtype must be None or one of" in refusal(minia3.load_model, folder, dtype=torch.int8)
    assert "found 'bfloat16'" in refusal(minia3.load_model, folder, dtype="bfloat16")


# What does not fit


def test_all_tensors_that_do_not_fit_are_named_at_once(copy):
    folder = copy("t5-v1.1")
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.final_layer_norm.weight"]
    tensors["decoder.final_layer_norm.weight"] = torch.ones(25)
    tensors["decoder.block.1.layer.0.SelfAttention.kk.weight"] = torch.ones(1)
    tensors["lm_head.weight"] = torch.ones(61, 24, dtype=torch.int64)
    tensors["decoder.block.2.layer.2.layer_norm.weight"] = torch.ones(24)
    for form, kind in (("safetensors", "I64"), ("bin", "torch.int64")):
        write(folder, tensors, form)
        message = refusal(minia3.load_model, folder)
        assert str(folder) in message
        assert "5 tensors do not fit the config" in message
        assert "encoder.final_layer_norm.weight is missing" in message
        assert "decoder.final_layer_norm.weight has shape (25,), expected (24,)" in message
        assert (
            "SelfAttention.kk.weight is left over (nearest known: decoder.block.1.layer.0.SelfAttention."
            in message
        )
        assert "decoder.block.2.layer.2.layer_norm.weight is left over" in message
        assert f"lm_head.weight is stored as {kind}, expected a float" in message


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        (
            "t5-v1.1",
            {"feed_forward_proj": "relu", "dense_act_fn": "relu"},
            "DenseReluDense.wi.weight is missing",
        ),
        ("t5-v1.0", {"num_layers": 1}, "encoder.block.1.layer.0.layer_norm.weight is left over"),
        (
            "t5-v1.0",
            {"num_decoder_layers": 3},
            "decoder.block.2.layer.2.DenseReluDense.wo.weight is missing",
        ),
        ("t5-v1.0", {"vocab_size": 62}, "shared.weight has shape (61, 24), expected (62, 24)"),
        (
            "llama-mha",
            {"num_key_value_heads": 2},
            "k_proj.weight has shape (24, 24), expected (12, 24)",
        ),
        (
            "llama-gqa",
            {"num_key_value_heads": 4},
            "v_proj.weight has shape (12, 24), expected (24, 24)",
        ),
        (
            "llama-tied",
            {"tie_word_embeddings": False},
            "1 tensors do not fit the config: lm_head.weight is missing",
        ),
    ],
)
def test_a_config_of_another_model_is_refused_with_the_tensors_that_tell(
    copy, name, changes, expected
):
    assert expected in refusal(minia3.load_model, copy(name, **changes))


def cut(path, part):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("part", [0.02, 0.5, 0.98])
def test_a_file_that_is_cut_short_is_refused(copy, form, part):
    folder = copy("llama-mha")
    write(folder, load_file(folder / "model.safetensors"), form)
    file = max(folder.glob("*model*"), key=lambda path: path.stat().st_size)
    cut(file, part)
    message = refusal(minia3.load_model, folder)
    assert message.startswith(f"{file}: damaged")
    assert "weights_only" not in message


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1\nsize 12345\n"
HTML = "\n<!DOCTYPE html>\n<html><head><title>429 Too Many Requests</title></head></html>"


@pytest.mark.parametrize(
    "file",
    ["model.safetensors", "pytorch_model.bin", "config.json", "model.safetensors.index.json"],
)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LFS, "a Git LFS pointer in place of the file: run `git lfs pull`"),
        (HTML, "an HTML page"),
        ("", "the file is empty"),
    ],
)
def test_what_stands_in_place_of_a_file_is_told(copy, file, content, message):
    folder = copy("t5-v1.0")
    if file != "config.json":
        (folder / "model.safetensors").unlink()
    (folder / file).write_text(content)
    found = refusal(minia3.load_model, folder)
    assert found.startswith(str(folder / file))
    assert message in found


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (
            {"weight_map": {"a": "../elsewhere.safetensors"}},
            "files of this folder, found ['../elsewhere.safetensors']",
        ),
        ({"weight_map": {"a": "/etc/passwd"}}, "found ['/etc/passwd']"),
        ({"weight_map": {"a": "sub/x.safetensors"}}, "found ['sub/x.safetensors']"),
        ({"weight_map": {"a": ".."}}, "found ['..']"),
        ({"weight_map": {"a": ""}}, "found ['']"),
        (
            {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}},
            "not there: one.safetensors, two.safetensors",
        ),
        ({"weight_map": {"a": 1}}, "expected a weight_map from tensors to files"),
        ({"weight_map": {}}, "expected a weight_map"),
        ({}, "expected a weight_map"),
        ([], "expected a JSON object, found list"),
    ],
)
def test_an_index_that_leads_nowhere_is_refused(copy, index, message):
    folder = copy("t5-v1.0")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert message in refusal(minia3.load_model, folder)


def test_a_config_that_is_refused_is_named_with_its_folder(copy):
    folder = copy("llama-mha", attention_bias=True)
    message = f"{folder}: config.json asks for what minia3 does not do: attention_bias=True"
    assert refusal(minia3.load_model, folder) == message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model_type": "t5", "d_mod', "JSONDecodeError: Unterminated string"),
        ("not json", "JSONDecodeError: Expecting value"),
        ("[1]", "expected a JSON object, found list"),
        ('{"model_type": "t5"}', "d_model is None, expected a whole number from 1 to"),
        ("[" * 100_000, "RecursionError: maximum recursion depth"),
        (
            '{"model_type": "llama", "num_hidden_layers": 1000000000}',
            "num_hidden_layers is 1000000000, expected",
        ),
        (b"\x80", "UnicodeDecodeError: 'utf-8' codec can't decode"),
    ],
)
def test_a_config_that_is_none_is_refused(copy, content, message):
    folder = copy("t5-v1.0")
    (folder / "config.json").write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )
    assert message in refusal(minia3.load_model, folder)


def test_a_folder_that_holds_no_checkpoint_is_refused(copy, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert refusal(minia3.load_model, empty) == f"{empty / 'config.json'}: not found"
    folder = copy("t5-v1.0")
    (folder / "model.safetensors").unlink()
    message = refusal(minia3.load_model, folder)
    assert (
        "expected one of model.safetensors, model.safetensors.index.json, pytorch_model.bin"
        in message
    )
    assert "the folder holds ['config.json', 'generation_config.json']" in message


@pytest.mark.parametrize(
    "value",
    [
        *([torch.ones(2)], {"state_dict": {"a": torch.ones(2)}}, {1: torch.ones(2)}, torch.ones(2)),
        *(
            {"a": torch.eye(2).to_sparse()},
            {"a": torch.ones(2, device="meta")},
            {"a": torch.ones(1).expand(10**12)},
        ),
    ],
)
def test_a_bin_that_is_no_dict_of_tensors_is_refused(copy, value):
    folder = copy("t5-v1.0")
    (folder / "model.safetensors").unlink()
    torch.save(value, folder / "pytorch_model.bin")
    assert "expected a dict from names to tensors" in refusal(minia3.load_model, folder)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    "form",
    [
        "bin",
        "old bin",
    ],
)
def test_a_hostile_pickle_is_refused_and_does_not_run(copy, tmp_path, form):
    folder, marker = copy("t5-v1.0"), tmp_path / "it ran"
    content = {"shared.weight": Hostile(str(marker))}
    if form == "pickle":
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(content, protocol=2))
    else:
        write(folder, content, form)
    message = refusal(minia3.load_model, folder)
    assert not marker.exists()
    assert message.startswith(f"{folder / 'pytorch_model.bin'}: damaged, or more than tensors")
    assert "weights_only" not in message, "no advice to run it"


# Names


def test_a_name_that_leads_nowhere_is_refused_with_the_nearest_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "or known name; did you mean t5-base?" in refusal(minia3.load_model, "t5-bse")
    assert "did you mean llama-3.2-1b?" in refusal(minia3.load_model, "llama3.2-1b")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "weights.pt").write_text("")
    expected = "no such folder, .gguf file, hub id (org/name) or known name. Known names: tiny-t5, t5-small"
    for name in (
        "xyzzy",
        "./not/there",
        tmp_path / "model.gguf",
        tmp_path / "sub" / "weights.pt",
        "sub/weights.pt",
    ):
        assert refusal(minia3.load_model, name).startswith(f"{name}: {expected}")


def test_a_folder_with_a_checkpoint_goes_before_a_known_name(copy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "minia3.checkpoints.hub.fetch", lambda repo, config, beside, weights: (repo, bool(weights))
    )
    assert find("t5-base") == ("google-t5/t5-base", True)
    assert find("Flan-T5-Base", weights=False) == ("google/flan-t5-base", False)
    assert find("someone/model") == ("someone/model", True)
    (tmp_path / "t5-base").mkdir()
    assert find("t5-base") == ("google-t5/t5-base", True), (
        "an empty folder of that name is not meant"
    )
    copy("t5-v1.0").rename(tmp_path / "flan-t5-base")
    assert find("flan-t5-base") == Path("flan-t5-base")
    model = minia3.load_model("flan-t5-base")
    assert not model.config.gated
    assert model.name_or_path == "flan-t5-base"
    assert known_model("flan-t5-base") is known_model("params.json") is None, (
        "it is another model, whatever its name"
    )
    assert dict(info("flan-t5-base"))["d_model"] == "24"
    minia3.save_model(model, "saved")
    assert "_name_or_path" not in json.loads((tmp_path / "saved" / "config.json").read_text())


# Saving


@pytest.mark.parametrize("name", PEERS)
def test_transformers_loads_what_is_saved_with_nothing_missing_or_left_over(
    peer, loaded, tmp_path, name
):
    import transformers

    minia3.save_model(
        loaded(name, seed=0), tmp_path / "deep" / "folder"
    )  # the vectors are not part of it
    kind = (
        transformers.AutoModelForCausalLM
        if name in LLAMA_PEERS
        else transformers.AutoModelForSeq2SeqLM
    )
    model, info = kind.from_pretrained(tmp_path / "deep" / "folder", output_loading_info=True)
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
    assert dtypes(again) == {torch.bfloat16}
    assert same_bits(again, model)
    assert again.config == model.config


def test_transformers_reads_the_dtype_that_was_saved(loaded, tmp_path):
    import transformers

    minia3.save_model(loaded("t5-v1.0", dtype=torch.bfloat16), tmp_path)
    assert (
        transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype="auto").dtype
        == torch.bfloat16
    )


@pytest.mark.parametrize("name", ["t5-v1.1", "llama-mha"])
def test_large_models_are_saved_in_shards_and_old_files_do_not_hide_new_ones(
    loaded, tmp_path, monkeypatch, name
):
    import transformers

    first, second, third = (
        loaded(name),
        randomize_weights(loaded(name), 1),
        randomize_weights(loaded(name), 2),
    )
    minia3.save_model(first, tmp_path)
    monkeypatch.setattr("minia3.checkpoints.save.SHARD_BYTES", 15_000)
    minia3.save_model(second, tmp_path)
    shards = sorted(tmp_path.glob("*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(shards) > 2
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert all(sum(x.nbytes for x in load_file(shard).values()) <= 15_000 for shard in shards)
    assert index["metadata"]["total_size"] == sum(
        x.nbytes for shard in shards for x in load_file(shard).values()
    )
    assert same_bits(minia3.load_model(tmp_path), second)
    kind = (
        transformers.AutoModelForCausalLM
        if name in LLAMA_PEERS
        else transformers.AutoModelForSeq2SeqLM
    )
    model, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    theirs = Peer(name, None, model.eval()).logits(SOURCE, None, TARGET)
    assert off(logits(second, SOURCE, None, TARGET), theirs) < 1e-5
    monkeypatch.undo()
    minia3.save_model(third, tmp_path)
    assert same_bits(minia3.load_model(tmp_path), third)


def randomize_weights(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(".scale"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def test_weights_may_be_saved_over_the_files_that_they_are_mapped_from(copy):
    folder = copy("llama-gqa")
    model = randomize(minia3.load_model(folder))
    before, base = logits(model, SOURCE, None, TARGET), model.state_dict()
    base = {name: value.clone() for name, value in base.items()}
    merged = minia3.merge(model)
    minia3.save_model(merged, folder)
    assert torch.equal(logits(model, SOURCE, None, TARGET), before)
    assert all(torch.equal(value, base[name]) for name, value in model.state_dict().items())
    assert same_bits(minia3.load_model(folder), merged)


def test_the_files_in_a_folder_are_not_changed_by_training_what_was_loaded_from_it(copy):
    folder = copy("t5-v1.0")
    before = (folder / "model.safetensors").read_bytes()
    model = randomize_weights(minia3.load_model(folder), 0)
    assert (folder / "model.safetensors").read_bytes() == before
    assert not same_bits(model, minia3.load_model(folder))


def test_saving_leaves_only_whole_files_that_others_may_read(loaded, tmp_path):
    class Tokenizer:
        def save(self, folder):
            (folder / "tokenizer.json").write_text("{}")

    minia3.save_model(loaded("t5-v1.0"), tmp_path, Tokenizer())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")
    ]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == 0o666 & ~mask


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    file = tmp_path / "x.json"
    write_json(file, {"a": 1})
    with pytest.raises(RuntimeError), replacing(file) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(file) == {"a": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_json_that_is_written_halfway_leaves_the_old_file(tmp_path, monkeypatch):
    def write_half(path, text, **_):
        path.write_bytes(text[: len(text) // 2].encode())
        raise OSError

    file = tmp_path / "x.json"
    write_json(file, {"a": 1})
    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(OSError):  # noqa: PT011
        write_json(file, {"a": 2})
    assert read_json(file) == {"a": 1}


def test_what_replaces_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, name=name, original=original: calls.append(name) or original(*a)
        )
    write_json(tmp_path / "x.json", {"a": 1})
    assert calls == ["fsync", "replace"]


# Memory

MEMORY = """
    import gc, json, sys, threading, time
    import torch
    import minia3.checkpoints.load, safetensors.torch, zipfile

    def anonymous():
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

    def measure(folder, dtype):
        gc.collect()
        before, peak, done = anonymous(), 0, threading.Event()

        def sample():
            nonlocal peak
            while not done.is_set():
                peak = max(peak, anonymous())
                time.sleep(0.0005)

        thread = threading.Thread(target=sample)
        thread.start()
        model = minia3.load_model(folder, dtype=dtype)
        after = anonymous()
        done.set()
        thread.join()
        sizes = [p.numel() * p.element_size() for p in model.parameters()]
        return {"peak": max(peak, after) - before, "model": sum(sizes), "largest": max(sizes)}

    folder = sys.argv[1]
    measure(folder + "/tiny", None)  # what a first load imports
    cases = json.loads(sys.argv[2])
    print(json.dumps([measure(f"{folder}/{name}", dtype and getattr(torch, dtype)) for name, dtype in cases]))
"""
ALLOWANCE = 8 * 2**20  # the sampling thread's stack, the model's modules, the allocator's slack


@pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="anonymous memory is read from Linux's /proc"
)
def test_loading_takes_no_more_memory_than_the_model_and_its_largest_tensor(tmp_path, peer):
    config = replace(
        KNOWN_MODELS["smollm2-135m"].config, n_layers=6, vocab_size=20_000, own_head=True
    )
    model = build_model(config)
    shapes = {theirs: ours for theirs, ours in name_table(model).items() if ours}
    for dtype, form in (
        (torch.float32, "safetensors"),
        (torch.bfloat16, "safetensors"),
        (torch.float32, "bin"),
    ):
        folder = tmp_path / f"{dtype} {form}"
        folder.mkdir()
        write_json(folder / "config.json", to_hf(config, dtype))
        tensors = {
            theirs: torch.ones(model.get_parameter(ours).shape, dtype=dtype)
            for theirs, ours in shapes.items()
        }
        tensors["lm_head.weight"] *= 2
        write(folder, tensors, form)
        del tensors
    (tmp_path / "tiny").symlink_to(peer("llama-mha").folder)
    cases = [
        ("torch.float32 safetensors", "bfloat16"),
        ("torch.float32 bin", "bfloat16"),
        ("torch.bfloat16 safetensors", "float32"),
        ("torch.float32 safetensors", None),
        ("torch.bfloat16 safetensors", None),
        ("torch.float32 bin", None),
    ]
    child = [sys.executable, "-c", textwrap.dedent(MEMORY), str(tmp_path), json.dumps(cases)]
    output = subprocess.run(
        child, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    for (name, dtype), found in zip(cases, json.loads(output.stdout), strict=True):
        print(name, dtype, {key: f"{value / 2**20:.1f} MiB" for key, value in found.items()})
        assert found["peak"] <= found["model"] + found["largest"] + ALLOWANCE, (name, dtype)
        if dtype is None:
            assert found["peak"] <= ALLOWANCE, "what stays as it is stored is mapped from the file"
