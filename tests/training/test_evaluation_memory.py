"""A run knows before it evaluates whether a batch fits into memory, and says what does."""

import contextlib
import functools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peaks import peak_beyond_weights
from running import fails, model, rows, run, words, write
from torch_version import counted_with_this_torch

import minia3
from minia3.checkpoints.known_models import KNOWN_MODELS
from minia3.inference import scoring
from minia3.inference.decoding import generate
from minia3.inference.scoring import choice_logprobs
from minia3.training import evaluation_memory, memory_fit
from minia3.training.evaluation_memory import peaks_of_evaluation, planned_evaluation
from minia3.training.memory_plan import MemoryCounter, StepShape

SMALL = dict.fromkeys(("n_layers", "n_decoder_layers"), 2)
CONFIGS = {
    "t5": replace(KNOWN_MODELS["t5-small"].config, vocab_size=256, **SMALL),
    "llama": replace(KNOWN_MODELS["smollm2-135m"].config, vocab_size=256, n_layers=2),
}


def real_peak(name, shape):
    """Return what the tensors of a real evaluation take beyond the weights."""
    loaded = minia3.load_model(name)
    with torch.no_grad():
        return peak_beyond_weights(loaded, shape, lambda batch: choice_logprobs(loaded, batch))


def peak_of_evaluation(*arguments):
    """Return what the tensors of an evaluation take on fake tensors."""
    return peaks_of_evaluation(*arguments).max()


# The last shape scores its choices in turns.
@pytest.mark.parametrize("shape", [(4, 20, 2, 3), (16, 9, 3, 2), (300, 3, 8, 3)])
@pytest.mark.parametrize("name", ["t5", "llama"])
def test_the_plan_is_what_a_real_evaluation_takes(name, shape):
    config = minia3.load_model(model(name)).config
    planned = peak_of_evaluation(config, torch.float32, StepShape(*shape))
    assert planned == pytest.approx(real_peak(model(name), shape), rel=0.05)


def test_choices_of_a_divided_base_take_no_turns_in_the_plan_either(monkeypatch):
    shape = (300, 3, 8, 3)
    divided = minia3.load_model("tiny-t5")
    in_turns = planned_evaluation(SimpleNamespace(model=divided), StepShape(*shape))
    divided.shards = "of some processes"
    at_once = planned_evaluation(SimpleNamespace(model=divided), StepShape(*shape))
    assert at_once > 1.2 * in_turns
    monkeypatch.setattr(scoring, "is_sharded", lambda model: True)
    assert at_once == pytest.approx(real_peak("tiny-t5", shape), rel=0.02)


def test_a_plan_for_a_text_is_enough_to_generate_it():
    loaded = minia3.load_model("tiny-t5")
    tokenizer = minia3.load_tokenizer("tiny-t5")
    counter = MemoryCounter()
    for tensor in loaded.parameters():
        counter.add(tensor)
    n_before = counter.now
    source = [[5] * 40] * 8
    with counter:
        generate(loaded, tokenizer, source, max_new_tokens=30)
    planned = peak_of_evaluation(loaded.config, torch.float32, StepShape(8, 40, 1, 30))
    assert counter.peak - n_before <= planned


DEEP = {
    "t5": replace(CONFIGS["t5"], n_layers=12, n_decoder_layers=12),
    "llama": replace(CONFIGS["llama"], n_layers=12, n_kv_heads=9),
}


# With three layers, a T5's encoder takes the most, and a LLaMA's prompt. With twelve layers it is
# the choices, because the keys and values of all layers are there.
@counted_with_this_torch
@pytest.mark.parametrize("shape", [(4, 32, 2, 4), (4, 128, 2, 4), (4, 32, 1, 4)])
@pytest.mark.parametrize("kind", DEEP)
def test_layers_beyond_the_fourth_are_like_the_fourth(kind, shape):
    shape = StepShape(*shape)
    embed = SimpleNamespace(weight=torch.zeros(1))
    group = SimpleNamespace(model=SimpleNamespace(config=DEEP[kind], embed=embed))
    expected = peak_of_evaluation(DEEP[kind], torch.float32, shape)
    assert planned_evaluation(group, shape) == expected


# Runs

PEAKS = functools.cache(peaks_of_evaluation)


@pytest.fixture
def plans_once(monkeypatch):
    """Plan each shape once, because the runs below evaluate the same batches."""
    monkeypatch.setattr(evaluation_memory, "peaks_of_evaluation", PEAKS)


@pytest.mark.parametrize("flags", [[], ["--eval-only"]])
def test_a_batch_that_does_not_fit_is_a_note_with_the_size_that_does(
    flags, tmp_path, capsys, monkeypatch, plans_once
):
    monkeypatch.setattr(evaluation_memory, "free_memory", lambda device: 2e6)
    monkeypatch.setattr(memory_fit, "limited_memory", contextlib.nullcontext)
    data = write(tmp_path / "task", train=rows(20), validation=rows(150))
    sizes = {"task": data, "steps": 1, "batch_size": 2}
    assert run(words(tmp_path / "run", *flags, eval_batch_size=150, **sizes)) == 0
    (note,) = [line for line in capsys.readouterr().out.splitlines() if "to evaluate" in line]
    assert note.startswith("note     to evaluate 150 rows at once takes about 0.0 GB, but 0.0 GB ")
    size = int(note.partition("--eval-batch-size ")[2].split()[0])
    assert 1 <= size < 150
    assert run(words(tmp_path / "fits", *flags, eval_batch_size=size, **sizes)) == 0
    assert "to evaluate" not in capsys.readouterr().out
    assert run(words(tmp_path / "next", *flags, eval_batch_size=2 * size, **sizes)) == 0
    assert "to evaluate" in capsys.readouterr().out  # so the size is the largest power of two


