"""config.json of a LLaMA, Mistral, Qwen2 or Qwen3: its keys (config.py says how they are read).

The four are one architecture. What the others add to LLaMA is a field of LlamaConfig: Mistral a
window, Qwen2 biases, Qwen3 norms of heads.

Shapes: P pairs of a head (half its width).
"""

from dataclasses import replace

import torch

from minia3.checkpoints.config_checks import (
    check_keys,
    end_ids,
    raise_if_any,
    read_numbers,
    refuse_unsupported,
    unsupported,
    without_nulls,
    wrong_ids,
    wrong_numbers,
)
from minia3.model.llama import LlamaConfig, rotation_frequencies

# fmt: off
# Keys of config.json whose values are numbers -> their names in our config
NUMBERS = {
    "hidden_size":                     "d_model",
    "head_dim":                        "d_head",
    "intermediate_size":               "d_ff",
    "num_hidden_layers":               "n_layers",
    "num_attention_heads":             "n_heads",
    "num_key_value_heads":             "n_kv_heads",
    "vocab_size":                      "vocab_size",
    "max_position_embeddings":         "max_length",
    "rope_theta":                      "rope_theta",
    "attention_dropout":               "dropout",
    "rms_norm_eps":                    "eps",
}
# The numbers of Llama 3.1's scaling, in the order of LlamaConfig.rope_scaling
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")

LIMITS = {
    "num_hidden_layers":               (1, 2**10),
    "max_position_embeddings":         (1, 2**31),
    "sliding_window":                  (1, 2**31),
    "max_window_layers":               (0, 2**31),
    "attention_dropout":               (0.0, 1.0),
    "rms_norm_eps":                    (0.0, 1.0),
    "rope_theta":                      (1.0, 1e30),
    "factor":                          (1.0, 1e9),
    "low_freq_factor":                 (0.0, 1e9),
    "high_freq_factor":                (0.0, 1e9),
}

# What transformers assumes for each model_type, if it differs from the defaults of LlamaConfig
QWEN = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "bos_token_id": None,
    "eos_token_id": None,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
DEFAULTS = {
    "llama": {},
    "mistral": {
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "num_key_value_heads": 8,
    },
    "qwen2": QWEN,
    "qwen3": QWEN | {"head_dim": 128},
}

# If a key is absent or null, it takes the value of another key.
SAME_AS = {
    "num_key_value_heads":    "num_attention_heads",
}

# The values with which our code computes the same as the model of the file. None stands for absent
# or null.
SUPPORTED = {
    "hidden_act":            ("silu", None),
    "is_causal":             (True, None),  # otherwise, tokens see later tokens
    "is_encoder_decoder":    (False, None),
    "attention_bias":        (False, None),  # of o, too
    "mlp_bias":              (False, None),
    "partial_rotary_factor": (1.0, None),
    "rope_interleaved":      (False, None),  # in files of SmolLM2; see rotation_layout.py
    "use_mrope":             (False, None),  # in files of Qwen2.5: rotations for pictures
    "pruned_heads":          ({}, None),
    "num_local_experts":     (0, None),
    "quantization":          (None,),  # in files of MLX
    "rope_type":             ("default", "llama3"),
    "tie_word_embeddings":   (True, False, None),
    "use_sliding_window":    (True, False, None),
}
# What differs for a model_type. Qwen2 always has biases of q, k and v, and transformers does not
# read the key. It does not read LLaMA's window, either, so nobody knows what such a file means.
SUPPORTED_BY = {
    "llama":   {"sliding_window": (None,), "use_sliding_window": (False, None)},
    "mistral": {},
    "qwen2":   {"attention_bias": (True, False, None)},
    "qwen3":   {},
}

# Other keys that are read
OTHER_KEYS = (
    "rope_scaling", "rope_parameters", "pad_token_id",
    "sliding_window", "max_window_layers", "layer_types",
)

