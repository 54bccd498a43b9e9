"""A grid: adapters that train together equal adapters that train apart."""

import functools
import gc
import json
import math
import random
import re
import shutil
import signal
import weakref
from pathlib import Path

import numpy as np
import pytest
import running
import torch
from running import (
    at_line,
    contents,
    events,
    fails,
    kill_self,
    last_vectors,
    metrics,
    model,
    outcome,
    resume,
    rows,
    run,
    words,
    write,
)
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from written_out import results_by_hand

import minia3
from minia3.checkpoints.load import load_model
from minia3.cli.table import table_rows
from minia3.tasks.examples import Example
from minia3.tasks.splits import load_task
from minia3.training.batch import MixedBatch
from minia3.training.checkpoint import copy_values
from minia3.training.drawing import draw_batches
from minia3.training.group import Group
from minia3.training.optimizer import Adafactor
from tests.benchmarks.adapters import step_of_adapters
from tests.benchmarks.launches import count

EXACT = {"dtype": "float64", "dropout": 0}


GRID = {
    "seed": "0,3",
    "lr": "0.05,0.01",
    "eval_every": 3,
    "patience": 2,
    "steps": 12,
    "clip": 0.5,
    "warmup_ratio": 0.2,
}


@functools.cache
def two_tasks():
    """Return two folders of rows with other choices and lengths: each mixed batch is padded."""
    made = {"one": rows(42, (2,), seed=1), "two": rows(42, (2, 3, 1), seed=2)}
    folders = []
    for name, task_rows in made.items():
        splits = {"train": task_rows[:20], "validation": task_rows[20:30], "test": task_rows[30:]}
        folders.append(write(Path(running.home().name, name), **splits))
    return folders


def both_tasks():
    return ",".join(map(str, two_tasks()))


def together(out, **flags):
    """Run a grid, and return what became of each of its cells: see `read_cell`."""
    assert run(words(out, **{"task": both_tasks(), **flags})) == 0
    names = [line["adapter"] for line in events(out, "final")]
    assert len(set(names)) == len(names)
    return {name: read_cell(out, name, row) for row, name in enumerate(names)}


def apart(out, task, **flags):
    """Run a single cell, and return what became of it."""
    assert run(words(out, task=task, **flags)) == 0
    return read_cell(out, None, 0)


def read_cell(out, name, row):
    """Return the vectors as they were trained and as they were saved, and the cell's results."""
    lines = [line for line in metrics(out) if line.get("adapter", name) == name]
    evals = []
    for line in lines:
        if line["event"] == "eval":
            evals.append((line["step"], line["accuracy"], line["auc"]))
    folder = out / "adapters" / name if name else out / "adapter"
    return {
        "vectors": {key: table[row] for key, table in last_vectors(out).items()},
        "saved": load_file(folder / "adapter_model.safetensors"),
        "final": lines[-1],
        "evals": evals,
    }


# With larger rates, the attention of the random T5 becomes so sure of itself that a gradient is
# nothing but rounding, which Adafactor turns into full steps.
RATES = {"t5": ("0.05", "0.01"), "llama": ("0.3", "0.02")}


def cells(rates):
    """Return the name of each cell of the grid: the flags that are its own."""
    found = {}
    for task in two_tasks():
        for seed in (0, 3):
            for lr in rates:
                found[f"{task.name}-s{seed}-lr{lr}"] = {"task": task, "seed": seed, "lr": lr}
    return found


# Rows of cells that also train alone: two cells that differ in all flags. Each case has another
# pair, so together the cases have all cells.
PAIRS = {("t5", 0): (0, 7), ("t5", 1): (1, 6), ("llama", 0): (2, 5), ("llama", 1): (3, 4)}
PAIRS |= {"lora": (3, 4), "full": (2, 5)}


def pair_of_cells(rates, case):
    """Return two of the cells: those of PAIRS[case]."""
    pairs = list(cells(rates).items())
    return dict(pairs[row] for row in PAIRS[case])


