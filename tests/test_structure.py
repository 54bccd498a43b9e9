"""Imports go one way, importing does nothing, and the contract's names and signatures are there."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import minia3
from minia3.model.llama import Llama
from minia3.model.sequence_state import State
from minia3.model.t5 import T5

ROOT = Path(minia3.__file__).parents[1]
MODULES = sorted((ROOT / "minia3").rglob("*.py"))

# Packages that not everybody has, and that are imported where they are needed.
OPTIONAL = [
    *("gguf", "jinja2", "matplotlib", "tensorboard", "wandb", "mlflow", "rouge_score", "sacrebleu"),
    *("bitsandbytes", "pyarrow", "datasets", "submitit", "transformers", "peft"),
]

# Each folder, and the folders that it may import.
FOLDERS = {
    "model": set(),
    "files": set(),
    "tasks": {"files"},
    "checkpoints": {"model", "files"},
    "inference": {"model", "files", "tasks"},
    "adapters": {"model", "files", "checkpoints"},
    "training": {"model", "files", "tasks", "checkpoints", "inference", "adapters"},
    "cli": {"model", "files", "tasks", "checkpoints", "inference", "adapters", "training"},
}


def imported_folders(tree):
    """Return the folders of minia3 that a file imports, inside of functions, too."""
    folders = set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level > 0:
            folders.add("a relative import")
        elif isinstance(node, ast.ImportFrom) and node.module == "minia3":
            names = [f"minia3.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        for name in names:
            first, _, rest = name.partition(".")
            if first == "minia3" and rest:
                folders.add(rest.partition(".")[0])
            if first == "train":
                folders.add("train.py")
    return folders


def test_every_folder_has_its_place():
    folders = {path.relative_to(ROOT / "minia3").parts[0] for path in MODULES}
    assert folders - {"__init__.py", "__main__.py"} == FOLDERS.keys()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    folder = path.relative_to(ROOT / "minia3").parts[0]
    if folder in FOLDERS:
        found = imported_folders(ast.parse(path.read_text(encoding="utf-8")))
        assert found <= FOLDERS[folder] | {folder, "__version__"}


def test_imports_are_found_wherever_they_stand():
    code = "import os, minia3.files.read\ndef f():\n    from minia3.tasks import x; import train"
    assert imported_folders(ast.parse(code)) == {"files", "tasks", "train.py"}
    assert imported_folders(ast.parse("from . import load")) == {"a relative import"}
    assert imported_folders(ast.parse("from minia3 import files")) == {"files"}


@pytest.mark.slow
def test_importing_needs_no_torch_and_prints_starts_and_writes_nothing(tmp_path):
    """First the public names alone, which need no torch until they are used. Then every module."""
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in MODULES]
    names = [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import minia3
assert "torch" not in sys.modules and "numpy" not in sys.modules
assert sorted(minia3.__all__) == {sorted(PUBLIC)!r}
assert set(minia3.__all__) <= set(dir(minia3))
import {", ".join(f"minia3.{folder}" for folder in FOLDERS)}
assert "torch" not in sys.modules
assert all(callable(getattr(minia3, name)) for name in minia3.__all__)
try:
    minia3.nothing
except AttributeError as error:
    print(error)

import {", ".join(names)}, train, threading
assert threading.active_count() == 1
assert not {set(OPTIONAL)!r} & sys.modules.keys()
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == "module 'minia3' has no attribute 'nothing'\n"
    assert not list(tmp_path.iterdir())


# The contract: DESIGN, section 5


class Contract:
    def train(model=None, task=None, **flags): ...
    def batches(model, tokenizer, task, *, batch_size=8, steps=1000, seed=0, max_length=512): ...
    def prompts_for(model, task): ...
    def choice_logprobs(model, batch, adapter=None): ...
    def total_loss(logp_BCL, mask_BCL, label_B, names=("lm", "ul", "ln"), n_terms=None): ...
    def Adafactor(parameters, lr=3e-3): ...
    def evaluate(model, tokenizer, rows, prompt, *, metric): ...
    def load_model(name_or_path, *, dtype=None, device="cpu", n_adapters=1): ...
    def load_tokenizer(name_or_path): ...
    def load_task(name_or_path, data_dir="data", shots=None, seed=0): ...
    def logprobs(model, state, target): ...
    def generate(
        model, tokenizer, prompts, *, adapter=None, max_new_tokens=..., temperature=0.0
    ): ...
    def stream(model, tokenizer, prompt, *, adapter=None, max_new_tokens=..., temperature=0.0): ...
    def rank(model, tokenizer, prompts, choices, *, adapter=None, length_norm=True): ...
    def vectors(model): ...
    def freeze(model): ...
    def move_to_huge_pages(model): ...
    def merge(model, adapter=0): ...
    def Adapters(model): ...
    def save_adapter(model, folder, adapter=0): ...
    def load_adapter(model, folder_or_file, adapter=0): ...
    def save_model(model, folder, tokenizer=None): ...


class ModelContract:
    def start(self, source, mask=None, adapter=None): ...
    def step(self, tokens, state): ...


class StateContract:
    def repeat(self, c): ...


PUBLIC = [name for name in vars(Contract) if not name.startswith("_")]


def check_signature(function, contract):
    """Check that `function` takes what the contract says, and more only as optional keywords."""
    found_parameters = list(inspect.signature(function).parameters.values())
    expected_parameters = list(inspect.signature(contract).parameters.values())
    assert len(found_parameters) >= len(expected_parameters)
    for found, expected in zip(found_parameters, expected_parameters, strict=False):
        assert (found.name, found.kind) == (expected.name, expected.kind)
        if expected.default is ...:
            assert found.default is not inspect.Parameter.empty
        else:
            assert found.default == expected.default
    for extra in found_parameters[len(expected_parameters) :]:
        assert extra.kind == inspect.Parameter.KEYWORD_ONLY
        assert extra.default is not inspect.Parameter.empty
    assert inspect.getdoc(function)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_function_has_the_contract_s_signature_and_a_docstring(name):
    check_signature(getattr(minia3, name), getattr(Contract, name))


@pytest.mark.parametrize("kind", [T5, Llama])
@pytest.mark.parametrize("name", ["start", "step"])
def test_both_models_have_the_contract_s_methods(kind, name):
    check_signature(getattr(kind, name), getattr(ModelContract, name))


def test_the_state_can_be_repeated():
    check_signature(State.repeat, StateContract.repeat)


@pytest.mark.parametrize("name", PUBLIC)
def test_the_docstring_of_a_public_name_can_be_read_alone(name):
    """`help(minia3.evaluate)` and editors show it without the module around it."""
    text = inspect.getdoc(getattr(minia3, name))
    assert not re.search(r"\b(above|below)\b", text), text


def test_editors_find_the_public_names_where_they_come_from():
    tree = ast.parse(Path(minia3.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    found = {}
    for line in block.body:
        (name,) = line.names
        assert name.asname == name.name  # otherwise it is not public to a type checker
        found[name.name] = line.module
    assert found == minia3._MODULES
