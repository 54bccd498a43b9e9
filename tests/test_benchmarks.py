"""Guards the benchmarks: every line works on tiny models, and both sides compute the same first.

Nothing here depends on how long something takes, or on how much memory an allocator keeps.
"""

import functools
import gc
import importlib
import itertools
import json
import os
import shutil
import sys
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import running
import torch
from forks import fork_python
from torch_version import counted_with_this_torch

import minia3
from minia3.checkpoints.known_models import KNOWN_MODELS
from minia3.checkpoints.load import build_model
from minia3.cli.main import main as minia3_main
from minia3.cli.table import PAPER_TASKS
from minia3.model import attend, linear
from minia3.model.blocks import RMSNorm
from minia3.model.ia3 import IA3
from minia3.tasks.known_tasks import known_tasks
from minia3.training.flags import as_tuple
from minia3.training.study_file import read_studies
from tests.benchmarks import (
    adapters,
    allocator,
    floors,
    growth,
    launches,
    measure,
    memory,
    operators,
    rows,
    study_inputs,
    training,
)
from tests.benchmarks.__main__ import in_order, main
from tests.benchmarks.inference import Ids, multiplications, random_prompts, without_vectors
from tests.benchmarks.jobs import timed
from tests.benchmarks.lines import COMPILES, GOALS, LINES, goal_of
from tests.benchmarks.measure import MOST_ROUNDS, Bench, Roof, Row
from tests.benchmarks.pairs import Pair, config_of
from tests.benchmarks.training import LENGTHS, loss_of, training_step
from tests.gpu.__main__ import main as check_gpu

STARTS_PROCESSES = ("start", "peak")
ROOT = Path(__file__).resolve().parents[1]
# Those that are built in no time
SHALLOW_MODELS = {
    name: known for name, known in KNOWN_MODELS.items() if known.config.n_layers <= 12
}
STUDIES = sorted((ROOT / "tests" / "benchmarks" / "studies").rglob("*.toml"))


@pytest.fixture(autouse=True)
def quick_collections():
    """Leave what is imported out of garbage collections.

    Each row of a table makes one, which takes a third of a second beside all of transformers.
    """
    importlib.import_module("peft")
    gc.freeze()
    yield
    gc.unfreeze()


def run_benchmark(folder, *flags):
    main(["--quick", "--json", str(folder / "result.json"), *flags])
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (main, ["--only", "steps,nonsense"]),
        (main, ["--models", "nonsense"]),
        (main, ["jobs", "--jobs", "nonsense"]),
        (main, ["jobs", "--models", "nonsense"]),
        (adapters.main, ["--models", "nonsense"]),
        (allocator.main, ["--models", "nonsense"]),
        (launches.main, ["--models", "nonsense"]),
        (operators.main, ["--models", "nonsense"]),
        (check_gpu, ["--only", "nonsense"]),
    ],
)
def test_a_name_that_does_not_exist_is_refused_by_the_parser(program, words, capsys):
    """It was a KeyError after the peers were imported."""
    with pytest.raises(SystemExit, match=r"\A2\Z"):
        program(words)
    message = capsys.readouterr().err.splitlines()[-1]
    expected = f"error: argument {words[-2]}: 'nonsense' is unknown, expected some of "
    assert expected in message


# The table


@pytest.mark.slow
def test_every_line_works_on_a_t5(tmp_path, capsys, monkeypatch):
    """In float32, because texts are compared only there.

    Blocks are neither traced nor compiled, which takes long and is tested in tests/model.
    """
    fork_python(monkeypatch)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # set_stance is from torch 2.6 on
    result = run_benchmark(tmp_path, "--models", "t5-base", "--dtype", "float32")
    rows = {}
    for title, row in result["rows"].items():
        rows[title.removeprefix("t5-base, ")] = row
    assert GOALS.keys() <= rows.keys()
    for title, row in rows.items():
        assert row["ours"] > 0
        assert row["ratio"] == row["theirs"] / row["ours"] > 0
        goal = goal_of(title, is_t5=True)
        assert row["goal"] == goal.ratio
        assert row.get("goal_share") == goal.share
        if row["unit"] == "s":
            assert row["rounds"] == 1
            assert row["peak_flops"] > 0
    assert {row["floor_of"] for row in rows.values() if "floor" in row} == {
        "roof",
        "products",
        "import of torch, mapping the weights",
        "reading the tensors",
        "making a tensor",
        "copying the files",
        "torch, weights, kept for backward",
        "the base alone",
    }
    assert {row["alone_of"] for row in rows.values() if "alone" in row} == {
        measure.ALL_KERNELS,
        "the same, building the layers",
        "building, folding and writing",
        "the base, multiplications",
    }
    assert result["lines"] == [f"t5-base, {line}" for line in LINES]
    n_printed = capsys.readouterr().out.count("\n| t5-base, ")
    assert n_printed == len(rows)