RESULTS = ("accuracy_before", "auc_before", "accuracy", "auc", "steps", "trainable", "total")
RESULTS += ("rows", "task", "metric")


def accuracy_by_hand(group, cell):
    """Cells of the larger rate never improve on the first evaluation, and run out of patience."""
    return 0.5 if cell.config.lr >= 0.05 else group.log.step / 100


OPTIMIZERS = [{}, {"optimizer": "adamw", "weight_decay": 0.1, "micro_batch_size": 7}]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", range(len(OPTIMIZERS)))
@pytest.mark.parametrize("name", ["t5", "llama"])
def test_adapters_that_train_together_equal_adapters_that_train_apart(
    name, recipe, tmp_path, monkeypatch
):
    real_results = results_by_hand(monkeypatch, accuracy_by_hand)
    flags = {"model": model(name), **GRID, **EXACT, **OPTIMIZERS[recipe]}
    rates = RATES[name]
    found = together(tmp_path / "grid", **{**flags, "lr": ",".join(rates)})
    real_results_of_grid = list(real_results)
    assert found.keys() == cells(rates).keys()
    steps = set()
    trained_alone = pair_of_cells(rates, (name, recipe))
    for i, (name, flags_of_cell) in enumerate(trained_alone.items()):
        real_results.clear()
        alone = apart(tmp_path / str(i), **{**flags, **flags_of_cell})
        of_cell = [(step, result) for step, cell, result in real_results_of_grid if cell == name]
        assert of_cell == [(step, result) for step, _, result in real_results]
        steps.add(alone["final"]["steps"])
        assert found[name]["evals"] == alone["evals"] != []
        for key in RESULTS:
            assert found[name]["final"][key] == alone["final"][key], (name, key)
        for key, l_D in alone["vectors"].items():
            assert_close(found[name]["vectors"][key], l_D, rtol=1e-9, atol=1e-9)
        for key, x in alone["saved"].items():
            assert_close(found[name]["saved"][key], x, rtol=1e-6, atol=1e-6)
        assert max((x - 1).abs().max() for x in alone["vectors"].values()) > 0.01
    assert steps == {9, 12}  # some stop early


def test_a_grid_in_several_passes_is_the_grid_in_one(tmp_path, monkeypatch):
    flags = {"model": model("t5"), **GRID, **EXACT, "lr": ",".join(RATES["t5"]), "steps": 3}
    flags |= {"seed": 0, "eval_every": None, "patience": None}
    whole = together(tmp_path / "whole", **flags)
    passes = []
    original = MixedBatch.split

    def spy(batch, size):
        passes.append(math.ceil(len(batch.pairs) / size))
        return original(batch, size)

    monkeypatch.setattr(MixedBatch, "split", spy)
    monkeypatch.setattr("minia3.training.batch.LARGE_BLOCK", 1)
    found = together(tmp_path / "parts", **flags)
    assert min(passes) > 1
    for name, cell in whole.items():
        for key, l_D in cell["vectors"].items():
            assert_close(found[name]["vectors"][key], l_D, rtol=1e-9, atol=1e-9)


def test_each_adapters_gradient_is_clipped_by_its_own_norm(tmp_path, monkeypatch):
    norms = []
    original = Adafactor.clip

    def norms_of_rows(tables):
        return torch.cat([table.grad for table in tables], dim=1).norm(dim=1)

    def spy(optimizer, most):
        before_A = norms_of_rows(optimizer.tables)
        original(optimizer, most)
        after_A = norms_of_rows(optimizer.tables)
        assert_close(after_A, before_A.clamp(max=most), rtol=1e-4, atol=0)
        norms.extend(before_A.tolist())

    monkeypatch.setattr(Adafactor, "clip", spy)
    together(tmp_path / "grid", **{**GRID, "steps": 2, "clip": 2, "eval_every": 2})
    assert len(norms) == 16  # one for each adapter and step
    assert min(norms) < 2 < max(norms)


