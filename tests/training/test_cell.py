"""A cell keeps its best parameters, counts its patience, and knows when it has failed."""

from pathlib import Path

import pytest
import torch
from running import events, last_vectors, metrics, model, run, task, train, words, write
from written_out import adapter, read, results_by_hand

import minia3
from minia3.inference.scoring import NotFiniteError
from minia3.training.cell import Cell
from minia3.training.checkpoint import copy_values
from minia3.training.grid import cell_name


def check_saved(out, vectors, folder):
    """Assert that the adapter of a run has these vectors, which are written to `folder`."""
    expected = minia3.load_model(model("t5"))
    with torch.no_grad():
        for name, table in minia3.vectors(expected).items():
            table.copy_(vectors[name])
    minia3.save_adapter(expected, folder / "adapter")
    found = adapter(out)
    for name, tensor in adapter(folder).items():
        assert torch.equal(found[name], tensor), name


def test_the_saved_vectors_are_the_best_on_the_held_out_rows(tmp_path, monkeypatch):
    accuracies = {2: 0.5, 4: 0.7, 6: 0.6, 8: 0.1}
    real = results_by_hand(monkeypatch, lambda group, cell: accuracies[group.log.step])
    assert run(words(tmp_path / "run", steps=8, eval_every=2, lr=0.1)) == 0
    monkeypatch.undo()
    adapter_folder = tmp_path / "run" / "adapter"
    swapped = write(tmp_path / "swapped", test=read(task() / "validation.jsonl"))
    again = words(tmp_path / "again", "--eval-only", task=swapped, adapter=adapter_folder)
    assert run(again) == 0
    step, _, best = real[1]
    final = metrics(tmp_path / "again")[-1]
    assert step == 4
    assert (final["accuracy"], final["auc"]) == (best["accuracy"], best["auc"])


@pytest.mark.parametrize(
    ("held_out", "patience", "n", "best"),
    [
        ([0.5, 0.6, 0.4, 0.3], 2, 4, 1),
        ([0.5, 0.5, 0.5, 0.9], 2, 3, 2),  # an equal one is not better, but the later is kept
        ([0.5, 0.6, 0.6, 0.7, 0.7, 0.2], 2, 6, 4),
        ([0.5, 0.4, 0.3, 0.2, 0.1], 0, 5, 0),
        ([0.1, 0.2, 0.3, 0.4, 0.5], 1, 5, 4),
    ],
)
def test_patience_counts_evaluations_without_a_better_one_and_the_best_vectors_are_saved(
    held_out, patience, n, best, tmp_path, monkeypatch
):
    seen = []

    def accuracy_of(group, cell):
        tables = minia3.vectors(group.model)
        seen.append({name: table.detach().clone() for name, table in tables.items()})
        return held_out[len(seen) - 1]

    results_by_hand(monkeypatch, accuracy_of)
    flags = {"eval_every": 1, "patience": patience, "steps": len(held_out), "lr": 0.1}
    assert run(words(tmp_path / "run", **flags)) == 0
    assert len(seen) == n
    assert metrics(tmp_path / "run")[-1]["steps"] == n
    check_saved(tmp_path / "run", seen[best], tmp_path / "expected")


def test_the_vectors_of_the_last_step_may_be_the_best(tmp_path, monkeypatch):
    """6 steps are no multiple of 4, and the last two of them have the lowest rates."""
    results_by_hand(monkeypatch, lambda group, cell: group.log.step / 100)
    out = tmp_path / "run"
    assert run(words(out, eval_every=4, lr=0.1)) == 0
    monkeypatch.undo()
    assert [line["step"] for line in events(out, "eval")] == [4, 6]
    assert run(words(tmp_path / "last", eval_every=6, lr=0.1)) == 0
    expected = adapter(tmp_path / "last")
    for name, tensor in adapter(out).items():
        assert torch.equal(tensor, expected[name])


def test_a_run_that_diverges_saves_the_last_finite_vectors(tmp_path, monkeypatch, capsys):
    """The rate of step 1 is 0, step 2 makes the vectors large, and step 3 makes them overflow."""
    accuracies = {1: 0.4, 2: 0.5, 3: 0.5}
    seen = {}

    def accuracy_of(group, cell):
        seen[group.log.step] = copy_values(minia3.vectors(group.model))
        return accuracies[group.log.step]

    results_by_hand(monkeypatch, accuracy_of)
    out = tmp_path / "run"
    flags = {"lr": 1e25, "warmup_ratio": 0.5, "eval_every": 1, "patience": 1, "dropout": 0}
    assert run(words(out, **flags)) == 0
    assert [line["step"] for line in events(out, "eval")] == [1, 2, 3]
    assert all((table == 1).all() for table in seen[1].values())
    assert max(table.abs().max() for table in seen[2].values()) > 1e20
    assert seen.keys() == {1, 2}  # the scores of step 3 are not finite, so it has no accuracy
    assert "step      3  the scores are not finite, held out\n" in capsys.readouterr().out
    check_saved(out, seen[2], tmp_path / "expected")
    *_, final = metrics(out)
    assert "the parameters are not finite after the last step" in " ".join(final["warnings"])


