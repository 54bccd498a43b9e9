"""`minia3.batches`: the batches of train.py, for a training loop of your own."""

from minia3.tasks.batches import collate
from minia3.training.cell import Cell
from minia3.training.config import Config
from minia3.training.drawing import draw_batches
from minia3.training.from_python import given_flags
from minia3.training.rules import check_config


def batches(model, tokenizer, task, *, batch_size=8, steps=1000, seed=0, max_length=512):
    """Return an iterator of Batches (minia3/tasks/batches.py), drawn as train.py draws them.

    model: its name decides which of the task's prompts suit it. task: from `load_task`.
    max_length: most tokens of an input; a longer one loses words from its middle.

    Raise ValueError if a row does not fit or a value is out of range.
    """
    flags = {"batch_size": batch_size, "steps": steps, "seed": seed, "max_length": max_length}
    name = str(getattr(model, "name_or_path", "")) or Config.model
    config = Config(model=name, **given_flags(flags))
    check_config(config)
    examples = draw_batches(Cell(config, task), tokenizer, model)
    return map(collate, examples)
