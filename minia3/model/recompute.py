"""Save memory in the backward pass: keep the inputs, and compute what follows from them again.

Autograd keeps every tensor that a backward pass reads. Three places keep fewer tensors, each with
one call that replaces the plain line: norms (`rms_norm`), scaled keys and values
(`scale_keeping_result`) and, if the user asks for it with --recompute, whole blocks
(`recompute_blocks`). Three more have files of their own: gated feed-forwards (gated_hidden.py),
the logits (target_logprobs.py), and attention on a CPU (plain_attention.py).

Shapes: B batch, L length, D width of the model, or of what is scaled, R rows.
"""

import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch.autograd.function import BackwardCFunction, once_differentiable
from torch.utils.checkpoint import checkpoint

# Of so many entries, the copies that a function makes stay in the cache of a CPU's core.
N_IN_CACHE = 2**17


def recompute(function, *inputs):
    """Return function(*inputs), and keep only `inputs` for the backward pass.

    The backward pass calls the function again. The function must return one tensor. Without
    gradients, and in torch.compile (which decides for itself what to recompute), this is the plain
    call.

    torch.utils.checkpoint does the same, but when it first runs, it imports torch's compiler, which
    takes about a second and 75 MB.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(*inputs)
    return _Recomputed.apply(function, *inputs)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, *inputs):
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    @once_differentiable  # the function runs again on inputs that are detached from their graph
    def backward(ctx, grad):
        need_grad = ctx.needs_input_grad[1:]
        inputs = []
        for x, needs in zip(ctx.saved_tensors, need_grad, strict=True):
            inputs.append(x.detach().requires_grad_(needs))
        with torch.enable_grad():
            out = ctx.function(*inputs)
        wanted = [x for x in inputs if x.requires_grad]
        grads = iter(torch.autograd.grad(out, wanted, grad))
        return None, *(next(grads) if needs else None for needs in need_grad)


def rms_norm(x, weight_D, eps):
    """Return F.rms_norm(x, weight), and keep x and one number per row for the backward pass.

    x: (..., D), such as tokens (B, L, D), or the heads of queries (B, H, L, K).

    PyTorch's rms_norm also keeps a float32 copy of a bfloat16 x, if it is not fused. This function
    computes in float32 or wider. In bfloat16 the last bits may differ from PyTorch's, which some
    releases round on the way, and from those of transformers, which rounds before it multiplies by
    the weight.
    """
    # PyTorch 2.5 compiles its rms_norm again for each length of the texts.
    is_plain = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    # Of more entries, PyTorch's rms_norm takes twice as long on a CPU: see `normalized`.
    is_large = x.device.type == "cpu" and x.numel() > N_IN_CACHE
    if has_fused_norm(x.device) or (is_plain and not is_large):
        return F.rms_norm(x, weight_D.shape, weight_D, eps)
    if is_plain:
        out, _ = normalized(x, weight_D, eps)
        return out
    return _RMSNorm.apply(x, weight_D, eps)


def has_fused_norm(device):
    """Return whether PyTorch's rms_norm keeps no copy, because it is a single operator there.

    On CUDA it is, from torch 2.9 on: two launches forward and backward, instead of seventeen.
    """
    return device.type == "cuda" and hasattr(torch.ops.aten, "_fused_rms_norm_backward")


def normalized(x, weight_D, eps):
    """Return x * r * weight, and one number r per row (..., 1): 1 / sqrt(mean(x^2) + eps).

    This overwrites its own tensors (and not x), because on a CPU, new memory takes longer than the
    arithmetic: the system fills it with zeros.
    """
    wide_dtype = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(wide_dtype)
    r = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    r = r.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    if x.dtype == wide_dtype:  # then `wide` is x
        return (x * r).mul_(weight_D), r
    return wide.mul_(r).mul_(weight_D).to(x.dtype), r


def pieces(tensors):
    """Return a few rows (R, ...) of all `tensors` (..., D or 1), then the next ones, and so on.

    On a CPU, what is computed from a piece stays in the cache. Elsewhere, and in torch.compile, the
    only piece is the whole.
    """
    tensors = [x.reshape(-1, x.shape[-1]) for x in tensors]
    if tensors[0].device.type != "cpu" or torch.compiler.is_compiling():
        return [tensors]
    n_rows = max(N_IN_CACHE // tensors[0].shape[-1], 1)
    return zip(*(x.split(n_rows) for x in tensors), strict=True)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_D, eps):
        out, r = normalized(x, weight_D, eps)
        ctx.save_for_backward(x, weight_D, r)
        return out

    @staticmethod
    @once_differentiable  # a second derivative would take r for a constant, and r depends on x
    def backward(ctx, grad):
        x, weight_D, r = ctx.saved_tensors
        grad_x = x.new_empty(x.shape)
        grad_weight_D = None
        if ctx.needs_input_grad[1]:
            grad_weight_D = torch.zeros_like(weight_D, dtype=r.dtype)
        for grad_RD, x_RD, r_R1, grad_x_RD in pieces((grad, x, r, grad_x)):
            unit_RD = x_RD * r_R1
            weighted_RD = grad_RD * weight_D.to(r.dtype)
            # The part of the gradient along x drops out (but for a share of eps), because scaling x
            # hardly changes the result.
            along_R1 = (weighted_RD * unit_RD).mean(-1, keepdim=True)
            grad_x_RD.copy_(weighted_RD.addcmul_(unit_RD, along_R1, value=-1).mul_(r_R1))
            if grad_weight_D is not None:
                grad_weight_D += (grad_RD * unit_RD).sum_to_size(weight_D.shape)
        return grad_x, grad_weight_D, None


# What `scale_keeping_result` adds to each entry of a vector, so that no entry is 0, because the
# backward pass divides by it. The results differ by less than 1e-18 of what was scaled, and in
# bfloat16 and float32 mostly not at all.
TINY = 2.0**-60


def scale_keeping_result(x_BLD, l_BD):
    """Return x * l (B, L, D), in the dtype of x. Keep it for the backward pass, and not x.

    This overwrites x, so the caller must not use x afterwards. The gradient of l is the sum of
    grad * x, and x is the result divided by l.

    The result takes no more memory if what reads it next keeps it anyway: attention, or Qwen3's
    norm of keys. The keys of other LLaMAs are rotated next, and a GPU unpacks a padded batch next,
    which keeps nothing of them. There the result takes as much memory as x would.

    float16 has no number as small as TINY, torch.compile decides for itself what to keep, and x may
    not be overwritten if a backward hook of the user wraps it: all three get the plain product.
    """
    is_plain = x_BLD.dtype == torch.float16 or torch.compiler.is_compiling()
    if is_plain or not l_BD.requires_grad or is_view_of_function(x_BLD):
        return x_BLD * l_BD.to(x_BLD.dtype).unsqueeze(1)
    return _Scaled.apply(x_BLD, l_BD)


def is_view_of_function(x):
    """Return whether a Function in Python returned x as a view, which may not be overwritten.

    `register_full_backward_hook` puts such a Function around a module.
    """
    return x._is_view() and isinstance(x.grad_fn, BackwardCFunction)


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BLD, l_BD):
        l_BD = l_BD.to(x_BLD.dtype) + TINY
        out_BLD = x_BLD.mul_(l_BD.unsqueeze(1))
        ctx.mark_dirty(out_BLD)
        ctx.save_for_backward(out_BLD, l_BD)
        return out_BLD

    @staticmethod
    @once_differentiable  # otherwise second derivatives would silently be wrong
    def backward(ctx, grad_BLD):
        out_BLD, l_BD = ctx.saved_tensors
        axes = (1,)
        if len(l_BD) == 1:  # one row for the whole batch
            axes = (0, 1)
        wide = torch.promote_types(l_BD.dtype, torch.float32)
        grad_l = (grad_BLD * out_BLD).sum(axes, dtype=wide) / l_BD
        return grad_BLD * l_BD.unsqueeze(1), grad_l


def recompute_blocks(blocks):
    """Make each block keep only its input for the backward pass, beside what stays in its cache."""
    for block in blocks:
        # A partial is copied and pickled with its arguments, so a copy of the block runs the copy.
        block.forward = partial(_recomputed_forward, block)


def _recomputed_forward(block, x, context, cache, kv_only=False):
    """Do what `Block.forward` does, and keep less."""
    forward = partial(type(block).forward, block)
    if not torch.is_grad_enabled():
        return forward(x, context, cache, kv_only)

    before = copy.copy(cache)  # the second pass must start from the same cache as the first

    def run_once(x):
        cache_of_this_pass = copy.copy(before)
        out = forward(x, context, cache_of_this_pass, kv_only)
        return out, cache_of_this_pass.kv

    out, cache.kv = checkpoint(run_once, x, use_reentrant=False)
    cache.length = cache.kv[0].shape[2]
    return out
