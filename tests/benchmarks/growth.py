"""How the cost of minia3 grows, as points (JSON), exponents and a figure.

python -m tests.benchmarks.growth --json growth.json --plot FOLDER    five minutes on two cores
python -m tests.benchmarks.growth --quick                  tiny models, two points of each curve

The models have the widths and heads of t5-base and SmolLM2-135M, but 2 + 2 and 4 layers, because
what grows does so in every layer. A point is one setting of a sweep, and all else is as in Setting.
Its time is that of the fastest round. "train" is forward and backward (without an optimizer), and
"serve" is a forward pass without gradients. Both read sources and score targets of 8 tokens. `kept`
is what autograd keeps for the backward pass, without the weights. `peak` is what a step takes at
its peak beyond what was there before it (weights, Python): of the process, or, on CUDA, of what
torch holds.

An exponent is the slope of log y over log x in the upper half of a sweep: 1 is linear, 0 is no
growth.
"""

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

import minia3
from minia3.checkpoints.load import build_model
from minia3.checkpoints.place import place_parameter
from minia3.inference.scoring import choice_logprobs
from minia3.training.losses import total_loss
from tests.benchmarks.measure import kept_for_backward, peak_beyond, seconds
from tests.benchmarks.pairs import N_TARGET, batch_on, config_of, random_examples

MODELS = {"t5-base": "T5", "smollm2-135m": "LLaMA"}
LAYERS = {"t5-base": {"n_layers": 2, "n_decoder_layers": 2}, "smollm2-135m": {"n_layers": 4}}
# T5 adds a bias of (heads, length, length) to its scores, so it reads shorter texts.
LONGEST = {"t5-base": 1024, "smollm2-135m": 4096}


@dataclass(frozen=True)
class Setting:
    """What one point measures."""

    length: int = 128  # tokens of each source
    batch: int = 8  # examples
    choices: int = 1  # of each example
    resident: int = 1  # adapters of the model
    mixed: int = 1  # different adapters in the batch


@dataclass(frozen=True)
class Sweep:
    """A row of settings, which differ in one number, x."""

    axis_title: str
    values: tuple  # of x
    base: Setting = Setting()
    fields: tuple = ()  # which x fills; empty: the one that has the sweep's name
    modes: tuple = ("train",)


SWEEPS = {
    "length": Sweep(
        "tokens of each source", (64, 128, 256, 512, 1024, 2048, 4096), Setting(batch=1)
    ),
    "batch": Sweep("examples", (1, 2, 4, 8, 16, 32)),
    "choices": Sweep("choices of each example", (1, 2, 4, 8, 16)),
    "resident": Sweep("adapters of the model", (1, 10, 100, 1000, 10000), modes=("train", "serve")),
    "mixed": Sweep(
        "adapters in a batch of 32",
        (1, 2, 4, 8, 16, 32),
        Setting(batch=32, resident=32),
        modes=("serve",),
    ),
    "tasks": Sweep("tasks trained in a batch of 8", (1, 2, 4, 8), fields=("resident", "mixed")),
}


@dataclass(frozen=True)
class Point:
    """One result. The names of its fields are those of the published JSON."""

    model: str
    sweep: str
    mode: str
    x: int
    seconds: float
    kept: int  # bytes; 0 in "serve"
    peak: int  # bytes


# Points


def random_model(config, n_adapters=1, dtype=torch.float32, device="cpu"):
    """Return a model with small random weights. Its vectors are one, and only they train."""
    model = build_model(config, n_adapters)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in list(model.named_parameters()):
        if name.endswith(".scale"):
            values = torch.ones(parameter.shape)
        else:
            values = (0.05 * torch.randn(parameter.shape, generator=generator)).to(dtype)
        place_parameter(model, name, values)
    minia3.freeze(model)
    return model.to(device)


def measure_model(name, quick, n_rounds, dtype, device):
    """Yield the points of a model."""
    config = config_of(name, quick)
    if not quick:
        config = replace(config, **LAYERS[name])
    for sweep_name, sweep in SWEEPS.items():
        values = sweep.values
        if sweep_name == "length":
            longest = LONGEST[name] // 2 if quick else LONGEST[name]
            values = [x for x in values if x <= longest]
        base = sweep.base
        if quick:
            values = values[-2:]
            base = replace(base, length=16)
        for x in values:
            setting = replace(base, **dict.fromkeys(sweep.fields or (sweep_name,), x))
            for mode in sweep.modes:
                measured = measure_setting(config, setting, mode, n_rounds, dtype, device)
                yield Point(name, sweep_name, mode, x, *measured)


