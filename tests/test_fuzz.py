"""Guards the border: whatever is done to a file that comes from outside ends in a ValueError of one line, or in what an
honest reading of the changed file gives: never in another exception, a crash, a hang, gigabytes, or a wrong model.

Every case is made of (seed, target, number) alone, and the message of a failure says how to repeat it. MINIA3_FUZZ is
how many cases there are in all (some thousands without it), MINIA3_FUZZ_SEED another seed.

What cannot be promised: a file that is cut *while* it is mapped ends the process with SIGBUS, in torch and safetensors
as here. Replace files by renaming, as everything here that writes does; a mapped file then stays whole.
"""

import csv
import io
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import struct
import sys
import warnings
import zipfile
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file

import minia3
from minia3.adapters.peft_files import peft_tensors
from minia3.adapters.rows import row_of
from minia3.checkpoints import save as save_module
from minia3.checkpoints.gguf import NAMES, read_gguf, read_metadata
from minia3.checkpoints.load import read_checkpoint
from minia3.checkpoints.tensor_names import name_table
from minia3.checkpoints.tokenizer import Tokenizer
from minia3.files.tensors import read_tensors
from minia3.model.llama import Llama, LlamaConfig
from minia3.model.t5 import T5, T5Config
from minia3.tasks.known_tasks import known_tasks
from minia3.tasks.prompts import Prompt
from minia3.tasks.rows import read_rows
from minia3.tasks.splits import load_task
from minia3.tasks.task import Source, TaskSpec
from minia3.training.checkpoint import load_checkpoint, random_state
from minia3.training.run_folder import Metrics, read_run_config, record_data

resource = pytest.importorskip("resource", reason="memory is limited by a means that Windows lacks")
SEED = int(os.environ.get("MINIA3_FUZZ_SEED", "0"))
SECONDS, RESIDENT = 5, 300  # of one case on the CPU, and MB that it may fill
MEMORY = 4 << 30  # bytes that a child may ask for, filled or not

# Mutations: (generator, bytes of a file) -> other bytes

