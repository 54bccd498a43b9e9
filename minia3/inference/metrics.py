"""Metrics other than accuracy.

Shapes: N examples.
"""

import numpy as np


def macro_f1(found_N, label_N):
    """Return the F1 of each label, averaged over the labels that were found or are right.

    The F1 of a label is 2 (found and right) / (found + right). A label that is neither found nor
    right has none, and does not count, as in sklearn's f1_score(average="macro").
    """
    scores = []
    for label in np.union1d(found_N, label_N):
        is_found_N = found_N == label
        is_right_N = label_N == label
        n_hits = (is_found_N & is_right_N).sum()
        scores.append(2 * n_hits / (is_found_N.sum() + is_right_N.sum()))
    return np.mean(scores)


def area_under_curve(positive, negative):
    """Return the chance that one of `positive` is larger than one of `negative`.

    This is the area under the ROC curve (Mann & Whitney 1947). A tie counts as a half.
    positive, negative: arrays with at least one number each.
    """
    in_order = np.sort(negative)
    n_below = np.searchsorted(in_order, positive, side="left")
    n_not_above = np.searchsorted(in_order, positive, side="right")
    # The sum counts a smaller negative twice, and a tie once.
    n_halves = n_below + n_not_above
    return float(n_halves.mean() / (2 * len(negative)))
