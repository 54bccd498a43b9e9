"""A study can be made by any number of workers, which may be killed: every run is made once."""

import contextlib
import json
import os
import re
import shlex
import signal
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import running
import torch
from command_line import failure, output
from forked import forget_shared_lock, print_into, run_as_python
from running import model, outcome, task

from minia3.cli.main import main
from minia3.cli.results import read_results
from minia3.files.lock import lock_folder
from minia3.training import start
from minia3.training.loop import load_loop
from minia3.training.run_folder import begin_run
from minia3.training.signals import Stopped
from minia3.training.study_file import given_words, read_studies

FENCE = re.compile(r"^```(\w*).*\n((?:.*\n)*?)```$", re.MULTILINE)
N_WORKERS = 6
VICTIMS = (0, 3)  # workers that are killed
N_BATCHES = 7  # that a victim draws before it is killed, after the checkpoint of step 6


def write_study(folder, text="", steps=3):
    """Write a study of four short runs on the random T5, and return its path."""
    path = folder / "study.toml"
    path.write_text(f"""
out = '{folder}/runs'
[flags]
model = '{model("t5")}'
task = '{task()}'
steps = {steps}
save-every = 2
batch-size = 4
device = 'cpu'
[each]
seed = [0, 1]
[each.method]
ia3 = {{}}
lora = {{method = 'lora', rank = 2}}
{text}
""")
    return path


def train_alone(path, folder):
    """Make each run of a study by itself, and return a dict from its name to its outcome."""
    outcomes = {}
    for run in read_studies([path], {"out": str(folder)}):
        assert running.run(given_words(run.flags)) == 0
        outcomes[run.name] = outcome(run.folder)
    return outcomes


def outcomes_of(path):
    return {run.name: outcome(run.folder) for run in read_studies([path], {})}


def states(capsys, path):
    """Return how many runs are in each state, and the state of each run."""
    *lines, last = output(capsys, "study", path).splitlines()
    return last, {Path(line.rpartition(" ")[2]).name: line[:9].strip() for line in lines}


# Lists and states


def test_the_list_has_command_lines_that_may_be_given_again(tmp_path, capsys):
    path = write_study(tmp_path, steps=2)
    lines = output(capsys, "study", path, "--list").splitlines()
    assert len(lines) == 4
    program, words = shlex.split(lines[0])[:2], shlex.split(lines[0])[2:]
    assert program == ["minia3", "train"]
    for expected in ("after ", "is finished"):
        assert running.run(words) == 0
        assert expected in capsys.readouterr().out
    assert states(capsys, path) == (
        "4 runs: 1 finished, 3 to come",
        {
            "seed0-ia3": "finished",
            "seed0-lora": "to come",
            "seed1-ia3": "to come",
            "seed1-lora": "to come",
        },
    )


def test_flags_on_the_command_line_replace_those_of_the_file(tmp_path, capsys):
    path = write_study(tmp_path)
    lines = output(capsys, "study", path, "--list", "--steps", 7, "--out", "elsewhere").splitlines()
    assert len(lines) == 4
    for line in lines:
        assert "--steps 7 " in line
        assert " --out elsewhere/" in line


def test_a_zero_on_the_command_line_reaches_every_run_and_every_worker(
    tmp_path, capsys, monkeypatch
):
    path = write_study(tmp_path)
    lines = output(capsys, "study", path, "--list", "--dropout", 0).splitlines()
    assert len(lines) == 4
    for line in lines:
        assert " --dropout 0.0 " in line
    calls = []
    monkeypatch.setattr("minia3.cli.submit.submit", lambda *given: calls.append(given))
    assert main(["study", str(path), "--submit", "local", "--dropout", "0"]) == 0
    ((_, words, *_),) = calls
    assert words == ["study", str(path), "--dropout", "0.0", "--only", "*", "--run"]


