"""The device is the one that was asked for, or a GPU if there is one."""

import os
from types import SimpleNamespace

import pytest
import torch
from running import fails, model, run, train, words
from written_out import adapter

from minia3.training import device as training_device
from minia3.training import loss_scale
from minia3.training.batch import MicroBatch
from minia3.training.checkpoint import random_state, set_random_state
from minia3.training.device import (
    available_devices,
    choose_device,
    free_memory,
    peak_memory,
    use_deterministic_kernels,
)
from minia3.training.optimizer import RowOptimizer
from minia3.training.process_state import unchanged_process


@pytest.mark.parametrize(
    ("gpu", "capability", "method", "line"),
    [
        (None, None, "ia3", "device   cpu (no GPU found), float32"),
        ("H100", (9, 0), "ia3", "device   cuda (H100), bfloat16"),
        ("H100", (9, 0), "full", "device   cuda (H100), float32"),
        ("A100", (8, 0), "ia3", "device   cuda (A100), bfloat16"),
        ("T4", (7, 5), "ia3", "device   cuda (T4), float32"),  # it has no bfloat16
    ],
)
def test_by_default_a_run_takes_the_gpu_if_there_is_one_and_says_why(
    gpu, capability, method, line, tmp_path, monkeypatch, capsys
):
    for kind in (torch.mps, torch.xpu):
        monkeypatch.setattr(kind, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(train, "Group", lambda *args: 0 / 0)
    with pytest.raises(ZeroDivisionError):
        run(words(tmp_path / "run", device=None, method=method))
    assert capsys.readouterr().out.splitlines()[0] == line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_a_device_that_does_not_exist_is_one_line(tmp_path, capsys):
    fails(words(tmp_path / "run", device="cuda"), capsys, "--device is 'cuda'")


def test_the_flag_asks_torch_for_deterministic_kernels(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        torch, "use_deterministic_algorithms", lambda value, **options: asked.append(value)
    )
    assert run(words(tmp_path / "run", "--deterministic", method="none")) == 0
    assert asked[0] is True


def test_cublas_is_told_to_be_deterministic_unless_the_user_has_told_it_more(monkeypatch):
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda value: None)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    use_deterministic_kernels()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    use_deterministic_kernels()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


LIMIT_AND_USED = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    2: ("memory.max", "memory.current"),
}


@pytest.fixture
def limit_group(tmp_path, monkeypatch):
    """Return a function that makes a control group with a limit, in a made-up /sys/fs/cgroup."""
    monkeypatch.setattr(training_device, "CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(training_device, "GROUPS_OF_PROCESS", tmp_path / "groups of process")

    def limit(path, limit, used, parts="anon 100\n", version=2):
        folder = tmp_path / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in zip(LIMIT_AND_USED[version], (limit, used), strict=True):
            (folder / name).write_text(f"{value}\n")
        (folder / "memory.stat").write_text(parts)

    return limit


def test_a_container_limits_the_memory_that_is_free(limit_group):
    training_device.GROUPS_OF_PROCESS.write_text("0::/\n")
    cpu = torch.device("cpu")
    for n_used, n_free in ((2000, 3000), (5000, 0), (6000, 0)):
        limit_group(".", 5000, n_used)
        assert free_memory(cpu) == n_free
    # Files that were read stay in memory until somebody needs it, so this memory is free, too.
    version_2 = "active_file 700\ninactive_file 1300\nshmem 50\n"
    version_1 = "active_file 1\ninactive_file 2\ntotal_active_file 700\ntotal_inactive_file 1300\n"
    for text in (version_2, version_1):
        limit_group(".", 5000, 6000, text)
        assert free_memory(cpu) == 1000
    limit_group(".", "max", 6000)
    n_free = free_memory(cpu)
    assert n_free is None or n_free > 5000  # those of the machine


@pytest.mark.parametrize(
    ("version", "root", "lines"),
    [
        (2, "", "0::/slurm/job_7/step_0\n"),
        (1, "memory/", "3:cpuset:/\n2:cpu,memory:/slurm/job_7/step_0\n0::/\n"),
    ],
)
def test_a_job_of_a_cluster_limits_the_memory_that_is_free(version, root, lines, limit_group):
    training_device.GROUPS_OF_PROCESS.write_text(lines)
    cpu = torch.device("cpu")
    limit_group(f"{root}slurm/job_7/step_0", "max", 2000, version=version)
    limit_group(f"{root}slurm/job_7", 9000, 3000, version=version)
    assert free_memory(cpu) == 6000
    limit_group(f"{root}slurm", 9000, 8000, version=version)  # all jobs together
    assert free_memory(cpu) == 1000
    limit_group(f"{root}slurm/job_7/step_0", 2500, 2000, version=version)
    assert free_memory(cpu) == 500


def test_a_container_that_names_its_group_as_the_machine_does_is_limited(limit_group):
    training_device.GROUPS_OF_PROCESS.write_text("4:memory:/docker/0123456789ab\n")
    limit_group("memory", 5000, 2000, version=1)
    assert free_memory(torch.device("cpu")) == 3000


# Other devices than CUDA


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        ((), ("cpu", "no GPU found")),
        (("mps",), ("mps", "Apple's GPU")),
        (("xpu",), ("xpu", "Max 1550")),
        (("mps", "cuda"), ("cuda", "H100")),
    ],
)
def test_the_default_is_the_first_kind_of_device_that_there_is(present, expected, monkeypatch):
    names = {"cuda": "H100", "xpu": "Max 1550"}  # torch.mps has no names
    for kind in ("cuda", "mps", "xpu"):
        is_there = kind in present
        module = SimpleNamespace(is_available=lambda there=is_there: there)
        if kind in names:
            module.get_device_name = lambda kind=kind: names[kind]
        monkeypatch.setattr(torch, kind, module)
    device, reason = choose_device(None)
    assert (device.type, reason) == expected


