"""Find the files of a name on this machine, or download them.

    find            t5-base, google-t5/t5-base, a/folder, model.gguf     the files of a model
    find_adapter    user/adapter, a/folder, finish.pt                    the files of an adapter
    local_path      org/name                                             where `find` has put them

Downloads go through huggingface_hub, so its cache and its variables (HF_TOKEN, HF_HOME,
HF_ENDPOINT, HF_HUB_OFFLINE) work, and a download that broke off is resumed. huggingface_hub is
imported when it is used, because it imports an HTTP library (0.2 s), and a folder on this machine
needs neither.
"""

import difflib
import inspect
import logging
import os
import re
import socket
import threading
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from minia3.checkpoints.known_models import KNOWN_MODELS, known_model
from minia3.checkpoints.layout import (
    ADAPTER_FILES,
    ADDED_TOKENS_FILE,
    CHAT_TEMPLATE_FILE,
    MERGES_FILE,
    SETTINGS_FILES,
    TOKENIZER_FILES,
    TOOL_TEMPLATE_FILE,
    WEIGHT_FILES,
    check_adapter_folder,
    is_gguf,
    refuse_file,
    shard_names,
)
from minia3.files.home import expand_home
from minia3.files.read import check_link, one_line
from minia3.files.write import finish_writing

LONGEST_WAIT = 600  # seconds without news of a download
NEWS = 10_000_000  # bytes: huggingface_hub reports as many at once

# Two parts with one slash between them, as in `org/name`. The first part does not begin like a path
# (`./x`, `~/x`), and the second does not end in .gguf, because that is a file that does not exist.
HUB_ID = re.compile(r"[^/.~][^/]*/[^/]*(?<!\.(?i:gguf))")


def find(name_or_path, weights=True):
    """Return the Path of a model's folder or .gguf file. Download it if it is not on this machine.

    name_or_path: a folder, a .gguf file, a known name (`t5-base`) or a hub id (`org/name`). A
        folder that holds a model wins over a known name.
    weights: False leaves out the weights, for callers that need only the config or the tokenizer.

    Only files that are needed are downloaded, and safetensors rather than .bin. Raise ValueError if
    the name leads nowhere (the message has the nearest known name) or the download fails.
    """
    check_is_name(name_or_path, "a model")
    row = known_model(name_or_path)
    repo = row.repo if row else str(name_or_path)  # for the embedded model, repo is a folder
    path = Path(repo)
    if path.is_dir():
        finish_writing(path)
        return path
    if path.is_file():
        if not is_gguf(path):
            refuse_file(path)
        return path
    check_link(path)
    if not HUB_ID.fullmatch(repo):
        hint = nearest_name(repo) or ". `minia3 info --list` prints the known names"
        expected = "folder, .gguf file, hub id (org/name) or known name"
        raise ValueError(f"{name_or_path}: no such {expected}{hint}")
    other_files = (MERGES_FILE, CHAT_TEMPLATE_FILE, TOOL_TEMPLATE_FILE, ADDED_TOKENS_FILE)
    optional = (*SETTINGS_FILES, *TOKENIZER_FILES, *other_files)
    if row is None:  # minia3 may have trained this model
        optional += ("task.json",)
    wanted_weights = WEIGHT_FILES if weights else ()
    return fetch(repo, "config.json", optional, wanted_weights)


def local_path(name_or_path):
    """Return the folder in the cache to which `find` has downloaded a hub id.

    Return a path or a known name as it is, and a hub id that was not downloaded, too. This needs no
    network.
    """
    name = str(name_or_path)
    if known_model(name) or os.path.exists(name) or not HUB_ID.fullmatch(name):
        return name_or_path
    from huggingface_hub import try_to_load_from_cache

    config = None
    with suppress(ValueError):  # a path that leads nowhere need not be a valid hub id
        config = try_to_load_from_cache(name, "config.json")
    return os.path.dirname(config) if isinstance(config, str) else name_or_path


def find_adapter(name_or_path):
    """Return the Path of an adapter's folder or file. Download it if it is not on this machine.

    name_or_path: a folder, a file or a hub id (`user/name`). Raise ValueError if it leads nowhere
        or the download fails.
    """
    path = local_adapter(name_or_path)
    if path is not None:
        return path
    return fetch(str(name_or_path), "adapter_config.json", ("task.json",), ADAPTER_FILES)


