"""Guards scoring. Log-probabilities and scores equal transformers on single rows, whatever the
batch, the adapters and the padding. Logits and choices that are computed in parts are the same, and
so are their gradients. Mistakes are named."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from batches import batch_of, gradients, loss_of, same
from conftest import tokens as random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from peaks import peak_beyond_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from word_models import (
    ADAPTERS,
    CHOICES,
    KINDS,
    LISTS,
    PROMPTS,
    byte_tokenizer,
    peer_logprobs,
    peer_score,
    word_model,
)
from words import word_tokenizer

import minia3
from minia3.checkpoints.known_models import KNOWN_MODELS
from minia3.checkpoints.load import build_model
from minia3.checkpoints.place import place_parameter
from minia3.inference.scoring import (
    choice_logprobs,
    logprobs_of_choices,
    score_examples,
    total_logprobs,
)
from minia3.model.recompute import recompute_blocks
from minia3.model.target_logprobs import widen
from minia3.tasks.batches import collate
from minia3.tasks.examples import Example
from minia3.training.losses import total_loss
from minia3.training.memory_plan import MemoryCounter
from tests.benchmarks.measure import kept_for_backward

INF = float("inf")
NAMES = ["t5-v1.0", "t5-v1.1", "llama-gqa"]


@pytest.fixture(scope="module", params=KINDS)
def both(request, peer, loaded):
    return word_model(request.param, peer, loaded)


# Log-probabilities


def test_log_probabilities_equal_transformers_and_the_state_advances(both):
    source = random_tokens(3, 6)
    target = random_tokens(3, 5, seed=1)
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


@pytest.mark.parametrize("move", ["step", "logprobs"])
def test_a_state_that_has_read_a_target_is_not_scored_as_if_it_were_new(both, move):
    """The token that begins a target was read once more, in the middle of the text."""
    target = random_tokens(2, 5, seed=1)
    state = both.model.start(random_tokens(2, 6))
    expected = minia3.logprobs(both.model, state.repeat(1), target)
    assert torch.equal(minia3.logprobs(both.model, state.repeat(1), target), expected)
    if move == "step":
        both.model.step(state.start, state)
    else:
        minia3.logprobs(both.model, state, target)
    length = state.length
    for moved in (state, state.repeat(2).select(torch.tensor([0, 2]))):
        with pytest.raises(ValueError, match="this state has read tokens of a target: start again"):
            minia3.logprobs(both.model, moved, target)
    both.model.step(target[:, -1:], state)  # it can still be continued
    assert state.length == length + 1


def test_log_probabilities_are_float32_for_a_bfloat16_model_and_float64_for_a_float64_model(
    both, loaded
):
    source = random_tokens(2, 6)
    target = random_tokens(2, 3, seed=1)
    for dtype, expected in {torch.bfloat16: torch.float32, torch.float64: torch.float64}.items():
        model = loaded(both.name, dtype=dtype)
        found = minia3.logprobs(model, model.start(source), target)
        state = model.start(source)
        logits = model.step(torch.cat((state.start, target[:, :-1]), dim=1), state)
        assert (logits.dtype, found.dtype) == (dtype, expected)
        assert torch.equal(
            found, logits.to(expected).log_softmax(-1).gather(-1, target[..., None])[..., 0]
        )


@pytest.mark.parametrize("is_frozen", [True, False])
def test_ids_may_be_int32(both, loaded, is_frozen):
    """If the head is frozen, log-probabilities are computed together with their gradients."""
    model = loaded(both.name)
    if is_frozen:
        minia3.freeze(model)
    source = random_tokens(2, 6)
    target = random_tokens(2, 3, seed=1)
    expected = minia3.logprobs(model, model.start(source), target)
    found = minia3.logprobs(model, model.start(source.int()), target.int())
    assert torch.equal(found, expected)


def test_gradients_of_log_probabilities_reach_only_the_vectors_of_a_row_s_adapter(both):
    both.model.zero_grad()
    minia3.logprobs(
        both.model, both.model.start(random_tokens(1, 6), adapter=2), random_tokens(1, 3, seed=1)
    ).sum().backward()
    for name, vector in minia3.vectors(both.model).items():
        assert vector.grad[2].any(), name
        assert not vector.grad[:2].any(), name


def test_the_source_is_read_once_for_all_of_its_choices(both, monkeypatch):
    examples = [Example([5, 6, 7], [[8], [9, 10]], 0), Example([11], [[12, 13, 14]], 0)]
    n_rows_read = []
    start = both.model.start

    def count(source, *rest):
        n_rows_read.append(len(source))
        return start(source, *rest)

    monkeypatch.setattr(both.model, "start", count)
    found = choice_logprobs(both.model, collate(examples))
    assert n_rows_read == [2]
    for row, example in enumerate(examples):
        for c, target in enumerate(example.targets):
            expected = peer_logprobs(both, example.source, target)
            torch.testing.assert_close(found[row, c, : len(target)], expected, rtol=1e-5, atol=1e-4)


# Rank


@pytest.mark.parametrize("length_norm", [True, False])
def test_scores_of_one_list_of_choices_equal_transformers_on_each_pair_alone(both, length_norm):
    found = minia3.rank(both.model, both.tokenizer, PROMPTS, CHOICES, length_norm=length_norm)
    expected = [
        [peer_score(both, prompt, choice, length_norm) for choice in CHOICES] for prompt in PROMPTS
    ]
    assert found.dtype == torch.float32
    assert not found.requires_grad
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_scores_of_a_list_for_each_prompt_do_not_depend_on_the_batch_and_gaps_are_minus_infinity(
    both, batch_size
):
    found = minia3.rank(both.model, both.tokenizer, PROMPTS, LISTS, batch_size=batch_size)
    expected = torch.full((len(PROMPTS), 4), -INF)
    for row, (prompt, choices) in enumerate(zip(PROMPTS, LISTS, strict=True)):
        expected[row, : len(choices)] = torch.tensor(
            [peer_score(both, prompt, choice) for choice in choices]
        )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_a_llama_whose_tokenizer_ends_texts_reads_no_end_before_a_choice(peer, loaded):
    """Tokenizers are saved so after a training with add_eos_token=True."""
    both = word_model("llama-gqa", peer, loaded)
    ended = word_tokenizer(True, model_type="llama")
    assert ended.encode("w3") == [*both.tokenizer.encode("w3"), ended.eos_id]
    expected = minia3.rank(both.model, both.tokenizer, PROMPTS, LISTS)
    assert torch.equal(minia3.rank(both.model, ended, PROMPTS, LISTS), expected)


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_a_batch_of_several_adapters_has_the_scores_of_each_row_alone(both, batch_size):
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
        is_base = torch.allclose(alone[0], base[row, : alone.shape[1]], atol=1e-3)
        assert is_base == (adapter == 0)


def test_scores_are_float32_whatever_the_default_dtype_of_the_program_is(both):
    try:
        torch.set_default_dtype(torch.float64)
        scores = minia3.rank(both.model, both.tokenizer, ["w7"], ["w8", "w9"])
    finally:
        torch.set_default_dtype(torch.float32)
    assert scores.dtype == torch.float32


def test_scores_and_texts_are_the_same_on_another_default_device(both):
    """Tensors of the meta device have no numbers, so none may be made there."""
    model, tokenizer = both.model, both.tokenizer
    adapter = [i % 2 for i in range(len(PROMPTS))]
    example = Example([3, 4, 5], [[6, 7]], 0)
    expected = minia3.rank(model, tokenizer, PROMPTS, CHOICES, adapter=0)
    logp, n_tokens = total_logprobs(model, [example])
    texts = minia3.generate(model, tokenizer, PROMPTS, adapter=adapter, max_new_tokens=4)
    with torch.device("meta"):  # as after torch.set_default_device("meta")
        found = minia3.rank(model, tokenizer, PROMPTS, CHOICES, adapter=0)
        found_logp, found_n_tokens = total_logprobs(model, [example])
        found_texts = minia3.generate(model, tokenizer, PROMPTS, adapter=adapter, max_new_tokens=4)
        rows = minia3.Adapters(copy.deepcopy(model)).rows([None])
    assert torch.equal(found, expected)
    assert torch.equal(found_logp, logp)
    assert torch.equal(found_n_tokens, n_tokens)
    assert found_texts == texts
    assert rows.tolist() == [0]


def test_a_stream_is_the_same_on_another_default_device(both):
    options = {"max_new_tokens": 4, "temperature": 1.0, "seed": 0}
    expected = list(minia3.stream(both.model, both.tokenizer, PROMPTS[0], **options))
    found = []
    with torch.device("meta"):
        for piece in minia3.stream(both.model, both.tokenizer, PROMPTS[0], **options):
            found.append(piece)
            assert torch.empty(0).is_meta, "the caller has another default device between pieces"
    assert found == expected


def test_logprobs_are_the_same_on_another_default_device(both):
    source, target = torch.tensor([[3, 4, 5], [6, 7, 8]]), torch.tensor([[6, 7]] * 8)
    mask = torch.tensor([[True, True, True], [True, True, False]])

    def logp():
        state = both.model.start(source, mask, [0, 1]).repeat(2).repeat(2)
        return minia3.logprobs(both.model, state, target)

    expected = logp()
    with torch.device("meta"):
        found = logp()
    assert torch.equal(found, expected)


def test_rank_refuses_a_table_in_one_line(both):
    pandas = pytest.importorskip("pandas", reason="another library")
    table = pandas.DataFrame({"w4": ["w5", "w6"]})
    with pytest.raises(
        ValueError, match=r"^expected a list of prompts, one or more: found [^\n]*$"
    ):
        minia3.rank(both.model, both.tokenizer, table, ["w4"])


def test_rank_says_what_is_wrong_with_its_lists(both):
    def rank(prompts, choices, **options):
        return minia3.rank(both.model, both.tokenizer, prompts, choices, **options)

    for prompts in ([], "w4 w5", {"w4": "w5"}, torch.tensor(3)):
        with pytest.raises(ValueError, match="expected a list of prompts"):
            rank(prompts, ["w4"])
    for choices in ([], "w4", [["w4"]], [["w4"], []], [["w4"], "w5"], [["w4"], ["w5"], ["w6"]]):
        with pytest.raises(
            ValueError,
            match="expected one non-empty list of choices for all 2 prompts, or one for each",
        ):
            rank(["w4", "w5"], choices)
    for choices in ({"w4", "w5"}, {"w4": 1}, None, [1, 2], iter(())):
        with pytest.raises(ValueError, match="expected one non-empty list of choices"):
            rank(["w4", "w5"], choices)
    for bad in (None, float("nan"), 5, b"w4", ["w4"]):
        with pytest.raises(ValueError, match=r"^prompt 1: found .*, expected a text$"):
            rank(["w4", bad], ["w4"])
        with pytest.raises(ValueError, match=r"^prompt 0: found .*, expected a text$"):
            rank(["w4"], ["w4", bad])
        with pytest.raises(ValueError, match=r"^found .*, expected a text$"):
            both.tokenizer.encode(bad)
    with pytest.raises(ValueError, match="an adapter for each of 2 rows, found 3"):
        rank(["w4", "w5"], ["w6"], adapter=torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="rows 0 to 2"):
        rank(["w4", "w5"], ["w6"], adapter=[0, 3])
    with pytest.raises(ValueError, match=r"adapter is \['rte', None\], expected rows of the model"):
        rank(["w4", "w5"], ["w6"], adapter=["rte", None])


def test_prompts_and_choices_may_be_arrays(both):
    prompts = ["w4 w5", "w6"]
    choices = [["w7", "w8 w9"], ["w10", "w11"]]
    for expected_choices in (choices, choices[0]):
        expected = minia3.rank(both.model, both.tokenizer, prompts, expected_choices)
        arrays = (np.array(prompts), np.array(expected_choices))
        assert torch.equal(minia3.rank(both.model, both.tokenizer, *arrays), expected)


def test_the_log_probability_of_a_conversation_is_transformers_loss_on_its_scored_tokens(both):
    """Some tokens of the target are read and not scored, as the user's turns in a conversation."""
    if both.is_t5:
        pytest.skip("a T5 has no conversations")
    examples = [
        Example([5, 6], [[7, 8, 9, 10, 11]], 0, [True, True, False, False, True]),
        Example([5], [[12, 13]], 0, [True, True]),
        Example([5, 6, 7], [[12, 13]], 0),
    ]
    total_N, n_tokens_N = total_logprobs(both.model, examples, batch_size=2)
    assert n_tokens_N.tolist() == [3, 2, 2]
    for example, total, n_tokens in zip(examples, total_N, n_tokens_N, strict=True):
        (target,) = example.targets
        scored = example.is_scored or [True] * len(target)
        labels = [-100] * len(example.source)
        labels += [i if is_one else -100 for i, is_one in zip(target, scored, strict=True)]
        ids = torch.tensor([example.source + target])
        with torch.no_grad():
            loss = both.peer.model(input_ids=ids, labels=torch.tensor([labels])).loss
        assert -total / n_tokens == pytest.approx(loss.item(), rel=1e-5)