@pytest.mark.slow
def test_lines_that_are_quick_work_on_a_llama(tmp_path):
    """In bfloat16, where a row also says how near ours comes to the roof."""
    lines = [line for line in LINES if line not in (*STARTS_PROCESSES, *COMPILES)]
    flags = ["--models", "smollm2-135m", "--dtype", "bfloat16", "--only", ",".join(lines)]
    rows = run_benchmark(tmp_path, *flags)["rows"]
    assert len(rows) > 2 * len(lines)

    steps = [row for title, row in rows.items() if "training step" in title]
    assert len(steps) == 6
    rankings = [row for title, row in rows.items() if "rank evaluation" in title]
    for row in [*steps, *rankings]:
        assert row["floor"] == row["flops"] / row["peak_flops"] > 0
        assert row["bound"] == row["theirs"] / row["floor"]
        assert row["tokens_per_second"] > 0
    generations = [row for title, row in rows.items() if "generation" in title]
    assert len(generations) == 2
    for row in generations:
        assert row["floor_of"] == "products"
        assert row["alone_of"] == measure.ALL_KERNELS
        assert row["bound_of_alone"] == row["theirs"] / row["alone"] > 0
        assert row["tokens_per_second"] > 0


@pytest.mark.parametrize(
    "line", ["adapters", "export", "steps", "choices", "many_tasks", "ranking", "generation"]
)
@pytest.mark.parametrize("model", ["t5-base", "smollm2-135m"])
def test_nothing_is_timed_if_one_side_leaves_the_adapter_out(model, line, tmp_path, monkeypatch):
    dtype = torch.float32 if line == "generation" else torch.bfloat16
    pair = Pair(model, tmp_path, True, dtype)
    monkeypatch.setattr(minia3, "load_adapter", lambda *_: None)
    bench = Bench(True, 0, Roof(dtype, 8))
    with pytest.raises(AssertionError, match="the two sides"):
        list(LINES[line](bench, pair))


