"""A mistake in a command line is answered before torch is imported; so is Ctrl-C, in one line."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import running
from running import ROOT, contents, events, fails, metrics, outcome, run, task, train, words, write

import minia3
from minia3.cli.main import main
from minia3.training.command_line import complete, parse_flags
from minia3.training.from_python import given_flags
from minia3.training.grid import steps_of_epochs
from minia3.training.study_file import read_studies

SCRIPT = [sys.executable, str(ROOT / "train.py")]
MODULE = [sys.executable, "-m", "minia3"]


def start(command, folder, **environ):
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def no_torch(tmp_path):
    """A folder in which importing torch is an error."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    return tmp_path


def test_a_path_may_begin_with_the_home_folder_wherever_no_shell_expands_it(tmp_path, monkeypatch):
    """A run made a folder named ~, or looked for one."""
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    typed = ["--model=~/m", "--adapter=~/a", "--data-dir=~/d", "--task=~/a.csv,~/b.csv"]
    flags = parse_flags([*typed, "--out=~/run", "--input=~/{text}"])
    config = complete(flags)
    home = tmp_path / "me"
    assert (config.model, config.adapter) == (f"{home}/m", f"{home}/a")
    assert (config.out, config.data_dir) == (f"{home}/run", f"{home}/d")
    assert config.task == (f"{home}/a.csv", f"{home}/b.csv")
    assert config.input == "~/{text}"
    assert complete({"data_dir": "~"}).data_dir == str(home)

    home.mkdir()
    (home / "flags.toml").write_text('out = "~/from file"\nchat-template = "~x"')
    config = complete({"config": "~/flags.toml"})
    assert (config.out, config.chat_template) == (f"{home}/from file", "~x")
    (tmp_path / "study.toml").write_text('out = "~/runs"\n[each]\nseed = [0, 1]')
    (first, _) = read_studies([tmp_path / "study.toml"], {})
    assert first.folder == home / "runs" / "seed0"


def test_a_run_and_a_command_write_into_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.chdir(tmp_path)
    flags = {"model": running.model("t5"), "task": running.task(), "device": "cpu"}
    trained = minia3.train(out="~/run", steps=1, **flags)
    assert trained.folder == tmp_path / "me" / "run"
    rows = f"{running.task()}/test.jsonl"
    words = ["predict", flags["model"], rows, "--adapter=~/run/adapter", "--out=~/out.csv"]
    words.append("--columns=~/{idx}=idx")
    assert main([*map(str, words), "--device=cpu"]) == 0
    assert (tmp_path / "me" / "out.csv").read_text().startswith("~/{idx}\n0\n")
    assert os.listdir(tmp_path) == ["me"]


def test_a_command_finds_its_model_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.chdir(tmp_path)
    minia3.save_model(minia3.load_model("tiny-t5"), "~/model", minia3.load_tokenizer("tiny-t5"))
    minia3.save_adapter(minia3.load_model("tiny-t5"), "~/adapter")
    assert main(["info", "~/model"]) == 0
    assert main(["convert", "~/model", "~/converted"]) == 0
    assert main(["merge", "~/model", "~/adapter", "~/merged"]) == 0
    assert main(["convert", "~/adapter", "~/copied"]) == 0
    assert main(["generate", "~/model", "compare .", "--device=cpu"]) == 0
    folders = {"model", "adapter", "converted", "merged", "copied"}
    assert set(os.listdir(tmp_path / "me")) == folders


