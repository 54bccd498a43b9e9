"""A run that is made longer continues with the learning rate that the message says."""

import contextlib
import errno
import functools
import json
import os
import shutil
import signal

import pytest
import running
import torch
from running import contents, events, fails, kill_self, metrics, outcome, resume, run, train, words
from written_out import results_by_hand

from minia3.training import cell as training_cell
from minia3.training import checkpoint as training_checkpoint
from minia3.training import group as training_group
from minia3.training import log as training_log
from minia3.training import run as training_run
from minia3.training.optimizer import learning_rate
from minia3.training.outcomes import results_of_finished

SHORT, LONG = 4, 8  # steps of a run, before and after it is made longer


def extend(folder, steps=LONG):
    return run(["--resume", folder, "--steps", steps])


def without_events(lines, *names):
    return [line for line in lines if line["event"] not in names]


def without_extension(lines):
    """Return the lines of an extended run as those of a run that was as long at once."""
    found = []
    for line in without_events(lines, "extended"):
        found.append({name: value for name, value in line.items() if name != "extended_from"})
    return found


def two_schedules(step, config, change):
    """The rate of a SHORT run until the step `change`, and then that of a LONG run."""
    steps = SHORT if step < change else LONG
    config = type(config)(**{**vars(config), "steps": steps})
    return learning_rate(step, config)


def two_schedules_of_all(monkeypatch):
    patched = functools.partial(two_schedules, change=SHORT)
    monkeypatch.setattr(train, "learning_rate", patched)
    monkeypatch.setattr(training_log, "learning_rate", patched)


RECIPES = {
    "adafactor": {"dropout": 0.1},
    "adamw": {"dropout": 0.2, "optimizer": "adamw", "clip": 0.5},
    "lora": {"method": "lora", "dropout": 0.1},
    "full": {"method": "full", "dropout": 0.1, "lr": 0.01},
    "best of full": {"method": "full", "eval_every": 2, "lr": 0.03, "patience": 9},
    "grid": {"seed": "0,3", "lr": "0.1,0.01", "dropout": 0.1},
    "best of": {"eval_every": 2, "dropout": 0.1, "lr": 0.3, "patience": 9},
}


@contextlib.contextmanager
def interrupted_at_update(n, monkeypatch):
    """Press Ctrl-C before the n-th update of a group in the block."""
    original = training_group.Group.update
    updates = []

    def update(group, rates):
        updates.append(rates)
        if len(updates) == n:
            kill_self(signal.SIGINT)
        original(group, rates)

    with monkeypatch.context() as patch:
        patch.setattr(training_group.Group, "update", update)
        yield


@contextlib.contextmanager
def interrupted_in_final_evaluation(monkeypatch):
    """Press Ctrl-C in the block when the last cell of a group is evaluated after training."""
    original = train.evaluate_after

    def evaluate_after(group, cell):
        if cell is group.cells[-1]:
            kill_self(signal.SIGINT)
        return original(group, cell)

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate_after", evaluate_after)
        yield


@pytest.mark.parametrize("name", RECIPES)
def test_a_finished_run_that_is_extended_is_a_run_with_two_schedules(
    name, tmp_path, capsys, monkeypatch
):
    flags = {"lr": 0.1, **RECIPES[name]}
    out = tmp_path / "run"
    assert run(words(out, steps=SHORT, **flags)) == 0
    first = metrics(out)
    assert extend(out) == 0
    assert f"extended from step {SHORT} to step {LONG}: " in capsys.readouterr().out

    two_schedules_of_all(monkeypatch)
    whole = tmp_path / "whole"
    # A line at step SHORT is what the shorter run writes at its end.
    assert run(words(whole, steps=LONG, save_every=SHORT, **flags)) == 0
    adapters, lines = outcome(out)
    expected_adapters, expected_lines = outcome(whole)
    assert adapters == expected_adapters
    assert without_extension(lines) == expected_lines
    assert {tuple(line["extended_from"]) for line in events(out, "final")} == {(SHORT,)}
    finals = [line for line in first if line["event"] == "final"]
    extended = [line for line in metrics(out) if line["event"] == "extended"]
    assert [{**line, "event": "final"} for line in extended] == finals
    assert json.loads((out / "config.json").read_text())["steps"] == LONG
    assert resume(out) == 0  # it is finished again
    assert "is finished" in capsys.readouterr().out


