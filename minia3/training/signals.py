"""How a run is stopped: Ctrl-C, SIGTERM, a closed terminal, and on Windows Ctrl-Break.

Where a run is                        the first Ctrl-C        the second Ctrl-C, or SIGTERM
----------------------------------    --------------------    -----------------------------
`uninterrupted`                       waits for the end       waits for the end
`urgent`, within `uninterrupted`      waits for the end       stops at once
outside of these blocks               stops at once           stops at once

If its terminal is closed, a run gets SIGHUP, which counts as SIGTERM. After another signal it is
ignored, and also in a run that was started with `nohup`. A second SIGTERM is ignored while the run
saves its state because of the first one.
"""

import os
import signal
import socket
import sys
import threading
from contextlib import contextmanager

from tqdm import tqdm

from minia3.files.messages import message_of
from minia3.files.processes import is_ending, is_first, n_processes
from minia3.files.program import SOON, call_later, send_to_main_thread

HANGUP = getattr(signal, "SIGHUP", None)  # the terminal was closed; Windows has no such signal

STOPPING = [signal.SIGINT, signal.SIGTERM]
if HANGUP is not None:
    STOPPING.append(HANGUP)
if hasattr(signal, "SIGBREAK"):  # Windows: Ctrl-Break, which another process can send, too
    STOPPING.append(signal.SIGBREAK)

WAITING = "finishing this step; press Ctrl-C again to stop now"

SHORT = 0.3  # seconds: a step that ends before that needs no announcement

# A single operation of torch may take minutes (the backward pass is one), and Python handles a
# signal only after it. So a second thread waits this many seconds, and then ends the process.
PATIENCE = 2.0


class Stopped(BaseException):
    """A signal asked the run to stop.

    This is a BaseException, like KeyboardInterrupt, so that no `except Exception` swallows it.
    """

    def __init__(self, number):
        super().__init__(number)
        self.number = number


def outlives_terminal():
    """Return whether this process was started with `nohup`, and is still there after SIGHUP.

    Under torchrun it is not: torchrun passes SIGHUP on to its processes, and kills them half a
    minute later.
    """
    return signal.getsignal(HANGUP) is signal.SIG_IGN and "TORCHELASTIC_RUN_ID" not in os.environ