def test_functions_of_python_read_and_write_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.chdir(tmp_path)
    base = running.model("t5")
    model = minia3.load_model(base)
    minia3.save_model(model, "~/model", minia3.load_tokenizer(base))
    minia3.load_tokenizer(Path("~/model")).save("~/tokenizer")
    model = minia3.load_model("~/model")
    assert model.name_or_path == str(tmp_path / "me" / "model")
    minia3.save_adapter(model, Path("~/adapters/a"))
    minia3.load_adapter(model, "~/adapters/a")
    adapters = minia3.Adapters(model)
    adapters.load("b", "~/adapters/a")
    adapters.load_folder("~/adapters")
    assert list(adapters) == ["b", "a"]
    shutil.copytree(running.task(), tmp_path / "me" / "task")
    assert minia3.load_task("~/task").train
    row = {"premise": "a", "hypothesis": "b", "label": "entailment", "idx": 0}
    write(tmp_path / "me" / "rte", train=[row], val=[row], test=[row])
    assert minia3.load_task("rte", data_dir="~").train[0]["premise"] == "a"
    with pytest.raises(ValueError, match="~user/x: no such folder"):
        minia3.load_model("~user/x")
    assert os.listdir(tmp_path) == ["me"]
    assert sorted(os.listdir("me")) == ["adapters", "model", "rte", "task", "tokenizer"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([*SCRIPT, "--modle", "x"], "train.py: '--modle' is neither"),
        ([*SCRIPT, "--steps", "0"], "train.py: --steps is 0, expected at least 1"),
        ([*SCRIPT, "--rank", "4"], "train.py: --rank is for --method lora"),
        ([*SCRIPT, "--resume", "nowhere"], "train.py: expected the folder of a run"),
        ([*SCRIPT, "--config", "nowhere.toml"], "train.py: nowhere.toml: not found"),
        ([*MODULE, "train", "--learning-rate", "1"], "minia3 train: '--learning-rate' is neither"),
        ([*MODULE, "trian"], "minia3: there is no command 'trian': did you mean train?"),
        ([*MODULE, "info", "--lenght", "3", "x"], "minia3: '--lenght' is neither"),
        ([*MODULE, "info", "x", "--batch", "0"], "minia3: argument --batch: 0 is not"),
        ([*MODULE, "generate", "x", "--beams", "0"], "minia3: argument --beams: 0 is not"),
        ([*MODULE, "generate", "x", "--top-p", "2"], "minia3: top_p is 2.0, expected above 0"),
        ([*MODULE, "generate", "x", "--beams=2", "--temperature=1"], "minia3: beams is 2 at temp"),
        ([*MODULE, "generate", "x", "--chat-template", "y"], "minia3: --chat-template is the"),
        ([*MODULE, "predict", "x", "y", "--dtype", "half"], "minia3: argument --dtype: invalid"),
        ([*MODULE, "predict", "x", "y", "--max-length=0"], "minia3: argument --max-length: 0 is"),
        ([*MODULE, "merge", "x", "y", "z", "--dtype", "half"], "minia3: argument --dtype: inval"),
        ([*MODULE, "mix", "z", "x:1", "--how", "sum"], "minia3: argument --how: invalid choice"),
    ],
)
def test_a_mistake_is_answered_before_torch_is_imported(command, message, no_torch):
    process = start(command, no_torch, PYTHONPATH=f"{no_torch}{os.pathsep}{ROOT}")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err.startswith(message)
    assert err.count("\n") == 1


@pytest.mark.slow
def test_train_py_answers_a_mistake_before_numpy_is_imported(no_torch):
    """It takes as long to import as all else that reads the flags."""
    (no_torch / "numpy.py").write_text("raise SystemExit('numpy was imported')")
    process = start([*SCRIPT, "--steps", "0"], no_torch, PYTHONPATH=f"{no_torch}{os.pathsep}{ROOT}")
    message = "train.py: --steps is 0, expected at least 1\n"
    assert (process.communicate(timeout=60), process.returncode) == (("", message), 2)


