"""A run that was stopped or killed anywhere continues as if it had not been, bit for bit."""

import contextlib
import errno
import functools
import io
import json
import os
import random
import resource
import shlex
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import running
import torch
from running import (
    at_line,
    contents,
    events,
    fails,
    finish,
    kill_self,
    metrics,
    outcome,
    quoted,
    resume,
    run,
    words,
)

import minia3
import train
from minia3.checkpoints.load import load_model
from minia3.files import processes
from minia3.training import checkpoint as training_checkpoint
from minia3.training import group as training_group
from minia3.training import run as training_run
from minia3.training import start as training_start
from minia3.training.checkpoint import save_checkpoint
from minia3.training.config import Config
from minia3.training.group import Group
from minia3.training.log import TrainingLog
from minia3.training.metrics_file import Metrics
from minia3.training.optimizer import RowOptimizer
from minia3.training.run import Run
from minia3.training.run_folder import begin_run
from minia3.training.shown_commands import resume_command, unrecorded_flags
from minia3.training.signals import WAITING

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
        "eval_every": 2,
        "patience": 2,
        "save_every": 4,
        "steps": 16,
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


HELD_OUT = {2: 0.5, 4: 0.5, 6: 0.6, 8: 0.7, 10: 0.4, 12: 0.7, 14: 0.1, 16: 0.2}


@contextlib.contextmanager
def held_out_by_hand():
    """Replace the accuracy on held-out rows, so that no rounding decides when a recipe stops."""
    original = Group.evaluate_held_out

    def evaluate_held_out(group, cell):
        results = original(group, cell)
        for result in results:
            result["accuracy"] = HELD_OUT[group.log.step]
        return results

    Group.evaluate_held_out = evaluate_held_out
    try:
        yield
    finally:
        Group.evaluate_held_out = original


@pytest.fixture(autouse=True)
def _by_hand():
    with held_out_by_hand():
        yield


@contextlib.contextmanager
def in_child(prepare):
    with held_out_by_hand(), prepare():
        yield


def start(arguments, log, prepare):
    return running.start(arguments, log, functools.partial(in_child, prepare))


def recipe(name, out):
    """The command line of a run of RECIPES into `out`."""
    values = {"steps": 12, **RECIPES[name]}
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


def continues_as_if_it_had_not_stopped(name, folder):
    assert resume(folder) == 0
    assert outcome(folder) == uninterrupted(name)[0]


def steps_that_begin(monkeypatch):
    """Return a list that collects the number of each step that begins, counted from 0."""
    steps = []
    original = TrainingLog.start_step

    def start_step(log):
        steps.append(log.step)
        return original(log)

    monkeypatch.setattr(TrainingLog, "start_step", start_step)
    return steps


def last_words(capsys):
    """Return stderr without the announcement of Ctrl-C, which comes only in slow steps."""
    return capsys.readouterr().err.replace(WAITING + "\n", "")


def stopped(out):
    """Return what a stopped run says."""
    return f"stopped; to continue: python train.py --resume {running.quoted(out)}\n"


@pytest.mark.slow
def test_the_recipes_are_worth_interrupting():
    (_, lines), _ = uninterrupted("best of")
    accuracies = [line["accuracy"] for line in lines if line["event"] == "eval"]
    assert accuracies == [HELD_OUT[step] for step in (2, 4, 6, 8, 10, 12)]
    assert lines[-1]["steps"] == 12 < RECIPES["best of"]["steps"]  # patience
    assert len({uninterrupted(name)[0][0] for name in RECIPES}) == len(RECIPES)
    train_lines = [line for line in uninterrupted("adafactor")[0][1] if line["event"] == "train"]
    assert any(line["step"] % 5 for line in train_lines)


# Stopped: Ctrl-C, SIGTERM


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", RECIPES)
def test_a_run_that_is_stopped_anywhere_says_how_to_continue_and_continues_bit_for_bit(
    name, seed, tmp_path, capsys
):
    number, code = ((signal.SIGINT, 130), (signal.SIGTERM, 143))[seed % 2]
    out = tmp_path / "run"
    n = somewhere(name, seed)
    capsys.readouterr()
    with at_line(n, functools.partial(kill_self, number)) as ran:
        assert run(recipe(name, out)) == code, ran[-1]
    assert last_words(capsys) == stopped(out)
    continues_as_if_it_had_not_stopped(name, out)


