"""What training and decoding take on a device: time, memory, and how large a model may be."""

import bisect

import torch

from minia3.checkpoints.known_models import KNOWN_MODELS
from minia3.inference.decoding import generate
from tests.benchmarks.inference import Ids
from tests.benchmarks.measure import Roof, count_flops
from tests.benchmarks.memory import measured, n_parameters
from tests.gpu.numbers import seconds_of
from tests.gpu.place import expect_at_most

MODELS = ("t5-base", "t5-large", "t0-3b", "llama-3.2-1b", "llama-2-7b")
LENGTHS = (128,) * 8


def performance(place):
    """Tokens per second of training and decoding, the share of the roof, and the peak memory."""
    roof = Roof(torch.bfloat16, 256 if place.is_dry else 8192, place.device)
    peak_flops = roof.flops / seconds_of(roof, place, 20)
    figures = {"roof, FLOP/s": peak_flops}
    for name in MODELS:
        try:
            figures[name] = performance_of(name, place, peak_flops)
        except torch.OutOfMemoryError:
            figures[name] = "out of memory"
    return figures


def performance_of(name, place, peak_flops):
    model = place.model(name, torch.bfloat16)
    batch = place.batch(model, LENGTHS, n_choices=1)
    if place.module is not None:
        place.module.reset_peak_memory_stats(place.device)
    n_steps = 1 if place.is_dry else 10

    def step():
        return place.gradients(model, batch)

    step()
    seconds = seconds_of(step, place, n_steps)
    n_read = int(batch.mask_BM.sum() + batch.target_mask_BCL.sum())
    peak = 0 if place.module is None else place.module.max_memory_allocated(place.device)
    n_tokens = 4 if place.is_dry else 32
    prompts = [[5, 6, 7, 8] * (2 if place.is_dry else 32)] * 8

    def write():
        return generate(model, Ids(), prompts, max_new_tokens=n_tokens)

    n_written = sum(len(text.split()) for text in write())  # a text may end early
    seconds_of_tokens = seconds_of(write, place, 1)
    return {
        "training, tokens/s": n_read / seconds,
        "training, share of the roof": count_flops(step) / seconds / peak_flops,
        "training, peak bytes": peak,
        "decoding, tokens/s": n_written / seconds_of_tokens,
    }


def largest(place):
    """The largest known model that trains with 8 sources of 128 tokens in bfloat16."""
    if place.is_dry:
        limit = 4 * 10**9  # torch built for CUDA takes half of it, even without a GPU
        names = ["t5-small", "llama-2-7b"]
    else:
        limit = place.module.get_device_properties(place.device).total_memory
        names = list(KNOWN_MODELS)
    names.sort(key=n_parameters)
    tried = {}

    def is_too_large(name):
        config = KNOWN_MODELS[name].config
        shape = (1, 16) if place.is_dry else (8, 128)
        given = config, torch.bfloat16, *shape, True
        found = measured(*given, device=place.device.type, limit=limit)
        tried[name] = "out of memory" if found is None else found
        return found is None

    n_fitting = bisect.bisect_left(names, True, key=is_too_large)
    expect_at_most(1, n_fitting, "no model trains: the number that do")
    return {"limit": limit, "largest": names[n_fitting - 1], "bytes": tried}
