"""Runs over a divided base are stopped, die and continue as other runs do."""

import json
import os
import signal
import sys
import time

import pytest
import running
import several
import torch
from ranks import run_on_ranks
from torch_version import divides_a_base

pytestmark = [
    pytest.mark.slow,
    divides_a_base,
    pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc"),
]

FLAGS = {"steps": 30, "save_every": 5, "shard": 2}


def words(folder, **values):
    return ["train.py", *running.words(folder, **FLAGS | values)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder of a run over a divided base that nobody stopped."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    code, out, err = several.call(2, *words(folder))
    assert (code, err) == (0, "")
    assert "shard    2 processes share one copy of the base" in out
    return folder


EXACT = {"dropout": 0.0, "dtype": "float64"}


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """The vectors of a run in one process, which are exact enough to compare with others."""
    folder = tmp_path_factory.mktemp("exact") / "run"
    assert running.run(running.words(folder, **FLAGS | EXACT | {"shard": None})) == 0
    return running.last_vectors(folder)


def stopped_run(n_processes, folder, **values):
    """Stop a run in several processes, in a step."""
    process = several.Torchrun(n_processes, *words(folder, **EXACT, **values))
    process.wait_for("step     10")
    process.send_signal(signal.SIGTERM)
    code, _, err = process.finish()
    assert code == 128 + signal.SIGTERM
    started = f"torchrun --nproc-per-node {n_processes} train.py"
    assert err == f"stopped; to continue: {started} --resume {running.quoted(folder)}\n"


def check_exact(folder, exact):
    found = running.last_vectors(folder)
    for name, table in exact.items():
        torch.testing.assert_close(found[name], table, rtol=1e-9, atol=1e-9)


def test_a_process_that_dies_ends_the_run_and_resume_gives_the_same_bits(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    process = several.Torchrun(2, *words(folder))
    process.wait_for("step     10")
    os.kill(process.pid_of_rank(1), signal.SIGKILL)
    began = time.monotonic()
    code, _, err = process.finish()
    assert time.monotonic() - began < 20
    assert code == 128 + signal.SIGKILL
    assert err.count("\n") == 2, err
    assert "minia3: torchrun: process 1 was ended by signal 9 (Killed)" in err
    command = f"torchrun --nproc-per-node 2 train.py --resume {running.quoted(folder)}"
    assert f"to continue: {command}" in err
    out = run_on_ranks(2, ["--resume", folder])
    assert "shard    2 processes share one copy of the base" in out
    assert running.outcome(folder) == running.outcome(uninterrupted)


def test_a_signal_stops_all_processes_and_one_process_may_continue(exact, tmp_path):
    folder = tmp_path / "run"
    stopped_run(2, folder)
    assert running.run(["--resume", folder]) == 0
    check_exact(folder, exact)


def test_another_number_of_processes_may_divide_the_base_in_another_way(exact, tmp_path):
    folder = tmp_path / "run"
    stopped_run(4, folder, shard=4)
    out = run_on_ranks(2, ["--resume", folder, "--shard", "2", "--offload"])
    assert "shard    2 processes share one copy of the base, in the memory of the CPU" in out
    config = json.loads((folder / "config.json").read_text())
    assert (config["shard"], config["offload"]) == (2, True)
    check_exact(folder, exact)


# Small texts are too long for this attention.
SMALL_BIAS = """
import sys
import train
from minia3.model import sequence_state

sequence_state.MAX_BIAS = 800
sys.exit(train.main(is_program=True))
"""


def test_a_batch_that_only_one_process_of_a_copy_refuses_ends_the_run(tmp_path):
    """The others are waiting for its pass, and never ask for its result."""
    script = tmp_path / "script.py"
    script.write_text(SMALL_BIAS)
    rows = running.rows(16)
    rows[5]["input"] = "w5 " * 50  # it alone would fit: its batch does not
    task = running.write(tmp_path / "task", train=rows, test=rows)
    flags = {"model": running.model("llama"), "task": task, "eval_batch_size": 4, "shard": 2}
    arguments = running.words(None, "--eval-only", **flags)
    code, _, err = several.call(4, script, *arguments)
    assert (code, err.count("\n")) == (2, 1), err
    assert "tokens needs a bias" in err


def test_an_adapter_is_evaluated_over_a_divided_base(uninterrupted):
    flags = {"adapter": uninterrupted / "adapter", "shard": 0}
    out = run_on_ranks(2, running.words(None, "--eval-only", **flags))
    alone = running.metrics(uninterrupted)[-1]["accuracy"]
    assert f"accuracy {alone:.1%}" in out