@pytest.mark.slow
def test_seeds_of_the_embedded_model_train_together_as_they_do_apart(tmp_path):
    # In float32, Adafactor would enlarge what rounding leaves of small gradients.
    real_rows = load_task("same-colour")
    # 64 test rows, because evaluation would take longer than training.
    splits = {"train": real_rows.train, "validation": real_rows.validation}
    task = write(tmp_path / "same-colour", **splits, test=real_rows.test[:64])
    flags = {"model": "tiny-t5", "task": task, "shots": 64, "batch_size": 8, **EXACT}
    flags |= {"steps": 10, "lr": 0.02}
    assert run(words(tmp_path / "grid", seed="0,1", **flags)) == 0
    for seed in range(2):
        assert run(words(tmp_path / str(seed), seed=seed, **flags)) == 0
        alone = load_file(tmp_path / str(seed) / "adapter" / "adapter_model.safetensors")
        found = load_file(tmp_path / "grid" / "adapters" / f"s{seed}" / "adapter_model.safetensors")
        assert max((found[name] - x).abs().max() for name, x in alone.items()) < 1e-6
        assert max((x - 1).abs().max() for x in alone.values()) > 0.01


def test_each_seed_draws_its_own_shots_and_rows(tmp_path):
    found = together(tmp_path / "grid", task=two_tasks()[0], seed="0,1", shots=6, steps=5, **EXACT)
    for seed in (0, 1):
        alone = apart(tmp_path / str(seed), two_tasks()[0], seed=seed, shots=6, steps=5, **EXACT)
        for key, l_D in alone["vectors"].items():
            assert_close(found[f"s{seed}"]["vectors"][key], l_D, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_a_step_launches_as_many_operators_for_two_adapters_as_for_25(name):
    """With the same examples for each, because padding would take operators of its own."""
    counts = []
    for n_adapters in (2, 5, 25):
        ours = load_model(model(name), n_adapters=n_adapters)
        minia3.freeze(ours)
        examples = [Example([3, 4, 5], [[6, 1], [7, 1]], label=1)] * (2 * n_adapters)
        step = step_of_adapters(ours, examples, n_adapters)
        step()  # after the first step, the optimizer has its moments
        counts.append(count(step).total())
    assert len(set(counts)) == 1, counts


# Stopped and resumed


STOPPED = {**GRID, "dropout": 0.1, "save_every": 4, "optimizer": "adamw"}


def files_and_lines(folder):
    """Return what two equal runs share: all files of the adapters, cards too, and the metrics."""
    files = {}
    for path in folder.rglob("adapters/*/*"):
        files[path.relative_to(folder)] = path.read_bytes()
    return files, outcome(folder)[1]


@functools.cache
def uninterrupted():
    folder = Path(running.home().name, "uninterrupted grid")
    with at_line(0, None) as ran:
        assert run(words(folder, task=both_tasks(), **STOPPED)) == 0
    return files_and_lines(folder), len(ran)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_grid_that_is_stopped_anywhere_continues_bit_for_bit(seed, tmp_path, monkeypatch):
    results_by_hand(monkeypatch, accuracy_by_hand)
    expected, n = uninterrupted()
    assert len(expected[0]) == 8 * 4
    n_steps = {line["steps"] for line in expected[1] if line["event"] == "final"}
    assert len(n_steps) > 1  # some cells stop before others
    out = tmp_path / "run"
    with at_line(
        int(n * (seed + random.Random(seed).random()) / 3),
        functools.partial(kill_self, signal.SIGINT),
    ):
        assert run(words(out, task=both_tasks(), **STOPPED)) == 130
    assert resume(out) == 0
    assert files_and_lines(out) == expected
    assert resume(out) == 0  # it is finished


@pytest.mark.slow
def test_a_resumed_run_does_not_read_the_adapter_that_it_started_from_again(tmp_path):
    assert run(words(tmp_path / "start", lr=0.3)) == 0
    folders = []
    for name in ("whole", "stopped"):
        shutil.copytree(tmp_path / "start" / "adapter", tmp_path / name / "from")
        folders.append(tmp_path / name / "run")
    flags = {"sites": "v", "save_every": 4}
    assert run(words(folders[0], adapter=tmp_path / "whole" / "from", **flags)) == 0
    with at_line(0, None) as ran:
        assert run(words(tmp_path / "measure", adapter=tmp_path / "whole" / "from", **flags)) == 0
    start = tmp_path / "stopped" / "from"
    with at_line(len(ran) * 2 // 3, functools.partial(kill_self, signal.SIGINT)):
        assert run(words(folders[1], adapter=start, **flags)) == 130
    file = start / "adapter_model.safetensors"
    save_file({name: 2 * x for name, x in load_file(file).items()}, file)
    assert resume(folders[1]) == 0
    whole, stopped = (load_file(f / "adapter" / "adapter_model.safetensors") for f in folders)
    assert all(torch.equal(whole[name], x) for name, x in stopped.items())


# Names


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ({"seed": "0,7"}, ["s0", "s7"]),
        ({"lr": "1e-3,0.01,2e-5"}, ["lr0.001", "lr0.01", "lr2e-05"]),
        ({"seed": "2,1", "lr": "1,2"}, ["s2-lr1.0", "s2-lr2.0", "s1-lr1.0", "s1-lr2.0"]),
    ],
)
def test_an_adapter_is_named_after_the_flags_that_vary(flags, names, tmp_path):
    out = tmp_path / "run"
    assert run(words(out, steps=1, **flags)) == 0
    finals = [line for line in metrics(out) if line["event"] == "final"]
    assert [line["adapter"] for line in finals] == names
    assert sorted(p.name for p in (out / "adapters").iterdir()) == sorted(names)
    assert not (out / "adapter").exists()
    for line in finals:
        parts = {part.lstrip("slr"): part for part in line["adapter"].split("-lr")}
        assert str(line["seed"]) in parts or "seed" not in flags
        assert line["task"] == running.task().name
    train_lines = [line for line in metrics(out) if line["event"] == "train"]
    assert all([*line["losses"]] == names for line in train_lines)
    assert train_lines[0]["loss"] == pytest.approx(
        sum(train_lines[0]["losses"].values()) / len(names)
    )


