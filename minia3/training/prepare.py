"""Set up a process and a model's modules for training: dropout, recomputation, compilation."""

from contextlib import suppress
from pathlib import Path

import torch

from minia3.checkpoints.hub import find
from minia3.checkpoints.load import read_checkpoint
from minia3.model.blocks import blocks_of
from minia3.model.recompute import recompute_blocks
from minia3.training.device import device_module


def check_model(name_or_path):
    """Raise ValueError if there is no such model, or none that can run. Read no weights."""
    read_checkpoint(find(name_or_path, weights=False), weights=False)


def forget_peak_memory(device):
    """Let the peak of memory (`peak_memory`) be that of what comes now.

    In a study or a notebook, runs follow each other in one process. macOS and Windows cannot forget
    the peak of a process, so there it is that of all runs so far.
    """
    module = device_module(device)
    if hasattr(module, "reset_peak_memory_stats"):
        with suppress(RuntimeError):  # nothing was allocated yet
            module.reset_peak_memory_stats(device)
    elif device.type == "cpu":
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def prepare_model(model, config):
    """Apply --dropout, --recompute and --compile to the modules of `model`."""
    blocks = blocks_of(model)
    if config.dropout is not None:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = config.dropout
    if config.recompute:
        recompute_blocks(blocks)
    if config.compile:
        # torch compiles a block for each kind of call: padded or not, training or not ...
        torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
        for block in blocks:
            block.compile(dynamic=True)
