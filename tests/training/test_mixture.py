"""Guards what a run does beside one task with one prompt: mixtures of tasks in one adapter, several prompts, in-context
learning, and a task whose labelled rows are all trained on."""

import functools
import json
import shlex
import shutil
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import running
from running import (
    at_line,
    fails,
    kill_self,
    metrics,
    model,
    outcome,
    resume,
    rows,
    run,
    task,
    train,
    words,
    write,
)
from safetensors.torch import load_file

import minia3
from minia3.tasks.batches import order
from minia3.tasks.prompts import OWN_PROMPTS, for_family
from minia3.training.cell import Cell, Part, draw_examples
from minia3.training.report import report

SIZES = {"small": 6, "large": 40}


@functools.cache
def tasks():
    """Two tasks of different sizes, and of different choices: the flag --task."""
    home = Path(running.home().name, "mixture")
    for n_choices, (name, n) in enumerate(SIZES.items(), 2):
        made = rows(n + 20, (n_choices,), seed=n)
        write(home / name, train=made[:n], validation=made[n : n + 8], test=made[n + 8 :])
    return ",".join(str(home / name) for name in SIZES)


def cell(cap, seed=0, steps=200):
    config = train.Config(
        task=tuple(tasks().split(",")), adapters="one", cap=cap, seed=seed, steps=steps
    )
    return Cell(config, [Part(config, minia3.load_task(name), True) for name in config.task], [])


# A mixture


@pytest.mark.parametrize(("cap", "share"), [(10**6, 6 / 46), (10, 6 / 16), (1, 1 / 2)])
def test_tasks_mix_in_proportion_to_their_rows_of_which_at_most_the_cap_count(cap, share):
    mixture = cell(cap)
    n_choices = Counter(
        len(example.targets)
        for step in draw_examples(mixture, minia3.load_tokenizer(model("t5")))
        for example in step
    )
    n = sum(n_choices.values())
    assert n == 200 * 8
    assert n_choices[2] / n == pytest.approx(share, abs=4 * (share * (1 - share) / n) ** 0.5)


def test_each_task_s_rows_come_equally_often_in_an_order_of_the_seed():
    tokenizer, seen = minia3.load_tokenizer(model("t5")), []
    for seed in (0, 0, 1):
        examples = [
            example for step in draw_examples(cell(10, seed), tokenizer) for example in step
        ]
        seen.append([(len(e.targets), tuple(e.source)) for e in examples])
        for n_choices in (2, 3):
            times = Counter(source for n, source in seen[-1] if n == n_choices).values()
            assert max(times) - min(times) <= 1 + (
                n_choices == 3
            )  # two rows of the larger one may be alike
    assert seen[0] == seen[1] != seen[2]


def test_a_single_task_is_drawn_batch_by_batch_as_order_says():
    config = train.Config(seed=3, steps=30)
    part = Part(config, minia3.load_task(task()), True)
    tokenizer = minia3.load_tokenizer(model("t5"))
    rows_of = order(20, 8, 3)
    expected = [
        [tokenizer.encode(part.train_rows[i]["input"]) for i in rows_of(step)] for step in range(30)
    ]
    assert [
        [example.source for example in step]
        for step in draw_examples(Cell(config, [part], []), tokenizer)
    ] == expected


MIXTURE = {"adapters": "one", "lr": 0.1, "eval_every": 4, "steps": 12, "save_every": 5}


def test_a_mixture_trains_one_adapter_and_reports_on_each_task(tmp_path, capsys):
    out = tmp_path / "run"
    assert run(words(out, task=tasks(), **MIXTURE)) == 0
    shown = capsys.readouterr().out
    finals = [line for line in metrics(out) if line["event"] == "final"]
    assert [line["task"] for line in finals] == [*SIZES]
    assert not any("adapter" in line for line in finals)
    assert [path.name for path in out.glob("adapter*")] == ["adapter"]
    for name, final in zip(SIZES, finals, strict=True):
        figures = f"{final['accuracy_before']:.1%} before, {final['accuracy']:.1%} after"
        assert f"  {name:<12}accuracy {figures}, 12 steps\n" in shown
        again = tmp_path / f"again-{name}"
        measure = {"adapter": out / "adapter", "task": tasks().split(",")[[*SIZES].index(name)]}
        assert run(words(again, "--eval-only", **measure)) == 0
        assert metrics(again)[-1]["accuracy"] == final["accuracy"]
    assert json.loads((out / "config.json").read_text())["task"] == tasks().split(",")
    assert {
        name.split("/")[0] for name in json.loads((out / "config.json").read_text())["data"]
    } == {*SIZES}


def test_the_best_vectors_of_a_mixture_are_those_of_the_best_mean(tmp_path):
    out = tmp_path / "run"
    assert run(words(out, task=tasks(), **MIXTURE)) == 0
    evals = [line for line in metrics(out) if line["event"] == "eval"]
    means = {
        step: np.mean([x["accuracy"] for x in evals if x["step"] == step]) for step in (4, 8, 12)
    }
    best = train.runs.load_checkpoint(out)["cells"][0]["best"]
    assert best["accuracy"] == max(means.values()) == means[best["step"]]


