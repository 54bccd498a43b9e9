"""Runs in several processes end together: after a mistake, a signal, or a process that dies."""

import functools
import os
import signal
import sys
import time

import pytest
import running
import several
from ranks import run_on_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc"),
]

LONG = {"steps": 30, "save_every": 5}
MANY = 3000  # steps that nobody waits for


def words(folder, *flags, **values):
    return ["train.py", *running.words(folder, *flags, **LONG | values)]


def resume_command(folder):
    return f"torchrun --nproc-per-node 2 train.py --resume {running.quoted(folder)}"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder of a run in two processes that nobody stopped."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    code, out, err = several.call(2, *words(folder, log_to="tensorboard"))
    assert (code, err) == (0, "")
    assert len(list(folder.rglob("events.*"))) == 1
    assert "each of 2 processes computes a part of every step" in out
    assert out.count("\nbefore ") == out.count("\nafter ") == 1  # one process prints
    return folder


def test_processes_resume_without_the_adapter_that_they_began_with(tmp_path):
    begun, out = (tmp_path / name for name in ("begun", "run"))
    assert running.run(running.words(begun, sites="q,k", lr=0.1, steps=2)) == 0
    flags = {"sites": "k", "adapter": begun / "adapter", "steps": 3}
    assert several.call(2, *words(out, **flags))[0] == 0
    begun.rename(tmp_path / "elsewhere")
    code, _, err = several.call(2, "train.py", "--resume", out, "--steps", "6")
    assert (code, err) == (0, "")
    assert running.events(out, "final")[0]["steps"] == 6


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path):
    arguments = words(tmp_path / "run", model="no-such-model")
    code, out, err = several.call(2, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("train.py: no-such-model: no such folder")
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_torchrun_adds_a_report_that_has_the_exit_code(tmp_path):
    arguments = words(tmp_path / "run", steps=0)
    code, _, err = several.call(2, *arguments, torchrun=several.TORCHRUN)
    assert code == 1  # whatever its processes say
    assert err.count("train.py: --steps is 0") == 1
    # An older torchrun may end one process before it has ended by itself.
    assert "exitcode  : 2 " in err


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_ends_the_run_within_seconds(rank, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    process = several.Torchrun(2, *words(folder))
    process.wait_for("step     10")
    os.kill(process.pid_of_rank(rank), signal.SIGKILL)
    began = time.monotonic()
    code, _, err = process.finish()
    assert time.monotonic() - began < 20
    assert code == 128 + signal.SIGKILL
    assert err.count("\n") == 2
    assert f"minia3: torchrun: process {rank} was ended by signal 9 (Killed)" in err
    assert f"to continue: {resume_command(folder)}" in err
    assert running.load_checkpoint(folder).n_steps >= (5 if rank == 0 else 10)

    assert "processes so far" not in run_on_ranks(2, ["--resume", folder])
    assert running.outcome(folder) == running.outcome(uninterrupted)


# One process dies, the other one says so, and torchrun starts both again.
DIES_ONCE = """
import os, signal, sys
from minia3.files.processes import PeerGone, gathered, has_first_word, join, leave, rank

join()
if rank() == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    os.kill(os.getpid(), signal.SIGKILL)
code = 0
try:
    ranks = gathered(rank())
except PeerGone:
    code = 1
if code == 1 or rank() == 0:
    print("gone" if code else ranks, has_first_word(code), flush=True)
sys.exit(leave(code))
"""


def test_processes_that_torchrun_starts_again_do_not_hear_those_before_them(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(DIES_ONCE)
    code, out, err = several.call(2, "--max-restarts", "1", script, n_starts=2)
    assert code == 0, err
    assert out.splitlines()[-1] == "[0, 1] True"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_all_processes_at_the_same_step(number, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    process = several.Torchrun(2, *words(folder))
    process.wait_for("step     10")
    process.send_signal(number)
    code, _, err = process.finish()
    assert code == 128 + number
    assert err == f"stopped; to continue: {resume_command(folder)}\n"
    run_on_ranks(2, ["--resume", folder])
    assert running.outcome(folder) == running.outcome(uninterrupted)


def test_a_signal_to_one_process_alone_stops_all_of_them(tmp_path):
    folder = tmp_path / "run"
    process = several.Torchrun(2, *words(folder, steps=MANY))
    process.wait_for("step     10")
    os.kill(process.pid_of_rank(1), signal.SIGINT)
    code, _, err = process.finish()
    assert code == 128 + signal.SIGINT
    assert err == f"stopped; to continue: {resume_command(folder)}\n"
    assert 10 <= running.load_checkpoint(folder).n_steps < MANY


def test_another_number_of_processes_continues_a_run_and_says_so(tmp_path):
    folder = tmp_path / "run"
    flags = {"dtype": "float64", "dropout": 0.0, "steps": 8}
    alone = tmp_path / "alone"
    with running.at_line(0, None) as executed:
        assert running.run(running.words(alone, **flags)) == 0
    kill = functools.partial(running.kill_self, signal.SIGINT)
    with running.at_line(len(executed) * 2 // 3, kill):
        assert running.run(running.words(folder, **flags)) == 128 + signal.SIGINT
    assert 0 < running.load_checkpoint(folder).n_steps < 8
    out = run_on_ranks(2, ["--resume", folder])
    assert "note     processes so far: 1, from now on: 2;" in out
    vectors = running.last_vectors(folder)
    for name, value in running.last_vectors(alone).items():
        assert (vectors[name] - value).abs().max() < 1e-9


def test_one_process_is_no_different_from_a_run_without_torchrun(tmp_path):
    code, out, err = several.call(1, *words(tmp_path / "started", steps=3))
    assert (code, err) == (0, "")
    assert "processes" not in out
    assert running.run(running.words(tmp_path / "plain", **LONG | {"steps": 3})) == 0
    assert running.outcome(tmp_path / "started") == running.outcome(tmp_path / "plain")


def test_a_program_of_ones_own_trains_in_several_processes(tmp_path):
    flags = {"model": str(running.model("t5")), "task": str(running.task()), "steps": 2}
    script = tmp_path / "program.py"
    script.write_text(
        "import minia3, os\n"
        f"for name in ('a', 'b'):\n"
        f"    trained = minia3.train(device='cpu', out=name, **{flags!r})\n"
        "    assert (trained.folder / 'adapter' / 'adapter_config.json').exists()\n"
        "    assert trained.results[0]['accuracy'] is not None\n"
        "print('rank ' + os.environ['RANK'])\n"  # one text, which nobody else's can divide
    )
    code, out, err = several.call(2, script, cwd=tmp_path)
    assert (code, err) == (0, "")
    assert "rank 0" in out
    assert "rank 1" in out  # perhaps in the same line
    assert out.count("\nbefore ") == 2  # one process prints
