"""Signals stop a run at once, but not within a block that must be finished. In the part of a step
that only computes, a second Ctrl-C or SIGTERM stops it, however long an operation takes."""

import contextlib
import functools
import hashlib
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from running import (
    ROOT,
    finish,
    kill_self,
    load_checkpoint,
    outcome,
    quoted,
    resume,
    run,
    start,
    words,
)

import train
from minia3.files.processes import GONE, PeerGone
from minia3.training import signals as training_signals
from minia3.training.checkpoint import save_checkpoint
from minia3.training.log import TrainingLog
from minia3.training.optimizer import RowOptimizer
from minia3.training.run import Run
from minia3.training.signals import STOPPING, WAITING, Signals, Stopped


@pytest.fixture
def _terminal():
    """The tests may have been started with `nohup`, but a run in them has a terminal to lose."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def signals(_terminal):
    with Signals() as signals:
        yield signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_at_once(number, signals):
    with pytest.raises(Stopped) as stop:
        kill_self(number)
    assert stop.value.number == number


def test_a_signal_waits_for_the_end_of_a_block(signals):
    seen = []

    def block():
        with signals.uninterrupted():
            kill_self(signal.SIGTERM)
            seen.append("rest of the block")

    with pytest.raises(Stopped):
        block()
    assert seen == ["rest of the block"]


def test_an_error_in_a_block_is_not_hidden_by_a_signal(signals):
    def block():
        with signals.uninterrupted():
            kill_self(signal.SIGTERM)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        block()


def test_a_block_without_a_signal_ends_quietly_and_the_next_signal_stops_at_once(signals):
    with signals.uninterrupted():
        pass
    with pytest.raises(Stopped):
        kill_self(signal.SIGINT)


def test_stopped_is_not_caught_by_handlers_of_errors():
    assert not issubclass(Stopped, Exception)


# Urgent signals


def leave(number):
    raise AssertionError("the main thread reacts")


@pytest.mark.parametrize(
    ("numbers", "n_received"),
    [
        ([signal.SIGTERM, signal.SIGTERM], 1),
        ([signal.SIGINT, signal.SIGINT], 2),
        ([signal.SIGHUP, signal.SIGHUP], 1),
        ([signal.SIGINT, signal.SIGTERM], 2),
        ([signal.SIGINT], 2),  # the rest of the block runs
    ],
)
def test_an_urgent_block_ends_at_a_second_ctrl_c_or_at_sigterm(numbers, n_received, signals):
    steps = []

    def block():
        with signals.uninterrupted(), signals.urgent(leave):
            for number in numbers:
                steps.append(number)
                kill_self(number)
            steps.append(None)

    with pytest.raises(Stopped) as stop:
        block()
    assert len(steps) == n_received
    assert stop.value.number == numbers[min(n_received, len(numbers)) - 1]


def test_a_second_signal_in_the_part_that_updates_waits(signals):
    steps = []

    def block():
        with signals.uninterrupted():
            with signals.urgent(leave):
                pass
            for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
                kill_self(number)
                steps.append(number)

    with pytest.raises(Stopped):
        block()
    assert len(steps) == 3


def test_the_first_ctrl_c_in_a_long_step_is_announced_and_in_a_short_one_it_is_not(
    signals, monkeypatch, capsys
):
    waiting = queue.SimpleQueue()  # what the second thread would call after some seconds
    monkeypatch.setattr(training_signals, "call_later", lambda *call: waiting.put(call))
    for is_long in (True, False):
        with contextlib.suppress(Stopped), signals.uninterrupted():
            kill_self(signal.SIGINT)
            seconds, announce, block = waiting.get(timeout=60)
            if is_long:
                announce(block)
        assert seconds == training_signals.SHORT
        assert capsys.readouterr().err == (WAITING + "\n" if is_long else "")
        announce(block)  # the step has ended
        with contextlib.suppress(Stopped), signals.uninterrupted():
            announce(block)  # and the next one goes on
        assert capsys.readouterr().err == ""


def test_handlers_are_as_before_after_the_block():
    before = [signal.getsignal(number) for number in STOPPING]
    with Signals():
        assert [signal.getsignal(number) for number in STOPPING] != before
    assert [signal.getsignal(number) for number in STOPPING] == before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.usefixtures("_terminal")
def test_a_program_of_several_processes_is_not_ended_before_it_has_said_why(monkeypatch):
    monkeypatch.setattr("minia3.training.signals.n_processes", lambda: 2)
    arrived = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: arrived.append(number))
    before_ctrl_c = signal.getsignal(signal.SIGINT)
    try:
        with Signals(is_program=True):
            pass
        kill_self(signal.SIGTERM)
        assert arrived == []
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, before_ctrl_c)


def test_torchrun_cannot_disturb_a_process_that_saves_because_another_one_has_ended(
    tmp_path, monkeypatch
):
    def sum_over_processes(run, group):
        if group.log.step == 3:
            raise PeerGone(GONE)

    def save_while_torchrun_stops_all(*args):
        kill_self(signal.SIGTERM)
        save_checkpoint(*args)

    whole = tmp_path / "whole"
    out = tmp_path / "run"
    flags = {"steps": 6, "save_every": 20}
    assert run(words(whole, **flags)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Run, "sum_over_processes", sum_over_processes)
        patch.setattr("minia3.training.run.save_checkpoint", save_while_torchrun_stops_all)
        assert run(words(out, **flags)) == 1
    assert load_checkpoint(out).n_steps == 3
    assert resume(out) == 0
    assert outcome(out) == outcome(whole)


# A terminal that is closed


@pytest.mark.usefixtures("_terminal")
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (signal.SIGHUP, signal.SIGHUP),  # of a terminal
        (signal.SIGTERM, signal.SIGHUP),  # of a logout
        (signal.SIGTERM, signal.SIGTERM),  # of SLURM
    ],
)
def test_a_system_that_sends_two_signals_does_not_disturb_the_saving(
    first, second, tmp_path, monkeypatch
):
    def clip(*args):
        steps.append(None)
        if len(steps) == 4:
            kill_self(first)
        original(*args)

    def save_while_another_signal_comes(*args):
        if steps:  # and not before training
            kill_self(second)
        save_checkpoint(*args)

    steps = []
    original = RowOptimizer.clip
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(RowOptimizer, "clip", clip)
        patch.setattr("minia3.training.run.save_checkpoint", save_while_another_signal_comes)
        assert run(words(out, **IN_PARTS)) == 128 + first
    assert load_checkpoint(out).n_steps == 4
    assert resume(out) == 0
    assert outcome(out) == whole_run()


@pytest.mark.parametrize(
    ("numbers", "n_ends"),
    [
        ([signal.SIGHUP, signal.SIGHUP], 1),
        ([signal.SIGTERM, signal.SIGHUP], 1),
        ([signal.SIGINT, signal.SIGHUP], 0),  # the step in progress may finish
        ([signal.SIGINT, signal.SIGHUP, signal.SIGINT], 1),
    ],
)
def test_a_terminal_that_is_closed_after_another_signal_ends_no_long_step(
    numbers, n_ends, monkeypatch
):
    called = []
    monkeypatch.setattr(
        training_signals, "call_later", lambda seconds, function, argument: called.append(function)
    )
    signals = Signals(is_program=True)
    signals.is_held = True
    reader, writer = socket.socketpair()
    with writer:
        writer.send(bytes(numbers))
    signals.watch(reader)
    assert called.count(signals.end_process) == n_ends


@pytest.mark.usefixtures("_terminal")
def test_a_program_that_stops_for_its_terminal_ends_in_its_own_way():
    """The second signal comes later, for example while its trackers close."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped), Signals(is_program=True):
        kill_self(signal.SIGHUP)
    kill_self(signal.SIGHUP)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.usefixtures("_terminal")
