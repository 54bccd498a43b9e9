"""Chapter 2, beside the blocks: functions that compute what plain lines compute, and keep less for the backward.

Shapes: B batch, L length, D model.
"""

from dataclasses import replace

import torch
from torch.utils.checkpoint import checkpoint

PLAIN = False  # True: the plain lines of blocks.py, whose gradients are the same, and for which autograd keeps more


def keeps_less():
    return torch.is_grad_enabled() and not PLAIN


class Recomputed(torch.autograd.Function):
    """function(*inputs), of which the inputs alone are kept: the backward computes it again.

    `weight` is the parameter that the function uses. (torch.utils.checkpoint does the same, once it has loaded torch's
    compiler, for two seconds and 100 MB.)
    """

    @staticmethod
    def forward(ctx, function, weight, *inputs):
        ctx.function, ctx.weight = function, weight
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    def backward(ctx, grad):
        needed = ctx.needs_input_grad[1:]
        inputs = [x.detach().requires_grad_(n) for x, n in zip(ctx.saved_tensors, needed[1:], strict=True)]
        with torch.enable_grad():
            out = ctx.function(*inputs)
        wanted = [x for x, n in zip([ctx.weight, *inputs], needed, strict=True) if n]
        grads = iter(torch.autograd.grad(out, wanted, grad))
        return None, *(next(grads) if n else None for n in needed)


class RMSNormed(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight, computed in float32 at least; x and a number a token are kept."""

    @staticmethod
    def forward(ctx, x_BLD, weight_D, eps):
        wide_BLD = x_BLD.to(torch.promote_types(x_BLD.dtype, torch.float32))
        r_BL1 = (wide_BLD.square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x_BLD, weight_D, r_BL1)
        return (wide_BLD * r_BL1 * weight_D).to(x_BLD.dtype)

    @staticmethod
    def backward(ctx, grad_BLD):
        x_BLD, weight_D, r_BL1 = ctx.saved_tensors
        unit_BLD = x_BLD * r_BL1
        weighted_BLD = grad_BLD * weight_D.to(r_BL1.dtype)
        along_BL1 = (weighted_BLD * unit_BLD).mean(-1, keepdim=True)  # growing x does not change its direction
        grad_x_BLD = ((weighted_BLD - unit_BLD * along_BL1) * r_BL1).to(x_BLD.dtype)
        grad_weight_D = (grad_BLD * unit_BLD).sum_to_size(weight_D.shape) if ctx.needs_input_grad[1] else None
        return grad_x_BLD, grad_weight_D, None


def checkpointed(forward):
    """A block's `forward` that keeps its input, and what later steps ask of its cache: all else is computed again."""

    def run(x, context, cache, asked=True):
        if not torch.is_grad_enabled():
            return forward(x, context, cache, asked)

        before = replace(cache)  # what the second time begins with too

        def once(x):
            own = replace(before)
            return forward(x, context, own, asked), own.kv

        out, cache.kv = checkpoint(once, x, use_reentrant=False)
        cache.length = cache.kv[0].shape[2]
        return out

    return run
