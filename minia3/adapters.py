"""Chapter 6, adapters: PEFT's files are our files, T-Few's are read, several mix into one, and rows have names.

Away from a model an adapter is a dict from our names of vectors ("encoder.blocks.0.attn.l_k") to (D,) float32. Vectors
that it lacks are ones: adapters of some layers, or of keys and values alone, are adapters.

Shapes: D width of a vector, A rows of a model, P adapters that mix, B batch.
"""

import difflib
import math
import re
import threading
import warnings
from os.path import realpath
from pathlib import Path
from typing import NamedTuple

import torch

from minia3 import files, names
from minia3.ia3 import vectors as tables
from minia3.load import FLOATS
from minia3.models import hub_name
from minia3.sites import add_sites, places

READ = names.PEFT | names.TFEW
WRITE = {ours: theirs for theirs, ours in names.PEFT.items()}
INPUTS = (".wo.ia3_l", ".down_proj.ia3_l")  # these scale what goes in, as (1, d); all others what comes out, as (d, 1)


class Adapter(NamedTuple):
    vectors: dict
    base: str | None  # base_model_name_or_path, where the file says it


def read_adapter(name_or_path):
    """A PEFT folder, its .safetensors or .bin alone, T-Few's .pt, or a hub id -> Adapter. No model is needed.

    Raises one ValueError for another kind of adapter, and for all tensors that scale another place or one place twice,
    have another shape or no floats, or an entry that is not finite.
    """
    path, base = files.find_adapter(name_or_path), None
    if path.is_dir():
        raw = files.read_json(path / "adapter_config.json")
        kind, modules, base = (raw.get(key) for key in ("peft_type", "modules_to_save", "base_model_name_or_path"))
        if kind != "IA3" or modules:
            raise ValueError(f"{path}: expected PEFT's IA3 and no modules_to_save, found {kind!r} and {modules!r}")
        path = next((path / x for x in files.ADAPTER_FILES if (path / x).exists()), path / files.ADAPTER_FILES[0])
    vectors, problems = {}, []
    for theirs, entry in files.tensors(path).items():
        name, d = _rename(theirs, READ), math.prod(entry.shape)
        shape = (1, d) if theirs.endswith(INPUTS) else (d, 1)
        if name is None or name in vectors:
            problem = "scales what another vector of the file scales already" if name else "has no place in T5 or LLaMA"
            problems.append(f"{theirs} {entry.shape} {problem}")
        elif entry.shape != shape or entry.dtype not in FLOATS:
            problems.append(f"{theirs} is {entry.dtype} {entry.shape}, expected floats {shape}")
        else:
            vector_D = vectors[name] = entry.read().detach().float().flatten()
            bad = [] if math.isfinite(vector_D.sum()) else (~vector_D.isfinite()).nonzero().flatten().tolist()
            problems += [f"{theirs} is {vector_D[i]} at {i}" for i in bad[:1]]
    if problems or not vectors:
        raise ValueError(f"{path}: no (IA)^3 adapter: {'; '.join(problems) or 'there are no vectors in it'}")
    # l_up alone, as PEFT's default for mT5 has it, is l_ff: the same function.
    vectors = {n if (ff := n.replace("l_up", "l_ff")) in vectors else ff: x for n, x in vectors.items()}
    return Adapter(vectors, base if isinstance(base, str) else None)


