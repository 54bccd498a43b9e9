"""Draw the batches of a cell, all before training begins.

Each time a row is used, a prompt is drawn for it, as in T-Few. The draws depend only on the seed
and the step, so a resumed run draws the same.
"""

from itertools import islice

import numpy as np

from minia3.tasks.examples import encode_rows
from minia3.tasks.mixture import draw_rows


def draw_batches(cell, tokenizer):
    """Return a list of examples for each step."""
    plan = plan_steps(cell)
    examples = encode_plan(plan, cell, tokenizer)
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


def encode_plan(plan, cell, tokenizer):
    """Return a dict from each (member, row, prompt) of the plan to its example.

    An example that the plan uses many times is encoded once.
    """
    drawn = set().union(*plan)
    examples = {}
    n_cut = 0
    for member, assignment in enumerate(cell.assignments):
        places = sorted(place for place in drawn if place[0] == member)
        pairs = []
        for _, row, prompt in places:
            pairs.append((assignment.train_rows[row], assignment.prompts[prompt]))
        has_end = assignment.task.answer != "choices"  # texts to generate must learn to end
        _, encoded, n_cut_here = encode_rows(pairs, tokenizer, cell.config.max_length, has_end)
        examples |= dict(zip(places, encoded, strict=True))
        n_cut += n_cut_here
    if n_cut:
        limit = f"{cell.config.max_length} tokens (--max-length)"
        has_chats = any(assignment.task.answer == "messages" for assignment in cell.assignments)
        action = "lose their oldest turns to fit into" if has_chats else "are cut to"
        print(f"note     {n_cut} of {len(examples)} training inputs {action} {limit}")
    return examples
