"""Guards what is checked between text and model: ids, lengths, and what a tokenizer can write."""

import os
from pathlib import Path

import pytest
from words import N_IDS, word_tokenizer

import minia3
from minia3.tasks.examples import Example
from minia3.tasks.limits import (
    check_ids,
    equal_choices,
    fit_all_targets,
    fit_targets,
    loses_characters,
    written_target,
)

DATA = os.environ.get("MINIA3_TEST_DATA")


@pytest.fixture(scope="module")
def t5_tokenizer():
    if DATA is None:
        pytest.skip("MINIA3_TEST_DATA is not set")
    return minia3.load_tokenizer(Path(DATA, "tokenizers", "t5-base"))


# Ids


@pytest.mark.parametrize(("source", "targets"), [([4, 61], [[5]]), ([4], [[5], [6, 61, 7]])])
def test_an_id_without_an_embedding_is_refused_by_its_token(source, targets):
    tokenizer = word_tokenizer(ends=False)
    tokenizer.backend.add_special_tokens(["<new>"])
    example = Example(source, targets, 0)
    with pytest.raises(ValueError, match=r"token '<new>' with the id 61, .* ends at 60: remove"):
        check_ids(example, N_IDS, tokenizer)
    check_ids(example, N_IDS + 1, tokenizer)


def test_a_row_without_targets_or_tokens_has_no_bad_ids():
    check_ids(Example([4], [], -1), N_IDS, word_tokenizer(ends=False))
    check_ids(Example([], [[]], -1), N_IDS, word_tokenizer(ends=False))


# Lengths


def test_a_long_target_keeps_its_beginning_without_the_end_token():
    example = Example([4], [[5, 6, 7, 1]], 0)
    assert fit_targets(example, 4, are_choices=False) == (example, False)
    assert fit_targets(example, None, are_choices=False) == (example, False)
    assert fit_targets(example, 2, are_choices=False) == (Example([4], [[5, 6]], 0), True)


def test_a_conversation_is_not_cut_again():
    """So `is_scored` is always as long as the target."""
    example = Example([4], [[5, 6, 7]], 0, [True, False, True])
    assert fit_targets(example, 2, are_choices=False) == (example, False)


def test_a_long_choice_is_an_error_that_names_the_row():
    rows = [{"idx": 3}, {"idx": 8}]
    short = Example([4], [[5], [6]], 0)
    with pytest.raises(ValueError, match=r"^row 8: a choice has 50,000 tokens, .*at most 512: "):
        fit_all_targets(rows, [short, Example([4], [[5], [6] * 50_000], 0)], 512, are_choices=True)
    assert fit_all_targets(rows, [short, short], 512, are_choices=True) == ([short, short], 0)


def test_a_long_choice_is_not_cut_even_if_it_is_the_only_one():
    example = Example([4], [[5, 6, 7, 1]], 0)
    assert fit_targets(example, 4, are_choices=True) == (example, False)
    with pytest.raises(ValueError, match=r"^a choice has 4 tokens, expected at most 2: "):
        fit_targets(example, 2, are_choices=True)


def test_targets_that_are_cut_are_counted():
    examples = [Example([4], [[5] * n], 0) for n in (1, 9, 3, 4)]
    rows = [{"idx": i} for i in range(4)]
    fitted, n_cut = fit_all_targets(rows, examples, 3, are_choices=False)
    assert n_cut == 2
    assert [len(example.targets[0]) for example in fitted] == [1, 3, 3, 3]


# Texts that a tokenizer cannot write


def test_choices_that_are_one_text_to_the_tokenizer_are_found(t5_tokenizer):
    def places(*choices):
        targets = [t5_tokenizer.encode_target(choice, end=False) for choice in choices]
        return equal_choices(Example([4], targets, 0))

    assert places("x", "a\nb", "c", "a b") == (1, 3)
    assert places("a b", "a  b") == (0, 1)
    assert places("a b", "ab", "b") is None


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("red green\nblue", "red green blue"),
        ("a  b\tc", "a b c"),
        ("x {y} < ~", "x y"),
        ("\ufb01ne", "fine"),
        ("\uff11\uff12", "12"),
        ("e\u0301te\u0301", "\u00e9t\u00e9"),
    ],
)
def test_targets_that_t5_cannot_write_are_compared_as_it_writes_them(text, written, t5_tokenizer):
    assert written_target(text, t5_tokenizer) == written
    assert loses_characters(text, t5_tokenizer)


@pytest.mark.parametrize("text", ["Hello world", " don't . stop , ", "\u00e9t\u00e9"])
def test_other_targets_lose_nothing(text, t5_tokenizer):
    assert written_target(text, t5_tokenizer) == text.strip()
    assert not loses_characters(text, t5_tokenizer)


def test_a_target_of_which_nothing_is_left_stays_itself(t5_tokenizer):
    assert written_target("\u65e5\u672c", t5_tokenizer) == "\u65e5\u672c"
    assert loses_characters("\u65e5\u672c", t5_tokenizer)
