"""Runs that train one adapter on a mixture of tasks."""

import functools
import json
import signal
from itertools import product
from pathlib import Path

import pytest
import torch
from running import (
    MIXED_SIZES,
    at_line,
    fails,
    kill_self,
    metrics,
    mixed_tasks,
    model,
    outcome,
    resume,
    rows,
    run,
    words,
    write,
)
from safetensors.torch import load_file
from written_out import read, used

import minia3

MIXTURE = {"adapters": "one", "lr": 0.1, "eval_every": 2, "steps": 6, "save_every": 5}


def test_a_mixture_trains_one_adapter_and_reports_on_each_task(tmp_path, capsys):
    out = tmp_path / "run"
    assert run(words(out, task=mixed_tasks(), **MIXTURE)) == 0
    shown = capsys.readouterr().out
    finals = [line for line in metrics(out) if line["event"] == "final"]
    assert [line["task"] for line in finals] == [*MIXED_SIZES]
    assert not any("adapter" in line for line in finals)
    assert [path.name for path in out.glob("adapter*")] == ["adapter"]
    paths = mixed_tasks().split(",")
    for name, path, final in zip(MIXED_SIZES, paths, finals, strict=True):
        figures = f"{final['accuracy_before']:.1%} before, {final['accuracy']:.1%} after"
        commonest = f"(commonest label: {final['commonest']:.1%})"
        assert f"  {name:<12}accuracy {figures} {commonest}, 6 steps\n" in shown
        again = tmp_path / f"again-{name}"
        measure = {"adapter": out / "adapter", "task": path}
        assert run(words(again, "--eval-only", **measure)) == 0
        assert metrics(again)[-1]["accuracy"] == final["accuracy"]
    assert json.loads((out / "config.json").read_text())["task"] == paths
    assert {
        name.split("/")[0] for name in json.loads((out / "config.json").read_text())["data"]
    } == {*MIXED_SIZES}


def test_the_best_vectors_of_a_mixture_have_the_best_mean(tmp_path, monkeypatch):
    accuracies = {2: (0.2, 0.8), 4: (0.5, 0.6), 6: (0.9, 0.1)}  # neither member is best at 4
    vectors = {}

    def evaluate_held_out(group, cell):
        step = group.log.step
        table = next(iter(minia3.vectors(group.model).values()))
        vectors[step] = table.detach().clone()
        result = {"auc": None, "n": 8, "n_cut": 0, "tokens": 1.0}
        return [{**result, "accuracy": accuracy} for accuracy in accuracies[step]]

    monkeypatch.setattr("minia3.training.group.Group.evaluate_held_out", evaluate_held_out)
    out = tmp_path / "run"
    assert run(words(out, task=mixed_tasks(), **MIXTURE)) == 0
    ours = minia3.load_model(model("t5"))
    minia3.load_adapter(ours, out / "adapter")
    found = next(iter(minia3.vectors(ours).values()))
    assert torch.equal(found, vectors[4])
    assert not torch.equal(found, vectors[6])


@pytest.mark.slow
def test_a_mixture_that_is_stopped_continues_bit_for_bit(tmp_path):
    with at_line(0, None) as executed:
        assert run(words(tmp_path / "whole", task=mixed_tasks(), **MIXTURE)) == 0
    for n in (len(executed) // 3, len(executed) * 2 // 3):
        out = tmp_path / str(n)
        with at_line(n, functools.partial(kill_self, signal.SIGINT)):
            assert run(words(out, task=mixed_tasks(), **MIXTURE)) == 130
        assert resume(out) == 0
        assert outcome(out) == outcome(tmp_path / "whole")


def test_mixtures_of_several_seeds_are_a_grid_and_each_starts_from_the_given_adapter(tmp_path):
    assert run(words(tmp_path / "start", lr=0.3)) == 0
    start = tmp_path / "start" / "adapter"
    out = tmp_path / "run"
    flags = {"adapters": "one", "seed": "0,1", "init": start, "steps": 1, "warmup_ratio": 0.6}
    assert run(words(out, task=mixed_tasks(), **flags)) == 0
    finals = [line for line in metrics(out) if line["event"] == "final"]
    expected = [(f"s{seed}", name) for seed, name in product((0, 1), MIXED_SIZES)]
    assert [(line["adapter"], line["task"]) for line in finals] == expected
    for seed in (0, 1):  # a first step changes nothing
        found = load_file(out / "adapters" / f"s{seed}" / "adapter_model.safetensors")
        for name, x in load_file(start / "adapter_model.safetensors").items():
            assert found[name].equal(x)


def test_two_tasks_of_the_same_name_do_not_mix(tmp_path, capsys):
    for folder in ("a", "b"):
        write(tmp_path / folder / "same", train=rows(4), test=rows(4, seed=1))
    two = f"{tmp_path / 'a' / 'same'},{tmp_path / 'b' / 'same'}"
    fails(
        words(tmp_path / "run", task=two, adapters="one"),
        capsys,
        "a different name for each task",
        "['same', 'same']",
    )


def test_a_cap_without_a_mixture_is_refused(tmp_path, capsys):
    fails(words(tmp_path / "run", task=mixed_tasks(), cap=5), capsys, "--cap", "--adapters one")


# What train.py prints to use an adapter


@pytest.mark.parametrize("adapters", ["one", "each"])
def test_the_printed_command_answers_with_each_adapter_of_a_grid(adapters, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(words(out, task=mixed_tasks(), adapters=adapters, seed="0,1", steps=4, lr=0.3)) == 0
    shown = capsys.readouterr().out
    folders = {Path(path).name: Path(path) for path in mixed_tasks().split(",")}
    finals = [line for line in metrics(out) if line["event"] == "final"]
    assert len(finals) == 4
    for final in finals:
        test_rows = read(folders[final["task"]] / "test.jsonl")
        found = used(shown, test_rows, capsys, final["adapter"], final["task"])
        assert found == pytest.approx(final["accuracy"])
