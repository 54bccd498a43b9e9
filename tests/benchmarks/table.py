"""Show runs of the table side by side, as Markdown, so that a reader sees what noise is.

Only runs on the same processor stand side by side: another processor has a table of its own.

python -m tests.benchmarks table A.json B.json
python -m tests.benchmarks table                the runs in tests/benchmarks/published/
python -m tests.benchmarks table --write        those, in the README and docs/performance*.md
"""

import argparse
import re
from pathlib import Path
from statistics import median
from string import ascii_uppercase

from minia3.checkpoints.known_models import KNOWN_MODELS
from minia3.model.t5 import T5Config
from tests.benchmarks.lines import goal_of
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.record import read_record

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / "tests" / "benchmarks" / "published"
PAGE = ROOT / "docs" / "performance.md"
NOTES = ROOT / "docs" / "performance-notes.md"
README = ROOT / "README.md"
N_RUNS_IN_PAGE = 4
# The part of a page between two comments is the table; in the README it is the table that begins
# with this line.
IN_PAGE = re.compile(
    r"(?<=<!-- python -m tests.benchmarks table: -->\n\n).*?(?=\n<!-- end -->)", re.S
)
README_HEAD = "| | minia3 | transformers + PEFT | theirs / ours |"
IN_README = re.compile(rf"^{re.escape(README_HEAD)}\n(\|.*\n)+", re.M)
README_TITLES = (
    "t5-base, training step, no padding",
    "t5-base, training step, RTE-like lengths",
    "t5-base, rank evaluation, RTE (2 choices)",
    "t5-base, greedy generation, batch 1",
)


def main(argv):
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="*", type=Path, help="default: those that are published")
    parser.add_argument("--write", action="store_true", help="write the documents, print nothing")
    args = parser.parse_args(argv)
    if args.write:
        write_pages(args.files)
    else:
        print(markdown(read_records(args.files)), end="")


def read_records(files=()):
    """Return the Records of files, or of those that are published. The oldest run comes first."""
    records = [read_record(path) for path in files or PUBLISHED.glob("*.json")]
    return sorted(records, key=lambda record: record.about["date"])


def published_file(today, torch_version, device):
    """Return where a run of this date (a text), torch and device is published."""
    release, _, _ = torch_version.partition("+")
    words = re.findall("[a-z0-9]+", processor_of(describe_machine(device)).lower())
    return PUBLISHED / f"{today}-{'-'.join(words)}-torch-{release}.json"


def write_pages(files=()):
    """Write the tables of records into the README and the two pages about performance."""
    records = read_records(files)
    of_page, of_notes = markdown_of_pages(records)
    PAGE.write_text(with_table(PAGE.read_text(), IN_PAGE, of_page))
    NOTES.write_text(with_table(NOTES.read_text(), IN_PAGE, of_notes))
    README.write_text(with_table(README.read_text(), IN_README, markdown_of_readme(records)))


def with_table(text, place, table):
    """Return the text of a page with the table at its place."""
    return place.sub(lambda _: table, text, count=1)


def markdown(records):
    """Return the whole table of one or several Records: one table for each processor."""
    return "\n".join(table_of_runs(*group) for group in by_processor(records))


def markdown_of_pages(records):
    """Return the tables of the page about performance, and of its notes.

    The page has the last runs on one processor. The notes have all others.
    """
    groups = by_processor(records)
    main_processor, _, _ = main_group(groups)
    of_notes = []
    for processor, letters, runs in groups:
        if processor == main_processor:
            of_page = table_of_runs(processor, letters[-N_RUNS_IN_PAGE:], runs[-N_RUNS_IN_PAGE:])
            letters, runs = letters[:-N_RUNS_IN_PAGE], runs[:-N_RUNS_IN_PAGE]
        if runs:
            of_notes.append(table_of_runs(processor, letters, runs))
    return of_page, "\n".join(of_notes)


def by_processor(records):
    """Return a list of (name of a processor, the letters that name its runs, its Records).

    The one that ran first comes first, so that a new run renames as few of the others as it can.
    """
    runs_on = {}
    for record in records:
        runs_on.setdefault(processor_of(record.about["machine"]), []).append(record)
    groups = []
    letters = ascii_uppercase
    for processor, runs in runs_on.items():
        groups.append((processor, letters[: len(runs)], runs))
        letters = letters[len(runs) :]
    return groups


def processor_of(machine):
    """Return the short name of the processor that computed: "Intel Xeon, family 6, model 207"."""
    name = machine.get("accelerator") or machine["processor"]
    return re.sub(r"\((R|TM)\)| Processor\b", "", name)


