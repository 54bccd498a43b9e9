"""The tables of docs/scale.md: what large models take on one device of several, as Markdown.

    python -m tests.benchmarks.plans

They are plans, made without weights in less than a minute. One example of 512 tokens trains on
each device, with --recompute; what is not quantized is bfloat16. With several devices, the base is
divided among them.
"""

import functools

import torch

from minia3.checkpoints.known_models import KNOWN_MODELS
from minia3.training.device_plan import Plan, recipe_shape

MODELS = (
    "t5-3b",
    "t0-11b",
    "llama-2-7b",
    "llama-2-13b",
    "llama-2-70b",
    "llama-3-70b",
    "llama-3.1-405b",
)
KINDS = (None, "int8", "nf4")
N_DEVICES = (1, 4, 8)
MEMORY = (24, 40, 80)  # GB of a device
SHAPE = recipe_shape(1, 512)

# Model and kind -> GB of a device, when 1, 8 and 32 share the base: a plan that was made by hand.
BY_HAND_DEVICES = (1, 8, 32)
BY_HAND = {
    ("llama-2-70b", None): (138, 23.3, 10.5),
    ("llama-2-70b", "int8"): (70, 12.7, 6.3),
    ("llama-2-70b", "nf4"): (40, 7.8, 4.2),
    ("llama-3.1-405b", None): (812, 128, 53),
    ("llama-3.1-405b", "int8"): (412, 70, 32),
    ("llama-3.1-405b", "nf4"): (236, 44, 23),
}


def main():
    for lines in (by_hand_lines(), size_lines(), batch_lines()):
        print("\n".join(lines), end="\n\n", flush=True)


@functools.cache
def plan_of(model, kind):
    """Return the Plan of a model. Its activations are planned once, for all kinds and tables."""
    plan = Plan(KNOWN_MODELS[model].config, torch.bfloat16, kind)
    if kind is not None:
        plan.planned = plan_of(model, None).planned
    return plan


def size_lines(models=MODELS):
    """Yield the lines of a table: GB on each device."""
    yield "| model | base | 1 device | 4 devices | 8 devices |"
    yield "|---|---|---|---|---|"
    for model in models:
        for kind in KINDS:
            plan = plan_of(model, kind)
            totals = [plan.on_device(n_devices, SHAPE).total for n_devices in N_DEVICES]
            yield row(model, kind, [f"{total / 1e9:.1f}" for total in totals])


def batch_lines(models=MODELS):
    """Yield the lines of a table: the largest batch of all devices together."""
    machines = []
    for n_devices in N_DEVICES:
        machines += [(n_devices, memory) for memory in MEMORY]
    titles = [f"{n_devices} x {memory}" for n_devices, memory in machines]
    yield "| model | base | " + " | ".join(titles) + " |"
    yield "|---|---|" + "---|" * len(titles)
    for model in models:
        for kind in KINDS:
            plan = plan_of(model, kind)
            cells = []
            for n_devices, memory in machines:
                largest = plan.largest_batch(n_devices, SHAPE, 1e9 * memory)
                cells.append(f"{largest * n_devices:,}" if largest else "-")
            yield row(model, kind, cells)


def by_hand_lines():
    """Yield the lines of a table: the plan by hand beside the plan by this program."""
    titles = "GB by hand for 1 / 8 / 32 devices | GB as planned | activations in the plan, GB"
    yield f"| model | base | {titles} |"
    yield "|---|---|---|---|---|"
    for (model, kind), expected in BY_HAND.items():
        plan = plan_of(model, kind)
        totals = [plan.on_device(n_devices, SHAPE).total for n_devices in BY_HAND_DEVICES]
        planned = " / ".join(f"{total / 1e9:.1f}" for total in totals)
        activations = plan.activations(SHAPE)
        by_hand = " / ".join(map(str, expected))
        yield row(model, kind, [by_hand, planned, f"{activations / 1e9:.1f}"])


def row(model, kind, cells):
    return "| " + " | ".join([model, kind or "bfloat16", *cells]) + " |"


if __name__ == "__main__":
    main()
