"""Guards `start`, `step`, `select` and `repeat` of both architectures.

However the target is cut into steps, wherever the padding is and whoever shares the batch, the
logits are those of the row alone. The cache grows in place, but not if a graph or another state
still needs what was there. What cannot be started is refused.
"""

import gc
import math
import re
import warnings
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import logits, off, tokens
from hypothesis import example, given, settings
from hypothesis import strategies as st

import minia3
from minia3.inference import scoring
from minia3.model import attend, packing, sequence_state
from minia3.model.sequence_state import State

NAMES = ["t5-v1.0", "t5-wide", "llama-gqa", "mistral"]
MASK = torch.tensor(
    [
        [False, True, True, True],
        [True, False, False, False],
        [True, True, True, True],
        [True, True, True, False],
    ]
)


@pytest.fixture(scope="module")
def models(loaded):
    return {name: loaded(name, n_adapters=2, seed=0) for name in NAMES}


def length_mask(*lengths):
    """Return (B, M) bool: rows of these lengths, padded on the right."""
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def take(x, rows):
    """Return the rows of a tensor, or None of None."""
    return None if x is None else x[rows]


def step_in_parts(model, state, target, lengths):
    """Return the logits of `start` and target, given to `step` in parts of these lengths."""
    parts = torch.cat((state.start, target), dim=1).split(lengths, dim=1)
    return torch.cat([model.step(part, state) for part in parts], dim=1)


# Padding


@st.composite
def masks(draw, holes=False):
    """(B, M) bool. Padding is on the left, the right or both; holes: anywhere."""
    width = draw(st.integers(1, 9))
    if holes:
        row = st.lists(st.booleans(), min_size=width, max_size=width).filter(any)
        return torch.tensor(draw(st.lists(row, min_size=1, max_size=3)))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        n_real = draw(st.integers(1, width))
        n_left = draw(st.integers(0, width - n_real))
        n_right = width - n_left - n_real
        rows.append([False] * n_left + [True] * n_real + [False] * n_right)
    return torch.tensor(rows)


def check_rows(model, mask, seed):
    """Assert that each row of a padded batch is the row alone. Its padding holds random ids."""
    source = tokens(*mask.shape, seed=seed)
    target = tokens(len(mask), 3, seed=seed + 1)
    adapter = torch.arange(len(mask)) % 2
    found = logits(model, source, mask, target, adapter)
    for i in range(len(mask)):
        real = source[i : i + 1, mask[i]]
        expected = logits(model, real, None, target[i : i + 1], int(adapter[i]))
        assert off(found[i : i + 1], expected) < 1e-5


@pytest.mark.parametrize("name", NAMES)
@given(mask=masks(), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=8)
def test_a_padded_row_is_the_row_without_padding(models, name, mask, seed):
    check_rows(models[name], mask, seed)


@pytest.mark.parametrize("name", ["llama-gqa", "mistral"])
@given(mask=masks(holes=True), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=8)
def test_a_llama_row_with_holes_is_the_row_without_them(models, name, mask, seed):
    check_rows(models[name], mask, seed)


@pytest.mark.parametrize("name", NAMES)
def test_a_mask_of_all_true_is_no_mask(models, name):
    source = tokens(2, 6)
    target = tokens(2, 4, seed=1)
    all_true = torch.ones_like(source, dtype=torch.bool)
    found = logits(models[name], source, all_true, target)
    assert off(found, logits(models[name], source, None, target)) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_a_padded_batch_are_those_of_its_rows_apart(loaded, name):
    """In float64. One row has one token."""
    model = loaded(name, n_adapters=2, seed=0, dtype=torch.float64).double()
    minia3.freeze(model)
    source = tokens(4, 7)
    target = tokens(4, 3, seed=1)
    adapter = torch.tensor([0, 1, 1, 0])
    mask = length_mask(7, 1, 4, 2)
    minia3.logprobs(model, model.start(source, mask, adapter), target).sum().backward()
    together = {key: vector.grad.clone() for key, vector in minia3.vectors(model).items()}

    model.zero_grad()
    for row in range(4):
        real = source[row : row + 1, mask[row]]
        state = model.start(real, None, int(adapter[row]))
        minia3.logprobs(model, state, target[row : row + 1]).sum().backward()
    for key, vector in minia3.vectors(model).items():
        assert off(together[key], vector.grad) < 1e-12, key


@pytest.mark.parametrize("name", NAMES)
def test_what_works_token_by_token_works_on_real_tokens_alone(loaded, name):
    model = loaded(name)
    mask = length_mask(9, 2, 5)
    is_t5 = name.startswith("t5")
    block = model.encoder.blocks[0] if is_t5 else model.blocks[0]
    seen = []
    block.ffn.register_forward_pre_hook(
        lambda module, arguments: seen.append(arguments[0].shape[:2].numel())
    )
    model.start(tokens(3, 9), mask)
    # LLaMA's start leaves the last token of each row to `step`.
    n_left = 0 if is_t5 else 3
    assert seen == [mask.sum().item() - n_left]


