"""Guards the benchmark of whole jobs: both sides do each job, and results that differ are noticed.

Nothing here depends on how long something takes.
"""

import json
import sys
import time
from concurrent.futures import wait
from pathlib import Path

import pytest
import torch
from forks import fork_python
from safetensors.torch import save_file

import minia3
from tests.benchmarks import __main__ as benchmarks
from tests.benchmarks.jobs import answering, labelling, processes
from tests.benchmarks.jobs.command import JOBS, MODELS, main
from tests.benchmarks.jobs.inputs import Inputs, Setting
from tests.benchmarks.jobs.processes import Runner, as_words, run_in_turns
from tests.benchmarks.jobs.products import count_weights
from tests.benchmarks.jobs.training import apart, check_accuracy
from tests.benchmarks.measure import count_flops


@pytest.mark.slow  # because it starts a dozen processes
@pytest.mark.parametrize("model", MODELS)
def test_both_sides_do_every_job_with_the_same_results(model, tmp_path, capsys, monkeypatch):
    fork_python(monkeypatch)
    if model != MODELS[0]:
        leave_out_how_long_parts_take(monkeypatch)
    path = tmp_path / "result.json"
    flags = ["--quick", "--threads", "1", "--models", model]
    main([*flags, "--folder", str(tmp_path), "--json", str(path)])
    outcomes = json.loads(path.read_text())["jobs"]
    assert len(outcomes) == len(JOBS)
    for outcome in outcomes.values():
        assert outcome["ratio"] == outcome["theirs"] / outcome["ours"] > 0
        assert outcome["products"] > 0
    labels, texts = [outcome["agreed"] for outcome in outcomes.values()][2:]
    assert labels.startswith("24 of 24 labels")
    assert texts == "12 of 12 texts"
    assert capsys.readouterr().out.count("\n| ") == 1 + len(JOBS)  # and the head


@pytest.mark.slow
def test_a_peer_that_pads_less_and_reads_less_has_the_same_results(tmp_path, capsys, monkeypatch):
    """The batches of training differ, so adapters are not compared, but accuracies are."""
    fork_python(monkeypatch)
    leave_out_how_long_parts_take(monkeypatch)
    flags = ["--quick", "--threads", "1", "--models", "t5-base", "--jobs", "a,c"]
    main([*flags, "--folder", str(tmp_path), "--group-by-length", "--encode-once"])
    assert "| 24 of 24 labels;" in capsys.readouterr().out


def leave_out_how_long_parts_take(monkeypatch):
    """Do no job again that is only timed. The jobs of the first model are."""
    monkeypatch.setattr("tests.benchmarks.jobs.command.seconds_of_start", lambda *args: 1.0)
    monkeypatch.setattr(Runner, "seconds_of_kernels", lambda *args: 1.0)


def test_the_word_jobs_leads_to_the_jobs(capsys):
    with pytest.raises(SystemExit, match=r"\A0\Z"):
        benchmarks.main(["jobs", "--help"])
    assert "python -m tests.benchmarks jobs" in capsys.readouterr().out


# Turns


# Writes its name three times, each time after the other has written as often, if it must wait.
WRITE_NAME = """
import sys, time
from pathlib import Path
file, name, other, must_wait = Path({file!r}), *sys.argv[1:]
for i in range(3):
    with file.open("a") as names:
        names.write(name)
    while must_wait == "yes" and file.read_text().count(other) <= i:
        time.sleep(0.01)
"""


linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.fixture
def writers(tmp_path):
    """Two sides that write their names into a file: (runners, function of must_wait, the file)."""
    file = tmp_path / "names"
    program = WRITE_NAME.format(file=str(file))
    runners = {name: Runner(Setting(threads=1), tmp_path) for name in ("a", "b")}

    def sides(must_wait):
        return {
            "a": lambda runner: runner("-c", program, "a", "b", must_wait),
            "b": lambda runner: runner("-c", program, "b", "a", must_wait),
        }

    return runners, sides, file


@linux_only
def test_the_sides_take_turns_until_both_have_ended(writers, monkeypatch):
    """Neither could end alone. And while one has its turn, the other is stopped."""
    runners, sides, file = writers
    n_stopped = []

    def wait_while_others_are_stopped(outcomes, seconds):
        stopped = [runner.process for runner in runners.values() if runner.is_stopped]
        for process in filter(None, stopped):
            while state_of(process) not in STOPPED_OR_ENDED:
                time.sleep(0.001)
            n_stopped.append(1)
        return wait(outcomes, seconds)

    monkeypatch.setattr(processes, "wait", wait_while_others_are_stopped)
    times = run_in_turns(sides("yes"), runners, seconds_of_a_turn=0.05)
    assert sorted(file.read_text()) == [*"aaabbb"]
    assert times.keys() == runners.keys()
    assert n_stopped
    assert all(runner.cpu_seconds > 0 for runner in runners.values())


STOPPED_OR_ENDED = ("T", "Z", "")


def state_of(process):
    """Return the letter that Linux has for the state of a process, or "" if it is gone."""
    try:
        stat = Path(f"/proc/{process.pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return stat.rpartition(")")[2].split()[0]


def test_without_turns_one_side_follows_the_other(writers):
    runners, sides, file = writers
    run_in_turns(sides("no"), runners, seconds_of_a_turn=None)
    assert file.read_text() == "aaabbb"


def test_a_side_that_fails_ends_the_other(tmp_path):
    runners = {name: Runner(Setting(threads=1), tmp_path) for name in ("a", "b")}

    def fail(runner):
        runner("-c", "raise SystemExit('a mistake')")

    def sleep(runner):
        runner("-c", "import time; time.sleep(1000)")

    with pytest.raises(RuntimeError, match="a mistake"):
        run_in_turns({"a": sleep, "b": fail}, runners, seconds_of_a_turn=0.1)


