"""Translate Hugging Face's config.json into our configs, and back.

A model that is computed almost right is worse than no model. So if a setting changes the
computation and is not implemented here, it is refused by name. If a file leaves out a key, the key
has the value that transformers assumes.

`from_hf` works in these steps:

    1. refuse settings that are not supported
    2. fill in defaults
    3. check ids and numbers
    4. make a T5Config or a LlamaConfig

Shapes: P pairs of a head (half its width).
"""

from dataclasses import replace

import torch

from minia3.model.llama import LlamaConfig, inverse_frequencies
from minia3.model.t5 import T5Config

# fmt: off
# Keys of config.json whose values are numbers -> their names in our configs.
T5_NUMBERS = {
    "d_model":                         "d_model",
    "d_kv":                            "d_head",
    "d_ff":                            "d_ff",
    "num_layers":                      "n_layers",
    "num_heads":                       "n_heads",
    "num_decoder_layers":              "n_decoder_layers",
    "vocab_size":                      "vocab_size",
    "relative_attention_num_buckets":  "n_buckets",
    "relative_attention_max_distance": "max_distance",
    "dropout_rate":                    "dropout",
    "layer_norm_epsilon":              "eps",
    "pad_token_id":                    "pad_id",
    "decoder_start_token_id":          "start_id",
}
LLAMA_NUMBERS = {
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
# The numbers of Llama 3.1's scaling, in the order of LlamaConfig.rope_scaling.
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")

# The least and the greatest value of a number. Fractions are allowed if the limits are floats. All
# published models stay far below the limits, which keep a damaged file from filling the memory.
LIMITS = {
    "num_layers":                      (1, 2**10),
    "num_decoder_layers":              (1, 2**10),
    "num_hidden_layers":               (1, 2**10),
    "relative_attention_num_buckets":  (4, 2**20),
    "max_position_embeddings":         (1, 2**31),
    "pad_token_id":                    (-1, 2**31),  # -1 means "no such token"
    "decoder_start_token_id":          (0, 2**31),
    "dropout_rate":                    (0.0, 1.0),
    "attention_dropout":               (0.0, 1.0),
    "layer_norm_epsilon":              (0.0, 1.0),
    "rms_norm_eps":                    (0.0, 1.0),
    "rope_theta":                      (1.0, 1e30),
    "factor":                          (1.0, 1e9),
    "low_freq_factor":                 (0.0, 1e9),
    "high_freq_factor":                (0.0, 1e9),
}
OTHER_LIMITS = (1, 2**20)

# What transformers assumes for each model_type, if it differs from the defaults of our classes.
DEFAULTS = {
    "t5": {},
    "mt5": {  # T5 v1.1 under another name
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "scale_decoder_outputs": False,  # even if tied: transformers 5 saves every mT5 as tied
    },
    "llama": {},
    "mistral": {  # LLaMA, as long as no window limits its attention
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "num_key_value_heads": 8,
    },
}
T5_TYPES = ("t5", "mt5")

# If a key is absent or null, it takes the value of another key.
SAME_AS = {
    "num_decoder_layers":     "num_layers",
    "decoder_start_token_id": "pad_token_id",
    "num_key_value_heads":    "num_attention_heads",
}

# The values with which our code computes the same as the model of the file. None stands for absent
# or null.
SUPPORTED = {
    "feed_forward_proj":     ("relu", "gated-gelu", None),
    "hidden_act":            ("silu", None),
    "attention_bias":        (False, None),
    "mlp_bias":              (False, None),
    "partial_rotary_factor": (1.0, None),
    "num_local_experts":     (0, None),
    "quantization_config":   (None,),
    "rope_type":             ("default", "llama3"),
    "tie_word_embeddings":   (True, False, None),
    "scale_decoder_outputs": (True, False, None),
    "sliding_window":        (None,),
}
# fmt: on


def from_hf(raw):
    """Return the T5Config or LlamaConfig that a config.json describes. `raw` is its content.

    Raise ValueError if the architecture or a feature is not supported, or if values are missing, of
    the wrong type or out of range. One message names them all.
    """
    model_type = raw.get("model_type")
    if model_type not in list(DEFAULTS):  # a list, because a damaged model_type may be unhashable
        known = ", ".join(DEFAULTS)
        raise ValueError(f"config.json: model_type is {model_type!r}, but minia3 runs only {known}")
    is_t5 = model_type in T5_TYPES
    rope = {} if is_t5 else rope_settings(raw)
    stated = DEFAULTS[model_type] | raw | {"rope_type": "default"}
    stated |= {key: rope[key] for key in rope if is_rope_key(key)}

    refused = unsupported(stated) + unsupported_rope(rope)
    if is_t5:
        refused += unsupported_activation(stated)
    if refused:
        raise ValueError(f"config.json asks for what minia3 does not support: {', '.join(refused)}")

    config_class = T5Config if is_t5 else LlamaConfig
    settings = fill_in(stated, config_class)
    return t5_config(settings) if is_t5 else llama_config(settings)


# What is not supported


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


def unsupported(stated):
    """Return a text for each setting whose value is not supported."""
    refused = []
    for key, values in SUPPORTED.items():
        if stated.get(key) not in values:
            refused.append(f"{key}={stated.get(key)!r}")
    return refused


def unsupported_rope(rope):
    """Return a text for each unknown key of the rotation whose value (not null or 1.0) matters."""
    unknown = [key for key in rope if not is_rope_key(key)]
    return [f"{key}={rope[key]!r}" for key in unknown if rope[key] not in (None, 1.0)]


def unsupported_activation(stated):
    """Return a text if the `dense_act_fn` of a T5 does not follow from its `feed_forward_proj`."""
    # transformers derives the former from the latter. gelu_new is the tanh approximation.
    derived = "gelu_new" if stated.get("feed_forward_proj") == "gated-gelu" else "relu"
    activation = stated.get("dense_act_fn")
    if activation in (None, derived):
        return []
    return [f"dense_act_fn={activation!r}"]


# Defaults


def fill_in(stated, config_class):
    """Return the settings without nulls, completed by what follows from other keys."""
    settings = {key: value for key, value in stated.items() if value is not None}
    for key, other in SAME_AS.items():
        if key not in settings and other in settings:
            settings[key] = settings[other]
    if "head_dim" not in settings:
        width = settings.get("hidden_size")
        n_heads = settings.get("num_attention_heads")
        if type(width) is int and type(n_heads) is int:
            settings["head_dim"] = width // max(n_heads, 1)
    settings["eos_token_id"] = end_ids(stated, config_class.eos_ids)
    return settings


def end_ids(stated, default):
    """Return a list of the ids that end a text. Null means none. Without the key, use `default`."""
    ids = stated.get("eos_token_id", list(default))
    if ids is None:
        return []
    return ids if isinstance(ids, list) else [ids]


# Checks. They use `type(x) is int` and not isinstance, because True is an instance of int.


def wrong_ids(settings, keys):
    faults = []
    if not all(type(i) is int for i in settings["eos_token_id"]):
        faults.append(f"eos_token_id is {settings['eos_token_id']!r}, expected whole numbers")
    for key in keys:
        if key in settings and type(settings[key]) is not int:
            faults.append(f"{key} is {settings[key]!r}, expected a whole number")
    return faults


def wrong_numbers(numbers):
    faults = []
    for key, value in numbers.items():
        least, greatest = LIMITS.get(key, OTHER_LIMITS)
        kind = "a whole number" if type(least) is int else "a number"
        is_number = type(value) in (int, type(least))
        if not is_number or not least <= value <= greatest:
            faults.append(f"{key} is {value!r}, expected {kind} from {least} to {greatest}")
    return faults


def raise_if_any(faults):
    if faults:
        raise ValueError(f"config.json: {'; '.join(faults)}")


def read_numbers(settings, names, config_class):
    """Return a dict from config.json's keys to numbers: the file's, or the default, or None."""
    numbers = {}
    for key, ours in names.items():
        default = getattr(config_class, ours, None)  # the default of the dataclass
        numbers[key] = settings.get(key, default)
    return numbers


# The two configs


def t5_config(settings):
    numbers = read_numbers(settings, T5_NUMBERS, T5Config)
    raise_if_any(wrong_ids(settings, ["bos_token_id"]) + wrong_numbers(numbers))

    is_tied = settings.get("tie_word_embeddings", True)
    is_gated = settings.get("feed_forward_proj") == "gated-gelu"
    activation = "gelu" if is_gated else "relu"
    config = T5Config(
        **{ours: numbers[key] for key, ours in T5_NUMBERS.items()},
        activation=activation,
        gated=is_gated,
        own_head=not is_tied,
        # v1.0 is tied and scaled, and v1.1 is neither. Only newer files state scaling separately.
        scale_logits=settings.get("scale_decoder_outputs", is_tied),
        eos_ids=tuple(settings["eos_token_id"]),
    )
    if config.start_id >= config.vocab_size or config.max_distance <= config.n_buckets // 2:
        expected = "decoder_start_token_id < vocab_size, max_distance > num_buckets / 2"
        raise ValueError(f"config.json: expected {expected}")
    return config


def llama_config(settings):
    numbers = read_numbers(settings, LLAMA_NUMBERS, LlamaConfig)
    scaling = {}
    if settings["rope_type"] == "llama3":
        scaling = {key: settings.get(key) for key in LLAMA3_ROPE}
    faults = wrong_ids(settings, ["pad_token_id", "bos_token_id"])
    raise_if_any(faults + wrong_numbers(numbers | scaling))

    rope_factors = settings.get("rope_factors")
    if not isinstance(rope_factors, tuple):
        rope_factors = None  # an unknown key of a config.json; only read_gguf makes a tuple
    config = LlamaConfig(
        **{ours: numbers[key] for key, ours in LLAMA_NUMBERS.items()},
        own_head=not settings.get("tie_word_embeddings", False),
        rope_scaling=tuple(scaling.values()) or None,
        rope_factors=rope_factors,
        pad_id=settings.get("pad_token_id"),
        eos_ids=tuple(settings["eos_token_id"]),
        bos_id=settings.get("bos_token_id"),
    )
    if config.n_heads % config.n_kv_heads != 0 or config.d_head % 2 != 0:
        heads = f"{config.n_kv_heads} key/value heads must divide {config.n_heads} heads"
        raise ValueError(f"config.json: {heads}, and head_dim {config.d_head} must be even")
    if scaling and scaling["low_freq_factor"] > scaling["high_freq_factor"]:
        raise ValueError("config.json: low_freq_factor must not be above high_freq_factor")
    return config


# The way back


def to_hf(config, dtype):
    """Return the content of a config.json that transformers 4 and 5 read as the same model.

    Raise ValueError if the rope factors (of a GGUF file) are neither Llama 3.1's nor 3.2's.
    """
    raw = t5_to_hf(config) if isinstance(config, T5Config) else llama_to_hf(config)
    raw["torch_dtype"] = str(dtype).removeprefix("torch.")
    raw["tie_word_embeddings"] = not config.own_head
    raw["pad_token_id"] = config.pad_id
    # Many programs expect a single id instead of a list with one id. None: no id ends a text.
    ids = list(config.eos_ids)
    raw["eos_token_id"] = ids[0] if len(ids) == 1 else ids or None
    return raw


def t5_to_hf(config):
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        **{key: getattr(config, ours) for key, ours in T5_NUMBERS.items()},
        "feed_forward_proj": "gated-gelu" if config.gated else "relu",
        # transformers 5 reads this key; version 4 derives it from tie_word_embeddings.
        "scale_decoder_outputs": config.scale_logits,
    }


def llama_to_hf(config):
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{key: getattr(config, ours) for key, ours in LLAMA_NUMBERS.items()},
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