def test_a_small_evaluation_is_not_planned(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation_memory, "planned_evaluation", lambda *_: 0 / 0)
    assert run(words(tmp_path / "run", steps=1)) == 0


def test_the_longest_rows_are_planned_and_not_all_of_them(tmp_path, monkeypatch):
    shapes = []

    def note_shape(config, shape):
        shapes.append(shape)
        return 0

    monkeypatch.setattr(evaluation_memory, "upper_bound", note_shape)
    texts = [*(["w3"] * 10), " ".join(["w4"] * 9), " ".join(["w5"] * 7)]
    held_out = [{"input": text, "choices": ["w6", "w7 w8"], "label": 0} for text in texts]
    data = write(tmp_path / "task", train=rows(20), validation=held_out)
    assert run(words(tmp_path / "run", task=data, steps=1, eval_batch_size=2)) == 0
    assert shapes == [(2, 10, 2, 3)]  # with the end token
    targets = [{"input": row["input"], "target": "w6"} for row in held_out]
    data = write(tmp_path / "texts", train=targets, validation=targets)
    flags = {"task": data, "steps": 1, "eval_batch_size": 3, "max_new_tokens": 11}
    assert run(words(tmp_path / "texts-run", **flags)) == 0
    assert shapes[1] == (3, 10, 1, 11)


def test_shots_fill_a_source_up_to_its_greatest_length_in_the_plan(tmp_path, monkeypatch):
    shapes = []
    monkeypatch.setattr(
        evaluation_memory, "upper_bound", lambda _, shape: shapes.append(shape) or 0
    )
    few = [{"input": "w3 w4", "choices": ["w5", "w6 w7"], "label": i % 2} for i in range(4)]
    flags = {"task": write(tmp_path / "task", train=few, validation=few), "max_length": 40}
    assert run(words(tmp_path / "none", method="none", **flags)) == 0
    assert run(words(tmp_path / "icl", method="icl", shots=2, **flags)) == 0
    assert shapes == [(4, 3, 2, 3), (4, 40, 2, 3)]


def test_targets_are_planned_as_they_are_scored(tmp_path, monkeypatch, capsys):
    shapes = []
    monkeypatch.setattr(
        evaluation_memory, "upper_bound", lambda _, shape: shapes.append(shape) or 0
    )
    long = [{"input": "w3", "target": " ".join(["w4"] * 50)}]
    data = write(tmp_path / "texts", train=long, validation=long)
    flags = {"task": data, "steps": 1, "max_target_length": 7, "metric": "inverse_perplexity"}
    assert run(words(tmp_path / "run", **flags)) == 0
    assert shapes == [(1, 2, 1, 7)]

    long = [{"input": "w3", "choices": ["w4", " ".join(["w5"] * 50)], "label": 0, "idx": 5}]
    data = write(tmp_path / "choices", train=rows(9), validation=long)
    fails(
        words(tmp_path / "long", task=data, max_target_length=7), capsys, "row 5: a choice has 51"
    )


def test_the_choices_of_a_llama_are_planned_without_the_end_token_of_texts(tmp_path, monkeypatch):
    shapes = []
    monkeypatch.setattr(
        evaluation_memory, "upper_bound", lambda _, shape: shapes.append(shape) or 0
    )
    long = [{"input": "w3", "choices": ["w4", " ".join(["w5"] * 7)], "label": 0}]
    data = write(tmp_path / "choices", train=rows(9), validation=long)
    flags = {"model": model("llama"), "task": data, "steps": 1, "max_target_length": 7}
    assert run(words(tmp_path / "run", **flags)) == 0
    assert [shape[2:] for shape in shapes] == [(2, 7)]


def test_memory_that_runs_out_in_an_evaluation_is_one_line_with_the_size(
    tmp_path, capsys, monkeypatch, plans_once
):
    monkeypatch.setattr(evaluation_memory, "free_memory", lambda device: 2e6)
    monkeypatch.setattr(memory_fit, "limited_memory", contextlib.nullcontext)

    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("minia3.inference.evaluation.score_examples", full)
    data = write(tmp_path / "task", train=rows(20), validation=rows(150))
    flags = {"task": data, "steps": 1, "eval_batch_size": 150}
    assert run(words(tmp_path / "run", **flags)) == 1
    out, err = capsys.readouterr()
    size = out.partition("--eval-batch-size ")[2].split()[0]
    assert f"--eval-batch-size (try {size})" in err
    assert err.count("\n") == 1
    assert "to continue" not in err  # the folder of a new run without results is removed
    assert not (tmp_path / "run").exists()
    flags = {"task": data, "steps": None, "method": "none", "eval_batch_size": 1}
    assert run(words(tmp_path / "run", **flags)) == 1
    advice = "out of memory: use a smaller model, a shorter --max-length or --recompute: CUDA out"
    assert advice in capsys.readouterr().err


def test_a_half_of_the_rows_is_offered_if_they_are_fewer_than_a_batch(
    tmp_path, capsys, monkeypatch
):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("minia3.inference.evaluation.score_examples", full)
    data = write(tmp_path / "task", train=rows(20), validation=rows(6))
    arguments = words(tmp_path / "run", task=data, steps=1, eval_batch_size=16)
    fails(arguments, capsys, "--eval-batch-size (try 3)", code=1)
