"""Random models of words ("w7 w9" is 7 9) and what transformers makes of the same texts."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from words import PAD, texts, word_tokenizer

import minia3
from minia3.checkpoints.tokenizer import Tokenizer

KINDS = ["t5-v1.1", "llama-gqa"]
EOS = (1, 16, 28)  # </s>, and two ordinary words

PROMPTS = texts(11)
CHOICES = texts(4, seed=1, longest=3)
LISTS = [texts(1 + i % 4, seed=i, longest=3) for i in range(len(PROMPTS))]
ADAPTERS = torch.tensor([0, 2, 1, 1, 0, 2, 2, 0, 1, 0, 2])


@dataclass
class WordModel:
    """A model of ours, its tokenizer, and the Peer that has its base weights."""

    name: str
    is_t5: bool
    peer: Any
    model: Any
    tokenizer: Any


def word_model(name, peer, loaded):
    """Return a WordModel with three adapters, of which row 0 is ones, and several end tokens."""
    is_t5 = name.startswith("t5")
    model = loaded(name, n_adapters=3, seed=0)
    model.config = replace(model.config, eos_ids=EOS)
    for vector in minia3.vectors(model).values():
        vector.data[0] = 1.0
    return WordModel(name, is_t5, peer(name), model, word_tokenizer(is_t5))


def peer_logprobs(both, source, target):
    """Return the log-probability of each id of `target` after `source`, two lists."""
    logits = both.peer.logits(torch.tensor([source]), None, torch.tensor([target]))[0, :-1]
    return logits.log_softmax(-1)[torch.arange(len(target)), target]


def peer_score(both, prompt, choice, length_norm=True):
    """Return a choice's score. It is encoded here: T5's choices end in </s>, LLaMA's do not."""
    source = word_ids(prompt)
    target = word_ids(choice)
    if both.is_t5:
        source.append(1)
        target.append(1)
    logp = peer_logprobs(both, source, target)
    return (logp.mean() if length_norm else logp.sum()).item()


def word_ids(text):
    return [int(word[1:]) for word in text.split()]


def peer_text(both, prompt, max_new_tokens):
    """Return the greedy text after a prompt, and whether it came to an end token."""
    source = torch.tensor([both.tokenizer.encode(prompt)])
    rows = both.peer.model.generate(
        source,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(EOS),
        pad_token_id=PAD,
    )
    n_start = 1 if both.is_t5 else source.shape[1]
    ids = rows[0, n_start:].tolist()
    written = until_end(ids)
    return both.tokenizer.decode(written), len(written) < len(ids)


def new_ids(rows, model, source):
    """Return the new ids, without the end token, of what transformers' generate returns."""
    n_start = 1 if model.config.is_encoder_decoder else source.shape[1]
    return [until_end(row) for row in rows[:, n_start:].tolist()]


def until_end(ids):
    """Return the ids before the first end token."""
    for i, token in enumerate(ids):
        if token in EOS:
            return ids[:i]
    return ids


def adapters_of_steps(model, monkeypatch):
    """Return a list that grows with each step: the adapters of the rows in its batch."""
    steps = []
    step = model.step

    def record(tokens, state):
        steps.append(state.adapter_B.tolist())
        return step(tokens, state)

    monkeypatch.setattr(model, "step", record)
    return steps


def model_of_many(name, loaded):
    """Return a model with 40 random adapters and several end tokens."""
    model = loaded(name, n_adapters=40, seed=1)
    model.config = replace(model.config, eos_ids=EOS)
    return model


def byte_tokenizer():
    """Return a byte-level BPE tokenizer with <s> in front, as Llama 3 has it."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(
        ["Is it true or false ? It is true . The answer is False , not True ."] * 2, trainer
    )
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True})
