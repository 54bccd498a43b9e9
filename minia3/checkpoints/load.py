"""Load a model in five steps. An Entry is a tensor that has not been read yet.

    find      the folder or .gguf file of a name                         hub.py
    read      the config, and an Entry for each name in the files        config.py, gguf.py, meta.py
    settle    if the embedding is stored several times, keep one Entry   copies.py
    match     find our name for each name, and check shapes and dtypes   tensor_names.py
    place     read one Entry after the other, and make it a parameter

The model is built on the meta device, where tensors have shapes but take no memory. So at any time,
only the tensors that are already placed and one more tensor are in memory. If a tensor keeps its
dtype and device, it is mapped from the file.
"""

import difflib
from dataclasses import replace
from functools import reduce
from numbers import Integral

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from minia3.checkpoints.config import from_hf
from minia3.checkpoints.copies import keep_one_embedding
from minia3.checkpoints.generation_keys import generation_settings, read_defaults
from minia3.checkpoints.gguf import read_gguf
from minia3.checkpoints.hub import find
from minia3.checkpoints.layout import check_model_folder, weight_files
from minia3.checkpoints.load_shards import place_shards
from minia3.checkpoints.meta import read_meta
from minia3.checkpoints.nf4_files import PackedEntry, join_packed, read_as
from minia3.checkpoints.place import (
    check_weight,
    place_linear,
    place_ones,
    place_weight,
    read_codes,
)
from minia3.checkpoints.tensor_names import name_table
from minia3.files.home import expand_home
from minia3.files.progress import progress
from minia3.files.read import read_json, reading
from minia3.files.tensors import FLOATS, read_tensors
from minia3.model.llama import Llama
from minia3.model.quantized import QUANTIZED, NF4Linear, check_widths, is_quantizable
from minia3.model.t5 import T5, T5Config

N_SHOWN = 20  # problems that a message names; the others are counted

# How PyTorch fills the weights of a new linear or embedding
INITIALIZERS = (nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.normal_)


# A tensor that is made in torch.inference_mode can never be changed or trained outside of it.
@torch.inference_mode(False)
def load_model(
    name_or_path,
    *,
    dtype=None,
    device="cpu",
    n_adapters=1,
    quantize=None,
    check_finite=False,
    shards=None,
):
    """Return a T5 or a Llama with its weights and `n_adapters` adapters of ones, in eval mode.

    name_or_path: a folder (in the layout of Hugging Face, or of Meta for a LLaMA), a .gguf file,
        a known name (`t5-base`) or a hub id (`org/name`).
    dtype: None keeps the stored dtype of the matrices, except that float16 T5 and quantized GGUF
        become float32. The vectors are float32 in any case.
    device: where the model is in the end. Not with `shards`.
    quantize: "int8" or "nf4" keeps the linears of the blocks in 8 or 4 bits (quantized.py). Each
        weight is quantized as soon as it is read, so the whole model is never in memory. Weights
        that are stored in bitsandbytes' nf4 stay in it.
    check_finite: look for NaN and infinite numbers in every weight, which reads all files at once.
        (In nf4, only scales can be NaN or infinite.)
    shards: the Shards (model/shard.py) that divide the blocks among processes. Each process reads
        only its rows (load_shards.py), on the device of the mesh. The base is frozen.

    On the CPU, weights that keep their dtype are mapped from the file and not copied. Raise
    ValueError if an argument has no such value, or asks for a T5 in float16, if the name leads
    nowhere, if files cannot be read, if tensors do not fit the config (one message names all such
    tensors) or the kind of `quantize`, or if a weight that is checked is not finite.
    """
    name_or_path = expand_home(name_or_path)
    is_count = isinstance(n_adapters, Integral) and not isinstance(n_adapters, bool)
    if not is_count or n_adapters < 1:
        raise ValueError(f"n_adapters must be an integer of at least 1, found {n_adapters!r:.40}")
    if quantize not in (None, *QUANTIZED):
        raise ValueError(f"quantize is {quantize!r}, expected one of {', '.join(QUANTIZED)}")
    model, stored, weight_dtype = open_checkpoint(name_or_path, dtype, n_adapters)
    check_widths(model, quantize)
    if shards is not None:
        place_shards(model, stored, weight_dtype, shards, quantize, check_finite)
        return model.eval()
    for name, (stored_name, entry) in progress(stored.items(), total=len(stored)):
        origin = f"{name_or_path}: {stored_name}"
        if is_packed(model, name, entry) and quantize != "int8":
            parts = [part.to(device) for part in read_codes(entry, origin, check_finite)]
            place_linear(model, name, NF4Linear(*parts))
            continue
        weight = read_as(entry, weight_dtype, device=device).contiguous()
        if check_finite:
            check_weight(weight, origin)
        place_weight(model, name, weight, quantize)
    place_ones(model, device)
    return model.to(device).eval()  # .to moves the buffers


