"""Guards `start`, `step`, `select` and `repeat` for both architectures: however the target is cut into steps, wherever
the padding lies and whoever shares the batch, the logits are those of the row alone; the cache grows in place, but not
where a graph or another state needs what was there; what cannot be started is refused."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from conftest import logits, off, tokens
from hypothesis import example, given, settings
from hypothesis import strategies as st

import minia3
from minia3.model.sequence_state import State

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
    source, target = (
        tokens(*mask.shape, seed=seed),
        tokens(len(mask), 3, seed=seed + 1),
    )  # padding holds random ids
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
@given(
    mask=masks(), cuts=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=st.integers(0, 99)
)
@example(mask=torch.tensor([[False, True, True], [True, True, False]]), cuts=[1, 1, 3, 1], seed=0)
@settings(deadline=None, max_examples=6)
def test_however_the_target_is_cut_into_steps_the_logits_are_those_of_one_step(
    models, name, mask, cuts, seed
):
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
    assert (
        off(
            logits(models[name], source, all_true, target),
            logits(models[name], source, None, target),
        )
        < 1e-6
    )


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
    model, source, before, target = (
        models[name],
        tokens(2, 5),
        tokens(2, n_before, seed=1),
        tokens(6, 3, seed=2),
    )
    mask = (
        torch.tensor([[False, True, True, True, False], [True, False, False, False, False]])
        if masked
        else None
    )
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
            twice = token.repeat_interleave(2, dim=0)
            one, other = state.repeat(2), state.repeat(2)
            model.step(twice, one)
            model.step(twice + 1, other)
            assert torch.equal(model.step(token, state), model.step(token, undisturbed))
            expected = state.repeat(2)
            assert off(model.step(twice, one), model.step(twice, expected)) < 1e-5, (
                "nor does the other"
            )


ROWS = {
    "one": [1],
    "fewer": [2, 0],
    "turned round": [3, 2, 1, 0],
    "more": [0, 0, 3, 1, 1, 1, 2],
    "the same": [0, 1, 2, 3],
}
MASK = torch.tensor(
    [[False, True, True, True], [True, False, False, False], [True] * 4, [True, True, True, False]]
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
@pytest.mark.parametrize("n_before", [0, 1, 3])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_selecting_rows_of_a_state_is_starting_from_these_rows(models, name, mask, n_before, rows):
    model, source, adapter, rows = (
        models[name],
        tokens(4, 4),
        torch.tensor([1, 0, 0, 1]),
        torch.tensor(rows),
    )
    before, target, other = (
        tokens(4, n_before, seed=1),
        tokens(len(rows), 3, seed=2),
        tokens(4, 3, seed=3),
    )
    with torch.no_grad():
        state = model.start(source, mask, adapter)
        whole = model.start(source[rows], None if mask is None else mask[rows], adapter[rows])
        undisturbed = model.start(source, mask, adapter)
        for token in before.split(1, dim=1) if n_before else ():
            model.step(token, state)
            model.step(token, undisturbed)
            model.step(token[rows], whole)
        selected, again = state.select(rows), state.select(rows)
        assert torch.equal(selected.start, whole.start)
        for i in range(3):  # three states that go on in turns, each of them in room of its own
            expected = model.step(target[:, i : i + 1], whole)
            assert off(model.step(target[:, i : i + 1], selected), expected) < 1e-5
            assert torch.equal(
                model.step(other[:, i : i + 1], state), model.step(other[:, i : i + 1], undisturbed)
            )
            model.step(other[rows, i : i + 1], again)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_selected_from_is_freed_at_once(models, name):
    """A search selects at each step: what waits for Python's collector of cycles would be a cache a step."""
    gc.disable()
    try:
        with torch.no_grad():
            state = models[name].start(tokens(2, 4), MASK[:2]).repeat(2)
            for _ in range(3):
                models[name].step(state.start, state)
                old, state = weakref.ref(state), state.select(torch.tensor([0, 3, 1, 1]))
                assert old() is None
    finally:
        gc.enable()


