"""To be written."""

import signal


class Failed(Exception):
    """A run that cannot go on, and what to try."""


class Stopped(BaseException):
    """A signal asked to stop: its number."""


class Signals:
    """Ctrl-C and SIGTERM raise Stopped: at once, but within a step (`in_step`) at its end: none is half done."""

    def __init__(self):
        self.in_step, self.number = False, None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self)

    def __call__(self, number, frame):
        self.number = number
        self.check()

    def check(self):
        if self.number is not None and not self.in_step:
            raise Stopped(self.number)
