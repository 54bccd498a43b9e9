"""Before a run evaluates: does a batch of --eval-batch-size rows fit into the memory that is free?

The batch of the longest rows is planned on fake tensors, as a step is (step_memory.py). Nothing is
kept for a backward pass, so a batch takes one layer's tensors, the keys and values of all layers,
and logits. A text that is generated takes at most what it takes to score a text of
--max-new-tokens.

Shapes: B examples, M source length, C choices, L tokens of a choice.
"""

from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from minia3.checkpoints.load import build_model, place_parameter
from minia3.inference.metrics import TEXT_METRICS
from minia3.tasks.examples import encode_rows
from minia3.training.device import free_memory
from minia3.training.memory_plan import MemoryCounter, stored_dtype
from minia3.training.step_memory import (
    LAYER_FIELDS,
    OVERHEAD,
    ROOM,
    StepShape,
    gigabytes,
    limited_memory,
    score_without_padding,
    upper_bound,
)


def check_evaluation(run, group):
    """Print a note if a batch of an evaluation takes more memory than is free.

    On a CPU, limit the process to what is free, as `check_memory` does.
    """
    free = free_memory(group.device)
    shape = shape_of_evaluation(group)
    if free is None or upper_bound(group.model.config, shape) < free / 2:
        return  # nothing to plan
    free = int(ROOM * free)
    needed = OVERHEAD * planned_evaluation(group, shape)
    if needed <= free:
        return
    fitting = fitting_rows(group, shape, free)
    advice = "no size fits: take a smaller model or a shorter --max-length"
    if fitting > 0:
        advice = f"--eval-batch-size {fitting} fits"
        run.eval_batch_size = fitting
    print(
        f"note     to evaluate {shape.n_examples} rows at once takes about {gigabytes(needed)}, "
        f"but {gigabytes(free)} are free: {advice}"
    )
    if group.device.type == "cpu":
        run.resources.enter_context(limited_memory(free))


def shape_of_evaluation(group):
    """Return the largest shape that a batch of this run's evaluations can have, or nearly so.

    The rows with the most characters stand for those with the most tokens.
    """
    config = group.config
    shape = StepShape(1, 1, 1, 1)
    for cell in group.cells:
        for assignment in cell.assignments:
            rows = [*assignment.report_rows, *assignment.held_out_rows]
            longest = sorted(rows, key=lambda row: -len(repr(row)))[: config.eval_batch_size]
            for prompt in assignment.eval_prompts:
                pairs = [(row, prompt) for row in longest]
                examples = encode_rows(pairs, group.tokenizer, config.max_length, end=True)[1]
                shape = larger(shape, shape_of_batch(examples, assignment, config))
    return shape


def shape_of_batch(examples, assignment, config):
    sources = [len(example.source) for example in examples]
    targets = [max(map(len, example.targets)) for example in examples]
    n_choices = [len(example.targets) for example in examples]
    source = config.max_length if assignment.shots else max(sources, default=1)
    target = max(targets, default=1)
    if assignment.task.metric in TEXT_METRICS:
        target = config.max_new_tokens
    return StepShape(max(1, len(examples)), source, max(n_choices, default=1), target)


def larger(shape, other):
    return StepShape(*map(max, shape, other))


def fitting_rows(group, shape, free):
    """Return the largest power of two that fits as --eval-batch-size, or 0."""
    size = 1 << (shape.n_examples - 1).bit_length() >> 1
    while size > 0:
        smaller = shape._replace(n_examples=size)
        if OVERHEAD * planned_evaluation(group, smaller) <= free:
            return size
        size //= 2
    return 0


def planned_evaluation(group, shape):
    """Return the bytes that the tensors of a batch take at once, beyond the weights."""
    config = group.model.config
    dtype = group.model.embed.weight.dtype
    fields = [name for name in LAYER_FIELDS if hasattr(config, name)]
    shallow = replace(config, **dict.fromkeys(fields, 2))
    two_layers = peak_of_evaluation(shallow, dtype, shape)
    total = two_layers
    for name in fields:
        deeper = replace(shallow, **{name: 3})
        layer = peak_of_evaluation(deeper, dtype, shape) - two_layers
        total += layer * (getattr(config, name) - 2)
    return total


@torch.no_grad()
def peak_of_evaluation(model_config, dtype, shape):
    """Return the most bytes that tensors take while a batch is scored, beyond the weights."""
    with FakeTensorMode():
        model = build_model(model_config)
        for name, p in list(model.named_parameters()):
            place_parameter(model, name, torch.empty(p.shape, dtype=stored_dtype(name, dtype)))
        source_BM = torch.zeros(shape.n_examples, shape.source_length, dtype=torch.long)
        target_shape = (shape.n_examples, shape.n_choices, shape.target_length)
        target_BCL = torch.zeros(target_shape, dtype=torch.long)
        counter = MemoryCounter()
        for tensor in (*model.parameters(), source_BM, target_BCL):
            counter.add(tensor)
        n_before = counter.now
        with counter:
            score_without_padding(model.eval(), source_BM, target_BCL)
        return counter.peak - n_before
