"""The folder of a run: no run overwrites another, and it records what the run depends on."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import running
import torch
from running import contents, fails, kill_self, metrics, resume, run, train, words

import minia3
from minia3.checkpoints.known_models import EMBEDDED
from minia3.files.lock import FolderLocked, lock_folder
from minia3.files.read import sample_digest
from minia3.tasks.splits import load_task
from minia3.training import group as training_group
from minia3.training import run as training_run
from minia3.training import run_folder
from minia3.training.command_line import complete
from minia3.training.config import Config
from minia3.training.metrics_file import Metrics
from minia3.training.run_folder import (
    begin_default_run,
    choose_folder,
    describe_difference,
    discard_run,
    environment,
    read_run_config,
    restore_flags,
    run_name,
)


def test_a_run_that_has_written_results_is_not_discarded(tmp_path):
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / name).touch()
    before = contents(tmp_path)
    discard_run(tmp_path)
    assert contents(tmp_path) == before
    (tmp_path / "metrics.jsonl").unlink()
    discard_run(tmp_path)
    assert not tmp_path.exists()


def test_the_lines_of_a_finished_run_are_rewritten_up_to_its_last_checkpoint(tmp_path):
    lines = [{"event": "train"}, {"event": "failed"}, {"event": "final", "accuracy": 1}]
    content = "".join(json.dumps(line) + "\n" for line in lines)
    path = tmp_path / "metrics.jsonl"
    path.write_text(content + '{"event": "half')
    before = contents(tmp_path)
    written = Metrics(tmp_path, len(content))
    for _ in range(2):  # a call that is killed at its end is repeated
        written.reopen()
        assert contents(tmp_path) == before
        written = Metrics(tmp_path, written.n_bytes, written.reopened)
    written.cut()
    assert metrics(tmp_path) == [lines[0], {"event": "extended", "accuracy": 1}]
    assert path.stat().st_size == written.n_bytes


def test_what_a_run_left_that_was_killed_at_once_is_removed(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    left = out / f".config.json.{'0' * 32}"
    left.write_text("{")
    assert run(words(out, steps=1)) == 0
    assert not left.exists()


def test_a_run_removes_what_it_left_but_not_what_another_run_below_it_is_writing(tmp_path):
    out = tmp_path / "run"
    left = f".checkpoint.pt.{'0' * 32}"
    below = out / "another" / left
    below.parent.mkdir(parents=True)
    below.write_text("half")
    assert run(words(out, seed="0,1", steps=1)) == 0
    assert below.exists()
    for name in (".", "states", "adapters/s0", "adapters/s1"):
        (out / name).mkdir(exist_ok=True)
        (out / name / left).write_text("half")
    assert resume(out) == 0
    assert list(out.rglob(left)) == [below]


def test_a_second_run_in_the_folder_of_one_that_lives_is_refused(tmp_path, capsys):
    out = tmp_path / "run"
    assert run(words(out, steps=1)) == 0
    before = contents(out)
    lock = lock_folder(out)  # as a run holds it that is alive
    fails(words(out, steps=1), capsys, out, "another run is writing there")
    fails(["--resume", out], capsys, out, "another run is writing there")
    lock.close()
    assert contents(out) == before
    assert resume(out) == 0


def test_a_run_holds_its_folder_until_it_ends(tmp_path, monkeypatch):
    out = tmp_path / "run"
    seen = []

    def load_task_while_locked(*args, **flags):
        with pytest.raises(ValueError, match="another run is writing there"):
            lock_folder(out)
        seen.append(args)
        return load_task(*args, **flags)

    monkeypatch.setattr("minia3.training.grid.load_task", load_task_while_locked)
    assert run(words(out, steps=1)) == 0
    assert len(seen) == 1
    lock_folder(out).close()


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "checkpoint.pt", "adapter"])
def test_a_folder_that_holds_a_run_or_a_part_of_a_run_is_never_overwritten(name, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(words(out, steps=1)) == 0
    for path in list(out.iterdir()):
        if name != "config.json" and path.name not in (name, ".lock"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = contents(out)
    fails(words(out, seed=5), capsys, out, name, "--resume", "--out")
    fails(words(out, "--eval-only"), capsys, out, name)
    assert contents(out) == before


@pytest.mark.parametrize("name", ["states", "tensorboard"])
def test_a_folder_of_somebody_else_that_a_run_would_replace_is_never_removed(
    name, tmp_path, capsys
):
    other = tmp_path / "run" / name / "mine.txt"
    other.parent.mkdir(parents=True)
    other.write_text("mine")
    fails(words(tmp_path / "run", steps=1), capsys, f"{tmp_path}/run holds a run already ({name})")
    assert other.read_text() == "mine"


def test_other_files_in_the_folder_stay(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert run(words(out, steps=1)) == 0
    assert (out / "notes.txt").read_text() == "mine"


def test_the_default_folder_is_named_after_model_task_method_and_seed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(words(None, steps=1, seed=3)) == 0
    folder = Path("runs", "t5-0-task-2-ia3-3")
    assert (tmp_path / folder / "adapter").is_dir()
    assert json.loads((folder / "config.json").read_text())["out"] == str(folder)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"task": ("rte", "a/b.jsonl"), "seed": (0, 1)}, "tiny-t5-rte,b-ia3-0,1"),
        ({"task": ("rte", "cb"), "adapters": "one"}, "tiny-t5-rte,cb-ia3-one-0"),
        ({"adapters": "one"}, "tiny-t5-same-colour-ia3-0"),
        ({"lr": (0.001, 0.01)}, "tiny-t5-same-colour-ia3-0-0.001,0.01"),
        ({"task": tuple(f"raft/{i:030}" for i in range(11))}, f"tiny-t5-{0:030}+10-ia3-0"),
        # Windows has no colon in a name, and each task file is called task.json.
        ({"task": "hf:user/name:config"}, "tiny-t5-name-config-ia3-0"),
        ({"task": "hf:user/name:train=a+b:test=c"}, "tiny-t5-name-a+b-c-ia3-0"),
        ({"task": 'a/b?"c.jsonl'}, "tiny-t5-b--c-ia3-0"),
        ({"task": ("moods/task.json", "b.csv.gz")}, "tiny-t5-moods,b-ia3-0"),
        ({"seed": tuple(range(100))}, "tiny-t5-same-colour-ia3-0+99"),
        ({"model": "x/t5", "task": "x" * 60, "method": "none"}, f"t5-{'x' * 60}-none-0"),
        ({"model": "x/t5/y/..", "task": "."}, f"t5-{Path.cwd().name}-ia3-0"),
    ],
)
def test_the_default_folder_of_a_grid_lists_its_values(flags, expected):
    assert run_name(train.Config(**flags)) == expected


def test_a_mistake_leaves_no_empty_folder_behind(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fails(words(None, task="nowhere.jsonl"), capsys, "nowhere.jsonl")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "runs" / "other").mkdir(parents=True)
    fails(words(None, task="nowhere.jsonl"), capsys, "nowhere.jsonl")
    assert [path.name for path in Path("runs").iterdir()] == ["other"]


def begin_two(monkeypatch, second_flags):
    """Begin a run with the default flags, and another while the first one has no config.json yet.

    Return the folder of the first, and that of the second or its error. Both hold their locks.
    """
    is_waiting = threading.Event()
    outcomes = []
    threads = []
    write_json = run_folder.write_json

    def begin_second(resources):
        try:
            folder, _ = begin_default_run(Config(**second_flags), resources)
            outcomes.append(folder)
        except ValueError as error:
            outcomes.append(error)
        is_waiting.set()  # if it has not waited at all

    def begin_second_and_write(path, content):
        if not threads:
            threads.append(threading.Thread(target=begin_second, args=(resources,)))
            threads[0].start()
            assert is_waiting.wait(60)
        write_json(path, content)

    def wait(seconds):
        is_waiting.set()
        sleep(seconds)

    sleep = time.sleep
    monkeypatch.setattr(run_folder, "write_json", begin_second_and_write)
    monkeypatch.setattr(time, "sleep", wait)
    with contextlib.ExitStack() as resources:
        first, _ = begin_default_run(Config(), resources)
        threads[0].join(60)
    return first, outcomes[0]


@pytest.mark.parametrize("out", [None, "run"])
def test_git_is_asked_before_the_folder_of_a_new_run_is_locked(out, tmp_path, monkeypatch):
    """On a network file system it may take seconds, and other runs would wait for the folder."""
    found = []

    def git_commit():
        found.append(list(tmp_path.rglob(".lock")))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folder, "git_commit", git_commit)
    made = training_run.Run(Config(out=out), SimpleNamespace(is_held=True))
    made.resources.close()
    assert found == [[]]
    assert (made.folder / ".lock").exists()


def test_two_runs_that_begin_at_once_choose_different_folders(tmp_path, monkeypatch):
    """Jobs of an array start together, and the second one said that its folder is taken."""
    monkeypatch.chdir(tmp_path)
    first, second = begin_two(monkeypatch, {"lr": 0.2})
    assert second == Path(f"{first}-lr0.2")
    assert read_run_config(first)["lr"] == Config().lr
    assert read_run_config(second)["lr"] == 0.2
    assert read_run_config(second)["out"] == str(second)


def test_of_two_equal_runs_that_begin_at_once_the_second_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = begin_two(monkeypatch, {})
    assert isinstance(second, FolderLocked)
    assert str(second) == f"{first}: another run is writing there"


def test_a_folder_in_which_no_run_begins_is_not_waited_for_long(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folder, "BEGINNING", 0.1)
    folder = choose_folder(Config())
    folder.mkdir(parents=True)
    with lock_folder(folder), contextlib.ExitStack() as resources, pytest.raises(FolderLocked):
        begin_default_run(Config(), resources)


def test_a_disk_that_is_full_from_the_beginning_leaves_no_empty_folder_behind(
    tmp_path, monkeypatch, capsys
):
    def refuse(path, value):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minia3.training.run_folder.write_json", refuse)
    fails(words(None), capsys, "--out is 'runs/t5-0-task-2-ia3-0'", "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_default_folder_whose_name_is_too_long_is_a_mistake(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = Path(f"{'x' * 245}.jsonl")
    rows.write_text("".join(json.dumps(row) + "\n" for row in running.rows(20)))
    Path("runs").mkdir()  # without it, the system does not look at the name
    fails(words(None, task=rows), capsys, "--out is 'runs/t5-0-xxx", "File name too long")


def run_by_default(**flags):
    """Run without --out, and return the folder's name."""
    before = set(Path("runs").glob("*"))
    assert run(words(None, method="none", steps=None, **flags)) == 0
    (new,) = set(Path("runs").glob("*")) - before
    return new.name


