"""`info`: what a model is, how large an adapter of it is, and the memory that its tensors take."""

import functools
import json
import os
from dataclasses import asdict, replace

from minia3.cli.arguments import MODEL_HELP, add_quantize, positive
from minia3.cli.terminal import format_size, show
from minia3.files.home import expand_home
from minia3.model.costs import LAYER_FIELDS

TITLE = "Describe a model and the memory that it takes, or list the models that are known by name"
EXAMPLE = "minia3 info t5-base"

# The flags that say what is planned for a model, and their defaults
PLAN_DEFAULTS = {
    "batch": 8,
    "length": 128,
    "devices": None,
    "memory": None,
    "quantize": None,
    "shard": None,
    "offload": False,
}

MEMORY_NOTE = """\
The most that tensors take at once, weights included, for {batch} sources of {length} tokens.
To serve: read the sources and write one token. To train: one step with targets of {target} tokens.
Python and PyTorch take about 0.3 GB more, or 0.6 GB if PyTorch is built for CUDA.
On a CPU, the allocator keeps some of what is freed."""

NF4_NOTE = (
    "The blocks are stored in nf4, and take less than this: give --devices and --memory for a plan."
)


def add_arguments(parser):
    parser.add_argument("model", nargs="?", type=expand_home, help=MODEL_HELP)
    parser.add_argument(
        "--list", action="store_true", help="list the known models, with their names on the hub"
    )
    parser.add_argument(
        "--batch",
        type=positive(int),
        default=PLAN_DEFAULTS["batch"],
        help="sources in a batch, to plan memory for (default: %(default)s)",
    )
    parser.add_argument(
        "--length",
        type=positive(int),
        default=PLAN_DEFAULTS["length"],
        help="tokens of each source (default: %(default)s)",
    )
    parser.add_argument(
        "--devices", type=int, help="plan a run on this many devices (default: plan for no device)"
    )
    parser.add_argument("--memory", type=float, help="memory of each device in GB")
    add_quantize(
        parser,
        "plan a base whose blocks are in 8 or 4 bits (default: in bfloat16, or in nf4 if they are "
        "stored so)",
    )
    parser.add_argument(
        "--shard",
        nargs="?",
        type=int,
        const=0,
        metavar="N",
        help="divide the base among N of the devices, or among all of them (default: among all, if "
        "one could not hold it; 1: never)",
    )
    parser.add_argument(
        "--offload",
        action="store_true",
        help="keep the weights of the blocks in the memory of the CPU",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object, or with --list a list of them, for programs",
    )


def run(args):
    if args.list == (args.model is not None):
        raise ValueError("info: expected either a model or --list (the known models)")
    if args.list:
        refuse_plan(args)
        rows = known_rows()
        lines = [json.dumps(rows)] if args.json else table(rows)
        show("\n".join(lines))
        return
    lines = info(args.model, args.batch, args.length, devices_of(args))
    if args.json:
        show(json.dumps({title: text for title, text in lines if title}))
        return
    for title, text in lines:  # one by one, because the memory takes a while
        show(f"{title:<18}{text}")


def refuse_plan(args):
    """Raise ValueError if a flag is given that says what is planned for one model."""
    for name, default in PLAN_DEFAULTS.items():
        if getattr(args, name) != default:
            raise ValueError(f"info: --{name} is for one model, and --list describes all of them")


def devices_of(args):
    """Return the Devices that the flags describe, or None. Raise ValueError if half is missing."""
    if args.devices is None and args.memory is None:
        if args.quantize or args.offload or args.shard is not None:
            found = "--quantize, --shard and --offload say how a run is planned"
            raise ValueError(f"info: {found}: give --devices and --memory, too")
        return None
    if args.devices is None or args.memory is None:
        example = "as in --devices 8 --memory 80"
        raise ValueError(f"info: expected both --devices and --memory (in GB), {example}")
    from minia3.cli.device_lines import Devices

    devices = Devices(args.devices, 1e9 * args.memory, args.quantize, args.shard, args.offload)
    devices.check()
    return devices


def info(name_or_path, batch=8, length=128, devices=None):
    """Yield (title, text) lines that describe a model. Lines without a title are notes.

    No weights are needed or downloaded, and a known name needs no network.
    batch, length: how many sources, and of how many tokens, the memory is planned for. The memory
    comes last, because planning it takes up to half a minute for large models.
    devices: None, or the Devices on which a run is planned (device_lines.py).
    Raise ValueError if there is no such model, or if minia3 cannot run it, or not on such a base.
    """
    from minia3.model.ia3 import vectors
    from minia3.model.quantized import check_widths
    from minia3.model.t5 import T5Config

    name, model, packed = find_model(name_or_path)
    if devices is not None:
        check_widths(model, devices.quantize)  # as a run does
    config = model.config
    rows = {vector_name: vector[0] for vector_name, vector in vectors(model).items()}
    n_adapter = sum(row.numel() for row in rows.values())
    n_base = sum(p.numel() for p in model.parameters()) - n_adapter

    yield "model", name
    if isinstance(config, T5Config):
        yield "architecture", "T5: encoder-decoder"
    else:
        yield "architecture", "LLaMA: decoder-only"
    for field, value in asdict(config).items():
        if value is not None:
            yield field, str(value)
    yield "parameters", f"{n_base:,}"
    yield "adapter", f"{n_adapter:,} parameters, {n_adapter / n_base:.3%} of the base"
    yield "adapter file", format_size(adapter_file_size(rows))
    if devices is None:
        yield from memory_lines(config, batch, length)
        if packed:
            yield "", NF4_NOTE
    else:
        from minia3.cli.device_lines import device_lines

        yield from device_lines(str(name_or_path), model, devices, batch, length, packed)