# Keys that change no logits, in addition to those of all architectures -> why
HARMLESS = {
    "pretraining_tp":              "multiplies matrices in parts, with the same result",
    "is_llama_config":             "in files of SmolLM2: says what model_type says",
    "transformers.js_config":      "for another program",
    "unsloth_version":             "says who wrote the file",
    "unsloth_fixed":               "says who wrote the file",
    "max_sequence_length":         "in files of LLaMA 1: says what max_position_embeddings says",
    "is_decoder":                  "a model of this family is nothing else",
    "add_cross_attention":         "no model of this family has or reads it",
    "cross_attention_hidden_size": "no model of this family has or reads it",
    "tie_encoder_decoder":         "no model of this family has or reads it",
}
# fmt: on
# Values of `layer_types`
FULL = "full_attention"
WINDOWED = "sliding_attention"


def from_hf(raw, origin="config.json"):
    """Return the LlamaConfig of a config.json's content, or raise ValueError."""
    model_type = raw["model_type"]
    rope = rope_settings(raw)
    stated = DEFAULTS[model_type] | raw | {"rope_type": "default"}
    stated |= {key: rope[key] for key in rope if is_rope_key(key)}
    supported = SUPPORTED | SUPPORTED_BY[model_type]
    refuse_unsupported(unsupported(stated, supported) + unsupported_rope(rope))
    rope_factors = factors_of_gguf(raw)
    gguf_keys = () if rope_factors is None else ("rope_factors",)
    check_keys(raw, origin, NUMBERS, SUPPORTED, OTHER_KEYS, HARMLESS, gguf_keys)
    settings = fill_in(stated)
    numbers = read_numbers(settings, NUMBERS, LlamaConfig)
    scaling = {}
    if settings["rope_type"] == "llama3":
        scaling = {key: settings.get(key) for key in LLAMA3_ROPE}
    window = window_numbers(stated)
    faults = wrong_ids(settings, ["pad_token_id", "bos_token_id"])
    raise_if_any(faults + wrong_numbers(numbers | scaling | window, LIMITS))

    config = LlamaConfig(
        **{ours: numbers[key] for key, ours in NUMBERS.items()},
        own_head=not settings.get("tie_word_embeddings", False),
        qkv_bias=model_type == "qwen2",
        qk_norm=model_type == "qwen3",
        window=window_of_all_layers(stated, window),
        rope_scaling=tuple(scaling.values()) or None,
        rope_factors=rope_factors,
        pad_id=settings.get("pad_token_id"),
        eos_ids=tuple(settings["eos_token_id"]),
        bos_id=stated.get("bos_token_id", LlamaConfig.bos_id),
    )
    check_sizes(config, scaling)
    return config


# The window: how many tokens a token sees


def window_numbers(stated):
    """Return the keys that describe the window, with their values; {} if there is no window.

    Mistral has the window in all layers. Qwen has it only if `use_sliding_window` says so, and only
    in the layers from `max_window_layers` on.
    """
    window = stated.get("sliding_window")
    if "max_window_layers" not in DEFAULTS[stated["model_type"]]:
        return {} if window is None else {"sliding_window": window}
    if window is None or not stated.get("use_sliding_window"):
        return {}
    return {"sliding_window": window, "max_window_layers": stated["max_window_layers"]}


def window_of_all_layers(stated, window):
    """Return the window, or None. `window` is from `window_numbers`.

    Raise ValueError if only some layers have it, or if `layer_types` says something else.
    """
    n_layers = stated["num_hidden_layers"]
    n_full = 0
    if not window:
        n_full = n_layers
    elif "max_window_layers" in window:
        n_full = min(window["max_window_layers"], n_layers)
    kinds = [FULL] * n_full + [WINDOWED] * (n_layers - n_full)
    stated_kinds = stated.get("layer_types") or kinds
    if "max_window_layers" in window:
        kinds = stated_kinds  # they win, but only in Qwen
    if stated_kinds != kinds or kinds not in ([FULL] * n_layers, [WINDOWED] * n_layers):
        found = f"max_window_layers={n_full} of {n_layers}, layer_types={stated_kinds!r:.100}"
        refuse_unsupported([f"a window in some layers ({found})"])
    return window["sliding_window"] if kinds[0] == WINDOWED else None


# The rotation


