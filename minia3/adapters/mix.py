"""To be written."""

import torch

MIX = {
    "average": lambda l_PD, w_P1: 1 + (w_P1 * (l_PD - 1)).sum(0),  # 1 + sum_i w_i (l_i - 1)
    "product": lambda l_PD, w_P1: (1 + w_P1 * (l_PD - 1)).prod(0),  # prod_i (1 + w_i (l_i - 1))
    "power": lambda l_PD, w_P1: (l_PD**w_P1).prod(0),  # prod_i l_i ** w_i, for positive entries
}


def mix(parts, how="average"):
    """One adapter out of several, by an equation of MIX. parts: a list of (vectors, weight) -> vectors.

    1 changes nothing, and vectors that an adapter lacks count as ones. Raises ValueError for adapters of different
    architectures or widths, and, saying where, for entries that are not positive (power) or come out infinite.
    """
    if how not in MIX or not parts:
        raise ValueError(
            f"expected adapters and one of {', '.join(MIX)}, found {len(parts)} adapters and {how!r}"
        )
    mixed, w_P1 = {}, torch.tensor([[weight] for _, weight in parts], dtype=torch.float64)
    for name in dict.fromkeys(name for vectors, _ in parts for name in vectors):
        first, d = (
            next(iter(mixed), name),
            {len(vectors[name]) for vectors, _ in parts if name in vectors},
        )
        if len(d) > 1 or name.startswith("blocks.") != first.startswith("blocks."):
            raise ValueError(
                f"adapters of different bases do not mix: {first}, and {name} of {sorted(d)} entries"
            )
        l_PD = torch.stack([vectors.get(name, torch.ones(*d)) for vectors, _ in parts]).double()
        mixed[name] = MIX[how](l_PD, w_P1).float()
        bad = ~mixed[name].isfinite() | (how == "power") & (l_PD <= 0).any(0)
        for i in bad.nonzero()[:1].flatten().tolist():
            raise ValueError(
                f"{name} at {i}: the {how} of {l_PD[:, i].tolist()} is not a finite number"
            )
    return mixed
