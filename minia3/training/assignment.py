"""What a run does with the rows and the prompts of a task.

train      is trained on, or shown before each input by in-context learning
held out   chooses the best vectors (--eval-every), and is not trained on
report     gives the result; nothing should be chosen with it
"""

from dataclasses import dataclass, field

import numpy as np

from minia3.inference.metrics import check_package
from minia3.tasks.prompts import Prompt, for_family
from minia3.tasks.task import Task
from minia3.training.doubts import doubts_about_family, doubts_about_rows, loss_notes
from minia3.training.learned import family_of, learned_tasks

# A note for a run that trains nothing, on a file that is split in three.
ONLY_A_PART = (
    "only test, which is {n_rows} of these rows, is evaluated: for all of them, if none was "
    "trained on, give a folder whose only file is named test, such as test.csv"
)
SAME_SEED = (
    "the seed decides which rows are reported on: if the adapter or the model was trained on this "
    "task, give --seed as in that training, or the result is on rows that it has learned"
)

# A note for a task that some models have seen
UNKNOWN_MODEL = (
    "minia3 does not know this model by name, so it knows neither whether the model saw this "
    "task's labels in its pre-training, nor prompts that are made for it"
)


@dataclass
class Assignment:
    """The rows and prompts of a task, by what a run does with them."""

    task: Task
    train_rows: list[dict]
    held_out_rows: list[dict]
    report_rows: list[dict]
    report_split: str  # the name of the split that `report_rows` come from
    shots: list[dict]  # examples before each input
    prompts: tuple[Prompt, ...]  # to draw from in training
    eval_prompts: list[Prompt]
    notes: list[str]  # what the user should know about these rows
    doubts: list[str] = field(default_factory=list)  # why a result may say little


def assign_rows(task, config):
    """Return the Assignment of a task. `config` has one seed.

    Raise ValueError if there are no rows to train on or to report on, or no such prompt.
    """
    if is_without_results(task, config):
        split = "test"
        report_rows = []
    else:
        split, report_rows = task.evaluation
    train_rows, held_out_rows = hold_out(task, config, split)
    check_train_rows(task, config, train_rows)
    shots = shuffled_rows(task.train, config.seed) if config.method == "icl" else []
    family = family_of(config.model)
    prompts = for_family(task.prompts, family)
    assignment = Assignment(
        task=task,
        train_rows=train_rows,
        held_out_rows=held_out_rows,
        report_rows=report_rows,
        report_split=split,
        shots=shots,
        prompts=prompts,
        eval_prompts=choose_prompts(prompts, config.eval_prompt, task.name),
        notes=[*task.notes, *notes_on(task, family, held_out_rows)],
    )
    check_package(task.metric)
    check_losses(task, config)
    assignment.doubts = doubts_about_rows(assignment, config) + doubts_about_family(task, family)
    if config.is_training:
        assignment.notes += loss_notes(assignment, config)
    elif task.is_divided and config.method != "icl":
        assignment.notes.append(ONLY_A_PART.format(n_rows=len(report_rows)))
    if task.depends_on_seed and (config.adapter or learned_tasks(config.model)):
        assignment.notes.append(SAME_SEED)
    return assignment


def notes_on(task, family, held_out_rows):
    """Return what the user should know about the choice of rows and of the model."""
    notes = []
    if held_out_rows:
        n_rows = len(held_out_rows)
        notes.append(f"{n_rows} rows choose the best vectors, and are not trained on")
    if family is None and task.spec.seen:
        notes.append(UNKNOWN_MODEL)
    return notes


def is_without_results(task, config):
    """Return whether all labeled rows are trained on, as in T-Few's submission to RAFT."""
    has_hidden_labels = any(row["label"] < 0 for row in task.test)
    return config.is_training and has_hidden_labels and not task.validation


def hold_out(task, config, report_split):
    """Return the rows to train on, and the rows that choose the best vectors."""
    if not (config.is_training and config.eval_every):
        return task.train, []
    if report_split == "test" and task.validation:
        return task.train, task.validation
    # The validation rows are reported on, so a fifth of the rows to train on is held out instead.
    n_held_out = max(1, len(task.train) // 5)
    rows = shuffled_rows(task.train, config.seed)
    return rows[:-n_held_out], rows[-n_held_out:]


def shuffled_rows(rows, seed):
    """Return the rows in a random order, because few-shot rows may be sorted by label (SST-2)."""
    # The 4 means nothing. It stays, because another number would hold out other rows.
    permutation = np.random.RandomState([seed, 4]).permutation(len(rows))
    return [rows[i] for i in permutation]


def check_train_rows(task, config, train_rows):
    """Raise ValueError if nothing can be learned from the rows."""
    needs_rows = config.is_training or config.method == "icl"
    if needs_rows and not task.train:
        raise ValueError(
            f"{task.name}: no rows to train on: expected some in a file named train, such as "
            "train.jsonl"
        )
    if needs_rows and not train_rows:
        raise ValueError(
            f"{task.name}: --eval-every holds out the only row to train on: expected 2 rows or "
            "more, or --shots 2 or more"
        )
    if config.method == "icl" and task.answer == "messages":
        raise ValueError(
            f"{task.name}: icl puts examples before an input, and conversations have none: "
            "expected another --method, or rows with an input and an answer"
        )


def check_losses(task, config):
    """Raise ValueError if no loss can train on the rows."""
    has_no_loss = task.answer != "choices" and "lm" not in config.losses.split(",")
    if config.is_training and has_no_loss:
        raise ValueError(
            f"{task.name}: its rows have a text to write and no choices, so only the loss lm can "
            f"train: expected lm in --losses, found {config.losses}"
        )
    has_one_label = all(len(prompt.choices or ()) == 1 for prompt in task.prompts)
    if config.is_training and has_one_label and "lm" not in config.losses.split(","):
        raise ValueError(
            f"{task.name}: there is one label, so only the loss lm can train: expected lm in "
            f"--losses, found {config.losses}; or name all labels with --labels"
        )


def choose_prompts(prompts, asked, task_name):
    """Return the prompts that --eval-prompt asks for, by number or all of them.

    Raise ValueError if there is no such prompt.
    """
    if asked == "all":
        return list(prompts)
    numbers = dict.fromkeys(str(asked).split(","))  # each once, in the order of the flag
    chosen = []
    for number in numbers:
        if number not in map(str, range(len(prompts))):
            expected = f"expected all, or numbers from 0 to {len(prompts) - 1} with commas between"
            raise ValueError(f"{task_name}: --eval-prompt is {asked}, {expected}")
        chosen.append(prompts[int(number)])
    return chosen
