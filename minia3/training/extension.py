"""Make a run longer: `--resume FOLDER --steps N`, also after the run has finished.

From the step at which the run stands, the learning rate is that of a run of N steps. So it rises
again from 0 to where such a run would be, and falls to 0 at step N. If such a run would still be in
its warm-up, it first rises to the peak. The optimizer keeps its state.

If the adapters of a grid were trained one after the other, each continues from its own state.
"""

import dataclasses
from pathlib import Path

from minia3.files.messages import plural
from minia3.files.read import reading
from minia3.training.checkpoint import (
    damage_in,
    keep_state,
    load_state_to_extend,
    reopen_cells,
    state_path,
    steps_of_states,
)
from minia3.training.choices import TRAINED_ALONE
from minia3.training.grid import expand_grid


def extend(saved, config, n_steps):
    """Return the Checkpoint from which a run continues up to `config.steps`.

    saved: its last Checkpoint. n_steps: from `steps_done`. All cells train on, also those of a
    stopped run that have a result already or have run out of patience. Raise ValueError if the run
    has done more steps already, if it lacks the state to continue from, or if no cell can train on.
    """
    if not config.is_training:
        raise ValueError("--steps extends training, and this run trains nothing")
    place = place_of(saved, config)
    check_state(saved, config, place, n_steps)
    if config.steps <= n_steps:
        found = f"--steps is {config.steps}, and the run has done {n_steps} "
        found += plural(n_steps, "step")
        raise ValueError(f"{found}: expected more than {n_steps}")
    if place > 0:
        group = load_state_to_extend(Path(config.resume), 0)
    else:
        folder = Path(config.resume)
        with reading(folder / "checkpoint.pt", damage_in(folder)):
            group = reopen_cells(saved.group)
    # Cells that train one after the other are a group each, and another one may train on.
    is_only_group = len(group["cells"]) == len(expand_grid(config, config.axes))
    if is_only_group and all(became_nan(cell["progress"]) for cell in group["cells"]):
        found = f"the loss of {config.resume} became NaN, so nothing is left to train"
        raise ValueError(f"{found}: begin a new run with a lower --lr")
    return dataclasses.replace(
        saved, is_finished=False, n_done=0, finals=[], failure=None, group=group
    )


def became_nan(progress):
    """Return whether the training of a cell ended early, with or without a result."""
    return bool(progress.get("divergence") or progress.get("failure"))


def steps_done(saved, config):
    """Return how many steps a run has done, or None if there is no state to continue from.

    Cells that train one after the other may have stopped at different steps, and those that come
    later may have done more: see `keep_last_state`.
    """
    steps = steps_of_states(Path(config.resume))
    if saved.n_steps is not None:
        steps.append(saved.n_steps)
    return max(steps, default=None)


def place_of(saved, config):
    """Return how many groups come before the one whose state the checkpoint has."""
    if config.method in TRAINED_ALONE:
        return saved.n_done - saved.is_finished
    return 0  # all cells are one group


def check_state(saved, config, place, n_steps):
    """Raise ValueError if a state is missing."""
    folder = Path(config.resume)
    missing = [i for i in range(place) if not state_path(folder, i).exists()]
    advice = "begin a new run with this run's adapter (--adapter)"
    if config.method == "full":
        advice = "begin a new run with this run's model (--model)"
    has_state = saved.group is not None or not saved.is_finished
    if not missing and (n_steps is None or not has_state):
        raise ValueError(f"{folder} keeps no state to continue from: {advice}")
    if missing:
        path = state_path(folder, missing[0])
        raise ValueError(f"{path}: not found, so the run cannot be extended: {advice}")


def keep_last_state(stopped, config):
    """Write the state of the group that trained last, if other groups come before it.

    The extended run begins again with the first group, and reads this state when it comes to this
    group. stopped: the last Checkpoint of the run before it was extended.
    """
    place = place_of(stopped, config)
    if place > 0 and stopped.group is not None:
        keep_state(Path(config.resume), place, stopped.group)
