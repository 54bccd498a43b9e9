"""Which rows and prompts make the batches of a cell."""

import functools
from collections import Counter
from itertools import chain

import numpy as np
import pytest
from running import mixed_tasks, model, run, task, train, words, write
from written_out import rte_flags

import minia3
from minia3.tasks.batches import order
from minia3.tasks.examples import encode_rows
from minia3.tasks.mixture import draw_rows, make_mixture
from minia3.tasks.prompts import for_family
from minia3.training.assignment import assign_rows
from minia3.training.cell import Cell
from minia3.training.drawing import draw_batches


@functools.cache
def tokenizer_and_model():
    return minia3.load_tokenizer(model("t5")), minia3.load_model(model("t5"))


def cell(cap, seed=0, steps=200):
    config = train.Config(
        task=tuple(mixed_tasks().split(",")), adapters="one", cap=cap, seed=seed, steps=steps
    )
    return Cell(config, make_mixture([minia3.load_task(name) for name in config.task]))


@pytest.mark.parametrize(("cap", "share"), [(10**6, 6 / 46), (10, 6 / 16), (1, 1 / 2)])
def test_tasks_mix_in_proportion_to_their_rows_up_to_the_cap(cap, share):
    mixture = cell(cap)
    batches = draw_batches(mixture, *tokenizer_and_model())
    n_choices = Counter(len(example.targets) for example in chain(*batches))
    n = sum(n_choices.values())
    assert n == 200 * 8
    assert n_choices[2] / n == pytest.approx(share, abs=4 * (share * (1 - share) / n) ** 0.5)


def test_a_grid_says_whose_inputs_are_cut_and_says_it_once_if_all_are(tmp_path, capsys):
    rows = [{"input": "w5 w6 w7 w8", "target": f"w{5 + i}"} for i in range(4)]
    rows[0]["input"] = "w5"
    many = write(tmp_path / "many", train=rows, test=rows)
    one = write(tmp_path / "one", train=[*rows[:2], rows[0], rows[0]], test=rows)
    flags = {"steps": 1, "max_length": 3, "max_target_length": 1}
    assert run(words(tmp_path / "run", task=f"{many},{one}", **flags)) == 0
    shown = capsys.readouterr().out
    notes = [line for line in shown.splitlines() if " training " in line]
    assert notes == [
        "note     many: 3 of 4 training inputs are cut to 3 tokens (--max-length)",
        "note     4 of 4 training targets are cut to 1 tokens (--max-target-length)",
        "note     one: 1 of 4 training inputs is cut to 3 tokens (--max-length)",
    ]
    flags |= {"method": "lora", "seed": "0,1", "max_target_length": 9}
    assert run(words(tmp_path / "lora", task=many, **flags)) == 0
    shown = capsys.readouterr().out
    for name in ("s0", "s1"):  # one after the other
        assert f"note     {name}: 3 of 4 training inputs are cut" in shown


def test_the_rows_of_each_task_come_equally_often_in_an_order_of_the_seed():
    seen = []
    for seed in (0, 0, 1):
        examples = chain(*draw_batches(cell(10, seed), *tokenizer_and_model()))
        seen.append([(len(e.targets), tuple(e.source)) for e in examples])
        for n_choices in (2, 3):
            times = Counter(source for n, source in seen[-1] if n == n_choices).values()
            # Two rows of the larger task may be equal.
            assert max(times) - min(times) <= {2: 1, 3: 2}[n_choices]
    assert seen[0] == seen[1] != seen[2]


def test_the_batches_of_a_single_task_follow_its_order():
    config = train.Config(seed=3, steps=30)
    data = minia3.load_task(task())
    tokenizer = minia3.load_tokenizer(model("t5"))
    rows_of = order(20, 8, 3)
    expected = [
        [tokenizer.encode(data.train[i]["input"]) for i in rows_of(step)] for step in range(30)
    ]
    assert [
        [example.source for example in step]
        for step in draw_batches(Cell(config, data), *tokenizer_and_model())
    ] == expected


def test_each_seed_draws_its_own_prompts(tmp_path):
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
        part = assign_rows(task, config)
        texts = [
            encode_rows([(task.train[0], prompt)], tokenizer, 512, False)[1][0]
            for prompt in part.prompts
        ]
        drawn.append(draw_batches(Cell(config, task), *tokenizer_and_model()))
        for step, batch in enumerate(drawn[-1]):
            prompts = np.random.RandomState([seed, 1, step]).randint(len(texts), size=7)
            assert batch == [texts[prompt] for prompt in prompts]  # there is one row
    assert drawn[0] != drawn[1]


def test_training_draws_from_all_prompts_and_evaluation_uses_one(tmp_path, monkeypatch):
    seen = []
    original = encode_rows

    def spy(pairs, *args, **options):
        seen.append({prompt for _, prompt in pairs})
        return original(pairs, *args, **options)

    monkeypatch.setattr("minia3.training.drawing.encode_rows", spy)
    monkeypatch.setattr("minia3.inference.evaluation.encode_rows", spy)
    assert run(words(tmp_path / "run", eval_prompt=2, steps=10, **rte_flags(tmp_path))) == 0
    prompts = for_family(minia3.load_task("rte", tmp_path / "data").prompts, None)
    assert seen == [set(prompts), {prompts[2]}, {prompts[2]}]


def test_batches_are_drawn_when_they_are_asked_for_and_in_any_order(monkeypatch):
    n_drawn = 0

    def spy(*args):
        nonlocal n_drawn
        for rows in draw_rows(*args):
            n_drawn += 1
            yield rows

    monkeypatch.setattr("minia3.training.drawing.draw_rows", spy)
    mixture = cell(10, steps=6)
    batches = draw_batches(mixture, minia3.load_tokenizer(model("t5")))
    n_drawn = 0  # because examples are drawn once before, to be encoded
    first = batches[0]
    assert n_drawn == 1
    third = batches[2]
    assert n_drawn == 3
    in_order = list(batches)
    assert len(in_order) == len(batches) == 6
    assert (first, third) == (in_order[0], in_order[2])
    for step in (3, 5, 0, 0, 2):
        assert batches[step] == in_order[step]
    with pytest.raises(IndexError):
        batches[6]


def test_a_run_of_a_billion_examples_is_drawn_at_once_and_in_little_memory():
    """One step of them has all rows, and then nothing is left to encode."""
    config = train.Config(batch_size=1000, steps=10**6)
    batches = draw_batches(
        Cell(config, minia3.load_task(task())), minia3.load_tokenizer(model("t5"))
    )
    assert len(batches.examples) == 20
    assert len(batches[1]) == 1000
