"""Guards `start`, `step` and `repeat` for both architectures: however the target is cut into steps, wherever the
padding lies and whoever shares the batch, the logits are those of the row alone; what cannot be started is refused."""

import pytest
import torch
import torch.nn.functional as F
from conftest import logits, off, tokens
from hypothesis import example, given, settings
from hypothesis import strategies as st

import minia3

NAMES = ["t5-v1.0", "t5-wide", "llama-gqa", "llama3"]


@pytest.fixture(scope="module")
def models(loaded):
    return {name: loaded(name, n_adapters=2, seed=0) for name in NAMES}


@st.composite
def masks(draw, holes=False):
    """(B, M) bool: rows with 1 to 6 real tokens; padding left, right or on both sides, or anywhere."""
    width = draw(st.integers(1, 9))
    if holes:
        row = st.lists(st.booleans(), min_size=width, max_size=width).filter(any)
        return torch.tensor(draw(st.lists(row, min_size=1, max_size=3)))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        n_real = draw(st.integers(1, width))
        n_left = draw(st.integers(0, width - n_real))
        rows.append([False] * n_left + [True] * n_real + [False] * (width - n_left - n_real))
    return torch.tensor(rows)


def check_rows(model, mask, seed):
    source, target = tokens(*mask.shape, seed=seed), tokens(len(mask), 3, seed=seed + 1)  # padding holds random ids
    adapter = torch.arange(len(mask)) % 2
    found = logits(model, source, mask, target, adapter)
    for i in range(len(mask)):
        alone = logits(model, source[i : i + 1, mask[i]], None, target[i : i + 1], int(adapter[i]))
        assert off(found[i : i + 1], alone) < 1e-5


@pytest.mark.parametrize("name", NAMES)
@given(mask=masks(), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=8)
def test_a_padded_row_is_the_row_without_padding(models, name, mask, seed):
    check_rows(models[name], mask, seed)


@pytest.mark.parametrize("name", ["llama-gqa", "llama3"])
@given(mask=masks(holes=True), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=8)
def test_a_llama_row_with_holes_is_the_row_without_them(models, name, mask, seed):
    check_rows(models[name], mask, seed)


@pytest.mark.parametrize("name", NAMES)
@given(mask=masks(), cuts=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=st.integers(0, 99))
@example(mask=torch.tensor([[False, True, True], [True, True, False]]), cuts=[1, 1, 3, 1], seed=0)
@settings(deadline=None, max_examples=6)
def test_however_the_target_is_cut_into_steps_the_logits_are_those_of_one_step(models, name, mask, cuts, seed):
    model, source, target = (
        models[name],
        tokens(*mask.shape, seed=seed),
        tokens(len(mask), sum(cuts) - 1, seed=seed + 1),
    )
    for mask_or_none in (mask, None):
        expected = logits(model, source, mask_or_none, target)
        with torch.no_grad():
            state = model.start(source, mask_or_none)
            parts = torch.cat((state.start, target), dim=1).split(cuts, dim=1)
            found = torch.cat([model.step(part, state) for part in parts], dim=1)
        assert off(found, expected) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_a_mask_of_all_true_is_no_mask(models, name):
    source, target = tokens(2, 6), tokens(2, 4, seed=1)
    all_true = torch.ones_like(source, dtype=torch.bool)
    assert off(logits(models[name], source, all_true, target), logits(models[name], source, None, target)) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_a_later_token_changes_nothing_before_it(models, name):
    source, target = tokens(1, 6), tokens(1, 6, seed=1)
    expected = logits(models[name], source, None, target)
    for i in range(6):
        changed = target.clone()
        changed[0, i] = (target[0, i] + 1) % 61
        found = logits(models[name], source, None, changed)
        assert off(found[:, : i + 1], expected[:, : i + 1]) < 1e-6
        assert off(found[:, i + 1 :], expected[:, i + 1 :]) > 1e-3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n_before", [0, 1, 3])
