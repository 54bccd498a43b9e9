"""Guards the metrics: they are what their definitions say."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minia3.inference.metrics import area_under_curve, macro_f1


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
