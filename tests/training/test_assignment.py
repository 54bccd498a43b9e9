"""What a run does with the rows and prompts of a task: nothing is chosen by what is reported."""

import json

import numpy as np
import pytest
from running import events, fails, metrics, model, outcome, rows, run, task, train, words, write
from written_out import (
    read,
    relabeled,
    rte_flags,
)

import minia3
from minia3.checkpoints.known_models import KNOWN_MODELS
from minia3.tasks.task import Task
from minia3.tasks.task_file import write_task_file
from minia3.training.assignment import assign_rows, is_without_results


def test_nothing_is_chosen_on_the_rows_that_are_reported(tmp_path, monkeypatch):
    splits = {split: read(task() / f"{split}.jsonl") for split in ("train", "validation", "test")}
    labels = {row["input"]: row["label"] for row in splits["validation"] + splits["test"]}
    n_right = {2: 7, 4: 9, 6: 4}  # step -> how many held-out rows a model "answers"

    def evaluate_by_hand(self, cell, assignment, rows, shots=()):
        """Answer the first rows with their label in the original task, and the others wrongly."""
        answered = n_right.get(self.log.step, 8)
        hits = 0
        for i, row in enumerate(rows):
            original = labels[row["input"]]
            answer = original if i < answered else 1 - original
            hits += answer == row["label"]
        return {"accuracy": hits / len(rows), "auc": None, "n": len(rows), "n_cut": 0}

    monkeypatch.setattr("minia3.training.group.Group.evaluate", evaluate_by_hand)
    tasks = {
        "original": splits,
        "other reported": splits | {"test": relabeled(splits["test"])},
        "other held out": splits | {"validation": relabeled(splits["validation"])},
    }
    found = {}
    for name, changed in tasks.items():
        folder = write(tmp_path / name / "task", **changed)
        out = tmp_path / name / "run"
        assert run(words(out, task=folder, eval_every=2, lr=0.1)) == 0
        found[name] = outcome(out)
    adapters, lines = found["original"]
    assert lines[-1]["best_step"] == 4
    same_adapters, other_lines = found["other reported"]
    assert adapters == same_adapters
    assert lines[1:-1] == other_lines[1:-1]
    assert lines[-1]["accuracy"] == pytest.approx(1 - other_lines[-1]["accuracy"])
    # The best of the original labels is step 4, and the best of the others is step 6.
    assert found["other held out"][0] != adapters


@pytest.mark.slow
def test_without_labels_for_test_a_fifth_of_train_is_held_out_and_not_trained_on(tmp_path, capsys):
    train_rows = read(task() / "train.jsonl")
    validation = read(task() / "validation.jsonl")
    order = np.random.RandomState([3, 4]).permutation(20).tolist()

    def changed(indices):
        """Return the rows to train on, some of them with the other label."""
        made = list(train_rows)
        for i in indices:
            made[i] = relabeled([train_rows[i]])[0]
        return made

    tasks = {
        "base": {"train": train_rows, "validation": validation},
        "reported": {"train": train_rows, "validation": relabeled(validation)},
        "held out": {"train": changed(order[16:]), "validation": validation},
        "trained on": {"train": changed(order[15:16]), "validation": validation},
    }
    found = {}
    for name, splits in tasks.items():
        folder = write(tmp_path / f"task-{name}", **splits)
        flags = {"eval_every": 2, "steps": 8, "save_every": 100, "seed": 3}
        assert run(words(tmp_path / name, task=folder, **flags)) == 0
        note = "note     4 rows choose the best vectors, and are not trained on\n"
        assert note in capsys.readouterr().out
        found[name] = outcome(tmp_path / name)
    losses = {}
    for name in tasks:
        losses[name] = [line["loss"] for line in events(tmp_path / name, "train")]
    assert found["base"][0] == found["reported"][0]
    assert losses["base"] == losses["held out"] != losses["trained on"]
    accuracies = [line["accuracy"] for line in events(tmp_path / "base", "eval")]
    complements = [1 - line["accuracy"] for line in events(tmp_path / "held out", "eval")]
    assert accuracies == pytest.approx(complements)


@pytest.mark.parametrize(("n", "n_held_out"), [(2, 1), (4, 1), (20, 4)])
def test_without_validation_a_fifth_of_train_is_held_out_but_at_least_one_row(
    n, n_held_out, tmp_path
):
    splits = {"train": rows(n), "test": rows(5, seed=1)}
    config = train.Config(model=model("t5"), task=write(tmp_path / "task", **splits), eval_every=1)
    found = assign_rows(minia3.load_task(config.task), config)
    assert (len(found.held_out_rows), len(found.train_rows)) == (n_held_out, n - n_held_out)


