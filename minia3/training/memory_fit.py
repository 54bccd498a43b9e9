"""Does what a run is about to do fit into the memory that is free, and if not, what does?

A run asks before its steps (step_memory.py) and before its evaluations (evaluation_memory.py).
"""

from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

import torch

from minia3.files.messages import shorten
from minia3.model.target_logprobs import MAX_LOGITS
from minia3.training.flags import option
from minia3.training.memory_plan import StepShape
from minia3.training.shown_commands import resume_command

# The plan counts tensors. An allocator also keeps some of what is freed: measured on a CPU, a step
# takes 1.4 times the plan.
OVERHEAD = 1.4

USABLE_SHARE = 0.9  # of the free memory: what a step may take


class Demand(NamedTuple):
    """What takes memory: a step, or a batch of an evaluation."""

    subject: str  # and the verb, for the note: "a step takes"
    flag: str  # which makes it smaller
    other_remedies: str  # besides a smaller model, if no size of the flag fits
    shape: StepShape
    bound: int  # more bytes than it takes
    plan: Callable[[StepShape], int]  # a function from a shape to the bytes that it takes


def size_to_try(run, group, demand, free):
    """Return the number of examples to try if memory runs out: the size that fits, or else a half.

    It is 0 if there is no smaller number than that of `demand`.

    free: the bytes that are free; None: not known. If they are far more than what is needed,
    nothing is planned. If they are not enough, print a note and, on a CPU, limit the process to
    what may be taken, so that it ends with a message. Otherwise the system would end it, or move
    everything that the user works with to the disk.
    """
    half = demand.shape.n_examples // 2
    if free is None or demand.bound < free / 2:
        return half
    usable = int(USABLE_SHARE * free)
    needed = OVERHEAD * demand.plan(demand.shape)
    if needed <= usable:
        return half
    fitting = largest_fitting_size(demand.plan, demand.shape, usable)
    advice = f"no {demand.flag} fits: use a smaller model, or {demand.other_remedies}"
    if fitting > 0:
        advice = f"{demand.flag} {fitting} fits"
    sizes = f"about {gigabytes(needed)}, but {gigabytes(usable)} of what is free may be taken"
    print(f"note     {demand.subject} {sizes}: {advice}")
    if group.device.type == "cpu":
        run.resources.enter_context(limited_memory(usable))
    return fitting or min(1, half)  # the plan may be wrong


def gigabytes(n_bytes):
    return f"{n_bytes / 1e9:.1f} GB"


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
    """Return what a run says when memory has run out: what to try, what failed, and how to go on.

    A size that cannot be smaller is no advice.
    """
    reason = shorten(" ".join(str(error).split()), 120) or "no memory is left"
    sizes = {
        "micro_batch_size": run.suggested_micro_batch_size,
        "eval_batch_size": run.suggested_eval_batch_size,
    }
    smaller = {name: size for name, size in sizes.items() if size > 0}
    remedies = []
    if smaller:
        flags = [f"{option(name)} (try {size})" for name, size in smaller.items()]
        remedies.append(f"lower {' or '.join(flags)}")
    if len(smaller) < len(sizes):
        remedies.append("use a smaller model, a shorter --max-length or --recompute")
    is_device_full = isinstance(error, torch.OutOfMemoryError)  # and not the CPU
    if run.is_offloaded and not is_device_full:
        remedies.append("free memory of the CPU, in which --offload keeps the base")
    message = f"out of memory: {', or '.join(remedies)}: {reason}"
    # The folder of a new run without results is removed.
    if smaller and run.folder is not None and (run.folder / "metrics.jsonl").exists():
        command = resume_command(run.program, run.folder, run.unrecorded | smaller)
        message += f"; to continue: {command}"
    return message