def measure_setting(config, setting, mode, n_rounds, dtype, device):
    """Return (seconds, bytes kept for backward, peak bytes) of a step."""
    model = random_model(config, setting.resident, dtype, device).train(mode == "train")
    lengths = [setting.length] * setting.batch
    examples = random_examples(lengths, setting.choices, N_TARGET, config.vocab_size)
    batch = batch_on(device, examples)
    different = torch.arange(setting.batch, device=device) % setting.mixed
    adapter = different * (setting.resident // setting.mixed)

    def loss():
        logp_BCL = choice_logprobs(model, batch, adapter)
        return total_loss(logp_BCL, batch.target_mask_BCL, batch.label_B)

    def step():
        if mode == "serve":
            with torch.no_grad():
                loss()
        else:
            loss().backward()
            model.zero_grad()

    step()  # the first step allocates what stays
    peak = peak_beyond(step, device)
    fastest = min(seconds(step) for _ in range(n_rounds))
    kept = kept_for_backward(loss, model) if mode == "train" else 0
    return fastest, kept, peak


# Exponents


def curves(points):
    """Return the points of each curve: (model, sweep, mode) to a list, in order."""
    found = {}
    for point in points:
        found.setdefault((point.model, point.sweep, point.mode), []).append(point)
    return found


def column(points, quantity):
    """Return one field of all points as an array."""
    return np.array([getattr(point, quantity) for point in points], float)


def exponents(points):
    """Return "model, sweep, mode" to a dict of exponents by quantity, as published."""
    found = {}
    for key, curve in curves(points).items():
        upper = curve[(len(curve) - 1) // 2 :]
        quantities = ("seconds", "kept", "peak")
        if curve[0].mode == "serve":
            quantities = ("seconds", "peak")
        slopes = {}
        for quantity in quantities:
            x = np.log(column(upper, "x"))
            y = np.log(column(upper, quantity))
            slopes[quantity] = round(float(np.polyfit(x, y, 1)[0]), 3)
        found[", ".join(key)] = slopes
    return found


# Figure

COLOURS = {"t5-base": "tab:blue", "smollm2-135m": "tab:orange"}
MARKERS = {"t5-base": "o", "smollm2-135m": "s"}
LINE_STYLES = {"train": "-", "serve": "--"}


def plot(points, path):
    """Draw a column for each sweep: the time of a step above, memory below, both logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(SWEEPS), figsize=(18, 6.4), sharex="col", sharey="row")
    for (model, sweep_name, mode), curve in curves(points).items():
        time_axis, memory_axis = axes[:, list(SWEEPS).index(sweep_name)]
        style = {
            "color": COLOURS[model],
            "marker": MARKERS[model],
            "markersize": 4,
            "linestyle": LINE_STYLES[mode],
        }
        x = column(curve, "x")
        label = f"{MODELS[model]}, {mode}"
        time_axis.plot(x, column(curve, "seconds"), **style, label=label)
        memory_axis.plot(x, column(curve, "peak") / 1e6, **style, alpha=0.4)
        if mode == "train":
            memory_axis.plot(x, column(curve, "kept") / 1e6, **style)

    for (time_axis, memory_axis), sweep in zip(axes.T, SWEEPS.values(), strict=True):
        for axis in (time_axis, memory_axis):
            set_scales(axis, sweep.values)
        memory_axis.set_xlabel(sweep.axis_title)
    axes[0, 0].set_ylabel("time of a step (s)")
    axes[1, 0].set_ylabel("memory (MB)\nstrong: kept for backward\npale: peak beyond the weights")
    add_legend(figure, axes[0])
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    figure.savefig(path)
    pyplot.close(figure)


def set_scales(axis, values):
    """Make both axes logarithmic, with a tick at each x and plain numbers at y."""
    from matplotlib.ticker import FuncFormatter

    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.grid(True, which="major", alpha=0.3)
    axis.set_xticks(values, [str(x) if x < 1000 else f"{x // 1000}k" for x in values])
    axis.minorticks_off()
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def add_legend(figure, axes):
    """Put one legend above the figure, with each label of `axes` once."""
    handles = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles[label] = handle
    figure.legend(handles.values(), handles, loc="upper center", ncols=len(handles), frameon=False)


# The command


def make_parser():
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.growth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny models, two points of each curve, one round"
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each point (default: 3)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch chooses)")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the weights"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, xpu ... (default: cpu)")
    parser.add_argument("--json", type=Path, help="file for the points")
    parser.add_argument("--plot", type=Path, help="folder for growth.svg (pip install matplotlib)")
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    n_rounds = 1 if args.quick else args.rounds
    dtype = getattr(torch, args.dtype)
    points = []
    for name in MODELS:
        for point in measure_model(name, args.quick, n_rounds, dtype, args.device):
            points.append(point)
            print_point(point)
    print(json.dumps(exponents(points), indent=2))

    if args.json:
        models = "widths of t5-base with 2 + 2 layers, of SmolLM2-135M with 4"
        result = {
            "dtype": args.dtype,
            "device": args.device,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "models": "tiny" if args.quick else models,
            "exponents": exponents(points),
            "points": [asdict(point) for point in points],
        }
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    if args.plot:
        args.plot.mkdir(parents=True, exist_ok=True)
        plot(points, args.plot / "growth.svg")


def print_point(point):
    fields = asdict(point)
    fields["seconds"] = f"{point.seconds:.4g}"
    print(", ".join(f"{name}: {value}" for name, value in fields.items()), flush=True)


if __name__ == "__main__":
    main()