@pytest.mark.slow
def test_a_signal_at_the_very_end_of_what_is_given_up_undoes_the_step(tmp_path):
    """Python then leaves the block `step_may_be_abandoned` without telling it why."""
    source = Path(train.__file__).read_text(encoding="utf-8").splitlines()
    place = source.index("                with run.step_may_be_abandoned(group):") + 1
    lines = uninterrupted("adamw")[1]
    passages = [n for n, line in enumerate(lines, 1) if line == ("train.py", place)]
    assert len(passages) == 2 * 12, "each step enters the block and leaves it"
    with at_line(passages[13], functools.partial(kill_self, signal.SIGTERM)):
        assert run(recipe("adamw", tmp_path)) == 143
    continues_as_if_it_had_not_stopped("adamw", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "function", "call", "n_done"),
    [
        (training_group, "load_model", 1, 0),
        (training_group, "evaluate", 1, 0),
        (RowOptimizer, "clip", 8, 8),
        (RowOptimizer, "clip", 1, 1),
        (training_group, "evaluate", 3, 4),
        (training_group, "evaluate", 8, 12),
    ],
)
def test_every_phase_can_be_stopped_at_once_except_for_a_step(
    owner, function, call, n_done, tmp_path, capsys, monkeypatch
):
    original = getattr(owner, function)
    calls = []

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
    assert last_words(capsys) == stopped(out)
    assert len(calls) == call  # at once, and in a step at its end
    monkeypatch.undo()
    steps = steps_that_begin(monkeypatch)
    continues_as_if_it_had_not_stopped("best of", out)
    assert steps == list(range(n_done, 12))


def interrupted_within_torch(*args, **options):
    """A call of torch in which Ctrl-C arrives, and which raises an error of its own instead."""
    with contextlib.suppress(BaseException):
        kill_self(signal.SIGINT)
    raise RuntimeError("trying to pop from empty mode stack")


WAITED_TO_THE_END = []  # calls of `interrupted_in_a_finalizer` that no signal has interrupted


def interrupted_in_a_finalizer(*args, **options):
    """A call in which Ctrl-C arrives while a `__del__` runs, whose exceptions Python drops.

    Then it blocks, until the signal that is sent again interrupts it.
    """

    class Finalized:
        def __del__(self):
            kill_self(signal.SIGINT)

    Finalized()
    began = time.monotonic()
    try:
        time.sleep(20)
    finally:
        if time.monotonic() - began >= 20:
            WAITED_TO_THE_END.append(interrupted_in_a_finalizer)


@pytest.mark.parametrize("interrupted", [interrupted_within_torch, interrupted_in_a_finalizer])
@pytest.mark.parametrize(("function", "call", "n_done"), [("load_model", 1, 0), ("evaluate", 4, 6)])
def test_a_signal_stops_the_run_although_torch_or_python_loses_its_exception(
    function, call, n_done, interrupted, tmp_path, monkeypatch, capsys
):
    uninterrupted("best of")
    original = getattr(training_group, function)
    calls = []

    def call_or_interrupt(*args, **options):
        calls.append(None)
        if len(calls) == call:
            interrupted()
        return original(*args, **options)

    monkeypatch.setattr(training_group, function, call_or_interrupt)
    out = tmp_path / "run"
    capsys.readouterr()
    assert run(recipe("best of", out)) == 130
    assert WAITED_TO_THE_END == []
    assert capsys.readouterr().err == stopped(out)
    monkeypatch.undo()
    steps = steps_that_begin(monkeypatch)
    continues_as_if_it_had_not_stopped("best of", out)
    assert steps == list(range(n_done, 12))


@pytest.mark.parametrize("function", ["has_first_word", "print_last"])
def test_a_second_ctrl_c_does_not_keep_a_stopped_run_from_saying_how_to_continue(
    function, tmp_path, monkeypatch, capsys
):
    """Programs that start others may pass on a Ctrl-C that the terminal has sent to both."""
    original = getattr(training_start, function)
    signals = [signal.SIGINT, signal.SIGINT]

    def interrupted(*args, **options):
        if signals:
            kill_self(signals.pop())
        return original(*args, **options)

    monkeypatch.setattr(training_start, function, interrupted)
    monkeypatch.setattr(
        training_group, "load_model", lambda *args, **options: kill_self(signals.pop())
    )
    out = tmp_path / "run"
    capsys.readouterr()
    assert run(recipe("best of", out)) == 130
    assert signals == []
    assert capsys.readouterr().err == stopped(out)


def test_a_stopped_run_that_cannot_be_saved_says_why(tmp_path, monkeypatch, capsys):
    def clip(*args, **options):
        kill_self(signal.SIGINT)
        monkeypatch.setattr(training_run, "save_checkpoint", full_disk)

    def full_disk(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RowOptimizer, "clip", clip)
    capsys.readouterr()
    assert run(recipe("adafactor", tmp_path / "run")) == 1
    assert "No space left on device" in last_words(capsys)


