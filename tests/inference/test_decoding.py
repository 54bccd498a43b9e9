"""Guards generation. Greedy texts equal the texts of transformers for single rows, whatever the
batch, the adapters and the padding. What is drawn follows the distribution, and depends only on the
seed. Rows that have ended leave the batch. Pieces join to the text. Mistakes are named."""

import copy
import warnings
import weakref
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import LLAMA_PEERS, T5_PEERS
from conftest import tokens as random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from word_models import (
    ADAPTERS,
    EOS,
    KINDS,
    PROMPTS,
    adapters_of_steps,
    byte_tokenizer,
    model_of_many,
    new_ids,
    peer_text,
    word_model,
)
from words import N_IDS, PAD, texts, word_tokenizer

import minia3
from minia3.checkpoints.tokenizer import Tokenizer
from minia3.inference import decoding, sampling
from minia3.inference.decoding import (
    choose_tokens,
    decode_tokens,
    generate,
    generate_texts,
    read_tokens,
    stream,
)
from minia3.inference.options import Options
from minia3.inference.pieces import Text
from minia3.inference.sampling import draw_tokens
from minia3.inference.scoring import NotFiniteError


@pytest.fixture(scope="module", params=KINDS)
def both(request, peer, loaded):
    return word_model(request.param, peer, loaded)


@pytest.fixture(scope="module", params=KINDS)
def many(request, loaded):
    return model_of_many(request.param, loaded)


# Greedy


def test_greedy_texts_of_prompts_of_different_lengths_equal_transformers(both):
    n = 12
    prompts = [*PROMPTS, *texts(10, seed=2)]
    expected, ended = zip(*(peer_text(both, prompt, n) for prompt in prompts), strict=True)
    assert any(ended)
    assert not all(ended)
    assert len(set(expected)) > 5
    for batch_size in (1, 7, 64):
        found = minia3.generate(
            both.model, both.tokenizer, prompts, max_new_tokens=n, batch_size=batch_size
        )
        assert found == list(expected)
    for n in (1, 5):  # A greedy text of fewer tokens is how the longer one begins.
        found = minia3.generate(both.model, both.tokenizer, prompts, max_new_tokens=n)
        assert found == [" ".join(text.split()[:n]) for text in expected]


def test_a_batch_of_several_adapters_writes_what_each_row_writes_alone(both):
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


def test_a_llama_whose_tokenizer_ends_texts_continues_the_prompt_itself(peer, loaded):
    """Tokenizers are saved so after a training with add_eos_token=True."""
    both = word_model("llama-gqa", peer, loaded)
    ended = word_tokenizer(True, model_type="llama")
    expected = minia3.generate(both.model, both.tokenizer, PROMPTS, max_new_tokens=8)
    assert minia3.generate(both.model, ended, PROMPTS, max_new_tokens=8) == expected


def test_the_longest_prompts_are_read_first_and_a_batch_stops_when_all_its_rows_have_ended(
    both, monkeypatch
):
    ending = next(prompt for prompt in texts(40, seed=2) if peer_text(both, prompt, 5)[1])
    lengths = []
    start = both.model.start

    def record(source, *rest):
        lengths.append(source.shape[1])
        return start(source, *rest)

    monkeypatch.setattr(both.model, "start", record)
    steps = adapters_of_steps(both.model, monkeypatch)
    minia3.generate(both.model, both.tokenizer, [ending], max_new_tokens=100)
    assert len(steps) <= 5
    minia3.generate(both.model, both.tokenizer, PROMPTS, max_new_tokens=1, batch_size=3)
    assert lengths[1:] == sorted(lengths[1:], reverse=True) != sorted(lengths[1:])


@pytest.mark.parametrize("name", [*T5_PEERS, *LLAMA_PEERS])
def test_greedy_ids_equal_transformers_for_every_kind_of_model(peer, loaded, name):
    model = loaded(name)
    theirs = peer(name).model
    model.config = replace(model.config, eos_ids=EOS)
    source = random_tokens(3, 6)
    options = {
        "do_sample": False,
        "max_new_tokens": 20,
        "use_cache": name != "t5-deep-decoder",  # see BEAM_PEERS in test_beam_search.py
        "eos_token_id": list(EOS),
        "pad_token_id": PAD,
    }
    expected_rows = new_ids(theirs.generate(source, **options), theirs, source)
    for row, expected in zip(source.split(1), expected_rows, strict=True):
        found = [token for _, token in decode_tokens(model, model.start(row), 20, set())]
        assert found == expected


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 1.0, "seed": 0}, {"samples": 2, "temperature": 1.0, "seed": 0}],
)
def test_a_text_ends_at_the_eos_of_the_tokenizer_too(both, options):
    """Targets are trained with it, and the model's files may name another end token."""
    options = {**options, "max_new_tokens": 12}
    written = generate(both.model, both.tokenizer, PROMPTS, **options)
    tokenizer = word_tokenizer(both.is_t5)
    tokenizer.eos_id = most_common([text.split()[2:] for text in written])
    expected = [before_word(text, f"w{tokenizer.eos_id}") for text in written]
    assert expected != written
    assert generate(both.model, tokenizer, PROMPTS, **options) == expected
    if "samples" not in options:
        streamed = ["".join(stream(both.model, tokenizer, PROMPTS[0], **options))]
        assert streamed == expected[:1]