def test_the_sides_take_turns_in_going_first_and_none_follows_itself():
    calls = []
    sides = {name: functools.partial(calls.append, name) for name in ("a", "b", "c")}
    times = measure.alternate(sides, 3, n_warm_ups=1)
    assert calls == [*"abc", *"abc", *"bca", *"cab"]
    assert {side: len(seconds) for side, seconds in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_row_has_medians_and_the_middle_half_of_the_ratios():
    row = measure.summarize([1.0, 2.0, 4.0], [2.0, 2.0, 12.0])
    assert row.published() == {
        "unit": "s",
        "ours": 2.0,
        "theirs": 2.0,
        "ratio": 1.0,
        "ours_min": 1.0,
        "ours_spread": [1.0, 4.0],
        "theirs_min": 2.0,
        "theirs_spread": [2.0, 12.0],
        "spread": [1.0, 3.0],
        "rounds": 3,
        "goal": None,
    }
    assert measure.summarize([2.0], [3.0]).spread == [1.5, 1.5]


def test_a_row_says_what_ours_could_reach_at_its_floor_and_can_be_read_back():
    row = Row("s", ours=2.0, theirs=3.0, ratio=1.5, floor=1.5, floor_of="roof", alone=1.75)
    assert row.share == 0.75
    assert row.bound == 2.0
    assert row.published()["bound"] == 2.0
    assert row.share_of_alone == 0.875
    assert row.bound_of_alone == row.published()["bound_of_alone"] == 3 / 1.75
    assert Row.read(row.published()) == row


@pytest.mark.parametrize(("seconds_of_a_call", "n_rounds"), [(0.5, 10), (0.001, 21), (20.0, 3)])
def test_there_are_as_many_rounds_as_fit(seconds_of_a_call, n_rounds, monkeypatch):
    monkeypatch.setattr(measure, "seconds", lambda function: seconds_of_a_call)
    planned, seconds_to_take = Bench(False, 30, None).plan_rounds([None] * 3)
    assert planned == n_rounds
    assert seconds_to_take == pytest.approx(3 * n_rounds * 3 * 2 * seconds_of_a_call)
    assert Bench(True, 30, None).plan_rounds([None] * 3) == (1, 0)


def test_programs_that_are_measured_do_not_see_bitsandbytes():
    with pytest.raises(RuntimeError, match="bitsandbytes"):
        measure.run_program("import bitsandbytes")


@pytest.mark.parametrize("model", ["t5-base", "smollm2-135m"])
def test_the_base_alone_is_the_base(model, tmp_path):
    pair = Pair(model, tmp_path, True, torch.float32)
    source = torch.tensor([[3, 4, 5]])

    def logits(model):
        state = model.start(source)
        return model.step(state.start, state)

    with torch.no_grad():
        ones = minia3.load_model(pair.folder)
        base = without_vectors(pair.ours())
        assert torch.equal(logits(base), logits(ones))
        assert not torch.equal(logits(base), logits(pair.ours()))


def test_all_multiplications_by_vectors_of_a_call_are_made_alone(tmp_path):
    model = Pair("t5-base", tmp_path, True, torch.float32).ours(n_adapters=2)
    adapter = torch.tensor([1, 0])

    @torch.no_grad()
    def read():
        state = model.start(torch.tensor([[3, 4, 5], [6, 7, 8]]), None, adapter)
        return model.step(state.start, state)

    multiply = multiplications(model, read)
    seen = []
    for module in model.modules():
        if isinstance(module, IA3):
            module.register_forward_pre_hook(lambda module, args: seen.append((module, *args)))
    multiply()
    alone = [(module, x.shape, adapter_B.tolist()) for module, x, adapter_B in seen]
    assert not any(x.any() for _, x, _ in seen)
    seen.clear()
    read()
    assert alone == [(module, x.shape, adapter_B.tolist()) for module, x, adapter_B in seen]
    assert len(alone) == len(minia3.vectors(model))


def test_lines_that_compile_come_after_all_others_of_all_models():
    order = in_order(["a", "b"], ["steps", "flags", "generation"])
    assert order[:3] == [("a", "steps"), ("a", "generation"), ("b", "steps")]
    assert order[3:] == [("b", "generation"), ("a", "flags"), ("b", "flags")]


@pytest.fixture
def calls(monkeypatch):
    """The names of the sides that were called. A side returns how long it took."""
    names = []
    monkeypatch.setattr(measure, "n_others_busy", lambda: len(names))
    monkeypatch.setattr(measure, "seconds", lambda function: function())
    monkeypatch.setattr(Roof, "__call__", lambda _: side(names, "roof", 0.5)())
    return names


def side(calls, name, *n_seconds):
    """Return a function that notes its name, and returns the next of some times."""
    times = itertools.cycle(n_seconds)

    def run():
        calls.append(name)
        return next(times)

    return run


def test_the_roof_runs_after_each_call(calls):
    bench = Bench(True, 0, Roof(torch.float32, 8))
    ours = side(calls, "ours", 2.0)
    theirs = side(calls, "theirs", 3.0)
    row = bench.time(ours, theirs, alone=side(calls, "alone", 1.0))
    assert calls == ["roof", "ours", "roof", "theirs", "roof", "alone", "roof"]
    assert row.peak_flops == 2 * 8**3 / 0.5
    assert row.alone == 1.0
    assert row.others_busy == 4  # the mean of 2, 4 and 6
    assert (row.calls, row.repeated) == (3, 0)


def test_the_floor_is_the_least_of_all_rounds(calls):
    bench = Bench(False, 1000, Roof(torch.float32, 8))
    floor = side(calls, "floor", 4.0, 3.0, 2.0, 6.0)
    row = bench.time(side(calls, "ours", 5.0), side(calls, "theirs", 6.0), floor=floor)
    assert calls.count("floor") == 1 + MOST_ROUNDS  # planning calls it, too
    assert row.floor == 2.0


def test_a_call_beside_a_slow_roof_is_made_again(monkeypatch):
    monkeypatch.setattr(measure, "seconds", lambda function: function())
    roof = Roof(torch.float32, 8)
    roofs = iter([1.0, 1.2, 1.3, 1.2, 1.0, 0.5, 0.6, 0.7, 0.7, 0.6])
    monkeypatch.setattr(Roof, "__call__", lambda _: next(roofs))
    timer = measure.Timer(roof, seconds_to_take=1000)
    calls = itertools.count()
    counted = [timer(lambda: next(calls)) for _ in range(3)]
    # The roofs around call 0 are 1.0 and 1.2. The second limit is 1.25, until a roof of 0.5.
    assert counted == [0, 3, 5]
    assert timer.roofs == [1.2, 1.0, 0.6]
    assert timer.n_calls == 6

    timer.end = 0  # so every call counts
    assert [timer(lambda: next(calls)) for _ in range(3)] == [6, 7, 8]
    assert timer.n_calls == 9


def test_the_floor_of_products_is_the_longer_of_reading_and_computing():
    weight = torch.ones(5, 7)
    products = measure.record_kernels(
        lambda: (torch.ones(1, 5) @ weight, torch.ones(9, 5) @ weight)
    )
    # 140 bytes are read in 14 s. 70 and 630 operations take 7 and 63 s.
    assert products.least_seconds(bytes_per_second=10, flops_per_second=10) == 14 + 63


def test_products_with_the_weight_first_are_recorded_as_others_are(monkeypatch):
    monkeypatch.setattr(linear, "HAS_TILES", True)
    weight = torch.ones(7, 5, dtype=torch.bfloat16)

    def products():
        for shape in ((1, 1, 5), (3, 1, 5), (linear.MOST_ROWS + 1, 1, 5)):
            linear.linear(torch.ones(shape, dtype=torch.bfloat16), weight)

    with torch.no_grad():
        kernels = measure.record_kernels(products)
        shapes = [(len(x), tuple(w.shape)) for x, w in kernels.products]
        assert shapes == [(1, (5, 7)), (3, (5, 7)), (linear.MOST_ROWS + 1, (5, 7))]
        found = []
        monkeypatch.setattr(
            measure, "LINEAR_WITH_WEIGHT_FIRST", lambda x, w: found.append((len(x), w.shape))
        )
        kernels()
        assert found == [(1, weight.shape), (3, weight.shape)]


def test_flops_and_products_are_those_of_the_matrix_products():
    x = torch.ones(3, 5)
    weight = torch.ones(5, 7, requires_grad=True)

    def step():
        (x @ weight).sum().backward()

    assert measure.count_flops(step) == 2 * (2 * 3 * 5 * 7)  # forward, and the weight's gradient
    kernels = measure.record_kernels(lambda: torch.mm(x, weight.detach()).relu())
    assert [(len(x), tuple(w.shape)) for x, w in kernels.products] == [(3, (5, 7))]


@pytest.mark.parametrize("model", ["t5-base", "smollm2-135m"])
@pytest.mark.parametrize("like_rte", LENGTHS.values(), ids=LENGTHS)
def test_the_kernels_of_a_step_are_all_that_has_operations(model, like_rte, tmp_path):
    """Alone, they compute what the step computes, forward and backward."""
    pair = Pair(model, tmp_path, True, torch.bfloat16)
    ours = pair.ours().train()
    batch = pair.batch(pair.lengths(like_rte))
    step = training_step(loss_of(pair, ours, batch), ours.parameters())
    kernels = measure.record_kernels(step, are_all=True)
    assert measure.count_flops(kernels) == measure.count_flops(step)
    n_calls = Counter(func for func, _, _ in kernels.calls)
    n_norms = sum(isinstance(module, RMSNorm) for module in ours.modules())
    assert n_calls.pop(measure.normalized) == n_norms
    assert 0 < n_calls.pop(measure.norm_backward) <= n_norms
    others = [func for func in n_calls if not measure.is_elementwise(func)]
    assert len(others) == 3, "products, attention, and attention's backward pass"


@pytest.mark.parametrize("model", ["t5-base", "smollm2-135m"])
def test_the_kernels_of_generation_are_all_that_has_operations(model, tmp_path, monkeypatch):
    """The attention of a single query is written out, in products of a batch of matrices."""
    for module in (attend, linear):  # with tiles, other products and attention are faster
        monkeypatch.setattr(module, "HAS_TILES", False)
    pair = Pair(model, tmp_path, True, torch.bfloat16)
    ours = pair.ours()
    prompts = random_prompts(pair, 3)

    def write():
        minia3.generate(ours, Ids(), prompts, max_new_tokens=3)

    kernels = measure.record_kernels(write, are_all=True)
    assert measure.count_flops(kernels) == measure.count_flops(write)
    functions = {func for func, _, _ in kernels.calls} - {torch.nn.functional.rms_norm}
    others = [func for func in functions if not measure.is_elementwise(func)]
    assert len(others) == 3, "products, fused attention, and attention that is written out"


def test_kernels_alone_repeat_elementwise_operators_but_change_nothing():
    """An operator that writes into a tensor writes into another one, and norms count once."""
    x = torch.ones(3, 5)
    written = torch.ones(3, 5)

    def compute():
        x.relu()
        x.double().relu()
        written.mul_(2)
        torch.mul(x, 2, out=written)
        torch.nn.functional.rms_norm(x, (5,))
        x.to(torch.bfloat16)

    kernels = measure.record_kernels(compute, are_all=True)
    aten = torch.ops.aten
    norm = torch.nn.functional.rms_norm
    expected = [aten.relu.default, aten.relu.default, aten.mul_.Tensor, aten.mul.out, norm]
    assert [func for func, _, _ in kernels.calls] == expected
    assert [args[0].dtype for _, args, _ in kernels.calls[:2]] == [torch.float32, torch.float64]

    written.fill_(7)
    kernels()
    assert written.eq(7).all()


def test_products_have_their_own_weights_and_share_inputs_of_one_shape():
    weights = torch.ones(2, 5, 7)
    kernels = measure.record_kernels(lambda: [torch.ones(3, 5) @ weight for weight in weights])
    (first_x, first), (second_x, second) = kernels.products
    assert first_x is second_x
    assert (first.data_ptr(), second.data_ptr()) == (weights[0].data_ptr(), weights[1].data_ptr())


def test_kernels_of_a_program_are_timed_and_nothing_else_is(tmp_path, monkeypatch):
    seconds = {}
    norm = "torch.nn.functional.rms_norm(x, (900,))"
    lines = {"product": "x @ x", "norm": norm, "sum": "x + x", "copy": "x.clone()"}
    for name, line in lines.items():
        program = tmp_path / f"{name}.py"
        program.write_text(f"import sys, torch\nx = torch.ones(900, 900)\n{line}\nsys.exit(0)\n")
        monkeypatch.setattr(sys, "argv", ["timed.py", str(tmp_path / name), str(program)])
        with pytest.raises(SystemExit):
            timed.main()
        seconds[name] = float((tmp_path / name).read_text())
    assert seconds["product"] > 0
    assert seconds["norm"] > 0
    assert seconds["sum"] > 0
    assert seconds["copy"] == 0


def test_the_least_memory_of_a_step_is_torch_the_weights_and_what_is_kept(tmp_path, monkeypatch):
    pair = Pair("t5-base", tmp_path, True, torch.float32)
    monkeypatch.setattr(training, "run_program", lambda program: "1000\n")
    monkeypatch.setattr(training, "kept_for_backward", lambda forward, model: 20)
    n_weights = sum(parameter.nbytes for parameter in pair.ours().parameters())
    assert training.least_bytes(pair) == 1020 + n_weights


def test_what_was_counted_is_freed():
    results = []

    def forward():
        # exp keeps its own result.
        result = torch.ones(8, requires_grad=True).exp()
        results.append(weakref.ref(result.untyped_storage()))
        return result

    assert measure.kept_for_backward(forward, torch.nn.Module()) == 8 * 4
    gc.collect()
    assert results[0]() is None


def test_what_is_kept_for_backward_counts_once_and_without_the_parameters():
    linear = torch.nn.Linear(5, 7, bias=False)
    x = torch.ones(3, 5)
    n_bytes = measure.kept_for_backward(lambda: linear(x).sum() + linear(x).sum(), linear)
    assert n_bytes == x.nbytes


# Many adapters in one pass


@pytest.mark.slow
def test_every_line_about_many_adapters_works(tmp_path, capsys, monkeypatch):
    """With fewer adapters, but with the eight tasks for which there is a goal."""
    monkeypatch.setattr(adapters, "N_ADAPTERS", 3)
    monkeypatch.setattr(adapters, "N_MANY", 4)
    monkeypatch.setattr(adapters, "N_TASKS", (2, 8))
    file = tmp_path / "adapters.json"
    adapters.main(["--quick", "--dtype", "float32", "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 3 + 2 * (1 + 2 * len(adapters.N_TASKS))
    for row in rows.values():
        assert row["ratio"] == row["theirs"] / row["ours"] > 0
    assert [row["goal"] for row in rows.values() if row["goal"] is not None] == [3, 1.1, 2.5, 1.1]
    assert capsys.readouterr().out.count("\n| ") == len(rows) + 1  # and the head


# Operators


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("aten::mm", "matrix products"),
        ("aten::addmv_", "matrix products"),  # which `mv` calls
        ("aten::add_", "sums"),
        ("aten::mul_", "products of elements"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::_log_softmax_backward_data", "loss"),
        ("aten::sum", "sums"),
        ("aten::argmax", operators.OTHER),
    ],
)
def test_an_operator_belongs_to_the_group_of_its_name(name, group):
    assert operators.group_of(name) == group


def test_the_seconds_and_the_calls_of_operators_are_recorded():
    x = torch.ones(400, 400)
    recording = operators.record(lambda: (x @ x).relu_(), n_rounds=2)
    assert recording.names.keys() >= {"aten::mm", "aten::relu_"}
    assert recording.n_calls >= 2
    assert recording.seconds["attention"] == 0
    for group in ("matrix products", "activations"):
        assert recording.seconds[group] > 0
    in_groups = sum(n for group, n in recording.seconds.items() if group != operators.OUTSIDE)
    assert in_groups == pytest.approx(sum(recording.names.values()))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["t5-base", "smollm2-135m"])
def test_the_operators_of_both_sides_are_printed_and_written(model, tmp_path, capsys):
    file = tmp_path / "operators.json"
    operators.main(["--quick", "--models", model, "--json", str(file)])
    result = json.loads(file.read_text())
    titles = [
        "training step, no padding",
        "training step, RTE-like lengths",
        "greedy generation, batch 1",
        "greedy generation, batch 32",
    ]
    assert list(result) == [f"{model}, {title}" for title in titles]
    for ours, theirs in result.values():
        for side in (ours, theirs):
            assert list(side["seconds"]) == [*operators.GROUPS, operators.OTHER, operators.OUTSIDE]
            assert "aten::mm" in side["names"]
    printed = capsys.readouterr().out
    assert printed.count("| together | ") == len(titles)


@pytest.mark.slow
def test_the_operators_of_one_title_are_printed(capsys):
    flags = ["--models", "smollm2-135m", "--only", "greedy generation, batch 32"]
    operators.main(["--quick", *flags])
    assert capsys.readouterr().out.count("| together | ") == 1


# Growth


@counted_with_this_torch
@pytest.mark.slow
def test_growth_is_measured_fitted_and_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib, which draws the figure, is not installed")
    file = tmp_path / "growth.json"
    growth.main(["--quick", "--dtype", "float32", "--json", str(file), "--plot", str(tmp_path)])
    result = json.loads(file.read_text())
    assert {point["sweep"] for point in result["points"]} == growth.SWEEPS.keys()
    # Twice the tokens keep twice the bytes. These are counted, not measured.
    assert result["exponents"]["smollm2-135m, length, train"]["kept"] == pytest.approx(1, abs=0.01)
    assert "</svg>" in (tmp_path / "growth.svg").read_text()


# Memory


@pytest.mark.slow
@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="memory is measured and limited as Linux does it"
)
@pytest.mark.parametrize("name", ["t5-base", "smollm2-135m"])
def test_a_process_is_measured_and_too_little_memory_is_told_from_a_failure(name, monkeypatch):
    fork_python(monkeypatch)
    config = config_of(name, quick=True)
    n_bytes = memory.measured(config, torch.float32, 2, 16, True, limit=10**10)
    assert 0 < n_bytes < 10**10
    huge = replace(config, vocab_size=10**9)
    assert memory.measured(huge, torch.float32, 2, 16, True, limit=10**10) is None
    broken = replace(config, vocab_size=1)  # the program reads token 1
    with pytest.raises(RuntimeError, match="IndexError"):
        memory.measured(broken, torch.float32, 2, 16, True)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="malloc is that of Linux")
