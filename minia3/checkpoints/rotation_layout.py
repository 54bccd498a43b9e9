"""The order of rows in W_q and W_k: the most dangerous difference between the file formats of
LLaMA.

Rotary embeddings turn the entries of a head in pairs. Which two entries make a pair is a
convention:

    Meta, llama.cpp             neighbors    (0, 1) (2, 3) (4, 5) ...
    Hugging Face, and minia3    halves        (0, d/2) (1, d/2 + 1) (2, d/2 + 2) ...

A score is a sum over entries, so the order of entries within a head does not matter, provided that
queries and keys have the same order and that the same two entries still turn together. So a file of
one convention becomes a file of the other if the rows of W_q and W_k change places within each
head. For a head of 6 rows:

    in the file    a0 b0 a1 b1 a2 b2      here    a0 a1 a2 b0 b1 b2      (ai and bi turn together)

If the rows are left as they are, the model still writes fluent text, only worse text. So tests
compare logits and not texts.

Only `read_gguf` and `read_meta` call this. Tensors in Hugging Face's layout are never permuted, and
llama.cpp keeps that layout for Qwen.
"""

from minia3.files.tensors import Entry


def neighbors_to_halves(entries, n_heads, n_kv_heads):
    """Return `entries` with the rows of every W_q and W_k (and bias) in the order of halves.

    entries: a dict from Hugging Face's names to Entries with rows in the order of neighbors.
    Nothing is read now. The rows change places when an Entry is read, after its shape was checked.
    """
    permuted = {}
    for name, entry in entries.items():
        if "q_proj." in name:
            permuted[name] = with_halves(entry, n_heads)
        elif "k_proj." in name:
            permuted[name] = with_halves(entry, n_kv_heads)
        else:
            permuted[name] = entry
    return permuted


def with_halves(entry, n_heads):
    """Return an Entry with the rows of `entry`, in the order of halves within each head."""

    def read():
        weight = entry.read()
        pairs = weight.unflatten(0, (n_heads, -1, 2))  # (n_heads, d/2, 2, ...)
        return pairs.transpose(1, 2).reshape(entry.shape)

    return Entry(entry.shape, entry.dtype, read)
