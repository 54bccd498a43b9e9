"""To be written."""

import warnings
from os.path import realpath

from minia3.adapters.peft_files import read_adapter, write_adapter
from minia3.checkpoints.known_models import hub_name
from minia3.model.ia3 import vectors
from minia3.model.more_vectors import add_vectors, possible_vectors


def row_of(model, adapter):
    """Our name -> (D,) of row `adapter` of the model: the row itself. Raises ValueError where it has no such row."""
    if type(adapter) is not int or not 0 <= adapter < model.n_adapters:
        raise ValueError(
            f"adapter {adapter!r} is no int, or out of range: the model has rows 0 to {model.n_adapters - 1}"
        )
    return {name: table.detach()[adapter] for name, table in vectors(model).items()}


def save_adapter(model, folder, adapter=0):
    """Write row `adapter` of the model as a PEFT folder."""
    write_adapter(folder, row_of(model, adapter), getattr(model, "name_or_path", None))


def load_adapter(model, folder_or_file, adapter=0):
    """Read an adapter (see `read_adapter`) into row `adapter`. Vectors that it lacks become ones.

    Those of sites.py are added to the model, ones in its other rows. Raises ValueError also where it does not fit the
    model. Another name of its base is a warning.
    """
    fill_row(model, adapter, fitting_vectors(model, read_adapter(folder_or_file), folder_or_file))


def fill_row(model, adapter, vectors):
    row = row_of(model, adapter)
    if vectors.keys() - row:
        add_vectors(model, vectors)
        row = row_of(model, adapter)
    for name, l_D in row.items():
        l_D[:] = vectors.get(name, 1.0)


def fitting_vectors(model, adapter, where):
    """The vectors of an Adapter that came from `where`. ValueError where the model has no places for them."""
    d = {name: table.shape[1] for name, table in vectors(model).items()}
    if adapter.vectors.keys() - d:
        d |= possible_vectors(model)
    wrong = {
        name: len(vector) for name, vector in adapter.vectors.items() if len(vector) != d.get(name)
    }
    if wrong:
        found = "; ".join(
            f"{name} of {width}, expected {d.get(name, 'none')}" for name, width in wrong.items()
        )
        what = f"found {len(wrong)} vectors that do not fit this {type(model).__name__}: {found}"
        raise ValueError(f"{where}: an adapter of another base: {what}")
    name = getattr(model, "name_or_path", None)
    if adapter.base and name and realpath(hub_name(adapter.base)) != realpath(hub_name(name)):
        warnings.warn(
            f"{where} was trained on {adapter.base}, and this model is {name}", stacklevel=3
        )
    return adapter.vectors
