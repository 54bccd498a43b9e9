"""Find the files of a known task, or download them.

Each file is downloaded whole, with the right checksum, or not at all.
"""

import hashlib
import io
import os
import shutil
import tempfile
import time
import zipfile
from collections.abc import Collection, Sequence
from contextlib import suppress
from itertools import chain, product
from pathlib import Path
from urllib.request import urlopen

from minia3.files.lock import lock_folder, remove_lock, waiting_for_lock
from minia3.files.progress import progress_bar
from minia3.files.read import one_line
from minia3.tasks.split_files import SPLIT_OF_NAME
from minia3.tasks.task import Source, TaskSpec

HUB = "https://huggingface.co/datasets/"
TIMEOUT = 30  # seconds to wait for the next byte
CHUNK = 1 << 16  # bytes
LEAST_RATE = 1000  # bytes per second, on average from the beginning
GRACE = 60  # seconds in which a transfer may be slower

LOCK = ".part-lock"
SCRATCH = ".part-"  # how the name of a folder with half-written files begins

# An unpacked file may be this many times as large as its archive. Texts are about four times as
# large.
MAX_INFLATION = 100


def find_or_download(spec: TaskSpec, folder: Path) -> dict[str, Path]:
    """Return the file of each split, after a download if a file that is needed is missing."""
    names = [Path(name) for name in file_names(spec.sources)]
    suffixes = {name.suffix for name in names}
    has_validation = any(SPLIT_OF_NAME.get(name.stem) == "validation" for name in names)
    needed = {"train", "validation"} if has_validation else {"train", "test"}
    files = find_splits(folder, suffixes)
    if needed <= files.keys():
        remove_leftovers(folder)
        return files
    download(spec.sources, folder)
    files = find_splits(folder, suffixes)
    if not needed <= files.keys():
        found = ", ".join(sorted(files)) or "nothing"
        raise ValueError(
            f"{folder}: some downloaded files were removed (left: {found}): run this again"
        )
    return files


def find_splits(folder: Path, suffixes: Collection[str]) -> dict[str, Path]:
    """Return the file of each split in the folder. Raise ValueError if a split has two files."""
    files = {}
    for (name, split), suffix in product(SPLIT_OF_NAME.items(), suffixes):
        path = folder / f"{name}{suffix}"
        if not path.is_file():
            continue
        if split in files:
            names = f"{files[split].name} and {path.name}"
            raise ValueError(f"{folder} has {names}: keep one of them as {split}")
        files[split] = path
    return files


def download(sources: Sequence[Source], folder: Path):
    """Put the files of `sources` into `folder`. A file that is already there is kept.

    Raise ValueError, in one line, if anything goes wrong. Then no part of a file is left behind.
    """
    names = ", ".join(file_names(sources))
    # The table lists train first, and we fetch it last. So if a later run finds train, it finds all
    # the other files, too.
    for source in reversed(sources):
        try:
            contents = fetch(source)
            write_files(contents, folder)
        except Exception as error:  # the network, the disk and the zip module raise many kinds
            raise ValueError(
                f"{source.address}: {one_line(error)}; or put {names} into {folder} by hand"
            ) from error


def file_names(sources: Sequence[Source]) -> list[str]:
    """Return the names of all files of a task."""
    return list(chain.from_iterable(source.files for source in sources))


def write_files(contents: dict[str, bytes], folder: Path):
    """Write files into `folder`, except those that are already there.

    Each file is first written to a scratch folder and then renamed. A rename is atomic, so no other
    process sees a part of a file. What a killed process left in its scratch folder is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with waiting_for_lock(folder, LOCK):
        remove_scratch(folder)
        with tempfile.TemporaryDirectory(dir=folder, prefix=SCRATCH) as scratch:
            for name, content in reversed(contents.items()):  # train last, as above
                target = folder / name
                if target.exists():
                    continue
                scratch_file = Path(scratch, name)
                scratch_file.write_bytes(content)
                os.replace(scratch_file, target)


def remove_leftovers(folder: Path):
    """Remove what a process left that was killed after its last file, unless another one writes."""
    if any(folder.glob(f"{SCRATCH}*/")):
        with suppress(OSError, ValueError), lock_folder(folder, LOCK):
            remove_scratch(folder)
            remove_lock(folder / LOCK)


def remove_scratch(folder: Path):
    """Remove the scratch folders that killed processes left. The caller holds the lock, so they are
    not those of a process that is writing.
    """
    for path in folder.glob(f"{SCRATCH}*/"):
        shutil.rmtree(path, ignore_errors=True)


def fetch(source: Source) -> dict[str, bytes]:
    """Return the content of each file of a source, by its name in the task's folder."""
    if source.address.startswith(HUB):
        return fetch_from_hub(source)
    if not source.sha256:
        raise ValueError("the authors give these files on request only: ask for them there")
    content = fetch_address(source)
    if source.address.endswith(".zip"):
        return unzip(source, content)
    return dict.fromkeys(source.files, content)


def fetch_from_hub(source: Source) -> dict[str, bytes]:
    from huggingface_hub import hf_hub_download  # takes half a second to import

    repo = source.address.removeprefix(HUB)
    contents = {}
    for name, hub_name in source.files.items():
        path = hf_hub_download(repo, hub_name, repo_type="dataset")
        contents[name] = Path(path).read_bytes()
    return contents


def fetch_address(source: Source) -> bytes:
    """Return what is at the address. Raise ValueError if it is not what the table says."""
    content = bytearray()
    started = time.monotonic()
    bar_options = {"total": source.n_bytes, "desc": source.address[-30:], "unit": "B"}
    with (
        urlopen(source.address, timeout=TIMEOUT) as response,
        progress_bar(**bar_options, unit_scale=True) as bar,
    ):
        # Stop after the first byte too many, because a server may never stop sending.
        while len(content) <= source.n_bytes:
            chunk = response.read1(CHUNK)  # what has come, and not only a whole chunk
            if not chunk:
                break
            content += chunk
            bar.update(len(chunk))
            check_rate(len(content), time.monotonic() - started)
    found = f"{len(content)} bytes of sha256 {hashlib.sha256(content).hexdigest()}"
    expected = f"{source.n_bytes} bytes of sha256 {source.sha256}"
    if found != expected:
        raise ValueError(f"found {found}, expected {expected}")
    return bytes(content)


def check_rate(n_bytes, seconds):
    """Raise ValueError if a transfer is too slow: a byte now and then could hold it for days."""
    if seconds > GRACE and n_bytes < LEAST_RATE * seconds:
        found = f"{n_bytes:,} bytes in {seconds:.0f} seconds"
        raise ValueError(f"the server is too slow: {found}, expected {LEAST_RATE:,} a second")


def unzip(source: Source, content: bytes) -> dict[str, bytes]:
    """Return the files of a source from its archive. Raise ValueError if one is far too large."""
    limit = MAX_INFLATION * source.n_bytes
    archive = zipfile.ZipFile(io.BytesIO(content))
    for member in source.files.values():
        if archive.getinfo(member).file_size >= limit:
            raise ValueError(
                f"found {limit} bytes or more in {member} of the zip file, expected less"
            )
    return {name: archive.read(member) for name, member in source.files.items()}