def rope_settings(raw):
    """Return the dict that describes the rotation, with its kind under `rope_type`.

    Newer files have `rope_parameters`, which also holds theta. Older files have `rope_scaling` and
    `rope_theta`, and the oldest files call the kind `type`.
    """
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        return {"rope_type": rope}  # refused, because it is not a dict of numbers
    if "type" in rope:
        renamed = {key: value for key, value in rope.items() if key != "type"}
        return {"rope_type": rope["type"]} | renamed
    return rope


def factors_of_gguf(raw):
    """Return the rope factors of a GGUF file, or None if `raw` comes from another file.

    `read_gguf` stores the factors as a tuple, which JSON cannot contain. So a `rope_factors` in a
    config.json is just an unknown key.
    """
    factors = raw.get("rope_factors")
    return factors if isinstance(factors, tuple) else None


def is_rope_key(key):
    return key in ("rope_type", "rope_theta", *LLAMA3_ROPE)


def unsupported_rope(rope):
    """Return a text for each unknown key of the rotation whose value (not null or 1.0) matters."""
    unknown = [key for key in rope if not is_rope_key(key)]
    return [f"{key}={rope[key]!r}" for key in unknown if rope[key] not in (None, 1.0)]


def fill_in(stated):
    """Return the settings without nulls, completed by what follows from other keys."""
    settings = without_nulls(stated, SAME_AS)
    if "head_dim" not in settings:
        width = settings.get("hidden_size")
        n_heads = settings.get("num_attention_heads")
        if type(width) is int and type(n_heads) is int:
            settings["head_dim"] = width // max(n_heads, 1)
    settings["eos_token_id"] = end_ids(stated, LlamaConfig.eos_ids)
    return settings


def check_sizes(config, scaling):
    """Raise ValueError if numbers that are right on their own do not fit together."""
    if config.n_heads % config.n_kv_heads != 0 or config.d_head % 2 != 0:
        heads = f"{config.n_kv_heads} key/value heads must divide {config.n_heads} heads"
        raise ValueError(f"config.json: {heads}, and head_dim {config.d_head} must be even")
    if scaling and scaling["low_freq_factor"] > scaling["high_freq_factor"]:
        raise ValueError("config.json: low_freq_factor must not be above high_freq_factor")


# The way back


def to_hf(config):
    """Return the keys of a config.json that only a LLaMA, Mistral or Qwen has."""
    model_type, architecture = model_type_of(config)
    raw = {
        "architectures": [architecture],
        "model_type": model_type,
        **{key: getattr(config, ours) for key, ours in NUMBERS.items()},
        "hidden_act": "silu",
        "bos_token_id": config.bos_id,
    }
    if model_type != "llama":
        raw["sliding_window"] = config.window
    if model_type in ("qwen2", "qwen3"):
        raw["use_sliding_window"] = config.window is not None
        raw["max_window_layers"] = 0 if config.window else config.n_layers
    scaling = config.rope_scaling
    if config.rope_factors is not None:
        scaling = scaling_of_factors(config)
    if scaling is not None:
        numbers = dict(zip(LLAMA3_ROPE, scaling, strict=True))
        raw["rope_scaling"] = {"rope_type": "llama3", **numbers}
    return raw


def model_type_of(config):
    """Return the model_type, and its class in transformers, that has all parts of the model."""
    if config.qk_norm:
        return "qwen3", "Qwen3ForCausalLM"
    if config.qkv_bias:
        return "qwen2", "Qwen2ForCausalLM"
    if config.window is not None:
        return "mistral", "MistralForCausalLM"
    return "llama", "LlamaForCausalLM"


def scaling_of_factors(config):
    """Return the `rope_scaling` with the same frequencies as the `rope_factors` of a GGUF file.

    A GGUF file holds the result of the scaling, but config.json has a place only for its four
    numbers. So we try the numbers of Llama 3.1 and of Llama 3.2.
    """
    frequencies = rotation_frequencies(config)
    for factor in (8.0, 32.0):
        scaling = (factor, 1.0, 4.0, 8192)
        candidate = replace(config, rope_factors=None, rope_scaling=scaling)
        if torch.allclose(rotation_frequencies(candidate), frequencies, rtol=1e-5):
            return scaling
    raise ValueError(
        "these rope factors are neither Llama 3.1's nor 3.2's: config.json cannot express them"
    )
