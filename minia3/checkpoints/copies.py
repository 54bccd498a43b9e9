"""Keep one copy of the embedding, because some checkpoints store it several times.

The embedding of a tied model is also its head, and the embedding of a T5 serves both the encoder
and the decoder. Files hold such a matrix one to four times, because torch's `state_dict` lists a
shared parameter under each of its names. Other files hold it once, but under an unusual name.
"""

import torch

from minia3.model.t5 import T5Config


def keep_one_embedding(entries, config, path):
    """Return `entries` (name -> Entry) with the embedding only once, under its usual name.

    An `lm_head.weight` that differs from the embedding stays even if the config says that the head
    is tied, because transformers also trusts the file. Raise ValueError if the copy of the encoder
    or of the decoder differs.
    """
    if isinstance(config, T5Config):
        usual = "shared.weight"
        inputs = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    else:
        usual = "model.embed_tokens.weight"
        inputs = []
    # Keep an untied head even if it equals the embedding, as it may before training: it is a
    # parameter of its own.
    copies = inputs if config.own_head else [*inputs, "lm_head.weight"]

    kept = dict(entries)
    found = [name for name in copies if name in kept]
    if usual not in kept and found:
        kept[usual] = kept.pop(found.pop(0))
    for name in found:
        if is_copy(kept[name], kept[usual]):
            del kept[name]
        elif name in inputs:
            raise ValueError(f"{path}: {name} is not the copy of {usual} that it should be")
    return kept


def is_copy(entry, other):
    """Return whether two entries hold equal tensors. Read them only if shape and dtype match."""
    if entry.shape != other.shape or entry.dtype != other.dtype:
        return False
    return torch.equal(entry.read(), other.read())
