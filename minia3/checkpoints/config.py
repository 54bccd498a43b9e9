"""To be written."""

from dataclasses import replace

import torch

from minia3.model.llama import LlamaConfig, inverse_frequencies
from minia3.model.t5 import T5Config

# fmt: off
T5 = {  # the numbers in config.json -> ours
    "d_model": "d_model", "d_kv": "d_head", "d_ff": "d_ff", "num_layers": "n_layers", "num_heads": "n_heads",
    "num_decoder_layers": "n_decoder_layers", "vocab_size": "vocab_size", "relative_attention_num_buckets": "n_buckets",
    "relative_attention_max_distance": "max_distance", "dropout_rate": "dropout", "layer_norm_epsilon": "eps",
    "pad_token_id": "pad_id", "decoder_start_token_id": "start_id",
}
LLAMA = {
    "hidden_size": "d_model", "head_dim": "d_head", "intermediate_size": "d_ff", "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads", "num_key_value_heads": "n_kv_heads", "vocab_size": "vocab_size",
    "max_position_embeddings": "max_length", "rope_theta": "rope_theta", "attention_dropout": "dropout",
    "rms_norm_eps": "eps",
}
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
LIMITS = {  # the least and the most; of other numbers 1 and 2**20, so that a lie in a file does not fill the memory
    "n_layers": (1, 2**10), "n_decoder_layers": (1, 2**10), "n_buckets": (4, 2**20), "max_length": (1, 2**31),
    "pad_id": (-1, 2**31), "start_id": (0, 2**31), "dropout": (0.0, 1.0), "eps": (0.0, 1.0),
    "rope_theta": (1.0, 1e30), "factor": (1.0, 1e9), "low_freq_factor": (0.0, 1e9), "high_freq_factor": (0.0, 1e9),
}
DEFAULTS = {  # what transformers assumes where a key is absent, beside what our own classes do
    "t5": {},
    "mt5": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
            "scale_decoder_outputs": False},  # whatever is tied: transformers 5 saves every mT5 as tied
    "llama": {},
    "mistral": {"max_position_embeddings": 131072, "sliding_window": 4096, "num_key_value_heads": 8},
}
AS = {"num_decoder_layers": "num_layers", "decoder_start_token_id": "pad_token_id",
      "num_key_value_heads": "num_attention_heads"}  # absent, it is as that one
SUPPORTED = {  # the values under which the model is what this code computes; None: absent or null
    "feed_forward_proj": ("relu", "gated-gelu", None), "hidden_act": ("silu", None), "attention_bias": (False, None),
    "mlp_bias": (False, None), "partial_rotary_factor": (1.0, None), "num_local_experts": (0, None),
    "quantization_config": (None,), "rope_type": ("default", "llama3"),
    "tie_word_embeddings": (True, False, None), "scale_decoder_outputs": (True, False, None),
    "sliding_window": (None,),  # Mistral is LLaMA, where it has none
}