LIES = [0, 1, 2, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
TEXTS = [
    "",
    "x",
    "a\nb",
    "../x",
    "/etc/passwd",
    "\ud800",
    "a\0b",
    "x" * 5000,
    "F32",
    "F16",
    "BF16",
    "I64",
    "F8_E5M2",
]
VALUES = [  # JSON's own texts
    "null", "true", "false", "0", "1", "-1", "2", "3", "4.0", "1.5", "1e400", "-1e-300", "NaN", "Infinity", "-Infinity",
    "[]", "{}", "[0]", "[0,0]", "[4,6]", "[1,1,1]",
    *map(str, LIES), "9" * 5000, "[2147483648,4294967296]", '["x"]', "[null,{}]", '{"x":1}',
    *map(json.dumps, TEXTS), "[" * 10_000 + "]" * 10_000, '{"a":' * 10_000 + "1" + "}" * 10_000,
]  # fmt: skip


class Raw(str):
    """JSON's own text in the place of a value."""


def dump(value):
    """JSON; a dict may be a list of pairs, so that a key can be there twice."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, tuple):
        return "{" + ", ".join(f"{json.dumps(key)}: {dump(item)}" for key, item in value) + "}"
    return "[" + ", ".join(map(dump, value)) + "]" if isinstance(value, list) else json.dumps(value)


def mutate_json(rng, content):
    """One or two places: another value, a key less, a key twice, a key of another name."""
    try:
        tree = json.loads(content, object_pairs_hook=tuple)
    except ValueError:
        return damage(rng, content)
    for _ in range(rng.choice([1, 1, 1, 2])):
        tree = mutate_tree(rng, tree)
    return dump(tree).encode()


def mutate_tree(rng, tree):
    if not isinstance(tree, list | tuple) or not tree or rng.random() < 0.05:
        return Raw(rng.choice(VALUES))
    items, at, how = list(tree), rng.randrange(len(tree)), rng.random()
    if how < 0.1:
        items.pop(at)
    elif how < 0.2:
        items.append(items[at])
    elif isinstance(tree, list):
        items[at] = mutate_tree(rng, items[at])
    elif how < 0.3:
        items[at] = (
            rng.choice(["x", "", "a\nb", items[at][0] + "x", "../x", rng.choice(items)[0]]),
            items[at][1],
        )
    elif how < 0.4:
        items.append((items[at][0], mutate_tree(rng, items[at][1])))  # the same key twice
    else:
        items[at] = (items[at][0], mutate_tree(rng, items[at][1]))
    return type(tree)(items)


def damage(rng, content):
    """Bytes as such: cut, flipped, overwritten by numbers that lie, left out, repeated, foreign."""
    new, how = bytearray(content), rng.randrange(7)
    at = (
        rng.randrange(len(new) + 1) if rng.random() < 0.5 else rng.randrange(min(len(new), 600) + 1)
    )
    n = rng.choice([1, 2, 4, 8, 100])
    if how == 0:
        del new[at:]
    elif how == 1:
        for _ in range(rng.choice([1, 1, 3, 20])):
            if new:
                new[rng.randrange(len(new))] ^= 1 << rng.randrange(8)
    elif how == 2:
        width = rng.choice([4, 8])
        new[at : at + width] = (rng.choice(LIES) % 2 ** (8 * width)).to_bytes(
            width, rng.choice(["little", "big"])
        )
    elif how == 3:
        del new[at : at + n]
    elif how == 4:
        new[at:at] = new[at : at + n]
    elif how == 5:
        new[at : at + n] = rng.randbytes(n)
    else:
        new[at:at] = rng.choice(
            [b"\0", b"\xff", b"\n", b'"', b",", b"\xef\xbb\xbf", b"{", b"]", b"\r", b"\x80" * 12]
        )
    return bytes(new)


def poison(rng, content):
    """NaN or infinity in the place of one of the last numbers."""
    at = len(content) - 4 * rng.randrange(1, max(len(content) // 8, 2))
    return (
        content[:at]
        + rng.choice([b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff"])
        + content[at + 4 :]
    )


def mutate_safetensors(rng, content):
    n = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + n]
    how = rng.random()
    if how < 0.6:
        header = mutate_json(rng, header)
        n = len(header)
    elif how < 0.7:
        n = rng.choice([*LIES, n - 1, n + 1, n + 8, len(content) - 8])
    elif how < 0.8:
        return poison(rng, content)
    else:
        return damage(rng, content)
    return n.to_bytes(8, "little") + header + content[8 + int.from_bytes(content[:8], "little") :]


def mutate_zip(rng, content):
    """Half of them with entries that are changed and whole, so that no checksum gives them away."""
    if rng.random() < 0.4 or not zipfile.is_zipfile(io.BytesIO(content)):
        return damage(rng, content)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    at = rng.randrange(len(entries))
    if rng.random() < 0.5:  # the pickle, where there is one: it says what is where
        at = next((i for i, (name, _) in enumerate(entries) if name.endswith(".pkl")), at)
    name, body = entries[at]
    how = rng.randrange(6)
    if how == 0:
        entries.append(("../" * rng.randrange(3) + name, body))
    elif how == 1:
        entries.pop(at)
    elif how == 2:
        entries[at] = (name, bytes(1 << 21))
    else:
        entries[at] = (name, (poison if how == 3 else damage)(rng, body))
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", rng.choice([0, 8])) as archive:
        warnings.simplefilter("ignore")  # a name that is there twice
        for name, body in entries:
            archive.writestr(name, body)
    return out.getvalue()


def mutate_lines(rng, content):
    """A line of JSON; the line ends and the order of lines stay."""
    lines = content.split(b"\n")
    at = rng.randrange(len(lines))
    lines[at] = mutate_json(rng, lines[at]) if rng.random() < 0.7 else damage(rng, lines[at])
    return b"\n".join(lines)


MUTATIONS = {
    ".json": mutate_json,
    ".safetensors": mutate_safetensors,
    ".bin": mutate_zip,
    ".pt": mutate_zip,
    ".pth": mutate_zip,
    ".zip": mutate_zip,
    ".jsonl": mutate_lines,
}


def mutate(rng, folder):
    """Do something to one file of `folder`: -> what."""
    path = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    content, how = path.read_bytes(), rng.random()
    if how < 0.02:
        path.unlink()
        if how < 0.01:
            path.mkdir()
        return f"{path.name}: {'a directory' if how < 0.01 else 'not there'}"
    if how < 0.03:
        changed = b""
    else:
        changed = (MUTATIONS.get(path.suffix, damage) if rng.random() < 0.75 else damage)(
            rng, content
        )
    path.write_bytes(changed)
    first = next(
        (i for i, (a, b) in enumerate(zip(content, changed, strict=False)) if a != b), "the end"
    )
    return f"{path.name}: {len(content)} bytes became {len(changed)}, from {first} on"


# Honest readings, as plain as can be


def honest_safetensors(content):
    """name -> (dtype, shape, bytes)."""
    n = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + n])
    found = {}
    for name, info in header.items():
        if name != "__metadata__":
            begin, end = info["data_offsets"]
            found[name] = info["dtype"], tuple(info["shape"]), content[8 + n + begin : 8 + n + end]
    return found


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def raw_bytes(tensor):
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def same_entries(entries, content):
    honest = honest_safetensors(content)
    assert entries.keys() == honest.keys()
    for name, entry in entries.items():
        dtype, shape, raw = honest[name]
        assert (entry.shape, entry.dtype) == (shape, DTYPES.get(dtype, dtype)), name
        if dtype in DTYPES and raw:
            assert raw_bytes(entry.read()) == raw, name


def is_number(x, low, high=math.inf):
    return type(x) in (int, float) and low <= x < high


def is_id(x):
    return type(x) is int


SIZES = {  # ours -> config.json's
    "t5": {"d_model": "d_model", "d_head": "d_kv", "d_ff": "d_ff", "n_layers": "num_layers", "n_heads": "num_heads",
           "n_decoder_layers": "num_decoder_layers", "n_buckets": "relative_attention_num_buckets",
           "max_distance": "relative_attention_max_distance"},
    "llama": {"d_model": "hidden_size", "d_head": "head_dim", "d_ff": "intermediate_size",
              "n_heads": "num_attention_heads", "n_layers": "num_hidden_layers", "n_kv_heads": "num_key_value_heads",
              "max_length": "max_position_embeddings"},
}  # fmt: skip


def sane_config(config, raw, generation):
    """What is read is what the file says, and a model could be made of it."""
    t5 = isinstance(config, T5Config)
    for name, key in {**SIZES["t5" if t5 else "llama"], "vocab_size": "vocab_size"}.items():
        value = getattr(config, name)
        assert type(value) is int, name
        assert value >= 1, name
        assert raw.get(key) in (None, value), name
    assert is_number(config.eps, 0), f"eps {config.eps}"
    assert is_number(config.dropout, 0, 1.0001), f"dropout {config.dropout}"
    for key in ("tie_word_embeddings", "scale_decoder_outputs"):
        assert raw.get(key) in (True, False, None), f"{key} {raw[key]!r}"
    assert config.pad_id is None or is_id(config.pad_id), f"pad_id {config.pad_id!r}"
    assert type(config.eos_ids) is tuple
    assert all(is_id(i) for i in config.eos_ids), f"eos_ids {config.eos_ids!r}"
    wanted = (
        raw.get("eos_token_id")
        if generation.get("eos_token_id") is None
        else generation["eos_token_id"]
    )
    wanted = wanted if isinstance(wanted, list) or wanted is None else [wanted]
    assert wanted is None or config.eos_ids == tuple(wanted), f"eos_ids {config.eos_ids!r}"
    if t5:
        assert is_id(config.start_id), f"start_id {config.start_id!r}"
        assert 0 <= config.start_id < config.vocab_size, f"start_id {config.start_id}"
    else:
        assert config.n_heads % config.n_kv_heads == 0
        assert is_number(config.rope_theta, 1e-300), f"theta {config.rope_theta}"
        assert config.bos_id is None or is_id(config.bos_id), f"bos_id {config.bos_id!r}"
        assert all(is_number(x, 1e-300) for x in config.rope_scaling or ()), (
            f"scaling {config.rope_scaling}"
        )


def read_object(path):
    return json.loads(path.read_bytes()) if path.exists() else {}


# Targets: a whole folder, and what reading it must give


def small_t5(**changes):
    sizes = {
        "d_model": 8,
        "d_head": 2,
        "d_ff": 12,
        "n_layers": 2,
        "n_decoder_layers": 1,
        "n_heads": 4,
        "vocab_size": 20,
    }
    torch.manual_seed(0)
    return T5(T5Config(**{**sizes, "n_buckets": 8, "max_distance": 16, **changes})).eval()


def small_llama():
    torch.manual_seed(0)
    sizes = {
        "d_model": 8,
        "d_head": 4,
        "d_ff": 12,
        "n_layers": 2,
        "n_heads": 2,
        "n_kv_heads": 1,
        "vocab_size": 20,
    }
    return Llama(LlamaConfig(**sizes, max_length=32, rope_scaling=(8.0, 1.0, 4.0, 16))).eval()


def jitter(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(1 + 0.1 * torch.randn(parameter.shape))
    return model


def make_safetensors(folder):
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(2, 3),
        "b.c": torch.randn(4).half(),
        "n": torch.arange(3),
        "e": torch.randn(0, 2),
    }
    (folder / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))


def read_safetensors(folder):
    path = folder / "model.safetensors"
    same_entries(read_tensors(path), path.read_bytes())


def make_bin(folder, zipped=True):
    torch.manual_seed(0)
    both = torch.randn(2, 3)
    tensors = {"a": both, "b.c": both[0], "h": torch.randn(4).bfloat16(), "n": torch.arange(3)}
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)


def read_bin(folder):
    for name, entry in read_tensors(folder / "pytorch_model.bin").items():
        assert type(name) is str
        tensor = entry.read()
        assert (tuple(tensor.shape), tensor.dtype) == (entry.shape, entry.dtype)
        assert tensor.layout == torch.strided
        tensor.double().sum()  # touches every number


def make_t5(folder):
    minia3.save_model(jitter(small_t5()), folder)


def make_llama(folder):
    minia3.save_model(jitter(small_llama()), folder)


def make_shards(folder):
    size, save_module.SHARD_BYTES = save_module.SHARD_BYTES, 1500
    try:
        make_llama(folder)
    finally:
        save_module.SHARD_BYTES = size


def read_model(folder):
    model = minia3.load_model(folder)
    sane_config(
        model.config,
        read_object(folder / "config.json"),
        read_object(folder / "generation_config.json"),
    )
    table, parameters = name_table(model), dict(model.named_parameters())
    shards = [folder / "model.safetensors"]
    if not shards[0].exists():
        weight_map = read_object(folder / "model.safetensors.index.json")["weight_map"]
        shards = sorted({folder / name for name in weight_map.values()})
        assert all(path.parent == folder for path in shards)
    for path in shards:
        for name, (dtype, shape, raw) in honest_safetensors(path.read_bytes()).items():
            found = parameters.pop(table[name]) if table[name] else None
            assert found is None or (tuple(found.shape), raw_bytes(found)) == (shape, raw), (
                name,
                dtype,
            )
    assert all(name.endswith(".scale") and (x == 1).all() for name, x in parameters.items()), (
        parameters.keys()
    )
    ids = torch.tensor([[1, 2, 3]])
    with (
        torch.no_grad()
    ):  # a config that a model can be made of, but not run, is a mistake that comes late
        state = model.start(ids)
        model.step(state.start, state)


def make_meta(folder):
    """Two shards as Meta writes them."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "tok_embeddings": (20, 4),
        "norm": (8,),
        "output": (10, 8),
        "layers.0.attention_norm": (8,),
    }
    shapes |= {
        "layers.0.attention.wq": (4, 8),
        "layers.0.attention.wk": (4, 8),
        "layers.0.attention.wv": (4, 8),
    }
    shapes |= {
        "layers.0.attention.wo": (8, 4),
        "layers.0.feed_forward.w1": (6, 8),
        "layers.0.feed_forward.w3": (6, 8),
    }
    shapes |= {"layers.0.feed_forward.w2": (8, 6), "layers.0.ffn_norm": (8,)}
    for i in range(2):
        shard = {
            f"{name}.weight": torch.rand(shape, generator=generator)
            for name, shape in shapes.items()
        }
        torch.save(shard, folder / f"consolidated.{i:02d}.pth")
    params = {
        "dim": 8,
        "n_layers": 1,
        "n_heads": 2,
        "norm_eps": 1e-5,
        "vocab_size": -1,
        "multiple_of": 256,
    }
    (folder / "params.json").write_text(json.dumps(params))