def write_adapter(folder, vectors, base=None):
    """Write `vectors` as a PEFT folder. base: its model's name or path.

    PEFT makes vectors in the same places. (Layers behind the last that has one cannot be known here, and get ones.)
    """
    tensors, blocks = peft_tensors(vectors), [name.split("blocks.") for name in vectors]  # stack, "0.attn.l_k"
    depths = {s: 1 + max(int(site.split(".")[0]) for stack, site in blocks if stack == s) for s in dict(blocks)}
    modules = [theirs.removeprefix("base_model.model.").removesuffix(".ia3_l") for theirs in tensors]
    kinds = sorted({module.rpartition(".")[2] for module in modules})
    sites = [ours for ours, theirs in WRITE.items() if theirs.split(".")[-2] in kinds]
    partial = len(modules) < sum(depths.get(ours.split("blocks.")[0], 1) for ours in sites)
    targets = modules if partial else kinds
    inputs = [target for target in targets if f".{target}.ia3_l".endswith(INPUTS)]
    if partial:  # a regex of modules: PEFT shortens long lists, and then refuses what it has written
        targets, inputs = ("|".join(map(re.escape, x)) for x in (targets, inputs))
    config = {
        "peft_type": "IA3", "task_type": "CAUSAL_LM" if "" in depths else "SEQ_2_SEQ_LM", "inference_mode": True,
        "base_model_name_or_path": hub_name(base), "revision": None, "modules_to_save": None,
        "target_modules": targets, "feedforward_modules": inputs, "fan_in_fan_out": False, "init_ia3_weights": True,
    }  # fmt: skip
    files.write_peft(folder, tensors, config)


def peft_tensors(vectors):
    """PEFT's name -> the vector in PEFT's shape, float32."""
    tensors = {_rename(name, WRITE): vector.float().cpu() for name, vector in vectors.items()}
    return {theirs: x.reshape((1, -1) if theirs.endswith(INPUTS) else (-1, 1)) for theirs, x in tensors.items()}


def _rename(name, table):
    """`name` through a table with {} for the layer, the first number in a name; None where it is not in there."""
    layer = re.search(r"\.(0|[1-9][0-9]{0,3})\.", name)
    found = layer and table.get(name.replace(layer[0], ".{}.", 1))
    return found and found.replace("{}", layer[1])


def row_of(model, adapter):
    """Our name -> (D,) of row `adapter` of the model: the row itself. Raises ValueError where it has no such row."""
    if type(adapter) is not int or not 0 <= adapter < model.n_adapters:
        raise ValueError(
            f"adapter {adapter!r} is no int, or out of range: the model has rows 0 to {model.n_adapters - 1}"
        )
    return {name: table.detach()[adapter] for name, table in tables(model).items()}


def save_adapter(model, folder, adapter=0):
    """Write row `adapter` of the model as a PEFT folder."""
    write_adapter(folder, row_of(model, adapter), getattr(model, "name_or_path", None))


def load_adapter(model, folder_or_file, adapter=0):
    """Read an adapter (see `read_adapter`) into row `adapter`. Vectors that it lacks become ones.

    Those of sites.py are added to the model, ones in its other rows. Raises ValueError also where it does not fit the
    model. Another name of its base is a warning.
    """
    fill(model, adapter, fitting(model, read_adapter(folder_or_file), folder_or_file))


def fill(model, adapter, vectors):
    row = row_of(model, adapter)
    if vectors.keys() - row:
        add_sites(model, vectors)
        row = row_of(model, adapter)
    for name, l_D in row.items():
        l_D[:] = vectors.get(name, 1.0)


def fitting(model, adapter, where):
    """The vectors of an Adapter that came from `where`. ValueError where the model has no places for them."""
    d = {name: table.shape[1] for name, table in tables(model).items()}
    if adapter.vectors.keys() - d:
        d |= {name: linear.out_features for name, linear in places(model).items()}
    wrong = {name: len(vector) for name, vector in adapter.vectors.items() if len(vector) != d.get(name)}
    if wrong:
        found = "; ".join(f"{name} of {width}, expected {d.get(name, 'none')}" for name, width in wrong.items())
        what = f"found {len(wrong)} vectors that do not fit this {type(model).__name__}: {found}"
        raise ValueError(f"{where}: an adapter of another base: {what}")
    name = getattr(model, "name_or_path", None)
    if adapter.base and name and realpath(hub_name(adapter.base)) != realpath(hub_name(name)):
        warnings.warn(f"{where} was trained on {adapter.base}, and this model is {name}", stacklevel=3)
    return adapter.vectors