def test_a_mixture_that_is_stopped_goes_on_bit_for_bit(tmp_path):
    with at_line(0, None) as ran:
        assert run(words(tmp_path / "whole", task=tasks(), **MIXTURE)) == 0
    for n in (len(ran) // 3, len(ran) * 2 // 3):
        out = tmp_path / str(n)
        with at_line(n, functools.partial(kill_self, signal.SIGINT)):
            assert run(words(out, task=tasks(), **MIXTURE)) == 130
        assert resume(out) == 0
        assert outcome(out) == outcome(tmp_path / "whole")


def test_mixtures_of_several_seeds_are_a_grid_and_each_starts_from_the_adapter_that_is_given(
    tmp_path,
):
    assert run(words(tmp_path / "start", lr=0.3)) == 0
    start, out = tmp_path / "start" / "adapter", tmp_path / "run"
    assert (
        run(
            words(
                out, task=tasks(), adapters="one", seed="0,1", init=start, steps=1, warmup_ratio=0.6
            )
        )
        == 0
    )
    finals = [line for line in metrics(out) if line["event"] == "final"]
    assert [(x["adapter"], x["task"]) for x in finals] == [
        (f"s{seed}", name) for seed in (0, 1) for name in SIZES
    ]
    for seed in (0, 1):  # a first step changes nothing
        found = load_file(out / "adapters" / f"s{seed}" / "adapter_model.safetensors")
        for name, x in load_file(start / "adapter_model.safetensors").items():
            assert found[name].equal(x)


def test_two_tasks_of_one_name_do_not_mix(tmp_path, capsys):
    for folder in ("a", "b"):
        write(tmp_path / folder / "same", train=rows(4), test=rows(4, seed=1))
    two = f"{tmp_path / 'a' / 'same'},{tmp_path / 'b' / 'same'}"
    fails(
        words(tmp_path / "run", task=two, adapters="one"),
        capsys,
        "a name for each",
        "['same', 'same']",
    )


def test_a_cap_is_refused_where_nothing_mixes(tmp_path, capsys):
    fails(words(tmp_path / "run", task=tasks(), cap=5), capsys, "--cap", "--adapters one")


# What train.py prints to measure again


def use_it(shown):
    (line,) = (line for line in shown.splitlines() if line.startswith("  use it"))
    return shlex.split(line.split("python train.py ")[1])


@pytest.mark.parametrize("adapters", ["one", "each"])
def test_the_line_that_measures_again_measures_the_same(adapters, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(words(out, task=tasks(), adapters=adapters, seed="0,1", steps=4, lr=0.3)) == 0
    command = use_it(capsys.readouterr().out)
    finals = [line for line in metrics(out) if line["event"] == "final"]
    for final in finals:
        put = {"NAME": final["adapter"], "SEED": str(final["seed"])}
        put["TASK"] = next(path for path in tasks().split(",") if Path(path).name == final["task"])
        filled = [
            functools.reduce(lambda word, key: word.replace(key, put[key]), put, word)
            for word in command
        ]
        assert run([*filled, "--device", "cpu", "--out", tmp_path / "again"]) == 0
        again = [line for line in metrics(tmp_path / "again") if line["event"] == "final"]
        assert final["accuracy"] in [
            line["accuracy"] for line in again if line["task"] == final["task"]
        ]
        shutil.rmtree(tmp_path / "again")


# Several prompts


@pytest.fixture
def rte(tmp_path):
    """A data folder with a few rows in the form of RTE's."""
    labels = ("entailment", "not_entailment")
    made = [
        {"premise": "w5 w6", "hypothesis": f"w{i}", "label": labels[i % 2]} for i in range(8, 18)
    ]
    write(tmp_path / "data" / "rte", train=made, val=made[:7])
    return {"task": "rte", "data_dir": tmp_path / "data", "steps": 2}


def test_over_prompts_the_result_is_the_median_and_the_accuracies_are_those_of_each(rte, tmp_path):
    each = []
    for prompt in ("0", "2", "3"):
        assert run(words(tmp_path / prompt, eval_prompt=prompt, method="none", **rte)) == 0
        each.append(metrics(tmp_path / prompt)[-1]["accuracy"])
    assert run(words(tmp_path / "run", eval_prompt="0,2,3", method="none", **rte)) == 0
    final = metrics(tmp_path / "run")[-1]
    assert (final["accuracies"], final["accuracy"]) == (each, float(np.median(each)))
    assert run(words(tmp_path / "all", eval_prompt="all", **rte)) == 0
    final = metrics(tmp_path / "all")[-1]
    prompts = for_family(minia3.load_task("rte", rte["data_dir"]).prompts, None)
    assert len(final["accuracies"]) == len(final["accuracies_before"]) == len(prompts) > 3
    assert [final["accuracies_before"][i] for i in (0, 2, 3)] == each


@pytest.mark.parametrize("asked", ["9", "0,x", "", "all,0"])
def test_a_prompt_that_is_not_there_is_refused(rte, asked, tmp_path, capsys):
    fails(words(tmp_path / "run", eval_prompt=asked, **rte), capsys, "--eval-prompt is ")


# In-context learning


def test_a_written_answer_ends_where_the_shots_answers_end(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "minia3.inference.evaluation.generate",
        lambda *args, stop, **options: seen.append(stop) or ["w4"],
    )
    ours, tokenizer = minia3.load_model(model("llama")), minia3.load_tokenizer(model("llama"))
    row = {"input": "w5", "target": "w4", "label": 0, "idx": 0}
    for shots in ((), [row]):
        minia3.evaluate.evaluate(
            ours, tokenizer, [row], OWN_PROMPTS[0], metric="exact_match", shots=shots
        )
    assert seen == [(), ("\n\n",)]


def test_shots_are_of_all_classes_where_few_fit(monkeypatch):
    made = [
        {"input": f"w{5 + i}", "choices": ["w3", "w4"], "label": i // 16, "idx": i}
        for i in range(32)
    ]
    data = minia3.load_task(task())._replace(train=made)
    first = [
        Part(train.Config(method="icl", shots=16, seed=seed), data, False).shots[:6]
        for seed in range(3)
    ]
    assert all({row["label"] for row in some} == {0, 1} for some in first)
    assert first[0] != first[1]
    held_out = [
        Part(train.Config(eval_every=1, seed=seed), data._replace(test=[]), True).held_out
        for seed in range(3)
    ]
    assert all({row["label"] for row in some} == {0, 1} for some in held_out)
    assert Part(train.Config(method="none", eval_every=1), data, False).held_out == []


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_in_context_learning_measures_rows_behind_the_shots_of_each_seed(name, tmp_path):
    out = tmp_path / "run"
    assert run(words(out, model=model(name), method="icl", shots=3, seed="0,1")) == 0
    finals = [line for line in metrics(out) if line["event"] == "final"]
    ours, tokenizer = minia3.load_model(model(name)), minia3.load_tokenizer(model(name))
    for seed, final in enumerate(finals):
        data = minia3.load_task(task(), shots=3, seed=seed)
        order = np.random.RandomState([seed, 4]).permutation(3)
        shots = [data.train[i] for i in order]
        head = "".join(f"{row['input']} {row['choices'][row['label']]}\n\n" for row in shots)
        scores = minia3.rank(
            ours,
            tokenizer,
            [head + row["input"] for row in data.test],
            [x["choices"] for x in data.test],
        )
        expected = np.mean(
            [
                best == row["label"]
                for best, row in zip(scores.argmax(1).tolist(), data.test, strict=True)
            ]
        )
        assert final["accuracy"] == pytest.approx(expected)
        assert (final["n_shots"], final["trainable"], final["steps"], final["method"]) == (
            3,
            0,
            0,
            "icl",
        )
    assert finals[0]["accuracy_before"] == finals[1]["accuracy_before"]
    assert not (out / "adapters").exists()


def test_what_in_context_learning_came_to_is_told(tmp_path, capsys):
    assert run(words(tmp_path / "run", method="icl", shots=3)) == 0
    final, shown = metrics(tmp_path / "run")[-1], capsys.readouterr().out
    assert (
        f"accuracy    {final['accuracy_before']:.1%} before, {final['accuracy']:.1%} after" in shown
    )
    assert "shots       3.0 before a row, in the mean" in shown
    finals = [final | {"adapter": f"s{i}", "n_shots": n} for i, n in enumerate((3.0, 1.0, 2.5))]
    report(train.Config(method="icl", shots=3, seed=(0, 1, 2)), tmp_path / "run", finals)
    assert "shots       1.0 to 3.0 before a row, in the mean" in capsys.readouterr().out


# Nothing to report on


def test_all_labelled_rows_of_raft_may_be_trained_on_and_then_nothing_is_measured(tmp_path, capsys):
    folder = tmp_path / "data" / "raft" / "overruling"
    labels = ("not overruling", "overruling")
    folder.mkdir(parents=True)
    train_rows = "".join(f"w{5 + i} w6,{labels[i % 2]},{i}\n" for i in range(10))
    (folder / "train.csv").write_text("Sentence,Label,ID\n" + train_rows)
    (folder / "test_unlabeled.csv").write_text("Sentence,ID\nw7 w8,10\n")
    of = {"task": "raft/overruling", "data_dir": tmp_path / "data"}
    assert run(words(tmp_path / "run", shots=10, **of)) == 0
    shown, final = capsys.readouterr().out, metrics(tmp_path / "run")[-1]
    assert "10 rows to train on, 0 of test to report on" in shown
    assert "after    nothing to measure" in shown
    assert "use it" not in shown
    assert (final["accuracy"], final["accuracy_before"], final["rows"], final["steps"]) == (
        None,
        None,
        0,
        12,
    )
    assert (tmp_path / "run" / "adapter" / "README.md").exists()
    fails(
        words(tmp_path / "none", shots=10, method="none", **of),
        capsys,
        "no labeled rows to report on",
    )
