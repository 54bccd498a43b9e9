"""How two sides are measured.

They alternate in one process, so that other work on the machine slows both of them. Memory is
counted in bytes: of the tensors that autograd keeps, or of a whole process.
"""

import ctypes
import gc
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from minia3.model import linear, plain_attention, recompute
from minia3.model.single_row import fast_products
from minia3.training.device import device_module
from tests.benchmarks.machine import n_others_busy
from tests.benchmarks.patched_mode import PatchedMode

aten = torch.ops.aten

LEAST_ROUNDS = 3
MOST_ROUNDS = 21
# A call is made again if the roof beside it was lower than this part of the best one,
LEAST_ROOF_OF_A_CALL = 0.8
# unless the row has taken so many times as long as planned.
MOST_PATIENCE = 3


@dataclass
class Row:
    """One row of the table. The names of its fields are those of the published JSON."""

    unit: str  # "s" or "B"
    ours: float  # a time is the median of the rounds
    theirs: float
    ratio: float  # theirs / ours: above 1, theirs takes more
    # Of times only. Quartiles say where the middle half of the rounds lies.
    ours_min: float | None = None
    ours_spread: list | None = None  # quartiles
    theirs_min: float | None = None
    theirs_spread: list | None = None  # quartiles
    spread: list | None = None  # quartiles of the ratios of the rounds
    rounds: int | None = None
    # Of times, what else the machine did in the same rounds:
    repeated: int | None = None  # calls that were made again, because the machine was slow
    calls: int | None = None  # all of them, without the roof
    others_busy: float | None = None  # threads of other processes that wanted a core, on average
    peak_flops: float | None = None  # per second, of the roof
    # Of times for which the number of tokens or of operations is known:
    tokens_per_second: float | None = None  # ours
    flops: int | None = None  # of one call of ours
    # Of times and bytes that have one:
    floor: float | None = None  # seconds or bytes that ours must take at least
    floor_of: str | None = None  # what takes them
    # Of times that have one:
    alone: float | None = None  # seconds of kernels of ours, when nothing else runs
    alone_of: str | None = None  # which kernels
    line: str | None = None  # which line it belongs to, with the model; older files do not say it
    # Of all lines; None if the line has no goal:
    goal: float | None = None  # of the ratio
    goal_share: float | None = None  # of the floor in our time

    @property
    def bound_of_alone(self):
        """The ratio that there would be if ours took just the time of those kernels alone."""
        return self.theirs / self.alone

    @property
    def share_of_alone(self):
        """What part of our time those kernels take alone."""
        return self.alone / self.ours

    @property
    def most_share(self):
        """What part of our time the floor would be if ours took just the time of those kernels."""
        return self.floor / self.alone

    @property
    def share(self):
        """What part of our time the floor is. For a step it is our FLOP/s as a part of the roof."""
        return self.floor / self.ours

    @property
    def bound(self):
        """The ratio that there would be if ours took just the time of the floor."""
        return self.theirs / self.floor

    def published(self):
        """Return the row as a dict for JSON, without the fields that it does not have."""
        fields = asdict(self)
        if self.floor is not None:
            fields["bound"] = self.bound
        if self.alone is not None:
            fields["bound_of_alone"] = self.bound_of_alone
        return {name: x for name, x in fields.items() if x is not None or name == "goal"}

    @classmethod
    def read(cls, published):
        """Return the Row of a dict that `published` made."""
        computed = ("bound", "bound_of_alone")
        return cls(**{name: x for name, x in published.items() if name not in computed})