def test_runs_with_other_flags_are_kept_apart(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        lines = [json.dumps(row) + "\n" for row in running.rows(20)]
        (tmp_path / name / "rows.jsonl").write_text("".join(lines))
    base = "t5-0-rows-none-0"
    assert run_by_default(task="a/rows.jsonl", lr=0.01) == base
    other = run_by_default(task="b/rows.jsonl", lr=0.01)
    assert other.startswith(f"{base}-task")
    assert run_by_default(task="a/rows.jsonl") == f"{base}-lr0.003"  # the default
    both = run_by_default(task="a/rows.jsonl", lr=0.1, max_length=9)
    assert both == f"{base}-lr0.1-maxlength9"
    assert run_by_default(task="a/rows.jsonl", lr=0.01, shots=2) == f"{base}-shots2"
    same = words(None, method="none", steps=None, task="a/rows.jsonl", lr=0.1, max_length=9)
    fails(same, capsys, f"runs/{both} holds a run already")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, ""),
        ({"out": "x", "device": "cpu", "data_dir": "y"}, ""),
        ({"steps": 300, "lr": 0.01}, "-steps300-lr0.01"),
        ({"recompute": True, "seed": (0, 1)}, "-seed0,1-recompute"),
        ({"epochs": 2.0}, "-epochs2.0"),
        ({"dropout": 0.0, "shard": 0}, "-shard0-dropout0.0"),
        ({"micro_batch_size": 2}, "-microbatchsize2"),
        ({"eval_prompt": "all", "sites": "k,v"}, "-sitesk,v-evalpromptall"),
    ],
)
def test_the_suffix_of_a_folder_names_what_differs(flags, expected):
    found = dataclasses.asdict(train.Config())
    assert describe_difference(train.Config(**flags), found) == expected
    assert describe_difference(train.Config(), found | {"shots": 32}) == "-noshots"
    long = describe_difference(train.Config(model="a/very/long/path/to/a/model"), found)
    assert re.fullmatch("-model[0-9a-f]{6}", long)


