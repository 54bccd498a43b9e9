"""Between files and models: an adapter of a file becomes a row of the model's vectors, and back.

Shapes: D width of what is scaled, A adapters (rows).
"""

import warnings
from os.path import basename, normpath, realpath

import torch

from minia3.adapters.peft_files import read_adapter, write_adapter
from minia3.checkpoints.known_models import hub_name
from minia3.checkpoints.layout import warn_of_task_file
from minia3.files.home import expand_home
from minia3.model.adapter_rows import INTEGERS, as_numbers, find_row
from minia3.model.ia3 import vectors
from minia3.model.more_vectors import add_vectors, possible_vectors


def row_of(model, adapter):
    """Return a dict from the name of each vector to its row `adapter` (D,).

    The rows are views: changing one changes the model. Raise ValueError if there is no such row.
    """
    places = vectors(model)
    row = row_number(model, adapter)
    return {name: vector.detach()[row] for name, vector in places.items()}


def copy_row(model, adapter):
    """Return what `row_of` returns, as copies.

    Raise ValueError if there is no such row, or if another thread removes or replaces its adapter
    meanwhile: the copies may then be of both adapters (see named_rows.py).
    """
    copies = {name: vector.clone() for name, vector in row_of(model, adapter).items()}
    row_number(model, adapter)  # again: the number becomes invalid before the vectors change
    return copies


def row_number(model, adapter):
    """Return the number of the row `adapter`, an int, also one of NumPy or torch.

    Raise ValueError if there is no such row.
    """
    number = as_numbers(adapter)
    if number.dtype not in INTEGERS or number.dim() > 0:
        raise ValueError(f"adapter {adapter!r} is not an int")
    return find_row(number.item(), model)


def check_row_0(model):
    """Raise ValueError if row 0 of a merged model holds vectors that belong to its base."""
    if getattr(model, "keeps_vectors", False):  # see merge_quantized.py
        raise ValueError(
            "row 0 of this merged model holds l_ff, so no other adapter can take its place: call "
            "minia3.model.quantized.dequantize and then minia3.merge"
        )


def save_adapter(model, folder, adapter=0):
    """Write row `adapter` of the model as a PEFT folder.

    Raise ValueError if there is no such row, if its adapter is replaced meanwhile, or if the folder
    holds a model or a run. Warn if a task.json stays there.
    """
    write_row(model, folder, adapter)
    warn_of_task_file(expand_home(folder))


def write_row(model, folder, adapter=0):
    """Do what `save_adapter` does, for a caller that takes care of task.json: do not warn of it."""
    row = copy_row(model, adapter)
    write_adapter(expand_home(folder), row, getattr(model, "name_or_path", None))


def load_adapter(model, folder_or_file, adapter=0):
    """Read an adapter into row `adapter` of the model.

    folder_or_file: a PEFT folder, a file, or a hub id; see `read_adapter`. Vectors that it lacks
    become ones. Vectors that the model lacks (more_vectors.py) are added to it, as ones in its
    other rows. A thread that is answering with this row is not told: a server loads with
    `Adapters.load`, which is.

    Raise ValueError if there is no such row, if the adapter cannot be read or does not fit, or if
    the model is merged and keeps l_ff in row 0; the model stays as it was. Warn if the adapter
    names another base model.
    """
    check_row_0(model)
    adapter_file = read_adapter(folder_or_file)
    places = vectors(model)
    row = row_number(model, adapter)
    new_vectors = fitting_vectors(model, adapter_file, folder_or_file, places)
    warn_of_bases(model, {folder_or_file: adapter_file.base})
    fill_row(model, row, new_vectors, places)


@torch.no_grad()
def fill_row(model, row, new_vectors, places=None):
    """Set a row to `new_vectors` (name -> (D,)). The row's other vectors become ones.

    places: `vectors(model)`, if the caller has it. Finding the vectors takes time.
    """
    places = places or vectors(model)
    if new_vectors.keys() - places:
        add_vectors(model, new_vectors)
        places = vectors(model)
    for name, vector_AD in places.items():
        vector_AD[row] = new_vectors.get(name, 1.0)


def fitting_vectors(model, adapter_file, origin, places=None):
    """Return the vectors of an AdapterFile that came from `origin`, if they fit the model.

    places: `vectors(model)`, if the caller has it. Finding the vectors takes time.

    Raise ValueError if the model has no place for one of them, or one of another width.
    """
    places = places or vectors(model)
    widths = {name: vector_AD.shape[1] for name, vector_AD in places.items()}
    if adapter_file.vectors.keys() - widths:
        widths.update(possible_vectors(model))
    misfits = []
    for name, vector in adapter_file.vectors.items():
        width = widths.get(name, "none")
        if vector.numel() != width:
            misfits.append(f"{name} of {vector.numel()}, expected {width}")
    if misfits:
        trained_on = adapter_file.base or "an unknown base"
        base = getattr(model, "name_or_path", None) or f"another {type(model).__name__}"
        found = f"an adapter of another base: trained on {trained_on}, and the model is {base}"
        count = f"{len(misfits)} vectors do not fit, such as {misfits[0]}"
        raise ValueError(f"{origin}: {found}: {count}")
    return adapter_file.vectors


def warn_of_bases(model, bases, stacklevel=3):
    """Warn of adapters that were trained on another base: one line for each such base.

    bases: a dict from the origins of the adapters to the bases that they name (see `doubt_base`).
    stacklevel: see `warnings.warn`; 3 is the line that calls the caller of this function.
    """
    origins_of = {}
    for origin, base in bases.items():
        origins_of.setdefault(base, []).append(origin)
    for base, origins in origins_of.items():
        doubt = doubt_base(model, base, origins[0], n_more=len(origins) - 1)
        if doubt is not None:
            warnings.warn(doubt, stacklevel=stacklevel)


def doubt_base(model, base, origin, n_more=0):
    """Return a warning (a text) if the adapter of `origin` was trained on another base, or None.

    base: the name or path of the base that the adapter names, or None.
    n_more: how many other adapters name this base, too.
    """
    name = getattr(model, "name_or_path", None)
    if not base or not name or is_same_base(base, name):
        return None
    trained = "was trained" if n_more == 0 else f"and {n_more} more were trained"
    return f"{origin} {trained} on {base}, and this model is {name}"


def is_same_base(name, other_name):
    """Return whether two names or paths mean one model, however they are spelled.

    The file of an adapter names a local folder without its place (see `public_name`).
    """
    names = (normpath(name), normpath(other_name))
    has_no_place = any(basename(path) == path for path in names)
    if has_no_place and basename(names[0]) == basename(names[1]):
        return True
    return realpath(hub_name(name)) == realpath(hub_name(other_name))
