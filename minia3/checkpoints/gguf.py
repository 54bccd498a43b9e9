"""Read a GGUF file of llama.cpp as if it were a checkpoint of Hugging Face.

The file may hold a LLaMA or a Mistral (which llama.cpp calls "llama"), a Qwen2 or a Qwen3.

    "GGUF" version n_tensors n_keys                  the numbers are little-endian
    n_keys times: key, type, value                   metadata, of the model and of its tokenizer
    n_tensors times: name, n_dims, dims, kind, offset
    padding, and then the data of all tensors        offsets count from the start of the data

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The package gguf (an extra)
dequantizes. The header is read here, because gguf's own reader takes ten times as long, and if a
count is damaged, it reads on until the memory is full.
"""

import math
import os
import warnings
from functools import partial
from struct import calcsize, unpack
from typing import NamedTuple

import numpy as np
import torch

from minia3.checkpoints.rotation_layout import neighbors_to_halves
from minia3.checkpoints.tensor_names import LLAMA_TENSORS, expand
from minia3.files.read import reading
from minia3.files.tensors import DTYPES, Entry

# llama.cpp's names -> Hugging Face's names. Other tensors keep their names, and load.py refuses
# them, because they match no parameter.
NAMES = {f"{t.gguf}.{t.ending}": f"{t.hugging_face}.{t.ending}" for t in LLAMA_TENSORS}

# What `general.architecture` may be. In the keys below, `{}` stands for it.
ARCHITECTURES = ("llama", "qwen2", "qwen3")

# fmt: off
# Keys of the metadata -> keys of config.json. All values are positive numbers.
CONFIG = {
    "{}.embedding_length":                 "hidden_size",
    "{}.feed_forward_length":              "intermediate_size",
    "{}.block_count":                      "num_hidden_layers",
    "{}.context_length":                   "max_position_embeddings",
    "{}.attention.head_count":             "num_attention_heads",
    "{}.attention.head_count_kv":          "num_key_value_heads",
    "{}.attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "{}.rope.freq_base":                   "rope_theta",
}
# Keys of features that are not supported -> the values that do not ask for the feature. To many
# scales, 0 means "not set".
UNSUPPORTED = {
    "{}.expert_count":                     [0],
    "{}.expert_used_count":                [0],
    "{}.nextn_predict_layers":             [0],
    "{}.use_parallel_residual":            [False],
    "{}.embedding_scale":                  [0, 1],
    "{}.residual_scale":                   [0, 1],
    "{}.logit_scale":                      [0, 1],
    "{}.attn_logit_softcapping":           [0],
    "{}.final_logit_softcapping":          [0],
    "{}.attention.scale":                  [0],  # instead of key_length ** -0.5
    "{}.attention.output_scale":           [0, 1],
    "{}.attention.temperature_scale":      [0],
    "{}.attention.causal":                 [True],
    "{}.attention.clamp_kqv":              [0],
    "{}.attention.max_alibi_bias":         [0],
    "{}.attention.shared_kv_layers":       [0],
    "{}.attention.sliding_window_pattern": [],  # the window in some layers only
    "{}.rope.dimension_sections":          [],
    # Llama 3.1's scaling has no type here. It comes as the tensor rope_freqs.weight.
    "{}.rope.scaling.type":                ["none"],
    # With a factor but no type, llama.cpp scales positions linearly.
    "{}.rope.scaling.factor":              [0, 1],
    "{}.rope.scale_linear":                [0, 1],
    "{}.rope.scaling.alpha":               [0, 1],
    "{}.rope.scaling.attn_factor":         [0, 1],
    "{}.rope.scaling.yarn_log_multiplier": [0],
    "{}.rope.scaling.yarn_ext_factor":     [0, -1],
    "{}.rope.scaling.yarn_attn_factor":    [0, 1],
    "split.count":                         [0, 1],  # of a model in several files
}
# Keys that change nothing
HARMLESS = {
    "{}.vocab_size":                       "the embedding has as many rows",
    "{}.tensor_data_layout":               "all known files have one layout",
    "{}.pooling_type":                     "it is for embeddings of texts",
    "{}.rope.scaling.original_context_length": "without a scaling.type, it is not read",
    "{}.rope.scaling.finetuned":           "without a scaling.type, it is not read",
    "{}.rope.scaling.yarn_beta_fast":      "without a scaling.type, it is not read",
    "{}.rope.scaling.yarn_beta_slow":      "without a scaling.type, it is not read",
}
HARMLESS_PREFIXES = ("general.", "tokenizer.", "split.", "quantize.")
# fmt: on
WINDOW_KEY = "{}.attention.sliding_window"  # 0: there is no window
KEY_LENGTH = "{}.attention.key_length"
VALUE_LENGTH = "{}.attention.value_length"
ROTATED_LENGTH = "{}.rope.dimension_count"
BOS_KEY = "tokenizer.ggml.bos_token_id"
PAD_KEY = "tokenizer.ggml.padding_token_id"
END_KEYS = (
    "tokenizer.ggml.eos_token_id",  # end of a text
    "tokenizer.ggml.eot_token_id",  # end of a turn in a chat
)

