"""Guards many adapters in one run: N trained together are the N trained apart, each with its own data order, prompts,
optimiser, clipping and patience; a grid that is stopped goes on as if it had not been; names and files are each cell's.
And the baselines and ablations: what is not asked for does not move.
"""

import functools
import gc
import json
import random
import re
import shutil
import signal
import weakref
from pathlib import Path

import numpy as np
import pytest
import running
import torch
from running import (
    at_line,
    fails,
    kill_self,
    metrics,
    model,
    resume,
    rows,
    run,
    train,
    words,
    write,
)
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import minia3
from minia3.adapters.lora import add_lora
from minia3.cli.table import table_rows
from minia3.tasks.examples import encode_rows
from minia3.training.cell import Cell, Part, draw_examples
from minia3.training.checkpoint import load_checkpoint
from minia3.training.report import report
from minia3.training.run_folder import run_name

EXACT = {"dtype": "float64", "dropout": 0}
GRID = {
    "seed": "0,3",
    "lr": "0.05,0.01",
    "eval_every": 3,
    "patience": 2,
    "steps": 24,
    "clip": 0.5,
    "warmup_ratio": 0.2,
}


@functools.cache
def two_tasks():
    """Two folders of rows, of another number of choices and other lengths: every mixed batch is padded."""
    made = {"one": rows(42, (2,), seed=1), "two": rows(42, (2, 3, 1), seed=2)}
    home = Path(running.home().name)
    return [
        write(home / k, train=x[:20], validation=x[20:30], test=x[30:]) for k, x in made.items()
    ]


def both_tasks():
    return ",".join(map(str, two_tasks()))


def together(out, **flags):
    """A run of a grid: -> a dict for each of its cells (see `cell`)."""
    assert run(words(out, **{"task": both_tasks(), **flags})) == 0
    saved = load_checkpoint(out)["vectors"]
    names = [line["adapter"] for line in metrics(out) if line["event"] == "final"]
    assert len(set(names)) == len(names)
    return {name: cell(out, name, saved, i) for i, name in enumerate(names)}


def cell(out, name, saved, i):
    """What became of an adapter: its row as it was trained last, the final line, the measurements, the losses."""
    lines = [line for line in metrics(out) if line.get("adapter", name) == name]
    return {
        "vectors": {key: x[i] for key, x in saved.items()},
        "saved": load_file(out / "adapters" / name / "adapter_model.safetensors") if name else None,
        "final": lines[-1],
        "evals": [
            (line["step"], line["accuracy"], line["auc"])
            for line in lines
            if line["event"] == "eval"
        ],
    }


def apart(out, task, **flags):
    assert run(words(out, task=task, **flags)) == 0
    one = cell(out, None, load_checkpoint(out)["vectors"], 0)
    one["saved"] = load_file(out / "adapter" / "adapter_model.safetensors")
    return one


# A larger one makes T5's random attention so sure of itself that Adafactor steps by what rounding leaves of a gradient
RATES = {"t5": ("0.05", "0.01"), "llama": ("0.3", "0.02")}


def cells(rates):
    for task in two_tasks():
        for seed in (0, 3):
            for lr in rates:
                yield f"{task.name}-s{seed}-lr{lr}", {"task": task, "seed": seed, "lr": lr}


RESULTS = (
    "accuracy_before",
    "auc_before",
    "accuracy",
    "auc",
    "steps",
    "trainable",
    "total",
    "rows",
    "task",
    "metric",
)


@pytest.mark.parametrize(
    "recipe", [{}, {"optimizer": "adamw", "weight_decay": 0.1}, {"micro_batch_size": 7}]
)
@pytest.mark.parametrize("name", ["t5", "llama"])
def test_adapters_trained_together_are_those_trained_apart(name, recipe, tmp_path):
    flags, rates = {"model": model(name), **GRID, **EXACT, **recipe}, RATES[name]
    found = together(tmp_path / "grid", **{**flags, "lr": ",".join(rates)})
    assert found.keys() == {name for name, _ in cells(rates)}
    steps = set()
    for i, (name, own) in enumerate(cells(rates)):
        alone = apart(tmp_path / str(i), **{**flags, **own})
        steps.add(alone["final"]["steps"])
        assert found[name]["evals"] == alone["evals"]
        for key in RESULTS:
            assert found[name]["final"][key] == alone["final"][key], (name, key)
        for key, l_D in alone["vectors"].items():
            assert_close(found[name]["vectors"][key], l_D, rtol=1e-9, atol=1e-9)
        for key, x in alone["saved"].items():
            assert_close(found[name]["saved"][key], x, rtol=1e-6, atol=1e-6)
        assert max((x - 1).abs().max() for x in alone["vectors"].values()) > 0.01
    assert min(steps) < 24  # some stop early
    assert len(steps) > 1


