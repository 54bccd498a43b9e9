"""Standard output, as a command of a pipeline uses it."""

import sys

from minia3.files.processes import is_first
from minia3.files.streams import drop

SIGPIPE_EXIT_CODE = 141  # 128 + SIGPIPE, as a shell reports other programs


def show(text="", end="\n"):
    """Print at once. If the reader is gone (`| head`), end without a message, as SIGPIPE would.

    Any other error is raised: for example, the disk behind a file may be full. Of several
    processes, only the first one prints.
    """
    if not is_first():
        return
    try:
        print(text, end=end, flush=True)
    except OSError as error:
        drop(sys.stdout)  # with the text that is still in its buffer
        if isinstance(error, BrokenPipeError):
            raise SystemExit(SIGPIPE_EXIT_CODE) from None
        raise


def format_size(n_bytes):
    """Return a number of bytes as a text in GB or MB."""
    if n_bytes >= 1e9:
        return f"{n_bytes / 1e9:,.2f} GB"
    return f"{n_bytes / 1e6:,.2f} MB"
