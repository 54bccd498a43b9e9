"""The tests of several processes notice a process that the others leave alone."""

import pytest
import ranks
from ranks import on_ranks

from minia3.files.processes import gathered, is_first


def test_a_collective_that_only_one_process_makes_is_an_error(monkeypatch):
    monkeypatch.setattr(ranks, "PATIENCE", 1)
    with pytest.raises(AssertionError, match="does a process wait"):
        on_ranks(2, gather_in_process_0)


def gather_in_process_0():
    if is_first():
        gathered(None)
