"""docs/models.md and docs/adapters.md agree with what `minia3 info --list` prints and PEFT does."""

import re

import pytest
from pages import ROOT

from minia3.cli.main import main

ADAPTERS = ROOT / "docs" / "adapters.md"
MODELS = ROOT / "docs" / "models.md"


def test_the_first_lines_of_the_list_are_shown(capsys):
    assert main(["info", "--list"]) == 0
    printed = capsys.readouterr().out.splitlines()
    (shown,) = re.findall(r"```text\n(name .*?)\n\.\.\.\n```", MODELS.read_text("utf-8"), re.DOTALL)
    lines = shown.splitlines()
    assert len(lines) > 3
    assert lines == printed[: len(lines)]


def test_the_table_of_defaults_is_that_of_peft():
    constants = pytest.importorskip("peft.utils.constants", reason="needs minia3[test]")
    defaults = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    rows = re.findall(r"^\| (`\w+`.*?) \| (.*?) \| `[a-z,]+` \|", ADAPTERS.read_text("utf-8"), re.M)
    compared = set()
    for kinds, modules in rows:
        for kind in re.findall(r"`(\w+)`", kinds):
            shown = re.findall(r"`(\w+)`", modules)
            assert defaults.get(kind, []) == shown, kind
            compared.add(kind)
    assert {"t5", "mt5", "umt5", "llama", "mistral", "qwen2", "qwen3"} <= compared