@dataclass(frozen=True)
class Bench:
    """How the lines of a table are measured.

    seconds: how long the rounds of one row may take. There are 3 to 21 rounds, or one if `quick`.
    """

    quick: bool
    seconds: float
    roof: "Roof"

    @property
    def n_floor_rounds(self):
        """How often a floor is measured that takes no turns with the sides."""
        return 1 if self.quick else 5

    @property
    def n_processes(self):
        """How many processes of each side tell how much memory it takes."""
        return 1 if self.quick else 3

    def time(self, ours, theirs, alone=None, floor=None):
        """Time two functions, and return a Row.

        Two more functions take turns with them if they are given. `alone` runs kernels of `ours`
        and nothing else, and `floor` does what `ours` cannot do without.
        """
        sides = {"ours": ours, "theirs": theirs}
        if alone is not None:
            sides["alone"] = alone
        if floor is not None:
            sides["floor"] = floor
        n_rounds, seconds_to_take = self.plan_rounds(sides.values())
        timer = Timer(self.roof, seconds_to_take)
        # Planning has warmed up each side.
        times = alternate(sides, n_rounds, n_warm_ups=0, seconds_of=timer)
        row = summarize(times["ours"], times["theirs"])
        row.calls = timer.n_calls
        row.repeated = timer.n_calls - n_rounds * len(sides)
        if None not in timer.others_busy:
            row.others_busy = statistics.mean(timer.others_busy)
        row.peak_flops = self.roof.flops / statistics.median(timer.roofs)
        if alone is not None:
            row.alone = min(times["alone"])
        if floor is not None:
            row.floor = min(times["floor"])
        return row

    def time_below_roof(self, ours, theirs, n_tokens, with_kernels=False):
        """Return the Row of two functions, where the matrix products of `ours` are its floor.

        n_tokens: what one call of `ours` reads and writes.
        with_kernels: time the kernels of `ours` (see `Kernels`) alone, too.
        """
        kernels = record_kernels(ours, are_all=True) if with_kernels else None
        row = self.time(ours, theirs, alone=kernels)
        if with_kernels:
            row.alone_of = ALL_KERNELS
        row.tokens_per_second = n_tokens / row.ours
        row.flops = count_flops(ours)
        row.floor = row.flops / row.peak_flops
        row.floor_of = "roof"
        return row

    def plan_rounds(self, functions):
        """Return how many rounds of these functions fit, and the seconds that they may take.

        Calls each function, which also warms it up. The roof runs after each call.
        """
        if self.quick:
            return 1, 0
        roof = seconds(self.roof)
        seconds_of_a_round = sum(seconds(function) + roof for function in functions)
        n_that_fit = int(self.seconds / seconds_of_a_round)
        n_rounds = min(max(n_that_fit, LEAST_ROUNDS), MOST_ROUNDS)
        return n_rounds, MOST_PATIENCE * n_rounds * seconds_of_a_round


# Time


def seconds(function):
    """Return how long one call takes. It ends when the GPU has done all work."""
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def synchronize():
    if hasattr(torch, "accelerator") and torch.accelerator.is_available():  # from torch 2.6 on
        torch.accelerator.synchronize()
    elif torch.cuda.is_available():
        torch.cuda.synchronize()


class Timer:
    """Times calls. The roof runs between any two of them, and says how fast the machine is there.

    On a shared machine, other work slows each of two sides at other moments. So a call beside a
    slow roof does not count, and is made again. After `seconds_to_take`, every call counts.

    The roof also empties the caches, as the batch between two calls of a user would. A call of a
    millisecond is slower if it finds nothing there.
    """

    def __init__(self, roof, seconds_to_take):
        self.roof = roof
        self.end = time.monotonic() + seconds_to_take
        self.n_calls = 0
        self.last_roof = roof.seconds()
        # Of the calls that count:
        self.roofs = []  # seconds of the roof after the call
        self.others_busy = []  # threads of other processes that wanted a core then

    def __call__(self, function):
        """Return the seconds of a call that counts."""
        while True:
            n_seconds = seconds(function)
            others_busy = n_others_busy()
            before, self.last_roof = self.last_roof, self.roof.seconds()
            self.n_calls += 1
            slowest = max(before, self.last_roof)
            if slowest <= self.roof.least_seconds / LEAST_ROOF_OF_A_CALL or self.is_late():
                self.roofs.append(self.last_roof)
                self.others_busy.append(others_busy)
                return n_seconds

    def is_late(self):
        return time.monotonic() >= self.end


