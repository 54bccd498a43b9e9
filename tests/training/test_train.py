"""Guards the loop: what train.py computes is what its flags and T-Few's recipe say, step by step, against loops
that are written out here; nothing is chosen on what is reported; every mistake of a user's is one line that says
what to do.
"""

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import pty
import shutil
import struct
import subprocess
import sys
import termios
import warnings
from itertools import product

import numpy as np
import pytest
import running
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from running import (
    fails,
    finish,
    metrics,
    model,
    outcome,
    rows,
    run,
    start,
    task,
    train,
    words,
    write,
)
from safetensors.torch import load_file, save_file

import minia3
from minia3.checkpoints.known_models import known_models
from minia3.tasks.batches import order as order_rows
from minia3.tasks.examples import encode_rows
from minia3.tasks.prompts import for_family
from minia3.training.cell import Part
from minia3.training.checkpoint import load_checkpoint


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def adapter(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def vectors(folder):
    """Those of the last checkpoint: as they were trained, in their own dtype."""
    return load_checkpoint(folder)["vectors"]


def accuracies(folder, event):
    return [line["accuracy"] for line in metrics(folder) if line["event"] == event]


# The equations, written out


def batches(n_rows, batch_size, seed):
    """Indices of the rows of each step: permutations, one behind the other."""
    stream = []
    for epoch in range(100):
        stream += np.random.RandomState([seed, epoch]).permutation(n_rows).tolist()
    return [stream[i : i + batch_size] for i in range(0, len(stream), batch_size)]


def loss_of(ours, tokenizer, batch, which):
    """T-Few's losses of some rows, one choice at a time: no padding, no batch."""
    likely, unlikely, rows_ln = [], [], []
    for row in batch:
        choices, label = row.get("choices", [row.get("target")]), row.get("label", 0)
        source = torch.tensor([tokenizer.encode(row["input"])])
        logps = []
        for choice in choices:
            target = torch.tensor([tokenizer.encode_target(choice, end="target" in row)])
            logps.append(minia3.logprobs(ours, ours.start(source), target)[0])
        likely.append(logps[label])
        unlikely += [torch.log(1 - p.exp() + 0.01) for k, p in enumerate(logps) if k != label]
        rows_ln.append(-torch.stack([p.mean() for p in logps]).log_softmax(0)[label])
    parts = {"lm": -torch.cat(likely).mean(), "ln": torch.stack(rows_ln).mean()}
    parts["ul"] = -torch.cat(unlikely).mean() if unlikely else torch.zeros(())
    return sum(parts[name] for name in which.split(","))


LOSSES = ("lm,ul,ln", "ul", "lm,ln")
KINDS = {"choices": (2,), "mixed choices": (2, 3, 1), "targets": (0,)}


@pytest.mark.parametrize(
    ("kind", "losses"), [x for x in product(KINDS, LOSSES) if x != ("targets", "ul")]
)
@pytest.mark.parametrize("name", ["t5", "llama"])
def test_the_loss_of_the_first_step_is_that_of_the_base_on_the_first_batch(
    name, kind, losses, tmp_path
):
    folder = task(KINDS[kind])
    flags = {"model": model(name), "task": folder, "losses": losses, "seed": 4, "max_new_tokens": 2}
    assert run(words(tmp_path / "run", steps=1, dropout=0, **flags)) == 0
    ours, tokenizer = minia3.load_model(model(name)), minia3.load_tokenizer(model(name))
    train_rows = read(folder / "train.jsonl")
    with torch.no_grad():
        expected = loss_of(ours, tokenizer, [train_rows[i] for i in batches(20, 4, 4)[0]], losses)
    found = metrics(tmp_path / "run")[1]
    assert (found["event"], found["step"]) == ("train", 1)
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw"])
def test_a_run_is_the_loop_written_out_with_the_optimisers_of_transformers_and_torch(
    optimizer, tmp_path
):
    transformers = pytest.importorskip("transformers")
    flags = {
        "steps": 7,
        "warmup_ratio": 0.4,
        "lr": 0.03,
        "clip": 0.5,
        "weight_decay": 0.1,
        "optimizer": optimizer,
    }
    out = tmp_path / "run"
    assert run(words(out, task=task((2, 3, 1)), seed=2, dropout=0, dtype="float64", **flags)) == 0

    ours, tokenizer = (
        minia3.load_model(model("t5"), dtype=torch.float64).double(),
        minia3.load_tokenizer(model("t5")),
    )
    minia3.freeze(ours)
    parameters = {
        name: torch.nn.Parameter(v.detach()[0].clone()) for name, v in minia3.vectors(ours).items()
    }
    if optimizer == "adafactor":
        optimiser = transformers.Adafactor(
            parameters.values(), lr=0.03, relative_step=False, scale_parameter=True
        )
    else:
        optimiser = torch.optim.AdamW(parameters.values(), lr=0.03, weight_decay=0.1)
    schedule = transformers.get_linear_schedule_with_warmup(optimiser, 3, 7)
    train_rows, losses = read(task((2, 3, 1)) / "train.jsonl"), []
    for batch in batches(20, 4, 2)[:7]:
        tables = minia3.vectors(ours)
        with torch.no_grad():
            for name, p in parameters.items():
                tables[name].copy_(p[None])
        loss = loss_of(ours, tokenizer, [train_rows[i] for i in batch], "lm,ul,ln")
        gradients = torch.autograd.grad(loss, list(tables.values()))
        norm = torch.sqrt(sum(g.square().sum() for g in gradients))
        assert norm > 0.5  # else clipping is not seen
        for p, g in zip(parameters.values(), gradients, strict=True):
            p.grad = g[0] * 0.5 / norm
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    found = vectors(out)
    assert found.keys() == parameters.keys()
    for name, p in parameters.items():
        torch.testing.assert_close(found[name][0], p.detach(), rtol=1e-5, atol=1e-7)
    first, rest = (line["loss"] for line in metrics(out) if line["event"] == "train")
    assert first == pytest.approx(losses[0], rel=1e-9)
    assert rest == pytest.approx(
        np.mean(losses[1:]), rel=1e-6
    )  # a line is the mean since the line before


@settings(deadline=None, max_examples=60)
@given(steps=st.integers(1, 400), ratio=st.floats(0, 0.99), lr=st.floats(1e-6, 10))
def test_the_learning_rate_is_that_of_transformers_schedule(steps, ratio, lr):
    transformers = pytest.importorskip("transformers")
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    schedule = transformers.get_linear_schedule_with_warmup(optimiser, round(ratio * steps), steps)
    config = train.Config(steps=steps, warmup_ratio=ratio, lr=lr)
    for step in range(steps):
        assert train.learning_rate(step, config) == pytest.approx(
            schedule.get_last_lr()[0], rel=1e-9, abs=1e-12
        )
        optimiser.step()
        schedule.step()


def test_t_fews_schedule_warms_up_for_60_steps_of_1000_and_ends_at_0():
    rates = [train.learning_rate(step, train.Config()) for step in (0, 30, 60, 530, 999)]
    assert rates == pytest.approx([0, 0.0015, 0.003, 0.0015, 0.003 / 940])


def test_the_logged_learning_rate_is_that_of_the_step(tmp_path):
    assert run(words(tmp_path / "run", warmup_ratio=0.5)) == 0
    rates = {
        line["step"]: line["lr"] for line in metrics(tmp_path / "run") if line["event"] == "train"
    }
    assert rates == pytest.approx({1: 0, 10: 0.003 * 3 / 6, 12: 0.003 * 1 / 6})


# Batches, shots, seeds, dropout, dtypes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("micro", [1, 3, 7])
def test_micro_batches_add_up_to_the_batch(kind, micro, tmp_path):
    flags = {
        "task": task(KINDS[kind]),
        "batch_size": 8,
        "dtype": "float64",
        "dropout": 0,
        "max_new_tokens": 2,
    }
    flags["steps"] = 5
    assert run(words(tmp_path / "whole", **flags)) == 0
    assert run(words(tmp_path / "parts", micro_batch_size=micro, **flags)) == 0
    whole, parts = vectors(tmp_path / "whole"), vectors(tmp_path / "parts")
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-9, atol=1e-9)
    assert max((whole[name] - 1).abs().max() for name in whole) > 1e-4


