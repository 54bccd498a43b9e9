"""A mixed batch has the examples of several cells, and each cell its own loss."""

from itertools import chain

import pytest
import torch
from running import model, task, train

import minia3
from minia3.inference.scoring import choice_logprobs
from minia3.tasks.batches import collate
from minia3.training.batch import MixedBatch
from minia3.training.cell import Cell
from minia3.training.drawing import draw_batches
from minia3.training.losses import total_loss


@pytest.fixture
def cells():
    """Three cells, each with its losses, batches and row of the vectors."""
    tokenizer = minia3.load_tokenizer(model("t5"))
    reader = minia3.load_model(model("t5"))
    made = []
    for row, losses in enumerate(["lm,ul,ln", "lm", "ul,ln"]):
        config = train.Config(seed=row, losses=losses, steps=2, batch_size=3)
        cell = Cell(config, minia3.load_task(task((2, 3, 1))))
        cell.batches = draw_batches(cell, tokenizer, reader)
        cell.row = row
        made.append(cell)
    return made


@pytest.fixture
def ours():
    """A model in float64 whose rows of vectors differ, so that a wrong row shows."""
    loaded = minia3.load_model(model("t5"), dtype=torch.float64, n_adapters=3).double()
    with torch.no_grad():
        for table in minia3.vectors(loaded).values():
            table *= torch.tensor([[1.0], [0.5], [-2.0]])
    return loaded


@pytest.mark.parametrize("size", [None, 1, 2, 4, 9])
def test_each_cell_has_the_losses_of_its_own_batch(size, cells, ours):
    step = 1
    found_A = torch.zeros(3, dtype=torch.float64)
    for part in MixedBatch(cells, step, n_rows=3).split(size):
        logp_BCL = choice_logprobs(ours, part.batch, part.row_B)
        found_A += part.losses(logp_BCL).detach()
    for cell in cells:
        batch = collate(cell.batches[step])
        logp_BCL = choice_logprobs(ours, batch, cell.row)
        names = cell.config.losses.split(",")
        expected = total_loss(logp_BCL, batch.target_mask_BCL, batch.label_B, names)
        assert found_A[cell.row].item() == pytest.approx(expected.item(), rel=1e-9)


def test_a_part_has_the_examples_and_the_rows_of_their_cells_in_order(cells):
    batch = MixedBatch(cells, 0, n_rows=3)
    parts = list(batch.split(4))
    assert [part.row_B.tolist() for part in parts] == [[0, 0, 0, 1], [1, 1, 2, 2], [2]]
    examples = list(chain(*(cell.batches[0] for cell in cells)))
    assert [example for _, example in batch.pairs] == examples
    texts = list(chain(*((example.source, *example.targets) for example in examples)))
    assert batch.n_tokens == sum(map(len, texts))


def test_a_model_with_a_single_row_gets_no_rows(cells):
    (part,) = MixedBatch(cells[:1], 0, n_rows=1).split()
    assert part.row_B is None


def test_cells_that_do_not_train_any_more_are_left_out(cells):
    batch = MixedBatch(cells[1:], 0, n_rows=3)
    assert {cell.row for cell, _ in batch.pairs} == {1, 2}
    (part,) = batch.split()
    assert set(part.row_B.tolist()) == {1, 2}
    loss_A = part.losses(torch.full(part.batch.target_BCL.shape, -1.0))
    assert loss_A[0] == 0
    assert (loss_A[1:] > 0).all()