def test_an_accelerator_that_only_torch_knows_is_taken(monkeypatch):
    accelerator = SimpleNamespace(is_available=lambda: True)
    accelerator.current_accelerator = lambda: torch.device("hpu")
    monkeypatch.setattr(torch, "accelerator", accelerator, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    device, reason = choose_device(None)
    assert (device.type, reason) == ("hpu", "PyTorch's accelerator")


@pytest.mark.parametrize("kind", ["cuda", "xpu", "hpu"])
def test_what_a_run_asks_of_a_device_it_asks_of_the_one_that_it_runs_on(kind, monkeypatch):
    """`--device cuda:1`, and any other kind: memory and random numbers are those of number 1."""
    device = SimpleNamespace(type=kind, index=1)
    states = {0: "first", 1: "second"}
    module = SimpleNamespace(
        get_rng_state=lambda asked: states[asked.index],
        set_rng_state=lambda state, asked: states.update({asked.index: state}),
        mem_get_info=lambda asked: (100 + asked.index, 1000),
        memory_reserved=lambda asked: 30 + asked.index,
        memory_allocated=lambda asked: 20 - asked.index,
        max_memory_allocated=lambda asked: 50 + asked.index,
    )
    monkeypatch.setattr(torch, kind, module, raising=False)
    assert free_memory(device) == 101 + 31 - 19
    assert peak_memory(device) == 51

    state = random_state(device)
    assert state[kind] == "second"
    states[1] = "later"
    set_random_state(state, device)
    assert states == {0: "first", 1: "second"}

    # A run that goes on elsewhere does not find the random numbers of its device.
    set_random_state({"cpu": state["cpu"], "tpu": "third"}, device)
    assert states == {0: "first", 1: "second"}


def test_apples_gpu_is_asked_without_a_number(monkeypatch):
    states = ["first"]
    module = SimpleNamespace(
        get_rng_state=lambda: states[-1],
        set_rng_state=states.append,
        recommended_max_memory=lambda: 100,
        driver_allocated_memory=lambda: 40,
    )
    monkeypatch.setattr(torch, "mps", module)
    device = torch.device("mps")
    assert (free_memory(device), peak_memory(device)) == (60, 40)
    set_random_state(random_state(device), device)
    assert states == ["first", "first"]


def test_the_random_numbers_and_the_card_of_an_accelerator_that_was_used_are_put_back(monkeypatch):
    states = [["a", "b"]]
    cards = [0]
    module = SimpleNamespace(
        is_initialized=lambda: True,
        get_rng_state_all=lambda: states[0],
        set_rng_state_all=states.append,
        current_device=lambda: cards[-1],
        set_device=cards.append,
    )
    idle = SimpleNamespace(is_initialized=lambda: False, manual_seed_all=lambda seed: None)
    monkeypatch.setattr(torch, "xpu", module)
    monkeypatch.setattr(torch, "cuda", idle)
    with unchanged_process():
        torch.xpu.set_device(1)  # as --offload does
    assert states == [["a", "b"], ["a", "b"]]
    assert cards == [0, 1, 0]


def test_an_accelerator_that_the_run_was_the_first_to_use_gets_the_seed_of_the_process(monkeypatch):
    started = []
    seeds = []
    module = SimpleNamespace(is_initialized=lambda: bool(started), manual_seed_all=seeds.append)
    with torch.random.fork_rng(devices=[]):
        # Within, because fork_rng keeps the first module that it finds for all later calls.
        monkeypatch.setattr(torch, "cuda", module)
        torch.default_generator.manual_seed(5)
        with unchanged_process():
            torch.default_generator.manual_seed(6)
            started.append("by a tensor")
    assert seeds == [5]


def test_the_random_numbers_of_apples_gpu_are_put_back(monkeypatch):
    """`torch.manual_seed` reaches them, whatever device the run is on."""
    states = []
    module = SimpleNamespace(get_rng_state=lambda: "before", set_rng_state=states.append)
    monkeypatch.setattr(torch, "mps", module)
    with unchanged_process():
        assert states == []
    assert states == []  # there is no such GPU
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with unchanged_process():
        assert states == []
    assert states == ["before"]


def test_torch_2_5_has_no_module_for_accelerators(monkeypatch):
    monkeypatch.delattr(torch, "accelerator", raising=False)
    assert available_devices()[-1] == "cpu"


def test_a_torch_without_a_module_for_a_device_lacks_the_device(monkeypatch):
    monkeypatch.delattr(torch, "xpu")  # torch 2.5 may have been built without it
    assert "xpu" not in available_devices()


@pytest.mark.parametrize("name", ["mps", "xpu", "cuda", "tpu", "meta", "cpu:x", ""])
def test_a_device_that_this_machine_lacks_is_one_line_with_those_that_it_has(name):
    if name in available_devices():
        pytest.skip(f"there is {name}")
    with pytest.raises(ValueError, match="expected a device that this machine has: ") as error:
        choose_device(name)
    assert len(str(error.value)) < 200
    assert ", ".join(available_devices()) in str(error.value)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously "),
            "CUDA error: out of memory",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB. GPU 0 has a "),
            "CUDA out of memory",
        ),
        (
            RuntimeError("CUDA error: no kernel image is available for execution on the device\n"),
            "CUDA error: no kernel image is available for execution on the device",
        ),
    ],
)
def test_a_device_that_cannot_be_used_is_not_said_to_be_missing(error, reason, monkeypatch):
    def ones(*_, **__):
        raise error

    monkeypatch.setattr(torch, "ones", ones)
    with pytest.raises(ValueError, match=rf"\({reason}\)$"):
        choose_device("cuda")


