"""Adapters on disk: PEFT's folders are read and written, and T-Few's files are read.

    adapter_config.json           the kind ((IA)^3), the base model, and the linears with vectors
    adapter_model.safetensors     the vectors, under PEFT's names (vector_names.py)

There is no second format, so what is trained here loads in PEFT, and the other way round. No model
is needed to read or write a file. rows.py checks whether an adapter fits a model.

Shapes: D entries of a vector.
"""

import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save

from minia3.adapters.peft_config import check_ia3_config, check_targets
from minia3.adapters.vector_names import INPUT_VECTORS, PREFIX, READ, SUFFIX, WRITE, rename
from minia3.checkpoints.hub import find_adapter
from minia3.checkpoints.known_models import public_name
from minia3.checkpoints.layout import ADAPTER_FILES, check_new_adapter
from minia3.files.read import read_json, reading
from minia3.files.tensors import FLOATS, read_tensors
from minia3.files.write import write_new_json, writing_folder

N_SHOWN = 2  # problems that a message names; the others are counted
# PEFT's names of the embedding and the head
EMBEDDINGS = (".embed_tokens.weight", ".shared.weight", ".lm_head.weight")


class AdapterFile(NamedTuple):
    """What a file says about its adapter."""

    vectors: dict  # our name -> its entries (D,), float32
    base: str | None  # the name or path of the base model, if the file has it


# Reading


def read_adapter(name_or_path):
    """Return an adapter as an AdapterFile.

    name_or_path: a PEFT folder, only its .safetensors or .bin file, T-Few's .pt file, or a hub id.
    Raise ValueError if the adapter is not (IA)^3, or if its config leaves out some of its tensors.
    One ValueError counts everything that is wrong with the tensors, and names the first problems:
    an unknown name, two names for one place, a wrong shape, a dtype that is not a float, an entry
    that is not finite.
    """
    path = find_adapter(name_or_path)
    config = {}
    if path.is_dir():
        config = read_json(path / "adapter_config.json")
        check_ia3_config(path, config)
        path = adapter_file(path)

    entries = read_tensors(path, as_a_whole=True)
    if not config and any(".lora_A." in name for name in entries):
        remedy = "give the folder with its adapter_config.json, which has its scale"
        raise ValueError(f"{path}: found LoRA's tensors, expected an (IA)^3 adapter: {remedy}")
    vectors = {}
    stored_names = {}  # our name -> the name in the file
    problems = []
    for stored_name, entry in entries.items():
        name = rename(stored_name, READ)
        problem = find_mismatch(stored_name, entry, name, vectors)
        if problem is None:
            vector = entry.read().flatten()
            # Most vectors are float32, and even a call of float() that changes nothing takes time.
            vectors[name] = vector if vector.dtype == torch.float32 else vector.float()
            stored_names[name] = stored_name
        else:
            problems.append(problem)
    problems += find_infinite(vectors, stored_names)
    if not vectors and not problems:
        problems.append("there are no vectors in it")
    if problems:
        raise ValueError(f"{path}: not an (IA)^3 adapter: {join_problems(problems)}")
    if config.get("target_modules") is not None:  # None: PEFT takes those of the model's family
        with reading(path.parent):
            check_targets(config, stored_names.values())
    return AdapterFile(with_l_ff(vectors), named_base(config))


def join_problems(problems):
    """Return the first problems in one text, and how many more there are."""
    shown = "; ".join(problems[:N_SHOWN])
    n_more = len(problems) - N_SHOWN
    return f"{shown}; and {n_more} more" if n_more > 0 else shown


def named_base(config):
    """Return the base model that an adapter_config.json names, or None."""
    base = config.get("base_model_name_or_path")
    # Older versions of PEFT write an empty name for a model that was built from a config.
    is_name = isinstance(base, str) and base != ""
    return base if is_name else None


def adapter_file(folder):
    """Return the path of the tensors in an adapter's folder."""
    for name in ADAPTER_FILES:
        if (folder / name).exists():
            return folder / name
    return folder / ADAPTER_FILES[0]  # the error about its absence names this file


def find_mismatch(peft_name, entry, name, vectors):
    """Return what is wrong with the name, shape or dtype of a stored vector, or None.

    name: our name, or None if there is none. vectors: the vectors that were read before.
    """
    if name is None:
        found = f"{peft_name} {entry.shape} has no place"
        if peft_name.endswith(EMBEDDINGS):
            reason = "PEFT saves it if the vocabulary was resized"
            remedy = "if it was not trained, save with save_embedding_layers=False"
            return f"{found} beside vectors: {reason}: {remedy}"
        return f"{found} in T5 or LLaMA"
    if name in vectors:
        return f"{peft_name} {entry.shape} scales the same place as another vector of the file"
    # The shape tells which side of a linear is scaled. Scaling the other side would be another
    # function.
    shape = peft_shape(peft_name, math.prod(entry.shape))
    is_turned = entry.shape == shape[::-1] != shape  # a single number has no side
    if is_turned and entry.dtype in FLOATS:
        sides = ("outputs", "inputs") if scales_input(peft_name) else ("inputs", "outputs")
        return f"{peft_name} {entry.shape} scales the {sides[0]} of its linear, not the {sides[1]}"
    if entry.shape != shape or entry.dtype not in FLOATS:
        return f"{peft_name} is {entry.dtype} {entry.shape}, expected floats {shape}"
    return None


