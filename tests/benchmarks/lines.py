"""The lines of the table. Each is a function of a `Bench` and a `Pair` that gives rows (what, measured)."""

from tests.benchmarks.inference import generation, mixed, ranking
from tests.benchmarks.starting import adapters, export, start
from tests.benchmarks.training import choices, dropout, flags, kept, many_tasks, peak, steps

LINES = {
    f.__name__: f
    for f in (
        start,
        adapters,
        export,
        steps,
        choices,
        many_tasks,
        kept,
        peak,
        dropout,
        flags,
        ranking,
        generation,
        mixed,
    )
}

# theirs / ours is to be at least this: of a T5, of a LLaMA. 0.97 is 1 / 1.03. The other lines are there to be known.
GOALS = {
    "process start to ready to train": (2.7, None),
    "load an adapter from disk": (50, 50),
    "switch to another adapter": (1000, 1000),
    "load, merge and export": (2, 2),
    "training step, no padding": (1.15, 1.3),
    "training step, RTE-like lengths": (1.6, 1.8),
    "T-Few's loss, 4 choices, against repeated inputs": (3.5, None),
    "T-Few's loss, 4 choices, against one encoding": (1.35, None),
    "8 tasks in one batch of 8, trained in one pass": (2.5, None),
    "bytes kept for backward, against (IA)^3": (1.6, 1.6),
    "bytes kept for backward, against LoRA r8 (q, v)": (1.45, 1.45),
    "peak memory of training, against (IA)^3": (1.4, None),
    "rank evaluation, RTE (2 choices)": (3.5, 3.5),
    "rank evaluation, 10 choices": (3.5, 3.5),
    "greedy generation, batch 1": (1.25, 1.25),
    "greedy generation, batch 32": (1.7, 1.7),
    "mixed batch of 32, 1 adapters, against the base alone (ours)": (0.97, 0.97),
    "mixed batch of 32, 8 adapters, against the base alone (ours)": (0.97, 0.97),
    "mixed batch of 32, 32 adapters, against the base alone (ours)": (0.97, 0.97),
    "mixed batch of 32, 32 adapters, against LoRA with adapter_names": (2, None),
}