def test_each_adapter_s_gradient_is_clipped_by_its_own_norm(tmp_path, monkeypatch):
    norms, original = [], torch.nn.utils.clip_grad_norm_

    def spy(parameters, most):
        norms.append(original(parameters := list(parameters), most).item())
        after = torch.stack([p.grad.norm() for p in parameters]).norm().item()
        assert after == pytest.approx(min(norms[-1], most), rel=1e-4)
        return norms[-1]

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    together(tmp_path / "grid", **{**GRID, "steps": 2, "clip": 2})
    assert len(norms) == 16  # one for each adapter and step
    assert min(norms) < 2 < max(norms)


def test_the_embedded_model_s_seeds_together_are_those_apart_in_float32(tmp_path):
    flags = {
        "model": "tiny-t5",
        "task": "same-colour",
        "steps": 100,
        "dropout": 0,
        "batch_size": 8,
        "shots": 64,
    }
    assert run(words(tmp_path / "grid", seed="0,1,2", **flags)) == 0
    for seed in range(3):
        assert run(words(tmp_path / str(seed), seed=seed, **flags)) == 0
        alone = load_file(tmp_path / str(seed) / "adapter" / "adapter_model.safetensors")
        found = load_file(tmp_path / "grid" / "adapters" / f"s{seed}" / "adapter_model.safetensors")
        assert max((found[name] - x).abs().max() for name, x in alone.items()) < 1e-3
        assert max((x - 1).abs().max() for x in alone.values()) > 0.05


def test_seeds_draw_their_own_shots_rows_and_prompts(tmp_path):
    found = together(tmp_path / "grid", task=two_tasks()[0], seed="0,1", shots=6, steps=5, **EXACT)
    for seed in (0, 1):
        alone = apart(tmp_path / str(seed), two_tasks()[0], seed=seed, shots=6, steps=5, **EXACT)
        for key, l_D in alone["vectors"].items():
            assert_close(found[f"s{seed}"]["vectors"][key], l_D, rtol=1e-9, atol=1e-9)


def test_each_seed_draws_prompts_of_its_own(tmp_path):
    rte = [
        {"premise": "w5 w6", "hypothesis": "w7", "label": label}
        for label in ("entailment", "not_entailment")
    ]
    write(tmp_path / "rte", train=rte[:1], val=rte)
    tokenizer = minia3.load_tokenizer(model("t5"))
    drawn = []
    for seed in (0, 5):
        config = train.Config(task="rte", seed=seed, steps=3, batch_size=7)
        task = minia3.load_task("rte", tmp_path, None, seed)
        part = Part(config, task, True)
        texts = [
            encode_rows([(task.train[0], prompt)], tokenizer, 512, False)[1][0]
            for prompt in part.prompts
        ]
        drawn.append(draw_examples(Cell(config, [part], ["seed"]), tokenizer))
        for step, batch in enumerate(drawn[-1]):
            prompts = np.random.RandomState([seed, 1, step]).randint(len(texts), size=7)
            assert batch == [texts[prompt] for prompt in prompts]  # there is one row
    assert drawn[0] != drawn[1]


def test_a_model_that_was_made_of_a_known_one_is_asked_in_the_known_one_s_words(tmp_path):
    row = {"premise": "w5", "hypothesis": "w7", "label": "entailment"}
    write(tmp_path / "rte", train=[row], val=[row])
    task = minia3.load_task("rte", tmp_path)
    prompts = {}
    for base in ("t5-base", None):
        (folder := tmp_path / str(base)).mkdir()
        (folder / "config.json").write_text(json.dumps({"_name_or_path": base}))
        prompts[base] = Part(train.Config(model=str(folder), task="rte"), task, True).prompts
    assert prompts["t5-base"] == Part(train.Config(model="t5-base", task="rte"), task, True).prompts
    assert (len(prompts["t5-base"]), len(prompts[None])) == (1, 5)


# Stopped and resumed

STOPPED = {**GRID, "dropout": 0.1, "save_every": 4, "optimizer": "adamw"}


