"""Results: what a run reports equals an evaluation of the saved adapter."""

from unittest import mock

import numpy as np
import pytest
import running
import torch
from running import metrics, model, outcome, run, task, train, words, write
from written_out import KINDS, adapter, read, rte_flags, used

import minia3
from minia3.inference.decoding import generate
from minia3.inference.evaluation import choice_auc, evaluate
from minia3.inference.scoring import NotFiniteError
from minia3.tasks.prompts import OWN_PROMPTS, for_family
from minia3.training.group import Group
from minia3.training.report import report


def test_the_last_line_is_the_result(tmp_path):
    assert run(words(tmp_path / "run", steps=3)) == 0
    before, *_, final = metrics(tmp_path / "run")
    model = minia3.load_model(running.model("t5"))
    trainable = sum(vector.numel() for vector in minia3.vectors(model).values())
    assert final["event"] == "final"
    assert final["accuracy_before"] == before["accuracy"]
    assert (final["metric"], final["split"], final["rows"], final["steps"]) == (
        "accuracy",
        "test",
        12,
        3,
    )
    assert (final["trainable"], final["total"]) == (
        trainable,
        sum(p.numel() for p in model.parameters()) - trainable,
    )
    assert final["dtype"] == "float32"
    assert 0 <= final["accuracy"] <= 1
    assert final["peak_memory_bytes"] > 10**7


def test_evaluation_follows_the_flags(tmp_path, monkeypatch):
    seen = []
    original = evaluate
    monkeypatch.setattr(
        "minia3.training.group.evaluate", lambda *a, **o: seen.append(o) or original(*a, **o)
    )
    flags = {"eval_batch_size": 5, "max_new_tokens": 3, "max_length": 9}
    assert run(words(tmp_path / "run", steps=1, **flags)) == 0
    assert len(seen) == 2
    assert all((o["batch_size"], o["max_new_tokens"], o["max_length"]) == (5, 3, 9) for o in seen)


def test_inputs_that_are_cut_are_counted_in_training_and_in_evaluation(tmp_path, capsys):
    splits = {split: read(task() / f"{split}.jsonl") for split in ("train", "validation", "test")}
    n = {
        split: sum(len(row["input"].split()) + 1 > 6 for row in part)
        for split, part in splits.items()
    }
    assert run(words(tmp_path / "run", max_length=6, batch_size=20, steps=1)) == 0
    out = capsys.readouterr().out
    assert f"{n['train']} of 20 training inputs are cut to 6 tokens (--max-length)" in out
    assert f"12 rows of test, {n['test']} of them cut to 6 tokens" in out
    assert metrics(tmp_path / "run")[-1]["rows_cut"] == n["test"] > 0
    assert run(words(tmp_path / "long", steps=1)) == 0
    assert " cut to " not in capsys.readouterr().out


def task_of(kind, folder, **flags):
    """Return the folder of a task of a kind. Some of its targets are what such a run writes.

    With random words for targets, each result would be 0, whatever adapter it is of.
    """
    random_task = task(KINDS[kind])
    if kind != "targets":
        return random_task
    texts = []  # of the last evaluation, which is that of the trained adapter

    def note_texts(*args, **options):
        texts[:] = generate(*args, **options)
        return list(texts)

    with mock.patch("minia3.inference.evaluation.generate", note_texts):
        assert run(words(folder / "writes", task=random_task, **flags)) == 0
    rows = {split: read(random_task / f"{split}.jsonl") for split in ("train", "test")}
    for row, text in list(zip(rows["test"], texts, strict=True))[::2]:
        row["target"] = text or row["target"]  # a target may not be empty
    return write(folder / "written", **rows)


