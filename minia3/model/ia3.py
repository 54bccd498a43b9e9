"""(IA)^3: three learned vectors per layer that rescale a frozen transformer.

    softmax( Q (l_k * K)^T / sqrt(d) ) (l_v * V)        self-attention and cross-attention
    ( l_ff * act(x W_1) ) W_2                            feed-forward

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context
Learning", arXiv 2205.05638, section 3.3. T5 leaves out the sqrt(d).

Every vector starts at one, so a model starts as a bit-exact copy of the pre-trained model. (T-Few
first pre-trains the vectors on T0's mixture, section 3.4. `--adapter` starts from such vectors.)

One model holds many adapters: row `a` of every vector belongs to adapter `a`.

Shapes: B batch, L length, D width of what is scaled, A adapters (rows).
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from minia3.model.recompute import scale_keeping_result


class IA3(nn.Module):
    """One vector: a row of `d` factors per adapter. Each example is scaled by its adapter's row.

    The rows are float32 whatever the dtype of the model, because small updates must survive (in
    bfloat16, 1 + 0.003 is 1). They are cast to the dtype of the activations when they are used.

    keeps_result: if true, `forward` overwrites x, and keeps its result for the backward pass. This
    takes no memory if attention keeps the result anyway.
    """

    def __init__(self, d, n_adapters=1, keeps_result=False):
        super().__init__()
        self.keeps_result = keeps_result
        self.scale = nn.Parameter(torch.ones(n_adapters, d, dtype=torch.float32))

    def forward(self, x_BLD, adapter_B):
        """Return x * l (B, L, D). This may overwrite x, so the caller must not use x afterwards.

        adapter_B: the row of each example (B,), or one row for all of them (1,).
        """
        l_BD = self.rows(adapter_B)
        # Each branch below returns x * l. They differ only in the memory that the result takes.
        if not torch.is_grad_enabled():
            return x_BLD.mul_(l_BD.to(x_BLD.dtype).unsqueeze(1))  # new memory would take time
        if self.keeps_result:
            return scale_keeping_result(x_BLD, l_BD)  # the product below, in the memory of x
        return x_BLD * l_BD.to(x_BLD.dtype).unsqueeze(1)

    def rows(self, adapter_B):
        """Return the vector l of each example (B, D), or of all (1, D), in float32 or wider."""
        # This is self.scale[adapter_B], but a GPU need not sort the rows in the backward pass.
        return F.embedding(adapter_B, self.scale)

    def _apply(self, fn, recurse=True):
        """Do what `model.to(...)` or `model.half()` asks for, but keep float32 or wider rows."""
        return super()._apply(partial(keep_wide, fn), recurse)


def keep_wide(fn, x):
    """Return fn(x), but in float32 if fn makes it narrower than that."""
    new = fn(x)
    if new.dtype.itemsize < torch.float32.itemsize:
        return x.to(new.device, torch.float32)
    return new


# The attributes in which torch.compile(model) and DistributedDataParallel(model) keep the model
WRAPPED_AT = ("_orig_mod", "module")


def refuse_wrapper(model):
    """Raise ValueError if the model is in a wrapper, because all names would have a prefix."""
    for attribute in WRAPPED_AT:
        if attribute in model._modules:
            found = f"found the model in the wrapper {type(model).__name__}"
            raise ValueError(f"{found}, expected the model itself: give its `.{attribute}`")


def vectors(model):
    """Return a dict from the name of each vector to its parameter (A, D), in module order.

    Raise ValueError if the model is in a wrapper, such as that of torch.compile.
    """
    refuse_wrapper(model)
    found = {}
    find_vectors(model, "", found)
    return found


def find_vectors(module, prefix, found):
    """Add the vectors inside a module to `found`. prefix: what their names begin with."""
    # `named_modules` takes twice as long, and the walk is a fifth of loading an adapter.
    for name, child in module._modules.items():
        if isinstance(child, IA3):
            found[prefix + name] = child._parameters["scale"]
        elif child is not None and child._modules:
            find_vectors(child, f"{prefix}{name}.", found)


def freeze(model):
    """Let only the (IA)^3 vectors require a gradient. They are found by type, not by name.

    Raise ValueError if the model is in a wrapper, such as that of torch.compile.
    """
    trained = vectors(model).values()
    model.requires_grad_(False)
    for vector in trained:
        vector.requires_grad_(True)
