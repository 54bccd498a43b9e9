"""The files that the fuzz damages, and what reading them must give.

A target makes a whole folder, and reads one: it raises ValueError, or checks that what was read is
what an honest reading of the (damaged) files gives. The honest readings here are as plain as can
be, and share no code with minia3.
"""

import csv
import functools
import gzip
import io
import json
import math
import re
import struct
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
import torch
from pyarrow import parquet
from safetensors.torch import load_file, save

import minia3
from minia3.checkpoints import save as save_module
from minia3.checkpoints.config import to_hf
from minia3.checkpoints.gguf import read_gguf, read_metadata
from minia3.checkpoints.load import read_checkpoint
from minia3.checkpoints.tensor_names import name_table
from minia3.checkpoints.tokenizer import Tokenizer
from minia3.files.tensors import read_tensors
from minia3.model.llama import Llama, LlamaConfig
from minia3.model.t5 import T5, T5Config
from minia3.tasks.known_tasks import known_tasks
from minia3.tasks.prompts import Prompt, render
from minia3.tasks.row_files import read_rows
from minia3.tasks.splits import load_task
from minia3.tasks.task import Source, TaskSpec
from minia3.training.checkpoint import Checkpoint, load_checkpoint, random_state, save_checkpoint
from minia3.training.metrics_file import Metrics
from minia3.training.run_folder import check_data, read_run_config
from tests.hostile import program_targets as program
from tests.small_tokenizers import field


def check_one_line(error):
    message = str(error)
    assert message, "a ValueError that says nothing"
    assert "\n" not in message, f"more than a line: {message!r}"
    assert len(message) < 1_000_000, f"{len(message)} characters"


def write_json(path, value):
    path.write_text(json.dumps(value))


def read_object(path):
    return json.loads(path.read_bytes()) if path.exists() else {}


