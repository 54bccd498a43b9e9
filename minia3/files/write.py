"""To be written."""

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

CONFIGS = ("config.json", "adapter_config.json")  # what makes a folder a checkpoint, or an adapter


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
    with lock_folder(folder):
        hidden = folder / ".writing"
        try:
            shutil.rmtree(hidden, ignore_errors=True)  # of a process that was killed
            hidden.mkdir()
            with disk_errors(folder):
                yield hidden
            names = sorted(os.listdir(hidden), key=CONFIGS.__contains__)
            stale = {path.name for pattern in replaces for path in folder.glob(pattern)} - {*names}
            same, *_ = filecmp.cmpfiles(hidden, folder, names, shallow=False)
            several = len(names) - len(same) + len(stale) > 1
            for name in [*(name for name in names if several and name in CONFIGS), *stale]:
                (folder / name).unlink(missing_ok=True)
            for name in names:
                (hidden / name).chmod(
                    hidden.stat().st_mode & 0o666
                )  # safetensors makes files for their owner alone
                os.replace(hidden / name, folder / name)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)
            (folder / ".lock").unlink(missing_ok=True)


@contextmanager
def disk_errors(folder):
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
