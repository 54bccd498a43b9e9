"""To be written."""

import io

import torch

from minia3.files.read import reading
from minia3.files.write import replacing


def save_checkpoint(folder, state):
    if folder is None:  # nothing is written
        return
    buffer = io.BytesIO()  # torch's own writer hides what the disk says
    torch.save(state, buffer)
    with replacing(folder / "checkpoint.pt") as temporary:
        temporary.write_bytes(buffer.getbuffer())


def save_last_checkpoint(folder, saved, whole):
    """The last checkpoint, without what only going on needs; of a whole model that would be four times its size."""
    gone = ("optimizers", "random") + ("vectors", "cells") * whole
    save_checkpoint(
        folder, {key: x for key, x in saved.items() if key not in gone} | {"finished": True}
    )


def load_checkpoint(folder):
    """The last checkpoint of a run, or None. Raises ValueError where it is damaged."""
    path = folder / "checkpoint.pt"
    with reading(path, "damaged; without it, the run begins anew"):
        state = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
        if state is not None and not (state["finished"] or {"done", "metrics"} <= state.keys()):
            raise TypeError("not the state of a run")
        return state


def copy_values(vectors):
    return {name: vector.detach().cpu().clone() for name, vector in vectors.items()}


def set_values(vectors, saved):
    for name, value in saved.items():
        vectors[name].data.copy_(value)


def all_finite(vectors):
    return all(bool(x.isfinite().all()) for x in vectors.values())


def random_state():
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state):
    torch.set_rng_state(state["cpu"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
