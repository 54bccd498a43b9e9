"""Before a run trains: does a step fit into the memory that is free, and if not, what does?

The step is planned on fake tensors (memory_plan.py), with the longest source and the longest
choices of the run, and with two layers and three layers of each stack: every further layer takes as
much as the third one. This takes half a second whatever the size of the model.

Shapes: B examples, M source length, C choices, L tokens of a choice.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import ceil
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from minia3.adapters.lora import add_lora
from minia3.files.messages import shorten
from minia3.files.processes import n_processes
from minia3.inference.scoring import choices_at_once, masked_logprobs
from minia3.model.costs import LAYER_FIELDS
from minia3.model.ia3 import freeze
from minia3.model.shard import is_sharded
from minia3.model.target_logprobs import MAX_LOGITS
from minia3.training.device import free_memory
from minia3.training.memory_plan import MemoryCounter, model_without_values, planned_logprobs
from minia3.training.prepare import prepare_model

# The plan counts tensors. An allocator also keeps some of what is freed: measured on a CPU, a step
# takes 1.4 times the plan.
OVERHEAD = 1.4

# Bytes per trained parameter that the plan does not count: a gradient, and AdamW's two moments.
TRAINED_BYTES = 12

USABLE_SHARE = 0.9  # of the free memory: what a step may take


class StepShape(NamedTuple):
    """The sizes of one forward pass: of a micro-batch, or of the whole batch."""

    n_examples: int
    source_length: int  # in tokens, as is target_length
    n_choices: int
    target_length: int

    @property
    def n_tokens(self):
        return self.n_examples * (self.source_length + self.n_choices * self.target_length)


class Demand(NamedTuple):
    """What takes memory: a step, or a batch of an evaluation."""

    subject: str  # and the verb, for the note: "a step takes"
    flag: str  # which makes it smaller
    other_remedies: str  # besides a smaller model, if no size of the flag fits
    shape: StepShape
    bound: int  # more bytes than it takes
    plan: Callable[[StepShape], int]  # a function from a shape to the bytes that it takes


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


def size_to_try(run, group, demand, free):
    """Return the number of examples to try if memory runs out: the size that fits, or else a half.

    free: the bytes that are free; None: not known. If they are far more than what is needed,
    nothing is planned. If they are not enough, print a note and, on a CPU, limit the process to
    what may be taken, so that it ends with a message. Otherwise the system would end it, or move
    everything that the user works with to the disk.
    """
    half = max(1, demand.shape.n_examples // 2)
    if free is None or demand.bound < free / 2:
        return half
    usable = int(USABLE_SHARE * free)
    needed = OVERHEAD * demand.plan(demand.shape)
    if needed <= usable:
        return half
    fitting = largest_fitting_size(demand.plan, demand.shape, usable)
    advice = f"no {demand.flag} fits: take a smaller model, or {demand.other_remedies}"
    if fitting > 0:
        advice = f"{demand.flag} {fitting} fits"
    sizes = f"about {gigabytes(needed)}, but {gigabytes(usable)} of what is free may be taken"
    print(f"note     {demand.subject} {sizes}: {advice}")
    if group.device.type == "cpu":
        run.resources.enter_context(limited_memory(usable))
    return max(1, fitting)


def gigabytes(n_bytes):
    return f"{n_bytes / 1e9:.1f} GB"


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


def upper_bound(model_config, shape):
    """Return more bytes than a step takes, without planning it.

    Most runs take far less than what is free, and need no plan. The factors are generous: they
    count more tensors of each width than a layer has, all of them kept, and in float32.
    """
    c = model_config
    n_layers = c.n_layers + getattr(c, "n_decoder_layers", 0)
    length = shape.source_length + shape.n_choices * shape.target_length
    width_of_heads = c.n_heads * c.d_head
    n_numbers = 40 * c.d_model + 8 * c.d_ff + 24 * width_of_heads + 8 * c.n_heads * length
    n_logits = min(shape.n_tokens * c.vocab_size, 4 * MAX_LOGITS)  # at most MAX_LOGITS at once
    return 4 * (shape.n_tokens * n_layers * n_numbers + 4 * n_logits)


def largest_fitting_size(plan, shape, free):
    """Return the largest power of two below shape.n_examples that fits, or 0 if not even 1 does.

    It is a power of two so that few sizes are planned. plan: see `Demand`. free: the bytes that may
    be taken.
    """
    size = 1
    while 2 * size < shape.n_examples:
        size *= 2
    while size > 0:
        if OVERHEAD * plan(shape._replace(n_examples=size)) <= free:
            return size
        size //= 2
    return 0


def planned_step(group, shape):
    """Return the bytes that the tensors of a step take at once, beyond the weights.

    What is whole only while it computes is not counted: a block of a sharded base, and a weight of
    a quantized one.
    """
    model = group.model
    dtype = model.embed.weight.dtype
    sharded = is_sharded(model)
    activations = planned_activations(model.config, dtype, shape, group.config, sharded)
    return activations + bytes_of_trained(group)


def bytes_of_trained(group):
    """Return the bytes of the gradients and the moments of all cells."""
    return TRAINED_BYTES * group.n_trained * len(group.cells)


def planned_activations(model_config, dtype, shape, config, sharded=False):
    """Return `peak_of_step` for a model of any depth, in half a second."""
    options = {"dtype": dtype, "shape": shape, "config": config, "sharded": sharded}
    return extrapolate_depth(partial(peak_of_step, **options), model_config)


def extrapolate_depth(peak, model_config):
    """Return peak(model_config), extrapolated from models with two and three layers per stack.

    peak: a function from the config of a model to bytes.
    """
    fields = [name for name in LAYER_FIELDS if hasattr(model_config, name)]
    shallow = replace(model_config, **dict.fromkeys(fields, 2))
    two_layers = peak(shallow)
    total = two_layers
    for name in fields:
        n_more = getattr(model_config, name) - 2
        if n_more != 0:
            total += n_more * (peak(replace(shallow, **{name: 3})) - two_layers)
    return total


def peak_of_step(model_config, dtype, shape, config, sharded=False):
    """Return the most bytes that tensors take in a forward and backward pass, beyond the weights.

    config: the flags of the run; dropout and recomputation change what is kept. sharded: whether
    processes hold the base together, because then choices are not scored in chunks.
    """
    with FakeTensorMode():
        model = model_without_values(model_config, dtype)
        freeze(model)
        if config.method == "full":
            model.requires_grad_(True)
        if config.method == "lora":
            add_lora(model, config.rank, config.alpha, config.where.split(","), seed=0)
        prepare_model(model, replace(config, compile=False))
        model.train()

        def step(source_BM, target_BCL):
            score_without_padding(model, source_BM, target_BCL, sharded).backward()

        return peak_beyond_weights(step, model, shape)


def peak_beyond_weights(function, model, shape):
    """Return the most bytes that tensors take while function(source_BM, target_BCL) runs.

    Call this within FakeTensorMode. The parameters of the model and the ids do not count.
    """
    source_BM = torch.zeros(shape.n_examples, shape.source_length, dtype=torch.long)
    target_shape = (shape.n_examples, shape.n_choices, shape.target_length)
    target_BCL = torch.zeros(target_shape, dtype=torch.long)
    counter = MemoryCounter()
    for tensor in (*model.parameters(), source_BM, target_BCL):
        counter.add(tensor)
    n_before = counter.now
    with counter:
        function(source_BM, target_BCL)
    return counter.peak - n_before


def score_without_padding(model, source_BM, target_BCL, sharded=False):
    """Return a scalar to call `backward` on: the sum of what `choice_logprobs` returns."""
    n_examples, n_choices, length = target_BCL.shape
    if n_choices == 1:
        return planned_logprobs(model, source_BM, target_BCL[:, 0]).sum()
    state = model.start(source_BM)

    def score(target_BCL):
        repeated = state.repeat(target_BCL.shape[1])
        return masked_logprobs(model, repeated, target_BCL.flatten(0, 1), None)

    n_at_once = choices_at_once(n_examples, length)
    if n_choices <= n_at_once or sharded:
        return score(target_BCL).sum()
    state.make_cross_kv()  # once for all chunks, as in `choice_logprobs`
    total = 0.0
    for part in target_BCL.split(n_at_once, dim=1):
        total = total + checkpoint(score, part, use_reentrant=False).sum()
    return total


# When memory has run out


@contextmanager
def limited_memory(n_bytes):
    """Let the process allocate `n_bytes` more, and no more than that, until the end of the block.

    A lower limit that the user has set stays. On systems other than Linux, nothing is limited.
    """
    try:
        import resource

        with open("/proc/self/status", encoding="utf-8") as file:
            (now,) = [int(line.split()[1]) * 1024 for line in file if line.startswith("VmData")]
    except (ImportError, OSError, ValueError):
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    limit = now + int(n_bytes)
    for user_limit in before:  # `ulimit -d` sets a soft limit and a hard one, or either of them
        if user_limit != resource.RLIM_INFINITY:
            limit = min(limit, user_limit)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def out_of_memory_message(error, run):
    """Return what a run says when memory has run out: what to try, and what failed."""
    reason = shorten(" ".join(str(error).split()), 120) or "no memory is left"
    micro = f"--micro-batch-size (try {run.suggested_micro_batch_size})"
    evaluation = f"--eval-batch-size (try {run.suggested_eval_batch_size})"
    return f"out of memory: lower {micro} or {evaluation}: {reason}"
