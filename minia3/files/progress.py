"""Progress bars with an estimate of the time that is left, for work that takes more than a moment.

    with showing("loading"):
        model = load_model("t5-base")

The caller of the library decides whether there is a bar. The loop that knows how far the work is
calls `progress`. Bars go to standard error, only if it is a terminal, and disappear at the end.
"""

import shutil
import sys
from contextlib import contextmanager
from contextvars import ContextVar

from tqdm import tqdm

from minia3.files.processes import is_first
from minia3.files.streams import is_terminal

WIDTH = 80  # columns that a bar takes at most
INTERVAL = 0.1  # seconds between two pictures of a bar
DELAY = 1.0  # seconds: work that ends before that needs no bar

# What the bar of the current work is called; None: no bar. Each thread has its own.
_title = ContextVar("title", default=None)


@contextmanager
def showing(title):
    """Let the work in the block show its progress after `title`."""
    token = _title.set(title)
    try:
        yield
    finally:
        _title.reset(token)


def progress(items, total=None, size=None):
    """Yield the items, and show how many of `total` are done if `showing` says so.

    size: a function from an item to how much of the total it is; None: one.
    """
    title = _title.get()
    if title is None:
        yield from items
        return
    with progress_bar(desc=title, total=total, leave=False, delay=DELAY) as bar:
        for item in items:
            yield item
            n_done = 1 if size is None else size(item)
            bar.update(n_done)


def progress_bar(**options):
    """Return a bar of tqdm that fits into 80 columns, and that is hidden outside of a terminal."""
    columns = min(WIDTH, shutil.get_terminal_size().columns)
    is_hidden = not is_terminal(sys.stderr) or not is_first()
    return tqdm(ncols=columns, mininterval=INTERVAL, disable=is_hidden, **options)
