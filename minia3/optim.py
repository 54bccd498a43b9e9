"""Chapter 9, the optimiser: Adafactor as T-Few uses it (Shazeer & Stern 2018, arXiv 1804.04235), row by row.

T-Few trains with transformers' Adafactor(scale_parameter=True, relative_step=False, no momentum, no weight decay). A
vector's second moment is not factored, so the whole update, for one row l of gradient g at step t, is

    v <- beta v + (1 - beta) (g^2 + 1e-30)         beta = 1 - t^-0.8
    u  = g / sqrt(v)
    l <- l - lr max(1e-3, rms(l)) u / max(1, rms(u))

Means are over a row alone, so that adapters trained side by side do what each would do alone: given a whole table,
torch's and transformers' Adafactor factor and clip across its rows.

Shapes: A adapters (rows), D width of a vector.
"""

import torch


class Adafactor(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for l_AD in (table for table in group["params"] if table.grad is not None):
                state = self.state[l_AD]
                if not state:
                    state["step"], state["v_AD"] = 0, torch.zeros_like(l_AD)
                state["step"] += 1
                beta = 1 - state["step"] ** -0.8
                state["v_AD"].mul_(beta).add_(l_AD.grad.square() + 1e-30, alpha=1 - beta)
                u_AD = l_AD.grad * state["v_AD"].rsqrt()
                u_AD /= rms(u_AD).clamp(min=1.0)
                l_AD -= group["lr"] * rms(l_AD).clamp(min=1e-3) * u_AD


def rms(x_AD):
    return x_AD.square().mean(dim=-1, keepdim=True).sqrt()