def outcome(folder):
    """What two equal runs have in common: all adapters' files, cards too, and metrics but for times."""
    lines = [
        {key: value for key, value in line.items() if key not in running.TIMES}
        for line in metrics(folder)
    ]
    adapters = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("adapters/*/*")}
    return adapters, lines


@functools.cache
def uninterrupted():
    folder = Path(running.home().name, "uninterrupted grid")
    with at_line(0, None) as ran:
        assert run(words(folder, task=both_tasks(), **STOPPED)) == 0
    return outcome(folder), len(ran)


@pytest.mark.parametrize("seed", range(6))
def test_a_grid_that_is_stopped_anywhere_goes_on_bit_for_bit(seed, tmp_path):
    expected, n = uninterrupted()
    assert len(expected[0]) == 8 * 3
    assert (
        len({line["steps"] for line in expected[1] if line["event"] == "final"}) > 1
    )  # one stops before another
    out = tmp_path / "run"
    with at_line(
        int(n * (seed + random.Random(seed).random()) / 6),
        functools.partial(kill_self, signal.SIGINT),
    ):
        assert run(words(out, task=both_tasks(), **STOPPED)) == 130
    assert resume(out) == 0
    assert outcome(out) == expected
    assert resume(out) == 0  # it is finished


# Names


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ({"seed": "0,7"}, ["s0", "s7"]),
        ({"lr": "1e-3,0.01,2e-5"}, ["lr0.001", "lr0.01", "lr2e-05"]),
        ({"seed": "2,1", "lr": "1,2"}, ["s2-lr1.0", "s2-lr2.0", "s1-lr1.0", "s1-lr2.0"]),
    ],
)
def test_an_adapter_is_named_by_what_varies(flags, names, tmp_path):
    out = tmp_path / "run"
    assert run(words(out, steps=1, **flags)) == 0
    finals = [line for line in metrics(out) if line["event"] == "final"]
    assert [line["adapter"] for line in finals] == names
    assert sorted(p.name for p in (out / "adapters").iterdir()) == sorted(names)
    assert not (out / "adapter").exists()
    for line in finals:
        parts = {part.lstrip("slr"): part for part in line["adapter"].split("-lr")}
        assert str(line["seed"]) in parts or "seed" not in flags
        assert line["task"] == running.task().name
    train_lines = [line for line in metrics(out) if line["event"] == "train"]
    assert all([*line["losses"]] == names for line in train_lines)
    assert train_lines[0]["loss"] == pytest.approx(
        sum(train_lines[0]["losses"].values()) / len(names)
    )


def test_one_cell_is_an_ordinary_run(tmp_path):
    assert run(words(tmp_path / "run", steps=1)) == 0
    assert (tmp_path / "run" / "adapter").is_dir()
    assert not any({"adapter", "losses"} & line.keys() for line in metrics(tmp_path / "run"))


def test_a_slash_in_a_task_s_name_is_a_dash_in_the_folder_s(tmp_path):
    task = minia3.load_task(two_tasks()[0])._replace(name="raft/x")
    config = train.Config(seed=3)
    cell = Cell(config, [Part(config, task, True)], ["task", "seed"])
    assert (cell.name, cell.folder) == ("raft/x-s3", Path("adapters", "raft-x-s3"))


def test_a_path_with_a_comma_is_one_task(tmp_path):
    folder = write(tmp_path / "a,b", train=rows(4), test=rows(4, seed=1))
    assert run(words(tmp_path / "run", task=folder, steps=1)) == 0
    assert metrics(tmp_path / "run")[-1]["task"] == "a,b"


def test_two_adapters_of_one_name_are_refused(tmp_path, capsys):
    fails(words(tmp_path / "run", seed="1,1"), capsys, "a name for each adapter", "'s1', 's1'")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"task": ("rte", "a/b.jsonl"), "seed": (0, 1)}, "tiny-t5-rte,b-ia3-0,1"),
        ({"task": ("rte", "cb"), "adapters": "one"}, "tiny-t5-rte,cb-ia3-one-0"),
        ({"adapters": "one"}, "tiny-t5-same-colour-ia3-0"),
        ({"lr": (0.001, 0.01)}, "tiny-t5-same-colour-ia3-0-0.001,0.01"),
        ({"task": tuple(f"raft/{i:030}" for i in range(11))}, f"tiny-t5-{0:030}+10-ia3-0"),
        ({"seed": tuple(range(100))}, "tiny-t5-same-colour-ia3-0+99"),
        ({"model": "x/t5", "task": "x" * 60, "method": "none"}, f"t5-{'x' * 60}-none-0"),
    ],
)
def test_the_default_folder_of_a_grid_has_its_values_with_commas(flags, expected):
    assert run_name(train.Config(**flags)) == expected


