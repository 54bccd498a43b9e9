"""Arguments that several commands share, and the functions that load what they name."""

import argparse
import math
import os
import warnings
from pathlib import Path

from minia3.files.home import expand_home
from minia3.files.processes import first_goes_first
from minia3.files.write import check_free, finish_writing
from minia3.training.choices import DTYPES, QUANTIZED

MODEL_HELP = "known name (t5-base ...), hub id, folder or .gguf file"
FIRST_DEVICE = "a GPU if PyTorch finds one"
QUANTIZE_HELP = "keep the weights of the blocks in 8 or 4 bits (default: neither)"


def add_model(parser):
    parser.add_argument("model", type=expand_home, help=MODEL_HELP)


def add_adapter_option(parser):
    parser.add_argument(
        "--adapter",
        type=adapter_path,
        help="folder, file or hub id of an adapter (default: none)",
    )


def adapter_path(text):
    """Read --adapter. An empty text, such as an unset variable of a script, is not the base."""
    if not text:
        raise argparse.ArgumentTypeError("expected a folder, file or hub id, found an empty text")
    return expand_home(text)


def add_new_folder(parser):
    parser.add_argument("out", type=new_folder, help="folder to write; it must be new or empty")


def add_max_new_tokens(parser):
    parser.add_argument(
        "--max-new-tokens",
        type=positive(int),
        default=64,
        help="maximum tokens to generate for an output (default: %(default)s)",
    )


def add_device_options(parser, default_device=FIRST_DEVICE):
    """Add --device, --dtype and --check-weights. default_device: in words, for the help."""
    parser.add_argument(
        "--device", help=f"cpu, cuda, cuda:1, mps, xpu ... (default: {default_device})"
    )
    default = "as stored, but float32 for a float16 T5 or a quantized GGUF"
    add_dtype(parser, f"dtype of the weights (default: {default})")
    parser.add_argument(
        "--check-weights",
        action="store_true",
        help="look for NaN and infinite numbers in the weights first",
    )


def add_dtype(parser, help):
    parser.add_argument("--dtype", choices=DTYPES, help=help)


def add_quantize(parser, help=QUANTIZE_HELP):
    parser.add_argument("--quantize", choices=QUANTIZED, help=help)


def add_shard(parser):
    parser.add_argument(
        "--shard",
        nargs="?",
        type=int,
        const=0,
        metavar="N",
        help="let every N of the processes that torchrun starts share one copy of the model "
        "(without N: all)",
    )
    parser.add_argument(
        "--offload",
        action="store_true",
        help="keep the weights of the blocks in the memory of the CPU until they are needed",
    )


def positive(kind):
    """Return a function that reads a number above 0, for argparse."""

    def read(text):
        number = kind(text)
        if not 0 < number < math.inf:
            expected = "a finite number" if number == math.inf else "a number"
            raise argparse.ArgumentTypeError(f"{text} is not {expected} above 0")
        return number

    read.__name__ = kind.__name__  # argparse names it in an error
    return read


def new_folder(path):
    """Return `path` if nothing would be overwritten there, for argparse."""
    path = expand_home(path)
    if os.path.lexists(path) and not os.path.isdir(path):
        raise argparse.ArgumentTypeError(f"{path} exists and is not a folder: give a new one")
    try:
        check_free(path)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return path


def read_dtype(args):
    """Return the dtype that --dtype names, or None."""
    import torch

    return args.dtype and getattr(torch, args.dtype)


def load_model(args):
    """Load the model of `args` onto --device in --dtype.

    The first process downloads it, and the adapter, then one on each other machine. It also moves
    into place what a killed process had written of the adapter.
    """
    from minia3.checkpoints.hub import find, find_adapter
    from minia3.checkpoints.load import load_model
    from minia3.files.progress import showing
    from minia3.training.device import choose_device
    from minia3.training.shards import make_shards

    device, _ = choose_device(args.device)
    with first_goes_first():
        find(args.model)
        adapter = getattr(args, "adapter", None)
        if adapter:
            finish_writing(adapter)
            if not Path(adapter).exists():
                find_adapter(adapter)
    shards = make_shards(getattr(args, "shard", None), getattr(args, "offload", False), device)
    if adapter and not is_folder_of_adapters(adapter):
        check_base_of_adapter(args, shards)
    with showing("loading"):
        return load_model(
            args.model,
            dtype=read_dtype(args),
            device=device,
            quantize=getattr(args, "quantize", None),
            check_finite=args.check_weights,
            shards=shards,
        )


def is_folder_of_adapters(path):
    """Return whether a path, or None, leads to a folder that is not an adapter itself."""
    is_folder = path is not None and Path(path).is_dir()
    return is_folder and not Path(path, "adapter_config.json").exists()


def check_base_of_adapter(args, shards):
    """Raise ValueError if --adapter is a LoRA, and the base is not plain and whole.

    `load_lora` would say so only after all weights have been read.
    """
    from minia3.adapters.lora import check_base_of_lora, is_lora
    from minia3.checkpoints.load import is_stored_in_nf4

    if is_lora(args.adapter):
        is_quantized = args.quantize is not None or is_stored_in_nf4(args.model)
        check_base_of_lora(is_quantized, is_divided=shards is not None)


def describe_folder(folder):
    """Return what a command has written, as in "out: 3 files, 4.1 MB"."""
    sizes = [path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()]
    files = "1 file" if len(sizes) == 1 else f"{len(sizes)} files"
    return f"{folder}: {files}, {sum(sizes) / 1e6:,.1f} MB"


def load_any_adapter(model, adapter):
    """Apply an adapter, (IA)^3 or LoRA, to a model."""
    from minia3.adapters.lora import is_lora, load_lora
    from minia3.adapters.rows import load_adapter

    if is_lora(adapter):
        load_lora(model, adapter)
    else:
        load_adapter(model, adapter)


def warn_if_endless(args, adapter, tokenizer):
    """Warn if an adapter has only learned to rank choices, and never to end a text.

    T5's choices end in the end token, and LLaMA's do not. The task.json beside the adapter says
    what it has learned; without that file, nothing is known.
    """
    if tokenizer.has_separate_targets:
        return
    from minia3.tasks.task import METRICS
    from minia3.training.learned import learned_tasks

    tasks = learned_tasks(args.model, adapter)
    if tasks and all(spec.metric in METRICS["choices"] for spec in tasks.values()):
        ways = "--max-new-tokens" + (" or --stop" if hasattr(args, "stop") else "")
        warnings.warn(
            f"{adapter} was trained to rank choices, and not to stop: a text goes on until {ways}",
            stacklevel=1,
        )
