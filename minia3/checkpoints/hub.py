"""To be written."""

import difflib
import re
from pathlib import Path

from huggingface_hub import errors, hf_hub_download, try_to_load_from_cache

from minia3.checkpoints.known_models import known_model, known_models
from minia3.checkpoints.layout import (
    ADAPTER_FILES,
    ADDED_TOKENS_FILE,
    CHAT_TEMPLATE_FILE,
    SETTINGS_FILES,
    TOKENIZER_FILES,
    WEIGHT_FILES,
    shard_names,
)
from minia3.files.read import one_line

HUB_ID = re.compile(r"[^/.~][^/]*/[^/]*(?<!\.gguf)")


def find(name_or_path, weights=True):
    """A folder, a .gguf file, a known name (`t5-base`) or a hub id (`org/name`) -> Path of the folder or .gguf file.

    What is not on this machine comes from the hub through huggingface_hub (its cache, resume, token, HF_ENDPOINT and
    HF_HUB_OFFLINE): only the files needed, safetensors rather than .bin; `weights=False` leaves the weights out.
    A folder with a config goes before a known name. ValueError for a name that leads nowhere, with the nearest known.
    """
    row = known_model(name_or_path)
    repo = row.repo if row else str(name_or_path)  # of the embedded one, a folder
    path = Path(repo)
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file() or not HUB_ID.fullmatch(repo):
        hint = nearest_name(repo) or f". Known names: {', '.join(known_models())}"
        raise ValueError(
            f"{name_or_path}: no such folder, .gguf file, hub id (org/name) or known name{hint}"
        )
    return fetch(
        repo,
        "config.json",
        (*SETTINGS_FILES, *TOKENIZER_FILES, CHAT_TEMPLATE_FILE, ADDED_TOKENS_FILE),
        WEIGHT_FILES * weights,
    )


def find_adapter(name_or_path):
    """A folder or file of an adapter, or a hub id (`user/name`), fetched as `find` does -> Path. ValueError too."""
    path = Path(name_or_path)
    if not (path.exists() or HUB_ID.fullmatch(str(name_or_path))):
        raise ValueError(
            f"{path}: not found; expected the folder or file of an adapter, or a hub id (user/name)"
        )
    return (
        path
        if path.exists()
        else fetch(str(name_or_path), "adapter_config.json", (), ADAPTER_FILES)
    )


def nearest_name(name):
    names = [known for short, row in known_models().items() for known in (short, row.repo.lower())]
    near = difflib.get_close_matches(name.lower(), names, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def fetch(repo, config, beside, weights):
    """The snapshot of the repository in huggingface_hub's cache, filled with what is needed and not there yet."""

    commit = unreachable = None

    def get(*names, needed=True):
        """The path of the first of `names` that is there; where none is, ValueError if `needed`."""
        nonlocal unreachable
        for name in names:
            if commit and not isinstance(
                try_to_load_from_cache(repo, name, revision=commit), str | None
            ):
                continue  # a mark in the cache: this commit has no such file
            try:
                return Path(
                    hf_hub_download(
                        repo, name, revision=commit, local_files_only=unreachable is not None
                    )
                )
            except errors.EntryNotFoundError as error:
                if isinstance(
                    error, errors.LocalEntryNotFoundError
                ):  # no network: from here on, the cache must do
                    unreachable = unreachable or one_line(error.__cause__ or error)
                continue
            except errors.GatedRepoError:
                why = f"gated. Accept its terms at https://huggingface.co/{repo} and set HF_TOKEN or `hf auth login`"
            except errors.RepositoryNotFoundError:
                why = f"the hub has no such repository, or it is private and needs a token{nearest_name(repo)}"
            except (
                Exception
            ) as error:  # of huggingface_hub, the disk, an HTTP library (its version's)
                why = f"not a hub id, or the download failed: {one_line(error)}"
            raise ValueError(f"{repo}: {why}")
        if needed and unreachable:
            why = f"is not in the cache, and the hub cannot be reached ({unreachable})"
            raise ValueError(
                f"{repo}: {' or '.join(names)} {why}. Without a network, give the path of a folder"
            )
        if needed:
            raise ValueError(f"{repo}: this hub repository has no {' or '.join(names)}")

    folder = get(config).parent
    commit = folder.name  # all files of one checkpoint, even while the repository moves on
    for name in beside:
        get(name, needed=False)
    for name in shard_names(get(*weights)) if weights else []:
        get(name)
    return folder
