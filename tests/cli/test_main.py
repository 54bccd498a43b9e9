"""Guards the command line as a whole: every help has an example that works, a user's mistake is one
line and exit code 2, a failure is one line and 1, and pipes and Ctrl-C make no noise."""

import argparse
import atexit
import errno
import gc
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import running
import torch
from command_line import failure, outcome, python, read_until, save_adapters, write_tfew_file
from running import ROOT

from minia3.cli import info
from minia3.cli.main import COMMANDS, main, parse
from minia3.files import processes
from minia3.files.program import begin, forget_interrupt, freeze_objects
from minia3.training import memory_plan

ROWS = ROOT / "data" / "same-colour" / "test.jsonl"

EXAMPLES = {
    name: shlex.split(command.EXAMPLE.removeprefix("minia3 ")) for name, command in COMMANDS.items()
}


@pytest.fixture
def adapters(tmp_path):
    save_adapters(tmp_path)
    return tmp_path


@pytest.fixture
def _program(monkeypatch):
    """Make this process handle signals as the program `minia3` does."""
    for hook in ("excepthook", "unraisablehook"):
        monkeypatch.setattr(sys, hook, getattr(sys, hook))
    before = signal.getsignal(signal.SIGINT)
    thresholds = gc.get_threshold()
    begin("minia3")
    yield
    gc.set_threshold(*thresholds)
    signal.signal(signal.SIGINT, before)
    atexit.unregister(freeze_objects)
    forget_interrupt()


# Help


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--help"], ["predict", "--help"]])
def test_help_does_not_import_torch(words):
    """It is quick because of that: importing torch takes seconds."""
    out, err, code = outcome(*words)
    assert (code, err) == (0, "")
    program = (
        "import sys\n"
        "from minia3.cli.main import main\n"
        f"try: main({words})\n"
        "finally: print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == out + "False\n"


def test_help_names_every_command_and_ends_with_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    for name in COMMANDS:
        assert f"\n    {name} " in out
    assert out.endswith("\nexample: minia3 info t5-base\n")


def test_without_a_command_the_help_is_shown(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    shown = capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 0
    assert capsys.readouterr().out == shown


class Collector(argparse.ArgumentParser):
    """Collects the arguments that a command declares."""

    def __init__(self):
        super().__init__(add_help=False)
        self.arguments = []

    def add_argument(self, *names, **options):
        self.arguments.append(super().add_argument(*names, **options))


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_explains_every_argument_and_ends_with_an_example(name, capsys):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    out = capsys.readouterr().out
    text = " ".join(out.split())
    collector = Collector()
    COMMANDS[name].add_arguments(collector)
    assert COMMANDS[name].TITLE in text
    for argument in collector.arguments:
        names = argument.option_strings or [argument.metavar or argument.dest]
        assert names[0] in text
        assert argument.help % {"default": argument.default} in text
    if name == "train":
        assert out.count("\n  minia3 train") == 4
    else:
        assert out.splitlines()[-1] == f"example: {COMMANDS[name].EXAMPLE}"


@pytest.mark.parametrize(
    ("name", "present", "absent"),
    [
        ("merge", ["--quantize"], ["(default: neither)"]),
        ("info", ["--quantize"], ["(default: neither)"]),
        ("predict", ["--quantize", "(default: neither)", "--dtype"], []),
        ("study", ["folder of all runs", "--steps"], ["--resume", "--or-resume", "--config"]),
    ],
)
def test_a_help_says_what_a_flag_does_in_this_command(name, present, absent, capsys):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for part in present:
        assert part in text
    for part in absent:
        assert part not in text


@pytest.mark.slow
# See tests/test_installed.py for `train`, and test_torchrun.py.
@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - {"train", "torchrun"}))
def test_the_example_is_a_command_line_that_works(name, adapters, monkeypatch, capsys):
    (adapters / "data").symlink_to(ROOT / "data")
    if name == "merge":
        shutil.copytree(adapters / "one" / "adapter", adapters / "adapter")
    write_tfew_file(adapters / "finish.pt")
    # The embedded model's own task has many rows to evaluate on.
    flags = f"steps = 1\nmodel = '{running.model('t5')}'\ntask = '{running.task()}'"
    (adapters / "study.toml").write_text(f"[flags]\n{flags}\n[each]\nseed = [0, 1]\n")
    monkeypatch.chdir(adapters)
    if name == "info":  # it would plan for seconds, and test_info.py looks at what is planned
        monkeypatch.setattr(memory_plan, "planned_memory", lambda *args, **options: 10**9)
    if name in ("table", "plot"):
        pytest.importorskip("matplotlib", reason="needs the extra plot")
        running.run(running.words(adapters / "runs" / "one"))
        capsys.readouterr()
    assert main(EXAMPLES[name]) == 0
    out, err = capsys.readouterr()
    assert out != ""
    assert err == ""