# Types of values. SCALARS has the letter of each scalar type in the notation of struct.
STRING = 8
ARRAY = 9
# fmt: off
SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 10: "Q", 11: "q",  # integers, 8 to 64 bits
    6: "f", 12: "d", 7: "?",
}
# fmt: on

# The largest number of entries in an array, or of bytes in a string. Real models stay far below,
# and a damaged count cannot fill the memory.
LARGEST_COUNT = 2**22

N_DIMENSIONS = 4  # the largest number that ggml knows
N_SHOWN = 20  # unknown keys that a warning names
ROWS_AT_ONCE = 256  # rows that are dequantized together


class TensorInfo(NamedTuple):
    """What the header says about one tensor."""

    name: str
    shape: tuple
    kind: int  # how entries are stored: as float32, or in one of about thirty quantized forms
    offset: int  # bytes from the start of the data


def read_metadata(path):
    """Return the metadata as a dict from keys to str, int, float, bool, or a list of these.

    Raise ValueError if the file is damaged.
    """
    metadata, _ = read_header(path)
    return metadata


def read_gguf(path):
    """Return the content of a config.json, and a dict from Hugging Face's names to the Entry of
    each tensor.

    If the file has a tensor rope_freqs.weight, the config has one more key, `rope_factors`: d_head
    / 2 floats that divide the frequencies of the rotation. Raise ValueError if the file is
    damaged, lacks keys, or asks for a feature that is not supported. Warn of keys that nobody
    knows.
    """
    metadata, stored = read_header(path)
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        found = f"general.architecture is {architecture!r:.40}"
        raise ValueError(f"{path}: {found}, expected one of {', '.join(ARCHITECTURES)}")
    sizes = read_sizes(path, architecture, metadata, stored)
    config = make_config(architecture, sizes, stored)
    n_blocks = count_blocks(stored)
    allowed = allowed_values(architecture, config, n_blocks)
    faults = unsupported(metadata, allowed)
    # Llama 3.1's scaling of the rotation. For us it is part of the config, and not a weight.
    rope_freqs = stored.pop("rope_freqs.weight", None)
    if rope_freqs is not None:
        config["rope_factors"] = tuple(rope_freqs.read().flatten().tolist())
        faults += wrong_factors(config["rope_factors"], config["head_dim"])
    if faults:
        raise ValueError(f"{path}: {'; '.join(faults)}")
    warn_of_unknown(path, metadata, {*allowed, *keys_of(architecture, CONFIG | HARMLESS)})

    table = expand(NAMES, n_blocks)
    entries = {table.get(name, name): entry for name, entry in stored.items()}
    if architecture == "llama":  # Qwen's rows are in the order of halves already
        n_heads = config["num_attention_heads"]
        entries = neighbors_to_halves(entries, n_heads, config["num_key_value_heads"])
    return config, entries


def keys_of(architecture, table):
    """Return a table of keys with the name of the architecture in them."""
    return {key.format(architecture): value for key, value in table.items()}


def read_sizes(path, architecture, metadata, stored):
    """Return the metadata with defaults. Raise one ValueError for all missing keys of CONFIG."""
    head_count = metadata.get(f"{architecture}.attention.head_count")
    defaults = {
        f"{architecture}.rope.freq_base": 10000.0,
        f"{architecture}.attention.head_count_kv": head_count,
    }
    sizes = defaults | metadata
    expected = keys_of(architecture, CONFIG)
    missing = [key for key in expected if not is_positive_number(sizes.get(key))]
    if "token_embd.weight" not in stored:
        missing.append("token_embd.weight")
    if missing:
        raise ValueError(f"{path}: missing, or not a positive number: {', '.join(missing)}")
    return sizes


def is_positive_number(value):
    return isinstance(value, int | float) and 0 < value < math.inf


