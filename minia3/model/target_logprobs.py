"""Log-probabilities of target tokens, from what the head reads.

A vocabulary has 32,000 to 256,000 tokens, so the logits of long targets would be the largest tensor
of a step. So they are computed for some tokens at a time. If the head is frozen, training keeps no
logit for the backward pass:

    z = W x                                  the logits of one token, from the head's weight W
    log p(t) = z_t - log sum_v exp(z_v)      the log-probability of the target t
    d log p(t) / dz = onehot(t) - p
    d log p(t) / dx = W^T (onehot(t) - p)

d log p / dx does not depend on the loss, so the forward pass computes it at once, while the logits
exist. The backward pass multiplies each token's gradient by one number, the gradient of the loss
with respect to its log-probability.

Shapes: T tokens, D model, V vocabulary.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from minia3.model.recompute import recompute

# Logits that may exist at once: 64 MB in float32. A product of fewer rows would leave a GPU waiting
# for the weights of the head.
MAX_LOGITS = 1 << 24

# The same on a CPU: 16 MB in float32. When a block of 32 MB or more is freed, the C library gives
# it back to the system, and the next part would wait for new, zeroed pages.
MAX_LOGITS_ON_CPU = 1 << 22

# Logits that a CPU turns into gradients at once, so that they stay in its caches: 1 MB in float32.
CACHED_LOGITS = 1 << 18


def target_logprobs(x_TD, head_VD, target_T):
    """Return (T,): the log-probability of each target, in float32 at least.

    x_TD: what the head reads at the token before each target. head_VD: the head's weight. If it
    trains (in full fine-tuning), the logits are kept for the backward pass, or, if they are many,
    computed again.
    """
    max_logits = MAX_LOGITS_ON_CPU if x_TD.device.type == "cpu" else MAX_LOGITS
    n_at_once = max(1, max_logits // len(head_VD))

    score = plain_logprobs
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        if x_TD.requires_grad and not head_VD.requires_grad:
            score = _WithGradient.apply
        elif len(x_TD) > n_at_once:
            score = partial(recompute, plain_logprobs)
    parts = zip(x_TD.split(n_at_once), target_T.split(n_at_once), strict=True)
    return torch.cat([score(x, head_VD, target) for x, target in parts])


def plain_logprobs(x_TD, head_VD, target_T):
    """Return what `target_logprobs` returns, with all logits at once."""
    logits_TV = widen(F.linear(x_TD, head_VD))
    return -F.cross_entropy(logits_TV, target_T, reduction="none")


class _WithGradient(torch.autograd.Function):
    """`plain_logprobs`, and the gradient of each with respect to its row of x_TD."""

    @staticmethod
    def forward(ctx, x_TD, head_VD, target_T):
        logits_TV = F.linear(x_TD, head_VD)
        n_at_once = len(x_TD)
        if x_TD.device.type == "cpu":
            n_at_once = max(1, CACHED_LOGITS // len(head_VD))
        target_T1 = target_T.unsqueeze(1)
        logp_T1 = torch.empty_like(target_T1, dtype=wide_dtype(x_TD))
        parts = [tensor.split(n_at_once) for tensor in (logits_TV, target_T1, logp_T1)]
        for logits, target, logp in zip(*parts, strict=True):
            replace_with_gradient(logits, target, logp)
        ctx.save_for_backward(logits_TV @ head_VD)
        return logp_T1.squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_T):
        (gradient_TD,) = ctx.saved_tensors
        return (grad_T.unsqueeze(1) * gradient_TD).to(gradient_TD.dtype), None, None


def replace_with_gradient(logits_TV, target_T1, logp_T1):
    """Write log p(t) into logp_T1, and overwrite the logits with its gradient.

    A second tensor of this size would be too large, so there is none.
    """
    logp_TV = widen(logits_TV).log_softmax(dim=-1)
    torch.gather(logp_TV, 1, target_T1, out=logp_T1)
    torch.mul(logp_TV.exp_(), -1, out=logits_TV)  # unlike torch.neg, this casts to 16 bits
    one_minus_p_T1 = -logp_T1.expm1()
    logits_TV.scatter_(1, target_T1, one_minus_p_T1.to(logits_TV.dtype))


def widen(x):
    """Return x in float32, or in its own dtype if that is wider."""
    return x.to(wide_dtype(x))


def wide_dtype(x):
    return torch.promote_types(x.dtype, torch.float32)
