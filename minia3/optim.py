"""Chapter 9, the optimiser: Adafactor as T-Few uses it (Shazeer & Stern 2018, arXiv 1804.04235), row by row.

T-Few trains with transformers' Adafactor(scale_parameter=True, relative_step=False, no momentum, no weight decay). A
vector's second moment is not factored, so the whole update, for one row l of gradient g at step t, is

    v <- beta v + (1 - beta) (g^2 + 1e-30)         beta = 1 - t^-0.8
    u  = g / sqrt(v)
    l <- l - lr max(1e-3, rms(l)) u / max(1, rms(u))

Means are over a row alone, so that adapters trained side by side do what each would do alone: given a whole table,
torch's and transformers' Adafactor factor and clip across its rows. Below it, the schedule, and which vectors train.

Shapes: A adapters (rows), D width of a vector.
"""

import re

import torch

from minia3.ia3 import vectors
from minia3.sites import CHOICES, add_sites, places


class Adafactor:
    """What the loop asks of an optimiser. Not a torch.optim.Optimizer: the first one loads torch's compiler, 1 s."""

    def __init__(self, params, lr):
        self.param_groups = [{"params": list(params), "lr": lr}]
        self.state = {table: {} for table in self.param_groups[0]["params"]}

    def state_dict(self):
        return {"state": dict(enumerate(self.state.values())), "param_groups": [{"lr": self.param_groups[0]["lr"]}]}

    def load_state_dict(self, saved):
        self.param_groups[0]["lr"] = saved["param_groups"][0]["lr"]
        for i, table in enumerate(self.state):
            state = saved["state"].get(i, {})
            self.state[table] = state | ({"v_AD": state["v_AD"].to(table)} if state else {})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for l_AD in (table for table in group["params"] if table.grad is not None):
                state = self.state[l_AD]
                if not state:
                    state.update(step=0, v_AD=torch.zeros_like(l_AD))
                state["step"] += 1
                beta = 1 - state["step"] ** -0.8
                state["v_AD"].mul_(beta).add_(l_AD.grad.square() + 1e-30, alpha=1 - beta)
                u_AD = l_AD.grad * state["v_AD"].rsqrt()
                u_AD /= rms(u_AD).clamp(min=1.0)
                l_AD -= group["lr"] * rms(l_AD).clamp(min=1e-3) * u_AD


def rms(x_AD):
    return x_AD.square().mean(dim=-1, keepdim=True).sqrt()


def learning_rate(step, config):
    """Linear from 0 to the peak, then linear to 0. As in T-Few, whose first step therefore changes nothing."""
    warmup = round(config.warmup_ratio * config.steps)
    if step < warmup:
        return config.lr * step / warmup
    return config.lr * (config.steps - step) / (config.steps - warmup)


def select(model, sites, layers, cross):
    """Freeze the vectors outside of `sites` ("k,v,ff"), `layers` ("0-5,20-") and, if not `cross`, of cross-attention.

    -> name -> parameter of the others; those of sites.py are added to the model, where need be. Raises ValueError where
    a site or a layer has none, where there is no cross-attention to leave out, and for a text of another form.
    """
    chosen, missing, parts, used = set(), {*sites.split(",")}, set(), set()
    spans = [re.fullmatch(r"(\d+)(-?)(\d*)", text) for text in layers.split(",")]
    if not all(spans):
        raise ValueError(f"--layers {layers!r}: expected numbers and spans, as in 0-5,20-")
    for name in {**vectors(model), **places(model)}:
        layer, part, site = re.search(r"blocks\.(\d+)\.(\w+)\.l_(\w+)$", name.replace("l_wi", "l_gate")).groups()
        inside = {x for x in spans if int(x[1]) <= int(layer) <= int(x[3] or (layer if x[2] else x[1]))}
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
