"""Draw the batches of a cell.

Each time a row is used, a prompt is drawn for it, as in T-Few. The draws depend only on the seed
and the step, so a resumed run draws the same. All examples are encoded before training begins, so
a row that does not fit is found at once. The batches are drawn when their steps come, because a
list of all of them could fill the memory.
"""

from itertools import chain, islice

import numpy as np

from minia3.files.messages import part_of
from minia3.inference.scoring import check_examples
from minia3.tasks.examples import encode_rows
from minia3.tasks.limits import equal_choices, fit_all_targets
from minia3.tasks.mixture import draw_rows


def draw_batches(cell, tokenizer, model=None):
    """Return the examples of each step, as DrawnExamples.

    model: if given, check that it can read the examples. Raise ValueError, with the `idx` of the
    row, if a row cannot be trained on.
    """
    plan = plan_steps(cell.assignments, cell.config)
    examples, notes = encode_plan(plan, cell, tokenizer, model)
    return DrawnExamples(cell.assignments, cell.config, examples, notes)


def print_notes(cells):
    """Print the notes on the examples of the cells of a group: which were cut, for example.

    A note begins with the title of its cell. What all cells say is said once.
    """
    notes = [cell.batches.notes for cell in cells]
    for text in dict.fromkeys(chain.from_iterable(notes)):
        is_of_all = all(text in notes_of_cell for notes_of_cell in notes)
        if is_of_all and len(cells) > 1:
            print(f"note     {text}")
            continue
        for cell in cells:
            if text in cell.batches.notes:
                print(f"note     {cell.title}{text}")


class DrawnExamples:
    """A list of examples for each step, drawn when a step is asked for.

    Ask for the steps in order: to go back to an earlier one, everything is drawn again from step 0.
    """

    def __init__(self, assignments, config, examples, notes=()):
        """examples, notes: from `encode_plan`."""
        self.assignments = assignments
        self.config = config
        self.examples = examples
        self.notes = notes
        self.plan = plan_steps(assignments, config)
        self.next_step = 0

    def __len__(self):
        return self.config.steps

    def __getitem__(self, step):
        if step >= len(self):
            raise IndexError(step)
        if step < self.next_step:
            self.plan = plan_steps(self.assignments, self.config)
            self.next_step = 0
        places = next(islice(self.plan, step - self.next_step, None))
        self.next_step = step + 1
        return [self.examples[place] for place in places]


def plan_steps(assignments, config):
    """Yield the places of each step: one per example, (member of the task, row, prompt) as numbers.

    The draws depend on nothing but the arguments, so every call yields the same.
    """
    sizes = [len(assignment.train_rows) for assignment in assignments]
    n_prompts = [len(assignment.prompts) for assignment in assignments]
    steps = draw_rows(sizes, config.cap, config.batch_size, config.seed)
    for step, rows in enumerate(islice(steps, config.steps)):
        rng = np.random.RandomState([config.seed, 1, step])  # 1: other draws than `draw_rows`
        prompts = rng.randint([n_prompts[member] for member, _ in rows]).tolist()
        places = []
        for (member, row), prompt in zip(rows, prompts, strict=True):
            places.append((member, row, prompt))
        yield places


def distinct_places(plan, cell):
    """Return the set of the places in a plan: (member, row, prompt).

    Stop reading the plan when every place that exists has occurred.
    """
    n_all = 0
    for assignment in cell.assignments:
        n_all += len(assignment.train_rows) * len(assignment.prompts)
    drawn = set()
    for places in plan:
        drawn.update(places)
        if len(drawn) == n_all:
            break
    return drawn


def encode_plan(plan, cell, tokenizer, model):
    """Return a dict from each (member, row, prompt) of the plan to its example, and a list of
    notes, such as how many examples were cut.

    An example that the plan uses many times is encoded once.
    """
    config = cell.config
    drawn = distinct_places(plan, cell)
    examples = {}
    n_cut = n_chats_cut = n_targets_cut = n_equal = 0
    for member, assignment in enumerate(cell.assignments):
        places = sorted(place for place in drawn if place[0] == member)
        rows = [assignment.train_rows[row] for _, row, _ in places]
        prompts = [assignment.prompts[prompt] for _, _, prompt in places]
        pairs = list(zip(rows, prompts, strict=True))
        are_choices = assignment.task.answer == "choices"
        has_end = not are_choices  # texts to generate must learn to end
        with cell.naming_task(assignment.task):
            _, encoded, n_cut_here = encode_rows(pairs, tokenizer, config.max_length, has_end)
            encoded, n_targets_cut_here = fit_all_targets(
                rows, encoded, config.max_target_length, are_choices
            )
            if model is not None:
                check_examples(rows, encoded, model, tokenizer)

        examples |= dict(zip(places, encoded, strict=True))
        if assignment.task.answer == "messages":
            n_chats_cut += n_cut_here
        else:
            n_cut += n_cut_here
        n_targets_cut += n_targets_cut_here
        n_equal += sum(equal_choices(example) is not None for example in encoded)
    return examples, notes_on_limits(
        config, len(examples), n_cut, n_chats_cut, n_targets_cut, n_equal
    )


def notes_on_limits(config, n_all, n_cut, n_chats_cut, n_targets_cut, n_equal):
    """Return a note on each kind of training examples that were cut, or that have equal choices."""
    limit = f"{config.max_length} tokens (--max-length)"
    lost = f"oldest turns to fit into {limit}"
    target_limit = f"{config.max_target_length} tokens (--max-target-length)"
    reason = "two choices that are the same text to the tokenizer"
    notes = [
        note_on_part(n_cut, n_all, "input", ("is", "are"), f"cut to {limit}"),
        note_on_part(n_chats_cut, n_all, "input", ("loses its", "lose their"), lost),
        note_on_part(n_targets_cut, n_all, "target", ("is", "are"), f"cut to {target_limit}"),
        note_on_part(n_equal, n_all, "example", ("has", "have"), reason),
    ]
    return [note for note in notes if note]


def note_on_part(n, n_all, noun, verbs, text):
    """Return a note on some of the training examples, or "" if n is 0. verbs: of one, of many."""
    if n == 0:
        return ""
    verb = verbs[0] if n == 1 else verbs[1]
    return f"{part_of(n, n_all, f'training {noun}')} {verb} {text}"