def test_after_a_mistake_before_the_first_evaluation_the_folder_is_gone(tmp_path, capsys):
    out = tmp_path / "run"
    fails(words(out, task=tmp_path / "nowhere"), capsys, "nowhere")
    assert not out.exists()
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    fails(words(out, adapter=tmp_path / "nowhere"), capsys, "nowhere")
    assert [p.name for p in out.iterdir()] == ["notes.txt"]
    assert run(words(out, steps=1)) == 0


def test_a_mistake_in_a_resumed_run_leaves_its_folder(tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    task = tmp_path / "task"
    shutil.copytree(running.task(), task)
    monkeypatch.setattr(
        training_group, "load_model", lambda *args, **options: kill_self(signal.SIGINT)
    )
    assert run(words(out, task=task)) == 130
    monkeypatch.undo()
    task.rename(tmp_path / "away")
    fails(["--resume", out], capsys, "task")
    assert (out / "config.json").exists()
    (tmp_path / "away").rename(task)
    assert resume(out) == 0


# --resume, and what it needs


def test_a_weight_decay_that_did_nothing_is_not_in_the_way_of_a_run_that_has_begun(
    tmp_path, capsys
):
    """Earlier versions took it with Adafactor."""
    out = tmp_path / "run"
    assert run(words(out, steps=1)) == 0
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"weight_decay": 0.1}))
    assert run(["--resume", out, "--steps", 2]) == 0
    assert run(words(out, "--or-resume", steps=2)) == 0
    assert "is finished" in capsys.readouterr().out
    assert run(["--config", out, "--out", tmp_path / "again"]) == 0
    decayed = json.loads((out / "config.json").read_text()) | {"optimizer": "adamw"}
    (out / "config.json").write_text(json.dumps(decayed | {"weight_decay": 0.1}))
    assert restore_flags({"resume": out}).weight_decay == 0.1


