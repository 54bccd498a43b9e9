"""Whether a run divides its base: what --shard and --offload say, or what the memory allows."""

import subprocess
import sys

import pytest
import running
import torch
from test_devices_of_processes import Accelerators

import minia3
from minia3.files import processes
from minia3.model import shard as shard_module
from minia3.training import shards
from minia3.training.command_line import complete, parse_flags
from minia3.training.config import Config

CPU = torch.device("cpu")


@pytest.fixture
def two_processes(monkeypatch):
    monkeypatch.setattr(processes._process, "n_processes", 2)
    monkeypatch.setattr(processes._process, "n_per_copy", 1)
    monkeypatch.setattr(shards, "gathered", lambda value: [value])


def fits(n_bytes, monkeypatch, dtype=torch.float32, **flags):
    monkeypatch.setattr(shards, "free_memory", lambda device: n_bytes)
    return shards.fits(Config(model=running.model("t5"), **flags), CPU, dtype)


@pytest.mark.slow
@pytest.mark.usefixtures("two_processes")
def test_a_base_is_divided_if_it_does_not_fit_into_one_device(monkeypatch):
    n_bytes = sum(p.nbytes for p in minia3.load_model(running.model("t5")).parameters())
    assert fits(None, monkeypatch), "on a device of unknown memory"
    assert fits(10**9, monkeypatch)
    assert not fits(n_bytes, monkeypatch)
    assert fits(n_bytes, monkeypatch, method="lora"), "which trains with a whole base only"
    assert fits(n_bytes, monkeypatch, compile=True)


@pytest.mark.usefixtures("two_processes")
def test_the_free_memory_of_a_process_is_its_own_part_already(monkeypatch):
    monkeypatch.setattr(shards, "is_enough_memory", lambda config, dtype, memory: memory == 100)
    assert fits(100, monkeypatch)


def test_a_process_that_is_alone_divides_nothing(monkeypatch):
    assert fits(1, monkeypatch)
    assert shards.make_shards(None, False, CPU) is None
    assert shards.make_shards(1, False, CPU) is None


def test_a_number_of_processes_that_does_not_suit_shard_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="and there is one: start several"):
        shards.make_shards(shards.ALL, False, CPU)
    with pytest.raises(ValueError, match="--shard 2 makes groups of 2 processes, but there are 1"):
        shards.make_shards(2, False, CPU)
    monkeypatch.setattr(processes._process, "n_processes", 4)
    found = "--shard 3 makes groups of 3 processes, but there are 4"
    advice = "expected a multiple: change --nproc-per-node, or give another --shard"
    with pytest.raises(ValueError, match=f"{found}: {advice}"):
        shards.make_shards(3, False, CPU)


@pytest.mark.parametrize(("name", "current"), [("cuda:1", 1), ("cuda", None), ("cpu:0", None)])
def test_a_base_is_on_the_card_that_was_asked_for(name, current, monkeypatch):
    cards = Accelerators()
    made = []

    def make_mesh(kind, shape):
        made.append((kind, shape, cards.current))

    monkeypatch.setattr(torch, "cuda", cards)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.device_mesh.init_device_mesh", make_mesh)
    device = torch.device(name)
    shards.make_shards(None, True, device)
    assert made == [(device.type, (1,), current)]


def test_a_process_alone_with_an_accelerator_can_send_what_is_on_the_cpu(monkeypatch):
    given = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda backend, **_: given.append(backend)
    )
    monkeypatch.setattr("torch.distributed.device_mesh.init_device_mesh", lambda *_: None)
    monkeypatch.setattr(shards.atexit, "register", lambda function: None)
    shards.make_shards(None, True, CPU)
    (backend,) = given
    assert backend.startswith("cpu:gloo,cuda:nccl")


OFFLOAD_ALONE = """
import atexit
import torch
from minia3.training.shards import make_shards
atexit.register(lambda: print(torch.distributed.is_initialized()))  # after what is registered later
make_shards(None, True, torch.device("cpu"))
print(torch.distributed.is_initialized())
"""


@pytest.mark.slow  # it imports torch again
def test_a_process_alone_closes_its_group_before_python_ends():
    command = [sys.executable, "-c", OFFLOAD_ALONE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout.split()) == (0, ["True", "False"]), done.stderr


def config_of(*words):
    return complete(parse_flags(list(words)))


def test_the_flag_may_stand_alone_or_have_a_number():
    assert config_of().shard is None
    assert config_of("--shard").shard == shards.ALL
    assert config_of("--shard", "--seed", "1").shard == shards.ALL
    assert config_of("--shard", "4").shard == 4
    with pytest.raises(ValueError, match="--shard is -1, expected at least 0"):
        config_of("--shard", "-1")


@pytest.mark.parametrize("words", [["--shard"], ["--shard", "2"], ["--offload"]])
def test_what_trains_or_is_compiled_is_not_divided(words):
    for method in ("lora", "full"):
        with pytest.raises(ValueError, match=f"is not for --method {method}"):
            config_of(*words, "--method", method)
    with pytest.raises(ValueError, match="--compile does not go with --shard or --offload"):
        config_of(*words, "--compile")
    config_of("--shard", "1", "--method", "lora", "--compile")


@pytest.mark.parametrize(
    ("version", "is_quantized", "message"),
    [
        ("2.6.0", False, "a base need torch 2.7 or newer, found 2.6.0"),
        ("2.7.1+cu128", False, None),
        ("2.11.0", True, "a quantized base need torch 2.12 or newer, found 2.11.0"),
        ("2.12.0a0", True, None),
    ],
)
def test_a_torch_that_is_too_old_is_named(version, is_quantized, message, monkeypatch):
    quantize = "int8" if is_quantized else None
    model = minia3.load_model(running.model("llama"), quantize=quantize)
    monkeypatch.setattr(torch, "__version__", version)
    if message is None:
        shard_module.check_torch(model)
        return
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        shard_module.check_torch(model)


def test_items_that_are_shared_keep_processes_of_a_copy_in_step(monkeypatch):
    monkeypatch.setattr(processes._process, "is_dividing", True)
    for n_processes, n_per_copy in ((2, 2), (4, 2), (4, 4), (3, 1)):
        monkeypatch.setattr(processes._process, "n_processes", n_processes)
        monkeypatch.setattr(processes._process, "n_per_copy", n_per_copy)
        for n_items in (1, 2, 5, 8):
            items = list(range(n_items))
            shares = []
            equal_shares = []
            for rank in range(n_processes):
                monkeypatch.setattr(processes._process, "rank", rank)
                shares.append(processes.share(items))
                equal_shares.append(processes.share_of_copy(items))
            assert {item for share in shares for item in share} == set(items)
            assert {item for share in equal_shares for item in share} == set(items)
            for first in range(0, n_processes, n_per_copy):
                together = slice(first, first + n_per_copy)
                assert len({len(share) for share in shares[together]}) == 1
                assert len({tuple(share) for share in equal_shares[together]}) == 1
