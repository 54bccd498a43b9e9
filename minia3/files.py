"""Chapter 6, files: from a name to a checkpoint's folder, and from its files to tensors that are read one at a time.

Everything that comes from outside passes here. Weights are memory-mapped: a tensor takes anonymous memory only where it
must change its dtype or device.
"""

import difflib
import json
import os
import pickle
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open

from minia3.models import KNOWN, known

TOKENIZER_FILES = (
    "tokenizer.json",
    "spiece.model",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
WEIGHT_FILES = (  # the first that is there
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class Entry(NamedTuple):
    """A tensor of a checkpoint that has not been read yet."""

    shape: tuple
    dtype: torch.dtype | str  # a string: what is no float
    read: Callable[[], torch.Tensor]


def find(name_or_path, weights=True):
    """A folder, a .gguf file, a known name (`t5-base`) or a hub id (`org/name`) -> Path of the folder or .gguf file.

    What is not on this machine comes from the hub through huggingface_hub (its cache, resume, token, HF_ENDPOINT and
    HF_HUB_OFFLINE): only the files needed, safetensors rather than .bin; `weights=False` leaves the weights out.
    A folder with a config.json goes before a known name. Raises ValueError for a name that leads nowhere, with the
    nearest known one.
    """
    path, row = Path(name_or_path), known(name_or_path)
    if path.is_dir() and (row is None or (path / "config.json").exists()):
        return path
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        raise ValueError(f"{path}: expected a folder with config.json, or a .gguf file")
    repo = row.repo if row else str(name_or_path)
    if Path(repo).is_dir():
        return Path(repo)
    if repo.count("/") == 1 and not repo.startswith((".", "/", "~")) and path.suffix != ".gguf":
        return _fetch(repo, weights)
    hint = _near(repo) or f". Known names: {', '.join(KNOWN)}"
    raise ValueError(f"{name_or_path}: no such folder or .gguf file, no hub id (org/name), and no known name{hint}")


def _near(name):
    near = difflib.get_close_matches(name.lower(), [*KNOWN, *(row.repo.lower() for row in KNOWN.values())], n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _fetch(repo, weights):
    """The snapshot of the repository in huggingface_hub's cache, filled with what is needed and not there yet."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    commit, unreachable = None, None

    def get(file):
        nonlocal unreachable
        cached = try_to_load_from_cache(repo, file, revision=commit) if commit else None
        if cached is not None:  # a path, or a mark that this commit has no such file
            return Path(cached) if isinstance(cached, str) else None
        try:
            return Path(hf_hub_download(repo, file, revision=commit, local_files_only=unreachable is not None))
        except LocalEntryNotFoundError as error:  # no network: from here on, what is in the cache must do
            unreachable = unreachable or error.__cause__ or error
        except EntryNotFoundError:
            pass
        return None

    def absent(what):
        if unreachable is None:
            return ValueError(f"{repo}: this hub repository has no {what}")
        return ValueError(
            f"{repo}: {what} is not in the cache, and the hub cannot be reached ({one_line(unreachable)}). "
            "Without a network, give the path of a folder"
        )

    try:
        config = get("config.json")
        if config is None:
            raise absent("config.json")
        commit = config.parent.name  # all files of one checkpoint, even while the repository moves on
        for file in ("generation_config.json", *TOKENIZER_FILES):
            get(file)
        if weights:
            first = next(filter(None, map(get, WEIGHT_FILES)), None)
            if first is None:
                raise absent(" or ".join(WEIGHT_FILES))
            for file in shard_names(first) if first.suffix == ".json" else []:
                if get(file) is None:
                    raise absent(file)
    except GatedRepoError:
        raise ValueError(
            f"{repo}: gated. Accept its terms at https://huggingface.co/{repo} and set HF_TOKEN, or run `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"{repo}: the hub has no such repository, or it is private and needs a token{_near(repo)}"
        ) from None
    except HFValidationError as error:
        raise ValueError(f"{repo}: not a hub id: {one_line(error)}") from None
    except ValueError:
        raise
    except Exception as error:  # huggingface_hub's, its HTTP library's (another one in each major version), the disk's
        raise ValueError(f"{repo}: the download failed: {one_line(error)}") from None
    return config.parent


def read_json(path):
    """The object in a JSON file. Raises ValueError, in one line, where there is none."""
    try:
        value = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path}: not found") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {not_what_it_says(path) or one_line(error)}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def weight_files(folder):
    """The files that hold a checkpoint's weights. Raises ValueError where the folder has none, or lacks a shard."""
    first = next((folder / file for file in WEIGHT_FILES if (folder / file).exists()), None)
    if first is None:
        found = sorted(path.name for path in folder.iterdir())[:8] or "nothing"
        raise ValueError(f"{folder}: expected one of {', '.join(WEIGHT_FILES)}; the folder holds {found}")
    files = [folder / name for name in shard_names(first)] if first.suffix == ".json" else [first]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise ValueError(f"{first}: names shards that are not there: {', '.join(missing)}")
    return files


def shard_names(index):
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index}: expected a weight_map from tensors to files")
    names = sorted(set(names.values()))
    outside = [repr(name) for name in names if Path(name).name != name or name in ("", "..")]
    if outside:
        raise ValueError(f"{index}: names files outside of its folder: {', '.join(outside)}")
    return names


def tensors(file):
    """Name -> Entry of every tensor of a .safetensors or .bin file. Raises ValueError where it is neither."""
    try:
        if file.suffix == ".safetensors":
            handle = safe_open(file, framework="pt")
            parts = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
            return {
                name: Entry(
                    tuple(part.get_shape()),
                    DTYPES.get(part.get_dtype(), part.get_dtype()),
                    lambda n=name: handle.get_tensor(n),
                )
                for name, part in parts.items()
            }
        # The old, non-zip form of torch's files cannot be mapped: it is read whole.
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:  # torch goes on to advise weights_only=False: not for a stranger's file
        reason = one_line(error).split(". ")[0]
        raise ValueError(f"{file}: {not_what_it_says(file) or 'damaged, or more than tensors: ' + reason}") from None
    except Exception as error:  # a damaged file provokes many kinds
        raise ValueError(f"{file}: {not_what_it_says(file) or 'damaged or cut short: ' + one_line(error)}") from None
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in loaded.items()
    ):
        raise ValueError(f"{file}: expected a dict from names to tensors")
    return {name: Entry(tuple(x.shape), x.dtype, lambda x=x: x) for name, x in loaded.items()}


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def not_what_it_says(path):
    """What the first bytes of a file tell, where it is not what its name says; else an empty string."""
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        return one_line(error)
    if not head:
        return "the file is empty"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer in place of the file: run `git lfs pull`"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "an HTML page in place of the file: the download went wrong"
    return ""


def one_line(error):
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextmanager
def replacing(path):
    """A temporary path beside `path`, renamed to it at the end: readers see the old file or the new one, never half."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o666 & ~_umask())
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path, value):
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
