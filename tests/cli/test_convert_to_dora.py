"""`minia3 convert --to dora` finds the base of an adapter, and refuses what is no adapter."""

import json

import pytest
from command_line import failure, output
from conftest import make, randomize

import minia3


def gated_model(folder):
    """Save a small LLaMA, and return it with a random adapter."""
    make("llama-gqa").save_pretrained(folder)
    return randomize(minia3.load_model(folder), 5)


def test_the_command_writes_a_dora_that_we_do_not_take_for_our_own(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = gated_model(tmp_path / "base")
    minia3.save_adapter(model, tmp_path / "ia3")
    (tmp_path / "ia3" / "task.json").write_text("{}")
    assert "converted ia3: dora: 3 files" in output(
        capsys, "convert", "ia3", "dora", "--to", "dora", "--base", "base"
    )
    config = json.loads((tmp_path / "dora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["use_dora"] is True
    assert config["target_modules"] == ["k_proj", "up_proj", "v_proj"]
    assert config["base_model_name_or_path"] == "base"
    assert "use_dora True" in failure(capsys, "merge", "base", "dora", "merged")


@pytest.mark.parametrize("unknown", [None, ""])
def test_the_base_is_the_one_that_the_adapter_names_unless_it_is_given(
    tmp_path, capsys, monkeypatch, unknown
):
    monkeypatch.chdir(tmp_path)
    model = gated_model(tmp_path / "base")
    minia3.save_adapter(model, tmp_path / "ia3")  # which names "base", a folder here
    assert "converted" in output(capsys, "convert", "ia3", "dora", "--to", "dora")
    path = tmp_path / "ia3" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": unknown}))
    message = failure(capsys, "convert", "ia3", "dora2", "--to", "dora")
    assert message == "minia3: ia3 does not say which model it is for: give --base\n"


def test_a_base_that_was_moved_is_to_be_given(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    minia3.save_adapter(gated_model(tmp_path / "base"), tmp_path / "ia3")
    (tmp_path / "base").rename("elsewhere")
    message = failure(capsys, "convert", "ia3", "dora", "--to", "dora")
    assert message.startswith("minia3: the model that ia3 names: base: no such folder")
    assert message.endswith("or give --base\n")


@pytest.mark.parametrize(
    ("kind", "found"),
    [("lora", "as a LoRA, an adapter loses most of itself"), ("dor", "'dor', expected dora")],
)
def test_other_kinds_are_refused(tmp_path, capsys, kind, found):
    assert found in failure(capsys, "convert", "x", tmp_path / "y", "--to", kind)


def test_a_model_is_no_dora(tmp_path, capsys):
    message = failure(capsys, "convert", "tiny-t5", tmp_path / "y", "--to", "dora")
    assert message == "minia3: --to is for an adapter, and tiny-t5 is not one\n"