def test_a_beam_search_ends_texts_at_the_eos_of_the_tokenizer_too(both):
    options = {"beams": 3, "samples": 3, "max_new_tokens": 8}
    written = generate(both.model, both.tokenizer, PROMPTS, **options)
    tokenizer = word_tokenizer(both.is_t5)
    tokenizer.eos_id = most_common([text.split()[1:] for text in written])
    found = generate(both.model, tokenizer, PROMPTS, **options)
    model = copy.copy(both.model)
    model.config = replace(model.config, eos_ids=(*EOS, tokenizer.eos_id))
    assert found == generate(model, both.tokenizer, PROMPTS, **options)
    assert found != written


def test_a_stop_text_with_a_special_token_and_other_text_is_a_warning(both):
    """It is in no text, so the text went on without a word."""
    (written,) = generate(both.model, both.tokenizer, ["w3"], max_new_tokens=6)
    token, following = written.split()[2:4]
    tokenizer = word_tokenizer(both.is_t5)
    tokenizer.backend.add_special_tokens([token])
    options = {"max_new_tokens": 6, "stop": ["never", f"{token} {following}"]}
    with pytest.warns(match=f"'{token}' is a special token, .* give '{token}' alone") as found:
        (text,) = generate(both.model, tokenizer, ["w3"], **options)
    assert len(found) == 1
    assert text.split() == [word for word in written.split() if word != token]
    # A text ends before an end token, so no more can follow it.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer.eos_id = tokenizer.backend.token_to_id(token)
        (text,) = generate(both.model, tokenizer, ["w3"], **options)
    assert text.split() == written.split()[:2]


@pytest.mark.parametrize("options", [{}, {"beams": 2}, {"temperature": 1.0, "seed": 0}])
def test_a_stop_text_that_is_a_special_token_ends_a_text(both, options):
    """`decode` drops the token, so no text has it."""
    options = {**options, "max_new_tokens": 12}
    written = generate(both.model, both.tokenizer, PROMPTS, **options)
    token = f"w{most_common([text.split()[2:] for text in written])}"
    tokenizer = word_tokenizer(both.is_t5)
    tokenizer.backend.add_special_tokens([token])
    assert tokenizer.decode(both.tokenizer.encode(f"w3 {token}", special=False)) == "w3"
    found = generate(both.model, tokenizer, PROMPTS, stop=[token, "never"], **options)
    stop = f" {token}\n"  # as templates have it
    assert found == generate(both.model, tokenizer, PROMPTS, stop=stop, **options)
    if "beams" not in options:  # the end of a text counts in a beam search, so others may win
        assert found == [before_word(text, token) for text in written]
    model = copy.copy(both.model)
    model.config = replace(model.config, eos_ids=(*EOS, tokenizer.backend.token_to_id(token)))
    assert found == generate(model, both.tokenizer, PROMPTS, **options)
    assert found != generate(both.model, tokenizer, PROMPTS, **options)


def most_common(lists):
    """Return the id of the word that most lists have."""
    counts = Counter(word for words in lists for word in set(words))
    return int(counts.most_common(1)[0][0].removeprefix("w"))


def before_word(text, word):
    words = text.split()
    if word in words:
        words = words[: words.index(word)]
    return " ".join(words)


