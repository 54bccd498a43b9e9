"""Guards the run's folder: a run that was stopped or killed anywhere and goes on is the run that never stopped, bit for
bit; no run overwrites another; what a run depends on is on disk before anything slow, and its metrics line by line.
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import running
import torch
from running import (
    at_line,
    contents,
    fails,
    finish,
    kill_self,
    metrics,
    outcome,
    resume,
    run,
    start,
    train,
    words,
)

import minia3
from minia3.tasks.splits import load_task
from minia3.training import group as training_group
from minia3.training.checkpoint import load_checkpoint
from minia3.training.run_folder import Metrics, environment

RECIPES = {
    "adafactor": {"dropout": 0.1, "save_every": 5},
    "adamw": {
        **{
            "dropout": 0.2,
            "optimizer": "adamw",
            "weight_decay": 0.1,
            "micro_batch_size": 3,
            "save_every": 4,
        },
        "choices": (2, 3, 1),
    },
    "best of": {
        "dropout": 0.1,
        "eval_every": 3,
        "patience": 2,
        "save_every": 6,
        "steps": 24,
        "seed": 26,
        "lr": 0.3,
    },
    "one by one": {
        "method": "lora",
        "seed": "0,3",
        "lr": "0.1,0.01",
        "steps": 6,
        "save_every": 4,
        "dropout": 0.1,
    },
    "in context": {"method": "icl", "shots": 2, "seed": "0,1,2"},
    "targets": {
        "model": "llama",
        "choices": (0,),
        "max_new_tokens": 4,
        "eval_every": 6,
        "dropout": 0.1,
    },
}


def recipe(name, out):
    """The command line of a run of RECIPES into `out`."""
    values = dict(RECIPES[name])
    values |= {
        "task": running.task(values.pop("choices", (2,))),
        "model": running.model(values.pop("model", "t5")),
    }
    return words(out, **values)


@functools.cache
def uninterrupted(name):
    """-> the outcome of a run of RECIPES, and the lines of code that it ran."""
    folder = Path(running.home().name, f"uninterrupted {name}")
    with at_line(0, None) as ran:
        assert run(recipe(name, folder)) == 0
    return outcome(folder), ran


def somewhere(name, seed):
    return random.Random(f"{name} {seed}").randint(1, len(uninterrupted(name)[1]))


def goes_on_as_if_nothing_had_been(name, folder):
    assert resume(folder) == 0
    assert outcome(folder) == uninterrupted(name)[0]


def stopped(out):
    return f"stopped; to continue: python train.py --resume {out}\n"


def test_the_recipes_are_worth_interrupting():
    (_, lines), _ = uninterrupted("best of")
    accuracies = [line["accuracy"] for line in lines if line["event"] == "eval"]
    assert len(set(accuracies)) >= 3
    assert lines[-1]["steps"] < RECIPES["best of"]["steps"]  # patience
    assert len({uninterrupted(name)[0][0] for name in RECIPES}) == len(RECIPES)
    assert any(
        line["step"] % 5 and line["event"] == "train" for line in uninterrupted("adafactor")[0][1]
    )


# Stopped: Ctrl-C, SIGTERM


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", RECIPES)
def test_a_run_stopped_anywhere_says_how_to_go_on_and_goes_on_bit_for_bit(
    name, seed, tmp_path, capsys
):
    number, code = ((signal.SIGINT, 130), (signal.SIGTERM, 143))[seed % 2]
    out = tmp_path / "run"
    n = somewhere(name, seed)
    capsys.readouterr()
    with at_line(n, functools.partial(kill_self, number)) as ran:
        assert run(recipe(name, out)) == code, ran[-1]
    assert capsys.readouterr().err == stopped(out)
    goes_on_as_if_nothing_had_been(name, out)


@pytest.mark.parametrize(
    ("phase", "owner", "function", "call", "step"),
    [
        ("load", training_group, "load_model", 1, None),
        ("before", training_group, "evaluate", 1, None),
        ("step", torch.nn.utils, "clip_grad_norm_", 8, 8),
        ("first step", torch.nn.utils, "clip_grad_norm_", 1, 1),
        ("held out", training_group, "evaluate", 3, 6),
        ("after", training_group, "evaluate", 8, 18),
    ],
)
def test_each_phase_can_be_stopped_and_a_step_is_never_half_done(
    phase, owner, function, call, step, tmp_path, capsys, monkeypatch
):
    original, calls = getattr(owner, function), []

    def interrupted(*args, **options):
        calls.append(None)
        if len(calls) == call:
            kill_self(signal.SIGINT)
        return original(*args, **options)

    uninterrupted("best of")
    monkeypatch.setattr(owner, function, interrupted)
    out = tmp_path / "run"
    capsys.readouterr()
    assert run(recipe("best of", out)) == 130
    assert capsys.readouterr().err == stopped(out)
    assert len(calls) == call  # at once, and in a step at its end
    saved = load_checkpoint(out)
    assert (saved and saved["step"]) == step
    monkeypatch.undo()
    goes_on_as_if_nothing_had_been("best of", out)


def test_a_measurement_on_held_out_rows_counts_as_a_whole_or_not_at_all(tmp_path):
    code = Path(train.__file__).read_text().splitlines()
    first, end = (
        next(number for number, line in enumerate(code, 1) if text in line)
        for text in ("measure(i, part, part.held_out)", "began, signals.in_step")
    )
    ran = uninterrupted("best of")[1]
    begin = [n for n, line in enumerate(ran) if line == ("train.py", first)][
        3
    ]  # the fourth, which is no better
    stops = range(begin, ran.index(("train.py", end), begin))
    for n in (n for n in stops if first <= ran[n][1] <= end):
        out = tmp_path / str(n)
        with at_line(n + 1, functools.partial(kill_self, signal.SIGINT)):
            assert run(recipe("best of", out)) == 130
        goes_on_as_if_nothing_had_been("best of", out)


def test_a_second_signal_while_the_first_one_saves_keeps_the_last_checkpoint(
    tmp_path, monkeypatch, capsys
):
    uninterrupted("adafactor")
    out, original = tmp_path / "run", torch.save

    def impatient(state, file):
        if state["step"] == 8:
            kill_self(signal.SIGTERM)
        original(state, file)

    clip, steps = torch.nn.utils.clip_grad_norm_, []

    def count(*args, **options):
        steps.append(None)
        if len(steps) == 8:
            kill_self(signal.SIGINT)
        return clip(*args, **options)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", count)
    monkeypatch.setattr(torch, "save", impatient)
    capsys.readouterr()
    assert run(recipe("adafactor", out)) == 143
    assert capsys.readouterr().err == stopped(out)
    monkeypatch.undo()
    assert load_checkpoint(out)["step"] == 5
    goes_on_as_if_nothing_had_been("adafactor", out)


def test_a_folder_with_a_space_is_quoted_in_what_to_type(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training_group, "load_model", lambda *args, **options: kill_self(signal.SIGINT))
    out = tmp_path / "my run"
    assert run(words(out)) == 130
    assert capsys.readouterr().err == f"stopped; to continue: python train.py --resume '{out}'\n"


def test_a_measurement_without_a_folder_that_is_stopped_has_nothing_to_go_on_with(
    capsys, monkeypatch
):
    monkeypatch.setattr(training_group, "load_model", lambda *args, **options: kill_self(signal.SIGTERM))
    assert run(words(None, "--eval-only")) == 143
    assert capsys.readouterr().err == "stopped\n"


# Killed: SIGKILL


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", RECIPES)
def test_a_run_killed_anywhere_goes_on_bit_for_bit(name, seed, tmp_path):
    out = tmp_path / "run"
    prepare = functools.partial(at_line, somewhere(name, f"kill {seed}"), kill_self)
    assert finish(start(recipe(name, out), tmp_path / "log", prepare)) == -signal.SIGKILL
    goes_on_as_if_nothing_had_been(name, out)


def test_a_run_killed_again_and_again_goes_on_bit_for_bit(tmp_path):
    out, n = tmp_path / "run", len(uninterrupted("best of")[1])
    arguments = recipe("best of", out)
    for part in (0.6, 0.5, 0.4):
        prepare = functools.partial(at_line, int(part * n), kill_self)
        assert finish(start(arguments, tmp_path / "log", prepare)) == -signal.SIGKILL
        arguments = ["--resume", out]
    goes_on_as_if_nothing_had_been("best of", out)


@contextlib.contextmanager
def torn_checkpoint(k):
    """The k-th checkpoint is written by half when the process is killed."""
    write, n = Path.write_bytes, []

    def half(path, data):
        n.append(None)
        if len(n) < k:
            return write(path, data)
        write(path, data[: len(data) // 2])
        return kill_self()

    Path.write_bytes = half
    yield


@pytest.mark.parametrize("k", [1, 2])
def test_a_run_killed_while_it_writes_a_checkpoint_goes_on_from_the_one_before(k, tmp_path):
    out = tmp_path / "run"
    prepare = functools.partial(torn_checkpoint, k)
    assert finish(start(recipe("adafactor", out), tmp_path / "log", prepare)) == -signal.SIGKILL
    saved = load_checkpoint(out)
    assert (saved and saved["step"]) == (None, 5)[k - 1]
    goes_on_as_if_nothing_had_been("adafactor", out)


@contextlib.contextmanager
def torn_line(event, step, part):
    """The line of `event` at `step` is written by a part when the process is killed."""
    write = Metrics.write

    def cut(self, **values):
        if (values["event"], values["step"]) != (event, step):
            return write(self, **values)
        text = json.dumps(values) + "\n"
        with self.path.open("a") as file:
            file.write(text[: int(part * len(text))])
        return kill_self()

    Metrics.write = cut
    yield


@pytest.mark.parametrize("part", [0, 0.5, 1])
@pytest.mark.parametrize(
    ("event", "step"), [("before", 0), ("train", 10), ("eval", 6), ("final", 18)]
)
def test_a_run_killed_while_it_writes_a_line_of_metrics_has_it_once(event, step, part, tmp_path):
    out = tmp_path / "run"
    prepare = functools.partial(torn_line, event, step, part)
    assert finish(start(recipe("best of", out), tmp_path / "log", prepare)) == -signal.SIGKILL
    goes_on_as_if_nothing_had_been("best of", out)


def test_a_finished_run_of_another_layout_is_finished(tmp_path, capsys):
    assert run(recipe("adafactor", tmp_path / "run")) == 0
    before = contents(tmp_path / "run")
    torch.save({"finished": True, "step": 3}, tmp_path / "run" / "checkpoint.pt")
    capsys.readouterr()
    assert resume(tmp_path / "run") == 0
    assert "is finished" in capsys.readouterr().out
    after = contents(tmp_path / "run")
    assert {name for name in before if before[name] != after[name]} == {Path("checkpoint.pt")}
    torch.save({"finished": False, "step": 3}, tmp_path / "run" / "checkpoint.pt")
    fails(["--resume", tmp_path / "run"], capsys, "not the state of a run")


def test_a_run_killed_before_its_first_checkpoint_goes_on_from_step_0(tmp_path):
    out = tmp_path / "run"
    prepare = functools.partial(torn_line, "train", 10, 1)
    assert finish(start(recipe("targets", out), tmp_path / "log", prepare)) == -signal.SIGKILL
    assert not (out / "checkpoint.pt").exists()
    assert metrics(out)[-1]["step"] == 10
    goes_on_as_if_nothing_had_been("targets", out)


@pytest.mark.parametrize(
    "more", ["", '{"event": "train", "step": 99}\n', '{"event": "fin', "\0\0\0", "\n\n"]
)
def test_whatever_metrics_hold_past_the_checkpoint_is_cut(more, tmp_path, monkeypatch):
    uninterrupted("adafactor")
    out, original = tmp_path / "run", save_checkpoint

    def stop(folder, state):
        original(folder, state)
        kill_self(signal.SIGTERM)

    monkeypatch.setattr("minia3.training.checkpoint.save_checkpoint", stop)
    assert run(recipe("adafactor", out)) == 143
    monkeypatch.undo()
    with (out / "metrics.jsonl").open("a") as file:
        file.write(more)
    goes_on_as_if_nothing_had_been("adafactor", out)


def test_metrics_that_lost_their_end_are_not_filled_up(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"a": 1}\n')
    Metrics(tmp_path, 100).write(b=2)
    assert metrics(tmp_path) == [{"a": 1}, {"b": 2}]


def test_a_finished_run_of_a_whole_model_keeps_it_once(tmp_path, capsys):
    out = tmp_path / "run"
    assert run(words(out, method="full", lr=1e-3)) == 0
    assert (out / "checkpoint.pt").stat().st_size < (
        out / "model" / "model.safetensors"
    ).stat().st_size / 10
    capsys.readouterr()
    assert resume(out) == 0
    assert capsys.readouterr().out.startswith(f"{out} is finished")


def test_a_finished_run_says_so_and_changes_nothing(tmp_path, capsys):
    out = tmp_path / "run"
    assert run(words(out)) == 0
    before = (
        contents(out),
        [p.stat().st_mtime_ns for p in sorted(out.rglob("*")) if p.name != ".lock"],
    )
    capsys.readouterr()
    assert resume(out) == 0
    assert (
        capsys.readouterr().out
        == f"{out} is finished; its final lines of metrics.jsonl are the results\n"
    )
    assert before == (
        contents(out),
        [p.stat().st_mtime_ns for p in sorted(out.rglob("*")) if p.name != ".lock"],
    )


def test_a_measurement_with_a_folder_that_is_killed_goes_on_and_ends(tmp_path):
    out = tmp_path / "run"
    prepare = functools.partial(torn_line, "final", 0, 0.5)
    assert finish(start(words(out, "--eval-only"), tmp_path / "log", prepare)) == -signal.SIGKILL
    assert resume(out) == 0
    assert [line["event"] for line in metrics(out)] == ["before", "final"]
    assert resume(out) == 0


def test_a_run_may_be_moved_before_it_goes_on(tmp_path, capsys):
    out = tmp_path / "run"
    prepare = functools.partial(torn_line, "train", 10, 1)
    assert finish(start(recipe("adafactor", out), tmp_path / "log", prepare)) == -signal.SIGKILL
    out.rename(tmp_path / "moved")
    goes_on_as_if_nothing_had_been("adafactor", tmp_path / "moved")
    assert not out.exists()
    assert f"{tmp_path / 'moved' / 'adapter'} --eval-only" in capsys.readouterr().out


# One folder, one run


@contextlib.contextmanager
def hanging():
    """Loading a task never ends."""
    running.load_task = lambda *args: time.sleep(60)
    yield


def test_a_second_run_in_the_folder_of_one_that_lives_is_refused(tmp_path, capsys):
    out = tmp_path / "run"
    process = start(recipe("adafactor", out), tmp_path / "log", hanging)
    try:
        for _ in range(600):
            if (out / "config.json").exists():
                break
            time.sleep(0.05)
        before = contents(out)
        fails(recipe("adafactor", out), capsys, out, "another run is writing there")
        fails(["--resume", out], capsys, out, "another run is writing there")
        assert contents(out) == before
    finally:
        process.kill()
        assert finish(process) == -signal.SIGKILL
    goes_on_as_if_nothing_had_been("adafactor", out)  # a dead process holds nothing


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "checkpoint.pt", "adapter"])
def test_a_folder_that_holds_a_run_or_a_part_of_one_is_never_overwritten(name, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(words(out, steps=1)) == 0
    for path in list(out.iterdir()):
        if name != "config.json" and path.name not in (name, ".lock"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = contents(out)
    fails(words(out, seed=5), capsys, out, name, "--resume", "--out")
    fails(words(out, "--eval-only"), capsys, out, name)
    assert contents(out) == before


def test_other_files_in_the_folder_stay(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert run(words(out, steps=1)) == 0
    assert (out / "notes.txt").read_text() == "mine"


def test_the_default_folder_is_named_after_model_task_method_and_seed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(words(None, steps=1, seed=3)) == 0
    assert (tmp_path / "runs" / "t5-0-task-2-ia3-3" / "adapter").is_dir()


def test_a_mistake_before_anything_was_measured_leaves_the_place_free(tmp_path, capsys):
    out = tmp_path / "run"
    fails(words(out, task=tmp_path / "nowhere"), capsys, "nowhere")
    assert not out.exists()
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    fails(words(out, adapter=tmp_path / "nowhere"), capsys, "nowhere")
    assert [p.name for p in out.iterdir()] == ["notes.txt"]
    assert run(words(out, steps=1)) == 0


def test_a_mistake_that_shows_when_a_run_goes_on_leaves_its_folder(tmp_path, capsys, monkeypatch):
    out, task = tmp_path / "run", tmp_path / "task"
    shutil.copytree(running.task(), task)
    monkeypatch.setattr(training_group, "load_model", lambda *args, **options: kill_self(signal.SIGINT))
    assert run(words(out, task=task)) == 130
    monkeypatch.undo()
    task.rename(tmp_path / "away")
    fails(["--resume", out], capsys, "task")
    assert (out / "config.json").exists()
    (tmp_path / "away").rename(task)
    assert resume(out) == 0


# --resume, and what it needs


def test_resume_goes_alone(tmp_path, capsys):
    out = tmp_path / "run"
    assert run(words(out, steps=1)) == 0
    before = contents(out)
    fails(["--resume", out, "--lr", "1"], capsys, "--resume goes alone", "config.json")
    assert contents(out) == before


def test_what_is_refused_leaves_the_run_as_it_is(tmp_path, capsys):
    data, out = tmp_path / "rows.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps(row) + "\n" for row in running.rows(20)))
    assert run(words(out, task=data, steps=11)) == 0
    (out / "checkpoint.pt").unlink()  # as one that was killed before its first
    before = contents(out)
    data.write_text(data.read_text() + json.dumps(running.rows(1, seed=1)[0]) + "\n")
    fails(["--resume", out], capsys, "files have changed")
    assert contents(out) == before


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (None, ["config.json", "not found"]),
        ("", ["config.json", "empty"]),
        ('{"model": "t5', ["config.json"]),
        ("[1]", ["config.json", "list"]),
        ('{"model_type": "t5", "d_model": 4}', ["config.json", "something else"]),
        (
            '{"model": "tiny-t5", "task": "same-colour", "steps": "many"}',
            ["--steps is 'many'", "int"],
        ),
        ('{"model": "tiny-t5", "task": "same-colour", "lr": -1}', ["--lr is -1", "above 0"]),
    ],
)
def test_a_folder_that_holds_no_run_cannot_go_on(text, parts, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    if text is not None:
        (out / "config.json").write_text(text)
    before = contents(out)
    fails(["--resume", out], capsys, *parts)
    assert contents(out) == before


def test_a_folder_that_is_not_there_cannot_go_on(tmp_path, capsys):
    fails(
        ["--resume", tmp_path / "nowhere"],
        capsys,
        "expected the folder of a run",
        tmp_path / "nowhere",
        "not found",
    )
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("damage", ["half", "html", "empty"])
def test_a_damaged_checkpoint_is_named(damage, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(words(out, steps=1)) == 0
    whole = (out / "checkpoint.pt").read_bytes()
    broken = {"half": whole[: len(whole) // 2], "html": b"<html>", "empty": b""}[damage]
    (out / "checkpoint.pt").write_bytes(broken)
    fails(["--resume", out], capsys, "checkpoint.pt", "damaged")


def test_a_run_does_not_go_on_with_other_data(tmp_path, capsys, monkeypatch):
    task = tmp_path / "task"
    shutil.copytree(running.task(), task)
    out = tmp_path / "run"
    monkeypatch.setattr(training_group, "evaluate", lambda *args, **options: kill_self(signal.SIGINT))
    assert run(words(out, task=task)) == 130
    monkeypatch.undo()
    text = (task / "train.jsonl").read_text()
    (task / "train.jsonl").write_text(text.replace("w7", "w8"))
    before = contents(out)
    fails(["--resume", out], capsys, out, "changed")
    assert contents(out) == before
    (task / "train.jsonl").write_text(text)
    assert resume(out) == 0


# What is written


def test_config_json_is_there_before_anything_slow_and_holds_every_flag(tmp_path, monkeypatch):
    out, seen = tmp_path / "run", []
    original = load_task

    def spy(*args):
        seen.append(json.loads((out / "config.json").read_text()))
        return original(*args)

    monkeypatch.setattr("minia3.training.grid.load_task", spy)
    assert run(words(out, "--deterministic", steps=1, lr=0.5, dropout=0)) == 0
    expected = dataclasses.asdict(train.Config()) | {
        **{
            "model": str(running.model("t5")),
            "task": str(running.task()),
            "out": str(out),
            "device": "cpu",
        },
        **{
            "batch_size": 4,
            "eval_batch_size": 64,
            "deterministic": True,
            "steps": 1,
            "lr": 0.5,
            "dropout": 0.0,
        },
    }
    assert {name: seen[0][name] for name in expected} == expected
    rest = {name: value for name, value in seen[0].items() if name not in expected}
    assert rest.keys() == {"minia3", "git_commit", "versions"}
    assert rest["minia3"] == minia3.__version__
    versions = {"python": "{}.{}.{}".format(*sys.version_info), "torch": torch.__version__}
    assert versions.items() <= rest["versions"].items()
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=running.ROOT, capture_output=True, text=True
    ).stdout.strip()
    assert (rest["git_commit"] or "").removesuffix("-dirty") == git
    sums = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in running.task().iterdir()}
    assert json.loads((out / "config.json").read_text()) == {**seen[0], "data": sums}


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_the_commit_is_that_of_the_code_and_says_whether_files_differ_from_it(
    tmp_path, monkeypatch
):
    def git(*arguments):
        words = [
            "git",
            "-C",
            str(tmp_path),
            "-c",
            "user.name=a",
            "-c",
            "user.email=a@b",
            *arguments,
        ]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout

    monkeypatch.setattr("minia3.training.run_folder.__file__", str(tmp_path / "code.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment()["git_commit"] is None
    (tmp_path / "code.py").write_text("1")
    for arguments in (
        ["init"],
        ["add", "code.py"],
        ["commit", "-m", "first"],
        ["tag", "-a", "v1", "-m", "v1"],
    ):
        git(*arguments)
    commit = git("rev-parse", "HEAD").strip()
    (tmp_path / "untracked.py").write_text("2")
    assert environment()["git_commit"] == commit
    (tmp_path / "code.py").write_text("2")
    assert environment()["git_commit"] == f"{commit}-dirty"


def test_metrics_are_flushed_line_by_line_and_come_at_least_every_ten_steps(tmp_path, monkeypatch):
    out, clip, steps = tmp_path / "run", torch.nn.utils.clip_grad_norm_, []

    def spy(*args, **options):
        steps.append(max(line["step"] for line in metrics(out)))
        return clip(*args, **options)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    assert run(words(out, steps=25)) == 0
    assert (
        steps == [0] + [1] * 9 + [10] * 10 + [20] * 5
    )  # the last line on disk, as each step sees it
    assert [(line["event"], line["step"]) for line in metrics(out)] == [
        ("before", 0), ("train", 1), ("train", 10), ("train", 20), ("train", 25), ("final", 25)
    ]  # fmt: skip
    for line in metrics(out)[1:-1]:
        numbers = ("loss", "examples_per_second", "tokens_per_second", "memory_bytes")
        assert line.keys() == {"event", "step", "lr", *numbers}
        assert all(line[key] > 0 for key in numbers)


def test_the_last_line_is_the_result(tmp_path):
    assert run(words(tmp_path / "run", steps=3)) == 0
    before, *_, final = metrics(tmp_path / "run")
    model = minia3.load_model(running.model("t5"))
    trainable = sum(vector.numel() for vector in minia3.vectors(model).values())
    assert final["event"] == "final"
    assert final["accuracy_before"] == before["accuracy"]
    assert (final["metric"], final["split"], final["rows"], final["steps"]) == (
        "accuracy",
        "test",
        12,
        3,
    )
    assert (final["trainable"], final["total"]) == (
        trainable,
        sum(p.numel() for p in model.parameters()) - trainable,
    )
    assert 0 <= final["accuracy"] <= 1
    assert 0 < final["seconds"] < 60
    assert final["peak_memory_bytes"] > 10**7


def test_time_is_that_of_all_steps_whether_or_not_the_run_was_stopped_or_measured_between(
    tmp_path, monkeypatch
):
    step, evaluated, result = 0.02, 0.3, {"accuracy": 0.5, "auc": None, "n": 1, "n_cut": 0}
    monkeypatch.setattr(training_group, "evaluate", lambda *args, **options: time.sleep(evaluated) or result)
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def slow(*args, **options):
        calls.append(None)
        if len(calls) == 8:
            kill_self(signal.SIGINT)
        time.sleep(step)
        return clip(*args, **options)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", slow)
    out = tmp_path / "run"
    begin = time.perf_counter()
    assert run(words(out, eval_every=3)) == 130
    assert resume(out) == 0
    elapsed = time.perf_counter() - begin
    assert len(calls) == 12
    assert 12 * step < metrics(out)[-1]["seconds"] < elapsed - 5 * evaluated
    logged = [line for line in metrics(out) if line["event"] == "train"]
    steps = [
        b["step"] - a for a, b in zip([0, *(line["step"] for line in logged)], logged, strict=False)
    ]
    seconds = sum(
        4 * n / line["examples_per_second"] for n, line in zip(steps, logged, strict=True)
    )
    assert metrics(out)[-1]["seconds"] == pytest.approx(seconds, abs=1e-3)


# The disk


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(
    number, tmp_path, capsys, monkeypatch
):
    uninterrupted("adafactor")
    out, write = tmp_path / "run", Path.write_bytes

    def full(path, data):
        if ".checkpoint.pt." in path.name and (out / "checkpoint.pt").exists():
            write(path, data[:100])
            raise OSError(number, os.strerror(number))
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    fails(recipe("adafactor", out), capsys, os.strerror(number), code=1)
    monkeypatch.undo()
    assert sorted(p.name for p in out.iterdir()) == [
        ".lock",
        "checkpoint.pt",
        "config.json",
        "metrics.jsonl",
    ]
    goes_on_as_if_nothing_had_been("adafactor", out)


@contextlib.contextmanager
def small_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    yield


def test_a_disk_that_takes_no_more_is_one_line(tmp_path):
    out = tmp_path / "run"
    log, number = tmp_path / "log", errno.EFBIG
    assert finish(start(recipe("adafactor", out), log, functools.partial(small_files, 4096))) == 1
    assert log.read_text().splitlines()[-1] == f"train.py: [Errno {number}] {os.strerror(number)}"
    assert "Traceback" not in log.read_text()
    goes_on_as_if_nothing_had_been("adafactor", out)


@pytest.mark.parametrize("where", ["file", "file/run", "/proc/nowhere/run"])
def test_a_place_where_no_folder_can_be_is_a_mistake(where, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    fails(words(tmp_path / where), capsys, f"--out is '{tmp_path / where}'", "expected a folder")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_may_not_be_written_is_a_mistake(tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    out.mkdir()

    def refuse(*args, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("minia3.training.run_folder.write_json", refuse)
    fails(words(out), capsys, out, "Permission denied")
