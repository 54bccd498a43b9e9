"""Guards minia3/checkpoints/load.py: every form of file is read to the same bits, and a file that
does not fit is refused in one line that says what was found. Nothing in a file is executed.
"""

import gc
import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from anonymous_memory import anonymous, sampling
from checkpoint_folders import (
    FORMS,
    SOURCE,
    TARGET,
    have_the_same_bits,
    randomize_weights,
    read_weights,
    refusal,
    store_as,
    weight_dtypes,
    write_weights,
)
from conftest import logits, make
from running import in_new_process

import minia3
from minia3.checkpoints.config import to_hf
from minia3.checkpoints.known_models import KNOWN_MODELS
from minia3.checkpoints.load import build_model
from minia3.checkpoints.tensor_names import name_table
from minia3.files.write import write_json

# Every form of file


@pytest.mark.parametrize("name", ["t5-v1.1", "llama-tied"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_file_is_read_to_the_same_bits(loaded, copy, name, form):
    folder = copy(name)
    write_weights(folder, read_weights(folder), form)
    model = minia3.load_model(folder)
    assert have_the_same_bits(model, loaded(name))
    expected = logits(loaded(name), SOURCE, None, TARGET)
    assert torch.equal(logits(model, SOURCE, None, TARGET), expected)


def test_shards_that_transformers_wrote_are_read(loaded, tmp_path):
    make("llama-gqa").save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert have_the_same_bits(minia3.load_model(tmp_path), loaded("llama-gqa"))


@pytest.mark.parametrize("name", ["t5-v1.0", "t5-v1.1", "llama-gqa"])
def test_a_model_can_be_pickled(loaded, name):
    model = loaded(name)
    assert have_the_same_bits(pickle.loads(pickle.dumps(model)), model)


def test_the_end_tokens_of_generation_config_win_over_those_of_config(copy):
    folder = copy("llama-mha", eos_token_id=4)
    generation = folder / "generation_config.json"
    # transformers wrote 2 into generation_config.json
    assert minia3.load_model(folder).config.eos_ids == (2,)
    generation.write_text('{"eos_token_id": [7, 8]}')
    assert minia3.load_model(folder).config.eos_ids == (7, 8)
    generation.write_text("{}")
    assert minia3.load_model(folder).config.eos_ids == (4,)


def test_rope_factors_are_not_taken_from_a_config_json(loaded, copy):
    with pytest.warns(UserWarning, match="does not know: rope_factors: if they change"):
        model = minia3.load_model(copy("llama-mha", rope_factors=["x"]))
    assert model.config == loaded("llama-mha").config


def test_training_a_loaded_model_does_not_change_its_files(copy):
    folder = copy("t5-v1.0")
    before = (folder / "model.safetensors").read_bytes()
    model = randomize_weights(minia3.load_model(folder), 0)
    assert (folder / "model.safetensors").read_bytes() == before
    assert not have_the_same_bits(model, minia3.load_model(folder))


# Dtypes


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
def test_the_stored_dtype_is_kept_by_default_except_float16_in_t5(copy, name, stored, expected):
    folder = store_as(copy(name), stored)
    model = minia3.load_model(folder)
    assert weight_dtypes(model) == {expected}
    table = name_table(model)
    for theirs, x in read_weights(folder).items():
        assert torch.equal(model.get_parameter(table[theirs]), x.to(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["t5-v1.1", "llama-gqa"])
def test_every_weight_except_the_vectors_has_the_requested_dtype(loaded, name, dtype):
    assert weight_dtypes(loaded(name, dtype=dtype)) == {dtype}


def test_weights_of_mixed_dtypes_become_the_widest_dtype(copy):
    folder = copy("t5-v1.0")
    tensors = read_weights(folder)
    narrow = {name: x.bfloat16() for name, x in tensors.items() if "Attention" in name}
    write_weights(folder, tensors | narrow)
    assert weight_dtypes(minia3.load_model(folder)) == {torch.float32}


def test_norms_of_a_wider_dtype_do_not_make_a_model_wider(copy):
    folder = store_as(copy("llama-gqa"), torch.bfloat16)
    tensors = read_weights(folder)
    norms = {name: x.float() for name, x in tensors.items() if x.ndim == 1}
    assert norms
    write_weights(folder, tensors | norms)
    assert weight_dtypes(minia3.load_model(folder)) == {torch.bfloat16}


def test_float16_is_refused_for_t5_with_the_reason_and_accepted_for_llama(loaded):
    assert "T5 overflows in float16" in refusal(loaded, "t5-v1.0", dtype=torch.float16)
    assert weight_dtypes(loaded("llama-mha", dtype=torch.float16)) == {torch.float16}


def test_the_default_dtype_of_torch_does_not_reach_the_vectors(loaded):
    torch.set_default_dtype(torch.float64)
    try:
        assert weight_dtypes(loaded("llama-mha")) == {torch.float32}
    finally:
        torch.set_default_dtype(torch.float32)


def test_options_that_make_no_sense_are_refused(peer):
    folder = peer("t5-v1.0").folder
    for n_adapters in (0, True, 2.0, "2", None):
        message = refusal(minia3.load_model, folder, n_adapters=n_adapters)
        assert f"n_adapters must be an integer of at least 1, found {n_adapters!r}" in message
    assert minia3.load_model(folder, n_adapters=np.int64(2)).n_adapters == 2
    assert "dtype must be None or one of" in refusal(minia3.load_model, folder, dtype=torch.int8)
    assert "found 'bfloat16'" in refusal(minia3.load_model, folder, dtype="bfloat16")


# Tensors and configs that do not fit


@pytest.mark.parametrize(("form", "kind"), [("safetensors", "I64"), ("bin", "torch.int64")])
def test_all_tensors_that_do_not_fit_are_named_at_once(copy, form, kind):
    folder = copy("t5-v1.1")
    tensors = read_weights(folder)
    del tensors["encoder.final_layer_norm.weight"]
    tensors["decoder.final_layer_norm.weight"] = torch.ones(25)
    tensors["decoder.block.1.layer.0.SelfAttention.kk.weight"] = torch.ones(1)
    tensors["lm_head.weight"] = torch.ones(61, 24, dtype=torch.int64)
    tensors["decoder.block.2.layer.2.layer_norm.weight"] = torch.ones(24)
    write_weights(folder, tensors, form)
    message = refusal(minia3.load_model, folder)
    assert message.startswith(f"{folder}: 5 tensors do not fit the config: ")
    assert "encoder.final_layer_norm.weight is missing" in message
    assert "decoder.final_layer_norm.weight has shape (25,), expected (24,)" in message
    nearest = "nearest known: decoder.block.1.layer.0.SelfAttention."
    assert f"SelfAttention.kk.weight is left over ({nearest}" in message
    assert "decoder.block.2.layer.2.layer_norm.weight is left over" in message
    assert f"lm_head.weight is stored as {kind}, expected a float" in message


def test_a_message_names_twenty_misfits_and_counts_the_others(copy):
    folder = copy("t5-v1.0")
    tensors = {f"tensor {i:02d}": torch.ones(1) for i in range(30)}
    write_weights(folder, read_weights(folder) | tensors)
    message = refusal(minia3.load_model, folder)
    assert "30 tensors do not fit the config" in message
    assert "tensor 19 is left over ..." in message
    assert "tensor 20" not in message


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        (
            "t5-v1.1",
            {"feed_forward_proj": "relu", "dense_act_fn": "relu", "is_gated_act": False},
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
def test_the_config_of_another_model_is_refused_with_the_tensors_that_differ(
    copy, name, changes, expected
):
    assert expected in refusal(minia3.load_model, copy(name, **changes))


def test_a_config_that_is_not_supported_is_named_with_its_folder(copy):
    folder = copy("llama-mha", attention_bias=True)
    message = f"{folder}: config.json asks for what minia3 does not support: attention_bias=True"
    assert refusal(minia3.load_model, folder) == message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"model_type": "t5", "d_mod', "JSONDecodeError: Unterminated string"),
        (b"not json", "JSONDecodeError: Expecting value"),
        (b"[1]", "expected a JSON object, found list"),
        (b'{"model_type": "t5"}', "d_model is None, expected a whole number from 1 to"),
        (b"[" * 100_000, "RecursionError: maximum recursion depth"),
        (
            b'{"model_type": "llama", "num_hidden_layers": 1000000000}',
            "num_hidden_layers is 1000000000, expected",
        ),
        (b"\x80", "UnicodeDecodeError: 'utf-8' codec can't decode"),
    ],
)
def test_a_damaged_config_is_refused(copy, content, message):
    folder = copy("t5-v1.0")
    (folder / "config.json").write_bytes(content)
    assert message in refusal(minia3.load_model, folder)


# Damaged and hostile files


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("part", [0.02, 0.5, 0.98])
def test_a_file_that_is_cut_short_is_refused(copy, form, part):
    folder = copy("llama-mha")
    write_weights(folder, read_weights(folder), form)
    file = max(folder.glob("*model*"), key=lambda path: path.stat().st_size)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * part)])
    message = refusal(minia3.load_model, folder)
    assert message.startswith(f"{file}: damaged")
    assert "weights_only" not in message