def known_rows():
    """Return a dict for each known model: its names, and how many parameters there are.

    "parameters" counts those of the model, and "adapter" those of one adapter. This takes neither a
    network nor weights.
    """
    from minia3.checkpoints.known_models import KNOWN_MODELS

    rows = []
    for name, known in KNOWN_MODELS.items():
        n_base, n_adapter = count_parameters(known.config)
        row = {"name": name, "hub": known.repo, "parameters": n_base, "adapter": n_adapter}
        rows.append(row)
    return rows


@functools.cache  # several known models have one config
def count_parameters(config):
    """Return how many parameters a model of this config has, and one adapter of it.

    All layers of a stack are alike, so a model with one layer in each stack is built, and for each
    stack a model with two.
    """
    fields = [name for name in LAYER_FIELDS if hasattr(config, name)]
    shallow = replace(config, **dict.fromkeys(fields, 1))
    of_one_layer = parameters_of(shallow)
    total = list(of_one_layer)
    for name in fields:
        n_more = getattr(config, name) - 1
        of_two_layers = parameters_of(replace(shallow, **{name: 2}))
        for i in range(2):
            total[i] += n_more * (of_two_layers[i] - of_one_layer[i])
    return tuple(total)


def parameters_of(config):
    """Return the two numbers of `count_parameters` by building the model."""
    from minia3.checkpoints.load import build_model
    from minia3.model.ia3 import vectors

    model = build_model(config)
    n_adapter = sum(vector[0].numel() for vector in vectors(model).values())
    n_all = sum(parameter.numel() for parameter in model.parameters())
    return n_all - n_adapter, n_adapter


def table(rows):
    """Yield the lines of a table of known models."""
    yield f"{'name':<24}{'parameters':>15}{'adapter':>12}  on the hub"
    for row in rows:
        numbers = f"{row['parameters']:>15,}{row['adapter']:>12,}"
        yield f"{row['name']:<24}{numbers}  {hub_column(row['hub'])}"


def hub_column(repo):
    return "(in this package)" if os.path.isabs(repo) else repo


def find_model(name_or_path):
    """Return the full name of a model, the model on the meta device, and its `packed_names`.

    No weights are needed. If they are on this machine, `open_checkpoint` looks at them.
    """
    from minia3.checkpoints.hub import find
    from minia3.checkpoints.known_models import known_model
    from minia3.checkpoints.layout import has_all_weights
    from minia3.checkpoints.load import build_model, open_checkpoint, packed_names, read_checkpoint
    from minia3.checkpoints.nf4_files import packed_by_config

    known = known_model(name_or_path)
    if known:
        return known.repo, build_model(known.config), frozenset()
    path = find(name_or_path, weights=False)
    if has_all_weights(path):
        # They say whether the head is the embedding, because transformers 5 writes the config of a
        # T5 as if it were.
        model, stored, _ = open_checkpoint(path)
        return str(name_or_path), model, packed_names(model, stored)
    config, _ = read_checkpoint(path, weights=False)
    model = build_model(config)
    return str(name_or_path), model, packed_by_config(model, path)


def adapter_file_size(rows):
    """Return the bytes of the file in which `save_adapter` would write these vectors."""
    import torch
    from safetensors.torch import save

    from minia3.adapters.peft_files import peft_tensors

    # `rows` have no storage, and the values do not change the size: take ones.
    adapter = {name: torch.ones(row.shape) for name, row in rows.items()}
    return len(save(peft_tensors(adapter)))


def memory_lines(config, batch, length):
    """Yield the planned memory for both dtypes, and notes on what it is planned for."""
    import torch

    from minia3.training.memory_plan import TARGET_LENGTH, planned_memory

    for dtype in (torch.float32, torch.bfloat16):
        serving = planned_memory(config, dtype, batch, length, is_training=False)
        training = planned_memory(config, dtype, batch, length, is_training=True)
        title = str(dtype).removeprefix("torch.")
        yield title, f"{format_size(serving)} to serve, {format_size(training)} to train"
    note = MEMORY_NOTE.format(batch=batch, length=length, target=TARGET_LENGTH)
    for line in note.splitlines():
        yield "", line