def alternate(sides, n_rounds, n_warm_ups=2, seconds_of=seconds):
    """Return the seconds of each round of each side. sides: name to function.

    Each round begins with the next side, so that none always goes first. The order is not reversed,
    because then a side would follow itself, and find its data in the caches.

    seconds_of: function that calls a side, and returns how long it took.
    """
    for _ in range(n_warm_ups):
        for function in sides.values():
            function()
    order = list(sides)
    times = {name: [] for name in sides}
    gc.collect()
    gc.disable()  # because a collection would fall into the time of one side
    try:
        for _ in range(n_rounds):
            for name in order:
                times[name].append(seconds_of(sides[name]))
            order.append(order.pop(0))
    finally:
        gc.enable()
    return times


def summarize(ours, theirs, unit="s"):
    """Return the Row of two lists of seconds or bytes, one for each round."""
    row = compare(statistics.median(ours), statistics.median(theirs), unit)
    row.ours_min = min(ours)
    row.ours_spread = middle_half(ours)
    row.theirs_min = min(theirs)
    row.theirs_spread = middle_half(theirs)
    row.spread = middle_half([b / a for a, b in zip(ours, theirs, strict=True)])
    row.rounds = len(ours)
    return row


def middle_half(values):
    """Return the quartiles between which the middle half of the values lies."""
    if len(values) == 1:
        return values * 2
    low, _, high = statistics.quantiles(values, n=4)
    return [low, high]


def compare(ours, theirs, unit):
    """Return the Row of two numbers, such as of bytes, which are the same in every round."""
    return Row(unit, ours, theirs, ratio=theirs / ours)


# Matrix products


class Roof:
    """A product of two (n, n) matrices. The FLOP/s that it reaches are the most to hope for."""

    def __init__(self, dtype, n, device="cpu"):
        self.a = torch.randn(n, n, device=device).to(dtype)
        self.b = torch.randn(n, n, device=device).to(dtype)
        self.flops = 2 * n**3
        self.least_seconds = math.inf  # of the fastest call so far

    def __call__(self):
        self.a @ self.b

    def seconds(self):
        """Return how long one call takes."""
        n_seconds = seconds(self)
        self.least_seconds = min(self.least_seconds, n_seconds)
        return n_seconds


# How the names of the kernels of attention begin: PyTorch's fused attention and its backward pass,
# and the batched products of attention that is written out.
ATTENTION = ("aten::_scaled_dot_product", "aten::bmm")

# The other operators that the equations ask for. Copies and casts are not among them.
ELEMENTWISE = (
    *(aten.mul, aten.mul_, aten.add, aten.add_, aten.sum, aten.exp_),
    *(aten._softmax, aten._log_softmax),
    *(aten.relu, aten.relu_, aten.threshold_backward),
    *(aten.silu, aten.silu_, aten.silu_backward),
)

ALL_KERNELS = "products, attention, norms, elementwise"