def find_infinite(vectors, stored_names):
    """Return a text for each vector that has an infinite entry or a NaN: where the first one is."""
    # One sum of all is quick, but it may be infinite although no entry is.
    if not vectors or math.isfinite(torch.cat(list(vectors.values())).sum()):
        return []
    problems = []
    for name, vector in vectors.items():
        positions = (~vector.isfinite()).nonzero().flatten().tolist()
        if positions:
            first = positions[0]
            problems.append(f"{stored_names[name]} is {vector[first]} at {first}")
    return problems


def with_l_ff(vectors):
    """Return the vectors with l_ff in place of each l_up that has no l_ff beside it.

    PEFT's default for mT5 scales the output of wi_1, which is the input of wo: the same function.
    If a file has vectors on both, each keeps its place.
    """
    renamed = {}
    for name, vector in vectors.items():
        name_of_ff = name.replace("l_up", "l_ff")
        if name_of_ff in vectors:
            renamed[name] = vector
        else:
            renamed[name_of_ff] = vector
    return renamed


# Writing


def write_adapter(folder, vectors, base=None):
    """Write vectors (our name -> (D,)) as a PEFT folder. base: the name or path of their model.

    PEFT puts vectors into the same places when it loads the folder. The number of the model's
    layers is not known here: if there are layers after the last vector, PEFT may give them vectors
    of ones.
    """
    tensors = peft_tensors(vectors)
    targets, inputs = target_modules(vectors, tensors)
    config = {
        "peft_type": "IA3",
        "task_type": task_type(tensors),
        "inference_mode": True,
        "base_model_name_or_path": public_name(base),
        "revision": None,
        "modules_to_save": None,
        "target_modules": targets,
        "feedforward_modules": inputs,
        "fan_in_fan_out": False,
        "init_ia3_weights": True,
    }
    write_peft(folder, tensors, config)


def target_modules(vectors, tensors):
    """Return PEFT's target_modules and feedforward_modules, the linears that have a vector.

    Usually these are kinds of linears, such as ["k", "v", "wo"]: PEFT puts a vector on each linear
    of these kinds. If some of these linears have no vector, each result is a regular expression of
    full names. (A list of full names would do today. But older versions of PEFT shorten a long list
    when they save the adapter again, and then refuse what they have written: its issue 2429.)
    """
    linears = [name.removeprefix(PREFIX).removesuffix(SUFFIX) for name in tensors]
    kinds = sorted({linear.rpartition(".")[2] for linear in linears})
    if len(linears) == count_linears(kinds, count_layers(vectors)):
        return kinds, [kind for kind in kinds if scales_input(f".{kind}{SUFFIX}")]
    inputs = [linear for linear in linears if scales_input(f"{linear}{SUFFIX}")]
    return any_of(linears), any_of(inputs)


def any_of(names):
    """Return a regular expression that matches only these names."""
    return "|".join(re.escape(name) for name in names)


def count_layers(names):
    """Return a dict from each stack ("encoder.", "decoder.", LLaMA's "") to how many layers it has.

    The last layer with a vector counts as the last of the stack.
    """
    n_layers = {}
    for name in names:
        stack, _, place = name.partition("blocks.")
        layer = int(place.partition(".")[0])
        n_layers[stack] = max(n_layers.get(stack, 0), layer + 1)
    return n_layers


def count_linears(kinds, n_layers):
    """Return how many linears of these kinds a model has. n_layers: of each stack.

    A stack without vectors counts as one layer, so that its linears are found to lack vectors.
    """
    count = 0
    for ours, peft_name in WRITE.items():
        if peft_name.split(".")[-2] in kinds:
            stack = ours.partition("blocks.")[0]
            count += n_layers.get(stack, 1)
    return count


def task_type(peft_names):
    """Return PEFT's name for what the model of an adapter does. peft_names: of its tensors."""
    stacks_of_t5 = (f"{PREFIX}encoder.", f"{PREFIX}decoder.")
    is_t5 = any(name.startswith(stacks_of_t5) for name in peft_names)
    return "SEQ_2_SEQ_LM" if is_t5 else "CAUSAL_LM"


def peft_tensors(vectors):
    """Return a dict from PEFT's name of each vector to its tensor in PEFT's shape, in float32."""
    tensors = {}
    for name, vector in vectors.items():
        peft_name = rename(name, WRITE)
        shape = peft_shape(peft_name, vector.numel())
        tensors[peft_name] = vector.to("cpu", torch.float32).reshape(shape)
    return tensors


def peft_shape(peft_name, n_entries):
    return (1, n_entries) if scales_input(peft_name) else (n_entries, 1)


def scales_input(peft_name):
    return peft_name.endswith(INPUT_VECTORS)


def write_peft(folder, tensors, config):
    """Write an adapter's tensors and adapter_config.json as a PEFT folder, of any kind.

    Raise ValueError if the folder holds a model or a run.
    """
    check_new_adapter(Path(folder))
    with writing_folder(folder, replaces=["adapter_model.*"]) as temporary:
        (temporary / ADAPTER_FILES[0]).write_bytes(save(tensors, metadata={"format": "pt"}))
        write_new_json(temporary / "adapter_config.json", config)
