"""Guards the reader of GGUF: it returns the Hugging Face checkpoint that a file was made from, bit
for bit, however the numbers are stored. A file that is damaged, or is not a LLaMA, ends in a
ValueError of one line.
"""

import json
import math
import random
import struct
import sys
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
import transformers
from checkpoint_folders import weight_dtypes
from hypothesis import given, settings
from hypothesis import strategies as st

import minia3
from minia3.checkpoints.gguf import CONFIG, read_gguf, read_metadata
from minia3.checkpoints.load import read_checkpoint
from minia3.checkpoints.tensor_names import name_table

gguf = pytest.importorskip("gguf", reason="needs the extra: pip install 'minia3[gguf]'")
KINDS = gguf.GGMLQuantizationType
F32 = KINDS.F32
Q8_0 = KINDS.Q8_0

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
    # Norms, too: if they were all ones, a reader could mistake one for another.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def hf_tensors(model):
    """Return the tensors that a file stores, by name. A tied head is not stored."""
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    return {name: x.numpy() for name, x in model.state_dict().items() if name not in tied}


def neighbors(rows, n_heads):
    """Return q or k in llama.cpp's order: rows i and d/2 + i of a head become neighbors."""
    d_head = len(rows) // n_heads
    order = []
    for head in range(n_heads):
        for i in range(d_head // 2):
            first = head * d_head + i
            order += [first, first + d_head // 2]
    return rows[order]


def gguf_name(name):
    stem, suffix = name.rsplit(".", 1)
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 11).get_name(stem) + "." + suffix


def gguf_tensors(tensors, kind=F32, n_heads=4, n_kv_heads=2):
    """Return a dict from GGUF's names to (bytes, kind). Norms are F32, as llama.cpp writes them."""
    made = {}
    for name, x in tensors.items():
        if "q_proj" in name:
            x = neighbors(x, n_heads)
        elif "k_proj" in name:
            x = neighbors(x, n_kv_heads)
        block_size, _ = gguf.GGML_QUANT_SIZES[kind]
        fits = x.ndim > 1 and x.shape[-1] % block_size == 0
        stored_as = kind if fits else F32
        made[gguf_name(name)] = (gguf.quants.quantize(x, stored_as), stored_as)
    return made


def write(path, tensors, changes=None, arch="llama", **options):
    """Write a GGUF file of `tensors` (name -> (array, kind)) and of KEYS with `changes`.

    A change to None removes a key.
    """
    writer = gguf.GGUFWriter(path, arch, **options)
    adders = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    keys = KEYS | (changes or {})
    for key, value in keys.items():
        if value is not None:
            adders[type(value)](key, value)
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
    """Return the message of the ValueError that `function(path)` must raise. It is one line."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the callers look at the message)
        function(path)
    message = str(caught.value)
    assert type(caught.value) is ValueError
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


@pytest.fixture
def small(tmp_path):
    """A small, sound file of F32 and Q8_0."""
    return write(tmp_path / "small.gguf", gguf_tensors(hf_tensors(make_model()), Q8_0))


# What is read


@pytest.mark.parametrize("tied", [False, True])
def test_a_float32_file_has_the_hugging_face_tensors_bit_for_bit(tmp_path, tied):
    expected = hf_tensors(make_model(tied))
    path = write(tmp_path / "a.gguf", gguf_tensors(expected))
    entries = read_checkpoint(path)[1]
    assert entries.keys() == expected.keys()
    for name, entry in entries.items():
        assert (entry.shape, entry.dtype) == (expected[name].shape, torch.float32)
        assert torch.equal(entry.read(), torch.from_numpy(expected[name]))


def test_data_begins_where_the_alignment_of_the_file_says(tmp_path, monkeypatch):
    original = gguf.GGUFWriter

    def aligned(*args, **options):
        writer = original(*args, **options)
        writer.add_custom_alignment(512)
        return writer

    expected = hf_tensors(make_model())
    monkeypatch.setattr(gguf, "GGUFWriter", aligned)
    found = read_all(write(tmp_path / "a.gguf", gguf_tensors(expected)))
    assert all(torch.equal(found[name], torch.from_numpy(x)) for name, x in expected.items())


@pytest.mark.parametrize("tied", [False, True])
def test_config_and_tensors_make_the_model_that_the_file_was_made_from(tmp_path, tied):
    model = make_model(tied)
    path = write(tmp_path / "a.gguf", gguf_tensors(hf_tensors(model)))
    again = transformers.LlamaForCausalLM(transformers.LlamaConfig(**read_gguf(path)[0])).eval()
    missing, left_over = again.load_state_dict(read_all(path), strict=False)
    expected_missing = ["lm_head.weight"] if tied else []
    assert missing == expected_missing
    assert left_over == []
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
    n_heads = n_kv_heads * group
    d_head = 2 * half
    q = np.random.rand(n_heads * d_head, d_model).astype(np.float32)
    k = np.random.rand(n_kv_heads * d_head, d_model).astype(np.float32)
    tensors = {
        "model.embed_tokens.weight": np.ones((5, d_model), np.float32),
        f"model.layers.{layer}.self_attn.q_proj.weight": q,
        f"model.layers.{layer}.self_attn.k_proj.weight": k,
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
    earlier_layers = {f"blk.{i}.x": (np.ones(1, np.float32), F32) for i in range(layer)}
    stored = gguf_tensors(tensors, n_heads=n_heads, n_kv_heads=n_kv_heads)
    write(path, stored | earlier_layers, sizes)
    found = read_all(path)
    for name, x in tensors.items():
        assert torch.equal(found[name], torch.from_numpy(x))


def test_scores_with_the_rotation_of_hugging_face_equal_scores_with_that_of_llama_cpp(tmp_path):
    """This is why rows change places: halves that rotate here are neighbors in the file."""
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
    found = read_all(write(tmp_path / "a.gguf", stored, sizes))
    q = found["model.layers.0.self_attn.q_proj.weight"].numpy()
    k = found["model.layers.0.self_attn.k_proj.weight"].numpy()
    angle = 7 * 50000.0 ** (-np.arange(0, d, 2) / d)
    cos = np.cos(angle)
    sin = np.sin(angle)

    def rotate_neighbors(x):
        even = x[0::2]
        odd = x[1::2]
        return np.stack([even * cos - odd * sin, odd * cos + even * sin], 1).ravel()

    def rotate_halves(x):
        low = x[: d // 2]
        high = x[d // 2 :]
        return np.concatenate([low * cos - high * sin, high * cos + low * sin])

    x, y = np.random.default_rng(1).normal(size=(2, 3))
    assert np.isclose(rotate_halves(q @ x) @ (k @ y), rotate_neighbors(w_q @ x) @ (w_k @ y))
    assert not np.isclose(rotate_halves(w_q @ x) @ (w_k @ y), rotate_neighbors(w_q @ x) @ (w_k @ y))


@pytest.mark.parametrize(
    ("kind", "dtype"), [(KINDS.F16, torch.float16), (KINDS.BF16, torch.bfloat16)]
)
def test_half_precision_stays_as_it_is_stored(tmp_path, kind, dtype):
    expected = hf_tensors(make_model())
    path = write(tmp_path / "a.gguf", gguf_tensors(expected, kind))
    entries = read_checkpoint(path)[1]
    for name, x in expected.items():
        stored_dtype = dtype if x.ndim > 1 else torch.float32
        wanted = torch.from_numpy(x).to(stored_dtype)
        assert entries[name].dtype == wanted.dtype
        assert torch.equal(entries[name].read(), wanted)


@pytest.mark.parametrize(
    ("kind", "dtype"), [(KINDS.F16, torch.float16), (KINDS.BF16, torch.bfloat16)]
)
def test_a_model_has_the_dtype_of_its_matrices_and_not_of_its_norms(tmp_path, kind, dtype):
    tensors = hf_tensors(make_model())
    stored = gguf_tensors(tensors, kind)
    model = minia3.load_model(write(tmp_path / "a.gguf", stored))
    assert weight_dtypes(model) == {dtype}
    norm = torch.from_numpy(tensors["model.norm.weight"])
    name = name_table(model)["model.norm.weight"]
    assert torch.equal(model.get_parameter(name), norm.to(dtype))
    # A single quantized matrix makes the whole model float32.
    stored["output.weight"] = (gguf.quants.quantize(tensors["lm_head.weight"], Q8_0), Q8_0)
    assert weight_dtypes(minia3.load_model(write(tmp_path / "b.gguf", stored))) == {torch.float32}


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if gguf.GGML_QUANT_SIZES[kind][0] > 1], ids=lambda k: k.name
)
def test_every_quantized_kind_is_read_as_gguf_dequantizes_it_or_refused_by_name(tmp_path, kind):
    """The bytes are random, because gguf can read kinds that it cannot make.

    They are below 0x3c, so that no scale is infinite or NaN.
    """
    block_size, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(kind)

    def random_rows(n_rows):
        return generator.integers(0, 0x3C, (n_rows, 256 // block_size * n_bytes), np.uint8)

    q = random_rows(24)
    k = random_rows(12)
    embedding = random_rows(300)
    content = {
        "model.layers.1.self_attn.q_proj.weight": q,
        "model.layers.1.self_attn.k_proj.weight": k,
        "model.embed_tokens.weight": embedding,
    }
    stored = gguf_tensors(hf_tensors(make_model())) | {
        "blk.1.attn_q.weight": (neighbors(q, 4), kind),
        "blk.1.attn_k.weight": (neighbors(k, 2), kind),
        "token_embd.weight": (embedding, kind),
    }
    path = write(tmp_path / "a.gguf", stored)
    try:
        expected = {name: gguf.quants.dequantize(raw, kind) for name, raw in content.items()}
    except NotImplementedError:
        assert kind.name in fault(read_gguf, path)
        return
    entries = read_checkpoint(path)[1]
    for name, x in expected.items():
        assert (entries[name].shape, entries[name].dtype) == (x.shape, torch.float32)
        assert torch.equal(entries[name].read(), torch.from_numpy(x))


@pytest.mark.parametrize("kind", [KINDS.F64, KINDS.I32])
def test_kinds_that_are_not_for_weights_are_refused_by_name(tmp_path, kind):
    dtype = np.float64 if kind == KINDS.F64 else np.int32
    embedding = {"token_embd.weight": (np.ones((300, 256), dtype), kind)}
    path = write(tmp_path / "a.gguf", gguf_tensors(hf_tensors(make_model())) | embedding)
    assert kind.name in fault(read_gguf, path)


def test_a_tensor_that_the_table_lacks_keeps_its_name(tmp_path):
    names = ("blk.0.attn_output.bias", "rope_{}_long.weight", "blk.1.x")
    extra = {name: (np.ones(4, np.float32), F32) for name in names}
    path = write(tmp_path / "a.gguf", gguf_tensors(hf_tensors(make_model())) | extra)
    assert read_gguf(path)[1].keys() == hf_tensors(make_model()).keys() | extra.keys()


def test_reading_holds_no_second_copy_of_a_tensor_and_never_writes_to_the_file(tmp_path):
    """tracemalloc counts the memory of numpy's dequantized rows, but not of the mapped file."""
    x = np.random.default_rng(0).normal(size=(8192, 256)).astype(np.float32)
    big = {
        "big.f32": (gguf.quants.quantize(x, F32), F32),
        "big.q8": (gguf.quants.quantize(x, Q8_0), Q8_0),
    }
    path = write(tmp_path / "a.gguf", gguf_tensors(hf_tensors(make_model())) | big)
    before = path.read_bytes()
    entries = read_checkpoint(path)[1]
    for name in big:
        tracemalloc.start()
        found = entries[name].read()
        assert tracemalloc.get_traced_memory()[1] < x.nbytes / 4
        tracemalloc.stop()
        assert torch.allclose(found, torch.from_numpy(x), atol=0.05)
        found.zero_()
    assert path.read_bytes() == before


# Metadata and config


def test_metadata_is_read_as_it_was_written_in_plain_python_types(small):
    found = read_metadata(small)
    assert found == KEYS | {"general.architecture": "llama"}
    assert json.loads(json.dumps(found)) == found  # json refuses numpy's types
    for key, value in KEYS.items():
        assert type(found[key]) is type(value)


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
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert read_metadata(tmp_path / "a.gguf") == values | {"general.architecture": "llama"}


def test_an_array_may_be_empty(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQQcIIQ", 3, 0, 1, 1, b"k", 9, 8, 0))
    assert read_metadata(path) == {"k": []}


def test_the_config_equals_the_content_of_a_config_json(small):
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
        (
            {"llama.rope.dimension_count": None, "llama.attention.value_length": None},
            {"head_dim": 6},
        ),
        (
            {
                "llama.attention.key_length": None,
                "llama.attention.value_length": 64,
                "llama.rope.dimension_count": 64,
            },
            {"head_dim": 64},
        ),
        ({"tokenizer.ggml.eot_token_id": 7}, {"eos_token_id": [2, 7]}),
        ({"tokenizer.ggml.eot_token_id": 2}, {"eos_token_id": 2}),
        ({"tokenizer.ggml.eot_token_id": 0}, {"eos_token_id": [2, 0]}),
        (
            {"tokenizer.ggml.eos_token_id": None, "tokenizer.ggml.bos_token_id": None},
            {"eos_token_id": [], "bos_token_id": None},
        ),
        ({"tokenizer.ggml.padding_token_id": 0}, {"pad_token_id": 0}),
        (
            {
                "llama.attention.causal": True,
                "llama.attention.scale": 0.0,
                "llama.attention.sliding_window": 0,
                "llama.embedding_scale": 1.0,
                "llama.expert_count": 0,
                "llama.rope.scaling.type": "none",
                "llama.rope.scaling.factor": 1.0,
                "llama.rope.scaling.finetuned": False,
                "llama.vocab_size": 300,
            },
            {"model_type": "llama"},
        ),
    ],
)
def test_keys_that_are_missing_or_different_change_the_config(tmp_path, changes, expected):
    path = write(tmp_path / "a.gguf", gguf_tensors(hf_tensors(make_model(tied=True))), changes)
    found = read_gguf(path)[0]
    assert {key: found[key] for key in expected} == expected
    assert found["tie_word_embeddings"] is True