def test_a_flag_of_several_lines_is_not_listed_as_several_commands(tmp_path, capsys):
    path = write_study(tmp_path, '[runs.prompt]\ninput = "{a}\\nIs it?"\ntarget = "{b}"')
    capsys.readouterr()
    assert main(["study", str(path), "--list"]) == 2
    assert "prompt has a flag of several lines" in capsys.readouterr().err


@pytest.mark.parametrize("n", [1, 2, 3, 4, 9])
def test_the_shares_are_the_runs_divided(tmp_path, monkeypatch, n):
    path = write_study(tmp_path)
    shares = []
    monkeypatch.setattr("minia3.cli.study.make_runs", lambda runs, share: shares.append(share))
    for i in range(1, n + 1):
        assert main(["study", str(path), "--run", f"{i}/{n}"]) == 0
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    names = sorted(run.name for share in shares for run in share)
    assert names == sorted(run.name for run in read_studies([path], {}))


@pytest.mark.parametrize("share", ["0/3", "4/3", "1", "a/b", "1/", "-1/3", "1/0", "1/2/3"])
def test_a_share_that_does_not_exist_is_refused(tmp_path, capsys, share):
    assert "not a share" in failure(capsys, "study", write_study(tmp_path), f"--run={share}")


def test_run_before_the_file_is_explained(tmp_path, capsys):
    path = write_study(tmp_path)
    assert "put --run after the file" in failure(capsys, "study", "--run", path)


@pytest.mark.parametrize("words", [("--workers", "6"), ("--run", "--hours", "8")])
def test_workers_and_hours_without_submit_are_refused(tmp_path, capsys, words):
    message = failure(capsys, "study", write_study(tmp_path), *words)
    assert "is for --submit, which starts workers: give it, too" in message
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("hours", "expected"),
    [("inf", "a finite number"), ("nan", "a number"), ("-inf", "a number"), ("0", "a number")],
)
def test_hours_that_are_no_time_are_refused(tmp_path, capsys, hours, expected):
    message = failure(capsys, "study", write_study(tmp_path), "--submit=local", f"--hours={hours}")
    assert f"argument --hours: {hours} is not {expected} above 0" in message
    assert not (tmp_path / "runs").exists()


# Making runs


def test_runs_that_nobody_has_begun_come_first(tmp_path, capsys, monkeypatch):
    """So that a run that kills its worker each time does not keep the others waiting."""
    path = write_study(tmp_path, steps=1)
    runs = read_studies([path], {})
    assert running.run(given_words(runs[1].flags)) == 0
    made = []
    monkeypatch.setattr("minia3.cli.study.make_run", lambda run: made.append(run.name) or "made")
    assert main(["study", str(path), "--run"]) == 0
    assert made == [runs[i].name for i in (0, 2, 3, 1)]


def test_a_worker_is_one_process(tmp_path, capsys, monkeypatch):
    path = write_study(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "4")
    message = failure(capsys, "study", path, "--run")
    assert "a worker of a study is one process, and torchrun has started 4" in message
    assert output(capsys, "study", path, "--list").count("\n") == 4


@pytest.mark.slow
def test_runs_equal_those_that_are_made_alone_and_are_not_made_twice(tmp_path, capsys):
    path = write_study(tmp_path)
    assert "2 finished now" in output(capsys, "study", path, "--run", "2/2")
    assert "2 finished now, 2 finished before" in output(capsys, "study", path, "--run")
    before = running.contents(tmp_path / "runs")
    assert output(capsys, "study", path, "--run") == "4 finished before\n"
    assert running.contents(tmp_path / "runs") == before
    assert states(capsys, path)[0] == "4 runs: 4 finished"
    assert outcomes_of(path) == train_alone(path, tmp_path / "alone")


