"""python -m tests.benchmarks.growth: how the cost of minia3 grows, as points (JSON), exponents and a figure.

python -m tests.benchmarks.growth --json growth.json --plot FOLDER     about five minutes on two cores
python -m tests.benchmarks.growth --quick                              tiny models, the end of each sweep

The models have the widths and heads of t5-base and SmolLM2-135M, but 2 + 2 and 4 layers: what grows, grows in every
layer. A point is one setting of a sweep, all else as in DEFAULTS; its time is that of the fastest round. "train" is
forward and backward (no optimiser), "serve" a forward pass without gradients; both read sources and give targets of 8
tokens. `kept` is what autograd keeps for backward, weights aside; `peak` what the step takes at the most beyond what is
there before it (weights, Python): of the resident set, on CUDA of what torch holds.

An exponent is the slope of log y over log x in the upper half of a sweep: 1 is linear, 0 is no growth.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import minia3
from minia3.checkpoints.load import build_model, place_parameter
from minia3.inference.scoring import choice_logprobs
from minia3.tasks.batches import collate
from minia3.training.losses import total_loss
from tests.benchmarks.measure import kept_for_backward, peak_beyond, seconds
from tests.benchmarks.pairs import config_of, examples

MODELS = {"t5-base": "T5", "smollm2-135m": "LLaMA"}
DEFAULTS = {"length": 128, "batch": 8, "choices": 1, "resident": 1, "mixed": 1}
# title -> what the x axis counts, its points, what else differs from DEFAULTS, modes
SWEEPS = {
    "length": (
        "tokens of each source",
        (64, 128, 256, 512, 1024, 2048, 4096),
        {"batch": 1},
        ("train",),
    ),
    "batch": ("examples", (1, 2, 4, 8, 16, 32), {}, ("train",)),
    "choices": ("choices of each example", (1, 2, 4, 8, 16), {}, ("train",)),
    "resident": ("adapters of the model", (1, 10, 100, 1000, 10000), {}, ("train", "serve")),
    "mixed": (
        "adapters in a batch of 32",
        (1, 2, 4, 8, 16, 32),
        {"batch": 32, "resident": 32},
        ("serve",),
    ),
    "tasks": ("tasks trained in a batch of 8", (1, 2, 4, 8), {}, ("train",)),
}
LONGEST = {
    "t5-base": 1024,
    "smollm2-135m": 4096,
}  # T5 adds a bias of (heads, length, length) to its scores


def random_model(config, n_adapters=1, dtype=torch.float32, device="cpu"):
    """A model with small random weights, its vectors at one."""
    model, generator = build_model(config, n_adapters), torch.Generator().manual_seed(0)
    for name, p in list(model.named_parameters()):
        if name.endswith(".scale"):
            place_parameter(model, name, torch.ones(p.shape))
        else:
            place_parameter(
                model, name, (0.05 * torch.randn(p.shape, generator=generator)).to(dtype)
            )
    minia3.freeze(model)
    return model.to(device)


def points(name, quick, rounds, dtype, device):
    """Yield the points of a model, as dicts."""
    config = config_of(name, quick)
    if not quick:
        config = replace(
            config,
            **({"n_layers": 2, "n_decoder_layers": 2} if name == "t5-base" else {"n_layers": 4}),
        )
    for sweep, (_, values, differs, modes) in SWEEPS.items():
        values = [x for x in values if sweep != "length" or x <= LONGEST[name]]
        for x in values[-2:] if quick else values:
            setting = DEFAULTS | ({"length": 16} if quick else {}) | differs
            setting |= {"resident": x, "mixed": x} if sweep == "tasks" else {sweep: x}
            for mode in modes:
                measured = measure(config, setting, mode, rounds, dtype, device)
                yield {"model": name, "sweep": sweep, "mode": mode, "x": x} | measured


def measure(config, setting, mode, rounds, dtype, device):
    """-> {"seconds", "kept", "peak"} of one setting."""
    length, n, n_choices, resident, mixed = setting.values()
    model = random_model(config, resident, dtype, device).train(mode == "train")
    batch = collate(examples([length] * n, n_choices, 8, config.vocab_size))
    batch = batch._make(x.to(device) for x in batch)
    adapter = torch.arange(n, device=device) % mixed * (resident // mixed)

    def loss():
        return total_loss(
            choice_logprobs(model, batch, adapter), batch.target_mask_BCL, batch.label_B
        )

    def run():
        if mode == "serve":
            with torch.no_grad():
                loss()
        else:
            loss().backward()
            model.zero_grad()

    run()  # the first allocates what stays
    peak = peak_beyond(run, device)
    time = min(seconds(run) for _ in range(rounds))
    return {
        "seconds": time,
        "kept": kept_for_backward(loss, model) if mode == "train" else 0,
        "peak": peak,
    }


def series(points, **chosen):
    """The chosen points' xs and their values by name."""
    rows = [p for p in points if all(p[key] == value for key, value in chosen.items())]
    return {
        key: np.array([row[key] for row in rows], float) for key in ("x", "seconds", "kept", "peak")
    }


