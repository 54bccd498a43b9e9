"""Several processes on a machine take an accelerator each, and share the memory of the CPU."""

import contextlib
import io
from unittest import mock

import pytest
import running
import torch
from ranks import on_ranks

from minia3.files import processes
from minia3.training import device


class Accelerators:
    """Stands in for torch.cuda on a machine with two cards."""

    def __init__(self):
        self.current = None

    def device_count(self):
        return 2

    def set_device(self, index):
        self.current = index


@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_of_a_machine_takes_a_card_of_its_own(rank, monkeypatch):
    cards = Accelerators()
    monkeypatch.setattr(device.torch, "cuda", cards)
    assert device.device_of_process("cuda") == "cuda"
    assert device.device_of_process("cuda:1") == "cuda:1"
    assert cards.current is None
    become(monkeypatch, rank, 2)
    assert device.device_of_process("cuda") == f"cuda:{rank}"
    assert cards.current == rank
    assert device.device_of_process("cpu") == "cpu"
    assert device.device_of_process("nosuch") == "nosuch"
    with pytest.raises(ValueError, match="'cuda:1', but this machine has 2 processes"):
        device.device_of_process("cuda:1")


def test_more_processes_than_cards_are_refused(monkeypatch):
    monkeypatch.setattr(device.torch, "cuda", Accelerators())
    become(monkeypatch, 2, 3)
    with pytest.raises(ValueError, match="there are 2: give --nproc-per-node 2, or --device cpu"):
        device.device_of_process("cuda")


def become(monkeypatch, rank, n_processes):
    """Let this process believe that it is one of several on its machine."""
    monkeypatch.setattr(processes._process, "n_processes", n_processes)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(n_processes))


def test_processes_of_a_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr(device.Path, "read_text", lambda path, *_: meminfo(path))
    assert device.free_memory_of_system() == 8_192_000
    become(monkeypatch, 0, 4)
    assert device.free_memory_of_system() == 2_048_000


def meminfo(path):
    if str(path) == "/proc/meminfo":
        return "MemAvailable:   8000 kB\n"
    raise FileNotFoundError


def run_beside_a_gpu(words):
    """Run train.py on the CPU in the first process, and as if on a GPU in the others."""
    gpu = mock.patch("train.choose_device", return_value=(torch.device("cuda"), "as if"))
    bfloat16 = mock.patch.object(device, "has_bfloat16", return_value=True)
    with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.ExitStack() as patches:
        if processes.rank() > 0:
            patches.enter_context(gpu)
            patches.enter_context(bfloat16)
        return running.run(words), errors.getvalue()


@pytest.mark.slow
def test_processes_that_would_not_compute_alike_are_refused(tmp_path):
    outcomes = on_ranks(2, run_beside_a_gpu, running.words(tmp_path / "run", device="cpu"))
    assert [code for code, _ in outcomes] == [2, 2]
    expected = (
        "train.py: process 1 computes on cuda in bfloat16, and the first one on cpu in float32: "
        "give --device and --dtype\n"
    )
    assert "".join(err for _, err in outcomes) == expected
    assert not (tmp_path / "run").exists()
