"""To be written."""

import torch
from torch import nn

from minia3.adapters.peft_files import write_peft
from minia3.checkpoints.hub import find_adapter
from minia3.checkpoints.known_models import hub_name
from minia3.checkpoints.layout import ADAPTER_FILES
from minia3.checkpoints.load import build_model
from minia3.checkpoints.tensor_names import name_table
from minia3.files.read import read_json, reading
from minia3.files.tensors import FLOATS, read_tensors

PLAIN = {
    "peft_type": "LORA",
    "bias": "none",
    "init_lora_weights": True,
}  # what PEFT's config must say, and what not:
MORE = (
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "alora_invocation_tokens",
)


class LoRA(nn.Linear):
    """What a frozen linear becomes, in its place and with its W. A (r, in) and B (out, r) are float32, cast at use."""

    def forward(self, x):
        return super().forward(x) + x @ self.lora_A.T.to(x.dtype) * self.scale @ self.lora_B.T.to(
            x.dtype
        )

    def merged(self):
        """(out, in): W + (alpha / r) B A, in float32 at least."""
        return (self.weight + self.scale * (self.lora_B @ self.lora_A)).detach()


def add_lora(model, rank=8, alpha=16, where=("q", "v"), seed=0):
    """Put LoRA on all linears that `where` names, of q k v o gate up down; freeze the rest. -> `lora_parameters`.

    As in PEFT, A is uniform up to in ** -0.5 and B zero: a bit-exact copy. ValueError for what cannot be put there.
    """
    linears = [
        (n.split(".")[-1], x)
        for n, x in model.named_modules()
        if "blocks" in n and type(x) is nn.Linear
    ]
    kinds, generator = sorted({kind for kind, _ in linears}), torch.Generator().manual_seed(seed)
    if rank < 1 or not where or not {*where} <= {*kinds} or lora_parameters(model):
        raise ValueError(
            f"expected no LoRA yet, a rank of 1 or more and some of {kinds}, found {rank} and {where!r}"
        )
    model.requires_grad_(False)
    for linear in (linear for kind, linear in linears if kind in where):
        a, b = torch.empty(rank, linear.in_features), torch.zeros(linear.out_features, rank)
        nn.init.kaiming_uniform_(
            a, 5**0.5, generator=generator
        )  # on the CPU: the same for every device
        linear.lora_A, linear.lora_B = (nn.Parameter(x.to(linear.weight.device)) for x in (a, b))
        linear.__class__, linear.alpha, linear.scale = LoRA, alpha, alpha / rank
    return lora_parameters(model)


def lora_parameters(model):
    """PEFT's name -> parameter of every A and B: what learns, and all that a checkpoint needs."""
    theirs = {ours: name.removesuffix("weight") for name, ours in name_table(model).items()}
    parts = [
        (name.rpartition("lora_"), p) for name, p in model.named_parameters() if ".lora_" in name
    ]
    return {
        f"base_model.model.{theirs[f'{linear}weight']}lora_{x}.weight": p
        for (linear, _, x), p in parts
    }


def save_lora(model, folder, base=None):
    """Write the model's LoRA as a PEFT folder. base: the name or path of what it was put on."""
    one, *_ = (module for module in model.modules() if isinstance(module, LoRA))
    tensors = {name: p.detach().float().cpu() for name, p in lora_parameters(model).items()}
    config = PLAIN | {
        "r": len(one.lora_A),
        "lora_alpha": one.alpha,
        "base_model_name_or_path": hub_name(base),
    }
    config["task_type"] = "SEQ_2_SEQ_LM" if hasattr(model, "encoder") else "CAUSAL_LM"
    config["target_modules"] = sorted({name.split(".")[-3] for name in tensors})
    write_peft(folder, tensors, config)


def is_lora(name_or_path):
    """Whether an adapter says that it is LoRA. Raises ValueError where there is none."""
    path = find_adapter(name_or_path)
    return path.is_dir() and read_json(path / "adapter_config.json").get("peft_type") == "LORA"


def load_lora(model, folder):
    """Put the LoRA of a PEFT folder or hub id on the model. Raises ValueError for more than that, or what misfits."""
    path = find_adapter(folder)
    raw = read_json(path / "adapter_config.json")
    if more := [
        key for key in [*PLAIN, *MORE] if (raw.get(key) or PLAIN.get(key)) != PLAIN.get(key)
    ]:
        raise ValueError(
            f"{path}: expected plain LoRA, found {', '.join(f'{key} {raw[key]!r}' for key in more)}"
        )
    entries = read_tensors(path / min(ADAPTER_FILES, key=lambda name: not (path / name).exists()))
    kinds = {
        theirs.split(".")[-2]: ours.split(".")[-2]
        for theirs, ours in name_table(model).items()
        if ours
    }
    with reading(path):
        args = (
            raw["r"],
            raw["lora_alpha"],
            [kinds[x] for x in kinds if any(f".{x}.lora_" in name for name in entries)],
        )
        expected = {
            (name, tuple(p.shape)) for name, p in add_lora(build_model(model.config), *args).items()
        }
        found = {
            (n, x.shape)
            for n, x in entries.items()
            if x.dtype in FLOATS and x.read().isfinite().all()
        }
        if found != expected:
            raise ValueError(
                f"lacks finite {sorted(expected - found)[:1]} ..., has {sorted(found - expected)[:1]} ..."
            )
    for name, p in add_lora(model, *args).items():
        p.data.copy_(entries[name].read())
