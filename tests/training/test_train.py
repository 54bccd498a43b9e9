"""train.py computes what its flags and T-Few's recipe say: runs equal loops written out here."""

import json
import os
import shutil
import subprocess
import sys
from itertools import product

import numpy as np
import pytest
import running
import torch
from running import last_vectors, metrics, model, outcome, rows, run, task, words, write
from torch.utils.checkpoint import checkpoint
from written_out import KINDS, batches, expected_loss, read

import minia3
from minia3.adapters.lora import add_lora
from minia3.checkpoints.load import load_model
from minia3.model.blocks import Block
from minia3.training.optimizer import Adafactor

LOSSES = ("lm,ul,ln", "ul", "lm,ln")


@pytest.mark.parametrize(
    ("kind", "losses"), [x for x in product(KINDS, LOSSES) if x != ("targets", "ul")]
)
@pytest.mark.parametrize("name", ["t5", "llama"])
def test_the_first_loss_is_the_loss_of_the_base_on_the_first_batch(name, kind, losses, tmp_path):
    folder = task(KINDS[kind])
    flags = {"model": model(name), "task": folder, "losses": losses, "seed": 4, "max_new_tokens": 2}
    assert run(words(tmp_path / "run", steps=1, dropout=0, **flags)) == 0
    ours = minia3.load_model(model(name))
    tokenizer = minia3.load_tokenizer(model(name))
    train_rows = read(folder / "train.jsonl")
    with torch.no_grad():
        expected = expected_loss(
            ours, tokenizer, [train_rows[i] for i in batches(20, 4, 4)[0]], losses
        )
    found = metrics(tmp_path / "run")[1]
    assert (found["event"], found["step"]) == ("train", 1)
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_the_loss_and_gradient_of_a_step_are_those_written_out(
    micro_batch_size, tmp_path, monkeypatch
):
    """The steps of Adafactor and AdamW would not show a gradient of another size."""
    found = []
    clip = Adafactor.clip

    def spy(optimizer, largest_norm):
        found.extend(table.grad.clone() for table in optimizer.tables)
        clip(optimizer, largest_norm)

    monkeypatch.setattr(Adafactor, "clip", spy)
    flags = {"task": task((2, 3, 1)), "seed": 2, "dropout": 0, "dtype": "float64"}
    flags |= {"steps": 1, "micro_batch_size": micro_batch_size}
    assert run(words(tmp_path / "run", **flags)) == 0

    ours = minia3.load_model(model("t5"), dtype=torch.float64).double()
    minia3.freeze(ours)
    tokenizer = minia3.load_tokenizer(model("t5"))
    train_rows = read(task((2, 3, 1)) / "train.jsonl")
    batch = [train_rows[i] for i in batches(20, 4, 2)[0]]
    loss = expected_loss(ours, tokenizer, batch, "lm,ul,ln")
    expected = torch.autograd.grad(loss, list(minia3.vectors(ours).values()))
    for gradient, expected_gradient in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-12)
    line = metrics(tmp_path / "run")[1]  # the losses of micro-batches add up
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-8)


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw"])
def test_a_run_is_the_loop_written_out_with_the_optimizers_of_transformers_and_torch(
    optimizer, tmp_path
):
    transformers = pytest.importorskip("transformers")
    flags = {
        "steps": 7,
        "warmup_ratio": 0.4,
        "lr": 0.03,
        "clip": 0.5,
        "weight_decay": 0.1 if optimizer == "adamw" else 0.0,
        "optimizer": optimizer,
    }
    out = tmp_path / "run"
    assert run(words(out, task=task((2, 3, 1)), seed=2, dropout=0, dtype="float64", **flags)) == 0

    ours = minia3.load_model(model("t5"), dtype=torch.float64).double()
    tokenizer = minia3.load_tokenizer(model("t5"))
    minia3.freeze(ours)
    parameters = {
        name: torch.nn.Parameter(v.detach()[0].clone()) for name, v in minia3.vectors(ours).items()
    }
    if optimizer == "adafactor":
        optimizer = transformers.Adafactor(
            parameters.values(), lr=0.03, relative_step=False, scale_parameter=True
        )
    else:
        optimizer = torch.optim.AdamW(parameters.values(), lr=0.03, weight_decay=0.1)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 3, 7)
    train_rows = read(task((2, 3, 1)) / "train.jsonl")
    losses = []
    for batch in batches(20, 4, 2)[:7]:
        tables = minia3.vectors(ours)
        with torch.no_grad():
            for name, p in parameters.items():
                tables[name].copy_(p[None])
        loss = expected_loss(ours, tokenizer, [train_rows[i] for i in batch], "lm,ul,ln")
        gradients = torch.autograd.grad(loss, list(tables.values()))
        norm = torch.sqrt(sum(g.square().sum() for g in gradients))
        assert norm > 0.5  # else clipping is not seen
        for p, g in zip(parameters.values(), gradients, strict=True):
            p.grad = g[0] * 0.5 / (norm + 1e-6)  # as in torch's clip_grad_norm_
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    found = last_vectors(out)
    assert found.keys() == parameters.keys()
    for name, p in parameters.items():
        torch.testing.assert_close(found[name][0], p.detach(), rtol=1e-9, atol=1e-10)
    first, rest = (line["loss"] for line in metrics(out) if line["event"] == "train")
    assert first == pytest.approx(losses[0], rel=1e-9)
    # A line has the mean since the line before.
    assert rest == pytest.approx(np.mean(losses[1:]), rel=1e-9)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_lora_and_full_fine_tuning_are_the_loop_written_out_with_torchs_adamw(method, tmp_path):
    flags = {"steps": 7, "warmup_ratio": 0.4, "lr": 0.01, "clip": 0.5, "weight_decay": 0.1}
    exact = {"task": task((2, 3, 1)), "seed": 2, "dropout": 0, "dtype": "float64"}
    out = tmp_path / "run"
    assert run(words(out, method=method, **exact, **flags)) == 0

    ours = minia3.load_model(model("t5"), dtype=torch.float64)
    tokenizer = minia3.load_tokenizer(model("t5"))
    if method == "lora":
        parameters = add_lora(ours, rank=8, alpha=16, where=("q", "v"), seed=2)
    else:
        ours.requires_grad_(True)
        parameters = dict(ours.named_parameters())
        for name in minia3.vectors(ours):
            parameters.pop(f"{name}.scale").requires_grad_(False)
    ours.double()
    optimizer = torch.optim.AdamW(parameters.values(), weight_decay=0.1)
    train_rows = read(task((2, 3, 1)) / "train.jsonl")
    losses = []
    rates = [0, 0.01 / 3, 0.02 / 3, 0.01, 0.0075, 0.005, 0.0025]  # up in 3 steps, down in 4
    for rate, batch in zip(rates, batches(20, 4, 2), strict=False):
        optimizer.zero_grad()
        loss = expected_loss(ours, tokenizer, [train_rows[i] for i in batch], "lm,ul,ln")
        loss.backward()
        norm = torch.sqrt(sum(p.grad.square().sum() for p in parameters.values()))
        assert norm > 0.5  # else clipping is not seen
        for p in parameters.values():
            p.grad *= 0.5 / (norm + 1e-6)  # as in torch's clip_grad_norm_
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        losses.append(loss.item())
    found = last_vectors(out)
    for name, p in parameters.items():
        torch.testing.assert_close(found[name], p.detach(), rtol=1e-9, atol=1e-10)
    first, rest = (line["loss"] for line in metrics(out) if line["event"] == "train")
    assert first == pytest.approx(losses[0], rel=1e-9)
    assert rest == pytest.approx(np.mean(losses[1:]), rel=1e-9)


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
    whole = last_vectors(tmp_path / "whole")
    parts = last_vectors(tmp_path / "parts")
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-9, atol=1e-9)
    assert max((whole[name] - 1).abs().max() for name in whole) > 1e-4


