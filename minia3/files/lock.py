"""To be written."""

import os
from contextlib import nullcontext


def lock_folder(folder, name=".lock"):
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
    return (
        file if os.fstat(file.fileno()).st_nlink else lock_folder(folder, name)
    )  # removed meanwhile: not the lock