def test_an_evaluation_whose_scores_are_not_finite_chooses_no_vectors(tmp_path, monkeypatch):
    """Its accuracy is 0, and so may be that of the vectors that are the best so far."""
    best = {}

    def accuracy_of(group, cell):
        if group.log.step > 2:
            raise NotFiniteError("row 0", 0)
        for name, table in minia3.vectors(group.model).items():
            best[name] = table.detach().clone()
        return 0.0

    results_by_hand(monkeypatch, accuracy_of)
    out = tmp_path / "run"
    assert run(words(out, eval_every=2, steps=4, lr=0.1)) == 0
    assert [line["accuracy"] for line in events(out, "eval")] == [0.0, 0.0]
    for name, table in last_vectors(out).items():
        assert torch.equal(table, best[name])


# Without a model


class CellByHand(Cell):
    """A cell with one parameter, and no model."""

    def __init__(self, value=0.0, **flags):
        super().__init__(train.Config(**flags), minia3.load_task(task()))
        self.parameters = {"l": torch.nn.Parameter(torch.tensor([[value]]))}


def test_the_best_parameters_have_the_best_mean_over_the_members():
    cell = CellByHand(eval_every=1)
    for value, accuracies in enumerate([(0.5, 0.5), (0.2, 0.9), (0.9, 0.1), (1.0, 0.0)]):
        cell.parameters["l"].data.fill_(value)
        cell.keep_if_best([{"accuracy": accuracy} for accuracy in accuracies])
    cell.take_best()
    assert cell.parameters["l"].item() == 1
    assert cell.progress.n_misses == 2


def test_parameters_that_are_not_finite_are_never_the_best():
    cell = CellByHand(1.0, eval_every=1)
    cell.keep_if_best([{"accuracy": 0.4}])
    cell.parameters["l"].data.fill_(float("nan"))
    cell.keep_if_best([{"accuracy": 0.9}])
    cell.take_best()
    assert cell.parameters["l"].item() == 1
    assert cell.progress.failure is None


def test_the_best_and_the_last_parameters_are_kept_only_once():
    cell = CellByHand(1.0, eval_every=1)
    cell.keep_if_best([{"accuracy": 0.4}])
    cell.parameters["l"].data.fill_(2)
    cell.take_best()
    assert (cell.parameters["l"].item(), cell.progress.best_parameters) == (1, {})
    assert cell.progress.last_parameters["l"].item() == 2
    # A longer run has other last ones in the end, so taking these twice would undo its steps.
    cell.take_last()
    assert (cell.parameters["l"].item(), cell.progress.last_parameters) == (2, {})
    assert cell.progress.best_parameters["l"].item() == 1


def test_a_cell_that_has_diverged_keeps_no_last_parameters():
    cell = CellByHand(1.0, eval_every=1)
    cell.keep_if_best([{"accuracy": 0.4}])
    cell.parameters["l"].data.fill_(float("nan"))
    cell.fail("the loss is NaN")
    cell.take_best()
    assert (cell.parameters["l"].item(), cell.progress.last_parameters) == (1, {})
    assert cell.progress.divergence.startswith("the loss is NaN, so the best parameters")


def test_a_cell_that_ends_with_parameters_that_are_not_finite_says_so_of_its_best_ones():
    """The loss of the last step was computed before its update."""
    cell = CellByHand(1.0, eval_every=1)
    cell.keep_if_best([{"accuracy": 0.4}])
    cell.parameters["l"].data.fill_(float("nan"))
    cell.take_best()
    assert (cell.parameters["l"].item(), cell.progress.last_parameters) == (1, {})
    assert cell.progress.failure is None
    expected = "the parameters are not finite after the last step, so the best parameters from"
    assert cell.progress.divergence.startswith(expected)


def test_an_evaluation_without_results_is_a_miss():
    cell = CellByHand(1.0, eval_every=1, patience=2)
    cell.keep_if_best(None)
    assert cell.is_active
    cell.keep_if_best(None)
    assert not cell.is_active


def test_a_cell_that_ends_with_parameters_that_are_not_finite_has_failed():
    cell = CellByHand(float("inf"))
    cell.take_best()
    assert cell.progress.failure.startswith("the parameters are not finite after the last step: ")
    assert not cell.is_active


def test_a_state_is_loaded_as_it_was_saved():
    cell = CellByHand(3.0, eval_every=1, patience=2)
    for accuracy in (0.5, 0.4):
        cell.keep_if_best([{"accuracy": accuracy}])
    other = CellByHand(0.0, eval_every=1, patience=2)
    other.load_state_dict(cell.state_dict())
    assert other.progress == cell.progress
    other.keep_if_best([{"accuracy": 0.3}])
    assert not other.is_active
    assert cell.is_active


def test_a_slash_in_the_name_of_a_task_is_a_dash_in_the_folder(tmp_path):
    data = minia3.load_task(task())._replace(name="raft/x")
    config = train.Config(seed=3)
    axes = ["task", "seed"]
    cell = Cell(config, data, cell_name(config, data, axes), axes)
    assert (cell.name, cell.folder) == ("raft/x-s3", Path("adapters", "raft-x-s3"))
