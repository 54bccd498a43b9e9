"""--quantize: a run beside a quantized base is the run beside the weights that its codes mean."""

import json

import pytest
import torch
from running import (
    at_line,
    fails,
    kill_self,
    last_vectors,
    metrics,
    model,
    resume,
    run,
    task,
    words,
)

import minia3
from minia3.adapters.lora import add_lora
from minia3.cli.main import main
from minia3.model.quantized import dequantize

EXACT = {"dtype": "float64", "quantize": "int8"}


def dequantized(name, folder):
    """Save the model that --quantize int8 makes of a model as plain weights, and return where."""
    plain = minia3.load_model(model(name), dtype=torch.float64, quantize="int8")
    dequantize(plain, torch.float64)
    minia3.save_model(plain, folder, minia3.load_tokenizer(model(name)))
    return folder


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_a_run_is_that_beside_the_plain_weights_that_the_codes_mean(name, tmp_path):
    flags = {"lr": 0.1, "seed": "0,1", "micro_batch_size": 3}
    assert run(words(tmp_path / "a", model=model(name), **flags, **EXACT)) == 0
    base = dequantized(name, tmp_path / "base")
    assert run(words(tmp_path / "b", model=base, dtype="float64", **flags)) == 0
    expected = last_vectors(tmp_path / "b")
    for vector_name, vector in last_vectors(tmp_path / "a").items():
        assert (vector - expected[vector_name]).abs().max() < 1e-6
        assert (vector - 1).abs().max() > 1e-3
    for found, final in zip(metrics(tmp_path / "a"), metrics(tmp_path / "b"), strict=True):
        assert found.get("trainable") == final.get("trainable")
        assert found.get("total") == final.get("total")


def test_a_run_that_was_stopped_goes_on_with_its_quantized_base(tmp_path):
    flags = {"lr": 0.1, "quantize": "int8", "save_every": 2}
    with at_line(0, None) as executed:
        assert run(words(tmp_path / "whole", **flags)) == 0
    with at_line(len(executed) * 2 // 3, lambda: kill_self(2)):
        assert run(words(tmp_path / "part", **flags)) == 130
    assert resume(tmp_path / "part") == 0
    expected = last_vectors(tmp_path / "whole")
    for vector_name, vector in last_vectors(tmp_path / "part").items():
        assert torch.equal(vector, expected[vector_name])


def test_an_adapter_of_a_quantized_base_labels_rows_beside_it(tmp_path, capsys):
    out = tmp_path / "run"
    assert run(words(out, lr=0.3, quantize="int8")) == 0
    assert "--quantize int8" in capsys.readouterr().out.split("use it")[1]
    path = task() / "test.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    prompts = [row["input"] for row in rows]
    choices = [row["choices"] for row in rows]
    arguments = ["predict", model("t5"), path, "--adapter", out / "adapter"]
    found = {}
    for kind, flags in (("int8", ["--quantize", "int8"]), (None, [])):
        assert main([*map(str, arguments), *flags]) == 0
        lines = capsys.readouterr().out.splitlines()
        found[kind] = torch.tensor([json.loads(line)["scores"] for line in lines])
        base = minia3.load_model(model("t5"), quantize=kind)
        minia3.load_adapter(base, out / "adapter")
        expected = minia3.rank(base, minia3.load_tokenizer(model("t5")), prompts, choices)
        assert (found[kind] - expected).abs().max() < 1e-4
    assert (found["int8"] - found[None]).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_method_that_changes_weights_needs_plain_ones(method, tmp_path, capsys):
    flags = {"method": method, "quantize": "int8"}
    fails(words(tmp_path / "run", **flags), capsys, f"--quantize is not for --method {method}")


def test_neither_lora_nor_a_checkpoint_is_made_of_codes(tmp_path):
    quantized = minia3.load_model(model("llama"), quantize="int8")
    with pytest.raises(ValueError, match="a LoRA needs plain weights"):
        add_lora(quantized)
    with pytest.raises(ValueError, match="a checkpoint holds plain weights"):
        minia3.save_model(quantized, tmp_path / "model")
    assert not (tmp_path / "model").exists()
