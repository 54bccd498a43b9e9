"""Chapter 2, beside the blocks: functions that compute what plain lines compute, and keep less for the backward.

Shapes: B batch, L query length, M memory length, D model, H query heads, G key/value heads, N query heads of each of
them, K head width.
"""

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

PLAIN = False  # True: the plain lines of blocks.py, whose results are the same, and for which autograd keeps more


def keeps_less():
    return torch.is_grad_enabled() and not PLAIN


class Recomputed(torch.autograd.Function):
    """function(*inputs), of which the inputs alone are kept: the backward computes it again, with the same dropout.

    `weight` is the parameter that the function uses; an input may be None. (torch.utils.checkpoint does the same, once
    it has loaded torch's compiler, for two seconds and 100 MB.)
    """

    @staticmethod
    def forward(ctx, function, weight, *inputs):
        ctx.function, ctx.weight, ctx.random = function, weight, torch.get_rng_state()
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    def backward(ctx, grad):
        needed = ctx.needs_input_grad[1:]
        inputs = [x if x is None else x.detach() for x in ctx.saved_tensors]
        for x, n in zip(inputs, needed[1:], strict=True):
            if n:
                x.requires_grad_()
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            torch.set_rng_state(ctx.random)
            out = ctx.function(*inputs)
        wanted = [x for x, n in zip([ctx.weight, *inputs], needed, strict=True) if n]
        grads = iter(torch.autograd.grad(out, wanted, grad))
        return None, *(next(grads) if n else None for n in needed)


def attention(q_BHLK, k_BGMK, v_BGMK, *, attn_mask, dropout_p, scale, **options):
    """F.scaled_dot_product_attention, but for two cases in which a CPU's is poor.

    Under dropout it keeps the weights, in float32: here it is computed again. And for one query, as in decoding, it is
    2 to 9 times as slow in bfloat16 as the equation, written out (the query heads of a group are its queries; so a mask
    may be of the head only where each has keys of its own).
    """
    function = partial(F.scaled_dot_product_attention, dropout_p=dropout_p, scale=scale, **options)
    if not PLAIN and q_BHLK.device.type == "cpu" and not torch.compiler.is_compiling():
        if torch.is_grad_enabled() and dropout_p:
            return Recomputed.apply(function, None, q_BHLK, k_BGMK, v_BGMK, attn_mask)
        if not torch.is_grad_enabled() and q_BHLK.shape[2] == 1 and q_BHLK.dtype.itemsize == 2:
            q_BGNK = q_BHLK.reshape(*k_BGMK.shape[:2], -1, q_BHLK.shape[3])
            scores_BGNM = (q_BGNK.float() * scale) @ k_BGMK.float().mT
            p_BGNM = (scores_BGNM if attn_mask is None else scores_BGNM + attn_mask).softmax(-1).to(v_BGMK.dtype)
            return (p_BGNM @ v_BGMK).view_as(q_BHLK)
    return function(q_BHLK, k_BGMK, v_BGMK, attn_mask)


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
