"""The optimizers equal transformers' Adafactor, which T-Few used, and torch's AdamW, on each row
alone, and what they do with one row has nothing to do with the other rows."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from running import train
from torch.testing import assert_close
from transformers.optimization import Adafactor as Theirs

from minia3.training.optimizer import (
    Adafactor,
    AdamW,
    TorchAdamW,
    learning_rate,
    make_optimizer,
)
from tests.benchmarks.launches import count

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


def test_a_vector_that_gets_gradients_later_than_others_begins_with_its_own_first_step():
    early, late, alone = (torch.nn.Parameter(torch.ones(1, 3)) for _ in range(3))
    optimizer = Adafactor([early, late], lr=LR)
    grads = list(gradients((1, 3)))
    take_steps(optimizer, early, grads[:4])
    optimizer.zero_grad()
    expected = take_steps(Adafactor([alone], lr=LR), alone, grads[4:])
    early.grad = torch.ones(1, 3)
    for found, value in zip(take_steps(optimizer, late, grads[4:]), expected, strict=True):
        assert torch.equal(found, value)


def test_tables_may_have_different_numbers_of_rows():
    tables = [torch.nn.Parameter(vector((n_rows, 3))) for n_rows in (1, 4, 2)]
    alone = [torch.nn.Parameter(table.detach().clone()) for table in tables]
    for table in (*tables, *alone):
        table.grad = torch.ones_like(table)
    Adafactor(tables, lr=LR).step()
    for table, table_alone in zip(tables, alone, strict=True):
        Adafactor([table_alone], lr=LR).step()
        assert torch.equal(table, table_alone)


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
    assert second.state[rows[1]]["steps"] == [2]


def test_a_step_leaves_the_state_that_was_loaded_as_it_is():
    rows = [vector((1, 3)), vector((1, 3))]
    first, second = (Adafactor([row], lr=LR) for row in rows)
    take_steps(first, rows[0], list(gradients((1, 3)))[:2])
    v_AD = first.state[rows[0]]["v_AD"].clone()
    second.load_state_dict(first.state_dict())
    take_steps(second, rows[1], list(gradients((1, 3)))[2:4])
    assert torch.equal(first.state[rows[0]]["v_AD"], v_AD)
    assert first.state[rows[0]]["steps"] == [2]


def test_the_state_of_another_optimizer_is_refused():
    wide = vector((2, 9))
    (g_wide,) = list(gradients((2, 9)))[:1]
    others = [Adafactor([wide], lr=LR), AdamW([wide], lr=LR), torch.optim.AdamW([wide], lr=LR)]
    for other in others:
        take_steps(other, wide, [g_wide])
    for l_AD, other in zip((vector((1, 9)), wide, wide), others, strict=True):
        optimizer = Adafactor([l_AD], lr=1.0)
        with pytest.raises(ValueError, match=r"expected what Adafactor keeps of 1 tables: .*found"):
            optimizer.load_state_dict(other.state_dict())
        assert optimizer.state == {l_AD: {}}
        assert optimizer.param_groups[0]["lr"] == 1.0
    with pytest.raises(ValueError, match=r"keeps of 2 tables, found 1 states"):
        Adafactor([wide, vector((2, 9))]).load_state_dict(others[0].state_dict())


# Rows that train at rates of their own


WIDTHS = (5, 9, 5)  # so that two tables are updated together
OPTIMIZERS = {
    "adafactor": Adafactor,
    "adamw": lambda parameters, lr: AdamW(parameters, lr, weight_decay=0.3),
}


def their_optimizer(name, parameters, lr):
    if name == "adafactor":
        return Theirs(parameters, lr=lr, scale_parameter=True, relative_step=False)
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.3)


def tables_of(n_rows):
    """Return tables in float64, whose rows differ in size."""
    size = 10.0 ** torch.linspace(-1, 1, n_rows, dtype=torch.float64)[:, None]
    return [torch.nn.Parameter(size * vector((n_rows, d), seed=i)) for i, d in enumerate(WIDTHS)]


def gradients_of(tables):
    """Return the gradients of all tables in each step."""
    each = [gradients(table.shape, seed=i) for i, table in enumerate(tables)]
    return [[g_AD.double() for g_AD in step] for step in zip(*each, strict=True)]


# Which rows train in a step, and at which rates: row 1 stops, row 3 stops and goes on.
RATES = [{3: 0.1, 0: 0.1, 1: 0.02, 2: 0.3}] * 3 + [{0: 0.05, 2: 0.05}] * 4
RATES += [{0: 0.2, 2: 0.3, 3: 0.1}] * 4 + [{3: 0.01}] * 2


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rows_that_train_together_equal_the_peers_on_each_row_alone(name):
    tables = tables_of(4)
    grads = gradients_of(tables)
    rows = []
    for row in range(4):
        parameters = [torch.nn.Parameter(table.detach()[row].clone()) for table in tables]
        rows.append((parameters, their_optimizer(name, parameters, lr=1.0)))
    ours = OPTIMIZERS[name](tables, lr=1.0)
    for rates, grads_of_step in zip(RATES, grads, strict=False):
        for table, g_AD in zip(tables, grads_of_step, strict=True):
            table.grad = g_AD.clone()
        ours.clip(0.1)
        ours.step(rates)
        for row, rate in rates.items():
            parameters, theirs = rows[row]
            for parameter, g_AD in zip(parameters, grads_of_step, strict=True):
                parameter.grad = g_AD[row].clone()
            torch.nn.utils.clip_grad_norm_(parameters, 0.1)
            theirs.param_groups[0]["lr"] = rate
            theirs.step()
        for row, (parameters, _) in enumerate(rows):
            for table, parameter in zip(tables, parameters, strict=True):
                assert_close(table[row], parameter, rtol=1e-9, atol=1e-12)


def bits_of(optimizer, tables, row):
    """Return all that an optimizer has of a row: entries, moments and the number of steps."""
    values = []
    for table in tables:
        state = optimizer.state[table]
        values.append(state["steps"][row])
        for tensor in (table, *(state[name] for name in optimizer.moments)):
            values.append(tensor.detach()[row].numpy().tobytes())
    return values


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rows_that_do_not_train_keep_their_bits_even_if_their_gradients_are_nan(name):
    tables = tables_of(4)
    optimizer = OPTIMIZERS[name](tables, lr=0.1)
    first, *later = gradients_of(tables)[:5]
    for table, g_AD in zip(tables, first, strict=True):
        table.grad = g_AD
    optimizer.step()
    before = [bits_of(optimizer, tables, row) for row in range(4)]
    for grads_of_step in later:
        for table, g_AD in zip(tables, grads_of_step, strict=True):
            table.grad = g_AD.clone()
            table.grad[1] = float("nan")
        optimizer.clip(0.1)
        optimizer.step({2: 0.1, 0: 0.2})
    after = [bits_of(optimizer, tables, row) for row in range(4)]
    assert after[1] == before[1]
    assert after[3] == before[3]
    assert after[0] != before[0]
    assert after[2] != before[2]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_before_a_backward_pass_there_is_nothing_to_clip_or_to_update(name):
    tables = tables_of(2)
    optimizer = OPTIMIZERS[name](tables, lr=0.1)
    before = [table.detach().clone() for table in tables]
    clip_and_step(optimizer, {0: 0.1})
    for table, expected in zip(tables, before, strict=True):
        assert_close(table.detach(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_row_that_is_not_finite_leaves_the_others_as_they_would_be(name, bad):
    outcomes = []
    for is_bad in (False, True):
        tables = tables_of(3)
        optimizer = OPTIMIZERS[name](tables, lr=0.1)
        for grads_of_step in gradients_of(tables)[:6]:
            for table, g_AD in zip(tables, grads_of_step, strict=True):
                table.grad = g_AD.clone()
            if is_bad:
                tables[1].grad[1, 2] = bad
            optimizer.clip(0.1)
            optimizer.step()
        outcomes.append([bits_of(optimizer, tables, row) for row in range(3)])
        assert tables[1][1].isfinite().all() != is_bad
    assert outcomes[0][0] == outcomes[1][0]
    assert outcomes[0][2] == outcomes[1][2]


def clip_and_step(optimizer, rates):
    optimizer.clip(0.1)
    optimizer.step(rates)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("is_one_rate", [True, False])
def test_an_update_launches_as_many_operators_for_two_rows_as_for_25(name, is_one_rate):
    counts = []
    for n_rows in (2, 5, 25):
        tables = tables_of(n_rows)
        optimizer = OPTIMIZERS[name](tables, lr=0.1)
        rates = {row: 0.1 if is_one_rate else 0.1 * (1 + row) for row in range(n_rows)}
        for grads_of_step in gradients_of(tables)[:3]:
            for table, g_AD in zip(tables, grads_of_step, strict=True):
                table.grad = g_AD
            clip_and_step(optimizer, rates)
        counts.append(count(partial(clip_and_step, optimizer, rates)).total())
    assert len(set(counts)) == 1, counts


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_of_rows_that_differ_continues_bit_for_bit(name, tmp_path):
    outcomes = []
    for n_before in (len(RATES), 5):
        tables = tables_of(4)
        optimizer = OPTIMIZERS[name](tables, lr=0.1)
        grads = gradients_of(tables)
        for step, (rates, grads_of_step) in enumerate(zip(RATES, grads, strict=False)):
            if step == n_before:
                torch.save(optimizer.state_dict(), tmp_path / "saved.pt")
                optimizer = OPTIMIZERS[name](tables, lr=0.1)
                optimizer.load_state_dict(torch.load(tmp_path / "saved.pt", weights_only=True))
            for table, g_AD in zip(tables, grads_of_step, strict=True):
                table.grad = g_AD.clone()
            optimizer.step(rates)
        outcomes.append([bits_of(optimizer, tables, row) for row in range(4)])
    assert outcomes[0] == outcomes[1]


# The learning rate


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


def test_the_method_and_the_flag_choose_the_optimizer():
    for flags, kind in [
        ({}, Adafactor),
        ({"optimizer": "adamw"}, AdamW),
        ({"method": "lora"}, TorchAdamW),
        ({"method": "full"}, TorchAdamW),
    ]:
        assert type(make_optimizer([vector((2, 3))], train.Config(**flags))) is kind


def test_the_number_of_warm_up_steps_is_rounded_to_the_nearest():
    config = train.Config(steps=30, warmup_ratio=0.06, lr=1.0)  # 1.8 steps
    assert [learning_rate(step, config) for step in (0, 1, 2)] == [0, 0.5, 1]
