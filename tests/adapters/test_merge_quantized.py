"""Guards minia3/adapters/merge_quantized.py: merged = applied for a quantized base, without new
codes."""

import pytest
import torch
from conftest import logits, make, off, randomize, tokens

import minia3
from minia3.model.quantized import quantized_linears

SOURCE = tokens(3, 7)
MASK = torch.tensor([[True] * 7, [False, False] + [True] * 5, [True] * 4 + [False] * 3])
TARGET = tokens(3, 5, seed=1)


@pytest.mark.parametrize("name", ["t5-v1.0", "t5-v1.1", "llama-gqa", "qwen2", "qwen3"])
def test_merged_is_applied(tmp_path, name):
    make(name).save_pretrained(tmp_path)
    model = minia3.load_model(tmp_path, dtype=torch.float64, n_adapters=3, quantize="int8")
    randomize(model, seed=1)
    before = logits(model, SOURCE, MASK, TARGET, adapter=0)
    expected = logits(model, SOURCE, MASK, TARGET, adapter=2)
    merged = minia3.merge(model, adapter=2)
    assert off(logits(merged, SOURCE, MASK, TARGET), expected) < 1e-6  # scales are float32
    assert off(before, expected) > 0.1
    assert torch.equal(logits(model, SOURCE, MASK, TARGET, adapter=0), before)

    linears = quantized_linears(model)
    for linear_name, linear in quantized_linears(merged).items():
        assert linear.codes.data_ptr() == linears[linear_name].codes.data_ptr()
    kept = [n for n, vector in minia3.vectors(merged).items() if not (vector == 1).all()]
    is_gated = name != "t5-v1.0"
    assert {vector_name.rpartition(".")[2] for vector_name in kept} == (
        set() if is_gated else {"l_ff"}
    )
    assert merged.n_adapters == 1
    assert all(len(vector) == 1 for vector in minia3.vectors(merged).values())
