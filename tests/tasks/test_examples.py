"""Texts become ids, and a long input is encoded as it was cut."""

import pytest

from minia3.tasks.examples import Example, encode_example, encode_rows
from minia3.tasks.prompts import OWN_PROMPTS, Rendered, fit

# Ids and batches


class Letters:
    """A tokenizer of one id a letter; 1 ends whatever has an end."""

    def encode(self, text):
        return [ord(letter) for letter in text]

    def encode_target(self, text, end):
        return [ord(letter) for letter in text] + [1] * end


@pytest.mark.parametrize("end", [False, True])
def test_an_example_is_the_ids_of_its_texts(end):
    example = encode_example(Rendered("ab", ["c", "de"], 1), Letters(), end=end)
    assert example == Example([97, 98], [[99] + [1] * end, [100, 101] + [1] * end], 1)
