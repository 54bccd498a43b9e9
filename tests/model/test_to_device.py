"""Copies to a GPU wait for nothing, and come from pinned memory if the GPU needs it."""

from types import SimpleNamespace

import pytest
import torch

from minia3.model.to_device import to_device


class Copied:
    """A tensor that notes how it is copied. It stands on `kind`."""

    def __init__(self, kind):
        self.device = torch.device(kind)
        self.calls = []

    def pin_memory(self):
        self.calls.append("pinned")
        return self

    def to(self, device, non_blocking):
        self.calls.append("without waiting" if non_blocking else "waiting")
        return self


@pytest.mark.parametrize(
    ("source", "target", "calls"),
    [
        ("cpu", "cuda:1", ["pinned", "without waiting"]),
        ("cpu", "xpu", ["without waiting"]),
        ("cpu", "mps", ["waiting"]),  # it might read memory that is gone
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