def test_a_step_that_fails_says_why_although_its_run_cannot_be_saved(tmp_path, monkeypatch, capsys):
    def choice_logprobs(*arguments):
        monkeypatch.setattr(training_run, "save_checkpoint", full_disk)
        raise RuntimeError("out of memory")

    def full_disk(*args):
        n_saves.append(None)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    n_saves = []
    monkeypatch.setattr(train, "choice_logprobs", choice_logprobs)
    fails(words(tmp_path / "run"), capsys, "train.py: out of memory", code=1)
    assert len(n_saves) == 1


@pytest.mark.slow
def test_an_evaluation_on_held_out_rows_counts_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    """Copies of a run that has stopped just before an evaluation are stopped within it."""
    begun = tmp_path / "begun"
    evaluations = []
    steps = []
    original_evaluate = Group.evaluate_held_out
    original_start = TrainingLog.start_step

    def stop_at_the_fourth(group, cell):  # after which there is no better one
        evaluations.append(None)
        if len(evaluations) == 4:
            kill_self(signal.SIGINT)
        return original_evaluate(group, cell)

    with monkeypatch.context() as patch:
        patch.setattr(Group, "evaluate_held_out", stop_at_the_fourth)
        assert run(recipe("best of", begun)) == 130
    shutil.copytree(begun, tmp_path / "marked")

    with at_line(0, None) as executed, monkeypatch.context() as patch:

        def evaluate_held_out(group, cell):
            evaluations.append(len(executed))
            return original_evaluate(group, cell)

        def start_step(log):
            steps.append(len(executed))
            return original_start(log)

        patch.setattr(Group, "evaluate_held_out", evaluate_held_out)
        patch.setattr(TrainingLog, "start_step", start_step)
        continues_as_if_it_had_not_stopped("best of", tmp_path / "marked")
    watched = ("train.py", "cell.py", "log.py", "signals.py")
    stops = [n for n in range(evaluations[4], steps[0]) if executed[n - 1][0] in watched]
    assert {executed[n - 1][0] for n in stops} == set(watched)
    for n in random.Random(0).sample(stops, 8):
        out = tmp_path / str(n)
        shutil.copytree(begun, out)
        with at_line(n, functools.partial(kill_self, signal.SIGINT)):
            assert resume(out) == 130
        continues_as_if_it_had_not_stopped("best of", out)


@pytest.mark.slow
def test_a_second_signal_while_the_first_one_saves_keeps_the_last_checkpoint(
    tmp_path, monkeypatch, capsys
):
    uninterrupted("adafactor")
    out = tmp_path / "run"
    original_save = torch.save
    original_clip = RowOptimizer.clip
    steps = []

    def impatient_save(state, file):
        if len(steps) == 8:
            kill_self(signal.SIGTERM)
        original_save(state, file)

    def clip(*args, **options):
        steps.append(None)
        if len(steps) == 8:
            kill_self(signal.SIGINT)
        return original_clip(*args, **options)

    monkeypatch.setattr(RowOptimizer, "clip", clip)
    monkeypatch.setattr(torch, "save", impatient_save)
    capsys.readouterr()
    assert run(recipe("adafactor", out)) == 143
    assert last_words(capsys) == stopped(out)
    monkeypatch.undo()
    assert events(out, "train")[-1]["step"] == 5  # the last step with a line and a checkpoint
    continues_as_if_it_had_not_stopped("adafactor", out)


@pytest.mark.parametrize("is_within", [False, True])
def test_a_signal_while_a_trained_group_is_saved_loses_no_step(is_within, tmp_path, monkeypatch):
    """Within a write, torch has the exception of the signal, and raises another one."""
    original_save = torch.save
    steps = steps_that_begin(monkeypatch)

    class Interrupted:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            if self.file.tell() > 0:
                kill_once()
            return self.file.write(data)

    def kill_once():
        if not signals:
            signals.append(None)
            kill_self(signal.SIGINT)

    def save(state, file):
        if len(steps) == 12 and is_within:
            file = Interrupted(file)
        elif len(steps) == 12:
            kill_once()
        original_save(state, file)

    signals = []
    monkeypatch.setattr(torch, "save", save)
    assert run(recipe("adafactor", tmp_path / "run")) == 130
    steps.clear()
    assert resume(tmp_path / "run") == 0
    assert steps == []


def test_the_command_to_continue_quotes_a_folder_with_a_space(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        training_group, "load_model", lambda *args, **options: kill_self(signal.SIGINT)
    )
    out = tmp_path / "my run"
    assert run(words(out)) == 130
    assert capsys.readouterr().err == f"stopped; to continue: python train.py --resume '{out}'\n"


