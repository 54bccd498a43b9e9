"""LoRA, the baseline that (IA)^3 is compared with.

    W x + (alpha / r) B A x

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685. Only A and B
train. Unlike (IA)^3, a model has one LoRA for all examples.

Shapes: (in, out) are the widths of the linear, r is the rank. A is (r, in) and B is (out, r).
"""

import warnings

import torch
from torch import nn

from minia3.adapters.peft_config import check_lora_config, check_targets
from minia3.adapters.peft_files import adapter_file, named_base, task_type, write_peft
from minia3.adapters.rows import doubt_base
from minia3.adapters.vector_names import PREFIX
from minia3.checkpoints.hub import find_adapter
from minia3.checkpoints.known_models import public_name
from minia3.checkpoints.load import WithoutInitialization, build_model
from minia3.checkpoints.tensor_names import name_table
from minia3.files.read import read_json, reading
from minia3.files.tensors import FLOATS, read_tensors
from minia3.model.linear import Linear
from minia3.model.quantized import quantized_linears
from minia3.model.shard import is_sharded

# The keys of PEFT's config, with the values that ask for the equation above
PLAIN = {"peft_type": "LORA", "bias": "none", "init_lora_weights": True}


class LoRA(Linear):
    """A linear with A and B beside its weight. It takes the place of a plain linear in a block.

    Weight and bias are the linear's: the same parameters, under the same names. A and B are float32
    whatever the dtype of the model, and are cast when they are used, as the vectors of (IA)^3 are.
    """

    def __init__(self, linear, a, b, alpha):
        # On the meta device, because the weight that a linear makes is replaced at once.
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.bias = linear.bias
        self.lora_A = nn.Parameter(a)
        self.lora_B = nn.Parameter(b)
        self.alpha = alpha
        self.scale = alpha / len(a)
        self.train(linear.training)

    def forward(self, x):
        out = super().forward(x)
        low_rank = x @ self.lora_A.T.to(x.dtype) * self.scale
        return out + low_rank @ self.lora_B.T.to(x.dtype)

    def merged(self):
        """Return (out, in): W + (alpha / r) B A, in float32 at least."""
        return (self.weight + self.scale * (self.lora_B @ self.lora_A)).detach()


@torch.inference_mode(False)  # see `load_model`
def add_lora(model, rank=8, alpha=16, where=("q", "v"), seed=0):
    """Put LoRA on the linears that `where` names, freeze all else, and return `lora_parameters`.

    where: some of q, k, v, o, gate, up and down. As in PEFT, A is uniform from -in ** -0.5 to
    in ** -0.5, and B is zero, so the model starts as a bit-exact copy. A depends only on `seed`.

    Raise ValueError if the model has LoRA already, or none of these linears.
    """
    check_base_of_lora(len(quantized_linears(model)) > 0, is_sharded(model))
    linears = block_linears(model)
    kinds = sorted({name.rpartition(".")[2] for name in linears})
    has_kinds = bool(where) and set(where) <= set(kinds)
    if rank < 1 or not has_kinds or lora_parameters(model):
        expected = f"expected no LoRA yet, a rank of 1 or more and some of {kinds}"
        raise ValueError(f"{expected}, found {rank} and {where!r}")

    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, linear in linears.items():
        parent_name, _, kind = name.rpartition(".")
        if kind in where:
            device = linear.weight.device
            # Drawn on the CPU, so that A is the same on every device. (On the meta device, it has
            # no numbers.)
            drawn_on = device if device.type == "meta" else "cpu"
            a = torch.empty(rank, linear.in_features, dtype=torch.float32, device=drawn_on)
            nn.init.kaiming_uniform_(a, 5**0.5, generator=generator)
            b = torch.zeros(linear.out_features, rank, dtype=torch.float32, device=device)
            lora = LoRA(linear, a.to(device), b, alpha)
            setattr(model.get_submodule(parent_name), kind, lora)
    return lora_parameters(model)


def check_base_of_lora(is_quantized, is_divided):
    """Raise ValueError unless a base has plain weights, and is whole."""
    if is_quantized:
        advice = (
            "load it without quantize; if its files are in nf4, give the model that they were made "
            "from, fold the LoRA into them with `minia3 merge`, or call "
            "minia3.model.quantized.dequantize first"
        )
        raise ValueError(f"a LoRA needs plain weights, and this base is quantized: {advice}")
    if is_divided:
        raise ValueError("a LoRA needs a whole base, and this one is divided (--shard, --offload)")


def block_linears(model):
    """Return a dict from the name of each plain linear in the blocks to the linear."""
    linears = {}
    for name, module in model.named_modules():
        if "blocks" in name and type(module) is Linear:
            linears[name] = module
    return linears


def lora_parameters(model):
    """Return a dict from PEFT's name of each A and B to the parameter; {} without LoRA."""
    peft_names = {}
    for theirs, ours in name_table(model).items():
        if ours is not None:
            peft_names[ours.removesuffix(".weight")] = PREFIX + theirs.removesuffix(".weight")
    parameters = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRA):
            parameters[f"{peft_names[name]}.lora_A.weight"] = module.lora_A
            parameters[f"{peft_names[name]}.lora_B.weight"] = module.lora_B
    return parameters


