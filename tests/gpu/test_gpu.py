"""The checks on a GPU, if there is one, and a dry run of all of them, so that they do not rot."""

import json

import pytest
import torch
from forks import fork_python

from minia3.training.device import available_devices, choose_device
from tests.gpu.__main__ import CHECKS, main, run_check
from tests.gpu.place import Place, expect_at_most
from tests.gpu.runs import divided


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHECKS)
def test_on_the_first_gpu(name):
    if available_devices()[0] == "cpu":
        pytest.skip("there is no GPU")
    result = run_check(name, Place(choose_device(None)[0]))
    assert result["result"] == "passed"


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_a_dry_run_of_each_check_passes(name, tmp_path, capsys, monkeypatch):
    fork_python(monkeypatch)
    file = tmp_path / "dry.json"
    assert main(["--device", "cpu", "--only", name, "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    assert written["is_dry"]
    check = written["checks"][name]
    assert (check["result"], bool(check["figures"])) == ("passed", True)
    assert f"| {name} | passed | " in capsys.readouterr().out


@pytest.mark.slow
def test_a_single_card_divides_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(Place, "n_devices", 1)
    place = Place(torch.device("cpu"), is_dry=True)
    assert set(divided(place, tmp_path)) == {
        "processes",
        "offloaded, seconds",
        "offloaded, losses differ by",
    }


def test_a_check_that_fails_is_one_line_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    def broken(place):
        expect_at_most(3.0, 2, "what is checked")

    monkeypatch.setitem(CHECKS, "waiting", (broken, False))
    monkeypatch.setitem(CHECKS, "attention", (lambda place: {"a": {"b": 0.5}}, False))
    assert main(["--device", "cpu", "--only", "waiting,attention"]) == 1
    out = capsys.readouterr().out
    assert "| waiting | failed: AssertionError: what is checked: 3, expected at most 2 | 0 |" in out
    assert "| attention: a, b | 0.5 |" in out


def test_what_does_not_fit_into_the_time_is_left_out(capsys):
    assert main(["--device", "cpu", "--only", "largest", "--seconds", "0"]) == 0
    assert "| largest | left out: the time is up | 0 |" in capsys.readouterr().out


def test_without_a_gpu_the_command_says_how_to_try_it(capsys):
    if available_devices()[0] != "cpu":
        pytest.skip("there is a GPU")
    assert main([]) == 2
    assert capsys.readouterr().err == "there is no GPU here; --device cpu is a dry run\n"
