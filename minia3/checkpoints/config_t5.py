"""config.json of a T5: its keys, and what they mean (config.py says how they are read)."""

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
DEFAULTS = {
    "t5": {},
    "mt5": {  # T5 v1.1 under another name
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "scale_decoder_outputs": False,  # even if tied: transformers 5 saves every mT5 as tied
    },
}

# If a key is absent or null, it takes the value of another key.
SAME_AS = {
    "num_decoder_layers":     "num_layers",
    "decoder_start_token_id": "pad_token_id",
}

# The values with which our code computes the same as the model of the file. None stands for absent
# or null.
SUPPORTED = {
    "feed_forward_proj":     ("relu", "gated-gelu", None),
    "quantization_config":   (None,),
    "tie_word_embeddings":   (True, False, None),
    "scale_decoder_outputs": (True, False, None),
}
# fmt: on


def from_hf(raw):
    """Return the T5Config of a config.json's content, or raise ValueError."""
    stated = DEFAULTS[raw["model_type"]] | raw
    refuse_unsupported(unsupported(stated, SUPPORTED) + unsupported_activation(stated))
    settings = without_nulls(stated, SAME_AS)
    settings["eos_token_id"] = end_ids(stated, T5Config.eos_ids)
    numbers = read_numbers(settings, NUMBERS, T5Config)
    raise_if_any(wrong_ids(settings, ["bos_token_id"]) + wrong_numbers(numbers, LIMITS))

    is_tied = settings.get("tie_word_embeddings", True)
    is_gated = settings.get("feed_forward_proj") == "gated-gelu"
    activation = "gelu" if is_gated else "relu"
    config = T5Config(
        **{ours: numbers[key] for key, ours in NUMBERS.items()},
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


def unsupported_activation(stated):
    """Return a text if the `dense_act_fn` of a T5 does not follow from its `feed_forward_proj`."""
    # transformers derives the former from the latter. gelu_new is the tanh approximation.
    derived = "gelu_new" if stated.get("feed_forward_proj") == "gated-gelu" else "relu"
    activation = stated.get("dense_act_fn")
    if activation in (None, derived):
        return []
    return [f"dense_act_fn={activation!r}"]


def to_hf(config):
    """Return the keys of a config.json that only a T5 has."""
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        **{key: getattr(config, ours) for key, ours in NUMBERS.items()},
        "feed_forward_proj": "gated-gelu" if config.gated else "relu",
        # transformers 5 reads this key; version 4 derives it from tie_word_embeddings.
        "scale_decoder_outputs": config.scale_logits,
    }
