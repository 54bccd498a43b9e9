"""What a run prints when it ends: the results, what they cost, and how to use the adapter."""

import dataclasses
import shlex

from minia3.files.messages import plural
from minia3.inference.metrics import INVERSE_PERPLEXITY
from minia3.tasks.names import list_names
from minia3.training.shown_commands import using_command

N_NAMED = 4  # results that a warning names; the others are counted


def report(config, folder, finals, n_failed=0):
    """Print what came out of a run, what is doubtful about it, and the command that uses it.

    finals: the final lines of metrics.jsonl, one per adapter and task, with the flags of `config`.
    folder: of the run; None if nothing was written. n_failed: adapters of a grid without a result.
    """
    if config.axes or config.is_mixture:
        title = "1 result" if len(finals) == 1 else f"{len(finals)} results"
        if n_failed:
            title += f"; failed adapters: {n_failed}"
        lines = [result_line(config, final) for final in finals]
    else:
        title, lines = single_result(config, finals[0])
    lines += cost_lines(config, finals)
    if finals[0]["trainable"]:
        lines += adapter_lines(config, folder, finals)
    lines += warning_lines(config, finals)

    width = max(12, *(len(name) + 1 for name, _ in lines))
    print(f"\n{title}")
    for name, text in lines:
        print(f"  {name:<{width}}{text}")


def describe(metric, result):
    """Return the result of an evaluation in a few words."""
    if result["accuracy"] is None:
        return "nothing to evaluate"
    name, key, form = figure_of(metric)
    text = f"{name} {format_value(result[key], form)}"
    if result["auc"] is not None:
        text += f", AUC {result['auc']:.2f}"
    return text


def figure_of(metric):
    """Return the name under which a metric is shown, its key in a final line, and its format."""
    if metric == INVERSE_PERPLEXITY:
        return "perplexity", "perplexity", ",.2f"
    return metric, "accuracy", ".1%"


def format_value(value, form):
    if value is None:
        return "-"
    return format(value, form)


def before_after(final, name, form):
    """Return a value of a final line before and after training, as texts."""
    # Without rows, a result has no perplexity.
    values = (final.get(f"{name}_before"), final.get(name))
    return [format_value(value, form) for value in values]


def single_result(config, final):
    """Return the title and the lines of a run with one result."""
    title = f"{final['task']}: {final['rows']} {plural(final['rows'], 'row')} of {final['split']}"
    if final["rows_cut"]:
        title += f", {final['rows_cut']} of them cut to {config.max_length} tokens"
    name, key, form = figure_of(final["metric"])
    lines = [(name, with_commonest(final, format_figure(config, final, key, form)))]
    if final["auc"] is not None:
        lines.append(("AUC", format_figure(config, final, "auc", ".2f")))
    return title, lines


def result_line(config, final):
    """Return the line of one result among several: its name, and what came out."""
    name, key, form = figure_of(final["metric"])
    figure = with_commonest(final, format_figure(config, final, key, form))
    line = f"{name} {figure}, {format_steps(final['steps'])}"
    if final["rows_cut"]:
        line += f", {final['rows_cut']} of {final['rows']} rows cut to {config.max_length} tokens"
    return result_name(config, final), line


def result_name(config, final):
    """Return what tells a result from the others of its run: its adapter, its task, or both."""
    names = []
    if config.axes:
        names.append(final["adapter"].replace("/", "-"))  # as its folder, for the NAME of `use it`
    if config.is_mixture:
        names.append(final["task"])
    return ": ".join(names)


def with_commonest(final, figure):
    """Return a figure beside what always giving the commonest label would reach, if there are
    labels: an accuracy of 90 % means little if nine rows in ten have the same label.
    """
    if final.get("commonest") is None:
        return figure
    return f"{figure} (commonest label: {final['commonest']:.1%})"


def warning_lines(config, finals):
    """Return a line for each doubt, with the names of the results that it is about."""
    names_of = {}  # doubt -> names of results
    for final in finals:
        for doubt in final.get("warnings", ()):
            names_of.setdefault(doubt, []).append(result_name(config, final))
    lines = []
    for doubt, names in names_of.items():
        if names == [""]:  # of the only result
            line = doubt
        elif len(names) == len(finals) > 1:
            line = f"all {len(names)}: {doubt}"
        else:
            line = f"{list_names(names, most=N_NAMED)}: {doubt}"
        lines.append(("warning", line))
    return lines


def format_figure(config, final, name, form):
    before, after = before_after(final, name, form)
    if final["trainable"] or config.method == "icl":
        return f"{before} before, {after} after"
    return after


def cost_lines(config, finals):
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
        if config.axes:
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
        return f"{finals[0]['seconds']:.0f} s for {format_steps(n_steps)}"
    seconds = sum(seconds_by_adapter.values())
    if len(seconds_by_adapter) == 1:
        return f"{seconds:.0f} s for {format_steps(n_steps)}"
    return f"{seconds:.0f} s for {len(seconds_by_adapter)} x {format_steps(n_steps)}"


def format_steps(n_steps):
    return f"{n_steps} {plural(n_steps, 'step')}"


def adapter_lines(config, folder, finals):
    """Return lines that say where the adapter is, and how to use it on new rows."""
    kind = "model" if config.method == "full" else "adapter"
    path = folder / kind
    if config.axes:
        path = folder / "adapters" / "NAME"  # the user fills it in
    adapter = path
    if kind == "model":
        config = dataclasses.replace(config, model=str(path))
        adapter = None
    commands = []
    for final in finals:
        commands.append(shlex.join(using_command(config, final["answer"], adapter)))
    uses = [("use it", command) for command in dict.fromkeys(commands)]  # a chat has another one
    return [(kind, str(path)), *uses]
