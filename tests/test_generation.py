"""Guards scoring and decoding: log-probabilities, ranks and greedy texts equal transformers' for single rows, whatever
the batch; adapters go by row; sampling follows the softmax; mistakes are named."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers
from words import N_IDS, PAD, texts, word_tokenizer

import minia3
from minia3.data import Example, collate
from minia3.generation import choice_logprobs
from minia3.tokenizer import Tokenizer

INF = float("inf")
EOS = (1, 16, 28)  # </s>, and two ordinary words


@pytest.fixture(scope="module", params=["t5-v1.1", "llama-gqa"])
def both(request, peer, loaded):
    """A model of transformers, ours with three adapters (row 0 is ones) and several end tokens, and a tokenizer."""
    t5 = request.param.startswith("t5")
    model = loaded(request.param, n_adapters=3, seed=0)
    model.config = replace(model.config, eos_ids=EOS)
    for vector in minia3.vectors(model).values():
        vector.data[0] = 1.0
    return SimpleNamespace(
        name=request.param, t5=t5, peer=peer(request.param), model=model, tokenizer=word_tokenizer(t5)
    )


PROMPTS = texts(11)
CHOICES = texts(4, seed=1, longest=3)
LISTS = [texts(1 + i % 4, seed=i, longest=3) for i in range(len(PROMPTS))]
ADAPTERS = torch.tensor([0, 2, 1, 1, 0, 2, 2, 0, 1, 0, 2])


def peer_logprobs(both, source, target):
    """log p of each of `target`'s ids behind `source`, both lists, by transformers."""
    logits = both.peer.logits(torch.tensor([source]), None, torch.tensor([target]))[0, :-1]
    return logits.log_softmax(-1)[torch.arange(len(target)), target]


def peer_score(both, prompt, choice, length_norm=True):
    """Encoded here by the contract's words: T5's choices end in </s>, LLaMA's have no end."""
    source, target = ([int(word[1:]) for word in text.split()] for text in (prompt, choice))
    if both.t5:
        source, target = [*source, 1], [*target, 1]
    logp = peer_logprobs(both, source, target)
    return (logp.mean() if length_norm else logp.sum()).item()


def peer_text(both, prompt, n):
    """transformers' greedy text behind one prompt, up to any of the end tokens; and whether it came to one."""
    source = torch.tensor([both.tokenizer.encode(prompt)])
    ids = both.peer.model.generate(source, do_sample=False, max_new_tokens=n, eos_token_id=list(EOS), pad_token_id=PAD)
    ids = ids[0, 1 if both.t5 else source.shape[1] :].tolist()
    end = next((i for i, token in enumerate(ids) if token in EOS), len(ids))
    return both.tokenizer.decode(ids[:end]), end < len(ids)


# Log-probabilities


def test_log_probabilities_are_transformers_and_move_the_state(both):
    source, target = tokens(3, 6), tokens(3, 5, seed=1)
    state = both.model.start(source)
    found = minia3.logprobs(both.model, state, target)
    expected = [peer_logprobs(both, s.tolist(), t.tolist()) for s, t in zip(source, target, strict=True)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-4)
    # The state has read all of the target but its last token.
    logits = both.model.step(target[:, -1:], state)[:, -1]
    torch.testing.assert_close(logits, both.peer.logits(source, None, target)[:, -1], rtol=1e-5, atol=1e-4)


def test_log_probabilities_are_float32_where_the_model_is_bfloat16_and_float64_where_it_is_that(both, loaded):
    source, target = tokens(2, 6), tokens(2, 3, seed=1)
    for dtype, expected in {torch.bfloat16: torch.float32, torch.float64: torch.float64}.items():
        model = loaded(both.name, dtype=dtype)
        found = minia3.logprobs(model, model.start(source), target)
        state = model.start(source)
        logits = model.step(torch.cat((state.start, target[:, :-1]), dim=1), state)
        assert (logits.dtype, found.dtype) == (dtype, expected)
        assert torch.equal(found, logits.to(expected).log_softmax(-1).gather(-1, target[..., None])[..., 0])


def test_log_probabilities_carry_gradients_to_the_vectors_of_the_row_s_adapter(both):
    both.model.zero_grad()
    minia3.logprobs(both.model, both.model.start(tokens(1, 6), adapter=2), tokens(1, 3, seed=1)).sum().backward()
    for name, vector in minia3.vectors(both.model).items():
        assert vector.grad[2].any(), name
        assert not vector.grad[:2].any(), name


