"""Guards what a run says about its own result: there is a warning if there is a reason for one, and
only then."""

import json

import numpy as np
import pytest
import running
import torch
from running import fails, metrics, model, run, task, train, words, write

import minia3
from minia3.inference.metrics import TEXT_METRICS
from minia3.training.assignment import assign_rows
from minia3.training.cell import Cell
from minia3.training.doubts import (
    count_repeated,
    doubts_about_dtypes,
    doubts_about_result,
    doubts_about_shots,
    loss_notes,
    notes_on_texts,
    notes_on_ties,
    rise_of,
)
from minia3.training.losses import UNLIKELY_EPS, unlikelihood_loss

FINAL = {
    "metric": "accuracy",
    "accuracy_before": 0.5,
    "accuracy": 0.7,
    "commonest": 0.6,
    "trainable": 10,
}


def choice_rows(answers, choices=("w3", "w4")):
    """Return rows with these right answers. Every row has another input."""
    rows = []
    for i, answer in enumerate(answers):
        order = list(choices)[:: (-1) ** i]  # the places of the choices alternate
        rows.append({"input": f"w{5 + i} w5", "choices": order, "label": order.index(answer)})
    return rows


def doubts_of(folder, train_rows, test_rows, **flags):
    folder = write(folder, train=train_rows, test=test_rows)
    config = train.Config(task=str(folder), **flags)
    return assign_rows(minia3.load_task(folder), config).doubts


# Rows


def test_rows_that_all_have_the_same_answer_are_doubtful(tmp_path):
    same = choice_rows(["w4"] * 6)
    mixed = choice_rows(["w3", "w4"] * 6)[6:]
    assert doubts_of(tmp_path / "a", same, mixed) == [
        "all 6 rows to train on have the same answer, 'w4'"
    ]
    assert doubts_of(tmp_path / "b", mixed, same) == [
        "all 6 rows to report on have the same answer, 'w4'"
    ]
    assert doubts_of(tmp_path / "c", mixed, choice_rows(["w3", "w4"])) == []
    assert doubts_of(tmp_path / "d", same, mixed, method="none") == []


def test_a_file_with_one_label_trains_with_a_warning_that_says_how_to_name_others(tmp_path, capsys):
    rows = [{"text": f"w{5 + i}", "label": "w4"} for i in range(8)]
    folder = write(tmp_path / "data", train=rows[:5], test=rows[5:])
    assert run(words(tmp_path / "run", task=folder, steps=2)) == 0
    shown = capsys.readouterr().out
    reason = "and there is no other label to pick: name all of them with --labels"
    doubt = f"all 5 rows to train on have the same answer, 'w4', {reason}"
    assert f"warning  {doubt}\n" in shown
    assert f"  warning     {doubt}\n" in shown
    assert running.events(tmp_path / "run", "final")[0]["commonest"] == 1
    flags = words(tmp_path / "ul", task=folder, losses="ul,ln")
    fails(flags, capsys, "there is one label, so only the loss lm can train", "--labels")
    # With the other label named, the others are not the only choice.
    assert run(words(tmp_path / "two", task=folder, steps=2, labels="w4,w5")) == 0
    assert reason not in capsys.readouterr().out


def test_if_the_choices_of_rows_differ_their_places_are_compared(tmp_path):
    rows = [{"input": "w9", "choices": [f"w{i}", "w4"], "label": 0} for i in range(5, 10)]
    (doubt,) = doubts_of(tmp_path / "a", rows, choice_rows(["w3", "w4"]))
    assert doubt == "all 5 rows to train on have the same answer, 0"


def test_a_known_task_is_checked_in_its_words(tmp_path):
    rte = [{"premise": "w5", "hypothesis": f"w{7 + i}", "label": "entailment"} for i in range(4)]
    write(tmp_path / "rte", train=rte, val=[*rte[:1], {**rte[1], "label": "not_entailment"}])
    assignment = assign_rows(minia3.load_task("rte", tmp_path), train.Config(task="rte"))
    first, second = assignment.doubts
    assert first.startswith("all 4 rows to train on have the same answer, '")
    assert second == "1 of 2 rows to report on is also trained on"


