"""Guards GGUF files of the whole LLaMA family: they make the model that they were written from.

The files are written with the package gguf, and read again by transformers, too.
"""

import json

import gguf
import numpy as np
import pytest
import torch
import transformers
from checkpoint_folders import refusal
from conftest import logits, make, off, tokens
from test_gguf import neighbors

import minia3
from minia3.checkpoints.gguf import CONFIG, read_gguf

KINDS = gguf.GGMLQuantizationType
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
SOURCE = tokens(2, 9)
TARGET = tokens(2, 4, seed=1)


def write_model(path, model, architecture, keys=None, permuted=None):
    """Write a model of transformers as llama.cpp's converter does.

    keys: what to add to the metadata, without the architecture. permuted: whether the rows of q and
    k are neighbors (default: if the architecture is "llama").
    """
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    for key, name in CONFIG.items():
        value = {"rope_theta": config.rope_parameters["rope_theta"]}.get(name)
        value = getattr(config, name) if value is None else value
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(key.format(architecture), value)
    writer.add_uint32(f"{architecture}.vocab_size", config.vocab_size)
    head_dim = model.model.layers[0].self_attn.head_dim
    for key in ("attention.key_length", "attention.value_length"):
        writer.add_uint32(f"{architecture}.{key}", head_dim)
    for key, value in (keys or {}).items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{architecture}.{key}", value)
    if permuted is None:
        permuted = architecture == "llama"
    names = gguf.get_tensor_name_map(ARCHITECTURES[architecture], config.num_hidden_layers)
    for name, x in stored_tensors(model, permuted).items():
        stem, ending = name.rsplit(".", 1)
        writer.add_tensor(f"{names.get_name(stem)}.{ending}", x, raw_dtype=KINDS.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stored_tensors(model, permuted):
    config = model.config
    tensors = {}
    for name, x in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        x = x.numpy()
        if permuted and ".q_proj." in name:
            x = neighbors(x, config.num_attention_heads)
        elif permuted and ".k_proj." in name:
            x = neighbors(x, config.num_key_value_heads)
        tensors[name] = np.ascontiguousarray(x)
    return tensors


def their_logits(model):
    with torch.no_grad():
        return model(input_ids=torch.cat((SOURCE, TARGET), dim=1)).logits[:, -5:]


@pytest.mark.parametrize(
    ("name", "architecture", "keys"),
    [
        ("llama-gqa", "llama", {}),
        ("llama-tied", "llama", {}),
        ("qwen2", "qwen2", {}),
        ("qwen2", "llama", {}),  # a LLaMA with biases: the rows of the biases change places, too
        ("qwen3", "qwen3", {}),
        ("mistral", "llama", {"attention.sliding_window": 5}),
    ],
)
def test_a_file_makes_the_model_that_it_was_written_from(tmp_path, name, architecture, keys):
    theirs = make(name)
    path = write_model(tmp_path / "a.gguf", theirs, architecture, keys)
    model = minia3.load_model(path)
    assert off(logits(model, SOURCE, None, TARGET), their_logits(theirs)) < 1e-5
    minia3.save_model(model, tmp_path / "exported")
    model_type = json.loads((tmp_path / "exported" / "config.json").read_text())["model_type"]
    expected = theirs.config.model_type
    assert model_type == expected
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert off(their_logits(again), their_logits(theirs)) < 1e-6


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_transformers_reads_the_same_model_from_the_same_file(tmp_path, architecture):
    """transformers passes over Qwen3's key_length, and takes 128."""
    name = {"llama": "llama-mha"}.get(architecture, architecture)
    model = make(name, head_dim=128 if architecture == "qwen3" else 6)
    rotated = {} if architecture == "qwen3" else {"rope.dimension_count": 6}
    path = write_model(tmp_path / "a.gguf", model, architecture, rotated)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    )
    assert type(theirs).__name__.lower() == f"{architecture}forcausallm"
    ours = minia3.load_model(path)
    assert off(logits(ours, SOURCE, None, TARGET), their_logits(theirs.eval())) < 1e-5


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_rows_that_are_in_the_other_order_make_another_model(tmp_path, architecture):
    """The two orders differ, so the test above sees which of them a file has."""
    theirs = make("qwen2")
    wrong = architecture != "llama"
    path = write_model(tmp_path / "a.gguf", theirs, architecture, permuted=wrong)
    assert off(logits(minia3.load_model(path), SOURCE, None, TARGET), their_logits(theirs)) > 1e-2


def test_a_window_of_qwen_is_in_all_layers(tmp_path):
    theirs = make("qwen3", use_sliding_window=True, sliding_window=4, max_window_layers=0)
    path = write_model(tmp_path / "a.gguf", theirs, "qwen3", {"attention.sliding_window": 4})
    model = minia3.load_model(path)
    assert model.config.window == 4
    assert off(logits(model, SOURCE, None, TARGET), their_logits(theirs)) < 1e-5


@pytest.mark.parametrize(
    ("name", "written", "architecture", "problem"),
    [
        ("qwen3", "qwen3", "qwen2", "self_attn.k_norm.weight is left over"),
        ("llama-gqa", "qwen2", "qwen2", "self_attn.k_proj.bias is missing"),
        ("qwen2", "qwen2", "qwen3", "self_attn.k_norm.weight is missing"),
    ],
)
def test_tensors_of_another_architecture_are_named(tmp_path, name, written, architecture, problem):
    path = write_model(tmp_path / "a.gguf", make(name), written)
    path.write_bytes(path.read_bytes().replace(written.encode(), architecture.encode()))
    assert problem in refusal(minia3.load_model, path)


def test_a_key_that_nobody_knows_is_a_warning_that_names_it(tmp_path):
    path = write_model(tmp_path / "a.gguf", make("qwen2"), "qwen2", {"attention.new_feature": 1})
    with pytest.warns(UserWarning, match=r"does not know: qwen2\.attention\.new_feature: if"):
        read_gguf(path)
