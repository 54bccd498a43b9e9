"""Guards the table of known models: the parameter counts equal the counts in the papers, and each
row equals the config on the hub.

The configs below are copied from the hub, without the keys that say nothing about the model.
"""

import functools
import json
import warnings

import pytest

from minia3.checkpoints.config import from_hf
from minia3.checkpoints.known_models import (
    EMBEDDED,
    KNOWN_MODELS,
    OTHER_NAMES,
    base_of,
    hub_name,
    known_base,
    known_model,
)
from minia3.checkpoints.load import build_model, read_checkpoint
from minia3.model.ia3 import vectors

# Parameters of one adapter, as the papers count them
VECTORS = {
    "t5-small": 43_008,
    "t5-base": 129_024,
    "t5-large": 344_064,
    "t5-v1.1-base": 104_448,
    "flan-t5-base": 104_448,
    "mt5-base": 104_448,
    "umt5-base": 104_448,
    "t0-3b": 540_672,
    "t0-11b": 1_081_344,
    "llama-2-7b": 614_400,
    "llama-3-8b": 524_288,
    "llama-3.2-1b": 147_456,
    "tinyllama-1.1b": 135_168,
}
# Parameters of the base model, as published
TOTALS = {
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "flan-t5-base": 247_577_856,
    "t5-v1.1-large": 783_150_080,
    "byt5-small": 299_637_760,
    "byt5-base": 581_653_248,
    "mt5-small": 300_176_768,
    "mt5-base": 582_401_280,
    "mt5-large": 1_229_581_312,
    "mt5-xl": 3_742_619_648,
    "mt5-xxl": 12_921_057_280,
    "umt5-small": 306_601_984,
    "codet5-base": 222_882_048,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-30b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.3-70b-instruct": 70_553_706_496,
    "tinyllama-1.1b": 1_100_048_384,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2-7b": 7_615_616_512,
    "qwen2-72b": 72_706_203_648,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b-instruct": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
}

# Billions of parameters, as the papers round them
ROUNDED = {
    "byt5-small": 0.300,
    "byt5-base": 0.582,
    "byt5-large": 1.23,
    "byt5-xl": 3.74,
    "byt5-xxl": 12.9,
    "mt5-small": 0.300,
    "mt5-base": 0.58,
    "mt5-large": 1.23,
    "mt5-xl": 3.74,
    "mt5-xxl": 12.9,
    "mt0-xxl": 12.9,
    "codet5-small": 0.060,
    "codet5-base": 0.22,
    "codet5-large": 0.74,
    "t0-3b": 2.85,
    "t0pp-11b": 11.1,
    "t5-xl-lm-adapt": 2.85,
}

