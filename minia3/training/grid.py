"""The cells of a run: one adapter for each combination of the flags that have several values."""

import dataclasses
import math

from minia3.checkpoints.chat import read_template
from minia3.files.home import expand_home
from minia3.tasks.column_flags import ColumnFlags
from minia3.tasks.mixture import make_mixture
from minia3.tasks.split_files import check_names, short_name
from minia3.tasks.splits import load_task
from minia3.training.cell import Cell
from minia3.training.flags import as_tuple, expand_grid
from minia3.training.learned import learned_tasks
from minia3.training.rules import check_first_evaluation


def make_cells(config):
    """Return the cells of the grid.

    Raise ValueError if a task has a wrong name, if two cells have the same folder, or if none needs
    --chat-template.
    """
    check_names([str(expand_home(name)) for name in as_tuple(config.task)])
    loaded = {}  # cells of the same seed share the rows of a task
    cells = []
    for cell_config in expand_grid(config, config.axes):
        task = load_task_of(cell_config, loaded)
        name = cell_name(cell_config, task, config.axes)
        cells.append(Cell(cell_config, task, name, config.axes))
    folders = [str(cell.folder).casefold() for cell in cells]  # macOS and Windows ignore case
    if len(set(folders)) < len(folders):
        names = [cell.name for cell in cells]
        raise ValueError(
            f"expected a different name for each adapter, found {names!r:.200} (as folders, a / is "
            "written -, and case makes no difference): give no value twice, and rename a file if "
            "two tasks have one name"
        )
    check_chat_template(config, cells)
    return cells


def check_chat_template(config, cells):
    """Raise ValueError if --chat-template cannot be read, or if a new run has no rows for it.

    This is before a model is downloaded and loaded.
    """
    if config.chat_template is None:
        return
    read_template(config.chat_template)
    if config.resume is not None:
        return
    specs = []
    for cell in cells:
        specs += [task.spec for task in cell.task.members]
    if not any(spec.messages for spec in specs):
        raise ValueError(
            "--chat-template is for rows of 'messages', and the rows of this run have none: leave "
            "it out"
        )


def load_task_of(config, loaded):
    """Return the task of a cell: if --task has several values, their mixture.

    loaded: (name, seed) -> the task, for the tasks so far. New ones are added to it.
    """
    tasks = []
    for name in as_tuple(config.task):
        key = (name, config.seed)
        if key not in loaded:
            flags = {field: getattr(config, field) for field in ColumnFlags._fields}
            flags["like"] = learned_task(name, config)
            loaded[key] = load_task(name, config.data_dir, config.shots, config.seed, **flags)
        tasks.append(loaded[key])
    return tasks[0] if len(tasks) == 1 else make_mixture(tasks)


def learned_task(name, config):
    """Return what --adapter or --model has learned, if it is evaluated and not trained, or None.

    If it has learned several tasks, it is the one of this name.
    """
    if config.is_training:
        return None
    specs = learned_tasks(config.model, config.adapter)
    if len(specs) == 1:
        return next(iter(specs.values()))
    return specs.get(short_name(name))


def cell_name(config, task, axes):
    """Return what varies in the grid, such as "rte-s0-lr0.01". A single cell has no name."""
    parts = {
        "task": task.name,
        "seed": f"s{config.seed}",
        "lr": f"lr{config.lr}",
        "warmup_ratio": f"w{config.warmup_ratio}",
    }
    return "-".join(parts[axis] for axis in axes)


def set_steps(config, cells):
    """Return the flags, with --epochs as a number of steps. Set the flags of the cells likewise.

    Raise ValueError if the cells of a grid need different numbers of steps, or if there are too few
    of them for --eval-every.
    """
    if config.epochs is None or not config.is_training:
        return config
    n_steps = sorted({steps_of_epochs(cell) for cell in cells})
    if len(n_steps) > 1:
        raise ValueError(
            f"--epochs {config.epochs} is {n_steps[0]} to {n_steps[-1]} steps for the adapters of "
            "this grid, and a grid has one number of steps: give --steps"
        )
    for cell in cells:
        cell.config = dataclasses.replace(cell.config, steps=n_steps[0])
    config = dataclasses.replace(config, steps=n_steps[0])
    check_first_evaluation(config)
    return config


def steps_of_epochs(cell):
    """Return how many steps draw each row of a cell --epochs times.

    A task of a mixture counts for at most --cap rows.
    """
    config = cell.config
    sizes = [len(assignment.train_rows) for assignment in cell.assignments]
    if len(sizes) > 1:
        sizes = [min(size, config.cap) for size in sizes]
    n_steps = config.epochs * sum(sizes) / config.batch_size
    return max(1, math.ceil(round(n_steps, 6)))  # because 0.55 * 800 is 440.00000000000006
