"""To be written."""

import zipfile
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from safetensors import safe_open

from minia3.files.read import reading

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Entry(NamedTuple):  # a tensor of a checkpoint that has not been read yet
    shape: tuple
    dtype: torch.dtype | str  # a string: what is no float
    read: Callable[[], torch.Tensor]


def read_tensors(file):
    """Name -> Entry of every tensor of a .safetensors or .bin file. Raises ValueError where it is neither."""
    mapped, entries = file.suffix == ".safetensors", {}
    with reading(file, "damaged or cut short" if mapped else "damaged, or more than tensors"):
        if mapped:
            handle = safe_open(file, framework="pt")
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                x = handle.get_slice(name)
                dtype = DTYPES.get(x.get_dtype(), x.get_dtype())
                entries[name] = Entry(tuple(x.get_shape()), dtype, partial(handle.get_tensor, name))
        else:  # the old, non-zip form of torch's files cannot be mapped: it is read whole
            parts = torch.load(
                file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
            )
            for name, x in parts.items() if isinstance(parts, dict) else [(None, parts)]:
                plain = isinstance(x, torch.Tensor) and x.layout == torch.strided and not x.is_meta
                if not (
                    plain and x.untyped_storage().nbytes() >= x.nbytes
                ):  # or one number is seen as a million
                    raise ValueError(
                        f"expected a dict from names to tensors, found {name!r:.80}: {type(x).__name__}"
                    )
                entries[name] = Entry(tuple(x.shape), x.dtype, lambda x=x: x)
        if bad := [name for name in entries if not (isinstance(name, str) and name.isprintable())]:
            raise ValueError(f"expected a dict from names to tensors, found a name {bad[0]!r:.80}")
    return entries