# Steps


@pytest.mark.parametrize("name", NAMES)
@given(
    mask=masks(), cuts=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=st.integers(0, 99)
)
@example(mask=torch.tensor([[False, True, True], [True, True, False]]), cuts=[1, 1, 3, 1], seed=0)
@settings(deadline=None, max_examples=6)
def test_however_the_target_is_cut_into_steps_the_logits_are_those_of_one_step(
    models, name, mask, cuts, seed
):
    model = models[name]
    source = tokens(*mask.shape, seed=seed)
    target = tokens(len(mask), sum(cuts) - 1, seed=seed + 1)
    for mask_or_none in (mask, None):
        expected = logits(model, source, mask_or_none, target)
        with torch.no_grad():
            state = model.start(source, mask_or_none)
            found = step_in_parts(model, state, target, cuts)
        assert off(found, expected) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_a_later_token_changes_nothing_before_it(models, name):
    source = tokens(1, 6)
    target = tokens(1, 6, seed=1)
    expected = logits(models[name], source, None, target)
    for i in range(6):
        changed = target.clone()
        changed[0, i] = (target[0, i] + 1) % 61
        found = logits(models[name], source, None, changed)
        assert off(found[:, : i + 1], expected[:, : i + 1]) < 1e-6
        assert off(found[:, i + 1 :], expected[:, i + 1 :]) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_start_changes_neither_its_arguments_nor_the_model(models, name):
    source = tokens(2, 5)
    mask = torch.tensor([[False, True, True, False, True], [True] * 5])
    source_before = source.clone()
    mask_before = mask.clone()
    first = logits(models[name], source, mask, tokens(2, 2))
    assert torch.equal(source, source_before)
    assert torch.equal(mask, mask_before)
    assert torch.equal(logits(models[name], source, mask, tokens(2, 2)), first)


@pytest.mark.parametrize("name", NAMES)
def test_log_probabilities_are_those_of_the_logits_and_move_the_state(models, name):
    model = models[name]
    source = tokens(2, 5)
    target = tokens(2, 4, seed=1)
    logp = logits(model, source, None, target)[:, :-1].log_softmax(-1)
    expected = logp.gather(2, target[..., None])[..., 0]
    state = model.start(source)
    before = state.length
    found = minia3.logprobs(model, state, target)
    assert off(found.detach(), expected) < 1e-5
    assert found.requires_grad
    assert found.dtype == torch.float32
    assert state.length == before + 4