def test_repeating_the_state_is_repeating_the_source(models, name, masked, n_before):
    model, source, before, target = models[name], tokens(2, 5), tokens(2, n_before, seed=1), tokens(6, 3, seed=2)
    mask = torch.tensor([[False, True, True, True, False], [True, False, False, False, False]]) if masked else None
    adapter = torch.tensor([1, 0])

    def repeat(x):
        return None if x is None else x.repeat_interleave(3, dim=0)

    with torch.no_grad():
        whole = model.start(repeat(source), repeat(mask), repeat(adapter))
        state = model.start(source, mask, adapter)
        if n_before:
            model.step(before, state)
            model.step(repeat(before), whole)
        repeated = state.repeat(3)
        assert torch.equal(repeated.start, whole.start)
        expected = model.step(target, whole)
        assert off(model.step(target, repeated), expected) < 1e-5
        # and the state that was repeated goes on as if nothing had happened
        assert off(model.step(target[::3], state), expected[::3]) < 1e-5
        # as does a second repeat of the first one
        assert off(model.step(target, whole.repeat(1)), model.step(target, whole)) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_stepping_a_repeated_state_leaves_the_first_one_where_it_was(models, name):
    model, source, target = models[name], tokens(2, 4), tokens(2, 3, seed=1)
    with torch.no_grad():
        undisturbed, state = model.start(source), model.start(source)
        for token in target.split(1, dim=1):
            model.step(token.repeat_interleave(2, dim=0), state.repeat(2))
            assert torch.equal(model.step(token, state), model.step(token, undisturbed))


@pytest.mark.parametrize("name", ["t5-v1.0", "llama-gqa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_every_mask_has_the_dtype_of_the_queries(loaded, monkeypatch, name, dtype):
    """Some versions of torch are silently wrong on the CPU where it has not."""
    seen, original = [], F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask, **options):
        seen.append((q.dtype, None if attn_mask is None else attn_mask.dtype))
        return original(q, k, v, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    logits(loaded(name, dtype=dtype), tokens(2, 3), mask, tokens(2, 3))
    assert (dtype, dtype) in seen
    assert set(seen) <= {(dtype, dtype), (dtype, None)}


@pytest.mark.parametrize("name", NAMES)
def test_start_changes_neither_its_arguments_nor_the_model(models, name):
    source, mask = tokens(2, 5), torch.tensor([[False, True, True, False, True], [True] * 5])
    before = source.clone(), mask.clone()
    first = logits(models[name], source, mask, tokens(2, 2))
    assert torch.equal(source, before[0])
    assert torch.equal(mask, before[1])
    assert torch.equal(logits(models[name], source, mask, tokens(2, 2)), first)


@pytest.mark.parametrize("name", NAMES)
def test_log_probabilities_are_those_of_the_logits_and_move_the_state(models, name):
    model, source, target = models[name], tokens(2, 5), tokens(2, 4, seed=1)
    expected = logits(model, source, None, target)[:, :-1].log_softmax(-1).gather(2, target[..., None])[..., 0]
    state = model.start(source)
    before = state.length
    found = minia3.logprobs(model, state, target)
    assert off(found.detach(), expected) < 1e-5
    assert found.requires_grad
    assert found.dtype == torch.float32
    assert state.length == before + 4


@pytest.mark.parametrize("name", ["t5-v1.0", "llama-gqa"])
@pytest.mark.parametrize(
    ("source", "mask", "message"),
    [
        (torch.ones(2, 0, dtype=torch.long), None, r"at least one token, found \(2, 0\)"),
        (torch.ones(0, 2, dtype=torch.long), None, r"found \(0, 2\)"),
        (torch.ones(3, dtype=torch.long), None, r"found \(3,\)"),
        (tokens(2, 3), torch.ones(2, 4, dtype=torch.bool), r"mask must be bool \(2, 3\), found torch.bool \(2, 4\)"),
        (tokens(2, 3), torch.ones(2, 3), r"mask must be bool \(2, 3\), found torch.float32"),
        (tokens(2, 3), torch.ones(2, 3, dtype=torch.long), "mask must be bool"),
        (tokens(3, 2), torch.tensor([[True] * 2, [False] * 2, [False] * 2]), r"rows \[1, 2\] have no real token"),
    ],
)
def test_what_cannot_be_started_is_refused(models, name, source, mask, message):
    with pytest.raises(ValueError, match=message):
        models[name].start(source, mask)
