"""A run begins as if no other one had been in its process."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import running
import torch
import torch._dynamo

import minia3
from minia3.training.config import Config
from minia3.training.device import peak_memory
from minia3.training.prepare import forget_peak_memory, prepare_model

LARGE = 600 * 10**6  # bytes


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot forget a peak")
def test_the_peak_of_a_run_is_not_that_of_an_earlier_one_in_its_process(tmp_path):
    np.ones(LARGE, np.uint8)  # and it is freed
    before = peak_memory(torch.device("cpu"))
    assert before > LARGE
    assert running.run(running.words(tmp_path / "run")) == 0
    *_, train, final = running.metrics(tmp_path / "run")
    assert 10**7 < train["memory_bytes"] <= final["peak_memory_bytes"] < before - LARGE / 2


def test_an_accelerator_forgets_the_peak_of_the_device_of_the_run(monkeypatch):
    device = SimpleNamespace(type="xpu", index=1)
    asked = []
    module = SimpleNamespace(reset_peak_memory_stats=asked.append)
    monkeypatch.setattr(torch, "xpu", module, raising=False)
    forget_peak_memory(device)
    assert asked == [device]


def test_a_device_that_has_allocated_nothing_has_no_peak_to_forget(monkeypatch):
    def refuse(device):
        raise RuntimeError("Allocator not initialized")

    monkeypatch.setattr(torch, "cuda", SimpleNamespace(reset_peak_memory_stats=refuse))
    forget_peak_memory(torch.device("cuda:0"))


@pytest.mark.parametrize("limit", [8, 256])
def test_compiling_only_raises_the_limit_of_the_compiler(limit):
    """It is a setting of the whole process, and a notebook may have raised it for other models."""
    model = minia3.load_model("tiny-t5")
    with torch._dynamo.config.patch(cache_size_limit=limit):
        prepare_model(model, Config(compile=True))
        assert torch._dynamo.config.cache_size_limit == max(64, limit)
