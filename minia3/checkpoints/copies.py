"""Some checkpoints store the embedding several times, and some store it under an unusual name.

The embedding of a tied model is also its head, and the embedding of a T5 serves both encoder and
decoder. Files hold such a matrix once or up to four times, because torch's `state_dict` lists a
shared parameter under each of its names.
"""

import torch

from minia3.model.t5 import T5Config


def keep_one_embedding(entries, config, path):
    """Return `entries` (name -> Entry) with the embedding once, and under its usual name.

    A `lm_head.weight` that differs from the embedding stays even if the config says that the head
    is tied, because transformers, too, believes the file. Raises ValueError if the encoder's or the
    decoder's copy differs.
    """
    if isinstance(config, T5Config):
        usual = "shared.weight"
        inputs = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    else:
        usual = "model.embed_tokens.weight"
        inputs = []
    # A head of its own may equal the embedding by chance or before training, but it is not a copy.
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
    """Return whether two entries hold the same tensor. Read them only if they look the same."""
    if entry.shape != other.shape or entry.dtype != other.dtype:
        return False
    return torch.equal(entry.read(), other.read())