def test_each_setting_of_malloc_is_measured(capsys, monkeypatch):
    fork_python(monkeypatch)
    settings = ("as it is", "MALLOC_TRIM_THRESHOLD_=1000000", "malloc_trim(0) after each step")
    chosen = {setting: allocator.SETTINGS[setting] for setting in settings}
    monkeypatch.setattr(allocator, "SETTINGS", chosen)
    allocator.main(["--quick", "--models", "t5-small"])
    lines = capsys.readouterr().out.splitlines()
    titles = [line.split(" | ")[0].removeprefix("| ") for line in lines[3:]]
    assert titles == list(settings)
    assert lines[3].endswith("| 1.00 times |")


@functools.cache
def built(config):
    return build_model(config)


@pytest.mark.slow
@pytest.mark.parametrize("room", [10**6, 3 * 10**8, 10**9, 10**12])
def test_the_largest_model_that_trains_is_found_by_bisection(room, monkeypatch, capsys):
    def n_parameters(config):
        return sum(parameter.numel() for parameter in built(config).parameters())

    def measured(config, *_, limit, **__):
        return n_parameters(config) if n_parameters(config) < limit else None

    monkeypatch.setattr(memory, "measured", measured)
    monkeypatch.setattr(memory, "build_model", built)
    monkeypatch.setattr(memory, "KNOWN_MODELS", SHALLOW_MODELS)
    memory.main(["--largest", str(room / 1e9)])
    counts = {name: n_parameters(known.config) for name, known in SHALLOW_MODELS.items()}
    largest = max((n for n in counts.values() if n < room), default=None)
    found = capsys.readouterr().out.split()[-1]
    assert counts.get(found) == largest
    assert (found == "none") == (largest is None)


