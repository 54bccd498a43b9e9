"""To be written."""

import dataclasses
import shlex
from pathlib import Path

from minia3.cli.results import MEASURING
from minia3.training.flags import expand_grid, flag_words


def before_after(final, name, form):
    return ["-" if x is None else format(x, form) for x in (final[f"{name}_before"], final[name])]


def describe(metric, result):
    auc = "" if result["auc"] is None else f", AUC {result['auc']:.2f}"
    return (
        "nothing to measure"
        if result["accuracy"] is None
        else f"{metric} {result['accuracy']:.1%}{auc}"
    )


def report(config, folder, finals, n_failed=0):
    """Print what came out of a run: a line for each figure, or each adapter, and the command that measures it again.

    n_failed: of a grid's adapters.
    """
    final, mixed = finals[0], config.adapters == "one" and isinstance(config.task, tuple)
    trained, total, kind = (
        final["trainable"],
        final["total"],
        "model" if config.method == "full" else "adapter",
    )
    axes, where = (
        expand_grid(config, ["task"] * mixed)[0],
        Path("adapters", "NAME") if "adapter" in final else kind,
    )

    def figure(final, name, form):
        then, now = before_after(final, name, form)
        return f"{then} before, {now} after" if trained or config.method == "icl" else now

    if axes or mixed:
        title = f"{len(finals)} results" + f", and {n_failed} that failed" * bool(n_failed)
        keys = ["adapter"] * bool(axes) + ["task"] * mixed
        names = [": ".join(x[key] for key in keys) for x in finals]
        figures = [
            f"{x['metric']} {figure(x, 'accuracy', '.1%')}, {x['steps']} steps" for x in finals
        ]
        lines = [*zip(names, figures, strict=True)]
    else:
        cut = (
            f", {final['rows_cut']} of them cut to {config.max_length} tokens"
            if final["rows_cut"]
            else ""
        )
        title = f"{final['task']}: {final['rows']} rows of {final['split']}{cut}"
        lines = [(final["metric"], figure(final, "accuracy", ".1%"))]
        lines += [("AUC", figure(final, "auc", ".2f"))] if final["auc"] is not None else []
    if shots := sorted(x["n_shots"] for x in finals if "n_shots" in x):
        most = f" to {shots[-1]:.1f}" * (shots[0] < shots[-1])
        lines += [("shots", f"{shots[0]:.1f}{most} before a row, in the mean")]
    lines += [
        ("memory", f"{max(x['peak_memory_bytes'] for x in finals) / 1e6:,.0f} MB at the most")
    ]
    if trained:
        cells = {
            x.get("adapter"): x["seconds"] for x in finals
        }  # of (IA)^3 all together, of others one by one
        seconds = final["seconds"] if config.method == "ia3" else sum(cells.values())
        steps = f"{max(x['steps'] for x in finals)} steps" + f" of {len(cells)}" * (
            config.method != "ia3" and len(cells) > 1
        )
        share = f"{trained:,} of {total:,} numbers ({trained / total:.3%})" + " each" * bool(axes)
        lines += [("trained", share), ("time", f"{seconds:.0f} s for {steps}")]
        lines += [(kind, folder / where)]
    if trained and any(x["rows"] for x in finals):
        one = dataclasses.replace(
            config, **{axis: axis.upper() for axis in axes}
        )  # NAME, SEED ...: to be filled in
        start = ["--adapter", folder / where]
        if kind == "model":
            one, start = dataclasses.replace(one, model=str(folder / where)), []
        differ = [
            x for x in ("method", *MEASURING) if getattr(config, x) != getattr(type(config), x)
        ]
        command = [
            "python",
            "train.py",
            *flag_words(one, ["model", "task", *differ]),
            *start,
            "--eval-only",
        ]
        lines += [("use it", shlex.join(map(str, command)))]
    width = max(12, *(2 + len(name) for name, _ in lines))
    print(f"\n{title}")
    for name, text in lines:
        print(f"  {name:<{width}}{text}")
