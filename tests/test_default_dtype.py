"""A program may set torch's default dtype for its own tensors. Ours stay what they are.

In a program whose default is bfloat16, what is read from a file or kept in float32 would otherwise
be rounded without a word.
"""

import gguf
import numpy as np
import pytest
import torch
from word_models import word_tokenizer

import minia3
from minia3.adapters.dora import write_dora
from minia3.adapters.lora import add_lora
from minia3.adapters.peft_files import read_adapter
from minia3.checkpoints.gguf import read_tensor
from minia3.files.tensors import read_tensors
from minia3.model.llama import LlamaConfig, rotation_frequencies

Q8_0 = gguf.GGMLQuantizationType.Q8_0


def quantized_weight(loaded, folder):
    weight = np.random.default_rng(0).standard_normal((4, 64), np.float32)
    gguf.quants.quantize(weight, Q8_0).tofile(folder / "weight")
    return read_tensor(folder / "weight", Q8_0, (4, 64), 0)


def rope_with_factors(loaded, folder):
    factors = tuple(np.linspace(1, 32, 8).tolist())
    return rotation_frequencies(LlamaConfig(16, 16, 1, 1, 1, 1, 1, rope_factors=factors))


def lora(loaded, folder):
    return torch.cat([x.flatten() for x in add_lora(loaded("llama-gqa")).values()])


def dora(loaded, folder):
    model = loaded("llama-gqa")
    for vector in minia3.vectors(model).values():
        entries = torch.linspace(0.5, 1.5, vector.numel(), dtype=torch.float32)
        vector.data = entries.view_as(vector)
    minia3.save_model(model, folder / "base")
    minia3.save_adapter(model, folder / "ia3")
    write_dora(folder / "dora", read_adapter(folder / "ia3"), folder / "base", folder / "ia3")
    entries = read_tensors(folder / "dora" / "adapter_model.safetensors")
    return torch.cat([entry.read().flatten() for entry in entries.values()])


def beam_search(loaded, folder):
    model = loaded("t5-v1.0")
    prompts = ["w1 w2 w3", "w4"]
    options = {"beams": 4, "samples": 4, "max_new_tokens": 12}
    return minia3.generate(model, word_tokenizer(ends=True), prompts, **options)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("work", [quantized_weight, rope_with_factors, lora, dora, beam_search])
def test_the_default_dtype_changes_nothing(work, default, loaded, tmp_path):
    (tmp_path / "expected").mkdir()
    expected = work(loaded, tmp_path / "expected")
    torch.set_default_dtype(default)
    try:
        (tmp_path / "found").mkdir()
        found = work(loaded, tmp_path / "found")
    finally:
        torch.set_default_dtype(torch.float32)
    if torch.is_tensor(expected):
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)
    else:
        assert found == expected
