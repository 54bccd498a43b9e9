"""Padding and masks are exact, and the order of rows depends only on the seed and the step."""

from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minia3.tasks.batches import collate, order
from minia3.tasks.examples import Example


def test_a_batch_is_padded_on_the_right_and_missing_choices_are_masked():
    examples = [Example([7, 8, 9], [[1], [2, 3]], 1), Example([5], [[4, 5, 6]], -1)]
    batch = collate(examples)
    assert batch.source_BM.tolist() == [[7, 8, 9], [5, 0, 0]]
    assert batch.mask_BM.tolist() == [[True, True, True], [True, False, False]]
    assert batch.target_BCL.tolist() == [[[1, 0, 0], [2, 3, 0]], [[4, 5, 6], [0, 0, 0]]]
    assert batch.target_mask_BCL.int().tolist() == [[[1, 0, 0], [1, 1, 0]], [[1, 1, 1], [0, 0, 0]]]
    assert batch.label_B.tolist() == [1, -1]
    assert [x.dtype for x in batch] == [torch.long, torch.bool, torch.long, torch.bool, torch.long]


IDS = st.lists(st.integers(0, 50), min_size=1, max_size=6)
EXAMPLES = st.lists(
    st.tuples(IDS, st.lists(IDS, min_size=1, max_size=4), st.integers(-1, 3)),
    min_size=1,
    max_size=5,
).map(lambda rows: [Example(*row) for row in rows])


@settings(deadline=None, max_examples=60)
@given(EXAMPLES)
def test_a_mask_keeps_exactly_the_ids_even_if_the_padding_is_a_real_id(examples):
    batch = collate(examples)
    n_choices = batch.target_BCL.shape[1]
    for b, example in enumerate(examples):
        assert batch.source_BM[b][batch.mask_BM[b]].tolist() == example.source
        for c in range(n_choices):
            ids = batch.target_BCL[b, c][batch.target_mask_BCL[b, c]].tolist()
            assert ids == (example.targets[c] if c < len(example.targets) else [])
        assert (batch.source_BM[b][~batch.mask_BM[b]] == 0).all()
        assert (batch.target_BCL[b][~batch.target_mask_BCL[b]] == 0).all()
    assert batch.source_BM.shape[1] == max(len(example.source) for example in examples)
    assert n_choices == max(len(example.targets) for example in examples)
    assert batch.label_B.tolist() == [example.label for example in examples]


@pytest.mark.parametrize(
    "bad",
    [Example([], [[1]], 0), Example([1], [], 0), Example([1], [[]], 0), Example([1], [[2], []], 0)],
)
def test_a_batch_with_nothing_to_read_or_to_score_is_an_error(bad):
    with pytest.raises(ValueError, match="example 1 of the batch"):
        collate([Example([1], [[1]], 0), bad])


# The order of rows


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**32 - 1))
def test_batches_are_a_stream_of_permutations(n_rows, batch_size, seed):
    n_steps = 3 * n_rows // batch_size + 2
    # Each step from a new function, the last step first: a step depends on no other.
    backwards = [order(n_rows, batch_size, seed)(step) for step in reversed(range(n_steps))]
    batches = backwards[::-1]
    assert {len(batch) for batch in batches} == {batch_size}
    stream = list(chain(*batches))
    for epoch in range(len(stream) // n_rows):
        assert sorted(stream[epoch * n_rows : (epoch + 1) * n_rows]) == list(range(n_rows))
    rows_of_step = order(n_rows, batch_size, seed)
    assert [rows_of_step(step) for step in range(n_steps)] == batches
    single_rows = order(n_rows, 1, seed)
    assert [single_rows(step)[0] for step in range(len(stream))] == stream, (
        "the stream does not depend on the batch size"
    )


def test_each_epoch_and_each_seed_has_a_different_permutation():
    permutations = set()
    for seed in (0, 1, 2):
        for epoch in (0, 1, 2):
            permutations.add(tuple(order(100, 100, seed)(epoch)))
    assert len(permutations) == 9


def test_the_order_does_not_depend_on_the_machine_or_the_version():
    assert [order(5, 2, 7)(step) for step in (0, 1, 2, 1000)] == [[4, 1], [2, 3], [0, 3], [3, 4]]
