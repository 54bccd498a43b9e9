"""Optimizers for vectors, and T-Few's learning rate.

A table holds one vector for several adapters, each in its row. What an adapter's row becomes does
not depend on the other rows, but all rows and all tables of one width are updated by the same few
operations: 25 adapters take as many operations as two.

Shapes: T tables, N tables of the same width, A adapters (rows of a table), R rows that train, D
entries of a vector.
"""

from collections import defaultdict

import torch

from minia3.model.to_device import to_device


class RowOptimizer:
    """What the optimizers of tables have in common. A subclass has the equations in `new_values`.

    new_values(g_NRD, l_NRD, *moments, lr, steps) returns the new l_NRD and its new moments. g_NRD:
    the gradients. lr: one number, or (R, 1): see `per_row`. steps: a list, how many steps each row
    has taken, including this one.

    This has the interface of a torch.optim.Optimizer, but it is not one, because creating the first
    torch.optim.Optimizer of a process loads torch's compiler, which takes about a second and 75 MB.
    """

    moments = ()  # the names of what an optimizer keeps of each table besides its number of steps

    def __init__(self, parameters, lr=3e-3):
        self.param_groups = [{"params": list(parameters), "lr": lr}]
        self.state = {l_AD: {} for l_AD in self.tables}  # empty before the first step of a table

    @property
    def tables(self):
        return self.param_groups[0]["params"]

    def clip(self, max_norm):
        """Scale the gradient of each row down to the norm `max_norm`, if its norm is larger.

        The norm of a row is over all tables. For each row this is torch.nn.utils.clip_grad_norm_.
        """
        tables = [l_AD for l_AD in self.tables if l_AD.grad is not None]
        if tables:  # there are none before the first backward pass
            clip_rows(tables, max_norm)

    @torch.no_grad()
    def step(self, rates=None):
        """Update the rows. rates: a dict from each row that trains to its learning rate.

        Other rows keep their bits. None: all rows train at the rate of the parameter group.
        """
        for tables in self.group_tables():
            rates_here = rates
            if rates is None:
                rates_here = dict.fromkeys(range(len(tables[0])), self.param_groups[0]["lr"])
            self.update(tables, rates_here)

    def group_tables(self):
        """Return lists of tables that are updated together.

        They have one shape, and their rows have taken the same numbers of steps. A table without a
        gradient is left out, and stays as it is.
        """
        alike = defaultdict(list)
        for l_AD in self.tables:
            if l_AD.grad is not None:
                steps = self.initialized_state(l_AD)["steps"]
                alike[l_AD.shape, tuple(steps)].append(l_AD)
        return list(alike.values())

    def initialized_state(self, l_AD):
        """Return the state of a table: the steps of each row, and the moments."""
        state = self.state[l_AD]
        if not state:
            state["steps"] = [0] * len(l_AD)
            state.update({name: torch.zeros_like(l_AD) for name in self.moments})
        return state

    def update(self, tables, rates):
        """Update rows of tables that are alike, and the moments and steps of these rows."""
        states = [self.state[l_AD] for l_AD in tables]
        rows = sorted(rates)
        steps = list(states[0]["steps"])
        for row in rows:
            steps[row] += 1

        # One stack (N, A, D) of the tables, and one of each of their moments.
        tensors_of_stacks = [tables]
        for name in self.moments:
            tensors_of_stacks.append([state[name] for state in states])
        stacks = [torch.stack(tensors) for tensors in tensors_of_stacks]
        g_NAD = torch.stack([l_AD.grad for l_AD in tables])

        trained = slice(None)  # all rows
        if len(rows) < len(steps):
            trained = to_device(torch.tensor(rows), g_NAD.device)
        lr = per_row([rates[row] for row in rows], g_NAD)
        steps_of_rows = [steps[row] for row in rows]
        values = [x_NAD[:, trained] for x_NAD in stacks]
        new_values = self.new_values(g_NAD[:, trained], *values, lr=lr, steps=steps_of_rows)

        for tensors, x_NAD, new_NRD in zip(tensors_of_stacks, stacks, new_values, strict=True):
            x_NAD[:, trained] = new_NRD
            torch._foreach_copy_(tensors, x_NAD.unbind())
        for state in states:
            state["steps"] = steps

    def zero_grad(self):
        """Forget the gradients, as torch's optimizers do."""
        for l_AD in self.tables:
            l_AD.grad = None

    def state_dict(self):
        lr = self.param_groups[0]["lr"]
        return {"state": dict(enumerate(self.state.values())), "param_groups": [{"lr": lr}]}

    def load_state_dict(self, saved):
        """Continue from what `state_dict` has returned, perhaps on another device.

        Raise ValueError if it is the state of other tables, or of another kind of optimizer.
        """
        self.check_states(saved["state"])
        self.param_groups[0]["lr"] = saved["param_groups"][0]["lr"]
        for i, l_AD in enumerate(self.tables):
            state = dict(saved["state"][i])  # empty before the first step
            for name in self.moments:
                if name in state:
                    state[name] = state[name].to(l_AD, copy=True)
            self.state[l_AD] = state

    def check_states(self, states):
        """Raise ValueError unless these are the states of such tables: number -> its state."""
        expected = f"expected what {type(self).__name__} keeps of {len(self.tables)} tables"
        if len(states) != len(self.tables):
            raise ValueError(f"{expected}, found {len(states)} states")
        for i, l_AD in enumerate(self.tables):
            moments = {name: x for name, x in states[i].items() if name != "steps"}
            found = {name: tuple(getattr(x, "shape", ())) for name, x in moments.items()}
            shapes = {name: tuple(l_AD.shape) for name in self.moments}
            if states[i] and found != shapes:
                raise ValueError(f"{expected}: {shapes} of table {i}, found {found}")


