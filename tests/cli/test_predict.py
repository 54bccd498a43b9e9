"""From a file as it lies around to labels of new rows: nothing that was said is said again."""

import csv
import json
import os
import shutil

import pytest
from command_line import CUT, answered, failure, output
from running import events, fails, metrics, model, resume, run, task, without_weights, words

import minia3
from minia3.cli.main import main

LABELS = ["w3", "w4", "w5"]  # words that the tokenizer of these tests knows


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return path


@pytest.fixture
def labeled(tmp_path):
    """A csv file whose texts are words, and whose labels are words."""
    rows = [{"text": f"w{10 + i} w{20 + i}", "label": LABELS[i % 3]} for i in range(30)]
    return write_csv(tmp_path / "moods.csv", rows)


def new_rows(tmp_path, *texts, column="text"):
    return write_csv(tmp_path / "new.csv", [{column: text} for text in texts])


def predicted(capsys, *flags, base=None):
    """Return the results of `predict`."""
    base = base or model("t5")
    lines = answered(capsys, "predict", base, *flags, "--device", "cpu").splitlines()
    return [json.loads(line) for line in lines]


def expected_choice(folder, text, choices):
    """Return what `rank` picks for a text with the adapter in a folder."""
    ours = minia3.load_model(model("t5"))
    minia3.load_adapter(ours, folder)
    scores = minia3.rank(ours, minia3.load_tokenizer(model("t5")), [text], choices)
    return choices[scores[0].argmax()]


def test_results_do_not_go_into_the_file_of_the_rows(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"input": "w3 w4"}\n' * 3)
    (tmp_path / "link.jsonl").symlink_to(rows)
    for out in (rows, tmp_path / "link.jsonl"):
        error = failure(capsys, "predict", model("t5"), rows, "--out", out)
        assert f"--out is {out}, the file of the rows" in error
    assert rows.read_text() == '{"input": "w3 w4"}\n' * 3


def test_results_are_not_written_as_json_into_a_file_of_another_format(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"input": "w3 w4"}\n')
    for name in ("out.tsv", "out.csv.gz", "out.Parquet", "out.json", "out.txt"):
        error = failure(capsys, "predict", model("t5"), rows, "--out", tmp_path / name)
        assert f"{name}, expected a name that ends in .jsonl or .csv" in error
        assert not (tmp_path / name).exists()
    out = tmp_path / "out.CSV"
    answered(capsys, "predict", model("t5"), rows, "--out", out, "--columns", "input")
    assert out.read_text() == "input\nw3 w4\n"
    out = tmp_path / "out-v1.2"
    answered(capsys, "predict", model("t5"), rows, "--out", out)
    assert json.loads(out.read_text())["idx"] == 0


def evaluated(out, folder, capsys, **flags):
    """Return the final line of an evaluation of the adapter of `folder`, and what it says."""
    capsys.readouterr()
    adapter = folder / "adapter"
    assert run(words(out, "--eval-only", steps=None, adapter=adapter, **flags)) == 0
    return metrics(out)[-1], capsys.readouterr().out


def test_an_evaluation_uses_the_words_that_the_adapter_has_learned(labeled, tmp_path, capsys):
    out = tmp_path / "run"
    flags = {"input": "{text} w8", "labels": "w6,w7,w8", "lr": 0.5, "metric": "macro_f1"}
    integers = [{"text": f"w{10 + i} w{20 + i}", "label": i % 3} for i in range(30)]
    file = write_csv(tmp_path / "integers.csv", integers)
    assert run(words(out, task=file, **flags)) == 0
    trained = metrics(out)[-1]
    final, shown = evaluated(tmp_path / "again", out, capsys, task=file)
    assert "note     the rows get the learned prompt and words (task.json)\n" in shown
    assert "columns  reads text, picks label among w6 (0), w7 (1), w8 (2)\n" in shown
    assert (final["accuracy"], final["metric"]) == (trained["accuracy"], "macro_f1")
    # What the command says comes first, and so does a file without the adapter's columns.
    _, shown = evaluated(tmp_path / "flags", out, capsys, task=file, labels="w3,w4,w5")
    assert "among w3 (0), w4 (1), w5 (2)\n" in shown
    assert "were learned" not in shown
    others = write_csv(
        tmp_path / "others.csv",
        [{"question": f"w{10 + i}", "label": LABELS[i % 3]} for i in range(30)],
    )
    _, shown = evaluated(tmp_path / "others", out, capsys, task=others)
    assert "columns  reads question, picks label among w3, w4, w5\n" in shown
    # An adapter of several tasks has learned the one of this name.
    other = write_csv(tmp_path / "other.csv", integers)
    both = tmp_path / "both"
    assert run(words(both, task=f"{file},{other}", adapters="one", **flags)) == 0
    _, shown = evaluated(tmp_path / "one", both, capsys, task=file)
    assert "among w6 (0), w7 (1), w8 (2)\n" in shown
    # A model into which the adapter is merged has learned the same.
    merged = tmp_path / "merged"
    output(capsys, "merge", model("t5"), out / "adapter", merged)
    assert run(words(tmp_path / "m", "--eval-only", steps=None, model=merged, task=file)) == 0
    assert metrics(tmp_path / "m")[-1]["accuracy"] == trained["accuracy"]
    assert "among w6 (0), w7 (1), w8 (2)\n" in capsys.readouterr().out


