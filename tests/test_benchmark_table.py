"""The published tables are those of the published runs, and a run says what it was measured on."""

import json
import os
import re
from dataclasses import replace

import pytest
import torch

from tests.benchmarks import __main__ as benchmarks
from tests.benchmarks import machine, table
from tests.benchmarks.lines import GOALS, GOALS_OF_SHARE, goal_of
from tests.benchmarks.measure import Row
from tests.benchmarks.record import Record, begin_or_continue, read_record

STEP = "t5-base, training step, no padding"
KEPT = "t5-base, bytes kept for backward, against (IA)^3"
EXPORT = "t5-base, load, merge and export"
GENERATION = "t5-base, greedy generation, batch 1"


def record_of(rows, **about):
    machine_of_run = {"processor": "a core", "instructions": ["avx512f"], "cores": 2}
    described = {
        "date": "2026-01-02 03:04",
        "seconds": 1800.0,
        "load": {"start": 0.1, "end": 1.0},
        "commit": "a",
        "machine": {**machine_of_run, "memory": 8e9, "kernel": "Linux 6.1.0"},
        "versions": {"torch": "2.13.0+cpu"},
        "threads": 1,
        "dtype": "bfloat16",
        "lines": [],
    }
    return Record({**described, **about}, rows)


def step_row(ratio=1.25, share=0.85, **others):
    fields = {"spread": [1.0, 2.0], "peak_flops": 1e12, "others_busy": 0.0, **others}
    return Row("s", 2.0, 2.0 * ratio, ratio, floor=2.0 * share, floor_of="roof", **fields)


# The documents


def test_the_tables_of_the_documents_are_those_of_the_published_runs():
    records = table.read_records()
    of_page, of_notes = table.markdown_of_pages(records)
    page = table.PAGE.read_text(encoding="utf-8")
    assert table.IN_PAGE.search(page)[0] == of_page
    notes = table.NOTES.read_text(encoding="utf-8")
    assert table.IN_PAGE.search(notes)[0] == of_notes
    readme = table.README.read_text(encoding="utf-8")
    assert table.IN_README.search(readme)[0] == table.markdown_of_readme(records)


@pytest.mark.parametrize(
    ("name", "place"), [("PAGE", "IN_PAGE"), ("NOTES", "IN_PAGE"), ("README", "IN_README")]
)
def test_a_figure_that_is_edited_by_hand_is_noticed(name, place, tmp_path, monkeypatch):
    page = getattr(table, name)
    text = page.read_text(encoding="utf-8")
    shown = getattr(table, place).search(text)[0]
    edited = re.sub(r"\d\.\d\d s", "9.87 s", shown, count=1)
    assert edited != shown
    for other_name in ("PAGE", "NOTES", "README"):  # copies, because they are written below
        other = getattr(table, other_name)
        copy = tmp_path / other.name
        copy.write_text(other.read_text(encoding="utf-8"), encoding="utf-8")
        monkeypatch.setattr(table, other_name, copy)
    getattr(table, name).write_text(text.replace(shown, edited), encoding="utf-8")
    with pytest.raises(AssertionError):
        test_the_tables_of_the_documents_are_those_of_the_published_runs()
    table.main(["--write"])
    test_the_tables_of_the_documents_are_those_of_the_published_runs()


def test_every_published_run_is_a_full_run_without_other_settings():
    paths = sorted(table.PUBLISHED.glob("*.json"))
    assert paths
    for path in paths:
        record = read_record(path)
        assert not record.about["quick"]
        assert set(table.README_TITLES) <= record.rows.keys()


# Several runs side by side


def test_several_runs_stand_side_by_side():
    a = record_of({STEP: step_row(1.25), KEPT: Row("B", 2e6, 4e6, 2.0)})
    b = record_of({STEP: step_row(1.35, others_busy=0.6)}, date="2026-01-03 03:04", commit="b")
    c = record_of({STEP: step_row(1.15)}, date="2026-01-04 03:04")
    text = table.markdown([a, b, c])
    lines = text.splitlines()
    assert lines[:2] == ["#### a core", ""]
    assert lines[4] == "| date | 2026-01-02 03:04 | 2026-01-03 03:04 | 2026-01-04 03:04 |"
    assert lines[6].startswith("| threads, memory, system | 1 of 2 cores, 8 GB, Linux 6.1.0 |")
    ruled_out = "goals; the floors rule out 0, and the kernels alone rule out 0."
    assert f"Run A reaches 2 of 2 {ruled_out}" in lines
    assert f"Run C reaches 0 of 1 {ruled_out}" in lines
    assert "The runs are of 2 different commits." in lines
    assert "Disturbed by other work, and marked with a star: 1." in lines
    ratios = "1.25 (1.00 to 2.00) | 1.35 (1.00 to 2.00) * | 1.15 (1.00 to 2.00)"
    floor = "1.70 s roof (85%) | 1.47"
    assert f"| {STEP} | 2.00 s | 2.50 s | {ratios} | 1.2 at 80% | 2 of 3 | {floor} |  |  |" in lines
    assert f"| {KEPT} | 2 MB | 4 MB | 2.00 |  |  | 1.6 | 1 of 1 |  |  |  |  |" in lines


