"""What the README says is so: its Python runs, its numbers are the code's, its commands have the flags they use.

The two commands of its beginning are run by .ci/run, which reads them from there.
"""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import running

import minia3
import train
from minia3.checkpoints.known_models import known_models
from minia3.checkpoints.load import build_model, load_model
from minia3.cli.main import COMMANDS, main, parse
from minia3.model.ia3 import vectors
from minia3.tasks.known_tasks import known_tasks

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(kind):
    return re.findall(rf"^```{kind}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_the_first_two_commands_are_there_for_ci_to_read():
    first, second = blocks("sh ci")
    assert "venv" in first
    assert "train.py" in first
    assert "[test]" in second
    assert "pytest" in second


def test_the_python_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    minia3.save_adapter(load_model("tiny-t5"), "runs/tiny-t5-same-colour-ia3-0/adapter")
    codes, names = [block for block in blocks("python") if "minia3." in block], {}
    assert len(codes) == 2
    for code in codes:
        exec(compile(code, "README.md", "exec"), names)
    assert (tmp_path / "same-colour-t5" / "model.safetensors").exists()
    assert type(names["merged"]) is type(names["model"])
    assert list(names["served"]) == []


def test_the_lines_of_the_command_line_work_as_they_stand(tmp_path, monkeypatch, capsys):
    """Those on the embedded model run, one after the other; those that need other files or a GGUF are parsed."""
    pytest.importorskip("matplotlib", reason="matplotlib, which draws, is not installed")
    monkeypatch.chdir(tmp_path)
    running.run(["--steps", "2", "--device", "cpu"])
    capsys.readouterr()
    (tmp_path / "data").symlink_to(ROOT / "data")
    lines = [
        line for block in blocks("sh") for line in block.splitlines() if line.startswith("minia3 ")
    ]
    assert {line.split()[1] for line in lines} == {command.__name__ for command in COMMANDS} - {
        "info",
        "convert",
    }
    for line in lines:
        words = shlex.split(
            line.replace("$A", "runs/tiny-t5-same-colour-ia3-0/adapter"), comments=True
        )[1:]
        assert parse(words).run.__name__ == words[0]
        if "runs/three" not in words and "runs/two" not in words and "$GGUF" not in words:
            assert main(words) == 0, line
    assert (tmp_path / "runs" / "merged" / "model.safetensors").exists()
    assert len((tmp_path / "labels.jsonl").read_text().splitlines()) == 1024
    assert capsys.readouterr().err == ""


def test_the_three_lines_are_the_three_lines_of_the_code():
    uses = re.compile(r"self\.l_(?:k|v|ff)\(")
    code = [
        line.strip()
        for path in sorted((ROOT / "minia3").glob("*.py"))
        for line in path.read_text().splitlines()
    ]
    shown = [line for block in blocks("python") for line in block.splitlines()]
    assert [line for line in shown if uses.search(line)] == [
        line for line in code if uses.search(line)
    ]


def test_the_table_of_counts_is_what_the_configs_give():
    rows = re.findall(
        r"^\| ([\w.-]+) \| ([\d,]+) \| ([\d,]+) \| ([\d.]+%) \|$", README, re.MULTILINE
    )
    assert len(rows) >= 11
    for name, base, adapter, share in rows:
        model = build_model(known_models()[name].config)
        n = sum(vector.numel() for vector in vectors(model).values())
        total = sum(p.numel() for p in model.parameters()) - n
        assert (name, base, adapter, share) == (name, f"{total:,}", f"{n:,}", f"{n / total:.3%}")


def test_the_map_names_every_module_with_its_chapter():
    shown = dict(re.findall(r"^  (\w+\.py) +(\d?)  ", README, re.MULTILINE))
    modules = {
        path.name: path.read_text()
        for path in (ROOT / "minia3").glob("*.py")
        if path.name != "__init__.py"
    }
    assert shown.keys() == modules.keys()
    for name, chapter in shown.items():
        assert not chapter or modules[name].startswith(f'"""Chapter {chapter}')


def test_commands_use_flags_names_and_files_that_exist():
    flags = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(train.Config)} | {
        "--init"
    }
    commands = [
        line for block in blocks("sh") for line in block.splitlines() if "python train.py" in line
    ]
    assert len(commands) >= 5
    for command in commands:
        words = command[command.index("train.py") :].split("#")[0].split(";")[0].split()
        assert {word for word in words if word.startswith("--")} <= flags
        if "--task" in words and "/" not in (task := words[words.index("--task") + 1]):
            assert {*task.split(",")} <= known_tasks().keys()
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


@pytest.mark.parametrize("mark", ["@@", "TODO"])
def test_nothing_in_it_is_left_to_fill_in(mark):
    assert mark not in README