def make_config(architecture, sizes, stored):
    """Return the content of a config.json for the metadata. It is not checked yet."""
    config = {name: sizes[key] for key, name in keys_of(architecture, CONFIG).items()}
    d_head = config["hidden_size"] // config["num_attention_heads"]
    window = sizes.get(WINDOW_KEY.format(architecture))
    if window:
        config["sliding_window"] = window
        config["use_sliding_window"] = True
        config["max_window_layers"] = 0  # all layers have the window
    return config | {
        "model_type": model_type(architecture, window, stored),
        "vocab_size": stored["token_embd.weight"].shape[0],
        "head_dim": sizes.get(KEY_LENGTH.format(architecture), d_head),
        "tie_word_embeddings": "output.weight" not in stored,
        "bos_token_id": sizes.get(BOS_KEY),
        "pad_token_id": sizes.get(PAD_KEY),
        "eos_token_id": end_ids(sizes),
    }


def model_type(architecture, window, stored):
    """Return Hugging Face's name of the architecture.

    llama.cpp's "llama" may also have biases, as Qwen2, or a window, as Mistral.
    """
    if architecture != "llama":
        return architecture
    if "blk.0.attn_q.bias" in stored:
        return "qwen2"
    return "mistral" if window else "llama"


def end_ids(metadata):
    """Return the ids that end a text in the form of config.json: one id, or a list."""
    ids = []
    for key in END_KEYS:
        i = metadata.get(key)
        if i is not None and i not in ids:
            ids.append(i)
    return ids[0] if len(ids) == 1 else ids


def count_blocks(stored):
    return len({name.split(".")[1] for name in stored if name.startswith("blk.")})


def allowed_values(architecture, config, n_blocks):
    """Return the values that each key may have, for the keys with few allowed values."""
    d_head = config["head_dim"]
    lengths = {
        "{}.block_count": [n_blocks],
        WINDOW_KEY: range(2**31),
        KEY_LENGTH: range(2, LARGEST_COUNT, 2),
        VALUE_LENGTH: [d_head],  # keys and values have the same width
        ROTATED_LENGTH: [d_head],  # the whole head is rotated
    }
    allowed = keys_of(architecture, UNSUPPORTED | lengths)
    for key in (BOS_KEY, PAD_KEY, *END_KEYS):
        allowed[key] = range(config["vocab_size"])
    return allowed


def unsupported(metadata, allowed):
    """Return a message for each key with a value that is not supported or cannot be true."""
    faults = []
    for key, values in allowed.items():
        if key in metadata and not is_allowed(metadata[key], values):
            faults.append(f"{key} is {metadata[key]!r:.40}, expected {describe(values):.40}")
    return faults


def is_allowed(value, values):
    """Whether `values`, a list or a range, has a value."""
    # Python would compare anything but an int with each number of the range, which takes minutes.
    if isinstance(values, range) and not isinstance(value, int):
        return False
    return value in values


def warn_of_unknown(path, metadata, known):
    """Warn, by name, of keys that are neither `known` nor harmless."""
    unknown = []
    for key in metadata:
        if key not in known and not key.startswith(HARMLESS_PREFIXES):
            unknown.append(f"{key:.80}")
    if unknown:
        shown = ", ".join(unknown[:N_SHOWN])
        found = f"{path} has keys that minia3 does not know: {shown}"
        warnings.warn(f"{found}: if they change the model, its results are wrong", stacklevel=2)


def wrong_factors(factors, d_head):
    """Return a list with a message if the factors are damaged, or an empty list."""
    is_positive = all(0 < factor < math.inf for factor in factors)
    if is_positive and 2 * len(factors) == d_head:
        return []
    return [f"rope_freqs.weight is not {d_head!r:.40} / 2 positive numbers"]


def describe(values):
    """Return the allowed values of a key as words of a message."""
    if not values:
        return "no such key"
    if isinstance(values, range):
        kind = "an even number" if values.step == 2 else "a whole number"
        return f"{kind} from {values[0]} to {values[-1]}"
    return " or ".join(map(repr, values))


# The header