def table_of_runs(processor, letters, records):
    """Return the table of Records on the same processor, which are named by letters."""
    titles = {title: None for record in records for title in record.rows}
    rows = [table_row(title, records) for title in titles]
    parts = [f"#### {processor}", heading(records, letters), summary(records, letters)]
    parts.append("\n".join([column_names(records, letters), *rows]))
    return "\n\n".join(parts) + "\n"


def markdown_of_readme(records):
    """Return the short table of the README, from the last runs on one processor."""
    _, _, runs = main_group(by_processor(records))
    lines = [README_HEAD, "|---|---|---|---|"]
    for title in README_TITLES:
        _, title_of_line = title.split(", ", 1)
        rows = rows_of(title, runs[-N_RUNS_IN_PAGE:])
        ours = middle(rows, "ours")
        theirs = middle(rows, "theirs")
        ratio = f"{middle(rows, 'ratio'):.2f}"
        cells = [title_of_line, with_unit(ours, "s"), with_unit(theirs, "s"), ratio]
        lines.append(line_of(cells))
    return "\n".join(lines) + "\n"


def main_group(groups):
    """Return the group with the most runs, or, if several have as many, the one that ran last."""
    return max(groups, key=number_and_last_date)


def number_and_last_date(group):
    _, _, runs = group
    return len(runs), runs[-1].about["date"]


# What the runs were measured on


def heading(records, letters=ascii_uppercase):
    """Return a small table that has a column for each run."""
    names = letters[: len(records)]
    lines = [line_of(["run", *names]), "|---" * (len(records) + 1) + "|"]
    for name, describe in DESCRIPTIONS.items():
        lines.append(line_of([name, *[describe(record.about) for record in records]]))
    lines.append(line_of(["best roof", *[roof_of(record) for record in records]]))
    lines.append(line_of(["calls made again", *[repeated_of(record) for record in records]]))
    return "\n".join(lines)


def describe_processor(about):
    machine = about["machine"]
    words = [machine.get("accelerator"), machine.get("processor"), *machine["instructions"]]
    return ", ".join(word for word in words if word)


def describe_cores(about):
    machine = about["machine"]
    if "cores" not in machine:
        return f"{about['threads']} of some cores"
    memory = f"{machine['memory'] / 1e9:.0f} GB"
    return f"{about['threads']} of {machine['cores']} cores, {memory}, {machine['kernel']}"


def describe_load(about):
    load = about.get("load")
    return f"{load['start']:.1f}, {load['end']:.1f}" if load else "not recorded"


def describe_packages(about):
    packages = about["versions"].items()
    return ", ".join(f"{name} {version.partition('+')[0]}" for name, version in packages)


def describe_duration(about):
    seconds = about.get("seconds")
    return "not recorded" if seconds is None else f"{seconds / 60:.0f} minutes"


def roof_of(record):
    if record.best_roof is None:
        return ""
    return f"{record.best_roof / 1e12:.2f} TFLOP/s, {record.about['dtype']}"


def repeated_of(record):
    """Say how many calls were made again, because the machine was slow beside them."""
    rows = [row for row in record.rows.values() if row.calls is not None]
    if not rows:
        return "none"
    return f"{sum(row.repeated for row in rows):,} of {sum(row.calls for row in rows):,}"


DESCRIPTIONS = {  # name of the line: function of what a Record is about
    "date": lambda about: about["date"],
    "processor": describe_processor,
    "threads, memory, system": describe_cores,
    "load at the start and at the end": describe_load,
    "packages": describe_packages,
    "duration": describe_duration,
}


def summary(records, letters=ascii_uppercase):
    """Return how many goals each run reaches, and how many no code can reach."""
    counts = []
    n_disturbed = 0
    for letter, record in zip(letters, records, strict=False):
        goals = {title: goal_of_title(title) for title in record.rows}
        goals = {title: goal for title, goal in goals.items() if goal.ratio is not None}
        n_reached = sum(goal.is_reached(record.rows[title]) for title, goal in goals.items())
        n_floor = sum(goal.is_beyond_floor(record.rows[title]) for title, goal in goals.items())
        n_alone = sum(goal.is_beyond_alone(record.rows[title]) for title, goal in goals.items())
        counts.append(
            f"Run {letter} reaches {n_reached} of {len(goals)} goals; "
            f"the floors rule out {n_floor}, and the kernels alone rule out {n_alone}."
        )
        n_disturbed += sum(map(record.is_disturbed, record.rows.values()))
    if n_disturbed:
        counts.append(f"Disturbed by other work, and marked with a star: {n_disturbed}.")
    if len(records) > 1:
        n_commits = len({record.about["commit"] for record in records})
        same = "the same code" if n_commits == 1 else f"{n_commits} different commits"
        counts.append(f"The runs are of {same}.")
    return "\n".join(counts)


