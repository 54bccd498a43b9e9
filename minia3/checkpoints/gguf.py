"""To be written."""

import math
import os
from functools import partial
from struct import calcsize, unpack

import numpy as np
import torch
from gguf.quants import dequantize, quant_shape_to_byte_shape

from minia3.checkpoints.tensor_names import LLAMA_TENSORS, expand
from minia3.files.read import reading
from minia3.files.tensors import DTYPES, Entry

NAMES = {
    f"{gguf}.weight": f"{hf}.weight" for hf, gguf, *_ in LLAMA_TENSORS
}  # others keep theirs, and are left over
CONFIG = {  # GGUF -> config.json; all are positive numbers
    "llama.embedding_length": "hidden_size", "llama.feed_forward_length": "intermediate_size",
    "llama.block_count": "num_hidden_layers", "llama.context_length": "max_position_embeddings",
    "llama.attention.head_count": "num_attention_heads", "llama.attention.head_count_kv": "num_key_value_heads",
    "llama.attention.layer_norm_rms_epsilon": "rms_norm_eps", "llama.rope.freq_base": "rope_theta",
}  # fmt: skip
HARMLESS = {  # keys of what the code does not do, and the values under which they ask for nothing
    "llama.expert_count": [0], "llama.attention.sliding_window": [0],
    "llama.rope.scaling.type": ["none"],  # Llama 3.1's scaling has no type: it is the tensor rope_freqs.weight
    "llama.rope.scaling.factor": [0, 1], "llama.rope.scale_linear": [0, 1],  # linear where no type is given
}  # fmt: skip
STRING, ARRAY = 8, 9  # types of values; the others are scalars, here in struct's letters
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
MOST = (
    1 << 22
)  # entries of an array, bytes of a string: no model's header comes near it, and a damaged one stays cheap


def read_metadata(path):
    """The keys and values: str, int, float, bool, or a list of one of these. ValueError where the file is damaged."""
    return read_header(path)[0]