def test_a_run_that_was_started_with_nohup_outlives_its_terminal():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Signals() as signals:
        kill_self(signal.SIGHUP)
        assert signals.pending is None
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


# A step that is given up

# Dropout and a mean over steps would show if anything of the step was left.
IN_PARTS = {"dropout": 0.1, "steps": 6, "save_every": 20, "micro_batch_size": 2, "seed": "0,1"}


@functools.cache
def whole_run():
    """Return what a run leaves in which no step is given up."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "whole")
        assert run(words(out, **IN_PARTS)) == 0
        return outcome(out)


@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT]])
@pytest.mark.parametrize("n_parts", [0, 1])
def test_a_step_that_is_given_up_is_the_only_one_that_is_lost(
    numbers, n_parts, tmp_path, monkeypatch
):
    whole = whole_run()
    out = tmp_path / "run"
    original = train.choice_logprobs
    n_calls = []
    n_parts_of_step = 4  # two cells with four examples each, in parts of two

    def choice_logprobs(*args):
        n_calls.append(None)
        result = original(*args)
        if len(n_calls) == 3 * n_parts_of_step + n_parts + 1:
            for number in numbers:
                kill_self(number)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(train, "choice_logprobs", choice_logprobs)
        assert run(words(out, **IN_PARTS)) == 128 + numbers[-1]
    steps = []
    start_step = TrainingLog.start_step
    monkeypatch.setattr(
        TrainingLog, "start_step", lambda log: (steps.append(log.step), start_step(log))
    )
    assert resume(out) == 0
    assert steps == list(range(3, 6))
    assert outcome(out) == whole


@contextlib.contextmanager
def an_operation_that_takes_long(ready):
    """The backward pass of the fourth step is one call of C that takes a minute."""
    original = torch.Tensor.backward
    n_calls = []

    def backward(*args):
        original(*args)
        n_calls.append(None)
        if len(n_calls) == 4:
            ready.touch()
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10**8)  # it lets other threads run

    torch.Tensor.backward = backward
    yield


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT]])
def test_a_single_operation_that_takes_a_minute_is_given_up_within_five_seconds(numbers, tmp_path):
    flags = {"dropout": 0.1, "steps": 8}
    assert run(words(tmp_path / "whole", **flags)) == 0
    out = tmp_path / "run"
    ready = tmp_path / "ready"
    prepare = functools.partial(an_operation_that_takes_long, ready)
    process = start(words(out, **flags), tmp_path / "log", prepare)
    while not ready.exists():
        assert process.is_alive(), "the run has ended before its fourth step"
        time.sleep(0.05)
    time.sleep(0.2)
    began = time.monotonic()
    for number in numbers:
        training_signals.os.kill(process.pid, number)
        time.sleep(0.5)
    assert finish(process) == 128 + numbers[-1]
    assert time.monotonic() - began < 5
    log = (tmp_path / "log").read_text()
    assert log.endswith(f"stopped; to continue: python train.py --resume {quoted(out)}\n")
    assert (WAITING in log) == (len(numbers) == 2)
    assert resume(out) == 0
    assert outcome(out) == outcome(tmp_path / "whole")


# Ctrl-C while modules are imported


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.1])
@pytest.mark.parametrize(
    ("program", "command"),
    [("train.py", ["train.py", "--out"]), ("minia3", ["-m", "minia3", "convert", "tiny-t5"])],
)
def test_ctrl_c_during_imports_is_one_line(program, command, delay, tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    # -v names each module that is imported.
    words = [sys.executable, "-v", *command, str(tmp_path / "out")]
    try:
        process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for line in process.stderr:
            if "torch/__init__" in line:
                break
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.wait(60) == 130
    assert "Traceback" not in rest
    beginnings = (f"{program}: ", "stopped; to continue")  # the second if imports were quick
    lines = [line for line in rest.splitlines() if line.startswith(beginnings)]
    assert len(lines) == 1


def test_a_checkpoint_that_cannot_be_written_lets_the_step_go_on(signals, monkeypatch, capsys):
    """The second thread does not end the process before the state is safe."""
    ended = []

    def full(number):
        kill_self(number)  # here the main thread hears of the signal
        raise OSError(28, "No space left on device")

    def step():
        with signals.uninterrupted(), signals.urgent(full):
            signals.end_process(signal.SIGTERM)
            ended.append("the step")

    monkeypatch.setattr(training_signals.os, "_exit", ended.append)
    with pytest.raises(Stopped) as stop:
        step()
    assert stop.value.number == signal.SIGTERM
    message = "the run cannot stop yet: [Errno 28] No space left on device\n"
    assert capsys.readouterr().err == message
    assert (ended, signals.is_leaving) == (["the step"], False)
    signals.end_process(signal.SIGTERM)  # too late: the block has ended
    assert ended == ["the step"]