def test_a_single_cell_is_an_ordinary_run(tmp_path):
    assert run(words(tmp_path / "run", steps=1)) == 0
    assert (tmp_path / "run" / "adapter").is_dir()
    assert not any({"adapter", "losses"} & line.keys() for line in metrics(tmp_path / "run"))


def test_a_run_of_a_single_cell_and_task_names_neither(tmp_path, capsys):
    """Not on the console, and not in the names of the data files."""
    out = tmp_path / "run"
    assert run(words(out, steps=1)) == 0
    lines = capsys.readouterr().out.splitlines()
    results = [line for line in lines if line.startswith(("before", "after"))]
    assert [line.split()[1] for line in results] == ["accuracy", "accuracy"]
    data = json.loads((out / "config.json").read_text())["data"]
    assert data.keys() == {"train.jsonl", "validation.jsonl", "test.jsonl"}


def test_a_path_with_a_comma_is_a_single_task(tmp_path):
    folder = write(tmp_path / "a,b", train=rows(4), test=rows(4, seed=1))
    assert run(words(tmp_path / "run", task=folder, steps=1)) == 0
    assert metrics(tmp_path / "run")[-1]["task"] == "a,b"


def test_two_adapters_of_the_same_name_are_refused(tmp_path, capsys):
    fails(
        words(tmp_path / "run", seed="1,1"),
        capsys,
        "a different name for each adapter",
        "'s1', 's1'",
    )
    assert not (tmp_path / "run").exists()