# Tensors


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def honest_safetensors(content):
    """Return name -> (dtype, shape, bytes)."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    numbers = content[8 + length :]
    tensors = {}
    for name, info in header.items():
        if name != "__metadata__":
            begin, end = info["data_offsets"]
            tensors[name] = (info["dtype"], tuple(info["shape"]), numbers[begin:end])
    return tensors


def raw_bytes(tensor):
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def make_safetensors(folder):
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(2, 3),
        "b.c": torch.randn(4).half(),
        "n": torch.arange(3),
        "e": torch.randn(0, 2),
    }
    content = save(tensors, metadata={"format": "pt"})
    (folder / "model.safetensors").write_bytes(content)


def read_safetensors(folder):
    path = folder / "model.safetensors"
    refusals = []
    for as_a_whole in (False, True):
        try:
            entries = read_tensors(path, as_a_whole)
        except ValueError as error:
            refusals.append(error)
        else:
            compare_entries(entries, honest_safetensors(path.read_bytes()))
    if refusals:
        assert len(refusals) == 2, f"only one way to read the file refuses it: {refusals[0]}"
        raise refusals[1]


def compare_entries(entries, honest):
    assert entries.keys() == honest.keys()
    for name, entry in entries.items():
        dtype, shape, raw = honest[name]
        assert (entry.shape, entry.dtype) == (shape, DTYPES.get(dtype, dtype)), name
        if dtype in DTYPES and raw:
            assert raw_bytes(entry.read()) == raw, name


def make_bin(folder, is_zip=True):
    torch.manual_seed(0)
    both = torch.randn(2, 3)
    tensors = {"a": both, "b.c": both[0], "h": torch.randn(4).bfloat16(), "n": torch.arange(3)}
    path = folder / "pytorch_model.bin"
    torch.save(tensors, path, _use_new_zipfile_serialization=is_zip)


def make_old_bin(folder):
    make_bin(folder, is_zip=False)


def read_bin(folder):
    for name, entry in read_tensors(folder / "pytorch_model.bin").items():
        assert type(name) is str
        tensor = entry.read()
        assert (tuple(tensor.shape), tensor.dtype) == (entry.shape, entry.dtype)
        assert tensor.layout == torch.strided
        tensor.double().sum()  # touches every number


# Configs


# Our name -> the key in config.json
T5_SIZES = {
    "vocab_size": "vocab_size",
    "d_model": "d_model",
    "d_head": "d_kv",
    "d_ff": "d_ff",
    "n_layers": "num_layers",
    "n_heads": "num_heads",
    "n_decoder_layers": "num_decoder_layers",
    "n_buckets": "relative_attention_num_buckets",
    "max_distance": "relative_attention_max_distance",
}
LLAMA_SIZES = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "d_head": "head_dim",
    "d_ff": "intermediate_size",
    "n_heads": "num_attention_heads",
    "n_layers": "num_hidden_layers",
    "n_kv_heads": "num_key_value_heads",
    "max_length": "max_position_embeddings",
}


def is_number(x, low, high=math.inf):
    return type(x) in (int, float) and low <= x < high


def is_id(x):
    return type(x) is int


def check_config(config, raw, generation):
    """The config is what the files say, and a model could be made of it.

    raw, generation: the content of config.json and generation_config.json.
    """
    is_t5 = isinstance(config, T5Config)
    sizes = T5_SIZES if is_t5 else LLAMA_SIZES
    check_sizes(config, raw, sizes)
    assert is_number(config.eps, 0), f"eps {config.eps}"
    assert is_number(config.dropout, 0, 1.0001), f"dropout {config.dropout}"
    for key in ("tie_word_embeddings", "scale_decoder_outputs"):
        assert raw.get(key) in (True, False, None), f"{key} {raw[key]!r}"
    assert config.pad_id is None or is_id(config.pad_id), f"pad_id {config.pad_id!r}"
    check_eos_ids(config.eos_ids, raw, generation)
    if is_t5:
        assert is_id(config.start_id), f"start_id {config.start_id!r}"
        assert 0 <= config.start_id < config.vocab_size, f"start_id {config.start_id}"
    else:
        check_llama_config(config)


def check_sizes(config, raw, keys):
    for name, key in keys.items():
        value = getattr(config, name)
        assert type(value) is int, name
        assert value >= 1, name
        assert raw.get(key) in (None, value), name


def check_eos_ids(eos_ids, raw, generation):
    assert type(eos_ids) is tuple
    assert all(is_id(i) for i in eos_ids), f"eos_ids {eos_ids!r}"
    wanted = generation.get("eos_token_id")
    if wanted is None:
        wanted = raw.get("eos_token_id")
    if wanted is not None:
        wanted_ids = wanted if isinstance(wanted, list) else [wanted]
        assert eos_ids == tuple(wanted_ids), f"eos_ids {eos_ids!r}"


def check_llama_config(config):
    assert config.n_heads % config.n_kv_heads == 0
    assert is_number(config.rope_theta, 1e-300), f"theta {config.rope_theta}"
    assert config.bos_id is None or is_id(config.bos_id), f"bos_id {config.bos_id!r}"
    scaling = config.rope_scaling or ()
    assert all(is_number(x, 1e-300) for x in scaling), f"scaling {scaling}"


def make_t5_config(folder):
    write_json(folder / "config.json", to_hf(small_t5().config, torch.float32))
    write_json(folder / "generation_config.json", {"eos_token_id": [1, 2], "pad_token_id": 0})


def make_llama_config(folder):
    make_t5_config(folder)
    write_json(folder / "config.json", to_hf(small_llama().config, torch.float32))


def read_config(folder):
    config = read_checkpoint(folder, weights=False)[0]
    raw = read_object(folder / "config.json")
    check_config(config, raw, read_object(folder / "generation_config.json"))


# Models


def small_t5(**changes):
    sizes = {
        **{"d_model": 8, "d_head": 2, "d_ff": 12, "n_layers": 2, "n_decoder_layers": 1},
        **{"n_heads": 4, "vocab_size": 20, "n_buckets": 8, "max_distance": 16},
    }
    torch.manual_seed(0)
    return T5(T5Config(**(sizes | changes))).eval()


def small_llama():
    sizes = {
        **{"d_model": 8, "d_head": 4, "d_ff": 12, "n_layers": 2, "n_heads": 2},
        **{"n_kv_heads": 1, "vocab_size": 20, "max_length": 32},
    }
    torch.manual_seed(0)
    return Llama(LlamaConfig(**sizes, rope_scaling=(8.0, 1.0, 4.0, 16))).eval()


def jitter(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(1 + 0.1 * torch.randn(parameter.shape))
    return model


def make_t5(folder):
    minia3.save_model(jitter(small_t5()), folder)


def make_llama(folder):
    minia3.save_model(jitter(small_llama()), folder)


def make_shards(folder):
    before = save_module.SHARD_BYTES
    save_module.SHARD_BYTES = 1500
    try:
        make_llama(folder)
    finally:
        save_module.SHARD_BYTES = before


def read_model(folder):
    """The files' tensors are the model's parameters, bit by bit; all others are vectors of ones."""
    model = minia3.load_model(folder)
    raw = read_object(folder / "config.json")
    check_config(model.config, raw, read_object(folder / "generation_config.json"))
    names = name_table(model)
    parameters = dict(model.named_parameters())
    for path in weight_files(folder):
        for name, (_, shape, raw) in honest_safetensors(path.read_bytes()).items():
            if names[name]:  # else a tensor that is used by nothing
                parameter = parameters.pop(names[name])
                assert (tuple(parameter.shape), raw_bytes(parameter)) == (shape, raw), name
    for name, parameter in parameters.items():
        assert name.endswith(".scale"), name
        assert (parameter == 1).all(), name
    run_model(model)


def weight_files(folder):
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    weight_map = read_object(folder / "model.safetensors.index.json")["weight_map"]
    paths = sorted({folder / name for name in weight_map.values()})
    assert all(path.parent == folder for path in paths)
    return paths


def run_model(model):
    """A config of which a model can be made, but not run, would be a mistake that comes late."""
    with torch.no_grad():
        state = model.start(torch.tensor([[1, 2, 3]]))
        model.step(state.start, state)


# Shapes of the tensors in one of two shards, as Meta writes them
META_SHAPES = {
    "tok_embeddings": (20, 4),
    "norm": (8,),
    "output": (10, 8),
    "layers.0.attention_norm": (8,),
    "layers.0.attention.wq": (4, 8),
    "layers.0.attention.wk": (4, 8),
    "layers.0.attention.wv": (4, 8),
    "layers.0.attention.wo": (8, 4),
    "layers.0.feed_forward.w1": (6, 8),
    "layers.0.feed_forward.w3": (6, 8),
    "layers.0.feed_forward.w2": (8, 6),
    "layers.0.ffn_norm": (8,),
}
META_PARAMS = {"dim": 8, "n_layers": 1, "n_heads": 2, "norm_eps": 1e-5, "multiple_of": 256}


def make_meta(folder):
    generator = torch.Generator().manual_seed(0)
    for i in range(2):
        shard = {}
        for name, shape in META_SHAPES.items():
            shard[f"{name}.weight"] = torch.rand(shape, generator=generator)
        torch.save(shard, folder / f"consolidated.{i:02d}.pth")
    write_json(folder / "params.json", META_PARAMS | {"vocab_size": -1})


def read_meta(folder):
    model = minia3.load_model(folder)
    params = read_object(folder / "params.json")
    config = model.config
    check_config(config, {}, {})
    found = {"dim": config.d_model, "n_layers": config.n_layers, "n_heads": config.n_heads}
    found["norm_eps"] = config.eps
    for key, value in found.items():
        assert params.get(key) in (None, value), key  # null is read as the default
    assert params.get("vocab_size") in (None, -1, config.vocab_size)
    run_model(model)


# Tokenizers


PIECES = [
    *(("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)),
    *(("▁", -1.0, 1), ("a", -2.0, 1), ("b", -2.5, 1)),
    *(("ab", -1.5, 1), ("▁ab", -0.5, 1), ("<x>", 0.0, 4)),
]
TOKENIZER_CONFIG = {
    "bos_token": "<s>",
    "eos_token": {"content": "</s>", "lstrip": False},
    "add_bos_token": True,
    "extra_ids": 4,
    "added_tokens_decoder": {
        "9": {"content": "<new>", "special": True},
        "10": {"content": "<more>"},
    },
    "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
}


def sentencepiece(model_type):
    content = b""
    for text, score, kind in PIECES:
        if kind == 4 and model_type == 2:
            kind = 3  # user-defined pieces of a BPE like LLaMA's are refused
        content += field(1, field(1, text.encode()) + field(2, score) + field(3, kind))
    trainer = field(2, field(3, model_type))
    normalizer = field(3, field(3, 1) + field(4, 0))
    return content + trainer + normalizer


def write_tokenizer_settings(folder, config):
    write_json(folder / "tokenizer_config.json", config)
    special = {"eos_token": "</s>", "pad_token": "<unk>"}
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "config.json", {"pad_token_id": 0, "eos_token_id": [2, 1]})


def make_unigram(folder):
    (folder / "spiece.model").write_bytes(sentencepiece(1))
    # T5's four sentinels come before the added tokens.
    descriptions = TOKENIZER_CONFIG["added_tokens_decoder"]
    moved = {str(int(i) + 4): description for i, description in descriptions.items()}
    write_tokenizer_settings(folder, TOKENIZER_CONFIG | {"added_tokens_decoder": moved})


def make_bpe(folder):
    (folder / "tokenizer.model").write_bytes(sentencepiece(2))
    write_tokenizer_settings(folder, TOKENIZER_CONFIG)


def make_tokenizer_json(folder):
    make_bpe(folder)
    Tokenizer.from_folder(folder).save(folder)
    (folder / "tokenizer.model").unlink()
    write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)


def read_tokenizer(folder):
    check_tokenizer(Tokenizer.from_folder(folder))


def check_tokenizer(tokenizer):
    for text in ("ab ba é\n", "", "</s> x", "ab" * 50):
        try:
            ids = tokenizer.encode(text)
            assert all(type(i) is int and 0 <= i < 2**32 for i in ids)
            assert type(tokenizer.decode(ids)) is str
            tokenizer.encode_target(text, end=True)
        except ValueError as error:
            check_one_line(error)
    assert is_id(tokenizer.pad_id)
    for i in (tokenizer.bos_id, tokenizer.eos_id):
        assert i is None or is_id(i)


# GGUF


GGUF = {
    "general.architecture": "llama",
    "llama.embedding_length": 8,
    "llama.feed_forward_length": 32,
    "llama.block_count": 1,
    "llama.context_length": 64,
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.attention.layer_norm_rms_epsilon": 0.001,
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": [text for text, _, _ in PIECES],
    "tokenizer.ggml.scores": [score for _, score, _ in PIECES],
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.token_type": [kind for _, _, kind in PIECES],
}
GGUF_SHAPES = {
    "token_embd.weight": (9, 8),
    "output_norm.weight": (8,),
    "rope_freqs.weight": (2,),
    "blk.0.attn_q.weight": (8, 8),
    "blk.0.attn_k.weight": (4, 8),
    "blk.0.attn_v.weight": (4, 8),
    "blk.0.attn_output.weight": (8, 8),
    "blk.0.attn_norm.weight": (8,),
    "blk.0.ffn_norm.weight": (8,),
    "blk.0.ffn_gate.weight": (32, 8),
    "blk.0.ffn_up.weight": (32, 8),
    "blk.0.ffn_down.weight": (8, 32),
}
# Without q and k, whose rows are permuted
HF_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "blk.0.attn_v.weight": "model.layers.0.self_attn.v_proj.weight",
    "blk.0.attn_output.weight": "model.layers.0.self_attn.o_proj.weight",
    "blk.0.attn_norm.weight": "model.layers.0.input_layernorm.weight",
    "blk.0.ffn_norm.weight": "model.layers.0.post_attention_layernorm.weight",
    "blk.0.ffn_gate.weight": "model.layers.0.mlp.gate_proj.weight",
    "blk.0.ffn_up.weight": "model.layers.0.mlp.up_proj.weight",
    "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
}


def gguf_value(value):
    """Return the type of a value, and its bytes."""
    if isinstance(value, str):
        return 8, struct.pack("<Q", len(value.encode())) + value.encode()
    if isinstance(value, list):
        kind, _ = gguf_value(value[0])
        items = b"".join(gguf_value(item)[1] for item in value)
        return 9, struct.pack("<IQ", kind, len(value)) + items
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    return 4, struct.pack("<I", value)


def padding(data):
    return bytes(-len(data) % 32)


def make_gguf(folder):
    rng = np.random.default_rng(0)
    header = b"GGUF" + struct.pack("<IQQ", 3, len(GGUF_SHAPES), len(GGUF))
    for key, value in GGUF.items():
        kind, packed = gguf_value(value)
        header += gguf_value(key)[1] + struct.pack("<I", kind) + packed
    body = b""
    for name, shape in GGUF_SHAPES.items():
        kind = 0
        numbers = rng.uniform(0.5, 1.5, shape).astype("<f4").tobytes()
        if name.endswith("down.weight"):  # Q8_0: a float16 scale and 32 bytes
            kind = 8
            numbers = b"".join(struct.pack("<e", 0.01) + rng.bytes(32) for _ in range(8))
        header += gguf_value(name)[1] + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        header += struct.pack("<IQ", kind, len(body))
        body += numbers + padding(numbers)
    (folder / "a.gguf").write_bytes(header + padding(header) + body)


def check_gguf(folder):
    path = folder / "a.gguf"
    metadata = read_metadata(path)
    assert all(type(key) is str for key in metadata)
    try:
        check_tokenizer(Tokenizer.from_gguf(metadata, path))
    except ValueError as error:
        check_one_line(error)
    model = minia3.load_model(path)
    check_config(model.config, {}, {})
    check_equal_to_gguf_package(path, model.config)
    run_model(model)


def check_equal_to_gguf_package(path, config):
    """The package gguf reads the same, if it reads the file at all."""
    import gguf

    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    entries = read_gguf(path)[1]
    assert len(tensors) == len(reader.tensors)
    assert len(entries) == len(tensors) - ("rope_freqs.weight" in tensors)
    for name, tensor in tensors.items():
        if not re.search("attn_[qk]|rope", name):
            found = entries[HF_NAMES[name]].read().float().numpy()
            wanted = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            assert np.array_equal(found, wanted.reshape(found.shape), equal_nan=True), name
    sizes = {
        "embedding_length": config.d_model,
        "feed_forward_length": config.d_ff,
        "context_length": config.max_length,
    }
    for key, size in sizes.items():
        assert reader.get_field(f"llama.{key}").contents() == size


# Adapters


@functools.cache
def adapter_model():
    return jitter(small_t5(activation="gelu", gated=True))


@functools.cache
def peft_names():
    """Return PEFT's name -> ours, found by saving vectors that are filled with their number."""
    model = small_t5(activation="gelu", gated=True)
    vectors = minia3.vectors(model)
    with torch.no_grad():
        for i, vector in enumerate(vectors.values()):
            vector.fill_(i)
    with tempfile.TemporaryDirectory() as folder:
        minia3.save_adapter(model, folder)
        saved = load_file(Path(folder, "adapter_model.safetensors"))
    ours = list(vectors)
    return {theirs: ours[int(tensor.flatten()[0])] for theirs, tensor in saved.items()}


