"""Signals stop a run at once, but not within a block that must be finished."""

import signal

import pytest
from running import kill_self

from minia3.training.signals import Signals, Stopped


@pytest.fixture
def signals():
    with Signals() as signals:
        yield signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_at_once(number, signals):
    with pytest.raises(Stopped) as stop:
        kill_self(number)
    assert stop.value.number == number


def test_a_signal_waits_for_the_end_of_a_block(signals):
    seen = []

    def block():
        with signals.uninterrupted():
            kill_self(signal.SIGTERM)
            seen.append("rest of the block")

    with pytest.raises(Stopped):
        block()
    assert seen == ["rest of the block"]


def test_an_error_in_a_block_is_not_hidden_by_a_signal(signals):
    def block():
        with signals.uninterrupted():
            kill_self(signal.SIGTERM)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        block()


def test_a_block_without_a_signal_ends_quietly_and_the_next_signal_stops_at_once(signals):
    with signals.uninterrupted():
        pass
    with pytest.raises(Stopped):
        kill_self(signal.SIGINT)


def test_stopped_is_not_caught_by_handlers_of_errors():
    assert not issubclass(Stopped, Exception)
