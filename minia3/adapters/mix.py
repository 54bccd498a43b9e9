"""Mixing: one adapter out of several, by an equation for each entry.

In all three equations, an entry of 1 changes nothing, and so does a weight of 0.

Shapes: P adapters that are mixed (parts), D width of a vector.
"""

import torch

from minia3.files.messages import plural


def average(l_PD, weight_P1):
    """Return 1 + sum_i w_i (l_i - 1)."""
    return 1 + (weight_P1 * (l_PD - 1)).sum(0)


def product(l_PD, weight_P1):
    """Return prod_i (1 + w_i (l_i - 1))."""
    return (1 + weight_P1 * (l_PD - 1)).prod(0)


def power(l_PD, weight_P1):
    """Return prod_i l_i ** w_i, for positive entries."""
    return (l_PD**weight_P1).prod(0)


MIX = {"average": average, "product": product, "power": power}


def mix(parts, equation="average"):
    """Return the vectors (name -> (D,) float32) of a mixture.

    parts: a list of (vectors, weight). equation: a name of MIX. A vector that an adapter lacks
    counts as ones. Arithmetic is in float64.

    Raise ValueError for adapters of different architectures or widths, for a weight or a result
    that is not finite, and for entries that are not positive in a power.
    """
    if equation not in MIX or not parts:
        expected = f"expected adapters and one of {', '.join(MIX)}"
        n_parts = f"{len(parts)} {plural(len(parts), 'adapter')}"
        raise ValueError(f"{expected}, found {n_parts} and {equation!r}")
    weight_P1 = torch.tensor([[weight] for _, weight in parts], dtype=torch.float64)
    if not weight_P1.isfinite().all():
        weights = weight_P1.flatten().tolist()
        raise ValueError(f"the weights are {weights}, expected finite numbers")
    mixed = {}
    for name in names_of_parts(parts):
        l_PD = stack_vectors(name, parts)
        if equation == "power":
            reason = "a power needs positive entries, found"
            refuse_entries(name, l_PD, l_PD <= 0, reason)
        l_D = MIX[equation](l_PD, weight_P1).float()
        reason = f"not finite: the {equation} of"
        refuse_entries(name, l_PD, ~l_D.isfinite(), reason)
        mixed[name] = l_D
    return mixed


def refuse_entries(name, l_PD, is_wrong, reason):
    """Raise ValueError if entries are wrong. The message says what each part has at the first.

    is_wrong: (D,), or (P, D).
    """
    wrong = is_wrong.nonzero()[:, -1].tolist()
    if wrong:
        i = min(wrong)
        entries = l_PD[:, i].tolist()
        raise ValueError(f"{name} at {i}: {reason} {entries}")


def names_of_parts(parts):
    """Return the names of all vectors, in order. Raise ValueError if the architectures differ."""
    names = []
    for vectors, _ in parts:
        names += vectors
    for name in names:
        # LLaMA's vectors are "blocks...", T5's are "encoder.blocks..." or "decoder.blocks...".
        if name.startswith("blocks.") != names[0].startswith("blocks."):
            refuse(f"{names[0]}, and {name}")
    return list(dict.fromkeys(names))


def stack_vectors(name, parts):
    """Return (P, D) float64: the vector of each part. Raise ValueError if the widths differ."""
    present = [vectors[name] for vectors, _ in parts if name in vectors]
    widths = sorted({len(vector) for vector in present})
    if len(widths) > 1:
        refuse(f"{name} of {widths} entries")
    identity = torch.ones_like(present[0])
    return torch.stack([vectors.get(name, identity) for vectors, _ in parts]).double()


def refuse(found):
    raise ValueError(f"adapters of different bases do not mix: {found}")