def make_adapter(folder):
    minia3.save_adapter(adapter_model(), folder)


def make_adapter_bin(folder):
    make_adapter(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def make_tfew(folder):
    """T-Few's names and shapes. Its vector of a gated feed-forward scales the output of wi_1."""
    vectors = minia3.vectors(adapter_model())
    tensors = {}
    for theirs, ours in peft_names().items():
        name = theirs.removeprefix("base_model.model.").replace("ia3_l", "multi_lora_b")
        name = name.replace(".wo.", ".wi_1.")
        tensors[name] = vectors[ours].detach().reshape(-1, 1).clone()
    torch.save(tensors, folder / "finish.pt")


def read_adapter(folder, file=None):
    """Load the whole adapter, or leave the row as it was."""
    vectors = minia3.vectors(adapter_model())
    before = {name: vector.detach().clone() for name, vector in vectors.items()}
    try:
        minia3.load_adapter(adapter_model(), file or folder)
        assert all(vector.isfinite().all() for vector in vectors.values())
        if file is None and (folder / "adapter_model.safetensors").exists():
            check_adapter(folder, vectors)
    except ValueError:
        for name, vector in vectors.items():
            assert torch.equal(vector, before[name]), "half an adapter"
        raise
    finally:
        with torch.no_grad():
            for name, vector in vectors.items():
                vector.copy_(before[name])


def check_adapter(folder, vectors):
    assert read_object(folder / "adapter_config.json")["peft_type"] == "IA3"
    content = (folder / "adapter_model.safetensors").read_bytes()
    stored = {peft_names()[name]: tensor for name, tensor in honest_safetensors(content).items()}
    for name, vector in vectors.items():
        expected = torch.ones(vector.shape[1])  # a vector that is not in the file
        if name in stored:
            dtype, _, raw = stored[name]
            expected = torch.frombuffer(bytearray(raw), dtype=DTYPES[dtype]).float()
        assert torch.equal(vector[0].detach(), expected), name


def read_tfew(folder):
    read_adapter(folder, folder / "finish.pt")


# Tasks


def make_jsonl(folder):
    lines = []
    for n in range(8):
        row = {"input": f"q {n} é", "choices": ["yes", "no", f"{n}"], "label": n % 3, "idx": n}
        lines.append(json.dumps(row))
    (folder / "rows.jsonl").write_text("\n".join(lines))


def make_csv(folder):
    lines = ["input,choices,label"]
    for n in range(8):
        choices = '"[""a""]"' if n % 2 else "yes|no"
        lines.append(f'"q, {n}\n""é""",{choices},0')
    (folder / "rows.csv").write_text("\r\n".join(lines))


def make_json_list(folder):
    make_jsonl(folder)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    (folder / "rows.jsonl").unlink()
    (folder / "rows.json").write_text(json.dumps({"version": [1, {}], "rows": rows}))


def make_gzip(folder):
    make_jsonl(folder)
    content = (folder / "rows.jsonl").read_bytes()
    (folder / "rows.jsonl").unlink()
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(content))