class Adafactor(RowOptimizer):
    """Adafactor (Shazeer & Stern 2018, arXiv 1804.04235) for tables of vectors.

    parameters: tables (A, D), such as the values of `vectors(model)`. Each row is a vector of its
    own. lr: how far a step goes, relative to the size of a vector.

    The options are those that T-Few passes to transformers' Adafactor: relative_step=False,
    scale_parameter=True, warmup_init=False. At step t, for a vector l with the gradient g:

        beta_t = 1 - t^-0.8
        v_t    = beta_t v_(t-1) + (1 - beta_t) (g^2 + 1e-30)
        u_t    = g / sqrt(v_t), divided by max(1, its RMS)
        l_t    = l_(t-1) - lr max(RMS(l_(t-1)), 1e-3) u_t

    So an update has an RMS of at most 1, and a step is relative to the size of l: this is why the
    parameter is l, which is about 1, and not l - 1. There is no momentum. The paper factors the v
    of a matrix into rows and columns; the v of a vector has nothing to factor.
    """

    moments = ("v_AD",)

    def new_values(self, g_NRD, l_NRD, v_NRD, *, lr, steps):
        beta = per_row([1 - t**-0.8 for t in steps], g_NRD)
        share = per_row([t**-0.8 for t in steps], g_NRD)  # 1 - beta, in full precision
        v_NRD = beta * v_NRD + share * (g_NRD.square() + 1e-30)
        u_NRD = g_NRD * v_NRD.rsqrt()
        u_NRD = u_NRD / rms(u_NRD).clamp(min=1.0)
        l_NRD = l_NRD - lr * rms(l_NRD).clamp(min=1e-3) * u_NRD
        return l_NRD, v_NRD