def test_a_card_has_the_command_that_trains_its_adapter_alone(tmp_path):
    assert run(words(tmp_path / "run", seed="0,4", steps=1, lr=0.1)) == 0
    card = (tmp_path / "run" / "adapters" / "s4" / "README.md").read_text()
    assert "--seed 4 " in card
    assert "0,4" not in card


def test_the_base_is_measured_once_for_each_set_of_rows(tmp_path, monkeypatch):
    measured, original = [], train.evaluate
    monkeypatch.setattr(
        train, "evaluate", lambda *a, **o: measured.append(o["adapter"]) or original(*a, **o)
    )
    assert run(words(tmp_path / "run", task=both_tasks(), seed="0,1,2", method="none")) == 0
    assert measured == [0, 3]
    finals = [line for line in metrics(tmp_path / "run") if line["event"] == "final"]
    assert len(finals) == 6
    assert len({line["accuracy"] for line in finals}) == 2


def test_seeds_that_report_on_other_rows_are_measured_on_their_own(tmp_path, monkeypatch):
    def load_task(name, data_dir, shots, seed):
        made = minia3.load_task(name, data_dir, shots, seed)
        return made._replace(test=made.test[seed::2])

    measured, original = [], train.evaluate
    monkeypatch.setattr("minia3.training.cell.load_task", load_task)
    monkeypatch.setattr(
        train, "evaluate", lambda *a, **o: measured.append(o["adapter"]) or original(*a, **o)
    )
    assert run(words(tmp_path / "run", seed="0,1", method="none")) == 0
    assert measured == [0, 1]


def test_all_adapters_start_from_the_one_that_is_given(tmp_path):
    assert run(words(tmp_path / "one", lr=0.3)) == 0
    start = {
        "adapter": tmp_path / "one" / "adapter",
        "steps": 1,
        "warmup_ratio": 0.6,
    }  # a first step changes nothing
    assert run(words(tmp_path / "on", seed="0,1", **start)) == 0
    expected = load_file(tmp_path / "one" / "adapter" / "adapter_model.safetensors")
    for name in ("s0", "s1"):
        found = load_file(tmp_path / "on" / "adapters" / name / "adapter_model.safetensors")
        assert all(torch.equal(found[key], x) for key, x in expected.items())


def test_the_end_is_a_line_for_each_adapter(tmp_path, capsys):
    assert run(words(tmp_path / "run", seed="0,11", steps=2)) == 0
    title, *table = capsys.readouterr().out.split("\n\n")[-1].splitlines()
    assert title == "2 results"
    for name, line in zip(("s0", "s11"), table, strict=False):
        final = next(
            x for x in metrics(tmp_path / "run") if x["event"] == "final" and x["adapter"] == name
        )
        figures = f"{final['accuracy_before']:.1%} before, {final['accuracy']:.1%} after"
        assert line == f"  {name:<12}accuracy {figures}, 2 steps"
    assert next(line for line in table if line.startswith("  trained ")).endswith("%) each")


def test_an_adapter_whose_loss_is_no_number_ends_and_the_others_are_as_without_it(tmp_path, capsys):
    out = tmp_path / "run"
    assert run(words(out, lr="0.2,1e30", warmup_ratio=0, dtype="float64", dropout=0)) == 0
    shown = capsys.readouterr().out
    assert re.search(
        r"\nfailed   lr1e\+30: the loss of step \d+ is (nan|inf): try a lower --lr", shown
    )
    *_, failed = (line for line in metrics(out) if line["event"] != "final")
    assert (failed["event"], failed["adapter"]) == ("failed", "lr1e+30")
    assert failed["steps" if "steps" in failed else "step"] < 12
    assert f"failed   {failed['reason']}\n" in shown
    assert [p.name for p in (out / "adapters").iterdir()] == ["lr0.2"]
    assert [line["adapter"] for line in metrics(out) if line["event"] == "final"] == ["lr0.2"]
    alone = apart(
        tmp_path / "alone", running.task(), lr=0.2, warmup_ratio=0, dtype="float64", dropout=0
    )
    for key, l_D in load_checkpoint(out)["vectors"].items():
        assert_close(l_D[0], alone["vectors"][key], rtol=1e-9, atol=1e-9)
    assert all(
        np.isfinite(line["loss"])
        for line in metrics(out)
        if line["event"] == "train" and line["step"] > 10
    )