@pytest.mark.slow
def test_a_run_that_another_worker_makes_is_passed_over(tmp_path, capsys):
    path = write_study(tmp_path)
    first = read_studies([path], {})[0]
    first.folder.mkdir(parents=True)
    with lock_folder(first.folder):
        printed = output(capsys, "study", path, "--run")
    assert printed.endswith("\n1 left to another worker, 3 finished now\n")
    assert "another worker is working on this run" in printed
    assert "1 finished now, 3 finished before" in output(capsys, "study", path, "--run")


@pytest.mark.slow
def test_a_run_that_another_worker_has_begun_since_we_looked_is_continued(
    tmp_path, capsys, monkeypatch
):
    path = write_study(tmp_path)
    first = read_studies([path], {})[0]
    run_config = start.run_config
    n_calls = 0

    def run_config_but_late(*arguments, **options):
        nonlocal n_calls
        n_calls += 1
        if n_calls == 1:
            assert running.run(given_words(first.flags)) == 0
        return run_config(*arguments, **options)

    monkeypatch.setattr(start, "run_config", run_config_but_late)
    printed = output(capsys, "study", path, "--run", "1/4")
    assert n_calls == 2
    assert printed.endswith("\n1 finished before\n")


def test_a_run_whose_worker_is_killed_while_others_work_is_made_by_one_of_them(
    tmp_path, capsys, monkeypatch
):
    path = write_study(tmp_path, steps=1)
    first, second, *_ = read_studies([path], {})
    first.folder.mkdir(parents=True)
    lock = lock_folder(first.folder)
    run_config = start.run_config

    def run_config_and_kill_the_other(config, *arguments, **options):
        if Path(config.out) == second.folder:
            lock.close()
        return run_config(config, *arguments, **options)

    monkeypatch.setattr(start, "run_config", run_config_and_kill_the_other)
    printed = output(capsys, "study", path, "--only", "seed0-*", "--run")
    assert "another worker is working on this run" in printed
    assert printed.endswith("\n2 finished now\n")


def test_a_run_that_another_worker_has_begun_and_left_since_we_looked_is_continued(
    tmp_path, capsys, monkeypatch
):
    path = write_study(tmp_path, steps=1)
    first = read_studies([path], {})[0]
    run_config = start.run_config

    def run_config_but_late(config, *arguments, **options):
        if not first.has_begun:
            with contextlib.ExitStack() as resources:  # of a worker that is killed at once
                begin_run(first.folder, config, {}, resources)
        return run_config(config, *arguments, **options)

    monkeypatch.setattr(start, "run_config", run_config_but_late)
    printed = output(capsys, "study", path, "--run", "1/4")
    assert printed.endswith("\n1 finished now\n")
    assert "another worker is working on this run" not in printed


def test_a_worker_does_not_read_the_state_of_a_finished_run(tmp_path, capsys, monkeypatch):
    """With --method full, it is three times as large as the model."""
    path = write_study(tmp_path, steps=1)
    assert "1 finished now" in output(capsys, "study", path, "--run", "1/4")
    read = []
    monkeypatch.setattr("minia3.training.checkpoint.read_values", read.append)
    assert output(capsys, "study", path, "--run", "1/4") == "1 finished before\n"
    assert read == []


@pytest.mark.slow
def test_a_run_that_fails_does_not_stop_the_others(tmp_path, capsys):
    path = write_study(tmp_path, "[runs.bad]\ntask = 'nowhere.csv'", steps=1)
    assert main(["study", str(path), "--run"]) == 1
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("minia3 train: nowhere.csv: no such file or folder")
    assert last == f"minia3: 1 of 5 runs failed, see above: {tmp_path}/runs/bad"
    assert states(capsys, path)[0] == "5 runs: 4 finished, 1 to come"


class AcceleratorError(RuntimeError):
    """Stands for that of torch, which torch 2.5 does not have."""