def test_files_of_the_same_name_are_to_be_renamed(tmp_path, capsys):
    for folder in ("a", "b"):
        write(tmp_path / folder / "same", train=rows(4), test=rows(4, seed=1))
    two = f"{tmp_path / 'a' / 'same'},{tmp_path / 'b' / 'same'}"
    advice = "rename a file if two tasks have one name"
    fails(words(tmp_path / "run", task=two), capsys, "found ['same', 'same']", advice)


@pytest.mark.parametrize("names", ["raft/a,raft-a", "Moods,moods"])
def test_two_adapters_whose_names_are_one_folder_are_refused(names, tmp_path, capsys, monkeypatch):
    data = load_task(running.task())

    def load_under_name(name, *args, **flags):
        return data._replace(name=name)

    monkeypatch.setattr("minia3.training.grid.check_names", lambda names: None)
    monkeypatch.setattr("minia3.training.grid.load_task", load_under_name)
    message = f"a different name for each adapter, found {names.split(',')}"
    fails(words(tmp_path / "run", task=names), capsys, message, "as folders")
    assert not (tmp_path / "run").exists()


def test_a_card_has_the_command_that_trains_its_adapter_alone(tmp_path):
    assert run(words(tmp_path / "run", seed="0,4", steps=1, lr=0.1)) == 0
    card = (tmp_path / "run" / "adapters" / "s4" / "README.md").read_text()
    assert "--seed 4 " in card
    assert "0,4" not in card


def test_all_adapters_start_from_the_given_adapter(tmp_path):
    assert run(words(tmp_path / "one", lr=0.3)) == 0
    start = {
        "adapter": tmp_path / "one" / "adapter",
        "steps": 1,
        "warmup_ratio": 0.6,
    }  # a first step changes nothing
    assert run(words(tmp_path / "on", seed="0,1", **start)) == 0
    expected = load_file(tmp_path / "one" / "adapter" / "adapter_model.safetensors")
    for name in ("s0", "s1"):
        found = load_file(tmp_path / "on" / "adapters" / name / "adapter_model.safetensors")
        assert all(torch.equal(found[key], x) for key, x in expected.items())


def test_the_report_of_a_grid_has_a_line_for_each_adapter(tmp_path, capsys):
    assert run(words(tmp_path / "run", seed="0,11", steps=2)) == 0
    title, *table = capsys.readouterr().out.split("\n\n")[-1].splitlines()
    assert title == "2 results"
    for name, line in zip(("s0", "s11"), table, strict=False):
        final = next(
            x for x in metrics(tmp_path / "run") if x["event"] == "final" and x["adapter"] == name
        )
        figures = f"{final['accuracy_before']:.1%} before, {final['accuracy']:.1%} after"
        commonest = f"(commonest label: {final['commonest']:.1%})"
        assert line == f"  {name:<12}accuracy {figures} {commonest}, 2 steps"
    assert next(line for line in table if line.startswith("  trained ")).endswith("%) each")


# Cells that fail

UPDATE = Group.update


def update_to_nan(group, rates, n_steps=4):
    """Take a step; one step of one cell ends in NaN. (A huge lr may or may not.)"""
    UPDATE(group, rates)
    for cell in rates:
        if cell.config.lr == 0.3 and cell.progress.n_steps == n_steps:
            for l_D in cell.parameters.values():
                l_D.fill_(float("nan"))