def test_scores_that_are_not_finite_are_an_error_that_names_the_prompt(both, loaded):
    model = loaded(both.name)
    model.embed.weight.data[33] = float("nan")
    prompts = ["w4 w5", "w4", "w33 w4", "w33 w4 w5"]
    with pytest.raises(ValueError, match=r"^prompt 2: the model's scores are not finite: "):
        minia3.rank(model, both.tokenizer, prompts, ["w6", "w7"])
    found = minia3.rank(model, both.tokenizer, prompts[:2], [["w6"], ["w6", "w7"]])
    assert found.isfinite().tolist() == [[True, False], [True, True]]  # -inf: there is no choice


def test_two_choices_that_are_one_text_to_the_tokenizer_are_a_warning(both):
    with pytest.warns(
        UserWarning, match=r"'w6\\nw7' and 'w6 w7' are the same text .* first always wins"
    ) as caught:
        scores = minia3.rank(both.model, both.tokenizer, ["w4"], ["w5", "w6\nw7", "w6 w7"])
    assert scores[0, 1] == scores[0, 2]
    assert caught[0].filename == __file__, "it points to the line that calls `rank`"


def test_a_token_without_an_embedding_is_refused(both):
    tokenizer = word_tokenizer(both.is_t5)
    tokenizer.backend.add_special_tokens(["<new>"])
    for prompt, choice in (("w4 <new>", "w5"), ("w4", "w5 <new>")):
        with pytest.raises(ValueError, match=r"^prompt 0: .*the token '<new>' with the id 61"):
            minia3.rank(both.model, tokenizer, [prompt], [choice])


