"""Guards the benchmarks: every line works on tiny models, where both sides compute the same before they are timed."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import running
import torch

import minia3
from minia3.checkpoints.known_models import known_models
from minia3.checkpoints.load import build_model
from minia3.training.checkpoint import load_checkpoint
from minia3.training.flags import parse_flags
from minia3.training.rules import check_config
from tests.benchmarks import growth, memory, studies
from tests.benchmarks.__main__ import main
from tests.benchmarks.lines import GOALS, LINES
from tests.benchmarks.measure import Bench, Roof
from tests.benchmarks.pairs import Pair, config_of

HERE = ",".join(LINES.keys() - {"start", "peak"})


def run(folder, *flags):
    main(["--quick", "--json", str(folder / "result.json"), *flags])
    return json.loads((folder / "result.json").read_text())


def test_every_line_works_on_a_t5(tmp_path, capsys):
    """In float32, where texts are compared too."""
    result = run(tmp_path, "--models", "t5-base", "--dtype", "float32")
    rows = {line.removeprefix("t5-base, "): row for line, row in result["rows"].items()}
    assert all(row["ours"] > 0 and row["ratio"] > 0 for row in rows.values())
    assert GOALS.keys() <= rows.keys()
    assert all(row["goal"] == GOALS.get(what, (None,))[0] for what, row in rows.items())
    assert capsys.readouterr().out.count("\n| ") == len(rows) + 1


def test_lines_that_begin_no_process_work_on_a_llama(tmp_path):
    """In bfloat16; with the share of the roof that is reached."""
    result = run(tmp_path, "--models", "smollm2-135m", "--dtype", "bfloat16", "--only", HERE)
    assert len(result["rows"]) > 2 * len(HERE.split(","))
    steps = {line: row for line, row in result["rows"].items() if "training step" in line}
    assert len(steps) == 5
    for row in steps.values():
        assert row["roof"] == row["flops"] / row["ours"] / row["peak_flops"] > 0
        assert row["tokens_per_second"] > 0
    texts = [row for line, row in result["rows"].items() if "generation" in line]
    assert all(row["ours_over_products"] == row["ours"] / row["products"] for row in texts)


@pytest.mark.parametrize(
    "line", ["adapters", "export", "steps", "choices", "many_tasks", "ranking", "generation"]
)
@pytest.mark.parametrize("model", ["t5-base", "smollm2-135m"])
def test_nothing_is_timed_where_one_side_leaves_the_adapter_out(model, line, tmp_path, monkeypatch):
    dtype = torch.float32 if line == "generation" else torch.bfloat16
    pair = Pair(model, tmp_path, True, dtype)
    monkeypatch.setattr(minia3, "load_adapter", lambda *_: None)
    with pytest.raises(AssertionError, match="the two sides"):
        list(LINES[line](Bench(True, 1, Roof(dtype, 8)), pair))


def test_growth_is_measured_fitted_and_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib, which draws the figure, is not installed")
    growth.main(
        [
            "--quick",
            "--dtype",
            "float32",
            "--json",
            str(tmp_path / "growth.json"),
            "--plot",
            str(tmp_path),
        ]
    )
    result = json.loads((tmp_path / "growth.json").read_text())
    assert {p["sweep"] for p in result["points"]} == growth.SWEEPS.keys()
    assert result["exponents"]["smollm2-135m, length, train"]["kept"] == pytest.approx(1, abs=0.01)
    assert "</svg>" in (tmp_path / "growth.svg").read_text()


# Memory


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="memory is measured and limited as Linux does it"
)
@pytest.mark.parametrize("name", ["t5-base", "smollm2-135m"])
def test_a_process_that_trains_is_measured_and_one_that_finds_no_memory_is_told_from_a_failure(
    name,
):
    config = config_of(name, quick=True)
    given = torch.float32, 2, 16, True
    assert 0 < memory.measured(config, *given, limit=10**9) < 10**8
    assert memory.measured(replace(config, vocab_size=10**7), *given, limit=10**9) is None
    with pytest.raises(RuntimeError, match="IndexError"):
        memory.measured(replace(config, vocab_size=1), *given)


@pytest.mark.parametrize("room", [10**6, 3 * 10**8, 10**9, 10**12])
def test_the_largest_model_that_trains_is_found_by_bisection(room, monkeypatch, capsys):
    def measured(config, *_, limit, **__):
        n = sum(p.numel() for p in build_model(config).parameters())
        return n if n < limit else None

    monkeypatch.setattr(memory, "measured", measured)
    memory.main(["--largest", str(room / 1e9)])
    counts = {
        name: sum(p.numel() for p in build_model(known.config).parameters())
        for name, known in known_models().items()
    }
    best = max((n for n in counts.values() if n < room), default=None)
    found = capsys.readouterr().out.split()[-1]
    assert counts.get(found) == best
    assert (found == "none") == (best is None)


# Studies


@pytest.mark.parametrize("name", studies.STUDIES)
def test_each_line_of_a_study_is_a_command_line_of_train_py_with_a_name_of_its_own(
    name, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        studies, "held_out", lambda folder: [f"{folder}/{task}" for task in "abcdx"]
    )
    monkeypatch.setattr(studies.subprocess, "run", lambda *args, **options: None)  # makes bases
    lines = list(studies.STUDIES[name]("tiny-t5", tmp_path))
    assert len({of for of, _ in lines}) == len(lines) > 16
    for of, words in lines:
        assert Path(of).name == of
        check_config(parse_flags(running.train.Config, words, ""))


def test_a_study_begins_goes_on_with_what_was_stopped_and_leaves_alone_what_is_finished(
    tmp_path, monkeypatch, capfd
):
    some = {
        name: running.words(None, steps=4, seed=seed) for seed, name in enumerate(("one", "two"))
    }
    monkeypatch.setattr(studies, "STUDIES", {"s": lambda model, out: some.items()})
    study = ["s", "--model", "m", "--out", str(tmp_path), "--save-every", "1"]
    with pytest.raises(SystemExit):
        studies.main([*study, "--only", "three"])
    assert "expected the beginning of one of one, two" in capfd.readouterr().err
    studies.main([*study, "--only", "one"])
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    checkpoint = tmp_path / "one" / "checkpoint.pt"
    lines, state = running.metrics(tmp_path / "one"), checkpoint.read_bytes()
    studies.main(study)
    assert checkpoint.read_bytes() == state
    assert "is finished" in capfd.readouterr().out
    assert running.metrics(tmp_path / "two")[-1]["event"] == "final"
    checkpoint.unlink()  # as one that was stopped before its first
    studies.main(study)
    assert running.metrics(tmp_path / "one")[-1]["accuracy"] == lines[-1]["accuracy"]
    assert load_checkpoint(tmp_path / "one").is_finished


@pytest.mark.skipif(
    "MINIA3_TEST_DATA" not in os.environ,
    reason="MINIA3_TEST_DATA is not set: no tokenizer, no data",
)
def test_the_study_of_t0_runs_to_its_end_on_a_tiny_model_of_its_architecture(tmp_path):
    """On CB, whose file is there, and StoryCloze, of which there are T-Few's published splits alone."""
    shared = Path(os.environ["MINIA3_TEST_DATA"])
    study = ["t0-3b", "--dry-run", str(shared / "tokenizers" / "t5-base"), "--out", str(tmp_path)]
    splits = {
        "ia3-storycloze": "T-Few's other splits",
        "lora-cb": "validation",
        "full-cb": "validation",
    }
    for name, split in splits.items():
        studies.main([*study, "--only", name, "--data-dir", str(shared / "data")])
        finals = [line for line in running.metrics(tmp_path / name) if line["event"] == "final"]
        assert [(final["adapter"], final["split"]) for final in finals] == [
            ("s0", split),
            ("s1", split),
        ]
        assert all(final["steps"] == 2 and len(final["accuracies"]) == 2 for final in finals)
