"""A loop over public functions trains what train.py trains."""

import json
import shutil

import numpy as np
import pytest
import running
import torch
from running import last_vectors, model, run, task, train, words

import minia3
from minia3.tasks.prompts import render
from minia3.training.optimizer import learning_rate


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_a_loop_of_your_own_over_public_functions_is_train_py(kind, tmp_path):
    flags = {"model": model(kind), "task": task((2, 3, 1)), "seed": 3, "lr": 0.1}
    assert run(words(tmp_path / "run", dropout=0, **flags)) == 0

    ours = minia3.load_model(model(kind))
    tokenizer = minia3.load_tokenizer(model(kind))
    rows = minia3.load_task(flags["task"])
    minia3.freeze(ours)
    vectors = minia3.vectors(ours)
    optimizer = minia3.Adafactor(vectors.values())
    config = train.Config(steps=6, lr=0.1)
    batches = minia3.batches(ours, tokenizer, rows, batch_size=4, steps=6, seed=3)
    for step, batch in enumerate(batches):
        logp_BCL = minia3.choice_logprobs(ours, batch)
        loss = minia3.total_loss(logp_BCL, batch.target_mask_BCL, batch.label_B)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vectors.values(), 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(step, config)
        optimizer.step()
        optimizer.zero_grad()
    assert step == 5
    assert all(vector.grad is None for vector in vectors.values())
    trained = last_vectors(tmp_path / "run")
    assert trained.keys() == vectors.keys()
    for name, vector in vectors.items():
        assert torch.equal(vector, trained[name]), name

    result = minia3.evaluate(ours, tokenizer, rows.test, rows.prompts[0], metric=rows.metric)
    final = running.events(tmp_path / "run", "final")[-1]
    assert result["accuracy"] == final["accuracy"]


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_with_an_adapter_per_example_the_gradients_are_those_of_each_example(kind):
    tokenizer = minia3.load_tokenizer(model(kind))
    rows = minia3.load_task(task((2, 3, 1)))

    def gradients(adapter):
        ours = minia3.load_model(model(kind), n_adapters=4, dtype=torch.float64).double()
        minia3.freeze(ours)
        batch = next(minia3.batches(ours, tokenizer, rows, batch_size=4, steps=1))
        logp_BCL = minia3.choice_logprobs(ours, batch, adapter=torch.tensor(adapter))
        minia3.total_loss(logp_BCL, batch.target_mask_BCL, batch.label_B).backward()
        tables = minia3.vectors(ours).values()
        return torch.cat([table.grad for table in tables], dim=1)

    of_examples = gradients([0, 1, 2, 3])
    torch.testing.assert_close(of_examples.sum(0), gradients([0, 0, 0, 0])[0])
    for row in range(4):
        example_apart = [0] * 4
        example_apart[row] = 1
        torch.testing.assert_close(of_examples[row], gradients(example_apart)[1])
        assert of_examples[row].abs().max() > 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"steps": 0}, "--steps is 0"),
        ({"steps": None}, "--steps is None, expected int"),
        ({"max_length": None}, "--max-length is None, expected int"),
        ({"seed": np.arange(2)}, r"--seed is \[0, 1\], expected int"),
        ({"seed": (0, 1)}, r"seed is \(0, 1\), expected an integer"),
        ({"max_length": 1}, "does not fit into max_length 1"),
    ],
)
def test_a_mistake_is_found_before_the_first_batch(values, message):
    ours = minia3.load_model(model("t5"))
    tokenizer = minia3.load_tokenizer(model("t5"))
    with pytest.raises(ValueError, match=message):
        minia3.batches(ours, tokenizer, minia3.load_task(task()), **values)


def test_numbers_of_numpy_and_torch_draw_what_those_of_python_draw():
    ours = minia3.load_model(model("t5"))
    tokenizer = minia3.load_tokenizer(model("t5"))
    rows = minia3.load_task(task())
    plain = minia3.batches(ours, tokenizer, rows, batch_size=4, steps=3, seed=5)
    numbers = {"batch_size": torch.tensor(4), "steps": np.int64(3), "seed": np.uint8(5)}
    found = minia3.batches(ours, tokenizer, rows, **numbers)
    for batch, same in zip(plain, found, strict=True):
        assert torch.equal(batch.source_BM, same.source_BM)
        assert torch.equal(batch.target_BCL, same.target_BCL)


@pytest.mark.parametrize("is_merged", [False, True])
def test_batches_are_in_the_words_that_the_model_knows_from_its_pre_training(is_merged, tmp_path):
    """The first prompt of the task was evaluated, in whose words nothing was trained."""
    folder = tmp_path / "model"
    shutil.copytree(model("t5"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_name_or_path": "t5-base"}))
    row = {"premise": "w5", "hypothesis": "w7", "label": "entailment"}
    running.write(tmp_path / "rte", train=[row], val=[row])
    rte = minia3.load_task("rte", tmp_path)
    tokenizer = minia3.load_tokenizer(folder)
    ours = minia3.load_model(folder)
    if is_merged:
        ours = minia3.merge(ours)

    (prompt,) = minia3.prompts_for(ours, rte)
    assert prompt.choices == ("entailment", "not_entailment")
    (batch,) = minia3.batches(ours, tokenizer, rte, batch_size=1, steps=1)
    source = tokenizer.encode_prompt(render(prompt, rte.train[0]).input)
    assert batch.source_BM.tolist() == [source]
    for general in (minia3.load_model(model("t5")), torch.nn.Linear(1, 1)):
        assert minia3.prompts_for(general, rte) == tuple(rte.prompts[:5])