def test_rows_to_report_on_that_are_trained_on_are_counted(tmp_path):
    rows = choice_rows(["w3", "w4"] * 4)
    others = [{**row, "input": "w50 w51"} for row in rows[:2]]
    doubts = doubts_of(tmp_path / "a", rows, [*rows[:3], *others])
    assert doubts == ["3 of 5 rows to report on are also trained on"]
    report_rows = [{"idx": 9, "a": 1}, {"a": 1}, {"a": 2}]
    assert count_repeated([{"idx": 3, "a": 1}], report_rows, ["a"]) == 2


def test_rows_that_choose_the_best_vectors_and_are_reported_on_are_counted(tmp_path):
    """A run said of them that they were not reported on."""
    train_rows = choice_rows(["w3", "w4"] * 5)
    others = [{**row, "input": f"w{50 + i}"} for i, row in enumerate(train_rows)]
    evaluated = {"eval_every": 2, "steps": 2}

    def doubts(name, flags, **splits):
        folder = write(tmp_path / name, **splits)
        config = train.Config(task=str(folder), **flags)
        return assign_rows(minia3.load_task(folder), config).doubts

    splits = {"train": train_rows, "validation": others[:6], "test": others[2:]}
    assert doubts("dev", evaluated, **splits) == [
        "4 of 8 rows to report on are also among those that choose the best vectors"
    ]
    # Nothing chooses the vectors, or other rows do.
    assert doubts("last", {}, **splits) == []
    assert doubts("apart", evaluated, **splits | {"test": others[6:]}) == []
    # Here, a fifth of the rows to train on chooses the best vectors.
    both = ["8 of 10 rows to report on are also trained on"]
    both.append("2 of 10 rows to report on are also among those that choose the best vectors")
    assert doubts("train", evaluated, train=train_rows, validation=train_rows) == both


def test_rows_that_differ_in_columns_that_no_model_reads_are_the_same(tmp_path):
    """Exports have ids. A file may also have 1 for the label that another one calls "1.0"."""
    labels = [0, 1, 0, 1]
    rows = [{"text": f"w{5 + i}", "label": label} for i, label in enumerate(labels)]
    again = [{**row, "label": f"{row['label']}.0", "ID": f"w{9 + i}"} for i, row in enumerate(rows)]
    other = {"text": "w5", "label": 1}
    assert doubts_of(tmp_path / "a", rows, [*again[:2], other]) == [
        "2 of 3 rows to report on are also trained on"
    ]
    task_file = {"label_field": "gold", "prompts": [{"text": "{text}"}]}
    folder = write(tmp_path / "b", train=rows, test=again[:3])
    for path in folder.glob("*.jsonl"):
        path.write_text(path.read_text().replace('"label"', '"gold"'))
    (folder / "task.json").write_text(json.dumps(task_file))
    doubts = assign_rows(minia3.load_task(folder), train.Config(task=str(folder))).doubts
    assert doubts == ["3 of 3 rows to report on are also trained on"]


def test_conversations_that_are_trained_on_are_counted(tmp_path):
    def chat(answer, **more):
        messages = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": answer}]
        return {"messages": messages, **more}

    test_rows = [chat("w6", id="a"), chat("w8", id="b")]
    assert doubts_of(tmp_path / "a", [chat("w6"), chat("w7")], test_rows) == [
        "1 of 2 rows to report on is also trained on"
    ]


def test_shots_that_are_reported_on_are_counted(tmp_path):
    """The model saw their answers in its source, and the run said nothing."""
    rows = choice_rows(["w3", "w4"] * 2)
    in_context = {"method": "icl", "shots": 2}
    others = [{**row, "input": "w50 w51"} for row in rows[:2]]
    assert doubts_of(tmp_path / "a", rows, [*rows, *others], **in_context) == [
        "4 of 6 rows to report on are also among the shots"
    ]
    assert doubts_of(tmp_path / "b", rows, [rows[0], *others], **in_context) == [
        "1 of 3 rows to report on is also among the shots"
    ]
    assert doubts_of(tmp_path / "c", rows, others, **in_context) == []
    # Without shots, the model sees none of these answers.
    assert doubts_of(tmp_path / "d", rows, rows, method="none") == []


