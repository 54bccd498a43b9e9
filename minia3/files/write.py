"""Write files and folders that a kill or a full disk cannot leave half done.

A file: `replacing` yields a temporary path beside the file and renames it at the end. A rename is
atomic, so a reader finds either the old file or the new one.

A folder: the system cannot rename several files at once, so `writing_folder` follows a protocol.
Loaders take a folder for a checkpoint only if it has a config (config.json or adapter_config.json),
and the protocol relies on this.

    1. lock the folder (.lock)            a second writer gets a ValueError
    2. write everything to .writing/      whatever fails here leaves the folder as it was
    3. rename .writing/ to .written/      from now on, the new checkpoint counts
    4. remove the old config              only if more than one file of the folder will change
    5. remove stale files                 left by the old checkpoint, not written by the new one
    6. rename the new files               the config comes last
    7. remove .written/ and .lock

A kill leaves .writing/ or .written/ behind. The next writer removes .writing/. If there is a
.written/, the next reader or writer of ours finishes steps 4 to 7 (`finish_writing`). So a kill at
any moment leaves the old checkpoint or the new one, and never a mixture. A program that knows
nothing of .written/, such as transformers, finds

    before step 4                                           the old checkpoint
    from step 4 until the config is renamed (milliseconds)  no config, so it refuses the folder
    after the config is renamed                             the new checkpoint

If only one file changes, step 4 is left out, because one rename leads from the old checkpoint to
the new one. The protocol guards against a kill but not against a power failure, because it does not
wait until the files are on the disk, which takes seconds for a large model. (`replacing` waits, and
a run waits for what it has trained: `sync_files`.)
"""

import errno
import filecmp
import json
import os
import re
import shutil
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from minia3.files.lock import lock_folder, remove_lock, waiting_for_lock
from minia3.files.read import one_line, reading

CONFIGS = ("config.json", "adapter_config.json")  # of a model, and of an adapter
WRITING = ".writing"  # the folder of files that are being written
WRITTEN = ".written"  # the folder of files that are complete, and on their way to their places
STALE_FILE = ".stale"  # in WRITTEN: the paths of the files to remove
LOCK_FILE = ".lock"
# A full disk, a quota, a limit on the size of a file, and a broken disk
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
WEIGHT_FILES = (".safetensors", ".gguf", ".bin", ".pt", ".pth")
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}")  # the names that `replacing` yields


def is_disk_error(error):
    """Return whether an exception means that nothing more can be written."""
    return isinstance(error, OSError) and error.errno in DISK_ERRORS


