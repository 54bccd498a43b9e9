"""Guards `predict`. It writes what ranking and generating give, row by row and in their order, with
the adapter that each row names. A file that was cut anywhere is completed. Memory does not grow
with the file."""

import csv
import errno
import gzip
import io
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import chat_model
import pytest
import running
import torch
from conftest import randomize
from words import END

import minia3
from minia3.checkpoints.tokenizer import Tokenizer
from minia3.cli.main import main
from minia3.files.program import CtrlC
from minia3.inference import result_file
from minia3.inference.evaluation import evaluate
from minia3.inference.scoring import score_examples
from minia3.tasks.known_tasks import known_tasks
from minia3.tasks.prompts import for_family


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path, rows):
    path.write_text(lines(rows))
    return path


def predict(*words):
    assert main(["predict", *map(str, words), "--device", "cpu"]) == 0


def predicted(capsys, *words):
    capsys.readouterr()
    predict(*words)
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def fails(capsys, *words):
    """Return the one line on stderr."""
    capsys.readouterr()
    assert main(["predict", *map(str, words), "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("minia3: ")
    assert err.count("\n") == 1
    return err


@pytest.fixture
def adapters(tmp_path):
    """A folder of two random adapters of the random T5, "one" and "two"."""
    for seed, name in enumerate(("one", "two")):
        model = randomize(minia3.load_model(running.model("t5")), seed)
        minia3.save_adapter(model, tmp_path / "adapters" / name)
    return tmp_path / "adapters"


def with_adapters(folder):
    """The random T5 with the base in row 0, and the adapters of `adapters`."""
    model = minia3.load_model(running.model("t5"), n_adapters=3)
    for row, name in enumerate(("one", "two"), 1):
        minia3.load_adapter(model, folder / name, adapter=row)
    return model, minia3.load_tokenizer(running.model("t5"))


@pytest.fixture
def damaged(tmp_path):
    """The folder of the random LLaMA with NaN in the embedding of w33."""
    model = minia3.load_model(running.model("llama"))
    model.embed.weight.data[33] = float("nan")
    tokenizer = minia3.load_tokenizer(running.model("llama"))
    minia3.save_model(model, tmp_path / "damaged", tokenizer)
    return tmp_path / "damaged"


@pytest.mark.parametrize("choices", [{"choices": ["w4", "w5"]}, {}])
def test_scores_that_are_not_finite_are_one_line_that_names_the_row(
    choices, damaged, tmp_path, capsys
):
    rows = [{"input": f"w{n}", **choices} for n in (30, 31, 32, 33, 34)]
    file = write(tmp_path / "rows.jsonl", rows)
    assert "row 3: the model's scores are not finite" in fails(capsys, damaged, file)
    assert len(predicted(capsys, damaged, write(file, rows[:3]))) == 3


def test_nan_in_the_weights_is_found_before_any_row_is_read(damaged, tmp_path, capsys):
    file = write(tmp_path / "rows.jsonl", [{"input": "w9"}])
    err = fails(capsys, damaged, file, "--check-weights")
    assert "model.embed_tokens.weight has 24 of 1,464 numbers that are NaN or infinite" in err


def test_a_choice_that_would_fill_the_memory_is_one_line_that_names_the_line(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("minia3.model.sequence_state.MAX_BIAS", 4 * 20 * 20)
    rows = [{"input": "w9", "choices": ["w4", " ".join(["w5"] * n)]} for n in (5, 19, 20)]
    err = fails(capsys, running.model("t5"), write(tmp_path / "rows.jsonl", rows))
    assert "rows.jsonl:3: attention from 21 to 21 tokens needs a bias of 1,764 numbers" in err


def test_choices_that_are_one_text_to_the_tokenizer_are_a_warning(tmp_path, capsys):
    file = write(tmp_path / "rows.jsonl", [{"input": "w9", "choices": ["w4\nw5", "w4 w5"]}])
    predict(running.model("t5"), file)
    assert "are the same text to the tokenizer" in capsys.readouterr().err


def test_a_token_without_an_embedding_is_one_line_that_names_the_line(tmp_path, capsys):
    model = minia3.load_model(running.model("llama"))
    tokenizer = minia3.load_tokenizer(running.model("llama"))
    tokenizer.backend.add_special_tokens(["<new>"])
    minia3.save_model(model, tmp_path / "model", tokenizer)
    rows = [{"input": "w9"}, {"input": "w9 <new>"}]
    err = fails(capsys, tmp_path / "model", write(tmp_path / "rows.jsonl", rows))
    assert "rows.jsonl:2: the tokenizer has the token '<new>' with the id 61, but" in err


@pytest.mark.parametrize("flag", ["--max-new-tokens", "--batch-size"])
def test_a_number_below_1_is_refused_before_a_row_is_answered(flag, tmp_path, capsys):
    rows = [{"input": "w3", "choices": ["w4", "w5"]}, {"input": "w6"}]
    command = ["predict", running.model("t5"), write(tmp_path / "rows.jsonl", rows), flag, "0"]
    assert main(list(map(str, command))) == 2
    out, err = capsys.readouterr()
    message = f"argument {flag}: 0 is not a number above 0 (see minia3 predict --help)"
    assert (out, err) == ("", f"minia3: {message}\n")


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_rows_with_choices_get_what_rank_gives_and_rows_without_what_generate_gives(
    name, tmp_path, capsys
):
    rows = running.rows(40, n_choices=(2, 0, 3, 1, 0))
    results = predicted(
        capsys, running.model(name), write(tmp_path / "rows.jsonl", rows), "--max-new-tokens", 5
    )
    model = minia3.load_model(running.model(name))
    tokenizer = minia3.load_tokenizer(running.model(name))
    assert [result["idx"] for result in results] == list(range(40))
    for row, result in zip(rows, results, strict=True):
        if "choices" in row:
            scores = minia3.rank(model, tokenizer, [row["input"]], row["choices"])[0].tolist()
            assert result["scores"] == pytest.approx(scores, abs=1e-5)
            assert result["label"] == scores.index(max(scores))
            assert result["choice"] == row["choices"][result["label"]]
            assert result.keys() == {"idx", "label", "choice", "scores"}
        else:
            (output,) = minia3.generate(model, tokenizer, [row["input"]], max_new_tokens=5)
            assert result == {"idx": result["idx"], "output": output}


def test_labels_are_as_often_right_as_evaluate_says(tmp_path, capsys):
    minia3.save_adapter(randomize(minia3.load_model("tiny-t5")), tmp_path / "adapter")
    file = running.ROOT / "data" / "same-colour" / "validation.jsonl"
    results = predicted(
        capsys, "tiny-t5", file, "--task", "same-colour", "--adapter", tmp_path / "adapter"
    )
    task = minia3.load_task("same-colour")
    model = minia3.load_model("tiny-t5")
    minia3.load_adapter(model, tmp_path / "adapter")
    tokenizer = minia3.load_tokenizer("tiny-t5")
    expected = evaluate(model, tokenizer, task.validation, task.prompts[0], metric="accuracy")[
        "accuracy"
    ]
    right = [
        result["label"] == row["label"]
        for result, row in zip(results, task.validation, strict=True)
    ]
    assert sum(right) / len(right) == expected


@pytest.mark.parametrize("prompt", [0, 2])
def test_rows_of_a_task_are_put_into_its_words_and_get_the_word_of_their_label(
    prompt, tmp_path, capsys
):
    task = {"premise": "anna has a ball", "hypothesis": "anna has a red ball"}
    rows = [
        task,
        {**task, "hypothesis": "tom has a cup", "idx": 77},
        {**task, "label": "not_entailment"},
    ]
    file = write(tmp_path / "rows.jsonl", rows)
    results = predicted(capsys, "tiny-t5", file, "--task", "rte", "--prompt", prompt)
    chosen = for_family(known_tasks()["rte"].prompts, "tiny-t5")[prompt]
    model = minia3.load_model("tiny-t5")
    tokenizer = minia3.load_tokenizer("tiny-t5")
    assert [result["idx"] for result in results] == [0, 77, 2]
    for row, result in zip(rows, results, strict=True):
        scores = minia3.rank(model, tokenizer, [chosen.text.format_map(row)], list(chosen.choices))[
            0
        ].tolist()
        assert result["scores"] == pytest.approx(scores, abs=1e-5)
        assert result["choice"] == chosen.choices[result["label"]]
        assert result["word"] == ("entailment", "not_entailment")[result["label"]]
    as_csv = tmp_path / "rows.csv"
    with as_csv.open("w", newline="") as out:
        table = csv.DictWriter(out, ["premise", "hypothesis", "adapter"], extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)  # their cell of the adapter is empty: none
    found = predicted(capsys, "tiny-t5", as_csv, "--task", "rte", "--prompt", prompt)
    assert [result["scores"] for result in found] == [result["scores"] for result in results]
    for number in (5, -1):
        assert "expected 0 to 4" in fails(
            capsys, "tiny-t5", file, "--task", "rte", "--prompt", number
        )
    (tmp_path / "config.json").write_text(
        json.dumps({"_name_or_path": "t5-base"})
    )  # which has a form of its own
    assert "expected 0 to 0" in fails(capsys, tmp_path, file, "--task", "rte", "--prompt", 1)
    assert "rte" in fails(capsys, "tiny-t5", file, "--task", "rtr")


def test_a_long_input_loses_its_middle(tmp_path, capsys):
    row = {"input": "w3 w4 w5 w6 w7 w8", "choices": ["w9", "w10"]}
    short = {**row, "input": "w3 w4 w8"}
    results = predicted(
        capsys, running.model("t5"), write(tmp_path / "r.jsonl", [row, short]), "--max-length", 4
    )
    assert results[0]["scores"] == results[1]["scores"]
    words = [running.model("t5"), tmp_path / "r.jsonl", "--max-length", 4]
    capsys.readouterr()
    predict(*words)
    assert capsys.readouterr().err == "minia3: 1 input cut to 4 tokens (--max-length)\n"


def written_by(monkeypatch, token_of):
    """Let the model write tokens of our choice. token_of: the next token of a row of the batch."""

    def choose(logits_BV, rows, sampler):
        return torch.tensor([[token_of(row)] for row in rows])

    monkeypatch.setattr("minia3.inference.decoding.choose_tokens", choose)


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_outputs_that_are_cut_are_counted_at_the_end(
    name, tmp_path, capsys, monkeypatch, small_chunks
):
    """They were written as if they were whole."""
    rows = [{"input": "w3 w4 w5"}, {"input": "w3 w4"}, {"input": "w3"}]
    rows.insert(1, {"input": "w3", "choices": ["w4", "w5"]})
    file = write(tmp_path / "rows.jsonl", rows * 3)  # several chunks
    words = [running.model(name), file, "--max-new-tokens", 2, "--batch-size", 1]
    written_by(monkeypatch, lambda row: 9)
    predict(*words)
    assert capsys.readouterr().err == "minia3: 9 outputs cut to 2 tokens (--max-new-tokens)\n"
    written_by(monkeypatch, lambda row: END)
    predict(*words)
    assert capsys.readouterr().err == ""
    # In a batch, the longest row comes first.
    written_by(monkeypatch, lambda row: 9 if row == 1 else END)
    write(file, rows[2:])
    predict(*words[:-1], 2)
    assert capsys.readouterr().err == "minia3: 1 output cut to 2 tokens (--max-new-tokens)\n"


def test_the_space_between_a_prompt_and_its_target_is_no_part_of_the_output(
    tmp_path, capsys, monkeypatch
):
    """A tokenizer of bytes keeps it, so the cell of a table was " cold"."""
    chat_model.save(tmp_path / "model")
    tokenizer = minia3.load_tokenizer(tmp_path / "model")
    ids = tokenizer.encode_target("cold  ice", end=True)
    assert tokenizer.decode(ids) == " cold  ice"
    question = [{"role": "user", "content": "hot"}]
    file = write(tmp_path / "rows.jsonl", [{"input": "hot"}, {"messages": question}])
    written = iter(ids * 2)
    written_by(monkeypatch, lambda row: next(written))
    outputs = [result["output"] for result in predicted(capsys, tmp_path / "model", file)]
    assert outputs == ["cold  ice", " cold  ice"]  # a conversation has no such space


# Adapters by row


def test_rows_that_name_their_adapters_are_answered_as_each_alone(adapters, tmp_path, capsys):
    rows = running.rows(30, n_choices=(2, 0))
    for i, row in enumerate(rows):
        row |= {"adapter": ("one", "two")[i % 2]} if i % 3 else {}
    file = write(tmp_path / "rows.jsonl", rows)
    results = predicted(
        capsys, running.model("t5"), file, "--adapter", adapters, "--max-new-tokens", 4
    )
    model, tokenizer = with_adapters(adapters)
    for row, result in zip(rows, results, strict=True):
        adapter = {None: 0, "one": 1, "two": 2}[row.get("adapter")]
        if "choices" in row:
            scores = minia3.rank(model, tokenizer, [row["input"]], row["choices"], adapter=adapter)[
                0
            ].tolist()
            assert result["scores"] == pytest.approx(scores, abs=1e-5)
        else:
            generated = minia3.generate(
                model, tokenizer, [row["input"]], adapter=adapter, max_new_tokens=4
            )
            assert [result["output"]] == generated


def test_a_row_that_names_no_adapter_has_the_given_one(adapters, tmp_path, capsys):
    rows = running.rows(6)
    first = adapters / "one"
    second = adapters / "two"
    alone = {
        path: predicted(
            capsys, running.model("t5"), write(tmp_path / "a.jsonl", rows), "--adapter", path
        )
        for path in (first, second)
    }
    null = write(tmp_path / "c.jsonl", [{**row, "adapter": None} for row in rows])
    assert predicted(capsys, running.model("t5"), null, "--adapter", first) == alone[first]
    named = write(tmp_path / "b.jsonl", [{**row, "adapter": "two"} for row in rows])
    assert predicted(capsys, running.model("t5"), named, "--adapter", adapters) == alone[second]
    assert (
        alone[first]
        != alone[second]
        != predicted(capsys, running.model("t5"), tmp_path / "a.jsonl")
    )


@pytest.mark.parametrize("name", ["three", "ONE", "../one", 1, ["one"], "", False])
def test_an_unknown_adapter_is_an_error_with_its_line_and_never_the_base(
    name, adapters, tmp_path, capsys
):
    rows = running.rows(3)
    rows[2]["adapter"] = name
    file = write(tmp_path / "rows.jsonl", rows)
    for words in ([], ["--adapter", adapters], ["--adapter", adapters / "one"]):
        error = fails(capsys, running.model("t5"), file, *words)
        assert f"{file}:3: 'adapter' is {name!r}" in error
        is_folder = words[1:] == [adapters]
        assert ("not a folder of adapters: give one" in error) is not is_folder
        assert ("expected one of one, two" in error) is is_folder


def test_a_table_that_can_name_no_adapter_of_a_folder_is_not_answered_by_the_base(
    adapters, tmp_path, capsys
):
    file = tmp_path / "rows.csv"
    file.write_text("text,Adapter\nw3,one\n")
    error = fails(capsys, running.model("t5"), file, "--adapter", adapters)
    assert "rows.csv: there is no column 'adapter', and --adapter is a folder of ada" in error
    assert "give one of them (one, two), or name one in each row" in error
    file.write_text("text,adapter\nw3,one\nw3,\n")  # a row may still name none
    words = ["--adapter", adapters, "--columns", "adapter"]
    found = predicted(capsys, running.model("t5"), file, *words)
    assert found == [{"adapter": "one"}, {"adapter": None}]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz"])
def test_rows_of_json_that_name_no_adapter_of_a_folder_are_not_answered_by_the_base(
    suffix, adapters, tmp_path, capsys
):
    file = tmp_path / f"rows{suffix}"
    words = [running.model("t5"), file, "--adapter", adapters, "--columns", "adapter"]

    def write_rows(*rows):
        content = json.dumps(rows) if suffix == ".json" else lines(rows)
        if suffix.endswith(".gz"):
            content = gzip.compress(content.encode()).decode("latin-1")
        file.write_text(content, "latin-1")

    row = {"input": "w3", "choices": ["w4", "w5"]}
    write_rows(*[{**row, "Adapter": "one"}] * 300)
    error = fails(capsys, *words)
    assert f"rows{suffix}: there is no column 'adapter', and --adapter is a folder of ada" in error
    assert "give one of them (one, two), or name one in each row" in error
    write_rows(*[row] * 299, {**row, "adapter": "two"})  # the base still answers a row of them
    assert predicted(capsys, *words) == [*[{"adapter": None}] * 299, {"adapter": "two"}]
    write_rows({**row, "adapter": None})  # it is said that the base is meant
    assert predicted(capsys, *words) == [{"adapter": None}]
    write_rows("no row", row)  # a wrong row is named, whatever the others lack
    assert f"rows{suffix}:1: expected a JSON object" in fails(capsys, *words)
    write_rows()
    assert predicted(capsys, *words) == []


def test_an_adapter_whose_name_is_a_number_is_expected_as_a_text(adapters, tmp_path, capsys):
    """The message was: 'adapter' is 7, expected one of 7, one, two."""
    shutil.copytree(adapters / "one", adapters / "7")
    rows = [{**row, "adapter": name} for row, name in zip(running.rows(2), ["7", 7], strict=True)]
    file = write(tmp_path / "rows.jsonl", rows)
    error = fails(capsys, running.model("t5"), file, "--adapter", adapters)
    assert error.endswith(f"{file}:2: 'adapter' is 7, expected the text '7'\n")
    file = write(tmp_path / "rows.jsonl", rows[:1])
    assert predicted(capsys, running.model("t5"), file, "--adapter", adapters)


def test_a_row_that_has_no_labels_leaves_its_word_empty(adapters, tmp_path, capsys):
    """The command stopped at the first row that the base answers, in the middle of the file."""
    entry = {"labels": ["w3", "w4"], "prompts": [{"text": "{input}"}]}
    (adapters / "one" / "task.json").write_text(json.dumps(entry))
    rows = [
        {"input": "w5", "adapter": "one"},
        {"input": "w6"},
        {"input": "w7", "adapter": "two"},
        {"input": "w8", "choices": ["w3", "w4"]},
    ]
    file = write(tmp_path / "rows.jsonl", rows)
    words = [running.model("t5"), file, "--adapter", adapters, "--max-new-tokens", 2]
    words += ["--columns", "idx,word"]
    first, *others = predicted(capsys, *words)
    assert first["word"] in entry["labels"]
    assert [row["word"] for row in others] == [None] * 3
    predict(*words, "--out", tmp_path / "out.csv")
    expected = ["idx,word", f"0,{first['word']}", "1,", "2,", "3,"]
    assert (tmp_path / "out.csv").read_text().splitlines() == expected
    # A column of the file does not fill the cells. But if no result has a word, it is meant.
    write(file, [row | {"word": "w9"} for row in rows])
    assert predicted(capsys, *words) == [first, *others]
    (adapters / "one" / "task.json").unlink()
    assert [row["word"] for row in predicted(capsys, *words)] == ["w9"] * 4


@pytest.mark.parametrize("flags", [["--input", "{adapter} {text}"], ["--task"]])
def test_a_column_that_the_task_reads_names_no_adapter(flags, adapters, tmp_path, capsys):
    if flags == ["--task"]:
        entry = {"fields": {"adapter": "plug"}, "target": "{end}"}
        entry["prompts"] = [{"text": "{plug} {text}"}]
        (tmp_path / "mine.json").write_text(json.dumps(entry))
        flags = ["--task", tmp_path / "mine.json"]
    rows = [{"adapter": "w3", "text": "w4"}, {"adapter": "w5", "text": "w6"}]
    file = write(tmp_path / "rows.jsonl", rows)
    joined = write(tmp_path / "joined.jsonl", [{"input": "w3 w4"}, {"input": "w5 w6"}])
    for words in ([], ["--adapter", adapters / "one"]):
        words = [*words, "--max-new-tokens", 3]
        expected = predicted(capsys, running.model("t5"), joined, *words)
        assert predicted(capsys, running.model("t5"), file, *words, *flags) == expected
        named = [*words, *flags, "--columns", "adapter,output"]
        found = predicted(capsys, running.model("t5"), file, *named)
        assert [row["adapter"] for row in found] == ["w3", "w5"]
    assert "expected one of one, two" in fails(
        capsys, running.model("t5"), file, "--adapter", adapters, *flags
    )


def test_a_folder_that_holds_no_adapter_is_refused(tmp_path, capsys):
    file = write(tmp_path / "rows.jsonl", running.rows(1))
    (tmp_path / "empty").mkdir()
    fails(capsys, running.model("t5"), file, "--adapter", tmp_path / "empty")
    fails(capsys, running.model("t5"), file, "--adapter", tmp_path / "nowhere")


# Bad rows


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ("{", "not JSON"),
        ("[1]", "JSON object"),
        ({}, "'input'"),
        ({"input": ""}, "'input'"),
        ({"input": [7]}, "'input'"),
        ({"input": "w3", "choices": []}, "'choices'"),
        ({"input": "w3", "choices": "w4"}, "'choices'"),
        ({"input": "w3", "choices": ["w4", 5]}, "'choices'"),
        ({"input": "w3", "choices": ["w4", "w4"]}, "texts that differ"),
        ({"input": "w3", "choices": ["w4", "\ud800"]}, "JSON"),
    ],
)
def test_a_bad_row_is_named_by_path_line_and_reason(row, part, tmp_path, capsys):
    file = write(tmp_path / "rows.jsonl", running.rows(2))
    with file.open("a") as f:
        f.write("\n" + (row if isinstance(row, str) else json.dumps(row)) + "\n")
    error = fails(capsys, running.model("t5"), file)
    assert f"{file}:4: " in error
    assert part in error


def test_a_row_that_lacks_a_field_of_the_task_or_does_not_fit_is_named(tmp_path, capsys):
    file = write(
        tmp_path / "rows.jsonl", [{"premise": "w3", "hypothesis": "w4"}, {"premise": "w3"}]
    )
    assert f"{file}:2: the row has no field 'hypothesis'" in fails(
        capsys, "tiny-t5", file, "--task", "rte"
    )
    file = write(tmp_path / "rows.jsonl", [{"input": "w3", "choices": ["w4"]}])
    assert f"{file}:1: row 0 does not fit" in fails(
        capsys, running.model("t5"), file, "--max-length", 1
    )


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_file_that_lacks_a_column_of_the_input_is_refused(suffix, tmp_path, capsys):
    """The rows were answered as if the column were empty in all of them."""
    file = tmp_path / f"rows{suffix}"
    words = (running.model("t5"), file, "--labels", "w5,w6", "--input", "{premise} {hypothesis}")
    good = {".csv": "premise,hypothesis\nw3,\n", ".jsonl": '{"premise": "w3", "hypothesis": ""}\n'}
    file.write_text(good[suffix])
    (result,) = predicted(capsys, *words)
    file.write_text(good[suffix].replace("hypothesis", "hypotesis"))
    error = fails(capsys, *words)
    assert "there is no column 'hypothesis', which the model reads (it may be empty); " in error
    assert "the columns are premise, hypotesis: did you mean 'hypotesis'?" in error
    file.write_text(good[suffix].replace("hypothesis", "Hypothesis"))
    assert predicted(capsys, *words) == [result]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_row_of_json_may_lack_a_column_that_another_row_has(suffix, tmp_path, capsys):
    """Training reads such files, and their rows are those that the adapter is asked about."""
    file = tmp_path / f"rows{suffix}"
    words = ("--labels", "w5,w6", "--input", "{premise} {hypothesis}")

    def write_rows(*rows):
        file.write_text(json.dumps(rows) if suffix == ".json" else lines(rows))

    last = {"Premise": "w3", "Hypothesis": "w4", "note": 1}
    write_rows(*[{"premise": "w3", "hypothesis": ""}] * 300, last)
    results = predicted(capsys, running.model("t5"), file, *words)
    write_rows(*[{"premise": "w3"}] * 300, last)  # in another chunk
    assert predicted(capsys, running.model("t5"), file, *words) == results
    reading, writing = os.pipe()
    os.write(writing, lines([{"premise": "w3"}, last]).encode())
    os.close(writing)
    error = fails(capsys, running.model("t5"), f"/dev/fd/{reading}", *words)
    os.close(reading)
    assert ":1: there is no column 'hypothesis'" in error, "a pipe is not read ahead"


def test_a_row_that_lacks_a_column_is_not_given_another_one(tmp_path, capsys):
    """`Premise` was read in its place, although other rows have both."""
    words = ("--labels", "w5,w6", "--input", "{premise} {hypothesis}")
    rows = [{"Premise": "w4", "hypothesis": "w5"}, {"premise": "w3", "hypothesis": "w5"}]
    file = write(tmp_path / "rows.jsonl", rows)
    one_name = predicted(capsys, running.model("t5"), file, *words)
    both = {"premise": "w3", "Premise": "w4", "hypothesis": "w5"}
    results = predicted(capsys, running.model("t5"), write(file, [*rows, both]), *words)
    assert results[1]["scores"] == results[2]["scores"] == one_name[1]["scores"]
    assert results[0]["scores"] != one_name[0]["scores"]
    predict(running.model("t5"), file, *words)
    assert capsys.readouterr().err == "minia3: 'premise' is empty in 1 row\n"


def test_rows_that_lack_a_column_are_counted_at_the_end(tmp_path, capsys):
    """A column that is misspelled in some rows was passed over, but not in training."""
    rows = [{"premise": "w3", "input": "w4"}] * 2 + [{"premise": "w3", "hypotesis": "w4"}]
    rows.append({"hypothesis": "w4"})
    file = write(tmp_path / "rows.jsonl", rows)
    words = ("--labels", "w5,w6", "--input", "{premise} {hypothesis} {input}")
    predict(running.model("t5"), file, *words)
    found = capsys.readouterr()
    assert found.err == (
        "minia3: 'hypothesis' is empty in 3 rows\nminia3: 'premise' is empty in 1 row\n"
    )
    assert found.out.count("\n") == 4


def test_cells_in_quotes_are_counted_in_a_tsv_file_to_answer(tmp_path, capsys):
    """The note was for training alone."""
    file = tmp_path / "rows.tsv"
    file.write_text('text\tid\n"w3, w4"\t1\n"w3 ""w4"""\t2\n')
    predict(running.model("t5"), file, "--labels", "w5,w6", "--input", "{text}")
    doubled, excel = capsys.readouterr().err.splitlines()
    rest = "The model reads all of these quotes: name the file .csv to leave them out"
    start = "minia3: 1 cell of .tsv files is in quotes"
    assert doubled == f"{start}, with each quote inside doubled. {rest}"
    assert excel == f"{start}, as Excel puts cells that have a comma. {rest}"
    file.rename(tmp_path / "rows.csv")
    predict(running.model("t5"), tmp_path / "rows.csv", "--labels", "w5,w6", "--input", "{text}")
    assert capsys.readouterr().err == ""


def test_a_cell_with_line_breaks_is_counted_in_a_tsv_file_with_a_single_column(tmp_path, capsys):
    """Each of its lines was a row, without a word."""
    file = tmp_path / "rows.tsv"
    words = ("--labels", "w5,w6", "--input", "{text}")
    file.write_text('text\n"w3\nw4\nw5"\nw6\n"w7\nw8"\n')
    assert len(predicted(capsys, running.model("t5"), file, *words)) == 6
    predict(running.model("t5"), file, *words)
    assert capsys.readouterr().err == (
        "minia3: 2 cells of .tsv files are in quotes, with line breaks, which end rows here. The "
        "model reads all of these quotes: name the file .csv to leave them out\n"
    )
    file.rename(tmp_path / "rows.csv")
    assert len(predicted(capsys, running.model("t5"), tmp_path / "rows.csv", *words)) == 3
    # In other columns, and without a beginning or an end, quotes are ordinary characters.
    for content in ('text\tn\n"w3\t1\nw4"\t2\n', 'text\n"w3\n5" w4\n', 'text\nw3"\nw4"\n'):
        file.write_text(content)
        predict(running.model("t5"), file, *words)
        assert capsys.readouterr().err == ""


def test_an_empty_text_of_a_published_task_is_not_counted(tmp_path, capsys):
    file = write(tmp_path / "rows.jsonl", [{"premise": "w3", "hypothesis": ""}])
    predict(running.model("t5"), file, "--task", "rte")
    assert "is empty" not in capsys.readouterr().err


def test_the_columns_of_rows_with_another_adapter_do_not_count(adapters, tmp_path, capsys):
    words = ("--adapter", adapters, "--labels", "w5,w6", "--input", "{premise} {hypothesis}")
    rows = [
        {"premise": "w3", "adapter": "one"},
        {"premise": "w3", "hypothesis": "w4", "adapter": "two"},
    ]
    file = write(tmp_path / "rows.jsonl", rows)
    assert f"{file}:1: there is no column 'hypothesis'" in fails(
        capsys, running.model("t5"), file, *words
    )
    file = write(tmp_path / "rows.jsonl", [*rows, {**rows[1], "adapter": "one"}])
    assert len(predicted(capsys, running.model("t5"), file, *words)) == 3


def test_the_columns_of_a_table_are_found_also_if_a_row_has_empty_cells(tmp_path, capsys):
    """The rows looked as if they had no column of an input."""
    file = tmp_path / "rows.csv"
    file.write_text("premise,hypothesis\nw3,w4\nw3,\n,w4\n")
    words = (running.model("t5"), file, "--labels", "w5,w6")
    results = predicted(capsys, *words)
    assert results == predicted(capsys, *words, "--input", "{premise}\\n{hypothesis}")


@pytest.mark.parametrize("text", ["w7", "w8", "w9"])
def test_an_input_or_a_choice_without_tokens_is_named(text, tmp_path, capsys, monkeypatch):
    rows = [
        {"input": "w3", "choices": ["w4"]},
        {"input": "w7", "choices": ["w8", "w6"]},
        {"input": "w9"},
    ]

    def without_tokens(method):
        def encode(self, t, *args, **options):
            return [] if t == text else method(self, t, *args, **options)

        return encode

    for name in ("encode", "encode_target"):
        monkeypatch.setattr(Tokenizer, name, without_tokens(getattr(Tokenizer, name)))
    error = fails(capsys, running.model("t5"), write(tmp_path / "rows.jsonl", rows))
    assert f"rows.jsonl:{3 if text == 'w9' else 2}: no tokens" in error


# Files: csv, columns


def test_a_csv_file_is_read_and_a_csv_file_is_written(tmp_path, capsys):
    rows = [
        {"input": "w3 w4", "choices": ["w5", "w6, w7"]},
        {"input": "w8"},
        {"input": "w3 w4", "choices": ["w5", "w6 w7"]},
    ]
    file = tmp_path / "rows.csv"
    file.write_text(
        'input,choices\r\nw3 w4,"[""w5"", ""w6, w7""]"\r\nw8,\r\nw3 w4,w5|w6 w7\r\n', newline=""
    )
    expected = predicted(capsys, running.model("t5"), write(tmp_path / "rows.jsonl", rows))
    assert predicted(capsys, running.model("t5"), file) == expected
    predict(running.model("t5"), file, "--out", tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="") as f:
        header, *found = csv.reader(f)
    assert header == ["idx", "label", "choice", "scores", "output"]
    for cells, result in zip(found, expected, strict=True):
        assert cells[0] == str(result["idx"])
        if "output" in result:
            assert cells[1:] == ["", "", "", result["output"]]
        else:
            assert cells[1:] == [
                str(result["label"]),
                result["choice"],
                json.dumps(result["scores"]),
                "",
            ]


@pytest.mark.parametrize(
    "name",
    ["a.json", "lines.json", "a.jsonl.gz", "a.csv.gz", "semicolons.csv", "a.tsv", "a.parquet"],
)
def test_every_format_gives_the_same_answers(tmp_path, capsys, name):
    rows = [
        {"input": "w3 w4", "choices": ["w5", "w6 w7"]},
        {"input": "w8"},
        {"input": "w9 w3", "choices": ["w3", "w4"]},
    ]
    file = tmp_path / name
    if ".parquet" in name:
        pyarrow = pytest.importorskip("pyarrow", reason="pyarrow reads parquet files")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        file.write_bytes(in_format(name, rows))
    expected = predicted(capsys, running.model("t5"), write(tmp_path / "rows.jsonl", rows))
    assert predicted(capsys, running.model("t5"), file) == expected


def in_format(name, rows):
    """Return the content of a file of this name."""
    if ".jsonl" in name or "lines" in name:
        content = lines(rows)
    elif ".json" in name:
        content = json.dumps({"version": 1, "rows": rows})
    else:
        delimiter = {"s": ";", "t": "\t"}.get(name[0], ",")
        if name.endswith(".tsv"):
            delimiter = "\t"
        cells = [["input", "choices"]]
        cells += [[row["input"], "|".join(row.get("choices", []))] for row in rows]
        content = "".join(delimiter.join(line) + "\n" for line in cells)
    content = content.encode()
    return gzip.compress(content) if name.endswith(".gz") else content


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.xlsx", ".xlsx is not read: save the sheet as .csv, in UTF-8; expected "),
        ("a.json", "expected a list of objects, found '12'"),
        ("a.parquet", "damaged or cut short: "),
        ("a.jsonl.gz", "damaged or cut short: "),
        ("folder.csv", "a folder; expected a file, .jsonl, "),
        ("none.csv", "not found"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, capsys, name, words):
    if name.startswith("folder"):
        (tmp_path / name).mkdir()
    elif not name.startswith("none"):
        (tmp_path / name).write_text("12")
    error = fails(capsys, "tiny-t5", tmp_path / name)
    assert error.startswith(f"minia3: {tmp_path / name}: {words}")


def test_columns_make_the_file_that_a_leaderboard_wants(tmp_path, capsys):
    rows = [
        {"premise": "anna has a ball", "hypothesis": f"tom has {i} cups", "ID": 50 + i}
        for i in range(3)
    ]
    file = write(tmp_path / "rows.jsonl", rows)
    words = ["tiny-t5", file, "--task", "rte", "--columns", "ID,Label=word,choice"]
    predict(*words, "--out", tmp_path / "out.csv")
    results = predicted(capsys, "tiny-t5", file, "--task", "rte")
    with (tmp_path / "out.csv").open(newline="") as f:
        header, *found = csv.reader(f)
    assert header == ["ID", "Label", "choice"]
    assert found == [
        [str(50 + i), result["word"], result["choice"]] for i, result in enumerate(results)
    ]
    assert predicted(capsys, *words)[0] == {
        "ID": 50,
        "Label": results[0]["word"],
        "choice": results[0]["choice"],
    }
    assert "'Id' is not in row 0" in fails(
        capsys, "tiny-t5", file, "--task", "rte", "--columns", "Id"
    )


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.parquet"])
def test_a_column_that_a_row_leaves_empty_is_empty_in_the_results(tmp_path, capsys, name):
    """The columns have the names that they have in the file, and not those in the prompt."""
    notes = [None, "x", None]
    rows = [
        {"Key": f"k{n}", "Utterance": f"w{n + 3}", "Note": note} for n, note in enumerate(notes)
    ]
    file = tmp_path / name
    if ".parquet" in name:
        pyarrow = pytest.importorskip("pyarrow", reason="pyarrow reads parquet files")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        with file.open("w", newline="") as out:
            table = csv.DictWriter(out, list(rows[0]), delimiter="\t" if "tsv" in name else ",")
            table.writeheader()
            table.writerows(rows)
    entry = {
        "fields": {"Utterance": "said"},
        "labels": ["w3", "w4"],
        "prompts": [{"text": "{said} {key}"}],
    }
    (tmp_path / "mine.json").write_text(json.dumps(entry))
    words = [running.model("t5"), file, "--task", tmp_path / "mine.json", "--columns"]
    names = "Key,Utterance,said,Note,copy=Note"
    expected = [{**row, "said": row["Utterance"], "copy": row["Note"]} for row in rows]
    assert predicted(capsys, *words, names) == expected
    predict(*words, names, "--out", tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text().splitlines()[1:3] == [
        "k0,w3,w3,,",
        "k1,w4,w4,x,x",
    ]
    assert "'note' is not in row 0; it has Key, Utterance, " in fails(capsys, *words, "note")


def test_a_column_of_the_results_has_the_values_of_the_file_also_if_the_model_reads_it(
    tmp_path, capsys
):
    """Numbers were texts ("3" for 3.0), but only in the columns that the model reads."""
    row = {"n": 3.0, "yes": True, "list": [2.0], "id": 4.0, "text": None}
    file = write(tmp_path / "rows.jsonl", [row])
    names = ",".join(row)
    prompt = "{n} {yes} {list[0]} {text}"
    words = [running.model("t5"), file, "--input", prompt, "--labels", "w3,w4"]
    assert predicted(capsys, *words, "--columns", names) == [row]
    predict(*words, "--columns", names, "--out", tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text().splitlines()[1] == "3.0,true,[2.0],4.0,"


def test_a_pipe_may_have_rows_that_lack_a_column_of_others(tmp_path, capsys):
    rows = [{"input": "w3", "note": "a"}, {"input": "w4"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()

    def read_pipe(read, columns):
        reading, writing = os.pipe()
        os.write(writing, lines)
        os.close(writing)
        try:
            words = [running.model("t5"), f"/dev/fd/{reading}", "--columns", columns]
            return read(capsys, *words, "--max-new-tokens", 1)
        finally:
            os.close(reading)

    assert read_pipe(predicted, "note") == [{"note": "a"}, {"note": None}]
    assert "'nope' is not in row 0" in read_pipe(fails, "nope")


def test_a_name_that_is_given_twice_is_no_column_of_the_results(tmp_path, capsys):
    file = write(tmp_path / "rows.jsonl", running.rows(1))
    # This is found before the model, which does not exist.
    words = ["nowhere/to/be/found", file, "--columns", "a=idx,b=label,a=choice"]
    assert "--columns names 'a' twice" in fails(capsys, *words)


@pytest.mark.parametrize("row", [{"input": "w3"}, {"input": "w3", "Label": "w4"}])
def test_a_row_without_a_label_has_no_such_column(row, tmp_path, capsys):
    """It was -1 in each row."""
    file = write(tmp_path / "rows.jsonl", [row])
    entry = {"prompts": [{"text": "{input}", "target": "{answer}"}]}
    (tmp_path / "writes.json").write_text(json.dumps(entry))
    words = [running.model("t5"), file, "--task", tmp_path / "writes.json", "--columns"]
    assert "'label' is not in row 0; it has input, " in fails(capsys, *words, "idx,label")
    (found,) = predicted(capsys, *words, ",".join(row))
    assert found == row


def test_a_name_in_quotes_may_have_a_comma(tmp_path, capsys):
    """Such a column could not be named: it was taken for two."""
    row = {"input": "w3", "choices": ["w4", "w5"]}
    row |= {"a, b": 1, 'say "x"': 2, "x=y": 3, '5" pipe': 4, '"': 5}
    file = write(tmp_path / "rows.jsonl", [row])
    words = [running.model("t5"), file, "--columns"]
    names = '"a, b","say ""x""","x=y",5" pipe,"""",","=idx,c="a, b","d=1"="x=y",e=x=y,idx='
    expected = {"a, b": 1, 'say "x"': 2, "x=y": 3, '5" pipe': 4, '"': 5}
    expected |= {",": 0, "c": 1, "d=1": 3, "e": 3, "idx": 0}
    assert predicted(capsys, *words, names) == [expected]
    predict(*words, names, "--out", tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="") as f:
        header, *_ = csv.reader(f)
    assert header == list(expected)
    # The message has the names as they are to be typed.
    error = fails(capsys, *words, "a, b")
    assert """'a' is not in row 0; it has input, choices, "a, b", "say ""x""\", x=y, """ in error


def test_a_mistake_in_the_columns_does_not_keep_the_file_from_the_right_ones(tmp_path, capsys):
    file = write(tmp_path / "rows.jsonl", running.rows(2))
    out = tmp_path / "out.csv"
    words = [running.model("t5"), file, "--out", out, "--columns"]
    assert "'wrod' is not in row 0" in fails(capsys, *words, "idx,wrod")
    predict(*words, "idx,choice")
    assert out.read_text().splitlines()[0] == "idx,choice"
    file.write_text("")
    out.unlink()
    predict(*words, "idx,choice")
    assert out.read_text().splitlines() == ["idx,choice"]


@pytest.mark.parametrize("row", [{"output": "w4"}, {"choices": None}])
def test_the_answer_of_the_file_is_still_a_column_of_the_results(row, tmp_path, capsys):
    row = {"input": "w3", "target": "w9", **row}
    file = write(tmp_path / "rows.jsonl", [row, {"input": "w3"}])
    words = [running.model("t5"), file, "--max-new-tokens", 2, "--columns"]
    answered = predicted(capsys, *words[:-1], "--columns", "input,output")
    found = predicted(capsys, *words, "input,target,output")
    assert found == [{**answered[0], "target": "w9"}, {**answered[1], "target": None}]
    error = fails(capsys, *words, "input,goal,output")
    assert "'goal' is not in row 0; it has input, " in error
    write(file, [row])
    (found,) = predicted(capsys, *words, "input,target,output")
    assert found == {**answered[0], "target": "w9"}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_row_of_json_may_lack_a_column_that_others_have(name, tmp_path, capsys):
    """The command stopped in the middle of the file."""
    rows = [{"input": "w3"}, {"id": 1.5, "input": "w3"}]
    content = json.dumps(rows) if name.endswith(".json") else lines(rows)
    (tmp_path / name).write_text(content)
    words = [running.model("t5"), tmp_path / name, "--labels", "w4,w5", "--columns", "id,input"]
    assert predicted(capsys, *words) == [{"id": None, "input": "w3"}, {"id": 1.5, "input": "w3"}]
    predict(*words, "--out", tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text() == "id,input\n,w3\n1.5,w3\n"


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_column_of_the_file_stays_if_no_result_has_one_of_its_name(suffix, tmp_path, capsys):
    """It was null in every row, because the results of other rows might have had such a column."""
    ranked = ["--input", "{prompt}", "--labels", "w3,w4", "--columns", "output,label"]
    (tmp_path / "ranked.csv").write_text("prompt,output,label\nw5,first,w4\nw6,,w4\n")
    out = tmp_path / f"out{suffix}"
    predict(running.model("t5"), tmp_path / "ranked.csv", *ranked, "--out", out)
    found = out.read_text().splitlines()[-2:]
    labels = predicted(capsys, running.model("t5"), tmp_path / "ranked.csv", *ranked)
    assert [row["output"] for row in labels] == ["first", None]
    assert {type(row["label"]) for row in labels} == {int}
    if suffix == ".csv":
        assert found == [f"first,{labels[0]['label']}", f",{labels[1]['label']}"]
    else:
        assert [json.loads(line) for line in found] == labels
    # If it is not known before how rows are answered, the column is that of the results.
    (tmp_path / "any.jsonl").write_text('{"input": "w3", "output": "w9", "choices": ["w4", "w5"]}')
    words = [running.model("t5"), tmp_path / "any.jsonl", "--columns", "output"]
    assert predicted(capsys, *words) == [{"output": None}]


def test_an_empty_cell_is_not_filled_by_a_column_that_is_not_read(tmp_path, capsys):
    task = write(tmp_path / "task.json", [{"fields": {"clean": "text"}, "labels": ["w8", "w9"]}])
    (tmp_path / "rows.csv").write_text("clean,text\nw4,w5\n,w5\n")
    words = (running.model("t5"), tmp_path / "rows.csv", "--task", task, "--input", "{text}")
    assert "rows.csv:3: 'clean' has no value, expected a text" in fails(capsys, *words)


def test_the_idx_of_a_row_is_that_of_its_file_if_it_is_an_integer(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    ids = ("17", "-3", "q7", "", "07", "100.0")
    path.write_text("idx,input,choices\n" + "".join(f"{idx},w4,w5|w6\n" for idx in ids))
    found = predicted(capsys, running.model("t5"), path, "--columns", "idx,choice")
    assert [result["idx"] for result in found] == [17, -3, 2, 3, 4, 100]


# Pipes


def test_a_pipe_is_read_once_also_if_a_bar_shows_the_progress(tmp_path, capsys, monkeypatch):
    file = write(tmp_path / "rows.jsonl", running.rows(5))
    whole = tmp_path / "whole.jsonl"
    predict(running.model("t5"), file, "--out", whole)
    out = tmp_path / "out.jsonl"
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    for written in (b"", whole.read_bytes()[:-3]):  # a new file, and one that is continued
        out.write_bytes(written)
        reading, writing = os.pipe()
        os.write(writing, file.read_bytes())
        os.close(writing)
        predict(running.model("t5"), f"/dev/fd/{reading}", "--out", out)
        os.close(reading)
        assert out.read_bytes() == whole.read_bytes()


def test_standard_input_may_be_a_socket(tmp_path, capsys):
    """Node connects a process by sockets, and a socket cannot be opened by a path."""
    file = write(tmp_path / "rows.jsonl", running.rows(3))
    expected = predicted(capsys, running.model("t5"), file)
    ours, theirs = socket.socketpair()
    words = ["predict", str(running.model("t5")), "-", "--device", "cpu"]
    command = [sys.executable, "-m", "minia3", *words]
    process = subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, cwd=running.ROOT)
    theirs.close()
    ours.sendall(file.read_bytes())
    ours.close()
    output, _ = process.communicate()
    assert process.returncode == 0
    assert list(map(json.loads, output.splitlines())) == expected


def test_results_for_the_device_of_standard_output_are_printed(tmp_path, capsys):
    """Whatever opens it a second time writes over what the process prints."""
    file = write(tmp_path / "rows.jsonl", running.rows(3))
    expected = predicted(capsys, running.model("t5"), file)
    assert predicted(capsys, running.model("t5"), file, "--out", "/dev/stdout") == expected


def test_a_mistake_in_the_names_of_files_is_found_before_anything_is_loaded(
    tmp_path, capsys, monkeypatch
):
    def load_model(*args, **options):
        raise AssertionError("the model is loaded")

    monkeypatch.setattr("minia3.checkpoints.load.load_model", load_model)
    file = write(tmp_path / "rows.jsonl", running.rows(3))
    (tmp_path / "results").mkdir()
    model = running.model("t5")
    assert "nowhere.jsonl: not found" in fails(capsys, model, tmp_path / "nowhere.jsonl")
    assert "rows.cvs: .cvs is not read" in fails(capsys, model, tmp_path / "rows.cvs")
    assert "results: a folder; expected a file" in fails(capsys, model, tmp_path / "results")
    error = fails(capsys, model, file, "--out", tmp_path / "results")
    assert f"--out is {tmp_path / 'results'}, a folder: expected a file" in error


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv"])
def test_the_bar_counts_rows_and_warnings_stand_above_it(name, tmp_path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr("minia3.files.progress.INTERVAL", 0)
    file = write(tmp_path / "rows.jsonl", [*running.rows(3), {"premise": "w3", "hypothesis": ""}])
    predict(running.model("t5"), file, "--out", tmp_path / name)
    assert re.findall(r"predicting: .*?(\d+/\d+) ", terminal.getvalue())[-1] == "4/4"
    assert "predicting: 5it" not in terminal.getvalue()  # tqdm drops a total that has been passed
    warnings = re.findall(r"([^\r\n]*)minia3: [^\n]*\n", terminal.getvalue())
    assert warnings == ["", ""]  # on an empty column, and on texts that were cut


def test_a_dash_is_standard_input_or_output(tmp_path, capsys, monkeypatch):
    file = write(tmp_path / "rows.jsonl", running.rows(3))
    expected = predicted(capsys, running.model("t5"), file)
    monkeypatch.chdir(tmp_path)
    assert predicted(capsys, running.model("t5"), file, "--out", "-") == expected
    assert not Path("-").exists()
    standard_input = os.dup(0)
    try:
        with file.open() as rows:
            os.dup2(rows.fileno(), 0)
            assert predicted(capsys, running.model("t5"), "-") == expected
        reading, writing = os.pipe()
        os.write(writing, file.read_bytes())
        os.close(writing)
        os.dup2(reading, 0)
        os.close(reading)
        assert predicted(capsys, running.model("t5"), "-") == expected
    finally:
        os.dup2(standard_input, 0)
        os.close(standard_input)


def test_a_pipe_is_not_asked_for_its_columns(tmp_path, capsys, monkeypatch):
    def read_again(path):
        raise AssertionError(f"{path} is read a second time")

    monkeypatch.setattr("minia3.tasks.row_files.column_names", read_again)
    reading, writing = os.pipe()
    os.write(writing, lines(running.rows(1)).encode())
    os.close(writing)
    error = fails(capsys, running.model("t5"), f"/dev/fd/{reading}", "--columns", "note")
    os.close(reading)
    assert "'note' is not in row 0; it has input, " in error


# Folders that a killed process has left


def leave_unfinished(folder):
    """Leave a folder as a kill does if the files are written, and not yet in their places."""
    paths = list(folder.iterdir())
    (folder / ".written").mkdir()
    for path in paths:
        path.rename(folder / ".written" / path.name)


def test_a_folder_that_a_killed_process_has_written_is_finished(adapters, tmp_path, capsys):
    for name in ("one", "two"):
        task = {"labels": ["w3", "w4"], "prompts": [{"text": f"{{input}} w{len(name)}"}]}
        (adapters / name / "task.json").write_text(json.dumps(task))
    rows = [{"input": "w9 w5", "adapter": name} for name in ("one", "two")]
    file = write(tmp_path / "rows.jsonl", rows)
    expected = predicted(capsys, running.model("t5"), file, "--adapter", adapters)
    assert all(result["choice"] in ("w3", "w4") for result in expected)
    for name in ("one", "two"):
        leave_unfinished(adapters / name)
    assert predicted(capsys, running.model("t5"), file, "--adapter", adapters) == expected

    single = write(tmp_path / "single.jsonl", [{"input": "w9 w5"}])
    alone = predicted(capsys, running.model("t5"), single, "--adapter", adapters / "one")
    leave_unfinished(adapters / "one")
    assert predicted(capsys, running.model("t5"), single, "--adapter", adapters / "one") == alone


def test_a_model_that_a_killed_process_has_written_is_finished(tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(running.model("t5"), model)
    task = {"labels": ["w3", "w4"], "prompts": [{"text": "{input}"}]}
    (model / "task.json").write_text(json.dumps(task))
    file = write(tmp_path / "rows.jsonl", [{"input": "w9 w5"}])
    expected = predicted(capsys, model, file)
    assert expected[0]["choice"] in ("w3", "w4")
    leave_unfinished(model)
    assert predicted(capsys, model, file) == expected


# A file that was begun


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr("minia3.inference.prediction.CHUNK", 4)


def results_in(path):
    """Return the results in a .jsonl or .csv file."""
    if path.suffix == ".jsonl":
        results = [json.loads(line) for line in path.read_text().splitlines()]
    else:
        with path.open(newline="") as file:
            results = list(csv.DictReader(file))
        for result in results:
            result["scores"] = json.loads(result["scores"] or "null")
    return results


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_file_that_was_cut_anywhere_is_completed(kind, tmp_path, small_chunks):
    rows = running.rows(9, n_choices=(2, 0, 3))
    rows[3]["choices"] = ['w5 "\n,"', "w6\r\n"]  # quotes and line breaks, as csv may have them
    file = write(tmp_path / "rows.jsonl", rows)
    words = [running.model("t5"), file, "--max-new-tokens", 3, "--out"]
    whole = tmp_path / f"whole.{kind}"
    predict(*words, whole)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    text = whole.read_bytes()
    assert [str(result["idx"]) for result in results_in(whole)] == [str(i) for i in range(9)]

    ends = [i + 1 for i, byte in enumerate(text) if byte == 10]
    before_ends = [end - 1 for end in ends]
    cuts = {0, 1, *ends, *before_ends, *random.Random(0).sample(range(len(text)), 5)}
    out = tmp_path / f"out.{kind}"
    for cut in sorted(cuts):
        out.write_bytes(text[:cut])
        predict(*words, out)
        assert out.read_bytes() == text, cut


def test_finished_lines_stay_and_only_the_chunks_of_other_rows_are_answered(
    tmp_path, monkeypatch, small_chunks
):
    out = tmp_path / "out.jsonl"
    words = [running.model("t5"), write(tmp_path / "rows.jsonl", running.rows(12)), "--out", out]
    predict(*words)
    finished = [line + "\n" for line in out.read_text().splitlines()]
    mark = '{"idx": 8, "mine": true}\n'  # nobody compares the lines with the results
    out.write_text("".join(finished[:8]) + mark + finished[9][:-5])
    n_scored = []
    score = score_examples

    def count(model, examples, *args, **options):
        n_scored.append(len(examples))
        return score(model, examples, *args, **options)

    monkeypatch.setattr("minia3.inference.prediction.score_examples", count)
    predict(*words)
    assert n_scored == [4]  # rows 8 to 11, because whole chunks have the bits of an unbroken run
    assert out.read_text().startswith("".join(finished[:8]) + mark)
    assert [result["idx"] for result in results_in(out)] == list(range(12))


def test_a_finished_file_stays_and_the_command_says_so(tmp_path, capsys, small_chunks):
    out = tmp_path / "out.jsonl"
    words = [running.model("t5"), write(tmp_path / "rows.jsonl", running.rows(9)), "--out", out]
    contents = []
    for note in ("", ": all 9 rows were there before"):
        capsys.readouterr()
        predict(*words)
        assert capsys.readouterr().out == f"{out} is finished{note}\n"
        contents.append(out.read_bytes())
    assert contents[0] == contents[1]
    assert contents[0].count(b"\n") == 9


def test_results_are_on_disk_before_the_next_chunk_is_read(tmp_path, monkeypatch, small_chunks):
    out = tmp_path / "out.jsonl"
    n_lines = []
    score = score_examples

    def look(*args, **options):
        n_lines.append(out.read_text().count("\n"))
        return score(*args, **options)

    monkeypatch.setattr("minia3.inference.prediction.score_examples", look)
    predict(running.model("t5"), write(tmp_path / "rows.jsonl", running.rows(10)), "--out", out)
    assert n_lines == [0, 4, 8]


def test_a_csv_file_with_other_columns_is_not_appended_to(tmp_path, capsys):
    out = tmp_path / "out.csv"
    file = write(tmp_path / "rows.jsonl", running.rows(4))
    predict(running.model("t5"), file, "--out", out)
    lines_of_file = out.read_bytes().splitlines(keepends=True)
    for n_bytes in (3, len(lines_of_file[0]), len(b"".join(lines_of_file[:2]))):
        text = b"".join(lines_of_file)[:n_bytes]
        out.write_bytes(text)
        words = ["--out", out, "--columns", "label,choice"]
        error = fails(capsys, running.model("t5"), file, *words)
        assert f"{out} is not a file of these results" in error
        assert out.read_bytes() == text


@pytest.mark.parametrize("flags", [[], ["--columns", "label,choice"], ["--columns", "idx,choice"]])
def test_json_lines_with_other_columns_are_not_appended_to(tmp_path, capsys, flags):
    out = tmp_path / "out.jsonl"
    file = write(tmp_path / "rows.jsonl", running.rows(4))
    predict(running.model("t5"), file, "--out", out, *flags)
    whole = out.read_bytes()
    first, *_ = whole.splitlines(keepends=True)
    for columns in ("label,choice", "idx,choice", "idx", "idx,choice,label", "ID=idx"):
        if columns in flags:
            continue
        error = fails(capsys, running.model("t5"), file, "--out", out, "--columns", columns)
        assert f"{out} is not a file of these results" in error
        assert out.read_bytes() == whole
    out.write_bytes(first)
    predict(running.model("t5"), file, "--out", out, *flags)
    assert out.read_bytes() == whole


@pytest.mark.parametrize(
    "text", ["mine\n", "mine", "[1, 2]\n", " \n", '{"a": 1}', '{"a": 1}\n', '{"idx": 0, "a": 1}\n']
)
@pytest.mark.parametrize("name", ["notes", "notes.jsonl", "notes.csv"])
def test_another_file_is_not_appended_to(name, text, tmp_path, capsys):
    out = tmp_path / name
    out.write_text(text)
    file = write(tmp_path / "rows.jsonl", running.rows(3))
    assert "is not a file of these results" in fails(
        capsys, running.model("t5"), file, "--out", out
    )
    assert out.read_text() == text


def test_results_before_a_bad_row_are_kept_and_completed_when_it_is_mended(
    tmp_path, capsys, small_chunks
):
    rows = running.rows(12)
    out = tmp_path / "out.jsonl"
    file = write(tmp_path / "rows.jsonl", rows)
    predict(running.model("t5"), file, "--out", out)
    text = out.read_text()
    out.unlink()
    file.write_text(lines(rows[:9]) + "{\n" + lines(rows[10:]))
    assert f"{file}:10: " in fails(capsys, running.model("t5"), file, "--out", out)
    assert out.read_text() == "".join(text.splitlines(keepends=True)[:8])
    # Nothing hidden stays in the folder.
    assert {path.name for path in tmp_path.iterdir()} == {file.name, out.name}
    write(file, rows)
    predict(running.model("t5"), file, "--out", out)
    assert out.read_text() == text  # the chunks are the same, so the bits are


def test_two_processes_do_not_write_the_same_file(tmp_path, capsys, monkeypatch):
    """The second begins while the first answers its rows."""
    out = tmp_path / "out.jsonl"
    file = write(tmp_path / "rows.jsonl", running.rows(5))
    score = score_examples

    def begin_second(*args, **options):
        monkeypatch.setattr("minia3.inference.prediction.score_examples", score)
        error = fails(capsys, running.model("t5"), file, "--out", out)
        assert f"{out}: another run is writing there" in error
        predict(running.model("t5"), file, "--out", tmp_path / "other.jsonl")  # it is free
        return score(*args, **options)

    monkeypatch.setattr("minia3.inference.prediction.score_examples", begin_second)
    predict(running.model("t5"), file, "--out", out)
    assert out.read_text() == (tmp_path / "other.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(),
    reason="only Linux tells a process's peak since its start",
)
def test_memory_does_not_grow_with_the_file(tmp_path):
    peaks = []
    for n in (300, 3_000):
        file = tmp_path / f"{n}.jsonl"
        out = tmp_path / f"{n}.out.jsonl"
        file.write_text(
            (json.dumps({"input": "w3 w4", "choices": ["w5", "w6"], "note": "x" * 4000}) + "\n") * n
        )
        words = ["predict", running.model("t5"), file, "--out", out]
        words += ["--batch-size", 256, "--device", "cpu"]
        peaks.append(running.in_new_process(peak_of_command, words))
        assert out.read_text().count("\n") == n
    assert peaks[1] < peaks[0] + 5e6  # the larger file has 12 MB


def peak_of_command(words):
    """Run a command of minia3. Return the most memory that this process has had, in bytes."""
    assert main([str(word) for word in words]) == 0
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


# The disk


def test_ctrl_c_says_that_the_same_command_continues(tmp_path, monkeypatch, capsys):
    rows = write(tmp_path / "rows.jsonl", running.rows(2))
    out = tmp_path / "out.jsonl"
    words = ["predict", running.model("t5"), rows, "--out", out, "--device", "cpu"]

    def stop(path, file, lines):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(result_file, "write_lines", stop)
        capsys.readouterr()
        assert main([str(word) for word in words]) == 130
    assert capsys.readouterr().err == f"minia3: stopped; the same command continues {out}\n"
    assert main([str(word) for word in words]) == 0
    assert len(out.read_text().splitlines()) == 2


def test_a_second_ctrl_c_does_not_keep_predict_from_saying_that_it_can_continue(
    tmp_path, monkeypatch
):
    rows = write(tmp_path / "rows.jsonl", running.rows(2))
    out = tmp_path / "out.jsonl"
    handled = []

    def stop(path, file, lines):
        raise KeyboardInterrupt

    def print_error(text):
        handled.append((text, CtrlC.is_ignored))

    monkeypatch.setattr(result_file, "write_lines", stop)
    monkeypatch.setattr("minia3.cli.predict.print_error", print_error)
    words = ["predict", running.model("t5"), rows, "--out", out, "--device", "cpu"]
    assert main([str(word) for word in words]) == 130
    assert handled == [(f"minia3: stopped; the same command continues {out}", True)]
    assert not CtrlC.is_ignored


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_a_full_disk_is_one_line_and_the_file_ends_at_its_last_whole_row(
    form, tmp_path, monkeypatch, capsys
):
    rows = write(tmp_path / "rows.jsonl", running.rows(20))
    whole = tmp_path / f"whole.{form}"
    predict(running.model("t5"), rows, "--out", whole)
    limit = whole.stat().st_size * 2 // 3

    class Disk(io.FileIO):
        """A file on a disk that takes `limit` bytes in all."""

        def write(self, data):
            room = limit - self.seek(0, 2)
            if room == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data[:room])

    open_path = Path.open

    def open_on_disk(path, mode="r", **options):
        is_raw = options.get("buffering") == 0
        return Disk(path, "a+") if is_raw else open_path(path, mode, **options)

    out = tmp_path / f"out.{form}"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_on_disk)
        capsys.readouterr()
        words = ["predict", running.model("t5"), rows, "--out", out, "--device", "cpu"]
        assert main([str(word) for word in words]) == 1
    assert capsys.readouterr().err == f"minia3: [Errno 28] No space left on device: '{out}'\n"
    written = out.read_bytes()
    assert written.endswith(b"\n")
    assert whole.read_bytes().startswith(written)
    assert 0 < len(written) < limit
    predict(running.model("t5"), rows, "--out", out)  # there is room again
    assert out.read_bytes().startswith(written)
    assert len(out.read_bytes().splitlines()) == len(whole.read_bytes().splitlines())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("column", ["label", "idx,label"])
def test_a_device_that_is_full_is_one_line(column, tmp_path, capsys):
    rows = write(tmp_path / "rows.jsonl", running.rows(3))
    words = ["predict", running.model("t5"), rows, "--out", "/dev/full", "--columns", column]
    capsys.readouterr()
    assert main([str(word) for word in words]) == 1
    assert capsys.readouterr().err == "minia3: [Errno 28] No space left on device: '/dev/full'\n"