def save_lora(model, folder, base=None):
    """Write the model's LoRA as a PEFT folder. base: the name or path of the model.

    Raise ValueError if the model has none, or if the folder holds a model or a run.
    """
    loras = [module for module in model.modules() if isinstance(module, LoRA)]
    if not loras:
        raise ValueError("expected a model with LoRA on at least 1 linear, found none")
    tensors = {}
    for name, parameter in lora_parameters(model).items():
        tensors[name] = parameter.detach().float().cpu()
    config = {
        **PLAIN,
        "r": len(loras[0].lora_A),
        "lora_alpha": loras[0].alpha,
        "base_model_name_or_path": public_name(base),
        "task_type": task_type(tensors),
        "target_modules": sorted({peft_linear(name) for name in tensors}),
    }
    write_peft(folder, tensors, config)


def peft_linear(name):
    """Return the linear's name: "q" for "...SelfAttention.q.lora_A.weight"."""
    return name.split(".")[-3]


def is_lora(name_or_path):
    """Return whether an adapter says that it is LoRA. Raise ValueError if there is none."""
    path = find_adapter(name_or_path)
    return path.is_dir() and read_json(path / "adapter_config.json").get("peft_type") == "LORA"


def load_lora(model, name_or_path):
    """Put the LoRA of a PEFT folder or a hub id on the model.

    An rsLoRA (use_rslora; Kalajdzievski 2023, arXiv 2312.03732) has the scale alpha / sqrt(r). Here
    it is a LoRA with the alpha that gives this scale, and is saved as such.

    Raise ValueError, and leave the model as it was, if it is more than plain LoRA, or does not fit.
    Warn if it was trained on another base.
    """
    path = find_adapter(name_or_path)
    config = read_json(path / "adapter_config.json")
    rank, alpha = check_lora_config(path, config)
    entries = read_tensors(adapter_file(path))
    with reading(path):
        doubt = doubt_base(model, named_base(config), name_or_path)
    try:
        with reading(path):
            kinds = fitting_linears(model, entries, rank, alpha)
    except ValueError as error:
        if doubt is None:
            raise
        raise ValueError(f"{error}: {doubt}") from None  # this is probably why it does not fit
    with reading(path):
        check_targets(config, entries)
    if config.get("use_rslora"):
        alpha *= rank**0.5
    for name, parameter in add_lora(model, rank, alpha, kinds).items():
        parameter.data.copy_(entries[name].read())
    if doubt is not None:
        warnings.warn(doubt, stacklevel=2)


def fitting_linears(model, entries, rank, alpha):
    """Return our names of the linears that the LoRA of a file is on.

    Raise ValueError if its tensors do not fit the model.
    """
    # A model without storage shows which names and shapes the tensors must have. A and B have
    # none either, because `rank` may be anything until it is compared with the file.
    with torch.device("meta"), WithoutInitialization():
        plain = build_model(model.config)
        kinds = linears_with_lora(plain, entries)
        expected = add_lora(plain, rank, alpha, kinds)
    check_tensors(entries, expected)
    return kinds


def linears_with_lora(model, entries):
    """Return our names (q, gate ...) of the linears that the tensors of a file belong to.

    Raise ValueError if there are no tensors, or if they belong to a linear that the blocks of the
    model do not have.
    """
    linears = block_linears(model)
    kinds = {}  # PEFT's name of each linear -> ours
    for theirs, ours in name_table(model).items():
        if ours is not None and ours.removesuffix(".weight") in linears:
            kinds[theirs.split(".")[-2]] = ours.split(".")[-2]
    found = set()
    for name in entries:
        linear, separator, _ = name.partition(".lora_")
        if separator:
            found.add(linear.rpartition(".")[2])
    unknown = sorted(found - kinds.keys())
    if unknown or not found:
        expected = f"expected a LoRA on linears of this model's blocks: {', '.join(kinds)}"
        raise ValueError(f"{expected}; found {', '.join(unknown) or 'no tensors'}")
    return [kind for peft_kind, kind in kinds.items() if peft_kind in found]


def check_tensors(entries, parameters):
    """Raise ValueError unless the file has exactly these tensors, finite and of these shapes."""
    expected = {(name, tuple(parameter.shape)) for name, parameter in parameters.items()}
    found = set()
    for name, entry in entries.items():
        if entry.dtype in FLOATS and entry.read().isfinite().all():
            found.add((name, entry.shape))
    if found != expected:
        missing = sorted(expected - found)[:1]
        unknown = sorted(found - expected)[:1]
        reason = ""
        if missing and missing[0][0] not in entries:
            reason = ": a LoRA must be on the same linears in all layers of this model"
        elif not missing and not unknown[0][0].endswith((".lora_A.weight", ".lora_B.weight")):
            # as a file with the embedding, to which tokens were added
            reason = ": a plain LoRA has A and B alone"
        raise ValueError(f"expected finite {missing} ..., found {unknown} ...{reason}")