# The cache


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
def test_cached_is_uncached_across_the_blocks_in_which_the_cache_grows(models, name, mask):
    model, source, target = models[name], tokens(4, 4), tokens(4, 203, seed=1)
    expected = logits(model, source, mask, target)
    with torch.no_grad():
        for cuts in ([1] * 204, [63, 1, 1, 65, 70, 4]):
            state = model.start(source, mask)
            parts = torch.cat((state.start, target), dim=1).split(cuts, dim=1)
            found = torch.cat([model.step(part, state) for part in parts], dim=1)
            assert off(found, expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ["t5-v1.0", "llama-gqa"])
@pytest.mark.parametrize("given", [(1, 3), (4, 3), (6, 3), (3, 0)])
def test_tokens_of_other_rows_than_the_state_has_are_refused(models, name, given):
    state = models[name].start(tokens(3, 4))
    with pytest.raises(
        ValueError, match=rf"expected tokens for each of 3 rows, found \({given[0]}, {given[1]}\)"
    ):
        models[name].step(tokens(*given), state)


@pytest.mark.parametrize("name", ["t5-v1.0", "llama-gqa"])
def test_the_cache_is_not_copied_at_each_step(models, name, monkeypatch):
    model, n, copied = models[name], 200, []
    cat, pad = torch.cat, F.pad

    def note(xs, dim=0):
        if xs[0].is_floating_point():
            copied.append(max(x.shape[dim] for x in xs))
        return cat(xs, dim=dim)

    monkeypatch.setattr(torch, "cat", note)
    monkeypatch.setattr(F, "pad", lambda x, *rest: copied.append(x.shape[2]) or pad(x, *rest))
    with torch.no_grad():
        state, places = model.start(tokens(3, 5)), set()
        for token in tokens(3, n, seed=1).split(1, dim=1):
            model.step(token, state)
            places.add(state.caches[0].kv[0].data_ptr())
    columns = [
        length for length in copied if length > model.config.d_head
    ]  # the others are halves of a rotated head
    assert len(columns) == 2 * len(state.caches) * (
        n // 64
    )  # keys and values of each block, once for 64 steps
    assert 3 <= len(places) <= 5


