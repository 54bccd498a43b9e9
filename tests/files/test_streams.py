"""Output goes on in silence when nobody reads it, and is UTF-8 whatever the locale is."""

import io
import json
import os
import shlex
import subprocess
import sys

import pytest
import running
from running import ROOT, metrics

from minia3.files.streams import (
    LastingStream,
    is_terminal,
    lasting_output,
    print_error,
    print_last,
    use_utf8,
)


class Broken(io.StringIO):
    def write(self, text):
        raise BrokenPipeError

    def flush(self):
        raise BrokenPipeError


def test_a_stream_that_fails_is_silent(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Broken())
    broken = sys.stdout
    with lasting_output():
        print("nobody reads this", flush=True)
    assert sys.stdout is broken


def test_a_program_without_standard_output_prints_nothing():
    stream = LastingStream(None)
    assert stream.write("text") == 4
    stream.flush()
    assert not stream.isatty()


def test_without_standard_error_no_message_goes_to_standard_output(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)  # as Python has it after `2>&-`
    print_error("a mistake")
    print_last("stopped")
    assert capsys.readouterr().out == ""
    assert not is_terminal(sys.stderr)


def test_everything_else_of_a_stream_is_as_before(capsys):
    with lasting_output():
        print("text")
        assert sys.stdout.encoding.lower() == "utf-8"
    assert capsys.readouterr().out == "text\n"


def test_ascii_becomes_utf8_and_utf8_stays(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    use_utf8()
    print("Übermaß 中文", flush=True)
    assert written.getvalue().decode() == "Übermaß 中文\n"


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_path_that_is_not_utf8_is_printed_as_it_came(monkeypatch, encoding):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    use_utf8()
    print(os.fsdecode(b"\xff"), flush=True)
    assert written.getvalue() == b"\xff\n"


# Processes

SHORT = ["--steps", "12", "--save-every", "4", "--eval-batch-size", "64", "--device", "cpu"]


def short_run(out):
    """Return the command line of a short run on a small model."""
    words = ["train.py", *SHORT, "--model", running.model("t5"), "--task", running.task()]
    return [sys.executable, *map(str, words), "--out", str(out)]


@pytest.mark.slow
def test_a_run_whose_output_nobody_reads_any_more_finishes(tmp_path):
    """As in `python train.py | head -1`."""
    out = tmp_path / "run"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(short_run(out), cwd=ROOT, text=True, **pipes)
    assert process.stdout.readline().startswith("device")
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 0
    check_finished(out)


@pytest.mark.slow
def test_a_run_whose_output_and_errors_nobody_reads_any_more_finishes(tmp_path):
    """As in `python train.py 2>&1 | head -1`."""
    out = tmp_path / "run"
    os.mkfifo(tmp_path / "pipe")
    process = running.start(running.words(out), tmp_path / "pipe")
    with (tmp_path / "pipe").open() as pipe:
        assert pipe.readline().startswith("device")
    assert running.finish(process) == 0
    check_finished(out)


def check_finished(out):
    assert metrics(out)[-1]["event"] == "final"
    assert (out / "adapter" / "adapter_config.json").exists()


needs_full = pytest.mark.skipif(
    not os.path.exists("/dev/full"), reason="this system has no /dev/full"
)


@pytest.mark.slow
@pytest.mark.parametrize("redirection", [pytest.param(">/dev/full", marks=needs_full), ">&- 2>&-"])
def test_a_run_without_a_place_for_its_output_finishes(redirection, tmp_path):
    out = tmp_path / "run"
    command = f"{shlex.join(short_run(out))} {redirection}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT)
    assert done.returncode == 0
    assert metrics(out)[-1]["event"] == "final"


@pytest.mark.slow
@needs_full
def test_a_run_without_a_place_for_its_output_and_its_messages_finishes(tmp_path):
    assert running.finish(running.start(running.words(tmp_path / "run"), "/dev/full")) == 0
    assert metrics(tmp_path / "run")[-1]["event"] == "final"


ROWS = [
    {"input": "Übermaß — 中文 ?", "choices": ["à", "é"], "label": 1},
    {"input": "naïve 🙂", "choices": ["à", "é"], "label": 0},
]


@pytest.mark.slow
def test_rows_and_paths_are_utf8_in_the_locale_c(tmp_path):
    folder = tmp_path / "Übung 中"
    task = running.write(folder / "é", train=ROWS, test=ROWS)
    environ = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONPATH": str(ROOT)}
    options = {"cwd": ROOT, "env": environ, "capture_output": True}
    words = [*SHORT, "--task", task, "--out", folder / "läuft"]
    train = [sys.executable, "train.py", *map(str, words)]
    done = subprocess.run(train, **options)
    assert done.stderr == b""
    assert f"{folder / 'läuft'}/adapter" in done.stdout.decode("utf-8")
    config = json.loads((folder / "läuft" / "config.json").read_bytes())
    assert config["task"] == str(task)

    words = ["tiny-t5", folder / "é" / "test.jsonl", "--out", folder / "ü.csv"]
    words += ["--adapter", folder / "läuft" / "adapter"]
    command = [sys.executable, "-m", "minia3", "predict", *map(str, words)]
    done = subprocess.run(command, **options)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode("utf-8") == f"{folder / 'ü.csv'} is finished\n"
    lines = (folder / "ü.csv").read_text(encoding="utf-8").splitlines()
    assert [line.split(",")[2] in ("à", "é") for line in lines[1:]] == [True, True]