def read_meta(folder):
    model, params = minia3.load_model(folder), read_object(folder / "params.json")
    sane_config(model.config, {}, {})
    for key, name in {
        "dim": "d_model",
        "n_layers": "n_layers",
        "n_heads": "n_heads",
        "norm_eps": "eps",
    }.items():
        assert params.get(key, getattr(model.config, name)) == getattr(model.config, name), key
    assert params.get("vocab_size") in (None, -1, model.config.vocab_size)
    state = model.start(torch.tensor([[1, 2, 3]]))
    model.step(state.start, state)


def make_config(folder):
    (folder / "config.json").write_text(
        json.dumps(minia3.config.to_hf(small_t5().config, torch.float32))
    )
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [1, 2], "pad_token_id": 0})
    )


def make_llama_config(folder):
    make_config(folder)
    (folder / "config.json").write_text(
        json.dumps(minia3.config.to_hf(small_llama().config, torch.float32))
    )


def read_config(folder):
    found = read_checkpoint(folder, weights=False)[0]
    sane_config(
        found, read_object(folder / "config.json"), read_object(folder / "generation_config.json")
    )


def protobuf(number, value):
    if isinstance(value, int):
        return bytes([number << 3]) + varint(value)
    if isinstance(value, float):
        return bytes([number << 3 | 5]) + struct.pack("<f", value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(n):
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)