def local_adapter(name_or_path):
    """Return the Path of an adapter's folder or file on this machine, or None for a hub id.

    Raise ValueError if the name is neither.
    """
    check_is_name(name_or_path, "an adapter")
    path = Path(expand_home(name_or_path))
    if path.is_dir():
        finish_writing(path)
        check_adapter_folder(path)
    elif path.suffix == ".json":
        expected = "the folder of an adapter, or its .safetensors, .bin or .pt file"
        raise ValueError(f"{path}: expected {expected}: give {path.parent}")
    if path.exists():
        return path
    check_link(path)
    if not HUB_ID.fullmatch(str(name_or_path)):
        expected = "the folder or file of an adapter, or a hub id (user/name)"
        raise ValueError(f"{path}: not found; expected {expected}")
    return None


def check_is_name(name, kind):
    """Raise ValueError if `name` is neither a text nor a path, but a number, for example.

    An empty text is not a name, either: as a path, it would be the current folder.
    """
    if name == "" or not isinstance(name, str | os.PathLike):
        raise ValueError(f"found {name!r:.80}, expected the name or the path of {kind}")


def nearest_name(name):
    """Return "; did you mean t5-base?", or an empty string if no known name is near."""
    names = []
    for short, row in KNOWN_MODELS.items():
        names += [short, row.repo.lower()]
    near = difflib.get_close_matches(name.lower(), names, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def fetch(repo, config, optional, weights):
    """Download the files of a repository that are not in the cache. Return the folder in the cache.

    config: the config file, which every model or adapter has.
    optional: files that are downloaded if the repository has them.
    weights: possible names of the weights. The first file that exists is downloaded, with its
        shards. Without names, no weights are downloaded.
    """
    snapshot = Snapshot(repo, config)
    for name in optional:
        snapshot.look_for(name)
    if weights:
        for shard in shard_names(snapshot.require(weights)):
            snapshot.require([shard])
    return snapshot.folder


class Snapshot:
    """The files of one commit of a hub repository, in huggingface_hub's cache.

    The first file decides the commit, so all files of a checkpoint belong together even if somebody
    pushes to the repository meanwhile. Without a network, files are looked up only in the cache,
    because huggingface_hub retries for a while before it gives up.
    """

    def __init__(self, repo, config):
        self.repo = repo
        self.commit = None  # None: the newest commit
        self.network_error = why_unreachable()  # None: as far as we know, the hub can be reached
        self.folder = self.require([config]).parent
        self.commit = self.folder.name  # the cache names the folder after the commit

    def require(self, names):
        """Return the path of the first of `names` that exists. Raise ValueError if none does."""
        path = self.first_of(names)
        if path is not None:
            return path
        wanted = " or ".join(names)
        if self.network_error:
            reason = f"is not in the cache, and the hub cannot be reached ({self.network_error})"
            remedy = "Without a network, give the path of a folder"
            raise ValueError(f"{self.repo}: {wanted} {reason}. {remedy}")
        remedy = ""
        if "config.json" in names:
            remedy = (
                ": if it holds .gguf files, download one and give its path; if it holds an "
                "adapter, give it as the adapter"
            )
        raise ValueError(f"{self.repo}: this hub repository has no {wanted}{remedy}")

    def look_for(self, name):
        """Download a file if the repository has it.

        Raise ValueError if the hub cannot be reached for this file, because it may exist: without
        its settings, a tokenizer has other ids. (If there was no network from the beginning, the
        cache has to be enough.)
        """
        was_reachable = self.network_error is None
        self.first_of([name])
        if was_reachable and self.network_error:
            raise ValueError(
                f"{self.repo}: the hub cannot be reached ({self.network_error}), and the cache "
                f"does not say whether there is a {name}. Try again, or set HF_HUB_OFFLINE=1 to "
                "use only what is in the cache"
            )

    def first_of(self, names):
        """Return the path of the first of `names` that the repository has, or None."""
        for name in names:
            path = None if self.is_known_to_lack(name) else self.download(name)
            if path is not None:
                return path
        return None

    def is_known_to_lack(self, name):
        """Return whether the cache says that this commit lacks the file. This saves a request."""
        from huggingface_hub import try_to_load_from_cache

        if self.commit is None:
            return False
        found = try_to_load_from_cache(self.repo, name, revision=self.commit)
        # A path means that the file is in the cache, and None that nothing is known. Anything else
        # marks a file that does not exist.
        return not isinstance(found, str | None)

    def download(self, name):
        """Return the path of a file in the cache, or None if there is no such file."""
        from huggingface_hub import errors, hf_hub_download

        is_offline = self.network_error is not None
        try:
            with without_warnings():
                path = Transfer(
                    hf_hub_download,
                    self.repo,
                    name,
                    revision=self.commit,
                    local_files_only=is_offline,
                ).result()
        except errors.LocalEntryNotFoundError as error:
            # There is no network, and the file is not in the cache. From now on, only the cache is
            # used.
            self.network_error = self.network_error or one_line(error.__cause__ or error)
            return None
        except errors.EntryNotFoundError:
            return None
        # The disk, huggingface_hub and its HTTP library (which changes between versions) raise
        # errors without a common base.
        except Exception as error:
            raise ValueError(f"{self.repo}: {self.explain(error)}") from None
        return Path(path)

    def explain(self, error):
        """Return why a download failed, and what the user can do."""
        from huggingface_hub import errors
        from huggingface_hub.utils import HFValidationError

        if isinstance(error, errors.GatedRepoError):
            terms = f"Accept its terms at https://huggingface.co/{self.repo}"
            return f"gated. {terms} and set HF_TOKEN or `hf auth login`"
        # This comes second, because a GatedRepoError is a RepositoryNotFoundError, too.
        if isinstance(error, errors.RepositoryNotFoundError):
            hint = nearest_name(self.repo)
            return f"the hub has no such repository, or it is private and needs a token{hint}"
        if isinstance(error, HFValidationError):
            return f"not a hub id: {one_line(error)}"
        return f"the download failed: {one_line(error)}"


class Transfer:
    """A download in a thread of its own, which is given up if it is too slow.

    huggingface_hub has a limit of time for each byte only, so a server that sends a byte now and
    then could hold a download for days. It reports every 10 MB, and the end of a file: if neither
    comes within LONGEST_WAIT, less than 17 kB came in a second. It reports nothing while it waits
    for another process that downloads the same file, so the files in its cache are watched, too.
    """

    def __init__(self, download, repo, name, **options):
        """download: hf_hub_download, which is called with the other arguments."""
        self.repo = repo
        self.n_bytes = 0  # of the files that are not complete, when they were last news
        self.reported = time.monotonic()  # when the last report came
        self.path = None
        self.error = None
        # Older versions of huggingface_hub do not let us watch: then a transfer is not limited.
        self.is_watched = "tqdm_class" in inspect.signature(download).parameters
        if self.is_watched:
            options["tqdm_class"] = self.bar_class()
        self.call = partial(download, repo, name, **options)

    def bar_class(self):
        """Return the class of huggingface_hub's bar, which reports to this transfer, too."""
        from huggingface_hub.utils import tqdm

        transfer = self

        class Bar(tqdm):
            def update(self, n=1):
                transfer.reported = time.monotonic()
                return super().update(n)

        return Bar

    def run(self):
        try:
            self.path = self.call()
        except Exception as error:  # raised again in the thread that waits
            self.error = error

    def is_too_slow(self):
        """Return whether there was no news for too long, in this process or in another one."""
        n_bytes = incomplete_bytes(self.repo)
        if abs(n_bytes - self.n_bytes) >= NEWS:  # fewer if a file is complete
            self.n_bytes = n_bytes
            self.reported = time.monotonic()
        return self.is_watched and time.monotonic() - self.reported > LONGEST_WAIT

    def result(self):
        """Return the path of the file, or raise what the download raised.

        Raise TimeoutError if it is too slow. Its thread ends with the program.
        """
        thread = threading.Thread(target=self.run, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(1.0)
            if self.is_too_slow():
                raise TimeoutError(
                    f"the server is too slow: less than 10 MB in {LONGEST_WAIT} seconds. If "
                    "another process is downloading this file, try again when it is done"
                )
        if self.error is not None:
            raise self.error
        return self.path


def incomplete_bytes(repo):
    """Return how many bytes the cache has of files of a repository that are being downloaded."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type="model"))
    n_bytes = 0
    for path in folder.glob("blobs/*.incomplete"):
        with suppress(OSError):  # it is complete, and has another name
            n_bytes += path.stat().st_size
    return n_bytes


def why_unreachable():
    """Return why the hub is not asked, or None.

    The hub is not asked if the user forbids it, or if its address has no host name, or one that
    cannot be resolved. Without a network this is known at once, but huggingface_hub would try for
    24 seconds.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    address = urlsplit(constants.ENDPOINT)
    if {address.scheme, "all"} & getproxies().keys():  # then the proxy resolves names
        return None
    if address.hostname is None:
        return (
            f"HF_ENDPOINT is {constants.ENDPOINT!r:.80}, expected one like https://huggingface.co"
        )
    try:
        socket.getaddrinfo(address.hostname, None)
    except OSError as error:
        return f"{address.hostname}: {one_line(error)}"
    return None


@contextmanager
def without_warnings():
    """Keep huggingface_hub from printing two lines for each of its tries.

    Whatever fails in the end is raised, and becomes a message of ours.
    """
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