def test_a_row_was_disturbed_if_others_were_busy_or_the_roof_was_low():
    quiet = step_row(peak_flops=1e12, others_busy=0.4)
    record = record_of({STEP: quiet})
    assert not record.is_disturbed(quiet)
    assert record.is_disturbed(replace(quiet, others_busy=0.6))
    assert record.is_disturbed(replace(quiet, peak_flops=0.8e12))
    assert not record.is_disturbed(Row("B", 1, 1, 1.0))


def test_a_run_says_how_many_calls_were_made_again():
    first = step_row(repeated=7, calls=1_000)
    second = step_row(repeated=4, calls=30)
    with_repeats = record_of({STEP: first, GENERATION: second, KEPT: Row("B", 2e6, 4e6, 2.0)})
    heading = table.heading([record_of({STEP: step_row()}), with_repeats])
    assert "| calls made again | none | 11 of 1,030 |" in heading.splitlines()


def test_a_goal_beyond_the_floor_or_beyond_the_kernels_alone_is_shown_as_such():
    row = replace(step_row(ratio=1.08), theirs=2.16, floor=1.6, floor_of="products")
    row = replace(row, alone=1.8, alone_of="products")
    text = table.table_row(GENERATION, [record_of({GENERATION: row})])
    alone = "1.80 s products (90%) | 1.20, below the goal"
    assert text.endswith(f"| 0 of 1 | 1.60 s products (80%) | 1.35 | {alone} |")
    assert "the floors rule out 0, and the kernels alone rule out 1." in table.summary(
        [record_of({GENERATION: row})]
    )
    row = replace(row, floor=1.79)
    text = table.table_row(GENERATION, [record_of({GENERATION: row})])
    assert "| 1.79 s products (90%) | 1.21, below the goal |" in text
    assert "the floors rule out 1, and the kernels alone rule out 1." in table.summary(
        [record_of({GENERATION: row})]
    )


def test_kernels_alone_rule_out_a_goal_if_they_run_below_its_share_of_the_roof():
    row = replace(step_row(ratio=1.25, share=0.5), alone=1.25, alone_of="products")
    text = table.table_row(STEP, [record_of({STEP: row})])
    alone = "1.25 s products (62%) | 2.00 at 80%"
    assert text.endswith(f"| 0 of 1 | 1.00 s roof (50%) | 2.50 | {alone} |")
    row = replace(row, alone=1.6)
    text = table.table_row(STEP, [record_of({STEP: row})])
    alone = "1.60 s products (80%) | 1.56 at 62%, below the goal"
    assert text.endswith(f"| 0 of 1 | 1.00 s roof (50%) | 2.50 | {alone} |")


def test_a_floor_of_bytes_is_shown_in_bytes():
    row = Row("B", 2e6, 4e6, 2.0, floor=1e6, floor_of="weights")
    text = table.table_row(KEPT, [record_of({KEPT: row})])
    assert text.endswith("| 1 MB weights (50%) | 4.00 |  |  |")


def test_runs_that_measured_less_or_other_floors_and_kernels_stand_beside_a_new_one():
    oldest = Row("s", 2.0, 4.0, 2.0)
    old = replace(oldest, floor=1.0, floor_of="writing a file", alone=1.0, alone_of="writing")
    new = replace(oldest, floor=1.6, floor_of="copying the files", alone=1.8, alone_of="folding")
    text = table.table_row(EXPORT, [record_of({EXPORT: row}) for row in (oldest, old, new)])
    assert text.endswith("| 1.60 s copying the files (80%) | 2.50 | 1.80 s folding (90%) | 2.22 |")