# Lines


def column_names(records, letters=ascii_uppercase):
    ratios = [f"theirs / ours, {letter}" for letter in letters[: len(records)]]
    names = ["line", "ours", "theirs", *ratios, "goal", "reached"]
    names += ["floor of ours", "bound by floor", "kernels of ours alone", "bound by kernels"]
    return line_of(names) + "\n" + "|---" * len(names) + "|"


def table_row(title, records):
    """Return a row of the table. Of several runs, it shows the ratios side by side.

    All other figures are medians over the runs.
    """
    rows = rows_of(title, records)
    goal = goal_of_title(title)
    unit = rows[0].unit
    cells = [title, with_unit(middle(rows, "ours"), unit), with_unit(middle(rows, "theirs"), unit)]
    cells += [ratio_text(title, record) for record in records]
    if goal.ratio is None:
        cells += ["", ""]
    else:
        n_reached = sum(goal.is_reached(row) for row in rows)
        cells += [goal_text(goal), f"{n_reached} of {len(rows)}"]
    cells += floor_texts(rows, goal)
    cells += alone_texts(rows, goal)
    return line_of(cells)


def goal_text(goal):
    text = f"{goal.ratio:g}"
    return text if goal.share is None else f"{text} at {goal.share:.0%}"


def floor_texts(rows, goal):
    """Return the texts about the floor, and about the ratio that would be reached there.

    They are empty if no run has measured it, as those of `alone_texts` are.
    """
    rows = [row for row in rows if row.floor is not None]
    if not rows:
        return ["", ""]
    last = rows[-1]
    rows = [row for row in rows if row.floor_of == last.floor_of]  # older runs may have another
    floor = f"{with_unit(middle(rows, 'floor'), last.unit)} {last.floor_of}"
    is_beyond = goal.ratio is not None and all(goal.is_beyond_floor(row) for row in rows)
    return [f"{floor} ({middle(rows, 'share'):.0%})", bound_text(middle(rows, "bound"), is_beyond)]


def alone_texts(rows, goal):
    """Return the texts about kernels that ran alone, and about the ratio that they would reach."""
    rows = [row for row in rows if row.alone is not None]
    if not rows:
        return ["", ""]
    last = rows[-1]
    rows = [row for row in rows if row.alone_of == last.alone_of]  # older runs may have others
    alone = f"{with_unit(middle(rows, 'alone'), 's')} {last.alone_of}"
    is_beyond = goal.ratio is not None and all(goal.is_beyond_alone(row) for row in rows)
    share = None if goal.share is None else middle(rows, "most_share")
    bound = bound_text(middle(rows, "bound_of_alone"), is_beyond, share)
    return [f"{alone} ({middle(rows, 'share_of_alone'):.0%})", bound]


def bound_text(bound, is_beyond, share=None):
    text = f"{bound:.2f}" if share is None else f"{bound:.2f} at {share:.0%}"
    return f"{text}, below the goal" if is_beyond else text


def ratio_text(title, record):
    """Return the ratio of a run, the middle half of its rounds, and a star if it was disturbed."""
    row = record.rows.get(title)
    if row is None:
        return ""
    text = f"{row.ratio:.2f}"
    if row.spread is not None:
        low, high = row.spread
        text += f" ({low:.2f} to {high:.2f})"
    if record.is_disturbed(row):
        text += " *"
    return text


def rows_of(title, records):
    return [record.rows[title] for record in records if title in record.rows]


def middle(rows, name):
    return median([getattr(row, name) for row in rows])


def goal_of_title(title):
    """Return the Goal of a row, whose title begins with the name of a model."""
    model, title_of_line = title.split(", ", 1)
    return goal_of(title_of_line, isinstance(KNOWN_MODELS[model].config, T5Config))


def line_of(cells):
    return f"| {' | '.join(cells)} |"


def with_unit(amount, unit):
    """Return seconds or bytes as a text in s, ms or MB."""
    if unit == "B":
        megabytes = amount / 1e6
        return f"{megabytes:,.0f} MB" if megabytes >= 10 else f"{megabytes:.3g} MB"
    return f"{amount:.2f} s" if amount >= 1 else f"{amount * 1e3:.3g} ms"
