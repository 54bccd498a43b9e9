"""Watch the anonymous memory of this process, as Linux counts it: without pages of mapped files."""

import threading
import time
from contextlib import contextmanager


def anonymous():
    """Return the bytes of anonymous memory."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


@contextmanager
def sampling():
    """Yield a list to which a thread adds what `anonymous` returns, until the block ends."""
    samples = []
    done = threading.Event()

    def sample():
        while not done.is_set():
            samples.append(anonymous())
            time.sleep(0.001)

    thread = threading.Thread(target=sample)
    thread.start()
    yield samples
    done.set()
    thread.join()
    samples.append(anonymous())
