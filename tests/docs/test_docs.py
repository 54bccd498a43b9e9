"""The README and the documents tell the truth: commands run, links lead somewhere, tables agree."""

import dataclasses
import fnmatch
import re
import runpy
import shutil
import subprocess
import sys
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pytest
import running
from forks import fork_python
from pages import FENCE, NEEDS, PAGES, README, ROOT, Block, blocks_of, headings, simple_commands

import minia3
import train
from minia3.checkpoints.known_models import KNOWN_MODELS, known_model
from minia3.checkpoints.load import build_model, load_model
from minia3.cli import plot
from minia3.cli.main import COMMANDS, main, parse
from minia3.model.ia3 import vectors
from minia3.tasks import user_rows
from minia3.tasks.known_tasks import known_tasks
from minia3.training import memory_plan
from minia3.training.command_line import parse_flags
from minia3.training.rules import check_config

DESIGN = ROOT / "docs" / "design.md"
API = ROOT / "docs" / "python-api.md"
ADAPTER = "runs/tiny-t5-same-colour-ia3-0/adapter"
# Flags that the text names: of train.py under a second name, of the scripts, and of other programs.
OTHER_FLAGS = {
    "--init",
    "--help",
    "--seed",
    "--d-model",
    "--details",
    "--dist",
    "--durations",
    "--quick",
    "--only",
    "--scale",
    "--group-by-length",
    "--encode-once",
    "--no-deps",
    "--nproc-per-node",  # torchrun
    "--standalone",
    "--shutdown-timeout",
    "--model-path",  # SGLang
    "--outfile",  # llama.cpp
    "--local-dir",
}

N_PLOTTED = 2  # runs, of two dozen that a page makes
N_TEST_ROWS = 16  # of the embedded tasks, in the copy on which commands run
N_ROWS_OF_SCRIPT = '"test": 1024'  # as data/pretrain.py has them

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def all_commands():
    """Return (page, words) for every command of every page."""
    found = []
    for page in PAGES:
        for block in blocks_of(page, "sh"):
            found += [(page, words) for words in simple_commands(block)]
    return found


def script_of(words):
    """Return the words that start a script of ours beside train.py, or "" if a command has none."""
    if words[1:2] == ["data/pretrain.py"]:
        return "data/pretrain.py"
    if words[1:2] == ["-m"] and words[2].startswith("tests."):
        has_jobs = words[3:4] == ["jobs"]  # a program of its own
        return " ".join(words[2 : 4 if has_jobs else 3])
    return ""


def script_commands():
    """Return the words of each command that gives flags to such a script, by script."""
    found = defaultdict(list)
    for _, words in all_commands():
        if any(word.startswith("--") for word in words):
            found[script_of(words)].append(words)
    del found[""]
    return found


def train_commands():
    return [words[2:] for _, words in all_commands() if words[:2] == ["python", "train.py"]]


def package_commands():
    commands = [words[1:] for _, words in all_commands() if words[0] == "minia3"]
    for _, words in all_commands():
        if words[:3] == ["python", "-m", "minia3"]:
            commands.append(words[3:])
    return commands


# The form of the pages


def test_the_readme_has_at_most_200_lines():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200


def test_the_first_two_commands_are_there_for_ci_to_read():
    first, second = [block.text for block in blocks_of(README, "sh") if block.mark == "ci"]
    assert "venv" in first
    assert "train.py" in first
    assert "[test]" in second
    assert "pytest" in second


@by_page
def test_every_block_of_commands_is_run_or_says_what_it_needs(page):
    marks = {"", "ci", "fails", *(f"needs={need}" for need in NEEDS)}
    assert {block.mark for block in blocks_of(page, "sh")} <= marks


@by_page
def test_no_page_has_a_commit_hash_or_something_left_to_fill_in(page):
    text = page.read_text(encoding="utf-8")
    for mark in ("@@", "TODO", "TBD"):
        assert mark not in text
    hashes = re.findall(r"\b(?=[0-9a-f]*[0-9])(?=[0-9a-f]*[a-f])[0-9a-f]{7,40}\b", text)
    assert hashes == []


