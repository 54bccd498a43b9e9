"""Guards scoring and generation: log-probabilities, ranks, greedy and beam ids equal transformers' for single rows,
whatever the batch, its adapters and its padding; what is drawn follows the distribution, and depends on the seed alone;
a row that is done costs nothing; pieces join to the text; mistakes are named."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import LLAMA_PEERS, T5_PEERS
from conftest import tokens as random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from words import N_IDS, PAD, texts, word_tokenizer

import minia3
from minia3.checkpoints.tokenizer import Tokenizer
from minia3.inference.beam_search import beam_search
from minia3.inference.decoding import Text, decode_tokens, draw_tokens, generate, stream
from minia3.inference.scoring import choice_logprobs
from minia3.tasks.batches import collate
from minia3.tasks.examples import Example

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
        name=request.param,
        t5=t5,
        peer=peer(request.param),
        model=model,
        tokenizer=word_tokenizer(t5),
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
    ids = both.peer.model.generate(
        source, do_sample=False, max_new_tokens=n, eos_token_id=list(EOS), pad_token_id=PAD
    )
    ids = ids[0, 1 if both.t5 else source.shape[1] :].tolist()
    end = next((i for i, token in enumerate(ids) if token in EOS), len(ids))
    return both.tokenizer.decode(ids[:end]), end < len(ids)


# Log-probabilities


def test_log_probabilities_are_transformers_and_move_the_state(both):
    source, target = random_tokens(3, 6), random_tokens(3, 5, seed=1)
    state = both.model.start(source)
    found = minia3.logprobs(both.model, state, target)
    expected = [
        peer_logprobs(both, s.tolist(), t.tolist()) for s, t in zip(source, target, strict=True)
    ]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-4)
    # The state has read all of the target but its last token.
    logits = both.model.step(target[:, -1:], state)[:, -1]
    torch.testing.assert_close(
        logits, both.peer.logits(source, None, target)[:, -1], rtol=1e-5, atol=1e-4
    )


def test_log_probabilities_are_float32_where_the_model_is_bfloat16_and_float64_where_it_is_that(
    both, loaded
):
    source, target = random_tokens(2, 6), random_tokens(2, 3, seed=1)
    for dtype, expected in {torch.bfloat16: torch.float32, torch.float64: torch.float64}.items():
        model = loaded(both.name, dtype=dtype)
        found = minia3.logprobs(model, model.start(source), target)
        state = model.start(source)
        logits = model.step(torch.cat((state.start, target[:, :-1]), dim=1), state)
        assert (logits.dtype, found.dtype) == (dtype, expected)
        assert torch.equal(
            found, logits.to(expected).log_softmax(-1).gather(-1, target[..., None])[..., 0]
        )


def test_log_probabilities_carry_gradients_to_the_vectors_of_the_row_s_adapter(both):
    both.model.zero_grad()
    minia3.logprobs(
        both.model, both.model.start(random_tokens(1, 6), adapter=2), random_tokens(1, 3, seed=1)
    ).sum().backward()
    for name, vector in minia3.vectors(both.model).items():
        assert vector.grad[2].any(), name
        assert not vector.grad[:2].any(), name


def test_every_choice_s_log_probabilities_come_from_one_reading_of_the_source(both, monkeypatch):
    examples = [Example([5, 6, 7], [[8], [9, 10]], 0), Example([11], [[12, 13, 14]], 0)]
    reads, start = [], both.model.start
    monkeypatch.setattr(
        both.model, "start", lambda *arguments: reads.append(len(arguments[0])) or start(*arguments)
    )
    found = choice_logprobs(both.model, collate(examples))
    assert reads == [2]
    for row, example in enumerate(examples):
        for c, target in enumerate(example.targets):
            expected = peer_logprobs(both, example.source, target)
            torch.testing.assert_close(found[row, c, : len(target)], expected, rtol=1e-5, atol=1e-4)


# Rank


@pytest.mark.parametrize("length_norm", [True, False])
def test_one_list_of_choices_is_ranked_as_transformers_scores_each_pair_alone(both, length_norm):
    found = minia3.rank(both.model, both.tokenizer, PROMPTS, CHOICES, length_norm=length_norm)
    expected = [
        [peer_score(both, prompt, choice, length_norm) for choice in CHOICES] for prompt in PROMPTS
    ]
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
        expected[row, : len(choices)] = torch.tensor(
            [peer_score(both, prompt, choice) for choice in choices]
        )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_a_mixed_batch_ranks_each_row_as_its_own_adapter_alone_does(both, batch_size):
    mixed = minia3.rank(
        both.model, both.tokenizer, PROMPTS, LISTS, adapter=ADAPTERS, batch_size=batch_size
    )
    as_list = minia3.rank(
        both.model, both.tokenizer, PROMPTS, LISTS, adapter=ADAPTERS.tolist(), batch_size=batch_size
    )
    assert torch.equal(mixed, as_list)
    base = minia3.rank(both.model, both.tokenizer, PROMPTS, LISTS)
    for row, adapter in enumerate(ADAPTERS.tolist()):
        alone = minia3.rank(
            both.model, both.tokenizer, PROMPTS[row : row + 1], LISTS[row], adapter=adapter
        )
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
        with pytest.raises(
            ValueError,
            match="expected one list of choices, none empty, for all of 2 prompts or for each",
        ):
            rank(["w4", "w5"], choices)
    with pytest.raises(ValueError, match="an adapter for each of 2 rows, found 3"):
        rank(["w4", "w5"], ["w6"], adapter=torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="rows 0 to 2"):
        rank(["w4", "w5"], ["w6"], adapter=[0, 3])


def test_prompts_and_choices_without_tokens_are_named(both):
    tokenizer = word_tokenizer(ends=False)  # adds nothing to an empty text
    with pytest.raises(ValueError, match=r"prompts \[1, 2\] have no tokens"):
        minia3.generate(both.model, tokenizer, ["w4", "", " "])
    for prompts, choices, named in ((["w4", "", "w5"], ["w5"], 1), (["w4"], ["w5", ""], 0)):
        with pytest.raises(
            ValueError, match=rf"prompts \[{named}\] have no tokens, or a choice of none"
        ):
            minia3.rank(both.model, tokenizer, prompts, choices, batch_size=1)


def byte_tokenizer():
    """Byte-level BPE with <s> in front, as Llama 3's."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(
        ["Is it true or false ? It is true . The answer is False , not True ."] * 2, trainer
    )
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True})


