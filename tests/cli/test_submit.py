"""submitit starts workers that make the runs of a study, here in place of a cluster."""

import sys

import pytest
from command_line import failure, output
from running import ROOT
from test_study import states, wait_for, write_study

from minia3.cli.main import main

submitit = pytest.importorskip("submitit", reason="--submit needs submitit")


@pytest.mark.slow
def test_two_local_workers_make_all_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    path = write_study(tmp_path)
    words = ["--steps", 2, "--submit", "local", "--workers", 2]
    lines = output(capsys, "study", path, *words).splitlines()
    assert len(lines) == 2
    for line in lines:
        _, number, *_, log = line.split()
        folder = tmp_path / "runs" / "workers"
        assert log.startswith(f"{folder}/{number}")
        job = submitit.LocalJob(folder, number, (0,))
        # A job that another object has started does not know whether its process is alive.
        wait_for(job.paths.result_pickle.exists, seconds=300)
        assert job.result() == 0
    assert states(capsys, path)[0] == "4 runs: 4 finished"


def test_a_worker_that_is_stopped_is_queued_again_with_the_same_words():
    from minia3.cli.submit import Worker

    worker = Worker(["study", "a.toml", "--run"])
    assert worker.checkpoint().function is worker


def test_a_cluster_that_is_not_there_is_one_line(tmp_path, capsys):
    path = write_study(tmp_path)
    assert "slrm" in failure(capsys, "study", path, "--submit", "slrm:gpu")
    assert failure(capsys, "study", path, "--submit", "slurm:gpu", code=1)


@pytest.mark.parametrize("words", [("--workers", "0"), ("--hours", "0"), ("--hours", "nan")])
def test_workers_and_hours_are_numbers_above_0(tmp_path, capsys, words):
    path = write_study(tmp_path)
    assert "not a number above 0" in failure(capsys, "study", path, "--submit", "local", *words)


@pytest.mark.parametrize(("words", "expected"), [((), (1, 24)), (("--workers", "3"), (3, 24))])
def test_workers_and_hours_have_defaults(tmp_path, monkeypatch, words, expected):
    found = []
    monkeypatch.setattr("minia3.cli.submit.submit", lambda *arguments: found.append(arguments[3:]))
    assert main(["study", str(write_study(tmp_path)), "--submit", "local", *words]) == 0
    assert found == [expected]


@pytest.mark.filterwarnings("ignore:No submission happened")
@pytest.mark.parametrize(("hours", "minutes"), [(0.005, 1), (24, 1440), (0.51, 31)])
def test_a_short_time_is_a_minute_and_not_none(tmp_path, monkeypatch, hours, minutes):
    """SLURM takes 0 for no limit."""
    from minia3.cli.submit import submit

    found = []
    update = submitit.AutoExecutor.update_parameters

    def update_parameters(executor, **parameters):
        found.append(parameters)
        update(executor, **parameters)

    monkeypatch.setattr(submitit.AutoExecutor, "update_parameters", update_parameters)
    submit("local", [], tmp_path, 0, hours)
    assert found[0]["timeout_min"] == minutes


def test_without_submitit_the_extra_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    message = failure(capsys, "study", write_study(tmp_path), "--submit", "slurm")
    assert message == "minia3: --submit needs submitit: pip install 'minia3[cluster]'\n"