@contextmanager
def naming_file(path):
    """If the block cannot write because the disk is full or broken, add this path to the OSError.

    Python names a file that cannot be opened, but not one that cannot be written on.
    """
    try:
        yield
    except OSError as error:
        if is_disk_error(error) and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def replacing(path):
    """Yield a temporary path beside `path`, and rename it to `path` at the end.

    If the block fails, `path` stays as it was. If the disk is full, the OSError names `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with naming_file(path):
            yield temporary
            sync_file(temporary)  # or a power failure could leave the name without the content
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sync_file(path):
    """Wait until a file is on the disk."""
    mode = "r+b" if os.name == "nt" else "rb"  # Windows syncs only what may be written
    with open(path, mode) as file:
        os.fsync(file.fileno())


def sync_files(folder):
    """Wait until the files of a folder, and of its sub-folders, are on the disk."""
    for path in Path(folder).rglob("*"):
        if path.is_file() and not path.is_symlink():  # a link may lead to the file of somebody else
            with naming_file(path):
                sync_file(path)


def remove_leftovers(folder):
    """Remove the temporary files that killed processes left in a folder, but not below it.

    The caller holds the lock of the folder, so no process is writing them. Sub-folders may have
    locks of their own.
    """
    for path in Path(folder).glob(".*"):
        if TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


@contextmanager
def writing_folder(folder, replaces=()):
    """Yield a hidden folder inside `folder`; at the end, move the files written there to `folder`.

    folder: the path of a folder, which is created if need be.
    replaces: patterns, such as "model*.safetensors". Files in `folder` that match a pattern are
    removed unless they are written. A pattern may lead to a sub-folder ("more/*.txt").

    If the block fails, `folder` stays as it was; one that was created stays, empty. The docstring
    of the module says what a kill leaves. Raise ValueError if another process is writing there, or
    if a new folder would have the name of a file of weights, and OSError if the disk is full.
    """
    folder = Path(folder)
    if folder.suffix.lower() in WEIGHT_FILES and not folder.exists():
        raise ValueError(
            f"{folder}: found the name of a file, expected that of a folder: minia3 writes "
            "safetensors and their config into a folder, and no other format"
        )
    folder.mkdir(parents=True, exist_ok=True)
    hidden = folder / WRITING
    with lock_folder(folder, LOCK_FILE):
        try:
            move_into_place(folder)  # what a killed process had completed
            shutil.rmtree(hidden, ignore_errors=True)  # what a killed process had begun
            hidden.mkdir()
            with disk_errors(folder), naming_file(folder):
                yield hidden
                stale = stale_paths(folder, replaces, os.listdir(hidden))
                (hidden / STALE_FILE).write_text(json.dumps(stale), encoding="utf-8")
            os.replace(hidden, folder / WRITTEN)
            move_into_place(folder)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)
            remove_lock(folder / LOCK_FILE)


@contextmanager
def writing_new_folder(folder):
    """Do what `writing_folder` does, for a folder that must be new or empty (see `is_free`).

    If the block fails, no empty folder stays. Raise ValueError if the folder is not free. A command
    may have looked before it began to compute, but another one may have written there since.
    """
    try:
        with writing_folder(folder) as hidden:
            check_free(folder)
            yield hidden
    finally:
        with suppress(OSError):  # the folder has files, so it is not empty
            Path(folder).rmdir()


def finish_writing(folder):
    """Move files into place that a killed process had written completely, if there are any.

    Call this before you read a folder. If the process is alive and still moves them, wait for it.
    Raise ValueError if the files cannot be moved.
    """
    folder = Path(folder)
    if not (folder / WRITTEN).exists():
        return
    try:
        with waiting_for_lock(folder, LOCK_FILE):
            move_into_place(folder)
    except OSError as error:
        killed = "a process was killed while it replaced the files of this folder"
        raise ValueError(f"{folder}: {killed}, and they cannot be moved: {error}") from None


def is_free(path):
    """Return whether nothing is lost if a command writes a new folder here.

    There is nothing, or an empty folder (hidden files do not count), such as one in which a command
    was killed. What a killed command had written completely is moved into place first, and stays.
    """
    path = Path(path)
    finish_writing(path)
    if not path.is_dir():
        return not os.path.lexists(path)  # a file, a device, or a link that leads nowhere
    return all(name.startswith(".") for name in os.listdir(path))


def check_free(path):
    """Raise ValueError if a command that writes a new folder here could lose something."""
    if not is_free(path):
        raise ValueError(f"{path} exists and is not empty: give a new folder")


def move_into_place(folder):
    """Replace the files of `folder` with those in .written/, if there are any (steps 4 to 7).

    If a kill interrupts this, a second call does the rest. Raise ValueError if .written/ is a link:
    we never make one, and in a folder from strangers it could lead to files that are not theirs.
    """
    written = folder / WRITTEN
    if written.is_symlink():
        raise ValueError(f"{written}: found a link, expected a folder of new files: remove it")
    if not written.exists():
        return
    # Windows leaves the lock file of whoever wrote a part of these files in their folder.
    names = [name for name in os.listdir(written) if name != LOCK_FILE]
    stale = []
    if STALE_FILE in names:
        names.remove(STALE_FILE)
        stale = read_stale(folder)
    new_configs = [name for name in names if name in CONFIGS]
    new_others = [name for name in names if name not in CONFIGS]
    if count_changes(written, folder, names, stale) > 1:
        for name in new_configs:
            (folder / name).unlink(missing_ok=True)
    for name in stale:
        (folder / name).unlink(missing_ok=True)
    for name in new_others + new_configs:
        set_usual_permissions(written / name)
        os.replace(written / name, folder / name)
    shutil.rmtree(written)


def set_usual_permissions(path):
    """Give a file the permissions of its folder, which has the usual ones.

    safetensors creates files that only their owner may read. A link stays as it is, because it may
    lead to a file elsewhere. On some shared drives nobody may set permissions.
    """
    if not path.is_symlink():
        with suppress(OSError):
            path.chmod(path.parent.stat().st_mode & 0o666)


def read_stale(folder):
    """Return the paths of the files to remove, relative to `folder`.

    Raise ValueError if one is elsewhere, because the folder may come from strangers.
    """
    file = folder / WRITTEN / STALE_FILE
    with reading(file):
        names = json.loads(file.read_text(encoding="utf-8"))
        for name in names:
            if not (folder / name).parent.resolve().is_relative_to(folder.resolve()):
                raise ValueError(f"{name!r:.80} is outside of {folder}")
    return names


def stale_paths(folder, replaces, names):
    """Return the paths below `folder` that match a pattern of `replaces` and are not in `names`."""
    found = set()
    for pattern in replaces:
        found.update(str(path.relative_to(folder)) for path in folder.glob(pattern))
    return sorted(found.difference(names))


def count_changes(written, folder, names, stale):
    """Return how many files of `folder` change. (A file does not if its bytes stay the same.)"""
    same, _, _ = filecmp.cmpfiles(written, folder, names, shallow=False)
    return len(names) - len(same) + len(stale)


@contextmanager
def disk_errors(folder):
    """Raise OSError in place of the errors of safetensors and tokenizers if they cannot write.

    tokenizers raises a bare Exception, so any more specific exception is passed on as it is.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, SafetensorError) or type(error) is Exception:
            raise OSError(f"{folder}: {one_line(error)}") from None
        raise


def write_json(path, value):
    """Write `value` as indented JSON, by replacing the file at `path`."""
    with replacing(path) as temporary:
        write_new_json(temporary, value)


def write_new_json(path, value):
    """Write `value` as indented JSON to a path that nobody reads yet, as in `writing_folder`."""
    text = json.dumps(value, indent=2) + "\n"
    path.write_text(text, encoding="utf-8")
