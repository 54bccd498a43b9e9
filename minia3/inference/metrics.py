"""To be written."""

import numpy as np


def macro_f1(found_N, label_N):
    """The mean, over the labels that are found or right, of 2 (found and right) / (found + right)."""
    hits = [(found_N == label, label_N == label) for label in np.union1d(found_N, label_N)]
    return np.mean(
        [2 * (found & right).sum() / (found.sum() + right.sum()) for found, right in hits]
    )


def area_under_curve(positive, negative):
    """The chance that one of `positive` is larger than one of `negative`; a tie is a half (Mann & Whitney 1947)."""
    negative = np.sort(negative)
    below = np.searchsorted(negative, positive, side="left") + np.searchsorted(
        negative, positive, side="right"
    )
    return float(below.mean() / (2 * len(negative)))
