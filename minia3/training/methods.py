"""What each method trains, and how the result is saved.

ia3     the vectors of the model: a row of a table for each adapter
lora    A and B of LoRA, which are added to some linears: the baseline of the paper
full    every parameter except the vectors
none    nothing: the base model is evaluated
icl     nothing: the base model is evaluated with examples before each input
"""

from minia3.adapters.lora import add_lora, is_lora, load_lora, lora_parameters, save_lora
from minia3.adapters.rows import load_adapter, write_row
from minia3.checkpoints.save import write_model
from minia3.files.write import sync_files
from minia3.inference.turns import answer_as_learned
from minia3.model.ia3 import freeze
from minia3.model.more_vectors import add_vectors, choose_vectors
from minia3.model.quantized import quantized_linears
from minia3.tasks.task_file import write_task_file


def trainable_parameters(model, config, saved_names=()):
    """Freeze all parameters that the flags do not train. Return the others: name to parameter.

    Read --adapter, if it is given; for (IA)^3, into every row. `config` has a single seed, from
    which LoRA's A is drawn. saved_names: of the vectors whose values a checkpoint has; then they
    are made, and --adapter is not read. Raise ValueError if --adapter is not for the method, or
    if a LoRA or full fine-tuning finds a base in nf4.
    """
    has_values = config.method == "ia3" and len(saved_names) > 0
    if config.adapter is not None and not has_values:
        check_kind(config)
    if config.method == "lora":
        if config.adapter is not None:
            load_lora(model, config.adapter)
            return lora_parameters(model)
        linears = config.where.split(",")
        return add_lora(model, config.rank, config.alpha, linears, config.seed)

    freeze(model)
    if config.method == "full":
        check_plain(model, config)
        trained = {}
        for name, parameter in model.named_parameters():
            is_vector = parameter.requires_grad  # `freeze` leaves only the vectors
            parameter.requires_grad_(not is_vector)
            if not is_vector:
                trained[name] = parameter
        return trained

    if has_values:
        add_vectors(model, saved_names)
    elif config.adapter is not None:
        for row in range(model.n_adapters):
            load_adapter(model, config.adapter, row)
    return choose_vectors(model, config.sites, config.layers, not config.no_cross)


def check_plain(model, config):
    """Raise ValueError if weights are codes, as those that are stored in nf4 are.

    --quantize was refused before (rules.py).
    """
    if quantized_linears(model):
        remedy = "give the model that it was made from"
        found = f"{config.model} is stored in nf4"
        raise ValueError(f"--method full trains plain weights, and {found}: {remedy}")


def check_kind(config):
    """Raise ValueError if --adapter is a LoRA and --method takes vectors, or the other way."""
    found = f"--adapter is {config.adapter!r}"
    if config.method == "lora" and not is_lora(config.adapter):
        expected = "expected the folder or the hub id of a LoRA"
        raise ValueError(f"{found}, {expected}: for (IA)^3, give --method ia3")
    if config.method != "lora" and is_lora(config.adapter):
        advice = "give --method lora, with --eval-only if nothing should train"
        if config.method == "icl":
            advice = "merge it into its model (minia3 merge), and give the result as --model"
        raise ValueError(f"{found}, a LoRA, and --method {config.method} takes (IA)^3: {advice}")


def save_trained(group, cell, folder):
    """Write a cell's adapter as a PEFT folder, or the whole model after full fine-tuning.

    Write task.json beside it, and wait until all of them are on the disk.
    """
    specs = []
    for task in cell.task.members:
        spec = task.spec._replace(metric=task.metric)
        if spec.messages:
            spec = spec._replace(chat_template=group.chat_template)
        specs.append((task.name, spec))
    method = cell.config.method
    if method == "ia3":
        write_row(group.model, folder, cell.row)
    elif method == "lora":
        save_lora(group.model, folder, cell.config.model)
    else:
        answer_as_learned(group.model, group.tokenizer, [spec for _, spec in specs])
        write_model(group.model, folder, group.tokenizer)
    # So that `predict` puts further rows into the same words, and `generate` knows whether the
    # adapter has learned to end a text.
    write_task_file(folder, specs)
    # Or a power failure could leave the results of the run without what it has trained.
    sync_files(folder)
