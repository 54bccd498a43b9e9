"""Standard output and standard error: always UTF-8, and a run survives their loss.

A training run may be piped into `head`, or lose its terminal (`nohup`). What it prints is then
lost, and the training goes on: metrics.jsonl has the same figures.
"""

import os
import sys
from contextlib import contextmanager, redirect_stdout, suppress

from minia3.files.processes import is_first


def use_utf8():
    """Let standard output and standard error write UTF-8.

    In the locale C, and on Windows if the output is a file, Python would write ASCII or a code
    page, and an accented letter would be an error.
    """
    for stream in (sys.stdout, sys.stderr):
        is_text = hasattr(stream, "reconfigure") and stream.encoding is not None
        if is_text and stream.encoding.lower().replace("-", "") != "utf8":
            stream.reconfigure(encoding="utf-8")
        if is_text and stream.errors == "strict":
            # What Python could not decode (as in a file's name) is written back as it came.
            stream.reconfigure(errors="surrogateescape")


@contextmanager
def lasting_output():
    """Within the block, drop what cannot be printed because the reader is gone or the disk is full.

    sys.stdout and sys.stderr are as before after the block.
    """
    before = (sys.stdout, sys.stderr)
    sys.stdout = LastingStream(sys.stdout)
    sys.stderr = LastingStream(sys.stderr)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def is_terminal(stream):
    """Return whether a stream is a terminal. Python has None for one that is closed (`2>&-`)."""
    return stream is not None and stream.isatty()


def print_error(text):
    """Print on standard error, or nowhere if it is closed.

    Without a stream, `print` would take standard output, which another program may read.
    """
    if sys.stderr is not None:
        print(text, file=sys.stderr)


def print_last(message):
    """Print on standard error why this process ends.

    In a terminal, the first of several processes may have left a bar in the line.
    """
    if not is_first() and is_terminal(sys.stderr):
        message = f"\n{message}"
    print_error(message)


@contextmanager
def only_first_prints():
    """Within the block, drop what is printed by any but the first of several processes."""
    if is_first():
        yield
    else:
        with redirect_stdout(LastingStream(None)):
            yield


@contextmanager
def some_output():
    """Within the block, sys.stdout is a silent stream if there is none, as in pythonw."""
    if sys.stdout is not None:
        yield
    else:
        with redirect_stdout(LastingStream(None)):
            yield


class LastingStream:
    """A stream that writes to another one, and goes on in silence once that one fails.

    stream: None, as Python has it if the program was started without standard output, is silent.
    """

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        if self.stream is not None:
            try:
                self.stream.write(text)
            except OSError:
                drop(self.stream)
        return len(text)

    def flush(self):
        if self.stream is not None:
            try:
                self.stream.flush()
            except OSError:
                drop(self.stream)

    def isatty(self):
        return is_terminal(self.stream)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def drop(stream):
    """Lead a stream and its buffer nowhere, because Python would fail again when it exits."""
    with suppress(OSError, ValueError):  # a stream of a notebook has no file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
