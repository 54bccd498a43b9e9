"""A mixed batch has the examples of several cells, and each cell its own loss."""

from dataclasses import replace
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from running import model, task, train

import minia3
from minia3.inference.scoring import choice_logprobs
from minia3.tasks.batches import collate
from minia3.tasks.examples import Example
from minia3.training import batch as batch_module
from minia3.training.batch import MixedBatch, choose_micro_batch_size
from minia3.training.cell import Cell
from minia3.training.drawing import draw_batches
from minia3.training.losses import count_terms, count_terms_of, total_loss


@pytest.fixture
def cells():
    """Three cells, each with its batches and row of the vectors."""
    tokenizer = minia3.load_tokenizer(model("t5"))
    reader = minia3.load_model(model("t5"))
    made = []
    for row in range(3):
        config = train.Config(seed=row, steps=2, batch_size=3)
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


@pytest.mark.parametrize(
    ("losses", "size"),
    [
        ("lm,ul,ln", None),
        ("lm,ul,ln", 1),
        ("lm,ul,ln", 2),
        ("lm", 4),
        ("ln,ul", 9),
    ],
)
def test_each_cell_has_the_losses_of_its_own_batch(losses, size, cells, ours):
    for cell in cells:
        cell.config = replace(cell.config, losses=losses)
    step = 1
    found_A = torch.zeros(3, dtype=torch.float64)
    for part in MixedBatch(cells, step, n_rows=3).split(size):
        logp_BCL = choice_logprobs(ours, part.inputs, part.row_B)
        found_A += part.losses(logp_BCL).detach()
    for cell in cells:
        batch = collate(cell.batches[step])
        logp_BCL = choice_logprobs(ours, batch, cell.row)
        expected = total_loss(logp_BCL, batch.target_mask_BCL, batch.label_B, losses.split(","))
        assert found_A[cell.row].item() == pytest.approx(expected.item(), rel=1e-9)


def test_the_parts_have_the_examples_and_the_rows_of_their_cells_in_order(cells):
    batch = MixedBatch(cells, 0, n_rows=3)
    parts = list(batch.split(4))
    assert [part.row_B.tolist() for part in parts] == [[0, 0, 0, 1], [1, 1, 2, 2], [2]]
    examples = list(chain(*(cell.batches[0] for cell in cells)))
    read = list(chain(*(texts_of(part.inputs) for part in parts)))
    assert read == [[example.source, *example.targets] for example in examples]
    labels = torch.cat([part.inputs.label_B for part in parts])
    assert labels.tolist() == [example.label for example in examples]
    assert batch.n_tokens == sum(map(len, chain(*read)))


def texts_of(inputs):
    """Return the source and the targets of each example of a Batch, as lists of ids."""
    texts = []
    for source_M, mask_M, target_CL, target_mask_CL in zip(*inputs[:4], strict=True):
        targets = []
        for target_L, target_mask_L in zip(target_CL, target_mask_CL, strict=True):
            targets.append(target_L[target_mask_L].tolist())
        texts.append([source_M[mask_M].tolist(), *filter(None, targets)])
    return texts


def test_a_model_with_a_single_row_gets_no_rows(cells):
    (part,) = MixedBatch(cells[:1], 0, n_rows=1).split()
    assert part.row_B is None


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_what_is_not_finite_in_one_cell_reaches_no_other_cell(bad, cells):
    (part,) = MixedBatch(cells, 0, n_rows=3).split()
    gradients = []
    for is_bad in (False, True):
        logp_BCL = -torch.linspace(0.1, 3, part.inputs.target_BCL.numel())
        logp_BCL = logp_BCL.view(part.inputs.target_BCL.shape)
        logp_BCL[part.row_B == 1] = bad if is_bad else -1.0
        logp_BCL.requires_grad_()
        loss_A = part.losses(logp_BCL)
        loss_A.sum().backward()
        assert loss_A.isfinite().tolist() == [True, not is_bad, True]
        gradients.append(logp_BCL.grad[part.row_B != 1])
    assert gradients[0].any()
    assert torch.equal(*gradients)


