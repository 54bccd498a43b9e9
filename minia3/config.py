"""Chapter 6, configs: Hugging Face's config.json -> ours, and back. What the code does not do is refused by name."""

from dataclasses import replace

import torch

from minia3.llama import LlamaConfig, inverse_frequencies
from minia3.t5 import T5Config

# config.json -> ours, the least and the most that it may be. Whole numbers are counts, and no larger than lets a lie
# in a file be found without filling the memory.
T5 = {
    "d_model": ("d_model", 1, 2**20), "d_kv": ("d_head", 1, 2**20), "d_ff": ("d_ff", 1, 2**20),
    "num_layers": ("n_layers", 1, 2**10), "num_decoder_layers": ("n_decoder_layers", 1, 2**10),
    "num_heads": ("n_heads", 1, 2**20), "vocab_size": ("vocab_size", 1, 2**24),
    "relative_attention_num_buckets": ("n_buckets", 4, 2**20),
    "relative_attention_max_distance": ("max_distance", 1, 2**31),
    "dropout_rate": ("dropout", 0.0, 1.0), "layer_norm_epsilon": ("eps", 0.0, 1.0),
    "pad_token_id": ("pad_id", -1, 2**31), "decoder_start_token_id": ("start_id", 0, 2**31),
}  # fmt: skip
LLAMA = {
    "hidden_size": ("d_model", 1, 2**20), "head_dim": ("d_head", 1, 2**20), "intermediate_size": ("d_ff", 1, 2**20),
    "num_hidden_layers": ("n_layers", 1, 2**10), "num_attention_heads": ("n_heads", 1, 2**20),
    "num_key_value_heads": ("n_kv_heads", 1, 2**20), "vocab_size": ("vocab_size", 1, 2**24),
    "max_position_embeddings": ("max_length", 1, 2**31), "rope_theta": ("rope_theta", 1.0, 1e30),
    "attention_dropout": ("dropout", 0.0, 1.0), "rms_norm_eps": ("eps", 0.0, 1.0),
}  # fmt: skip
LLAMA3_ROPE = {  # -> rope_scaling
    "factor": ("factor", 1.0, 1e9),
    "low_freq_factor": ("low", 0.0, 1e9),
    "high_freq_factor": ("high", 0.0, 1e9),
    "original_max_position_embeddings": ("original", 1, 2**31),
}
FEED_FORWARDS = {"relu": ("relu", False), "gated-gelu": ("gelu", True)}

# What transformers assumes where a key is absent, beside what our own classes do: a value, or that of another key.
DEFAULTS = {
    "t5": {"feed_forward_proj": "relu"},
    "mt5": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
            "scale_decoder_outputs": False},  # whatever is tied: transformers 5 saves every mT5 as tied
    "llama": {},
    "mistral": {"max_position_embeddings": 131072, "sliding_window": 4096, "num_key_value_heads": 8},
}  # fmt: skip
AS = {"num_decoder_layers": "num_layers", "decoder_start_token_id": "pad_token_id",
      "num_key_value_heads": "num_attention_heads"}  # fmt: skip
# The values under which the model is what this code computes; None: absent or null.
T5_SUPPORTED = {"feed_forward_proj": tuple(FEED_FORWARDS), "quantization_config": (None,)}
LLAMA_SUPPORTED = {  # Mistral is LLaMA, where it has no sliding window
    "hidden_act": ("silu", None), "attention_bias": (False, None), "mlp_bias": (False, None),
    "sliding_window": (None,), "partial_rotary_factor": (1.0, None), "num_local_experts": (0, None),
    "quantization_config": (None,), "rope_type": ("default", "llama3"),
}  # fmt: skip