@pytest.mark.parametrize("options", [{"samples": 2, "temperature": 1.0}, {"beams": 2}])
def test_the_rows_of_a_batch_are_counted_whether_they_are_prompts_samples_or_beams(
    both, monkeypatch, options
):
    n_rows = []
    step = both.model.step

    def record(tokens, state):
        n_rows.append(len(tokens))
        return step(tokens, state)

    monkeypatch.setattr(both.model, "step", record)
    for batch_size, n_prompts in ((7, [3, 3, 3, 2]), (1, [1] * 11)):
        n_rows.clear()
        generate(
            both.model, both.tokenizer, PROMPTS, max_new_tokens=1, batch_size=batch_size, **options
        )
        assert [n // 2 for n in n_rows] == n_prompts


# Sampling


def peer_probabilities(logits, temperature, top_k, top_p):
    """Return the probabilities from which transformers draws."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k > 0:
        logits = TopKLogitsWarper(top_k)(None, logits)
    if top_p < 1:
        logits = TopPLogitsWarper(top_p)(None, logits)
    return logits.double().softmax(-1)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 99),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 5, 61, 100]),
    top_p=st.sampled_from([1e-9, 0.2, 0.7, 0.95, 1.0]),
)
def test_tokens_are_drawn_with_the_probabilities_of_transformers(seed, temperature, top_k, top_p):
    logits = 3 * torch.randn(2, N_IDS, generator=torch.Generator().manual_seed(seed))
    probabilities = peer_probabilities(logits, temperature, top_k, top_p)
    n = 2000
    for row, expected in zip(logits, probabilities, strict=True):
        uniform = (torch.arange(n, dtype=torch.float64) + 0.5)[:, None] / n
        drawn = draw_tokens(row.expand(n, -1), uniform, temperature, top_k, top_p)[:, 0]
        share = drawn.bincount(minlength=N_IDS) / n
        # Of n evenly spaced numbers, an interval holds its share, give or take one of them.
        assert (share - expected).abs().max() <= 1 / n + 1e-6
        assert drawn.equal(drawn.sort().values)  # in the order of ids


def test_the_token_that_crosses_top_p_is_kept_and_a_probability_of_zero_is_never_drawn():
    logits = torch.tensor([[0.5, 0.25, 0.0, 0.25]]).log()
    uniform = torch.tensor([[0.0], [0.49], [0.51], [0.76], [1 - 2**-53]], dtype=torch.float64)
    rows = logits.expand(5, -1)
    assert draw_tokens(rows, uniform, 1.0)[:, 0].tolist() == [0, 0, 1, 3, 3]
    assert set(draw_tokens(rows, uniform, 1.0, top_p=0.5)[:, 0].tolist()) == {0}
    assert len(set(draw_tokens(rows, uniform, 1.0, top_p=0.5001)[:, 0].tolist())) == 2
    assert draw_tokens(torch.tensor([[0.0, 0.5, 0.5]]).log(), uniform[:1], 1.0).item() == 1
    # Two of four equal probabilities are 0.5, to the bit.
    assert set(draw_tokens(torch.zeros(5, 4), uniform, 1.0, top_p=0.5)[:, 0].tolist()) == {0, 1}


def test_no_temperature_overflows():
    logits = torch.tensor([[0.5, 0.25, 0.0, 0.25]]).log().expand(5, -1)
    uniform = torch.tensor([[0.0], [0.49], [0.51], [0.76], [1 - 2**-53]], dtype=torch.float64)
    assert set(draw_tokens(logits, uniform, 1e-300)[:, 0].tolist()) == {0}
    assert set(draw_tokens(logits + 9, uniform, 5e-324)[:, 0].tolist()) == {0}


@pytest.mark.parametrize(("kind", "n_copies"), [("cuda", 0), ("mps", 1), ("xpu", 1)])
def test_a_device_without_float64_leaves_drawing_to_the_cpu(kind, n_copies, monkeypatch):
    copies = []

    class Logits(torch.Tensor):
        @property
        def device(self):
            return torch.device(kind)

        def cpu(self):
            copies.append(self)
            return self.as_subclass(torch.Tensor)

    monkeypatch.setattr(sampling, "to_device", lambda x, device: x)
    logits = torch.tensor([[0.0, 9.0, 0.0], [9.0, 0.0, 0.0]])
    sampler = sampling.Sampler([np.random.RandomState(0)] * 2, Options(temperature=0.1))
    assert sampler.draw(logits.as_subclass(Logits), [0, 1]).tolist() == [[1], [0]]
    assert len(copies) == n_copies


@pytest.mark.slow
@pytest.mark.parametrize("both", KINDS[:1], indirect=True)  # scores are drawn from as of any model
def test_sampled_tokens_follow_the_softmax_at_that_temperature(both):
    n = 6_000
    temperature = 0.5
    options = {"max_new_tokens": 1, "temperature": temperature, "samples": n, "seed": 0}
    found = generate(both.model, both.tokenizer, PROMPTS[5:6], **options)
    start = both.model.start(torch.tensor([both.tokenizer.encode(PROMPTS[5])]))
    logits = both.model.step(start.start, start)[0, -1].detach()
    expected = (logits / temperature).softmax(-1)
    words = ["" if i in (PAD, *EOS) else both.tokenizer.decode([i]) for i in range(N_IDS)]
    # Hoeffding: each of 61 frequencies is off by more than 0.04 with a chance of at most
    # 2 exp(-2 n 0.04^2) = 1e-8, so the chance that right code fails under a seed is below 1e-6.
    bound = 0.04
    for word in set(words):
        p = sum(expected[i].item() for i in range(N_IDS) if words[i] == word)
        assert abs(found.count(word) / n - p) < bound, word
    for wrong in (1.0, 1 / temperature):  # would fail
        assert ((logits / wrong).softmax(-1) - expected).abs().max() > 2 * bound


DRAWN = {"max_new_tokens": 6, "temperature": 1.5, "top_k": 30, "top_p": 0.9, "samples": 3}


@pytest.mark.parametrize("batch_size", [1, 5, 100])
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
    # Other adapters beside a row.
    adapters = torch.where(ADAPTERS == 2, 1, ADAPTERS)
    beside_others = sample(len(PROMPTS), batch_size=batch_size, adapter=adapters)
    has_same_adapter = (ADAPTERS != 2).repeat_interleave(3).tolist()
    for text, expected, is_same in zip(beside_others, together, has_same_adapter, strict=True):
        assert text == expected or not is_same
    assert beside_others != together


def test_a_seed_gives_the_same_texts_and_no_seed_gives_others_each_time(both):
    def sample(**options):
        return generate(both.model, both.tokenizer, PROMPTS[:1] * 5, **DRAWN, **options)

    assert sample(seed=3) == sample(seed=3) != sample(seed=4)
    assert sample() != sample()
    assert len(set(sample(seed=0))) > 10  # equal prompts have streams of their own
    before = torch.random.get_rng_state()
    sample(seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)


# Many adapters


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_with_a_thousand_adapters_a_batch_of_several_writes_what_each_row_writes_alone(
    loaded, name
):
    model = loaded(name, n_adapters=1000, seed=0)
    tokenizer = word_tokenizer(name.startswith("t5"))
    for vector in minia3.vectors(model).values():
        vector.data[0] = 1.0
    adapters = [0, 999, 1, 500, 501, 500, 0, 3, 77, 123, 998]
    for options in (
        {"max_new_tokens": 6},
        {"max_new_tokens": 6, "beams": 3},
        {"max_new_tokens": 6, "temperature": 1.0, "top_p": 0.8, "seed": 0},
    ):
        found = generate(model, tokenizer, PROMPTS, adapter=adapters, batch_size=7, **options)
        for row, adapter in enumerate(adapters):
            # The prompt keeps its index, on which its random numbers depend.
            options_of_row = Options(first_prompt=row, **options)
            alone = generate_texts(model, tokenizer, [PROMPTS[row]], adapter, options_of_row)
            assert [found[row]] == alone
        assert found != generate(model, tokenizer, PROMPTS, batch_size=7, **options)


# Rows that have ended


@pytest.mark.slow
@pytest.mark.parametrize("stop", [(), ["w5", "w2"]])
def test_a_row_that_has_ended_is_in_no_later_step(many, monkeypatch, stop):
    tokenizer = word_tokenizer(ends=hasattr(many, "encoder"))
    prompts = texts(40, seed=5)
    n = 8
    expected = []
    for row, prompt in enumerate(prompts):
        with torch.no_grad():
            state = many.start(torch.tensor([tokenizer.encode(prompt)]), adapter=row)
            ids = []
            token = state.start
            has_ended = False
            while len(ids) < n and not has_ended:
                token = many.step(token, state)[:, -1].argmax(dim=-1, keepdim=True)
                ids.append(token.item())
                is_stopped = any(word in tokenizer.decode(ids) for word in stop)
                has_ended = ids[-1] in EOS or is_stopped
        expected.append(len(ids))
    steps = adapters_of_steps(many, monkeypatch)
    monkeypatch.setattr(decoding, "LEAVES_AT", 0)
    generate(
        many, tokenizer, prompts, adapter=range(40), max_new_tokens=n, stop=stop, batch_size=40
    )
    assert [sum(row in adapters for adapters in steps) for row in range(40)] == expected
    assert len(set(expected)) > 3


@pytest.mark.parametrize("stop", [(), ["w5", "w2"]])
def test_of_a_large_batch_several_rows_leave_together(many, monkeypatch, stop):
    """What they would write after their end is not seen."""
    tokenizer = word_tokenizer(ends=hasattr(many, "encoder"))
    prompts = texts(40, seed=5)
    written = []
    rows_of_steps = []
    for leaves_at in (0, 1 / 8):
        monkeypatch.setattr(decoding, "LEAVES_AT", leaves_at)
        with monkeypatch.context() as patch:
            steps = adapters_of_steps(many, patch)
            options = {"max_new_tokens": 8, "stop": stop, "batch_size": 40}
            written.append(generate(many, tokenizer, prompts, adapter=range(40), **options))
        rows_of_steps.append([set(adapters) for adapters in steps])
    assert written[0] == written[1]

    at_once, together = rows_of_steps
    for going_on, rows in zip(at_once, together, strict=True):
        assert going_on <= rows
        assert len(rows - going_on) < len(rows) / 8
    assert len(set(map(len, together))) < len(set(map(len, at_once)))


@pytest.mark.parametrize("n_tokens", [4, 1000])
def test_of_equally_likely_tokens_the_first_is_chosen(n_tokens):
    logits_BV = torch.zeros(4, n_tokens)
    logits_BV[1, 1:] = 2.0
    logits_BV[2, [2, -1]] = 3.0
    logits_BV[3, 2:] = float("nan")
    assert choose_tokens(logits_BV, range(4), None).tolist() == [[0], [1], [2], [2]]


def test_scores_that_are_not_finite_matter_only_until_the_text_has_ended():
    logits_BV = torch.tensor([[0.0, 1.0], [0.0, float("nan")], [2.0, 0.0]])
    tokens_B1 = choose_tokens(logits_BV, [4, 7, 9], None)
    assert read_tokens(tokens_B1, logits_BV, [4, 7, 9], {7}) == [(4, 1), (9, 0)]
    with pytest.raises(NotFiniteError, match="text 7"):
        read_tokens(tokens_B1, logits_BV, [4, 7, 9], {4})


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.5}])
def test_a_token_that_is_drawn_from_scores_that_are_not_finite_is_one_of_the_model(options):
    """A text that has ended stays in the batch for some steps, which read its tokens."""
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, float("nan"), 1.0], [0.0, float("inf"), 1.0]])
    uniform = torch.full((3, 1), 0.5, dtype=torch.float64)
    tokens = draw_tokens(logits, uniform, 1.0, **options)
    assert tokens[0, 0] == 2
    assert tokens.max() <= 2


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 0}])
def test_the_scores_of_a_text_that_has_ended_change_no_other_text(options, both, monkeypatch):
    """The first of nine texts ends at once, and its scores are then NaN."""
    prompts = PROMPTS[:1] * 9
    step = both.model.step
    found = []
    for score in (0.0, float("nan")):
        n_rows = []

        def end_first(tokens, state, score=score, n_rows=n_rows):
            logits = step(tokens, state)
            n_rows.append(len(logits))
            if len(n_rows) == 1:
                logits[..., list(EOS)] = -1e4
                logits[0, :, EOS[0]] = 1e4
            elif len(logits) == len(prompts):
                logits[0] = score
            return logits

        monkeypatch.setattr(both.model, "step", end_first)
        found.append(generate(both.model, both.tokenizer, prompts, max_new_tokens=4, **options))
        assert n_rows[:2] == [9, 9]  # one of nine is less than an eighth
    assert found[0] == found[1]
    assert found[0][0] == ""


# Texts: stop strings, and pieces


def test_for_prompts_of_ids_and_stop_texts_a_tokenizer_needs_only_decode(both):
    prompts = [both.tokenizer.encode(prompt) for prompt in PROMPTS]
    options = {"max_new_tokens": 5, "stop": "w9"}
    expected = generate(both.model, both.tokenizer, prompts, **options)
    only_decode = SimpleNamespace(decode=both.tokenizer.decode)
    assert generate(both.model, only_decode, prompts, **options) == expected
    of_transformers = SimpleNamespace(decode=both.tokenizer.decode, backend="tokenizers")
    assert generate(both.model, of_transformers, prompts, **options) == expected


def before_stop(text, stops):
    """Return `text` before the first occurrence of a stop text."""
    ends = [text.index(stop) for stop in stops if stop in text]
    return text[: min(ends, default=len(text))]


@pytest.mark.parametrize(
    "options", [{}, {"beams": 2, "samples": 2}, {"temperature": 2.0, "seed": 1, "samples": 2}]
)
def test_a_text_ends_before_the_first_of_the_stop_texts(both, options):
    options = {"max_new_tokens": 10, **options}
    whole = generate(both.model, both.tokenizer, PROMPTS, **options)
    n_shortened = 0
    for stop in (" ", "w1", ["w5 w", "5 "], ["9 w", " w4", "w"], "never"):
        found = generate(both.model, both.tokenizer, PROMPTS, stop=stop, **options)
        stops = [stop] if isinstance(stop, str) else stop
        assert found == [before_stop(text, stops) for text in whole]
        n_shortened += sum(a != b for a, b in zip(found, whole, strict=True))
    assert n_shortened > 20


FALLBACK = {
    "<unk>": 0,
    "▁a": 1,
    "b": 2,
    "▁": 3,
    "é": 4,
    **{f"<0x{i:02X}>": 5 + i for i in range(256)},
}


def fallback_tokenizer():
    """Return a tokenizer of pieces and bytes, as LLaMA-2 has it.

    A character that is not a piece is split over several tokens, of one byte each.
    """
    backend = Backend(models.BPE(FALLBACK, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = llama2_decoder()
    return Tokenizer(backend, {})


def llama2_decoder():
    steps = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    return decoders.Sequence(steps)


SPLIT = {"bytes": byte_tokenizer(), "fallback": fallback_tokenizer()}
LETTERS = st.text("ab é中🎉\u0301", min_size=1, max_size=12)


def encoded(name, text):
    if name == "bytes":
        return SPLIT[name].encode(text, special=False)
    known = {"é": [4], "b": [2], " ": [3]}
    ids = []
    for letter in text:
        ids += known.get(letter, [5 + byte for byte in letter.encode()])
    return ids


@pytest.mark.parametrize("name", SPLIT)
@settings(deadline=None, max_examples=100)
@given(text=LETTERS, stops=st.lists(st.text("ab é中", min_size=1, max_size=3), max_size=3))
def test_pieces_hold_whole_characters_and_no_part_of_a_stop_text_and_join_to_the_text(
    name, text, stops
):
    decode = SPLIT[name].decode
    ids = encoded(name, text)
    row = Text(decode, tuple(stops))
    pieces = []
    whole = before_stop(decode(ids), stops)
    for token in ids:
        pieces.append(row.add(token))
        joined = "".join(pieces)
        assert "\ufffd" not in joined
        assert whole.startswith(joined)
    pieces.append(row.finish())
    assert "".join(pieces) == whole
    assert row.is_stopped == (whole != decode(ids))


@pytest.mark.parametrize("name", SPLIT)
@settings(deadline=None, max_examples=100)
@given(ids=st.lists(st.integers(0, 260), max_size=12))
def test_pieces_of_any_ids_join_to_the_text_and_lose_no_character(name, ids):
    """LLaMA-2's decoder takes back a character if the bytes after it are damaged. Pieces do not."""
    decode = SPLIT[name].decode
    row = Text(decode, ())
    joined = "".join(row.add(token) for token in ids) + row.finish()
    whole = decode(ids)
    if name == "bytes" or "\ufffd" not in whole:
        assert joined == whole
    rest = iter(joined)
    assert all(letter in rest for letter in whole if letter != "\ufffd")  # in this order
    assert joined.endswith("\ufffd") == whole.endswith("\ufffd")


@pytest.mark.parametrize("name", SPLIT)
def test_a_token_takes_as_long_at_the_end_of_a_long_text_as_at_its_beginning(name):
    n_decoded = []

    def decode(ids):
        n_decoded.append(len(ids))
        return SPLIT[name].decode(ids)

    row = Text(decode, ("never",))
    text = "ab é中🎉🎉" * 20
    joined = "".join(row.add(token) for token in encoded(name, text)) + row.finish()
    assert joined == text
    assert max(n_decoded) == 8  # two characters of four bytes each


def test_a_piece_comes_as_soon_as_it_is_certain():
    row = Text(SPLIT["bytes"].decode, ("<end>",))
    assert [row.add(token) for token in encoded("bytes", "é")] == ["", "é"]  # two bytes
    for letter, piece in zip("a<en<e", ["a", "", "", "", "<en", ""], strict=True):
        (token,) = encoded("bytes", letter)
        assert row.add(token) == piece
    assert row.finish() == "<e"
    assert not row.is_stopped


def test_nothing_follows_a_stop_text():
    row = Text(SPLIT["bytes"].decode, ("<end>",))
    pieces = [row.add(token) for token in encoded("bytes", "a<end>b<end>")]
    assert ("".join(pieces), row.finish()) == ("a", "")
    assert row.is_stopped


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.5, "top_p": 0.9, "top_k": 20, "seed": 5}]
)
def test_streamed_pieces_join_to_what_generate_gives(both, options):
    n_pieces = set()
    for adapter in (0, 2):
        for stop in ((), "w1", ["w5 w", "5 "]):
            common = {"adapter": adapter, "stop": stop, "max_new_tokens": 9, **options}
            for prompt in PROMPTS[:3]:
                pieces = list(stream(both.model, both.tokenizer, prompt, **common))
                assert all(pieces)
                n_pieces.add(len(pieces))
                assert ["".join(pieces)] == generate(both.model, both.tokenizer, [prompt], **common)
    assert len(n_pieces) > 3


