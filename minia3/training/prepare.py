"""Set up a model's modules for training: dropout, recomputation, compilation."""

import torch

from minia3.checkpoints.hub import find
from minia3.checkpoints.load import read_checkpoint
from minia3.model.blocks import blocks_of
from minia3.model.recompute import recompute_blocks


def check_model(name_or_path):
    """Raise ValueError if there is no such model, or none that can run. Read no weights."""
    read_checkpoint(find(name_or_path, weights=False), weights=False)


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
        torch._dynamo.config.cache_size_limit = 64
        for block in blocks:
            block.compile(dynamic=True)
