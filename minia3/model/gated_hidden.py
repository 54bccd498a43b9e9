"""The inside of a gated feed-forward, l_ff * activation(gate) * up, and its backward pass.

Autograd would keep four tensors for these products, and its backward pass would write several more,
each as large. Here, only gate and up are kept, and a CPU computes the gradients of a few tokens at
a time, so that what it needs for them stays in its cache.

    out = a * up * l        a = activation(gate)
    dup = dout * a * l      dgate = activation'(gate) * dout * up * l      dl = sum(dout * a * up)

(Here dx is the gradient of x.)

Shapes: B batch, L length, F feed-forward.
"""

from functools import reduce

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from minia3.model.recompute import N_IN_CACHE


def gated_hidden(ffn, gate_BLF, up_BLF, adapter_B):
    """Return ffn.hidden(gate, up, adapter) (B, L, F). Keep gate and up for the backward pass.

    ffn: a gated FeedForward (blocks.py). Its vectors are looked up again in the backward pass, so
    the rows of adapter_B must not change before it. If no gradient is recorded, this overwrites
    gate_BLF, so the caller must not use it afterwards. torch.compile decides for itself what to
    keep, so it gets the plain lines.
    """
    records_gradient = torch.is_grad_enabled()
    if records_gradient and not torch.compiler.is_compiling():
        return _GatedHidden.apply(ffn, gate_BLF, up_BLF, adapter_B, ffn.l_ff.scale)
    return ffn.hidden(gate_BLF, up_BLF, adapter_B, in_place=not records_gradient)


class _GatedHidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ffn, gate_BLF, up_BLF, adapter_B, _):
        """The last argument, l_ff's parameter, is there so that autograd asks for its gradient."""
        ctx.ffn = ffn
        ctx.save_for_backward(gate_BLF, up_BLF, adapter_B)
        return ffn.hidden(gate_BLF, up_BLF, adapter_B, in_place=False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BLF):
        gate_BLF, up_BLF, adapter_B = ctx.saved_tensors
        grad_gate_BLF = gate_BLF.new_empty(gate_BLF.shape)
        grad_up_BLF = up_BLF.new_empty(up_BLF.shape)
        with torch.enable_grad():
            l_BF = ctx.ffn.l_ff.rows(adapter_B)
        tensors = (grad_BLF, gate_BLF, up_BLF, grad_gate_BLF, grad_up_BLF)
        pieces = pieces_of_examples(tensors, l_BF.detach().to(gate_BLF.dtype))
        grads_of_l = [gradients(ctx.ffn.activation, *piece) for piece in pieces]

        grad_scale = None
        if l_BF.requires_grad:
            is_shared = len(l_BF) == 1
            grad_l_BF = reduce(torch.add, grads_of_l) if is_shared else torch.cat(grads_of_l)
            (grad_scale,) = torch.autograd.grad(l_BF, ctx.ffn.l_ff.scale, grad_l_BF)
        return None, grad_gate_BLF, grad_up_BLF, None, grad_scale


def pieces_of_examples(tensors, l_BF):
    """Yield some examples of all tensors (B, L, F) and their vectors, then the next, and so on.

    l_BF: a vector for each example, or one for all of them (1, F). On a CPU, what is computed from
    a piece stays in the cache. Elsewhere, the only piece is the whole batch. So it is in a plan of
    memory (memory_plan.py): its fake tensors are those of a CPU, but it has to hold for a GPU.
    """
    is_shared = len(l_BF) == 1
    if is_shared:  # then a long text can be cut, too: each of its tokens is an example
        tensors = [x.flatten(0, 1).unsqueeze(1) for x in tensors]
    n_examples = max(len(tensors[0]), 1)
    n_at_once = n_examples
    if l_BF.device.type == "cpu" and not isinstance(l_BF, FakeTensor):
        n_at_once = max(N_IN_CACHE // max(tensors[0][:1].numel(), 1), 1)
    for first in range(0, n_examples, n_at_once):
        rows = slice(first, first + n_at_once)
        yield [x[rows] for x in tensors], l_BF if is_shared else l_BF[rows]


def gradients(activation, tensors, l_BF):
    """Write the gradients of gate and up, and return that of l, in float32 or wider.

    tensors: the gradient of the result, gate, up, and where to write the gradients of these two.
    """
    grad_BLF, gate_BLF, up_BLF, grad_gate_BLF, grad_up_BLF = tensors
    l_B1F = l_BF.unsqueeze(1)
    product_BLF = grad_BLF * activation.apply(gate_BLF, False)
    torch.mul(product_BLF, l_B1F, out=grad_up_BLF)
    axes = (0, 1) if len(l_BF) == 1 else (1,)
    wide = torch.promote_types(l_BF.dtype, torch.float32)
    grad_l_BF = product_BLF.mul_(up_BLF).sum(axes, dtype=wide).view_as(l_BF)

    # The first product is done with, and new memory would be as large, so this overwrites it.
    torch.mul(grad_BLF, up_BLF, out=product_BLF)
    torch.mul(activation.gradient(product_BLF, gate_BLF), l_B1F, out=grad_gate_BLF)
    return grad_l_BF