def test_vectors_that_are_no_number_are_never_the_best_nor_saved(tmp_path, capsys):
    flags = {"warmup_ratio": 0, "eval_every": 3, "patience": 1, "dropout": 0}
    fails(words(tmp_path / "one", lr="1e25", **flags), capsys, "try a lower --lr", code=1)
    assert not (tmp_path / "one" / "adapter").exists()
    assert run(words(tmp_path / "two", lr="1e-12,1e25", **flags)) == 0
    assert "1 results, and 1 that failed" in capsys.readouterr().out
    events = {
        line["adapter"]: line["event"] for line in metrics(tmp_path / "two") if "adapter" in line
    }
    assert events == {"lr1e-12": "final", "lr1e+25": "failed"}
    (row,), note = table_rows([tmp_path / "two"])
    assert (row["runs"], note.startswith("1 left out"), "lr1e+25" in note) == (1, True, True)


def test_the_last_vectors_that_are_numbers_stay_the_best(tmp_path):
    flags = {
        "lr": "1e25",
        "warmup_ratio": 0.5,
        "eval_every": 1,
        "patience": 1,
    }  # the first step changes nothing
    assert run(words(tmp_path / "run", dropout=0, **flags)) == 0
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(x.isfinite().all() for x in saved.values())
    assert [line["accuracy"] for line in metrics(tmp_path / "run") if line["event"] == "eval"] == [
        0.4,
        0.5,
        0.5,
    ]


def test_a_resumed_run_has_the_vectors_it_began_with_though_its_start_has_changed(tmp_path):
    assert run(words(tmp_path / "start", lr=0.3)) == 0
    folders = []
    for name in ("whole", "stopped"):
        shutil.copytree(tmp_path / "start" / "adapter", tmp_path / name / "from")
        folders.append(tmp_path / name / "run")
    flags = {"sites": "v", "save_every": 4}
    assert run(words(folders[0], adapter=tmp_path / "whole" / "from", **flags)) == 0
    with at_line(0, None) as ran:
        assert run(words(tmp_path / "measure", adapter=tmp_path / "whole" / "from", **flags)) == 0
    start = tmp_path / "stopped" / "from"
    with at_line(len(ran) * 2 // 3, functools.partial(kill_self, signal.SIGINT)):
        assert run(words(folders[1], adapter=start, **flags)) == 130
    file = start / "adapter_model.safetensors"
    save_file({name: 2 * x for name, x in load_file(file).items()}, file)
    assert resume(folders[1]) == 0
    whole, stopped = (load_file(f / "adapter" / "adapter_model.safetensors") for f in folders)
    assert all(torch.equal(whole[name], x) for name, x in stopped.items())


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_cannot_share_a_model_trains_cell_by_cell_and_each_is_the_run_of_its_own(
    method, tmp_path, capsys
):
    flags, kind = (
        {"method": method, "steps": 12, "dropout": 0.1},
        {"lora": "adapter", "full": "model"}[method],
    )
    assert (
        run(words(tmp_path / "grid", task=both_tasks(), seed="0,3", lr="0.02,0.001", **flags)) == 0
    )
    assert "8 results" in capsys.readouterr().out
    finals = {
        line["adapter"]: line for line in metrics(tmp_path / "grid") if line["event"] == "final"
    }
    assert metrics(tmp_path / "grid")[-1] in finals.values()
    assert len({line["accuracy_before"] for line in finals.values()}) == 2  # a figure for each task
    for i, (name, own) in enumerate(cells(("0.02", "0.001"))):
        assert run(words(tmp_path / str(i), **flags, **own)) == 0
        (path,) = (tmp_path / str(i) / kind).glob("*.safetensors")
        assert path.read_bytes() == (tmp_path / "grid" / "adapters" / name / path.name).read_bytes()
        alone, shared = metrics(tmp_path / str(i)), metrics(tmp_path / "grid")
        for key in RESULTS:
            assert alone[-1][key] == finals[name][key]
        losses = [line["losses"][name] for line in shared if name in line.get("losses", {})]
        assert losses == [line["loss"] for line in alone if line["event"] == "train"]
    (row,) = [
        row for row in table_rows([tmp_path / "grid"])[0] if row["method"] == f"{method}, lr 0.02"
    ]
    assert row["runs"] == 4


@pytest.mark.parametrize(
    ("method", "told"), [("lora", "30 s for 12 steps of 3"), ("ia3", "10 s for 12 steps")]
)
def test_the_time_of_a_grid_is_that_of_all_its_cells(method, told, tmp_path, capsys):
    assert run(words(tmp_path / "run", method=method, seed="0,1,2")) == 0
    finals = [
        line | {"seconds": 10.0} for line in metrics(tmp_path / "run") if line["event"] == "final"
    ]
    capsys.readouterr()
    report(train.Config(method=method, seed=(0, 1, 2)), tmp_path, finals)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("  time "))
    assert line.split(None, 1)[1] == told