def test_only_the_shots_are_trained_on_and_they_are_t_fews(tmp_path):
    train_rows = read(task() / "train.jsonl")
    np.random.seed(3)
    np.random.shuffle(train_rows)
    test = {split: read(task() / f"{split}.jsonl") for split in ("validation", "test")}
    same = write(tmp_path / "same", train=train_rows[:6], **test)
    assert run(words(tmp_path / "shots", seed=3, shots=6)) == 0
    assert run(words(tmp_path / "rows", seed=3, task=same)) == 0
    assert outcome(tmp_path / "shots")[0] == outcome(tmp_path / "rows")[0]


def test_a_batch_larger_than_the_data_holds_several_epochs(tmp_path):
    few = write(tmp_path / "few", train=rows(3), validation=rows(4, seed=1))
    assert run(words(tmp_path / "run", task=few, batch_size=7, steps=2, dropout=0)) == 0
    ours = minia3.load_model(model("t5"))
    tokenizer = minia3.load_tokenizer(model("t5"))
    with torch.no_grad():
        expected = expected_loss(
            ours, tokenizer, [rows(3)[i] for i in batches(3, 7, 0)[0]], "lm,ul,ln"
        )
    assert metrics(tmp_path / "run")[1]["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_the_same_seed_is_the_same_run_and_another_one_is_not(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(name) + seed)  # what the process drew before does not matter
        assert run(words(tmp_path / name, seed=seed, steps=3, dropout=0.3)) == 0
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")
    assert outcome(tmp_path / "a")[0] != outcome(tmp_path / "c")[0]


def test_dropout_is_drawn_by_the_seed(tmp_path):
    # No seed changes the order of a single row.
    folder = write(tmp_path / "single", train=rows(1), test=rows(3, seed=1))
    losses = {}
    for seed, dropout in product((0, 1), (0, 0.5)):
        out = tmp_path / f"{seed}-{dropout}"
        assert run(words(out, task=folder, seed=seed, dropout=dropout, steps=1)) == 0
        losses[seed, dropout] = metrics(out)[1]["loss"]
    assert losses[0, 0] == losses[1, 0]
    assert losses[0, 0.5] != losses[1, 0.5]


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_dropout_comes_from_the_flag_or_the_config_and_is_off_in_evaluation(name, tmp_path):
    configured = {"t5": "0.1", "llama": "0.0"}[name]
    for dropout in (None, configured, 0.4):
        flags = {"model": model(name), "dropout": dropout, "steps": 2, "warmup_ratio": 0}
        assert run(words(tmp_path / str(dropout), **flags)) == 0
    none, same, more = (tmp_path / str(dropout) for dropout in (None, configured, 0.4))
    assert outcome(none) == outcome(same)
    assert metrics(more)[1]["loss"] != metrics(none)[1]["loss"]
    assert metrics(more)[0] == metrics(none)[0]


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_vectors_of_a_bfloat16_model_are_float32_and_make_steps_that_bfloat16_would_lose(
    name, tmp_path
):
    assert run(words(tmp_path / "run", model=model(name), dtype="bfloat16", lr=1e-4, steps=3)) == 0
    trained = last_vectors(tmp_path / "run")
    assert {v.dtype for v in trained.values()} == {torch.float32}
    moved = torch.cat([(v - 1).flatten() for v in trained.values()])
    assert 0 < moved.abs().max() < 1e-3


def test_float64_is_float64_throughout(tmp_path):
    assert run(words(tmp_path / "run", dtype="float64", steps=2)) == 0
    assert {v.dtype for v in last_vectors(tmp_path / "run").values()} == {torch.float64}


def test_only_the_vectors_are_trained(tmp_path, monkeypatch):
    loaded = []
    original = load_model
    monkeypatch.setattr(
        "minia3.training.group.load_model",
        lambda *a, **o: loaded.append(original(*a, **o)) or loaded[-1],
    )
    assert run(words(tmp_path / "run", steps=3, lr=0.1)) == 0
    fresh = original(model("t5"))
    (trained,) = loaded
    moving = minia3.vectors(fresh).keys()
    for (name, before), after in zip(fresh.named_parameters(), trained.parameters(), strict=True):
        is_vector = name.removesuffix(".scale") in moving
        assert torch.equal(before, after) != is_vector, name
        # If others required a gradient, the backward pass would keep more.
        assert after.requires_grad == is_vector, name
    assert not trained.training


def test_recompute_changes_no_result(tmp_path, monkeypatch):
    seen = []

    def spy(*args, **options):
        seen.append(args)
        return checkpoint(*args, **options)

    monkeypatch.setattr("minia3.model.recompute.checkpoint", spy)
    assert run(words(tmp_path / "plain")) == 0
    assert not seen
    assert run(words(tmp_path / "recomputed", "--recompute")) == 0
    assert seen
    assert outcome(tmp_path / "recomputed") == outcome(tmp_path / "plain")


def test_compile_asks_for_one_graph_for_all_lengths(tmp_path, monkeypatch):
    """That it changes no result is tested without a run: tests/model/test_compile.py."""
    seen = []

    def spy(module, **options):
        seen.append((type(module), options))

    monkeypatch.setattr(torch.nn.Module, "compile", spy)
    assert run(words(tmp_path / "run", "--compile", steps=1)) == 0
    assert seen == [(Block, {"dynamic": True})] * 4


# A user's data


def test_windows_line_ends_and_a_byte_order_mark_do_not_matter(tmp_path):
    shutil.copytree(task(), tmp_path / "task")
    for path in (tmp_path / "task").iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().rstrip(b"\n").replace(b"\n", b"\r\n"))
    for name, folder in (("unix", task()), ("windows", tmp_path / "task")):
        assert run(words(tmp_path / name, task=folder, steps=3)) == 0
    assert outcome(tmp_path / "unix")[0] == outcome(tmp_path / "windows")[0]


def test_a_single_file_is_split_and_the_run_says_so(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(30)))
    assert run(words(tmp_path / "run", task=tmp_path / "rows.jsonl", steps=1)) == 0
    out = capsys.readouterr().out
    assert "is split into train, validation and test" in out
    assert "24 rows to train on, 3 rows of test to report on" in out


# As a newcomer runs it


@pytest.mark.slow
def test_the_script_runs_from_any_folder_with_the_embedded_model(tmp_path):
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


@pytest.mark.slow
def test_a_run_does_not_import_torchs_compiler(tmp_path):
    code = "import sys, train; sys.exit(train.main(sys.argv[1:]) or 'torch._dynamo' in sys.modules)"
    command = [sys.executable, "-c", code, *map(str, words(tmp_path / "run", steps=2))]
    environ = {**os.environ, "PYTHONPATH": str(running.ROOT)}
    assert subprocess.run(command, env=environ, stdout=subprocess.DEVNULL).returncode == 0
    assert metrics(tmp_path / "run")[-1]["steps"] == 2