class Kernels(PatchedMode):
    """Records the matrix products that run inside of it. A call runs them alone.

    are_all: record attention, norms and elementwise operators, too. (A norm is several operators on
    a CPU, and is recorded as a whole.)

    Inputs are kept once for each shape, but weights all, because to read them is what takes time.
    Elementwise operators of one shape all read the same tensors, so they find these in the caches,
    just as an operator of a model finds there what the one before it wrote.
    """

    def __init__(self, are_all=False):
        super().__init__()
        self.are_all = are_all
        self.is_within = False  # a function that is recorded as a whole
        self.inputs = {}  # function and shapes: arguments
        self.ones = {}  # shape: a tensor that elementwise operators read or write
        self.calls = []  # (function, arguments, arguments by name)

    def replaced_functions(self):
        """Return functions that are recorded as a whole: (owner, name, function)."""
        weight_first = (linear, "linear_with_weight_first", self.record_weight_first)
        if not self.are_all:
            return (weight_first,)
        norm = recompute._RMSNorm
        backward = norm.backward

        def recorded_backward(context, grad):
            self.record(norm_backward, (grad, *context.saved_tensors))
            return self.run_within(backward, context, grad)

        return (
            weight_first,
            (F, "rms_norm", self.recorded(F.rms_norm)),
            (recompute, "normalized", self.recorded(normalized)),
            (norm, "backward", staticmethod(recorded_backward)),
            (plain_attention, "outputs_of_rows", self.recorded(outputs_of_rows)),
            (plain_attention, "gradients_of_rows", self.recorded(gradients_of_rows)),
        )

    def recorded(self, function):
        """Return a function that notes a call of `function`, and calls it."""

        def run(*args):
            self.record(function, args)
            return self.run_within(function, *args)

        return run

    def record_weight_first(self, x, weight):
        self.record_product(multiply_with_weight_first, x.flatten(0, -2), weight.T)
        return self.run_within(multiply_with_weight_first, x, weight.T)

    def run_within(self, function, *args):
        """Call a function that has been recorded, so its operators are not recorded again."""
        self.is_within = True
        out = function(*args)
        self.is_within = False
        return out

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.is_within:
            return func(*args, **kwargs)
        if func is aten.mm.default:
            self.record_product(func, *args)
        elif self.are_all and func.name().startswith(ATTENTION):
            self.record(func, args, kwargs)
        elif self.are_all and is_elementwise(func):
            self.record_elementwise(func, args, kwargs)
        return func(*args, **kwargs)

    def record_product(self, func, x, weight):
        """Note a product of an input (rows, I) and a weight (I, O)."""
        (x,), _ = self.first_of_shape(func, (x,), {})
        self.calls.append((func, (x, weight.detach()), {}))

    def record(self, func, args, kwargs=None):
        """Note a call whose inputs may be those of an earlier call with the same shapes."""
        self.calls.append((func, *self.first_of_shape(func, args, kwargs or {})))

    def first_of_shape(self, func, args, kwargs):
        """Return the arguments of the first call in which the tensors had these shapes."""
        shapes = [shape_of(x) for x in (*args, *kwargs.values())]
        detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
        return self.inputs.setdefault((func, *shapes), (detached, kwargs))

    def record_elementwise(self, func, args, kwargs):
        """Note a call on ones, because the product of two gradients may take longer (denormals)."""
        written = written_arguments(func)
        positional = [self.ones_like(x, i in written) for i, x in enumerate(args)]
        named = {name: self.ones_like(x, name in written) for name, x in kwargs.items()}
        self.calls.append((func, positional, named))

    def ones_like(self, x, is_written):
        """Return ones in place of a tensor, and anything else as it is."""
        if not isinstance(x, torch.Tensor):
            return x
        key = (*shape_of(x), is_written)
        if key not in self.ones:
            last = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
            ones = torch.ones(last + 1, dtype=x.dtype, device=x.device)
            self.ones[key] = ones.as_strided(x.shape, x.stride())
        return self.ones[key]

    @property
    def products(self):
        """The (input, weight) of each matrix product."""
        return [args for func, args, _ in self.calls if func in PRODUCTS]

    @torch.no_grad()
    def __call__(self):
        for func, args, kwargs in self.calls:
            if func is aten.mm.default:
                x, weight = args
                with fast_products(len(x), weight):
                    x @ weight
            else:
                func(*args, **kwargs)

    def least_seconds(self, bytes_per_second, flops_per_second):
        """Return the seconds that the products take at least.

        Each reads its weight from memory, and computes at the roof. The longer of the two counts.
        """
        n_seconds = 0
        for x, weight in self.products:
            reading = weight.nbytes / bytes_per_second
            computing = 2 * len(x) * weight.numel() / flops_per_second
            n_seconds += max(reading, computing)
        return n_seconds


def multiply_with_weight_first(x, weight):
    """Return x @ weight, computed as `Linear` does on a processor with tiles (model/linear.py)."""
    return LINEAR_WITH_WEIGHT_FIRST(x, weight.T)