def from_hf(raw):
    """A config.json as dict -> T5Config or LlamaConfig.

    Raises ValueError for another architecture, for features that this code does not have, and for numbers that are
    missing or out of range: all of them in one line.
    """
    kind = raw.get("model_type")
    if kind not in [*DEFAULTS]:  # a list, since `kind` may be unhashable
        raise ValueError(f"config.json: model_type is {kind!r}, but minia3 runs only {', '.join(DEFAULTS)}")
    t5 = kind in ("t5", "mt5")
    cls, table, supported = (T5Config, T5, T5_SUPPORTED) if t5 else (LlamaConfig, LLAMA, LLAMA_SUPPORTED)
    # Newer files have one dict for theta and the scaling, older ones two keys.
    rope = (not t5 and (raw.get("rope_scaling") or raw.get("rope_parameters"))) or {}
    rope = rope if isinstance(rope, dict) else {"rope_type": rope}
    known = {key: rope[key] for key in ("rope_type", "rope_theta", *LLAMA3_ROPE) if key in rope}
    raw = DEFAULTS[kind] | raw | {"rope_type": rope.get("type", "default")} | known
    refused = [f"{key}={raw.get(key)!r}" for key, values in supported.items() if raw.get(key) not in values]
    refused += [f"{key}={rope[key]!r}" for key in rope if key not in (*known, "type") and rope[key] not in (None, 1.0)]
    if refused:
        raise ValueError(f"config.json asks for what minia3 does not do: {', '.join(refused)}")
    ends = raw.get("eos_token_id", [*cls.eos_ids])  # null: no end token; absent: the default
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    raw = {key: value for key, value in raw.items() if value is not None}
    raw = {key: raw[other] for key, other in AS.items() if other in raw} | raw
    if "head_dim" not in raw and all(type(raw.get(key)) is int for key in ("hidden_size", "num_attention_heads")):
        raw["head_dim"] = raw["hidden_size"] // max(raw["num_attention_heads"], 1)
    table = table | LLAMA3_ROPE if raw["rope_type"] == "llama3" else table
    numbers = {ours: raw.get(key, getattr(cls, ours, None)) for key, (ours, _, _) in table.items()}
    faults = [] if all(type(i) is int for i in ends) else [f"eos_token_id is {ends!r}, expected whole numbers"]
    for key, (ours, least, most) in table.items():
        if type(numbers[ours]) not in (int, type(least)) or not least <= numbers[ours] <= most:
            what = "a whole number" if type(least) is int else "a number"
            faults.append(f"{key} is {numbers[ours]!r}, expected {what} from {least} to {most}")
    for key in ("tie_word_embeddings", "scale_decoder_outputs", "pad_token_id", "bos_token_id"):
        plain = int if key.endswith("_id") else bool
        if type(raw.get(key, plain())) is not plain:
            faults.append(f"{key} is {raw[key]!r}, expected {plain.__name__}")
    if t5 and not faults:
        if numbers["start_id"] >= numbers["vocab_size"] or numbers["max_distance"] <= numbers["n_buckets"] // 2:
            faults.append("expected decoder_start_token_id < vocab_size, max_distance > num_buckets / 2")
    elif not faults:
        heads, kv_heads, width = (numbers[ours] for ours in ("n_heads", "n_kv_heads", "d_head"))
        if heads % kv_heads or width % 2:
            faults.append(f"{kv_heads} key/value heads must divide {heads} heads, and head_dim {width} must be even")
    if faults:
        raise ValueError(f"config.json: {'; '.join(faults)}")
    tied = raw.get("tie_word_embeddings", t5)
    numbers |= {"own_head": not tied, "eos_ids": tuple(ends)}
    if t5:
        activation, gated = FEED_FORWARDS[raw["feed_forward_proj"]]
        scale = raw.get("scale_decoder_outputs", tied)
        return T5Config(**numbers, activation=activation, gated=gated, scale_logits=scale)
    scaling = tuple(numbers.pop(ours) for ours, _, _ in LLAMA3_ROPE.values() if ours in numbers) or None
    factors = tuple(raw["rope_factors"]) if "rope_factors" in raw else None  # of gguf_file alone
    ids = {"pad_id": raw.get("pad_token_id"), "bos_id": raw.get("bos_token_id")}
    return LlamaConfig(**numbers, **ids, rope_scaling=scaling, rope_factors=factors)


def to_hf(config, dtype):
    """Our config -> a config.json as dict, which transformers 4 and 5 read as the same model."""
    t5, ids = isinstance(config, T5Config), list(config.eos_ids)
    raw = {key: getattr(config, ours) for key, (ours, _, _) in (T5 if t5 else LLAMA).items()}
    raw |= {"torch_dtype": str(dtype).removeprefix("torch."), "tie_word_embeddings": not config.own_head}
    raw |= {"pad_token_id": config.pad_id, "eos_token_id": ids[0] if len(ids) == 1 else ids or None}
    if t5:
        forward = {pair: name for name, pair in FEED_FORWARDS.items()}[config.activation, config.gated]
        raw |= {"feed_forward_proj": forward, "scale_decoder_outputs": config.scale_logits, "is_encoder_decoder": True}
        # transformers 4 takes from tie_word_embeddings whether to scale, 5 from scale_decoder_outputs
        return raw | {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}
    if scaling := config.rope_scaling or _named_scaling(config):
        raw["rope_scaling"] = {"rope_type": "llama3", **dict(zip(LLAMA3_ROPE, scaling, strict=True))}
    raw |= {"hidden_act": "silu", "bos_token_id": config.bos_id}
    return raw | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def _named_scaling(config):
    """The llama3 scaling behind a GGUF's factors: config.json has no place for the factors themselves."""
    if config.rope_factors is None:
        return None
    found = inverse_frequencies(config)
    for scaling in ((8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192)):  # Llama 3.1 and 3.3; Llama 3.2
        if torch.allclose(found, inverse_frequencies(replace(config, rope_factors=None, rope_scaling=scaling)), 1e-5):
            return scaling
    raise ValueError("the rope factors of this GGUF are none of Llama 3.1's or 3.2's: config.json cannot express them")