def make_parquet(folder):
    make_jsonl(folder)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    (folder / "rows.jsonl").unlink()
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, folder / "rows.parquet", write_page_checksum=True)


def check_rows(folder):
    path = next(folder.glob("rows.*"), folder / "rows.csv")
    found = [row for _, row in read_rows(path)]
    good = [row for row in found if isinstance(row, dict)]
    for error in found:
        if not isinstance(error, dict):
            assert type(error) is ValueError
            check_one_line(error)
    if len(good) == len(found):
        assert repr(good) == repr(HONEST_ROWS[path.suffix](path.read_bytes()))
    task = load_task(path)
    rows = [*task.train, *task.validation, *task.test]
    texts = [as_text(input_of(row)) for row in good]
    assert sorted(row["input"] for row in rows) == sorted(texts)
    for row in rows:
        assert 0 <= row["label"] < len(render(task.prompts[0], row).choices)
    if path.suffix == ".csv":
        choices = sorted(map(repr, map(honest_choices, good)))
        assert sorted(repr(row.get("choices")) for row in rows) == choices
    assert task.checksums == {path.name: sha256(path.read_bytes()).hexdigest()}


def input_of(row):
    """Return the value of the column "input", in upper or lower case."""
    values = [value for name, value in row.items() if name.lower() == "input"]
    return values[0]


