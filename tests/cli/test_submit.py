"""submitit starts workers that make the runs of a study, here in place of a cluster."""

import contextlib
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import running
from command_line import failure, output
from running import ROOT
from test_study import states, wait_for, write_study

from minia3.cli.main import main
from minia3.training.checkpoint import save_checkpoint
from minia3.training.group import Group
from minia3.training.loop import load_loop

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


@pytest.mark.slow
def test_a_job_in_which_a_run_fails_is_a_job_that_failed(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    path = write_study(tmp_path, "[runs.bad]\ntask = 'nowhere.csv'")
    words = ["--only", "bad", "--submit", "local"]
    _, number, *_ = output(capsys, "study", path, *words).split()
    job = submitit.LocalJob(tmp_path / "runs" / "workers", number, (0,))
    wait_for(job.paths.result_pickle.exists, seconds=300)
    message = "minia3 study .* --only bad --run: the exit code is 1"
    with pytest.raises(submitit.core.utils.FailedJobError, match=message):
        job.result()


def test_a_path_that_submitit_would_change_is_refused(tmp_path, capsys):
    path = write_study(tmp_path)
    folder = tmp_path / "runs" / "50%train"
    message = failure(capsys, "study", path, "--out", folder, "--submit", "local")
    assert message == (
        f"minia3: {folder / 'workers'}: found a %, which submitit replaces with the number of a "
        "job: choose another --out\n"
    )
    assert not folder.exists()


@pytest.mark.parametrize("code", [1, 2])
def test_a_worker_that_fails_does_not_return(monkeypatch, code):
    from minia3.cli.submit import Worker

    monkeypatch.setattr("minia3.cli.submit.main", lambda words: code)
    with pytest.raises(RuntimeError, match=f"minia3 study 'a b.toml': the exit code is {code}"):
        Worker(["study", "a b.toml"])()


@pytest.mark.filterwarnings("ignore:No submission happened")
@pytest.mark.parametrize("gpus", [None, "3,5"])
def test_a_local_worker_has_the_gpus_of_the_process_that_starts_it(tmp_path, monkeypatch, gpus):
    """submitit starts it with CUDA_VISIBLE_DEVICES="", so that its runs would be on the CPU."""
    from minia3.cli.submit import Worker, submit

    def keep(executor, worker):
        workers.append(worker)
        return SimpleNamespace(job_id="7", paths=SimpleNamespace(stdout="7.out"))

    name = "CUDA_VISIBLE_DEVICES"
    monkeypatch.delenv(name, raising=False)
    if gpus is not None:
        monkeypatch.setenv(name, gpus)
    workers = []
    monkeypatch.setattr(submitit.AutoExecutor, "submit", keep)
    submit("local", [], tmp_path, 2, 1)
    workers.append(Worker([]))  # of a cluster, which chooses the GPUs itself
    seen = []
    monkeypatch.setattr("minia3.cli.submit.main", lambda words: seen.append(os.getenv(name)) or 0)
    for worker in workers:
        monkeypatch.setenv(name, "")
        worker()
    assert seen == [gpus, gpus, ""]


def test_a_worker_that_is_stopped_is_queued_again_with_the_same_words():
    from minia3.cli.submit import Worker

    worker = Worker(["study", "a.toml", "--run"])
    assert worker.checkpoint().function is worker


@contextlib.contextmanager
def submitit_handler(ending):
    """Let the process be one that submitit has started. The handler of its signal raises `ending`.

    Yield a list to which each call of the handler adds.
    """
    calls = []

    def queue_again(number, frame):
        calls.append(number)
        raise ending

    before = signal.signal(signal.SIGUSR2, queue_again)
    try:
        yield calls
        assert signal.getsignal(signal.SIGUSR2) is queue_again
    finally:
        signal.signal(signal.SIGUSR2, before)


ENDINGS = [
    SystemExit(122),
    submitit.core.utils.UncompletedJobError("timed-out too many times"),
    subprocess.CalledProcessError(1, ["scontrol", "requeue", "7"]),  # the cluster forbids it
]


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_run_whose_time_is_up_saves_its_last_step(tmp_path, capsys, monkeypatch, ending):
    from minia3.cli.submit import Worker

    original = Group.update
    updates = []

    def update(group, rates):
        updates.append(rates)
        if len(updates) == 5:
            running.kill_self(signal.SIGUSR2)
            running.kill_self(signal.SIGUSR2)  # a second one changes nothing
        original(group, rates)

    monkeypatch.setattr(Group, "update", update)
    path = write_study(tmp_path, steps=8)
    words = ["study", str(path), "--only", "seed0-ia3", "--save-every", "100", "--run"]
    with submitit_handler(ending) as calls, pytest.raises(type(ending)) as caught:
        Worker(words)()
    assert caught.value is ending
    assert len(calls) == 1
    folder = tmp_path / "runs" / "seed0-ia3"
    assert capsys.readouterr().err == (
        f"stopped; to continue: minia3 train --resume {running.quoted(folder)}\n"
        "minia3: the same command continues the study\n"
    )
    assert running.load_checkpoint(folder).n_steps == 5
    assert Worker(words)() == 0
    assert len(updates) == 8


@pytest.mark.parametrize("place", ["step", "evaluation"])
def test_a_run_whose_time_is_up_gives_up_what_may_take_long(place, tmp_path, monkeypatch):
    """A local worker that takes longer than half a minute to stop is not queued again."""
    from minia3.cli.submit import Worker

    def choice_logprobs(*arguments):
        parts.append(arguments)
        if place == "step" and len(parts) == 18:  # the second of four examples of step 5
            running.kill_self(signal.SIGUSR2)
        return score(*arguments)

    def evaluate(group, *arguments):
        if place == "evaluation" and group.log.step == 4:
            running.kill_self(signal.SIGUSR2)
            raise AssertionError("not reached")
        return original(group, *arguments)

    parts = []
    loop = load_loop()
    score = loop.choice_logprobs
    original = Group.evaluate
    path = write_study(tmp_path, steps=8)
    words = ["study", str(path), "--only", "seed0-ia3", "--micro-batch-size", "1"]
    words += ["--save-every", "100", "--eval-every", "4", "--run"]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "choice_logprobs", choice_logprobs)
        patch.setattr(Group, "evaluate", evaluate)
        with submitit_handler(SystemExit(122)), pytest.raises(SystemExit) as caught:
            Worker(words)()
    assert caught.value.code == 122
    assert len(parts) == {"step": 18, "evaluation": 16}[place]
    assert running.load_checkpoint(tmp_path / "runs" / "seed0-ia3").n_steps == 4
    assert Worker(words)() == 0