# Studies


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_is_made_of_valid_runs_in_a_folder_of_its_name(path):
    runs = read_studies([path], {})
    assert {run.folder.parts[0] for run in runs} == {"runs"}
    assert {run.folder.parent.name for run in runs} == {path.stem}
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# "), "its first line says what it asks"


def test_all_studies_together_have_no_run_twice():
    runs = read_studies(STUDIES, {})
    assert len(runs) == 74 + 36 + 17 + 33  # embedded and init, widths, smollm2, t0-3b


def test_the_study_of_the_paper_has_its_tasks_and_t_fews_shots():
    runs = read_studies([ROOT / "tests/benchmarks/studies/t0-3b.toml"], {}, only="ia3-*")
    assert [run.flags["task"] for run in runs] == list(PAPER_TASKS)
    for run in runs:
        assert run.flags["shots"] == known_tasks()[run.flags["task"]].shots


@pytest.mark.slow
def test_the_tasks_of_the_embedded_studies_are_where_these_look_for_them(tmp_path, monkeypatch):
    fork_python(monkeypatch)
    monkeypatch.chdir(tmp_path)
    study_inputs.main(["embedded"])
    colour, place, xor = (
        minia3.load_task(f"runs/embedded/tasks/{name}").train
        for name in ("same-colour", "same-place", "xor")
    )
    labels = [row["label"] for row in xor]
    assert labels == [a["label"] ^ b["label"] for a, b in zip(colour, place, strict=True)]
    for run in read_studies(STUDIES, {}):
        for task in as_tuple(run.flags["task"]):
            assert not task.startswith("runs/") or Path(task, "test.jsonl").exists()


