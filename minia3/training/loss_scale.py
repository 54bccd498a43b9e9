"""The loss scale of float16, with which small gradients do not become zero.

In float16 a number below 3e-8 is zero, and once a model fits its data, many gradients of its
activations are as small as that. So a backward pass begins with a gradient of 128 instead of 1, and
the gradients of the parameters, which are float32, are divided by 128 before they are used
(Micikevicius et al. 2018, arXiv 1710.03740, section 3.2). A larger scale would come near the end of
float16, 65,504, when a model is wrong and certain.
"""

import torch

LOSS_SCALE = 128.0


def choose_loss_scale(dtype, device):
    """Return a tensor (), the gradient with which `loss.backward` begins, or None, which means 1.

    dtype: of the weights.
    """
    if dtype != torch.float16:
        return None
    return torch.tensor(LOSS_SCALE, device=device)


def unscale(parameters):
    """Divide the gradients of parameters by the loss scale of float16."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients:  # there are none if no loss counted
        torch._foreach_div_(gradients, LOSS_SCALE)