BOTH = (signal.SIGUSR2, signal.SIGTERM)


@pytest.mark.parametrize(("first", "second"), [BOTH, BOTH[::-1]])
def test_the_other_signal_of_slurm_does_not_disturb_the_saving(
    first, second, tmp_path, monkeypatch
):
    """It sends SIGTERM to a job that is queued again, and on some clusters before USR2, too."""
    from minia3.cli.submit import Worker

    def update(group, rates):
        original(group, rates)
        if group.log.step == 4:
            running.kill_self(first)

    def save(*arguments):
        running.kill_self(second)
        save_checkpoint(*arguments)

    original = Group.update
    monkeypatch.setattr(Group, "update", update)
    monkeypatch.setattr("minia3.training.run.save_checkpoint", save)
    path = write_study(tmp_path, steps=8)
    words = ["study", str(path), "--only", "seed0-ia3", "--save-every", "100", "--run"]
    with submitit_handler(SystemExit(122)) as calls, pytest.raises(SystemExit) as caught:
        Worker(words)()
    assert (caught.value.code, len(calls)) == (122, 1)
    assert running.load_checkpoint(tmp_path / "runs" / "seed0-ia3").n_steps == 5


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_worker_without_a_run_ends_at_once(tmp_path, monkeypatch, ending):
    from minia3.cli.submit import Worker

    def load(words):
        running.kill_self(signal.SIGUSR2)
        raise AssertionError("not reached")

    monkeypatch.setattr("minia3.cli.submit.main", load)
    with submitit_handler(ending) as calls, pytest.raises(type(ending)):
        Worker([])()
    assert len(calls) == 1


def test_a_cluster_that_is_not_there_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # where there is no srun
    path = write_study(tmp_path)
    assert "slrm" in failure(capsys, "study", path, "--submit", "slrm:gpu")
    assert failure(capsys, "study", path, "--submit", "slurm:gpu", code=1)


@pytest.mark.parametrize("words", [("--workers", "0"), ("--hours", "0"), ("--hours", "nan")])
def test_workers_and_hours_are_numbers_above_0(tmp_path, capsys, words):
    path = write_study(tmp_path)
    command = ["study", path, "--submit", "local"]
    assert "not a number above 0" in failure(capsys, *command, *words)
    assert "invalid float value: 'x'" in failure(capsys, *command, "--hours", "x")


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
