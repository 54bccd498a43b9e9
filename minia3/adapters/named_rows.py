"""Names for the rows of a model that is in use: thousands of adapters that come and go."""

import difflib
import threading
from collections.abc import Mapping
from pathlib import Path

import torch

from minia3.adapters.peft_files import read_adapter
from minia3.adapters.rows import check_row_0, fill_row, fitting_vectors, warn_of_bases
from minia3.files.home import expand_home
from minia3.files.write import finish_writing
from minia3.model.adapter_rows import find_row, give_up, give_up_all, number_of
from minia3.model.ia3 import vectors


class Adapters(Mapping):
    """A mapping from the name of each adapter to its row (a number: see model/adapter_rows.py).

        adapters = minia3.Adapters(model)
        adapters.load("rte", "runs/t5-base-rte-ia3-0/adapter")
        minia3.generate(model, tokenizer, prompts, adapter=adapters.rows(["rte", None]))

    Row 0 is the base: it is all ones, and its name is None. The other rows belong to the adapters
    with names. A model has one Adapters at a time, because a new one takes over all rows. Read it
    like a dict; only `load`, `load_folder`, `remove` and `del` change it.

    Any thread may load, replace or remove adapters while others generate, if the model has rows for
    all of them (`n_adapters`); otherwise all rows move. An unknown name is a ValueError, also for
    `get`. A row whose adapter is removed or replaced after the row was asked for, or even while it
    is read, is a ValueError, too: ask for the rows again, and compute the answer again. A merged
    model that keeps l_ff in row 0 is refused.
    """

    # One lock for all instances: an Adapters with a lock inside could not be copied with its model.
    lock = threading.Lock()

    def __init__(self, model):
        check_row_0(model)
        self.model = model
        self._numbers = {}
        places = vectors(model)
        with self.lock:
            give_up_all(model)
            fill_row(model, 0, {}, places)

    def __getitem__(self, name):
        try:
            return self._numbers[name]
        except KeyError:
            raise ValueError(self._describe_unknown(name)) from None

    def __contains__(self, name):
        return name in self._numbers

    def __iter__(self):
        return iter(list(self._numbers))  # a copy, because another thread may add to it meanwhile

    def __len__(self):
        return len(self._numbers)

    def __delitem__(self, name):
        self.remove(name)

    def __repr__(self):
        return f"Adapters({self._numbers})"

    def load(self, name, name_or_path):
        """Add an adapter (see `load_adapter`) under a name, or replace the one of this name.

        If Ctrl-C or a lack of memory ends a replacement halfway, there is no adapter of this name.
        Raise ValueError if the name is not a text, or if the adapter cannot be read or does not
        fit.
        """
        if not isinstance(name, str):
            expected = "expected a text as the name of an adapter"
            raise ValueError(f"{expected}, found {name!r} (None is the base)")
        self._add({name: name_or_path})

    def load_folder(self, folder):
        """Add each sub-folder that holds an adapter, under the name of the sub-folder.

        Raise ValueError, and add none of them, if one of them cannot be read or does not fit.
        """
        paths = {}
        for path in sorted(Path(expand_home(folder)).glob("[!.]*")):
            finish_writing(path)
            if (path / "adapter_config.json").exists():
                paths[path.name] = path
        if not paths:
            expected = "expected sub-folders with an adapter_config.json"
            raise ValueError(f"{folder}: {expected}, found none")
        self._add(paths)

    def remove(self, name):
        """Forget a name. Its row becomes ones, and is free for another adapter."""
        with self.lock:
            row = find_row(self[name], self.model)
            del self._numbers[name]
            # Before the vectors change, so that a thread that is reading them finds out: see
            # State.check_adapters.
            give_up(row, self.model)
            fill_row(self.model, row, {})

    def rows(self, names):
        """Return (B,) long, on the CPU: the row of each name, for `start`. None is the base.

        Raise ValueError if a name is unknown, or if `names` is a single text.
        """
        if isinstance(names, str):
            raise ValueError(f"found {names!r}, expected a list of names: one for each example")
        rows = [0 if name is None else self[name] for name in names]
        return torch.tensor(rows, dtype=torch.long, device="cpu")

    def _add(self, paths):
        # Read everything first: if one adapter is wrong, nothing has changed.
        new_vectors = {}
        bases = {}
        for name, path in paths.items():
            adapter_file = read_adapter(path)
            new_vectors[name] = fitting_vectors(self.model, adapter_file, path)
            bases[path] = adapter_file.base
        warn_of_bases(self.model, bases, stacklevel=4)  # the line that calls `load`

        with self.lock:
            rows = self._choose_rows(new_vectors)
            grow(self.model, 1 + max(rows.values()))
            for name, row in rows.items():
                self._fill(name, row, new_vectors[name])

    def _fill(self, name, row, new_vectors):
        """Give a row to a name. If this fails or is interrupted, the name is forgotten."""
        try:
            # A number of this row was handed out: for this name, or before an interrupted `remove`.
            if row in self.model.row_generations:
                give_up(row, self.model)  # first, as in `remove`
            fill_row(self.model, row, new_vectors)
            self._numbers[name] = number_of(row, self.model)
        except BaseException:  # Ctrl-C, or no memory for new vectors
            # The row may hold vectors of two adapters, and the name its old number.
            give_up(row, self.model)
            self._numbers.pop(name, None)
            raise

    def _choose_rows(self, names):
        """Return a row for each name: the row that it has, or else a free one."""
        rows = {name: find_row(number, self.model) for name, number in self._numbers.items()}
        n_enough = 1 + len(self) + len(names)  # if none of the names has a row; 1: the base
        free = sorted(set(range(1, n_enough)) - set(rows.values()), reverse=True)
        chosen = {}
        for name in names:
            chosen[name] = rows[name] if name in rows else free.pop()  # the lowest first
        return chosen

    def _describe_unknown(self, name):
        names = list(self)
        nearest = difflib.get_close_matches(str(name), names, n=1, cutoff=0) or ["none"]
        hint = f"the nearest of {len(names)} names: {nearest[0]}"
        return f"there is no adapter {name!r}; {hint}"


@torch.inference_mode(False)  # see `load_model`
def grow(model, n_rows):
    """Give the model at least `n_rows` rows. The new rows are all ones.

    The number doubles, so that loading a thousand adapters one by one copies the rows ten times.
    The parameters stay the same objects, because a compiled model may hold them. Their memory is
    replaced, so another thread must not be reading it at that moment: a server makes all rows when
    it loads the model (`n_adapters`). An optimizer that has made a step cannot make another one,
    because it keeps tensors of the old size.
    """
    n_adapters = model.n_adapters
    while n_adapters < n_rows:
        n_adapters *= 2
    n_new = n_adapters - model.n_adapters
    if n_new == 0:
        return
    for vector in vectors(model).values():
        new_rows = vector.new_ones(n_new, vector.shape[1])
        vector.data = torch.cat((vector.data, new_rows))
    model.n_adapters = n_adapters
