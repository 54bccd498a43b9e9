"""A mixture: several tasks on which one adapter trains.

A mixture is a task, too. It has `members`, which are evaluated one by one; a plain task is its only
member. Each example of a batch is drawn from a member with the probability

    min(rows of the member, cap) / sum over members of min(rows, cap)

(T5's examples-proportional mixing: Raffel et al. 2019, arXiv 1910.10683, section 3.5.2). Without
the cap, a large task would leave nothing of a small one.
"""

from collections.abc import Iterator, Sequence
from itertools import count
from typing import NamedTuple

import numpy as np

from minia3.tasks.batches import order
from minia3.tasks.task import Task


class Mixture(NamedTuple):
    """Several tasks on which one adapter trains."""

    members: list[Task]

    @property
    def name(self) -> str:
        return "+".join(task.name for task in self.members)


def make_mixture(tasks: Sequence[Task]) -> Mixture:
    """Return a mixture.

    Raise ValueError if two tasks have the same name, because only the name tells their results
    apart.
    """
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise ValueError(
            f"expected a different name for each task of a mixture, found {names!r:.200}: a task "
            "has the name of its file or folder, so rename one"
        )
    return Mixture(list(tasks))


def draw_rows(
    sizes: Sequence[int], cap: int, batch_size: int, seed: int
) -> Iterator[list[tuple[int, int]]]:
    """Yield the rows of step 0, 1, 2 ... without end: (member, row) for each example of the batch.

    sizes: how many rows each member has. The rows of a member come in its own `order`, each row
    equally often. A single member's batches are those of `order`.
    """
    counted = np.minimum(sizes, cap)
    rates = counted / counted.sum()
    streams = [row_stream(size, batch_size, seed) for size in sizes]
    for step in count():
        rng = np.random.RandomState([seed, 3, step])  # 3: other draws than those of prompts
        members = rng.choice(len(sizes), batch_size, p=rates)
        yield [(member, next(streams[member])) for member in members.tolist()]


def row_stream(n_rows: int, batch_size: int, seed: int) -> Iterator[int]:
    """Yield the rows of `order`, batch after batch."""
    rows_of_step = order(n_rows, batch_size, seed)
    for step in count():
        yield from rows_of_step(step)