def test_runs_of_one_day_have_other_files_if_torch_or_the_processor_is_another(monkeypatch):
    described = {"processor": "Intel(R) Xeon(R) Processor"}
    monkeypatch.setattr(table, "describe_machine", lambda device: described)
    file = table.published_file("2026-01-02", "2.13.0+cpu", "cpu")
    assert file == table.PUBLISHED / "2026-01-02-intel-xeon-torch-2.13.0.json"
    file = table.published_file("2026-01-02", "2.15.0", "cpu")
    assert file == table.PUBLISHED / "2026-01-02-intel-xeon-torch-2.15.0.json"
    described["accelerator"] = "NVIDIA H100"
    file = table.published_file("2026-01-02", "2.15.0", "cuda")
    assert file == table.PUBLISHED / "2026-01-02-nvidia-h100-torch-2.15.0.json"


def test_another_processor_has_a_table_of_its_own():
    def on(processor, date):
        return record_of({STEP: step_row()}, date=date, machine={**machine_of, **processor})

    machine_of = record_of({}).about["machine"]
    xeon = on({"processor": "Intel(R) Xeon(R) Processor"}, "2026-01-01 03:04")
    first = on({"processor": "AMD EPYC"}, "2026-01-02 03:04")
    second = on({"processor": "AMD EPYC"}, "2026-01-03 03:04")
    lines = table.markdown([xeon, first, second]).splitlines()
    heads = [line for line in lines if line.startswith(("####", "| run", "| line"))]
    assert heads[:2] == ["#### Intel Xeon", "| run | A |"]
    assert heads[2].startswith("| line | ours | theirs | theirs / ours, A | goal |")
    assert heads[3:5] == ["#### AMD EPYC", "| run | B | C |"]
    assert heads[5].startswith("| line | ours | theirs | theirs / ours, B | theirs / ours, C |")
    reached = [line.partition(" reaches")[0] for line in lines if " reaches " in line]
    assert reached == ["Run A", "Run B", "Run C"]


def test_the_page_has_the_last_runs_of_one_processor_and_the_notes_have_the_others():
    def heads(text):
        return [line for line in text.splitlines() if line.startswith(("####", "| run"))]

    machine_of = record_of({}).about["machine"]
    days = [f"2026-01-0{day} 03:04" for day in range(1, 7)]
    records = [record_of({STEP: step_row()}, date=day) for day in days]
    records[1].about["machine"] = {**machine_of, "processor": "another core"}
    of_page, of_notes = table.markdown_of_pages(records)
    assert heads(of_page) == ["#### a core", "| run | B | C | D | E |"]
    assert heads(of_notes) == ["#### a core", "| run | A |", "#### another core", "| run | F |"]
    assert "2026-01-01" in of_notes
    assert "2026-01-01" not in of_page
    of_page, of_notes = table.markdown_of_pages(records[2:])
    assert heads(of_page) == ["#### a core", "| run | A | B | C | D |"]
    assert of_notes == ""


def test_the_table_of_the_readme_is_of_the_processor_with_the_most_runs():
    row = {title: step_row() for title in table.README_TITLES}
    slower = {title: replace(step_row(), ours=9.0) for title in table.README_TITLES}
    machine_of = record_of({}).about["machine"]
    records = [record_of(row), record_of(row, date="2026-01-03 03:04")]
    other = record_of(slower, date="2026-01-01 03:04", machine={**machine_of, "processor": "b"})
    assert table.markdown_of_readme([other, *records]) == table.markdown_of_readme(records)
    assert "| 9.00 s |" in table.markdown_of_readme([other])
    last = record_of(slower, date="2026-01-04 03:04", machine=other.about["machine"])
    assert "| 9.00 s |" in table.markdown_of_readme([other, *records, last])


def test_the_oldest_run_comes_first_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "PUBLISHED", tmp_path)
    dates = {"a": "2026-01-03 09:10", "b": "2026-01-03 09:09", "c": "2026-01-01 23:00"}
    for name, day in dates.items():
        record = record_of({}, date=day)
        record.path = tmp_path / f"{name}.json"
        record.write()
    for files in ((), sorted(tmp_path.glob("*"))):
        assert [record.path.stem for record in table.read_records(files)] == ["c", "b", "a"]


def test_a_goal_with_a_share_of_the_roof_needs_both():
    goal = goal_of("training step, no padding", is_t5=True)
    assert goal.is_reached(step_row(1.2, 0.80))
    assert not goal.is_reached(step_row(1.19, 0.80))
    assert not goal.is_reached(step_row(1.2, 0.79))


def test_every_goal_is_of_a_line_that_has_one():
    assert GOALS_OF_SHARE.keys() <= GOALS.keys()


# The record of a run