class AdamW(RowOptimizer):
    """AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101) for tables of vectors.

    The numbers are torch's defaults, and w is the weight decay. At step t, for a vector l with the
    gradient g:

        m_t = 0.9 m_(t-1) + 0.1 g
        v_t = 0.999 v_(t-1) + 0.001 g^2
        u_t = m_t / (1 - 0.9^t), divided by sqrt(v_t / (1 - 0.999^t)) + 1e-8
        l_t = l_(t-1) - lr w l_(t-1) - lr u_t
    """

    moments = ("m_AD", "v_AD")

    def __init__(self, parameters, lr=3e-3, weight_decay=0.0):
        super().__init__(parameters, lr)
        self.weight_decay = weight_decay

    def new_values(self, g_NRD, l_NRD, m_NRD, v_NRD, *, lr, steps):
        m_NRD = 0.9 * m_NRD + 0.1 * g_NRD
        v_NRD = 0.999 * v_NRD + 0.001 * g_NRD.square()
        mean_NRD = m_NRD / per_row([1 - 0.9**t for t in steps], g_NRD)
        square_NRD = v_NRD / per_row([1 - 0.999**t for t in steps], g_NRD)
        u_NRD = mean_NRD / (square_NRD.sqrt() + 1e-8)
        l_NRD = l_NRD - lr * self.weight_decay * l_NRD - lr * u_NRD
        return l_NRD, m_NRD, v_NRD


class TorchAdamW:
    """torch's AdamW for LoRA and full fine-tuning, whose cells have the model to themselves.

    It has those methods of a RowOptimizer that a run calls.
    """

    def __init__(self, parameters, lr, weight_decay):
        self.parameters = list(parameters)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=weight_decay)

    def clip(self, max_norm):
        torch.nn.utils.clip_grad_norm_(self.parameters, max_norm)

    def step(self, rates):
        """rates: a dict with the learning rate of the only cell."""
        (rate,) = rates.values()
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()

    def state_dict(self):
        return self.optimizer.state_dict()

    def load_state_dict(self, saved):
        self.optimizer.load_state_dict(saved)


@torch.no_grad()
def clip_rows(tables, max_norm):
    """Scale the gradient of each row of the tables down to the norm `max_norm`, if it is larger."""
    by_shape = defaultdict(list)
    for l_AD in tables:
        by_shape[l_AD.shape].append(l_AD)
    gradients = {}  # of tables of one shape (N, A, D)
    norms = {}  # of each row of a table
    for shape, alike in by_shape.items():
        gradients[shape] = torch.stack([l_AD.grad for l_AD in alike])
        norm_NA = torch.linalg.vector_norm(gradients[shape], dim=-1)
        norms.update(zip(alike, norm_NA.unbind(), strict=True))

    # In the order of the tables, because the bits of a sum depend on the order.
    norm_TA = torch.stack([norms[l_AD] for l_AD in tables])
    norm_A1 = torch.linalg.vector_norm(norm_TA, dim=0)[:, None]
    scale_A1 = (max_norm / (norm_A1 + 1e-6)).clamp(max=1.0)
    for shape, alike in by_shape.items():
        clipped = (gradients[shape] * scale_A1).unbind()
        torch._foreach_copy_([l_AD.grad for l_AD in alike], clipped)


def per_row(numbers, like):
    """Return one number if all rows share it, else a tensor (R, 1) on the device of `like`.

    A number goes to a GPU as part of an operation, but a tensor must be copied there.
    """
    if len(set(numbers)) == 1:
        return numbers[0]
    return to_device(torch.tensor(numbers, dtype=like.dtype)[:, None], like.device)


def rms(x_NRD):
    """Return (N, R, 1): the root mean square of each row."""
    return x_NRD.square().mean(dim=-1, keepdim=True).sqrt()


def make_optimizer(parameters, config):
    """Return the optimizer of the flags. By default (IA)^3 trains with Adafactor, as in T-Few."""
    if config.method != "ia3":
        return TorchAdamW(parameters, config.lr, config.weight_decay)
    if config.optimizer == "adamw":
        return AdamW(parameters, config.lr, config.weight_decay)
    return Adafactor(parameters, config.lr)


def learning_rate(step, config):
    """Return the learning rate of a step, counted from 0: linear from 0 to the peak, then to 0.

    As in T-Few, the rate of step 0 is 0 if there is a warm-up, so the first step changes no vector,
    but only what the optimizer keeps. T-Few's code does not round the number of warm-up steps.
    """
    warmup_steps = round(config.warmup_ratio * config.steps)
    if step < warmup_steps:
        return config.lr * step / warmup_steps
    return config.lr * (config.steps - step) / (config.steps - warmup_steps)