def test_targets_that_are_all_the_same_are_doubtful(tmp_path):
    """The run ended with an exact match of 100%, whatever the model had read."""
    same = [{"input": f"w{i}", "target": "w4"} for i in range(5, 12)]
    mixed = [{**row, "target": f"w{4 + i}"} for i, row in enumerate(same)]
    assert doubts_of(tmp_path / "a", same[:4], same[4:]) == [
        "all 4 rows to train on have the same answer, 'w4'",
        "all 3 rows to report on have the same answer, 'w4'",
    ]
    assert doubts_of(tmp_path / "b", mixed[:4], same[4:]) == [
        "all 3 rows to report on have the same answer, 'w4'"
    ]
    assert doubts_of(tmp_path / "c", same[:4], mixed[4:], method="none") == []
    assert doubts_of(tmp_path / "d", mixed[:1], mixed[1:2]) == []


# The loss


def test_a_loss_that_is_a_sum_is_called_a_sum_and_its_lowest_value_is_true():
    data = minia3.load_task(task())
    (note,) = loss_notes(assign_rows(data, train.Config()), train.Config())
    assert note.startswith("the loss is the sum of lm, ul and ln (--losses); ul, and so the sum, ")
    lowest = float(note.rpartition("at least ")[2].rstrip(")"))
    assert lowest == pytest.approx(-np.log(1 + UNLIKELY_EPS), abs=1e-4)
    logp = torch.tensor([[[0.0], [-1e9]]])  # the model is certain of the right choice
    found = unlikelihood_loss(logp, torch.ones(1, 2, 1, dtype=torch.bool), torch.tensor([0]))
    assert float(found) == pytest.approx(lowest, abs=1e-4)


@pytest.mark.parametrize(("losses", "n_choices"), [("lm", (2,)), ("lm,ul,ln", (0,))])
def test_a_single_loss_is_not_called_a_sum(losses, n_choices):
    config = train.Config(losses=losses)
    assert loss_notes(assign_rows(minia3.load_task(task(n_choices)), config), config) == []


@pytest.mark.parametrize(
    "losses",
    [
        np.linspace(1, 2, 30).tolist(),
        [1.0, 1.1, 0.9, 1.0, 1.0, 1.1, 1.4, 1.5, 1.6],
        [0.5, 0.5, 30.0],  # it blew up
        [0.001, 0.9],
        [4.0, *[1.0] * 29, *[2.0] * 30],  # the first line is the highest one
        [1.0] * 20 + [2.0] * 20 + [0.9],  # the last line is the lowest one
    ],
)
def test_a_loss_that_rose_is_noticed(losses):
    lower, higher = rise_of(losses)
    assert lower < higher


@pytest.mark.parametrize(
    "losses",
    [
        [],
        [3.0],
        [1.0, 1.3],  # too few lines to say
        [1e-6, 3e-6],  # both are as good as 0
        np.linspace(1e-6, 9e-4, 30).tolist(),
        np.linspace(2, 1, 30).tolist(),
        [1.0, 9.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0],  # one bad batch
    ],
)
def test_a_loss_that_did_not_rise_is_not_blamed(losses):
    assert rise_of(losses) is None


def test_noise_is_not_taken_for_a_rise():
    rng = np.random.default_rng(0)
    rises = [rise_of(rng.uniform(1, 1.9, 30).tolist()) for _ in range(200)]
    n_blamed = sum(rise is not None for rise in rises)
    assert n_blamed <= 2


# The result


def test_a_good_result_has_no_doubts():
    assert doubts_about_result(FINAL, [2.0, 1.0]) == []
    assert doubts_about_result({**FINAL, "accuracy": None, "accuracy_before": None}, []) == []


def test_a_result_below_the_commonest_label_or_below_the_start_is_doubtful():
    (doubt,) = doubts_about_result({**FINAL, "accuracy": 0.55}, [])
    assert (
        doubt == "the accuracy (55.0%) is below that of always giving the commonest label (60.0%)"
    )
    (doubt,) = doubts_about_result({**FINAL, "accuracy": 0.5999}, [])
    assert "(59.99%)" in doubt, "because 60.0% is not below 60.0%"
    assert doubt.endswith("(60.00%)")
    text = {**FINAL, "metric": "bleu", "accuracy": 0.4}
    del text["commonest"]
    assert doubts_about_result(text, []) == ["the result is worse than before training"]
    untrained = {**FINAL, "trainable": 0, "accuracy": 0.6, "accuracy_before": 0.7}
    assert doubts_about_result(untrained, []) == []