def test_every_choice_s_log_probabilities_come_from_one_reading_of_the_source(both, monkeypatch):
    examples = [Example([5, 6, 7], [[8], [9, 10]], 0), Example([11], [[12, 13, 14]], 0)]
    reads, start = [], both.model.start
    monkeypatch.setattr(both.model, "start", lambda *arguments: reads.append(len(arguments[0])) or start(*arguments))
    found = choice_logprobs(both.model, collate(examples, PAD))
    assert reads == [2]
    for row, example in enumerate(examples):
        for c, target in enumerate(example.targets):
            expected = peer_logprobs(both, example.source, target)
            torch.testing.assert_close(found[row, c, : len(target)], expected, rtol=1e-5, atol=1e-4)


# Rank


@pytest.mark.parametrize("length_norm", [True, False])
def test_one_list_of_choices_is_ranked_as_transformers_scores_each_pair_alone(both, length_norm):
    found = minia3.rank(both.model, both.tokenizer, PROMPTS, CHOICES, length_norm=length_norm)
    expected = [[peer_score(both, prompt, choice, length_norm) for choice in CHOICES] for prompt in PROMPTS]
    assert found.dtype == torch.float32
    assert not found.requires_grad
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_a_list_of_choices_each_is_ranked_the_same_in_batches_of_any_size_and_what_is_missing_is_minus_infinity(
    both, batch_size
):
    found = minia3.rank(both.model, both.tokenizer, PROMPTS, LISTS, batch_size=batch_size)
    expected = torch.full((len(PROMPTS), 4), -INF)
    for row, (prompt, choices) in enumerate(zip(PROMPTS, LISTS, strict=True)):
        expected[row, : len(choices)] = torch.tensor([peer_score(both, prompt, choice) for choice in choices])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_a_mixed_batch_ranks_each_row_as_its_own_adapter_alone_does(both, batch_size):
    mixed = minia3.rank(both.model, both.tokenizer, PROMPTS, LISTS, adapter=ADAPTERS, batch_size=batch_size)
    as_list = minia3.rank(both.model, both.tokenizer, PROMPTS, LISTS, adapter=ADAPTERS.tolist(), batch_size=batch_size)
    assert torch.equal(mixed, as_list)
    base = minia3.rank(both.model, both.tokenizer, PROMPTS, LISTS)
    for row, adapter in enumerate(ADAPTERS.tolist()):
        alone = minia3.rank(both.model, both.tokenizer, PROMPTS[row : row + 1], LISTS[row], adapter=adapter)
        torch.testing.assert_close(mixed[row, : alone.shape[1]], alone[0], rtol=1e-5, atol=1e-4)
        same = torch.allclose(alone[0], base[row, : alone.shape[1]], atol=1e-3)
        assert same == (adapter == 0)


def test_rank_names_what_is_wrong_with_its_lists(both):
    def rank(prompts, choices, **options):
        return minia3.rank(both.model, both.tokenizer, prompts, choices, **options)

    for prompts in ([], "w4 w5"):
        with pytest.raises(ValueError, match="expected a list of prompts"):
            rank(prompts, ["w4"])
    for choices in ([], "w4", [["w4"]], [["w4"], []], [["w4"], "w5"], [["w4"], ["w5"], ["w6"]]):
        with pytest.raises(ValueError, match="expected one list of choices for all of the 2 prompts, or one for each"):
            rank(["w4", "w5"], choices)
    with pytest.raises(ValueError, match="an adapter for each of 2 rows, found 3"):
        rank(["w4", "w5"], ["w6"], adapter=torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="rows 0 to 2"):
        rank(["w4", "w5"], ["w6"], adapter=[0, 3])


def test_prompts_and_choices_without_tokens_are_named(both):
    tokenizer = word_tokenizer(ends=False)  # adds nothing to an empty text
    with pytest.raises(ValueError, match=r"prompts \[1, 2\] have no tokens"):
        minia3.generate(both.model, tokenizer, ["w4", "", " "])
    for prompts, choices in ((["w4", ""], ["w5"]), (["w4"], ["w5", ""])):
        with pytest.raises(ValueError, match="no tokens"):
            minia3.rank(both.model, tokenizer, prompts, choices)


