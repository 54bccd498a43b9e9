"""`merge`: write a model with an adapter folded into its weights."""

from functools import partial

from minia3.cli.arguments import (
    add_dtype,
    add_model,
    add_new_folder,
    add_quantize,
    describe_folder,
    read_dtype,
)
from minia3.cli.terminal import show
from minia3.files.write import writing_new_folder

TITLE = "Fold an adapter into a model"
EXAMPLE = "minia3 merge tiny-t5 adapter merged"


def add_arguments(parser):
    add_model(parser)
    parser.add_argument("adapter", help="folder, file or hub id of an adapter")
    add_new_folder(parser)
    add_quantize(
        parser,
        "fold the adapter into the weights that an int8 or nf4 base stands for; needs --dequantize "
        "(default: into the stored weights)",
    )
    parser.add_argument(
        "--dequantize",
        action="store_true",
        help="write bfloat16 weights: of a base stored in nf4, or of the one that --quantize makes",
    )
    add_dtype(
        parser,
        "dtype of the base when the adapter was trained, and of what is written without "
        "--dequantize (default: that of the stored weights)",
    )


def run(args):
    if args.quantize and not args.dequantize:
        reason = "no file format keeps int8 or nf4 with an adapter folded in"
        raise ValueError(f"merge --quantize: {reason}: add --dequantize, which writes bfloat16")
    from minia3.adapters.lora import is_lora
    from minia3.checkpoints.hub import find_adapter
    from minia3.files.progress import showing
    from minia3.inference.turns import answer_as_learned
    from minia3.tasks.task_file import copy_task_file
    from minia3.training.learned import learned_tasks

    with showing("merging"), writing_new_folder(args.out) as folder:
        merge = merge_lora if is_lora(args.adapter) else merge_vectors
        learned = learned_tasks(args.model, args.adapter).values()
        merge(args, folder, partial(answer_as_learned, specs=learned))
        copy_task_file([find_adapter(args.adapter)], folder)
    show(f"merged {args.adapter} into {args.model}: {describe_folder(args.out)}")


def merge_lora(args, folder, change):
    """Write a model with a LoRA folded in. change: see `merge_files`.

    The LoRA of a quantized base is added to the weights that the base stands for.
    """
    from minia3.adapters.lora import load_lora
    from minia3.adapters.merge import merge
    from minia3.checkpoints.hub import find
    from minia3.checkpoints.load import load_model
    from minia3.checkpoints.save import save_model
    from minia3.checkpoints.tokenizer import find_tokenizer
    from minia3.model.quantized import dequantize

    # The tokenizer may be refused, and that is quick.
    tokenizer = find_tokenizer(find(args.model, weights=False))
    check_dequantize(args)
    model = load_model(args.model, dtype=read_dtype(args), quantize=args.quantize)
    dequantize(model, model.embed.weight.dtype)
    load_lora(model, args.adapter)
    merged = merge(model)
    if args.dequantize:
        merged.bfloat16()
    change(merged, tokenizer)
    save_model(merged, folder, tokenizer)


def merge_vectors(args, folder, change):
    """Write a model with an (IA)^3 adapter folded in, file by file. change: see `merge_files`."""
    import torch

    from minia3.adapters.merge import merge_files

    check_dequantize(args)
    out_dtype = torch.bfloat16 if args.dequantize else None
    merge_files(
        args.model,
        args.adapter,
        folder,
        dtype=read_dtype(args),
        quantize=args.quantize,
        out_dtype=out_dtype,
        change=change,
    )


def check_dequantize(args):
    """Raise ValueError if --dequantize would only round the base, because nothing is quantized."""
    from minia3.checkpoints.load import is_stored_in_nf4

    if not args.dequantize or args.quantize:
        return
    if not is_stored_in_nf4(args.model):
        found = f"merge --dequantize: {args.model} is not stored in nf4"
        raise ValueError(f"{found}: add the --quantize of the run, or leave --dequantize out")