def test_resume_takes_no_other_flags(tmp_path, capsys):
    out = tmp_path / "run"
    assert run(words(out, steps=1)) == 0
    before = contents(out)
    fails(["--resume", out, "--lr", "1"], capsys, "--resume takes no other flags", "config.json")
    assert contents(out) == before


def test_a_run_resumes_on_another_device_with_another_folder_of_data(tmp_path, capsys):
    out = tmp_path / "run"
    assert run(words(out, steps=1)) == 0
    config = json.loads((out / "config.json").read_text())
    there = {"device": "meta:7", "data_dir": "/mnt/there"}
    (out / "config.json").write_text(json.dumps(config | there))
    fails(["--resume", out, "--steps", 2], capsys, "--device is 'meta:7', expected a device")
    here = {"device": "cpu", "data_dir": str(tmp_path)}
    again = ["--resume", out, "--device", "cpu", "--data-dir", tmp_path]
    assert run([*again, "--steps", 2]) == 0
    recorded = json.loads((out / "config.json").read_text())
    assert {name: recorded[name] for name in here} == here
    assert recorded["steps"] == running.metrics(out)[-1]["steps"] == 2
    assert run(["--resume", out, "--steps", 3]) == 0  # as the run says


def change_config(folder, **flags):
    """Change flags in the config.json of a run."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | flags))


def test_a_shard_without_offload_takes_the_offload_of_a_resumed_run_back(
    tmp_path, capsys, monkeypatch
):
    """No flag says that there is no --offload, so such a run could not leave the CPU."""
    out = tmp_path / "run"
    assert run(words(out, steps=1)) == 0
    change_config(out, shard=1, offload=True)
    assert restore_flags({"resume": out}).offload
    assert restore_flags({"resume": out, "shard": 1, "offload": True}).offload
    given = ["--resume", out, "--steps", 2, "--shard", 1]
    with monkeypatch.context() as patch:
        patch.setattr(train, "make_cells", lambda config: kill_self(signal.SIGINT))
        assert run(given) == 130
    _, _, command = capsys.readouterr().err.partition("python train.py ")
    assert shlex.split(command) == list(map(str, given))  # although --shard has not changed
    assert run(given) == 0
    assert "in the memory of the CPU" not in capsys.readouterr().out
    recorded = read_run_config(out)
    assert (recorded["shard"], recorded["offload"]) == (1, False)


def test_a_shard_that_is_typed_to_resume_a_run_needs_several_processes(tmp_path, capsys):
    """Without torchrun, it was ignored, and one process held the whole base."""
    out = tmp_path / "run"
    assert run(words(out, steps=1)) == 0
    change_config(out, shard=2)
    message = "--shard divides a model among processes, and there is one: start several"
    for typed in (["--shard", 2], ["--shard"], ["--shard", 2, "--offload"]):
        fails(["--resume", out, *typed], capsys, message, "or leave --shard out")
    assert complete({"resume": str(out), "shard": 0, "offload": True}).offload
    assert resume(out) == 0  # one process with more memory may continue a divided run


@pytest.mark.parametrize("shard", [0, 2])
def test_one_process_that_continues_a_divided_run_says_that_it_holds_the_whole_base(
    shard, tmp_path, capsys
):
    """A line of a study has all flags again. It was given without torchrun, and nothing said so."""
    out = tmp_path / "run"
    assert run(words(out, steps=1)) == 0
    change_config(out, shard=shard)
    note = "note     --shard needs several processes, and there is one: it holds the whole base\n"
    for arguments in (["--resume", out], words(out, "--or-resume", steps=1, shard=shard)):
        (out / "checkpoint.pt").unlink(missing_ok=True)
        (out / "metrics.jsonl").unlink()
        capsys.readouterr()
        assert run(arguments) == 0
        assert note in capsys.readouterr().out


def test_a_run_says_if_it_is_continued_by_other_code_and_records_it(tmp_path, capsys, monkeypatch):
    """A half of its steps came from one version and a half from another, and nothing said so."""
    out = tmp_path / "run"
    assert run(words(out, steps=1)) == 0
    first = read_run_config(out)

    def continue_with(steps, **changes):
        now = {name: first[name] for name in ("minia3", "git_commit", "versions")} | changes
        monkeypatch.setattr(run_folder, "environment", lambda: now)
        capsys.readouterr()
        assert run(["--resume", out, "--steps", steps]) == 0
        return now, capsys.readouterr().out

    _, shown = continue_with(2)
    assert "so far with" not in shown
    assert "continued_with" not in read_run_config(out)
    other_torch = first["versions"] | {"torch": "9.9.9"}
    second, shown = continue_with(3, minia3="9.0", versions=other_torch)
    before = f"minia3 {first['minia3']}, torch {first['versions']['torch']}"
    now = "minia3 9.0, torch 9.9.9"
    note = f"computed so far with {before}, and from now on with {now}: results may differ\n"
    assert f"note     {note}" in shown
    _, shown = continue_with(4, minia3="9.0", versions=other_torch, git_commit=None)  # not known
    assert "so far with" not in shown
    third, shown = continue_with(5, minia3="9.1", versions=other_torch)
    assert "computed so far with minia3 9.0, and from now on with minia3 9.1: results may" in shown
    recorded = read_run_config(out)
    assert recorded["continued_with"] == [second, third]
    assert recorded["minia3"] == first["minia3"]


def test_a_run_says_if_it_resumes_with_weights_of_another_dtype(tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(train, "choose_dtype", lambda *_: torch.bfloat16)  # as on a GPU
        assert run(words(out, steps=1)) == 0
    assert "so far" not in capsys.readouterr().out
    assert run(["--resume", out, "--steps", 2]) == 0
    note = "note     weights so far: bfloat16, from now on: float32, because there was no --dtype"
    assert note in capsys.readouterr().out
    assert run(["--resume", out, "--steps", 3]) == 0
    printed = capsys.readouterr().out
    assert "so far" not in printed
    # Only the last dtype was in the results, and nothing said that there was another one.
    finals = [line for line in running.metrics(out) if line["event"] in ("extended", "final")]
    both = "bfloat16 then float32"
    assert [line["dtype"] for line in finals] == ["bfloat16", both, both]
    assert f"  warning     the weights were {both}, because there was no --dtype" in printed
    assert f"the weights were {both}" in (out / "adapter" / "README.md").read_text()


def test_a_refused_resume_changes_nothing(tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    out = tmp_path / "run"
    data.write_text("".join(json.dumps(row) + "\n" for row in running.rows(20)))
    assert run(words(out, task=data, steps=11)) == 0
    (out / "checkpoint.pt").unlink()  # as one that was killed before its first
    before = contents(out)
    data.write_text(data.read_text() + json.dumps(running.rows(1, seed=1)[0]) + "\n")
    fails(["--resume", out], capsys, "files have changed")
    assert contents(out) == before


@pytest.fixture
def begun(tmp_path):
    """A run that was killed before its first checkpoint, and the model's folder."""
    model = tmp_path / "model"
    shutil.copytree(EMBEDDED, model)
    assert run(words(tmp_path / "run", model=model, steps=1)) == 0
    (tmp_path / "run" / "checkpoint.pt").unlink()
    return tmp_path / "run", model


