"""To be written."""

import torch
from torch import nn


class IA3(nn.Module):
    """One row of `d` factors per adapter; each example of a batch is scaled by the row of its own adapter.

    The rows are float32 whatever the model's dtype, so that small updates are kept (in bfloat16, 1 + 0.003 is 1); they
    are rounded to the activations' dtype only where they are used.
    """

    def __init__(self, d, n_adapters=1):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(n_adapters, d, dtype=torch.float32))

    def forward(self, x_BLD, adapter_B):
        l_BD = self.scale[adapter_B].to(x_BLD.dtype)
        return x_BLD * l_BD.unsqueeze(1)


def vectors(model):
    """Name -> parameter (A, D) of every (IA)^3 vector of `model`, in the order of its modules."""
    return {name: module.scale for name, module in model.named_modules() if isinstance(module, IA3)}


def freeze(model):
    """Make the (IA)^3 vectors the only parameters of `model` that require a gradient: by type, not by name."""
    model.requires_grad_(False)
    for vector in vectors(model).values():
        vector.requires_grad_(True)