@pytest.mark.parametrize("name", ["t5-v1.0", "llama-gqa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_every_mask_has_the_dtype_of_the_queries(loaded, monkeypatch, name, dtype):
    """With another one, some versions of torch are silently wrong on the CPU."""
    seen = set()
    original = F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask, **options):
        mask_dtype = None if attn_mask is None else attn_mask.dtype
        seen.add((q.dtype, mask_dtype))
        return original(q, k, v, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(attend, "products_are_faster", lambda *_: False)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    logits(loaded(name, dtype=dtype), tokens(2, 3), mask, tokens(2, 3))
    assert (dtype, dtype) in seen
    assert seen <= {(dtype, dtype), (dtype, None)}


# Repeating and selecting rows


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n_before", [0, 1, 3])
def test_repeating_the_state_is_repeating_the_source(models, name, masked, n_before):
    model = models[name]
    source = tokens(2, 5)
    before = tokens(2, n_before, seed=1)
    target = tokens(6, 3, seed=2)
    adapter = torch.tensor([1, 0])
    mask = None
    if masked:
        mask = torch.tensor([[False, True, True, True, False], [True, False, False, False, False]])
    thrice = torch.tensor([0, 0, 0, 1, 1, 1])

    with torch.no_grad():
        whole = model.start(source[thrice], take(mask, thrice), adapter[thrice])
        state = model.start(source, mask, adapter)
        if n_before:
            model.step(before, state)
            model.step(before[thrice], whole)
        repeated = state.repeat(3)
        assert torch.equal(repeated.start, whole.start)
        expected = model.step(target, whole)
        assert off(model.step(target, repeated), expected) < 1e-5
        # The state that was repeated continues as if nothing had happened,
        assert off(model.step(target[::3], state), expected[::3]) < 1e-5
        # and so does a second repetition of the first one.
        assert off(model.step(target, whole.repeat(1)), model.step(target, whole)) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_stepping_a_repeated_state_leaves_the_first_one_where_it_was(models, name):
    model = models[name]
    source = tokens(2, 4)
    with torch.no_grad():
        undisturbed = model.start(source)
        state = model.start(source)
        for token in tokens(2, 3, seed=1).split(1, dim=1):
            twice = token.repeat_interleave(2, dim=0)
            first = state.repeat(2)
            second = state.repeat(2)
            model.step(twice, first)
            model.step(twice + 1, second)
            assert torch.equal(model.step(token, state), model.step(token, undisturbed))
            # Nor does the second repetition disturb the first.
            expected = model.step(twice, state.repeat(2))
            assert off(model.step(twice, first), expected) < 1e-5


ROWS = {
    "one": [1],
    "fewer": [2, 0],
    "reversed": [3, 2, 1, 0],
    "more": [0, 0, 3, 1, 1, 1, 2],
    "the same": [0, 1, 2, 3],
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("mask", "n_before"), [(None, 0), (None, 3), (MASK, 0), (MASK, 1)])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_selecting_rows_of_a_state_is_starting_from_these_rows(models, name, mask, n_before, rows):
    model = models[name]
    rows = torch.tensor(rows)
    source = tokens(4, 4)
    adapter = torch.tensor([1, 0, 0, 1])
    target = tokens(len(rows), 3, seed=2)
    other_target = tokens(4, 3, seed=3)
    with torch.no_grad():
        state = model.start(source, mask, adapter)
        undisturbed = model.start(source, mask, adapter)
        whole = model.start(source[rows], take(mask, rows), adapter[rows])
        for i in range(n_before):
            token = tokens(4, n_before, seed=1)[:, i : i + 1]
            model.step(token, state)
            model.step(token, undisturbed)
            model.step(token[rows], whole)
        selected = state.select(rows)
        selected_again = state.select(rows)
        assert torch.equal(selected.start, whole.start)
        # Three states continue in turns, and each has room of its own.
        for i in range(3):
            token = target[:, i : i + 1]
            other_token = other_target[:, i : i + 1]
            expected = model.step(token, whole)
            assert off(model.step(token, selected), expected) < 1e-5
            found = model.step(other_token, state)
            assert torch.equal(found, model.step(other_token, undisturbed))
            model.step(other_token[rows], selected_again)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_that_was_selected_from_is_freed_at_once(models, name):
    """A beam search selects at each step. With a cycle, each step would leave a cache behind."""
    gc.disable()
    try:
        with torch.no_grad():
            state = models[name].start(tokens(2, 4), MASK[:2]).repeat(2)
            for _ in range(3):
                models[name].step(state.start, state)
                old = weakref.ref(state)
                state = state.select(torch.tensor([0, 3, 1, 1]))
                assert old() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("grad", [False, True])
@settings(deadline=None, max_examples=10)
@given(
    mask=masks(),
    c=st.integers(2, 3),
    lengths=st.lists(st.integers(1, 3), min_size=2, max_size=4),
    data=st.data(),
)
def test_rows_that_continue_one_source_are_rows_apart(models, name, grad, mask, c, lengths, data):
    """Over several steps, also after some rows were selected, and repeated again."""
    model = models[name]
    source_row = torch.arange(len(mask)).repeat_interleave(c)
    n_rows = len(source_row)
    source = tokens(*mask.shape)
    adapter = torch.arange(len(mask)) % 2
    with torch.set_grad_enabled(grad):
        state = model.start(source, mask, adapter).repeat(c)
        whole = model.start(source[source_row], mask[source_row], adapter[source_row])
        for i, length in enumerate(lengths):
            target = tokens(n_rows, length, seed=i)
            assert off(model.step(target, state), model.step(target, whole)) < 1e-5

        row = st.integers(0, n_rows - 1)
        rows = torch.tensor(data.draw(st.lists(row, min_size=1, max_size=4, unique=True)))
        repeated = state.repeat(2)
        state = state.select(rows)
        whole = whole.select(rows)
        for i in range(2):
            target = tokens(len(rows), 2, seed=9 + i)
            target_of_repeated = tokens(2 * n_rows, 2, seed=9 + i)
            target_of_repeated[rows * 2] = target
            expected = model.step(target, whole)
            assert off(model.step(target, state), expected) < 1e-5
            assert off(model.step(target_of_repeated, repeated)[rows * 2], expected) < 1e-5


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=20)
@given(
    mask=masks(), c=st.integers(1, 3), d=st.integers(1, 2), seed=st.integers(0, 9), data=st.data()
)
def test_selected_rows_that_shared_a_source_are_the_rows_apart(
    models, name, mask, c, d, seed, data
):
    model = models[name]
    row = st.integers(0, len(mask) * c * d - 1)
    rows = torch.tensor(data.draw(st.lists(row, min_size=1, max_size=4)))
    source = tokens(*mask.shape, seed=seed)
    target = tokens(len(rows), 3, seed=seed + 1)
    adapter = torch.arange(len(mask)) % 2
    with torch.no_grad():
        state = model.start(source, mask, adapter).repeat(c).repeat(d).select(rows)
        found = model.step(torch.cat((state.start, target), dim=1), state)
    source_row = rows // (c * d)
    expected = logits(model, source[source_row], mask[source_row], target, adapter[source_row])
    assert off(found, expected) < 1e-5


def use_state(model):
    """Return the logits of calls that need each form of the source's keys and values."""
    adapter = torch.tensor([1, 0, 1])
    state = model.start(tokens(3, 6), length_mask(6, 1, 4), adapter).repeat(2)
    found = [model.step(torch.cat((state.start, tokens(6, 3)), dim=1), state)]
    chosen = state.select(torch.tensor([5, 1, 0, 3]))
    for after in (chosen.repeat(2), state, chosen):
        for n_tokens in (1, 2):
            found.append(model.step(tokens(len(after.start), n_tokens, seed=n_tokens), after))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_state_is_the_same_if_its_sources_lie_end_to_end(models, name, monkeypatch):
    """As those of long rows do on a CPU."""
    model = models[name]
    vectors = list(minia3.vectors(model).values())
    with torch.no_grad():
        expected = use_state(model)
    monkeypatch.setattr(packing, "LEAST_COLUMNS", 1)
    with torch.no_grad():
        found = use_state(model)
    found_with_gradients = use_state(model)
    for logits_found in (found, found_with_gradients):
        torch.testing.assert_close(logits_found, expected, rtol=1e-4, atol=1e-5)

    loss = sum(x.square().sum() for x in found_with_gradients)
    gradients = torch.autograd.grad(loss, vectors)
    monkeypatch.undo()
    loss = sum(x.square().sum() for x in use_state(model))
    for gradient, expected in zip(gradients, torch.autograd.grad(loss, vectors), strict=True):
        assert off(gradient, expected) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_keys_and_values_of_the_source_are_not_copied_for_each_choice(models, name):
    state = models[name].start(tokens(2, 5), length_mask(5, 3))
    shared = "cross_kv" if name.startswith("t5") else "kv"
    repeated = state.repeat(3)
    repeated.ensure_all_cross_kv()
    state.ensure_all_cross_kv()
    for cache, repeated_cache in zip(state.caches, repeated.caches, strict=True):
        found = getattr(repeated_cache, shared)
        expected = getattr(cache, shared)
        assert [x.data_ptr() for x in found] == [x.data_ptr() for x in expected]
        assert [len(x) for x in found] == [2, 2]
    selected = repeated.repeat(2).select(torch.tensor([11, 0, 5]))
    assert len(getattr(selected.caches[0], shared)[0]) == 3


@pytest.mark.parametrize(
    ("rows", "n_sources"), [([2, 0, 1, 5, 3, 3], 2), ([4, 4, 3], 1), ([0, 3, 1], 3), ([0, 1], 2)]
)
def test_beams_continue_from_keys_and_values_of_their_source_without_copies(
    models, rows, n_sources
):
    """Two sources have three beams each. Rows share a source if they still are three in a row."""
    model = models["t5-v1.0"]
    source = tokens(2, 5)
    mask = length_mask(5, 3)
    state = model.start(source, mask).repeat(3).select(torch.tensor(rows))
    for cache in state.caches:
        assert [len(x) for x in cache.cross_kv] == [n_sources, n_sources]
    assert len(state.memory_bias_B11M) == n_sources

    source_row = torch.tensor(rows) // 3
    token = tokens(len(rows), 1)
    with torch.no_grad():
        found = model.step(token, state)
        expected = model.step(token, model.start(source[source_row], mask[source_row]))
    assert off(found, expected) < 1e-5


def drawn(mask_LM):
    """Return each row of a mask as a text: x is seen, - is not."""
    return ["".join("x" if is_seen else "-" for is_seen in row) for row in mask_LM.tolist()]


def test_a_column_is_seen_by_later_columns_of_its_row():
    empty = torch.zeros(0, dtype=torch.long)
    state = State(torch.zeros(2, 1), None, [], empty, empty)
    state.append_columns(torch.zeros(2, 2))
    state.end_step()
    # Two columns belong to both rows. Then each row gets two, and then one.
    shared = state.repeat(2)
    assert shared.append_columns(torch.arange(8).view(4, 2)).tolist() == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
    ]
    shared.end_step()
    assert shared.append_columns(torch.arange(4).view(4, 1)).tolist() == [[0, 1], [2, 3]]
    assert state.length == 2
    assert shared.length == 5
    assert drawn(state.causal_mask(1)) == ["xx"]
    assert drawn(state.causal_mask(2)) == ["x-", "xx"]
    assert drawn(shared.causal_mask(6)) == [
        "xxx-----",
        "xxxx----",
        "xx--x---",
        "xx--xx--",
        "xxxx--x-",
        "xx--xx-x",
    ]