PIECES = [
    ("<unk>", 0.0, 2),
    ("<s>", 0.0, 3),
    ("</s>", 0.0, 3),
    ("▁", -1.0, 1),
    ("a", -2.0, 1),
    ("b", -2.5, 1),
]
PIECES += [("ab", -1.5, 1), ("▁ab", -0.5, 1), ("<x>", 0.0, 4)]


def sentencepiece(kind, pieces=PIECES):
    made = b"".join(
        protobuf(1, protobuf(1, text.encode()) + protobuf(2, score) + protobuf(3, kind))
        for text, score, kind in pieces
    )
    return made + protobuf(2, protobuf(3, kind)) + protobuf(3, protobuf(3, 1) + protobuf(4, 0))


TOKENIZER_CONFIG = {
    **{
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "lstrip": False},
        "add_bos_token": True,
        "extra_ids": 4,
    },
    "added_tokens_decoder": {
        "9": {"content": "<new>", "special": True},
        "10": {"content": "<more>"},
    },
    "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
}


def make_spiece(folder, name="spiece.model", kind=1):
    (folder / name).write_bytes(sentencepiece(kind))
    text = json.dumps(TOKENIZER_CONFIG)
    if kind == 1:  # T5's sentinels come before what was added
        text = text.replace('"9"', '"13"').replace('"10"', '"14"')
    (folder / "tokenizer_config.json").write_text(text)
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": "</s>", "pad_token": "<unk>"})
    )
    (folder / "config.json").write_text(json.dumps({"pad_token_id": 0, "eos_token_id": [2, 1]}))


def make_bpe(folder):
    make_spiece(folder, "tokenizer.model", 2)


def make_tokenizer_json(folder):
    make_bpe(folder)
    Tokenizer.from_folder(folder).save(folder)
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))