def test_shots_are_t_fews_split_and_nothing_else_is_trained_on(tmp_path):
    train_rows = read(task() / "train.jsonl")
    np.random.seed(3)
    np.random.shuffle(train_rows)
    test = {split: read(task() / f"{split}.jsonl") for split in ("validation", "test")}
    same = write(tmp_path / "same", train=train_rows[:6], **test)
    assert run(words(tmp_path / "shots", seed=3, shots=6)) == 0
    assert run(words(tmp_path / "rows", seed=3, task=same)) == 0
    assert outcome(tmp_path / "shots")[0] == outcome(tmp_path / "rows")[0]


def test_more_rows_in_a_batch_than_there_are_is_several_epochs_of_them(tmp_path):
    few = write(tmp_path / "few", train=rows(3), validation=rows(4, seed=1))
    assert run(words(tmp_path / "run", task=few, batch_size=7, steps=2, dropout=0)) == 0
    ours, tokenizer = minia3.load_model(model("t5")), minia3.load_tokenizer(model("t5"))
    with torch.no_grad():
        expected = loss_of(ours, tokenizer, [rows(3)[i] for i in batches(3, 7, 0)[0]], "lm,ul,ln")
    assert metrics(tmp_path / "run")[1]["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_the_same_seed_is_the_same_run_and_another_one_is_not(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(name) + seed)  # what the process drew before does not matter
        assert run(words(tmp_path / name, seed=seed, steps=3, dropout=0.3)) == 0
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")
    assert outcome(tmp_path / "a")[0] != outcome(tmp_path / "c")[0]


def test_dropout_is_drawn_by_the_seed(tmp_path):
    one = write(
        tmp_path / "one", train=rows(1), test=rows(3, seed=1)
    )  # whose order no seed changes
    losses = {}
    for seed, dropout in product((0, 1), (0, 0.5)):
        out = tmp_path / f"{seed}-{dropout}"
        assert run(words(out, task=one, seed=seed, dropout=dropout, steps=1)) == 0
        losses[seed, dropout] = metrics(out)[1]["loss"]
    assert losses[0, 0] == losses[1, 0]
    assert losses[0, 0.5] != losses[1, 0.5]


def test_the_flag_asks_torch_for_deterministic_kernels(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    assert run(words(tmp_path / "run", "--deterministic", method="none")) == 0
    assert asked[0] is True


def test_measuring_is_as_the_flags_say(tmp_path, monkeypatch):
    seen, original = [], train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *a, **o: seen.append(o) or original(*a, **o))
    flags = {"eval_batch_size": 5, "max_new_tokens": 3, "max_length": 9}
    assert run(words(tmp_path / "run", steps=1, **flags)) == 0
    assert len(seen) == 2
    assert all((o["batch_size"], o["max_new_tokens"], o["max_length"]) == (5, 3, 9) for o in seen)


@pytest.mark.parametrize("seed", ["0", "0,1"])
def test_speeds_count_the_examples_of_all_adapters_with_sources_and_choices(seed, tmp_path):
    assert run(words(tmp_path / "run", seed=seed, batch_size=20, steps=1)) == 0  # all rows once
    line = next(line for line in metrics(tmp_path / "run") if line["event"] == "train")
    tokenizer, train_rows = minia3.load_tokenizer(model("t5")), read(task() / "train.jsonl")
    n_tokens = sum(
        len(tokenizer.encode(text))
        for row in train_rows
        for text in (row["input"], *row["choices"])
    )
    assert line["tokens_per_second"] / line["examples_per_second"] == pytest.approx(n_tokens / 20)


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_dropout_is_that_of_the_flag_else_of_the_config_and_is_off_where_it_is_measured(
    name, tmp_path
):
    own = {"t5": "0.1", "llama": "0.0"}[name]
    for p in (None, own, 0.4):
        assert (
            run(words(tmp_path / str(p), model=model(name), dropout=p, steps=2, warmup_ratio=0))
            == 0
        )
    none, same, more = (tmp_path / str(p) for p in (None, own, 0.4))
    assert outcome(none) == outcome(same)
    assert metrics(more)[1]["loss"] != metrics(none)[1]["loss"]
    assert metrics(more)[0] == metrics(none)[0]


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_vectors_are_float32_over_a_bfloat16_base_and_move_by_less_than_it_can_hold(name, tmp_path):
    assert run(words(tmp_path / "run", model=model(name), dtype="bfloat16", lr=1e-4, steps=3)) == 0
    trained = vectors(tmp_path / "run")
    assert {v.dtype for v in trained.values()} == {torch.float32}
    moved = torch.cat([(v - 1).flatten() for v in trained.values()])
    assert 0 < moved.abs().max() < 1e-3


def test_float64_is_float64_throughout(tmp_path):
    assert run(words(tmp_path / "run", dtype="float64", steps=2)) == 0
    assert {v.dtype for v in vectors(tmp_path / "run").values()} == {torch.float64}


def test_nothing_but_the_vectors_is_trained(tmp_path, monkeypatch):
    loaded = []
    original = minia3.load_model
    monkeypatch.setattr(
        minia3, "load_model", lambda *a, **o: loaded.append(original(*a, **o)) or loaded[-1]
    )
    assert run(words(tmp_path / "run", steps=3, lr=0.1)) == 0
    fresh, (trained,) = original(model("t5")), loaded
    moving = minia3.vectors(fresh).keys()
    for (name, before), after in zip(fresh.named_parameters(), trained.parameters(), strict=True):
        assert torch.equal(before, after) != (name.removesuffix(".scale") in moving), name
        assert after.requires_grad == (name.removesuffix(".scale") in moving), (
            name
        )  # else backward keeps more
    assert not trained.training


# Prompts


LABELS = ("entailment", "not_entailment")
RTE = [{"premise": "w5 w6 w7", "hypothesis": f"w{i}", "label": LABELS[i % 2]} for i in range(8, 18)]


@pytest.fixture
def rte(tmp_path):
    """A data folder with a few rows in the form of RTE's."""
    write(tmp_path / "data" / "rte", train=RTE, val=RTE[:6])
    return {"task": "rte", "data_dir": tmp_path / "data"}


def test_training_draws_from_all_prompts_and_one_of_them_measures(rte, tmp_path, monkeypatch):
    seen, original = [], encode_rows

    def spy(pairs, *args, **options):
        seen.append({prompt for _, prompt in pairs})
        return original(pairs, *args, **options)

    monkeypatch.setattr("minia3.training.cell.encode_rows", spy)
    monkeypatch.setattr("minia3.inference.evaluation.encode_rows", spy)
    assert run(words(tmp_path / "run", eval_prompt=2, steps=10, **rte)) == 0
    prompts = for_family(minia3.load_task("rte", rte["data_dir"]).prompts, None)
    assert seen == [set(prompts), {prompts[2]}, {prompts[2]}]


def test_a_family_that_saw_the_labels_is_said_to_have_seen_them(rte, tmp_path, monkeypatch, capsys):
    assert run(words(tmp_path / "run", steps=1, **rte)) == 0
    assert "pre-training" not in capsys.readouterr().out
    monkeypatch.setattr("minia3.training.cell.known_model", lambda name: known_models()["t5-base"])
    monkeypatch.setattr(
        "minia3.training.cell.for_family",
        lambda prompts, family: prompts[5:] if family == "t5-v1.0" else 0 / 0,
    )
    assert run(words(tmp_path / "seen", steps=1, **rte)) == 0
    assert "t5-v1.0 saw this task's labels in its pre-training" in capsys.readouterr().out


def test_inputs_that_are_cut_are_counted_where_they_are_trained_on_and_where_they_are_measured(
    tmp_path, capsys
):
    splits = {split: read(task() / f"{split}.jsonl") for split in ("train", "validation", "test")}
    n = {
        split: sum(len(row["input"].split()) + 1 > 6 for row in part)
        for split, part in splits.items()
    }
    assert run(words(tmp_path / "run", max_length=6, batch_size=20, steps=1)) == 0
    out = capsys.readouterr().out
    assert f"{n['train']} of 20 training inputs are cut to 6 tokens (--max-length)" in out
    assert f"12 rows of test, {n['test']} of them cut to 6 tokens" in out
    assert metrics(tmp_path / "run")[-1]["rows_cut"] == n["test"] > 0
    assert run(words(tmp_path / "long", steps=1)) == 0
    assert " cut to " not in capsys.readouterr().out


# Choosing


CHOOSING = {"eval_every": 3, "steps": 24, "save_every": 100, "seed": 3, "lr": 0.3, "dropout": 0.1}


def relabelled(folder, split):
    """A copy of the task whose rows of `split` have the other label."""
    made = [{**row, "label": 1 - row["label"]} for row in read(task() / f"{split}.jsonl")]
    shutil.copytree(task(), folder)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return folder


def test_nothing_is_chosen_on_the_split_that_is_reported(tmp_path):
    assert run(words(tmp_path / "run", **CHOOSING)) == 0
    assert (
        run(
            words(
                tmp_path / "other",
                task=relabelled(tmp_path / "a" / task().name, "test"),
                **CHOOSING,
            )
        )
        == 0
    )
    (chosen, lines), (other, others) = outcome(tmp_path / "run"), outcome(tmp_path / "other")
    assert chosen == other
    assert lines[1:-1] == others[1:-1]
    assert lines[-1]["accuracy"] == pytest.approx(
        1 - others[-1]["accuracy"]
    )  # they were measured on these labels
    assert lines[-1]["accuracy"] != 0.5
    assert (
        run(words(tmp_path / "held", task=relabelled(tmp_path / "b", "validation"), **CHOOSING))
        == 0
    )
    assert outcome(tmp_path / "held")[0] != chosen  # but on these they were chosen


def test_without_a_labelled_test_split_a_fifth_of_train_is_held_out_and_not_trained_on(
    tmp_path, capsys
):
    train_rows, validation = read(task() / "train.jsonl"), read(task() / "validation.jsonl")
    order = np.random.RandomState([CHOOSING["seed"], 4]).permutation(20).tolist()

    def flipped(which):
        return [
            {**row, "label": (row["label"] + (i in which)) % 2} for i, row in enumerate(train_rows)
        ]

    all_flipped = [{**row, "label": 1 - row["label"]} for row in validation]
    tasks = {
        "base": {"train": train_rows, "validation": validation},
        "reported": {"train": train_rows, "validation": all_flipped},
        "held": {"train": flipped(order[16:]), "validation": validation},
        "trained": {"train": flipped(order[15:16]), "validation": validation},
    }
    found = {}
    for name, splits in tasks.items():
        assert (
            run(words(tmp_path / name, task=write(tmp_path / f"task-{name}", **splits), **CHOOSING))
            == 0
        )
        assert (
            "chosen on 4 rows that are neither trained nor reported on" in capsys.readouterr().out
        )
        found[name] = outcome(tmp_path / name)
    losses = {
        name: [line["loss"] for line in lines if line["event"] == "train"]
        for name, (_, lines) in found.items()
    }
    assert found["base"][0] == found["reported"][0]
    assert losses["base"] == losses["held"] != losses["trained"]
    wrong = [1 - accuracy for accuracy in accuracies(tmp_path / "held", "eval")]
    assert accuracies(tmp_path / "base", "eval") == pytest.approx(wrong)


@pytest.mark.parametrize(("n", "n_held_out"), [(2, 1), (4, 1), (20, 4)])
def test_without_validation_a_fifth_of_train_is_held_out_and_one_row_at_least(
    n, n_held_out, tmp_path
):
    splits = {"train": rows(n), "test": rows(5, seed=1)}
    config = train.Config(model=model("t5"), task=write(tmp_path / "task", **splits), eval_every=1)
    part = Part(config, minia3.load_task(config.task), True)
    assert (len(part.held_out), len(part.train_rows)) == (n_held_out, n - n_held_out)


def test_the_saved_vectors_are_the_best_on_the_held_out_rows(tmp_path):
    assert run(words(tmp_path / "run", **CHOOSING)) == 0
    held_out = accuracies(tmp_path / "run", "eval")
    assert held_out[-1] < max(held_out)
    swapped = write(tmp_path / "swapped", test=read(task() / "validation.jsonl"))
    again = words(
        tmp_path / "again", "--eval-only", task=swapped, adapter=tmp_path / "run" / "adapter"
    )
    assert run(again) == 0
    assert metrics(tmp_path / "again")[-1]["accuracy"] == max(held_out)


def scripted(monkeypatch, held_out):
    """Make measurements on held-out rows give these accuracies; -> the vectors at each of them."""
    seen, original, numbers = [], train.evaluate, iter(held_out)

    def evaluate(ours, tokenizer, rows, **options):
        result = original(ours, tokenizer, rows, **options)
        if len(rows) == 10:
            seen.append({name: v.detach().clone() for name, v in minia3.vectors(ours).items()})
            result["accuracy"] = next(numbers)
        return result

    monkeypatch.setattr(train, "evaluate", evaluate)
    return seen


@pytest.mark.parametrize(
    ("held_out", "patience", "n", "best"),
    [
        ([0.5, 0.6, 0.4, 0.3], 2, 4, 1),
        (
            [0.5, 0.5, 0.5, 0.9],
            2,
            3,
            2,
        ),  # an equal one is no better, but of equals the last is kept
        ([0.5, 0.6, 0.6, 0.7, 0.7, 0.2], 2, 6, 4),
        ([0.5, 0.4, 0.3, 0.2, 0.1], 0, 5, 0),
        ([0.1, 0.2, 0.3, 0.4, 0.5], 1, 5, 4),
    ],
)
def test_patience_counts_measurements_without_a_better_one_and_the_best_vectors_win(
    held_out, patience, n, best, tmp_path, monkeypatch
):
    seen = scripted(monkeypatch, held_out)
    flags = {"eval_every": 2, "patience": patience, "steps": 2 * len(held_out), "lr": 0.1}
    assert run(words(tmp_path / "run", **flags)) == 0
    assert len(seen) == n
    assert metrics(tmp_path / "run")[-1]["steps"] == 2 * n
    expected = minia3.load_model(model("t5"))
    with torch.no_grad():
        for name, v in minia3.vectors(expected).items():
            v.copy_(seen[best][name])
    found = adapter(tmp_path / "run")
    for name, v in minia3.adapters.peft_tensors(minia3.adapters.row_of(expected, 0)).items():
        assert torch.equal(found[name], v)


# Adapters, in and out


@pytest.mark.parametrize("name", ["t5", "llama"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_of_a_run_scores_what_the_run_says_and_a_run_can_start_from_it(
    name, kind, tmp_path, capsys
):
    flags = {"model": model(name), "task": task(KINDS[kind]), "lr": 0.3, "max_new_tokens": 3}
    assert run(words(tmp_path / "run", **flags)) == 0
    final = metrics(tmp_path / "run")[-1]
    assert final["metric"] == ("exact_match" if kind == "targets" else "accuracy")
    assert max((v - 1).abs().max() for v in adapter(tmp_path / "run").values()) > 0.1
    capsys.readouterr()
    adapter_flag = {"adapter": tmp_path / "run" / "adapter"}
    assert run(words(None, "--eval-only", **flags, **adapter_flag)) == 0
    assert f"  {final['metric']:<12}{final['accuracy']:.1%}\n" in capsys.readouterr().out
    assert run(words(tmp_path / "scored", "--eval-only", **flags, **adapter_flag)) == 0
    scored = metrics(tmp_path / "scored")[-1]
    assert (scored["accuracy"], scored["auc"], scored["trainable"]) == (
        final["accuracy"],
        final["auc"],
        0,
    )
    assert not (tmp_path / "scored" / "adapter").exists()
    assert run(words(tmp_path / "on", steps=1, **flags, **adapter_flag)) == 0
    on = metrics(tmp_path / "on")[-1]
    assert (on["accuracy_before"], on["steps"]) == (final["accuracy"], 1)


def test_a_run_that_does_not_move_gives_back_the_adapter_that_it_began_with(tmp_path):
    assert run(words(tmp_path / "run", lr=0.1)) == 0
    assert (
        run(words(tmp_path / "on", steps=1, warmup_ratio=0.6, adapter=tmp_path / "run" / "adapter"))
        == 0
    )
    assert outcome(tmp_path / "on")[0] == outcome(tmp_path / "run")[0]


def test_what_peft_reads_is_what_was_trained(tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    assert run(words(tmp_path / "run", lr=0.3)) == 0
    base = transformers.AutoModelForSeq2SeqLM.from_pretrained(model("t5"))
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    ours = minia3.load_model(model("t5"))
    minia3.load_adapter(ours, tmp_path / "run" / "adapter")
    source, target = torch.tensor([[5, 9, 30, 1]]), torch.tensor([[0, 7, 8]])
    with torch.no_grad():
        expected = theirs(input_ids=source, decoder_input_ids=target).logits
        found = ours.step(target, ours.start(source))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_command_that_uses_the_adapter_gives_the_same_number(tmp_path, capsys):
    out = tmp_path / "a run"
    assert run(words(out, lr=0.3, max_length=5, dtype="float64")) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "use it" in line)
    command = line.split("python train.py ")[1]
    assert "--max-length 5" in command
    assert "--dtype float64" in command
    assert run([*train.shlex.split(command), "--device", "cpu"]) == 0
    assert f"{metrics(out)[-1]['accuracy']:.1%}\n" in capsys.readouterr().out


def test_method_none_measures_the_base_and_trains_nothing(tmp_path, capsys):
    assert run(words(tmp_path / "none", method="none")) == 0
    assert [line["event"] for line in metrics(tmp_path / "none")] == ["before", "final"]
    final = metrics(tmp_path / "none")[-1]
    assert final["accuracy"] == final["accuracy_before"]
    assert (final["trainable"], final["steps"], final["method"]) == (0, 0, "none")
    assert not (tmp_path / "none" / "adapter").exists()
    assert "after" not in capsys.readouterr().out


def test_eval_only_writes_nothing_unless_it_is_told_where(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(words(None, "--eval-only")) == 0
    assert list(tmp_path.iterdir()) == []


# Own data as it comes


def test_windows_line_ends_a_byte_order_mark_and_a_missing_last_line_end_do_not_matter(tmp_path):
    shutil.copytree(task(), tmp_path / "task")
    for path in (tmp_path / "task").iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().rstrip(b"\n").replace(b"\n", b"\r\n"))
    for name, folder in (("unix", task()), ("windows", tmp_path / "task")):
        assert run(words(tmp_path / name, task=folder, steps=3)) == 0
    assert outcome(tmp_path / "unix")[0] == outcome(tmp_path / "windows")[0]


def test_one_file_is_split_and_the_run_says_how(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(30)))
    assert run(words(tmp_path / "run", task=tmp_path / "rows.jsonl", steps=1)) == 0
    out = capsys.readouterr().out
    assert "is split into train, validation and test" in out
    assert "24 rows to train on, 3 of test to report on" in out


def test_a_task_to_measure_on_needs_no_rows_to_train_on_and_one_to_train_on_does(tmp_path, capsys):
    only = write(tmp_path / "only", test=rows(5))
    assert run(words(None, "--eval-only", task=only)) == 0
    fails(words(tmp_path / "run", task=only), capsys, "no rows to train on", "train.jsonl")
    assert "before" not in capsys.readouterr().out
    one = write(tmp_path / "one", train=rows(1), validation=rows(5))
    fails(
        words(tmp_path / "run", task=one, eval_every=1),
        capsys,
        "no rows to train on",
        "--eval-every",
    )
    assert run(words(tmp_path / "run", task=one, steps=2)) == 0


# Mistakes


LIMITS = """
    steps 0 at least 1
    batch-size 0 at least 1
    micro-batch-size -1 at least 1
    eval-batch-size 0 at least 1
    save-every 0 at least 1
    shots 0 at least 1
    max-length 0 at least 1
    max-new-tokens 0 at least 1
    eval-every -1 at least 0
    cap 0 at least 1
    patience -1 at least 0
    seed -1 at least 0
    seed 4294967296 below 4294967296
    lr 0.0 above 0
    lr -1.0 above 0
    lr nan above 0
    lr inf above 0
    clip 0.0 above 0
    dropout 1.0 below 1
    dropout -0.1 at least 0
    dropout nan at least 0
    warmup-ratio 1.0 below 1
    warmup-ratio -0.5 at least 0
    weight-decay -1.0 at least 0
    lr 1e+38 below 1e+32
"""
LIMITS = [line.strip().split(" ", 2) for line in LIMITS.strip().splitlines()]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--modle", "x"], ["'--modle' is no flag", "did you mean --model?", "--help"]),
        (["--step=3"], ["'--step=3'", "did you mean --steps?"]),
        (["--eval_every", "3"], ["did you mean --eval-every?"]),
        (["--frobnicate"], ["'--frobnicate' is no flag"]),
        (["rte"], ["'rte' is no flag"]),
        ([""], ["'' is no flag"]),
        (["--steps"], ["--steps", "expected one argument"]),
        (["--steps", "many"], ["--steps", "'many'", "int"]),
        (["--steps", "1.5"], ["--steps", "'1.5'"]),
        (["--lr", "fast"], ["--lr", "'fast'", "float"]),
        (["--eval-only=yes"], ["--eval-only"]),
        (["--patience", "2"], ["--patience", "--eval-every"]),
        (["--losses", "lm,xx"], ["--losses is 'lm,xx'", "lm,ul,ln"]),
        (["--sites", "k,x"], ["--sites is 'k,x'", "some of k,v,ff,q,o,up,gate, none twice"]),
        (["--sites", "k,"], ["--sites is 'k,'"]),
        (["--sites", "k,v,k"], ["--sites is 'k,v,k'", "none twice"]),
        (["--where", "q,ff"], ["--where is 'q,ff'", "some of k,v,down,q,o,up,gate"]),
        (["--losses", "lm,lm"], ["--losses is 'lm,lm'", "none twice"]),
        (["--losses", ""], ["--losses is ''"]),
        (["--out", ""], ["--out is '', expected str"]),
        (["--adapter", ""], ["--adapter is '', expected str"]),
        (["--dtype", "float16"], ["--dtype is 'float16'", "float32", "bfloat16"]),
        (["--method", "prefix"], ["--method is 'prefix'", "ia3", "none"]),
        (["--rank", "0"], ["--rank is 0", "at least 1"]),
        (["--alpha", "0"], ["--alpha is 0", "at least 1"]),
        (["--rank", "4"], ["--rank is for --method lora", "found --method ia3"]),
        (
            ["--method", "lora", "--sites", "k"],
            ["--sites is for --method ia3", "found --method lora"],
        ),
        (
            ["--method", "lora", "--rank", "4", "--init", "x"],
            ["--rank is of a new LoRA", "--adapter brings its own"],
        ),
        (["--method", "icl"], ["--method icl", "say how many with --shots"]),
        (["--adapters", "two"], ["--adapters is 'two'", "each", "one"]),
        (
            ["--method", "lora", "--optimizer", "adafactor"],
            ["--optimizer adafactor", "B begins at 0", "use adamw"],
        ),
        (["--method", "full", "--optimizer", "adafactor"], ["--optimizer adafactor", "use adamw"]),
        (["--method", "full", "--adapter", "x"], ["--method full", "--model"]),
        (["--seed", "0,x"], ["--seed", "'0,x'", "int"]),
        (["--seed", "0,-1"], ["--seed is -1", "at least 0"]),
        (["--lr", "1e-3,0"], ["--lr is 0.0", "above 0"]),
        (["--task", "rte,"], ["--task is ''", "str"]),
        (["--optimizer", "sgd"], ["--optimizer is 'sgd'", "adafactor", "adamw"]),
        *[([f"--{flag}", value], [f"--{flag} is {value}", limit]) for flag, value, limit in LIMITS],
    ],
)
def test_a_bad_flag_is_one_line_before_anything_is_written(
    arguments, parts, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    fails(arguments, capsys, *parts)
    assert list(tmp_path.iterdir()) == []


def test_each_flag_with_limits_is_tried_above():
    (mark,) = test_a_bad_flag_is_one_line_before_anything_is_written.pytestmark
    tried = {arguments[0] for arguments, _ in mark.args[1]}
    limited = {f.name for f in dataclasses.fields(train.Config) if f.metadata["limits"]}
    assert {f"--{name.replace('_', '-')}" for name in limited} <= tried


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"model": "t5-bsae"}, ["t5-bsae", "did you mean t5-base?"]),
        ({"model": "nowhere/to/be/found"}, ["nowhere/to/be/found", "Known names"]),
        ({"task": "rt"}, ["'rt' is not a known task", "did you mean 'rte'?", "Known tasks"]),
        ({"task": "nowhere.jsonl"}, ["nowhere.jsonl", "is not a known task, a file or a folder"]),
        ({"adapter": "nowhere"}, ["nowhere", "expected the folder or file of an adapter"]),
        ({"device": "gpu"}, ["--device is 'gpu'", "expected cpu or cuda"]),
        ({"device": "meta"}, ["--device is 'meta'", "expected cpu or cuda"]),
        ({"shots": 21}, ["expected 1 to 20 shots", "found 21"]),
        ({"task": task((0,)), "losses": "ul,ln"}, ["--losses ul,ln lacks lm"]),
        ({"eval_prompt": 1}, ["--eval-prompt is 1", "some of 0 to 0"]),
        ({"max_length": 1}, ["does not fit into max_length 1"]),
    ],
)
def test_what_is_not_there_is_one_line_and_leaves_nothing_behind(
    values, parts, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fails(words(tmp_path / "run", **values), capsys, *parts)
    assert list(tmp_path.iterdir()) == []


def test_a_row_to_train_on_that_cannot_be_cut_to_fit_is_found_before_anything_is_measured(
    tmp_path, capsys
):
    long = {
        "input": "\N{SNOWMAN}" * 20,
        "choices": ["no", "yes"],
        "label": 0,
    }  # 20 characters without a space, 60 bytes
    short = {**long, "input": "red"}
    split = write(tmp_path / "task", train=[short, long], validation=[short])
    own = {"model": "tiny-t5", "task": split, "max_length": 30}
    fails(words(tmp_path / "run", **own), capsys, "row 1 does not fit into max_length 30")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_cuda_where_there_is_none_is_one_line(tmp_path, capsys):
    fails(words(tmp_path / "run", device="cuda"), capsys, "--device is 'cuda'")


def test_every_bad_row_is_named_in_one_line(tmp_path, capsys):
    bad = write(tmp_path / "task", test=rows(3))
    lines = [
        "{",
        "[]",
        '{"input": "a"}',
        '{"input": "", "target": "b"}',
        '{"input": "a", "choices": ["b"]}',
        "{",
    ]
    (bad / "train.jsonl").write_text("\n".join(lines))
    fails(
        words(tmp_path / "run", task=bad),
        capsys,
        *[f"train.jsonl:{i}: " for i in range(1, 6)],
        "and 1 more",
    )
    (bad / "train.jsonl").write_text("")
    fails(words(tmp_path / "run", task=bad), capsys, "train.jsonl: no rows")


def test_an_adapter_of_another_model_is_one_line(tmp_path, capsys):
    assert run(words(tmp_path / "llama", model=model("llama"), steps=1)) == 0
    with warnings.catch_warnings(record=True) as more_lines:
        wrong = words(tmp_path / "run", adapter=tmp_path / "llama" / "adapter")
        fails(wrong, capsys, "an adapter of another base", "expected none")
    assert more_lines == []
    tensors = adapter(tmp_path / "llama")
    folder = tmp_path / "wrong"
    shutil.copytree(tmp_path / "llama" / "adapter", folder)
    save_file({name: x[:1] for name, x in tensors.items()}, folder / "adapter_model.safetensors")
    fails(
        words(tmp_path / "run", model=model("llama"), adapter=folder), capsys, "of 1, expected 12"
    )


def test_an_adapter_of_another_base_is_a_note(tmp_path, capsys):
    assert run(words(tmp_path / "run", steps=1)) == 0
    capsys.readouterr()
    other = {"model": model("t5", seed=1), "adapter": tmp_path / "run" / "adapter"}
    with warnings.catch_warnings(record=True) as more_lines:
        assert run(words(None, "--eval-only", **other)) == 0
    assert (
        f"adapter was trained on {model('t5')}, and this model is {model('t5', seed=1)}\n"
        in capsys.readouterr().out
    )
    assert more_lines == []


def test_a_data_folder_that_is_not_there_is_one_line(tmp_path, capsys, monkeypatch):
    no_network = lambda *args, **options: (_ for _ in ()).throw(OSError("no network"))  # noqa: E731
    monkeypatch.setattr("minia3.tasks.download.urlopen", no_network)
    data = tmp_path / "data"
    fails(
        words(tmp_path / "run", task="rte", data_dir=data),
        capsys,
        "no network",
        data / "rte",
        "by hand",
    )
    (tmp_path / "file").write_text("mine")
    fails(
        words(tmp_path / "run", task="rte", data_dir=tmp_path / "file"),
        capsys,
        tmp_path / "file",
        "by hand",
    )


# Runs that fail


def test_a_loss_that_is_not_finite_stops_the_run_with_the_step_and_what_to_try(
    tmp_path, capsys, monkeypatch
):
    original, calls = train.total_loss, []

    def total_loss(*args, **options):
        calls.append(None)
        return original(*args, **options) * (float("nan") if len(calls) == 7 else 1)

    monkeypatch.setattr(train, "total_loss", total_loss)
    fails(words(tmp_path / "run"), capsys, "the loss of step 7 is nan", "--lr", "--dtype", code=1)
    *lines, failed = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1]
    assert failed["event"] == "failed"
    assert "step 7" in failed["reason"]