def gradients(model, out):
    model.zero_grad()
    out.square().sum().backward()
    return {
        name: vector.grad.clone()
        for name, vector in minia3.vectors(model).items()
        if vector.grad is not None
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
@pytest.mark.parametrize("order", ["ng", "gn", "ngng", "gngn", "nngn", "ggnn"])
def test_steps_with_and_without_gradients_may_follow_one_another(models, name, mask, order):
    """The logits are those of one step; a step's gradients do not change by what is stepped after it, nor whether what
    came before it without gradients was written in place or not."""
    model, source, target = models[name], tokens(4, 4), tokens(4, 2 * len(order) - 1, seed=1)
    expected = logits(model, source, mask, target)

    def run(order):
        with torch.set_grad_enabled(order[0] == "g"):
            state = model.start(source, mask)
        outs = []
        for kind, part in zip(
            order, torch.cat((state.start, target), dim=1).split(2, dim=1), strict=False
        ):
            with torch.set_grad_enabled(kind == "g"):
                outs.append(model.step(part, state))
        return outs

    outs = run(order)
    assert [out.requires_grad for out in outs] == [kind == "g" for kind in order]
    assert off(torch.cat(outs, dim=1).detach(), expected) < 1e-5
    for i, kind in enumerate(order):
        if kind == "g":
            shorter = gradients(model, run(order[: i + 1])[-1])
            for vector, gradient in gradients(model, run(order)[i]).items():
                assert torch.equal(gradient, shorter[vector])
                assert gradient.any()


@pytest.mark.parametrize("name", NAMES)
def test_gradients_flow_through_a_cache_that_grows_and_is_selected_from(models, name):
    model, source, target = models[name], tokens(2, 4), tokens(2, 5, seed=1)
    rows = torch.tensor([1, 0, 1])
    state = model.start(source)
    for token in target[:, :3].split(1, dim=1):
        model.step(token, state)
    found = gradients(model, model.step(target[rows, 3:], state.select(rows)))
    expected = gradients(model, model.step(target[rows], model.start(source[rows]))[:, 3:])
    for vector, gradient in expected.items():
        torch.testing.assert_close(found[vector], gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_rows_that_share_a_source_are_those_of_the_rows_apart(models, name):
    model, mask, target = models[name], MASK[:2], tokens(6, 3, seed=1)
    source, adapter, of = tokens(2, 4), torch.tensor([1, 0]), torch.tensor([0, 0, 0, 1, 1, 1])
    found = gradients(model, model.step(target, model.start(source, mask, adapter).repeat(3)))
    expected = gradients(model, model.step(target, model.start(source[of], mask[of], adapter[of])))
    for vector, gradient in expected.items():
        torch.testing.assert_close(found[vector], gradient, rtol=1e-4, atol=1e-4)


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
    expected = (
        logits(model, source, None, target)[:, :-1]
        .log_softmax(-1)
        .gather(2, target[..., None])[..., 0]
    )
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
def test_what_cannot_be_started_is_refused(models, name, source, mask, message):
    with pytest.raises(ValueError, match=message):
        models[name].start(source, mask)


# Padded tokens are not computed


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_a_padded_batch_are_those_of_its_rows_apart(loaded, name):
    """In float64; a row of one token is one of them."""
    model = loaded(name, n_adapters=2, seed=0, dtype=torch.float64).double()
    minia3.freeze(model)
    source, target, adapter = tokens(4, 7), tokens(4, 3, seed=1), torch.tensor([0, 1, 1, 0])
    mask = torch.arange(7) < torch.tensor([[7], [1], [4], [2]])
    minia3.logprobs(model, model.start(source, mask, adapter), target).sum().backward()
    together = {n: vector.grad.clone() for n, vector in minia3.vectors(model).items()}
    model.zero_grad()
    for row in range(4):
        state = model.start(source[row : row + 1, : mask[row].sum()], None, int(adapter[row]))
        minia3.logprobs(model, state, target[row : row + 1]).sum().backward()
    for n, vector in minia3.vectors(model).items():
        assert off(together[n], vector.grad) < 1e-12, n


@pytest.mark.parametrize("name", NAMES)
def test_what_is_done_token_by_token_is_done_for_real_tokens_alone(loaded, name, monkeypatch):
    model, mask, seen = loaded(name), torch.arange(9) < torch.tensor([[9], [2], [5]]), []
    block = (model.encoder.blocks if hasattr(model, "encoder") else model.blocks)[0]
    block.ffn.register_forward_pre_hook(
        lambda module, arguments: seen.append(arguments[0].shape[:2].numel())
    )
    model.start(tokens(3, 9), mask)
    n_kept = (
        0 if hasattr(model, "encoder") else 3
    )  # LLaMA's start leaves each row's last token to `step`
    assert seen == [mask.sum().item() - n_kept]


@pytest.mark.parametrize("name", NAMES)
def test_the_source_s_keys_and_values_are_not_copied_for_each_choice(models, name):
    state = models[name].start(tokens(2, 5), torch.arange(5) < torch.tensor([[5], [3]]))
    repeated, source = state.repeat(3), "memory" if name.startswith("t5") else "kv"
    for cache, again in zip(state.caches, repeated.caches, strict=True):
        found = getattr(again, source)
        assert [x.data_ptr() for x in found] == [x.data_ptr() for x in getattr(cache, source)]
        assert [len(x) for x in found] == [2, 2]
    assert (
        len(getattr(repeated.repeat(2).select(torch.tensor([11, 0, 5])).caches[0], source)[0]) == 3
    )


@pytest.mark.parametrize(
    ("rows", "n_sources"), [([2, 0, 1, 5, 3, 3], 2), ([4, 4, 3], 1), ([0, 3, 1], 3), ([0, 1], 2)]
)
def test_beams_go_on_from_their_source_s_keys_and_values_without_copies_of_them(
    models, rows, n_sources
):
    """Of two sources, three beams each: rows that still are three of a source, one after the other, share it."""
    model, mask, of = (
        models["t5-v1.0"],
        torch.arange(5) < torch.tensor([[5], [3]]),
        [row // 3 for row in rows],
    )
    chosen, apart = (
        model.start(tokens(2, 5), mask).repeat(3).select(torch.tensor(rows)),
        tokens(2, 5)[of],
    )
    assert {len(x) for cache in chosen.caches for x in cache.memory} == {n_sources}
    assert len(chosen.memory_bias_B11M) == n_sources
    with torch.no_grad():
        found, expected = (
            model.step(tokens(len(rows), 1), state)
            for state in (chosen, model.start(apart, mask[of]))
        )
    assert off(found, expected) < 1e-5


def test_a_column_is_seen_by_its_own_row_and_those_after_it():
    empty = torch.zeros(0, dtype=torch.long)
    state = State(torch.zeros(2, 1), None, [], empty, empty)
    state.append_columns(torch.zeros(2, 2))
    shared = state.repeat(2)  # two columns of both rows, and then two and one of each
    assert [shared.append_columns(torch.arange(4 * n).view(4, n)).tolist() for n in (2, 1)] == [
        [[0, 1, 2, 3], [4, 5, 6, 7]],
        [[0, 1], [2, 3]],
    ]
    assert [state.length, shared.length] == [2, 5]
    assert [
        ["".join("-x"[seen] for seen in row) for row in state.causal_mask(n).tolist()]
        for n in (1, 2)
    ] == [
        ["xx"],
        ["x-", "xx"],
    ]
    assert ["".join("-x"[seen] for seen in row) for row in shared.causal_mask(6).tolist()] == [
        "xxx-----",
        "xxxx----",
        "xx--x---",
        "xx--xx--",
        "xxxx--x-",
        "xx--xx-x",
    ]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("grad", [False, True])
@settings(deadline=None, max_examples=10)
@given(
    mask=masks(),
    c=st.integers(2, 3),
    lengths=st.lists(st.integers(1, 3), min_size=2, max_size=4),
    data=st.data(),
)
def test_rows_that_go_on_from_one_source_are_rows_apart(models, name, grad, mask, c, lengths, data):
    """Over several steps, and after some are selected, and repeated again."""
    model, of = models[name], torch.arange(len(mask)).repeat_interleave(c)
    source, adapter = tokens(*mask.shape), torch.arange(len(mask)) % 2
    with torch.set_grad_enabled(grad):
        state, whole = (
            model.start(source, mask, adapter).repeat(c),
            model.start(source[of], mask[of], adapter[of]),
        )
        for i, length in enumerate(lengths):
            target = tokens(len(of), length, seed=i)
            assert off(model.step(target, state), model.step(target, whole)) < 1e-5
        rows = torch.tensor(
            data.draw(st.lists(st.integers(0, len(of) - 1), min_size=1, max_size=4, unique=True))
        )
        state, whole, again = state.select(rows), whole.select(rows), state.repeat(2)
        for i in range(2):
            target, both = tokens(len(rows), 2, seed=9 + i), tokens(2 * len(of), 2, seed=9 + i)
            both[rows * 2] = target
            expected = model.step(target, whole)
            assert off(model.step(target, state), expected) < 1e-5
            assert off(model.step(both, again)[rows * 2], expected) < 1e-5


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=20)
@given(
    mask=masks(), c=st.integers(1, 3), d=st.integers(1, 2), seed=st.integers(0, 9), data=st.data()
)
def test_rows_that_share_a_source_and_are_selected_are_the_rows_apart(
    models, name, mask, c, d, seed, data
):
    model, n = models[name], len(mask) * c * d
    rows = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=4))
    source, target = tokens(*mask.shape, seed=seed), tokens(len(rows), 3, seed=seed + 1)
    adapter = torch.arange(len(mask)) % 2
    with torch.no_grad():
        state = model.start(source, mask, adapter).repeat(c).repeat(d).select(torch.tensor(rows))
        found = model.step(torch.cat((state.start, target), dim=1), state)
    of = torch.tensor(rows) // (c * d)
    assert off(found, logits(model, source[of], mask[of], target, adapter[of])) < 1e-5
