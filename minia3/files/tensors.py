"""List the tensors of a weight file without reading them.

Files are memory-mapped, so a tensor takes memory only if its dtype or device changes. A model that
is larger than the free memory can therefore be inspected, or merged shard by shard. The small file
of an adapter is read as a whole instead, because it has many short tensors.
"""

import zipfile
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from safetensors import deserialize, safe_open

from minia3.files.pickles import check_storages
from minia3.files.read import reading

# The names that safetensors and GGUF give to the floats. A model's weights have one of these types.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

SMALL = 1 << 24  # bytes of a file that may be read as a whole, so that a huge one fills no memory


class Entry(NamedTuple):
    """A tensor of a weight file that has not been read yet."""

    shape: tuple
    dtype: torch.dtype | str  # a string, such as "I64": a type of safetensors that is not in DTYPES
    read: Callable[[], torch.Tensor]


def read_tensors(file, as_a_whole=False):
    """Return name -> Entry for every tensor of a .safetensors or .bin (torch.save) file.

    as_a_whole: read a .safetensors file of at most SMALL bytes now. Its entries then give only
    floats, and only in one dimension: see `small_file_entries`.

    Raise ValueError if the file is damaged, or holds anything but tensors by name. Nothing in the
    file is executed.
    """
    is_safetensors = file.suffix == ".safetensors"
    damage = "damaged or cut short" if is_safetensors else "damaged, or more than tensors"
    with reading(file, damage):
        if not is_safetensors:
            entries = torch_entries(file)
        elif as_a_whole and is_small(file):
            entries = small_file_entries(file)
        else:
            entries = safetensors_entries(file)
        for name in entries:
            # Names end up in messages of one line, so a name of two lines is refused here, once.
            if not isinstance(name, str) or not name.isprintable():
                raise ValueError(
                    f"expected a dict from names to tensors, found the name {name!r:.80}"
                )
    return entries


def is_small(file):
    """Return whether a file may be read as a whole: not a pipe, nor a device that never ends."""
    return file.is_file() and file.stat().st_size <= SMALL


def safetensors_entries(file):
    """Return name -> Entry. Only the header is read now; a tensor is read by its Entry."""
    handle = safe_open(file, framework="pt")
    entries = {}
    for name in handle.keys():  # noqa: SIM118 (the handle is not a dict)
        header = handle.get_slice(name)
        dtype = DTYPES.get(header.get_dtype(), header.get_dtype())
        read = partial(handle.get_tensor, name)
        entries[name] = Entry(tuple(header.get_shape()), dtype, read)
    return entries


def small_file_entries(file):
    """Return name -> Entry. The .safetensors file is read now, as a whole.

    This takes less than half the time of `safetensors_entries` if the tensors are many and short.
    An Entry gives only floats, and only in one dimension, whatever its shape. (To give each tensor
    its shape, which the caller takes away again, would be a tenth of loading an adapter.)
    """
    tensors = dict(deserialize(file.read_bytes()))
    entries = {}
    for name in sorted(tensors):  # because the order of `tensors` is another one in each call
        stored = tensors[name]
        dtype = DTYPES.get(stored["dtype"], stored["dtype"])
        read = partial(to_vector, stored["data"], dtype)
        entries[name] = Entry(tuple(stored["shape"]), dtype, read)
    return entries


def to_vector(data, dtype):
    """Return the vector whose entries are the bytes `data`."""
    if not data:  # torch.frombuffer refuses it
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype)


def torch_entries(file):
    """Return name -> Entry.

    A file in torch's old format is not a zip archive. It cannot be mapped, so it is read as a
    whole.
    """
    check_storages(file)
    is_mapped = zipfile.is_zipfile(file)
    # weights_only refuses a pickle that would run code.
    tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=is_mapped)
    if not isinstance(tensors, dict):
        raise ValueError(f"expected a dict from names to tensors, found {type(tensors).__name__}")
    entries = {}
    places = set()  # of the tensors in memory
    for name, tensor in tensors.items():
        if not is_plain(tensor):
            found = f"{name!r:.80}: {type(tensor).__name__}"
            raise ValueError(f"expected a dict from names to tensors, found {found}")
        # The tensor is mapped already, so there is nothing left to read. But torch.save stores a
        # tensor with two names once, such as an untied head that is the embedding before training.
        # Each name gets a tensor of its own, because training may change both.
        plain = tensor.detach()  # it may be a Parameter
        place = (plain.data_ptr(), plain.shape)
        read = plain.clone if place in places else plain.detach
        places.add(place)
        entries[name] = Entry(tuple(plain.shape), plain.dtype, read)
    return entries


def is_plain(tensor):
    """Return whether this is a dense tensor whose storage holds all of its entries."""
    if not isinstance(tensor, torch.Tensor):
        return False
    if tensor.layout != torch.strided or tensor.is_meta:
        return False
    # Damaged strides can show one stored entry as a million entries, which would fill the memory.
    return tensor.untyped_storage().nbytes() >= tensor.nbytes