def test_a_learning_rate_that_explodes_stops_the_run(tmp_path, capsys):
    fails(
        words(tmp_path / "run", lr=1e30),
        capsys,
        "the loss of step ",
        " is nan: ",
        "try a lower --lr",
        code=1,
    )


def test_a_gpu_that_is_full_is_one_line_with_the_flag_to_lower(tmp_path, capsys, monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has " + "many words " * 50
        )

    monkeypatch.setattr(train, "choice_logprobs", full)
    fails(words(tmp_path / "run"), capsys, "CUDA out of memory", "lower --micro-batch-size", code=1)
    monkeypatch.setattr(train, "evaluate", full)
    fails(words(tmp_path / "other"), capsys, "CUDA out of memory", "--eval-batch-size", code=1)
    assert not (tmp_path / "other").exists()  # so that the same command with other flags can begin


# What is printed


def test_help_explains_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        run(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    explained = [" ".join(part.split()) for part in text.split("options:")[1].split("\n  --")[1:]]
    fields = dataclasses.fields(train.Config)
    assert len(explained) == len(fields)
    for field, words_of in zip(fields, explained, strict=True):
        name, *rest = words_of.split()
        assert name.rstrip(",") == field.name.replace(
            "_", "-"
        )  # Python 3.13 has a comma before another name
        assert len(rest) > 4
        if field.default not in (None, False, 0):
            assert f"(default: {field.default})" in words_of
        assert "(default: " in words_of, name
    assert text.count("python train.py") >= 4


def test_progress_is_plain_lines_where_stderr_is_no_terminal(tmp_path, capsys):
    assert run(words(tmp_path / "run", eval_every=6)) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "\r" not in out
    lines = [line for line in out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["1", "6", "10", "12", "12"]
    for unit in ("loss ", "lr ", "examples/s", "tokens/s", "MB"):
        assert unit in lines[0]
    assert "held out" in lines[1]


def test_the_end_is_one_short_table(tmp_path, capsys):
    assert run(words(tmp_path / "run")) == 0
    final = metrics(tmp_path / "run")[-1]
    head, *table = capsys.readouterr().out.split("\n\n")[-1].splitlines()
    assert head == "task-2: 12 rows of test"
    cells = {line[2:14].strip(): line[14:] for line in table}
    assert (
        cells["accuracy"] == f"{final['accuracy_before']:.1%} before, {final['accuracy']:.1%} after"
    )
    assert cells["AUC"] == f"{final['auc_before']:.2f} before, {final['auc']:.2f} after"
    assert cells["trained"] == f"448 of 23,512 numbers ({448 / 23512:.3%})"
    assert cells["adapter"] == str(tmp_path / "run" / "adapter")
    assert cells["time"].endswith(" s for 12 steps")
    assert cells["memory"].endswith(" MB at the most")
    assert cells["use it"].startswith("python train.py --model ")


def test_the_device_the_model_and_the_share_of_its_numbers_are_said_at_the_beginning(
    tmp_path, capsys
):
    assert run(words(tmp_path / "run", steps=1)) == 0
    device, name, of_task, *_ = capsys.readouterr().out.splitlines()
    assert device == "device   cpu (as asked), float32"
    assert name == f"model    {model('t5')}: 23,512 numbers, and 448 that train ({448 / 23512:.3%})"
    assert of_task == "task     task-2: 20 rows to train on, 12 of test to report on"


@pytest.mark.parametrize(
    ("found", "method", "said"),
    [
        (False, "ia3", "device   cpu (no CUDA GPU found), float32"),
        (True, "ia3", "device   cuda (H100), bfloat16"),
        (True, "full", "device   cuda (H100), float32"),
    ],
)
def test_without_a_flag_it_runs_on_cuda_where_there_is_a_gpu_and_says_why(
    found, method, said, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    monkeypatch.setattr("minia3.training.cell.load_task", lambda *args: 0 / 0)
    with pytest.raises(ZeroDivisionError):
        run(words(tmp_path / "run", device=None, method=method))
    assert capsys.readouterr().out.splitlines()[0] == said


@contextlib.contextmanager
def terminal(name):
    """stderr is the terminal `name`."""
    os.dup2(os.open(name, os.O_WRONLY), 2)
    yield


def test_progress_is_a_bar_in_a_terminal(tmp_path):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 160, 0, 0))  # lines, columns
    process = start(
        words(tmp_path / "run"), tmp_path / "log", functools.partial(terminal, os.ttyname(theirs))
    )
    assert finish(process) == 0
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal is an error
        while part := os.read(ours, 1 << 16):
            shown += part
    os.close(ours)
    text = shown.decode()
    assert "\r" in text
    last = text.rstrip().split("\r")[-1]
    for unit in ("12/12", "step/s", "loss ", "lr ", "examples/s", "tokens/s", "MB"):
        assert unit in last
    assert not any(line.startswith("step ") for line in (tmp_path / "log").read_text().splitlines())


# As a newcomer runs it


def test_the_script_runs_from_anywhere_with_the_embedded_model(tmp_path):
    words = ["--device", "cpu", "--method", "none", "--eval-batch-size", "64"]
    command = [sys.executable, str(running.ROOT / "train.py"), *words]
    environ = {**os.environ, "PYTHONPATH": str(running.ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    final = metrics(tmp_path / "runs" / "tiny-t5-same-colour-none-0")[-1]
    assert (final["model"], final["task"], final["total"], final["rows"]) == (
        "tiny-t5",
        "same-colour",
        218_112,
        1024,
    )


def test_a_run_does_not_wait_for_torch_s_compiler(tmp_path):
    code = "import sys, train; sys.exit(train.main(sys.argv[1:]) or 'torch._dynamo' in sys.modules)"
    command = [sys.executable, "-c", code, *map(str, words(tmp_path / "run", steps=2))]
    environ = {**os.environ, "PYTHONPATH": str(running.ROOT)}
    assert subprocess.run(command, env=environ, stdout=subprocess.DEVNULL).returncode == 0
    assert metrics(tmp_path / "run")[-1]["steps"] == 2


def test_batches_of_similar_lengths_are_a_flag_and_off_by_default(tmp_path, monkeypatch):
    lengths, order = [], order_rows
    monkeypatch.setattr(
        "minia3.training.cell.order", lambda *args: lengths.append(args[3]) or order(*args)
    )
    for name, flags in (("plain", []), ("similar", ["--similar-lengths"])):
        assert run(words(tmp_path / name, *flags)) == 0
    assert lengths[0] is None
    assert lengths[1] == [len(row["input"]) for row in minia3.load_task(task()).train]


@pytest.mark.parametrize("flag", ["--checkpoint", "--compile"])
def test_a_flag_that_saves_memory_or_time_changes_no_result(flag, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: seen.append(how))
    seen, results = [], []
    for name, flags in (("plain", []), ("other", [flag])):
        assert run(words(tmp_path / name, *flags)) == 0
        results.append(outcome(tmp_path / name))
    assert results[0] == results[1]
    assert seen == [{"dynamic": True}] * (4 if flag == "--compile" else 0)
