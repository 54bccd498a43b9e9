"""A study's file says which runs there are; each mistake in it is answered in one line."""

import re
import shlex

import pytest

from minia3.training.command_line import parse_flags
from minia3.training.study_file import given_words, read_studies

WHOLE = """
out = "runs/shots"
[flags]
model = "t5-base"
seed = [0, 1]
lr = 1e-3
[each]
shots = [4, 16]
[each.method]
ia3 = {}
lora = {method = "lora", lr = 3e-3}
[runs.none]
method = "none"
"""


def read(tmp_path, text, name="study.toml", **given):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return read_studies([path], given)


def names(runs):
    return [run.name for run in runs]


def test_the_runs_are_the_product_of_the_lists_and_one_for_each_table_of_runs(tmp_path):
    runs = read(tmp_path, WHOLE)
    assert names(runs) == ["shots4-ia3", "shots4-lora", "shots16-ia3", "shots16-lora", "none"]
    shared = {"model": "t5-base", "seed": (0, 1), "lr": 1e-3}
    assert runs[0].flags == shared | {"shots": 4, "out": "runs/shots/shots4-ia3"}
    lora = {"shots": 16, "method": "lora", "lr": 3e-3, "out": "runs/shots/shots16-lora"}
    assert runs[3].flags == shared | lora, "a set replaces what [flags] says"
    assert runs[4].flags == shared | {"method": "none", "out": "runs/shots/none"}


def test_the_words_of_a_run_are_the_command_line_of_its_flags(tmp_path):
    for run in read(tmp_path, WHOLE + "no-cross = false\ninput = '{a} is it?'"):
        words = shlex.split(shlex.join(given_words(run.flags)))
        assert parse_flags(words) == run.flags
        assert "no_cross" not in run.flags


def test_the_words_of_labels_may_be_a_list(tmp_path):
    text = "[flags]\nlabels = ['bad', 'good']\n[each]\nsites = [['k', 'v'], 'ff']\n"
    first, second = read(tmp_path, text)
    assert (first.name, second.name) == ("k,v", "ff")
    assert [first.config.labels, first.config.sites] == ["bad,good", "k,v"]


def test_values_are_those_of_the_command_line_whatever_the_file_writes(tmp_path):
    text = "[runs.a]\nlr = 1\nwarmup-ratio = [0, 0.5]\neval-prompt = 0"
    (run,) = read(tmp_path, text)
    assert repr(run.config.lr) == "1.0"
    assert repr(run.config.warmup_ratio) == "(0.0, 0.5)"
    assert repr(run.config.eval_prompt) == "'0'"
    with pytest.raises(ValueError, match="two runs are the same run"):
        read(tmp_path, "[runs.a]\nlr = 1\n[runs.b]\nlr = 1.0")


def test_several_values_may_be_a_text_with_commas_as_in_a_file_of_config(tmp_path):
    text = "[flags]\nseed = '0,1'\n[each]\nlr = ['1e-3,1e-2']\ntask = ['a/x.csv,b/y.csv']"
    (run,) = read(tmp_path, text)
    assert run.name == "lr0.001,0.01-x.csv,y.csv"
    assert (run.config.seed, run.config.lr) == ((0, 1), (0.001, 0.01))
    assert run.config.task == ("a/x.csv", "b/y.csv")


def test_zero_is_a_value_like_others(tmp_path):
    text = "[flags]\ndropout = 0\n[each]\nwarmup-ratio = [0, 0.06]\n[runs.shared]\nshard = 0"
    first, second, shared = read(tmp_path, text)
    assert names([first, second]) == ["warmupratio0", "warmupratio0.06"]
    assert (first.config.warmup_ratio, second.config.warmup_ratio) == (0.0, 0.06)
    assert shared.config.shard == 0
    for run in (first, second, shared):
        assert run.config.dropout == 0.0
        assert parse_flags(given_words(run.flags)) == run.flags


def test_a_value_may_begin_with_a_dash(tmp_path):
    text = "[runs.a]\nlabels = '-1,1'\ninput = '- {a}?'\ntarget = '{b}'"
    (run,) = read(tmp_path, text)
    assert (run.config.labels, run.config.input) == ("-1,1", "- {a}?")
    assert parse_flags(given_words(run.flags)) == run.flags