MIX = {
    "average": lambda l_PD, w_P1: 1 + (w_P1 * (l_PD - 1)).sum(0),  # 1 + sum_i w_i (l_i - 1)
    "product": lambda l_PD, w_P1: (1 + w_P1 * (l_PD - 1)).prod(0),  # prod_i (1 + w_i (l_i - 1))
    "power": lambda l_PD, w_P1: (l_PD**w_P1).prod(0),  # prod_i l_i ** w_i, for positive entries
}


def mix(parts, how="average"):
    """One adapter out of several, by an equation of MIX. parts: a list of (vectors, weight) -> vectors.

    1 changes nothing, and vectors that an adapter lacks count as ones. Raises ValueError for adapters of different
    architectures or widths, and, saying where, for entries that are not positive (power) or come out infinite.
    """
    if how not in MIX or not parts:
        raise ValueError(f"expected adapters and one of {', '.join(MIX)}, found {len(parts)} adapters and {how!r}")
    mixed, w_P1 = {}, torch.tensor([[weight] for _, weight in parts], dtype=torch.float64)
    for name in dict.fromkeys(name for vectors, _ in parts for name in vectors):
        first, d = next(iter(mixed), name), {len(vectors[name]) for vectors, _ in parts if name in vectors}
        if len(d) > 1 or name.startswith("blocks.") != first.startswith("blocks."):
            raise ValueError(f"adapters of different bases do not mix: {first}, and {name} of {sorted(d)} entries")
        l_PD = torch.stack([vectors.get(name, torch.ones(*d)) for vectors, _ in parts]).double()
        mixed[name] = MIX[how](l_PD, w_P1).float()
        bad = ~mixed[name].isfinite() | (how == "power") & (l_PD <= 0).any(0)
        for i in bad.nonzero()[:1].flatten().tolist():
            raise ValueError(f"{name} at {i}: the {how} of {l_PD[:, i].tolist()} is not a finite number")
    return mixed


class Adapters(dict):
    """Names for the rows of a model in use: name -> row. Row 0 is the base, all ones, and its name is None.

    A state that has been started goes on while others are added or removed, by any thread. An unknown name is a
    ValueError.
    """

    lock = threading.Lock()  # of all, since copies share none of their own

    def __init__(self, model):
        super().__init__()
        self.model = model
        fill(model, 0, {})

    def load(self, name, name_or_path):
        """Add an adapter (see `load_adapter`) under a new name, or in place of the one that has the name."""
        if not isinstance(name, str):
            raise ValueError(f"expected a text as the name of an adapter, found {name!r} (None is the base)")
        self._add({name: name_or_path})

    def load_folder(self, folder):
        """Add every sub-folder that is an adapter under its own name: all of them, or ValueError and none."""
        paths = {path.parent.name: path.parent for path in sorted(Path(folder).glob("[!.]*/adapter_config.json"))}
        if not paths:
            raise ValueError(f"{folder}: expected sub-folders with an adapter_config.json, found none")
        self._add(paths)

    def _add(self, paths):
        added = {name: fitting(self.model, read_adapter(path), path) for name, path in paths.items()}
        with self.lock:
            free = iter(sorted({*range(1, 1 + len(self) + len(added))} - {*self.values()}))
            rows = {name: self.get(name) or next(free) for name in added}
            while self.model.n_adapters <= max(rows.values()):  # twice as many rows, in the same parameters
                for table_AD in tables(self.model).values():
                    table_AD.data = torch.cat((table_AD.data, torch.ones_like(table_AD)))
                self.model.n_adapters *= 2
            for name, vectors in added.items():
                fill(self.model, rows[name], vectors)
            self.update(rows)

    def remove(self, name):
        """Forget a name; its row is ones again, and free."""
        with self.lock:
            fill(self.model, self[name], {})
            del self[name]

    def rows(self, names):
        """(B,) long: the row of each name (None: the base), as `start` takes them."""
        rows = [0 if name is None else self[name] for name in names]
        return torch.tensor(rows, dtype=torch.long, device=self.model.embed.weight.device)

    def __missing__(self, name):
        near = ", ".join(difflib.get_close_matches(str(name), self, n=1, cutoff=0)) or "none"
        raise ValueError(f"there is no adapter {name!r}; the nearest of {len(self)} names: {near}")