def test_training_needs_rows_to_train_on_and_evaluation_does_not(tmp_path, capsys):
    only = write(tmp_path / "only", test=rows(5))
    assert run(words(None, "--eval-only", task=only)) == 0
    fails(words(tmp_path / "run", task=only), capsys, "no rows to train on", "train.jsonl")
    assert "before" not in capsys.readouterr().out
    held_out = {"eval_every": 1, "steps": 2}
    no_train = write(tmp_path / "no train", validation=rows(5), test=rows(5))
    fails(words(tmp_path / "run", task=no_train, **held_out), capsys, "no rows to train on: ")
    single = write(tmp_path / "single", train=rows(1), validation=rows(5))
    only_row = "--eval-every holds out the only row to train on: expected 2 rows or more"
    fails(words(tmp_path / "run", task=single, **held_out), capsys, only_row)
    single_shot = write(tmp_path / "single shot", train=rows(9), validation=rows(5))
    shots = {"task": single_shot, "shots": 1, **held_out}
    fails(words(tmp_path / "run", **shots), capsys, only_row, "--shots 2 or more")
    assert run(words(tmp_path / "run", task=single, steps=2)) == 0


def test_what_trains_nothing_says_how_few_rows_of_a_file_are_evaluated(tmp_path, capsys):
    """The run spoke of rows to train on, and not of the rows that it left out."""
    made = write(tmp_path, train=rows(30))
    file = (made / "train.jsonl").rename(tmp_path / "held-out.jsonl")
    note = "note     only test, which is 3 of these rows, is evaluated: for all of them, if"

    def shown(*flags, task=file, **values):
        capsys.readouterr()
        assert run(words(None, *flags, task=task, **values)) == 0
        return capsys.readouterr().out

    for flags in (["--eval-only"], ["--method", "none", "--shots", "2"]):
        out = shown(*flags)
        assert "task     held-out: 3 rows of test to report on\n" in out
        assert note in out
    out = shown("--method", "icl", "--shots", "2")
    assert "held-out: 2 rows to put before each input, 3 rows of test to report on\n" in out
    assert note not in out
    (tmp_path / "all").mkdir()
    file.rename(tmp_path / "all" / "test.jsonl")
    out = shown("--eval-only", task=tmp_path / "all")
    assert "task     all: 30 rows of test to report on\n" in out
    assert "note  " not in out