def test_a_stream_that_begins_in_inference_mode_may_go_on_outside_of_it(both):
    texts = []
    for prompt in PROMPTS:
        pieces = stream(both.model, both.tokenizer, prompt, max_new_tokens=10)
        with torch.inference_mode():
            text = next(pieces, "")
        texts.append(text + "".join(pieces))
    assert texts == generate(both.model, both.tokenizer, PROMPTS, max_new_tokens=10)


def test_a_stream_steps_only_as_far_as_it_is_read(both, monkeypatch):
    steps = adapters_of_steps(both.model, monkeypatch)
    monkeypatch.setattr(both.model, "config", replace(both.model.config, eos_ids=()))
    pieces = stream(both.model, both.tokenizer, "w4 w5", max_new_tokens=10)
    assert next(pieces)
    assert len(steps) == 1
    assert len(list(pieces)) == 9
    assert len(steps) == 10


def test_prompts_may_be_ids(both):
    prompts = [both.tokenizer.encode(prompt) for prompt in PROMPTS]
    expected = generate(both.model, both.tokenizer, PROMPTS, max_new_tokens=4)
    assert generate(both.model, both.tokenizer, prompts, max_new_tokens=4) == expected
    pieces = stream(both.model, both.tokenizer, prompts[0], max_new_tokens=4)
    assert "".join(pieces) == expected[0]


