"""How a run is stopped: Ctrl-C and SIGTERM."""

import signal
import threading
from contextlib import contextmanager


class Stopped(BaseException):
    """A signal asked the run to stop.

    This is a BaseException, like KeyboardInterrupt, so that no `except Exception` swallows it.
    """

    def __init__(self, number):
        super().__init__(number)
        self.number = number


class Signals:
    """Raises Stopped on SIGINT and SIGTERM: at once, or at the end of an `uninterrupted` block.

    Use it as a context manager: at its end, the signals do again what they did before.
    """

    def __init__(self):
        self.is_held = False
        self.pending = None  # the number of the signal that has arrived
        self.handlers_before = {}

    def __enter__(self):
        # Python lets only the main thread decide about signals. In another thread none arrives.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers_before[number] = signal.signal(number, self.receive)
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers_before.items():
            # None: a handler that was not installed from Python, and cannot be put back from it
            signal.signal(number, handler or signal.SIG_DFL)

    def receive(self, number, frame):
        self.pending = number
        self.check()

    def check(self):
        if self.pending is not None and not self.is_held:
            raise Stopped(self.pending)

    @contextmanager
    def uninterrupted(self):
        self.is_held = True
        try:
            yield
        finally:
            self.is_held = False
        self.check()
