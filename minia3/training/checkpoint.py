"""checkpoint.pt: the state that a run continues from, with the vectors trained so far.

Beside it, states/0.pt, states/1.pt ... hold the states of groups that are done, if a run trains its
cells one after the other. They are what --steps extends the run from.
"""

import shutil
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from minia3.files.pickles import check_checksums, check_storages
from minia3.files.read import is_out_of_memory, one_line, reading
from minia3.files.write import replacing
from minia3.training.device import device_module
from minia3.training.outcomes import results_of_finished

LAYOUT = 3  # goes up if an older checkpoint cannot be continued
OTHER_LAYOUT = (
    "written by another version of minia3: finish the run with that version, "
    "or remove the file to start over from step 0"
)
DAMAGED = "damaged: remove the file to start over from step 0"
DAMAGED_AT_THE_END = (
    "damaged, so the run cannot be extended; it is finished, and metrics.jsonl has its results"
)
STATES = "states"  # the folder of the states of groups that are done
DAMAGED_STATE = "damaged, so the run cannot be extended: begin a new one with --adapter"


@dataclass
class Checkpoint:
    """Where a run stands: the results that it has, and the state of the group that trains."""

    is_finished: bool = False
    # Cells in the groups that are done. Only groups of one cell follow each other, so this is also
    # the number of these groups.
    n_done: int = 0
    finals: list = field(default_factory=list)  # the final lines of metrics.jsonl
    failure: str | None = None  # the reason of the last cell that failed
    n_bytes: int = 0  # of metrics.jsonl: what lies beyond was written after this state
    reopened: str | None = None  # what metrics.jsonl has to become first: see Metrics.reopen
    group: dict | None = None  # Group.state_dict of the group that trains
    n_processes: int = 1  # that trained it together
    dtype: str | None = None  # of the base; None: an earlier version, which does not say

    @property
    def n_steps(self):
        """How many steps the run has done, or None if there is no state to continue from."""
        steps = [final["steps"] for final in self.finals]
        if self.group is not None:
            log = self.group.get("log")
            if not isinstance(log, dict) or type(log.get("step")) is not int:
                return None
            steps.append(log["step"])
        return max(steps, default=None)

    def check(self):
        """Raise TypeError if a value cannot be right."""
        has_counts = type(self.n_done) is int and type(self.n_bytes) is int
        has_containers = isinstance(self.finals, list) and isinstance(self.group, dict | None)
        has_containers = has_containers and isinstance(self.reopened, str | None)
        if not has_counts or not has_containers or self.n_bytes < 0:
            raise TypeError("not the state of a run")


def save_checkpoint(folder, checkpoint):
    """Replace the checkpoint of a run's folder. Without a folder, nothing is written."""
    if folder is None:
        return
    write_values({"layout": LAYOUT, **vars(checkpoint)}, folder / "checkpoint.pt")


def write_values(values, path):
    """Replace a file by a dict: by all of it, or the old file stays.

    Tensors on a CPU are written from where they are, because a copy of a whole model may not fit.
    """
    with replacing(path) as temporary, open(temporary, "wb") as file, saving(path):
        torch.save(on_cpu(values), file)


@contextmanager
def saving(path):
    """Return a context for torch.save. Raise OSError within it if memory or the disk is full."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            found = f"{path}: not enough memory to save the state"
            raise OSError(f"{found}: {one_line(error)}") from None
        # torch says that the file has no end, and hides that the disk is full.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def load_checkpoint(folder):
    """Return the last Checkpoint of a run, or None. Raise ValueError if it is damaged."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        return None
    with reading(path, damage_in(folder), is_bounded=True):
        values = read_values(path)
        if values.pop("layout", None) != LAYOUT:
            if values.get("finished") is True:  # as earlier versions wrote it
                return Checkpoint(is_finished=True, finals=known_results(folder) or [])
            raise ValueError(OTHER_LAYOUT)
        checkpoint = Checkpoint(**values)
        checkpoint.check()
        return checkpoint


def damage_in(folder):
    """Return what to say if the checkpoint of a run is damaged: starting over costs its results."""
    return DAMAGED if known_results(folder) is None else DAMAGED_AT_THE_END


def known_results(folder):
    """Return the results of a finished run, or None, also if metrics.jsonl is damaged."""
    try:
        return results_of_finished(folder)
    except ValueError:
        return None


def checkpoint_of_results(folder):
    """Return the Checkpoint of a run that is finished although it has no checkpoint.pt, or None.

    A user may delete that file to save space. All results are in metrics.jsonl.
    """
    finals = results_of_finished(folder)
    return None if finals is None else Checkpoint(is_finished=True, finals=finals)