def test_other_weights_than_a_run_began_with_are_refused(begun, capsys):
    out, model = begun
    before = contents(out)
    changed = minia3.load_model(model)
    changed.get_parameter("decoder.norm.weight").data *= 1.01
    minia3.save_model(changed, model)
    fails(["--resume", out], capsys, f"the weights of {model} have changed")
    assert contents(out) == before


@pytest.mark.parametrize("recorded", [None, "another"])
def test_a_run_that_began_with_weights_of_elsewhere_is_refused(begun, capsys, recorded):
    """None stands for weights of the hub: a folder may have their name now."""
    out, model = begun
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"weights": recorded}))
    fails(["--resume", out], capsys, f"the weights of {model} have changed")


def test_a_run_whose_model_and_rows_have_moved_takes_their_new_paths_from_config_json(tmp_path):
    rows = tmp_path / "rows"
    model = tmp_path / "model"
    shutil.copytree(running.task(), rows)
    shutil.copytree(EMBEDDED, model)
    out = tmp_path / "run"
    assert run(words(out, model=model, task=rows, steps=1)) == 0
    rows.rename(tmp_path / "new rows")
    model.rename(tmp_path / "new model")
    config = json.loads((out / "config.json").read_text())
    paths = {"model": f"{model.parent}/new model", "task": f"{rows.parent}/new rows"}
    (out / "config.json").write_text(json.dumps(config | paths))
    assert run(["--resume", out, "--steps", 2]) == 0
    assert json.loads((out / "config.json").read_text())["model"] == paths["model"]


