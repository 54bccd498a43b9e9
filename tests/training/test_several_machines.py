"""Runs on several machines: two calls of torchrun on this one, which take each other for two."""

import contextlib
import io
import os
import shutil
import signal

import pytest
import running
import several
from ports import reserved_port
from ranks import on_ranks

import minia3
from minia3.files import processes

pytestmark = pytest.mark.slow

FLAGS = {"steps": 30, "save_every": 20, "dtype": "float64", "dropout": 0.0}


@pytest.fixture
def port():
    with reserved_port() as reserved:
        yield reserved


def start_two(port, *arguments, torchrun=several.OURS):
    """Start a script in one process on each of two machines, and return torchrun's processes.

    The first machine has the first process, and the port at which they meet.
    """
    place = ("--master-addr", "127.0.0.1", "--master-port", port)
    started = []
    for rank in (0, 1):
        machines = ("--nnodes", 2, "--node-rank", rank, *place)
        started.append(several.Torchrun(1, *arguments, torchrun=torchrun, machines=machines))
    return started


def test_a_run_on_two_machines_stops_continues_and_has_the_numbers_of_one_process(tmp_path, port):
    folder = tmp_path / "run"
    first, second = start_two(port, "train.py", *running.words(folder, **FLAGS))
    first.wait_for("step     10")
    second.send_signal(signal.SIGINT)  # which stops the processes of both machines
    code, out, first_err = first.finish()
    assert code == 128 + signal.SIGINT
    code, out, second_err = second.finish()
    assert (code, out) == (128 + signal.SIGINT, "")
    message = f"stopped; to continue: torchrun ... train.py --resume {running.quoted(folder)}\n"
    assert first_err + second_err == message
    assert 10 <= running.load_checkpoint(folder).n_steps < FLAGS["steps"]

    first, second = start_two(port, "train.py", "--resume", folder, torchrun=several.TORCHRUN)
    code, out, _ = first.finish()
    assert code == 0
    assert "each of 2 processes computes a part of every step" in out
    assert second.finish()[:2] == (0, "")

    alone = tmp_path / "alone"
    assert running.run(running.words(alone, **FLAGS)) == 0
    vectors = running.last_vectors(folder)
    for name, expected in running.last_vectors(alone).items():
        assert (vectors[name] - expected).abs().max() < 1e-9
    final, expected = running.metrics(folder)[-1], running.metrics(alone)[-1]
    for name in ("accuracy_before", "accuracy", "auc"):
        assert final[name] == pytest.approx(expected[name], abs=1e-9)


def test_a_mistake_ends_the_run_on_both_machines(port):
    first, second = start_two(port, "train.py", "--steps", 0)
    codes_and_errors = [machine.finish()[::2] for machine in (first, second)]
    assert [code for code, _ in codes_and_errors] == [2, 2]
    message = "train.py: --steps is 0, expected at least 1\n"
    assert "".join(err for _, err in codes_and_errors) == message


def run_in_own_folder(folder, words):
    """Run train.py in a folder that only this process has, as on a machine of its own."""
    os.chdir(folder / str(processes.rank()))
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        return running.run(words), errors.getvalue()


def save_vectors(value, folder):
    model = minia3.load_model(running.model("t5"))
    for vector in minia3.vectors(model).values():
        vector.data.fill_(value)
    minia3.save_adapter(model, folder)


@pytest.mark.parametrize("differs", ["data", "model", "adapter"])
def test_machines_with_different_files_are_refused(differs, tmp_path):
    for number in ("0", "1"):
        shutil.copytree(running.task(), tmp_path / number / "task")
        shutil.copytree(running.model("t5"), tmp_path / number / "model")
        save_vectors(1.5, tmp_path / number / "adapter")
    if differs == "data":
        with open(tmp_path / "1" / "task" / "validation.jsonl", "a") as file:
            file.write("\n")
        names = "validation.jsonl"
    elif differs == "adapter":
        save_vectors(0.5, tmp_path / "1" / "adapter")
        names = "the adapter adapter"
    else:
        other = running.model("t5", seed=1) / "model.safetensors"
        shutil.copy(other, tmp_path / "1" / "model")
        names = "the weights of model"
    words = running.words("run", model="model", task="task", adapter="adapter")
    outcomes = on_ranks(2, run_in_own_folder, tmp_path, words)
    assert [code for code, _ in outcomes] == [2, 2]
    assert "".join(err for _, err in outcomes) == (
        f"train.py: process 1 has different files from the first one ({names}): "
        "copy the files of one machine to the others\n"
    )