def read_gguf(path):
    """A file -> a config.json of model_type "llama" as dict, and Hugging Face name -> Entry of every tensor.

    One key more, `rope_factors`, where the file has rope_freqs.weight: head_dim / 2 floats, which divide the inverse
    frequencies. ValueError where the file is damaged, lacks keys, or asks for what the code does not do.
    """
    meta, stored = read_header(path)
    if (found := meta.get("general.architecture")) != "llama":
        raise ValueError(f"{path}: general.architecture is {found!r:.40}, expected 'llama'")
    meta = {
        "llama.rope.freq_base": 1e4,
        "llama.attention.head_count_kv": meta.get("llama.attention.head_count"),
    } | meta
    missing = [
        key
        for key in CONFIG
        if not isinstance(meta.get(key), int | float) or not 0 < meta[key] < math.inf
    ]
    if missing := [*missing, *{"token_embd.weight"} - stored.keys()]:
        raise ValueError(f"{path}: missing, or not a positive number: {', '.join(missing)}")
    hf = {name: meta[key] for key, name in CONFIG.items()}
    vocab_size, blocks = (
        stored["token_embd.weight"].shape[0],
        {x.split(".")[1] for x in stored if x[:4] == "blk."},
    )
    d_head = meta.get("llama.attention.key_length", hf["hidden_size"] // hf["num_attention_heads"])
    ids = [f"tokenizer.ggml.{name}_token_id" for name in ("bos", "padding", "eos", "eot")]
    allowed = HARMLESS | dict.fromkeys(ids, range(vocab_size)) | {
        "llama.block_count": [len(blocks)], "llama.attention.key_length": range(2, MOST, 2),
        "llama.attention.value_length": [d_head], "llama.rope.dimension_count": [d_head],
    }  # fmt: skip
    wrong = [key for key, ok in allowed.items() if key in meta and meta[key] not in ok]
    faults = [f"{key} is {meta[key]!r:.40}, expected {allowed[key]!r:.40}" for key in wrong]
    if rope := stored.pop("rope_freqs.weight", None):
        hf["rope_factors"] = factors = tuple(rope.read().flatten().tolist())
        if 2 * len(factors) != d_head or not all(0 < x < math.inf for x in factors):
            faults.append(f"rope_freqs.weight is not {d_head} / 2 positive numbers")
    if faults:
        raise ValueError(f"{path}: {'; '.join(faults)}")
    bos, pad, *ends = map(meta.get, ids)
    ends = [i for i in dict.fromkeys(ends) if i is not None]
    hf |= {
        "model_type": "llama",
        "tie_word_embeddings": "output.weight" not in stored,
        "vocab_size": vocab_size,
    }
    ends = ends[0] if len(ends) == 1 else ends
    hf |= {"head_dim": d_head, "bos_token_id": bos, "pad_token_id": pad, "eos_token_id": ends}
    table = expand(NAMES, len(blocks))
    return hf, {table.get(name, name): entry for name, entry in stored.items()}


def read_tensor(path, kind, shape, offset):
    """F32, F16 and BF16 are private views of the file, quantised kinds become float32."""

    raw = np.memmap(
        path,
        np.uint8,
        "c",
        offset,
        quant_shape_to_byte_shape((math.prod(shape[:-1]), shape[-1]), kind),
    )
    if kind.name in DTYPES:
        return torch.from_numpy(raw).view(DTYPES[kind.name]).reshape(shape)
    x = torch.empty(len(raw), shape[-1])
    for i in range(0, len(raw), 256):  # in parts, since dequantize holds twice what it returns
        x[i : i + 256] = torch.from_numpy(dequantize(raw[i : i + 256], kind))
    return x.reshape(shape)


def read_header(path):
    """-> metadata, and GGUF's name -> Entry of each tensor. ValueError unless the numbers of all are there."""

    def take(form):
        return unpack("<" + form, file.read(calcsize("<" + form)))

    def count(form="Q", most=MOST):
        if (n := take(form)[0]) > most:
            raise ValueError(f"a count of {n}, expected at most {most}")
        return n

    def values(kind, n):
        if kind == STRING:
            return [take(f"{count()}s")[0].decode() for _ in range(n)]
        return list(take(f"{n}{SCALARS[kind]}"))

    with reading(path, "cut short, damaged or not supported", "gguf"), open(path, "rb") as file:
        import gguf

        magic, version = take("4sI")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(
                f"found {magic!r} {version:#x}, expected b'GGUF' 0x2 or 0x3 (0x3000000 is big-endian)"
            )
        n_tensors, n_keys, meta, stored = count(), count(), {}, {}
        for _ in range(n_keys):
            (key,), (kind,) = values(STRING, 1), take("I")
            if key in meta:
                raise ValueError(f"the key {key!r:.80} is there twice")
            meta[key] = values(*take("I"), count()) if kind == ARRAY else values(kind, 1)[0]
        infos = [
            (*values(STRING, 1), take(f"{count('I', 4)}Q")[::-1], *take("IQ"))
            for _ in range(n_tensors)
        ]
        start, size = (
            file.tell() + -file.tell() % int(meta.get("general.alignment", 32)),
            os.path.getsize(path),
        )
        for name, shape, kind, offset in infos:
            kind = gguf.GGMLQuantizationType(kind)
            gguf.quants.dequantize(
                np.zeros(gguf.GGML_QUANT_SIZES[kind][1], np.uint8), kind
            )  # raises where it cannot
            end = start + offset + math.prod(gguf.quants.quant_shape_to_byte_shape(shape, kind))
            if end > size or 0 in shape or name in stored:
                raise ValueError(
                    f"{name} {shape} is cut short (byte {end} of {size}), empty, or there twice"
                )
            reader = partial(read_tensor, path, kind, shape, start + offset)
            stored[name] = Entry(shape, DTYPES.get(kind.name, torch.float32), reader)
    return meta, stored
