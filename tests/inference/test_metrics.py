"""Guards the metrics: they are what their definitions say."""

import itertools
import math
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minia3.inference.metrics import (
    CHOICE_METRICS,
    INVERSE_PERPLEXITY,
    PACKAGES,
    TEXT_METRICS,
    area_under_curve,
    bleu,
    check_package,
    exact_match,
    has_rouge_words,
    inverse_perplexity,
    macro_f1,
    perplexity,
    rouge_l,
    token_f1,
)
from minia3.tasks.task import METRICS


def share_of_pairs(positive, negative):
    """Return the share of pairs that are in order. A tie is a half."""
    wins = 0.0
    for p, n in itertools.product(positive, negative):
        wins += (p > n) + (p == n) / 2
    return wins / (len(positive) * len(negative))


SCORES = st.lists(st.integers(-3, 3) | st.floats(-3, 3), min_size=1, max_size=30)


@settings(deadline=None)
@given(SCORES, SCORES)
def test_the_area_under_the_curve_is_the_share_of_pairs_in_order_and_a_tie_is_a_half(
    positive, negative
):
    found = area_under_curve(np.array(positive, dtype=float), np.array(negative, dtype=float))
    assert found == pytest.approx(share_of_pairs(positive, negative))


def test_macro_f1_is_the_mean_over_labels_by_hand():
    """2 (found and right) / (found + right) is 2/4, 0/1 and 4/5."""
    found = np.array([0, 0, 2, 2, 1])
    right = np.array([0, 2, 2, 2, 0])
    expected = (2 * 1 / (2 + 2) + 2 * 0 / (1 + 0) + 2 * 2 / (2 + 3)) / 3
    assert macro_f1(found, right) == pytest.approx(expected)
    assert macro_f1(right, right) == 1.0


def test_a_label_that_is_neither_found_nor_right_does_not_count():
    assert macro_f1(np.array([0, 2]), np.array([0, 2])) == 1.0
    assert macro_f1(np.array([0, 0]), np.array([0, 2])) == pytest.approx((2 / 3 + 0) / 2)


# Texts

TEXTS = ["The cat sat on the mat.", "nothing in common", "", "a b c d e f", "Paris, France!"]
TARGETS = ["A cat sat on a mat", "other words here", "something", "a b x d e f", "paris france"]


def test_exact_match_ignores_white_space_at_the_ends_only():
    assert exact_match([" yes\n", "yes", "Yes", "y es"], ["yes", "yes ", "yes", "yes"]) == 0.5


@pytest.mark.parametrize(
    ("text", "target", "expected"),
    [
        ("The cat sat!", "a CAT sat", 1),  # case, articles and punctuation do not count
        ("cat cat dog", "cat dog dog", 2 * 2 / (3 + 3)),  # a word counts as often as it is shared
        ("cat cat dog", "cat cat bird", 2 * 2 / (3 + 3)),
        ("one two", "two three four five", 2 * 1 / (2 + 4)),
        ("one", "two", 0),
        ("an apple", "apple", 1),
        ("the", "a", 1),  # nothing is left of either
        ("the", "two", 0),
        ("it's state-of-art", "its stateofart", 1),
    ],
)
def test_token_f1_is_that_of_squad_by_hand(text, target, expected):
    assert token_f1([text], [target]) == pytest.approx(expected)
    assert token_f1([text, "x"], [target, "y"]) == pytest.approx(expected / 2)


def test_rouge_l_is_the_mean_of_rouge_score():
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="needs the extra metrics")
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    expected = []
    for text, target in zip(TEXTS, TARGETS, strict=True):
        expected.append(scorer.score(target=target, prediction=text)["rougeL"].fmeasure)
    assert rouge_l(TEXTS, TARGETS) == pytest.approx(np.mean(expected))
    # By hand: the longest common subsequence of "a b c d" and "a c e d" has three words.
    assert rouge_l(["a b c d"], ["a c e d"]) == pytest.approx(3 / 4)
    assert rouge_l(["he runs"], ["he running"]) == pytest.approx(1 / 2), "words, not their stems"
    for text in ("Москва", "漢字", "été", "7", "A", "!"):
        assert rouge_l([text], [text]) == has_rouge_words(text)


def test_bleu_is_sacrebleu_s_of_the_whole_corpus():
    sacrebleu = pytest.importorskip("sacrebleu", reason="needs the extra metrics")
    expected = sacrebleu.BLEU().corpus_score(TEXTS, [TARGETS]).score
    assert bleu(TEXTS, TARGETS) == pytest.approx(expected / 100)
    assert bleu(TARGETS, TARGETS) == pytest.approx(1)
    assert bleu(["a b c d e"], ["a b c d e"]) == 1  # sacrebleu says 100.00000000000004


@pytest.mark.parametrize(("metric", "package"), [("rouge_l", "rouge_score"), ("bleu", "sacrebleu")])
def test_a_missing_package_is_one_line_that_names_the_extra(metric, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"^{metric}: .*pip install 'minia3\[metrics\]'$"):
        check_package(metric)


def test_packages_are_loaded_only_for_their_metrics(monkeypatch):
    for package in ("rouge_score", "sacrebleu"):
        monkeypatch.setitem(sys.modules, package, None)
    for metric in itertools.chain(*METRICS.values()):
        if metric not in PACKAGES:
            check_package(metric)


# Likelihoods


def test_the_inverse_perplexity_is_one_over_the_exponential_of_the_mean_loss_over_tokens():
    value = inverse_perplexity(np.array([-1.0, -5.0]), np.array([1, 3]))
    assert value == pytest.approx(math.exp(-6 / 4))
    assert perplexity(value) == pytest.approx(math.exp(6 / 4))


def test_a_target_that_a_model_rules_out_has_no_perplexity():
    assert inverse_perplexity(np.array([-1e6]), np.array([1])) == 0
    assert perplexity(0.0) is None


def test_the_metrics_of_each_kind_of_rows_are_the_metrics_that_there_are():
    found = {*CHOICE_METRICS, *TEXT_METRICS, INVERSE_PERPLEXITY}
    assert set(itertools.chain(*METRICS.values())) == found
    for answer, names in METRICS.items():
        assert all((name in CHOICE_METRICS) == (answer == "choices") for name in names)