def as_text(value):
    """Return the text that a number or a boolean is read as: "3" for 3.0, and "true" for True."""
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else str(value).removesuffix(".0")


def honest_list(content):
    """Return the list of objects of a .json file, which may be in an object, or be lines."""
    try:
        tree = json.loads(content)
    except ValueError:
        return honest_json(content)
    if isinstance(tree, list):
        return tree
    lists = [value for value in tree.values() if isinstance(value, list)]
    (rows,) = [rows for rows in lists if isinstance(rows[:1], list) and is_object(rows[:1])]
    return rows


def is_object(values):
    return len(values) == 1 and isinstance(values[0], dict)


def honest_gzip(content):
    return honest_json(gzip.decompress(content))


def honest_parquet(content):
    rows = []
    table = parquet.read_table(io.BytesIO(content), use_threads=False)
    for values in table.to_pylist():
        row = {}
        for key, value in values.items():
            # Without the description of its type, a text is bytes.
            value = value.decode() if isinstance(value, bytes) else value
            if value is not None:
                row[key] = value
        rows.append(row)
    return rows


def honest_json(content):
    lines = content.decode("utf-8-sig").split("\n")
    return [json.loads(line) for line in lines if line.strip()]


def honest_csv(content):
    """Read the text as a whole, by the csv module's own reader of dicts."""
    text = io.StringIO(content.decode("utf-8-sig").lstrip("\r\n"), newline="")
    rows = []
    for cells in csv.DictReader(text, strict=True):
        row = {key.strip(): cell for key, cell in cells.items() if cell}
        if any(cell.strip() for cell in cells.values()):
            rows.append(row)
    return rows