BYTES, TEXT = (
    byte_tokenizer(),
    st.text(min_size=1, max_size=12) | st.sampled_from(["True", " True", "not True", "?"]),
)


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
        found = minia3.generate(
            both.model, both.tokenizer, prompts, max_new_tokens=n, batch_size=batch_size
        )
        assert found == list(expected)
    for n in (1, 5):
        found = minia3.generate(both.model, both.tokenizer, prompts, max_new_tokens=n)
        assert found == [peer_text(both, prompt, n)[0] for prompt in prompts]


def test_a_mixed_batch_writes_for_each_row_what_its_own_adapter_alone_does(both):
    mixed = minia3.generate(
        both.model, both.tokenizer, PROMPTS, adapter=ADAPTERS, max_new_tokens=8, batch_size=4
    )
    rows = zip(PROMPTS, ADAPTERS.tolist(), strict=True)
    alone = [
        minia3.generate(both.model, both.tokenizer, [p], adapter=a, max_new_tokens=8)[0]
        for p, a in rows
    ]
    assert mixed == alone
    base = minia3.generate(both.model, both.tokenizer, PROMPTS, max_new_tokens=8)
    changed = [a != b for a, b in zip(mixed, base, strict=True)]
    assert any(changed)
    assert not any(changed[i] for i in range(len(PROMPTS)) if ADAPTERS[i] == 0)