def test_an_adapter_whose_loss_is_nan_ends_and_does_not_change_the_others(
    tmp_path, capsys, monkeypatch
):
    out = tmp_path / "run"
    flags = {**EXACT, "warmup_ratio": 0, "steps": 12}
    with monkeypatch.context() as patch:
        patch.setattr(Group, "update", update_to_nan)
        assert run(words(out, lr="0.2,0.3", **flags)) == 1
    shown, last_line = capsys.readouterr()
    assert last_line == (
        f"train.py: 1 of 2 adapters failed, as {out / 'metrics.jsonl'} says: lr0.3; the others "
        "have their results: lr0.2\n"
    )
    assert re.search(r"\nfailed   lr0\.3: the loss of step 5 is nan: try a lower --lr", shown)
    *_, failed = (line for line in metrics(out) if line["event"] != "final")
    assert (failed["event"], failed["adapter"]) == ("failed", "lr0.3")
    assert failed["steps" if "steps" in failed else "step"] < 12
    assert f"failed   {failed['reason']}\n" in shown
    assert [p.name for p in (out / "adapters").iterdir()] == ["lr0.2"]
    assert [line["adapter"] for line in metrics(out) if line["event"] == "final"] == ["lr0.2"]
    assert running.resume(out) == 0, "nothing is left to do"
    shown, last_line = capsys.readouterr()
    assert shown.startswith(f"{out} is finished: the final lines ")
    assert f"(an adapter that failed has none: {failed['reason']})" in shown
    assert last_line == ""
    alone = apart(tmp_path / "alone", running.task(), lr=0.2, **flags)
    for key, l_D in last_vectors(out).items():
        assert_close(l_D[0], alone["vectors"][key], rtol=1e-9, atol=1e-9)
    assert all(
        np.isfinite(line["loss"])
        for line in metrics(out)
        if line["event"] == "train" and line["step"] > 10
    )


def test_an_adapter_that_diverges_as_it_runs_out_of_patience_ends_as_it_does_alone(
    tmp_path, monkeypatch
):
    """Its loss is NaN in step 5, it has no patience left after step 6, and step 10 has a line."""
    results_by_hand(monkeypatch, lambda group, cell: group.log.step / 100)
    monkeypatch.setattr(Group, "update", update_to_nan)
    flags = {**EXACT, "warmup_ratio": 0, "steps": 12, "eval_every": 3, "patience": 1}
    found = together(tmp_path / "grid", task=running.task(), lr="0.2,0.3", **flags)
    alone = apart(tmp_path / "alone", running.task(), lr=0.3, **flags)
    assert alone["final"]["steps"] == found["lr0.3"]["final"]["steps"] == 6
    assert found["lr0.3"]["evals"] == alone["evals"]
    for key, x in alone["saved"].items():
        assert_close(found["lr0.3"]["saved"][key], x, rtol=1e-6, atol=1e-6)
    assert found["lr0.2"]["final"]["steps"] == 12
    assert all(np.isfinite(line["loss"]) for line in events(tmp_path / "grid", "train"))


def test_an_adapter_whose_loss_becomes_nan_has_its_best_vectors(tmp_path, capsys, monkeypatch):
    """Step 14 is the first with a loss of NaN, which step 20 reads, before it would evaluate."""
    best = {}

    def accuracy_of(group, cell):
        if cell.config.lr == 0.3:
            best[group.log.step] = copy_values(cell.parameters)
        return 0.5

    results_by_hand(monkeypatch, accuracy_of)
    monkeypatch.setattr(Group, "update", functools.partialmethod(update_to_nan, n_steps=13))
    flags = {**EXACT, "warmup_ratio": 0, "steps": 40, "eval_every": 10}
    alone = apart(tmp_path / "alone", running.task(), lr=0.3, **flags)
    assert list(best) == [10]
    for key, l_D in best[10].items():
        assert torch.equal(alone["vectors"][key], l_D[0])
        assert l_D.isfinite().all()
    kept = (
        "the loss of step 14 is nan, so the best parameters from before are kept: try a lower --lr "
        "or --dtype float32"
    )
    assert (alone["final"]["best_step"], alone["final"]["steps"]) == (10, 20)
    assert kept in alone["final"]["warnings"]
    shown = capsys.readouterr().out
    assert f"\nended    {kept}\n" in shown
    assert re.search(rf"\n  warning +{kept}\n", shown)

    before = contents(tmp_path / "alone")
    longer = ["--resume", tmp_path / "alone", "--steps", 50]
    fails(longer, capsys, "nothing is left to train: begin a new run with a lower --lr")
    assert contents(tmp_path / "alone") == before

    # Without an evaluation before, it has failed, and training longer does not change that.
    never = flags | {"eval_every": 0}
    assert run(words(tmp_path / "failed", task=running.task(), lr=0.3, **never)) == 1
    before = contents(tmp_path / "failed")
    longer = ["--resume", tmp_path / "failed", "--steps", 50]
    capsys.readouterr()
    fails(longer, capsys, "nothing is left to train: begin a new run with a lower --lr")
    assert contents(tmp_path / "failed") == before

    found = together(tmp_path / "grid", task=running.task(), lr="0.2,0.3", **flags)
    assert found["lr0.3"]["final"]["warnings"].count(kept) == 1
    assert kept not in found["lr0.2"]["final"]["warnings"]
    assert [found[name]["final"]["steps"] for name in found] == [40, 20]
    for key, x in alone["saved"].items():
        assert_close(found["lr0.3"]["saved"][key], x, rtol=1e-6, atol=1e-6)
    assert all(np.isfinite(line["loss"]) for line in events(tmp_path / "grid", "train"))

    assert run(["--resume", tmp_path / "grid", "--steps", 45]) == 0
    other, diverged = events(tmp_path / "grid", "final")
    assert (other["steps"], other["extended_from"]) == (45, [40])
    assert (diverged["steps"], diverged["extended_from"]) == (20, [40])


