"""docs/adapters.md agrees with PEFT."""

import re

import pytest
from pages import ROOT

ADAPTERS = ROOT / "docs" / "adapters.md"


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
