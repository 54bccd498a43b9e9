"""Keep a second process out of a folder that is being written.

The lock belongs to the operating system (flock), and is not the existence of a file: if the process
that holds it is killed, the system releases it, and nobody has to clean up.
"""

import os
from contextlib import nullcontext


def lock_folder(folder, name=".lock"):
    """Lock `folder` until the returned file is closed (it is also a context manager).

    folder: a Path. The lock is on the file `name` in the folder. The file is created if need be,
    and the holder of the lock may remove it.

    Raise ValueError if another process holds the lock. On Windows nothing is locked.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return nullcontext()
    while True:
        file = open(folder / name, "a")  # noqa: SIM115 (closing it releases the lock)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ValueError(f"{folder}: another run is writing there") from None
        if os.fstat(file.fileno()).st_nlink > 0:
            return file
        # The previous holder removed the file after we opened it. Nobody else can see our lock, so
        # try again.
        file.close()
