"""Draw the batches of a cell, all before training begins.

Each time a row is used, a prompt is drawn for it, as in T-Few. The draws depend only on the seed
and the step, so a resumed run draws the same.
"""

from itertools import islice

import numpy as np

from minia3.inference.scoring import check_examples
from minia3.tasks.examples import encode_rows
from minia3.tasks.limits import equal_choices, fit_all_targets
from minia3.tasks.mixture import draw_rows


def draw_batches(cell, tokenizer, model=None):
    """Return a list of examples for each step.

    model: if it is given, it is checked that the model can read the examples. Raise ValueError,
    with the `idx` of the row, if a row cannot be trained on.
    """
    plan = plan_steps(cell)
    examples = encode_plan(plan, cell, tokenizer, model)
    return [[examples[place] for place in step] for step in plan]


def plan_steps(cell):
    """Return (member of the task, row, prompt) for each example of each step, as numbers."""
    config = cell.config
    sizes = [len(assignment.train_rows) for assignment in cell.assignments]
    n_prompts = [len(assignment.prompts) for assignment in cell.assignments]
    steps = draw_rows(sizes, config.cap, config.batch_size, config.seed)
    plan = []
    for step, rows in enumerate(islice(steps, config.steps)):
        rng = np.random.RandomState([config.seed, 1, step])
        prompts = rng.randint([n_prompts[member] for member, _ in rows]).tolist()
        places = []
        for (member, row), prompt in zip(rows, prompts, strict=True):
            places.append((member, row, prompt))
        plan.append(places)
    return plan


def encode_plan(plan, cell, tokenizer, model):
    """Return a dict from each (member, row, prompt) of the plan to its example.

    An example that the plan uses many times is encoded once.
    """
    config = cell.config
    drawn = set().union(*plan)
    examples = {}
    n_cut = n_targets_cut = n_equal = 0
    for member, assignment in enumerate(cell.assignments):
        places = sorted(place for place in drawn if place[0] == member)
        rows = [assignment.train_rows[row] for _, row, _ in places]
        prompts = [assignment.prompts[prompt] for _, _, prompt in places]
        pairs = list(zip(rows, prompts, strict=True))
        has_end = assignment.task.answer != "choices"  # texts to generate must learn to end
        _, encoded, n_cut_here = encode_rows(pairs, tokenizer, config.max_length, has_end)
        encoded, n_targets_cut_here = fit_all_targets(rows, encoded, config.max_target_length)
        if model is not None:
            check_examples(rows, encoded, model, tokenizer)

        examples |= dict(zip(places, encoded, strict=True))
        n_cut += n_cut_here
        n_targets_cut += n_targets_cut_here
        n_equal += sum(equal_choices(example) is not None for example in encoded)
    n_all = len(examples)
    if n_cut:
        limit = f"{config.max_length} tokens (--max-length)"
        print(f"note     {n_cut} of {n_all} training inputs are cut to {limit}")
    if n_targets_cut:
        limit = f"{config.max_target_length} tokens (--max-target-length)"
        print(f"note     {n_targets_cut} of {n_all} training targets are cut to {limit}")
    if n_equal:
        reason = "have two choices that are one text to the tokenizer"
        print(f"note     {n_equal} of {n_all} training examples {reason}")
    return examples
