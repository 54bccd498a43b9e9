"""Chapter 6, configs: Hugging Face's config.json -> ours, and back. What the code does not do is refused by name."""

from dataclasses import replace

import torch

from minia3.llama import LlamaConfig, inverse_frequencies
from minia3.t5 import T5Config

# config.json -> ours
T5_SIZES = {
    "d_model": "d_model",
    "d_kv": "d_head",
    "d_ff": "d_ff",
    "num_layers": "n_layers",
    "num_decoder_layers": "n_decoder_layers",
    "num_heads": "n_heads",
    "vocab_size": "vocab_size",
    "relative_attention_num_buckets": "n_buckets",
    "relative_attention_max_distance": "max_distance",
}
LLAMA_SIZES = {
    "hidden_size": "d_model",
    "head_dim": "d_head",
    "intermediate_size": "d_ff",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_length",
}
FEED_FORWARDS = {"relu": ("relu", False), "gated-gelu": ("gelu", True)}
NUMBERS = ("layer_norm_epsilon", "rms_norm_eps", "dropout_rate", "attention_dropout", "rope_theta")
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")

# What transformers assumes where a key is absent.
DEFAULTS = {
    "t5": {"feed_forward_proj": "relu", "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128},
    "mt5": {"feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 32,
            "relative_attention_max_distance": 128, "tie_word_embeddings": False,
            "scale_decoder_outputs": False},  # whatever is tied: transformers 5 saves every mT5 as tied
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "sliding_window": 4096, "num_key_value_heads": 8},
}  # fmt: skip

# The values under which the model is what this code computes; None: absent or null.
LLAMA_SUPPORTED = {
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "sliding_window": (None,),
    "partial_rotary_factor": (1.0, None),
    "num_local_experts": (0, None),
    "quantization_config": (None,),
}
SUPPORTED = {
    "t5": {"feed_forward_proj": tuple(FEED_FORWARDS), "quantization_config": (None,)},
    "mt5": {"feed_forward_proj": tuple(FEED_FORWARDS), "quantization_config": (None,)},
    "llama": LLAMA_SUPPORTED,
    "mistral": LLAMA_SUPPORTED,  # LLaMA, where it has no sliding window
}


def from_hf(raw):
    """A config.json as dict -> T5Config or LlamaConfig.

    Raises ValueError for another architecture, for sizes that are missing or no positive whole numbers, and for
    features that this code does not have: all of them in one line.
    """
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if kind not in [*SUPPORTED]:  # a list, since `kind` may be unhashable
        raise ValueError(f"config.json: model_type is {kind!r}, but minia3 runs only {', '.join(SUPPORTED)}")
    raw = {**DEFAULTS[kind], **raw}
    refused = [f"{key}={raw[key]!r}" for key, values in SUPPORTED[kind].items() if raw.get(key) not in values]
    if refused:
        raise ValueError(f"config.json asks for what minia3 does not do: {', '.join(refused)}")
    ends = {"eos_token_id": []} if "eos_token_id" in raw else {}  # null: no end token; absent: the default
    raw = ends | {key: value for key, value in raw.items() if value is not None}
    wrong = [f"{key}={raw[key]!r}" for key in NUMBERS if type(raw.get(key, 0)) not in (int, float)]
    if wrong:
        raise ValueError(f"config.json: expected a number, found {', '.join(wrong)}")
    return t5_from_hf(raw) if kind in ("t5", "mt5") else llama_from_hf(raw)


def t5_from_hf(raw):
    sizes = _sizes({"num_decoder_layers": raw.get("num_layers"), **raw}, T5_SIZES)
    activation, gated = FEED_FORWARDS[raw["feed_forward_proj"]]
    tied = raw.get("tie_word_embeddings", True)
    pad_id = raw.get("pad_token_id", 0)
    return T5Config(
        **sizes,
        activation=activation,
        gated=gated,
        own_head=not tied,
        scale_logits=raw.get("scale_decoder_outputs", tied),
        dropout=raw.get("dropout_rate", 0.1),
        eps=raw.get("layer_norm_epsilon", 1e-6),
        pad_id=pad_id,
        eos_ids=token_ids(raw.get("eos_token_id", 1)),
        start_id=raw.get("decoder_start_token_id", pad_id),
    )


