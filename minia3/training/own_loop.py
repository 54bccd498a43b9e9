"""`minia3.batches` and `minia3.prompts_for`: what train.py draws, for a loop of your own."""

from minia3.tasks.batches import collate
from minia3.tasks.prompts import for_family
from minia3.training.cell import Cell
from minia3.training.config import Config
from minia3.training.drawing import draw_batches, print_notes
from minia3.training.from_python import as_python
from minia3.training.learned import family_of
from minia3.training.rules import check_config


def batches(model, tokenizer, task, *, batch_size=8, steps=1000, seed=0, max_length=512):
    """Return an iterator that yields a Batch (minia3/tasks/batches.py) for each step.

    The examples are those that train.py draws. Notes on rows that are cut are printed.

    A row is put into the words of one of `prompts_for(model, task)`. task: from `load_task`.
    max_length: maximum tokens of an input; a longer one loses words from its middle.

    Raise ValueError if a row does not fit, if a value is out of range, or if the task has no rows
    to train on or to report on.
    """
    if isinstance(seed, tuple):  # a grid of train.py has several
        raise ValueError(f"seed is {seed!r:.60}, expected an integer")
    config = Config(
        model=name_of(model),
        batch_size=as_python(batch_size),
        steps=as_python(steps),
        seed=as_python(seed),
        max_length=as_python(max_length),
    )
    check_config(config)
    cell = Cell(config, task)
    cell.batches = draw_batches(cell, tokenizer, model)
    print_notes([cell])
    return map(collate, cell.batches)


def prompts_for(model, task):
    """Return the prompts of a task from which train.py draws for a model, a tuple.

    These are the forms of the task in which the family of the model was pre-trained, such as "rte
    sentence1: ..." for t5-base, or else the prompts for all models. train.py evaluates with the
    first of them. task: from `load_task`.

    Raise ValueError if all prompts are for other families.
    """
    return for_family(task.prompts, family_of(name_of(model)))


def name_of(model):
    """Return the name or path of a model, or of the model from which it was merged.

    Without either, it is that of the embedded model, which gets the prompts for all models.
    """
    name = getattr(model, "name_or_path", getattr(model, "made_of", None))
    return str(name or Config.model)
