"""What a program does first, before it imports anything that takes seconds, and last.

    begin("train.py")

Importing torch takes seconds, and Ctrl-C within them would print a traceback of a hundred lines.
After torch was imported, Python also takes tenths of a second to end, and Ctrl-C would print a
traceback then, too. `end()` prevents this. It is called when a program has done everything.
"""

import atexit
import ctypes
import gc
import os
import signal
import sys
import threading
from contextlib import contextmanager

from minia3.files.processes import is_alone_or_first

# Parameters of glibc's mallopt, from its malloc.h.
M_TRIM_THRESHOLD = -1  # how much free memory at the end of the heap goes back to the system
M_MMAP_THRESHOLD = -3  # from which size on a block has pages of its own, which go back when freed
KEPT = 1 << 30  # bytes

# Python looks for garbage whenever there are this many new objects, instead of a few hundred or
# thousand. Torch alone has hundreds of thousands, and to look at them again and again, while more
# are imported, takes a tenth of a second.
N_NEW_OBJECTS = 20_000

SOON = 0.05  # seconds: after that, a signal is sent again whose exception Python has dropped

# If an exception of ours comes while these are at work, they may raise another one in its place.
# The system of imports has its first name until a program imports importlib.
FRAGILE = ("_frozen_importlib", "importlib._bootstrap", "argparse")  # names of modules


class CtrlC:
    """What is known of Ctrl-C."""

    has_come = False  # it has raised KeyboardInterrupt: see `was_interrupted`
    is_ignored = False  # see `ignoring_interrupts`


def begin(program):
    """Prepare this process to be a program. `program` begins its messages.

    From here on, Ctrl-C while a module is imported or a command line is read ends the process with
    one line, and a KeyboardInterrupt that nobody catches ends it in silence. One that Python drops,
    because it comes in a `__del__`, comes again. Files and names of files are UTF-8 whatever the
    locale is.
    """
    forget_interrupt()
    require_utf8()
    gc.set_threshold(N_NEW_OBJECTS)
    atexit.register(freeze_objects)

    def interrupt(number, frame):
        if CtrlC.is_ignored:
            return
        if is_fragile(frame):
            if is_alone_or_first():  # Ctrl-C reaches all processes of torchrun
                os.write(2, f"{program}: stopped\n".encode())
            os._exit(128 + number)
        CtrlC.has_come = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)

    hook_before = sys.excepthook

    def show(kind, error, traceback):
        # It may come a second time, after the run has said that it stops.
        if not issubclass(kind, KeyboardInterrupt):
            hook_before(kind, error, traceback)

    sys.excepthook = show

    hook_for_dropped_before = sys.unraisablehook

    def interrupt_again(dropped):
        if isinstance(dropped.exc_value, KeyboardInterrupt):
            call_later(SOON, send_to_main_thread, signal.SIGINT)
        else:
            hook_for_dropped_before(dropped)

    sys.unraisablehook = interrupt_again


def call_later(seconds, function, argument):
    timer = threading.Timer(seconds, function, [argument])
    timer.daemon = True
    timer.start()


def send_to_main_thread(number):
    """Send a signal so that it also interrupts a blocking call there, such as a download."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident, number)
    else:  # On Windows, a signal cannot interrupt a blocking call.
        signal.raise_signal(number)


def end():
    """Let Ctrl-C end this process at once from here on, because it has nothing left to do."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as `leave` (processes.py) sets it
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))


def was_interrupted():
    """Return whether an exception is the fault of Ctrl-C, whatever its class is.

    If Ctrl-C comes while Python code runs within torch's C++, torch raises an error of its own in
    place of KeyboardInterrupt ("could not determine the shape of object").
    """
    return CtrlC.has_come


def forget_interrupt():
    """Forget a Ctrl-C that has ended only an answer, so that later errors are reported as such."""
    CtrlC.has_come = False


@contextmanager
def ignoring_interrupts():
    """Ignore Ctrl-C in the block, which says that the program was stopped by one.

    A second one may come at once, because a program that started this one may pass on what the
    terminal has sent to both. It would end this one before it has said so.
    """
    CtrlC.is_ignored = True
    try:
        yield
    finally:
        CtrlC.is_ignored = False


def freeze_objects():
    """Let Python pass over all objects when it ends, unless triton was imported.

    Python looks for garbage several times. After torch was imported, there are so many objects that
    this takes tenths of a second. But triton 3.9 prints pages about objects that were not freed,
    and parts of torch import it, such as those for AdamW and for deterministic kernels.
    """
    if "triton" not in sys.modules:
        gc.freeze()


def require_utf8():
    """Start Python again in its UTF-8 mode, if this process encodes names of files otherwise.

    This happens in the locale C if PYTHONUTF8=0, and in old locales such as de_DE.ISO-8859-1. The
    encoding cannot be changed later. On Windows and macOS it is UTF-8 anyway.
    """
    is_utf8 = sys.getfilesystemencoding().lower().replace("-", "") == "utf8"
    if not is_utf8 and not sys.flags.utf8_mode:
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def keep_freed_memory():
    """Let glibc's malloc keep the memory of a batch for the next one (Linux).

    Otherwise it goes back to the system, which clears the pages before it gives them out again.
    Settings of the user (MALLOC_...) stay. Other systems have no mallopt, or another one. A glibc
    before 2.35 refuses a size of more than 32 MB, and then nothing changes.
    """
    has_settings = any(name.startswith("MALLOC_") for name in os.environ)
    if has_settings or not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and mallopt(M_MMAP_THRESHOLD, KEPT):
        mallopt(M_TRIM_THRESHOLD, KEPT)


def is_fragile(frame):
    """Return whether a module of FRAGILE is at work in a frame, or in one that has called it."""
    while frame is not None:
        if frame.f_globals.get("__name__") in FRAGILE:
            return True
        frame = frame.f_back
    return False