def test_decoding_reads_the_longest_prompts_first_and_stops_when_all_rows_of_a_batch_have_ended(
    both, monkeypatch
):
    ends = next(prompt for prompt in texts(40, seed=2) if peer_text(both, prompt, 5)[1])
    lengths, steps, start, step = [], [], both.model.start, both.model.step
    monkeypatch.setattr(
        both.model, "start", lambda x, *rest: lengths.append(x.shape[1]) or start(x, *rest)
    )
    monkeypatch.setattr(both.model, "step", lambda *arguments: steps.append(1) or step(*arguments))
    minia3.generate(both.model, both.tokenizer, [ends], max_new_tokens=100)
    assert len(steps) <= 5
    minia3.generate(both.model, both.tokenizer, PROMPTS, max_new_tokens=1, batch_size=3)
    assert lengths[1:] == sorted(lengths[1:], reverse=True) != sorted(lengths[1:])


@pytest.mark.parametrize("name", [*T5_PEERS, *LLAMA_PEERS])
def test_greedy_ids_are_transformers_for_every_kind_of_model(peer, loaded, name):
    model, theirs = loaded(name), peer(name).model
    model.config = replace(model.config, eos_ids=EOS)
    source = random_tokens(3, 6)
    options = {
        "use_cache": name != "t5-deep-decoder",
        "eos_token_id": list(EOS),
        "pad_token_id": PAD,
    }  # see BEAM_PEERS
    for row in source.split(1):
        expected = new_ids(
            theirs.generate(row, do_sample=False, max_new_tokens=20, **options), theirs, row
        )[0]
        found = [token for _, token in decode_tokens(model, model.start(row), 20, set())]
        assert found == expected


def new_ids(rows, model, source):
    """The lists of ids, without the end token, in what transformers' generate returns."""
    rows = rows[:, 1 if model.config.is_encoder_decoder else source.shape[1] :].tolist()
    return [
        row[: next((i for i, token in enumerate(row) if token in EOS), len(row))] for row in rows
    ]


# Beam search

# transformers 5.24's cache has as many layers as the encoder: it fails on decoders that are deeper, in a beam search
# even without use_cache.
BEAM_PEERS = [name for name in (*T5_PEERS, *LLAMA_PEERS) if name != "t5-deep-decoder"]


@pytest.mark.parametrize("name", BEAM_PEERS)
def test_all_beams_are_transformers_in_their_order(peer, loaded, name):
    model, theirs = loaded(name), peer(name).model
    model.config = replace(model.config, eos_ids=EOS)
    source = random_tokens(3, 6)
    lengths = set()
    for beams, n, penalty in ((2, 12, 1.0), (4, 12, 2.0), (3, 1, 0.0), (5, 9, -1.0), (3, 15, 0.6)):
        options = {
            "num_beams": beams,
            "num_return_sequences": beams,
            "length_penalty": penalty,
            "max_new_tokens": n,
        }
        options |= {
            "do_sample": False,
            "early_stopping": False,
            "eos_token_id": list(EOS),
            "pad_token_id": PAD,
        }
        expected = [
            new_ids(theirs.generate(row, **options), theirs, row) for row in source.split(1)
        ]
        assert beam_search(model, model.start(source), beams, n, penalty) == expected
        lengths |= {len(ids) for row in expected for ids in row}
    assert len(lengths) > 3  # some end before the last step


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_beams_in_a_padded_mixed_batch_are_those_of_each_row_alone_and_samples_are_the_best_of_them(
    both, batch_size
):
    options = {"max_new_tokens": 8, "beams": 3, "length_penalty": 0.5, "samples": 2}
    mixed = generate(
        both.model, both.tokenizer, PROMPTS, adapter=ADAPTERS, batch_size=batch_size, **options
    )
    alone = []
    for prompt, adapter in zip(PROMPTS, ADAPTERS.tolist(), strict=True):
        state = both.model.start(torch.tensor([both.tokenizer.encode(prompt)]), adapter=adapter)
        alone += [
            both.tokenizer.decode(ids) for ids in beam_search(both.model, state, 3, 8, 0.5)[0][:2]
        ]
    assert mixed == alone
    assert len(set(mixed)) > len(PROMPTS)
    assert generate(both.model, both.tokenizer, PROMPTS, **options | {"samples": 1}) != mixed[::2]