def test_the_command_to_continue_has_the_flags_that_config_json_does_not_have_yet(
    tmp_path, capsys, monkeypatch
):
    """A resumed run that is stopped while it reads its rows has changed no file."""
    out = tmp_path / "run"
    assert run(words(out, steps=3)) == 0
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"device": "cuda", "log_to": "wandb"}))
    given = ["--steps", 6, "--data-dir", tmp_path / "my data", "--device", "cpu"]
    given += ["--log-to", "none"]
    with monkeypatch.context() as patch:
        patch.setattr(train, "make_cells", lambda config: kill_self(signal.SIGINT))
        assert run(["--resume", out, *given]) == 130
        _, _, command = capsys.readouterr().err.partition("python train.py ")
        assert shlex.split(command) == list(map(str, ["--resume", out, *given]))
    assert resume_command("minia3.train", out, {"steps": 6, "device": "cpu"}) == (
        f"minia3.train(resume={str(out)!r}, steps=6, device='cpu')"
    )
    assert run(["--resume", out, *given]) == 0


def test_the_command_that_continues_a_run_has_flags_without_a_value():
    flags = {"shard": 2, "offload": True}
    expected = "python train.py --resume run --shard 2 --offload"
    assert resume_command("python train.py", "run", flags) == expected


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The Run of a process that is not the first, on a machine without the folder of the run."""
    monkeypatch.setattr(processes._process, "rank", 1)
    made = Run(Config(), SimpleNamespace(is_held=True))
    made.folder = tmp_path / "run"
    return made


def test_a_process_without_the_folder_knows_whether_the_run_can_continue(elsewhere, tmp_path):
    assert (
        elsewhere.with_continuation("gone") == "gone"
    )  # the first process removes an empty folder
    elsewhere.write("before")
    command = f"python train.py --resume {quoted(tmp_path / 'run')}"
    assert elsewhere.with_continuation("gone") == f"gone; to continue: {command}"


def test_a_process_that_writes_nothing_collects_no_state_when_it_must_end_at_once(
    elsewhere, capsys
):
    elsewhere.save_and_report(None, None, signal.SIGTERM)
    assert capsys.readouterr().err.startswith("stopped; to continue: ")


def test_a_flag_that_an_earlier_version_did_not_have_has_not_changed():
    assert unrecorded_flags(Config(resume="run"), {"eval_batch_size": 16}) == {}


def test_a_stopped_evaluation_without_a_folder_has_nothing_to_continue(capsys, monkeypatch):
    monkeypatch.setattr(
        training_group, "load_model", lambda *args, **options: kill_self(signal.SIGTERM)
    )
    assert run(words(None, "--eval-only")) == 143
    assert capsys.readouterr().err == "stopped\n"


def test_a_run_that_is_stopped_between_two_lines_continues_bit_for_bit(tmp_path, monkeypatch):
    """The next line has the mean loss of steps before and after the stop."""
    flags = {"dropout": 0.1, "steps": 12, "save_every": 7}
    whole = tmp_path / "whole"
    out = tmp_path / "run"
    assert run(words(whole, **flags)) == 0

    original = TrainingLog.start_step

    def start_step(log):
        if log.step == 8:
            kill_self(signal.SIGINT)
        return original(log)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingLog, "start_step", start_step)
        assert run(words(out, **flags)) == 130
    steps = steps_that_begin(monkeypatch)
    assert resume(out) == 0
    assert steps == list(range(9, 12))  # the step in which the signal came was finished
    assert outcome(out) == outcome(whole)


# Killed: SIGKILL


class Killed(BaseException):
    """What a test raises in place of a SIGKILL, to stay in this process."""


@contextlib.contextmanager
def break_off(at_step):
    """Raise Killed when a step begins."""
    original = TrainingLog.start_step

    def start_step(log):
        if log.step == at_step:
            raise Killed
        return original(log)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingLog, "start_step", start_step)
        yield


def test_a_run_that_breaks_off_continues_bit_for_bit_from_its_last_checkpoint(
    tmp_path, monkeypatch
):
    """The tests above and below do this anywhere, but they are slow."""
    flags = {"dropout": 0.1, "steps": 14, "save_every": 7}
    whole = tmp_path / "whole"
    out = tmp_path / "run"
    assert run(words(whole, **flags)) == 0

    with break_off(at_step=12), pytest.raises(Killed):
        run(words(out, **flags))
    assert events(out, "train")[-1]["step"] == 10  # a line beyond the checkpoint of step 7
    steps = steps_that_begin(monkeypatch)
    assert resume(out) == 0
    assert steps == list(range(7, 14))
    assert outcome(out) == outcome(whole)


ORDERS = {  # in which the tasks are evaluated for two seeds, by --adapters
    "each": ["one", "one", "two", "two", "three", "three"],
    "one": ["one", "two", "three", "one", "two", "three"],
}


@pytest.mark.parametrize("method", ["none", "ia3"])
@pytest.mark.parametrize("adapters", ORDERS)
def test_a_run_that_is_stopped_between_its_tasks_evaluates_each_of_them_once(
    adapters, method, tmp_path, monkeypatch, capsys
):
    """With two seeds, which share a result: that of the first task is not made again."""
    made = running.rows(60)
    tasks = []
    for place, name in enumerate(("one", "two", "three")):
        part = made[20 * place :]
        tasks.append(running.write(tmp_path / name, train=part[:10], test=part[10:20]))
    flags = {"task": ",".join(map(str, tasks)), "seed": "0,1", "adapters": adapters}
    flags |= {"method": method, "steps": 2}
    whole = tmp_path / "whole"
    out = tmp_path / "run"
    assert run(words(whole, **flags)) == 0

    evaluated = []  # steps and tasks

    def evaluate(group, cell, assignment, *arguments):
        evaluated.append((group.log.step, assignment.task.name))
        if evaluated == [(0, "one"), (0, "two"), (0, "three")]:
            kill_self(signal.SIGTERM)
        return original(group, cell, assignment, *arguments)

    original = Group.evaluate
    monkeypatch.setattr(Group, "evaluate", evaluate)
    assert run(words(out, **flags)) == 143
    order = ORDERS[adapters]
    found = [line["task"] for line in events(out, "before")]
    assert found == order[: order.index("three")]
    evaluated.append("resumed")
    capsys.readouterr()
    assert resume(out) == 0
    before = [place for place in evaluated[4:] if place[0] == 0]
    assert evaluated[3] == "resumed"
    assert before == [(0, "three")]
    assert "starts over" not in capsys.readouterr().out
    assert [line["task"] for line in events(out, "before")] == order
    assert outcome(out) == outcome(whole)


def test_torchrun_cannot_break_off_the_save_after_an_error_of_all_processes(
    tmp_path, monkeypatch, capsys
):
    """Another process has ended by then, and torchrun sends SIGTERM to this one."""

    def save(*arguments):
        kill_self(signal.SIGTERM)
        save_checkpoint(*arguments)

    def be_one_of_two(*arguments):
        monkeypatch.setattr(training_run, "n_processes", lambda: 2)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(train, "choice_logprobs", be_one_of_two)
    monkeypatch.setattr(training_run, "save_checkpoint", save)
    fails(words(tmp_path / "run"), capsys, "train.py: out of memory", code=1)
    assert (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_run_whose_memory_runs_out_in_a_step_continues_before_this_step(
    tmp_path, monkeypatch, capsys
):
    """Dropout has been drawn by then, and a part of the gradients exists."""
    flags = {"dropout": 0.1, "steps": 12, "save_every": 100, "micro_batch_size": 3}
    whole = tmp_path / "whole"
    out = tmp_path / "run"
    assert run(words(whole, **flags)) == 0
    n_parts = []

    def choice_logprobs(*arguments):
        n_parts.append(None)
        logp_BCL = original(*arguments)
        if len(n_parts) == 16:  # the second one of step 8
            raise RuntimeError("out of memory")
        return logp_BCL

    original = train.choice_logprobs
    with monkeypatch.context() as patch:
        patch.setattr(train, "choice_logprobs", choice_logprobs)
        fails(words(out, **flags), capsys, "out of memory", code=1)
    steps = steps_that_begin(monkeypatch)
    assert resume(out) == 0
    assert steps == list(range(7, 12))
    assert outcome(out) == outcome(whole)


def test_a_resumed_run_keeps_vectors_that_do_not_train_if_their_file_has_changed(tmp_path):
    def save_vectors(value):
        adapted = load_model(running.model("t5"))
        for vector in minia3.vectors(adapted).values():
            vector.data.fill_(value)
        minia3.save_adapter(adapted, tmp_path / "adapter")

    flags = {"sites": "k", "adapter": tmp_path / "adapter", "steps": 8, "save_every": 4}
    save_vectors(1.5)
    whole = tmp_path / "whole"
    out = tmp_path / "run"
    assert run(words(whole, **flags)) == 0
    with break_off(at_step=6), pytest.raises(Killed):
        run(words(out, **flags))
    save_vectors(0.5)
    assert resume(out) == 0
    assert outcome(out) == outcome(whole)


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_resumed_run_does_not_need_the_vectors_that_it_began_with(is_replaced, tmp_path):
    """One of them has a site that the paper does not have, so the model must be given it again."""
    begun, other, whole, out = (tmp_path / name for name in ("begun", "other", "whole", "run"))
    assert run(words(begun, sites="q,k", lr=0.1, steps=2)) == 0
    assert run(words(other, sites="v,o", lr=0.1, steps=2)) == 0
    flags = {"sites": "k", "adapter": begun / "adapter", "steps": 8, "save_every": 4}
    assert run(words(whole, **flags)) == 0
    with break_off(at_step=6), pytest.raises(Killed):
        run(words(out, **flags))
    recorded = json.loads((out / "config.json").read_text())["adapter_files"]
    files = ("adapter_config.json", "adapter_model.safetensors", "task.json")
    assert tuple(recorded) == files
    shutil.rmtree(begun)
    if is_replaced:
        shutil.copytree(other, begun)
    assert resume(out) == 0
    assert outcome(out) == outcome(whole)
    assert json.loads((out / "config.json").read_text())["adapter_files"] == recorded


def test_a_resumed_run_whose_lora_is_gone_or_replaced_says_so(tmp_path, capsys):
    begun, other, whole, out = (tmp_path / name for name in ("begun", "other", "whole", "run"))
    assert run(words(begun, method="lora", rank=2, steps=1)) == 0
    assert run(words(other, method="lora", rank=3, steps=1)) == 0
    adapter = begun / "adapter"
    flags = {"method": "lora", "adapter": adapter, "steps": 8, "save_every": 4}
    assert run(words(whole, **flags)) == 0
    with break_off(at_step=6), pytest.raises(Killed):
        run(words(out, **flags))
    before = contents(out)
    kept = adapter.rename(begun / "kept")
    fails(["--resume", out], capsys, f"{adapter}: not found; expected the folder")
    assert contents(out) == before

    shutil.copytree(kept, adapter)
    lora_config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(lora_config | {"lora_alpha": 32}))
    found = f"{out}: the adapter {adapter} has changed since this run began (adapter_config.json)"
    fails(["--resume", out], capsys, f"{found}: restore it, or begin a new run")
    assert contents(out) == before

    # A run of an earlier version does not say which adapter it began with.
    recorded = json.loads((out / "config.json").read_text())
    earlier = json.dumps({name: recorded[name] for name in recorded if name != "adapter_files"})
    (out / "config.json").write_text(earlier)
    shutil.rmtree(adapter)
    shutil.copytree(other / "adapter", adapter)
    fails(["--resume", out], capsys, f"other parameters than --adapter {adapter}, which")
    (out / "config.json").write_text(earlier)
    shutil.rmtree(adapter)
    shutil.copytree(kept, adapter)
    assert resume(out) == 0
    assert json.loads((out / "config.json").read_text()) == recorded
    assert outcome(out) == outcome(whole)


def test_an_evaluation_is_not_resumed_with_other_vectors(tmp_path, monkeypatch, capsys):
    begun, other, whole, out = (tmp_path / name for name in ("begun", "other", "whole", "run"))
    assert run(words(begun, lr=0.1, steps=2)) == 0
    assert run(words(other, lr=0.2, steps=2)) == 0
    made = running.rows(40)
    one = running.write(tmp_path / "one", train=made[:10], test=made[10:20])
    two = running.write(tmp_path / "two", train=made[20:30], test=made[30:])
    adapter = begun / "adapter"
    flags = {"task": f"{one},{two}", "adapter": adapter}
    assert run(words(whole, "--eval-only", **flags)) == 0

    def evaluate(group, cell, assignment, *arguments):
        if assignment.task.name == "two":
            kill_self(signal.SIGTERM)
        return original(group, cell, assignment, *arguments)

    original = Group.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(Group, "evaluate", evaluate)
        assert run(words(out, "--eval-only", **flags)) == 143
    before = contents(out)
    kept = adapter.rename(begun / "kept")
    shutil.copytree(other / "adapter", adapter)
    found = f"the adapter {adapter} has changed since this run began (adapter_model.safetensors): "
    fails(["--resume", out], capsys, found)
    assert contents(out) == before
    shutil.rmtree(adapter)
    shutil.copytree(kept, adapter)
    assert resume(out) == 0
    assert outcome(out) == outcome(whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", RECIPES)
def test_a_run_that_is_killed_anywhere_continues_bit_for_bit(name, seed, tmp_path):
    out = tmp_path / "run"
    prepare = functools.partial(at_line, somewhere(name, f"kill {seed}"), kill_self)
    assert finish(start(recipe(name, out), tmp_path / "log", prepare)) == -signal.SIGKILL
    continues_as_if_it_had_not_stopped(name, out)


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_continues_bit_for_bit(tmp_path):
    out = tmp_path / "run"
    n = len(uninterrupted("best of")[1])
    arguments = recipe("best of", out)
    for part in (0.6, 0.5, 0.4):
        prepare = functools.partial(at_line, int(part * n), kill_self)
        assert finish(start(arguments, tmp_path / "log", prepare)) == -signal.SIGKILL
        arguments = ["--resume", out]
    continues_as_if_it_had_not_stopped("best of", out)


class SmallDisk(io.FileIO):
    """A file of which the disk takes a part. Then it calls `fail`."""

    def __init__(self, path, fail):
        super().__init__(path, "w")
        self.fail = fail

    def write(self, data):
        n_free = 2000 - self.tell()
        if len(data) <= n_free:
            return super().write(data)
        super().write(data[:n_free])
        return self.fail()


@contextlib.contextmanager
def torn_checkpoint(k):
    """The k-th checkpoint is written by a part when the process is killed."""
    n = []

    def open_small(path, mode):
        n.append(None)
        return open(path, mode) if len(n) < k else io.BufferedWriter(SmallDisk(path, kill_self))

    training_checkpoint.open = open_small
    yield


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 2])
def test_a_run_that_is_killed_while_it_writes_a_checkpoint_continues_from_the_previous_checkpoint(
    k, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    prepare = functools.partial(torn_checkpoint, k)
    assert finish(start(recipe("adafactor", out), tmp_path / "log", prepare)) == -signal.SIGKILL
    steps = steps_that_begin(monkeypatch)
    continues_as_if_it_had_not_stopped("adafactor", out)
    assert steps[0] == {1: 0, 2: 5}[k]


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("event", "step", "part"),
    [
        ("before", 0, 0),
        ("before", 0, 1),
        ("train", 10, 0.5),
        ("train", 10, 1),
        ("eval", 6, 0.5),
        ("final", 12, 0),
        ("final", 12, 1),
    ],
)
def test_a_run_that_is_killed_while_it_writes_a_line_has_the_line_once(event, step, part, tmp_path):
    out = tmp_path / "run"
    prepare = functools.partial(torn_line, event, step, part)
    assert finish(start(recipe("best of", out), tmp_path / "log", prepare)) == -signal.SIGKILL
    continues_as_if_it_had_not_stopped("best of", out)


@pytest.mark.slow
def test_a_run_that_is_killed_before_its_first_checkpoint_begins_again(tmp_path):
    out = tmp_path / "run"
    prepare = functools.partial(torn_line, "train", 10, 1)
    assert finish(start(recipe("targets", out), tmp_path / "log", prepare)) == -signal.SIGKILL
    assert not (out / "checkpoint.pt").exists()
    assert metrics(out)[-1]["step"] == 10
    continues_as_if_it_had_not_stopped("targets", out)


@pytest.mark.slow
def test_an_evaluation_that_is_killed_continues(tmp_path):
    out = tmp_path / "run"
    prepare = functools.partial(torn_line, "final", 0, 0.5)
    assert finish(start(words(out, "--eval-only"), tmp_path / "log", prepare)) == -signal.SIGKILL
    assert resume(out) == 0
    assert [line["event"] for line in metrics(out)] == ["before", "final"]
    assert resume(out) == 0


@pytest.mark.slow
def test_a_run_may_be_moved_before_it_continues(tmp_path, capsys):
    out = tmp_path / "run"
    prepare = functools.partial(torn_line, "train", 10, 1)
    assert finish(start(recipe("adafactor", out), tmp_path / "log", prepare)) == -signal.SIGKILL
    out.rename(tmp_path / "moved")
    continues_as_if_it_had_not_stopped("adafactor", tmp_path / "moved")
    assert not out.exists()
    assert f"--adapter {tmp_path / 'moved' / 'adapter'}\n" in capsys.readouterr().out


# What continues, and from where


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", ["", '{"event": "train", "step": 99}\n', '{"event": "fin', "\0\0\0", "\n\n"]
)
def test_metrics_beyond_the_checkpoint_are_cut(more, tmp_path, monkeypatch):
    uninterrupted("adafactor")
    out = tmp_path / "run"

    def stop(folder, state):
        save_checkpoint(folder, state)
        kill_self(signal.SIGTERM)

    monkeypatch.setattr("minia3.training.run.save_checkpoint", stop)
    assert run(recipe("adafactor", out)) == 143
    monkeypatch.undo()
    with (out / "metrics.jsonl").open("a") as file:
        file.write(more)
    continues_as_if_it_had_not_stopped("adafactor", out)


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
        == f"{out} is finished: the final lines of its metrics.jsonl are the results; "
        f"to train longer: python train.py --resume {running.quoted(out)} --steps 12\n"
    )
    assert before == (
        contents(out),
        [p.stat().st_mtime_ns for p in sorted(out.rglob("*")) if p.name != ".lock"],
    )


@pytest.mark.parametrize("at_step", [0, 3, 5])
def test_a_folder_that_is_deleted_while_the_run_trains_is_one_line(
    at_step, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "run"
    original = TrainingLog.start_step

    def start_step(log):
        if log.step == at_step:
            shutil.rmtree(out)
        return original(log)

    monkeypatch.setattr(TrainingLog, "start_step", start_step)
    fails(words(out), capsys, f"{out}: the folder of this run was deleted or moved", code=1)
    assert not out.exists()


@pytest.mark.parametrize("metrics_of_other", [None, '{"event": "before", "step": 0}\n'])
@pytest.mark.parametrize("at_step", [0, 3, 5])
def test_a_run_writes_nothing_into_the_folder_that_another_run_has_made_anew(
    at_step, metrics_of_other, tmp_path, capsys, monkeypatch
):
    """They wrote into the same metrics.jsonl and checkpoint.pt."""
    out = tmp_path / "run"
    original = TrainingLog.start_step
    of_other_run = {}

    def start_step(log):
        if log.step == at_step:
            shutil.rmtree(out)
            begin_run(out, Config(out=str(out)), {}, resources)
            if metrics_of_other is not None:
                (out / "metrics.jsonl").write_text(metrics_of_other)
            of_other_run.update(contents(out))
        return original(log)

    monkeypatch.setattr(TrainingLog, "start_step", start_step)
    with contextlib.ExitStack() as resources:
        fails(words(out), capsys, f"{out}: the folder of this run was deleted or moved", code=1)
        assert contents(out) == of_other_run
        assert Path("config.json") in of_other_run


def test_a_run_whose_lock_somebody_removes_goes_on(tmp_path, monkeypatch):
    """The file is hidden, and a user who copies a folder may leave it out."""
    out = tmp_path / "run"
    original = TrainingLog.start_step

    def start_step(log):
        (out / ".lock").unlink(missing_ok=True)
        return original(log)

    monkeypatch.setattr(TrainingLog, "start_step", start_step)
    assert run(words(out)) == 0
    assert len(events(out, "final")) == 1


def test_a_folder_that_is_deleted_before_the_result_is_saved_is_not_made_again(
    tmp_path, capsys, monkeypatch
):
    out = tmp_path / "run"
    message = f"{out}: the folder of this run was deleted or moved"
    evaluate_after = train.evaluate_after
    finish_cell = training_run.Run.finish_cell

    def evaluate_and_delete(*args):
        finals = evaluate_after(*args)
        shutil.rmtree(out)
        return finals

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate_after", evaluate_and_delete)
        fails(words(out), capsys, message, code=1)
    assert not out.exists()

    def finish_and_delete(*args):
        finish_cell(*args)
        shutil.rmtree(out)

    monkeypatch.setattr(training_run.Run, "finish_cell", finish_and_delete)
    fails(words(out, method="lora", seed="0,1"), capsys, message, code=1)
    assert not out.exists()


# The disk


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("n_buffered", [1, 10**6])  # the disk fails in the middle, or at the end
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(
    n_buffered, number, tmp_path, capsys, monkeypatch
):
    uninterrupted("adafactor")
    out = tmp_path / "run"

    def fail():
        raise OSError(number, os.strerror(number))

    def open_small(path, mode):
        if not (out / "checkpoint.pt").exists():
            return open(path, mode)
        return io.BufferedWriter(SmallDisk(path, fail), n_buffered)

    monkeypatch.setattr(training_checkpoint, "open", open_small, raising=False)
    named = f"{os.strerror(number)}: '{out / 'checkpoint.pt'}'"
    continuation = f"; to continue: python train.py --resume {running.quoted(out)}\n"
    fails(recipe("adafactor", out), capsys, named, continuation, code=1)
    monkeypatch.undo()
    assert sorted(p.name for p in out.iterdir()) == [
        ".lock",
        "checkpoint.pt",
        "config.json",
        "metrics.jsonl",
    ]
    continues_as_if_it_had_not_stopped("adafactor", out)


@pytest.mark.slow
def test_a_resumed_run_whose_cells_have_all_lost_patience_only_reports(tmp_path, monkeypatch):
    """The stop comes between the last evaluation, in which the cell gives up, and its report."""
    uninterrupted("best of")
    out = tmp_path / "run"
    original = Group.evaluate
    n_calls = []

    def evaluate(group, *args, **options):
        if not group.active_cells:
            n_calls.append(None)
            kill_self(signal.SIGTERM)
        return original(group, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Group, "evaluate", evaluate)
        assert run(recipe("best of", out)) == 143
        assert resume(out) == 143  # again there is no active cell
    assert len(n_calls) == 2
    continues_as_if_it_had_not_stopped("best of", out)


@contextlib.contextmanager
def small_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    yield


@pytest.mark.slow
def test_a_disk_that_takes_no_more_is_one_line(tmp_path):
    out = tmp_path / "run"
    log = tmp_path / "log"
    number = errno.EFBIG
    assert finish(start(recipe("adafactor", out), log, functools.partial(small_files, 4096))) == 1
    found = f"[Errno {number}] {os.strerror(number)}: '{out / 'checkpoint.pt'}'"
    expected = f"train.py: {found}; to continue: python train.py --resume {running.quoted(out)}"
    assert log.read_text().splitlines()[-1] == expected
    assert "Traceback" not in log.read_text()
    continues_as_if_it_had_not_stopped("adafactor", out)
