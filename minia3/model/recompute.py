"""To be written."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

PLAIN = False  # True: the plain lines of blocks.py, whose results are the same, and for which autograd keeps more


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
        inputs = [
            x.detach().requires_grad_(n) for x, n in zip(ctx.saved_tensors, needed[1:], strict=True)
        ]
        with torch.enable_grad():
            out = ctx.function(*inputs)
        wanted = [x for x, n in zip([ctx.weight, *inputs], needed, strict=True) if n]
        grads = iter(torch.autograd.grad(out, wanted, grad))
        return None, *(next(grads) if n else None for n in needed)


class DroppedAttention(torch.autograd.Function):
    """dropout(softmax(q k^T * scale + bias)) v. Of the weights, which are dropped is kept, a byte for each."""

    @staticmethod
    def forward(ctx, q_BHLK, k_BHMK, v_BHMK, bias_BHLM, scale, rate):
        p_BHLM = weights(q_BHLK, k_BHMK, bias_BHLM, scale)
        noise_BHLM = torch.empty_like(p_BHLM).bernoulli_(1 - rate)
        ctx.save_for_backward(q_BHLK, k_BHMK, v_BHMK, bias_BHLM, noise_BHLM.bool())
        ctx.scale, ctx.rate = scale, rate
        return p_BHLM.mul_(noise_BHLM).to(v_BHMK.dtype) @ v_BHMK / (1 - rate)

    @staticmethod
    def backward(ctx, grad_BHLK):
        q_BHLK, k_BHMK, v_BHMK, bias_BHLM, kept_BHLM = ctx.saved_tensors
        p_BHLM, grad_BHLK = (
            weights(q_BHLK, k_BHMK, bias_BHLM, ctx.scale),
            grad_BHLK / (1 - ctx.rate),
        )
        noise_BHLM = kept_BHLM.to(p_BHLM.dtype)
        grad_v_BHMK = (p_BHLM * noise_BHLM).to(v_BHMK.dtype).mT @ grad_BHLK
        p_times_grad_BHLM = noise_BHLM.mul_(grad_BHLK @ v_BHMK.mT).mul_(
            p_BHLM
        )  # in place: room that is new is slow
        grad_s_BHLM = p_times_grad_BHLM.sub_(
            p_BHLM.mul_(p_times_grad_BHLM.sum(-1, keepdim=True))
        )  # the softmax's
        grad_bias = grad_s_BHLM.sum_to_size(bias_BHLM.shape) if ctx.needs_input_grad[3] else None
        grad_s_BHLM = grad_s_BHLM.to(q_BHLK.dtype)
        grad_q_BHLK, grad_k_BHMK = (
            grad_s_BHLM @ k_BHMK * ctx.scale,
            grad_s_BHLM.mT @ q_BHLK * ctx.scale,
        )
        return grad_q_BHLK, grad_k_BHMK, grad_v_BHMK, grad_bias, None, None


def weights(q_BGNK, k_BGMK, bias, scale):
    """softmax(q k^T * scale + bias), in float32 at least."""
    wide = torch.promote_types(q_BGNK.dtype, torch.float32)
    scores_BGNM = (q_BGNK.to(wide) * scale) @ k_BGMK.to(wide).mT
    return (scores_BGNM if bias is None else scores_BGNM.add_(bias)).softmax(-1)


def attention(q_BHLK, k_BGMK, v_BGMK, *, attn_mask, dropout_p, is_causal, scale, enable_gqa):
    """F.scaled_dot_product_attention, but for two cases in which a CPU's is poor.

    Under dropout (T5's) it takes more time, and keeps the weights several times, in float32. And for one query, as in
    decoding, it is 2 to 9 times as slow in bfloat16 as the equation, written out. (The query heads of a group are its
    queries then: a mask may be of the head only where each has keys of its own.)
    """
    if not PLAIN and q_BHLK.device.type == "cpu" and not torch.compiler.is_compiling():
        if dropout_p and torch.is_grad_enabled() and not is_causal and not enable_gqa:
            return DroppedAttention.apply(q_BHLK, k_BGMK, v_BGMK, attn_mask, scale, dropout_p)
        if (
            q_BHLK.shape[2] == 1
            and q_BHLK.dtype.itemsize == 2
            and not (dropout_p or torch.is_grad_enabled())
        ):
            q_BGNK = q_BHLK.reshape(*k_BGMK.shape[:2], -1, q_BHLK.shape[3])
            p_BGNM = weights(q_BGNK, k_BGMK, attn_mask, scale)
            return (p_BGNM.to(v_BGMK.dtype) @ v_BGMK).view_as(q_BHLK)
    how = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    return F.scaled_dot_product_attention(q_BHLK, k_BGMK, v_BGMK, attn_mask, **how)


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
        along_BL1 = (weighted_BLD * unit_BLD).mean(
            -1, keepdim=True
        )  # growing x does not change its direction
        grad_x_BLD = ((weighted_BLD - unit_BLD * along_BL1) * r_BL1).to(x_BLD.dtype)
        grad_weight_D = (
            (grad_BLD * unit_BLD).sum_to_size(weight_D.shape) if ctx.needs_input_grad[1] else None
        )
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