def test_vectors_that_are_not_finite_are_never_saved(tmp_path, capsys):
    flags = {"warmup_ratio": 0, "eval_every": 3, "patience": 1, "dropout": 0}
    fails(words(tmp_path / "one", lr="1e25", **flags), capsys, "try a lower --lr", code=1)
    assert not (tmp_path / "one" / "adapter").exists()
    assert run(words(tmp_path / "two", lr="1e-12,1e25", **flags)) == 1
    assert "1 result; failed adapters: 1" in capsys.readouterr().out
    events = {
        line["adapter"]: line["event"] for line in metrics(tmp_path / "two") if "adapter" in line
    }
    assert events == {"lr1e-12": "final", "lr1e+25": "failed"}
    (_, row), note = table_rows([tmp_path / "two"])  # the first row is the commonest label's
    assert row.n_runs == 1
    assert note.startswith("1 left out")
    assert "lr1e+25" in note


def test_failed_adapters_of_a_finished_run_are_named_and_so_are_their_tasks(tmp_path, capsys):
    out = tmp_path / "run"
    names = running.mixed_tasks()
    flags = {"task": names, "lr": "0.01,1e30", "warmup_ratio": 0, "steps": 12}
    assert run(words(out, **flags)) == 1
    failed = running.events(out, "failed")
    assert [line["task"] for line in failed] == ["small", "large"]
    capsys.readouterr()
    assert running.resume(out) == 0
    reasons = "; ".join(line["reason"] for line in failed)
    assert f"(2 adapters that failed have none: {reasons})" in capsys.readouterr().out
    (out / "metrics.jsonl").unlink()  # checkpoint.pt has the last of the reasons, too
    assert running.resume(out) == 0
    assert "(an adapter that failed has none: " in capsys.readouterr().out


def test_a_cell_that_fails_alone_leaves_the_cells_after_it_to_train(tmp_path, capsys):
    assert (
        run(words(tmp_path / "run", method="full", lr="1e30,0.01", warmup_ratio=0, steps=12)) == 1
    )
    assert "1 result; failed adapters: 1" in capsys.readouterr().out
    events = {
        line["adapter"]: line["event"] for line in metrics(tmp_path / "run") if "adapter" in line
    }
    assert events == {"lr1e+30": "failed", "lr0.01": "final"}
    fails(
        words(tmp_path / "none", method="full", lr="1e30,1e29", warmup_ratio=0),
        capsys,
        "the loss of step",
        code=1,
    )


def test_a_run_whose_adapters_all_fail_fails(tmp_path, capsys):
    fails(
        words(tmp_path / "run", lr="1e29,1e30", warmup_ratio=0),
        capsys,
        "the loss of step",
        "--lr",
        code=1,
    )