@pytest.mark.parametrize("name", ["t5", "llama"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_scores_what_its_run_reported_and_a_run_can_start_from_it(
    name, kind, tmp_path, capsys
):
    flags = {"model": model(name), "lr": 0.3, "max_new_tokens": 3}
    flags["task"] = task_of(kind, tmp_path, **flags)
    assert run(words(tmp_path / "run", **flags)) == 0
    final = metrics(tmp_path / "run")[-1]
    assert final["metric"] == ("exact_match" if kind == "targets" else "accuracy")
    assert final["accuracy"] > 0
    assert max((v - 1).abs().max() for v in adapter(tmp_path / "run").values()) > 0.1
    capsys.readouterr()
    adapter_flag = {"adapter": tmp_path / "run" / "adapter"}
    assert run(words(None, "--eval-only", **flags, **adapter_flag)) == 0
    assert f"  {final['metric']:<12}{final['accuracy']:.1%}" in capsys.readouterr().out
    assert run(words(tmp_path / "scored", "--eval-only", **flags, **adapter_flag)) == 0
    scored = metrics(tmp_path / "scored")[-1]
    assert (scored["accuracy"], scored["auc"], scored["trainable"]) == (
        final["accuracy"],
        final["auc"],
        0,
    )
    assert not (tmp_path / "scored" / "adapter").exists()
    assert run(words(tmp_path / "on", steps=1, **flags, **adapter_flag)) == 0
    on = metrics(tmp_path / "on")[-1]
    assert (on["accuracy_before"], on["steps"]) == (final["accuracy"], 1)


def test_a_run_whose_steps_change_nothing_saves_the_adapter_that_it_started_from(tmp_path):
    assert run(words(tmp_path / "run", lr=0.1)) == 0
    assert (
        run(words(tmp_path / "on", steps=1, warmup_ratio=0.6, adapter=tmp_path / "run" / "adapter"))
        == 0
    )
    assert outcome(tmp_path / "on")[0] == outcome(tmp_path / "run")[0]


def test_what_peft_reads_is_what_was_trained(tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    assert run(words(tmp_path / "run", lr=0.3)) == 0
    base = transformers.AutoModelForSeq2SeqLM.from_pretrained(model("t5"))
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    ours = minia3.load_model(model("t5"))
    minia3.load_adapter(ours, tmp_path / "run" / "adapter")
    source = torch.tensor([[5, 9, 30, 1]])
    target = torch.tensor([[0, 7, 8]])
    with torch.no_grad():
        expected = theirs(input_ids=source, decoder_input_ids=target).logits
        found = ours.step(target, ours.start(source))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_the_printed_command_answers_new_rows_as_the_run_did(kind, tmp_path, capsys):
    out = tmp_path / "a run"
    flags = {"max_length": 5, "max_new_tokens": 3, "dtype": "float64", "lr": 0.3}
    made = task_of(kind, tmp_path, **flags)
    capsys.readouterr()
    assert run(words(out, task=made, **flags)) == 0
    shown = capsys.readouterr().out
    for word in ("--max-length 5", "--max-new-tokens 3", "--dtype float64"):
        assert word in shown
    found = used(shown, read(made / "test.jsonl"), capsys)
    assert found == pytest.approx(metrics(out)[-1]["accuracy"])
    assert found > 0


def test_method_none_evaluates_the_base_and_trains_nothing(tmp_path, capsys):
    assert run(words(tmp_path / "none", method="none")) == 0
    assert [line["event"] for line in metrics(tmp_path / "none")] == ["before", "final"]
    final = metrics(tmp_path / "none")[-1]
    assert final["accuracy"] == final["accuracy_before"]
    assert (final["trainable"], final["steps"], final["method"]) == (0, 0, "none")
    assert not (tmp_path / "none" / "adapter").exists()
    assert "after" not in capsys.readouterr().out


def test_eval_only_writes_nothing_without_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(words(None, "--eval-only")) == 0
    assert list(tmp_path.iterdir()) == []


def test_the_result_over_several_prompts_is_the_median(tmp_path):
    each = []
    for prompt in ("0", "2", "3"):
        assert (
            run(words(tmp_path / prompt, eval_prompt=prompt, method="none", **rte_flags(tmp_path)))
            == 0
        )
        each.append(metrics(tmp_path / prompt)[-1]["accuracy"])
    assert (
        run(words(tmp_path / "run", eval_prompt="0,2,3", method="none", **rte_flags(tmp_path))) == 0
    )
    final = metrics(tmp_path / "run")[-1]
    assert (final["accuracies"], final["accuracy"]) == (each, float(np.median(each)))
    assert run(words(tmp_path / "all", eval_prompt="all", **rte_flags(tmp_path))) == 0
    final = metrics(tmp_path / "all")[-1]
    prompts = for_family(minia3.load_task("rte", tmp_path / "data").prompts, None)
    assert len(final["accuracies"]) == len(final["accuracies_before"]) == len(prompts) > 3
    assert [final["accuracies_before"][i] for i in (0, 2, 3)] == each


def test_the_base_is_evaluated_once_for_each_set_of_rows(tmp_path, monkeypatch):
    measured = []
    original = evaluate
    monkeypatch.setattr(
        "minia3.training.group.evaluate",
        lambda *a, **o: measured.append(o["adapter"]) or original(*a, **o),
    )
    assert (
        run(
            words(tmp_path / "run", task=f"{task()},{task((2, 3, 1))}", seed="0,1,2", method="none")
        )
        == 0
    )
    assert measured == [0, 3]
    finals = [line for line in metrics(tmp_path / "run") if line["event"] == "final"]
    assert len(finals) == 6
    assert len({(line["task"], line["accuracy"]) for line in finals}) == 2


def test_seeds_that_report_on_other_rows_have_their_own_evaluation(tmp_path, monkeypatch):
    def load_task(name, data_dir, shots, seed, **flags):
        made = minia3.load_task(name, data_dir, shots, seed)
        return made._replace(test=made.test[seed::2])

    measured = []
    original = evaluate
    monkeypatch.setattr("minia3.training.grid.load_task", load_task)
    monkeypatch.setattr(
        "minia3.training.group.evaluate",
        lambda *a, **o: measured.append(o["adapter"]) or original(*a, **o),
    )
    assert run(words(tmp_path / "run", seed="0,1", method="none")) == 0
    assert measured == [0, 1]


# In-context learning


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_in_context_learning_puts_the_shots_of_each_seed_before_each_row(name, tmp_path):
    out = tmp_path / "run"
    assert run(words(out, model=model(name), method="icl", shots=3, seed="0,1")) == 0
    finals = [line for line in metrics(out) if line["event"] == "final"]
    ours = minia3.load_model(model(name))
    tokenizer = minia3.load_tokenizer(model(name))

    def expected(head, rows):
        """Return the accuracy and the AUC if all inputs begin with `head`."""
        inputs = [head + row["input"] for row in rows]
        scores = minia3.rank(ours, tokenizer, inputs, [row["choices"] for row in rows]).numpy()
        labels = np.array([row["label"] for row in rows])
        auc = choice_auc(scores, labels)
        return pytest.approx([np.mean(scores.argmax(1) == labels), auc])

    for seed, final in enumerate(finals):
        data = minia3.load_task(task(), shots=3, seed=seed)
        order = np.random.RandomState([seed, 4]).permutation(3)
        shots = [data.train[i] for i in order]
        head = "".join(f"{row['input']} {row['choices'][row['label']]}\n\n" for row in shots)
        assert [final["accuracy_before"], final["auc_before"]] == expected("", data.test)
        assert [final["accuracy"], final["auc"]] == expected(head, data.test)
        assert (final["n_shots"], final["trainable"], final["steps"], final["method"]) == (
            3,
            0,
            0,
            "icl",
        )
    assert not (out / "adapters").exists()


def test_scores_that_are_infinite_with_shots_are_not_blamed_on_training(
    tmp_path, monkeypatch, capsys
):
    evaluate_prompt = Group.evaluate_prompt

    def evaluate(self, cell, assignment, rows, prompt, shots):
        if shots:
            raise NotFiniteError("row 3", 3)
        return evaluate_prompt(self, cell, assignment, rows, prompt, shots)

    monkeypatch.setattr(Group, "evaluate_prompt", evaluate)
    assert run(words(tmp_path / "run", method="icl", shots=3)) == 1
    message = "with shots, the scores of row 3 are not finite: try --dtype float32\n"
    assert message in capsys.readouterr().err


def test_the_report_says_how_many_shots_fit(tmp_path, capsys):
    assert run(words(tmp_path / "run", method="icl", shots=3)) == 0
    final = metrics(tmp_path / "run")[-1]
    shown = capsys.readouterr().out
    assert (
        f"accuracy    {final['accuracy_before']:.1%} before, {final['accuracy']:.1%} after" in shown
    )
    assert "shots       3.0 before each input, on average" in shown
    assert "3 rows to put before each input, " in shown
    assert final["n_shots_given"] == 3
    assert "shots fit into" not in shown
    finals = [final | {"adapter": f"s{i}", "n_shots": n} for i, n in enumerate((3.0, 1.0, 2.5))]
    report(train.Config(method="icl", shots=3, seed=(0, 1, 2)), tmp_path / "run", finals)
    assert "shots       1.0 to 3.0 before each input, on average" in capsys.readouterr().out


def test_a_warning_says_if_not_all_shots_fit(tmp_path, capsys):
    """The result of a few shots was that of `shots 9`, also in the table."""
    assert run(words(tmp_path / "run", method="icl", shots=9, max_length=40)) == 0
    final = metrics(tmp_path / "run")[-1]
    assert 0 < final["n_shots"] < final["n_shots_given"] == 9
    doubt = "of 9 shots fit into 40 tokens (--max-length)"
    assert doubt in capsys.readouterr().out
    assert any(doubt in text for text in final["warnings"])


def test_a_written_answer_ends_where_the_shots_answers_end(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "minia3.inference.evaluation.generate",
        lambda *args, stop, **options: seen.append(stop) or ["w4"],
    )
    ours = minia3.load_model(model("llama"))
    tokenizer = minia3.load_tokenizer(model("llama"))
    row = {"input": "w5", "target": "w4", "label": 0, "idx": 0}
    for shots in ((), [row]):
        evaluate(ours, tokenizer, [row], OWN_PROMPTS[0], metric="exact_match", shots=shots)
    assert seen == [(), ("\n\n",)]


# The console


def test_a_run_begins_with_the_device_the_model_and_the_task(tmp_path, capsys):
    assert run(words(tmp_path / "run", steps=1)) == 0
    device, name, of_task, *_ = capsys.readouterr().out.splitlines()
    assert device == "device   cpu (as asked), float32"
    assert name == f"model    {model('t5')}: 23,512 parameters, 448 trained ({448 / 23512:.3%})"
    assert of_task == "task     task-2: 20 rows to train on, 12 rows of test to report on"


def test_a_run_ends_with_one_short_table(tmp_path, capsys):
    assert run(words(tmp_path / "run")) == 0
    final = metrics(tmp_path / "run")[-1]
    head, *table = capsys.readouterr().out.split("\n\n")[-1].splitlines()
    assert head == "task-2: 12 rows of test"
    cells = {line[2:14].strip(): line[14:] for line in table}
    figures = f"{final['accuracy_before']:.1%} before, {final['accuracy']:.1%} after"
    labels = [row["label"] for row in read(task() / "test.jsonl")]
    share = max(labels.count(0), labels.count(1)) / len(labels)
    assert cells["accuracy"] == f"{figures} (commonest label: {share:.1%})"
    assert final["commonest"] == share
    assert cells["AUC"] == f"{final['auc_before']:.2f} before, {final['auc']:.2f} after"
    assert cells["trained"] == f"448 of 23,512 parameters ({448 / 23512:.3%})"
    assert cells["adapter"] == str(tmp_path / "run" / "adapter")
    assert cells["time"].endswith(" s for 6 steps")
    assert cells["peak memory"].endswith(" MB")
    assert cells["use it"].startswith("minia3 predict ")