def from_hf(raw):
    """A config.json as dict -> T5Config or LlamaConfig.

    Raises ValueError for an architecture or features that this code lacks, or for all numbers missing or out of range.
    """
    kind = raw.get("model_type")
    if kind not in [*DEFAULTS]:  # a list, since `kind` may be unhashable
        raise ValueError(f"config.json: model_type is {kind!r}, but minia3 runs only {', '.join(DEFAULTS)}")
    t5 = kind in ("t5", "mt5")
    cls, table = (T5Config, T5) if t5 else (LlamaConfig, LLAMA)
    # Newer files have one dict for theta and the scaling, older ones two keys.
    rope = (not t5 and (raw.get("rope_scaling") or raw.get("rope_parameters"))) or {}
    rope = rope if isinstance(rope, dict) else {"rope_type": rope}
    known = {key: rope[key] for key in ("rope_type", "rope_theta", *LLAMA3_ROPE) if key in rope}
    raw = DEFAULTS[kind] | raw | {"rope_type": rope.get("type", "default")} | known
    refused = [f"{key}={raw.get(key)!r}" for key, values in SUPPORTED.items() if raw.get(key) not in values]
    refused += [f"{key}={rope[key]!r}" for key in rope if key not in (*known, "type") and rope[key] not in (None, 1.0)]
    act = "gelu_new" if raw.get("feed_forward_proj") == "gated-gelu" else "relu"  # as transformers derives it
    refused += [f"dense_act_fn={raw['dense_act_fn']!r}"] if t5 and raw.get("dense_act_fn") not in (None, act) else []
    if refused:
        raise ValueError(f"config.json asks for what minia3 does not do: {', '.join(refused)}")
    ends = raw.get("eos_token_id", [*cls.eos_ids])  # null: no end token; absent: the default
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    raw = {key: value for key, value in raw.items() if value is not None}
    raw = {key: raw[other] for key, other in AS.items() if other in raw} | raw
    if "head_dim" not in raw and all(type(raw.get(key)) is int for key in ("hidden_size", "num_attention_heads")):
        raw["head_dim"] = raw["hidden_size"] // max(raw["num_attention_heads"], 1)
    table = table | {key: key for key in LLAMA3_ROPE} if raw["rope_type"] == "llama3" else table
    n = {ours: raw.get(key, getattr(cls, ours, None)) for key, ours in table.items()}  # the numbers
    ids = {"eos_token_id": ends, **{x: [raw[x]] for x in ("pad_token_id", "bos_token_id") if x in raw.keys() - table}}
    faults = [f"{x} is {ids[x]!r}, expected whole numbers" for x in ids if not all(type(i) is int for i in ids[x])]
    for key, ours in table.items():
        least, most = LIMITS.get(ours, (1, 2**20))
        if type(n[ours]) not in (int, type(least)) or not least <= n[ours] <= most:
            what = "a whole number" if type(least) is int else "a number"
            faults.append(f"{key} is {n[ours]!r}, expected {what} from {least} to {most}")
    if not faults and t5 and (n["start_id"] >= n["vocab_size"] or n["max_distance"] <= n["n_buckets"] // 2):
        faults.append("expected decoder_start_token_id < vocab_size, max_distance > num_buckets / 2")
    if not faults and not t5 and (n["n_heads"] % n["n_kv_heads"] or n["d_head"] % 2):
        faults.append("{n_kv_heads} key/value heads must divide {n_heads} heads, head_dim {d_head} be even".format(**n))
    if not faults and n.get("low_freq_factor", 0) > n.get("high_freq_factor", 1):
        faults.append("low_freq_factor must not be above high_freq_factor")
    if faults:
        raise ValueError(f"config.json: {'; '.join(faults)}")
    tied = raw.get("tie_word_embeddings", t5)
    n |= {"own_head": not tied, "eos_ids": tuple(ends)}
    if t5:
        gated, scale = raw.get("feed_forward_proj") == "gated-gelu", raw.get("scale_decoder_outputs", tied)
        return T5Config(**n, activation="gelu" if gated else "relu", gated=gated, scale_logits=scale)
    scaling = tuple(n.pop(key) for key in LLAMA3_ROPE if key in n) or None
    factors = raw["rope_factors"] if isinstance(raw.get("rope_factors"), tuple) else None  # JSON has none: of gguf_file
    ids = {"pad_id": raw.get("pad_token_id"), "bos_id": raw.get("bos_token_id")}
    return LlamaConfig(**n, **ids, rope_scaling=scaling, rope_factors=factors)




def to_hf(config, dtype):
    """Our config -> a config.json as dict, which transformers 4 and 5 read as the same model."""
    t5, ids = isinstance(config, T5Config), list(config.eos_ids)
    raw = {key: getattr(config, ours) for key, ours in (T5 if t5 else LLAMA).items()}
    raw |= {"torch_dtype": str(dtype).removeprefix("torch."), "tie_word_embeddings": not config.own_head}
    raw |= {"pad_token_id": config.pad_id, "eos_token_id": ids[0] if len(ids) == 1 else ids or None}
    if t5:
        raw |= {"feed_forward_proj": "gated-gelu" if config.gated else "relu", "is_encoder_decoder": True}
        raw |= {"scale_decoder_outputs": config.scale_logits}  # transformers 4 takes this from tie_word_embeddings
        return raw | {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}
    if config.rope_factors:  # of a GGUF; config.json has a place only for the scaling behind them: Llama 3.1's or 3.2's
        known = [replace(config, rope_factors=None, rope_scaling=(factor, 1.0, 4.0, 8192)) for factor in (8.0, 32.0)]
        fits = [c for c in known if torch.allclose(inverse_frequencies(c), inverse_frequencies(config), 1e-5)]
        if not fits:
            raise ValueError("these rope factors are none of Llama 3.1's or 3.2's: config.json cannot express them")
        config = fits[0]
    if config.rope_scaling:
        raw["rope_scaling"] = {"rope_type": "llama3", **dict(zip(LLAMA3_ROPE, config.rope_scaling, strict=True))}
    raw |= {"hidden_act": "silu", "bos_token_id": config.bos_id}
    return raw | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