def test_an_adapter_labels_rows_that_have_only_a_text(labeled, tmp_path, capsys):
    out = tmp_path / "run"
    flags = {"input": "{text} w8", "labels": "w3,w4,w5", "lr": 0.5, "metric": "macro_f1"}
    assert run(words(out, task=labeled, **flags)) == 0
    shown = capsys.readouterr().out
    assert "columns  reads text, picks label among w3, w4, w5\n" in shown
    assert metrics(out)[-1]["metric"] == "macro_f1"
    new = new_rows(tmp_path, "w12 w22", "w13", "w14 w9")
    results = predicted(capsys, new, "--adapter", out / "adapter")
    for result, text in zip(results, ("w12 w22 w8", "w13 w8", "w14 w9 w8"), strict=True):
        choice = expected_choice(out / "adapter", text, LABELS)
        assert result["choice"] == result["word"] == choice
        assert result["label"] == LABELS.index(choice)
    # What the command itself says comes first.
    asked = predicted(capsys, new, "--adapter", out / "adapter", "--input", "{text}")
    assert asked[1]["choice"] == expected_choice(out / "adapter", "w13", LABELS)
    renamed = predicted(capsys, new, "--adapter", out / "adapter", "--labels", "w6,w7,w8")
    assert {result["choice"] for result in renamed} <= {"w6", "w7", "w8"}
    wrong = new_rows(tmp_path, "w12", column="txt")
    error = failure(capsys, "predict", model("t5"), wrong, "--adapter", out / "adapter")
    assert "new.csv:2: 'text' has no value" in error
    assert "the columns are txt" in error
    assert "did you mean 'txt'?" in error


def test_integers_come_back_as_their_words(tmp_path, capsys):
    rows = [{"Text": f"w{10 + i}", "Label": i % 2} for i in range(20)]
    file = write_csv(tmp_path / "rows.csv", rows)
    out = tmp_path / "run"
    assert run(words(out, task=file, labels="w3,w4", steps=2)) == 0
    (result,) = predicted(capsys, new_rows(tmp_path, "w12"), "--adapter", out / "adapter")
    assert result["choice"] == ("w3", "w4")[result["label"]]
    assert result["word"] == str(result["label"]), "as the file spells it"


def test_an_adapter_that_writes_texts_writes_them_for_new_rows(tmp_path, capsys):
    rows = [
        {"instruction": f"w{10 + i}", "input": "w9" * (i % 2), "output": "w4"} for i in range(9)
    ]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows))
    out = tmp_path / "run"
    assert run(words(out, task=tmp_path / "alpaca.json", steps=30, lr=1.0)) == 0
    assert "columns  reads instruction and input, writes output\n" in capsys.readouterr().out
    new = tmp_path / "new.jsonl"
    new.write_text('{"instruction": "w12", "input": "w9"}\n{"instruction": "w13"}\n')
    results = predicted(capsys, new, "--adapter", out / "adapter", "--max-new-tokens", 3)
    ours = minia3.load_model(model("t5"))
    minia3.load_adapter(ours, out / "adapter")
    texts = ["w12\nw9", "w13"]
    tokenizer = minia3.load_tokenizer(model("t5"))
    assert [result["output"] for result in results] == minia3.generate(
        ours, tokenizer, texts, max_new_tokens=3
    )


