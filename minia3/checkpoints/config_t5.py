"""config.json of a T5: its keys, and what they mean (config.py says how they are read)."""

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
from minia3.model.t5 import T5Config

# fmt: off
# Keys of config.json whose values are numbers -> their names in our config
NUMBERS = {
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
LIMITS = {
    "num_layers":                      (1, 2**10),
    "num_decoder_layers":              (1, 2**10),
    "relative_attention_num_buckets":  (4, 2**20),
    "decoder_start_token_id":          (0, 2**31),
    "dropout_rate":                    (0.0, 1.0),
    "layer_norm_epsilon":              (0.0, 1.0),
}

# What transformers assumes for each model_type, if it differs from the defaults of T5Config
GATED = {
    "feed_forward_proj": "gated-gelu",
    "decoder_start_token_id": 0,
}
DEFAULTS = {
    "t5": {},
    "mt5": GATED | {  # T5 v1.1 under another name
        "tie_word_embeddings": False,
        "scale_decoder_outputs": False,  # even if tied: transformers 5 saves every mT5 as tied
    },
    "umt5": GATED,  # with a table of position biases in every layer
}

# feed_forward_proj -> the activation, whether it is gated, and the name that transformers gives it.
# If two forms are the same, the later one is written.
FEED_FORWARDS = {
    "relu":            ("relu", False, "relu"),
    "gelu_new":        ("gelu", False, "gelu_new"),
    "silu":            ("silu", False, "silu"),
    "gated-relu":      ("relu", True, "relu"),
    "gated-gelu_new":  ("gelu", True, "gelu_new"),
    "gated-gelu":      ("gelu", True, "gelu_new"),  # v1.1: this means the tanh approximation
    "gated-silu":      ("silu", True, "silu"),      # UL2
}

# If a key is absent or null, it takes the value of another key.
SAME_AS = {
    "d_model":                "hidden_size",
    "d_kv":                   "head_dim",
    "num_layers":             "num_hidden_layers",
    "num_heads":              "num_attention_heads",
    "num_decoder_layers":     "num_layers",
    "decoder_start_token_id": "pad_token_id",
}

# Keys that follow from feed_forward_proj. They must agree with it.
DERIVED = ("dense_act_fn", "is_gated_act")

# Other names of keys. If a file has both, they must agree, because transformers takes either.
OTHER_NAMES = {
    "hidden_size":            "d_model",
    "head_dim":               "d_kv",
    "num_hidden_layers":      "num_layers",
    "num_attention_heads":    "num_heads",
}

# The values with which our code computes the same as the model of the file. None stands for absent
# or null.
SUPPORTED = {
    "feed_forward_proj":     (*FEED_FORWARDS, None),
    "tie_word_embeddings":   (True, False, None),
    "scale_decoder_outputs": (True, False, None),
    "is_encoder_decoder":    (True, None),  # False: transformers computes other logits
    "tie_encoder_decoder":   (False, None),
    "pruned_heads":          ({}, None),
}

# Keys that change no logits, in addition to those of all architectures -> why
HARMLESS = {
    "is_decoder":                  "says False of the whole; its two halves are made alike",
    "add_cross_attention":         "a T5 decoder always has it",
    "cross_attention_hidden_size": "no T5 reads it: both halves have the same width",
    "scalable_attention":          "in files of umT5; no version of transformers reads it",
}
# fmt: on


def from_hf(raw, origin="config.json"):
    """Return the T5Config of a config.json's content, or raise ValueError."""
    stated = DEFAULTS[raw["model_type"]] | raw
    refuse_unsupported(unsupported(stated, SUPPORTED) + contradictions(stated))
    check_keys(raw, origin, NUMBERS, SUPPORTED, OTHER_NAMES, HARMLESS, DERIVED)
    settings = without_nulls(stated, SAME_AS)
    settings["eos_token_id"] = end_ids(stated, T5Config.eos_ids)
    numbers = read_numbers(settings, NUMBERS, T5Config)
    raise_if_any(wrong_ids(settings, ["bos_token_id"]) + wrong_numbers(numbers, LIMITS))

    is_tied = settings.get("tie_word_embeddings", True)
    activation, is_gated, _ = FEED_FORWARDS[settings.get("feed_forward_proj", "relu")]
    # v1.0 is tied and scaled, and v1.1 is neither. Only newer files state scaling separately.
    is_scaled = stated.get("scale_decoder_outputs", is_tied)
    config = T5Config(
        **{ours: numbers[key] for key, ours in NUMBERS.items()},
        activation=activation,
        gated=is_gated,
        own_head=not is_tied,
        scale_logits=bool(is_scaled),  # null is False
        own_positions=raw["model_type"] == "umt5",
        eos_ids=tuple(settings["eos_token_id"]),
    )
    if config.start_id >= config.vocab_size or config.max_distance <= config.n_buckets // 2:
        expected = "decoder_start_token_id < vocab_size, max_distance > num_buckets / 2"
        raise ValueError(f"config.json: expected {expected}")
    return config


def contradictions(stated):
    """Return a text for each key that contradicts the key from which it follows."""
    refused = []
    form = stated.get("feed_forward_proj") or "relu"
    if form in list(FEED_FORWARDS):  # a list, because a damaged value may be unhashable
        _, is_gated, activation = FEED_FORWARDS[form]
        refused += unsupported(
            stated, {"dense_act_fn": (activation, None), "is_gated_act": (is_gated, None)}
        )
    for other, key in OTHER_NAMES.items():
        if None not in (stated.get(other), stated.get(key)) and stated[other] != stated[key]:
            refused.append(f"{other}={stated[other]!r:.80} beside {key}={stated.get(key)!r:.80}")
    if stated["model_type"] == "mt5" and stated.get("scale_decoder_outputs"):
        refused.append("scale_decoder_outputs=True in an mT5, which never scales")
    return refused


def to_hf(config):
    """Return the keys of a config.json that only a T5 has."""
    model_type = "umt5" if config.own_positions else "t5"
    forms = {row[:2]: form for form, row in FEED_FORWARDS.items()}
    return {
        "architectures": [f"{model_type.upper()}ForConditionalGeneration"],
        "model_type": model_type,
        "is_encoder_decoder": True,
        **{key: getattr(config, ours) for key, ours in NUMBERS.items()},
        "feed_forward_proj": forms[config.activation, config.gated],
        # transformers 5 reads this key; version 4 derives it from tie_word_embeddings.
        "scale_decoder_outputs": config.scale_logits,
    }
