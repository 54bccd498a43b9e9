"""Guards the border of config.json: an absent key has the value that transformers assumes, an
unsupported feature is refused by its name, and a config that is written is read back as the same.
"""

import dataclasses
import warnings

import pytest
import torch

from minia3.checkpoints import config_t5
from minia3.checkpoints.config import from_hf, to_hf
from minia3.checkpoints.config_checks import HARMLESS
from minia3.checkpoints.known_models import KNOWN_MODELS
from minia3.model.llama import LlamaConfig, rotation_frequencies
from minia3.model.t5 import T5Config

T5 = {
    "model_type": "t5",
    "d_model": 8,
    "d_kv": 4,
    "d_ff": 16,
    "num_layers": 2,
    "num_heads": 2,
    "vocab_size": 10,
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 10,
}
# What transformers 2 to 4 wrote, and published files hold
OLDER_KEYS = """
    add_cross_attention bad_words_ids begin_suppress_tokens cross_attention_hidden_size
    diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    gradient_checkpointing length_penalty max_length min_length n_positions no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences output_past output_scores prefix pruned_heads
    remove_invalid_values repetition_penalty return_dict_in_generate scalable_attention
    sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript typical_p use_bfloat16
"""
SCALING = (8.0, 1.0, 4.0, 8192)
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("form", "act"),
    [("relu", "relu"), ("gated-gelu", "gelu_new"), ("gated-silu", "silu"), ("silu", "silu")],
)
def test_the_activation_of_t5_must_follow_from_feed_forward_proj(form, act):
    raw = T5 | {"feed_forward_proj": form}
    is_gated = form.startswith("gated")
    assert from_hf(raw | {"dense_act_fn": act, "is_gated_act": is_gated}) == from_hf(raw)
    # transformers would use another activation, whatever feed_forward_proj says.
    for other in {"relu", "gelu", "gelu_new", "silu"} - {act}:
        with pytest.raises(ValueError, match=f"does not support: dense_act_fn='{other}'"):
            from_hf(raw | {"dense_act_fn": other})
    with pytest.raises(ValueError, match=f"does not support: is_gated_act={not is_gated}"):
        from_hf(raw | {"is_gated_act": not is_gated})


def test_the_low_frequency_factor_of_llama_3_must_not_be_above_the_high_one():
    rope = {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 5.0}
    with pytest.raises(ValueError, match="low_freq_factor must not be above high_freq_factor"):
        from_hf(LLAMA | {"rope_scaling": rope})
    equal = from_hf(LLAMA | {"rope_scaling": rope | {"high_freq_factor": 5.0}})
    assert equal.rope_scaling == (8.0, 5.0, 5.0, 8192)


def test_a_t5_config_without_a_key_means_what_transformers_assumes():
    assert from_hf(T5 | {"pad_token_id": 3}).start_id == 3
    assert from_hf(T5) == T5Config(8, 4, 16, 2, 2, 2, 10, own_head=False, scale_logits=True)
    assert from_hf(T5 | {"num_decoder_layers": None, "eos_token_id": [1, 5]}) == T5Config(
        8, 4, 16, 2, 2, 2, 10, eos_ids=(1, 5)
    )
    v1_1 = from_hf(T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False})
    assert (v1_1.activation, v1_1.gated) == ("gelu", True)
    assert (v1_1.own_head, v1_1.scale_logits) == (True, False)
    assert from_hf(T5 | {"model_type": "mt5"}) == v1_1


@pytest.mark.parametrize(
    ("keys", "own_head", "scale"),
    [
        ({"tie_word_embeddings": True}, False, True),
        ({"tie_word_embeddings": False}, True, False),
        # v1.1, saved by transformers 5
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, False, False),
        ({"tie_word_embeddings": False, "scale_decoder_outputs": True}, True, True),
        # mT5, saved by transformers 5
        ({"model_type": "mt5", "tie_word_embeddings": True}, False, False),
    ],
)
def test_scale_decoder_outputs_or_else_tie_word_embeddings_decides_whether_t5_scales(
    keys, own_head, scale
):
    config = from_hf(T5 | keys)
    assert (config.own_head, config.scale_logits) == (own_head, scale)