# Methods that change the model: one cell after the other


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_methods_that_change_the_model_train_cell_by_cell_as_in_separate_runs(
    method, tmp_path, capsys
):
    flags = {"method": method, "steps": 4, "dropout": 0.1}
    kind = {"lora": "adapter", "full": "model"}[method]
    assert (
        run(words(tmp_path / "grid", task=both_tasks(), seed="0,3", lr="0.02,0.001", **flags)) == 0
    )
    assert "8 results" in capsys.readouterr().out
    finals = {
        line["adapter"]: line for line in metrics(tmp_path / "grid") if line["event"] == "final"
    }
    assert metrics(tmp_path / "grid")[-1] in finals.values()
    assert len({(line["task"], line["accuracy_before"]) for line in finals.values()}) == 2
    for i, (name, flags_of_cell) in enumerate(pair_of_cells(("0.02", "0.001"), method).items()):
        assert run(words(tmp_path / str(i), **flags, **flags_of_cell)) == 0
        (path,) = (tmp_path / str(i) / kind).glob("*.safetensors")
        assert path.read_bytes() == (tmp_path / "grid" / "adapters" / name / path.name).read_bytes()
        alone = metrics(tmp_path / str(i))
        shared = metrics(tmp_path / "grid")
        for key in RESULTS:
            assert alone[-1][key] == finals[name][key]
        losses = [line["losses"][name] for line in shared if name in line.get("losses", {})]
        assert losses == [line["loss"] for line in alone if line["event"] == "train"]
    found, _ = table_rows([tmp_path / "grid"])
    (row,) = [row for row in found if row.method == f"{method}, lr 0.02"]
    assert row.n_runs == 4


def test_a_grid_of_lora_can_be_evaluated_without_a_folder(tmp_path, monkeypatch, capsys):
    assert run(words(tmp_path / "one", method="lora", steps=6)) == 0
    monkeypatch.chdir(tmp_path)
    flags = {"method": "lora", "adapter": tmp_path / "one" / "adapter", "task": both_tasks()}
    capsys.readouterr()
    assert run(words(None, "--eval-only", **flags)) == 0
    assert "2 results" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_the_examples_of_a_cell_are_kept_only_while_it_trains(tmp_path, monkeypatch):
    """A grid of LoRAs kept those of all cells from the start, and they could fill the memory."""
    cells = []
    with_batches = []

    def draw(cell, *arguments):
        if cell not in cells:
            cells.append(cell)
        return draw_batches(cell, *arguments)

    def train(*arguments):
        with_batches.append([len(cell.batches) > 0 for cell in cells])
        return train_as_usual(*arguments)

    train_as_usual = running.train.train
    monkeypatch.setattr("minia3.training.group.draw_batches", draw)
    monkeypatch.setattr(running.train, "train", train)
    assert run(words(tmp_path / "run", method="lora", seed="0,1", steps=2)) == 0
    assert with_batches[0] == [True, False]
    assert len(with_batches) == 2


@pytest.mark.parametrize("switches", [(), ("--recompute",)])
def test_nothing_of_a_cell_is_in_memory_when_the_next_model_is_loaded(
    switches, tmp_path, monkeypatch
):
    remains = []

    def load_one_model(*args, **options):
        assert not any(reference() is not None for reference in remains)
        loaded = load_model(*args, **options)
        remains.append(weakref.ref(loaded))
        remains.extend(weakref.ref(parameter) for parameter in loaded.parameters())
        return loaded

    monkeypatch.setattr("minia3.training.group.load_model", load_one_model)
    gc.disable()  # nothing waits until Python happens to collect garbage
    try:
        out = tmp_path / "run"
        assert run(words(out, *switches, method="full", seed="0,1,2", steps=2)) == 0
    finally:
        gc.enable()
    assert sum(reference() is None for reference in remains) == len(remains)
    assert len(remains) > 3