# float16


def test_a_llama_trains_in_float16(tmp_path):
    flags = {"model": model("llama"), "steps": 6}
    for dtype in ("float16", "float32"):
        assert run(words(tmp_path / dtype, dtype=dtype, **flags)) == 0
    half = adapter(tmp_path / "float16")
    single = adapter(tmp_path / "float32")
    for name, vector in single.items():
        assert half[name].dtype == torch.float32
        assert (vector - 1).abs().max() > 1e-3  # it has trained
        # A step is at most 3e-3 in each direction, and most steps go the same way.
        assert ((half[name] - vector).abs().mean() < 0.5 * (vector - 1).abs().mean()).item()


def test_small_gradients_are_not_lost_in_float16(tmp_path, monkeypatch):
    """As in a model that fits its data, where the gradients of most activations are below 1e-7."""
    plain_losses = MicroBatch.losses
    monkeypatch.setattr(MicroBatch, "losses", lambda *args: plain_losses(*args) * 1e-5)
    gradients = {}

    def gradients_of_first_step(name, dtype):
        def keep_gradients(optimizer, _):
            found = [table.grad.flatten() for table in optimizer.tables]
            gradients.setdefault(name, torch.cat(found))

        monkeypatch.setattr(RowOptimizer, "clip", keep_gradients)
        flags = {"model": model("llama"), "steps": 1, "dtype": dtype}
        assert run(words(tmp_path / name, **flags)) == 0
        return gradients[name]

    expected = gradients_of_first_step("float32", "float32")

    def error(name):
        difference = gradients_of_first_step(name, "float16") - expected
        return (difference.norm() / expected.norm()).item()

    assert error("scaled") < 0.02
    monkeypatch.setattr(loss_scale, "LOSS_SCALE", 1.0)
    assert error("plain") > 0.2


def test_float16_is_refused_with_the_reason(tmp_path, capsys):
    arguments = words(tmp_path / "run", dtype="float16")
    fails(arguments, capsys, "T5 overflows in float16", "use bfloat16 or float32")
    flags = {"dtype": "float16", "method": "full", "model": model("llama")}
    fails(words(tmp_path / "run", **flags), capsys, "--method full", "is lost in float16")
