"""`convert`: write an adapter as a PEFT folder, or a model in the Hugging Face layout."""

import argparse
from pathlib import Path

from minia3.cli.arguments import (
    MODEL_HELP,
    add_device_options,
    add_new_folder,
    describe_folder,
    load_model,
)
from minia3.cli.terminal import show
from minia3.files.home import expand_home
from minia3.files.write import finish_writing, writing_new_folder

TITLE = "Convert an adapter to a PEFT folder, or a model to the Hugging Face layout"
EXAMPLE = "minia3 convert finish.pt adapter"

ADAPTER_OPTIONS = ("to", "base")
MODEL_OPTIONS = ("device", "dtype", "check_weights")


def add_arguments(parser):
    model_help = f"a model: {MODEL_HELP}; or an adapter: folder or file"
    parser.add_argument("model", type=expand_home, help=model_help)
    add_new_folder(parser)
    parser.add_argument(
        "--to",
        type=read_kind,
        metavar="dora",
        help="write an adapter of a gated model as a DoRA (default: as (IA)^3)",
    )
    parser.add_argument(
        "--base",
        type=expand_home,
        help="the name or path of the adapter's model (default: as the adapter says)",
    )
    add_device_options(parser, default_device="cpu")


def read_kind(text):
    """Return what --to names. Say why there is no LoRA."""
    if text == "lora":
        raise argparse.ArgumentTypeError(
            "as a LoRA, an adapter loses most of itself, because what it adds to a weight has full "
            "rank: use --to dora, or `minia3 merge`"
        )
    if text != "dora":
        raise argparse.ArgumentTypeError(f"{text!r}, expected dora")
    return text


def run(args):
    if is_adapter(Path(args.model)):
        refuse(args, MODEL_OPTIONS, "a model")
        convert_adapter(args)
    else:
        refuse(args, ADAPTER_OPTIONS, "an adapter")
        convert_model(args)
    show(f"converted {args.model}: {describe_folder(args.out)}")


def refuse(args, options, kind):
    """Raise ValueError if one of the options, which are for `kind`, was given."""
    for option in options:
        if getattr(args, option):
            flag = "--" + option.replace("_", "-")
            raise ValueError(f"{flag} is for {kind}, and {args.model} is not one")


def convert_adapter(args):
    from minia3.adapters.dora import write_dora
    from minia3.adapters.peft_files import read_adapter, write_adapter
    from minia3.tasks.task_file import copy_task_file

    adapter = read_adapter(args.model)
    base = args.base or adapter.base
    if args.to == "dora" and args.base is None:
        check_base(args.model, base)
    with writing_new_folder(args.out) as folder:
        if args.to == "dora":
            write_dora(folder, adapter, base, args.model)
        else:
            write_adapter(folder, adapter.vectors, base)
        copy_task_file([Path(args.model)], folder)


def check_base(adapter, base):
    """Raise ValueError if the model that an adapter names, which a DoRA needs, is not found."""
    from minia3.checkpoints.hub import find

    if base is None:
        raise ValueError(f"{adapter} does not say which model it is for: give --base")
    try:
        find(base, weights=False)
    except ValueError as error:
        raise ValueError(f"the model that {adapter} names: {error}: or give --base") from None


def convert_model(args):
    from minia3.checkpoints.hub import find
    from minia3.checkpoints.load import is_stored_in_nf4
    from minia3.checkpoints.save import save_model
    from minia3.checkpoints.tokenizer import find_tokenizer
    from minia3.files.progress import showing
    from minia3.tasks.task_file import copy_task_file

    path = find(args.model, weights=False)
    # None if there is none. It comes before the weights, because it may be refused, which is quick.
    tokenizer = find_tokenizer(path)
    if is_stored_in_nf4(args.model):
        remedy = "`minia3 merge --dequantize` writes such weights, with an adapter folded in"
        raise ValueError(f"{args.model} is stored in nf4, and has no plain weights: {remedy}")
    # Nothing is computed, so a GPU would not help, and it may have too little memory. This is not a
    # default of argparse, because an adapter refuses the flag.
    args.device = args.device or "cpu"
    model = load_model(args)
    with showing("writing"), writing_new_folder(args.out) as folder:
        save_model(model, folder, tokenizer)
        if path.is_dir():  # what lies beside a .gguf file is not of the model
            copy_task_file([path], folder)


def is_adapter(path):
    """Return whether a path leads to an adapter. The only model in a single file is a GGUF."""
    from minia3.checkpoints.layout import is_gguf

    if path.is_file():
        return not is_gguf(path)
    finish_writing(path)
    return (path / "adapter_config.json").exists()