class Signals:
    """Raises Stopped when a signal asks for it, as the table above says.

    Use it as a context manager: at its end, the signals do again what they did before. But in a
    program that is one of several processes, they do nothing from there on.
    """

    def __init__(self, is_program=False):
        """is_program: whether this process may be ended, because it does nothing but this run."""
        self.is_program = is_program
        self.handlers_before = {}
        self.is_held = False
        self.is_urgent = False
        self.pending = None  # the number of the signal that has arrived
        self.is_raised = False  # Stopped is on its way: see `arriving`
        self.is_dropped = False  # Python has lost a Stopped: see `stop_again`
        self.hook_before = None  # for exceptions that Python drops: see `stop_again`
        self.n_blocks = 0  # `uninterrupted` blocks so far
        self.n_arrived = 0  # signals in the current block

        # What the second thread uses:
        self.lock = threading.Lock()
        self.n_seen = 0  # signals in the current block, as that thread counts them
        self.leave = None  # in an `urgent` block: what it calls before it ends the process
        self.is_leaving = False
        self.is_stopping = False  # one of several processes, and it stops: signals are ignored
        self.wakeup = None  # a socket: Python writes the number of each signal to it, at once
        self.wakeup_before = -1

    def __enter__(self):
        # Python lets only the main thread decide about signals. In another thread none arrives.
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if number == HANGUP and outlives_terminal():
                    continue
                self.handlers_before[number] = signal.signal(number, self.receive)
            self.hook_before = sys.unraisablehook
            sys.unraisablehook = self.stop_again
            self.start_watching()
        return self

    def __exit__(self, *_):
        if self.wakeup is not None:
            signal.set_wakeup_fd(self.wakeup_before)
            self.wakeup.close()  # which ends the second thread
            sys.unraisablehook = self.hook_before
        if self.is_program and n_processes() > 1:
            # torchrun tells this process to end as soon as another one has ended, but first it must
            # say why the run ends. After that, `leave` (processes.py) ignores signals itself.
            self.is_leaving = True
            return
        for number, handler in self.handlers_before.items():
            # None: a handler that was not installed from Python, and cannot be put back from it
            signal.signal(number, handler or signal.SIG_DFL)
        if self.is_program and self.pending is not None and HANGUP in self.handlers_before:
            signal.signal(HANGUP, signal.SIG_IGN)  # another one comes: see `receive`

    # The main thread

    def receive(self, number, frame):
        """Handle a signal. Python calls this between two operations of the main thread."""
        if self.is_leaving or self.is_stopping:
            return
        if self.is_repeated(number):
            return
        self.pending = number
        self.n_arrived += 1
        can_wait = number == signal.SIGINT and self.n_arrived == 1
        if not self.is_held or (self.is_urgent and not can_wait):
            self.stop()

    def is_repeated(self, number):
        """Return whether the system has sent this signal after another one, as it often does.

        The shell and the system both send SIGHUP when a terminal is closed, and a logout sends it
        after SIGTERM. SLURM sends SIGTERM to a job whose time is up or that is queued again, also
        if it has done so before. None of these must disturb the run that is saving because of the
        first signal.
        """
        if self.pending is None or self.is_dropped:
            return False
        is_second_sigterm = number == self.pending == signal.SIGTERM
        return number == HANGUP or (is_second_sigterm and not self.is_held)

    def stop(self):
        # torchrun tells all processes to stop as soon as one has ended: by then, they know it.
        self.is_stopping = n_processes() > 1
        self.is_raised = True
        self.is_dropped = False
        raise Stopped(self.pending)

    def stop_again(self, dropped):
        """If Python has dropped a Stopped, send its signal again.

        Pass any other exception to the previous hook. Python calls this with an exception that it
        cannot raise, such as that of a `__del__`.
        """
        if isinstance(dropped.exc_value, Stopped):
            self.is_stopping = False
            self.is_raised = False
            self.is_dropped = True
            call_later(SOON, self.send_again, self.pending)
        else:
            self.hook_before(dropped)

    def send_again(self, number):
        """Send a signal whose Stopped was dropped, unless the run has been stopped meanwhile."""
        if self.is_dropped:
            send_to_main_thread(number)

    @contextmanager
    def arriving(self):
        """Return a context. If torch replaces Stopped by an error within it, raise Stopped.

        A signal may come while Python code runs within torch's C++, which then raises an error of
        its own ("could not determine the shape of object").
        """
        try:
            yield
        except Stopped:
            self.is_raised = False  # later errors are not its fault
            raise
        except Exception:
            if not self.is_raised:
                raise
            self.is_raised = False
            raise Stopped(self.pending) from None

    @contextmanager
    def uninterrupted(self):
        """Return a context in which a signal waits for the end of the block."""
        self.n_blocks += 1
        self.n_arrived = 0
        self.n_seen = 0
        self.is_held = True
        try:
            yield
        finally:
            self.is_held = False
        if self.pending is not None:
            self.stop()

    @contextmanager
    def ignored_after(self, error):
        """Return a context. If it raises an error of this class, signals are ignored from there on.

        torchrun tells all processes to stop as soon as one has ended. A process that has found this
        out by itself is saving its state by then, and must not be disturbed.
        """
        try:
            yield
        except error:
            self.is_stopping = True
            raise

    @contextmanager
    def last_words(self, say):
        """Return a context. If Stopped ends it, call `say` with the number of the signal.

        From there on, signals are ignored. A second Ctrl-C may come at once, because a program that
        started this one may pass on what the terminal has sent to both.
        """
        try:
            yield
        except Stopped as stop:
            self.is_leaving = True
            say(stop.number)
            raise

    @contextmanager
    def urgent(self, leave):
        """Return a context, within `uninterrupted`, in which a second signal stops at once.

        leave: a function of the signal's number that saves what is needed and says how to continue.
        If the block does not react, another thread calls it, and then the process ends.
        """
        self.leave = leave
        self.is_urgent = True
        try:
            yield
        finally:
            self.is_urgent = False
            with self.lock:  # if the other thread is in `leave`, this waits for the end
                self.leave = None

    # The second thread

    def start_watching(self):
        """Start a thread that learns of each signal at once, even if the main thread computes."""
        reader, self.wakeup = socket.socketpair()
        self.wakeup.setblocking(False)  # as `set_wakeup_fd` demands
        self.wakeup_before = signal.set_wakeup_fd(self.wakeup.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self.watch, args=(reader,), daemon=True).start()

    def watch(self, reader):
        """Read the numbers of signals until the other end of the socket is closed."""
        with reader:
            while received := reader.recv(1):
                number = received[0]
                if number not in STOPPING or not self.is_held:
                    continue
                if number == HANGUP and self.n_seen > 0:
                    continue  # `receive` ignores it, too
                self.n_seen += 1
                if number == signal.SIGINT and self.n_seen == 1:
                    call_later(SHORT, self.announce, self.n_blocks)
                elif self.is_program:
                    call_later(PATIENCE, self.end_process, number)

    def announce(self, block):
        """Say that the signal has arrived, unless the step has ended already."""
        is_same_step = self.is_held and self.n_blocks == block
        if is_same_step and is_first() and not is_ending():
            tqdm.write(WAITING, file=sys.stderr)

    def end_process(self, number):
        """End the process, unless the main thread has left the `urgent` block."""
        with self.lock:
            if self.leave is None:
                return
            self.is_leaving = True
            try:
                self.leave(number)
            except Exception as error:  # the disk is full: the main thread goes on
                self.pending = number  # `receive` may have ignored it meanwhile
                self.is_leaving = False
                tqdm.write(f"the run cannot stop yet: {message_of(error)}", file=sys.stderr)
            else:
                os._exit(128 + number)