def honest_choices(row):
    """Return the choices in the cell of a .csv, or None if the row has no such column."""
    cells = [cell for name, cell in row.items() if name.lower() == "choices"]
    if not cells:
        return None
    (cell,) = cells
    if cell.startswith("["):
        return json.loads(cell)
    return [choice.strip() for choice in cell.split("|")]


HONEST_ROWS = {
    ".jsonl": honest_json,
    ".csv": honest_csv,
    ".json": honest_list,
    ".gz": honest_gzip,
    ".parquet": honest_parquet,
}


MEMBERS = {f"{name}.jsonl": f"T/{name}.jsonl" for name in ("train", "val", "test")}


def make_zip(folder):
    lines = "".join(json.dumps({"text": f"{n}", "label": n % 2}) + "\n" for n in range(40))
    with zipfile.ZipFile(folder / "T.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in MEMBERS.values():
            archive.writestr(name, lines)
        archive.writestr("T/README", "x")


def read_zip(folder):
    """Read it as if its checksum were the right one: a zip archive is no safer for that."""
    path = folder / "T.zip"
    data_dir = folder / "data"
    content = path.read_bytes() if path.is_file() else b""
    source = Source(path.as_uri(), MEMBERS, len(content), sha256(content).hexdigest())
    prompt = Prompt("{text}?", ("No", "Yes"))
    known_tasks()["fuzzed"] = TaskSpec((prompt,), [source], ("0", "1"))
    try:
        task = load_task("fuzzed", data_dir)
        assert [row["text"] for row in task.train] == texts_in_zip(path, "train.jsonl")
        assert [row["text"] for row in task.validation] == texts_in_zip(path, "val.jsonl")
    finally:
        del known_tasks()["fuzzed"]
        written = {path.name for path in data_dir.rglob("*")} if data_dir.exists() else set()
        assert written <= {"fuzzed", "train.jsonl", "val.jsonl", "test.jsonl"}
        assert {path.name for path in folder.iterdir()} <= {"T.zip", "data"}


def texts_in_zip(path, name):
    with zipfile.ZipFile(path) as archive:
        lines = archive.read(MEMBERS[name]).splitlines()
    return [json.loads(line)["text"] for line in lines if line.strip()]


# Runs


def make_run(folder):
    flags = {"model": "m", "task": "t", "steps": 10, "data": {"train.jsonl": "0"}, "minia3": "0"}
    write_json(folder / "config.json", flags)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    vectors = {}
    for name, vector in minia3.vectors(adapter_model()).items():
        vectors[name] = vector.detach()[0].clone()
    random = random_state(torch.device("cpu"))
    group = {"cells": [], "log": {"step": 3}, "parameters": vectors, "random": random}
    save_checkpoint(folder, Checkpoint(n_bytes=12, group=group))


def read_run(folder):
    flags = read_run_config(folder)
    assert {"model", "task"} <= flags.keys()
    check_data(folder, {"train.jsonl": "0"})
    saved = load_checkpoint(folder)
    if saved is not None:
        assert type(saved) is Checkpoint
        with suppress(OSError):  # train.py reports it in one line
            written = Metrics(folder, saved.n_bytes)
            written.cut()
            written.write(step=4)


class Target(NamedTuple):
    make: Callable
    read: Callable
    n_cases: int  # in a plain run


TARGETS = {
    "safetensors": Target(make_safetensors, read_safetensors, 800),
    "bin": Target(make_bin, read_bin, 500),
    "old bin": Target(make_old_bin, read_bin, 500),
    "T5 config": Target(make_t5_config, read_config, 800),
    "LLaMA config": Target(make_llama_config, read_config, 800),
    "T5 model": Target(make_t5, read_model, 300),
    "LLaMA model": Target(make_llama, read_model, 300),
    "shards": Target(make_shards, read_model, 400),
    "Meta": Target(make_meta, read_meta, 300),
    "tokenizer.json": Target(make_tokenizer_json, read_tokenizer, 600),
    "spiece.model": Target(make_unigram, read_tokenizer, 600),
    "tokenizer.model": Target(make_bpe, read_tokenizer, 600),
    "GGUF": Target(make_gguf, check_gguf, 800),
    "adapter": Target(make_adapter, read_adapter, 500),
    "adapter bin": Target(make_adapter_bin, read_adapter, 300),
    "T-Few": Target(make_tfew, read_tfew, 300),
    "JSONL": Target(make_jsonl, check_rows, 500),
    "csv": Target(make_csv, check_rows, 500),
    "JSON list": Target(make_json_list, check_rows, 500),
    "rows in gzip": Target(make_gzip, check_rows, 300),
    "parquet": Target(make_parquet, check_rows, 500),
    "zip": Target(make_zip, read_zip, 300),
    "run": Target(make_run, read_run, 300),
    "chat template": Target(program.make_templates, program.read_chat_templates, 300),
    "task file": Target(program.make_task, program.read_task, 500),
    "LoRA": Target(program.make_lora, program.read_lora, 200),
    "generation": Target(program.make_generation_config, program.read_generation_config, 500),
}
