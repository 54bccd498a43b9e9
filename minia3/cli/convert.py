"""`convert`: write an adapter as a PEFT folder, or a model in the Hugging Face layout."""

from pathlib import Path

from minia3.cli.arguments import (
    MODEL_HELP,
    add_device_options,
    add_new_folder,
    describe_folder,
    load_model,
    writing_new_folder,
)
from minia3.cli.terminal import show

TITLE = "Convert an adapter to a PEFT folder, or a model to the Hugging Face layout"
EXAMPLE = "python -m minia3 convert finish.pt adapter"


def add_arguments(parser):
    parser.add_argument("model", help=f"a model: {MODEL_HELP}; or an adapter: folder or file")
    add_new_folder(parser)
    add_device_options(parser)


def run(args):
    from minia3.adapters.peft_files import read_adapter, write_adapter
    from minia3.checkpoints.hub import find
    from minia3.checkpoints.save import save_model
    from minia3.checkpoints.tokenizer import find_tokenizer
    from minia3.files.progress import showing
    from minia3.tasks.task_file import copy_task_file

    if is_adapter(Path(args.model)):
        adapter = read_adapter(args.model)
        with writing_new_folder(args.out) as folder:
            write_adapter(folder, adapter.vectors, adapter.base)
            copy_task_file([Path(args.model)], folder)
    else:
        model = load_model(args)
        tokenizer = find_tokenizer(find(args.model, weights=False))  # None if there is none
        with showing("writing"):
            save_model(model, args.out, tokenizer)
    show(f"converted {args.model}: {describe_folder(args.out)}")


def is_adapter(path):
    """Return whether a path leads to an adapter. The only model in a single file is .gguf."""
    if path.is_file():
        return path.suffix != ".gguf"
    return (path / "adapter_config.json").exists()