@pytest.mark.parametrize(
    ("error", "n_made"),
    [
        (NotImplementedError("aten::x is not implemented"), 4),
        (AcceleratorError("the device is gone"), 2),
        (RuntimeError("CUDA error: an illegal access"), 2),
    ],
)
def test_an_error_of_torch_stops_the_worker_only_if_the_accelerator_is_lost(
    tmp_path, capsys, monkeypatch, error, n_made
):
    path = write_study(tmp_path, steps=1)
    runs = read_studies([path], {})
    second = runs[1]
    made = []

    def run_config(config, *_, **__):
        made.append(Path(config.out))
        if made[-1] == second.folder:
            raise error

    monkeypatch.setattr(torch, "AcceleratorError", AcceleratorError, raising=False)
    monkeypatch.setattr(start, "run_config", run_config)
    # The states are of no interest, because nothing is made.
    monkeypatch.setattr("minia3.cli.study.state_of", lambda run: "finished")
    capsys.readouterr()
    assert main(["study", str(path), "--run"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert made == [run.folder for run in runs[:n_made]]
    if n_made == 2:
        assert lines == [f"minia3: {error}"]
    else:
        assert lines == [
            f"minia3 train: {second.folder}: {error}",
            f"minia3: 1 of 4 runs failed, see above: {second.folder}",
        ]


@pytest.mark.slow
def test_a_loss_that_is_nan_is_a_run_that_failed(tmp_path, capsys):
    path = write_study(tmp_path, "[runs.high]\nlr = 1e30\nclip = 1e30")
    assert main(["study", str(path), "--run", "5/5", "--steps", "30"]) == 1
    capsys.readouterr()
    assert "1 failed" in output(capsys, "study", path, "--steps", 30)


def test_a_grid_in_which_an_adapter_fails_is_a_run_that_failed_and_is_not_made_again(
    tmp_path, capsys
):
    path = write_study(tmp_path, "[runs.grid]\nlr = [1e-12, 1e30]\ndropout = 0\nwarmup-ratio = 0")
    words = ["study", str(path), "--only", "grid", "--steps", "12"]
    capsys.readouterr()
    for _ in range(2):
        assert main([*words, "--run"]) == 1
        out, err = capsys.readouterr()
        assert out.endswith("1 failed\n")
        first, last = err.splitlines()
        assert first.startswith(f"minia3 train: {tmp_path}/runs/grid: some of its adapters failed")
        assert last == f"minia3: the only run failed, see above: {tmp_path}/runs/grid"
        assert output(capsys, *words).endswith("\n1 run: 1 failed\n")
    assert out == "1 failed\n"  # so nothing was trained
    assert len(read_results([tmp_path / "runs" / "grid"])[0]) == 1


def test_a_finished_run_whose_checkpoint_was_deleted_is_not_made_again(tmp_path, capsys):
    path = write_study(tmp_path, steps=1)
    assert "1 finished now" in output(capsys, "study", path, "--run", "1/4")
    first = read_studies([path], {})[0]
    (first.folder / "checkpoint.pt").unlink()
    before = running.contents(first.folder)
    assert states(capsys, path)[1]["seed0-ia3"] == "finished"
    assert output(capsys, "study", path, "--run", "1/4") == "1 finished before\n"
    assert running.contents(first.folder) == before


def test_a_run_with_the_flags_that_the_file_had_before_is_noted(tmp_path, capsys):
    path = write_study(tmp_path, steps=1)
    first = read_studies([path], {})[0]
    assert running.run([*given_words(first.flags), "--data-dir", "elsewhere"]) == 0
    last, found = states(capsys, path)
    assert (last, len(found)) == ("4 runs: 1 finished, 3 to come", 4)
    write_study(tmp_path, steps=2)
    *_, note, last = output(capsys, "study", path).splitlines()
    assert note == (
        f"note      1 run not of this study: {first.folder} holds a run with other flags: "
        "--steps is 1, expected 2: give another --out, or remove the folder, or make it longer: "
        f"minia3 train --resume {first.folder} --steps 2"
    )
    assert last == "4 runs: 1 finished, 3 to come"


@pytest.mark.parametrize("length", [("--steps", "2"), ("--epochs", "0.4")])
def test_a_study_goes_on_with_a_run_that_was_made_longer(tmp_path, capsys, length):
    words = ["study", write_study(tmp_path), "--only", "seed0-ia3", "--run"]
    assert "1 finished now" in output(capsys, *words, *length)
    folder = tmp_path / "runs" / "seed0-ia3"
    assert running.run(["--resume", folder, "--steps", 4]) == 0
    advice = "or remove the folder, or, if it was made longer, give --steps 4\n"
    assert failure(capsys, *words, *length).endswith(advice)
    assert output(capsys, *words, "--steps", 4) == "1 finished before\n"


@pytest.mark.parametrize(
    ("name", "content"), [("metrics.jsonl", "{}\n[3]\n"), ("config.json", '{"model"')]
)
def test_a_damaged_run_does_not_hide_the_others(tmp_path, capsys, name, content):
    path = write_study(tmp_path, steps=1)
    runs = read_studies([path], {})
    for run in runs[:2]:
        assert running.run(given_words(run.flags)) == 0
    (runs[0].folder / name).write_text(content)
    *lines, note, last = output(capsys, "study", path).splitlines()
    found = [line[:9].strip() for line in lines]
    assert found == ["damaged", "finished", "to come", "to come"]
    assert note.startswith(f"note      {runs[0].folder}: expected a run of train.py: ")
    assert name in note
    assert last == "4 runs: 1 finished, 1 damaged, 2 to come"


def test_runs_with_other_flags_are_a_mistake_before_anything_is_made(tmp_path, capsys):
    path = write_study(tmp_path, steps=1)
    last = read_studies([path], {})[-1]
    assert running.run(given_words(last.flags)) == 0
    found = f"{last.folder} holds a run with other flags: --steps is 1, expected 2"
    for action in ("--run", "--submit=local"):
        assert found in failure(capsys, "study", path, action, "--steps", 2)
    assert not (tmp_path / "runs" / "workers").exists()
    assert states(capsys, path)[0] == "4 runs: 1 finished, 3 to come"


def test_a_study_that_a_signal_stops_says_how_to_continue_it(tmp_path, capsys, monkeypatch):
    def run_config(*_, **__):
        raise Stopped(signal.SIGINT)

    monkeypatch.setattr("minia3.training.start.run_config", run_config)
    with pytest.raises(SystemExit) as exit_of_worker:
        main(["study", str(write_study(tmp_path)), "--run"])
    assert exit_of_worker.value.code == 130
    assert capsys.readouterr().err == "minia3: the same command continues the study\n"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_run_and_stops_the_worker(tmp_path, capsys, number):
    path = write_study(tmp_path, steps=3000)
    log = tmp_path / "log"
    words = ["-m", "minia3", "study", str(path), "--run"]
    worker = running.processes().Process(target=be_program, args=(words, log))
    worker.start()
    wait_for(lambda: (tmp_path / "runs/seed0-ia3/checkpoint.pt").exists())
    os.kill(worker.pid, number)
    assert running.finish(worker) == 128 + number, log.read_text()
    assert "stopped; to continue: minia3 train --resume" in log.read_text()
    last, found = states(capsys, path)
    assert last == "4 runs: 1 begun, 3 to come"
    assert found["seed0-ia3"] == "begun"


def be_program(words, log):
    """Do what `python WORDS` does, in this process, which was forked for it."""
    print_into(log, log)
    forget_shared_lock()
    run_as_python(words)


# Six workers, two of which are killed


def work(words, folder, number):
    """Be worker `number`: make runs, and write down when each begins and ends.

    A victim is killed in the middle of a run, after all workers have begun.
    """
    loop = load_loop()
    log = os.open(folder / f"worker-{number}.log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    run_grid = loop.run_grid
    next_batch = loop.Group.next_batch
    n_drawn = 0
    current = None  # the folder of the run

    def next_batch_or_death(group):
        nonlocal n_drawn
        n_drawn += 1
        if n_drawn == N_BATCHES:
            wait_for(lambda: len(list(folder.glob("worker-*.log"))) == N_WORKERS)
            note(folder, current, "killed")
            running.kill_self()
        return next_batch(group)

    def noted_run_grid(run, config):  # which is called with the lock of the run
        nonlocal current
        current = run.folder
        note(folder, run.folder, "begins")
        run_grid(run, config)
        note(folder, run.folder, "ends")

    loop.run_grid = noted_run_grid
    if number in VICTIMS:
        loop.Group.next_batch = next_batch_or_death
    sys.exit(main(words))


def note(folder, run_folder, event):
    line = {"run": run_folder.name, "worker": os.getpid(), "time": time.monotonic(), "event": event}
    with open(folder / "events.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def wait_for(condition, seconds=180):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def read_meanwhile(runs_folder, workers):
    """Read the results again and again while workers write them. Return how many there were."""
    counts = []
    while any(worker.is_alive() for worker in workers):
        # Before the first result, this is all that there is to say.
        with contextlib.suppress(ValueError):
            counts.append(len(read_results([runs_folder])[0]))
        time.sleep(0.1)
    return counts


@pytest.mark.slow
def test_six_workers_make_each_run_once_although_two_are_killed(tmp_path, capsys):
    text = "[runs.none]\nmethod = 'none'\n[runs.grid]\nlr = [1e-3, 3e-3]\n"
    text += "[runs.long]\nsteps = 24\n[runs.ul]\nlosses = 'lm,ul'\nseed = 5"
    path = write_study(tmp_path, text, steps=8)
    words = ["study", str(path), "--run"]
    workers = {}
    for number in sorted(range(N_WORKERS), key=lambda number: number not in VICTIMS):
        process = running.processes().Process(target=work, args=(words, tmp_path, number))
        process.start()
        workers[number] = process
        if number in VICTIMS:  # so that each victim has a run, however slow this machine is
            wait_for(lambda: len(list(tmp_path.glob("runs/*/metrics.jsonl"))) == len(workers))
    counts = read_meanwhile(tmp_path / "runs", workers.values())
    assert counts == sorted(counts)
    codes = {number: running.finish(worker) for number, worker in workers.items()}
    expected = dict.fromkeys(range(N_WORKERS), 0)
    expected |= dict.fromkeys(VICTIMS, -signal.SIGKILL)
    logs = [path.read_text() for path in sorted(tmp_path.glob("worker-*.log"))]
    assert codes == expected, logs

    # Nobody waits for the runs of the dead. One more worker completes the study.
    assert main(words) == 0
    capsys.readouterr()
    assert states(capsys, path)[0] == "8 runs: 8 finished"
    check_no_run_was_made_twice_at_once(tmp_path)
    assert outcomes_of(path) == train_alone(path, tmp_path / "alone")
    assert "| none " in output(capsys, "table", tmp_path / "runs")


def check_no_run_was_made_twice_at_once(folder):
    """Check that the events of each run alternate: it begins, ends or is killed, and so on."""
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    events.sort(key=lambda event: event["time"])
    assert sum(event["event"] == "killed" for event in events) == len(VICTIMS)
    for name in {event["run"] for event in events}:
        of_run = [event for event in events if event["run"] == name]
        assert of_run[0]["event"] == "begins"
        for event, following in pairwise(of_run):
            if event["event"] == "begins":
                assert following["worker"] == event["worker"]
                assert following["event"] in ("ends", "killed")
            else:
                assert following["event"] == "begins"


# The documents


def test_the_study_in_the_documents_has_the_runs_that_they_show(tmp_path, capsys):
    text = (running.ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    blocks = dict(FENCE.findall(text.partition("## Sweeps on a cluster")[2])[:3])
    path = tmp_path / "study.toml"
    path.write_text(blocks["toml"])
    assert output(capsys, "study", path, "--list") == blocks["text"]