def sane_tokenizer(tokenizer):
    for text in ("ab ba é\n", "", "</s> x", "ab" * 50):
        try:
            ids = tokenizer.encode(text)
            assert all(type(i) is int and 0 <= i < 2**32 for i in ids)
            assert type(tokenizer.decode(ids)) is str
            tokenizer.encode_target(text, end=True)
        except ValueError as error:
            one_line(error)
    assert type(tokenizer.pad_id) is int
    for i in (tokenizer.bos_id, tokenizer.eos_id):
        assert i is None or type(i) is int


def read_tokenizer(folder):
    sane_tokenizer(Tokenizer.from_folder(folder))


def gguf_value(value):
    if isinstance(value, str):
        return 8, struct.pack("<Q", len(value.encode())) + value.encode()
    if isinstance(value, list):
        kind = gguf_value(value[0])[0]
        return 9, struct.pack("<IQ", kind, len(value)) + b"".join(
            gguf_value(item)[1] for item in value
        )
    return (
        (6, struct.pack("<f", value)) if isinstance(value, float) else (4, struct.pack("<I", value))
    )


GGUF = {
    **{
        "general.architecture": "llama",
        "llama.embedding_length": 8,
        "llama.feed_forward_length": 32,
    },
    **{"llama.block_count": 1, "llama.context_length": 64, "llama.attention.head_count": 2},
    **{"llama.attention.head_count_kv": 1, "llama.attention.layer_norm_rms_epsilon": 0.001},
    **{"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": [text for text, _, _ in PIECES]},
    **{
        "tokenizer.ggml.scores": [score for _, score, _ in PIECES],
        "tokenizer.ggml.eos_token_id": 2,
    },
    "tokenizer.ggml.token_type": [kind for _, _, kind in PIECES],
}


def make_gguf(folder):
    rng = np.random.default_rng(0)
    shapes = {"token_embd.weight": (9, 8), "output_norm.weight": (8,), "rope_freqs.weight": (2,)}
    shapes |= {
        "blk.0.attn_q.weight": (8, 8),
        "blk.0.attn_k.weight": (4, 8),
        "blk.0.attn_v.weight": (4, 8),
    }
    shapes |= {
        "blk.0.attn_output.weight": (8, 8),
        "blk.0.attn_norm.weight": (8,),
        "blk.0.ffn_norm.weight": (8,),
    }
    shapes |= {
        "blk.0.ffn_gate.weight": (32, 8),
        "blk.0.ffn_up.weight": (32, 8),
        "blk.0.ffn_down.weight": (8, 32),
    }
    header, body = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(GGUF)), b""
    for key, value in GGUF.items():
        kind, packed = gguf_value(value)
        header += gguf_value(key)[1] + struct.pack("<I", kind) + packed
    for name, shape in shapes.items():
        kind, numbers = 0, rng.uniform(0.5, 1.5, shape).astype("<f4").tobytes()
        if name.endswith("down.weight"):  # Q8_0: a float16 scale and 32 bytes
            kind, numbers = 8, b"".join(struct.pack("<e", 0.01) + rng.bytes(32) for _ in range(8))
        header += gguf_value(name)[1] + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        header += struct.pack("<IQ", kind, len(body))
        body += numbers + bytes(-len(numbers) % 32)
    (folder / "a.gguf").write_bytes(header + bytes(-len(header) % 32) + body)


def check_gguf(folder):
    path = folder / "a.gguf"
    meta = read_metadata(path)
    assert all(type(key) is str for key in meta)
    try:
        sane_tokenizer(Tokenizer.from_gguf(meta, path))
    except ValueError as error:
        one_line(error)
    model = minia3.load_model(path)
    sane_config(model.config, {}, {})
    # the package gguf reads the same, where it reads at all
    import gguf

    peer = gguf.GGUFReader(path)
    theirs = {tensor.name: tensor for tensor in peer.tensors}
    ours, config = read_gguf(path)[1], model.config
    assert len(theirs) == len(peer.tensors)
    assert len(ours) == len(theirs) - ("rope_freqs.weight" in theirs)
    for name, tensor in theirs.items():
        if re.search("attn_[qk]|rope", name):
            continue
        block = re.fullmatch(r"blk\.0\.(.*)", name)
        key = NAMES["blk.{}." + block[1] if block else name].format(0)
        wanted = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(
            ours[key].read().float().numpy(), wanted.reshape(ours[key].shape), equal_nan=True
        ), name
    fields = {
        "d_model": "embedding_length",
        "d_ff": "feed_forward_length",
        "max_length": "context_length",
    }
    for name, key in fields.items():
        assert getattr(config, name) == peer.get_field(f"llama.{key}").contents()
    state = model.start(torch.tensor([[1, 2, 3]]))
    model.step(state.start, state)


MODEL = {}


def adapter_model():
    return MODEL.setdefault("t5", jitter(small_t5(activation="gelu", gated=True)))


def make_adapter(folder):
    minia3.save_adapter(adapter_model(), folder)


