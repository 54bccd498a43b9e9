"""Chapter 9, what is said of a result: in the terminal, and in the model card, the README.md in the folder of a run's
adapter or model, for people and for the hub. In card.md a line <!-- METHODS --> stands before what these alone say.
"""

import dataclasses
import json
import re
import shlex
from pathlib import Path

from minia3 import files, flags
from minia3.models import hub_name
from minia3.table import MEASURING

AUTO = {"T5": "AutoModelForSeq2SeqLM", "Llama": "AutoModelForCausalLM"}  # class of ours -> of transformers
WHERE = ("model", "task", "out", "data_dir", "resume", "device")  # these say where something is; the others, what to do


def write_card(folder, config, finals, checksums):
    with files.replacing(folder / "README.md") as temporary:
        temporary.write_text(card(config, *(final | {"data": checksums} for final in finals)), encoding="utf-8")


def card(config, *finals):
    """The text of README.md. config: the run's flags, train.py's Config.

    finals: the run's result, for each task of a mixture; with `data`, the checksums of its files.
    """
    final, base, tasks = finals[0], hub_name(config.model), [final["task"] for final in finals]
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists()
    differ = [f.name for f in dataclasses.fields(config) if getattr(config, f.name) != f.default]
    words = flags.words(config, ["model", "task", *(name for name in differ if name not in WHERE)])
    rows = []
    for one in finals:
        of = f"{one['task']}, {one['rows']:,} rows of {one['split']}: " if len(finals) > 1 else ""
        over = f", median over {len(one['accuracies'])} prompts" if "accuracies" in one else ""
        rows.append([of + one["metric"] + over, *before_after(one, "accuracy", ".1%")])
        rows += [[of + "AUC", *before_after(one, "auc", ".2f")]] if one["auc"] is not None else []
    _, *parts = re.split("<!-- (.*) -->\n", Path(__file__).with_suffix(".md").read_text(encoding="utf-8"))
    text = "".join(x for methods, x in zip(parts[::2], parts[1::2], strict=True) if final["method"] in methods.split())
    return text.format(
        **final | {"task": ", ".join(tasks)},
        measured=f"{final['rows']:,} rows of {final['split']}" if len(finals) == 1 else "",
        front=f"base_model: {base}\n" if on_hub else "",
        base="data/tiny-t5" if base == "tiny-t5" else base,  # in this project's repository
        datasets=json.dumps(tasks),
        share=final["trainable"] / final["total"],
        figures="\n".join(f"| {' | '.join(row)} |" for row in rows),
        command=shlex.join(["python", "train.py", *words]),
        checksums="\n".join(f"- {name} `{digest}`" for name, digest in final["data"].items()),
        auto=AUTO[final["architecture"]],
    )


def before_after(final, name, form):
    return ["-" if x is None else format(x, form) for x in (final[f"{name}_before"], final[name])]


def describe(metric, result):
    auc = "" if result["auc"] is None else f", AUC {result['auc']:.2f}"
    return "nothing to measure" if result["accuracy"] is None else f"{metric} {result['accuracy']:.1%}{auc}"


def report(config, folder, finals, n_failed=0):
    """Print what came out of a run: a line for each figure, or each adapter, and the command that measures it again.

    n_failed: of a grid's adapters.
    """
    final, mixed = finals[0], config.adapters == "one" and isinstance(config.task, tuple)
    trained, total, kind = final["trainable"], final["total"], "model" if config.method == "full" else "adapter"
    axes, where = flags.grid(config, ["task"] * mixed)[0], Path("adapters", "NAME") if "adapter" in final else kind

    def figure(final, name, form):
        then, now = before_after(final, name, form)
        return f"{then} before, {now} after" if trained or config.method == "icl" else now

    if axes or mixed:
        title = f"{len(finals)} results" + f", and {n_failed} that failed" * bool(n_failed)
        keys = ["adapter"] * bool(axes) + ["task"] * mixed
        names = [": ".join(x[key] for key in keys) for x in finals]
        figures = [f"{x['metric']} {figure(x, 'accuracy', '.1%')}, {x['steps']} steps" for x in finals]
        lines = [*zip(names, figures, strict=True)]
    else:
        cut = f", {final['rows_cut']} of them cut to {config.max_length} tokens" if final["rows_cut"] else ""
        title = f"{final['task']}: {final['rows']} rows of {final['split']}{cut}"
        lines = [(final["metric"], figure(final, "accuracy", ".1%"))]
        lines += [("AUC", figure(final, "auc", ".2f"))] if final["auc"] is not None else []
    if shots := sorted(x["n_shots"] for x in finals if "n_shots" in x):
        most = f" to {shots[-1]:.1f}" * (shots[0] < shots[-1])
        lines += [("shots", f"{shots[0]:.1f}{most} before a row, in the mean")]
    lines += [("memory", f"{max(x['peak_memory_bytes'] for x in finals) / 1e6:,.0f} MB at the most")]
    if trained:
        cells = {x.get("adapter"): x["seconds"] for x in finals}  # of (IA)^3 all together, of others one by one
        seconds = final["seconds"] if config.method == "ia3" else sum(cells.values())
        steps = f"{max(x['steps'] for x in finals)} steps" + f" of {len(cells)}" * (
            config.method != "ia3" and len(cells) > 1
        )
        share = f"{trained:,} of {total:,} numbers ({trained / total:.3%})" + " each" * bool(axes)
        lines += [("trained", share), ("time", f"{seconds:.0f} s for {steps}")]
        lines += [(kind, folder / where)]
    if trained and any(x["rows"] for x in finals):
        one = dataclasses.replace(config, **{axis: axis.upper() for axis in axes})  # NAME, SEED ...: to be filled in
        start = ["--adapter", folder / where]
        if kind == "model":
            one, start = dataclasses.replace(one, model=str(folder / where)), []
        differ = [x for x in ("method", *MEASURING) if getattr(config, x) != getattr(type(config), x)]
        command = ["python", "train.py", *flags.words(one, ["model", "task", *differ]), *start, "--eval-only"]
        lines += [("use it", shlex.join(map(str, command)))]
    width = max(12, *(2 + len(name) for name, _ in lines))
    print(f"\n{title}")
    for name, text in lines:
        print(f"  {name:<{width}}{text}")