@pytest.mark.slow
@pytest.mark.parametrize("command", [SCRIPT, MODULE, [*MODULE, "train"]])
@pytest.mark.parametrize("word", ["--help", "--version"])
def test_help_and_version_need_no_torch(command, word, no_torch):
    process = start([*command, word], no_torch, PYTHONPATH=f"{no_torch}{os.pathsep}{ROOT}")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    if word == "--version":
        assert out == f"minia3 {minia3.__version__}\n"
    else:
        assert out.startswith("usage: ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "message"),
    [
        (SCRIPT, "train.py: stopped\n"),
        ([*MODULE, "train"], "minia3: stopped\n"),
        ([*MODULE, "generate", "tiny-t5"], "minia3: stopped\n"),
    ],
)
def test_ctrl_c_while_torch_is_imported_leaves_no_traceback(command, message, tmp_path):
    slow = 'import sys, time\nprint("importing", flush=True)\ntime.sleep(60)\n'
    (tmp_path / "torch.py").write_text(slow)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = start(command, tmp_path, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert err == message


def test_only_typed_flags_are_given():
    assert parse_flags([]) == {}
    assert parse_flags(["--lr", "3e-3", "--eval-only"]) == {"lr": 3e-3, "eval_only": True}


# --config


def test_the_config_json_of_a_run_repeats_it_and_typed_flags_win(tmp_path):
    first = tmp_path / "first"
    assert run(words(first, steps=3, seed="1,2", lr=0.1, dropout=0)) == 0
    again = ["--config", first / "config.json", "--out", tmp_path / "again"]
    assert run(again) == 0
    for name in ("s1", "s2"):
        file = f"adapters/{name}/adapter_model.safetensors"
        assert (tmp_path / "again" / file).read_bytes() == (first / file).read_bytes()
    other = ["--config", first, "--out", tmp_path / "other", "--lr", 3e-3, "--steps", 2]
    assert run(other) == 0  # a run's folder stands for its config.json, and 3e-3 is the default
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    assert (config["lr"], config["steps"], config["seed"]) == (3e-3, 2, [1, 2])
    assert config["out"] == str(tmp_path / "other")


def test_a_toml_file_has_the_flags_as_they_are_typed(tmp_path):
    file = tmp_path / "flags.toml"
    file.write_text('task = ["rte", "cb"]\nbatch-size = 16\neval_only = true\nlr = 1\nout = "x"\n')
    config = complete({"config": str(file), "seed": 3})
    expected = {"task": ("rte", "cb"), "batch_size": 16, "eval_only": True, "lr": 1, "out": "x"}
    assert config == train.Config(**expected, seed=3)


def test_a_file_in_the_home_folder_with_a_comma_in_its_name_is_a_single_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a,b.csv").write_text("text,label\n")
    path = f"{tmp_path}/a,b.csv"
    assert complete(parse_flags(["--task=~/a,b.csv"])).task == path
    assert complete(given_flags({"task": Path("~/a,b.csv")})).task == path
    (tmp_path / "flags.toml").write_text('task = ["~/a,b.csv", "rte"]')
    assert complete({"config": str(tmp_path / "flags.toml")}).task == (path, "rte")


def test_a_text_with_commas_in_a_file_is_read_as_it_is_typed(tmp_path):
    (tmp_path / "a,b.csv").write_text("text,label\n")
    flags = {"task": "rte,cb", "seed": "0,1", "lr": "1e-2", "model": "x,y"}
    expected = train.Config(task=("rte", "cb"), seed=(0, 1), lr=0.01, model="x,y")
    toml = "".join(f"{name} = '{value}'\n" for name, value in flags.items())
    (tmp_path / "flags.toml").write_text(toml)
    (tmp_path / "flags.json").write_text(json.dumps(flags))
    for name in ("flags.toml", "flags.json"):
        assert complete({"config": str(tmp_path / name)}) == expected
    path = str(tmp_path / "a,b.csv")  # the comma is a part of its name
    (tmp_path / "flags.json").write_text(json.dumps({"task": path}))
    assert complete({"config": str(tmp_path / "flags.json")}).task == path


def test_a_list_of_a_single_value_in_a_file_is_this_value_and_makes_no_grid(tmp_path):
    file = tmp_path / "flags.toml"
    file.write_text('task = ["rte"]\nseed = [3]\nlr = [1e-2, 3e-2]\n')
    expected = {"task": "rte", "seed": 3, "lr": (1e-2, 3e-2)}
    assert complete({"config": str(file)}) == train.Config(**expected)


def test_a_list_in_a_file_is_a_text_with_commas_for_a_flag_of_several_parts(tmp_path):
    file = tmp_path / "flags.toml"
    file.write_text('labels = ["so, so", "bad"]\nlosses = ["lm", "ul"]\neval-prompt = [0, 2]\n')
    config = complete({"config": str(file)})
    expected = {"labels": '["so, so", "bad"]', "losses": "lm,ul", "eval_prompt": "0,2"}
    assert config == train.Config(**expected)


def test_a_number_in_a_file_is_a_text_for_a_flag_of_several_parts(tmp_path):
    file = tmp_path / "flags.toml"
    file.write_text("eval-prompt = 0\nlayers = 1\n")
    assert complete({"config": str(file)}) == train.Config(eval_prompt="0", layers="1")


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("flags.yaml", "a: 1", ["flags.yaml", "expected a .toml or .json file"]),
        ("flags.toml", "stepps = 3", ["flags.toml", '"stepps"', "did you mean steps?"]),
        ("flags.toml", "steps = ", ["flags.toml: not TOML", "Invalid value"]),
        ("flags.toml", "[train]\nsteps = 3", ['unknown flag "train"']),
        ("flags.toml", 'steps = "3"', ["--steps is '3', expected int"]),
        ("flags.toml", "steps = [3, 4]", ["--steps is (3, 4), expected int"]),
        ("flags.toml", 'seed = "0,a"', ["--seed is '0,a', expected int"]),
        ("flags.toml", "steps = 3\nepochs = 2", ["--epochs takes the place of --steps"]),
        ("flags.toml", 'config = "x.toml"', ["a file cannot name another --config"]),
        ("flags.toml", '"--resume" = "x"', ["a file cannot name another --config or --resume"]),
        ("flags.toml", 'data = "x.jsonl"', ['unknown flag "data"', "did you mean --task?"]),
        ("flags.toml", "similar_lengths = false", ['unknown flag "similar_lengths"']),
        (
            "flags.toml",
            "checkpoint = true",
            ['"checkpoint"', "continue a run, --resume FOLDER?"],
        ),
        ("flags.toml", "batch-size = 2\nbatch_size = 3", ["flags.toml has --batch-size twice"]),
        ("flags.toml", 'init = "x"\nadapter = "y"', ["flags.toml has --adapter twice"]),
        ("flags.json", "[1]", ["flags.json", "expected a JSON object"]),
        ("flags.json", '{"lr": 0}', ["--lr is 0", "above 0"]),
    ],
)
def test_a_mistake_in_a_config_file_is_one_line(name, text, parts, tmp_path, capsys):
    (tmp_path / name).write_text(text)
    fails(["--config", tmp_path / name], capsys, *parts)