# What must not pass for the same result


def test_accuracies_may_differ_by_noise_alone():
    check_accuracy(0.52, 0.55, n_rows=277)
    for theirs in (0.75, float("nan")):
        with pytest.raises(AssertionError, match=r"accuracy 0\.520, and theirs"):
            check_accuracy(0.52, theirs, n_rows=277)


def test_adapters_are_apart_by_a_part_of_their_way_from_ones(tmp_path):
    def write(name, **vectors):
        (tmp_path / name).mkdir()
        save_file(vectors, tmp_path / name / "adapter_model.safetensors")
        return tmp_path / name

    theirs = write("theirs", l_k=torch.tensor([1.0, 1.3]), l_v=torch.tensor([1.4]))
    ours = write("ours", l_k=torch.tensor([1.0, 1.3]), l_v=torch.tensor([1.45]))
    ones = write("ones", l_k=torch.ones(2), l_v=torch.ones(1))
    assert apart(theirs, theirs) == 0
    assert apart(ours, theirs) == pytest.approx(0.05 / 0.5, rel=1e-5)
    assert apart(ones, theirs) == pytest.approx(1)
    assert apart(ours, ones) > 0
    with pytest.raises(AssertionError, match="different vectors"):
        apart(write("fewer", l_k=torch.ones(2)), theirs)


def result(*scores):
    return {"label": scores.index(max(scores)), "scores": list(scores)}


def test_labels_may_differ_only_if_the_scores_are_near():
    sure = result(-1.0, -3.0)
    close = result(-2.0, -2.0001)
    other = result(-2.0001, -2.0)
    assert labelling.compare([sure, close], [sure, close], 1e-3).startswith("2 of 2")
    assert labelling.compare([sure, close], [sure, other], 1e-3).startswith("1 of 2")
    mislabeled = {"label": 1, "scores": sure["scores"]}
    with pytest.raises(AssertionError, match="row 1 has label 1, and 0"):
        labelling.compare([sure, mislabeled], [sure, sure], 1e-3)
    for scores in ((-1.5, -3.0), (float("nan"), -3.0)):
        with pytest.raises(AssertionError, match="the scores of the two sides differ by"):
            labelling.compare([sure], [{"label": 0, "scores": scores}], 1e-3)


def test_texts_must_be_equal_in_float32():
    assert answering.compare(["a", "b"], ["a", "b"], "float32") == "2 of 2 texts"
    assert answering.compare(["a", "b"], ["a", "c"], "bfloat16") == "1 of 2 texts"
    with pytest.raises(AssertionError, match="1 of 2 texts"):
        answering.compare(["a", "b"], ["a", "c"], "float32")


# What both sides read


def test_a_scale_divides_but_leaves_something():
    assert Setting(scale=10).divided(277) == 28
    assert Setting(scale=1000).divided(100) == 1


def test_flags_are_words():
    assert as_words({"max_batch": 4, "encode_once": True, "a": False}) == [
        "--max-batch",
        "4",
        "--encode-once",
    ]


@pytest.mark.parametrize("model", MODELS)
def test_the_products_of_a_pass_are_counted_as_torch_counts_them(model, tmp_path):
    """Without those of attention, which have no weights."""
    inputs = Inputs(model, tmp_path, Setting(quick=True))
    ours = minia3.load_model(inputs.model)
    source = torch.zeros(1, 1, dtype=torch.long)
    target = torch.zeros(1, 3, dtype=torch.long)
    n_source = 1 if inputs.is_t5 else 0  # a LLaMA has read all of a prompt but its last token

    def score():
        minia3.logprobs(ours, ours.start(source), target)

    config = ours.config
    n_query_keys = 3 * 3 + 3 + 1 if inputs.is_t5 else 3 * 3
    attention = 4 * config.n_layers * config.n_heads * config.d_head * n_query_keys
    found = count_weights(inputs.model).flops(n_source, 3)
    assert found == pytest.approx(count_flops(score) - attention, rel=0.01)


def test_both_sides_get_the_same_rows_in_the_same_order(tmp_path):
    """The file of training has the rows of each step, in the words that train.py draws."""
    inputs = Inputs("t5-base", tmp_path, Setting(quick=True))
    flags = inputs.training_flags(n_steps=3, n_test=5, seeds=(0, 1), rates=(1e-3, 3e-3))
    folder = inputs.training_rows(flags)
    batches = minia3.batches(
        minia3.load_model(inputs.model),
        minia3.load_tokenizer(inputs.model),
        minia3.load_task(flags["task"], shots=flags["shots"], seed=1),
        steps=3,
        seed=1,
    )
    tokenizer = minia3.load_tokenizer(inputs.model)
    lines = (folder / "train-1.jsonl").read_text().splitlines()
    assert len(lines) == 3 * 8
    sources = []
    for batch in batches:
        for source, mask in zip(batch.source_BM, batch.mask_BM, strict=True):
            sources.append(source[mask].tolist())
    assert [tokenizer.encode(json.loads(line)["input"]) for line in lines] == sources
    assert len((folder / "test.jsonl").read_text().splitlines()) == 5


def test_rows_name_adapters_in_mixed_order(tmp_path):
    inputs = Inputs("smollm2-135m", tmp_path, Setting(quick=True))
    rows = [json.loads(line) for line in inputs.rows(40, 4).read_text().splitlines()]
    names = [row["adapter"] for row in rows]
    assert set(names) == {path.name for path in inputs.adapters(4).iterdir()}
    assert names != sorted(names)
    assert all("label" not in row for row in rows)