def test_a_grid_of_lora_is_measured_without_a_folder(tmp_path, monkeypatch, capsys):
    assert run(words(tmp_path / "one", method="lora", steps=6)) == 0
    monkeypatch.chdir(tmp_path)
    flags = {"method": "lora", "adapter": tmp_path / "one" / "adapter", "task": both_tasks()}
    capsys.readouterr()
    assert run(words(None, "--eval-only", **flags)) == 0
    assert "2 results" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_whole_models_are_in_memory_one_at_a_time(tmp_path, monkeypatch):
    original, models = minia3.load_model, []

    def load_model(*args, **options):
        assert not any(model() for model in models)
        models.append(weakref.ref(model := original(*args, **options)))
        return model

    monkeypatch.setattr(minia3, "load_model", load_model)
    gc.disable()  # not even until the next collection
    try:
        assert run(words(tmp_path / "run", method="full", seed="0,1,2", steps=2)) == 0
    finally:
        gc.enable()
    assert len(models) == 3


def test_a_cell_that_fails_alone_leaves_the_cells_after_it_to_train(tmp_path, capsys):
    assert (
        run(words(tmp_path / "run", method="full", lr="1e30,0.01", warmup_ratio=0, steps=12)) == 0
    )
    assert "1 results, and 1 that failed" in capsys.readouterr().out
    events = {
        line["adapter"]: line["event"] for line in metrics(tmp_path / "run") if "adapter" in line
    }
    assert events == {"lr1e+30": "failed", "lr0.01": "final"}
    fails(
        words(tmp_path / "none", method="full", lr="1e30,1e29", warmup_ratio=0),
        capsys,
        "the loss of step",
        code=1,
    )


def test_a_run_whose_adapters_all_fail_fails(tmp_path, capsys):
    fails(
        words(tmp_path / "run", lr="1e29,1e30", warmup_ratio=0),
        capsys,
        "the loss of step",
        "--lr",
        code=1,
    )


# Which vectors learn


def sites(name):
    """Every vector of a model's as (name, layer, its part of the block, site)."""
    for key in minia3.vectors(minia3.load_model(model(name))):
        layer, part, site = key.split("blocks.")[1].split(".")
        yield key, int(layer), part, site.removeprefix("l_")


@pytest.mark.parametrize(
    ("flags", "moves"),
    [
        ([], lambda layer, part, site: True),
        (["--sites", "k"], lambda layer, part, site: site == "k"),
        (["--sites", "ff,v"], lambda layer, part, site: site != "k"),
        (["--layers", "1"], lambda layer, part, site: layer == 1),
        (["--layers", "0"], lambda layer, part, site: layer == 0),
        (["--layers", "0,1-9"], lambda layer, part, site: True),
        (
            ["--layers", "1-", "--sites", "k,ff"],
            lambda layer, part, site: layer == 1 and site != "v",
        ),
        (["--no-cross"], lambda layer, part, site: part != "cross"),
    ],
)
@pytest.mark.parametrize("name", ["t5", "llama"])
@pytest.mark.parametrize("seed", ["0", "0,1"])
def test_only_the_chosen_vectors_leave_one(seed, name, flags, moves, tmp_path, capsys):
    if (name, flags) == ("llama", ["--no-cross"]):
        fails(
            words(tmp_path / "run", *flags, model=model(name)),
            capsys,
            "--no-cross",
            "this one has none",
        )
        return
    assert run(words(tmp_path / "run", *flags, model=model(name), lr=0.1, seed=seed)) == 0
    trained = load_checkpoint(tmp_path / "run")["vectors"]
    ours = minia3.load_model(model(name))
    folder = tmp_path / "run" / ("adapter" if seed == "0" else "adapters/s1")
    minia3.load_adapter(ours, folder)
    n = 0
    for key, *place in sites(name):
        moved = (minia3.vectors(ours)[key] != 1).any().item()
        assert moved == moves(*place), key
        assert (trained[key] != 1).any().item() == moves(*place)
        n += minia3.vectors(ours)[key].numel() * moves(*place)
    assert metrics(tmp_path / "run")[-1]["trainable"] == n


