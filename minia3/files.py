"""Chapter 6, files: from a name to a checkpoint's folder, and from its files to tensors that are read one at a time.

Everything that comes from outside passes here. Weights are memory-mapped: a tensor takes anonymous memory only where it
must change its dtype or device.
"""

import difflib
import filecmp
import json
import os
import re
import shutil
import uuid
import zipfile
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from minia3 import models

CONFIGS = ("config.json", "adapter_config.json")  # what makes a folder a checkpoint, or an adapter
FORMS = ("tokenizer.json", "spiece.model", "tokenizer.model")  # of a tokenizer: the first that is there
BESIDE = ("generation_config.json", "special_tokens_map.json", "tokenizer_config.json")  # its settings: the last wins
TEMPLATE = "chat_template.jinja"
ADDED = "added_tokens.json"  # token -> id: what older tokenizers put behind sentencepiece's pieces
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json",  # the first that is there
                "pytorch_model.bin", "pytorch_model.bin.index.json")  # fmt: skip
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
HUB_ID = re.compile(r"[^/.~][^/]*/[^/]*(?<!\.gguf)")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Entry(NamedTuple):  # a tensor of a checkpoint that has not been read yet
    shape: tuple
    dtype: torch.dtype | str  # a string: what is no float
    read: Callable[[], torch.Tensor]


def find(name_or_path, weights=True):
    """A folder, a .gguf file, a known name (`t5-base`) or a hub id (`org/name`) -> Path of the folder or .gguf file.

    What is not on this machine comes from the hub through huggingface_hub (its cache, resume, token, HF_ENDPOINT and
    HF_HUB_OFFLINE): only the files needed, safetensors rather than .bin; `weights=False` leaves the weights out.
    A folder with a config goes before a known name. ValueError for a name that leads nowhere, with the nearest known.
    """
    row = models.known(name_or_path)
    repo = row.repo if row else str(name_or_path)  # of the embedded one, a folder
    path = Path(repo)
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file() or not HUB_ID.fullmatch(repo):
        hint = _near(repo) or f". Known names: {', '.join(models.table())}"
        raise ValueError(f"{name_or_path}: no such folder, .gguf file, hub id (org/name) or known name{hint}")
    return _fetch(repo, "config.json", (*BESIDE, *FORMS, TEMPLATE, ADDED), WEIGHT_FILES * weights)


def base_of(name_or_path):
    """The known model that a folder says it was made of (config.json's _name_or_path); any other name as it is."""
    config = Path(name_or_path, "config.json")
    base = read_json(config).get("_name_or_path") if config.is_file() else name_or_path
    return base if models.known(base) else name_or_path


def find_adapter(name_or_path):
    """A folder or file of an adapter, or a hub id (`user/name`), fetched as `find` does -> Path. ValueError too."""
    path = Path(name_or_path)
    if not (path.exists() or HUB_ID.fullmatch(str(name_or_path))):
        raise ValueError(f"{path}: not found; expected the folder or file of an adapter, or a hub id (user/name)")
    return path if path.exists() else _fetch(str(name_or_path), "adapter_config.json", (), ADAPTER_FILES)


