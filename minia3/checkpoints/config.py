"""Translate Hugging Face's config.json into our configs, and back.

A model that is computed almost right is worse than no model. So if a setting changes the
computation and is not implemented here, it is refused by name. If a file leaves out a key, the key
has the value that transformers assumes.

Each architecture has a module with the tables of its keys: config_t5.py and config_llama.py. Both
work in these steps:

    1. refuse settings that are not supported
    2. fill in defaults
    3. check ids and numbers
    4. make a T5Config or a LlamaConfig
"""

from minia3.checkpoints import config_llama, config_t5
from minia3.checkpoints.nf4_files import check_quantization
from minia3.model.t5 import T5Config


def from_hf(raw, origin="config.json"):
    """Return the T5Config or LlamaConfig that a config.json describes. `raw` is its content.

    origin: the name of the file, for warnings. A key that nobody knows is a warning.

    Raise ValueError if the architecture or a feature is not supported, or if values are missing, of
    the wrong type or out of range. One message names them all.
    """
    check_quantization(raw.get("quantization_config"))
    model_type = raw.get("model_type")
    # Lists, because a damaged model_type may be unhashable.
    if model_type in list(config_t5.DEFAULTS):
        return config_t5.from_hf(raw, origin)
    if model_type in list(config_llama.DEFAULTS):
        return config_llama.from_hf(raw, origin)
    known = ", ".join([*config_t5.DEFAULTS, *config_llama.DEFAULTS])
    raise ValueError(f"config.json: model_type is {model_type!r:.80}, but minia3 runs only {known}")


def to_hf(config, dtype):
    """Return the content of a config.json that transformers 5 reads as the same model.

    Version 4 does, too, except for a T5 that is tied and does not scale its logits, or has a head
    of its own and scales them, because version 4 does not read scale_decoder_outputs.

    Raise ValueError if the rope factors (of a GGUF file) are neither Llama 3.1's nor 3.2's.
    """
    module = config_t5 if isinstance(config, T5Config) else config_llama
    raw = module.to_hf(config)
    raw["torch_dtype"] = str(dtype).removeprefix("torch.")
    raw["tie_word_embeddings"] = not config.own_head
    raw["pad_token_id"] = config.pad_id
    # Many programs expect a single id instead of a list with one id. None: no id ends a text.
    ids = list(config.eos_ids)
    raw["eos_token_id"] = ids[0] if len(ids) == 1 else ids or None
    return raw
