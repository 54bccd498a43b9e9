"""The lines of the table, and their goals.

A line is a function of a Bench and a Pair that yields (title, Row). It may yield several rows.
"""

from dataclasses import dataclass

from tests.benchmarks.inference import generation, mixed, ranking
from tests.benchmarks.starting import adapters, export, start
from tests.benchmarks.training import (
    choices,
    dropout,
    flags,
    kept,
    long_targets,
    many_tasks,
    peak,
    steps,
)

LINES = {
    "start": start,
    "adapters": adapters,
    "export": export,
    "steps": steps,
    "long_targets": long_targets,
    "choices": choices,
    "many_tasks": many_tasks,
    "kept": kept,
    "peak": peak,
    "dropout": dropout,
    "ranking": ranking,
    "generation": generation,
    "mixed": mixed,
    "flags": flags,
}
COMPILES = ("flags",)

# The least that theirs / ours should be, of a T5 and of a LLaMA. (0.97 is 1 / 1.03.) Rows without a
# goal are measured because people want to know them.
GOALS = {
    "process start to ready to train": (3.2, None),
    "load an adapter from disk": (12, 12),
    "switch to another adapter": (40, 40),
    "load, merge and export": (2, 2),
    "training step, no padding": (1.2, 1.6),
    "training step, RTE-like lengths": (1.8, 1.8),
    "T-Few's loss, 4 choices, against repeated inputs": (3.5, None),
    "T-Few's loss, 4 choices, against one encoding": (1.35, None),
    "8 tasks in one batch of 8, trained in one pass": (2.5, 2.5),
    "bytes kept for backward, against (IA)^3": (1.6, 1.6),
    "bytes kept for backward, against LoRA r8 (q, v)": (1.45, 1.45),
    "peak memory of training, against (IA)^3": (1.5, None),
    "rank evaluation, RTE (2 choices)": (3.5, 3.5),
    "rank evaluation, 10 choices": (3.5, 3.5),
    "greedy generation, batch 1": (1.25, 1.25),
    "greedy generation, batch 32": (1.7, 2.2),
    "mixed batch of 32, 1 adapters, against the base alone (ours)": (0.97, 0.97),
    "mixed batch of 32, 8 adapters, against the base alone (ours)": (0.97, 0.97),
    "mixed batch of 32, 32 adapters, against the base alone (ours)": (0.97, 0.97),
    "mixed batch of 32, 32 adapters, against LoRA with adapter_names": (2, None),
}
# The least that the floor should be of our time. A row with such a goal needs both.
GOALS_OF_SHARE = {
    "training step, no padding": (0.80, 0.65),
}


@dataclass(frozen=True)
class Goal:
    """What a row should reach; None if it has no such goal."""

    ratio: float | None
    share: float | None

    def is_reached(self, row):
        """Whether a Row reaches the ratio and, if there is a goal for it, the share."""
        if row.ratio < self.ratio:
            return False
        return self.share is None or row.share >= self.share

    def is_beyond_floor(self, row):
        """Whether the ratio cannot be reached, because ours cannot take less than its floor."""
        return row.floor is not None and row.bound < self.ratio

    def is_beyond_alone(self, row):
        """Whether the goal cannot be reached with the kernels that were timed alone."""
        if row.alone is None:
            return False
        if row.bound_of_alone < self.ratio:
            return True
        return self.share is not None and row.most_share < self.share


def goal_of(title, is_t5):
    """Return the Goal of a row."""
    nothing = (None, None)
    side = 0 if is_t5 else 1
    return Goal(GOALS.get(title, nothing)[side], GOALS_OF_SHARE.get(title, nothing)[side])
