"""To be written."""

from functools import lru_cache
from typing import NamedTuple

from minia3.tasks.prompts import Rendered, fit


class Example(NamedTuple):
    source: list[int]
    targets: list[list[int]]
    label: int


def encode_example(
    rendered: Rendered, tokenizer, end: bool, source: list[int] | None = None
) -> Example:
    """Texts to ids. `end`: whether a LLaMA's targets get the end token (T5's always have it). `source`: if known."""
    targets = [tokenizer.encode_target(choice, end=end) for choice in rendered.choices]
    return Example(source or tokenizer.encode(rendered.input), targets, rendered.label)


def encode_rows(pairs, tokenizer, max_length, end):
    """(row, prompt) pairs -> (their Rendered texts, their Examples, how many had to be cut to `max_length` tokens)."""
    encode, rendered, examples, n_cut = lru_cache(1)(tokenizer.encode), [], [], 0
    for row, prompt in pairs:
        text, cut = fit(prompt, row, lambda text: len(encode(text)), max_length)
        rendered.append(text)
        examples.append(
            encode_example(text, tokenizer, end, encode(text.input))
        )  # the last that `fit` has counted
        n_cut += cut
    return rendered, examples, n_cut
