"""Chapter 6, adapters: PEFT's files are our files, and a row of vectors folds into the weights.

W_k <- diag(l_k) W_k        W_v <- diag(l_v) W_v        W_down <- W_down diag(l_ff)
"""

import copy
import warnings
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from minia3 import files, names
from minia3.blocks import Attention, FeedForward
from minia3.ia3 import IA3, vectors
from minia3.models import hub_name
from minia3.t5 import T5

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def peft_table(model):
    """PEFT's name -> the name of our vector, for the vectors which this model has.

    On a gated T5, PEFT scales either the output of wi_1 or the input of wo, which is the same function.
    """
    c = model.config
    if isinstance(model, T5):
        table = names.expand(names.PEFT_T5, max(c.n_layers, c.n_decoder_layers))
    else:
        table = names.expand(names.PEFT_LLAMA, c.n_layers)
    ours = vectors(model)
    plain = isinstance(model, T5) and not c.gated  # has no wi_1
    return {theirs: name for theirs, name in table.items() if name in ours and not (plain and ".wi_1." in theirs)}


def adapter_tensors(model, adapter=0):
    """PEFT's name -> row `adapter` of each vector in PEFT's shape, float32."""
    table = {ours: theirs for theirs, ours in peft_table(model).items()}  # of two names the last: wo, not wi_1
    return {
        table[name]: vector[adapter].detach().float().cpu().reshape((1, -1) if name.endswith("l_ff") else (-1, 1))
        for name, vector in vectors(model).items()
    }


def save_adapter(model, folder, adapter=0):
    """Write row `adapter` as a PEFT adapter: adapter_config.json and adapter_model.safetensors (float32)."""
    tensors = adapter_tensors(model, _row(model, adapter))
    t5 = isinstance(model, T5)
    sites = ["k", "v", "wo"] if t5 else ["k_proj", "v_proj", "down_proj"]
    with files.replacing(Path(folder) / WEIGHTS[0]) as temporary:
        temporary.write_bytes(save(tensors, metadata={"format": "pt"}))
    files.write_json(
        Path(folder) / "adapter_config.json",
        {
            "base_model_name_or_path": hub_name(getattr(model, "name_or_path", None)),
            "fan_in_fan_out": False,
            "feedforward_modules": sites[2:],
            "inference_mode": True,
            "init_ia3_weights": True,
            "modules_to_save": None,
            "peft_type": "IA3",
            "revision": None,
            "target_modules": sites,
            "task_type": "SEQ_2_SEQ_LM" if t5 else "CAUSAL_LM",
        },
    )


def load_adapter(model, folder_or_file, adapter=0):
    """Read a PEFT (IA)^3 adapter into row `adapter`. Vectors that it does not have become ones.

    folder_or_file: a folder as PEFT writes it, or its adapter_model.safetensors or .bin alone. Raises ValueError for
    another kind of adapter, and for tensors that this model has no place for, of another shape, or with entries that
    are not finite, naming all of them. A different base model's name is a warning.
    """
    row = _row(model, adapter)
    path = Path(folder_or_file)
    if path.is_dir():
        _check_config(model, files.read_json(path / "adapter_config.json"), path)
        path = next((path / name for name in WEIGHTS if (path / name).exists()), path / WEIGHTS[0])
    if not path.is_file():
        raise ValueError(
            f"{path}: not found; expected a PEFT adapter: a folder with adapter_config.json and {WEIGHTS[0]}"
        )
    table, ours = peft_table(model), vectors(model)
    found, problems = {}, []
    for theirs, entry in files.tensors(path).items():
        if theirs not in table:
            problems.append(f"{theirs} {entry.shape} has no place in this model")
            continue
        d = ours[table[theirs]].shape[1]
        expected = (1, d) if theirs.endswith((".wo.ia3_l", ".down_proj.ia3_l")) else (d, 1)
        if entry.shape != expected:
            problems.append(f"{theirs} has shape {entry.shape}, expected {expected}")
        elif table[theirs] in found:
            problems.append(f"{theirs} scales what another vector of the file scales already")
        else:
            value = found[table[theirs]] = entry.read().float().flatten()
            if not value.isfinite().all():
                problems.append(f"{theirs} has entries that are not finite")
    if not found and not problems:
        problems.append("there are no vectors in it")
    if problems:
        raise ValueError(f"{path}: not an (IA)^3 adapter of this model: {'; '.join(problems)}")
    with torch.no_grad():
        for name, vector in ours.items():
            vector[row] = found[name].to(vector) if name in found else 1.0


def _row(model, adapter):
    if not 0 <= adapter < model.n_adapters:
        raise ValueError(f"adapter {adapter} is out of range: the model has rows 0 to {model.n_adapters - 1}")
    return adapter


def _check_config(model, raw, path):
    if raw.get("peft_type") != "IA3":
        raise ValueError(f"{path}: expected a PEFT adapter of type IA3, found {raw.get('peft_type')!r}")
    if raw.get("modules_to_save"):
        raise ValueError(f"{path}: holds whole modules beside its vectors: modules_to_save={raw['modules_to_save']}")
    base, name = raw.get("base_model_name_or_path"), getattr(model, "name_or_path", None)
    if base and name and hub_name(base) != hub_name(name):
        warnings.warn(f"{path} was trained on {base}, and this model is {name}", stacklevel=3)


def merge(model, adapter=0):
    """A new model with row `adapter` folded into its weights, and one row of ones.

    The product is made in float32 at least and rounded once. Tensors that do not change are shared with `model`, which
    stays as it is.
    """
    row = _row(model, adapter)
    shared = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()}
    merged = copy.deepcopy(model, shared)
    merged.n_adapters = 1
    for module in merged.modules():
        if isinstance(module, Attention):
            _fold(module.k, module.l_k.scale[row, :, None])
            _fold(module.v, module.l_v.scale[row, :, None])
        elif isinstance(module, FeedForward):
            _fold(module.down, module.l_ff.scale[row])
    for module in merged.modules():
        if isinstance(module, IA3):
            module.scale = nn.Parameter(torch.ones_like(module.scale[:1]), module.scale.requires_grad)
    return merged


def _fold(linear, factors):
    weight = linear.weight.detach()
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32)) * factors.detach()
    linear.weight = nn.Parameter(wide.to(weight.dtype), linear.weight.requires_grad)
