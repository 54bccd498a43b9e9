"""A tokenizer of words for the random models of conftest.py: "w7 w9" is 7 9, so that texts are ids that can be read."""

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from minia3.checkpoints.tokenizer import Tokenizer

N_IDS = 61
PAD, END = 0, 1


def word_tokenizer(ends):
    """`ends`: T5's, with </s> behind every text; otherwise nothing is added, as with SmolLM2."""
    vocab = {"<pad>": PAD, "</s>": END, "a": 2} | {f"w{i}": i for i in range(3, N_IDS)}
    backend = Backend(models.WordLevel(vocab, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Tokenizer(backend, {"pad_token": "<pad>", "eos_token": "</s>", "add_eos_token": ends})


def texts(n, seed=0, longest=9):
    """`n` texts of 1 to `longest` words."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (n,), generator=g).tolist()
    return [
        " ".join(f"w{i}" for i in torch.randint(3, N_IDS, (length,), generator=g).tolist())
        for length in lengths
    ]
