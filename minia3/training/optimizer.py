"""The optimizer and the learning rate of T-Few.

Adafactor (Shazeer & Stern 2018, arXiv 1804.04235), with the options that T-Few passes to
transformers' Adafactor: relative_step=False, scale_parameter=True, warmup_init=False. At step t,
for a vector l with the gradient g:

    beta_t = 1 - t^-0.8
    v_t    = beta_t v_(t-1) + (1 - beta_t) (g^2 + 1e-30)
    u_t    = g / sqrt(v_t), divided by max(1, its RMS)
    l_t    = l_(t-1) - lr max(RMS(l_(t-1)), 1e-3) u_t

So an update has an RMS of at most 1, and a step is relative to the size of l: this is why the
parameter is l, which is about 1, and not l - 1. There is no momentum. The paper factors the v of a
matrix into rows and columns; the v of a vector has nothing to factor.

Shapes: A adapters, D entries of a vector.
"""

import torch


class Adafactor:
    """Adafactor for tables of vectors. Each row is a vector, and no row depends on another.

    This has the interface of a torch.optim.Optimizer, but it is not one, because creating the first
    torch.optim.Optimizer of a process loads torch's compiler, which takes a second.
    """

    def __init__(self, parameters, lr=3e-3):
        self.param_groups = [{"params": list(parameters), "lr": lr}]
        self.state = {l_AD: {} for l_AD in self.param_groups[0]["params"]}

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for l_AD in group["params"]:
                if l_AD.grad is not None:
                    self.update(l_AD, group["lr"])

    def update(self, l_AD, lr):
        """Update one table by the equations above."""
        state = self.state[l_AD]
        if not state:
            state["step"] = 0
            state["v_AD"] = torch.zeros_like(l_AD)
        state["step"] += 1
        beta = 1 - state["step"] ** -0.8
        state["v_AD"].mul_(beta).add_(l_AD.grad.square() + 1e-30, alpha=1 - beta)
        u_AD = l_AD.grad * state["v_AD"].rsqrt()
        u_AD /= rms(u_AD).clamp(min=1.0)
        l_AD -= lr * rms(l_AD).clamp(min=1e-3) * u_AD

    def zero_grad(self):
        """Forget the gradients, as torch's optimizers do."""
        for group in self.param_groups:
            for l_AD in group["params"]:
                l_AD.grad = None

    def state_dict(self):
        lr = self.param_groups[0]["lr"]
        return {"state": dict(enumerate(self.state.values())), "param_groups": [{"lr": lr}]}

    def load_state_dict(self, saved):
        self.param_groups[0]["lr"] = saved["param_groups"][0]["lr"]
        for i, l_AD in enumerate(self.state):
            state = dict(saved["state"].get(i, {}))  # empty before the first step
            if state:
                state["v_AD"] = state["v_AD"].to(l_AD)
            self.state[l_AD] = state


def rms(x_AD):
    """Return (A, 1): the root mean square of each row."""
    return x_AD.square().mean(dim=-1, keepdim=True).sqrt()


def make_optimizer(parameters, config):
    """Return the optimizer of the flags. By default (IA)^3 trains with Adafactor, as in T-Few."""
    name = config.optimizer
    if name is None:
        name = "adafactor" if config.method == "ia3" else "adamw"
    if name == "adafactor":
        return Adafactor(parameters, lr=config.lr)
    return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)


def learning_rate(step, config):
    """Return the learning rate of a step, counted from 0: linear from 0 to the peak, then to 0.

    As in T-Few, the rate of step 0 is 0 if there is a warm-up, so the first step changes nothing.
    """
    warmup_steps = round(config.warmup_ratio * config.steps)
    if step < warmup_steps:
        return config.lr * step / warmup_steps
    return config.lr * (config.steps - step) / (config.steps - warmup_steps)