@torch.no_grad()
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
def test_beams_that_change_places_share_the_keys_and_values_of_their_sources(models, mask):
    """A beam search selects at each step. Only what the steps write into is copied."""
    model = models["t5-v1.0"]
    state = model.start(tokens(4, 4), mask).repeat(3)
    model.step(state.start, state)
    same_sources = state.select(torch.tensor([1, 0, 1, 5, 5, 5, 8, 6, 7, 9, 9, 10]))
    fewer_sources = state.select(torch.tensor([1, 0, 1, 5, 5, 5, 8, 6, 7]))
    other_order = state.select(torch.tensor([5, 5, 5, 1, 0, 1, 8, 6, 7, 9, 9, 10]))
    for other, is_same in ((same_sources, True), (fewer_sources, False), (other_order, False)):
        for cache, selected in zip(state.caches, other.caches, strict=True):
            for x, y in zip(cache.cross_kv, selected.cross_kv, strict=True):
                assert (x.data_ptr() == y.data_ptr()) == is_same
            for x, y in zip(cache.kv, selected.kv, strict=True):
                assert x.data_ptr() != y.data_ptr()


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_state_with_the_same_rows_sees_no_later_tokens(models, name):
    model = models[name]
    target = tokens(4, 3, seed=1)
    state = model.start(tokens(4, 4), MASK)
    expected = model.step(torch.cat((state.start, target), dim=1), state)
    state = model.start(tokens(4, 4), MASK)
    for token in (state.start, target[:, :1]):  # then there is room for more
        model.step(token, state)
    same = state.select(torch.arange(4))
    found = [model.step(target[:, 1:2], same)]
    model.step(target[:, 1:2].flip(0), state)
    found.append(model.step(target[:, 2:], same))
    assert off(torch.cat(found, dim=1), expected[:, 2:]) < 1e-5