def piece_tokenizer():
    """Return a tokenizer that puts a space before any text, and drops it again, as LLaMA-2's does.

    The even pieces begin with a space, and the odd ones continue a word.
    """
    vocabulary = {"<pad>": PAD, "</s>": 1, "▁": 2}
    for i in range(3, N_IDS, 2):
        vocabulary |= {f"-{i}": i, f"▁{i + 1}": i + 1}
    backend = Backend(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first")
    backend.decoder = llama2_decoder()
    return Tokenizer(backend, {"pad_token": "<pad>", "eos_token": "</s>"})


def test_a_text_is_continued_with_the_space_between_and_ids_are_answered_without_it(loaded):
    model = loaded("llama-gqa")
    tokenizer = piece_tokenizer()
    prompts = [f"{i} {i + 2}" for i in range(4, 40, 2)]
    found = generate(model, tokenizer, prompts, max_new_tokens=3)
    assert {text[:1] for text in found} == {" ", "-"}
    answers = generate(model, tokenizer, map(tokenizer.encode, prompts), max_new_tokens=3)
    for prompt, text, answer in zip(prompts, found, answers, strict=True):
        source = tokenizer.encode(prompt)
        state = model.start(torch.tensor([source]))
        ids = [token for _, token in decode_tokens(model, state, 3, set())]
        assert prompt + text == tokenizer.decode(source + ids)
        assert answer == tokenizer.decode(ids) == text.removeprefix(" ")
        assert "".join(stream(model, tokenizer, prompt, max_new_tokens=3)) == text
        for stop in {text[2:], text[:2]}:
            (stopped,) = generate(model, tokenizer, [prompt], max_new_tokens=3, stop=stop)
            assert stopped == before_stop(text, [stop])


def test_the_text_of_a_prompt_without_words_begins_without_a_space(loaded):
    """A text of LLaMA-2 begins so, if the prompt is only <s>."""
    model = loaded("llama-gqa")
    tokenizer = piece_tokenizer()
    found = generate(model, tokenizer, ["</s>"], max_new_tokens=3)
    assert found == generate(model, tokenizer, [[1]], max_new_tokens=3)
    assert found[0] != ""


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
    assert generate(both.model, both.tokenizer, [], adapter=[]) == []
    with pytest.raises(ValueError, match=r"adapter must be .*\(1,\) long, found \[\]"):
        generate(both.model, both.tokenizer, ["w4"], adapter=[])


OF_BOTH = [
    ({"temperature": -1.0}, "temperature is -1.0, expected 0 or more, and finite"),
    ({"temperature": float("nan")}, "temperature is nan, expected 0 or more"),
    ({"temperature": float("inf"), "top_k": 3}, "temperature is inf, expected 0 or more"),
    ({"top_k": -1}, "top_k is -1, expected 0 or more"),
    ({"top_p": 0.0}, "top_p is 0.0, expected above 0, and at most 1"),
    ({"top_p": 1.1}, "top_p is 1.1, expected above 0, and at most 1"),
    ({"top_p": float("nan")}, "top_p is nan, expected above 0, and at most 1"),
    ({"max_new_tokens": 0}, "max_new_tokens is 0, expected 1 or more"),
    ({"stop": ""}, "stop is '', expected texts that are not empty"),
    ({"stop": ["a", ""]}, r"stop is \['a', ''\], expected texts that are not empty"),
    ({"stop": None}, "stop is None, expected texts that are not empty"),
    ({"stop": ["a", 5]}, r"stop is \['a', 5\], expected texts that are not empty"),
    ({"max_new_tokens": None}, "max_new_tokens is None, expected an integer"),
    ({"max_new_tokens": 2.0}, "max_new_tokens is 2.0, expected an integer"),
    ({"top_k": None, "temperature": 1.0}, "top_k is None, expected an integer"),
    ({"top_p": None, "temperature": 1.0}, "top_p is None, expected a number"),
    ({"temperature": "0.5"}, "temperature is '0.5', expected a number"),
    ({"seed": -1}, r"seed is -1, expected an integer from 0 to 2\*\*32 - 1"),
    ({"seed": 2**32}, r"seed is 4294967296, expected an integer from 0 to 2\*\*32 - 1"),
    ({"seed": 10**30}, r"expected an integer from 0 to 2\*\*32 - 1"),
    ({"seed": 1.5}, r"seed is 1.5, expected an integer from 0 to 2\*\*32 - 1"),
    ({"seed": True}, r"seed is True, expected an integer from 0 to 2\*\*32 - 1"),
    ({"adapter": 3}, "rows 0 to 2"),
    ({"adapter": -1}, "rows 0 to 2"),
]
OF_GENERATE = [
    ({"beams": 0}, "beams is 0, expected 1 or more"),
    ({"samples": 0}, "samples is 0, expected 1 or more"),
    ({"batch_size": 0}, "batch_size is 0, expected 1 or more"),
    ({"samples": None}, "samples is None, expected an integer"),
    ({"beams": 2.5}, "beams is 2.5, expected an integer"),
    ({"beams": 2, "temperature": 1.0}, "beams is 2 at temperature 1.0, expected temperature 0"),
    ({"samples": 2}, "samples is 2, expected a temperature above 0 or as many beams"),
    ({"samples": 3, "beams": 2}, "samples is 3, expected a temperature above 0 or as many beams"),
    ({"length_penalty": float("nan"), "beams": 2}, "length_penalty is nan, expected -10 to 10"),
    ({"length_penalty": 1e6, "beams": 2}, "length_penalty is 1000000.0, expected -10 to 10"),
    (
        {"adapter": torch.tensor([0, 1])},
        r"adapter must be None, an int or \(1,\) long, found tensor",
    ),
]


@pytest.mark.parametrize(("options", "message"), [*OF_BOTH, *OF_GENERATE])
def test_generate_refuses_an_option_that_is_out_of_range(both, options, message):
    with pytest.raises(ValueError, match=f"^[^\n]*{message}[^\n]*$"):
        generate(both.model, both.tokenizer, ["w4"], **options)


@pytest.mark.parametrize(("options", "message"), OF_BOTH)
def test_stream_refuses_an_option_that_is_out_of_range(both, options, message):
    with pytest.raises(ValueError, match=f"^[^\n]*{message}[^\n]*$"):
        list(stream(both.model, both.tokenizer, "w4", **options))


def test_prompts_that_are_not_a_list_of_texts_or_ids_are_refused(both):
    for prompts in ("w4 w5", [4, 5]):
        with pytest.raises(ValueError, match="expected a list of texts, or of lists of ids"):
            generate(both.model, both.tokenizer, prompts)
    for bad in ([], [4, 61], [-1]):
        with pytest.raises(
            ValueError, match=r"prompts \[1\] have no tokens, or ids outside 0 to 60"
        ):
            generate(both.model, both.tokenizer, ["w4", bad])
    with pytest.raises(ValueError, match=r"prompts \[0\] have no tokens"):
        stream(both.model, both.tokenizer, [])
    for bad in (None, ["w4"], [4.0], 0.5, b"\x04\x05"):
        with pytest.raises(ValueError, match=r"^prompt 1 is .*, expected a text or a list of ids"):
            generate(both.model, both.tokenizer, ["w4", bad])
    with pytest.raises(ValueError, match=r"^prompt 0 is tensor\(4\), expected a text or a list"):
        generate(both.model, both.tokenizer, torch.tensor([4, 5]))


@pytest.mark.parametrize(
    "prompts",
    [
        None,
        5,
        "",
        set(),
        {"w4", "w5"},
        {"text": ["w4"]},
        torch.tensor(3),
        {"input_ids": [[4]], "attention_mask": [1]},
    ],
)
def test_prompts_in_no_order_are_refused(both, prompts):
    with pytest.raises(ValueError, match=r"^prompts is .*, expected a list of texts, or of lists"):
        generate(both.model, both.tokenizer, prompts)


def test_a_table_is_no_list_of_prompts_but_a_column_is(both):
    """The texts of a table were the answers to the names of its columns."""
    pandas = pytest.importorskip("pandas", reason="another library")
    table = pandas.DataFrame({"w4": PROMPTS[:3], "w5": [0, 1, 0]}, index=[7, 8, 9])
    with pytest.raises(ValueError, match=r"^prompts is [^\n]*, expected a list of texts[^\n]*$"):
        generate(both.model, both.tokenizer, table)
    expected = generate(both.model, both.tokenizer, PROMPTS[:3])
    assert generate(both.model, both.tokenizer, table["w4"]) == expected
    for index in ([7, 8, 9], [2, 0, 1], [0, 2, 5]):  # torch would look up these labels
        table.index = index
        found = generate(both.model, both.tokenizer, table["w4"], adapter=table["w5"])
        assert found == generate(both.model, both.tokenizer, PROMPTS[:3], adapter=[0, 1, 0])


def test_prompts_may_come_from_a_generator_or_an_array(both):
    def write(prompts):
        return generate(both.model, both.tokenizer, prompts, max_new_tokens=4)

    expected = write(PROMPTS)
    for prompts in (iter(PROMPTS), tuple(PROMPTS), np.array(PROMPTS, dtype=object)):
        assert write(prompts) == expected
    ids = [[4, 5], [6, 7]]
    expected = write(ids)
    for prompts in (torch.tensor(ids), np.array(ids)):
        assert write(prompts) == expected
    assert generate(both.model, both.tokenizer, iter(())) == []


def test_a_prompt_is_named_by_its_place_among_all_prompts(both, loaded):
    options = Options(max_new_tokens=3, first_prompt=16)
    given = (both.tokenizer, ["w4", "w33"], None, options)
    model = loaded(both.name)
    model.embed.weight.data[33] = float("nan")
    with pytest.raises(ValueError, match=r"^prompt 17: the model's scores are not finite"):
        generate_texts(model, *given)
    model.embed = torch.nn.Embedding.from_pretrained(model.embed.weight[:33])
    with pytest.raises(ValueError, match=r"^prompts \[17\] have no tokens, or ids outside 0 to 32"):
        generate_texts(model, *given)


@pytest.mark.parametrize("option", [{"top_p": 0.9}, {"top_k": 3}, {"length_penalty": 2.0}])
def test_an_option_that_has_no_effect_is_a_warning_once_for_a_call(option, both):
    """generate and stream took the likeliest tokens without a word."""
    calls = [(generate, PROMPTS)]
    if "length_penalty" not in option:
        calls.append((stream, PROMPTS[0]))
    for function, prompts in calls:
        with pytest.warns(UserWarning, match="no effect") as found:
            function(both.model, both.tokenizer, prompts, max_new_tokens=1, **option)
        (warning,) = found
        (name,) = option
        assert name in str(warning.message)


@pytest.mark.parametrize(("adapter", "found"), [(99, "adapter 99"), ([0, 1], "adapter must be")])
def test_a_stream_checks_its_adapter_before_the_first_piece(adapter, found, both):
    with pytest.raises(ValueError, match=found):
        stream(both.model, both.tokenizer, "w4", adapter=adapter)


@pytest.mark.parametrize(
    ("integer", "number"), [(np.int64, np.float32), (torch.tensor, torch.tensor)]
)
def test_options_may_be_numbers_of_numpy_and_torch(both, integer, number):
    def write(n_tokens, temperature):
        options = {"max_new_tokens": n_tokens, "temperature": temperature, "seed": 1}
        return generate(both.model, both.tokenizer, ["w4"], **options)

    assert write(integer(3), number(0.5)) == write(3, 0.5)


@pytest.mark.parametrize("integer", [np.int64, np.uint64, torch.tensor])
def test_a_seed_may_be_an_integer_of_numpy_or_torch(both, integer):
    options = {"max_new_tokens": 4, "temperature": 2.0}
    expected = generate(both.model, both.tokenizer, PROMPTS, seed=3, **options)
    assert generate(both.model, both.tokenizer, PROMPTS, seed=integer(3), **options) == expected


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("max_new_tokens", np.int64(3), 3),
        ("max_new_tokens", torch.tensor(3), 3),
        ("samples", np.uint8(200), 200),  # whose product with a number of rows would overflow
        ("beams", np.array(2), 2),
        ("length_penalty", np.float16(0.5), 0.5),
        ("top_p", torch.tensor(0.5), 0.5),
        ("temperature", 1, 1),
        ("seed", None, None),
        ("seed", np.uint64(5), 5),
    ],
)
def test_numbers_of_numpy_and_torch_become_those_of_python(name, value, expected):
    found = getattr(Options(**{name: value}), name)
    assert (found, type(found)) == (expected, type(expected))