def test_llama3_scaling_becomes_factors_of_the_config_and_is_not_a_tensor(tmp_path):
    factors = {"rope_freqs.weight": (np.array([1, 2.5, 8], np.float32), F32)}
    path = write(tmp_path / "a.gguf", gguf_tensors(hf_tensors(make_model())) | factors)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config, _ = read_checkpoint(path)
    assert config.rope_factors == (1.0, 2.5, 8.0)
    assert read_gguf(path)[1].keys() == hf_tensors(make_model()).keys()


@pytest.mark.parametrize(
    "factors", [[1, 2], [1, 2, 0], [1, 2, -3], [1, 2, math.nan], [1, 2, math.inf]]
)
def test_impossible_factors_are_refused(tmp_path, factors):
    stored = {"rope_freqs.weight": (np.array(factors, np.float32), F32)}
    path = write(tmp_path / "a.gguf", gguf_tensors(hf_tensors(make_model())) | stored)
    assert "rope_freqs.weight" in fault(read_gguf, path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"llama.expert_count": 8}, ["llama.expert_count is 8"]),
        ({"llama.attention.sliding_window": -1.5}, ["llama.attention.sliding_window is -1.5"]),
        ({"llama.attention.sliding_window": "4"}, ["sliding_window is '4'", "a whole number"]),
        ({"llama.attention.sliding_window_pattern": 6}, ["sliding_window_pattern is 6", "no such"]),
        ({"llama.attention.scale": 0.5}, ["llama.attention.scale is 0.5"]),
        ({"llama.embedding_scale": 12.0}, ["llama.embedding_scale is 12.0", "0 or 1"]),
        ({"llama.residual_scale": 0.22}, ["llama.residual_scale is 0.2"]),
        ({"llama.logit_scale": 16.0}, ["llama.logit_scale is 16.0"]),
        ({"llama.attention.causal": False}, ["llama.attention.causal is False"]),
        ({"llama.final_logit_softcapping": 30.0}, ["final_logit_softcapping is 30.0"]),
        ({"llama.rope.scaling.attn_factor": 2.0}, ["llama.rope.scaling.attn_factor is 2.0"]),
        ({"split.count": 2}, ["split.count is 2"]),
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
        (
            dict.fromkeys(KEYS),
            [key.format("llama") for key in CONFIG if key != "{}.rope.freq_base"],
        ),
    ],
)
def test_a_message_names_all_keys_that_are_missing_or_not_supported(tmp_path, changes, words):
    path = write(tmp_path / "a.gguf", gguf_tensors(hf_tensors(make_model())), changes)
    message = fault(read_gguf, path)
    assert [word for word in words if word not in message] == []
    assert len(message) < 600