def test_only_some_runs_may_be_meant_and_only_their_flags_are_checked(tmp_path):
    path = tmp_path / "study.toml"
    path.write_text(WHOLE)
    runs = read_studies([path], {"adapter": "path/to/adapter"}, only="*-ia3")
    assert names(runs) == ["shots4-ia3", "shots16-ia3"]
    assert names(read_studies([path], {"rank": 4}, only="*lora")) == ["shots4-lora", "shots16-lora"]
    with pytest.raises(ValueError, match="'x', and no run has such a name: expected a pattern"):
        read_studies([path], {}, only="x")


def test_flags_that_are_typed_replace_those_of_the_file_in_every_run(tmp_path):
    runs = read(tmp_path, WHOLE, lr=1.0, out="elsewhere")
    assert {run.flags["lr"] for run in runs} == {1.0}
    assert str(runs[-1].folder) == "elsewhere/none"


def test_steps_and_epochs_take_each_other_s_place(tmp_path):
    text = "[flags]\nepochs = 3\n[runs.short]\nsteps = 5\n[runs.long]\nseed = 1"
    short, long = read(tmp_path, text)
    assert (short.config.steps, short.config.epochs) == (5, None)
    assert long.config.epochs == 3
    for run in read(tmp_path, text, steps=2, out=str(tmp_path)):
        assert (run.resolve().steps, run.resolve().epochs) == (2, None)
    for run in read(tmp_path, text, epochs=1.0, out=str(tmp_path)):
        assert run.resolve().epochs == 1
        assert "steps" not in run.flags


def test_without_a_place_the_runs_are_in_a_folder_of_the_study_s_name(tmp_path):
    (run,) = read(tmp_path, "[runs.a]\nsteps = 2", name="losses.toml")
    assert str(run.folder) == "runs/losses/a"


def test_without_each_there_are_only_the_runs_that_are_named(tmp_path):
    assert names(read(tmp_path, "[runs.a]\nlr = 1\n[runs.b]\nlr = 2")) == ["a", "b"]


def test_several_files_are_one_list(tmp_path):
    paths = []
    for name in ("one", "two"):
        path = tmp_path / f"{name}.toml"
        path.write_text(f"[each]\ntask = ['rte', 'cb']\n[flags]\nmodel='m-{name}'")
        paths.append(path)
    folders = [str(run.folder) for run in read_studies(paths, {})]
    assert folders == ["runs/one/rte", "runs/one/cb", "runs/two/rte", "runs/two/cb"]
    with pytest.raises(ValueError, match="--out is the folder of one study, found 2 studies"):
        read_studies(paths, {"out": "x"})


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("lr = [3e-3]", "lr0.003"),
        ("batch-size = [8]", "batchsize8"),
        ("task = ['path/to/same-colour']", "same-colour"),
        ("task = ['path/to/']", "to"),
        ("task = [['rte', 'cb']]", "rte,cb"),
        ("seed = [[0, 1]]", "seed0,1"),
        ("seed = [[7]]", "seed7"),
        ("losses = ['lm,ul']", "lm,ul"),
        ("no-cross = [true]", "nocrosstrue"),
        ("model = ['./t5']", "t5"),
        ("eval-prompt = [0]", "0"),
    ],
)
def test_values_name_the_runs(tmp_path, line, name):
    assert names(read(tmp_path, f"[each]\n{line}")) == [name]


def test_texts_that_cannot_be_names_of_files_become_a_short_one(tmp_path):
    runs = read(tmp_path, "[each]\ninput = ['{a} Is it? {b}', '{a} Größe: {b}']")
    for run in runs:
        assert re.fullmatch(r"[0-9a-f]{6}", run.name)


def test_a_slash_in_a_text_begins_no_path(tmp_path):
    prompts = "'{text} Is it good, yes/no?', '{text} Do you like it, yes/no?', '{text} a/b'"
    runs = read(tmp_path, f"[each]\ninput = [{prompts}]")
    assert len({run.name for run in runs}) == 3
    assert all(re.fullmatch(r"[0-9a-f]{6}", run.name) for run in runs)


@pytest.mark.parametrize("path", [".", ".."])
def test_a_folder_without_a_name_has_the_name_that_it_has_elsewhere(tmp_path, monkeypatch, path):
    (tmp_path / "above" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "above" / "here")
    expected = {".": "here", "..": "above"}[path]
    assert names(read(tmp_path, f"[each]\ndata-dir = ['{path}']")) == [expected]


def test_a_file_from_windows_is_read(tmp_path):
    path = tmp_path / "study.toml"
    path.write_bytes('\ufeff[runs."größe"]\r\nlr = 1\r\n'.encode())
    assert names(read_studies([path], {})) == ["größe"]