def test_what_an_evaluation_noticed_about_texts_is_said_in_words():
    result = {"n": 9, "n_lossy": 2, "n_too_long": 3, "n_ends_cut": 1, "n_equal": 4}
    result |= {"n_wordless": 5, "n_single": 6}
    lossy, too_long, wordless, ends_cut, equal, single = notes_on_texts("exact_match", result, 64)
    assert lossy.startswith("2 of 9 targets have characters that the tokenizer cannot write")
    assert too_long.startswith("3 of 9 targets have more than 64 tokens (--max-new-tokens)")
    assert wordless.startswith("5 of 9 targets have no letter from a to z and no digit")
    assert ends_cut.startswith("1 of 9 targets has more tokens than --max-target-length")
    assert equal.startswith("4 of 9 rows have two choices that are the same text to the tokenizer")
    assert single == "6 of 9 rows have a single choice, which is always right"
    assert notes_on_texts("exact_match", {"n": 9, "n_lossy": 0, "n_too_long": 0}, 64) == []


def test_ties_between_choices_are_said_in_words_and_a_wider_dtype_is_named_if_there_is_one():
    text = "14 of 277 rows have two best choices with equal scores, and the first counts"
    result = {"n": 277, "n_tied": 14}
    assert notes_on_ties(result, "bfloat16") == [f"{text}: --dtype float32 tells them apart"]
    assert notes_on_ties(result, "float32") == [text]
    assert notes_on_ties({"n": 277, "n_tied": 0}, "bfloat16") == notes_on_ties({"n": 1}, "") == []


@pytest.mark.parametrize("metric", sorted(TEXT_METRICS))
def test_what_a_target_that_is_too_long_does_to_each_metric_is_said(metric):
    """A text of 200 tokens that was perfect had a BLEU of 0.12, and nothing was said."""
    (note,) = notes_on_texts(metric, {"n": 9, "n_too_long": 1}, 64)
    subject = "1 of 9 targets has more than 64 tokens (--max-new-tokens)"
    effect = ": the texts that are compared with them end there"
    if metric == "exact_match":
        effect = ", which cannot be matched"
    assert note == subject + effect


# In a run


def test_a_run_says_its_doubts_at_its_beginning_and_end_and_in_its_last_line(tmp_path, capsys):
    folder = write(tmp_path / "data", train=choice_rows(["w4"] * 6), test=choice_rows(["w4"] * 3))
    out = tmp_path / "run"
    assert run(words(out, task=folder, lr=0.3)) == 0
    shown = capsys.readouterr().out
    begin, _, end = shown.partition("before   ")
    expected = [
        "all 6 rows to train on have the same answer, 'w4'",
        "all 3 rows to report on have the same answer, 'w4'",
        "3 of 3 rows to report on are also trained on",
    ]
    for text in expected:
        assert f"\nwarning  {text}\n" in begin
        assert f"\n  warning     {text}\n" in end
        assert f"**Warning:** {text}." in (out / "adapter" / "README.md").read_text()
    final = metrics(out)[-1]
    assert final["warnings"][:3] == expected
    assert (final["commonest"], final["answer"]) == (1.0, "choices")
    assert " after (commonest label: 100.0%)\n" in shown
    assert "note     the loss is the sum of lm, ul and ln" in begin


def test_a_loss_that_rises_in_a_run_is_a_warning(tmp_path, capsys, monkeypatch):
    def uphill(step, config):
        return -0.03

    monkeypatch.setattr(train, "learning_rate", uphill)
    assert run(words(tmp_path / "run", steps=80, dropout=0)) == 0
    losses = [line["loss"] for line in metrics(tmp_path / "run") if line["event"] == "train"]
    lower, higher = np.median(losses[:3]), np.median(losses[-3:])
    expected = f"the training loss rose, from {lower:.3f} to {higher:.3f}: try a lower --lr"
    assert higher > lower
    assert f"  warning     {expected}\n" in capsys.readouterr().out


def test_a_resumed_run_remembers_the_losses_before_it_was_stopped(tmp_path):
    config = train.Config(task=str(task()))
    cell = Cell(config, minia3.load_task(task()))
    cell.progress.losses += [1.0, 5.0]
    again = Cell(config, minia3.load_task(task()))
    again.load_state_dict(json.loads(json.dumps(cell.state_dict())))
    assert again.progress.losses == [1.0, 5.0]