def test_a_file_may_use_another_name_of_a_flag(tmp_path):
    file = tmp_path / "flags.toml"
    file.write_text('init = "x"\n')
    assert complete({"config": str(file)}).adapter == "x"


def test_resume_and_config_do_not_mix(tmp_path, capsys):
    assert run(words(tmp_path / "run", steps=1)) == 0
    both = ["--resume", tmp_path / "run", "--config", tmp_path / "run" / "config.json"]
    fails(both, capsys, "--resume takes no other flags")


# --epochs


@pytest.mark.parametrize(("epochs", "steps"), [(2, 10), (0.5, 3), (0.01, 1)])
def test_epochs_are_passes_over_the_rows(epochs, steps, tmp_path, monkeypatch):
    drawn = []
    original = train.Group.next_batch

    def next_batch(group):
        batch = original(group)
        drawn.extend(example.source for _, example in batch.pairs)
        return batch

    monkeypatch.setattr(train.Group, "next_batch", next_batch)
    flags = {"epochs": epochs, "steps": None, "lr": 0.1, "dropout": 0}
    assert run(words(tmp_path / "epochs", **flags)) == 0  # 20 rows, 4 per step
    assert run(words(tmp_path / "steps", **flags | {"epochs": None, "steps": steps})) == 0
    assert metrics(tmp_path / "epochs")[-1]["steps"] == steps
    if epochs == 2:
        sources = list(map(tuple, drawn[:40]))
        assert sorted(sources[:20]) == sorted(sources[20:])
    assert outcome(tmp_path / "epochs") == outcome(tmp_path / "steps")
    assert json.loads((tmp_path / "epochs" / "config.json").read_text())["steps"] == steps


def test_the_config_json_of_a_run_of_epochs_repeats_it(tmp_path):
    first = tmp_path / "first"
    assert run(words(first, steps=None, epochs=0.5, lr=0.1, dropout=0)) == 0
    assert run(["--config", first, "--out", tmp_path / "again"]) == 0
    assert outcome(tmp_path / "again") == outcome(first)
    shorter = complete({"config": str(first), "steps": 2})
    assert (shorter.steps, shorter.epochs) == (2, None)
    longer = complete({"config": str(first), "epochs": 2.0})
    assert longer.epochs == 2.0


def test_epochs_that_differ_within_a_grid_are_refused(tmp_path, capsys):
    flags = {"task": f"{task()},{task((2, 3, 1))}", "epochs": 2, "steps": None}
    assert run(words(tmp_path / "same", **flags)) == 0  # both have 20 rows
    few = tmp_path / "few"
    few.mkdir()
    for split in ("train", "validation", "test"):
        lines = (task() / f"{split}.jsonl").read_text().splitlines(keepends=True)
        (few / f"{split}.jsonl").write_text("".join(lines[:9]))
    flags["task"] = f"{task()},{few}"
    fails(words(tmp_path / "run", **flags), capsys, "5 to 10 steps", "give --steps")
    assert run(words(tmp_path / "one", adapters="one", **flags)) == 0
    assert metrics(tmp_path / "one")[-1]["steps"] == 15  # 29 rows twice, 4 per step


