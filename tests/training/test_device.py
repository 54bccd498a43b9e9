"""The device is the one that was asked for, or a GPU if there is one."""

import pytest
import torch
from running import fails, run, train, words


@pytest.mark.parametrize(
    ("has_gpu", "method", "line"),
    [
        (False, "ia3", "device   cpu (no CUDA GPU found), float32"),
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