def test_other_architectures_and_files_without_an_embedding_are_refused(tmp_path):
    stored = gguf_tensors(hf_tensors(make_model()))
    message = fault(read_gguf, write(tmp_path / "a.gguf", stored, arch="gemma3"))
    assert message == "general.architecture is 'gemma3', expected one of llama, qwen2, qwen3"
    stored.pop("token_embd.weight")
    assert "token_embd.weight" in fault(read_gguf, write(tmp_path / "b.gguf", stored))


@pytest.mark.parametrize("name", ["q", "k"])
def test_a_tensor_whose_rows_are_not_heads_times_width_is_named(tmp_path, name):
    wrong = {f"blk.1.attn_{name}.weight": (np.ones((8, 256), "f4"), F32)}
    stored = gguf_tensors(hf_tensors(make_model())) | wrong
    message = fault(minia3.load_model, write(tmp_path / "a.gguf", stored))
    problem = f"model.layers.1.self_attn.{name}_proj.weight has shape (8, 256)"
    assert f"1 tensors do not fit the config: {problem}" in message


# Files that are not GGUF, or damaged


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
            "the key 'k' appears twice",
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
def test_a_file_that_is_not_gguf_or_damaged_is_refused_in_one_line(
    tmp_path, function, content, words
):
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    assert words in fault(function, path)


