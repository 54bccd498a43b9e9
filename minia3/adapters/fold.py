"""Fold a vector into the weight or the bias of its linear.

A product is computed in float32 at least, and rounded once to the dtype of the weight.

Shapes: D width of what is scaled.
"""

import torch

from minia3.model.site_names import SITES

# Entries of a weight that are multiplied at once. So few stay in the processor's cache, which makes
# folding 6 times as fast.
N_AT_ONCE = 1 << 18


def fold(name, weight, vectors):
    """Return the parameter `name` with its vector folded in; if it has none, `weight` itself.

    vectors: name -> (D,). Raise ValueError if the product is not finite in the weight's dtype.
    """
    l_D = vector_of(name, vectors)
    if l_D is None:
        return weight
    return fold_vector(name, weight, l_D)


def fold_rows(name, parameter, vectors, shards):
    """Return what `fold` returns, but only this process's rows of a divided parameter."""
    vector = vector_of(name, vectors)
    rows = parameter.detach().to_local()
    if vector is None or len(rows) == 0:
        return rows
    if not scales_columns(name):
        vector = vector[shards.rows(len(parameter))]
    return fold_vector(name, rows, vector.to(rows.device))


def scales_columns(name):
    """Return whether a vector scales the columns of the parameter `name`: its linear's input.

    l_ff does. All other vectors scale the output of a linear, which is the rows of its weight.
    """
    return name.endswith(".down.weight")


def fold_vector(name, weight, l_D):
    """Return the parameter `name`, which is `weight`, scaled by l_D. Raise the errors of `fold`."""
    factor = l_D
    if name.endswith(".weight") and not scales_columns(name):
        factor = l_D.unsqueeze(1)
    factor = factor.expand_as(weight)
    folded = torch.empty_like(weight)
    n_rows = max(N_AT_ONCE // weight[0].numel(), 1)
    parts = zip(weight.split(n_rows), factor.split(n_rows), folded.split(n_rows), strict=True)
    for weight_rows, factor_rows, folded_rows in parts:
        # The factor is float32, so the product is, too; `out` rounds it.
        torch.mul(weight_rows, factor_rows, out=folded_rows)
    check_folded(name, folded)
    return folded


def check_folded(name, folded):
    """Raise ValueError unless all numbers of the parameter `name` are finite after folding."""
    smallest, largest = folded.aminmax()  # a NaN would be both
    if not (smallest.isfinite() and largest.isfinite()):
        found = f"{name} with the adapter folded in is not finite in {folded.dtype}"
        raise ValueError(f"{found}: use a wider dtype")


def vector_of(name, vectors):
    """Return the vector that scales the parameter `name`, or None.

    name: such as "blocks.0.attn.k.weight". vectors: name -> (D,).
    """
    module, _, _ = name.rpartition(".")  # weight or bias
    place, _, linear = module.rpartition(".")
    for site, scaled_linear in SITES.items():
        if linear == scaled_linear and f"{place}.l_{site}" in vectors:
            return vectors[f"{place}.l_{site}"]
    return None