def test_one_beam_is_greedy(both):
    found = [
        beam_search(both.model, both.model.start(row), 1, 9)[0][0]
        for row in random_tokens(9, 5).split(1)
    ]
    greedy = [
        [token for _, token in decode_tokens(both.model, both.model.start(row), 9, set())]
        for row in random_tokens(9, 5).split(1)
    ]
    assert found == greedy


@pytest.mark.parametrize("options", [{"samples": 2, "temperature": 1.0}, {"beams": 2}])
def test_a_batch_has_as_many_rows_as_it_may_whether_prompts_samples_or_beams(
    both, monkeypatch, options
):
    rows, step = [], both.model.step
    monkeypatch.setattr(both.model, "step", lambda x, state: rows.append(len(x)) or step(x, state))
    for batch_size, prompts in ((7, [3, 3, 3, 2]), (1, [1] * 11)):
        rows.clear()
        generate(
            both.model, both.tokenizer, PROMPTS, max_new_tokens=1, batch_size=batch_size, **options
        )
        assert [n // 2 for n in rows] == prompts


# Sampling


def warped(logits, temperature, top_k, top_p):
    """The probabilities from which transformers draws."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = TemperatureLogitsWarper(temperature)(None, logits)
    logits = TopKLogitsWarper(top_k)(None, logits) if top_k else logits
    return (TopPLogitsWarper(top_p)(None, logits) if top_p < 1 else logits).double().softmax(-1)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 99),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 5, 61, 100]),
    top_p=st.sampled_from([1e-9, 0.2, 0.7, 0.95, 1.0]),
)
def test_what_is_drawn_has_the_probabilities_of_transformers_warpers(
    seed, temperature, top_k, top_p
):
    logits = 3 * torch.randn(2, N_IDS, generator=torch.Generator().manual_seed(seed))
    for row, expected in zip(logits, warped(logits, temperature, top_k, top_p), strict=True):
        n = 2000
        uniform = (torch.arange(n, dtype=torch.float64) + 0.5)[:, None] / n
        drawn = draw_tokens(row.expand(n, -1), uniform, temperature, top_k, top_p)[:, 0]
        share = drawn.bincount(minlength=N_IDS) / n
        assert (
            share - expected
        ).abs().max() <= 1 / n + 1e-6  # even numbers meet each interval to within one of them
        assert drawn.equal(drawn.sort().values)  # in the order of ids


def test_the_token_that_crosses_top_p_is_kept_and_a_probability_of_zero_is_never_drawn():
    logits = torch.tensor([[0.5, 0.25, 0.0, 0.25]]).log()
    uniform = torch.tensor([[0.0], [0.49], [0.51], [0.76], [1 - 2**-53]], dtype=torch.float64)
    rows = logits.expand(5, -1)
    assert draw_tokens(rows, uniform, 1.0)[:, 0].tolist() == [0, 0, 1, 3, 3]
    assert set(draw_tokens(rows, uniform, 1.0, top_p=0.5)[:, 0].tolist()) == {0}
    assert len(set(draw_tokens(rows, uniform, 1.0, top_p=0.5001)[:, 0].tolist())) == 2
    assert draw_tokens(torch.tensor([[0.0, 0.5, 0.5]]).log(), uniform[:1], 1.0).item() == 1
    assert set(draw_tokens(torch.zeros(5, 4), uniform, 1.0, top_p=0.5)[:, 0].tolist()) == {
        0,
        1,
    }  # these are 0.5, to the bit
    assert set(draw_tokens(rows, uniform, 1e-300)[:, 0].tolist()) == {0}  # no overflow
    assert set(draw_tokens(rows + 9, uniform, 5e-324)[:, 0].tolist()) == {
        0
    }  # nor of logits above 0


def test_sampled_tokens_follow_the_softmax_at_that_temperature(both):
    n, temperature = 10_000, 0.5
    options = {"max_new_tokens": 1, "temperature": temperature, "samples": n, "seed": 0}
    found = generate(both.model, both.tokenizer, PROMPTS[5:6], **options)
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


DRAWN = {"max_new_tokens": 6, "temperature": 1.5, "top_k": 30, "top_p": 0.9, "samples": 3}


@pytest.mark.parametrize("batch_size", [1, 4, 5, 100])
def test_what_is_drawn_for_a_sample_does_not_depend_on_the_batch(both, batch_size):
    def sample(n, **options):
        adapter = options.pop("adapter", ADAPTERS)
        return generate(
            both.model, both.tokenizer, PROMPTS[:n], adapter=adapter[:n], seed=7, **DRAWN | options
        )

    together = sample(len(PROMPTS), batch_size=16)
    assert sample(len(PROMPTS), batch_size=batch_size) == together
    assert sample(4, batch_size=batch_size) == together[:12]  # fewer prompts
    assert sample(4, batch_size=batch_size, samples=1) == together[:12:3]  # fewer samples
    assert sample(4, batch_size=batch_size, samples=5)[5:8] == together[3:6]  # more of them
    other = sample(
        len(PROMPTS), batch_size=batch_size, adapter=torch.where(ADAPTERS == 2, 1, ADAPTERS)
    )
    same = (ADAPTERS != 2).repeat_interleave(3).tolist()  # other adapters beside it
    assert [a for a, keep in zip(other, same, strict=True) if keep] == [
        a for a, keep in zip(together, same, strict=True) if keep
    ]
    assert other != together


def test_a_seed_gives_the_same_texts_and_no_seed_gives_others_each_time(both):
    def sample(**options):
        return generate(both.model, both.tokenizer, PROMPTS[:1] * 5, **DRAWN, **options)

    assert sample(seed=3) == sample(seed=3) != sample(seed=4)
    assert sample() != sample()
    assert len(set(sample(seed=0))) > 10  # equal prompts are drawn for apart
    before = torch.random.get_rng_state()
    sample(seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)


# Many adapters


@pytest.mark.parametrize("name", ["t5-v1.1", "llama-gqa"])
def test_among_a_thousand_adapters_a_mixed_batch_writes_what_each_of_its_rows_does_alone(
    loaded, name
):
    model, tokenizer = loaded(name, n_adapters=1000, seed=0), word_tokenizer(name.startswith("t5"))
    for vector in minia3.vectors(model).values():
        vector.data[0] = 1.0
    adapters = [0, 999, 1, 500, 501, 500, 0, 3, 77, 123, 998]
    for options in (
        {"max_new_tokens": 6},
        {"max_new_tokens": 6, "beams": 3},
        {"max_new_tokens": 6, "temperature": 1.0, "top_p": 0.8, "seed": 0},
    ):
        found = generate(model, tokenizer, PROMPTS, adapter=adapters, batch_size=7, **options)
        for row, adapter in enumerate(
            adapters
        ):  # as the prompt with the same index, for its numbers
            alone = generate(
                model, tokenizer, PROMPTS[: row + 1], adapter=adapter, batch_size=1, **options
            )
            assert found[row] == alone[row]
        assert found != generate(model, tokenizer, PROMPTS, batch_size=7, **options)


# Rows that are done


def spied(both, monkeypatch):
    """The adapter rows of each step's batch: each row has one of its own below."""
    steps, step = [], both.model.step
    monkeypatch.setattr(
        both.model,
        "step",
        lambda x, state: steps.append(state.adapter_B.tolist()) or step(x, state),
    )
    return steps


@pytest.fixture(scope="module", params=["t5-v1.1", "llama-gqa"])
def many(request, loaded):
    model = loaded(request.param, n_adapters=40, seed=1)
    model.config = replace(model.config, eos_ids=EOS)
    return SimpleNamespace(model=model, tokenizer=word_tokenizer(request.param.startswith("t5")))


@pytest.mark.parametrize("stop", [(), ["w5", "w2"]])
def test_a_row_that_is_done_is_in_no_later_step(many, monkeypatch, stop):
    model, tokenizer, prompts, n = many.model, many.tokenizer, texts(40, seed=5), 8
    expected = []
    for row, prompt in enumerate(prompts):
        state, ids = model.start(torch.tensor([tokenizer.encode(prompt)]), adapter=row), [None]
        token = state.start
        while (
            len(ids) <= n
            and ids[-1] not in EOS
            and not any(word in tokenizer.decode(ids[1:]) for word in stop)
        ):
            token = model.step(token, state)[:, -1].argmax(dim=-1, keepdim=True)
            ids.append(token.item())
        expected.append(len(ids) - 1)
    steps = spied(many, monkeypatch)
    generate(
        model, tokenizer, prompts, adapter=range(40), max_new_tokens=n, stop=stop, batch_size=40
    )
    assert [sum(row in step for step in steps) for row in range(40)] == expected
    assert len({*expected}) > 3


def test_a_beam_search_that_is_done_is_in_no_later_step(many, monkeypatch):
    steps, rows = spied(many, monkeypatch), range(40)
    source = random_tokens(40, 4)
    together = beam_search(many.model, many.model.start(source, adapter=torch.arange(40)), 2, 8)
    counts = [sum(row in step for step in steps) for row in rows]
    for row in rows:
        steps.clear()
        assert (
            beam_search(many.model, many.model.start(source[row : row + 1], adapter=row), 2, 8)[0]
            == together[row]
        )
        assert len(steps) == counts[row]
    assert len({*counts}) > 2


# Texts: stop strings, and pieces


def plain(text, stops):
    """`text` before the first occurrence of a stop text."""
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]


