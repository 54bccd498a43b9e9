"""To be written."""

import re
import threading

from torch import nn

from minia3.model.blocks import Block
from minia3.model.ia3 import IA3, vectors

# The vector l_... -> the linear whose output it scales; ff: whose input. The first three are in the blocks. wi is the
# gate where there is no up beside it (T5 v1.0); --sites calls it gate too.
SITES = {
    "k": "k",
    "v": "v",
    "ff": "down",
    "q": "q",
    "o": "o",
    "up": "up",
    "gate": "gate",
    "wi": "gate",
}
CHOICES = tuple(site for site in SITES if site != "wi")  # what --sites takes
LINEARS = tuple(dict.fromkeys(SITES.values()))  # all linears of a block
CALL = (
    threading.local()
)  # its `rows`: of the block's call that is under way; threads may share a model


class Scaled(nn.Linear):
    """What such a linear becomes, in its place and with its W: each example is scaled by its own adapter's row."""

    def forward(self, x_BLD):
        rows, y = getattr(CALL, "rows", None), super().forward(x_BLD)
        if (
            rows is None
        ):  # the block's call had begun when the vector was added: none of its adapters has one
            return y
        # (1,), or (B,): where rows of a batch share a source, cross-attention sees them as one
        return self.l(y, rows if len(rows) == 1 else rows.reshape(len(x_BLD), -1)[:, 0])


class ScaledBlock(Block):
    """What the block around them becomes, which says whose rows come."""

    def forward(self, x_BLD, context, cache, asked=True):
        CALL.rows = context.adapter_B
        try:
            return super().forward(x_BLD, context, cache, asked)
        finally:
            CALL.rows = None


def places(model):
    """Our name of each vector that there may be beside the paper's -> the linear whose output it scales."""
    found = {}
    for name, linear in model.named_modules():
        parent, _, kind = name.rpartition(".")
        if kind in ("q", "o", "up", "gate") and type(linear) in (nn.Linear, Scaled):
            wi = kind == "gate" and model.get_submodule(parent).up is None
            found[f"{parent}.l_{'wi' if wi else kind}"] = linear
    return found


def add_sites(model, names):
    """Add those vectors of `names` that are `places` without one: all ones, a row for each adapter."""
    like = next(iter(vectors(model).values()))
    for name, linear in places(model).items():
        if name in names and type(linear) is nn.Linear:
            if "forward" in vars(model.get_submodule(name.rsplit(".", 2)[0])):
                raise ValueError(
                    f"{name}: its block's forward is another already: add vectors before it is changed"
                )
            (block, part, attribute), vector = (
                name.rsplit(".", 2),
                IA3(linear.out_features, model.n_adapters).to(like),
            )
            vector.requires_grad_(like.requires_grad)
            model.get_submodule(f"{block}.{part}").add_module(attribute, vector)
            linear.__dict__["l"] = vector  # not as its own module: a vector has one name
            linear.__class__, model.get_submodule(block).__class__ = Scaled, ScaledBlock


def select_vectors(model, sites, layers, cross):
    """Freeze the vectors outside of `sites` ("k,v,ff"), `layers` ("0-5,20-") and, if not `cross`, of cross-attention.

    -> name -> parameter of the others; those of sites.py are added to the model, where need be. Raises ValueError where
    a site or a layer has none, where there is no cross-attention to leave out, and for a text of another form.
    """
    chosen, missing, parts, used = set(), {*sites.split(",")}, set(), set()
    spans = [re.fullmatch(r"(\d+)(-?)(\d*)", text) for text in layers.split(",")]
    if not all(spans):
        raise ValueError(f"--layers {layers!r}: expected numbers and spans, as in 0-5,20-")
    for name in {**vectors(model), **places(model)}:
        layer, part, site = re.search(
            r"blocks\.(\d+)\.(\w+)\.l_(\w+)$", name.replace("l_wi", "l_gate")
        ).groups()
        inside = {
            x for x in spans if int(x[1]) <= int(layer) <= int(x[3] or (layer if x[2] else x[1]))
        }
        parts.add(part)
        if inside and site in sites.split(",") and (cross or part != "cross"):
            chosen.add(name)
            missing.discard(site)
            used |= inside
    if lacking := sorted(missing) or [x[0] for x in spans if x not in used]:
        found = f"of --sites {sites!r} in --layers {layers!r}, {','.join(lacking)!r} has no vectors in this model"
        raise ValueError(f"{found}: expected some of {','.join(CHOICES)}, and layers as in 0-5,20-")
    if not (cross or "cross" in parts):
        raise ValueError("--no-cross is for models with cross-attention, and this one has none")
    add_sites(model, chosen)
    for name, vector in vectors(model).items():
        vector.requires_grad_(name in chosen)
    return {name: vector for name, vector in vectors(model).items() if name in chosen}