def _near(name):
    names = [known for short, row in models.table().items() for known in (short, row.repo.lower())]
    near = difflib.get_close_matches(name.lower(), names, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _fetch(repo, config, beside, weights):
    """The snapshot of the repository in huggingface_hub's cache, filled with what is needed and not there yet."""
    from huggingface_hub import errors, hf_hub_download, try_to_load_from_cache

    commit = unreachable = None

    def get(*names, needed=True):
        """The path of the first of `names` that is there; where none is, ValueError if `needed`."""
        nonlocal unreachable
        for name in names:
            if commit and not isinstance(try_to_load_from_cache(repo, name, revision=commit), str | None):
                continue  # a mark in the cache: this commit has no such file
            try:
                return Path(hf_hub_download(repo, name, revision=commit, local_files_only=unreachable is not None))
            except errors.EntryNotFoundError as error:
                if isinstance(error, errors.LocalEntryNotFoundError):  # no network: from here on, the cache must do
                    unreachable = unreachable or one_line(error.__cause__ or error)
                continue
            except errors.GatedRepoError:
                why = f"gated. Accept its terms at https://huggingface.co/{repo} and set HF_TOKEN or `hf auth login`"
            except errors.RepositoryNotFoundError:
                why = f"the hub has no such repository, or it is private and needs a token{_near(repo)}"
            except Exception as error:  # of huggingface_hub, the disk, an HTTP library (its version's)
                why = f"not a hub id, or the download failed: {one_line(error)}"
            raise ValueError(f"{repo}: {why}")
        if needed and unreachable:
            why = f"is not in the cache, and the hub cannot be reached ({unreachable})"
            raise ValueError(f"{repo}: {' or '.join(names)} {why}. Without a network, give the path of a folder")
        if needed:
            raise ValueError(f"{repo}: this hub repository has no {' or '.join(names)}")

    folder = get(config).parent
    commit = folder.name  # all files of one checkpoint, even while the repository moves on
    for name in beside:
        get(name, needed=False)
    for name in shard_names(get(*weights)) if weights else []:
        get(name)
    return folder


def read_json(path):
    """The object in a JSON file. Raises ValueError, in one line, where there is none."""
    with reading(path):
        value = json.loads(Path(path).read_bytes())
        if not isinstance(value, dict):
            raise ValueError(f"expected a JSON object, found {type(value).__name__}")
    return value


def weight_files(folder):
    """The files that hold a checkpoint's weights. Raises ValueError where the folder has none, or lacks a shard."""
    first = next((folder / file for file in WEIGHT_FILES if (folder / file).exists()), None)
    if first is None:
        found = sorted(path.name for path in folder.iterdir())[:8] or "nothing"
        raise ValueError(f"{folder}: expected one of {', '.join(WEIGHT_FILES)}; the folder holds {found}")
    paths = [folder / name for name in shard_names(first)]
    if missing := [path.name for path in paths if not os.path.exists(path)]:  # nor a name that is too long
        raise ValueError(f"{first}: names shards that are not there: {', '.join(missing):.300}")
    return paths


def shard_names(first):
    """The names of all shards, of which the index tells; `first` alone where it is none."""
    if first.suffix != ".json":
        return [first.name]
    parts = read_json(first).get("weight_map")
    names = [*parts.values()] if isinstance(parts, dict) else []
    wrong = [x for x in names if not (isinstance(x, str) and x == Path(x).name and x not in ("", ".."))]
    if wrong or not names:
        what = "a weight_map from tensors to files of this folder"
        raise ValueError(f"{first}: expected {what}, found {wrong or parts!r:.200}")
    return sorted(set(names))


def tensors(file):
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
            parts = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
            for name, x in parts.items() if isinstance(parts, dict) else [(None, parts)]:
                plain = isinstance(x, torch.Tensor) and x.layout == torch.strided and not x.is_meta
                if not (plain and x.untyped_storage().nbytes() >= x.nbytes):  # or one number is seen as a million
                    raise ValueError(f"expected a dict from names to tensors, found {name!r:.80}: {type(x).__name__}")
                entries[name] = Entry(tuple(x.shape), x.dtype, lambda x=x: x)
        if bad := [name for name in entries if not (isinstance(name, str) and name.isprintable())]:
            raise ValueError(f"expected a dict from names to tensors, found a name {bad[0]!r:.80}")
    return entries


@contextmanager
def reading(where, damage="damaged or cut short", extra=None):
    """Whatever goes wrong while a file of others is read becomes a ValueError of one line that begins with `where`.

    A plain ValueError keeps its message; `damage` is what any other tells. `extra` of minia3: for imports in between.
    """
    try:
        yield
    except BaseException as error:  # tokenizers raises plain Exceptions, and a panic of its Rust code is not even one
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        why = one_line(error)
        if extra and isinstance(error, ImportError):
            why = f"{why}: pip install 'minia3[{extra}]'"
        elif type(error) is not ValueError:  # of others, the first sentence: torch goes on to advise weights_only=False
            why = f"{damage}: {type(error).__name__}: {why.split('. ')[0]}"
        known = not_what_it_says(where) if isinstance(where, Path) and not where.is_dir() else ""
        raise ValueError(f"{where}: {known or why}") from None


def not_what_it_says(path):
    """What the first bytes of a file tell, where it is not what its name says; else an empty string."""
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        return "not found" if isinstance(error, FileNotFoundError) else one_line(error)
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer in place of the file: run `git lfs pull`"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "an HTML page in place of the file: the download went wrong"
    return "" if head else "the file is empty"


def one_line(error):
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextmanager
def replacing(path):
    """A temporary path beside `path`, renamed to it at the end: readers see the old file or the new one, never half."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def lock(folder, name=".lock"):
    """Hold a file of `folder` until what is returned is left, or closed. ValueError where another process holds it."""
    try:
        import fcntl
    except ImportError:  # Windows
        return nullcontext()
    file = open(folder / name, "a")  # noqa: SIM115 (stays open as long as the folder is held)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"{folder}: another run is writing there") from None
    return file if os.fstat(file.fileno()).st_nlink else lock(folder, name)  # removed meanwhile: not the lock


@contextmanager
def writing_folder(folder, replaces=()):
    """A hidden folder inside `folder` (made if need be): what is written there moves to `folder` at the end.

    Until then nothing changes, whatever fails. `folder` is held meanwhile: ValueError where another process holds it.
    What matches the patterns `replaces` and is not written anew is removed. A kill leaves the old or the new: one file
    changes by one rename. Where several change, the old config is removed first, and the new one comes last: a kill in
    the milliseconds between leaves a folder without a config, which loaders refuse, but never a mixture.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder):
        hidden = folder / ".writing"
        try:
            shutil.rmtree(hidden, ignore_errors=True)  # of a process that was killed
            hidden.mkdir()
            with written(folder):
                yield hidden
            names = sorted(os.listdir(hidden), key=CONFIGS.__contains__)
            stale = {path.name for pattern in replaces for path in folder.glob(pattern)} - {*names}
            same, *_ = filecmp.cmpfiles(hidden, folder, names, shallow=False)
            several = len(names) - len(same) + len(stale) > 1
            for name in [*(name for name in names if several and name in CONFIGS), *stale]:
                (folder / name).unlink(missing_ok=True)
            for name in names:
                (hidden / name).chmod(hidden.stat().st_mode & 0o666)  # safetensors makes files for their owner alone
                os.replace(hidden / name, folder / name)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)
            (folder / ".lock").unlink(missing_ok=True)


@contextmanager
def written(folder):
    """The errors of safetensors and tokenizers, where they write, become OSErrors: the disk is full."""
    try:
        yield
    except Exception as error:
        if isinstance(error, SafetensorError) or type(error) is Exception:
            raise OSError(f"{folder}: {one_line(error)}") from None
        raise


def write_json(path, value):
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_peft(folder, tensors, config):
    """Write an adapter's tensors and adapter_config.json as a PEFT folder."""
    with writing_folder(folder, replaces=["adapter_model.*"]) as temporary:
        (temporary / ADAPTER_FILES[0]).write_bytes(save(tensors, metadata={"format": "pt"}))
        write_json(temporary / "adapter_config.json", config)
