"""Keep a second process out of a folder that is being written.

The lock belongs to the operating system (flock, or LockFile on Windows), and is not the existence
of a file: if the process that holds it is killed, the system releases it, and nobody has to clean
up.
"""

import errno
import os
import time
from contextlib import contextmanager, suppress

# On Windows nobody can write to a byte that is locked, so the lock is on a byte far beyond the end.
FAR = (1 << 31) - 2
SECONDS_BETWEEN_TRIES = 0.05
HELD = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK)  # the last two: Windows


class FolderLocked(ValueError):
    """Another process holds the lock of a folder."""


def lock_folder(folder, name=".lock"):
    """Lock `folder` until the returned file is closed (it is also a context manager).

    folder: a Path. The lock is on the file `name` in the folder. The file is created if need be,
    and the holder of the lock may remove it.

    Raise FolderLocked, a ValueError, if another process holds the lock, and ValueError if the file
    system has no locks.
    """
    while True:
        file = open(folder / name, "a")  # noqa: SIM115 (closing it releases the lock)
        try:
            lock_file(file.fileno())
        except OSError as error:
            file.close()
            if error.errno in HELD:
                place = folder
                if not name.startswith("."):  # other files of the folder are free
                    place = folder / name
                raise FolderLocked(f"{place}: another run is writing there") from None
            raise ValueError(
                f"{folder}: its file system has no locks, which keep two runs out of one folder: "
                f"{error.strerror}"
            ) from None
        if is_at(folder / name, file):
            return file
        # The previous holder removed the file after we opened it. Nobody else can see our lock, so
        # try again.
        file.close()


def is_at(path, file):
    """Return whether an open file is the one that `path` leads to.

    Its number of links would not tell: at /dev/fd/9, a file without any can be opened again.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(file.fileno()), found)


def is_lock_of(file, folder):
    """Return whether a file from `lock_folder` still is the lock of `folder`.

    It is not if somebody has deleted the folder, and another run has made one of the same name. If
    only the file of the lock was removed, it is, because another run would have made a new one.
    """
    path = folder / ".lock"
    return is_at(path, file) or not path.exists()


@contextmanager
def waiting_for_lock(folder, name):
    """Hold the lock on the file `name` in a folder during the block. Wait while others hold it."""
    lock = None
    while lock is None:
        try:
            lock = lock_folder(folder, name)
        except FolderLocked:
            time.sleep(SECONDS_BETWEEN_TRIES)
    with lock:
        try:
            yield
        finally:
            remove_lock(folder / name)


def lock_file(descriptor):
    """Lock an open file. Raise OSError if another process holds its lock."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        os.lseek(descriptor, FAR, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def remove_lock(path):
    """Remove the file of a lock that this process holds. Windows keeps a file that is open."""
    with suppress(PermissionError):
        path.unlink(missing_ok=True)