@pytest.mark.parametrize(
    "options", [{}, {"beams": 2, "samples": 2}, {"temperature": 2.0, "seed": 1, "samples": 2}]
)
def test_a_text_ends_before_the_first_of_the_stop_texts(both, options):
    options = {"max_new_tokens": 10, **options}
    whole = generate(both.model, both.tokenizer, PROMPTS, **options)
    shortened = 0
    for stop in (" ", "w1", ["w5 w", "5 "], ["9 w", " w4", "w"], "never"):
        found = generate(both.model, both.tokenizer, PROMPTS, stop=stop, **options)
        assert found == [plain(text, [stop] if isinstance(stop, str) else stop) for text in whole]
        shortened += sum(a != b for a, b in zip(found, whole, strict=True))
    assert shortened > 20


FALLBACK = {
    "<unk>": 0,
    "▁a": 1,
    "b": 2,
    "▁": 3,
    "é": 4,
    **{f"<0x{i:02X}>": 5 + i for i in range(256)},
}


def fallback_tokenizer():
    """Pieces and bytes, as LLaMA-2's: a character that is no piece is split over tokens of one byte each."""
    backend = Backend(models.BPE(FALLBACK, [], unk_token="<unk>", byte_fallback=True))
    steps = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    backend.decoder = decoders.Sequence(steps)
    return Tokenizer(backend, {})