def test_the_test_rows_of_a_run_are_answered_although_some_lack_a_column(tmp_path, capsys):
    """`predict` stopped at the first such row, on which the run had reported."""
    rows = []
    for i in range(9):
        context = {"context": f"w{20 + i}"} if i % 2 else {}
        rows.append({"question": f"w{10 + i}", **context, "answer": "w4"})
    content = "".join(json.dumps(row) + "\n" for row in rows)
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(content)
    out = tmp_path / "run"
    assert run(words(out, task=tmp_path, steps=2)) == 0
    test = tmp_path / "test.jsonl"
    command = ["predict", model("t5"), test, "--adapter", out / "adapter", "--max-new-tokens", 3]
    capsys.readouterr()
    assert main([str(word) for word in command]) == 0
    found = capsys.readouterr()
    assert [json.loads(line)["idx"] for line in found.out.splitlines()] == list(range(9))
    note, cut = found.err.split("\n", 1)
    assert note == "minia3: 'context' is empty in 5 rows"
    assert CUT.fullmatch(cut)
    test.write_text(content.replace("context", "contxt"))
    error = failure(capsys, "predict", model("t5"), test, "--adapter", out / "adapter")
    assert f"{test}:1: there is no column 'context'" in error
    assert "did you mean 'contxt'?" in error


def write_rte(data_dir):
    """Write RTE with a row of each label, and return the row without it."""
    folder = data_dir / "rte"
    folder.mkdir(parents=True)
    row = {"premise": "w5", "hypothesis": "w6"}
    lines = [json.dumps({**row, "label": label}) for label in ("entailment", "not_entailment")]
    for name in ("train", "val"):
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return row


def test_an_adapter_of_a_known_task_labels_its_rows_without_the_task(tmp_path, capsys):
    row = write_rte(tmp_path / "data")
    out = tmp_path / "run"
    assert run(words(out, model="tiny-t5", task="rte", data_dir=tmp_path / "data", steps=2)) == 0
    new = tmp_path / "new.jsonl"
    new.write_text(json.dumps(row) + "\n")
    alone = predicted(capsys, new, "--adapter", out / "adapter", base="tiny-t5")
    flags = ["--adapter", out / "adapter", "--task", "rte"]
    assert alone == predicted(capsys, new, *flags, base="tiny-t5")
    assert alone[0]["word"] in ("entailment", "not_entailment")
    assert "expected 0 to 4" in failure(
        capsys, "predict", "tiny-t5", new, "--adapter", out / "adapter", "--prompt", 5
    )


def test_the_adapters_of_a_folder_get_the_prompt_of_this_number(tmp_path, capsys):
    """It was refused: rows that name no adapter have a single prompt."""
    row = write_rte(tmp_path / "data")
    out = tmp_path / "run"
    flags = {"model": "tiny-t5", "task": "rte", "data_dir": tmp_path / "data", "seed": "0,1"}
    assert run(words(out, steps=2, **flags)) == 0
    adapters = out / "adapters"
    new = tmp_path / "new.jsonl"
    new.write_text(json.dumps(row | {"adapter": "s1"}) + "\n")
    (result,) = predicted(capsys, new, "--adapter", adapters, "--prompt", 3, base="tiny-t5")
    new.write_text(json.dumps(row) + "\n")
    (alone,) = predicted(capsys, new, "--adapter", adapters / "s1", "--prompt", 3, base="tiny-t5")
    assert result["scores"] == pytest.approx(alone["scores"], abs=1e-5)
    (other,) = predicted(capsys, new, "--adapter", adapters / "s1", base="tiny-t5")
    assert result["scores"] != pytest.approx(other["scores"], abs=1e-5)
    error = failure(capsys, "predict", "tiny-t5", new, "--adapter", adapters, "--prompt", 5)
    assert "expected 0 to 4" in error