def read_values(path):
    """Return the dict in a file that `write_values` wrote. Raise TypeError if it holds no dict."""
    check_checksums(path)
    check_storages(path)
    values = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(values, dict):
        raise TypeError("not the state of a run")
    return values


# The states of groups that are done, each in a file. In checkpoint.pt, every save would write all
# of them again.


def state_path(folder, place):
    """Return the file of the state of a group. place: how many groups come before it."""
    return folder / STATES / f"{place}.pt"


def keep_state(folder, place, state):
    """Write the state of a group that is done."""
    write_values({"layout": LAYOUT, "group": state}, state_path(folder, place))


def load_state_to_extend(folder, place):
    """Return the state of a group in an earlier, shorter run of this folder, or None.

    Its cells are reopened. Raise ValueError if its file is damaged.
    """
    if folder is None or not state_path(folder, place).exists():
        return None
    return read_state(state_path(folder, place))


def steps_of_states(folder):
    """Return how many steps each group has done that has a state in states/: a list.

    Raise ValueError if a file is damaged.
    """
    paths = sorted((folder / STATES).glob("*.pt"))
    return [read_state(path)["log"]["step"] for path in paths]


def read_state(path):
    """Return the state of a group, with its cells reopened. Raise ValueError if it is damaged."""
    with reading(path, DAMAGED_STATE, is_bounded=True):
        values = read_values(path)
        if values.get("layout") != LAYOUT:
            raise ValueError(OTHER_LAYOUT)
        return reopen_cells(values["group"])


def forget_states(folder):
    """Remove the states of an earlier run, because this one starts over."""
    shutil.rmtree(folder / STATES, ignore_errors=True)


def reopen_cells(group_state):
    """Return the state of a group whose cells have patience again, and no result yet.

    Record in `extended_from` of each cell the step at which the run was made longer. (Also of a
    cell that has diverged and does not continue: its flags are those of the longer run, too.)
    """
    step = group_state["log"]["step"]
    cells = []
    for cell in group_state["cells"]:
        progress = cell["progress"] | {"is_reported": False, "n_misses": 0}
        if step > 0:
            # A killed extension has noted the step already.
            progress["extended_from"] = sorted({*progress.get("extended_from", ()), step})
        cells.append(cell | {"progress": progress})
    return group_state | {"cells": cells}


# Tensors and the random state


def copy_values(parameters):
    """Return copies on the CPU: name to tensor."""
    copies = {}
    for name, parameter in parameters.items():
        copies[name] = parameter.detach().to("cpu", copy=True)
    return copies


def on_cpu(state):
    """Return a state with its tensors on the CPU, so that a run may continue on another device.

    Those that are there already are not copied. None of them is a Parameter.
    """
    if isinstance(state, torch.Tensor):
        return state.detach().cpu()
    if isinstance(state, dict):
        return {name: on_cpu(value) for name, value in state.items()}
    return state


def set_values(parameters, saved):
    """Copy saved values into parameters in place, because views and optimizers refer to them.

    Without saved values, nothing changes. Raise KeyError or TypeError if these are the values of
    other parameters.
    """
    # In a run of --method full that an earlier version began, T5's biases have another name.
    saved = {name.replace(".positions.", ".bias_tables."): value for name, value in saved.items()}
    if saved and saved.keys() != parameters.keys():
        raise KeyError(f"{len(saved)} parameters, expected {len(parameters)}")
    for name, value in saved.items():
        if value.shape != parameters[name].shape:
            raise TypeError(f"{name} has the shape {tuple(value.shape)}")
        parameters[name].data.copy_(value)


def all_finite(parameters):
    """Return whether all numbers of all parameters are finite. This waits for a GPU once."""
    if not parameters:
        return True
    are_finite = [parameter.isfinite().all() for parameter in parameters.values()]
    return bool(torch.stack(are_finite).all())


def random_state(device):
    """Return the states of torch's global generators, from which dropout is drawn on a device."""
    state = {"cpu": torch.get_rng_state()}
    module = device_module(device)
    if hasattr(module, "get_rng_state"):
        state[device.type] = module.get_rng_state(*device_arguments(device))
    return state


def set_random_state(state, device):
    """Go back to a `random_state`. If another kind of device made it, restore only the CPU's."""
    torch.set_rng_state(state["cpu"])
    module = device_module(device)
    if hasattr(module, "set_rng_state") and device.type in state:
        module.set_rng_state(state[device.type], *device_arguments(device))


def device_arguments(device):
    """Return the arguments that tell a module which of its devices is meant. (There is one mps.)"""
    return () if device.type == "mps" else (device,)