SPLIT = {"bytes": byte_tokenizer(), "fallback": fallback_tokenizer()}
LETTERS = st.text("ab é中🎉\u0301", min_size=1, max_size=12)


def encoded(name, text):
    if name == "bytes":
        return SPLIT[name].encode(text, special=False)
    known = {"é": [4], "b": [2], " ": [3]}
    return [i for letter in text for i in known.get(letter, [5 + byte for byte in letter.encode()])]


@pytest.mark.parametrize("name", SPLIT)
@settings(deadline=None, max_examples=100)
@given(text=LETTERS, stops=st.lists(st.text("ab é中", min_size=1, max_size=3), max_size=3))
def test_pieces_have_whole_characters_hold_back_what_may_be_a_stop_text_and_join_to_the_text(
    name, text, stops
):
    decode, ids = SPLIT[name].decode, encoded(name, text)
    row = Text(decode, tuple(stops))
    pieces = []
    for token in [*ids, None]:
        pieces.append(row.add(token))
        joined = "".join(pieces)
        assert "\ufffd" not in joined
        assert plain(decode(ids), stops).startswith(joined)
    assert joined == plain(decode(ids), stops)
    assert row.done == (joined != decode(ids))


@pytest.mark.parametrize("name", SPLIT)
@settings(deadline=None, max_examples=100)
@given(ids=st.lists(st.integers(0, 260), max_size=12))
def test_pieces_of_any_ids_join_to_as_long_a_text(name, ids):
    row, decode = Text(SPLIT[name].decode, ()), SPLIT[name].decode
    joined = "".join(map(row.add, [*ids, None]))
    whole = decode(ids)
    if "\ufffd" not in whole:
        assert joined == whole
    assert len(joined) == len(whole)