def lines(points):
    """The (model, sweep, mode) that there are, in order."""
    return list(dict.fromkeys((p["model"], p["sweep"], p["mode"]) for p in points))


def exponents(points):
    """Model, sweep, mode -> quantity -> its exponent."""
    found = {}
    for model, sweep, mode in lines(points):
        data = series(points, model=model, sweep=sweep, mode=mode)
        upper = slice((len(data["x"]) - 1) // 2, None)
        names = ("seconds", "kept", "peak") if mode == "train" else ("seconds", "peak")
        slopes = {
            key: np.polyfit(np.log(data["x"][upper]), np.log(data[key][upper]), 1)[0]
            for key in names
        }
        found[f"{model}, {sweep}, {mode}"] = {
            key: round(float(slope), 3) for key, slope in slopes.items()
        }
    return found


def plot(points, path):
    """One figure: a column for each sweep; above the time of a step, below memory. Both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    figure, axes = pyplot.subplots(2, len(SWEEPS), figsize=(18, 6.4), sharex="col", sharey="row")
    styles = {"t5-base": ("tab:blue", "o"), "smollm2-135m": ("tab:orange", "s")}
    for model, sweep, mode in lines(points):
        column, data = (
            list(SWEEPS).index(sweep),
            series(points, model=model, sweep=sweep, mode=mode),
        )
        (colour, marker), label = styles[model], f"{MODELS[model]}, {mode}"
        line = {
            "color": colour,
            "marker": marker,
            "markersize": 4,
            "linestyle": "-" if mode == "train" else "--",
        }
        axes[0, column].plot(data["x"], data["seconds"], **line, label=label)
        axes[1, column].plot(data["x"], data["peak"] / 1e6, **line, alpha=0.4)
        if mode == "train":
            axes[1, column].plot(data["x"], data["kept"] / 1e6, **line)
    plain = FuncFormatter(lambda value, _: f"{value:,g}")
    for column, (what, values, _, _) in enumerate(SWEEPS.values()):
        for axis in axes[:, column]:
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.grid(True, which="major", alpha=0.3)
            axis.set_xticks(values, [str(x) if x < 1000 else f"{x // 1000}k" for x in values])
            axis.minorticks_off()
            axis.yaxis.set_major_formatter(plain)
        axes[1, column].set_xlabel(what)
    axes[0, 0].set_ylabel("time of a step (s)")
    axes[1, 0].set_ylabel("memory (MB)\nstrong: kept for backward\npale: peak beyond the weights")
    handles = {
        label: h
        for axis in axes[0]
        for h, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="upper center", ncols=len(handles), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    figure.savefig(path)
    pyplot.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.growth", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--quick", action="store_true", help="tiny models, the end of each sweep, one round"
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each point (default: 3)")
    parser.add_argument("--threads", type=int, help="of torch (default: torch's own choice)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, help="file for the points")
    parser.add_argument("--plot", type=Path, help="folder for growth.svg (pip install matplotlib)")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    found, rounds = [], 1 if args.quick else args.rounds
    for name in MODELS:
        for point in points(name, args.quick, rounds, getattr(torch, args.dtype), args.device):
            found.append(point)
            print(", ".join(f"{key}: {value:.4g}" if key == "seconds" else f"{key}: {value}"
                            for key, value in point.items()), flush=True)  # fmt: skip
    print(json.dumps(exponents(found), indent=2))
    about = {
        "dtype": args.dtype,
        "device": args.device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    about["models"] = (
        "widths of t5-base with 2 + 2 layers, of SmolLM2-135M with 4" if not args.quick else "tiny"
    )
    if args.json:
        result = about | {"exponents": exponents(found), "points": found}
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    if args.plot:
        args.plot.mkdir(parents=True, exist_ok=True)
        plot(found, args.plot / "growth.svg")


if __name__ == "__main__":
    main()