def test_each_row_has_the_words_of_its_own_adapter(labeled, tmp_path, capsys):
    rows = [{"Question": f"w{10 + i}", "answer": f"w{3 + i % 2}"} for i in range(20)]
    questions = write_csv(tmp_path / "questions.csv", rows)
    out = tmp_path / "run"
    assert run(words(out, task=f"{labeled},{questions}", steps=2)) == 0
    new = tmp_path / "new.jsonl"
    made = [
        {"text": "w12", "adapter": "moods"},
        {"question": "w13", "adapter": "questions"},
        {"input": "w14"},
        {"text": "w15", "adapter": "moods"},
    ]
    new.write_text("".join(json.dumps(row) + "\n" for row in made))
    results = predicted(capsys, new, "--adapter", out / "adapters", "--max-new-tokens", 3)
    assert [set(result) for result in results] == [
        {"idx", "label", "choice", "scores", "word"},
        {"idx", "output"},
        {"idx", "output"},
        {"idx", "label", "choice", "scores", "word"},
    ]
    choice = expected_choice(out / "adapters" / "moods", "w15", LABELS)
    assert results[3]["choice"] == choice


def test_an_adapter_of_a_mixture_asks_for_the_task(labeled, tmp_path, capsys):
    rows = [{"question": f"w{10 + i}", "answer": f"w{3 + i % 2}"} for i in range(20)]
    questions = write_csv(tmp_path / "questions.csv", rows)
    out = tmp_path / "run"
    flags = {"task": f"{labeled},{questions}", "adapters": "one", "steps": 2}
    assert run(words(out, **flags)) == 0
    new = new_rows(tmp_path, "w12")
    command = ["predict", model("t5"), new, "--adapter", out / "adapter"]
    error = failure(capsys, *command)
    assert "has learned 2 tasks: give --task moods|questions" in error
    (result,) = predicted(capsys, *command[2:], "--task", "moods")
    assert result["choice"] in LABELS
    error = failure(capsys, *command, "--task", "mood")
    assert "expected a task file or the name of a task: did you mean 'moods'?" in error
    error = failure(capsys, *command, "--task", "else")
    assert "expected a task file or the name of a task: moods, questions, anli-r1, " in error


def test_the_adapters_of_a_grid_of_mixtures_ask_for_the_task_too(labeled, tmp_path, capsys):
    rows = [{"question": f"w{10 + i}", "answer": f"w{3 + i % 2}"} for i in range(20)]
    questions = write_csv(tmp_path / "questions.csv", rows)
    out = tmp_path / "run"
    flags = {"task": f"{labeled},{questions}", "adapters": "one", "seed": "0,1", "steps": 2}
    assert run(words(out, **flags)) == 0
    new = tmp_path / "new.jsonl"
    texts = ["w12 w13", "w14"]
    made = [{"text": text, "adapter": f"s{i}"} for i, text in enumerate(texts)]
    new.write_text("".join(json.dumps(row) + "\n" for row in [*made, {"text": "w15"}]))
    command = ["predict", model("t5"), new, "--adapter", out / "adapters"]
    error = failure(capsys, *command)
    assert "s0 has learned 2 tasks: give --task moods|questions" in error
    *results, base = predicted(capsys, *command[2:], "--task", "moods")
    for i, (text, result) in enumerate(zip(texts, results, strict=True)):
        assert result["choice"] == expected_choice(out / "adapters" / f"s{i}", text, LABELS)
        assert result["word"] == result["choice"]
    assert base["choice"] in LABELS
    error = failure(capsys, *command, "--task", "mood")
    assert "expected a task file or the name of a task: did you mean 'moods'?" in error