def byte_tokenizer():
    """Byte-level BPE with <s> in front, as Llama 3's."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["Is it true or false ? It is true . The answer is False , not True ."] * 2, trainer)
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True})


BYTES, TEXT = byte_tokenizer(), st.text(min_size=1, max_size=12) | st.sampled_from(["True", " True", "not True", "?"])


@settings(deadline=None, max_examples=60)
@given(TEXT.map(str.rstrip).filter(bool), TEXT)
def test_prompt_and_choice_encoded_apart_are_the_joined_text_encoded(prompt, choice):
    joined = BYTES.encode(f"{prompt} {choice.removeprefix(' ')}")
    assert BYTES.encode(prompt) + BYTES.encode_target(choice, end=False) == joined


# Greedy


def test_greedy_texts_are_transformers_for_prompts_of_different_lengths_in_one_batch(both):
    n = 12
    prompts = [*PROMPTS, *texts(20, seed=2)]
    expected, ended = zip(*(peer_text(both, prompt, n) for prompt in prompts), strict=True)
    assert any(ended)
    assert not all(ended)
    assert len(set(expected)) > 5
    for batch_size in (1, 7, 64):
        found = minia3.generate(both.model, both.tokenizer, prompts, max_new_tokens=n, batch_size=batch_size)
        assert found == list(expected)
    for n in (1, 5):
        found = minia3.generate(both.model, both.tokenizer, prompts, max_new_tokens=n)
        assert found == [peer_text(both, prompt, n)[0] for prompt in prompts]


def test_a_mixed_batch_writes_for_each_row_what_its_own_adapter_alone_does(both):
    mixed = minia3.generate(both.model, both.tokenizer, PROMPTS, adapter=ADAPTERS, max_new_tokens=8, batch_size=4)
    rows = zip(PROMPTS, ADAPTERS.tolist(), strict=True)
    alone = [minia3.generate(both.model, both.tokenizer, [p], adapter=a, max_new_tokens=8)[0] for p, a in rows]
    assert mixed == alone
    base = minia3.generate(both.model, both.tokenizer, PROMPTS, max_new_tokens=8)
    changed = [a != b for a, b in zip(mixed, base, strict=True)]
    assert any(changed)
    assert not any(changed[i] for i in range(len(PROMPTS)) if ADAPTERS[i] == 0)


def test_decoding_reads_the_longest_prompts_first_and_stops_when_all_rows_of_a_batch_have_ended(both, monkeypatch):
    ends = next(prompt for prompt in texts(40, seed=2) if peer_text(both, prompt, 5)[1])
    lengths, steps, start, step = [], [], both.model.start, both.model.step
    monkeypatch.setattr(both.model, "start", lambda x, *rest: lengths.append(x.shape[1]) or start(x, *rest))
    monkeypatch.setattr(both.model, "step", lambda *arguments: steps.append(1) or step(*arguments))
    minia3.generate(both.model, both.tokenizer, [ends], max_new_tokens=100)
    assert len(steps) <= 5
    minia3.generate(both.model, both.tokenizer, PROMPTS, max_new_tokens=1, batch_size=3)
    assert lengths[1:] == sorted(lengths[1:], reverse=True) != sorted(lengths[1:])


# Sampling


def test_sampled_tokens_follow_the_softmax_at_that_temperature(both):
    n, temperature = 10_000, 0.5
    torch.manual_seed(0)
    found = minia3.generate(
        both.model, both.tokenizer, [PROMPTS[5]] * n, max_new_tokens=1, temperature=temperature, batch_size=n
    )
    start = both.model.start(torch.tensor([both.tokenizer.encode(PROMPTS[5])]))
    logits = both.model.step(start.start, start)[0, -1].detach()
    expected = (logits / temperature).softmax(-1)
    words = ["" if i in (PAD, *EOS) else both.tokenizer.decode([i]) for i in range(N_IDS)]
    # Hoeffding: each of 61 frequencies is off by more than 0.03 with a chance of at most 2 exp(-2 n 0.03^2) = 3e-8: the
    # chance that right code fails under a seed is below 2e-6.
    bound = 0.03
    for word in set(words):
        p = sum(expected[i].item() for i in range(N_IDS) if words[i] == word)
        assert abs(found.count(word) / n - p) < bound, word
    for wrong in (1.0, 1 / temperature):  # would be seen
        assert ((logits / wrong).softmax(-1) - expected).abs().max() > 2 * bound


def test_sampling_is_torch_s_generator_s_and_differs_by_row_and_call(both):
    def sample():
        return minia3.generate(both.model, both.tokenizer, PROMPTS[:1] * 20, max_new_tokens=6, temperature=1.0)

    torch.manual_seed(3)
    first, second = sample(), sample()
    torch.manual_seed(3)
    assert sample() == first
    assert first != second
    assert len(set(first)) > 3


# The border


def test_no_prompts_give_no_texts(both):
    assert minia3.generate(both.model, both.tokenizer, []) == []


def test_generate_names_what_is_wrong_with_its_arguments(both):
    for prompts, options in (
        ("w4 w5", {}),
        (["w4"], {"temperature": -1.0}),
        (["w4"], {"max_new_tokens": 0}),
    ):
        with pytest.raises(ValueError, match="expected a list of prompts, temperature >= 0 and max_new_tokens >= 1"):
            minia3.generate(both.model, both.tokenizer, prompts, **options)
    with pytest.raises(ValueError, match="an adapter for each of 1 rows, found 2"):
        minia3.generate(both.model, both.tokenizer, ["w4"], adapter=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="rows 0 to 2"):
        minia3.generate(both.model, both.tokenizer, ["w4"], adapter=3)
