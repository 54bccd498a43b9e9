"""Guards the keys of config.json in the LLaMA family: each is used, harmless or refused by name.

What a key means is taken from transformers: its configs say which keys there are, and in which
layers a window limits the attention.
"""

import warnings
from dataclasses import replace

import pytest
import torch
import transformers
from checkpoint_folders import refusal

from minia3.checkpoints.config import from_hf, to_hf
from minia3.model.llama import LlamaConfig

SIZES = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 10,
}
MODEL_TYPES = ["llama", "mistral", "qwen2", "qwen3"]
PLAIN = LlamaConfig(
    d_model=8, d_head=4, d_ff=16, n_layers=3, n_heads=2, n_kv_heads=1, vocab_size=10
)

# Keys of published files that transformers 5 no longer writes: of Llama 1, 2 and 3, TinyLlama,
# SmolLM2, Mistral, Qwen2, Qwen2.5 and Qwen3
PUBLISHED = {
    "_name_or_path": "meta-llama/Llama-2-7b-hf",
    "auto_map": {"AutoConfig": "configuration_x.XConfig"},
    "is_llama_config": True,
    "max_sequence_length": 2048,
    "mlp_bias": False,
    "pretraining_tp": 2,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    "unsloth_version": "2024.9",
    "use_mrope": False,
}


def without_warnings(raw):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return from_hf(raw)


def their_config(model_type, **keys):
    return transformers.AutoConfig.for_model(model_type, **{**SIZES, **keys})


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_key_that_transformers_or_a_published_file_writes_is_known(model_type):
    raw = their_config(model_type, sliding_window=None).to_dict()
    config = without_warnings(raw | PUBLISHED)
    assert config == without_warnings(raw)
    assert (config.qkv_bias, config.qk_norm) == (model_type == "qwen2", model_type == "qwen3")


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_key_that_nobody_knows_is_a_warning_that_names_it(model_type):
    raw = {"model_type": model_type, **SIZES, "residual_multiplier": 0.22}
    with pytest.warns(UserWarning, match="does not know: residual_multiplier: if they change"):
        from_hf(raw)


@pytest.mark.parametrize(
    ("model_type", "key", "value"),
    [
        ("llama", "is_causal", False),
        ("qwen3", "is_causal", False),
        ("llama", "is_encoder_decoder", True),
        ("llama", "pruned_heads", {"0": [1]}),
        ("llama", "quantization", {"bits": 4}),
        ("llama", "rope_interleaved", True),
        ("llama", "sliding_window", 4),
        ("llama", "use_sliding_window", True),
        ("llama", "attention_bias", True),
        ("mistral", "attention_bias", True),
        ("qwen3", "attention_bias", True),
        ("qwen2", "mlp_bias", True),
        ("qwen2", "use_mrope", True),
        ("qwen2", "use_sliding_window", 1.5),
        ("mistral", "hidden_act", "gelu"),
    ],
)
def test_a_key_that_changes_the_model_is_refused_by_name(model_type, key, value):
    raw = {"model_type": model_type, **SIZES, key: value}
    assert f"does not support: {key}={value!r}" in refusal(from_hf, raw)


def test_qwen2_has_its_biases_whatever_attention_bias_says():
    """transformers does not read the key, either."""
    raw = {"model_type": "qwen2", **SIZES}
    assert from_hf(raw | {"attention_bias": False}) == from_hf(raw | {"attention_bias": True})


def test_absent_keys_of_qwen_mean_what_transformers_assumes():
    sizes = {key: SIZES[key] for key in SIZES if key not in ("head_dim", "num_key_value_heads")}
    for model_type in ("qwen2", "qwen3"):
        raw = {"model_type": model_type, **sizes, "num_attention_heads": 32, "hidden_size": 64}
        theirs = transformers.AutoConfig.for_model(**raw)
        assert from_hf(raw) == without_warnings(theirs.to_dict())
    assert from_hf(raw).d_head == 128
    assert from_hf(raw).eos_ids == ()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_an_absent_bos_is_the_one_that_transformers_assumes_and_null_is_none(model_type):
    raw = {"model_type": model_type, **SIZES}
    assert from_hf(raw).bos_id == transformers.AutoConfig.for_model(**raw).bos_token_id
    assert from_hf(raw | {"bos_token_id": None}).bos_id is None


# The window


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
@pytest.mark.parametrize("is_used", [True, False])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("n_full", [0, 2, 3, 28])
@pytest.mark.parametrize("kinds", [None, "full", "sliding", "both"])
def test_qwen_has_a_window_where_transformers_has_it(model_type, is_used, window, n_full, kinds):
    names = {"full": ["full_attention"] * 3, "sliding": ["sliding_attention"] * 3, None: None}
    names["both"] = ["full_attention", "sliding_attention", "full_attention"]
    raw = {"model_type": model_type, **SIZES, "use_sliding_window": is_used}
    raw |= {"sliding_window": window, "max_window_layers": n_full, "layer_types": names[kinds]}
    theirs = transformers.AutoConfig.for_model(**raw)
    windows = set()
    for kind in theirs.layer_types:
        windows.add(theirs.sliding_window if kind == "sliding_attention" else None)
    lacks_window = "sliding_attention" in theirs.layer_types and theirs.sliding_window is None
    if len(windows) > 1 or lacks_window:  # in the second case, transformers fails when it runs
        message = refusal(from_hf, raw)
        assert "a window in some layers (max_window_layers=" in message
        assert "layer_types=[" in message
    else:
        assert {from_hf(raw).window} == windows


def test_mistral_has_its_window_in_all_layers():
    raw = {"model_type": "mistral", **SIZES}
    assert from_hf(raw).window == 4096
    assert from_hf(raw | {"sliding_window": 7}).window == 7
    assert from_hf(raw | {"sliding_window": None}).window is None
    kinds = ["full_attention"] * 3
    assert "layer_types" in refusal(from_hf, raw | {"layer_types": kinds})
    assert from_hf(raw | {"sliding_window": None, "layer_types": kinds}).window is None


@pytest.mark.parametrize("window", [0, -1, 2.5, "4096", True, 2**40])
def test_an_impossible_window_is_refused(window):
    raw = {"model_type": "mistral", **SIZES, "sliding_window": window}
    assert f"sliding_window is {window!r}, expected a whole number" in refusal(from_hf, raw)


@pytest.mark.parametrize("n_full", [-1, 1.5, "2", None, True])
def test_an_impossible_number_of_layers_without_a_window_is_refused(n_full):
    raw = {"model_type": "qwen2", **SIZES, "use_sliding_window": True, "sliding_window": 4}
    message = refusal(from_hf, raw | {"max_window_layers": n_full})
    assert f"max_window_layers is {n_full!r}, expected a whole number from 0" in message


# The way back


@pytest.mark.parametrize(
    ("changes", "model_type"),
    [
        ({}, "llama"),
        ({"window": 5}, "mistral"),
        ({"qkv_bias": True}, "qwen2"),
        ({"qkv_bias": True, "window": 5}, "qwen2"),
        ({"qk_norm": True}, "qwen3"),
        ({"qk_norm": True, "window": 5, "own_head": False}, "qwen3"),
    ],
)
def test_the_parts_of_a_model_decide_which_model_type_is_written(changes, model_type):
    config = replace(PLAIN, **changes)
    raw = to_hf(config, torch.float16)
    assert raw["model_type"] == model_type
    assert without_warnings(raw) == config
    theirs = transformers.AutoConfig.for_model(**raw)
    assert without_warnings(theirs.to_dict()) == config
    assert raw["architectures"][0] in dir(transformers)