def test_weights_that_were_only_copied_again_are_not_refused(begun):
    out, model = begun
    shutil.rmtree(model)
    shutil.copytree(EMBEDDED, model, copy_function=shutil.copyfile)  # with other times
    assert run(["--resume", out]) == 0


def test_a_run_of_an_earlier_version_that_did_not_record_its_weights_is_resumed(begun):
    out, _ = begun
    config = json.loads((out / "config.json").read_text())
    digest = config.pop("weights")
    (out / "config.json").write_text(json.dumps(config))
    assert run(["--resume", out]) == 0
    assert json.loads((out / "config.json").read_text())["weights"] == digest


def test_an_adapter_in_a_file_may_be_renamed_and_not_replaced(tmp_path, capsys):
    adapter = tmp_path / "first.safetensors"
    out = tmp_path / "run"
    assert run(words(tmp_path / "begun", steps=1)) == 0
    shutil.copy(tmp_path / "begun" / "adapter" / "adapter_model.safetensors", adapter)
    assert run(words(out, "--eval-only", adapter=adapter)) == 0
    recorded = read_run_config(out)
    digest = hashlib.sha256(adapter.read_bytes()).hexdigest()
    assert recorded["adapter_files"] == {"--adapter": digest}

    def resume_with(**changes):
        (out / "checkpoint.pt").unlink(missing_ok=True)  # as one that was killed before its first
        (out / "config.json").write_text(json.dumps(recorded | changes))
        return ["--resume", out]

    moved = adapter.rename(tmp_path / "moved.safetensors")
    assert run(resume_with(adapter=str(moved))) == 0
    found = f"the adapter {moved} has changed since this run began (--adapter)"
    # Without checksums, it was one of the hub: a file may have its name now.
    fails(resume_with(adapter=str(moved), adapter_files={}), capsys, found)
    assert run(words(tmp_path / "other", steps=2)) == 0
    shutil.copy(tmp_path / "other" / "adapter" / "adapter_model.safetensors", moved)
    fails(resume_with(adapter=str(moved)), capsys, found)