@pytest.mark.parametrize("n_choices", [(2, 3, 1), (0,)])
def test_terms_are_counted_without_tensors_as_they_are_in_a_batch(n_choices):
    tokenizer = minia3.load_tokenizer(model("t5"))
    cell = Cell(train.Config(steps=1, batch_size=7), minia3.load_task(task(n_choices)))
    examples = draw_batches(cell, tokenizer)[0]
    examples.append(Example([3], [[4, 5, 6, 7]], 0, [True, False, True, True]))
    whole = collate(examples)
    assert count_terms_of(examples) == count_terms(whole.target_mask_BCL, whole.label_B)


def test_a_process_without_examples_makes_a_pass_that_adds_0(cells, ours, monkeypatch):
    monkeypatch.setattr("minia3.training.batch.share_of_step", lambda pairs, size: [[]])
    (part,) = MixedBatch(cells, 0, n_rows=3).split()
    loss_A = part.losses(choice_logprobs(ours, part.inputs, part.row_B))
    loss_A.sum().backward()
    assert loss_A.tolist() == [0, 0, 0]
    assert not any(table.grad.any() for table in minia3.vectors(ours).values())
    nan_BCL = torch.full(part.inputs.target_BCL.shape, float("nan"), requires_grad=True)
    loss_A = part.losses(nan_BCL)
    loss_A.sum().backward()
    assert loss_A.tolist() == [0, 0, 0]
    assert not nan_BCL.grad.any()


def test_cells_that_do_not_train_any_more_are_left_out(cells):
    batch = MixedBatch(cells[1:], 0, n_rows=3)
    assert {cell.row for cell, _ in batch.pairs} == {1, 2}
    (part,) = batch.split()
    assert set(part.row_B.tolist()) == {1, 2}
    loss_A = part.losses(torch.full(part.inputs.target_BCL.shape, -1.0))
    assert loss_A[0] == 0
    assert (loss_A[1:] > 0).all()


@pytest.fixture
def group(cells, ours):
    """What choose_micro_batch_size reads of a grid on a CPU."""
    config = train.Config(batch_size=3)
    return SimpleNamespace(config=config, cells=cells, model=ours, device=torch.device("cpu"))


def bytes_of(group):
    """Return the bytes of the inner activations of the longest example."""
    examples = [
        example for cell in group.cells for step in (0, 1) for example in cell.batches[step]
    ]
    longest = max(len(example.source) + sum(map(len, example.targets)) for example in examples)
    return longest * group.model.config.d_ff * 8  # float64


@pytest.mark.parametrize("n_examples", [3, 5])
def test_on_a_cpu_the_passes_of_a_grid_are_as_large_as_malloc_keeps(group, n_examples, monkeypatch):
    monkeypatch.setattr(batch_module, "LARGE_BLOCK", n_examples * bytes_of(group) + 1)
    assert choose_micro_batch_size(group) == n_examples
    monkeypatch.setattr(batch_module, "LARGE_BLOCK", n_examples * bytes_of(group))
    expected = max(n_examples - 1, group.config.batch_size)  # no less than one adapter alone reads
    assert choose_micro_batch_size(group) == expected


def test_no_others_are_divided_unless_the_user_says_so(group, monkeypatch):
    monkeypatch.setattr(batch_module, "LARGE_BLOCK", 1)
    assert choose_micro_batch_size(group) == 3
    group.device = torch.device("cuda")
    assert choose_micro_batch_size(group) is None
    group.device = torch.device("cpu")
    group.cells = group.cells[:1]
    assert choose_micro_batch_size(group) is None
    group.config = replace(group.config, micro_batch_size=2)
    assert choose_micro_batch_size(group) == 2