LINEAR_WITH_WEIGHT_FIRST = linear.linear_with_weight_first  # `Kernels` replaces it for a while
PRODUCTS = (aten.mm.default, multiply_with_weight_first)

# `Kernels` also replaces these.
outputs_of_rows = plain_attention.outputs_of_rows
gradients_of_rows = plain_attention.gradients_of_rows
normalized = recompute.normalized


def norm_backward(grad, x, weight_D, r):
    """Compute the gradient of the input of a norm. x, weight, r: what the norm has kept."""
    recompute._RMSNorm.backward(NormContext(x, weight_D, r), grad)


class NormContext:
    """Stands in for the context that autograd gives to a norm. The weight is frozen."""

    needs_input_grad = (True, False, False)

    def __init__(self, *saved_tensors):
        self.saved_tensors = saved_tensors


def is_elementwise(func):
    """Return whether this is one of ELEMENTWISE. func: an operator of torch, or a function."""
    return getattr(func, "overloadpacket", None) in ELEMENTWISE


def written_arguments(func):
    """Return the positions and the names of the arguments that an operator writes into."""
    written = set()
    for i, argument in enumerate(func._schema.arguments):
        if argument.is_write:
            written |= {i, argument.name}
    return written


def shape_of(x):
    """Return shape, strides and dtype of a tensor, and any other argument as it is."""
    return (x.shape, x.stride(), x.dtype) if isinstance(x, torch.Tensor) else x


def record_kernels(function, are_all=False):
    """Return the Kernels of `function()`. To call them runs them alone."""
    with Kernels(are_all) as kernels:
        function()
    return kernels


def attention_flops(q_shape, k_shape, *_, **__):
    """Return the FLOPs of the two products of each query head.

    torch counts the fused attention of a GPU, but not yet that of a CPU.
    """
    return 4 * math.prod(q_shape) * k_shape[2]


def attention_backward_flops(_, q_shape, k_shape, *__, **___):
    """Return the FLOPs of five products per query head.

    They are the scores again, and the gradients of values, probabilities, queries and keys.
    """
    return 10 * math.prod(q_shape) * k_shape[2]


CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


def count_flops(function):
    """Return the FLOPs of all matrix products of `function()`, also of its backward pass."""
    # Imported here, because it loads torch's compiler, which processes that are measured do not.
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        function()
    return counter.get_total_flops()


# Memory


def kept_for_backward(forward, model):
    """Return the bytes of the tensors that autograd keeps of `forward()`.

    Each storage counts once, and the parameters of `model` do not count.
    """
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage  # which stays alive, so its address stays its own
        # Not x: an operation would hold its own result, and neither would ever be freed.
        return x.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


def peak_memory(device):
    """Return the most bytes that torch has held on the GPU, or this process in memory (Linux)."""
    module = device_module(torch.device(device))
    if module is not None:
        return module.max_memory_allocated(device)
    # VmHWM and not ru_maxrss, because the latter starts with the peak of the parent process.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM: memory is measured on Linux only")


def peak_beyond(function, device):
    """Return the bytes that `function()` takes at its peak beyond what was there before it."""
    module = device_module(torch.device(device))
    if module is not None:
        module.reset_peak_memory_stats(device)
    else:
        ctypes.CDLL(None).malloc_trim(0)  # gives what is free back to the system
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to what there is now
    before = peak_memory(device)
    function()
    return peak_memory(device) - before


# Processes

# PEFT imports bitsandbytes if it is installed, which takes a second and 20 MB. It is here for the
# tests of other things, and nothing that is measured needs it, so the programs do not see it.
WITHOUT_BITSANDBYTES = """
import sys
sys.modules["bitsandbytes"] = None
"""


def run_program(program, **variables):
    """Run a Python program in another process, and return what it prints.

    variables: of its environment, beside those of this process.
    """
    command = [sys.executable, "-c", WITHOUT_BITSANDBYTES + program]
    environment = os.environ | variables
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return done.stdout
