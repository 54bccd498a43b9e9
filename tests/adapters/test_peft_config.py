"""Guards the keys of adapter_config.json: for each key of PEFT's configs it is decided whether it
is read, harmless or refused, and a key that nobody knows is a warning.
"""

import json
import warnings

import peft
import pytest
import torch
from conftest import Peer, logits, make, off, tokens

from minia3.adapters.lora import load_lora
from minia3.adapters.peft_config import (
    HARMLESS,
    LORA_HARMLESS,
    LORA_REFUSED,
    READ,
    REFUSED,
    check_ia3_config,
    check_lora_config,
)

IA3 = {"peft_type": "IA3"}
LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


def test_every_key_of_pefts_configs_is_decided_in_one_way():
    # What only newer or older versions write may be here, too.
    ia3 = [*READ, *HARMLESS, *REFUSED]
    lora = [*READ, "r", "lora_alpha", *LORA_HARMLESS, *LORA_REFUSED]
    assert peft.IA3Config().to_dict().keys() <= set(ia3)
    assert peft.LoraConfig().to_dict().keys() <= set(lora)
    for keys in (ia3, lora):
        assert len(keys) == len(set(keys))


def test_pefts_defaults_are_plain():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_ia3_config("x", plain(peft.IA3Config()))
        assert check_lora_config("x", plain(peft.LoraConfig(r=4, lora_alpha=3.5))) == (4, 3.5)


def plain(config):
    """Return what PEFT writes of a config."""
    raw = config.to_dict()
    raw["peft_type"] = str(raw["peft_type"].value)
    return json.loads(json.dumps(raw, default=list))


@pytest.mark.parametrize("key", REFUSED)
def test_a_key_that_changes_an_ia3_adapter_is_refused(key):
    with pytest.raises(ValueError, match=r"^x: expected plain \(IA\)\^3, found .*\['head'\]"):
        check_ia3_config("x", {**IA3, key: ["head"]})


@pytest.mark.parametrize("key", LORA_REFUSED)
@pytest.mark.parametrize("value", ["pissa", 1.5, [[0, 2]], {"x": 1}])
def test_a_key_that_changes_a_lora_is_refused_by_name(key, value):
    with pytest.raises(ValueError, match=f"^x: expected plain LoRA, found {key} "):
        check_lora_config("x", {**LORA, key: value})


def test_the_keys_of_the_first_loras_are_known():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keys = {"enable_lora": None, "merge_weights": False, "fan_in_fan_out": False}
        assert check_lora_config("x", LORA | keys) == (4, 8)


@pytest.mark.parametrize("check", [check_ia3_config, check_lora_config])
def test_a_key_that_nobody_knows_is_a_warning_that_names_it(check):
    raw = {check_ia3_config: IA3, check_lora_config: LORA}[check]
    with pytest.warns(UserWarning, match=r"^x/adapter_config.json .*know: new_feature: if they"):
        check("x", {**raw, "new_feature": 1})


@pytest.mark.parametrize("start", ["gaussian", "orthogonal", "eva"])
def test_a_lora_that_began_with_other_numbers_is_plain(loaded, tmp_path, start):
    """PEFT draws A and B without a look at the weights of the base, which stay as they are."""
    options = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, init_lora_weights=start, target_modules=["q_proj"]
    )
    theirs = peft.get_peft_model(make("qwen2"), options).eval()
    torch.manual_seed(0)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    theirs.save_pretrained(tmp_path)
    model = loaded("qwen2")
    load_lora(model, tmp_path)
    source = tokens(2, 5)
    target = tokens(2, 3, seed=1)
    expected = Peer("qwen2", None, theirs).logits(source, None, target)
    assert off(logits(model, source, None, target), expected) < 1e-5