def open_checkpoint(name_or_path, dtype=None, n_adapters=1):
    """Do all steps of `load_model` except the last, which reads the weights.

    Return the model on the meta device, a dict from our name of each weight to (its name in the
    checkpoint, its Entry), and the dtype that the weights will have. Raise the errors of
    `load_model`.
    """
    if dtype not in (None, *FLOATS):
        names = ", ".join(map(str, FLOATS))
        raise ValueError(f"dtype must be None or one of {names}, found {dtype!r}")
    path = find(name_or_path)
    config, stored_entries = read_checkpoint(path)
    is_t5 = isinstance(config, T5Config)
    if is_t5 and dtype == torch.float16:
        reason = "T5 overflows in float16 (activations beyond 65,504)"
        raise ValueError(f"{reason}: use bfloat16 or float32")

    entries = keep_one_embedding(stored_entries, config, path)
    has_own_head = config.own_head or "lm_head.weight" in entries
    model = build_model(replace(config, own_head=has_own_head), n_adapters)
    model.name_or_path = str(name_or_path)
    model.generation_defaults = read_defaults(path)
    stored = match_tensors(model, entries, path)
    return model, stored, dtype or stored_dtype(stored, is_t5)


def is_stored_in_nf4(name_or_path):
    """Return whether linears of a checkpoint's blocks are in nf4. No weight is read.

    Raise the errors of `load_model`.
    """
    model, stored, _ = open_checkpoint(name_or_path)
    return len(packed_names(model, stored)) > 0


def packed_names(model, stored):
    """Return our names of the weights of blocks that are stored in nf4, and can stay in it.

    stored: see `open_checkpoint`.
    """
    names = [name for name, (_, entry) in stored.items() if is_packed(model, name, entry)]
    return frozenset(names)


def is_packed(model, name, entry):
    """Return whether a weight of a block is stored in nf4, and so can stay in it."""
    return isinstance(entry, PackedEntry) and is_quantizable(model, name)


def build_model(config, n_adapters=1):
    """Return a model on the meta device, where parameters take no memory."""
    model_class = T5 if isinstance(config, T5Config) else Llama
    with torch.device("meta"), WithoutInitialization():
        return model_class(config, n_adapters)


class WithoutInitialization(TorchFunctionMode):
    """Leaves weights as they are when a linear or an embedding is made.

    On the meta device there is nothing to fill. But for the linears, PyTorch would take a quarter
    of the time of building a model, and for an embedding it would import its compiler, which takes
    a second.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in INITIALIZERS:
            return None
        return func(*args, **(kwargs or {}))


# Read


def read_checkpoint(path, weights=True):
    """Return the config of a folder or .gguf file, and a dict from Hugging Face's names to Entries.

    weights: if False, a folder in the layout of Hugging Face need not hold weights, and its dict is
    empty. Raise ValueError if the files are damaged or not supported.
    """
    if path.is_file():
        raw, entries = read_gguf(path)
        return read_config(raw, path), entries
    check_model_folder(path)
    if (path / "params.json").exists() and not (path / "config.json").exists():
        raw, entries = read_meta(path)
        return read_config(raw, path), entries
    config = read_config(read_json(path / "config.json"), path)
    entries = read_weights(path) if weights else {}
    return config, entries


def read_config(raw, path):
    """Return the config for the content of a config.json. generation_config.json wins."""
    generation = path / "generation_config.json"
    with reading(path):
        if generation.exists():
            raw = raw | generation_settings(read_json(generation), raw, generation.name)
        return from_hf(raw, f"{path}/config.json")


def read_weights(folder):
    entries = {}
    for file in weight_files(folder):
        for name, entry in read_tensors(file).items():
            if name in entries:
                raise ValueError(f"{file}: {name} is in another shard too")
            entries[name] = entry
    return join_packed(entries)


# Match


def match_tensors(model, entries, path):
    """Return a dict from our name of each weight to (its name in the checkpoint, its Entry).

    Raise one ValueError for all tensors that are left over, missing, of the wrong shape or not
    floats.
    """
    table = name_table(model)
    stored = {}
    problems = []
    for name in sorted(entries.keys() | table.keys()):
        if name not in table:
            # Look for a close match only if the message shows the tensor, because each search takes
            # a while.
            hint = nearest_known(name, table) if len(problems) < N_SHOWN else ""
            problems.append(f"{name} is left over{hint}")
            continue
        ours = table[name]
        if ours is None:  # passed over; the table says why
            continue
        problem = misfit(entries.get(name), tuple(model.get_parameter(ours).shape))
        if problem:
            problems.append(f"{name} {problem}")
        else:
            stored[ours] = name, entries[name]
    if problems:
        shown = "; ".join(problems[:N_SHOWN])
        dots = " ..." if len(problems) > N_SHOWN else ""
        count = f"{len(problems)} tensors do not fit the config"
        raise ValueError(f"{path}: {count}: {shown}{dots}")
    return stored


def misfit(entry, shape):
    """Return why an entry cannot become a parameter of this shape, or an empty string if it can."""
    if entry is None:
        return "is missing"
    if entry.shape != shape:
        return f"has shape {entry.shape}, expected {shape}"
    if entry.dtype not in FLOATS:
        return f"is stored as {entry.dtype}, expected a float"
    return ""


def nearest_known(name, table):
    near = difflib.get_close_matches(name, table, n=1)
    return f" (nearest known: {near[0]})" if near else ""


# Place


def stored_dtype(stored, is_t5):
    """Return the widest dtype of the matrices. A T5 in float16 would overflow, so return float32.

    Norms and biases do not count, because llama.cpp stores them as float32 in every file, and they
    would make the whole model as wide.
    """
    dtypes = [entry.dtype for _, entry in stored.values() if len(entry.shape) > 1]
    dtype = reduce(torch.promote_types, dtypes)
    if is_t5 and dtype == torch.float16:
        return torch.float32
    return dtype