def test_targets_that_the_tokenizer_cannot_write_are_counted_in_the_run(tmp_path, capsys):
    rows = [{"input": f"w{5 + i}", "target": "w3\nw4" if i % 2 else "w3 w4"} for i in range(8)]
    folder = write(tmp_path / "data", train=rows[:4], test=rows[4:])
    out = tmp_path / "run"
    assert run(words(out, task=folder, steps=1, max_new_tokens=1)) == 0
    shown = capsys.readouterr().out
    assert "note     2 of 4 targets have characters that the tokenizer cannot write" in shown
    assert "note     4 of 4 targets have more than 1 tokens (--max-new-tokens)" in shown
    assert metrics(out)[-1]["n_lossy"] == 2


def test_a_run_says_how_many_rows_have_two_choices_that_are_one_text(tmp_path, capsys):
    rows = []
    for i in range(8):
        choices = ["w4\nw5", "w4 w5" if i % 4 == 0 else "w4 w6"]
        rows.append({"input": f"w{5 + i}", "choices": choices, "label": i % 2})
    folder = write(tmp_path / "data", train=rows[:5], test=rows[5:])
    assert run(words(tmp_path / "run", task=folder, steps=3)) == 0
    shown = capsys.readouterr().out
    assert "note     2 of 5 training examples have two choices that are the same text to" in shown
    assert "one text" not in shown.partition("training examples")[2].partition("\n")[2]
    assert run(words(tmp_path / "all", task=write(tmp_path / "b", train=rows, test=rows))) == 0
    equal = "note     2 of 8 rows have two choices that are the same text to the tokenizer"
    assert equal in capsys.readouterr().out


def test_a_run_says_how_many_rows_have_ties_or_a_single_choice(tmp_path, capsys, monkeypatch):
    rows = choice_rows(["w3", "w4"] * 5)
    for row in rows[7:9]:
        row |= {"choices": ["w4"], "label": 0}
    folder = write(tmp_path / "data", train=rows[:5], test=rows[5:])
    scores_NC = torch.zeros(5, 2)
    scores_NC[2:4, 1] = -torch.inf  # the rows with a single choice
    scores_NC[4, 0] = 1
    monkeypatch.setattr("minia3.inference.evaluation.score_examples", lambda *_, **__: scores_NC)
    assert run(words(tmp_path / "run", task=folder, steps=1, dtype="bfloat16")) == 0
    begin, _, end = capsys.readouterr().out.partition("\nafter ")
    ties = "note     2 of 5 rows have two best choices with equal scores, and the first counts: "
    assert ties in begin
    assert ties in end
    assert "note     2 of 5 rows have a single choice, which is always right\n" in begin
    final = metrics(tmp_path / "run")[-1]
    assert (final["n_tied"], final["n_single"]) == (2, 2)


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_targets_are_measured_by_their_perplexity_if_the_metric_says_so(name, tmp_path, capsys):
    out = tmp_path / "run"
    flags = {"model": model(name), "task": task((0,)), "metric": "inverse_perplexity"}
    flags |= {"eval_every": 6, "steps": 12}
    assert run(words(out, lr=0.1, **flags)) == 0
    final = metrics(out)[-1]
    assert final["perplexity"] == pytest.approx(1 / final["accuracy"])
    assert final["perplexity_before"] == pytest.approx(1 / final["accuracy_before"])
    assert final["perplexity"] < final["perplexity_before"]
    shown = capsys.readouterr().out
    figures = f"{final['perplexity_before']:,.2f} before, {final['perplexity']:,.2f} after"
    assert f"\n  perplexity  {figures}\n" in shown
    assert f"before   perplexity {final['perplexity_before']:,.2f}\n" in shown


# Targets that are long


def long_targets(folder, n_words):
    rows = [{"input": f"w{5 + i}", "target": "w3 w4"} for i in range(8)]
    rows[2]["target"] = " ".join(["w4"] * n_words)
    return write(folder, train=rows[:5], test=rows[5:])


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_long_targets_are_cut_and_counted(name, tmp_path, capsys):
    folder = long_targets(tmp_path / "data", 50_000)
    flags = {"model": model(name), "task": folder, "batch_size": 5, "max_new_tokens": 3}
    assert run(words(tmp_path / "run", steps=1, **flags)) == 0
    expected = "note     1 of 5 training targets is cut to 512 tokens (--max-target-length)\n"
    assert expected in capsys.readouterr().out
    flags["max_target_length"] = 2
    assert run(words(tmp_path / "short", steps=1, **flags)) == 0
    shown = capsys.readouterr().out
    # With the end token, every target has three tokens.
    assert "note     5 of 5 training targets are cut to 2 tokens" in shown


