"""checkpoint.pt: the state that a run continues from, with the vectors trained so far."""

import io
from dataclasses import dataclass, field

import torch

from minia3.files.pickles import check_checksums, check_storages
from minia3.files.read import reading
from minia3.files.write import replacing
from minia3.training.device import is_available

LAYOUT = 2  # goes up if an older checkpoint cannot be continued
OTHER_LAYOUT = (
    "written by another version of minia3: finish the run with that version, "
    "or remove the file to start over from step 0"
)
DAMAGED = "damaged: remove the file to start over from step 0"


@dataclass
class Checkpoint:
    """Where a run stands: the results that it has, and the state of the group that trains."""

    is_finished: bool = False
    n_done: int = 0  # cells in the groups that are done
    finals: list = field(default_factory=list)  # the final lines of metrics.jsonl
    failure: str | None = None  # why a cell failed: the last one that did
    n_bytes: int = 0  # of metrics.jsonl: what lies beyond was written after this state
    group: dict | None = None  # Group.state_dict of the group that trains
    n_processes: int = 1  # that trained it together

    @property
    def n_steps(self):
        """How many steps the group that trains has done, or None if that is not known."""
        log = (self.group or {}).get("log")
        return log.get("step") if isinstance(log, dict) else None

    def check(self):
        """Raise TypeError if a value cannot be right."""
        has_counts = type(self.n_done) is int and type(self.n_bytes) is int
        has_containers = isinstance(self.finals, list) and isinstance(self.group, dict | None)
        if not has_counts or not has_containers or self.n_bytes < 0:
            raise TypeError("not the state of a run")


def save_checkpoint(folder, checkpoint):
    """Replace the checkpoint of a run's folder. Without a folder, nothing is written."""
    if folder is None:
        return
    # If the disk is full, torch.save hides the reason, so the file is written by Path.
    buffer = io.BytesIO()
    torch.save({"layout": LAYOUT, **vars(checkpoint)}, buffer)
    with replacing(folder / "checkpoint.pt") as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_checkpoint(folder):
    """Return the last Checkpoint of a run, or None. Raise ValueError if it is damaged."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        return None
    with reading(path, DAMAGED):
        check_checksums(path)
        check_storages(path)
        values = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(values, dict):
            raise TypeError("not the state of a run")
        if values.pop("layout", None) != LAYOUT:
            if values.get("finished") is True:  # as earlier versions wrote it
                return Checkpoint(is_finished=True)
            raise ValueError(OTHER_LAYOUT)
        checkpoint = Checkpoint(**values)
        checkpoint.check()
        return checkpoint


# Tensors and the random state


def copy_values(parameters):
    """Return copies on the CPU: name to tensor."""
    return {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}


def set_values(parameters, saved):
    """Copy saved values into parameters in place, because views and optimizers refer to them.

    Without saved values, nothing changes. Raise KeyError or TypeError if these are the values of
    other parameters.
    """
    if saved and saved.keys() != parameters.keys():
        raise KeyError(f"{len(saved)} parameters, expected {len(parameters)}")
    for name, value in saved.items():
        if value.shape != parameters[name].shape:
            raise TypeError(f"{name} has the shape {tuple(value.shape)}")
        parameters[name].data.copy_(value)


def all_finite(parameters):
    return all(bool(parameter.isfinite().all()) for parameter in parameters.values())


def random_state():
    """Return the state of torch's global generators, from which dropout is drawn."""
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    state = {"cpu": torch.get_rng_state(), "gpus": on_gpus}
    for kind in ("mps", "xpu"):
        if is_available(kind):
            state[kind] = getattr(torch, kind).get_rng_state()
    return state


def set_random_state(state):
    torch.set_rng_state(state["cpu"])
    if state["gpus"]:
        torch.cuda.set_rng_state_all(state["gpus"])
    for kind in ("mps", "xpu"):
        if kind in state:
            getattr(torch, kind).set_rng_state(state[kind])