def test_a_t5_config_may_call_its_sizes_by_the_names_of_other_models():
    renamed = dict(T5)
    for other, key in config_t5.OTHER_NAMES.items():
        renamed[other] = renamed.pop(key)
    assert from_hf(renamed) == from_hf(T5 | renamed) == from_hf(T5)


def test_scale_decoder_outputs_that_is_null_means_no_scaling_as_in_transformers():
    assert from_hf(T5 | {"scale_decoder_outputs": None}).scale_logits is False


def test_a_key_that_nobody_knows_is_a_warning_that_names_it():
    message = "t5/config.json has keys that minia3 does not know: alibi, n_experts: if they change"
    with pytest.warns(UserWarning, match=message):
        from_hf(T5 | {"alibi": True, "n_experts": 8, "n_positions": 512}, "t5/config.json")


@pytest.mark.parametrize("name", ["T5Config", "MT5Config", "UMT5Config"])
def test_every_key_that_transformers_writes_for_a_t5_is_decided(name):
    import transformers

    raw = getattr(transformers, name)().to_dict()
    older = dict.fromkeys(OLDER_KEYS.split())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_hf(older | raw)


def test_every_key_that_is_passed_over_has_a_reason():
    for table in (HARMLESS, config_t5.HARMLESS):
        assert all(len(reason.split()) > 1 for reason in table.values())


def test_a_llama_config_without_a_key_means_what_transformers_assumes():
    assert from_hf(LLAMA) == LlamaConfig(8, 4, 16, 2, 2, 2, 10)
    nulls = dict.fromkeys(
        ("head_dim", "num_key_value_heads", "rope_scaling", "sliding_window", "pad_token_id")
    )
    assert from_hf(LLAMA | nulls) == from_hf(LLAMA)
    assert from_hf(LLAMA | {"head_dim": 6}).d_head == 6
    assert from_hf(LLAMA | {"eos_token_id": None}).eos_ids == ()
    mistral = {"model_type": "mistral", "sliding_window": None}
    mistral = from_hf(LLAMA | mistral | {"num_attention_heads": 16, "head_dim": 2})
    assert (mistral.n_kv_heads, mistral.max_length) == (8, 131072)


