"""A program prepares for Ctrl-C within imports and for UTF-8 before it imports anything slow."""

import argparse
import atexit
import contextlib
import ctypes
import gc
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import running
from running import ROOT

from minia3 import __main__ as entry
from minia3.files.processes import VARIABLES
from minia3.files.program import (
    KEPT,
    M_MMAP_THRESHOLD,
    M_TRIM_THRESHOLD,
    begin,
    forget_interrupt,
    freeze_objects,
    ignoring_interrupts,
    is_fragile,
    keep_freed_memory,
    require_utf8,
    was_interrupted,
)


@pytest.fixture(autouse=True)
def _handler(monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    before = signal.getsignal(signal.SIGINT)
    thresholds = gc.get_threshold()
    yield
    gc.set_threshold(*thresholds)
    signal.signal(signal.SIGINT, before)
    sys.excepthook = sys.__excepthook__
    forget_interrupt()
    atexit.unregister(freeze_objects)


def test_an_import_in_progress_is_seen(tmp_path, monkeypatch):
    code = "import sys\nfrom minia3.files.program import is_fragile\n"
    code += "seen = is_fragile(sys._getframe())\n"
    (tmp_path / "module_of_a_test.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    import module_of_a_test

    assert module_of_a_test.seen
    assert not is_fragile(sys._getframe())


def test_an_import_is_seen_before_anything_has_imported_importlib():
    caller = SimpleNamespace(f_globals={"__name__": "_frozen_importlib"}, f_back=None)
    assert is_fragile(SimpleNamespace(f_globals={"__name__": "module"}, f_back=caller))


def test_the_reading_of_a_command_line_is_seen():
    """argparse ends in an error of its own if an exception comes while it puts its usage together.

    Nothing else is at work then, so Ctrl-C may end the process at once.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("word", type=lambda word: is_fragile(sys._getframe()))
    assert parser.parse_args(["x"]).word


def test_ctrl_c_outside_of_an_import_is_as_usual():
    begin("program")
    assert not was_interrupted()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert was_interrupted()
    forget_interrupt()
    assert not was_interrupted()


def test_ctrl_c_is_ignored_while_a_program_says_that_it_was_stopped():
    begin("program")
    with contextlib.suppress(ZeroDivisionError), ignoring_interrupts():
        os.kill(os.getpid(), signal.SIGINT)
        raise ZeroDivisionError
    assert not was_interrupted()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("rank", "n_lines"), [(0, 1), (1, 0)])
def test_ctrl_c_within_an_import_ends_the_process_with_one_line(rank, n_lines, monkeypatch):
    for name in VARIABLES:  # Ctrl-C reaches all processes that torchrun has started
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("RANK", str(rank))
    begin("program")
    written = []

    def end(code):
        raise SystemExit(code)

    monkeypatch.setattr("minia3.files.program.is_fragile", lambda frame: True)
    monkeypatch.setattr(os, "write", lambda file, text: written.append((file, text)))
    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(SystemExit) as stop:
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.value.code == 130
    assert written == [(2, b"program: stopped\n")] * n_lines


@pytest.mark.parametrize(
    ("error", "last_lines"), [("KeyboardInterrupt", []), ("ValueError", ["ValueError"])]
)
def test_only_ctrl_c_ends_a_program_in_silence(error, last_lines):
    """A second Ctrl-C comes when the run has said that it stops, and just before it ends."""
    code = f"from minia3.files.program import begin\nbegin('program')\nraise {error}\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1:] == last_lines


def test_ctrl_c_in_a_destructor_comes_again_and_prints_nothing():
    """Python would print it, and go on. A second Ctrl-C often comes while a run lets go of its
    progress bars, whose class has a `__del__`.
    """
    code = """
import signal, time
from minia3.files.program import begin

class Bar:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

begin("program")
Bar()
print("goes on", flush=True)
time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode in (130, -signal.SIGINT)
    assert (done.stdout, done.stderr) == ("goes on\n", "")


def test_another_error_in_a_destructor_is_shown():
    code = """
from minia3.files.program import begin

class Bar:
    def __del__(self):
        raise ValueError("wrong")

begin("program")
Bar()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "ValueError: wrong" in done.stderr


EVALUATION = running.words(None, "--eval-only")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "words"),
    [("run_path('train.py'", EVALUATION), ("run_module('minia3'", ["info", "--list"])],
)
def test_ctrl_c_while_python_ends_prints_nothing(program, words):
    """What torch cleans up would end in a traceback."""
    code = "import atexit, os, runpy, signal, sys\n"
    code += "atexit.register(os.kill, os.getpid(), signal.SIGINT)\n"
    code += f"sys.argv[1:] = {words}\n"
    code += f"runpy.{program}, run_name='__main__')\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (130, "")


def test_python_passes_over_all_objects_when_the_program_ends():
    """What was registered first is called last, and finds the objects frozen."""
    code = """
import atexit, gc
from minia3.files.program import begin
atexit.register(lambda: print(len(gc.get_objects()), gc.get_freeze_count() > 1000))
begin("program")
print(gc.get_freeze_count())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    n_before, n_objects, is_frozen = done.stdout.split()
    assert n_before == "0"
    assert int(n_objects) < 100
    assert is_frozen == "True"


def test_python_does_not_look_at_all_objects_while_a_program_imports_torch():
    code = """
import gc
from minia3.files.program import begin
begin("program")
n_before = gc.get_stats()[2]["collections"]  # of all objects
import torch
print(gc.get_stats()[2]["collections"] - n_before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"


def test_a_program_that_has_imported_triton_ends_without_a_word():
    """From triton 3.9 on, it lists on stderr which of its objects are still frozen."""
    pytest.importorskip("triton")
    code = "from minia3.files.program import begin\nbegin('program')\nimport triton\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("encoding", "utf8_mode", "is_started_again"),
    [("utf-8", 0, False), ("UTF8", 0, False), ("ascii", 0, True), ("iso8859-1", 0, True)],
)
def test_python_starts_again_unless_names_of_files_are_utf8(
    encoding, utf8_mode, is_started_again, monkeypatch
):
    calls = []
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: encoding)
    monkeypatch.setattr(sys, "flags", SimpleNamespace(utf8_mode=utf8_mode))
    monkeypatch.setattr(sys, "orig_argv", ["python", "train.py", "--steps", "2"])
    monkeypatch.setattr(os, "execv", lambda *args: calls.append(args))
    require_utf8()
    expected = (sys.executable, [sys.executable, "-X", "utf8", "train.py", "--steps", "2"])
    assert calls == [expected] * is_started_again


class Malloc:
    """Stands in for the C library, and records what is set. is_old: it refuses large thresholds."""

    def __init__(self, is_old=False):
        self.is_old = is_old
        self.settings = []

    def mallopt(self, parameter, value):
        self.settings.append((parameter, value))
        return 0 if self.is_old else 1


@pytest.fixture
def system(monkeypatch):
    """Make this process one of Linux without settings of malloc."""
    monkeypatch.setattr(sys, "platform", "linux")
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    return monkeypatch


def settings_of(library, system):
    system.setattr(ctypes, "CDLL", lambda name: library)
    keep_freed_memory()
    return library.settings


def test_malloc_keeps_freed_memory_of_both_kinds(system):
    expected = [(M_MMAP_THRESHOLD, KEPT), (M_TRIM_THRESHOLD, KEPT)]
    assert settings_of(Malloc(), system) == expected


def test_an_old_malloc_that_refuses_stays_as_it_is(system):
    assert settings_of(Malloc(is_old=True), system) == [(M_MMAP_THRESHOLD, KEPT)]


def test_a_users_settings_of_malloc_stay(system):
    system.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    assert settings_of(Malloc(), system) == []


def test_a_library_or_a_system_without_mallopt_is_left_alone(system):
    system.setattr(ctypes, "CDLL", lambda name: object())
    keep_freed_memory()
    system.setattr(sys, "platform", "darwin")
    assert settings_of(Malloc(), system) == []


@pytest.mark.parametrize(("word", "n_settings"), [("predict", 2), ("merge", 0)])
def test_only_predict_keeps_freed_memory(word, n_settings, system):
    """Its batches are alike. Other commands would only take more memory."""
    library = Malloc()
    system.setattr(ctypes, "CDLL", lambda name: library)
    system.setattr(sys, "argv", ["minia3", word, "--help"])
    with pytest.raises(SystemExit):
        entry.main()
    assert len(library.settings) == n_settings