def test_a_piece_comes_as_soon_as_it_is_certain():
    row = Text(SPLIT["bytes"].decode, ("<end>",))
    parts = [[token] for token in encoded("bytes", "é")]
    assert len(parts) == 2
    assert [row.add(*part) for part in parts] == ["", "é"]
    for letter, piece in zip("a<en<e", ["a", "", "", "", "<en", ""], strict=True):
        assert row.add(*encoded("bytes", letter)) == piece
    assert (row.add(None), row.done) == ("<e", False)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.5, "top_p": 0.9, "top_k": 20, "seed": 5}]
)
def test_streamed_pieces_join_to_what_generate_gives(both, options):
    n_pieces = set()
    for adapter in (0, 2):
        for stop in ((), "w1", ["w5 w", "5 "]):
            common = {"adapter": adapter, "stop": stop, "max_new_tokens": 9, **options}
            for prompt in PROMPTS[:5]:
                pieces = list(stream(both.model, both.tokenizer, prompt, **common))
                assert all(pieces)
                n_pieces.add(len(pieces))
                assert ["".join(pieces)] == generate(both.model, both.tokenizer, [prompt], **common)
    assert len(n_pieces) > 3


def test_a_stream_steps_only_as_far_as_it_is_read(both, monkeypatch):
    steps = spied(both, monkeypatch)
    monkeypatch.setattr(both.model, "config", replace(both.model.config, eos_ids=()))
    pieces = stream(both.model, both.tokenizer, "w4 w5", max_new_tokens=10)
    assert next(pieces)
    assert len(steps) == 1
    assert len(list(pieces)) == 9
    assert len(steps) == 10


def test_prompts_may_be_ids(both):
    prompts = [both.tokenizer.encode(prompt) for prompt in PROMPTS]
    assert generate(both.model, both.tokenizer, prompts) == generate(
        both.model, both.tokenizer, PROMPTS
    )
    pieces = stream(both.model, both.tokenizer, prompts[0])
    assert "".join(pieces) == generate(both.model, both.tokenizer, PROMPTS[:1])[0]


def test_generating_leaves_no_graph_and_the_gradient_mode_as_it_was(both):
    pieces = stream(both.model, both.tokenizer, "w4 w5")
    next(pieces)
    assert torch.is_grad_enabled()
    for _, token in decode_tokens(both.model, both.model.start(random_tokens(1, 3)), 2, set()):
        assert torch.is_grad_enabled()
        assert isinstance(token, int)


# The border


def test_no_prompts_give_no_texts(both):
    assert generate(both.model, both.tokenizer, []) == []