@pytest.mark.parametrize(
    ("keys", "theta", "scaling"),
    [
        ({}, 10000.0, None),
        ({"rope_theta": 500000}, 500000.0, None),
        ({"rope_theta": 5.0, "rope_scaling": None}, 5.0, None),
        ({"rope_theta": 5.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}, 5.0, SCALING),
        ({"rope_theta": 5.0, "rope_scaling": {"type": "llama3", **LLAMA3}}, 5.0, SCALING),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 7.0, **LLAMA3}},
            7.0,
            SCALING,
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, 7.0, None),
        (  # rope_scaling wins, as in transformers
            {
                "rope_theta": 5.0,
                "rope_scaling": {"rope_type": "llama3", **LLAMA3},
                "rope_parameters": {"rope_type": "default", "rope_theta": 7.0},
            },
            5.0,
            SCALING,
        ),
        (
            {
                "rope_theta": 5.0,
                "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0},
            },
            5.0,
            None,
        ),
    ],
)
def test_rope_is_read_in_every_form(keys, theta, scaling):
    config = from_hf(LLAMA | keys)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, "model_type is None, but minia3 runs only t5, mt5, umt5, llama, mistral"),
        (T5 | {"model_type": "longt5"}, "model_type is 'longt5'"),
        (LLAMA | {"model_type": "mixtral"}, "model_type is 'mixtral'"),
        (LLAMA | {"model_type": ["llama"]}, r"model_type is \['llama'\]"),
        (
            T5 | {"feed_forward_proj": "gated-tanh"},
            "does not support: feed_forward_proj='gated-tanh'",
        ),
        (
            T5 | {"quantization_config": {"load_in_8bit": True}},
            "quantization_config={'load_in_8bit': True}",
        ),
        (LLAMA | {"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}"),
        (LLAMA | {"sliding_window": 4096}, "sliding_window=4096"),
        (
            LLAMA | {"attention_bias": True, "mlp_bias": True},
            "attention_bias=True, mlp_bias=True",
        ),  # both at once
        (LLAMA | {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (LLAMA | {"num_local_experts": 8}, "num_local_experts=8"),
        (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        (LLAMA | {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type='yarn'"),
        (LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_type='linear'"),
        (LLAMA | {"rope_parameters": {"rope_type": "dynamic"}}, "rope_type='dynamic'"),
        (LLAMA | {"rope_scaling": "llama3"}, "factor is None, expected a number from 1.0 to"),
        (
            LLAMA | {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5",
        ),
        (
            LLAMA | {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}},
            "full_attention={'rope_theta': 5.0}",
        ),
        (
            LLAMA
            | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": "1"}},
            "low_freq_factor is '1'.*; high_freq_factor is None.*; "
            "original_max_position_embeddings is None",
        ),
        (LLAMA | {"rope_theta": "10000"}, "rope_theta is '10000', expected a number from 1.0 to"),
        (
            LLAMA | {"rms_norm_eps": "1e-5"},
            "rms_norm_eps is '1e-5', expected a number from 0.0 to 1.0",
        ),
        (T5 | {"dropout_rate": True}, "dropout_rate is True, expected a number from 0.0 to 1.0"),
        (
            {"model_type": "t5", "d_model": 8},
            "d_kv is None, .*; d_ff is None, .*; "
            "num_layers is None, expected a whole number from 1 to 1024; ",
        ),
        (
            {"model_type": "llama", "hidden_size": 8},
            "head_dim is None, .*; intermediate_size is None, .*; num_hidden_layers is None",
        ),
        (
            T5 | {"d_model": 0, "d_ff": 1.5, "num_heads": True},
            "d_model is 0, expected a whole number from 1 to 1048576; "
            "d_ff is 1.5, .*; num_heads is True, ",
        ),
        (
            LLAMA | {"num_attention_heads": 3, "num_key_value_heads": 2},
            "2 key/value heads must divide 3 heads",
        ),
        (LLAMA | {"head_dim": 5}, "head_dim 5 must be even"),
        (
            LLAMA | {"rms_norm_eps": float("nan")},
            "rms_norm_eps is nan, expected a number from 0.0 to 1.0",
        ),
        (
            LLAMA | {"rope_theta": float("inf"), "num_hidden_layers": 10**400},
            "num_hidden_layers is 1000.*rope_theta is inf",
        ),
        (LLAMA | {"eos_token_id": [2, "3"]}, r"eos_token_id is \[2, '3'\], expected whole numbers"),
        (T5 | {"eos_token_id": "</s>"}, "eos_token_id is .*, expected whole numbers"),
        (T5 | {"decoder_start_token_id": 10}, "decoder_start_token_id < vocab_size"),
        (
            T5 | {"relative_attention_num_buckets": 2},
            "relative_attention_num_buckets is 2, expected a whole number from 4",
        ),
        (T5 | {"relative_attention_max_distance": 16}, "max_distance > num_buckets / 2"),
        (
            T5 | {"pad_token_id": "<pad>"},
            "pad_token_id is '<pad>'.*decoder_start_token_id is '<pad>'",
        ),
        (
            LLAMA | {"rope_parameters": {"rope_type": "default", "hidden_size": 4}},
            "does not support: hidden_size=4",
        ),
        # What a comparison of random configs with transformers found: these change logits.
        (T5 | {"is_encoder_decoder": False}, "does not support: is_encoder_decoder=False"),
        (T5 | {"tie_encoder_decoder": True}, "does not support: tie_encoder_decoder=True"),
        (T5 | {"pruned_heads": {"0": [1]}}, "does not support: pruned_heads={'0': "),
        (T5 | {"num_hidden_layers": 1}, "num_hidden_layers=1 beside num_layers=2"),
        (
            T5 | {"model_type": "mt5", "scale_decoder_outputs": True},
            "scale_decoder_outputs=True in an mT5",
        ),
        (T5 | {"feed_forward_proj": ["relu"]}, r"feed_forward_proj=\['relu'\]"),
        (T5 | {"suppress_tokens": [3]}, r"does not support: suppress_tokens=\[3\]"),
        (LLAMA | {"num_attention_heads": 0}, "num_attention_heads is 0, "),
        (LLAMA | {"bos_token_id": [1]}, r"bos_token_id is \[1\], expected a whole number"),
        (LLAMA | {"pad_token_id": True}, "pad_token_id is True, expected a whole number"),
    ],
)
def test_unsupported_and_missing_settings_are_refused_by_name(raw, message):
    with pytest.raises(ValueError, match=message) as error:
        from_hf(raw)
    assert "\n" not in str(error.value)


SMALL_T5 = T5Config(
    d_model=8, d_head=4, d_ff=16, n_layers=2, n_decoder_layers=1, n_heads=2, vocab_size=10
)
SMALL_LLAMA = LlamaConfig(
    d_model=8, d_head=4, d_ff=16, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=10
)
T5_FORMS = {
    f"t5-{form}": dataclasses.replace(SMALL_T5, activation=activation, gated=gated)
    for form, (activation, gated, _) in config_t5.FEED_FORWARDS.items()
}
CONFIGS = {
    **T5_FORMS,
    "umt5": dataclasses.replace(
        T5_FORMS["t5-gated-gelu"], own_positions=True, scale_logits=False, own_head=True
    ),
    "umt5-tied": dataclasses.replace(T5_FORMS["t5-gated-gelu"], own_positions=True),
    **{name: row.config for name, row in KNOWN_MODELS.items()},
    "t5-unscaled": dataclasses.replace(SMALL_T5, activation="gelu", gated=True, scale_logits=False),
    "t5-scaled-own": dataclasses.replace(
        SMALL_T5,
        n_decoder_layers=3,
        own_head=True,
        eps=1e-3,
        start_id=4,
        pad_id=3,
        dropout=0.0,
        n_buckets=8,
    ),
    "llama-no-end": dataclasses.replace(
        SMALL_LLAMA, eos_ids=(), bos_id=None, eps=1e-3, dropout=0.5
    ),
    "llama-ends": dataclasses.replace(
        SMALL_LLAMA, d_head=6, eos_ids=(4, 5), pad_id=3, rope_theta=7.0, max_length=9
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_written_config_is_read_back_as_the_same(name):
    assert from_hf(to_hf(CONFIGS[name], torch.bfloat16)) == CONFIGS[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_reads_a_written_config_as_the_same_model(name):
    import transformers

    ours = CONFIGS[name]
    raw = to_hf(ours, torch.bfloat16)
    kind = transformers.AutoConfig.for_model(raw["model_type"]).__class__
    again = kind.from_dict(dict(raw)).to_dict() | {"model_type": raw["model_type"]}
    if isinstance(ours, T5Config):
        # transformers 5 makes this True, but keeps the head of the file.
        again["tie_word_embeddings"] = not ours.own_head
    else:
        assert kind.from_dict(dict(raw)).dtype == torch.bfloat16
    assert from_hf(again) == ours


def test_a_model_without_an_end_token_is_written_with_null():
    assert to_hf(CONFIGS["llama-no-end"], torch.float32)["eos_token_id"] is None


def test_the_factors_of_a_gguf_file_are_written_as_the_scaling_that_they_come_from():
    for scaling in ((8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192)):
        config = LlamaConfig(256, 128, 8, 1, 2, 2, 10, rope_theta=500000.0, rope_scaling=scaling)
        plain = rotation_frequencies(dataclasses.replace(config, rope_scaling=None))
        factors = tuple((plain / rotation_frequencies(config)).tolist())
        from_gguf = dataclasses.replace(config, rope_scaling=None, rope_factors=factors)
        assert from_hf(to_hf(from_gguf, torch.float32)) == config
        doubled = tuple(2 * factor for factor in factors)
        other = dataclasses.replace(from_gguf, rope_factors=doubled)
        with pytest.raises(ValueError, match=r"config\.json cannot express them"):
            to_hf(other, torch.float32)