def test_prompts_and_choices_without_tokens_are_named(both):
    tokenizer = word_tokenizer(ends=False)  # adds nothing to an empty text
    with pytest.raises(ValueError, match=r"prompts \[1, 2\] have no tokens"):
        minia3.generate(both.model, tokenizer, ["w4", "", " "])
    for prompts, choices, named in ((["w4", "", "w5"], ["w5"], 1), (["w4"], ["w5", ""], 0)):
        with pytest.raises(
            ValueError, match=rf"prompts \[{named}\] have no tokens, or a choice without tokens"
        ):
            minia3.rank(both.model, tokenizer, prompts, choices, batch_size=1)


BYTES = byte_tokenizer()
TEXT = st.text(min_size=1, max_size=12) | st.sampled_from(["True", " True", "not True", "?"])


@settings(deadline=None, max_examples=60)
@given(TEXT.map(str.rstrip).filter(bool), TEXT)
def test_a_prompt_and_a_choice_encoded_separately_are_the_joined_text_encoded(prompt, choice):
    joined = BYTES.encode(f"{prompt} {choice.removeprefix(' ')}")
    assert BYTES.encode(prompt) + BYTES.encode_target(choice, end=False) == joined


@pytest.mark.parametrize("batch_size", [0, -1])
def test_rank_refuses_a_batch_size_below_1(both, batch_size):
    with pytest.raises(ValueError, match=f"batch_size is {batch_size}, expected 1 or more"):
        minia3.rank(both.model, both.tokenizer, PROMPTS, LISTS, batch_size=batch_size)


