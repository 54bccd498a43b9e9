"""The optimizer equals the Adafactor of transformers, which T-Few used, on each row alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from running import train
from torch.testing import assert_close
from transformers.optimization import Adafactor as Theirs

from minia3.training.optimizer import Adafactor, learning_rate

LR = 3e-3
STEPS = 30


def gradients(shape, seed=0):
    """Yield a gradient per step: over eight orders of magnitude, and some entries are zero."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(STEPS):
        exponent = -4 + 4 * torch.rand(shape, generator=generator)
        size = 10**exponent * 10.0 ** -(step % 5)
        direction = torch.randn(shape, generator=generator)
        is_there = torch.rand(shape, generator=generator) > 0.1
        yield direction * size * is_there


def vector(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 1 + 0.1 * torch.randn(shape, generator=generator)


def take_steps(optimizer, parameter, grads):
    """Return the values of the parameter after each step."""
    values = []
    for grad in grads:
        parameter.grad = grad.view_as(parameter).clone()
        optimizer.step()
        values.append(parameter.detach().clone())
    return values


@pytest.mark.parametrize("start", [1.0, 0.0, 1e-4, -30.0])  # below 1e-3, the step is that of 1e-3
@pytest.mark.parametrize("d", [1, 3, 64])
# The size of the gradients. Against the smaller, the 1e-30 that is added to their squares counts.
@pytest.mark.parametrize("size", [1.0, 1e-14])
@pytest.mark.parametrize("column", [False, True], ids=["(d,)", "T-Few's (d, 1)"])
def test_every_step_equals_the_step_of_transformers_on_one_vector(d, start, size, column):
    ours = torch.nn.Parameter(start * vector((1, d)))
    shape = (d, 1) if column else (d,)
    theirs = torch.nn.Parameter(ours.detach().clone().view(shape))
    options = {"scale_parameter": True, "relative_step": False, "warmup_init": False}
    grads = [size * grad for grad in gradients((1, d))]
    expected = take_steps(Theirs([theirs], lr=LR, **options), theirs, grads)
    found = take_steps(Adafactor([ours], lr=LR), ours, grads)
    first = start * vector((1, d)).flatten()
    moved = (expected[-1].flatten() - first).abs().max().item()
    assert moved > LR * max(abs(start), 1e-3) / 10
    tolerance = {"rtol": 1e-5, "atol": 1e-5 * moved}
    for step, (our_step, their_step) in enumerate(zip(found, expected, strict=True)):
        message = f"step {step}"
        assert_close(our_step.flatten(), their_step.flatten(), **tolerance, msg=message)


@pytest.mark.parametrize("d", [1, 2, 7, 64, 1000])
def test_rows_trained_together_equal_rows_trained_alone_bit_for_bit(d):
    # Row 3 has no gradient: no batch has an example of its task.
    size = torch.tensor([[1.0], [1e-4], [30.0], [0.0]])
    table = torch.nn.Parameter(vector((4, d)) * torch.tensor([[1.0], [5.0], [1e-4], [1.0]]))
    rows = [torch.nn.Parameter(row.clone()[None]) for row in table.detach()]
    grads = [grad * size for grad in gradients((4, d))]
    together = torch.stack(take_steps(Adafactor([table], lr=LR), table, grads))
    for i, row in enumerate(rows):
        grads_of_row = [grad[i] for grad in grads]
        alone = torch.stack(take_steps(Adafactor([row], lr=LR), row, grads_of_row))
        assert torch.equal(together[:, i], alone[:, 0])
    assert torch.equal(table[3], rows[3][0])


def test_zero_gradients_move_nothing_at_first_and_later():
    row = torch.nn.Parameter(vector((1, 5)))
    start = row.detach().clone()
    optimizer = Adafactor([row], lr=LR)
    assert torch.equal(take_steps(optimizer, row, [torch.zeros(5)] * 3)[-1], start)
    moved = take_steps(optimizer, row, gradients((1, 5)))[-1]
    assert not torch.equal(moved, start)
    assert torch.equal(take_steps(optimizer, row, [torch.zeros(5)] * 3)[-1], moved)


def test_a_vector_without_a_gradient_stays_and_the_others_move():
    stays, moves = (torch.nn.Parameter(torch.ones(1, 3)) for _ in range(2))
    take_steps(Adafactor([stays, moves], lr=LR), moves, gradients((1, 3)))
    assert torch.equal(stays, torch.ones(1, 3))
    assert not torch.equal(moves, torch.ones(1, 3))


def test_a_step_uses_the_learning_rate_of_its_group():
    row = torch.nn.Parameter(torch.ones(1, 4))
    optimizer = Adafactor([row], lr=LR)
    optimizer.param_groups[0]["lr"] = 0.0
    assert torch.equal(take_steps(optimizer, row, gradients((1, 4)))[-1], torch.ones(1, 4))
    optimizer.param_groups[0]["lr"] = LR
    assert not torch.equal(take_steps(optimizer, row, gradients((1, 4)))[-1], torch.ones(1, 4))


def test_a_saved_optimizer_continues_bit_for_bit(tmp_path):
    grads = list(gradients((3, 9)))
    whole = torch.nn.Parameter(vector((3, 9)))
    expected = take_steps(Adafactor([whole], lr=LR), whole, grads)
    first = torch.nn.Parameter(vector((3, 9)))
    optimizer = Adafactor([first], lr=LR)
    take_steps(optimizer, first, grads[:11])
    torch.save(
        {"vector": first.detach(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt"
    )
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    second = torch.nn.Parameter(saved["vector"])
    optimizer = Adafactor([second], lr=1.0)  # the saved rate replaces it
    optimizer.load_state_dict(saved["optimizer"])
    for a, b in zip(take_steps(optimizer, second, grads[11:]), expected[11:], strict=True):
        assert torch.equal(a, b)


def test_a_state_is_loaded_in_the_dtype_of_its_vector_and_is_empty_before_the_first_step():
    rows = [
        torch.nn.Parameter(torch.ones(1, 3, dtype=dtype))
        for dtype in (torch.float32, torch.float64)
    ]
    first, second = (Adafactor([row], lr=LR) for row in rows)
    second.load_state_dict(first.state_dict())
    assert second.state == {rows[1]: {}}
    take_steps(first, rows[0], list(gradients((1, 3)))[:2])
    second.load_state_dict(first.state_dict())
    assert second.state[rows[1]]["v_AD"].dtype == torch.float64
    assert second.state[rows[1]]["step"] == 2


@settings(deadline=None, max_examples=60)
@given(steps=st.integers(1, 400), ratio=st.floats(0, 0.99), lr=st.floats(1e-6, 10))
def test_the_learning_rate_equals_the_schedule_of_transformers(steps, ratio, lr):
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, round(ratio * steps), steps)
    config = train.Config(steps=steps, warmup_ratio=ratio, lr=lr)
    for step in range(steps):
        assert learning_rate(step, config) == pytest.approx(
            schedule.get_last_lr()[0], rel=1e-9, abs=1e-12
        )
        optimizer.step()
        schedule.step()


def test_t_few_warms_up_for_60_of_1000_steps_and_ends_at_0():
    rates = [learning_rate(step, train.Config()) for step in (0, 30, 60, 530, 999)]
    assert rates == pytest.approx([0, 0.0015, 0.003, 0.0015, 0.003 / 940])
