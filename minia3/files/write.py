"""Write files and folders that a kill or a full disk cannot leave half done.

A file: `replacing` yields a temporary path beside the file and renames it at the end. A rename is
atomic, so a reader finds either the old file or the new one.

A folder: the system cannot rename several files at once, so `writing_folder` follows a protocol.
Loaders take a folder for a checkpoint only if it has a config (config.json or adapter_config.json),
and the protocol relies on this.

    1. lock the folder (.lock)            a second writer gets a ValueError
    2. write everything to .writing/      whatever fails here leaves the folder as it was
    3. remove the old config              only if more than one file of the folder will change
    4. remove stale files                 left by the old checkpoint, not written by the new one
    5. rename the new files               the config comes last
    6. remove .writing/ and .lock         after a failure, too

A kill leaves .writing/ behind, which the next writer removes, and .lock, which the system has
released. What a reader finds in the folder depends on the moment of the kill:

    before step 3                                           the old checkpoint
    from step 3 until the config is renamed (milliseconds)  no config, so loaders refuse the folder
    after the config is renamed                             the new checkpoint

The folder is never a mixture of both. If only one file changes, step 3 is left out, because one
rename leads from the old checkpoint to the new one. The protocol has two limits. First, files that
are written without a config, such as the files of a tokenizer, are renamed one after the other, and
a kill can come in between. Second, the protocol guards against a kill but not against a power
failure, because it does not wait until the files are on the disk. (`replacing` waits.)
"""

import filecmp
import json
import os
import shutil
import uuid
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from minia3.files.lock import lock_folder
from minia3.files.read import one_line

CONFIGS = ("config.json", "adapter_config.json")  # of a model, and of an adapter
HIDDEN_FOLDER = ".writing"
LOCK_FILE = ".lock"


@contextmanager
def replacing(path):
    """Yield a temporary path beside `path`, and rename it to `path` at the end.

    If the block fails, `path` stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # or a power failure could leave the name without the content
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing_folder(folder, replaces=()):
    """Yield a hidden folder inside `folder`; at the end, move the files written there to `folder`.

    folder: the path of a folder, which is created if need be.
    replaces: patterns, such as "model*.safetensors". Files in `folder` that match a pattern are
    removed unless they are written.

    If the block fails, `folder` stays as it was. The docstring of the module says what a kill
    leaves. Raise ValueError if another process is writing there, and OSError if the disk is full.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    hidden = folder / HIDDEN_FOLDER
    with lock_folder(folder, LOCK_FILE):
        try:
            shutil.rmtree(hidden, ignore_errors=True)  # a killed process may have left it
            hidden.mkdir()
            with disk_errors(folder):
                yield hidden
            move_into_place(hidden, folder, replaces)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)
            (folder / LOCK_FILE).unlink(missing_ok=True)


def move_into_place(hidden, folder, replaces):
    """Replace the files in `folder` with the files in `hidden` (steps 3 to 5 of the protocol)."""
    names = os.listdir(hidden)
    new_configs = [name for name in names if name in CONFIGS]
    new_others = [name for name in names if name not in CONFIGS]
    stale = stale_names(folder, replaces, names)
    if count_changes(hidden, folder, names, stale) > 1:
        for name in new_configs:
            (folder / name).unlink(missing_ok=True)
    for name in stale:
        (folder / name).unlink(missing_ok=True)
    for name in new_others + new_configs:
        # safetensors creates files that only their owner may read. The folder has the usual
        # permissions, so the files get them from it.
        (hidden / name).chmod(hidden.stat().st_mode & 0o666)
        os.replace(hidden / name, folder / name)


def stale_names(folder, replaces, names):
    """Return the names in `folder` that match a pattern of `replaces` and are not in `names`."""
    found = set()
    for pattern in replaces:
        found.update(path.name for path in folder.glob(pattern))
    return sorted(found.difference(names))


def count_changes(hidden, folder, names, stale):
    """Return how many files of `folder` change. (A file does not if its bytes stay the same.)"""
    same, _, _ = filecmp.cmpfiles(hidden, folder, names, shallow=False)
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
    text = json.dumps(value, indent=2) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
