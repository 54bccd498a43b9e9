"""What a run prints when it ends: the results, what they cost, and how to use the adapter."""

import dataclasses
import shlex

from minia3.training.command_lines import evaluation_command


def report(config, folder, finals, n_failed=0):
    """Print what came out of a run, and the command that evaluates it again.

    finals: the final lines of metrics.jsonl, one per adapter and task, with the flags of `config`.
    folder: of the run; None if nothing was written. n_failed: adapters of a grid without a result.
    """
    axes = grid_axes(config)
    if axes or is_mixture(config):
        title = "1 result" if len(finals) == 1 else f"{len(finals)} results"
        if n_failed:
            title += f"; failed adapters: {n_failed}"
        lines = [result_line(config, final, axes) for final in finals]
    else:
        title, lines = single_result(config, finals[0])
    lines += cost_lines(config, finals, is_grid=bool(axes))
    if finals[0]["trainable"]:
        lines += adapter_lines(config, folder, finals, axes)

    width = max(12, *(len(name) + 1 for name, _ in lines))
    print(f"\n{title}")
    for name, text in lines:
        print(f"  {name:<{width}}{text}")


def describe(metric, result):
    """Return the result of an evaluation in a few words."""
    if result["accuracy"] is None:
        return "nothing to evaluate"
    text = f"{metric} {result['accuracy']:.1%}"
    if result["auc"] is not None:
        text += f", AUC {result['auc']:.2f}"
    return text


def before_after(final, name, form):
    """Return a value of a final line before and after training, as texts."""
    texts = []
    for value in (final[f"{name}_before"], final[name]):
        if value is None:
            texts.append("-")
        else:
            texts.append(format(value, form))
    return texts


def grid_axes(config):
    """Return the flags that have several values, and so make several adapters."""
    axes = []
    for field in dataclasses.fields(config):
        is_axis = isinstance(getattr(config, field.name), tuple)
        if is_axis and not (field.name == "task" and is_mixture(config)):
            axes.append(field.name)
    return axes


def is_mixture(config):
    """Return whether one adapter is trained on several tasks."""
    return config.adapters == "one" and isinstance(config.task, tuple)


def single_result(config, final):
    """Return the title and the lines of a run with one result."""
    title = f"{final['task']}: {final['rows']} rows of {final['split']}"
    if final["rows_cut"]:
        title += f", {final['rows_cut']} of them cut to {config.max_length} tokens"
    lines = [(final["metric"], format_figure(config, final, "accuracy", ".1%"))]
    if final["auc"] is not None:
        lines.append(("AUC", format_figure(config, final, "auc", ".2f")))
    return title, lines


def result_line(config, final, axes):
    """Return the line of one result among several: its name, and what came out."""
    names = []
    if axes:
        names.append(final["adapter"])
    if is_mixture(config):
        names.append(final["task"])
    figure = format_figure(config, final, "accuracy", ".1%")
    return ": ".join(names), f"{final['metric']} {figure}, {final['steps']} steps"


def format_figure(config, final, name, form):
    before, after = before_after(final, name, form)
    if final["trainable"] or config.method == "icl":
        return f"{before} before, {after} after"
    return after


def cost_lines(config, finals, is_grid):
    """Return lines about shots and memory, and about size and time if anything was trained."""
    lines = []
    n_shots = sorted(final["n_shots"] for final in finals if "n_shots" in final)
    if n_shots:
        text = f"{n_shots[0]:.1f}"
        if n_shots[0] < n_shots[-1]:
            text += f" to {n_shots[-1]:.1f}"
        lines.append(("shots", f"{text} before each input, on average"))
    peak = max(final["peak_memory_bytes"] for final in finals)
    lines.append(("peak memory", f"{peak / 1e6:,.0f} MB"))

    n_trained = finals[0]["trainable"]
    n_base = finals[0]["total"]
    if n_trained:
        text = f"{n_trained:,} of {n_base:,} parameters ({n_trained / n_base:.3%})"
        if is_grid:
            text += " each"
        lines.append(("trained", text))
        lines.append(("time", format_time(config, finals)))
    return lines


def format_time(config, finals):
    """Return how many seconds and steps training took.

    The cells of an (IA)^3 grid train together, so each final line has the time of all of them. The
    cells of another method train one after the other.
    """
    seconds_by_adapter = {final.get("adapter"): final["seconds"] for final in finals}
    n_steps = max(final["steps"] for final in finals)
    if config.method == "ia3":
        return f"{finals[0]['seconds']:.0f} s for {n_steps} steps"
    seconds = sum(seconds_by_adapter.values())
    if len(seconds_by_adapter) == 1:
        return f"{seconds:.0f} s for {n_steps} steps"
    return f"{seconds:.0f} s for {len(seconds_by_adapter)} x {n_steps} steps"


def adapter_lines(config, folder, finals, axes):
    """Return lines that say where the adapter is, and how to evaluate it."""
    kind = "model" if config.method == "full" else "adapter"
    path = folder / kind
    if axes:
        path = folder / "adapters" / "NAME"  # the user fills it in, like SEED
    lines = [(kind, str(path))]
    has_labels = any(final["rows"] for final in finals)
    if has_labels:
        filled = dataclasses.replace(config, **{axis: axis.upper() for axis in axes})
        if kind == "model":
            words = evaluation_command(dataclasses.replace(filled, model=str(path)))
        else:
            words = evaluation_command(filled, adapter=path)
        lines.append(("use it", shlex.join(words)))
    return lines
