"""Before a run evaluates: does a batch of --eval-batch-size rows fit into the memory that is free?

The batch of the longest rows is planned on fake tensors, as a step is (step_memory.py). Nothing is
kept for a backward pass, so a batch takes one layer's tensors, the keys and values of all layers,
and logits. Generating a text is planned as scoring a target of --max-new-tokens tokens. (When rows
leave the batch, the keys and values of the others exist twice for a moment, which the plan does not
count.)

Shapes: B examples, M source length, C choices, L tokens of a choice.
"""

from functools import partial
from heapq import nlargest

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from minia3.inference.metrics import CHOICE_METRICS, TEXT_METRICS
from minia3.model.shard import is_sharded
from minia3.tasks.examples import encode_rows
from minia3.tasks.limits import fit_all_targets
from minia3.training.device import free_memory
from minia3.training.memory_fit import Demand, size_to_try, upper_bound
from minia3.training.memory_plan import (
    StepShape,
    extrapolate_depth,
    model_without_values,
    peaks_beyond_weights,
    score_without_padding,
)


def plan_evaluation_memory(run, group):
    """Return an --eval-batch-size to try if memory runs out, and print a note if it will: see
    `size_to_try`.
    """
    shape = shape_of_evaluation(group)
    demand = Demand(
        subject=f"to evaluate {shape.n_examples} rows at once takes",
        flag="--eval-batch-size",
        other_remedies="a shorter --max-length",
        shape=shape,
        bound=upper_bound(group.model.config, shape),
        plan=partial(planned_evaluation, group),
    )
    return size_to_try(run, group, demand, free_memory(group.device))


def shape_of_evaluation(group):
    """Return the largest shape that a batch of this run's evaluations can have, or nearly so.

    The rows with the most characters stand for those with the most tokens.
    """
    shape = StepShape(1, 1, 1, 1)
    for cell in group.cells:
        for assignment in cell.assignments:
            with cell.naming_task(assignment.task):
                shape = larger(shape, shape_of_rows(group, assignment))
    return shape


def shape_of_rows(group, assignment):
    """Return the largest shape that a batch of a task's rows can have."""
    config = group.config
    shape = StepShape(1, 1, 1, 1)
    rows = [*assignment.report_rows, *assignment.held_out_rows]
    longest = nlargest(config.eval_batch_size, rows, key=lambda row: len(repr(row)))
    for prompt in assignment.eval_prompts:
        pairs = [(row, prompt) for row in longest]
        are_choices = assignment.task.metric in CHOICE_METRICS
        has_end = not are_choices
        _, examples, _ = encode_rows(pairs, group.tokenizer, config.max_length, has_end)
        if assignment.task.metric not in TEXT_METRICS:
            limit = config.max_target_length
            examples, _ = fit_all_targets(longest, examples, limit, are_choices)
        shape = larger(shape, shape_of_batch(examples, assignment, config))
    return shape


def shape_of_batch(examples, assignment, config):
    """Return the StepShape of a batch of these examples, which may be none."""
    sources = [len(example.source) for example in examples]
    targets = [max(map(len, example.targets)) for example in examples]
    n_choices = [len(example.targets) for example in examples]
    source_length = max(sources, default=1)
    if assignment.shots:
        source_length = config.max_length  # because as many shots as fit come before each row
    target_length = max(targets, default=1)
    if assignment.task.metric in TEXT_METRICS:
        target_length = config.max_new_tokens
    n_examples = max(1, len(examples))
    return StepShape(n_examples, source_length, max(n_choices, default=1), target_length)


def larger(shape, other):
    """Return the StepShape whose sizes are the larger ones of two."""
    return StepShape(*map(max, shape, other))


def planned_evaluation(group, shape):
    """Return the bytes that the tensors of a batch take at once, beyond the weights."""
    model = group.model
    options = {"dtype": model.embed.weight.dtype, "sharded": is_sharded(model)}
    peaks = extrapolate_depth(partial(peaks_of_evaluation, shape=shape, **options), model.config)
    return int(peaks.max())


@torch.no_grad()
def peaks_of_evaluation(model_config, dtype, shape, sharded=False):
    """Return the most bytes that tensors take in each part of scoring a batch, beyond the weights:
    an array, see `count_in_parts`.

    sharded: see `peaks_of_step`. The keys and values of a LLaMA's texts are kept, because texts
    that are generated need them. (Scoring a given text takes less.)
    """
    with FakeTensorMode():
        model = model_without_values(model_config, dtype).eval()
        score = partial(score_without_padding, model, sharded=sharded, keeps_kv=True)
        return peaks_beyond_weights(score, model, shape)