def test_rank_refuses_a_batch_size_that_is_no_integer(both):
    with pytest.raises(ValueError, match=r"batch_size is 2\.5, expected an integer"):
        minia3.rank(both.model, both.tokenizer, PROMPTS, LISTS, batch_size=2.5)


# Logits in parts

SCORING = "minia3.inference.scoring"
LOGPROBS = "minia3.model.target_logprobs"

# Scaled embedding, own head, own head; and twice the embedding as it is.
HEADS = [*NAMES, "t5-unscaled", "llama-tied"]


def record_parts(monkeypatch):
    """Return a list that grows with each part of the logits: how many tokens it has."""
    n_tokens_of_parts = []

    def record(logits_TV):
        n_tokens_of_parts.append(len(logits_TV))
        return widen(logits_TV)

    monkeypatch.setattr(f"{LOGPROBS}.widen", record)
    return n_tokens_of_parts


@pytest.mark.parametrize("is_whole", [False, True], ids=["vectors", "all weights"])
@pytest.mark.parametrize("name", HEADS)
def test_logits_in_parts_are_the_same_and_so_are_the_gradients(name, is_whole, loaded, monkeypatch):
    """All weights: the head or the embedding, which all parts share, and whatever lies below it."""
    model = loaded(name, seed=0).double()
    batch = batch_of((7, 3, 5))
    minia3.freeze(model)
    if is_whole:
        model.requires_grad_(True)

    def losses_and_gradients():
        found = gradients(model, batch)
        return [*found, *(p.grad for p in model.parameters() if p.requires_grad)]

    expected = losses_and_gradients()
    n_ids = model.embed.num_embeddings
    monkeypatch.setattr(f"{LOGPROBS}.MAX_LOGITS_ON_CPU", 3 * n_ids + 5)
    n_tokens_of_parts = record_parts(monkeypatch)
    same(losses_and_gradients(), expected, rtol=1e-12, atol=1e-12)
    n_tokens = int(batch.target_mask_BCL.sum())
    n_whole_parts, n_rest = divmod(n_tokens, 3)
    assert n_rest > 0
    parts = [3] * n_whole_parts + [n_rest]
    again = parts[::-1] if is_whole else []  # for the backward pass
    assert n_tokens_of_parts == parts + again


