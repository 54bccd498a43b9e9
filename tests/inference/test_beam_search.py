"""Guards beam search. All beams equal the beams of transformers, in order, whatever the batch. A
search that is over costs nothing."""

from dataclasses import replace

import pytest
import torch
from conftest import LLAMA_PEERS, T5_PEERS
from conftest import tokens as random_tokens
from word_models import (
    ADAPTERS,
    EOS,
    KINDS,
    PROMPTS,
    adapters_of_steps,
    model_of_many,
    new_ids,
    word_model,
)
from words import PAD

from minia3.inference.beam_search import beam_search
from minia3.inference.decoding import decode_tokens, generate


@pytest.fixture(scope="module", params=KINDS)
def both(request, peer, loaded):
    return word_model(request.param, peer, loaded)


@pytest.fixture(scope="module", params=KINDS)
def many(request, loaded):
    return model_of_many(request.param, loaded)


# transformers 5.24's cache has as many layers as the encoder. It fails on a deeper decoder, and a
# beam search does even without use_cache.
BEAM_PEERS = [name for name in (*T5_PEERS, *LLAMA_PEERS) if name != "t5-deep-decoder"]


@pytest.mark.parametrize("name", BEAM_PEERS)
def test_all_beams_equal_the_beams_of_transformers_in_order(peer, loaded, name):
    model = loaded(name)
    theirs = peer(name).model
    model.config = replace(model.config, eos_ids=EOS)
    source = random_tokens(3, 6)
    lengths = set()
    for beams, n, penalty in ((2, 12, 1.0), (4, 12, 2.0), (3, 1, 0.0), (5, 9, -1.0), (3, 15, 0.6)):
        options = {
            "num_beams": beams,
            "num_return_sequences": beams,
            "length_penalty": penalty,
            "max_new_tokens": n,
            "do_sample": False,
            "early_stopping": False,
            "eos_token_id": list(EOS),
            "pad_token_id": PAD,
        }
        found = new_ids(theirs.generate(source, **options), theirs, source)
        expected = [found[i : i + beams] for i in range(0, len(found), beams)]
        assert beam_search(model, model.start(source), beams, n, penalty) == expected
        for texts in expected:
            lengths.update(len(ids) for ids in texts)
    assert len(lengths) > 3  # some end before the last step


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_beams_in_a_batch_of_several_adapters_equal_each_row_alone_and_the_best_are_samples(
    both, batch_size
):
    options = {"max_new_tokens": 8, "beams": 3, "length_penalty": 0.5, "samples": 2}
    mixed = generate(
        both.model, both.tokenizer, PROMPTS, adapter=ADAPTERS, batch_size=batch_size, **options
    )
    alone = []
    for prompt, adapter in zip(PROMPTS, ADAPTERS.tolist(), strict=True):
        state = both.model.start(torch.tensor([both.tokenizer.encode(prompt)]), adapter=adapter)
        (beams,) = beam_search(both.model, state, 3, 8, 0.5)
        alone += [both.tokenizer.decode(ids) for ids in beams[:2]]
    assert mixed == alone
    assert len(set(mixed)) > len(PROMPTS)
    assert generate(both.model, both.tokenizer, PROMPTS, **options | {"samples": 1}) != mixed[::2]


def test_one_beam_is_greedy(both):
    for row in random_tokens(9, 5).split(1):
        ((found,),) = beam_search(both.model, both.model.start(row), 1, 9)
        greedy = decode_tokens(both.model, both.model.start(row), 9, set())
        assert found == [token for _, token in greedy]


def test_a_search_leaves_its_state_as_it_was(both):
    state = both.model.start(random_tokens(3, 5))
    expected = beam_search(both.model, state, 2, 6)
    assert state.length == both.model.start(random_tokens(3, 5)).length
    assert beam_search(both.model, state, 2, 6) == expected


def test_a_search_that_is_over_is_in_no_later_step(many, monkeypatch):
    steps = adapters_of_steps(many, monkeypatch)
    source = random_tokens(40, 4)
    together = beam_search(many, many.start(source, adapter=torch.arange(40)), 2, 8)
    n_steps = [sum(row in adapters for adapters in steps) for row in range(40)]
    for row in range(40):
        steps.clear()
        (alone,) = beam_search(many, many.start(source[row : row + 1], adapter=row), 2, 8)
        assert alone == together[row]
        assert len(steps) == n_steps[row]
    assert len(set(n_steps)) > 2