def test_a_run_whose_checkpoint_has_all_weights_does_not_record_those_of_its_model(tmp_path):
    """Its result may replace its model, and it can still be made longer."""
    model = tmp_path / "model"
    shutil.copytree(EMBEDDED, model)
    out = tmp_path / "run"
    assert run(words(out, model=model, method="full", steps=1)) == 0
    shutil.copy(out / "model" / "model.safetensors", model)
    assert run(["--resume", out, "--steps", 2]) == 0


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (None, ["config.json", "not found"]),
        ("", ["config.json", "empty"]),
        ('{"model": "t5', ["config.json"]),
        ("[1]", ["config.json", "list"]),
        ('{"model_type": "t5", "d_model": 4}', ["config.json", "not written by train.py"]),
        (
            '{"model": "tiny-t5", "task": "same-colour", "steps": "many"}',
            ["--steps is 'many'", "int"],
        ),
        ('{"model": "tiny-t5", "task": "same-colour", "lr": -1}', ["--lr is -1", "above 0"]),
    ],
)
def test_a_folder_without_a_run_cannot_be_resumed(text, parts, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    if text is not None:
        (out / "config.json").write_text(text)
    before = contents(out)
    fails(["--resume", out], capsys, *parts)
    assert contents(out) == before


def test_a_folder_that_does_not_exist_cannot_be_resumed(tmp_path, capsys):
    fails(
        ["--resume", tmp_path / "nowhere"],
        capsys,
        "expected the folder of a run",
        tmp_path / "nowhere",
        "not found",
    )
    assert not (tmp_path / "nowhere").exists()


def test_a_run_does_not_continue_with_other_data(tmp_path, capsys, monkeypatch):
    task = tmp_path / "task"
    shutil.copytree(running.task(), task)
    out = tmp_path / "run"
    monkeypatch.setattr(
        training_group, "evaluate", lambda *args, **options: kill_self(signal.SIGINT)
    )
    assert run(words(out, task=task)) == 130
    monkeypatch.undo()
    text = (task / "train.jsonl").read_text()
    (task / "train.jsonl").write_text(text.replace("w7", "w8"))
    before = contents(out)
    fails(["--resume", out], capsys, out, "changed since this run began (train.jsonl)")
    assert contents(out) == before
    (task / "train.jsonl").write_text(text)
    assert resume(out) == 0


def test_a_run_of_an_earlier_version_keeps_its_flags_under_their_new_names(tmp_path, capsys):
    out = tmp_path / "run"
    assert run(words(out, "--recompute", steps=3)) == 0
    config = json.loads((out / "config.json").read_text())
    config["checkpoint"] = config.pop("recompute")
    config["similar_lengths"] = False
    write_config = (out / "config.json").write_text
    write_config(json.dumps(config))
    assert restore_flags({"resume": str(out)}).recompute is True
    (out / "checkpoint.pt").unlink()
    shutil.rmtree(out / "adapter")
    assert resume(out) == 0
    write_config(json.dumps(config | {"similar_lengths": True}))
    fails(
        ["--resume", out],
        capsys,
        "--similar-lengths, which only an earlier version has",
        "that version",
    )


# config.json and metrics.jsonl


def test_config_json_is_written_before_anything_slow_and_holds_every_flag(tmp_path, monkeypatch):
    out = tmp_path / "run"
    seen = []
    original = load_task

    def spy(*args, **flags):
        seen.append(json.loads((out / "config.json").read_text()))
        return original(*args, **flags)

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
    if shutil.which("git") is not None:
        git = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=running.ROOT, capture_output=True, text=True
        ).stdout.strip()
        assert (rest["git_commit"] or "").removesuffix("-dirty") == git
    sums = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in running.task().iterdir()}
    weights = sample_digest([running.model("t5") / "model.safetensors"])
    recorded = {**seen[0], "data": sums, "weights": weights}
    assert json.loads((out / "config.json").read_text()) == recorded


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_the_commit_of_the_code_is_recorded_and_whether_files_differ_from_it(tmp_path, monkeypatch):
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


