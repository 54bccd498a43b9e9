"""Read checkpoints whose weights are already in bitsandbytes' nf4.

A weight `w` of such a file is spread over several tensors:

    w                                        codes, two in a byte
    w.quant_state.bitsandbytes__nf4          JSON as bytes: shape, dtype, entries per scale
    w.absmax, w.quant_map                    the scales, and the 16 levels
    w.nested_absmax, w.nested_quant_map      only if the scales are quantized, too ("double quant")

`join_packed` presents them as one `PackedEntry` with the name and the shape of the weight.
"""

import json
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from minia3.checkpoints.tensor_names import name_table
from minia3.files.read import read_json, reading
from minia3.model.quantized import NF4_BLOCK, NF4Linear, bitsandbytes_functions, is_quantizable

STATE = ".quant_state.bitsandbytes__nf4"
# The tensors beside the codes.
PARTS = (STATE, ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")

# The dtypes that a weight may have had before it was quantized.
DTYPES = ("float32", "float16", "bfloat16")

# What config.json says of a checkpoint that can be read. Other keys say how it was made, or in
# which dtype to compute.
REQUIRED = {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}

# The modules that transformers leaves plain although no file says so: the last linear of a T5's
# feed-forward (_keep_in_fp32_modules of transformers).
ALWAYS_PLAIN = ("wo",)

ALL_ROWS = slice(None)


class PackedEntry(NamedTuple):
    """A weight in nf4 that has not been read yet: an Entry (tensors.py) that knows its codes."""

    shape: tuple
    dtype: torch.dtype  # of the weight before it was quantized
    read: Callable[[], torch.Tensor]  # the weight, dequantized in this dtype: see `read_as`
    read_codes: Callable[[], tuple]  # codes (O, I / 2) and scales (O, I / 64), see NF4Linear


def check_quantization(quantization):
    """Raise ValueError if a config.json's quantization_config is not nf4's. None is none."""
    if quantization is None:
        return
    for key, value in REQUIRED.items():
        if not isinstance(quantization, dict) or quantization.get(key) != value:
            raise ValueError(
                "config.json asks for what minia3 does not support: "
                f"quantization_config={quantization!r:.200}; expected {key}={value!r}"
            )


def packed_by_config(model, path):
    """Return our names of the weights that a model's config.json says are stored in nf4.

    For a model whose weights are not on this machine. The config was checked before.
    """
    config = path / "config.json"
    if not config.exists():
        return frozenset()
    quantization = read_json(config).get("quantization_config")
    if quantization is None:
        return frozenset()
    modules = quantization.get("llm_int8_skip_modules")
    if not isinstance(modules, list):  # it is null in most files
        modules = []
    names = set()
    for theirs, ours in name_table(model).items():
        is_of_block = ours is not None and is_quantizable(model, ours)
        if is_of_block and not is_left_plain(theirs, modules):
            names.add(ours)
    return frozenset(names)


def is_left_plain(name, modules):
    """Return whether transformers has left a weight as it was.

    modules: llm_int8_skip_modules, the names of modules or their ends. (Newer versions of
    transformers take them for patterns, too, and we do not.)
    """
    return any(f".{module}." in f".{name}" for module in [*modules, *ALWAYS_PLAIN])


def join_packed(entries):
    """Return the entries of a checkpoint, with one PackedEntry for each weight in nf4.

    Raise ValueError if the parts of a weight do not fit, or if its codes are missing.
    """
    packed_names = [name.removesuffix(STATE) for name in entries if name.endswith(STATE)]
    joined = dict(entries)
    for name in packed_names:
        if name not in entries:
            raise ValueError(f"{name} is missing, but {name}{STATE} is there: damaged")
        parts = {}
        for suffix in PARTS:
            if name + suffix in entries:
                parts[name + suffix] = joined.pop(name + suffix)
        joined[name] = packed_entry(name, entries[name], parts)
    return joined


def packed_entry(name, codes, parts):
    """Return the PackedEntry of the weight `name`. Raise ValueError if its parts do not fit."""
    state = read_state(name, parts[name + STATE])
    shape = tuple(state["shape"])
    n_codes = codes.shape[0] if codes.shape else 0
    is_whole = len(shape) == 2 and n_codes * 2 == shape[0] * shape[1]
    if not is_whole or state["blocksize"] != NF4_BLOCK or shape[1] % NF4_BLOCK != 0:
        raise ValueError(
            f"{name}: {n_codes} codes of a weight {shape} with a scale for {state['blocksize']} "
            f"entries; expected half as many codes as entries, and a scale for {NF4_BLOCK}"
        )
    dtype = getattr(torch, state["dtype"])
    read_codes = partial(read_packed, name, codes, parts, shape)
    return PackedEntry(shape, dtype, partial(dequantized, read_codes, dtype), read_codes)


def read_state(name, entry):
    """Return the JSON beside a weight. Raise ValueError if it is damaged or lacks something."""
    with reading(f"{name}{STATE}"):
        state = json.loads(bytes(entry.read().tolist()))
    is_complete = isinstance(state, dict) and {"shape", "dtype", "blocksize"} <= state.keys()
    if not is_complete or not is_shape(state["shape"]) or state["dtype"] not in DTYPES:
        raise ValueError(f"{name}{STATE} is {state!r:.200}: expected a shape, dtype and blocksize")
    return state


def is_shape(value):
    """Return whether a value from JSON is the shape of a tensor: a list of whole numbers."""
    return isinstance(value, list) and all(type(n) is int for n in value)


def read_packed(name, codes, parts, shape):
    """Return the codes (O, I / 2) and the scales (O, I / 64) of a weight (O, I)."""
    functions = bitsandbytes_functions()
    tensors = {part.removeprefix(name + "."): entry.read() for part, entry in parts.items()}
    with reading(name):
        state = functions.QuantState.from_dict(tensors, device="cpu")
        scales = state.absmax
        if state.nested:
            scales = functions.dequantize_blockwise(state.absmax, state.state2) + state.offset
        return codes.read().view(shape[0], -1), scales.float().view(shape[0], -1)


def dequantized(read_codes, dtype):
    return NF4Linear.dequantize(*read_codes(), dtype)


def read_as(entry, dtype, rows=ALL_ROWS, device="cpu"):
    """Return rows of the weight of an Entry or a PackedEntry, in a dtype and on a device.

    A weight in nf4 is dequantized in this dtype, as while the model runs. It is never rounded to
    the dtype that it had before it was quantized, which may be narrower.
    """
    if isinstance(entry, PackedEntry):
        weight = NF4Linear.dequantize(*entry.read_codes(), dtype)
    else:
        weight = entry.read()
    return weight[rows].to(device=device, dtype=dtype)
