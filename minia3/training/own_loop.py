"""`minia3.batches`: the batches of train.py, for a training loop of your own."""

from minia3.tasks.batches import collate
from minia3.training.cell import Cell
from minia3.training.config import Config
from minia3.training.drawing import draw_batches, print_notes
from minia3.training.from_python import as_python
from minia3.training.rules import check_config


def batches(model, tokenizer, task, *, batch_size=8, steps=1000, seed=0, max_length=512):
    """Return an iterator of Batches (minia3/tasks/batches.py), drawn as train.py draws them.

    model: its name decides which of the task's prompts suit it. task: from `load_task`.
    max_length: maximum tokens of an input; a longer one loses words from its middle.

    Raise ValueError if a row does not fit or a value is out of range.
    """
    if isinstance(seed, tuple):  # a grid of train.py has several
        raise ValueError(f"seed is {seed!r:.60}, expected an integer")
    config = Config(
        model=str(getattr(model, "name_or_path", "")) or Config.model,
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
