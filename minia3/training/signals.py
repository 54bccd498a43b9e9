"""How a run is stopped: Ctrl-C and SIGTERM."""

import signal
from contextlib import contextmanager


class Stopped(BaseException):
    """A signal asked the run to stop.

    This is a BaseException, like KeyboardInterrupt, so that no `except Exception` swallows it.
    """

    def __init__(self, number):
        super().__init__(number)
        self.number = number


class Signals:
    """Raises Stopped on SIGINT and SIGTERM: at once, or at the end of an `uninterrupted` block."""

    def __init__(self):
        self.is_held = False
        self.pending = None  # the number of the signal that has arrived
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

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