LFS = """version https://git-lfs.github.com/spec/v1
oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1
size 12345
"""
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
def test_a_message_says_what_is_in_the_place_of_a_file(copy, file, content, message):
    folder = copy("t5-v1.0")
    if file != "config.json":
        (folder / "model.safetensors").unlink()
    (folder / file).write_text(content)
    found = refusal(minia3.load_model, folder)
    assert found.startswith(str(folder / file))
    assert message in found


@pytest.mark.parametrize(
    "value",
    [
        [torch.ones(2)],
        {"state_dict": {"a": torch.ones(2)}},
        {1: torch.ones(2)},
        torch.ones(2),
        {"a": torch.eye(2).to_sparse()},
        {"a": torch.ones(2, device="meta")},
        {"a": torch.ones(1).expand(10**12)},
    ],
)
def test_a_bin_that_is_not_a_dict_of_tensors_is_refused(copy, value):
    folder = copy("t5-v1.0")
    (folder / "model.safetensors").unlink()
    torch.save(value, folder / "pytorch_model.bin")
    assert "expected a dict from names to tensors" in refusal(minia3.load_model, folder)


class Hostile:
    """An object that makes a directory when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("form", ["bin", "old bin", "plain pickle"])
def test_a_hostile_pickle_is_refused_and_does_not_run(copy, tmp_path, form):
    folder = copy("t5-v1.0")
    marker = tmp_path / "it ran"
    content = {"shared.weight": Hostile(str(marker))}
    if form == "plain pickle":
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(content, protocol=2))
    else:
        write_weights(folder, content, form)
    message = refusal(minia3.load_model, folder)
    assert not marker.exists()
    assert message.startswith(f"{folder / 'pytorch_model.bin'}: damaged, or more than tensors")
    assert "weights_only" not in message, "a message must not advise the user to run the pickle"


# Memory


def memory_of_loading(folder, cases):
    """Return the bytes of (the peak while loading, the model, its largest tensor) for each case."""
    minia3.load_model(folder / "tiny")  # imports what a first load imports
    found = []
    for name, dtype in cases:
        gc.collect()
        before = anonymous()
        with sampling() as samples:
            model = minia3.load_model(folder / name, dtype=dtype)
        sizes = [p.nbytes for p in model.parameters()]
        found.append((max(samples) - before, sum(sizes), max(sizes)))
    return found


ALLOWANCE = 8 * 2**20  # for the sampling thread's stack, the model's modules, the allocator's slack


def write_model(folder, config, dtype, form):
    """Write a checkpoint of ones."""
    model = build_model(config)
    folder.mkdir()
    write_json(folder / "config.json", to_hf(config, dtype))
    tensors = {}
    for theirs, ours in name_table(model).items():
        if ours is not None:
            tensors[theirs] = torch.ones(model.get_parameter(ours).shape, dtype=dtype)
    tensors["lm_head.weight"] *= 2  # a head that is not a copy of the embedding
    write_weights(folder, tensors, form)


@pytest.mark.parametrize("name", ["t5-base", "smollm2-135m", "qwen2.5-0.5b"])
def test_a_model_is_built_without_an_initialization(name, monkeypatch):
    """On the meta device it fills nothing, but it took a quarter of the time."""
    monkeypatch.setattr(torch.Tensor, "uniform_", None)
    monkeypatch.setattr(torch.Tensor, "normal_", None)
    model = build_model(KNOWN_MODELS[name].config)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="anonymous memory is read from Linux's /proc"
)
def test_loading_takes_no_more_memory_than_the_model_and_its_largest_tensor(tmp_path, peer):
    config = replace(
        KNOWN_MODELS["smollm2-135m"].config, n_layers=6, vocab_size=20_000, own_head=True
    )
    write_model(tmp_path / "float32", config, torch.float32, "safetensors")
    write_model(tmp_path / "bfloat16", config, torch.bfloat16, "safetensors")
    write_model(tmp_path / "float32-bin", config, torch.float32, "bin")
    (tmp_path / "tiny").symlink_to(peer("llama-mha").folder)
    cases = [
        ("float32", torch.bfloat16),
        ("float32-bin", torch.bfloat16),
        ("bfloat16", torch.float32),
        ("float32", None),
        ("bfloat16", None),
        ("float32-bin", None),
    ]
    results = in_new_process(memory_of_loading, tmp_path, cases)
    for (name, dtype), (peak, model, largest) in zip(cases, results, strict=True):
        print(name, dtype, [f"{n / 2**20:.1f} MiB" for n in (peak, model, largest)])
        assert peak <= model + largest + ALLOWANCE, (name, dtype)
        if dtype is None:
            assert peak <= ALLOWANCE, "weights that keep their dtype are mapped"


# NaN


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_found_if_one_asks(number, copy, loaded):
    folder = copy("llama-tied")
    weights = read_weights(folder)
    weights["model.layers.1.mlp.up_proj.weight"][3, :2] = number
    write_weights(folder, weights)
    assert minia3.load_model(folder) is not None
    message = refusal(minia3.load_model, folder, check_finite=True)
    assert "model.layers.1.mlp.up_proj.weight has 2 of 960 numbers that are NaN or inf" in message
    assert loaded("llama-tied", check_finite=True) is not None


def test_weights_that_do_not_fit_into_their_dtype_are_found(copy):
    folder = copy("llama-tied")
    weights = read_weights(folder)
    weights["model.norm.weight"][0] = 1e6
    write_weights(folder, weights)
    minia3.load_model(folder, check_finite=True)
    message = refusal(minia3.load_model, folder, dtype=torch.float16, check_finite=True)
    assert "model.norm.weight has 1 of 24 numbers" in message