@pytest.mark.parametrize("is_whole", [False, True], ids=["vectors", "all weights"])
def test_few_logits_are_made_once_and_at_once(is_whole, loaded, monkeypatch):
    model = loaded("t5-v1.1", seed=0)
    minia3.freeze(model)
    if is_whole:
        model.requires_grad_(True)
    batch = batch_of((7, 3, 5))
    n_tokens = int(batch.target_mask_BCL.sum())
    monkeypatch.setattr(f"{LOGPROBS}.MAX_LOGITS_ON_CPU", n_tokens * model.embed.num_embeddings)
    n_tokens_of_parts = record_parts(monkeypatch)
    loss_of(model, batch).backward()
    assert n_tokens_of_parts == [n_tokens]


@pytest.mark.parametrize("has_grad", [False, True])
def test_no_tensor_holds_the_logits_of_all_tokens(has_grad, loaded, monkeypatch):
    config = replace(loaded("t5-v1.1").config, vocab_size=2000)
    batch = batch_of((2, 3, 1), n_choices=9)
    model = build_model(config).bfloat16()
    n_logits = int(batch.target_mask_BCL.sum()) * 2000
    minia3.freeze(model)
    for limit, is_large in ((n_logits, True), (n_logits // 4, False)):
        monkeypatch.setattr(f"{LOGPROBS}.MAX_LOGITS", limit)  # because the model is on "meta"
        with torch.set_grad_enabled(has_grad), Largest() as largest:
            loss = loss_of(model, batch)
            if has_grad:
                loss.backward()
        assert (largest.n_entries >= n_logits) == is_large


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that is made."""

    n_entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.n_entries = max(self.n_entries, x.numel())
        return out


def test_bfloat16_gradients_in_many_parts_are_as_near_to_float64_as_those_in_one(
    loaded, monkeypatch
):
    x = torch.randn(12, 4, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = []
    for dtype, limit in ((torch.float64, 1 << 24), (torch.bfloat16, 1 << 24), (torch.bfloat16, 1)):
        model = loaded("t5-v1.1", seed=0, dtype=torch.bfloat16).to(dtype)
        batch = batch_of((7, 3, 5), n_choices=4)
        monkeypatch.setattr(f"{LOGPROBS}.MAX_LOGITS_ON_CPU", limit)
        minia3.freeze(model)
        read_by_head = x.to(dtype, copy=True).requires_grad_()
        monkeypatch.setattr(model, "run_blocks", lambda tokens, state, x=read_by_head: x)
        loss_of(model, batch).backward()
        found.append(read_by_head.grad.double())
    exact, in_one, in_parts = found
    assert 0 < (in_parts - exact).norm() < 1.5 * (in_one - exact).norm()


# Choices that take turns


def many_choices():
    """Return a batch of rows with 77, 76 and 1 choices, of 1 to 4 tokens."""
    batch = batch_of((7, 3, 5), n_choices=77)
    n_choices = torch.tensor([77, 76, 1])[:, None, None]
    mask = batch.target_mask_BCL & (torch.arange(77)[:, None] < n_choices)
    return batch._replace(target_mask_BCL=mask, label_B=torch.tensor([76, 0, 0]))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_choices_that_take_turns_are_the_same_and_so_are_the_gradients(name, loaded, monkeypatch):
    model = loaded(name, n_adapters=2, seed=0).double()
    batch = many_choices()
    adapter = torch.tensor([1, 0, 1])
    minia3.freeze(model)

    def scores_and_gradients():
        model.zero_grad()
        logp = choice_logprobs(model, batch, adapter)
        total_loss(logp, batch.target_mask_BCL, batch.label_B).backward()
        with torch.no_grad():
            scored = choice_logprobs(model, batch, adapter)
        return [logp.detach(), scored, *(vector.grad for vector in minia3.vectors(model).values())]

    expected = scores_and_gradients()
    run_blocks = model.run_blocks
    shapes = []

    def record(tokens, *rest, **options):
        shapes.append(tuple(tokens.shape))
        return run_blocks(tokens, *rest, **options)

    model.run_blocks = record
    prompts = (3, 6)  # a LLaMA's
    for n_texts, n_side_by_side, turns in (
        (69, 99, [23, 23, 23, 8]),
        (1, 99, [1] * 77),
        (3 * 77, 77, [77]),
        (3 * 77, 30, [30, 30, 17]),
    ):
        monkeypatch.setattr(f"{SCORING}.MAX_CHOICE_TOKENS", 4 * n_texts)
        monkeypatch.setattr(f"{SCORING}.MAX_SIDE_BY_SIDE", 4 * n_side_by_side)
        shapes.clear()
        same(scores_and_gradients(), expected, rtol=1e-12, atol=1e-12)
        turns_of_backward = []
        if len(turns) > 1:
            turns_of_backward = turns[::-1]
        targets = [(3 * n, 4) for n in [*turns, *turns_of_backward, *turns]]
        assert [shape for shape in shapes if shape != prompts] == targets
        assert len(shapes) - len(targets) == (0 if name.startswith("t5") else 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_more_turns_take_no_more_memory_than_their_ids_and_results(name, loaded, monkeypatch):
    """The backward pass keeps only the ids of a turn, and only one turn's work exists at a time."""
    model = loaded(name, seed=0)
    batches = {n: batch_of((7, 3), n_choices=n) for n in (8, 24, 48)}
    minia3.freeze(model)
    monkeypatch.setattr(f"{SCORING}.MAX_CHOICE_TOKENS", 16 * 4)
    kept = {}
    peak_of_training = {}
    peak_of_scoring = {}
    for n, batch in batches.items():
        kept[n] = kept_for_backward(lambda batch=batch: choice_logprobs(model, batch).sum(), model)
        with MemoryCounter() as counter:
            choice_logprobs(model, batch).sum().backward()
        peak_of_training[n] = counter.peak
        with torch.no_grad(), MemoryCounter() as counter:
            choice_logprobs(model, batch)
        peak_of_scoring[n] = counter.peak
    n_bytes = 2 * 24 * 4 * (8 + 1)  # the ids and the mask of 24 choices more
    assert kept[48] - kept[24] == n_bytes < kept[8] / 20
    assert peak_of_training[48] - peak_of_training[24] < 2 * n_bytes
    assert peak_of_scoring[48] - peak_of_scoring[24] < 2 * n_bytes
    assert kept[48] < kept[8] / 4  # 8 choices have one turn, which keeps everything


# One target per source: a LLaMA reads both in one pass


@pytest.mark.parametrize("is_training", [False, True])
def test_one_pass_drops_the_keys_and_values_of_a_block_that_has_run(is_training):
    """So each further layer takes nothing; in training with --recompute, its input."""
    n_rows, n_source, n_target = (4, 16, 5)
    sizes = {"d_model": 64, "d_ff": 128, "n_heads": 4, "n_kv_heads": 4, "d_head": 16}
    config = replace(KNOWN_MODELS["smollm2-135m"].config, vocab_size=256, **sizes)

    def peak(n_layers):
        model = build_model(replace(config, n_layers=n_layers)).train()
        for name, parameter in list(model.named_parameters()):
            place_parameter(model, name, torch.zeros(parameter.shape))
        minia3.freeze(model)
        recompute_blocks(model.blocks)

        def score(batch):
            with torch.set_grad_enabled(is_training):
                logp = choice_logprobs(model, batch)
                if is_training:
                    logp.sum().backward()

        return peak_beyond_weights(model, (n_rows, n_source, 1, n_target), score)

    bytes_of_input = 0
    if is_training:
        n_read = n_rows * (n_source + n_target - 1)
        bytes_of_input = n_read * config.d_model * torch.float32.itemsize
    assert peak(16) - peak(12) == 4 * bytes_of_input


@pytest.mark.parametrize("name", ["llama-gqa", "mistral"])
@pytest.mark.parametrize("lengths", [(7, 7, 7), (7, 1, 4)])
def test_one_pass_over_texts_is_two_over_sources_and_targets(name, lengths, loaded):
    model = loaded(name, n_adapters=2, seed=0).double()
    minia3.freeze(model)
    adapter = torch.tensor([1, 0, 1])
    batch = batch_of(lengths, n_choices=1)
    if lengths[0] != lengths[1]:  # padding on the left, holes, and targets of three lengths
        holes = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
        batch = batch._replace(
            source_BM=batch.source_BM.flip(1),
            mask_BM=batch.mask_BM.flip(1),
            target_mask_BCL=holes[:, None],
        )

    def in_one_pass():
        return choice_logprobs(model, batch, adapter)

    def in_two_passes():
        state = model.start(batch.source_BM, batch.mask_BM, adapter)
        return logprobs_of_choices(model, state, batch.target_BCL, batch.target_mask_BCL)

    results = []
    for logprobs in (in_one_pass, in_two_passes):
        model.zero_grad()
        logp_BCL = logprobs()
        total_loss(logp_BCL, batch.target_mask_BCL, batch.label_B, ("lm",)).backward()
        gradients = [vector.grad for vector in minia3.vectors(model).values()]
        results.append([logp_BCL.detach(), *gradients])
    same(*results, rtol=1e-12, atol=1e-12)


def test_a_source_without_a_real_token_is_refused_in_one_pass_too(loaded):
    batch = batch_of((3, 2), n_choices=1)
    batch.mask_BM[1] = False
    with pytest.raises(ValueError, match=r"source rows \[1\] have no real token"):
        choice_logprobs(loaded("llama-gqa", seed=0), batch)


# Masks with holes: conversations


def test_tokens_that_are_not_scored_are_read(loaded):
    """The scores of the others are those that they have if all tokens are scored."""
    model = loaded("llama-gqa", n_adapters=2, seed=0)
    target = [[8, 9, 10, 11, 12, 13]]
    is_scored = [True, False, False, True, True, False]
    with_holes = [Example([5, 6, 7], target, 0, is_scored), Example([11], [[12, 13, 14]], 0)]
    without = [example._replace(is_scored=None) for example in with_holes]
    batch = collate(with_holes)
    found = choice_logprobs(model, batch)
    expected = choice_logprobs(model, collate(without))
    torch.testing.assert_close(found, expected * batch.target_mask_BCL)
    assert (found[0, 0][~torch.tensor(is_scored)] == 0).all()

    scores = score_examples(model, with_holes)
    mean = expected[0, 0][torch.tensor(is_scored)].mean()
    torch.testing.assert_close(scores[0, 0], mean)


# A GPU


def test_the_next_batch_is_computed_before_the_scores_of_one_are_read(both, monkeypatch):
    """Reading waits for a GPU, which must have something to do meanwhile.

    A copy is asked for before the next batch, because a GPU would make it after that batch.
    """
    events = []

    def note(event):
        number = sum(other.startswith(event) for other in events)
        events.append(f"{event} {number}")

    def compute(model, batch, adapter):
        note("compute")
        return choice_logprobs(model, batch, adapter)

    def start_reading(logp_BCL):
        note("copy")

        def read():
            note("read")
            return logp_BCL

        return read

    examples = [Example([3, 4, 5], [[6], [7]], 0)] * 5
    expected = score_examples(both.model, examples, batch_size=2)
    monkeypatch.setattr("minia3.inference.scoring.choice_logprobs", compute)
    monkeypatch.setattr("minia3.inference.scoring.start_reading", start_reading)
    assert torch.equal(score_examples(both.model, examples, batch_size=2), expected)
    turns = ["compute 0, copy 0", "compute 1, copy 1", "read 0", "compute 2, copy 2", "read 1"]
    assert ", ".join(events) == ", ".join([*turns, "read 2"])
