"""Texts become ids, and a long input is cut before its ids are used."""

import pytest

from minia3.tasks.examples import Example, encode_example, encode_rows
from minia3.tasks.prompts import OWN_PROMPTS, Rendered


class Letters:
    """A tokenizer with one id per letter. A target with an end token ends in 1. It counts the texts
    that it encodes.
    """

    def __init__(self):
        self.n_encoded = 0

    def encode_prompt(self, text):
        self.n_encoded += 1
        return [ord(letter) for letter in text]

    def encode_target(self, text, end):
        ids = [ord(letter) for letter in text]
        return [*ids, 1] if end else ids


def test_an_example_holds_the_ids_of_its_texts():
    rendered = Rendered("ab", ["c", "de"], 1)
    assert encode_example(rendered, Letters(), end=False) == Example(
        [97, 98], [[99], [100, 101]], 1
    )
    ended = Example([97, 98], [[99, 1], [100, 101, 1]], 1)
    assert encode_example(rendered, Letters(), end=True) == ended


@pytest.mark.parametrize("end", [False, True])
def test_rows_are_encoded_as_they_were_cut(end):
    rows = [
        {"input": "a bb c", "target": "x", "label": 0, "idx": 0},
        {"input": "a bb ccc dddd", "target": "y", "label": 0, "idx": 1},
    ]
    tokenizer = Letters()
    pairs = [(row, OWN_PROMPTS[0]) for row in rows]
    rendered, examples, n_cut = encode_rows(pairs, tokenizer, 10, end)
    assert [text.input for text in rendered] == ["a bb c", "a bb dddd"]
    assert examples == [encode_example(text, tokenizer, end) for text in rendered]
    assert n_cut == 1


def test_an_input_that_fits_is_encoded_once():
    tokenizer = Letters()
    row = {"input": "a", "target": "b", "label": 0, "idx": 0}
    encode_rows([(row, OWN_PROMPTS[0])], tokenizer, 10, end=False)
    assert tokenizer.n_encoded == 1