def test_the_keys_and_values_of_a_prompt_are_kept_once(both, monkeypatch):
    """While texts are written, nothing refers to the state of their prompts."""
    states = []
    start = both.model.start

    def noted_start(*args):
        state = start(*args)
        states.append(weakref.ref(state.caches[0]))
        return state

    monkeypatch.setattr(both.model, "start", noted_start)
    monkeypatch.setattr(both.model, "config", replace(both.model.config, eos_ids=()))
    n_seen = 0
    for _ in stream(both.model, both.tokenizer, "w4 w5", max_new_tokens=9):
        if n_seen > 0:  # nobody waits for the garbage collector
            assert states[0]() is None
        n_seen += 1
    assert n_seen > 1


def test_the_state_of_rows_that_have_left_is_kept_by_nobody(both):
    state = both.model.start(random_tokens(9, 4))
    kept = weakref.ref(state)
    pairs = decode_tokens(both.model, state, 3, ended={0, 1}, end_ids=())
    del state
    assert kept() is not None
    next(pairs)
    assert kept() is None  # nobody waits for the garbage collector
    assert len(list(pairs)) == 3 * 7 - 1


# Scores that are not finite


@pytest.mark.parametrize(
    "options", [{}, {"samples": 3, "temperature": 1.0, "seed": 0}, {"beams": 3, "samples": 2}]
)
def test_a_prompt_whose_scores_are_not_finite_is_named(options, both, loaded):
    model = loaded(both.name)
    model.embed.weight.data[33] = float("nan")
    prompts = ["w4 w5", "w4", "w33 w4", "w33 w4 w5"]
    with pytest.raises(ValueError, match=r"^prompt [23]: the model's scores are not finite: "):
        generate(model, both.tokenizer, prompts, max_new_tokens=3, batch_size=6, **options)
    assert generate(model, both.tokenizer, prompts[:2], max_new_tokens=3, **options)


def test_of_a_beam_search_with_several_texts_the_prompt_is_named_that_is_not_finite(both, loaded):
    model = loaded(both.name)
    model.embed.weight.data[33] = float("nan")
    prompts = ["w4 w5 w6", "w33 w4", "w4"]  # one batch, in which each prompt has two texts
    options = {"beams": 3, "samples": 2, "batch_size": 9, "max_new_tokens": 3}
    with pytest.raises(ValueError, match=r"^prompt 1: the model's scores are not finite"):
        generate(model, both.tokenizer, prompts, **options)


def test_a_token_that_a_model_rules_out_is_no_error(both, loaded):
    model = loaded(both.name)
    logits = model.logits
    model.logits = lambda x: logits(x).index_fill(-1, torch.tensor([4, 5]), float("-inf"))
    assert generate(model, both.tokenizer, ["w9"], max_new_tokens=3)
