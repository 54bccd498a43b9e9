"""Arguments that several commands share, and the functions that load what they name."""

import argparse

from minia3.files.write import is_free

MODEL_HELP = "known name (t5-base ...), hub id, folder or .gguf file"


def add_model(parser):
    parser.add_argument("model", help=MODEL_HELP)


def add_adapter_option(parser):
    parser.add_argument("--adapter", help="folder, file or hub id of an adapter (default: none)")


def add_new_folder(parser):
    parser.add_argument("out", type=new_folder, help="folder to write; it must be new or empty")


def add_max_new_tokens(parser):
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=64,
        help="most tokens to generate for an output (default: %(default)s)",
    )


def add_device_options(parser):
    parser.add_argument(
        "--device", help="cpu, cuda, cuda:1 ... (default: CUDA if there is a GPU, else the CPU)"
    )
    parser.add_argument(
        "--dtype", help="float32, bfloat16 ... (default: the dtype of the stored weights)"
    )


def new_folder(path):
    """Return `path` if nothing would be overwritten there, for argparse."""
    if not is_free(path):
        raise argparse.ArgumentTypeError(f"{path} exists and is not empty: give a new folder")
    return path


def load_model(args):
    """Load the model of `args` onto --device in --dtype."""
    import torch

    from minia3.checkpoints.load import load_model
    from minia3.training.device import choose_device

    device, _ = choose_device(args.device)
    dtype = None
    if args.dtype is not None:
        dtype = getattr(torch, args.dtype, args.dtype)  # load_model refuses other words
    return load_model(args.model, dtype=dtype, device=device)


def load_any_adapter(model, adapter):
    """Apply an adapter, (IA)^3 or LoRA, to a model."""
    from minia3.adapters.lora import is_lora, load_lora
    from minia3.adapters.rows import load_adapter

    if is_lora(adapter):
        load_lora(model, adapter)
    else:
        load_adapter(model, adapter)
