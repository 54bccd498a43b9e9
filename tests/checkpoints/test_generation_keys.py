"""Guards generation_config.json: its tokens are used, and what changes them is refused."""

import warnings

import pytest
import torch
from conftest import logits, off, tokens

import minia3
from minia3.checkpoints.generation_keys import (
    NOT_DONE,
    REFUSED,
    STRATEGY,
    USED,
    check_generation_keys,
    generation_settings,
)
from minia3.files.write import write_json


def test_the_start_token_of_generation_config_is_used_if_the_config_names_none(copy):
    folder = copy("t5-v1.0", decoder_start_token_id=None)
    write_json(folder / "generation_config.json", {"decoder_start_token_id": 7})
    state = minia3.load_model(folder).start(tokens(2, 4))
    assert torch.equal(state.start, torch.full((2, 1), 7))


def test_two_files_that_disagree_about_the_start_token_are_refused(copy):
    folder = copy("t5-v1.0")
    write_json(folder / "generation_config.json", {"decoder_start_token_id": 7})
    message = "generation_config.json: decoder_start_token_id is 7, expected the 0 of config.json"
    with pytest.raises(ValueError, match=message):
        minia3.load_model(folder)


def test_a_start_token_that_is_a_list_is_refused(copy):
    folder = copy("t5-v1.0", decoder_start_token_id=None)
    write_json(folder / "generation_config.json", {"decoder_start_token_id": [0, 0]})
    with pytest.raises(ValueError, match=r"decoder_start_token_id is \[0, 0\], expected a whole"):
        minia3.load_model(folder)


@pytest.mark.parametrize("key", REFUSED)
def test_forced_and_forbidden_tokens_are_refused(key):
    for value in REFUSED[key]:
        check_generation_keys({key: value}, "generation_config.json")
    message = rf"^generation_config.json asks for what minia3 does not support: {key}=\[3\]$"
    with pytest.raises(ValueError, match=message):
        generation_settings({key: [3]}, {}, "generation_config.json")


@pytest.mark.parametrize("key", NOT_DONE)
def test_what_generate_cannot_do_is_a_warning(key):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for value in NOT_DONE[key]:
            check_generation_keys({key: value}, "config.json")
    with pytest.warns(UserWarning, match=f"asks for {key}=5.5: generate writes without it"):
        check_generation_keys({key: 5.5}, "config.json")


def test_the_logits_of_a_model_with_a_penalty_for_repetitions_are_the_same(copy, peer):
    folder = copy("t5-v1.0")
    raw = {"repetition_penalty": 1.1, "do_sample": True, "temperature": 0.7}
    write_json(folder / "generation_config.json", raw)
    with pytest.warns(UserWarning, match=r"repetition_penalty=1\.1"):
        model = minia3.load_model(folder)
    source = tokens(2, 5)
    target = tokens(2, 3, seed=1)
    assert (
        off(logits(model, source, None, target), peer("t5-v1.0").logits(source, None, target))
        < 1e-5
    )


def test_every_key_of_transformers_generation_config_is_decided_or_is_about_its_program():
    import transformers

    decided = {*USED, *STRATEGY, *NOT_DONE, *REFUSED}
    others = set(transformers.GenerationConfig().to_dict()) - decided
    about_the_program = (
        *(
            "cache",
            "output",
            "return",
            "assist",
            "prompt_lookup",
            "compile",
            "batching",
            "lookbehind",
        ),
        *("draft", "ngram", "speculation", "_from_model_config", "transformers_version", "use_mtp"),
        *("prefill", "low_memory", "pad_token_id", "bos_token_id"),
    )
    unclear = [key for key in others if not any(part in key for part in about_the_program)]
    assert unclear == []
