"""Bars appear only in a terminal, only if somebody asks for them, and fit into 80 columns."""

import io
import re
import sys
import threading

import pytest
import running

import minia3
from minia3.cli.main import main
from minia3.files import progress as module
from minia3.files.progress import progress, progress_bar, showing


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def open_terminal(monkeypatch):
    """A function that makes sys.stderr a terminal; even work that takes no time gets a bar.

    A test calls it, because pytest replaces sys.stderr between a fixture and its test.
    """

    def open_now():
        monkeypatch.setattr(sys, "stderr", Terminal())
        monkeypatch.setattr(module, "DELAY", 0)
        monkeypatch.setattr(module, "INTERVAL", 0)
        return sys.stderr

    return open_now


def test_work_shows_how_far_it_is(open_terminal):
    terminal = open_terminal()
    with showing("loading"):
        assert list(progress([1, 2, 3], total=6, size=lambda n: n)) == [1, 2, 3]
    text = terminal.getvalue()
    assert "loading:" in text
    assert "/6" in text
    assert text.endswith("\r")  # the bar is gone


def test_without_a_title_and_outside_of_a_terminal_nothing_is_shown(open_terminal, monkeypatch):
    terminal = open_terminal()
    assert list(progress([1, 2], total=2)) == [1, 2]
    assert terminal.getvalue() == ""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with showing("loading"):
        assert list(progress([1, 2], total=2)) == [1, 2]
    assert sys.stderr.getvalue() == ""


def test_without_standard_error_nothing_is_shown(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)  # as Python has it after `2>&-`
    with showing("loading"):
        assert list(progress([1, 2], total=2)) == [1, 2]


def test_a_title_is_of_one_thread(open_terminal):
    terminal = open_terminal()
    with showing("loading"):
        thread = threading.Thread(target=lambda: list(progress([1], total=1)))
        thread.start()
        thread.join()
    assert terminal.getvalue() == ""


def test_a_bar_fits_into_80_columns_however_wide_the_terminal_is(open_terminal, monkeypatch):
    terminal = open_terminal()
    monkeypatch.setenv("COLUMNS", "300")
    with progress_bar(total=10**6, desc="x" * 20, unit="step") as bar:
        bar.set_postfix_str("loss 1234.567, " * 5)
        bar.update(5)
        bar.refresh()
    assert max(map(len, re.split("[\r\n]", terminal.getvalue()))) <= 80


@pytest.mark.parametrize("command", ["merge", "convert", "predict"])
def test_a_command_shows_its_progress_and_says_what_it_wrote(
    command, open_terminal, tmp_path, capsys
):
    terminal = open_terminal()
    model = running.model("t5")
    out = tmp_path / "out"
    if command == "merge":
        minia3.save_adapter(minia3.load_model(model), tmp_path / "adapter")
        words = ["merge", model, tmp_path / "adapter", out]
        expected = f"merged {tmp_path / 'adapter'} into {model}: {out}: "
    elif command == "convert":
        words = ["convert", model, out, "--device", "cpu"]
        expected = f"converted {model}: {out}: "
    else:
        rows = running.write(tmp_path, rows=running.rows(5)) / "rows.jsonl"
        words = ["predict", model, rows, "--out", out, "--device", "cpu"]
        expected = f"{out} is finished"
    assert main([str(word) for word in words]) == 0
    title = {"merge": "merging", "convert": "loading", "predict": "predicting"}[command]
    assert title in terminal.getvalue()
    assert capsys.readouterr().out.startswith(expected)


def test_a_run_shows_loading_and_evaluation(open_terminal, tmp_path):
    terminal = open_terminal()
    assert running.run(running.words(tmp_path / "run", steps=1)) == 0
    text = terminal.getvalue()
    for title in ("loading:", "evaluating:", "step/s"):
        assert title in text
