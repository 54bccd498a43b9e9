"""Copies to a GPU wait for nothing; to a CUDA GPU, they are made while it computes."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from minia3.model import to_device as module
from minia3.model.to_device import start_reading, to_device


class Copied:
    """A tensor that notes how it is copied. It stands on `kind`."""

    def __init__(self, kind, calls=None):
        self.device = torch.device(kind)
        self.calls = [] if calls is None else calls

    def pin_memory(self):
        self.calls.append("pinned")
        return self

    def to(self, device, non_blocking):
        self.calls.append("without waiting" if non_blocking else "waiting")
        return self

    def record_stream(self, stream):
        self.calls.append(f"kept for {stream.name}")


@pytest.mark.parametrize(
    ("source", "target", "calls"),
    [
        ("cpu", "meta", ["without waiting"]),
        ("cpu", "mps", ["waiting"]),  # it might read memory that is gone
        ("cpu", "xpu", ["waiting"]),  # the same
        ("cuda", "cuda", ["waiting"]),  # it is there already, and cannot be pinned
    ],
)
def test_how_a_tensor_is_copied(source, target, calls):
    x = Copied(source)
    assert to_device(x, SimpleNamespace(type=torch.device(target).type)) is x
    assert x.calls == calls


def test_on_the_cpu_nothing_is_copied():
    x = torch.arange(3)
    assert to_device(x, torch.device("cpu")) is x


class Stream:
    """A stream of CUDA that notes what is asked of it."""

    def __init__(self, name, calls):
        self.name = name
        self.calls = calls

    def wait_stream(self, other):
        self.calls.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def calls(monkeypatch):
    """What was asked of CUDA, in order. Each new stream has a number."""
    calls = []
    n_streams = 0

    def make_stream(device):
        nonlocal n_streams
        n_streams += 1
        return Stream(f"stream {n_streams} of {device}", calls)

    @contextmanager
    def within(stream):
        calls.append(f"in {stream.name}")
        yield
        calls.append(f"left {stream.name}")

    computing = Stream("the computing stream", calls)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    monkeypatch.setattr(torch.cuda, "Stream", make_stream)
    monkeypatch.setattr(torch.cuda, "stream", within)
    module.side_stream.cache_clear()
    yield calls
    module.side_stream.cache_clear()


def test_a_copy_to_cuda_is_made_beside_what_is_computed(calls):
    """It is pinned, made on a second stream, waited for by the GPU alone, and kept for it."""
    x = Copied("cpu", calls)
    assert to_device(x, torch.device("cuda:1")) is x
    assert calls == [
        "in stream 1 of cuda:1",
        "pinned",
        "without waiting",
        "left stream 1 of cuda:1",
        "the computing stream waits for stream 1 of cuda:1",
        "kept for the computing stream",
    ]


def test_each_device_has_one_stream_for_its_copies(calls):
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        to_device(Copied("cpu", calls), torch.device(device))
    assert [call for call in calls if call.startswith("in ")] == [
        "in stream 1 of cuda:0",
        "in stream 2 of cuda:1",
        "in stream 1 of cuda:0",
    ]


# Reading


class Pinned:
    """Memory of the CPU that notes what is copied into it."""

    def __init__(self, calls, **options):
        assert options == {"dtype": torch.float32, "device": "cpu", "pin_memory": True}
        self.calls = calls

    def copy_(self, x, non_blocking):
        assert non_blocking
        self.calls.append("copied without waiting")


class Event:
    """An event of CUDA that notes what is asked of it."""

    def __init__(self, calls):
        self.calls = calls

    def record(self, stream):
        self.calls.append(f"event after {stream.name}")

    def synchronize(self):
        self.calls.append("waited for the event")


def test_reading_from_cuda_waits_for_the_copy_and_for_nothing_later(calls, monkeypatch):
    monkeypatch.setattr(torch, "empty", lambda shape, **options: Pinned(calls, **options))
    monkeypatch.setattr(torch.cuda, "Event", lambda: Event(calls))
    x = SimpleNamespace(device=torch.device("cuda:1"), shape=(2, 3), dtype=torch.float32)
    read = start_reading(x)
    begun = ["copied without waiting", "event after the computing stream"]
    assert calls == begun
    assert isinstance(read(), Pinned)
    assert calls == [*begun, "waited for the event"]


def test_elsewhere_reading_is_a_plain_copy():
    x = torch.arange(3)
    assert start_reading(x)() is x