@by_page
def test_no_line_of_a_paragraph_begins_like_an_item_of_a_list(page):
    """A wrapped "l - 1" became an item of a list."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    wrong = []
    for before, line in pairwise(text.splitlines()):
        is_prose = re.match(r"[^\s#|>*+-]", before) and not re.match(r"\d+\. ", before)
        if is_prose and re.match(r"[-+*] ", line):
            wrong.append(line)
    assert wrong == []


@by_page
def test_links_lead_to_files_and_headings_that_exist(page):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), target
        if anchor:
            assert anchor in headings(linked), target


@by_page
def test_files_that_are_named_exist(page):
    if page.name == "CHANGELOG.md":
        pytest.skip("it names files that were removed")
    folders = "model|files|tasks|checkpoints|inference|adapters|training|cli"
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"\b(?:minia3|tests|docs)/[\w/.-]+\.(?:py|json|md|ipynb)\b", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(rf"`((?:{folders})/\w+\.(?:py|json))`", text):
        assert (ROOT / "minia3" / name).exists(), name


# What the pages say about the code


def test_the_three_lines_are_the_three_lines_of_the_code():
    uses = re.compile(r"self\.l_(?:k|v|ff)\(")
    (excerpt,) = [block for block in blocks_of(README, "python") if block.mark]
    code = []
    for path in sorted((ROOT / "minia3").rglob("*.py")):
        code += [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    assert excerpt.text.splitlines() == [line for line in code if uses.search(line)]


def test_the_table_of_parameters_is_what_the_configs_give():
    pattern = r"^\| ([\w.-]+) \| ([\d,]+) \| ([\d,]+) \| ([\d.]+%) \|$"
    rows = re.findall(pattern, DESIGN.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) >= 11
    for name, base, adapter, share in rows:
        model = build_model(KNOWN_MODELS[name].config)
        n_adapter = sum(vector.numel() for vector in vectors(model).values())
        n_base = sum(p.numel() for p in model.parameters()) - n_adapter
        assert base == f"{n_base:,}", name
        assert adapter == f"{n_adapter:,}", name
        assert share == f"{n_adapter / n_base:.3%}", name


def test_the_map_names_every_module():
    shown = re.findall(r"^ +(\w+/\w+\.py)  ", DESIGN.read_text(encoding="utf-8"), re.MULTILINE)
    package = ROOT / "minia3"
    modules = [
        str(path.relative_to(package))
        for path in package.glob("*/*.py")
        if path.name != "__init__.py"
    ]
    assert sorted(shown) == sorted(modules)


def test_every_command_of_the_package_is_shown():
    shown = {words[0] for words in package_commands()}
    assert shown == set(COMMANDS)


def test_the_table_of_tasks_names_every_known_task():
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    text = text.partition("## Prompts")[0]
    table = re.findall(r"^\|.*\|$", text, re.MULTILINE)
    named = set(re.findall(r"`([\w/-]+)`", "\n".join(table)))
    assert named == set(known_tasks())


# Commands: their flags and names


def test_commands_of_train_py_have_flags_that_exist_and_go_together():
    commands = train_commands()
    assert len(commands) >= 20
    for words in commands:
        # The only mistakes are those that troubleshooting.md shows.
        if words not in failing_commands():
            check_config(train.Config(**parse_flags(words)))


def failing_commands():
    found = []
    for page in PAGES:
        for block in blocks_of(page, "sh"):
            if block.mark == "fails":
                found.append(simple_commands(block)[-1][2:])
    return found


def test_commands_name_models_and_tasks_that_exist():
    for words in train_commands():
        if words in failing_commands():
            continue
        config = train.Config(**parse_flags(words))
        assert known_model(config.model) or is_path(config.model), config.model
        tasks = config.task if isinstance(config.task, tuple) else (config.task,)
        for task in tasks:
            assert task in known_tasks() or is_path(task), task


@by_page
def test_flags_in_the_text_exist(page, capsys):
    if page.name == "CHANGELOG.md":
        pytest.skip("it names flags that were removed")
    known = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(train.Config)}
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            parse([command, "--help"])
    known |= set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    used = set(re.findall(r"`[^`]*?(--[a-z][\w-]*)", text))
    assert used - known - OTHER_FLAGS == set()


def is_path(name):
    """Whether a name stands for a file or folder that the reader brings, or that a run makes."""
    suffixes = (".csv", ".jsonl", ".json.gz", ".gguf", "moods")
    return name.startswith(("runs/", "path/to/", "hf:")) or name.endswith(suffixes)


def test_commands_of_the_package_can_be_parsed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an --out that exists would be refused
    commands = package_commands()
    assert len(commands) >= 10
    for words in commands:
        assert parse(words).command == words[0]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("script", script_commands())
def test_commands_of_the_other_scripts_have_flags_that_exist(script, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    name, *rest = script.split()
    monkeypatch.setattr(sys, "argv", [name, *rest, "--help"])
    run_script = runpy.run_module
    if name.endswith(".py"):
        run_script = runpy.run_path
    with pytest.raises(SystemExit):
        run_script(name, run_name="__main__")
    # In the list of options, because the text above it has examples of its own.
    known = set(re.findall(r"^  (--[\w-]+)", capsys.readouterr().out, re.MULTILINE))
    for words in script_commands()[script]:
        flags = {word for word in words if word.startswith("--")}
        assert flags <= known, words


# Commands: run


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder that looks like the root of the repository, and is the current one.

    It has a copy of data/, so that no command can change what ships. The copy has, and makes,
    fewer rows to test, because nearly all runs evaluate on them twice.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("tiny-t5", "same-colour"):
        shutil.copytree(ROOT / "data" / name, tmp_path / "data" / name)
    test_split = tmp_path / "data" / "same-colour" / "test.jsonl"
    lines = test_split.read_text(encoding="utf-8").splitlines(keepends=True)
    test_split.write_text("".join(lines[:N_TEST_ROWS]), encoding="utf-8")
    monkeypatch.setattr(user_rows, "SHIPPED", tmp_path / "data")
    # `minia3 info` would plan for seconds, and no page compares what it plans. test_info.py does.
    monkeypatch.setattr(memory_plan, "planned_memory", lambda *args, **options: 10**9)
    # Pictures of fewer dots are drawn in half the time. test_plot.py looks at pictures.
    monkeypatch.setattr(plot, "DPI", 30)
    fork_python(monkeypatch)
    script = (ROOT / "data" / "pretrain.py").read_text(encoding="utf-8")
    assert N_ROWS_OF_SCRIPT in script
    script = script.replace(N_ROWS_OF_SCRIPT, f'"test": {N_TEST_ROWS}')
    (tmp_path / "data" / "pretrain.py").write_text(script, encoding="utf-8")
    return tmp_path


@pytest.mark.slow
@by_page
def test_commands_run_as_they_stand(page, folder, capsys):
    pytest.importorskip("matplotlib", reason="`minia3 plot` needs matplotlib")
    printed = ""
    n_shipped = len((ROOT / "data/same-colour/test.jsonl").read_text("utf-8").splitlines())
    for block in blocks_of(page):
        if block.language == "sh" and block.mark == "":
            for line in block.commands:
                assert run_line(line) == 0, line
            printed, err = capsys.readouterr()
            assert err == ""
        if block.mark == "prints":
            shown = block.text.replace(f"{n_shipped} rows of test", f"{N_TEST_ROWS} rows of test")
            missing = [line for line in shown.splitlines() if line not in printed]
            assert not missing, printed


@pytest.mark.slow
@by_page
def test_commands_that_fail_print_the_message_that_is_shown(page, folder, capsys):
    blocks = blocks_of(page)
    for block, following in pairwise(blocks):
        if block.mark != "fails":
            continue
        *first, last = block.commands
        for line in first:
            assert run_line(line) == 0, line
        capsys.readouterr()
        assert run_line(last, is_short=False) != 0
        message = capsys.readouterr().err.strip()
        pattern = re.sub(r"[][]", r"[\g<0>]", following.text.strip())  # fnmatch reads [ as a set
        assert fnmatch.fnmatchcase(message, pattern.replace("...", "*")), message


def run_line(line, is_short=True):
    """Run a command line, in this process if that is possible. Return its exit code.

    Of the runs, some are plotted. is_short: a run makes two steps. To fail, it may need more.
    """
    words = simple_commands(Block(README, "sh", "", line))[0]
    if is_short and words[:2] in (["python", "train.py"], ["minia3", "train"]):
        words = shortened(words)
    if words[:2] == ["python", "train.py"]:
        return running.run(words[2:])
    if words[:2] == ["minia3", "plot"]:
        return main(["plot", *sorted(map(str, Path("runs").iterdir()))[:N_PLOTTED], *words[3:]])
    if words[0] == "minia3":
        return main(words[1:])
    if words[0] == "python" and ">" not in line:
        return subprocess.run([sys.executable, *words[1:]], timeout=120).returncode
    command = line.replace("python ", f"{sys.executable} ")
    return subprocess.run(["bash", "-c", command], timeout=120).returncode


def shortened(words):
    """Return the words of a run, but with two steps. One that is resumed to go on makes a third."""
    if "--resume" in words:
        return [*words, "--steps", "3"] if "--steps" in words else words
    return [*words, "--steps", "2", "--eval-batch-size", "64", "--device", "cpu"]


@pytest.mark.slow
def test_the_report_in_the_readme_is_what_a_run_prints(folder, capsys):
    """Apart from digits, which depend on the machine."""
    (shown,) = [block for block in blocks_of(README, "text") if "accuracy" in block.text]
    assert running.run(["--steps", "2", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert without_digits(shown.text).strip() in without_digits(printed)


def without_digits(text):
    return re.sub(r"\d[\d.,]*", "#", re.sub(r"(?<= ) +", "", text))


# Python


def run_python(page):
    """Execute the Python of a page from top to bottom. Return the names that it leaves."""
    minia3.save_adapter(load_model("tiny-t5"), ADAPTER)  # what `python train.py` would make
    names = {}
    for block in blocks_of(page, "python"):
        if not block.mark:
            exec(compile(block.text, page.name, "exec"), names)
    return names


def test_only_the_api_page_has_python_that_runs():
    pages = [page for page in PAGES if any(not b.mark for b in blocks_of(page, "python"))]
    assert pages == [API]


def test_the_python_of_the_api_page_runs_and_does_what_it_says(folder, monkeypatch):
    # With a setting of the user, keep_freed_memory leaves the memory of this process as it is.
    monkeypatch.setenv("MALLOC_ARENA_MAX", "8")
    names = run_python(API)
    assert names["scores"].shape == (4, 2)
    assert (Path("same-colour-t5") / "model.safetensors").exists()
    assert type(names["merged"]) is type(names["model"])
    assert list(names["served"]) == []


def test_the_api_page_names_every_public_function():
    text = API.read_text(encoding="utf-8")
    for name in minia3.__all__:
        assert f"minia3.{name}" in text, name
