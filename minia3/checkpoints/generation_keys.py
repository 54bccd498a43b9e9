"""The keys that say how a model writes, in generation_config.json or in an older config.json.

They are of four kinds:

    tokens that begin or end a text         used
    how tokens are searched or drawn        passed over: the arguments of `generate` say it
    what `generate` cannot do, such as a    a warning names it, because the model's logits are the
    penalty for repetitions                 same, and training and ranking do not need it
    tokens that are forced or forbidden     refused, because the model was made to write with them
"""

import warnings

from minia3.files.read import read_json

# Keys of generation_config.json that win over those of config.json
USED = ("eos_token_id", "decoder_start_token_id")

# The arguments of `generate` take the place of these.
STRATEGY = (
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "top_h",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "num_beams",
    "early_stopping",
    "length_penalty",
    "num_return_sequences",
    "max_length",
    "max_new_tokens",
    "max_time",
    "renormalize_logits",
    "remove_invalid_values",
)

# What `generate` does not do -> the values that ask for nothing. (0 equals False.)
NOT_DONE = {
    "repetition_penalty":               (None, 1.0),
    "encoder_repetition_penalty":       (None, 1.0),
    "no_repeat_ngram_size":             (None, 0),
    "encoder_no_repeat_ngram_size":     (None, 0),
    "min_length":                       (None, 0),
    "min_new_tokens":                   (None, 0),
    "exponential_decay_length_penalty": (None,),
    "stop_strings":                     (None, []),
    "guidance_scale":                   (None, 1.0),
    "penalty_alpha":                    (None, 0.0),
    "dola_layers":                      (None,),
    "num_beam_groups":                  (None, 1),
    "diversity_penalty":                (None, 0.0),
    "token_healing":                    (None, False),
    "watermarking_config":              (None,),
}  # fmt: skip

# What makes the model write other tokens than its logits say -> the values that ask for nothing
REFUSED = {
    "forced_bos_token_id":   (None,),
    "forced_eos_token_id":   (None,),
    "forced_decoder_ids":    (None, []),
    "suppress_tokens":       (None, []),
    "begin_suppress_tokens": (None, []),
    "bad_words_ids":         (None, []),
    "force_words_ids":       (None, []),
    "constraints":           (None, []),
    "sequence_bias":         (None, {}, []),
}  # fmt: skip

ALL = (*STRATEGY, *NOT_DONE, *REFUSED)

# What a model that was made of another one hands on. Qwen's config.json, for example, has no token
# that pads.
HANDED_ON = (*STRATEGY, *NOT_DONE, "pad_token_id", "bos_token_id")


def check_generation_keys(raw, origin):
    """Raise ValueError if `raw` forces or forbids tokens. Warn of what `generate` does not do.

    raw: the content of generation_config.json or config.json. origin: its name, for the messages.
    """
    refused = other_values(raw, REFUSED)
    if refused:
        raise ValueError(f"{origin} asks for what minia3 does not support: {refused}")
    not_done = other_values(raw, NOT_DONE)
    if not_done:
        effect = "generate writes without it; logits and training are the same"
        warnings.warn(f"{origin} asks for {not_done}: {effect}", stacklevel=2)


def other_values(raw, neutral):
    """Return the keys of `raw` whose values are not among the neutral ones, as one text."""
    return ", ".join(
        f"{key}={raw[key]!r:.80}" for key, values in neutral.items() if raw.get(key) not in values
    )


def generation_settings(raw, config, origin):
    """Return the settings of generation_config.json that win over those of config.json.

    raw: its content. config: the content of config.json. Raise ValueError if it asks for what is
    not supported, or if both files name a decoder_start_token_id, and not the same: transformers
    would train with one and generate with the other.
    """
    check_generation_keys(raw, origin)
    settings = {key: raw[key] for key in USED if raw.get(key) is not None}
    start = settings.get("decoder_start_token_id")
    other_start = config.get("decoder_start_token_id")
    if start is not None and other_start is not None and start != other_start:
        expected = f"the {other_start!r} of config.json"
        raise ValueError(f"{origin}: decoder_start_token_id is {start!r:.80}, expected {expected}")
    return settings


def read_defaults(folder):
    """Return how a model writes by default: with which strategy, and which tokens begin and pad.

    We pass over these keys, but `save_model` hands them on: transformers and servers read them.
    folder: of a model. They are in generation_config.json. Older models have them in config.json,
    which transformers reads if there is no other file. The dict is empty for a .gguf file.
    """
    for name in ("generation_config.json", "config.json"):
        if (folder / name).exists():
            raw = read_json(folder / name)
            return {key: raw[key] for key in HANDED_ON if raw.get(key) is not None}
    return {}
