"""What each method trains: the chosen vectors, LoRA, or everything else; the rest does not move."""

import functools
import signal

import pytest
import torch
from running import (
    at_line,
    fails,
    kill_self,
    last_vectors,
    metrics,
    model,
    outcome,
    resume,
    run,
    task,
    train,
    words,
)
from safetensors.torch import load_file
from written_out import read, used

import minia3
from minia3.adapters.lora import add_lora
from minia3.training.methods import trainable_parameters


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
def test_only_the_chosen_vectors_differ_from_one(seed, name, flags, moves, tmp_path, capsys):
    if (name, flags) == ("llama", ["--no-cross"]):
        fails(
            words(tmp_path / "run", *flags, model=model(name)),
            capsys,
            "--no-cross",
            "this one has none",
        )
        return
    out = tmp_path / "run"
    assert run(words(out, *flags, model=model(name), lr=0.1, seed=seed, steps=3)) == 0
    trained = last_vectors(out)
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
        (
            "sites",
            "k,up",
            ["--sites 'k,up'", "no vectors for 'up'", "sites from k,v,ff,q,o,up,gate"],
        ),
        ("layers", "0,2", ["--layers names 2", "layers 0 to 1"]),
        ("layers", "2", ["--layers names 2", "as in 0-1"]),
        ("layers", "1-0", ["--layers '1-0'"]),
        ("layers", "0,x", ["--layers '0,x'", "0-5,20-"]),
        ("layers", "0,", ["--layers '0,'"]),
    ],
)
def test_sites_and_layers_that_do_not_exist_are_one_line(flag, value, parts, tmp_path, capsys):
    fails(words(tmp_path / "run", **{flag: value}), capsys, *parts)
    assert not (tmp_path / "run").exists()


# The baselines


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_lora_trains_what_it_adds_and_its_folder_gives_the_same_result(name, tmp_path, capsys):
    flags = {
        "model": model(name),
        "method": "lora",
        "rank": 2,
        "alpha": 3,
        "where": "q,down",
        "lr": 0.05,
    }
    out = tmp_path / "run"
    assert run(words(out, **flags)) == 0
    final = metrics(out)[-1]
    tensors = load_file(out / "adapter" / "adapter_model.safetensors")
    assert final["trainable"] == sum(x.numel() for x in tensors.values())
    assert all(x.any() for x in tensors.values())  # B too has left zero
    share = used(capsys.readouterr().out, read(task() / "test.jsonl"), capsys)
    assert share == pytest.approx(final["accuracy"])
    config = train.Config(method="lora", adapter=str(out / "adapter"))
    found = trainable_parameters(minia3.load_model(model(name)), config)
    saved = sorted(map(torch.Tensor.tolist, tensors.values()))
    assert sorted(parameter.tolist() for parameter in found.values()) == saved


def test_lora_is_drawn_by_the_seed_of_its_run():
    found = trainable_parameters(
        minia3.load_model(model("t5")), train.Config(method="lora", seed=3)
    )
    expected = add_lora(minia3.load_model(model("t5")), seed=3)
    assert all(torch.equal(p, expected[name]) for name, p in found.items())


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_full_trains_everything_except_the_vectors_and_saves_a_model(name, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(words(out, model=model(name), method="full", lr=0.01)) == 0
    final = metrics(out)[-1]
    before = minia3.load_model(model(name))
    after = minia3.load_model(out / "model")
    vectors = sum(v.numel() for v in minia3.vectors(before).values())
    assert (
        final["trainable"]
        == final["total"]
        == sum(p.numel() for p in before.parameters()) - vectors
    )
    for (key, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        assert torch.equal(old, new) == key.endswith(".scale"), key
    share = used(capsys.readouterr().out, read(task() / "test.jsonl"), capsys)
    assert share == pytest.approx(final["accuracy"])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_baseline_that_is_stopped_continues_bit_for_bit(method, tmp_path):
    flags = {"method": method, "lr": 0.01, "eval_every": 3, "dropout": 0.1}
    with at_line(0, None) as executed:
        assert run(words(tmp_path / "whole", **flags)) == 0
    with at_line(int(0.7 * len(executed)), functools.partial(kill_self, signal.SIGINT)):
        assert run(words(tmp_path / "run", **flags)) == 130
    assert resume(tmp_path / "run") == 0
    adapters, lines = outcome(tmp_path / "run")
    assert (adapters, lines) == outcome(tmp_path / "whole")
    assert len(adapters) == 1
