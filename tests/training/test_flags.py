"""A command line becomes a Config, and each mistake in it is one line that says what to do."""

import dataclasses

import pytest
from running import fails, run, train

from minia3.training.config import GROUPS

LIMITS = """
    steps 0 at least 1
    batch-size 0 at least 1
    micro-batch-size -1 at least 1
    eval-batch-size 0 at least 1
    save-every 0 at least 1
    shots 0 at least 1
    max-length 0 at least 1
    max-target-length 0 at least 1
    max-new-tokens 0 at least 1
    eval-every -1 at least 0
    cap 0 at least 1
    patience -1 at least 0
    seed -1 at least 0
    seed 4294967296 below 4294967296
    lr 0.0 above 0
    lr -1.0 above 0
    lr nan above 0
    lr inf a finite number above 0
    clip 0.0 above 0
    clip inf a finite number above 0
    dropout 1.0 below 1
    dropout -0.1 at least 0
    dropout nan at least 0
    warmup-ratio 1.0 below 1
    warmup-ratio -0.5 at least 0
    weight-decay -1.0 at least 0
    lr 1e+38 below 1e+32
"""
LIMITS = [line.strip().split(" ", 2) for line in LIMITS.strip().splitlines()]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--modle", "x"], ["'--modle' is neither a flag nor", "did you mean --model?", "--help"]),
        (["--step=3"], ["'--step=3'", "did you mean --steps?"]),
        (["--eval_every", "3"], ["did you mean --eval-every?"]),
        (["--frobnicate"], ["'--frobnicate' is neither a flag nor"]),
        (["rte"], ["'rte' is neither a flag nor"]),
        ([""], ["'' is neither a flag nor"]),
        (["--steps"], ["--steps", "expected one argument"]),
        (["--steps", "many"], ["--steps", "'many'", "int"]),
        (["--steps", "1.5"], ["--steps", "'1.5'"]),
        (["--lr", "fast"], ["--lr", "'fast'", "float"]),
        (["--eval-only=yes"], ["--eval-only"]),
        (["--quantize", "int4"], ["--quantize is 'int4'", "int8,nf4"]),
        (["--metric", "f2"], ["--metric is 'f2'", "accuracy", "rouge_l"]),
        (["--losses", "lm,xx"], ["--losses is 'lm,xx'", "lm,ul,ln"]),
        (["--sites", "k,x"], ["--sites is 'k,x'", "some of k,v,ff,q,o,up,gate, each at most once"]),
        (["--sites", "k,"], ["--sites is 'k,'"]),
        (["--sites", "k,v,k"], ["--sites is 'k,v,k'", "each at most once"]),
        (["--where", "q,ff"], ["--where is 'q,ff'", "some of k,v,down,q,o,up,gate"]),
        (["--losses", "lm,lm"], ["--losses is 'lm,lm'", "each at most once"]),
        (["--losses", ""], ["--losses is ''"]),
        (["--out", ""], ["--out is '', expected str"]),
        (["--adapter", ""], ["--adapter is '', expected str"]),
        (["--dtype", "float17"], ["--dtype is 'float17'", "float32", "bfloat16"]),
        (["--method", "prefix"], ["--method is 'prefix'", "ia3", "none"]),
        (["--rank", "0"], ["--rank is 0", "at least 1"]),
        (["--shard", "-1"], ["--shard is -1", "at least 0"]),
        (["--alpha", "0"], ["--alpha is 0", "at least 1"]),
        (["--adapters", "two"], ["--adapters is 'two'", "each", "one"]),
        (["--seed", "1", "2", "3"], ["'2' is neither", "commas", "as in --seed 1,2,3"]),
        (["--lr", "1e-3", "1e-2", "--steps", "3"], ["as in --lr 1e-3,1e-2"]),
        (["--labels", "bad", "good"], ["as in --labels bad,good"]),
        (["--sites", "k", "v", "--steps", "3"], ["as in --sites k,v"]),
        (["--losses", "lm", "ul"], ["as in --losses lm,ul"]),
        (["--where", "q", "v"], ["as in --where q,v"]),
        (["--layers", "0-5", "20-"], ["as in --layers 0-5,20-"]),
        (["--eval-prompt", "0", "1"], ["as in --eval-prompt 0,1"]),
        (["--steps", "1", "2"], ["'2' is neither a flag nor the value of a flag (see"]),
        (["--learning-rate", "1"], ["'--learning-rate'", "did you mean --lr?"]),
        (["--output_dir=x"], ["did you mean --out?"]),
        (["--checkpoint", "runs/x/checkpoint.pt"], ["to continue a run, --resume runs/x?"]),
        (["--checkpoint", "--steps", "3"], ["--recompute (its name since", "--resume FOLDER?"]),
        (["--resume", "runs/x/checkpoint.pt"], ["expected the folder of a run: runs/x"]),
        (["--epochs", "0"], ["--epochs is 0.0", "above 0"]),
        (["--epochs", "2", "--steps", "3"], ["--epochs takes the place of --steps"]),
        (["--log-to", "tensorbord"], ["--log-to is 'tensorbord'", "some of tensorboard,wandb"]),
        (["--seed", "0,x"], ["--seed", "'0,x'", "int"]),
        (["--seed", "0,-1"], ["--seed is -1", "at least 0"]),
        (["--lr", "1e-3,0"], ["--lr is 0.0", "above 0"]),
        (["--task", "rte,"], ["--task is ''", "str"]),
        (["--optimizer", "sgd"], ["--optimizer is 'sgd'", "adafactor", "adamw"]),
        *[([f"--{flag}", value], [f"--{flag} is {value}", limit]) for flag, value, limit in LIMITS],
    ],
)
def test_a_bad_flag_is_one_line_and_nothing_is_written(
    arguments, parts, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    fails(arguments, capsys, *parts)
    assert list(tmp_path.iterdir()) == []


def test_each_flag_with_limits_is_tested_above():
    (mark,) = test_a_bad_flag_is_one_line_and_nothing_is_written.pytestmark
    tried = {arguments[0] for arguments, _ in mark.args[1]}
    limited = {f.name for f in dataclasses.fields(train.Config) if f.metadata["limits"]}
    assert {f"--{name.replace('_', '-')}" for name in limited} <= tried


def test_help_explains_every_flag_and_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        run(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    shown, examples = text.split("options:")[1].split("\nexamples:")
    explained = [" ".join(part.split()) for part in shown.split("\n  --")[2:]]  # not --version
    fields = dataclasses.fields(train.Config)
    assert len(explained) == len(fields)
    for field, words_of in zip(fields, explained, strict=True):
        name, *rest = words_of.split()
        # Python 3.13 has a comma before another name of the flag.
        assert name.rstrip(",") == field.name.replace("_", "-")
        assert len(rest) > 4
        if field.default not in (None, False, 0):
            assert f"(default: {field.default})" in words_of
        assert "(default: " in words_of, name
    assert examples.count("\n  python train.py") == 4


def test_help_has_groups_and_each_flag_is_in_one(capsys):
    with pytest.raises(SystemExit):
        run(["--help"])
    text = capsys.readouterr().out
    places = [text.index(f"\n{title}:\n") for title in GROUPS.values()]
    assert places == sorted(places)
    assert GROUPS.keys() <= {field.name for field in dataclasses.fields(train.Config)}
    assert "\n  --model " not in text[: places[0]]
