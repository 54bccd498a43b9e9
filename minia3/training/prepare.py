"""To be written."""

import torch

from minia3.model.blocks import Attention, Block
from minia3.model.recompute import checkpointed


def prepare_model(model, config):
    """How the model's modules are to train, as the flags say."""
    if config.compile:
        torch._dynamo.config.cache_size_limit = (
            64  # graphs of a block: first or last, padded or not, training or not
        )
    for module in model.modules():
        if config.dropout is not None and isinstance(module, torch.nn.Dropout | Attention):
            setattr(module, "dropout" if isinstance(module, Attention) else "p", config.dropout)
        if config.checkpoint and isinstance(module, Block):
            module.forward = checkpointed(module.forward)
        if config.compile and isinstance(module, Block):
            module.compile(dynamic=True)
