"""config.json of a LLaMA: its keys, and what they mean (config.py says how they are read).

Shapes: P pairs of a head (half its width).
"""

from dataclasses import replace

import torch

from minia3.checkpoints.config_checks import (
    end_ids,
    raise_if_any,
    read_numbers,
    refuse_unsupported,
    unsupported,
    without_nulls,
    wrong_ids,
    wrong_numbers,
)
from minia3.model.llama import LlamaConfig, inverse_frequencies

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
    "attention_dropout":               (0.0, 1.0),
    "rms_norm_eps":                    (0.0, 1.0),
    "rope_theta":                      (1.0, 1e30),
    "factor":                          (1.0, 1e9),
    "low_freq_factor":                 (0.0, 1e9),
    "high_freq_factor":                (0.0, 1e9),
}

# What transformers assumes for each model_type, if it differs from the defaults of LlamaConfig
DEFAULTS = {
    "llama": {},
    "mistral": {  # LLaMA, as long as no window limits its attention
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "num_key_value_heads": 8,
    },
}

# If a key is absent or null, it takes the value of another key.
SAME_AS = {
    "num_key_value_heads":    "num_attention_heads",
}

# The values with which our code computes the same as the model of the file. None stands for absent
# or null.
SUPPORTED = {
    "hidden_act":            ("silu", None),
    "attention_bias":        (False, None),
    "mlp_bias":              (False, None),
    "partial_rotary_factor": (1.0, None),
    "num_local_experts":     (0, None),
    "quantization_config":   (None,),
    "rope_type":             ("default", "llama3"),
    "tie_word_embeddings":   (True, False, None),
    "sliding_window":        (None,),
}
# fmt: on


def from_hf(raw, origin="config.json"):
    """Return the LlamaConfig of a config.json's content, or raise ValueError."""
    rope = rope_settings(raw)
    stated = DEFAULTS[raw["model_type"]] | raw | {"rope_type": "default"}
    stated |= {key: rope[key] for key in rope if is_rope_key(key)}
    refuse_unsupported(unsupported(stated, SUPPORTED) + unsupported_rope(rope))
    settings = fill_in(stated)
    numbers = read_numbers(settings, NUMBERS, LlamaConfig)
    scaling = {}
    if settings["rope_type"] == "llama3":
        scaling = {key: settings.get(key) for key in LLAMA3_ROPE}
    faults = wrong_ids(settings, ["pad_token_id", "bos_token_id"])
    raise_if_any(faults + wrong_numbers(numbers | scaling, LIMITS))

    rope_factors = settings.get("rope_factors")
    if not isinstance(rope_factors, tuple):
        rope_factors = None  # an unknown key of a config.json; only read_gguf makes a tuple
    config = LlamaConfig(
        **{ours: numbers[key] for key, ours in NUMBERS.items()},
        own_head=not settings.get("tie_word_embeddings", False),
        rope_scaling=tuple(scaling.values()) or None,
        rope_factors=rope_factors,
        pad_id=settings.get("pad_token_id"),
        eos_ids=tuple(settings["eos_token_id"]),
        bos_id=settings.get("bos_token_id"),
    )
    check_sizes(config, scaling)
    return config


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
    """Return the keys of a config.json that only a LLaMA has."""
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{key: getattr(config, ours) for key, ours in NUMBERS.items()},
        "hidden_act": "silu",
        "bos_token_id": config.bos_id,
    }
    scaling = config.rope_scaling
    if config.rope_factors is not None:
        scaling = scaling_of_factors(config)
    if scaling is not None:
        numbers = dict(zip(LLAMA3_ROPE, scaling, strict=True))
        raw["rope_scaling"] = {"rope_type": "llama3", **numbers}
    return raw


def scaling_of_factors(config):
    """Return the `rope_scaling` with the same frequencies as the `rope_factors` of a GGUF file.

    A GGUF file holds the result of the scaling, but config.json has a place only for its four
    numbers. So we try the numbers of Llama 3.1 and of Llama 3.2.
    """
    frequencies = inverse_frequencies(config)
    for factor in (8.0, 32.0):
        scaling = (factor, 1.0, 4.0, 8192)
        candidate = replace(config, rope_factors=None, rope_scaling=scaling)
        if torch.allclose(inverse_frequencies(candidate), frequencies, rtol=1e-5):
            return scaling
    raise ValueError(
        "these rope factors are neither Llama 3.1's nor 3.2's: config.json cannot express them"
    )