MISTAKES = {
    "": "there are no runs: give lists in [each], or [runs.NAME]",
    "[flags]\nseed = 1": "there are no runs",
    "steps = 3": "a study has no part 'steps': a flag belongs in [flags], [each] or [runs.NAME]",
    "[flag]\nsteps = 3": "a study has no part 'flag': did you mean flags?",
    "[grid]\nsteps = 3": "a study has no part 'grid': expected one of out, flags, each, runs",
    "out = 3\n[runs.a]": "out is 3, expected a folder",
    "out = ''\n[runs.a]": "out is '', expected a folder",
    "flags = 3\n[runs.a]": "[flags] is 3, expected flags and their values",
    "[flags]\nlearning-rate = 1\n[runs.a]": 'unknown flag "learning-rate": did you mean --lr?',
    "[each]\nstep = [1]": '[each]: unknown flag "step": did you mean steps?',
    "[each]": "[each] is {}, expected lists of values",
    "each = [1]": "[each] is [1], expected lists of values",
    "[each]\nseed = []": "[each] seed is [], expected a list of values",
    "[each]\nseed = 1": "[each] seed is 1, expected a list of values",
    "[each]\nseed = [[]]": "[each] seed is an empty list",
    "[flags]\nseed = []\n[runs.a]": "[flags] seed is an empty list",
    "[each.how]": "[each.how] is empty, expected named sets of flags",
    "[each.how]\na = 1": "[each.how] a is 1, expected flags and their values",
    "[each.how]\n'a/b' = {}": "'a/b' cannot name a folder",
    "[each.how]\n'..' = {}": "'..' cannot name a folder",
    "[runs.'']": "'' cannot name a folder",
    "runs = 3": "runs is 3, expected tables [runs.NAME]",
    "[[runs]]\nlr = 1": "expected tables [runs.NAME]",
    "[runs]\nlr = 1": "[runs.lr] is 1, expected flags and their values",
    "[flags]\nlr = 1\n[each]\nlr = [1, 2]": "--lr is in [flags] and in [each]: choose one",
    "[each.how]\na = {lr = 1}\n[each]\nlr = [1]": "--lr is in [each.how] and in [each]: choose one",
    "[each.how]\na = {lr = 1}\n[each.x]\nb = {lr = 2}": "--lr is in [each.how] and in [each.x]",
    "[each]\nseed = [1, 1]": "two runs have the same folder",
    "[each]\nseed = [1, [1]]": "two runs have the same folder",
    "[runs.a]\n[runs.A]\nlr = 1": "two runs have the same folder",  # on Windows and macOS
    "[runs.a]\n[runs.b]": "two runs are the same run: runs/study/a and runs/study/b",
    "[runs.a]\nlr = 3e-3\n[runs.b]\nsteps = 1000": "two runs are the same run",
    "[runs.a]\nsteps = 0": "a: --steps is 0, expected at least 1",
    "[runs.a]\nsteps = 'x'": "a: --steps is 'x', expected int",
    "[runs.a]\nrank = 4": "a: --rank is for --method lora",
    "[runs.a]\nshard = true": "a: --shard is True, expected int",
    "[flags]\nsteps = 3\nepochs = 2\n[runs.a]": "a: --epochs takes the place of --steps",
    "[runs.a]\nout = 'x'": "[runs.a] has --out, which is not for the runs of a study",
    "[flags]\nresume = 'x'\n[runs.a]": "[flags] has --resume, which is not for the runs of a study",
    "[flags]\nconfig = 'x'\n[runs.a]": "[flags] has --config, which is not",
    "[flags]\nbatch-size = 1\nbatch_size = 2\n[runs.a]": "[flags] has --batch-size twice",
    "[runs.a]\ntask = ['a,b', 'c']": "[runs.a] task has 'a,b' in a list, and on a command line",
    "[flags\n": "not TOML",
    "[runs.a]\n[runs.a]": "not TOML",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_answered_in_one_line(tmp_path, text):
    with pytest.raises(ValueError, match=re.escape(MISTAKES[text])) as caught:
        read(tmp_path, text)
    message = str(caught.value)
    assert "\n" not in message
    if not message.startswith("two runs"):
        assert message.startswith(str(tmp_path / "study.toml"))


def test_a_study_continues_its_runs_itself(tmp_path):
    with pytest.raises(ValueError, match="a study continues its runs itself"):
        read(tmp_path, "[runs.a]", resume="runs/x")


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.toml: not found"):
        read_studies([tmp_path / "nowhere.toml"], {})