def test_epochs_with_fewer_steps_than_eval_every_are_refused(tmp_path, capsys):
    out = tmp_path / "run"
    message = "--eval-every is 6, and the run has 5 steps"
    fails(words(out, steps=None, epochs=1, eval_every=6), capsys, message)
    assert not out.exists()
    assert run(words(out, steps=None, epochs=1, eval_every=5)) == 0
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"eval_every": 6}))  # an earlier version
    assert run(["--resume", out]) == 0
    assert run(["--resume", out, "--steps", 7]) == 0
    assert [line["step"] for line in events(out, "eval")] == [5, 6, 7]


@pytest.mark.parametrize(("epochs", "steps"), [(0.55, 55), (0.551, 56), (1 / 3, 34), (3.0, 300)])
def test_what_rounding_adds_to_a_product_is_not_a_step(epochs, steps):
    """0.55 * 800 is 440.00000000000006."""
    part = SimpleNamespace(train_rows=range(800))
    config = train.Config(epochs=epochs, batch_size=8)
    assert steps_of_epochs(SimpleNamespace(config=config, assignments=[part])) == steps


# --or-resume: a command line that may be given again


def test_or_resume_begins_continues_and_leaves_a_run_alone(tmp_path, capsys):
    again = words(tmp_path / "run", "--or-resume", steps=3, save_every=2)
    assert run(again) == 0
    assert run(words(tmp_path / "alone", steps=3, save_every=2)) == 0
    expected = outcome(tmp_path / "alone")
    assert outcome(tmp_path / "run") == expected
    capsys.readouterr()
    assert run(again) == 0
    assert "is finished" in capsys.readouterr().out
    assert outcome(tmp_path / "run") == expected
    (tmp_path / "run" / "checkpoint.pt").unlink()  # as if it was killed before the first one
    *lines, _ = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(lines))
    assert run(again) == 0
    assert outcome(tmp_path / "run") == expected


def test_or_resume_leaves_a_finished_run_alone_although_its_checkpoint_was_deleted(
    tmp_path, capsys
):
    again = words(tmp_path / "run", "--or-resume", steps=2, seed="0,1")
    assert run(again) == 0
    (tmp_path / "run" / "checkpoint.pt").unlink()
    before = contents(tmp_path / "run")
    capsys.readouterr()
    assert run(again) == 0
    printed = capsys.readouterr().out
    assert "is finished" in printed
    assert "to train longer" not in printed  # because there is nothing to continue from
    assert contents(tmp_path / "run") == before
    assert run(["--resume", tmp_path / "run"]) == 0  # which starts over
    assert (tmp_path / "run" / "checkpoint.pt").exists()


def test_or_resume_goes_on_with_a_grid_that_has_some_of_its_results(tmp_path, capsys):
    again = words(tmp_path / "run", "--or-resume", steps=2, seed="0,1")
    assert run(again) == 0
    expected = outcome(tmp_path / "run")
    (tmp_path / "run" / "checkpoint.pt").unlink()
    *lines, _ = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(lines))
    capsys.readouterr()
    assert run(again) == 0
    assert "is finished" not in capsys.readouterr().out
    assert outcome(tmp_path / "run") == expected


@pytest.mark.parametrize(
    "flags", [{"out": 7, "or_resume": True}, {"resume": 7}, {"resume": ["a"]}, {"config": 7}]
)
def test_a_path_that_is_no_text_is_a_mistake(flags):
    name, value = next(iter(flags.items()))
    with pytest.raises(ValueError, match=re.escape(f"--{name} is {value!r}, expected str")):
        complete(flags)


def test_or_resume_leaves_no_trace_in_the_record_of_a_run(tmp_path):
    assert run(words(tmp_path / "run", "--or-resume", steps=1)) == 0
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())
    assert recorded["or_resume"] is False
    assert recorded["resume"] is None


def test_or_resume_needs_a_folder_and_the_same_flags(tmp_path, capsys):
    fails(words(None, "--or-resume"), capsys, "--or-resume looks for a run in the folder of --out")
    fails(["--or-resume", "--resume", tmp_path], capsys, "--resume takes no other flags")
    assert run(words(tmp_path / "run", steps=1)) == 0
    found = f"{tmp_path}/run holds a run with other flags: --lr is 0.003, expected 0.1"
    fails(words(tmp_path / "run", "--or-resume", steps=1, lr=0.1), capsys, found)
    # Where a run happens is not what it does, and neither is how many examples a pass reads.
    others = {"data_dir": tmp_path, "micro_batch_size": 2, "eval_batch_size": 3}
    assert run(words(tmp_path / "run", "--or-resume", steps=1, **others)) == 0