def test_the_bases_of_widths_are_where_it_looks_for_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = []
    monkeypatch.setattr(study_inputs, "pretrain", lambda *flags: made.append(flags))
    study_inputs.main(["widths"])
    expected = {f"{flags[-1]}/tiny-t5" for flags in made}
    runs = read_studies([ROOT / "tests/benchmarks/studies/widths.toml"], {})
    assert {run.flags["model"] for run in runs} == expected
    assert len(made) == 9


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is Linux's figure")
def test_the_memory_of_rows_is_measured_in_every_format(capsys):
    pytest.importorskip("pyarrow", reason="pyarrow writes parquet files")
    rows.main(["--rows", "1000"])
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[1:]] == list(rows.FORMATS)


def keep_rows(path, n_rows):
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.chmod(0o644)
    path.write_text("".join(lines[:n_rows]), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.skipif(
    "MINIA3_TEST_DATA" not in os.environ,
    reason="MINIA3_TEST_DATA is not set: no tokenizer, no data",
)
def test_the_study_of_t0_runs_to_its_end_on_a_tiny_model_of_its_architecture(tmp_path, monkeypatch):
    """On CB, whose file is there, and on StoryCloze, which has only T-Few's published splits.

    Few of the rows are left, because evaluating on all of them would take most of the time.
    """
    monkeypatch.chdir(tmp_path)
    shared = Path(os.environ["MINIA3_TEST_DATA"])
    for name in ("cb", "few_shot/cb", "few_shot/storycloze"):
        shutil.copytree(shared / "data" / name, tmp_path / "data" / name)
    keep_rows(tmp_path / "data" / "cb" / "val.jsonl", 8)
    for seed in (1, 32, 42, 1024):  # not that of the run, which trains on all its rows
        split = tmp_path / "data" / "few_shot" / "storycloze" / "70_shot" / f"{seed}_seed.jsonl"
        keep_rows(split, 2)
    study_inputs.main(["tiny-t0", "--tokenizer", str(shared / "tokenizers" / "t5-base")])
    words = ["study", str(ROOT / "tests/benchmarks/studies/t0-3b.toml"), "--run"]
    words += ["--out", "runs/dry", "--model", "runs/tiny-t0", "--data-dir", "data"]
    words += ["--steps", "2", "--eval-prompt", "0,1"]
    splits = {
        "ia3-storycloze": ("0", "T-Few's other splits"),
        "lora-cb": ("0,1", "validation"),
        "full-cb": ("0", "validation"),
    }
    for name, (seeds, split) in splits.items():
        assert minia3_main([*words, "--seed", seeds, "--only", name]) == 0
        run_folder = tmp_path / "runs" / "dry" / name
        finals = [line for line in running.metrics(run_folder) if line["event"] == "final"]
        assert len(finals) == len(seeds.split(","))
        for final in finals:
            assert final["split"] == split
            assert final["steps"] == 2
            assert len(final["accuracies"]) == 2


# Floors


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="files are forgotten as on Linux")
def test_floors_read_and_write_as_many_bytes_as_they_are_asked_to(tmp_path, monkeypatch):
    n_bytes = (1 << 21) + 3  # no multiple of what is written at once
    sizes = []
    unlink = Path.unlink

    def unlink_and_look(path, **kwargs):
        sizes.append(path.stat().st_size)
        unlink(path, **kwargs)

    monkeypatch.setattr(Path, "unlink", unlink_and_look)
    assert floors.file_write_seconds(n_bytes, tmp_path, n_rounds=2) > 0
    assert floors.file_write_seconds(n_bytes, tmp_path, n_rounds=1, is_synced=True) > 0
    assert floors.file_read_seconds(n_bytes, tmp_path, n_rounds=2) > 0
    assert floors.file_read_seconds(n_bytes, tmp_path, n_rounds=1, is_cached=False) > 0
    source = tmp_path / "source"
    source.write_bytes(bytes(n_bytes))
    floors.copy_file(source, tmp_path / "floor")
    assert sizes == [n_bytes] * 6
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.slow
def test_floors_are_printed(capsys, monkeypatch):
    fork_python(monkeypatch)
    flags = ["--rounds", "1", "--file-bytes", "1000", "--memory-bytes", "4000"]
    floors.main(flags)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    assert lines[0].startswith("read memory: ")
    assert lines[-1].startswith("a process that imports torch: ")