def test_metrics_that_are_shorter_than_the_checkpoint_says_are_not_filled_up(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"a": 1}\n')
    written = Metrics(tmp_path, 100)
    written.cut()
    written.write(b=2)
    assert metrics(tmp_path) == [{"a": 1}, {"b": 2}]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_metrics_that_the_disk_refuses_are_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written = Metrics(tmp_path, 0)
    path.symlink_to("/dev/full")
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        written.write(a=1)


def test_the_lines_that_a_checkpoint_counts_are_on_the_disk_before_it(tmp_path, monkeypatch):
    synced = {}  # number of a file -> its bytes
    counted = []
    fsync = os.fsync
    save_checkpoint = training_run.save_checkpoint

    def note_size(descriptor):
        fsync(descriptor)
        synced[os.fstat(descriptor).st_ino] = os.fstat(descriptor).st_size

    def note_lines(folder, checkpoint):
        file = (folder / "metrics.jsonl").stat()
        if checkpoint.reopened is None:  # if not, the checkpoint has the lines
            counted.append((checkpoint.n_bytes, synced[file.st_ino]))
        save_checkpoint(folder, checkpoint)

    monkeypatch.setattr(os, "fsync", note_size)
    monkeypatch.setattr(training_run, "save_checkpoint", note_lines)
    out = tmp_path / "run"
    assert run(words(out, steps=4, save_every=2)) == 0
    assert run(["--resume", out, "--steps", 6]) == 0
    assert len(counted) >= 5
    assert all(n_bytes == n_synced for n_bytes, n_synced in counted)


@pytest.mark.parametrize("method", ["ia3", "lora", "full"])
def test_what_a_run_has_trained_is_on_the_disk_before_its_results(method, tmp_path, monkeypatch):
    synced = set()  # (number of a file, its bytes)
    seen = []
    fsync = os.fsync
    finish_cell = training_run.Run.finish_cell

    def note_file(descriptor):
        fsync(descriptor)
        status = os.fstat(descriptor)
        synced.add((status.st_ino, status.st_size))

    def note_folder(run, cell, finals):
        for path in (run.folder / cell.folder).iterdir():
            seen.append(path.name)
            assert (path.stat().st_ino, path.stat().st_size) in synced, path.name
        finish_cell(run, cell, finals)

    monkeypatch.setattr(os, "fsync", note_file)
    monkeypatch.setattr(training_run.Run, "finish_cell", note_folder)
    assert run(words(tmp_path / "run", method=method, steps=1)) == 0
    weights = {"full": "model.safetensors"}.get(method, "adapter_model.safetensors")
    assert {weights, "task.json", "README.md"} <= set(seen)
