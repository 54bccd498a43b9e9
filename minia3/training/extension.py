"""Make a run longer: `--resume FOLDER --steps N`, also after the run has finished.

From the step at which the run stands, the learning rate is that of a run of N steps. So it rises
again from 0 to where such a run would be, and falls to 0 at step N. There is no second warm-up, and
the optimizer keeps its state.
"""

import dataclasses
from pathlib import Path

from minia3.files.read import reading
from minia3.training.checkpoint import DAMAGED
from minia3.training.choices import TRAINED_ALONE


def extend(saved, config):
    """Return the Checkpoint from which a run continues up to `config.steps`.

    saved: its last Checkpoint. Raise ValueError if it has done more steps already, or if it lacks
    the state to continue from.
    """
    if saved.is_finished and not config.is_training:
        raise ValueError("--steps extends a training, and this run trains nothing")
    if config.method in TRAINED_ALONE and saved.n_done > saved.is_finished:
        reason = "its adapters were trained one after the other, and only the last one has a state"
        raise ValueError(f"{config.resume} cannot be extended ({reason}): {advise_new_run(config)}")
    if saved.n_steps is None:
        reason = "no state to continue from"
        if config.method == "full":
            reason = "the model, but not its optimizer"
        raise ValueError(f"{config.resume} keeps {reason}: {advise_new_run(config)}")
    if config.steps <= saved.n_steps:
        found = f"--steps is {config.steps}, and the run has done {saved.n_steps} steps"
        raise ValueError(f"{found}: expected more than {saved.n_steps}")
    if not saved.is_finished:
        return saved
    with reading(Path(config.resume, "checkpoint.pt"), DAMAGED):
        group = reopen_cells(saved.group)
    return dataclasses.replace(
        saved, is_finished=False, n_done=0, finals=[], failure=None, group=group
    )


def reopen_cells(group):
    """Return the state of a group whose cells have patience again, and no result yet."""
    cells = []
    for cell in group["cells"]:
        progress = cell["progress"] | {"is_reported": False, "n_misses": 0}
        cells.append(cell | {"progress": progress})
    return group | {"cells": cells}


def advise_new_run(config):
    if config.method == "full":
        return f"begin a new run with --model {config.resume}/model"
    return "begin a new run with --adapter, which takes an adapter of this one"