def llama_from_hf(raw):
    raw = {"num_key_value_heads": raw.get("num_attention_heads"), **raw}
    if "head_dim" not in raw and all(isinstance(raw.get(k), int) for k in ("hidden_size", "num_attention_heads")):
        raw["head_dim"] = raw["hidden_size"] // max(raw["num_attention_heads"], 1)
    sizes = _sizes(raw, LLAMA_SIZES)
    if sizes["n_heads"] % sizes["n_kv_heads"] or sizes["d_head"] % 2:
        raise ValueError(
            f"config.json: {sizes['n_kv_heads']} key/value heads must divide {sizes['n_heads']} heads, "
            f"and head_dim {sizes['d_head']} must be even"
        )
    theta, scaling = _rope(raw)
    return LlamaConfig(
        **sizes,
        own_head=not raw.get("tie_word_embeddings", False),
        eps=raw.get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        rope_factors=tuple(raw["rope_factors"]) if "rope_factors" in raw else None,
        dropout=raw.get("attention_dropout", 0.0),
        pad_id=raw.get("pad_token_id"),
        eos_ids=token_ids(raw.get("eos_token_id", 2)),
        bos_id=raw.get("bos_token_id"),
    )


def _rope(raw):
    """-> theta and llama3's four numbers (or None). Newer files have one dict for both, older ones two keys."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    rope = rope if isinstance(rope, dict) else {"rope_type": rope}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ["default", "llama3"]:
        raise ValueError(f"config.json: rope scaling of kind {kind!r}, but minia3 does only 'llama3' or none")
    known = ("rope_type", "type", "rope_theta", *LLAMA3_ROPE)
    unknown = [f"{key}={value!r}" for key, value in rope.items() if key not in known and value not in (None, 1.0)]
    if unknown:
        raise ValueError(f"config.json: the rope scaling asks for what minia3 does not do: {', '.join(unknown)}")
    theta = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    needed = {"rope_theta": theta} | {key: rope.get(key) for key in LLAMA3_ROPE if kind == "llama3"}
    wrong = [f"{key}={value!r}" for key, value in needed.items() if type(value) not in (int, float)]
    if wrong:
        raise ValueError(f"config.json: the rope scaling needs numbers, found {', '.join(wrong)}")
    return float(theta), tuple(rope[key] for key in LLAMA3_ROPE) if kind == "llama3" else None


def token_ids(value):
    """An eos_token_id of a config file, which is a number or a list of them -> tuple."""
    return tuple(value) if isinstance(value, list) else (value,)


def _sizes(raw, table):
    wrong = [f"{key}={raw.get(key)!r}" for key in table if type(raw.get(key)) is not int or raw[key] < 1]
    if wrong:
        raise ValueError(f"config.json: expected a positive whole number, found {', '.join(wrong)}")
    return {ours: raw[key] for key, ours in table.items()}


def to_hf(config, dtype):
    """Our config -> a config.json as dict, which transformers 4 and 5 read as the same model."""
    ids = list(config.eos_ids)
    shared = {
        "torch_dtype": str(dtype).removeprefix("torch."),
        "pad_token_id": config.pad_id,
        "eos_token_id": ids[0] if len(ids) == 1 else ids or None,
    }
    if isinstance(config, T5Config):
        forward = {pair: name for name, pair in FEED_FORWARDS.items()}[config.activation, config.gated]
        return {
            "architectures": ["T5ForConditionalGeneration"],
            "model_type": "t5",
            "is_encoder_decoder": True,
            **{key: getattr(config, ours) for key, ours in T5_SIZES.items()},
            "feed_forward_proj": forward,
            "tie_word_embeddings": not config.own_head,  # transformers 4 takes "scale" from this, 5 from the next
            "scale_decoder_outputs": config.scale_logits,
            "dropout_rate": config.dropout,
            "layer_norm_epsilon": config.eps,
            "decoder_start_token_id": config.start_id,
            **shared,
        }
    rope = {"rope_theta": config.rope_theta}
    scaling = config.rope_scaling or _named_scaling(config)
    if scaling:
        rope["rope_scaling"] = {"rope_type": "llama3", **dict(zip(LLAMA3_ROPE, scaling, strict=True))}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{key: getattr(config, ours) for key, ours in LLAMA_SIZES.items()},
        "hidden_act": "silu",
        "rms_norm_eps": config.eps,
        **rope,
        "attention_dropout": config.dropout,
        "tie_word_embeddings": not config.own_head,
        "bos_token_id": config.bos_id,
        **shared,
    }


def _named_scaling(config):
    """The llama3 scaling behind a GGUF's factors: config.json has no place for the factors themselves."""
    if config.rope_factors is None:
        return None
    found = inverse_frequencies(config)
    for scaling in ((8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192)):  # Llama 3.1 and 3.3; Llama 3.2
        if torch.allclose(found, inverse_frequencies(replace(config, rope_factors=None, rope_scaling=scaling)), 1e-5):
            return scaling
    raise ValueError("the rope factors of this GGUF are none of Llama 3.1's or 3.2's: config.json cannot express them")
