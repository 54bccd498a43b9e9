"""A wheel and an editable install train in an environment of their own, and a source distribution
becomes the same wheel.

The wheel learns from the kinds of files that people have, by one command each.
"""

import email
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import chat_model
import pytest
import running

import minia3

pytestmark = pytest.mark.slow
pytest.importorskip("hatchling", reason="builds the package")
pytest.importorskip("hatch_fancy_pypi_readme", reason="builds the package")

FILES = ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "train.py")
ENVIRON = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def call(*command, cwd, code=0):
    """Run a command in an environment without PYTHONPATH. Return the process that has ended."""
    words = list(map(str, command))
    done = subprocess.run(words, cwd=cwd, env=ENVIRON, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def pip(*arguments, cwd):
    call(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, cwd=cwd)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the repository as git has it, so that nothing is built in the repository."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("minia3", "data", "docs", "tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(running.ROOT / name, folder / name, ignore=ignored)
    for name in (*FILES, ".gitignore"):
        shutil.copy(running.ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
    """A folder with the source distribution and the wheel, as pip would ask for them."""
    folder = tmp_path_factory.mktemp("built")
    program = (
        "import sys\n"
        "from hatchling.build import build_sdist, build_wheel\n"
        "build_sdist(sys.argv[1])\n"
        "build_wheel(sys.argv[1])"
    )
    call(sys.executable, "-c", program, folder, cwd=source)
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def sdist(built):
    (path,) = built.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel_of_sdist(sdist, tmp_path_factory):
    """What pip installs if it is given the source distribution."""
    folder = tmp_path_factory.mktemp("wheel-of-sdist")
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", folder, sdist, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


def install(folder, *what):
    """Return the programs of a new environment that has minia3, and the packages of this one.

    The packages of this environment come through a .pth file, whose folders have no .pth files of
    their own: an editable install of minia3 in this environment does not count there.
    """
    venv.create(folder / "env", with_pip=False)
    programs = folder / "env" / "bin"
    (packages,) = (folder / "env").glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    options = ("--no-deps", "--no-build-isolation", "--no-index")
    python = programs / "python"
    command = [sys.executable, "-m", "pip", "--python", python, "install", *options, *what]
    call(*command, cwd=folder)
    return programs


@pytest.fixture(scope="module")
def programs(wheel, tmp_path_factory):
    """The programs of an environment that has the wheel."""
    return install(tmp_path_factory.mktemp("installed"), wheel)


def make_elsewhere(folder):
    """Return a folder with a train.py and a data/ of its own."""
    elsewhere = folder / "elsewhere"
    (elsewhere / "data").mkdir(parents=True)
    (elsewhere / "train.py").write_text("raise SystemExit('the train.py of a user')")
    return elsewhere


def train_somewhere(programs, elsewhere):
    """Train from a folder. Return the folder of the run."""
    words = ["--steps", "2", "--eval-batch-size", "64", "--device", "cpu"]
    done = call(programs / "minia3", "train", *words, cwd=elsewhere)
    assert done.stderr == ""
    assert "same-colour: 1024 rows of test" in done.stdout
    run = elsewhere / "runs" / "tiny-t5-same-colour-ia3-0"
    assert (run / "adapter" / "adapter_model.safetensors").exists()
    assert json.loads((run / "config.json").read_text())["git_commit"] is None
    assert running.metrics(run)[-1]["total"] == 218_112
    return run


def call_train(programs, folder, *resumed):
    """Call minia3.train from Python in a folder, and then resume runs on the command line.

    Return the package's folder, its train.py, and what it printed before it told these two.
    """
    program = (
        "import sys, minia3\n"
        "from minia3.cli.main import main\n"
        "from minia3.training.loop import load_loop\n"
        "options = {'method': 'none', 'out': 'x', 'eval_batch_size': 64, 'device': 'cpu'}\n"
        "trained = minia3.train(steps=1, **options)\n"
        "assert trained.results[0]['task'] == 'same-colour'\n"
        "for folder in sys.argv[1:]:\n"
        "    assert main(['train', '--resume', folder]) == 0\n"
        "print(minia3.__file__)\n"
        "print(load_loop().__file__)"
    )
    printed = call(programs / "python", "-c", program, *resumed, cwd=folder).stdout
    *lines, package, script = printed.splitlines()
    assert json.loads((folder / "x" / "config.json").read_text())["git_commit"] is None
    return Path(package).parent, Path(script), lines


def test_a_wheel_trains_from_any_folder(programs, tmp_path):
    elsewhere = make_elsewhere(tmp_path)
    run = train_somewhere(programs, elsewhere)
    package, script, lines = call_train(programs, elsewhere, run)
    command = f"minia3 train --resume {running.quoted(run)} --steps 4"
    assert lines[-1].endswith(f"to train longer: {command}")
    assert package.is_relative_to(programs.parent)
    # What a clone has once, a wheel has once, too.
    assert script == package / "shipped" / "train.py"
    assert script.read_text() == (running.ROOT / "train.py").read_text()
    assert not (package.parent / "train.py").exists()
    assert not (package.parent / "data").exists()


def test_an_editable_install_trains_from_any_folder_with_the_train_py_beside_it(source, tmp_path):
    programs = install(tmp_path, "--editable", source)
    elsewhere = make_elsewhere(tmp_path)
    package, script, lines = call_train(programs, elsewhere)
    assert (package, script) == (source / "minia3", source / "train.py")
    assert any("same-colour: 1024 rows of test" in line for line in lines)
    assert call(programs / "minia3", "train", "--help", cwd=elsewhere).stdout.startswith("usage: ")


# The files that people have: one command trains, and one labels or answers new rows


END = "(end of the command)\n"
IN_TURN = f"""
import json, sys
from minia3.cli.main import main

for words in json.loads(sys.argv[1]):
    assert main(words) == 0
    print({END!r}, end="", flush=True)
"""


def training(file, *flags):
    """Return the words that train on a file of a folder that has nothing of ours."""
    return ["train", "--task", file, *flags, "--out", run_of(file), "--device", "cpu"]


def prediction(file, new):
    """Return the words that label or answer new rows, which have only inputs."""
    return ["predict", "tiny-t5", new, "--adapter", f"{run_of(file)}/adapter"]


def run_of(file):
    """Return the folder of the run that is trained on a file."""
    return f"run-of-{Path(file).stem}"


def read_lines(text):
    return [json.loads(line) for line in text.splitlines()]


PRAISE = ["fine", "great", "lovely", "nice"]
BLAME = ["bad", "dull", "awful", "sad"]
OPPOSITES = {"hot": "cold", "big": "small", "yes": "no", "in": "out"}
CAPITALS = {
    "Capital of France?": "Paris",
    "Capital of Germany?": "Berlin",
    "Capital of Italy?": "Rome",
    "Capital of Spain?": "Madrid",
}


def write_csv(folder):
    lines = ["text,label"]
    for good, bad in zip(PRAISE * 5, BLAME * 5, strict=True):
        lines += [f"the film was {good},positive", f"the film was {bad},negative"]
    (folder / "reviews.csv").write_text("\n".join(lines))
    (folder / "new.csv").write_text("text\nthe film was dull\nthe film was nice\n")


def write_alpaca(folder):
    asked = [{"instruction": "Say the opposite.", "input": word} for word in OPPOSITES]
    answered = [row | {"output": OPPOSITES[row["input"]]} for row in asked]
    (folder / "alpaca.json").write_text(json.dumps(answered * 6, indent=2))
    (folder / "new.json").write_text(json.dumps(asked))


def write_parquet(folder):
    import pyarrow
    from pyarrow import parquet

    first = [f"the film was {word}" for word in (*PRAISE, *BLAME)]
    columns = {"sentence1": first * 5, "sentence2": ["was it good"] * 40}
    labels = ([True] * 4 + [False] * 4) * 5
    parquet.write_table(pyarrow.table(columns | {"label": labels}), folder / "pairs.parquet")
    parquet.write_table(pyarrow.table(columns).slice(2, 4), folder / "new.parquet")


def write_conversations(folder):
    chat_model.save(folder / "small-llama")
    lines = []
    for question, answer in CAPITALS.items():
        asked = {"role": "user", "content": question}
        answered = {"role": "assistant", "content": answer}
        lines.append(json.dumps({"messages": [asked, answered]}) + "\n")
    (folder / "capitals.jsonl").write_text("".join(lines * 5))


WRITERS = {
    "reviews.csv": write_csv,
    "alpaca.json": write_alpaca,
    "pairs.parquet": write_parquet,
    "capitals.jsonl": write_conversations,
}
PACKAGES = {"pairs.parquet": "pyarrow", "capitals.jsonl": "jinja2"}  # that a kind of file needs
KINDS = [kind for kind in WRITERS if find_spec(PACKAGES.get(kind, "minia3"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the files of all kinds, where the commands run."""
    folder = tmp_path_factory.mktemp("files")
    for kind in KINDS:
        WRITERS[kind](folder)
    return folder


COMMANDS = {
    "reviews.csv": (
        training("reviews.csv", "--steps", "45", "--lr", "3e-2"),
        prediction("reviews.csv", "new.csv"),
    ),
    "alpaca.json": (
        training("alpaca.json", "--steps", "100", "--lr", "1e-1"),
        prediction("alpaca.json", "new.json"),
    ),
    "pairs.parquet": (
        training("pairs.parquet", "--steps", "60", "--lr", "3e-2"),
        prediction("pairs.parquet", "new.parquet"),
    ),
    "capitals.jsonl": (
        training("capitals.jsonl", "--model", "small-llama", "--steps", "75", "--lr", "3e-1"),
        ["generate", "small-llama", "--chat", "--adapter", "run-of-capitals/adapter", *CAPITALS],
    ),
}


@pytest.fixture(scope="module")
def printed(programs, folder):
    """A dict from each file to what the command that trains on it prints, and the one after it.

    They run in turn, in one process: it takes longer to import torch than to do what they do.
    """
    commands = list(itertools.chain(*[COMMANDS[kind] for kind in KINDS]))
    done = call(programs / "python", "-c", IN_TURN, json.dumps(commands), cwd=folder)
    assert done.stderr == ""
    texts = done.stdout.split(END)[:-1]
    return dict(zip(KINDS, zip(texts[::2], texts[1::2], strict=True), strict=True))


def test_a_csv_of_texts_and_words_as_labels(folder, printed):
    report, answers = printed["reviews.csv"]
    assert "columns  reads text, picks label among positive, negative\n" in report
    last = "use it      minia3 predict tiny-t5 new.csv --adapter run-of-reviews/adapter\n"
    assert last in report
    assert [row["choice"] for row in read_lines(answers)] == ["negative", "positive"]
    (final,) = running.events(folder / "run-of-reviews", "final")
    assert final["steps"] == 45


def test_an_alpaca_file(printed):
    report, answers = printed["alpaca.json"]
    assert "columns  reads instruction and input, writes output\n" in report
    assert [row["output"] for row in read_lines(answers)] == list(OPPOSITES.values())


@pytest.mark.skipif("pairs.parquet" not in KINDS, reason="needs pyarrow")
def test_a_parquet_file(printed):
    report, answers = printed["pairs.parquet"]
    assert "columns  reads sentence1 and sentence2, picks label among " in report
    choices = [row["choice"] for row in read_lines(answers)]
    assert choices == ["true", "true", "false", "false"]


@pytest.mark.skipif("capitals.jsonl" not in KINDS, reason="needs jinja2")
def test_a_file_of_conversations(folder, printed):
    report, answers = printed["capitals.jsonl"]
    assert "columns  reads messages, writes what the assistant says\n" in report
    last = "use it      minia3 generate small-llama --chat --adapter run-of-capitals/adapter\n"
    assert last in report
    assert answers.splitlines() == list(CAPITALS.values())
    adapter = folder / "run-of-capitals" / "adapter"
    for question, answer in CAPITALS.items():
        assert chat_model.answer(folder / "small-llama", adapter, question) == answer


def contents_of(wheel):
    """Return the bytes of each file of a wheel, by name."""
    archive = zipfile.ZipFile(wheel)
    return {name: archive.read(name) for name in archive.namelist()}


def test_a_source_distribution_becomes_the_same_wheel(wheel, wheel_of_sdist):
    contents = contents_of(wheel)
    assert contents_of(wheel_of_sdist) == contents
    names = contents.keys()
    modules = {str(p.relative_to(running.ROOT)) for p in (running.ROOT / "minia3").rglob("*.py")}
    assert modules <= names
    assert "minia3/tasks/tasks.json" in names


def test_the_long_description_has_no_links_that_lead_nowhere(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Name"] == "minia3"
    assert metadata["Version"] == minia3.__version__
    assert metadata["Description-Content-Type"] == "text/markdown"
    text = metadata.get_payload()
    assert text.startswith("# minia3\n\n`pip install minia3`")
    targets = re.findall(r"\]\(([^)]*)\)|\]\[|(?:src|href)=", text)
    assert [target for target in targets if not target.startswith(("https://", "http://"))] == []
    assert "walkthrough" in text  # the text of a link stays
    assert "![" not in text