def test_a_run_with_fewer_steps_can_be_made_longer(tmp_path, capsys):
    out = tmp_path / "my run"
    assert run(words(out, steps=1)) == 0
    only = "give another --out, or remove the folder"
    longer = f"{only}, or make it longer: minia3 train --resume '{out}' --steps 2"
    fails(words(out, "--or-resume", steps=2), capsys, longer)
    fails(words(out, "--or-resume", steps=1, lr=0.1), capsys, f"{only}\n")
    fails(words(out, "--or-resume", steps=2, lr=0.1), capsys, f"expected 2: {only}\n")
    assert run(["--resume", out, "--steps", "2"]) == 0
    found = f"--steps is 2, expected 1: {only}, or, if it was made longer, give --steps 2\n"
    fails(words(out, "--or-resume", steps=1), capsys, found)
    untrained = tmp_path / "untrained"
    assert run(words(untrained, steps=1, method="none")) == 0
    again = words(untrained, "--or-resume", steps=2, method="none")
    fails(again, capsys, f"expected 2: {only}\n")
    again = words(untrained, "--or-resume", steps=None, epochs=1, method="none")
    fails(again, capsys, f"expected 1.0: {only}\n")


def test_a_run_whose_rows_were_moved_can_get_their_new_path(tmp_path, capsys):
    rows = shutil.copytree(task(), tmp_path / "old" / "rows")
    out = tmp_path / "run"
    assert run(words(out, steps=1, task=rows)) == 0
    moved = tmp_path / "new" / "rows"
    (tmp_path / "old").rename(tmp_path / "new")
    again = words(out, "--or-resume", steps=1, task=moved)
    fails(again, capsys, "or, if it was moved, write the new path into its config.json")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"task": str(moved)}))
    assert run(again) == 0
    assert "is finished" in capsys.readouterr().out


def test_or_resume_takes_the_places_that_are_typed(tmp_path):
    flags = {"model": str(running.model("t5")), "task": str(task()), "device": "cpu", "steps": 1}
    flags |= {"out": str(tmp_path / "run"), "or_resume": True}
    minia3.train(**flags)
    again = complete(flags)
    assert (again.resume, again.data_dir, again.device) == (flags["out"], "data", "cpu")
    moved = complete({**flags, "data_dir": "elsewhere", "device": "meta"})
    assert moved == dataclasses.replace(again, data_dir="elsewhere", device="meta")
    del flags["device"]
    assert complete(flags).device == "cpu"  # that of the run


def test_or_resume_knows_a_run_whose_epochs_became_steps(tmp_path, capsys):
    again = words(tmp_path / "run", "--or-resume", steps=None, epochs=0.5)
    assert run(again) == 0
    capsys.readouterr()
    assert run(again) == 0
    assert "is finished" in capsys.readouterr().out


def test_or_resume_does_not_take_epochs_for_steps_before_it_knows_how_many_they_are(
    tmp_path, capsys, monkeypatch
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(train, "make_cells", lambda config: running.kill_self(signal.SIGINT))
        assert run(words(out, steps=None, epochs=0.5)) == 130
    message = "holds a run with other flags: --epochs is 0.5, expected None"
    fails(words(out, "--or-resume", steps=None), capsys, message)
    assert run(words(out, "--or-resume", steps=None, epochs=0.5)) == 0
    assert run(words(out, "--or-resume", steps=3)) == 0  # which they are
    assert "is finished" in capsys.readouterr().out


def test_or_resume_knows_a_grid_of_a_single_adapter(tmp_path, capsys):
    """Such a run began when a list of a single value in a file still made a grid."""
    out = tmp_path / "run"
    assert run(words(out, steps=1, seed=3)) == 0
    record = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(record | {"seed": [3]}))
    assert run(words(out, "--or-resume", steps=1, seed=3)) == 0
    assert f"{out} is finished" in capsys.readouterr().out
    fails(words(out, "--or-resume", steps=1, seed=4), capsys, "--seed is (3,), expected 4")


def test_or_resume_from_python(tmp_path):
    flags = {"task": str(task()), "steps": 1, "out": tmp_path / "run", "or_resume": True}
    first = minia3.train(running.model("t5"), **flags)
    assert minia3.train(running.model("t5"), **flags).results == first.results
    (tmp_path / "run" / "checkpoint.pt").unlink()
    assert minia3.train(running.model("t5"), **flags).results == first.results