def test_the_message_says_what_the_learning_rate_does(tmp_path, capsys):
    out = tmp_path / "run"
    assert run(words(out, steps=10, lr=0.1, warmup_ratio=0)) == 0
    assert extend(out, 20) == 0
    text = "the learning rate continues as in a run of 20 steps, at 5.0e-02, and falls to 0\n"
    assert f"extended from step 10 to step 20: {text}" in capsys.readouterr().out
    rates = {line["step"]: line["lr"] for line in events(out, "train")}
    assert rates[10] == pytest.approx(0.1 * 1 / 10)  # the last step of a run of 10
    assert rates[20] == pytest.approx(0.1 * 1 / 20)


def test_the_message_has_each_rate_of_a_grid_once(tmp_path, capsys):
    out = tmp_path / "run"
    assert run(words(out, steps=10, seed="0,1", lr=0.1, warmup_ratio="0,0.9")) == 0
    assert extend(out, 20) == 0
    # Without a warm-up the rate has fallen to the half; with one of 18 steps it still rises.
    assert "in a run of 20 steps, at 5.0e-02,5.6e-02, and falls to 0\n" in capsys.readouterr().out
    assert {line["steps"] for line in events(out, "final")} == {20}


def test_an_extension_can_be_stopped_and_killed_and_repeated(tmp_path, monkeypatch):
    flags = {"steps": SHORT, "lr": 0.1, "dropout": 0.1}
    whole = tmp_path / "whole"
    assert run(words(whole, **flags)) == 0
    shutil.copytree(whole, tmp_path / "run")
    assert extend(whole) == 0
    out = tmp_path / "run"

    class Killed(BaseException):
        pass

    def break_off(*args, **options):
        raise Killed

    places = (
        (training_run, "save_checkpoint"),
        (training_run.Metrics, "cut"),
        (training_run, "record_run"),
    )
    for owner, name in places:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, break_off)
            with pytest.raises(Killed):
                extend(out)
    with interrupted_at_update(2, monkeypatch):
        assert extend(out) == 130
    assert resume(out) == 0
    assert outcome(out) == outcome(whole)


@pytest.mark.parametrize(
    ("place", "writer"),
    [
        (training_run.Metrics, "reopen"),
        (training_run, "save_checkpoint"),
        (training_run.Metrics, "cut"),
        (training_run, "record_run"),
    ],
)
def test_an_extension_that_is_stopped_as_it_begins_continues_without_steps(
    place, writer, tmp_path, monkeypatch, capsys
):
    """It writes the checkpoint, which may take long, metrics.jsonl, and config.json in turns."""
    flags = {"steps": SHORT, "seed": "0,3", "lr": 0.1, "dropout": 0.1}
    whole = tmp_path / "whole"
    assert run(words(whole, **flags)) == 0
    shutil.copytree(whole, tmp_path / "run")
    assert extend(whole) == 0
    out = tmp_path / "run"
    original = getattr(place, writer)

    def write(*arguments):
        kill_self(signal.SIGINT)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(place, writer, write)
        assert extend(out) == 130
    command = f"python train.py --resume {running.quoted(out)}"
    assert f"to continue: {command}\n" in capsys.readouterr().err
    assert resume(out) == 0
    assert outcome(out) == outcome(whole)


def fail_to_write(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "checkpoint.pt")