class HeaderReader:
    """A reader of the fields of a header, one after the other."""

    def __init__(self, file):
        self.file = file

    def fields(self, letters):
        """Return a tuple of values. letters: their types in struct's notation, such as "IQ"."""
        layout = "<" + letters
        return unpack(layout, self.file.read(calcsize(layout)))

    def number(self, letter):
        (value,) = self.fields(letter)
        return value

    def count(self, letter="Q", largest=LARGEST_COUNT):
        n = self.number(letter)
        if n > largest:
            raise ValueError(f"a count of {n}, expected at most {largest}")
        return n

    def string(self):
        (content,) = self.fields(f"{self.count()}s")
        return content.decode()

    def value(self):
        kind = self.number("I")
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self.array()
        return self.number(SCALARS[kind])

    def array(self):
        kind = self.number("I")
        n = self.count()
        if kind == STRING:
            return [self.string() for _ in range(n)]
        return list(self.fields(f"{n}{SCALARS[kind]}"))

    def metadata(self, n_keys):
        metadata = {}
        for _ in range(n_keys):
            key = self.string()
            if key in metadata:
                raise ValueError(f"the key {key!r:.80} appears twice")
            metadata[key] = self.value()
        return metadata

    def tensor_info(self):
        name = self.string()
        n_dims = self.count("I", N_DIMENSIONS)
        dims = self.fields(f"{n_dims}Q")
        kind, offset = self.fields("IQ")
        return TensorInfo(name, dims[::-1], kind, offset)  # ggml's first dimension is the fastest


def read_header(path):
    """Return the metadata, and a dict from llama.cpp's names to the Entry of each tensor.

    Raise ValueError if the header is damaged, or the file does not hold the data of all tensors.
    """
    with reading(path, "cut short, damaged or not supported", "gguf"), open(path, "rb") as file:
        header = HeaderReader(file)
        magic, version = header.fields("4sI")
        if magic != b"GGUF" or version not in (2, 3):
            expected = "b'GGUF' 0x2 or 0x3 (0x3000000 is big-endian)"
            raise ValueError(f"found {magic!r} {version:#x}, expected {expected}")
        n_tensors = header.count()
        n_keys = header.count()
        metadata = header.metadata(n_keys)
        infos = [header.tensor_info() for _ in range(n_tensors)]
        alignment = int(metadata.get("general.alignment", 32))
        padding = -file.tell() % alignment
        start = file.tell() + padding
        stored = {}
        for info in infos:
            if info.name in stored:
                raise ValueError(f"the tensor {info.name} appears twice")
            stored[info.name] = unread_tensor(path, info, start)
    return metadata, stored


def unread_tensor(path, info, start):
    """Return the Entry of a tensor. Raise ValueError if it cannot be read or is cut short."""
    import gguf  # here, because it is an extra, and most users never open such a file

    kind = gguf.GGMLQuantizationType(info.kind)
    # Try the kind with zeros, because gguf can name more kinds than it can dequantize.
    gguf.quants.dequantize(np.zeros(gguf.GGML_QUANT_SIZES[kind][1], np.uint8), kind)
    n_bytes = math.prod(gguf.quants.quant_shape_to_byte_shape(info.shape, kind))
    end = start + info.offset + n_bytes
    size = os.path.getsize(path)
    if end > size or 0 in info.shape:
        where = f"byte {end} of {size}"
        raise ValueError(f"{info.name} {info.shape} is cut short ({where}) or empty")
    read = partial(read_tensor, path, kind, info.shape, start + info.offset)
    return Entry(info.shape, DTYPES.get(kind.name, torch.float32), read)


def read_tensor(path, kind, shape, offset):
    """Return a tensor. Float32, float16 and bfloat16 are mapped; quantized kinds become float32."""
    from gguf.quants import dequantize, quant_shape_to_byte_shape

    n_rows = math.prod(shape[:-1])
    n_columns = shape[-1]
    byte_shape = quant_shape_to_byte_shape((n_rows, n_columns), kind)
    # Mode "c" is copy on write: writing to the tensor does not change the file. It becomes a plain
    # array of the same memory, because gguf takes thousands of slices, and a memmap's are slow.
    content = np.memmap(path, np.uint8, "c", offset, byte_shape).view(np.ndarray)
    if kind.name in DTYPES:
        return torch.from_numpy(content).view(DTYPES[kind.name]).reshape(shape)
    weight = torch.empty(n_rows, n_columns, dtype=torch.float32)
    # A few rows at a time, because dequantize takes twice the memory of what it returns.
    for row in range(0, n_rows, ROWS_AT_ONCE):
        rows = slice(row, row + ROWS_AT_ONCE)
        weight[rows] = torch.from_numpy(dequantize(content[rows], kind))
    return weight.reshape(shape)
