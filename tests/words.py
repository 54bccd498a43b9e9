"""A tokenizer of words for the random models of conftest.py.

"w7 w9" is [7, 9], so that a text shows its ids.
"""

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from minia3.checkpoints.tokenizer import Tokenizer

N_IDS = 61
PAD = 0
END = 1


def word_tokenizer(ends, **settings):
    """Return the tokenizer. If `ends`, it ends every text with </s> (T5), else it adds nothing.

    settings: more of them, as model_type="llama".
    """
    vocabulary = {"<pad>": PAD, "</s>": END, "a": 2}
    for i in range(3, N_IDS):
        vocabulary[f"w{i}"] = i
    backend = Backend(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "add_eos_token": ends}
    return Tokenizer(backend, special | settings)


def texts(n, seed=0, longest=9):
    """Return `n` random texts of 1 to `longest` words."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (n,), generator=generator).tolist()
    return [random_text(length, generator) for length in lengths]


def random_text(length, generator):
    ids = torch.randint(3, N_IDS, (length,), generator=generator).tolist()
    return " ".join(f"w{i}" for i in ids)