def test_a_csv_file_has_no_columns_that_every_row_leaves_empty(labeled, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(words(out, task=labeled, steps=2)) == 0
    new = new_rows(tmp_path, "w12")
    ranked = ["predict", model("t5"), new, "--device", "cpu", "--adapter", out / "adapter"]
    output(capsys, *ranked, "--out", tmp_path / "ranked.csv")
    assert (tmp_path / "ranked.csv").read_text().startswith("idx,label,choice,scores\n")
    # Without the task, a row says itself how it is answered.
    answered(capsys, *ranked[:5], "--out", tmp_path / "any.csv", "--max-new-tokens", 2)
    assert (tmp_path / "any.csv").read_text().startswith("idx,label,choice,scores,output\n")
    output(capsys, *ranked[:5], "--labels", "w3,w4", "--out", tmp_path / "labels.csv")
    assert (tmp_path / "labels.csv").read_text().startswith("idx,label,choice,scores\n")
    rows = [{"question": f"w{10 + i}", "answer": f"w{3 + i % 2}"} for i in range(20)]
    written = tmp_path / "written"
    questions = write_csv(tmp_path / "questions.csv", rows)
    assert run(words(written, task=questions, steps=2)) == 0
    command = ["predict", model("t5"), questions, "--device", "cpu", "--max-new-tokens", 2]
    path = tmp_path / "written.csv"
    answered(capsys, *command, "--adapter", written / "adapter", "--out", path)
    assert path.read_text().startswith("idx,output\n")


def test_a_choice_that_is_too_long_is_named_if_the_flag_says_so(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"input": "w5", "choices": ["w6", "w7 w8 w9"]}) + "\n")
    (result,) = predicted(capsys, path)
    assert result["label"] in (0, 1)
    command = ["predict", model("t5"), path, "--device", "cpu", "--max-target-length"]
    assert json.loads(output(capsys, *command, 4)) == result  # three words and the end token
    error = failure(capsys, *command, 3)
    assert "rows.jsonl:1: a choice has 4 tokens, expected at most 3" in error
    assert "raise --max-target-length" in error
    # The only choice is not cut, either.
    path.write_text(json.dumps({"input": "w5", "choices": ["w7 w8 w9"]}) + "\n")
    assert "rows.jsonl:1: a choice has 4 tokens" in failure(capsys, *command, 3)


@pytest.mark.parametrize(("name", "is_warned"), [("llama", True), ("t5", False)])
def test_an_adapter_for_ranking_that_writes_says_that_it_was_not_trained_to_stop(
    name, is_warned, tmp_path, capsys
):
    out = tmp_path / "run"
    flags = {"model": model(name), "task": task((2,)), "steps": 1, "seed": "0,1"}
    assert run(words(out, **flags)) == 0
    path = tmp_path / "rows.jsonl"
    ranked = {"input": "w5", "choices": ["w6", "w7"]}
    rows = [ranked, {"input": "w8"}, {"input": "w9"}]
    command = ["predict", model(name), path, "--device", "cpu", "--max-new-tokens", "2"]

    def warnings_for(rows, adapter):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        capsys.readouterr()
        assert main([str(word) for word in (*command, "--adapter", adapter)]) == 0
        return capsys.readouterr().err.count("was trained to rank choices, and not to stop")

    adapters = out / "adapters"
    assert warnings_for([ranked], adapters / "s0") == 0
    assert warnings_for(rows, adapters / "s0") == is_warned  # once
    rows = [row | {"adapter": f"s{i % 2}"} for i, row in enumerate([*rows, *rows])]
    assert warnings_for(rows, adapters) == 2 * is_warned
    assert warnings_for([{"input": "w8", "adapter": None}], adapters) == 0


