"""Several processes answer the rows of a file, and a failure is not torchrun's traceback."""

import contextlib
import io
import json
import logging
import signal
import socket

import pytest
import running
import several
from ranks import on_ranks
from torch.distributed import run as torchrun
from torch.distributed.elastic.rendezvous import RendezvousConnectionError
from torch.distributed.launcher.api import LaunchConfig

from minia3.cli.main import main

pytestmark = pytest.mark.slow

EXACT = ("--dtype", "float64")  # so that no printed digit depends on rounding


def alone(*arguments):
    """Return what a command prints in this process, which is alone."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert main(list(map(str, arguments))) == 0
    return output.getvalue()


def together(n_processes, *arguments):
    """Return what a command prints in several processes, which torchrun has not started.

    This is faster, because their Python has imported torch already.
    """
    return "".join(on_ranks(n_processes, alone, *arguments))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A file of 40 rows, of which some are ranked and others continued."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [json.dumps(row) + "\n" for row in running.rows(40, n_choices=(3, 2, 2))]
    lines[7:9] = [json.dumps({"input": f"w5 w6 w{i}"}) + "\n" for i in (7, 9)]
    file.write_text("".join(lines))
    return file


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_predict_gives_the_lines_of_one_process(name, rows, tmp_path):
    flags = ["--batch-size", 4, "--max-new-tokens", 5, *EXACT]
    arguments = ["predict", running.model(name), rows, *flags]
    expected = alone(*arguments)
    assert together(2, *arguments) == expected

    file = tmp_path / "results.jsonl"
    begun = expected[: len(expected) // 2]  # in the middle of a line
    file.write_text(begun)
    together(4, *arguments, "--out", file)
    assert file.read_text() == expected


def notes_of(*arguments):
    """Return what a command prints on standard error."""
    with contextlib.redirect_stderr(io.StringIO()) as notes:
        alone(*arguments)
    return notes.getvalue()


def test_outputs_that_any_process_has_cut_are_counted(rows):
    arguments = ["predict", running.model("t5"), rows, "--batch-size", 1, "--max-new-tokens", 1]
    notes = notes_of(*arguments, *EXACT)
    assert "2 outputs cut to 1 tokens (--max-new-tokens)" in notes
    assert on_ranks(2, notes_of, *arguments, *EXACT) == [notes, ""]


def test_generate_gives_the_texts_of_one_process():
    model = running.model("t5")
    texts = [f"w3 w4 w{i}" for i in range(5, 25)]
    for flags in ([], ["--beams", 3], ["--temperature", 1, "--seed", 4, "--samples", 2, "--json"]):
        arguments = ["generate", model, *texts, "--max-new-tokens", 6, *flags, *EXACT]
        assert together(2, *arguments) == alone(*arguments)


def test_torchrun_itself_starts_a_command():
    arguments = ["generate", running.model("t5"), "w3 w4", "w5", "--max-new-tokens", 3, *EXACT]
    code, out, err = several.call_python(2, "-m", "minia3", *arguments)
    assert (code, out, err) == (0, alone(*arguments), "")


def test_a_wrong_row_is_one_line_and_exit_code_2(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"input": "w3"}\n{"input": \n')
    code, _, err = several.call(2, "-m", "minia3", "predict", running.model("t5"), file)
    assert code == 2
    assert err.startswith(f"minia3: {file}:2: ")
    assert err.count("\n") == 1


def test_commands_for_one_process_run_once():
    assert together(2, "info", running.model("t5")) == alone("info", running.model("t5"))


@pytest.mark.parametrize(
    ("words", "missing"),
    [(["nothing.py", "--steps", "1"], "script nothing.py"), (["-m", "no.such"], "module no.such")],
)
def test_a_script_that_is_missing_is_one_line(words, missing, capsys):
    assert main(["torchrun", "--standalone", "--nproc-per-node", "2", *words]) == 2
    assert capsys.readouterr().err == f"minia3: torchrun: there is no {missing}\n"


def test_no_process_at_all_is_one_line(capsys, tmp_path):
    """As a script gives it that counts the GPUs of a machine that has none."""
    script = tmp_path / "script.py"
    script.touch()
    assert main(["torchrun", "--standalone", "--nproc-per-node", "0", str(script)]) == 2
    expected = "minia3: torchrun: --nproc-per-node is 0, expected at least 1 process\n"
    assert capsys.readouterr().err == expected


def test_scripts_modules_and_programs_that_are_there_are_started(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr("torch.distributed.run.run", started.append)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("raise AssertionError('is not imported')")
    (tmp_path / "script.py").touch()
    level = logging.root.manager.disable
    for words in (["script.py"], ["-m", "package.module"], ["-m", "minia3"], ["--no-python", "ls"]):
        assert main(["torchrun", *words]) == 0
    assert len(started) == 4
    assert logging.root.manager.disable == level


def test_who_sets_no_number_of_threads_hears_which_one_torchrun_takes(monkeypatch, capsys):
    monkeypatch.setattr("torch.distributed.run.run", lambda options: None)
    words = ["torchrun", "-m", "minia3"]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert main(words) == 0
    assert capsys.readouterr().err == ""  # a single process takes as many as it likes
    words[1:1] = ["--nproc-per-node", "2"]
    assert main(words) == 0
    expected = "computes on the CPU with a single thread: set OMP_NUM_THREADS for more\n"
    assert capsys.readouterr().err == f"minia3: torchrun: each of 2 processes {expected}"
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert main(words) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(
    "shutdown_timeout" not in LaunchConfig.__dataclass_fields__,
    reason="this torch always kills processes after 30 seconds",
)
def test_processes_have_ten_minutes_to_save_unless_the_user_says_otherwise(monkeypatch):
    seconds = []

    def run(options):
        config, *_ = torchrun.config_from_args(options)
        seconds.append(config.shutdown_timeout)

    monkeypatch.setattr(torchrun, "run", run)
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "5")
    assert main(["torchrun", "-m", "minia3"]) == 0
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    assert main(["torchrun", "-m", "minia3"]) == 0
    assert main(["torchrun", "--shutdown-timeout", "7", "-m", "minia3"]) == 0
    assert seconds == [5, 600, 7]


def test_machines_that_do_not_meet_are_one_line(monkeypatch, capsys):
    def run(options):
        raise RendezvousConnectionError("see the inner exception") from ValueError("timed\nout")

    monkeypatch.setattr("torch.distributed.run.run", run)
    assert main(["torchrun", "-m", "minia3"]) == 1
    expected = "minia3: torchrun: the machines of this run cannot reach each other: timed out\n"
    assert capsys.readouterr().err == expected


def test_a_port_that_another_run_uses_is_one_line(capsys, tmp_path):
    script = tmp_path / "script.py"
    script.touch()
    with socket.create_server(("", 0)) as server:
        port = str(server.getsockname()[1])
        words = ["--nproc-per-node", "2", "--master-port", port, str(script)]
        assert main(["torchrun", *words]) == 1
    assert capsys.readouterr().err.startswith("minia3: torchrun: its port is in use, perhaps by")


def test_what_torchrun_starts_decides_about_the_exit_code(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys; sys.exit(int(sys.argv[1]))")
    assert several.call(1, script, 3) == (3, "", "")
    assert several.call(1, script, 0) == (0, "", "")


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (signal.SIGKILL, "signal 9 (Killed), which the system sends if memory runs out"),
        (signal.SIGSEGV, "signal 11 (Segmentation fault)"),
    ],
)
def test_a_process_that_a_signal_has_ended_is_named(number, text, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("""
import os, sys, time
if os.environ["RANK"] == "1":
    os.kill(os.getpid(), int(sys.argv[1]))
time.sleep(60)
""")
    expected = f"minia3: torchrun: process 1 was ended by {text}\n"
    assert several.call(2, script, int(number)) == (128 + number, "", expected)
