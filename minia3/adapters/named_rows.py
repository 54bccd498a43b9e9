"""To be written."""

import difflib
import threading
from pathlib import Path

import torch

from minia3.adapters.peft_files import read_adapter
from minia3.adapters.rows import fill_row, fitting_vectors
from minia3.model.ia3 import vectors


class Adapters(dict):
    """Names for the rows of a model in use: name -> row. Row 0 is the base, all ones, and its name is None.

    A state that has been started goes on while others are added or removed, by any thread. An unknown name is a
    ValueError.
    """

    lock = threading.Lock()  # of all, since copies share none of their own

    def __init__(self, model):
        super().__init__()
        self.model = model
        fill_row(model, 0, {})

    def load(self, name, name_or_path):
        """Add an adapter (see `load_adapter`) under a new name, or in place of the one that has the name."""
        if not isinstance(name, str):
            raise ValueError(
                f"expected a text as the name of an adapter, found {name!r} (None is the base)"
            )
        self._add({name: name_or_path})

    def load_folder(self, folder):
        """Add every sub-folder that is an adapter under its own name: all of them, or ValueError and none."""
        paths = {
            path.parent.name: path.parent
            for path in sorted(Path(folder).glob("[!.]*/adapter_config.json"))
        }
        if not paths:
            raise ValueError(
                f"{folder}: expected sub-folders with an adapter_config.json, found none"
            )
        self._add(paths)

    def _add(self, paths):
        added = {
            name: fitting_vectors(self.model, read_adapter(path), path)
            for name, path in paths.items()
        }
        with self.lock:
            free = iter(sorted({*range(1, 1 + len(self) + len(added))} - {*self.values()}))
            rows = {name: self.get(name) or next(free) for name in added}
            while self.model.n_adapters <= max(
                rows.values()
            ):  # twice as many rows, in the same parameters
                for table_AD in vectors(self.model).values():
                    table_AD.data = torch.cat((table_AD.data, torch.ones_like(table_AD)))
                self.model.n_adapters *= 2
            for name, entries in added.items():
                fill_row(self.model, rows[name], entries)
            self.update(rows)

    def remove(self, name):
        """Forget a name; its row is ones again, and free."""
        with self.lock:
            fill_row(self.model, self[name], {})
            del self[name]

    def rows(self, names):
        """(B,) long: the row of each name (None: the base), as `start` takes them."""
        rows = [0 if name is None else self[name] for name in names]
        return torch.tensor(rows, dtype=torch.long, device=self.model.embed.weight.device)

    def __missing__(self, name):
        near = ", ".join(difflib.get_close_matches(str(name), self, n=1, cutoff=0)) or "none"
        raise ValueError(f"there is no adapter {name!r}; the nearest of {len(self)} names: {near}")
