"""Before a run trains: does a step fit into the memory that is free, and if not, what does?

The step is planned on fake tensors (memory_plan.py), with the longest source and the longest
choices of the run, once with three layers in each stack and once with four. In each part of the
step, each further layer takes as much as the fourth one (`count_in_parts`). This takes a
second or two, whatever the size of the model. With --layers, layers differ: those below the first
one that trains keep nothing for the backward pass. Then the whole depth is planned.

Shapes: B examples, M source length, C choices, L tokens of a choice.
"""

from dataclasses import replace
from functools import partial
from math import ceil

from torch._subclasses.fake_tensor import FakeTensorMode

from minia3.adapters.lora import LoRA
from minia3.files.processes import n_processes
from minia3.model.shard import is_sharded
from minia3.training.device import free_memory
from minia3.training.memory_fit import Demand, size_to_try, upper_bound
from minia3.training.memory_plan import (
    StepShape,
    extrapolate_depth,
    model_without_values,
    peaks_beyond_weights,
    score_without_padding,
)
from minia3.training.methods import trainable_parameters
from minia3.training.prepare import prepare_model
from minia3.training.rules import is_given

# Bytes per trained parameter that the plan does not count: a gradient, and AdamW's two moments.
TRAINED_BYTES = 12


def plan_step_memory(run, group):
    """Return a micro-batch size to try if memory runs out, and print a note if it will: see
    `size_to_try`.
    """
    shape = shape_of_step(group)
    bound = upper_bound(group.model.config, shape)
    demand = Demand(
        subject="a step takes",
        flag="--micro-batch-size",
        other_remedies="a shorter --max-length or --recompute",
        shape=shape,
        bound=bound + 2 * bytes_of_trained(group),  # twice, to be on the safe side
        plan=partial(planned_step, group),
    )
    return size_to_try(run, group, demand, free_memory(group.device))


def shape_of_step(group):
    """Return the largest shape that a forward pass of this run can have."""
    sources = []
    targets = []
    n_choices = 1
    for cell in group.cells:
        for example in cell.batches.examples.values():
            sources.append(len(example.source))
            targets.append(max(map(len, example.targets)))
            n_choices = max(n_choices, len(example.targets))
    n_examples = ceil(group.config.batch_size * len(group.cells) / n_processes())
    if group.micro_batch_size is not None:
        n_examples = min(n_examples, group.micro_batch_size)
    return StepShape(n_examples, max(sources), n_choices, max(targets))


def planned_step(group, shape):
    """Return the bytes that the tensors of a step take at once, beyond the weights.

    What is whole only while it computes is not counted: a block of a sharded base, and a weight of
    a quantized one.
    """
    model = group.model
    dtype = model.embed.weight.dtype
    sharded = is_sharded(model)
    config = config_of_lora(group) if group.config.method == "lora" else group.config
    activations = planned_activations(model.config, dtype, shape, config, sharded)
    return activations + bytes_of_trained(group)


def config_of_lora(group):
    """Return the flags of a run, with the rank and the linears of its LoRA.

    A LoRA of --adapter has those of its file.
    """
    loras = {}
    for name, module in group.model.named_modules():
        if isinstance(module, LoRA):
            loras[name.rpartition(".")[2]] = module
    rank = max(len(lora.lora_A) for lora in loras.values())
    return replace(group.config, rank=rank, where=",".join(loras))


def bytes_of_trained(group):
    """Return the bytes of the gradients and the moments of all cells."""
    return TRAINED_BYTES * group.n_trained * len(group.cells)


def planned_activations(model_config, dtype, shape, config, sharded=False):
    """Return the largest of `peaks_of_step` for a model of any depth, in a second or two.

    If --layers is given, it takes as long as all layers take: about a second for ten.
    """
    options = {"dtype": dtype, "shape": shape, "config": config, "sharded": sharded}
    count = partial(peaks_of_step, **options)
    if is_given(config, "layers"):
        return int(count(model_config).max())
    return int(extrapolate_depth(count, model_config).max())


def peaks_of_step(model_config, dtype, shape, config, sharded=False):
    """Return the most bytes that tensors take in each part of a forward and backward pass, beyond
    the weights: an array, see `count_in_parts`.

    config: the flags of the run; what trains, dropout and recomputation change what is kept.
    sharded: whether processes share one copy of the base, because then choices are not scored in
    chunks.
    """
    with FakeTensorMode():
        model = model_without_values(model_config, dtype)
        trainable_parameters(model, replace(config, adapter=None, seed=0))
        prepare_model(model, replace(config, compile=False))
        model.train()

        def step(source_BM, target_BCL):
            score_without_padding(model, source_BM, target_BCL, sharded).backward()

        return peaks_beyond_weights(step, model, shape)