def test_a_model_after_full_fine_tuning_labels_new_rows_too(labeled, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(words(out, task=labeled, method="full", steps=2)) == 0
    new = new_rows(tmp_path, "w12")
    lines = output(capsys, "predict", out / "model", new, "--device", "cpu")
    assert json.loads(lines)["choice"] in LABELS


def test_what_is_made_of_an_adapter_keeps_its_task(labeled, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(words(out, task=labeled, seed="0,1", steps=2)) == 0
    first = out / "adapters" / "s0"
    second = out / "adapters" / "s1"
    output(capsys, "merge", model("t5"), first, tmp_path / "merged")
    output(capsys, "convert", first, tmp_path / "converted")
    output(capsys, "mix", tmp_path / "mixed", f"{first}:0.5", f"{second}:0.5")
    kept = (first / "task.json").read_bytes()
    for name in ("merged", "converted", "mixed"):
        assert (tmp_path / name / "task.json").read_bytes() == kept
    new = new_rows(tmp_path, "w12")
    alone = predicted(capsys, new, "--adapter", first)
    merged = predicted(capsys, new, base=tmp_path / "merged")
    assert merged[0]["scores"] == pytest.approx(alone[0]["scores"], abs=1e-4)
    (second / "task.json").unlink()
    output(capsys, "mix", tmp_path / "other", f"{first}:0.5", f"{second}:0.5")
    assert not (tmp_path / "other" / "task.json").exists(), "they have learned different tasks"


def test_lora_labels_new_rows_too(labeled, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(words(out, task=labeled, method="lora", steps=2)) == 0
    (result,) = predicted(capsys, new_rows(tmp_path, "w12"), "--adapter", out / "adapter")
    assert result["choice"] in LABELS


def test_without_an_adapter_the_usual_columns_are_the_input(tmp_path, capsys):
    new = new_rows(tmp_path, "w12 w13", column="Question")
    (result,) = predicted(capsys, new, "--max-new-tokens", 3)
    ours = minia3.load_model(model("t5"))
    tokenizer = minia3.load_tokenizer(model("t5"))
    assert [result["output"]] == minia3.generate(ours, tokenizer, ["w12 w13"], max_new_tokens=3)
    (result,) = predicted(capsys, new, "--input", "{question} w9", "--labels", "w3,w4")
    scores = minia3.rank(ours, tokenizer, ["w12 w13 w9"], ["w3", "w4"])[0].tolist()
    assert result["scores"] == pytest.approx(scores, abs=1e-5)
    error = failure(capsys, "predict", model("t5"), new, "--input", "{question.upper}")
    assert "--input is '{question.upper}': {question.upper} is not a column" in error
    assert "new.csv" not in error, "because the file is right"


def test_a_task_file_puts_rows_into_words(tmp_path, capsys):
    entry = {"labels": ["w3", "w4"], "prompts": [{"text": "{text} w9"}, {"text": "w8 {text}"}]}
    (tmp_path / "mine.json").write_text(json.dumps(entry))
    new = new_rows(tmp_path, "w12")
    flags = [new, "--task", tmp_path / "mine.json", "--prompt", 1]
    (result,) = predicted(capsys, *flags)
    ours = minia3.load_model(model("t5"))
    scores = minia3.rank(ours, minia3.load_tokenizer(model("t5")), ["w8 w12"], ["w3", "w4"])
    assert result["scores"] == pytest.approx(scores[0].tolist(), abs=1e-5)


def test_a_task_file_that_leaves_its_labels_to_train_does_not_make_an_adapter_write(
    labeled, tmp_path, capsys
):
    """It has learned to pick among labels, and wrote texts."""
    entry = {"prompts": [{"text": "{text} w9"}], "label_field": "label", "files": str(labeled)}
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(entry))
    out = tmp_path / "run"
    assert run(words(out, task=file, steps=2)) == 0
    new = new_rows(tmp_path, "w12")
    flags = [new, "--adapter", out / "adapter"]
    (expected,) = predicted(capsys, *flags)
    assert expected["choice"] in LABELS
    error = failure(capsys, "predict", model("t5"), *flags, "--task", file)
    assert f"--task is {file}, which takes its labels from its file of train, and " in error
    assert "has learned to pick among labels: leave out --task, or give --labels" in error
    labels = ["--task", file, "--labels", ",".join(LABELS)]
    assert predicted(capsys, *flags, *labels)[0]["choice"] == expected["choice"]
    (result,) = predicted(capsys, new, "--task", file)  # the base has learned no labels
    assert "output" in result

    # In a folder of adapters, the next one may have learned to write.
    adapters = tmp_path / "adapters"
    for name in "ab":
        shutil.copytree(out / "adapter", adapters / name)
    writing = {"prompts": [{"text": "{text}"}], "target": "{text}"}
    (adapters / "b" / "task.json").write_text(json.dumps(writing))
    new = tmp_path / "named.jsonl"
    new.write_text('{"text": "w12", "adapter": "b"}\n')
    (result,) = predicted(capsys, new, "--adapter", adapters, "--task", file)
    assert "output" in result


def test_the_choices_of_a_row_to_label_are_prepared_as_in_training(tmp_path, capsys):
    entry = {"labels": ["0", "1"], "prompts": [{"text": "{q}", "choices": ["w{a}", "{b}"]}]}
    (tmp_path / "mine.json").write_text(json.dumps(entry))
    new = tmp_path / "new.jsonl"
    new.write_text(json.dumps({"q": "w12", "a": 3.0, "b": "w4"}) + "\n")
    (result,) = predicted(capsys, new, "--task", tmp_path / "mine.json")
    ours = minia3.load_model(model("t5"))
    scores = minia3.rank(ours, minia3.load_tokenizer(model("t5")), ["w12"], ["w3", "w4"])
    assert result["scores"] == pytest.approx(scores[0].tolist(), abs=1e-5)
    new.write_text(json.dumps({"q": "w12", "a": " ", "b": "w4"}) + "\n")
    error = failure(capsys, "predict", model("t5"), new, "--task", tmp_path / "mine.json")
    assert "new.jsonl:1: 'a' is ' ', expected a text that is not empty" in error


# Runs


def test_a_run_is_resumed_with_its_flags_and_finds_changed_files(labeled, tmp_path, capsys):
    entry = {
        "files": {"train": labeled.name, "test": labeled.name},
        "prompts": [{"text": "{text}"}],
    }
    task_file = tmp_path / "task.json"
    task_file.write_text(json.dumps(entry))
    out = tmp_path / "run"
    flags = {"input": "{text} w9", "labels": "w5,w4,w3", "metric": "macro_f1", "steps": 3}
    assert run(words(out, task=task_file, **flags)) == 0
    config = json.loads((out / "config.json").read_text())
    assert {name: config[name] for name in flags} == flags
    assert set(config["data"]) == {labeled.name, "task.json"}
    (out / "checkpoint.pt").unlink()  # as if it had been killed before the first one
    task_file.write_text(json.dumps(entry | {"metric": "accuracy"}))
    assert run(["--resume", out]) == 2
    assert "files have changed since this run began (task.json)" in capsys.readouterr().err
    task_file.write_text(json.dumps(entry))
    assert resume(out) == 0
    assert len(events(out, "final")) == 1


def test_mistakes_about_columns_are_one_line_before_a_model_is_loaded(labeled, tmp_path, capsys):
    run_folder = tmp_path / "run"
    wrong = {"model": without_weights("t5", tmp_path / "weightless"), "task": labeled}
    fails(
        words(run_folder, input="{txt}", **wrong),
        capsys,
        "--input names the column 'txt'",
        "the columns are text, label: did you mean 'text'?",
    )
    fails(words(run_folder, labels="w3,w4", **wrong), capsys, "'label' is 'w5', expected one")
    fails(
        words(run_folder, metric="bleu", **wrong), capsys, "the metric is 'bleu', expected one of"
    )
    fails(words(run_folder, metric="blue", **wrong), capsys, "--metric is 'blue', expected one of")
    other = write_csv(tmp_path / "other.csv", [{"review": "a b c", "mood": "d"}])
    fails(words(run_folder, task=other), capsys, '--input "{review}" --target "{mood}"')
    assert not run_folder.exists()


def test_words_as_labels_train_with_the_losses_of_choices(labeled, tmp_path, capsys):
    assert run(words(tmp_path / "run", task=labeled, losses="ul,ln", steps=2)) == 0
    target = {"task": labeled, "target": "{label}", "losses": "ul,ln"}
    fails(words(tmp_path / "other", **target), capsys, "expected lm in --losses, found ul,ln")


@pytest.mark.slow
def test_peft_ignores_the_task_beside_its_files(labeled, tmp_path):
    from peft import PeftModel
    from transformers import T5ForConditionalGeneration

    out = tmp_path / "run"
    assert run(words(out, task=labeled, steps=2, lr=0.5)) == 0
    assert (out / "adapter" / "task.json").exists()
    base = T5ForConditionalGeneration.from_pretrained(model("t5"))
    peft_model = PeftModel.from_pretrained(base, out / "adapter")
    ours = minia3.load_model(model("t5"))
    minia3.load_adapter(ours, out / "adapter")
    theirs = {name: p for name, p in peft_model.named_parameters() if "ia3_l" in name}
    n_entries = sum(parameter.numel() for parameter in theirs.values())
    assert n_entries == sum(vector.numel() for vector in minia3.vectors(ours).values())
    name = "base_model.model.encoder.block.0.layer.0.SelfAttention.k.ia3_l.default"
    assert theirs[name].flatten().tolist() == ours.encoder.blocks[0].attn.l_k.scale[0].tolist()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_several_processes_do_not_read_one_pipe(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("minia3.cli.predict.n_processes", lambda: 2)
    pipe = tmp_path / "rows.jsonl"
    os.mkfifo(pipe)
    assert f"{pipe} is a pipe, and each of 2" in failure(capsys, "predict", model("t5"), pipe)
    nowhere = tmp_path / "nowhere.jsonl"
    assert "nowhere.jsonl" in failure(capsys, "predict", model("t5"), nowhere)