def test_a_run_goes_on_where_it_was_interrupted(tmp_path, monkeypatch, capsys):
    measured = []

    def line(name):
        def measure(bench, pair):
            if name in failing:
                raise KeyboardInterrupt
            measured.append(name)
            yield f"line {name}", Row("B", 1, 2, 2.0)

        return measure

    failing = {"second"}
    lines = {name: line(name) for name in ("first", "second")}
    monkeypatch.setattr(benchmarks, "LINES", lines)
    path = tmp_path / "run.json"
    flags = ["--quick", "--models", "t5-base", "--only", "first,second", "--json", str(path)]
    with pytest.raises(KeyboardInterrupt):
        benchmarks.main(flags)
    assert json.loads(path.read_text())["lines"] == ["t5-base, first"]

    failing.clear()
    benchmarks.main(flags)
    assert measured == ["first", "second"]
    content = json.loads(path.read_text())
    assert content["lines"] == ["t5-base, first", "t5-base, second"]
    assert content["rows"].keys() == {"t5-base, line first", "t5-base, line second"}

    with pytest.raises(SystemExit, match="was measured with dtype = bfloat16, and now it is float"):
        benchmarks.main([*flags, "--dtype", "float32"])
    benchmarks.main(["table", str(path)])
    assert "| t5-base, line second | 1e-06 MB | 2e-06 MB | 2.00 |" in capsys.readouterr().out


def test_a_run_that_has_ended_measures_its_disturbed_lines_again(tmp_path, monkeypatch):
    """And it keeps the figures beside which the machine was calmer, whatever the ratios are."""
    waiting = {
        "quiet": [step_row(1.0)],
        "noisy": [step_row(1.1, others_busy=0.9), step_row(1.2, others_busy=0.7), step_row(1.3)],
        "slow": [step_row(1.4, peak_flops=5e11), step_row(1.5, peak_flops=4e11)],
    }

    def line(name):
        return lambda bench, pair: iter([(name, waiting[name].pop(0))])

    monkeypatch.setattr(benchmarks, "LINES", {name: line(name) for name in waiting})
    path = tmp_path / "run.json"
    flags = ["--quick", "--models", "t5-base", "--only", ",".join(waiting), "--json", str(path)]
    ratios = []
    for _ in range(2):
        benchmarks.main(flags)
        ratios.append([row.ratio for row in read_record(path).rows.values()])
    assert ratios == [[1.0, 1.1, 1.4], [1.0, 1.1, 1.4]]
    waiting["slow"].append(step_row(1.6))
    benchmarks.main(flags)
    record = read_record(path)
    assert [row.ratio for row in record.rows.values()] == [1.0, 1.3, 1.6]
    assert record.about["lines"] == [f"t5-base, {name}" for name in waiting]
    assert not any(waiting.values())
    benchmarks.main(flags)  # nothing is left to measure


def test_a_record_is_written_after_every_row_and_read_back(tmp_path):
    path = tmp_path / "run.json"
    settings = {"commit": "a", "versions": {"torch": "2"}}
    record = begin_or_continue(settings, path)
    record.add("one", Row("B", 1, 2, 2.0))
    found = read_record(path)
    assert found.rows == record.rows
    assert found.about == record.about
    assert begin_or_continue(settings, path).about["date"] == record.about["date"]
    with pytest.raises(ValueError, match="commit = a, and now it is b: give another file"):
        begin_or_continue({**settings, "commit": "b"}, path)


def test_a_run_says_what_it_was_measured_on():
    described = machine.describe_machine("cpu")
    assert described["cores"] == os.cpu_count()
    assert described["memory"] > 10**8
    assert described["processor"]
    assert set(described["instructions"]) <= set(machine.INSTRUCTIONS)
    assert machine.versions()["torch"] == torch.__version__


def test_generations_of_a_processor_have_different_names(monkeypatch):
    lines = {"model name": "AMD EPYC", "cpu family": "26", "model": "2"}
    monkeypatch.setattr(machine, "cpuinfo", lines.get)
    assert machine.processor_name() == "AMD EPYC, family 26, model 2"
    del lines["cpu family"]  # as on ARM
    assert machine.processor_name() == "AMD EPYC"


@pytest.mark.skipif(not machine.Path("/proc/loadavg").exists(), reason="Linux says who is busy")
def test_this_thread_is_not_counted_among_the_others(monkeypatch):
    assert machine.n_own_busy() >= 1
    assert machine.n_others_busy() >= 0
    monkeypatch.setattr(machine, "n_own_busy", lambda: 0)
    assert machine.n_others_busy() >= 1


@pytest.mark.skipif(not (machine.ROOT / ".git").exists(), reason="there is no repository")
def test_a_run_says_which_commit_it_measured():
    assert len(machine.commit().partition(",")[0]) == 40