@pytest.mark.parametrize(
    ("flag", "value", "parts"),
    [
        ("sites", "k,up", ["--sites 'k,up'", "'up' has no vectors", "some of k,v,ff,q,o,up,gate"]),
        ("layers", "0,2", ["--layers '0,2'", "'2' has no vectors"]),
        ("layers", "2", ["--layers '2'"]),
        ("layers", "1-0", ["--layers '1-0'"]),
        ("layers", "0,x", ["--layers '0,x'", "0-5,20-"]),
        ("layers", "0,", ["--layers '0,'"]),
    ],
)
def test_sites_and_layers_that_are_not_there_are_one_line(flag, value, parts, tmp_path, capsys):
    fails(words(tmp_path / "run", **{flag: value}), capsys, *parts)
    assert not (tmp_path / "run").exists()


# The baselines


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_lora_trains_what_it_adds_and_its_folder_measures_the_same(name, tmp_path, capsys):
    flags = {
        "model": model(name),
        "method": "lora",
        "rank": 2,
        "alpha": 3,
        "where": "q,down",
        "lr": 0.05,
    }
    out = tmp_path / "run"
    assert run(words(out, steps=10, **flags)) == 0
    final = metrics(out)[-1]
    tensors = load_file(out / "adapter" / "adapter_model.safetensors")
    assert final["trainable"] == sum(x.numel() for x in tensors.values())
    assert all(x.any() for x in tensors.values())  # B too has left zero
    command = next(line for line in capsys.readouterr().out.splitlines() if "use it" in line).split(
        "train.py "
    )[1]
    assert run([*command.split(), "--device", "cpu"]) == 0
    assert f"  accuracy    {final['accuracy']:.1%}\n" in capsys.readouterr().out


def test_a_lora_begins_by_the_seed_of_its_run():
    found = train.parameters(minia3.load_model(model("t5")), train.Config(method="lora", seed=3))
    expected = add_lora(minia3.load_model(model("t5")), seed=3)
    assert all(torch.equal(p, expected[name]) for name, p in found.items())


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_full_trains_all_but_the_vectors_and_saves_a_model(name, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(words(out, model=model(name), method="full", lr=0.01, steps=10)) == 0
    final, before = metrics(out)[-1], minia3.load_model(model(name))
    after = minia3.load_model(out / "model")
    vectors = sum(v.numel() for v in minia3.vectors(before).values())
    assert (
        final["trainable"]
        == final["total"]
        == sum(p.numel() for p in before.parameters()) - vectors
    )
    for (key, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        assert torch.equal(old, new) == key.endswith(".scale"), key
    command = next(line for line in capsys.readouterr().out.splitlines() if "use it" in line).split(
        "train.py "
    )[1]
    assert run([*command.split(), "--device", "cpu"]) == 0
    assert f"  accuracy    {final['accuracy']:.1%}\n" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_baseline_that_is_stopped_goes_on_bit_for_bit(method, tmp_path):
    flags = {"method": method, "lr": 0.01, "eval_every": 3, "dropout": 0.1}
    assert run(words(tmp_path / "whole", **flags)) == 0
    with at_line(0, None) as ran:
        assert run(words(tmp_path / "again", **flags)) == 0
    with at_line(int(0.7 * len(ran)), functools.partial(kill_self, signal.SIGINT)):
        assert run(words(tmp_path / "run", **flags)) == 130
    assert resume(tmp_path / "run") == 0
    whole, found = (
        {
            name: x
            for p in sorted((tmp_path / n).rglob("*.safetensors"))
            for name, x in load_file(p).items()
        }
        for n in ("whole", "run")
    )
    assert whole.keys() == found.keys() != set()
    assert all(torch.equal(found[key], x) for key, x in whole.items())
