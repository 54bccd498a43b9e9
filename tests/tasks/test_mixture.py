"""A mixture draws each example from a task in proportion to its rows, up to a cap."""

from collections import Counter
from itertools import chain, islice

import numpy as np
import pytest

from minia3.tasks.batches import order
from minia3.tasks.mixture import draw_rows, make_mixture
from minia3.tasks.task import Task


def make_task(name):
    return Task(name, [], [], [], "accuracy", {}, [])


def first_steps(n_steps, *arguments):
    return list(islice(draw_rows(*arguments), n_steps))


@pytest.mark.parametrize(
    ("cap", "shares"), [(10**6, (6, 40, 4)), (10, (6, 10, 4)), (5, (5, 5, 4)), (1, (1, 1, 1))]
)
def test_members_are_drawn_in_proportion_to_their_rows_up_to_the_cap(cap, shares):
    steps = first_steps(500, [6, 40, 4], cap, 8, 0)
    n_drawn = Counter(member for member, _ in chain(*steps))
    for member, share in enumerate(shares):
        p = share / sum(shares)
        assert n_drawn[member] / 4000 == pytest.approx(p, abs=4 * (p * (1 - p) / 4000) ** 0.5)


def test_the_rows_of_a_member_come_in_its_order_whoever_is_drawn_between():
    steps = first_steps(60, [6, 40], 10, 8, 3)
    for member, n_rows in enumerate([6, 40]):
        drawn = [row for drawn_member, row in chain(*steps) if drawn_member == member]
        rows_of_step = order(n_rows, 8, 3)
        expected = list(chain(*map(rows_of_step, range(60))))
        assert drawn == expected[: len(drawn)]


def test_the_batches_of_a_single_member_are_those_of_order():
    rows_of_step = order(20, 7, 5)
    for step, drawn in enumerate(first_steps(30, [20], 3, 7, 5)):
        assert drawn == [(0, row) for row in rows_of_step(step)]


def test_the_members_of_a_step_are_a_function_of_the_seed_and_the_step():
    steps = first_steps(5, [6, 10], 2**16, 8, 2)
    for step, drawn in enumerate(steps):
        rng = np.random.RandomState([2, 3, step])
        members = rng.choice(2, 8, p=np.array([6, 10]) / 16)
        assert [member for member, _ in drawn] == members.tolist()
    assert first_steps(5, [6, 10], 2**16, 8, 2) == steps
    assert first_steps(5, [6, 10], 2**16, 8, 1) != steps


def test_a_plain_task_is_its_only_member_and_a_mixture_has_several():
    tasks = [make_task("a"), make_task("b")]
    assert tasks[0].members == [tasks[0]]
    assert make_mixture(tasks).members == tasks


def test_tasks_of_the_same_name_do_not_mix():
    with pytest.raises(
        ValueError, match=r"name for each task of a mixture, found \['a', 'a'\]: .*so rename one\Z"
    ):
        make_mixture([make_task("a"), make_task("a")])
