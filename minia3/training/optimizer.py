"""To be written."""

import torch


class Adafactor:
    """What the loop asks of an optimiser. Not a torch.optim.Optimizer: the first one loads torch's compiler, 1 s."""

    def __init__(self, params, lr):
        self.param_groups = [{"params": list(params), "lr": lr}]
        self.state = {table: {} for table in self.param_groups[0]["params"]}

    def state_dict(self):
        return {
            "state": dict(enumerate(self.state.values())),
            "param_groups": [{"lr": self.param_groups[0]["lr"]}],
        }

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