def make_adapter_bin(folder):
    make_adapter(folder)
    torch.save(peft_tensors(row_of(adapter_model(), 0)), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def make_tfew(folder):
    vectors, tensors = minia3.vectors(adapter_model()), {}
    for theirs, ours in minia3.names.TFEW.items():
        for i in range(2):
            if ours.format(i) in vectors:
                tensors[theirs.format(i)] = vectors[ours.format(i)].detach().reshape(-1, 1).clone()
    torch.save(tensors, folder / "finish.pt")


def read_adapter(folder, file=None):
    """The whole adapter comes in, or the row is what it was."""
    model = adapter_model()
    vectors = minia3.vectors(model)
    before = {name: x.detach().clone() for name, x in vectors.items()}
    try:
        minia3.load_adapter(model, file or folder)
        assert all(x.isfinite().all() for x in vectors.values())
        path = folder / "adapter_model.safetensors"
        if path.exists() and file is None:
            assert read_object(folder / "adapter_config.json")["peft_type"] == "IA3"
            places = {
                theirs: ours for ours, x in before.items() for theirs in peft_tensors({ours: x[0]})
            }
            honest = {places[name]: x for name, x in honest_safetensors(path.read_bytes()).items()}
            for name, x in vectors.items():
                dtype, _, raw = honest.get(
                    name, ("F32", None, np.ones(x.shape[1], "<f4").tobytes())
                )
                value = torch.frombuffer(bytearray(raw), dtype=DTYPES[dtype]).float()
                assert torch.equal(x[0].detach(), value), name
    except ValueError:
        assert all(torch.equal(x, before[name]) for name, x in vectors.items()), "half an adapter"
        raise
    finally:
        with torch.no_grad():
            for name, x in vectors.items():
                x.copy_(before[name])


def read_tfew(folder):
    read_adapter(folder, folder / "finish.pt")


def make_jsonl(folder):
    rows = [
        {"input": f"q {n} é", "choices": ["yes", "no", f"{n}"], "label": n % 3, "idx": n}
        for n in range(8)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))


def make_csv(folder):
    rows = [
        f'"q, {n}\n""é""",{["yes|no", chr(34) + "[" + chr(34) * 2 + "a" + chr(34) * 2 + "]" + chr(34)][n % 2]},0'
        for n in range(8)
    ]
    (folder / "rows.csv").write_text("input,choices,label\r\n" + "\r\n".join(rows))


def check_rows(folder):
    path = next(folder.glob("rows.*"), folder / "rows.csv")
    found = [row for _, row in read_rows(path)]
    for error in (row for row in found if not isinstance(row, dict)):
        assert type(error) is ValueError
        one_line(error)
    good = [row for row in found if isinstance(row, dict)]
    if len(good) == len(found):
        wanted = (honest_json if path.suffix == ".jsonl" else honest_csv)(path.read_bytes())
        assert repr(good) == repr(wanted)
    task = load_task(path)
    parts = [*task.train, *task.validation, *task.test]
    assert sorted(row["input"] for row in parts) == sorted(row["input"] for row in good)
    assert all(0 <= row["label"] < len(row.get("choices", [0])) for row in parts)
    assert task.checksums == {path.name: sha256(path.read_bytes()).hexdigest()}


def honest_json(content):
    return [json.loads(line) for line in content.decode("utf-8-sig").split("\n") if line.strip()]


def honest_csv(content):
    """By the module's own reader of dicts, of what is given to it whole."""
    rows = []
    for cells in csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True):
        row = {key: cell for key, cell in cells.items() if cell}
        if "choices" in row:
            text = row["choices"]
            row["choices"] = (
                json.loads(text)
                if text.startswith("[")
                else [choice.strip() for choice in text.split("|")]
            )
        if any(cell.strip() for cell in cells.values()):
            rows.append(row)
    return rows


MEMBERS = {f"{name}.jsonl": f"T/{name}.jsonl" for name in ("train", "val", "test")}


