"""The device is the one that was asked for, or a GPU if there is one."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version
from running import ROOT, fails, model, outcome, run, train, words
from written_out import adapter

from minia3.training.device import available_devices, choose_device


@pytest.mark.parametrize(
    ("has_gpu", "method", "line"),
    [
        (False, "ia3", "device   cpu (no GPU found), float32"),
        (True, "ia3", "device   cuda (H100), bfloat16"),
        (True, "full", "device   cuda (H100), float32"),
    ],
)
def test_by_default_a_run_takes_the_gpu_if_there_is_one_and_says_why(
    has_gpu, method, line, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
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


# Other devices than CUDA


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        ((), ("cpu", "no GPU found")),
        (("mps",), ("mps", "Apple's GPU")),
        (("xpu",), ("xpu", "Intel's GPU")),
        (("mps", "cuda"), ("cuda", "H100")),
    ],
)
def test_the_default_is_the_first_kind_of_device_that_there_is(present, expected, monkeypatch):
    for kind in ("cuda", "mps", "xpu"):
        is_there = kind in present
        module = SimpleNamespace(is_available=lambda there=is_there: there)
        module.get_device_name = lambda: "H100"
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


PROGRAM = """
import sys
sys.path[:0] = sys.argv[1:3]
import simulated_device as sim
import train
sys.exit(train.main(sys.argv[3:]))
"""


def run_on_simulated_device(*arguments):
    data = os.environ.get("MINIA3_TEST_DATA")
    if data is None or not Path(data, "simulated_device.py").exists():
        pytest.skip("MINIA3_TEST_DATA has no simulated_device.py")
    if Version(torch.__version__) < Version("2.13"):
        pytest.skip("the simulated device needs torch 2.13")
    command = [sys.executable, "-c", PROGRAM, data, str(ROOT), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{}, {"seed": "0,1", "micro_batch_size": 3}, {"method": "lora"}])
def test_a_run_on_another_device_gives_what_a_cpu_gives(flags, tmp_path):
    """The device of PyTorch's own for tests; it refuses tensors of two devices, as a GPU does."""
    flags = {**flags, "steps": 4, "dtype": "float32", "eval_every": 2, "save_every": 2}
    assert run(words(tmp_path / "cpu", **flags)) == 0
    done = run_on_simulated_device(*words(tmp_path / "sim", **flags, device="sim"))
    assert (done.returncode, done.stderr) == (0, "")
    assert outcome(tmp_path / "sim") == outcome(tmp_path / "cpu")
    assert done.stdout.startswith("device   sim (as asked), float32\n")


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


def test_float16_is_refused_with_the_reason(tmp_path, capsys):
    arguments = words(tmp_path / "run", dtype="float16")
    fails(arguments, capsys, "T5 overflows in float16", "use bfloat16 or float32")
    flags = {"dtype": "float16", "method": "full", "model": model("llama")}
    fails(words(tmp_path / "run", **flags), capsys, "--method full", "is lost in float16")
