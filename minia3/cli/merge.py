"""`merge`: write a model with an adapter folded into its weights."""

from minia3.cli.arguments import add_model, add_new_folder, describe_folder, writing_new_folder
from minia3.cli.terminal import show

TITLE = "Fold an adapter into a model"
EXAMPLE = "python -m minia3 merge tiny-t5 adapter merged"


def add_arguments(parser):
    add_model(parser)
    parser.add_argument("adapter", help="folder, file or hub id of an adapter")
    add_new_folder(parser)


def run(args):
    from minia3.adapters.lora import is_lora, load_lora
    from minia3.adapters.merge import merge, merge_files
    from minia3.checkpoints.hub import find, find_adapter
    from minia3.checkpoints.load import load_model
    from minia3.checkpoints.save import save_model
    from minia3.checkpoints.tokenizer import find_tokenizer
    from minia3.files.progress import showing
    from minia3.tasks.task_file import copy_task_file

    with showing("merging"), writing_new_folder(args.out) as folder:
        if is_lora(args.adapter):
            model = load_model(args.model)
            load_lora(model, args.adapter)
            save_model(merge(model), folder, find_tokenizer(find(args.model)))
        else:
            # File by file, so that only one shard is in memory.
            merge_files(args.model, args.adapter, folder)
        copy_task_file([find_adapter(args.adapter)], folder)
    show(f"merged {args.adapter} into {args.model}: {describe_folder(args.out)}")