def test_shots_and_held_out_rows_are_of_all_classes(monkeypatch):
    made = []
    for i in range(32):  # sorted by label
        made.append({"input": f"w{5 + i}", "choices": ["w3", "w4"], "label": i // 16, "idx": i})
    data = minia3.load_task(task())._replace(train=made)
    first_shots = []
    for seed in range(3):
        in_context = assign_rows(data, train.Config(method="icl", shots=16, seed=seed))
        first_shots.append(in_context.shots[:6])
        assert {row["label"] for row in first_shots[seed]} == {0, 1}
        trained = assign_rows(data._replace(test=[]), train.Config(eval_every=1, seed=seed))
        assert {row["label"] for row in trained.held_out_rows} == {0, 1}
    assert first_shots[0] != first_shots[1]
    assert assign_rows(data, train.Config(method="none", eval_every=1)).held_out_rows == []


def test_all_labeled_rows_of_raft_may_be_trained_on_and_then_nothing_is_evaluated(tmp_path, capsys):
    folder = tmp_path / "data" / "raft" / "overruling"
    labels = ("not overruling", "overruling")
    folder.mkdir(parents=True)
    train_rows = "".join(f"w{5 + i} w6,{labels[i % 2]},{i}\n" for i in range(10))
    (folder / "train.csv").write_text("Sentence,Label,ID\n" + train_rows)
    (folder / "test_unlabeled.csv").write_text("Sentence,ID\nw7 w8,10\n")
    flags = {"task": "raft/overruling", "data_dir": tmp_path / "data"}
    assert run(words(tmp_path / "run", shots=10, **flags)) == 0
    shown = capsys.readouterr().out
    final = metrics(tmp_path / "run")[-1]
    assert "10 rows to train on, 0 rows of test to report on" in shown
    assert "after    nothing to evaluate" in shown
    assert "use it      minia3 predict" in shown
    assert shown.count("warning  nothing is evaluated on held-out rows: the quality") == 1
    assert "  warning     nothing is evaluated on held-out rows: the quality" in shown
    assert (final["accuracy"], final["accuracy_before"], final["rows"], final["steps"]) == (
        None,
        None,
        0,
        6,
    )
    assert (tmp_path / "run" / "adapter" / "README.md").exists()
    for method in ("none", "icl"):
        fails(
            words(tmp_path / method, shots=10, method=method, **flags),
            capsys,
            "no labeled rows to report on: all of them are shots, so give fewer --shots",
        )


def test_what_was_trained_before_is_noted_if_the_seed_decides_which_rows_are_reported(tmp_path):
    """Fold 0 was reported on by default, also if fold 1 was held out in training."""
    folder = tmp_path / "raft" / "overruling"
    folder.mkdir(parents=True)
    rows = "".join(f"w{5 + i},{['not ', ''][i % 2]}overruling,{i}\n" for i in range(10))
    (folder / "train.csv").write_text(f"Sentence,Label,ID\n{rows}")
    (folder / "test_unlabeled.csv").write_text("Sentence,ID\nw7,10\n")
    task = minia3.load_task("raft/overruling", data_dir=tmp_path)
    start = "the seed decides which rows are reported on: "

    def is_noted(task, **flags):
        notes = assign_rows(task, train.Config(**flags)).notes
        return any(note.startswith(start) for note in notes)

    assert is_noted(task, eval_only=True, adapter="x")
    assert is_noted(task, adapter="x")  # which may be trained further on the rows of another fold
    assert not is_noted(task, eval_only=True)
    assert not is_noted(task)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    unknown = {"model": str(tmp_path / "model")}
    assert not is_noted(task, eval_only=True, **unknown)
    write_task_file(tmp_path / "model", [("", task.spec)])  # as --method full does
    assert is_noted(task, eval_only=True, **unknown)
    assert is_noted(task, method="full", **unknown)
    assert not is_noted(task._replace(depends_on_seed=False), eval_only=True, adapter="x")


# Prompts


@pytest.mark.parametrize("asked", ["9", "0,x", "", "all,0"])
def test_a_prompt_that_does_not_exist_is_refused(asked, tmp_path, capsys):
    fails(
        words(tmp_path / "run", eval_prompt=asked, **rte_flags(tmp_path)),
        capsys,
        "--eval-prompt is ",
    )


def test_a_model_that_was_made_from_a_known_model_has_the_prompts_of_that_model(tmp_path):
    row = {"premise": "w5", "hypothesis": "w7", "label": "entailment"}
    write(tmp_path / "rte", train=[row], val=[row])
    task = minia3.load_task("rte", tmp_path)
    prompts = {}
    for base in ("t5-base", None):
        (folder := tmp_path / str(base)).mkdir()
        (folder / "config.json").write_text(json.dumps({"_name_or_path": base}))
        prompts[base] = assign_rows(task, train.Config(model=str(folder), task="rte")).prompts
    assert (
        prompts["t5-base"] == assign_rows(task, train.Config(model="t5-base", task="rte")).prompts
    )
    assert (len(prompts["t5-base"]), len(prompts[None])) == (1, 5)


def test_a_warning_says_if_the_model_saw_the_labels_in_its_pre_training(
    tmp_path, monkeypatch, capsys
):
    """It was a note, which neither metrics.jsonl nor the model card had."""
    doubt = "t5-v1.0 saw this task's labels in its pre-training: these results are not few-shot"
    unknown = "note     minia3 does not know this model by name, so it knows neither whether"
    assert run(words(tmp_path / "run", steps=1, **rte_flags(tmp_path))) == 0
    shown = capsys.readouterr().out
    assert unknown in shown
    assert "these results are not few-shot" not in shown
    monkeypatch.setattr("minia3.training.learned.known_base", lambda name: KNOWN_MODELS["t5-base"])
    monkeypatch.setattr(
        "minia3.training.assignment.for_family",
        lambda prompts, family: prompts[5:] if family == "t5-v1.0" else 0 / 0,
    )
    assert run(words(tmp_path / "seen", steps=1, **rte_flags(tmp_path))) == 0
    shown = capsys.readouterr().out
    assert f"warning  {doubt}\n" in shown
    assert unknown not in shown
    assert doubt in metrics(tmp_path / "seen")[-1]["warnings"]
    card = (tmp_path / "seen" / "adapter" / "README.md").read_text(encoding="utf-8")
    assert f"**Warning:** {doubt}." in card


@pytest.mark.parametrize(
    ("labels", "n_validation", "flags", "expected"),
    [
        ([-1, -1], 0, {}, True),
        ([0, -1], 0, {}, True),
        ([0, 1], 0, {}, False),
        ([-1, -1], 1, {}, False),
        ([-1, -1], 0, {"eval_only": True}, False),
    ],
)
def test_only_training_does_without_results_and_only_if_test_hides_a_label(
    labels, n_validation, flags, expected
):
    test = [{"label": label} for label in labels]
    hidden = Task("t", [], [{"label": 0}] * n_validation, test, "accuracy", {}, [])
    assert is_without_results(hidden, train.Config(**flags)) is expected
