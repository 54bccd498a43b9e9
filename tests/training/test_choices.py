"""The names among which flags choose are those of what they name."""

import torch

from minia3.model.more_vectors import SITES
from minia3.model.site_names import LINEARS, SITE_NAMES
from minia3.training import choices, losses, trackers


def test_the_names_are_those_of_what_they_name():
    assert tuple(losses.LOSSES) == choices.LOSSES
    assert tuple(trackers.TRACKERS) == choices.TRACKERS
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in choices.DTYPES)
    assert set(choices.TRAINED_ALONE) < set(choices.TRAINED) < set(choices.METHODS)
    assert set(SITE_NAMES) | {"wi"} == set(SITES)
    assert set(LINEARS) == set(SITES.values())