BOTH = [
    ({"temperature": -1.0}, r"temperature, top_k \(-1.0, 0\): expected 0 or more"),
    ({"temperature": float("nan")}, "expected 0 or more"),
    ({"temperature": float("inf"), "top_k": 3}, "expected 0 or more, and finite"),
    ({"top_k": -1}, "expected 0 or more"),
    ({"top_p": 0.0}, "top_p 0.0: expected above 0, and at most 1"),
    ({"top_p": 1.1}, "top_p 1.1: expected above 0, and at most 1"),
    ({"top_p": float("nan")}, "top_p nan: expected above 0, and at most 1"),
    (
        {"max_new_tokens": 0},
        r"max_new_tokens, beams, samples, batch_size \(0, 1, 1, \d+\): expected 1 or more",
    ),
    ({"stop": ""}, "stop '': expected texts that are not empty"),
    ({"stop": ["a", ""]}, r"stop \['a', ''\]: expected texts that are not empty"),
    ({"seed": -1}, "2\\*\\*32 - 1"),
    ({"seed": 2**32}, "2\\*\\*32 - 1"),
    ({"seed": 10**30}, "2\\*\\*32 - 1"),
    ({"seed": 1.5}, "seed 1.5: expected 0 to 2\\*\\*32 - 1"),
    ({"seed": True}, "seed True: expected 0 to 2\\*\\*32 - 1"),
    ({"adapter": 3}, "rows 0 to 2"),
    ({"adapter": -1}, "rows 0 to 2"),
]
GENERATE = [
    ({"beams": 0}, "expected 1 or more"),
    ({"samples": 0}, "expected 1 or more"),
    ({"batch_size": 0}, "expected 1 or more"),
    ({"beams": 2, "temperature": 1.0}, "beams 2 at temperature 1.0: expected temperature 0"),
    ({"samples": 2}, "samples 2: expected a temperature, or as many beams"),
    ({"samples": 3, "beams": 2}, "samples 3: expected a temperature, or as many beams"),
    ({"length_penalty": float("nan"), "beams": 2}, "length_penalty nan: expected -10 to 10"),
    ({"length_penalty": 1e6, "beams": 2}, "length_penalty 1000000.0: expected -10 to 10"),
    ({"adapter": torch.tensor([0, 1])}, "an adapter for each of 1 rows, found 2"),
]


@pytest.mark.parametrize("batch_size", [0, -1])
def test_rank_names_a_batch_size_that_is_none(both, batch_size):
    with pytest.raises(ValueError, match=f"batch_size is {batch_size}, expected 1 or more"):
        minia3.rank(both.model, both.tokenizer, PROMPTS, LISTS, batch_size=batch_size)


@pytest.mark.parametrize(("options", "message"), [*BOTH, *GENERATE])
def test_generate_names_a_value_that_is_out_of_range(both, options, message):
    with pytest.raises(ValueError, match=f"^[^\n]*{message}[^\n]*$"):
        generate(both.model, both.tokenizer, ["w4"], **options)


@pytest.mark.parametrize(("options", "message"), BOTH)
def test_stream_names_a_value_that_is_out_of_range(both, options, message):
    with pytest.raises(ValueError, match=f"^[^\n]*{message}[^\n]*$"):
        list(stream(both.model, both.tokenizer, "w4", **options))


def test_prompts_that_are_none_are_named(both):
    for prompts in ("w4 w5", [4, 5]):
        with pytest.raises(ValueError, match="expected a list of texts, or of lists of ids"):
            generate(both.model, both.tokenizer, prompts)
    for bad in ([], [4, 61], [-1]):
        with pytest.raises(
            ValueError, match=r"prompts \[1\] have no tokens, or ids that are not 0 to 60"
        ):
            generate(both.model, both.tokenizer, ["w4", bad])
    with pytest.raises(ValueError, match=r"prompts \[0\] have no tokens"):
        stream(both.model, both.tokenizer, [])