# The cache


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
def test_cached_is_uncached_while_the_cache_grows(models, name, mask):
    model = models[name]
    source = tokens(4, 4)
    target = tokens(4, 139, seed=1)
    expected = logits(model, source, mask, target)
    # The cache grows by 64 columns. Of the tokens that come alone, some come where it grows.
    for cuts in ([*[1] * 9, 50, *[1] * 9, 58, *[1] * 14], [63, 1, 1, 65, 6, 4]):
        with torch.no_grad():
            found = step_in_parts(model, model.start(source, mask), target, cuts)
        assert off(found, expected) < 1e-5


@pytest.mark.parametrize("name", ["t5-v1.0", "llama-gqa"])
def test_the_cache_is_not_copied_at_each_step(models, name, monkeypatch):
    model = models[name]
    n_steps = 200
    n_columns = []  # of each tensor that is copied
    cat = torch.cat
    pad = F.pad

    def spy_on_cat(tensors, dim=0):
        if tensors[0].is_floating_point():
            n_columns.append(max(x.shape[dim] for x in tensors))
        return cat(tensors, dim=dim)

    def spy_on_pad(x, *rest):
        n_columns.append(x.shape[2])
        return pad(x, *rest)

    monkeypatch.setattr(torch, "cat", spy_on_cat)
    monkeypatch.setattr(F, "pad", spy_on_pad)
    buffers = []
    with torch.no_grad():
        state = model.start(tokens(3, 5))
        for token in tokens(3, n_steps, seed=1).split(1, dim=1):
            model.step(token, state)
            buffer = state.caches[0].kv[0]
            if not any(buffer is known for known in buffers):
                buffers.append(buffer)
    # Smaller copies are halves of a rotated head.
    copies = [n for n in n_columns if n > model.config.d_head]
    # Keys and values of each block, once in 64 steps.
    assert len(copies) == 2 * len(state.caches) * (n_steps // 64)
    assert 3 <= len(buffers) <= 5


def gradients(model, out):
    """Return the gradients of the sum of squares of `out`, of vectors that have a gradient."""
    model.zero_grad()
    out.square().sum().backward()
    found = {}
    for name, vector in minia3.vectors(model).items():
        if vector.grad is not None:
            found[name] = vector.grad.clone()
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
@pytest.mark.parametrize("order", ["ngng", "gngn", "nngn", "ggnn"])
def test_steps_with_and_without_gradients_may_follow_one_another(models, name, mask, order):
    """g: with gradients, n: without. The logits are those of one step.

    The gradients of a step do not change by the steps that follow it, nor by whether earlier steps
    wrote in place.
    """
    model = models[name]
    source = tokens(4, 4)
    target = tokens(4, 2 * len(order) - 1, seed=1)
    expected = logits(model, source, mask, target)

    def run(order):
        with torch.set_grad_enabled(order[0] == "g"):
            state = model.start(source, mask)
        parts = torch.cat((state.start, target), dim=1).split(2, dim=1)
        outputs = []
        for kind, part in zip(order, parts, strict=False):
            with torch.set_grad_enabled(kind == "g"):
                outputs.append(model.step(part, state))
        return outputs

    outputs = run(order)
    assert [out.requires_grad for out in outputs] == [kind == "g" for kind in order]
    assert off(torch.cat(outputs, dim=1).detach(), expected) < 1e-5
    for i, kind in enumerate(order):
        if kind == "g":
            of_shorter_run = gradients(model, run(order[: i + 1])[-1])
            for vector, gradient in gradients(model, run(order)[i]).items():
                assert torch.equal(gradient, of_shorter_run[vector])
                assert gradient.any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
def test_a_step_without_gradients_takes_none_from_the_tokens_before_it(
    models, name, without_gradients
):
    """Later steps see the tokens of such a step as constants."""
    model = models[name]
    source = tokens(4, 4)
    # The second part makes room for 64 more tokens, and the third one needs more.
    parts = tokens(4, 71, seed=1).split((2, 2, 65, 2), dim=1)

    state = model.start(source, MASK)
    model.step(parts[0], state)
    n_before = state.caches[0].length
    with without_gradients():
        model.step(parts[1], state)
        model.step(parts[2], state)
    found = gradients(model, model.step(parts[3], state))

    state = model.start(source, MASK)
    for part in parts[:3]:
        model.step(part, state)
    for cache in state.caches:
        parts_of_kv = [(x[:, :, :n_before], x[:, :, n_before:].detach()) for x in cache.kv]
        cache.kv = tuple(torch.cat(both, dim=2) for both in parts_of_kv)
    expected = gradients(model, model.step(parts[3], state))

    assert found.keys() == expected.keys()
    for vector, gradient in expected.items():
        torch.testing.assert_close(found[vector], gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_flow_through_a_cache_that_grows_and_is_selected_from(models, name):
    model = models[name]
    source = tokens(2, 4)
    target = tokens(2, 5, seed=1)
    rows = torch.tensor([1, 0, 1])
    state = model.start(source)
    for token in target[:, :3].split(1, dim=1):
        model.step(token, state)
    found = gradients(model, model.step(target[rows, 3:], state.select(rows)))
    expected = gradients(model, model.step(target[rows], model.start(source[rows]))[:, 3:])
    for vector, gradient in expected.items():
        torch.testing.assert_close(found[vector], gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
def test_decoding_a_token_takes_no_gradients_from_a_state_that_was_selected(
    models, name, without_gradients
):
    model = models[name]
    source = tokens(4, 4)
    rows = torch.tensor([3, 0, 3])

    def gradients_after_a_token(state):
        with without_gradients():
            model.step(tokens(3, 1), state)
        return gradients(model, model.step(tokens(3, 2), state))

    found = gradients_after_a_token(model.start(source, MASK).select(rows))
    expected = gradients_after_a_token(model.start(source[rows], MASK[rows]))
    assert found.keys() == expected.keys()
    for vector, gradient in expected.items():
        torch.testing.assert_close(found[vector], gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
def test_rows_that_share_keys_and_values_share_their_gradients(models, name, without_gradients):
    """Also if the first state writes into its room meanwhile: an error of PyTorch's views."""
    model = models[name]
    found = []
    for mode in (torch.enable_grad, without_gradients):
        state = model.start(tokens(4, 4), MASK)
        model.step(tokens(4, 2), state)
        with torch.no_grad():
            model.step(tokens(4, 1), state)
        with mode():
            repeated = state.repeat(2)
        with torch.no_grad():
            model.step(tokens(4, 1), state)
        found.append(gradients(model, model.step(tokens(8, 2), repeated)))
    assert found[0].keys() == found[1].keys()
    for vector, gradient in found[0].items():
        assert torch.equal(found[1][vector], gradient)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
def test_a_state_that_has_decoded_in_inference_mode_may_train_outside_of_it(models, name, mask):
    model = models[name]
    found = []
    for without_gradients in (torch.no_grad, torch.inference_mode):
        with torch.no_grad():
            state = model.start(tokens(4, 4), mask)
        with without_gradients():
            model.step(state.start, state)
        found.append(gradients(model, model.step(tokens(4, 2), state)))
    for vector, gradient in found[0].items():
        assert torch.equal(found[1][vector], gradient)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_rows_that_share_a_source_are_those_of_the_rows_apart(models, name):
    model = models[name]
    mask = MASK[:2]
    source = tokens(2, 4)
    target = tokens(6, 3, seed=1)
    adapter = torch.tensor([1, 0])
    thrice = torch.tensor([0, 0, 0, 1, 1, 1])
    shared = model.start(source, mask, adapter).repeat(3)
    apart = model.start(source[thrice], mask[thrice], adapter[thrice])
    found = gradients(model, model.step(target, shared))
    expected = gradients(model, model.step(target, apart))
    for vector, gradient in expected.items():
        torch.testing.assert_close(found[vector], gradient, rtol=1e-4, atol=1e-4)


# Refusals


@torch.no_grad()
@pytest.mark.parametrize("name", ["t5-v1.0", "llama-gqa"])
@pytest.mark.parametrize("shape", [(1, 3), (4, 3), (6, 3), (3, 0), (3,)])
def test_tokens_for_another_number_of_rows_are_refused(models, name, shape):
    state = models[name].start(tokens(3, 4))
    expected = re.escape(f"expected tokens for each of 3 rows, found {shape}")
    with pytest.raises(ValueError, match=expected):
        models[name].step(tokens(*shape), state)
    with pytest.raises(ValueError, match=expected):
        minia3.logprobs(models[name], state, tokens(*shape))
    assert state.length == models[name].start(tokens(3, 4)).length


@pytest.mark.parametrize("name", ["t5-v1.0", "llama-gqa"])
@pytest.mark.parametrize(
    ("source", "mask", "message"),
    [
        (torch.ones(2, 0, dtype=torch.long), None, r"at least one token, found \(2, 0\)"),
        (torch.ones(0, 2, dtype=torch.long), None, r"found \(0, 2\)"),
        (torch.ones(3, dtype=torch.long), None, r"found \(3,\)"),
        (
            tokens(2, 3),
            torch.ones(2, 4, dtype=torch.bool),
            r"mask must be bool \(2, 3\), found torch.bool \(2, 4\)",
        ),
        (tokens(2, 3), torch.ones(2, 3), r"mask must be bool \(2, 3\), found torch.float32"),
        (tokens(2, 3), torch.ones(2, 3, dtype=torch.long), "mask must be bool"),
        (
            tokens(3, 2),
            torch.tensor([[True] * 2, [False] * 2, [False] * 2]),
            r"rows \[1, 2\] have no real token",
        ),
    ],
)
def test_a_source_or_mask_that_cannot_be_started_is_refused(models, name, source, mask, message):
    with pytest.raises(ValueError, match=message):
        models[name].start(source, mask)


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_that_all_rows_share_is_looked_up_once(models, name):
    """Otherwise the vectors of each token are looked up, if there is padding."""
    model = models[name]
    source = tokens(4, 4)
    states = [model.start(source, MASK, adapter) for adapter in (1, torch.tensor([1] * 4))]
    assert [state.adapter_B.tolist() for state in states] == [[1], [1]]
    expected, found = (model.step(state.start, state) for state in states)
    assert torch.equal(found, expected)
    assert model.start(source, MASK, [1, 1, 0, 1]).adapter_B.tolist() == [1, 1, 0, 1]


@pytest.mark.parametrize("adapter", ["rte", ["rte", "cb"], ["rte", None], [None, 1], [[0], 1]])
def test_adapters_that_are_no_numbers_are_refused(models, adapter):
    message = r"adapter is .*, expected rows of the model \(Adapters.rows returns the rows of names"
    with pytest.raises(ValueError, match=message):
        models["llama-gqa"].start(tokens(2, 3), None, adapter)


def advance(model, state, target, kind):
    if kind == "step":
        return model.step(target, state)
    return minia3.logprobs(model, state, target)


def out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory")


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("part", ["tokens", "last block", "logits"])
@pytest.mark.parametrize("kind", ["step", "logprobs"])
def test_a_state_whose_last_step_has_failed_is_refused(models, name, part, kind, monkeypatch):
    """Some of its blocks may have read the tokens, and others not."""
    model = models[name]
    target = tokens(2, 3, seed=1)
    decoder = model.decoder if name.startswith("t5") else model
    expected = advance(model, model.start(tokens(2, 4)), target, kind)
    state = model.start(tokens(2, 4))
    with monkeypatch.context() as patch:
        if part == "tokens":
            patch.setattr(model.embed, "forward", out_of_memory)
        elif part == "last block":
            patch.setattr(decoder.blocks[-1].ffn, "forward", out_of_memory)
        else:
            patch.setattr(model, "logits", out_of_memory)
            patch.setattr(scoring, "target_logprobs", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            advance(model, state, target, kind)
    for failed in (state, state.select(torch.tensor([1, 0]))):
        with pytest.raises(ValueError, match="the last step of this state failed halfway"):
            advance(model, failed, target, kind)
    state = model.start(tokens(2, 4))
    assert torch.equal(advance(model, state, target, kind), expected)
    model.step(target, state)  # another step may follow one that has succeeded


# Lengths


@pytest.mark.parametrize(
    ("name", "mask", "shape"),
    [
        ("t5-v1.0", None, (4, 9, 9)),  # a bias for each head
        ("t5-v1.0", length_mask(9, 5), (2, 4, 9, 9)),  # and for each row, because padding differs
        ("llama-gqa", length_mask(9, 5), (2, 9, 17)),  # a mask for each row
    ],
)
def test_a_bias_that_is_too_large_is_refused_before_it_is_made(
    name, mask, shape, models, monkeypatch
):
    def read():
        models[name].step(tokens(2, 9), models[name].start(tokens(2, 9), mask))

    n_numbers = math.prod(shape)
    monkeypatch.setattr(sequence_state, "MAX_BIAS", n_numbers)
    read()
    monkeypatch.setattr(sequence_state, "MAX_BIAS", n_numbers - 1)
    message = rf"attention from 9 to \d+ tokens needs a bias of {n_numbers} numbers, .*--max-length"
    with pytest.raises(ValueError, match=message):
        read()


@pytest.mark.parametrize("name", ["t5-v1.0", "llama-gqa"])
def test_a_long_target_after_a_source_is_refused_before_its_bias_is_made(name, models, monkeypatch):
    state = models[name].start(tokens(1, 4))
    monkeypatch.setattr(sequence_state, "MAX_BIAS", 50)
    with pytest.raises(ValueError, match="attention from 8 to"):
        models[name].step(tokens(1, 8), state)


def test_a_t5_makes_no_mask_of_a_target_whose_bias_is_too_large(models, monkeypatch):
    state = models["t5-v1.0"].start(tokens(1, 4))
    monkeypatch.setattr(sequence_state, "MAX_BIAS", 50)
    monkeypatch.setattr(sequence_state.State, "causal_mask", lambda *_: pytest.fail("made"))
    with pytest.raises(ValueError, match="attention from 8 to"):
        models["t5-v1.0"].step(tokens(1, 8), state)


def test_a_llama_s_prompt_without_padding_needs_no_bias_however_long_it_is(models, monkeypatch):
    monkeypatch.setattr(sequence_state, "MAX_BIAS", 0)
    models["llama-gqa"].start(tokens(1, 50))


@pytest.mark.parametrize(
    ("name", "n_source", "n_targets", "n_numbers"),
    [
        ("t5-v1.0", 9, [3], 4 * 9 * 9),  # a bias for each head
        ("t5-v1.0", 4, [3, 6], 4 * 6 * 6),
        ("llama-gqa", 9, [3], 0),
        ("llama-gqa", 9, [3, 6], 6 * (9 + 6)),  # choices follow a prompt that was read before
        ("mistral", 9, [3], 12 * 12),  # beyond the window
        ("mistral", 1, [1], 0),
    ],
)
def test_lengths_are_checked_by_the_bias_that_attention_makes_of_them(
    name, n_source, n_targets, n_numbers, loaded, monkeypatch
):
    model = loaded(name)
    monkeypatch.setattr(sequence_state, "MAX_BIAS", n_numbers)
    model.check_lengths(n_source, n_targets)
    if n_numbers > 0:
        monkeypatch.setattr(sequence_state, "MAX_BIAS", n_numbers - 1)
        with pytest.raises(ValueError, match="attention from"):
            model.check_lengths(n_source, n_targets)


def warned(model, source, n_new, mask=None):
    """Return the messages of warnings while a model reads a source and writes some tokens."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state = model.start(source, mask)
        for i in range(n_new):
            model.step(tokens(len(source), 1, seed=i), state)
    return [str(warning.message) for warning in caught]


def test_reading_or_writing_beyond_the_positions_of_a_model_is_a_warning_once(loaded):
    for n_source, n_new in ((12, 1), (4, 8)):
        model = loaded("llama-gqa")
        model.config = replace(model.config, max_length=10)
        assert warned(model, tokens(1, 10), 0) == warned(model, tokens(2, 5), 5) == []
        (message,) = warned(model, tokens(1, n_source), n_new)
        assert "11 tokens is beyond the 10 positions" in message
        assert "max_position_embeddings" in message
        assert warned(model, tokens(1, n_source), n_new) == []
    # Padding does not count.
    model = loaded("llama-gqa")
    model.config = replace(model.config, max_length=10)
    assert warned(model, tokens(2, 14), 1, length_mask(9, 5, 14)[:2]) == []


def test_the_padding_of_a_prompt_that_has_left_is_no_reason_to_warn(loaded):
    model = loaded("llama-gqa")
    model.config = replace(model.config, max_length=10)
    state = model.start(tokens(3, 9), length_mask(9, 2, 4))
    short = state.repeat(2).select(torch.tensor([2, 5, 3]))  # of the prompts of 2, 4 and 2 tokens
    long = state.select(torch.tensor([1, 0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.step(tokens(3, 7), short)
        model.step(tokens(2, 2), long)
    with pytest.warns(UserWarning, match="a text of 11 tokens is beyond the 10 positions"):
        model.step(tokens(3, 1), short)
    model.has_warned = False
    with pytest.warns(UserWarning, match="a text of 11 tokens is beyond the 10 positions"):
        model.step(tokens(2, 1), long)


def test_a_t5_has_no_last_position(models):
    assert warned(models["t5-v1.0"], tokens(1, 600), 1) == []