def make_zip(folder):
    with zipfile.ZipFile(folder / "T.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in MEMBERS.values():
            archive.writestr(
                name,
                "".join(json.dumps({"text": f"{n}", "label": n % 2}) + "\n" for n in range(40)),
            )
        archive.writestr("T/README", "x")


def read_zip(folder):
    """As if the table's checksum were that of the file: a zip is no safer for being the right one."""
    path, out = folder / "T.zip", folder / "data"
    content = path.read_bytes() if path.is_file() else b""
    source = Source(path.as_uri(), MEMBERS, len(content), sha256(content).hexdigest())
    known_tasks()["fuzzed"] = TaskSpec((Prompt("{text}?", ("No", "Yes")),), [source], ("0", "1"))
    try:
        task = load_task("fuzzed", out)
        with zipfile.ZipFile(path) as archive:
            for name, rows in (("train.jsonl", task.train), ("val.jsonl", task.validation)):
                texts = [
                    json.loads(line)["text"]
                    for line in archive.read(MEMBERS[name]).splitlines()
                    if line.strip()
                ]
                assert [row["text"] for row in rows] == texts
    finally:
        del known_tasks()["fuzzed"]
        left = {path.name for path in out.rglob("*")} if out.exists() else set()
        assert left <= {"fuzzed", "train.jsonl", "val.jsonl", "test.jsonl"}
        assert {path.name for path in folder.iterdir()} <= {"T.zip", "data"}


def make_run(folder):
    flags = {"model": "m", "task": "t", "steps": 10, "data": {"train.jsonl": "0"}, "minia3": "0"}
    (folder / "config.json").write_text(json.dumps(flags))
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    vectors = {name: x.detach()[0].clone() for name, x in minia3.vectors(adapter_model()).items()}
    state = {
        "done": 0,
        "step": 3,
        "finished": False,
        "metrics": 12,
        "vectors": vectors,
        "best": None,
        "random": random_state(),
    }
    torch.save(state, folder / "checkpoint.pt")


def read_run(folder):
    flags = read_run_config(folder)
    assert {"model", "task"} <= flags.keys()
    record_data(folder, {"train.jsonl": "0"})
    saved = load_checkpoint(folder)
    assert saved is None or (
        type(saved) is dict and {"done", "finished", "metrics"} <= saved.keys()
    ), "no state"
    if saved is not None and type(saved["metrics"]) is int and saved["metrics"] >= 0:
        with suppress(OSError):  # train.py says it in one line
            Metrics(folder, saved["metrics"]).write(step=4)


class Target(NamedTuple):
    make: object
    read: object
    n: int  # cases in a plain run


TARGETS = {
    "safetensors": Target(make_safetensors, read_safetensors, 800),
    "bin": Target(make_bin, read_bin, 500),
    "old bin": Target(lambda folder: make_bin(folder, zipped=False), read_bin, 500),
    "T5 config": Target(make_config, read_config, 800),
    "LLaMA config": Target(make_llama_config, read_config, 800),
    "T5 model": Target(make_t5, read_model, 300),
    "LLaMA model": Target(make_llama, read_model, 300),
    "shards": Target(make_shards, read_model, 400),
    "Meta": Target(make_meta, read_meta, 300),
    "tokenizer.json": Target(make_tokenizer_json, read_tokenizer, 600),
    "spiece.model": Target(make_spiece, read_tokenizer, 600),
    "tokenizer.model": Target(make_bpe, read_tokenizer, 600),
    "GGUF": Target(make_gguf, check_gguf, 800),
    "adapter": Target(make_adapter, read_adapter, 500),
    "adapter bin": Target(make_adapter_bin, read_adapter, 300),
    "T-Few": Target(make_tfew, read_tfew, 300),
    "JSONL": Target(make_jsonl, check_rows, 500),
    "csv": Target(make_csv, check_rows, 500),
    "zip": Target(make_zip, read_zip, 300),
    "run": Target(make_run, read_run, 300),
}
SHARE = int(os.environ.get("MINIA3_FUZZ", "0")) / sum(target.n for target in TARGETS.values()) or 1


def one_line(error):
    message = str(error)
    assert message, "a ValueError that says nothing"
    assert "\n" not in message, f"more than a line: {message!r}"
    assert len(message) < 1_000_000, f"{len(message)} characters"


def run_case(name, number, whole, scratch):
    """-> what was done, and what went wrong with it (or "")."""
    rng = random.Random(f"{SEED} {name} {number}")
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(whole, scratch)
    what, before = mutate(rng, scratch), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        try:
            TARGETS[name].read(scratch)
        except ValueError as error:
            one_line(error)
        used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
        assert used < RESIDENT, f"{used} MB of memory"
    except BaseException as error:  # a panic of Rust is not even an Exception
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        return what, kind + (str(error).splitlines() or ["wrong"])[0][:300]
    return what, ""


def child(name, numbers, whole, scratch, pipe):
    """Never returns. Writes a line to `pipe` before each case, and one about each that went wrong."""
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # Rust's panics, which become ValueErrors
    warnings.simplefilter("ignore")
    limit = (
        int(re.search(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
        + MEMORY
    )
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for number in numbers:
        os.write(pipe, f"{number}\n".encode())
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # what it signals ends the process
        signal.setitimer(
            signal.ITIMER_REAL, 20 * SECONDS
        )  # on a busy machine; or where it waits for something
        what, wrong = run_case(name, number, whole, scratch)
        if wrong:
            os.write(pipe, f"{number}: {what}: {wrong}\n".encode("utf-8", "replace"))
    os._exit(0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit on memory is Linux's")
@pytest.mark.parametrize("name", TARGETS)
def test_a_damaged_file_is_one_line_or_read_as_it_is(name, tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    TARGETS[name].make(whole)
    TARGETS[name].read(
        shutil.copytree(whole, tmp_path / "scratch")
    )  # the whole one is read, and is as it should be
    n, first, failures = math.ceil(TARGETS[name].n * SHARE), 0, []
    while first < n and not failures:
        reading, writing = os.pipe()
        process = os.fork()
        if process == 0:
            try:
                child(name, range(first, n), whole, tmp_path / "scratch", writing)
            finally:
                os._exit(1)
        os.close(writing)
        with open(reading) as pipe:
            lines = pipe.read().splitlines()
        _, status = os.waitpid(process, 0)
        failures += [line for line in lines if ":" in line]
        last = max(int(line.split(":")[0]) for line in lines)
        if status:
            failures.append(
                f"{last}: ended the process with status {status} (27: more than {SECONDS} s of CPU)"
            )
        first = last + 1
    repeat = f"MINIA3_FUZZ_SEED={SEED}; run_case({name!r}, NUMBER, ...)"
    assert not failures, f"{len(failures)} of {n} cases ({repeat}):\n" + "\n".join(failures)


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("form", ["plain", "zip", "old"])
@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "adapter_model.bin", "finish.pt", "checkpoint.pt"]
)
def test_a_pickle_that_would_run_code_does_not(tmp_path, name, form):
    path, marker = tmp_path / name, tmp_path / "ran"
    if form == "plain":
        path.write_bytes(pickle.dumps({"a": Code(marker)}))
    else:
        torch.save(
            {"a": torch.ones(2), "b": Code(marker)},
            path,
            _use_new_zipfile_serialization=form == "zip",
        )
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    readers = {
        "pytorch_model.bin": read_tensors,
        "checkpoint.pt": lambda path: load_checkpoint(path.parent),
    }
    read = readers.get(name, lambda path: minia3.load_adapter(adapter_model(), path))
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z"):
        read(path)
    assert not marker.exists()


def change_json(path, **changes):
    path.write_text(json.dumps(read_object(path) | changes))


def rename_tensor(path, name):
    tensors = load_file(path)
    save_file({name: tensors.pop(min(tensors)), **tensors}, path)


def t5_with(folder, **changes):
    make_config(folder)
    change_json(folder / "config.json", **changes)
    read_checkpoint(folder, weights=False)


def llama_with(folder, **changes):
    make_llama_config(folder)
    change_json(folder / "config.json", **changes)
    read_checkpoint(folder, weights=False)


def two_shards_with_one_name(folder):
    make_shards(folder)
    first, *_, last = sorted(folder.glob("model-*.safetensors"))
    name = min(load_file(first))
    save_file(load_file(last) | {name: load_file(first)[name] + 1}, last)
    minia3.load_model(folder)


def a_name_of_two_lines(folder):
    make_llama(folder)
    rename_tensor(folder / "model.safetensors", "a\nb")
    minia3.load_model(folder)


def a_name_of_two_lines_in_an_adapter(folder):
    make_adapter(folder)
    rename_tensor(folder / "adapter_model.safetensors", "a\nb")
    minia3.load_adapter(adapter_model(), folder)


def a_key_of_two_lines(folder):
    make_meta(folder)
    change_json(folder / "params.json", **{"a\nb": 1})
    minia3.load_model(folder)


def a_shard_whose_name_no_system_takes(folder):
    make_shards(folder)
    change_json(folder / "model.safetensors.index.json", weight_map={"a": "x" * 5000})
    minia3.load_model(folder)


def a_hundred_thousand_sentinels(folder):
    make_spiece(folder)
    change_json(folder / "tokenizer_config.json", extra_ids=100_000)
    Tokenizer.from_folder(folder)


def a_checkpoint_that_is_a_text(folder):
    torch.save("x", folder / "checkpoint.pt")
    load_checkpoint(folder)


FOUND = {  # by the fuzz, or beside it: each the smallest
    "T5, tied 'no'": lambda folder: t5_with(folder, tie_word_embeddings="no"),
    "T5, scaled [0]": lambda folder: t5_with(folder, scale_decoder_outputs=[0]),
    "LLaMA, tied 4.5": lambda folder: llama_with(folder, tie_word_embeddings=4.5),
    "LLaMA, pad 'x'": lambda folder: llama_with(folder, pad_token_id="x"),
    "LLaMA, bos [1]": lambda folder: llama_with(folder, bos_token_id=[1]),
    "two shards": two_shards_with_one_name,
    "name": a_name_of_two_lines,
    "adapter's name": a_name_of_two_lines_in_an_adapter,
    "params.json's key": a_key_of_two_lines,
    "long shard": a_shard_whose_name_no_system_takes,
    "sentinels": a_hundred_thousand_sentinels,
    "checkpoint": a_checkpoint_that_is_a_text,
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_is_refused_in_one_line(name, tmp_path):
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z"):
        FOUND[name](tmp_path)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "..", "", "a/b.safetensors", "a\0b"]
)
def test_an_index_names_no_file_outside_of_its_folder(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    make_shards(folder)
    (folder / "model-00001-of-00004.safetensors").rename(tmp_path / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(
        index.read_text().replace("model-00001-of-00004.safetensors", name.replace("\0", "\\u0000"))
    )
    with pytest.raises(ValueError, match=r"\A[^\n]*model\.safetensors\.index\.json: [^\n]+\Z"):
        minia3.load_model(folder)