@pytest.mark.parametrize("method", ["ia3", "full"])
def test_a_finished_run_keeps_its_results_if_the_disk_is_full_as_it_is_made_longer(
    method, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    assert run(words(out, method=method)) == 0
    before = contents(out)
    with monkeypatch.context() as patch:
        patch.setattr(training_checkpoint.torch, "save", fail_to_write)
        fails(["--resume", out, "--steps", 12], capsys, "No space left on device", code=1)
    assert contents(out) == before
    assert extend(out, 12) == 0


@pytest.mark.parametrize("steps", [None, LONG])
def test_a_finished_run_has_its_results_until_a_killed_extension_goes_on(
    steps, tmp_path, monkeypatch
):
    """The kill comes after the checkpoint was written, and before metrics.jsonl was."""
    flags = {"steps": SHORT, "seed": "0,3", "lr": "0.1", "dropout": 0.1}
    whole = tmp_path / "whole"
    assert run(words(whole, **flags)) == 0
    shutil.copytree(whole, tmp_path / "run")
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(training_run.Metrics, "cut", fail_to_write)
        assert extend(out) == 1
    assert outcome(out) == outcome(whole)
    assert results_of_finished(out) == results_of_finished(whole)
    assert extend(whole) == 0
    if steps is None:  # config.json still has the steps from before
        assert resume(out) == 0
        assert [line["steps"] for line in events(out, "final")] == [SHORT, SHORT]
    assert extend(out) == 0
    assert outcome(out)[0] == outcome(whole)[0]


def test_a_run_that_was_resumed_without_the_steps_of_its_extension_is_not_called_extended(
    tmp_path, monkeypatch
):
    out = tmp_path / "run"
    assert run(words(out, steps=SHORT, lr=0.1)) == 0
    adapters, (*_, final) = outcome(out)
    with monkeypatch.context() as patch:
        patch.setattr(training_run, "record_run", fail_to_write)
        assert extend(out) == 1
    assert resume(out) == 0
    assert outcome(out)[0] == adapters
    assert outcome(out)[1][-1] == final
    assert extend(out) == 0
    assert metrics(out)[-1]["extended_from"] == [SHORT]


@pytest.mark.parametrize("has_checkpoint", [True, False])
def test_an_extension_that_is_stopped_before_it_is_recorded_continues_with_steps(
    has_checkpoint, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    assert run(words(out, steps=6)) == 0
    if not has_checkpoint:  # as if it was killed before the first one
        (out / "checkpoint.pt").unlink()
        *lines, _ = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
        (out / "metrics.jsonl").write_text("".join(lines))
    before = contents(out)
    with monkeypatch.context() as patch:
        patch.setattr(train, "make_cells", lambda config: kill_self(signal.SIGINT))
        assert extend(out, 12) == 130
    command = f"python train.py --resume {running.quoted(out)} --steps 12"
    assert f"to continue: {command}\n" in capsys.readouterr().err
    assert contents(out) == before


def test_a_run_that_was_stopped_can_be_made_longer_too(tmp_path, monkeypatch):
    out = tmp_path / "run"
    with interrupted_at_update(4, monkeypatch):
        assert run(words(out, steps=6, lr=0.1, warmup_ratio=0)) == 130
    assert extend(out, 12) == 0
    final = metrics(out)[-1]
    assert (final["event"], final["steps"]) == ("final", 12)
    assert metrics(out)[-2]["lr"] == pytest.approx(0.1 / 12)


AT_THE_END = {
    "grid": {"seed": "0,3", "lr": 0.1, "dropout": 0.1},
    "best of": {"lr": "0.3,0.03", "eval_every": 2, "patience": 9},
    "failed": {"lr": "1e30,0.1"},  # the first cell
}


def results_line(capsys):
    """Return the line of the last report that says how many results there are."""
    lines = capsys.readouterr().out.splitlines()
    return [line for line in lines if line[1:].startswith(" result")][-1]


@pytest.mark.parametrize("name", AT_THE_END)
def test_a_grid_that_was_stopped_after_the_results_of_a_cell_trains_all_cells_longer(
    name, tmp_path, monkeypatch, capsys
):
    flags = {**AT_THE_END[name], "steps": SHORT}
    code = 1 if name == "failed" else 0
    finished = tmp_path / "finished"
    assert run(words(finished, **flags)) == code
    assert extend(finished) == code
    expected_results = results_line(capsys)
    out = tmp_path / "run"
    with interrupted_in_final_evaluation(monkeypatch):
        assert run(words(out, **flags)) == 130
    assert {line["event"] for line in metrics(out)} & {"final", "failed"}
    assert extend(out) == code
    assert results_line(capsys) == expected_results
    adapters, lines = outcome(out)
    expected_adapters, expected_lines = outcome(finished)
    assert adapters == expected_adapters
    assert without_events(lines, "extended") == without_events(expected_lines, "extended")


@pytest.mark.parametrize("is_finished", [True, False])
def test_an_adapter_that_ran_out_of_patience_trains_again(is_finished, tmp_path, monkeypatch):
    def miss(cell, results):
        cell.progress.n_misses = 1

    monkeypatch.setattr(training_cell.Cell, "keep_if_best", miss)
    out = tmp_path / "run"
    flags = words(out, steps=6, eval_every=2, patience=1)
    if is_finished:
        assert run(flags) == 0
        assert metrics(out)[-1]["steps"] == 2
    else:
        with interrupted_in_final_evaluation(monkeypatch):
            assert run(flags) == 130
    assert extend(out, 12) == 0
    assert metrics(out)[-1]["steps"] == 4


def test_the_last_step_is_evaluated_once_before_and_after_a_run_is_made_longer(
    tmp_path, monkeypatch
):
    out = tmp_path / "run"
    with interrupted_in_final_evaluation(monkeypatch):
        assert run(words(out, steps=5, eval_every=2)) == 130
    assert resume(out) == 0
    assert [line["step"] for line in events(out, "eval")] == [2, 4, 5]
    assert extend(out, 9) == 0
    assert [line["step"] for line in events(out, "eval")] == [2, 4, 5, 6, 8, 9]


def one_misses(group, cell):
    """Return an accuracy with which one of the adapters never improves on its first evaluation."""
    return 0.5 if cell.config.lr == 0.3 else group.log.step / 100


def test_a_line_has_the_loss_of_an_adapter_that_trains_again(tmp_path, monkeypatch):
    results_by_hand(monkeypatch, one_misses)
    out = tmp_path / "run"
    flags = {"lr": "0.1,0.3", "steps": 12, "eval_every": 2, "patience": 1, "save_every": 4}
    with interrupted_at_update(9, monkeypatch):
        assert run(words(out, **flags)) == 130
    assert extend(out, 18) == 0
    cells_of_line = {line["step"]: [*line["losses"]] for line in events(out, "train")}
    assert cells_of_line[4] == ["lr0.1", "lr0.3"]
    assert cells_of_line[8] == ["lr0.1"]  # the other one has run out of patience after step 4
    assert cells_of_line[10] == ["lr0.1", "lr0.3"]  # from step 9 on it trains again


def no_model(*args, **options):
    kill_self(signal.SIGINT)


def test_a_grid_is_not_extended_to_fewer_steps_than_one_of_its_adapters_has(
    tmp_path, monkeypatch, capsys
):
    results_by_hand(monkeypatch, one_misses)
    out = tmp_path / "run"
    flags = {"method": "lora", "lr": "0.3,0.1", "eval_every": 2, "patience": 1}
    assert run(words(out, steps=6, **flags)) == 0
    assert [line["steps"] for line in events(out, "final")] == [4, 6]
    with monkeypatch.context() as patch:
        patch.setattr(training_group, "load_model", no_model)
        assert extend(out, 20) == 130
    before = contents(out)
    fails(["--resume", out, "--steps", 5], capsys, "--steps is 5, and the run has done 6 steps")
    assert contents(out) == before


def test_a_grid_whose_first_adapter_failed_can_be_made_longer_before_the_second_one_begins(
    tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    original = training_group.load_model
    loaded = []

    def load_one_model(*args, **options):
        loaded.append(None)
        return no_model() if len(loaded) == 2 else original(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(training_group, "load_model", load_one_model)
        assert run(words(out, method="full", lr="1e30,0.01", warmup_ratio=0)) == 130
    assert [line["event"] for line in metrics(out)][-1] == "failed"
    assert extend(out, 9) == 1
    assert "extended from step 6 to step 9: " in capsys.readouterr().out
    assert [line["steps"] for line in events(out, "final")] == [9]


def test_a_stopped_run_that_trains_nothing_cannot_be_extended(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    with interrupted_in_final_evaluation(monkeypatch):
        assert run(words(out, method="none", seed="0,1")) == 130
    fails(["--resume", out, "--steps", 20], capsys, "this run trains nothing")


GRIDS = {
    "lora": {"method": "lora", "seed": "0,3", "dropout": 0.1, "lr": 0.1},
    "best of full": {"method": "full", "lr": "0.03,0.01", "eval_every": 2, "patience": 9},
}


def by_adapter(lines):
    """Return the lines of metrics.jsonl of a grid, adapter by adapter.

    A grid whose adapters train one after the other has them in another order if it is extended.
    """
    found = {}
    for line in lines:
        name = line.get("adapter") or next(iter(line["losses"]))
        found.setdefault(name, []).append(line)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", GRIDS)
def test_each_adapter_of_an_extended_grid_continues_from_its_own_state(name, tmp_path, monkeypatch):
    flags = GRIDS[name]
    out = tmp_path / "run"
    assert run(words(out, steps=SHORT, **flags)) == 0
    assert extend(out) == 0
    lines = without_extension(outcome(out)[1])
    n_extended = len(events(out, "extended"))
    with monkeypatch.context() as patch:
        two_schedules_of_all(patch)
        whole = tmp_path / "whole"
        assert run(words(whole, steps=LONG, save_every=SHORT, **flags)) == 0
    assert outcome(out)[0] == outcome(whole)[0]
    assert by_adapter(lines) == by_adapter(outcome(whole)[1])
    assert n_extended == 2
    assert extend(out, LONG + 1) == 0  # and again
    assert [line["steps"] for line in events(out, "final")] == [LONG + 1] * 2
    assert [line["extended_from"] for line in events(out, "final")] == [[SHORT, LONG]] * 2


# A grid of two adapters is stopped in the first and in the second one, before and after it is made
# longer.
@pytest.mark.slow
@pytest.mark.parametrize(("n_updates", "is_stopped_again"), [(2, False), (6, True)])
def test_a_grid_that_was_stopped_can_be_made_longer(
    n_updates, is_stopped_again, tmp_path, monkeypatch
):
    flags = {**GRIDS["lora"], "steps": SHORT, "warmup_ratio": 0}
    out = tmp_path / "run"
    with interrupted_at_update(n_updates, monkeypatch):
        assert run(words(out, **flags)) == 130
    if is_stopped_again:
        with interrupted_at_update(LONG - 1, monkeypatch):  # in the second adapter
            assert extend(out) == 130
        assert resume(out) == 0
    else:
        assert extend(out) == 0

    expected = {}
    for seed, change in (("0", min(n_updates, SHORT)), ("3", max(n_updates - SHORT, 0))):
        whole = tmp_path / f"whole-{seed}"
        with monkeypatch.context() as patch:
            patched = functools.partial(two_schedules, change=change)
            patch.setattr(train, "learning_rate", patched)
            assert run(words(whole, **flags | {"steps": LONG, "seed": seed})) == 0
        (path,) = (whole / "adapter").glob("*.safetensors")
        expected[f"s{seed}"] = path.read_bytes()
    found = {path.parent.name: path.read_bytes() for path in out.rglob("*.safetensors")}
    assert found == expected
    assert [line["steps"] for line in events(out, "final")] == [LONG, LONG]


@pytest.mark.parametrize("name", ["adafactor", "lora"])
def test_a_finished_run_without_its_checkpoint_is_not_made_longer(name, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(words(out, steps=SHORT, **RECIPES[name])) == 0
    (out / "checkpoint.pt").unlink()
    before = contents(out)
    fails(["--resume", out, "--steps", LONG], capsys, f"{out} keeps no state to continue from")
    assert contents(out) == before


def test_a_run_that_starts_over_does_not_continue_from_old_states(tmp_path, capsys):
    flags = GRIDS["lora"]
    out = tmp_path / "run"
    assert run(words(out, steps=6, **flags)) == 0
    before = outcome(out)
    (out / "checkpoint.pt").unlink()
    capsys.readouterr()
    assert resume(out) == 0
    assert f"{out} has no checkpoint.pt, so the run starts over" in capsys.readouterr().out
    assert outcome(out) == before


def test_a_state_that_is_missing_or_damaged_is_one_line(tmp_path, capsys):
    out = tmp_path / "run"
    assert run(words(out, steps=3, **GRIDS["lora"])) == 0
    state = out / "states" / "0.pt"
    content = state.read_bytes()
    for damaged in (content[:-50], b"", None):
        state.unlink()
        if damaged is not None:
            state.write_bytes(damaged)
        before = contents(out)
        reason = "cannot be extended" if damaged != b"" else "the file is empty"
        fails(["--resume", out, "--steps", 9], capsys, "states/0.pt", reason)
        assert contents(out) == before


def test_a_state_with_other_values_is_named(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    assert run(words(out, steps=3, **GRIDS["lora"])) == 0
    with interrupted_at_update(1, monkeypatch):
        assert extend(out, 4) == 130
    path = out / "states" / "1.pt"
    state = torch.load(path, weights_only=True)
    state["group"]["parameters"] = {"another": torch.ones(1)}
    torch.save(state, path)
    fails(["--resume", out], capsys, "states/1.pt: damaged, so the run cannot be extended")


def test_what_a_killed_run_wrote_after_its_checkpoint_is_cut_when_it_is_made_longer(
    tmp_path, monkeypatch
):
    out = tmp_path / "run"
    with interrupted_at_update(8, monkeypatch):
        assert run(words(out, steps=20, lr=0.1)) == 130
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "step": 10, "loss": 3.0}\n')
    assert extend(out, 30) == 0
    assert [line["step"] for line in events(out, "train")] == [1, 10, 20, 30]


@pytest.mark.parametrize("content", ['{"event": "bef', '{"event": "before"}\n{"ev\n'])
def test_metrics_that_are_damaged_are_named_and_may_be_put_back(content, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(words(out, steps=3)) == 0
    whole = (out / "metrics.jsonl").read_text()
    (out / "metrics.jsonl").write_text(content)
    fails(["--resume", out, "--steps", 6], capsys, f"{out / 'metrics.jsonl'}: ")
    (out / "metrics.jsonl").write_text(whole)
    assert extend(out, 6) == 0
    assert metrics(out)[-1]["steps"] == 6


@pytest.mark.parametrize(
    ("flags", "steps", "parts"),
    [
        ({}, 2, ["--steps is 2, and the run has done 3 steps", "more than 3"]),
        ({"method": "none"}, 9, ["this run trains nothing"]),
    ],
)
def test_what_cannot_be_extended_is_said_and_nothing_changes(flags, steps, parts, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(words(out, steps=3, **flags)) == 0
    before = contents(out)
    fails(["--resume", out, "--steps", steps], capsys, *parts)
    assert contents(out) == before


def test_a_run_of_an_earlier_version_has_no_state_to_extend(tmp_path, capsys):
    out = tmp_path / "run"
    assert run(words(out, steps=3)) == 0
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    checkpoint["group"] = {"parameters": checkpoint["group"]["parameters"]}
    torch.save(checkpoint, out / "checkpoint.pt")
    fails(["--resume", out, "--steps", 9], capsys, "no state to continue from", "--adapter")


def test_the_same_number_of_steps_is_a_finished_run(tmp_path, capsys):
    out = tmp_path / "run"
    assert run(words(out, steps=3)) == 0
    before = contents(out)
    assert extend(out, 3) == 0
    assert "is finished" in capsys.readouterr().out
    assert contents(out) == before


def test_a_run_of_epochs_can_be_extended_by_steps(tmp_path):
    out = tmp_path / "run"
    assert run(words(out, steps=None, epochs=1)) == 0
    assert metrics(out)[-1]["steps"] == 5
    assert extend(out, 7) == 0
    assert metrics(out)[-1]["steps"] == 7
    config = json.loads((out / "config.json").read_text())
    assert (config["steps"], config["epochs"]) == (7, None)
    assert running.last_vectors(out)


@pytest.mark.parametrize("damage", [{"cells": 3}, {"cells": [1]}, {"log": 3}, {"log": {}}])
def test_a_damaged_state_is_one_line(damage, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(words(out, steps=3)) == 0
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    checkpoint["group"] |= damage
    torch.save(checkpoint, out / "checkpoint.pt")
    before = contents(out)
    fails(["--resume", out, "--steps", 9], capsys, "" if "log" in damage else "damaged")
    assert contents(out) == before