@pytest.mark.parametrize(
    "words",
    [
        ["m", "x", "y", "--beams", "2", "--json"],
        ["--beams", "2", "m", "x", "--json", "y"],
        ["m", "--json", "x", "y", "--beams=2"],
    ],
)
def test_prompts_and_flags_come_in_any_order(words):
    args = parse(["generate", *words])
    assert (args.command, args.run) == ("generate", COMMANDS["generate"].run)
    assert (args.model, args.prompts, args.beams, args.json) == ("m", ["x", "y"], 2, True)


# Mistakes and failures


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["inof", "t5-base"], ["'inof'", "did you mean info?", "see minia3 --help"]),
        (["trian", "--steps", "3"], ["'trian'", "did you mean train?"]),
        (["frobnicate"], ["'frobnicate'", "expected one of train, info, generate"]),
        (["info", "t5-base", "t5-large"], ["t5-large", "see minia3 info --help"]),
        (["info", "t5-bsae"], ["did you mean t5-base?"]),
        (["generate"], ["model", "required"]),
        (["generate", "tiny-t5", "--beam", "2"], ["'--beam'", "did you mean --beams?"]),
        (
            ["merge", "tiny-t5", "--adapter", "a", "--out", "b"],
            ["'--adapter'", "give its value alone, as in minia3 merge MODEL ADAPTER OUT"],
        ),
        (["generate", "tiny-t5", "--beams", "two", "x"], ["--beams", "'two'"]),
        (["generate", "tiny-t5", "--beams", "0", "x"], ["beams", "0"]),
        (["generate", "tiny-t5", "--top-p", "2", "x"], ["top_p", "2.0"]),
        (["generate", "tiny-t5", "--chat", "x"], ["chat_template"]),
        (["generate", "tiny-t5", "--dtype", "float17", "x"], ["float17", "float32"]),
        (["generate", "tiny-t5", "--device", "tpu", "x"], ["--device is 'tpu'", "cpu"]),
        (["generate", "tiny-t5", "--adapter", "nowhere", "x"], ["nowhere"]),
        (["generate", "tiny-t5", "--adapter", "", "x"], ["--adapter", "found an empty text"]),
        (["predict", "tiny-t5", "rows.jsonl", "--adapter", ""], ["found an empty text"]),
        (["predict", "tiny-t5", "nowhere.jsonl"], ["nowhere.jsonl", "not found"]),
        (["predict", "tiny-t5", str(ROWS), "--task", "rtx"], ["--task is 'rtx'", "rte"]),
        (["merge", "tiny-t5", "nowhere", "out"], ["nowhere"]),
        (["convert", "nowhere", "out"], ["nowhere"]),
        (["mix", "out"], ["adapter:weight", "required"]),
        (["mix", "out", "adapter"], ["adapter:weight", "'adapter'"]),
        (["mix", "out", "adapter:half"], ["'adapter:half'", "expected ADAPTER:WEIGHT"]),
        (["mix", "out", "0.5"], ["'0.5'", "expected ADAPTER:WEIGHT"]),
        (["mix", "out", ":0.5"], ["':0.5'", "expected ADAPTER:WEIGHT"]),
        (["mix", "out", "nowhere:1"], ["nowhere"]),
        (["table", "nowhere"], ["nowhere", "expected a run of train.py"]),
        (["plot", "nowhere"], ["nowhere", "expected a run of train.py"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words, parts, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    error = failure(capsys, *words)
    for part in parts:
        assert part in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("inside", ["notes.txt", None])
@pytest.mark.parametrize(
    "command", ["merge tiny-t5 one/adapter", "convert one/adapter", "convert tiny-t5", "mix"]
)
def test_a_folder_with_files_and_a_file_are_not_overwritten(
    command, inside, adapters, monkeypatch, capsys
):
    monkeypatch.chdir(adapters)
    out = adapters / "out"
    file = out
    if inside:
        out.mkdir()
        file = out / inside
    file.write_text("mine")
    words = [*command.split(), "out"]
    if command == "mix":
        words = ["mix", "out", "one/adapter:1"]
    reason = "a folder" if inside is None else "empty"
    assert f"out exists and is not {reason}" in failure(capsys, *words)
    assert file.read_text() == "mine"
    file.unlink()
    out.mkdir(exist_ok=True)
    (out / ".hidden").touch()
    assert main(words) == 0


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 1),
        (OSError(errno.EIO, "Input/output error", "file"), 1),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1),  # of a download, not of standard output
        (ConnectionResetError("reset"), 1),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"), 1),
        (RuntimeError("can't allocate memory: you tried to allocate 8 bytes"), 1),
        (MemoryError(), 1),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), 2),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 2),
    ],
)
def test_a_failure_is_one_line_and_exit_code_1(error, code, tmp_path, capsys, monkeypatch):
    def fail(*args):
        raise error

    monkeypatch.setattr("minia3.adapters.lora.is_lora", fail)
    line = failure(capsys, "merge", "tiny-t5", "adapter", tmp_path / "out", code=code)
    assert line == f"minia3: {' '.join(str(error).split()) or 'MemoryError'}\n"