def test_a_folder_a_missing_file_and_big_endian_are_refused(tmp_path):
    assert "directory" in fault(read_gguf, tmp_path)
    assert "not found" in fault(read_gguf, tmp_path / "none.gguf")
    stored = gguf_tensors(hf_tensors(make_model()))
    path = write(tmp_path / "a.gguf", stored, endianess=gguf.GGUFEndian.BIG)
    assert "big-endian" in fault(read_gguf, path)


def test_a_tensor_that_is_stored_twice_is_refused(tmp_path, small):
    path = tmp_path / "twice.gguf"
    path.write_bytes(small.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight"))
    assert "twice" in fault(read_gguf, path)


@pytest.mark.slow
def test_a_file_that_is_cut_anywhere_is_refused_before_reading(tmp_path, small):
    whole = small.read_bytes()
    path = tmp_path / "cut.gguf"
    end = max(t.data_offset + t.n_bytes for t in gguf.GGUFReader(small).tensors)
    for size in [*range(1, end, 997), *range(1, 2000, 7), end - 1]:
        path.write_bytes(whole[:size])
        assert "cut short" in fault(read_gguf, path)
    path.write_bytes(whole[:end])
    assert read_all(path).keys() == read_all(small).keys()


def mutate(content, header_size, generator):
    """Return `content` with a few bytes changed, most of them in the header."""
    mutated = bytearray(content)
    for _ in range(generator.choice([1, 1, 2, 8])):
        end = header_size if generator.random() < 0.9 else len(content)
        position = generator.randrange(end)
        mutated[position] = generator.choice([0, 1, 0x7F, 0xFF, generator.randrange(256)])
    if generator.random() < 0.2:  # bytes are lost, or a count becomes huge
        position = generator.randrange(header_size)
        replacement = generator.choice([b"", b"\xff" * 8, b"\xff" * 4 + bytes(4)])
        mutated[position : position + 8] = replacement
    return mutated


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy warns of infinite scales
def test_damaged_bytes_end_in_a_value_error_or_a_result_and_take_no_memory(tmp_path):
    stored = gguf_tensors(hf_tensors(make_model()), Q8_0)
    stored["rope_freqs.weight"] = (np.ones(3, "f4"), F32)
    whole = write(tmp_path / "a.gguf", stored).read_bytes()
    header_size = whole.index(b"rope_freqs.weight") + 60
    generator = random.Random(0)
    path = tmp_path / "mutated.gguf"
    faults = []
    tracemalloc.start()
    for number in range(500):
        if number == 100:  # it slows what follows, and the campaign measures memory, too
            assert tracemalloc.get_traced_memory()[1] < 50e6
            tracemalloc.stop()
        path.write_bytes(mutate(whole, header_size, generator))
        try:
            read_metadata(path)
            minia3.load_model(path)
        except ValueError as error:
            faults.append(str(error))
    assert 50 < len(faults) < 450
    for message in faults:
        assert message.startswith(f"{path}: ")
        assert "\n" not in message


# The package gguf


def test_without_the_package_gguf_one_line_says_how_to_get_it(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    for function in (read_metadata, read_gguf):
        assert "pip install 'minia3[gguf]'" in fault(function, small)
