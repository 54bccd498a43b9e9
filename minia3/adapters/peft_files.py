"""To be written."""

import math
import re
from typing import NamedTuple

from safetensors.torch import save

from minia3.adapters.vector_names import INPUTS, READ, WRITE, rename
from minia3.checkpoints.hub import find_adapter
from minia3.checkpoints.known_models import hub_name
from minia3.checkpoints.layout import ADAPTER_FILES
from minia3.files.read import read_json
from minia3.files.tensors import FLOATS, read_tensors
from minia3.files.write import write_json, writing_folder


class Adapter(NamedTuple):
    vectors: dict
    base: str | None  # base_model_name_or_path, where the file says it


def read_adapter(name_or_path):
    """A PEFT folder, its .safetensors or .bin alone, T-Few's .pt, or a hub id -> Adapter. No model is needed.

    Raises one ValueError for another kind of adapter, and for all tensors that scale another place or one place twice,
    have another shape or no floats, or an entry that is not finite.
    """
    path, base = find_adapter(name_or_path), None
    if path.is_dir():
        raw = read_json(path / "adapter_config.json")
        kind, modules, base = (
            raw.get(key) for key in ("peft_type", "modules_to_save", "base_model_name_or_path")
        )
        if kind != "IA3" or modules:
            raise ValueError(
                f"{path}: expected PEFT's IA3 and no modules_to_save, found {kind!r} and {modules!r}"
            )
        path = next(
            (path / x for x in ADAPTER_FILES if (path / x).exists()), path / ADAPTER_FILES[0]
        )
    vectors, problems = {}, []
    for theirs, entry in read_tensors(path).items():
        name, d = rename(theirs, READ), math.prod(entry.shape)
        shape = (1, d) if theirs.endswith(INPUTS) else (d, 1)
        if name is None or name in vectors:
            problem = (
                "scales what another vector of the file scales already"
                if name
                else "has no place in T5 or LLaMA"
            )
            problems.append(f"{theirs} {entry.shape} {problem}")
        elif entry.shape != shape or entry.dtype not in FLOATS:
            problems.append(f"{theirs} is {entry.dtype} {entry.shape}, expected floats {shape}")
        else:
            vector_D = vectors[name] = entry.read().detach().float().flatten()
            bad = (
                []
                if math.isfinite(vector_D.sum())
                else (~vector_D.isfinite()).nonzero().flatten().tolist()
            )
            problems += [f"{theirs} is {vector_D[i]} at {i}" for i in bad[:1]]
    if problems or not vectors:
        raise ValueError(
            f"{path}: no (IA)^3 adapter: {'; '.join(problems) or 'there are no vectors in it'}"
        )
    # l_up alone, as PEFT's default for mT5 has it, is l_ff: the same function.
    vectors = {
        n if (ff := n.replace("l_up", "l_ff")) in vectors else ff: x for n, x in vectors.items()
    }
    return Adapter(vectors, base if isinstance(base, str) else None)


def write_adapter(folder, vectors, base=None):
    """Write `vectors` as a PEFT folder. base: its model's name or path.

    PEFT makes vectors in the same places. (Layers behind the last that has one cannot be known here, and get ones.)
    """
    tensors, blocks = (
        peft_tensors(vectors),
        [name.split("blocks.") for name in vectors],
    )  # stack, "0.attn.l_k"
    depths = {
        s: 1 + max(int(site.split(".")[0]) for stack, site in blocks if stack == s)
        for s in dict(blocks)
    }
    modules = [
        theirs.removeprefix("base_model.model.").removesuffix(".ia3_l") for theirs in tensors
    ]
    kinds = sorted({module.rpartition(".")[2] for module in modules})
    sites = [ours for ours, theirs in WRITE.items() if theirs.split(".")[-2] in kinds]
    partial = len(modules) < sum(depths.get(ours.split("blocks.")[0], 1) for ours in sites)
    targets = modules if partial else kinds
    inputs = [target for target in targets if f".{target}.ia3_l".endswith(INPUTS)]
    if (
        partial
    ):  # a regex of modules: PEFT shortens long lists, and then refuses what it has written
        targets, inputs = ("|".join(map(re.escape, x)) for x in (targets, inputs))
    config = {
        "peft_type": "IA3", "task_type": "CAUSAL_LM" if "" in depths else "SEQ_2_SEQ_LM", "inference_mode": True,
        "base_model_name_or_path": hub_name(base), "revision": None, "modules_to_save": None,
        "target_modules": targets, "feedforward_modules": inputs, "fan_in_fan_out": False, "init_ia3_weights": True,
    }  # fmt: skip
    write_peft(folder, tensors, config)


def peft_tensors(vectors):
    """PEFT's name -> the vector in PEFT's shape, float32."""
    tensors = {rename(name, WRITE): vector.float().cpu() for name, vector in vectors.items()}
    return {
        theirs: x.reshape((1, -1) if theirs.endswith(INPUTS) else (-1, 1))
        for theirs, x in tensors.items()
    }


def write_peft(folder, tensors, config):
    """Write an adapter's tensors and adapter_config.json as a PEFT folder."""
    with writing_folder(folder, replaces=["adapter_model.*"]) as temporary:
        (temporary / ADAPTER_FILES[0]).write_bytes(save(tensors, metadata={"format": "pt"}))
        write_json(temporary / "adapter_config.json", config)