def test_a_bug_is_not_hidden(tmp_path, monkeypatch):
    monkeypatch.setattr("minia3.adapters.lora.is_lora", lambda *args: {}["bug"])
    with pytest.raises(KeyError):
        main(["merge", "tiny-t5", "adapter", str(tmp_path / "out")])


def test_a_warning_is_one_line(adapters, capsys):
    path = adapters / "one" / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": "other/base"}))
    assert main(["generate", "tiny-t5", "same colour ?", "--adapter", str(path.parent)]) == 0
    err = capsys.readouterr().err
    assert err.startswith("minia3: ")
    assert "was trained on other/base" in err
    assert err.count("\n") == 1


# Pipes and signals


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("info t5-bsae", 2),
        ("train --steps 0", 2),
        ("predict tiny-t5 rows.jsonl --adapter one/adapter", 0),  # which warns
        ("merge tiny-t5 one/adapter out", 0),
    ],
)
def test_without_standard_error_a_command_does_the_same_in_silence(
    words, code, adapters, monkeypatch, capsys
):
    """As after `2>&-`: a message must not come between the results on standard output."""
    monkeypatch.chdir(adapters)
    config = adapters / "one" / "adapter" / "adapter_config.json"
    named = json.loads(config.read_text()) | {"base_model_name_or_path": "other/base"}
    config.write_text(json.dumps(named))
    (adapters / "rows.jsonl").write_text('{"input": "same colour ?", "choices": ["no", "yes"]}\n')
    monkeypatch.setattr(sys, "stderr", None)
    assert main(words.split()) == code
    out = capsys.readouterr().out
    assert "minia3" not in out
    if words.startswith("predict"):
        (line,) = out.splitlines()
        assert len(json.loads(line)["scores"]) == 2


# A command that imports nothing slow
LIST = ["study", "tests/benchmarks/studies/t0-3b.toml", "--list"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [["--help"], LIST, ["predict", "tiny-t5", "data/same-colour/test.jsonl"]],
)
def test_a_reader_that_leaves_causes_no_message(words):
    read, write = os.pipe()
    process = python(*words, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    if words[0] == "predict":
        assert os.read(read, 10)
    os.close(read)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 141


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
@pytest.mark.parametrize("words", [["--help"], LIST])
def test_a_full_disk_behind_standard_output_is_one_line(words):
    with open("/dev/full", "w") as full:
        process = python(*words, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
        assert process.communicate(timeout=60)[1] == "minia3: [Errno 28] No space left on device\n"
    assert process.returncode == 1


@pytest.mark.slow
def test_ctrl_c_causes_no_message():
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    # A shell's job in the background ignores the signal, and so would its children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = python("generate", "tiny-t5", **pipes)
    finally:
        signal.signal(signal.SIGINT, before)
    process.stdin.write(b"same colour ?\n" * 16)
    process.stdin.flush()
    assert read_until(process.stdout.fileno(), b"\n")  # it waits for more
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == b""
    assert process.returncode == 130


@pytest.mark.parametrize("error", [ValueError, RuntimeError, AttributeError])
@pytest.mark.usefixtures("_program")
def test_an_error_in_place_of_ctrl_c_causes_no_message(error, capsys, monkeypatch):
    """torch raises its own if Ctrl-C comes while Python code runs within its C++."""

    def run(args):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise error("could not determine the shape of object") from None

    monkeypatch.setattr(info, "run", run)
    assert main(["info", "tiny-t5"]) == 130
    assert capsys.readouterr() == ("", "")


def test_a_process_that_waits_for_one_that_is_gone_says_so(monkeypatch, capsys):
    def lose(args):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]")

    monkeypatch.setattr(info, "run", lose)
    monkeypatch.setattr(processes._process, "n_processes", 2)
    assert main(["info", "tiny-t5"]) == 1
    assert capsys.readouterr().err == "minia3: another process of this run has ended\n"