T5 = {
    "architectures": ["T5ForConditionalGeneration"],
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "n_positions": 512,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_num_buckets": 32,
    "vocab_size": 32128,
}
V1_1 = {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "use_cache": True}
MT5 = {**V1_1, "architectures": ["MT5ForConditionalGeneration"], "model_type": "mt5"}
MT5 |= {"tokenizer_class": "T5Tokenizer", "vocab_size": 250112}
MT0 = {**MT5, "_name_or_path": "mt0"}
UMT5 = {
    **V1_1,
    "architectures": ["UMT5ForConditionalGeneration"],
    "model_type": "umt5",
    "dense_act_fn": "gelu_new",
    "is_gated_act": True,
    "relative_attention_max_distance": 128,
    "scalable_attention": True,
    "vocab_size": 256384,
}
BYT5 = {**V1_1, "gradient_checkpointing": False, "tokenizer_class": "ByT5Tokenizer"}
BYT5 |= {"vocab_size": 384}
CODET5 = {
    **T5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "feed_forward_proj": "relu",
    "gradient_checkpointing": False,
    "id2label": {"0": "LABEL_0"},
    "label2id": {"LABEL_0": 0},
    "task_specific_params": {"summarization": {"max_length": 200}},
    "vocab_size": 32100,
}
FLAN_UL2 = {
    **V1_1,
    "d_kv": 256,
    "dense_act_fn": "silu",
    "dropout_rate": 0.0,
    "feed_forward_proj": "gated-silu",
    "is_gated_act": True,
    "relative_attention_max_distance": 128,
    "torch_dtype": "bfloat16",
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "model_type": "llama",
    "tie_word_embeddings": False,
    "use_cache": True,
    "rms_norm_eps": 1e-05,
    "pretraining_tp": 1,
    "rope_scaling": None,
    "vocab_size": 32000,
}
LLAMA1 = {**LLAMA, "max_position_embeddings": 2048, "rms_norm_eps": 1e-06}
LLAMA2 = {**LLAMA, "max_position_embeddings": 4096, "torch_dtype": "float16"}
TINYLLAMA = {**LLAMA, "max_position_embeddings": 2048, "torch_dtype": "float32"}
LLAMA3 = {
    **LLAMA,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
}
ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA31 = {
    **LLAMA3,
    "mlp_bias": False,
    "max_position_embeddings": 131072,
    "rope_scaling": {"factor": 8.0, **ROPE},
}
LLAMA32 = {**LLAMA31, "tie_word_embeddings": True, "rope_scaling": {"factor": 32.0, **ROPE}}
SMOLLM2 = {
    **LLAMA,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "rope_interleaved": False,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 49152,
}
SMOLLM2_INSTRUCT = {**SMOLLM2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
MISTRAL1 = {
    **LLAMA,
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "max_position_embeddings": 32768,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "bfloat16",
}
MISTRAL2 = {**MISTRAL1, "rope_theta": 1e6, "sliding_window": None, "attention_dropout": 0.0}
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN2_TIED = {**QWEN2, "tie_word_embeddings": True, "vocab_size": 151936}
QWEN2_TUNED = {
    "eos_token_id": 151645,
    "max_position_embeddings": 32768,
    "max_window_layers": 70,
    "rms_norm_eps": 1e-06,
}
QWEN2_LARGE = {**QWEN2, "rms_norm_eps": 1e-05, "max_window_layers": 80}
QWEN3 = {
    **QWEN2_TIED,
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "eos_token_id": 151645,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "rope_scaling": None,
    "sliding_window": None,
    "vocab_size": 151936,
}
QWEN3_UNTIED = {**QWEN3, "tie_word_embeddings": False}
QWEN3_BASE = {"eos_token_id": 151643, "max_position_embeddings": 32768}


def t5(d_model, d_kv, d_ff, num_layers, num_heads):
    return {
        "d_model": d_model,
        "d_kv": d_kv,
        "d_ff": d_ff,
        "num_layers": num_layers,
        "num_heads": num_heads,
    }


def llama(
    hidden_size,
    intermediate_size,
    num_hidden_layers,
    num_attention_heads,
    num_key_value_heads,
    **more,
):
    return {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        **more,
    }


# fmt: off
CONFIGS = {
    "t5-small":       T5 | t5(512, 64, 2048, 6, 8),
    "t5-base":        T5 | t5(768, 64, 3072, 12, 12),
    "t5-large":       T5 | t5(1024, 64, 4096, 24, 16),
    "t5-3b":          T5 | t5(1024, 128, 16384, 24, 32),
    "t5-11b":         T5 | t5(1024, 128, 65536, 24, 128),
    "t5-v1.1-small":  V1_1 | t5(512, 64, 1024, 8, 6) | {"num_decoder_layers": 8},
    "t5-v1.1-base":   V1_1 | t5(768, 64, 2048, 12, 12) | {"num_decoder_layers": 12},
    "t5-v1.1-large":  V1_1 | t5(1024, 64, 2816, 24, 16) | {"num_decoder_layers": 24},
    "t5-v1.1-xl":     V1_1 | t5(2048, 64, 5120, 24, 32) | {"num_decoder_layers": 24},
    "t5-v1.1-xxl":    V1_1 | t5(4096, 64, 10240, 24, 64) | {"num_decoder_layers": 24},
    "flan-t5-base":   V1_1 | t5(768, 64, 2048, 12, 12) | {"num_decoder_layers": 12},
    "t0-3b":          V1_1 | t5(2048, 64, 5120, 24, 32) | {"num_decoder_layers": 24},
    "t0-11b":         V1_1 | t5(4096, 64, 10240, 24, 64) | {"num_decoder_layers": 24},
    "t0pp-11b":       V1_1 | t5(4096, 64, 10240, 24, 64) | {"num_decoder_layers": 24},
    "t5-base-lm-adapt": V1_1 | t5(768, 64, 2048, 12, 12) | {"num_decoder_layers": 12},
    "flan-ul2":       FLAN_UL2 | t5(4096, 256, 16384, 32, 16) | {"num_decoder_layers": 32},
    "byt5-small":     BYT5 | t5(1472, 64, 3584, 12, 6) | {"num_decoder_layers": 4},
    "byt5-base":      BYT5 | t5(1536, 64, 3968, 18, 12) | {"num_decoder_layers": 6},
    "byt5-large":     BYT5 | t5(1536, 64, 3840, 36, 16) | {"num_decoder_layers": 12},
    "byt5-xl":        BYT5 | t5(2560, 64, 6720, 36, 32) | {"num_decoder_layers": 12},
    "byt5-xxl":       BYT5 | t5(4672, 64, 12352, 36, 64) | {"num_decoder_layers": 12},
    "mt5-small":      MT5 | t5(512, 64, 1024, 8, 6) | {"num_decoder_layers": 8},
    "mt5-base":       MT5 | t5(768, 64, 2048, 12, 12) | {"num_decoder_layers": 12},
    "mt5-large":      MT5 | t5(1024, 64, 2816, 24, 16) | {"num_decoder_layers": 24},
    "mt5-xl":         MT5 | t5(2048, 64, 5120, 24, 32) | {"num_decoder_layers": 24},
    "mt5-xxl":        MT5 | t5(4096, 64, 10240, 24, 64) | {"num_decoder_layers": 24},
    "mt0-large":      MT0 | t5(1024, 64, 2816, 24, 16) | {"num_decoder_layers": 24},
    "umt5-small":     UMT5 | t5(512, 64, 1024, 8, 6) | {"num_decoder_layers": 8},
    "umt5-base":      UMT5 | t5(768, 64, 2048, 12, 12) | {"num_decoder_layers": 12},
    "umt5-xl":        UMT5 | t5(2048, 64, 5120, 24, 32) | {"num_decoder_layers": 24},
    "umt5-xxl":       UMT5 | t5(4096, 64, 10240, 24, 64) | {"num_decoder_layers": 24},
    "codet5-small":   CODET5 | t5(512, 64, 2048, 6, 8),
    "codet5-base":    CODET5 | t5(768, 64, 3072, 12, 12) | {"num_decoder_layers": 12},
    "codet5-large":   CODET5 | t5(1024, 64, 4096, 24, 16) | {"num_decoder_layers": 24},
    "llama-7b":       LLAMA1 | llama(4096, 11008, 32, 32, 32),
    "llama-13b":      LLAMA1 | llama(5120, 13824, 40, 40, 40),
    "llama-30b":      LLAMA1 | llama(6656, 17920, 60, 52, 52),
    "llama-65b":      LLAMA1 | llama(8192, 22016, 80, 64, 64, rms_norm_eps=1e-05),
    "llama-2-7b":     LLAMA2 | llama(4096, 11008, 32, 32, 32),
    "llama-2-13b":    LLAMA2 | llama(5120, 13824, 40, 40, 40),
    "llama-2-70b":    LLAMA2 | llama(8192, 28672, 80, 64, 8),
    "llama-3-8b":     LLAMA3 | llama(4096, 14336, 32, 32, 8, max_position_embeddings=8192),
    "llama-3-70b":    LLAMA3 | llama(8192, 28672, 80, 64, 8, max_position_embeddings=8192),
    "llama-3.1-8b":   LLAMA31 | llama(4096, 14336, 32, 32, 8),
    "llama-3.1-70b":  LLAMA31 | llama(8192, 28672, 80, 64, 8),
    "llama-3.2-1b":   LLAMA32 | llama(2048, 8192, 16, 32, 8, head_dim=64),
    "llama-3.2-3b":   LLAMA32 | llama(3072, 8192, 28, 24, 8, head_dim=128),
    "tinyllama-1.1b": TINYLLAMA | llama(2048, 5632, 22, 32, 4),
    "smollm2-135m":   SMOLLM2 | llama(576, 1536, 30, 9, 3),
    "smollm2-360m":   SMOLLM2 | llama(960, 2560, 32, 15, 5),
    "smollm2-1.7b":   SMOLLM2 | llama(2048, 8192, 24, 32, 32, rope_theta=130000),
    "llama-3-8b-instruct": LLAMA3 | llama(
        4096, 14336, 32, 32, 8, max_position_embeddings=8192, eos_token_id=128009
    ),
    "llama-3.1-405b": LLAMA31 | llama(16384, 53248, 126, 128, 8),
    "llama-3.2-1b-instruct": LLAMA32 | llama(
        2048, 8192, 16, 32, 8, head_dim=64, eos_token_id=[128001, 128008, 128009]
    ),
    "llama-3.3-70b-instruct": LLAMA31 | llama(
        8192, 28672, 80, 64, 8, head_dim=128, eos_token_id=[128001, 128008, 128009]
    ),
    "tinyllama-1.1b-chat": TINYLLAMA | llama(2048, 5632, 22, 32, 4, attention_bias=False),
    "smollm2-135m-instruct": SMOLLM2_INSTRUCT | llama(576, 1536, 30, 9, 3),
    "smollm2-1.7b-instruct": SMOLLM2_INSTRUCT | llama(2048, 8192, 24, 32, 32, rope_theta=130000),
    "mistral-7b-v0.1": MISTRAL1 | llama(4096, 14336, 32, 32, 8),
    "mistral-7b-instruct-v0.2": MISTRAL2 | llama(4096, 14336, 32, 32, 8),
    "mistral-7b-v0.3": MISTRAL2 | llama(4096, 14336, 32, 32, 8, vocab_size=32768),
    "qwen2-0.5b":     QWEN2_TIED | llama(896, 4864, 24, 14, 2, max_window_layers=24),
    "qwen2-1.5b":     QWEN2_TIED | llama(1536, 8960, 28, 12, 2),
    "qwen2-7b":       QWEN2 | llama(3584, 18944, 28, 28, 4),
    "qwen2-72b":      QWEN2_LARGE | llama(8192, 29568, 80, 64, 8),
    "qwen2-7b-instruct": QWEN2 | QWEN2_TUNED | llama(3584, 18944, 28, 28, 4),
    "qwen2.5-0.5b":   QWEN2_TIED | llama(896, 4864, 24, 14, 2, max_position_embeddings=32768),
    "qwen2.5-1.5b":   QWEN2_TIED | llama(1536, 8960, 28, 12, 2),
    "qwen2.5-3b":     QWEN2_TIED | llama(2048, 11008, 36, 16, 2, max_position_embeddings=32768),
    "qwen2.5-7b":     QWEN2 | llama(3584, 18944, 28, 28, 4),
    "qwen2.5-14b":    QWEN2_LARGE | llama(5120, 13824, 48, 40, 8, max_window_layers=48),
    "qwen2.5-32b":    QWEN2_LARGE | llama(5120, 27648, 64, 40, 8, max_window_layers=64),
    "qwen2.5-72b":    QWEN2_LARGE | llama(8192, 29568, 80, 64, 8),
    "qwen2.5-0.5b-instruct": QWEN2_TIED | QWEN2_TUNED | llama(896, 4864, 24, 14, 2),
    "qwen2.5-32b-instruct": QWEN2 | QWEN2_TUNED | llama(5120, 27648, 64, 40, 8),
    "qwen2.5-72b-instruct": QWEN2 | QWEN2_TUNED | llama(8192, 29568, 80, 64, 8),
    "qwen3-0.6b":     QWEN3 | llama(1024, 3072, 28, 16, 8),
    "qwen3-1.7b":     QWEN3 | llama(2048, 6144, 28, 16, 8),
    "qwen3-4b":       QWEN3 | llama(2560, 9728, 36, 32, 8, max_window_layers=36),
    "qwen3-8b":       QWEN3_UNTIED | llama(4096, 12288, 36, 32, 8, max_window_layers=36),
    "qwen3-14b":      QWEN3_UNTIED | llama(5120, 17408, 40, 40, 8, max_window_layers=40),
    "qwen3-32b":      QWEN3_UNTIED | llama(5120, 25600, 64, 64, 8, max_window_layers=64),
    "qwen3-0.6b-base": QWEN3 | QWEN3_BASE | llama(1024, 3072, 28, 16, 8),
}
# fmt: on


@functools.cache
def counts(config):
    """Return the number of parameters of one adapter, and of the base."""
    model = build_model(config)
    in_vectors = sum(vector[0].numel() for vector in vectors(model).values())
    assert all(parameter.is_meta for parameter in model.parameters())
    return in_vectors, sum(parameter.numel() for parameter in model.parameters()) - in_vectors


@pytest.mark.parametrize("name", CONFIGS)
def test_a_row_of_the_table_equals_the_config_on_the_hub(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no key of a published config is unknown
        assert KNOWN_MODELS[name].config == from_hf(CONFIGS[name])


def test_the_row_of_the_embedded_model_equals_its_config():
    assert KNOWN_MODELS["tiny-t5"].config == read_checkpoint(EMBEDDED, weights=False)[0]


@pytest.mark.parametrize("name", VECTORS)
def test_one_adapter_has_as_many_parameters_as_the_papers_say(name):
    assert (
        counts(KNOWN_MODELS[name].config)[0] == counts(from_hf(CONFIGS[name]))[0] == VECTORS[name]
    )


@pytest.mark.parametrize("name", TOTALS)
def test_the_base_has_as_many_parameters_as_are_published(name):
    assert counts(KNOWN_MODELS[name].config)[1] == counts(from_hf(CONFIGS[name]))[1] == TOTALS[name]


@pytest.mark.parametrize("name", ROUNDED)
def test_the_base_has_as_many_parameters_as_the_paper_rounds(name):
    n_base = counts(KNOWN_MODELS[name].config)[1]
    assert n_base / 1e9 == pytest.approx(ROUNDED[name], rel=0.015)


@pytest.mark.parametrize(
    "name",
    [name for name, row in KNOWN_MODELS.items() if row.family.startswith(("t5", "flan", "t0"))],
)
def test_a_t5_adapter_has_as_many_parameters_as_the_formula_says(name):
    c = KNOWN_MODELS[name].config
    kv = 2 * c.n_heads * c.d_head
    assert counts(c)[0] == c.n_layers * (kv + c.d_ff) + c.n_decoder_layers * (2 * kv + c.d_ff)


def test_names_and_hub_ids_lead_to_the_same_row_in_any_case():
    assert known_model("t5-base") is known_model("google-t5/T5-Base") is KNOWN_MODELS["t5-base"]
    assert (
        known_model("Llama-2-7B")
        is known_model("meta-llama/llama-2-7b-hf")
        is KNOWN_MODELS["llama-2-7b"]
    )
    assert known_model("t5-bse") is None
    assert known_model("google/t5-base") is KNOWN_MODELS["t5-base"]
    assert known_model("bigscience/t0pp") is known_model("T0pp") is KNOWN_MODELS["t0pp-11b"]
    assert known_model(EMBEDDED) is known_model("tiny-t5") is KNOWN_MODELS["tiny-t5"]
    assert len({row.repo for row in KNOWN_MODELS.values()}) == len(KNOWN_MODELS)
    assert all(name == name.lower() for name in KNOWN_MODELS)


def test_other_names_are_in_lower_case_lead_to_a_row_and_are_no_second_name_of_a_row():
    repos = {row.repo.lower() for row in KNOWN_MODELS.values()}
    for other, short in OTHER_NAMES.items():
        assert other == other.lower()
        assert short in KNOWN_MODELS
        assert other not in repos | KNOWN_MODELS.keys()


def test_the_hub_name_of_a_known_model_is_its_repository():
    assert hub_name("t5-base") == "google-t5/t5-base"
    assert hub_name("google/t5-base") == "google-t5/t5-base"
    assert hub_name("bigscience/T0_3B") == "bigscience/T0_3B"
    assert hub_name("someone/else") == "someone/else"
    assert hub_name("tiny-t5") == "tiny-t5"
    assert hub_name(str(EMBEDDED)) == str(EMBEDDED)
    assert hub_name(None) is None


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("models/t5-base", "t5-base"),
        ("google-t5/t5-base", "t5-base"),  # also the name of the model itself
        ("models/T0_3B", "t0-3b"),
        ("models/Llama-2-7b-hf", "llama-2-7b"),
        ("hub/models--google-t5--t5-base/snapshots/a9723ea", "t5-base"),
        ("hub/models--meta-llama--Llama-2-7b-hf/snapshots/01c7f73", "llama-2-7b"),
    ],
)
def test_a_copy_of_a_known_model_is_known(folder, name, tmp_path, monkeypatch):
    """Its config.json does not say what it is, so t5-base was asked in the prompts of others."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / folder
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(CONFIGS[name]))
    assert known_model(folder) is None
    for written in (folder, f"{folder}/", str(path)):
        assert known_base(written) is KNOWN_MODELS[name]
        assert base_of(written) == KNOWN_MODELS[name].repo
    # A merged model has a name in its config.json, which the folder of this path does not hide.
    merged = tmp_path / "merged"
    merged.mkdir()
    config = CONFIGS[name] | {"_name_or_path": KNOWN_MODELS[name].repo}
    (merged / "config.json").write_text(json.dumps(config))
    assert known_base(merged) is KNOWN_MODELS[name]


def test_the_name_in_the_hubs_cache_is_that_of_the_model(tmp_path):
    """Its config.json may name the model that it was trained from."""
    path = tmp_path / "models--bigscience--T0_3B" / "snapshots" / "a9723ea"
    path.mkdir(parents=True)
    config = CONFIGS["t0-3b"] | {"_name_or_path": "google/t5-v1_1-xl"}
    (path / "config.json").write_text(json.dumps(config))
    assert known_base(path) is KNOWN_MODELS["t0-3b"]


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("models/t5-base", "t5-small"),  # other sizes than those of the name
        ("models/mine", "t5-base"),
        ("hub/models--mine--t5-base/snapshots/a9723ea", "t5-base"),
    ],
)
def test_another_model_is_no_copy(folder, name, tmp_path):
    path = tmp_path / folder
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(CONFIGS[name]))
    assert known_base(path) is None
    assert base_of(path) == path


def test_building_takes_no_memory():
    model = build_model(KNOWN_MODELS["t0-11b"].config, n_adapters=2)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    # The frequencies of the rotation are not on the meta device, because no file holds them.
    assert build_model(KNOWN_MODELS["llama-2-70b"].config).frequency.device.type == "cpu"