def test_a_run_says_how_many_targets_are_cut_before_their_perplexity_is_measured(tmp_path, capsys):
    rows = [{"input": f"w{5 + i}", "target": "w3 w4"} for i in range(8)]
    rows[6]["target"] = "w3 w4 w5 w6 w7"
    folder = write(tmp_path / "data", train=rows[:5], test=rows[5:])
    flags = {"task": folder, "steps": 1, "max_target_length": 4, "metric": "inverse_perplexity"}
    assert run(words(tmp_path / "run", **flags)) == 0
    expected = (
        "note     1 of 3 targets has more tokens than --max-target-length: the perplexity is that "
        "of the beginning\n"
    )
    assert expected in capsys.readouterr().out
    assert metrics(tmp_path / "run")[-1]["n_ends_cut"] == 1


def test_a_target_of_50_000_words_is_one_line_that_names_the_row_and_the_flag(tmp_path, capsys):
    folder = long_targets(tmp_path / "data", 50_000)
    flags = {"task": folder, "batch_size": 5, "max_target_length": 10**6}
    running.fails(
        words(tmp_path / "run", **flags),
        capsys,
        "row 2: attention from 50,001 to 50,001 tokens needs a bias of 10,000,400,004 numbers",
        "--max-target-length",
    )


@pytest.mark.parametrize("others", [["w3"], []], ids=["one of two", "the only one"])
def test_a_choice_of_50_000_words_is_one_line_that_names_the_row_and_the_flag(
    others, tmp_path, capsys
):
    rows = choice_rows(["w3", "w4"] * 5)
    rows[1] |= {"choices": [*others, " ".join(["w4"] * 50_000)], "label": 0}
    folder = write(tmp_path / "data", train=rows[:6], test=rows[6:])
    running.fails(
        words(tmp_path / "run", task=folder, batch_size=6),
        capsys,
        "row 1: a choice has 50,001 tokens, expected at most 512",
        "--max-target-length",
    )


# NaN


@pytest.fixture
def damaged(tmp_path):
    """The random LLaMA with NaN in its last norm, so that every score is NaN."""
    ours = minia3.load_model(model("llama"))
    ours.norm.weight.data[3] = float("nan")
    minia3.save_model(ours, tmp_path / "damaged", minia3.load_tokenizer(model("llama")))
    return tmp_path / "damaged"


def test_weights_with_nan_are_an_error_that_names_the_row(damaged, tmp_path, capsys):
    parts = ("row 0: the model's scores are not finite", "--check-weights")
    running.fails(words(tmp_path / "run", model=damaged), capsys, *parts)


def test_weights_with_nan_are_found_by_a_flag(damaged, tmp_path, capsys):
    part = "model.norm.weight has 1 of 24 numbers that are NaN or infinite"
    running.fails(words(None, "--check-weights", model=damaged), capsys, part)
    assert run(words(tmp_path / "sound", "--check-weights", model=model("llama"), steps=1)) == 0


def test_without_rows_to_report_on_the_first_step_says_that_the_weights_are_to_blame(
    damaged, tmp_path, capsys, monkeypatch
):
    def nothing_to_report(assigned_task, config):
        return True

    monkeypatch.setattr("minia3.training.assignment.is_without_results", nothing_to_report)
    running.fails(
        words(tmp_path / "run", model=damaged),
        capsys,
        "the loss of step 1 is nan, before anything was trained",
        "--check-weights",
        code=1,
    )


def test_a_base_of_several_dtypes_is_doubtful_and_a_base_of_one_is_not():
    assert doubts_about_dtypes(["float32"]) == []
    (doubt,) = doubts_about_dtypes(["float32", "bfloat16"])
    assert doubt.startswith("the weights were float32 then bfloat16, because there was no --dtype")


def test_shots_that_do_not_fit_are_counted_and_shots_that_fit_are_not():
    doubt = "on average 4.6 of 32 shots fit into 512 tokens (--max-length)"
    assert doubts_about_shots({"n_shots": 4.61, "n_shots_given": 32}, 512) == [doubt]
    (nearly,) = doubts_about_shots({"n_shots": 31.98, "n_shots_given": 32}, 512)
    assert nearly.startswith("on average 31.9 of 32 shots fit")
    assert doubts_about_shots({"n_shots": 32.0, "n_shots_given": 32}, 512) == []
    assert doubts_about_shots({}, 512) == []
