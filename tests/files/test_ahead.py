"""The next item of a sequence is taken while the current one is in use: in order, and only one."""

import threading

import pytest

from minia3.files import ahead
from minia3.files.ahead import one_ahead, read_ahead

BOTH = pytest.mark.parametrize("take", [read_ahead, one_ahead])


@BOTH
@pytest.mark.parametrize("n", [0, 1, 2, 7])
def test_all_items_come_in_order(take, n):
    assert list(take(range(n))) == list(range(n))


@BOTH
def test_an_item_may_be_none(take):
    assert list(take([None, [], 0])) == [None, [], 0]


@BOTH
def test_one_item_is_taken_ahead_and_no_more(take):
    taken = []

    def items():
        for i in range(5):
            taken.append(i)
            yield i

    for i in take(items()):
        if take is read_ahead:
            wait_for_threads()
        assert taken == list(range(min(i + 2, 5)))


def wait_for_threads():
    for thread in threading.enumerate():
        if isinstance(thread, ahead.Coming):
            thread.join()


def test_items_are_read_in_another_thread():
    def items():
        yield threading.current_thread()

    assert list(read_ahead(items())) != [threading.current_thread()]
    assert list(one_ahead(items())) == [threading.current_thread()]


def failing():
    yield 1
    yield 2
    raise ValueError("row 3: no such label")


@BOTH
def test_an_error_is_raised_here_in_place_of_its_item(take):
    items = take(failing())
    assert next(items) == 1
    if take is read_ahead:
        assert next(items) == 2
    with pytest.raises(ValueError, match="row 3: no such label"):
        next(items)


def test_even_the_end_of_the_program_is_raised_here():
    def items():
        yield 1
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        list(read_ahead(items()))


def test_whoever_stops_early_leaves_no_thread_behind():
    for item in read_ahead(range(100)):
        if item == 3:
            break
    assert not any(isinstance(thread, ahead.Coming) for thread in threading.enumerate())


def test_the_end_does_not_wait_for_an_item_that_never_comes(monkeypatch):
    monkeypatch.setattr(ahead, "MOMENT", 0.01)
    is_over = threading.Event()

    def items():
        yield 1
        is_over.wait()  # as for a pipe into which nobody writes
        yield 2

    reading = read_ahead(items())
    assert next(reading) == 1
    reading.close()
    waiting = [thread for thread in threading.enumerate() if isinstance(thread, ahead.Coming)]
    assert [thread.daemon for thread in waiting] == [True]  # so Python can end
    is_over.set()
    waiting[0].join()
