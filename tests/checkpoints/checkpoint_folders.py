"""What the tests of this folder share: they write checkpoints in any form, and compare models."""

import json

import numpy as np
import pytest
import torch
from conftest import LLAMA_PEERS, tokens
from safetensors.torch import load_file, save_file

import minia3

SOURCE = tokens(2, 7)
TARGET = tokens(2, 4, seed=1)
FORMS = ["safetensors", "sharded safetensors", "bin", "sharded bin", "old bin"]


def read_gguf_as_arrays(monkeypatch):
    """Let the package gguf and transformers see a mapped file as a plain array.

    They cut a million parts out of it, and a part of a map takes several times as long to make as a
    part of an array.
    """
    memmap = np.memmap

    def as_array(*given, **options):
        return memmap(*given, **options).view(np.ndarray)

    monkeypatch.setattr(np, "memmap", as_array)


def have_the_same_bits(model, other):
    ours = model.state_dict()
    theirs = other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[x], theirs[x]) for x in ours)


def refusal(call, *arguments, **options):
    """Return the message of the ValueError that `call` must raise. It must be one line."""
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the callers look at the message)
        call(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def transformers_class(name):
    """Return the class of transformers that loads a peer."""
    import transformers

    if name in LLAMA_PEERS:
        return transformers.AutoModelForCausalLM
    return transformers.AutoModelForSeq2SeqLM


def embedding_name(name):
    return "model.embed_tokens.weight" if name in LLAMA_PEERS else "shared.weight"


def save_old_bin(tensors, path):
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


def read_weights(folder):
    return load_file(folder / "model.safetensors")


def write_weights(folder, tensors, form="safetensors"):
    """Make `tensors` the only weights of `folder`, in one of the forms of published checkpoints."""
    for file in folder.glob("*model*"):
        file.unlink()
    save = {"safetensors": save_file, "bin": torch.save, "old bin": save_old_bin}[
        form.removeprefix("sharded ")
    ]
    suffix = "safetensors" if save is save_file else "bin"
    stem = "model" if save is save_file else "pytorch_model"
    if not form.startswith("sharded"):
        save(tensors, folder / f"{stem}.{suffix}")
        return
    weight_map = {}
    for i in range(2):
        half = dict(list(tensors.items())[i::2])
        save(half, folder / f"{stem}-{i}.{suffix}")
        weight_map |= dict.fromkeys(half, f"{stem}-{i}.{suffix}")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def store_as(folder, dtype):
    """Store the weights of `folder` in another dtype."""
    tensors = {name: x.to(dtype) for name, x in read_weights(folder).items()}
    write_weights(folder, tensors)
    return folder


def weight_dtypes(model):
    """Return the dtypes of the base weights. The vectors must be float32."""
    vectors = {f"{name}.scale" for name in minia3.vectors(model)}
    dtypes = set()
    for name, parameter in model.named_parameters():
        if name in vectors:
            assert parameter.dtype == torch.float32
        else:
            dtypes.add(parameter.dtype)
    return dtypes


def randomize_weights(model, seed):
    """Fill the base weights with random numbers, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(".scale"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model
