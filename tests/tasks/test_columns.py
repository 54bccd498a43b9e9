"""The usual columns are recognised, the user's word comes before them, and the run says in a line
how it understood the file.
"""

import gzip
import json
import re

import pytest
from task_files import lines

from minia3.tasks.column_flags import ColumnFlags, with_flags
from minia3.tasks.columns import COLUMN_SETS, EXPECTED, ColumnNames
from minia3.tasks.prompts import render
from minia3.tasks.rows import PREDICTED, normalize_row, without_target
from minia3.tasks.splits import load_task
from minia3.tasks.task import TaskSpec
from minia3.tasks.task_file import make_entry, read_entry, read_task_file
from minia3.tasks.understanding import guess_task, has_columns


def load(tmp_path, *rows, **flags):
    """Return the task of these rows, three times each, so that the file can be split."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(*rows * 3))
    return load_task(path, **flags)


def load_described(tmp_path, entry, *rows, **flags):
    """Return the task of these rows, three times each, as a task file describes them."""
    (tmp_path / "rows.jsonl").write_bytes(lines(*rows * 3))
    (tmp_path / "task.json").write_text(json.dumps({"files": "rows.jsonl", **entry}))
    return load_task(tmp_path / "task.json", **flags)


def rendered(task):
    """Return the input, the choices and the label of each row, in the order of the file."""
    rows = sorted([*task.train, *task.validation, *task.test], key=lambda row: row["idx"])
    return [tuple(render(task.prompts[0], row)) for row in rows[: len(rows) // 3]]


LABELED = [
    # names of the columns of a row, its input, and how the line begins
    ({"text": "a"}, "a", "reads text"),
    ({"sentence": "a"}, "a", "reads sentence"),
    ({"question": "a"}, "a", "reads question"),
    ({"input": "a"}, "a", "reads input"),
    ({"sentence1": "a", "sentence2": "b"}, "a\nb", "reads sentence1 and sentence2"),
    ({"premise": "a", "hypothesis": "b"}, "a\nb", "reads premise and hypothesis"),
    ({"question": "a", "sentence": "b"}, "a\nb", "reads question and sentence"),
    ({"question": "a", "passage": "b"}, "b\na", "reads passage and question"),
    ({"question": "a", "context": "b"}, "b\na", "reads context and question"),
]


@pytest.mark.parametrize(("row", "text", "line"), LABELED, ids=[line for _, _, line in LABELED])
def test_rows_with_a_label_are_put_into_words(row, text, line, tmp_path):
    task = load(tmp_path, {**row, "label": "good"}, {**row, "label": "bad", "source": "x"})
    assert rendered(task) == [(text, ["good", "bad"], 0), (text, ["good", "bad"], 1)]
    assert task.columns == f"{line}, picks label among good, bad; ignores source"
    assert (task.metric, task.answer) == ("accuracy", "choices")


WRITTEN = [
    ({"input": "a", "target": "z"}, "a", "reads input, writes target"),
    ({"input": "a", "output": "z"}, "a", "reads input, writes output"),
    ({"prompt": "a", "completion": " z"}, "a", "reads prompt, writes completion"),
    ({"question": "a", "answer": "z"}, "a", "reads question, writes answer"),
    (
        {"question": "a", "context": "b", "answer": "z"},
        "b\na",
        "reads context and question, writes answer",
    ),
    (
        {"question": "a", "passage": "b", "answer": "z"},
        "b\na",
        "reads passage and question, writes answer",
    ),
    (
        {"instruction": "a", "context": "b", "response": "z"},
        "a\nb",
        "reads instruction and context, writes response",
    ),
    (
        {"instruction": "a", "input": "b", "output": "z"},
        "a\nb",
        "reads instruction and input, writes output",
    ),
    ({"instruction": "a", "output": "z"}, "a", "reads instruction, writes output"),
]


@pytest.mark.parametrize(("row", "text", "line"), WRITTEN, ids=[line for _, _, line in WRITTEN])
def test_rows_with_a_text_to_write_are_put_into_words(row, text, line, tmp_path):
    task = load(tmp_path, row)
    assert rendered(task) == [(text, ["z"], 0)]
    assert task.columns == line
    assert (task.metric, task.answer) == ("exact_match", "target")


def test_rows_with_choices_of_their_own_pick_by_index_or_by_word(tmp_path):
    row = {"input": "a", "choices": ["x", "y"]}
    task = load(tmp_path, {**row, "label": 1}, {**row, "label": "x"}, {**row, "label": " Y "})
    assert [label for _, _, label in rendered(task)] == [1, 0, 1]
    assert task.columns == "reads input, picks label among the row's choices"
    asked = {"question": "a", "choices": ["x", "y"], "answer": "y"}
    task = load(tmp_path, asked)
    assert rendered(task) == [("a", ["x", "y"], 1)]
    assert task.columns == "reads question, picks answer among the row's choices"


def test_choices_with_letters_are_picked_by_their_letter(tmp_path):
    """This is the form of ARC, CommonsenseQA and OpenBookQA."""
    choices = {"text": ["x", "y", "2"], "label": ["A", "B", "C"]}
    row = {"question": "a", "choices": choices, "answerKey": "B"}
    numbered = {**row, "choices": {**choices, "label": ["1", "2", "3"]}, "answerKey": "2"}
    task = load(tmp_path, row, numbered, {**row, "AnswerKey": "x", "answerKey": "x"})
    assert rendered(task) == [("a", ["x", "y", "2"], label) for label in (1, 1, 0)]
    assert task.columns == (
        "reads question, picks answerKey among the row's choices; ignores AnswerKey"
    )
    stem = {"question_stem": "a", "choices": choices, "answerKey": "C"}
    assert rendered(load(tmp_path, stem, input="{question_stem}")) == [("a", ["x", "y", "2"], 2)]
    hidden = normalize_row(row | {"answerKey": ""}, task.spec, "test", 0)
    assert (hidden["label"], hidden["choices"]) == (-1, ["x", "y", "2"])
    assert normalize_row(dict(row), task.spec, PREDICTED, 0)["choices"] == ["x", "y", "2"]
    cells = json.dumps(choices).replace('"', '""')
    text = f'question,choices,answerKey\n"a","{cells}",B\n'
    (tmp_path / "rows.csv").write_text(text + text.split("\n")[1] + "\n" + text.split("\n")[1])
    assert load_task(tmp_path / "rows.csv").train[0]["label"] == 1
    with pytest.raises(ValueError, match=r"'answerKey' is 'D', expected one of 0, 1, 2 or one of"):
        load(tmp_path, {**row, "answerKey": "D"})
    with pytest.raises(ValueError, match=r"'choices' is \{.*expected a list of texts"):
        load(tmp_path, {**row, "choices": {**choices, "label": ["A"]}})
    flags = {"input": "{question} {choices[text][0]}", "target": "{answerKey}", "labels": "A,B"}
    assert rendered(load(tmp_path, row, **flags)) == [("a x", ["A", "B"], 1)]


def test_rows_with_lists_of_choices_pick_among_them_if_a_task_file_names_their_column(tmp_path):
    rows = [{"question": "a", "options": ["x", "y"], "answer": n} for n in (1, 0)]
    task = load_described(tmp_path, {"fields": {"options": "choices"}}, *rows)
    assert rendered(task) == [("a", ["x", "y"], 1), ("a", ["x", "y"], 0)]


def test_what_an_adapter_has_learned_does_not_count_if_something_else_is_said(tmp_path):
    learned = load(tmp_path, {"text": "a", "label": "x"}, {"text": "b", "label": "y"}).spec
    rows = [{"text": "c", "label": "y"}, {"text": "d", "label": "x"}]
    for said in ({}, {"metric": "macro_f1"}):
        task = load(tmp_path, *rows, like=learned, **said)
        assert rendered(task) == [("c", ["x", "y"], 1), ("d", ["x", "y"], 0)]
    task = load(tmp_path, *rows, like=learned, input="{text}!")
    assert rendered(task) == [("c!", ["y", "x"], 0), ("d!", ["y", "x"], 1)]
    task = load_described(tmp_path, {"prompts": [{"text": "{text}?"}]}, *rows, like=learned)
    assert rendered(task) == [("c?", ["y", "x"], 0), ("d?", ["y", "x"], 1)]


def test_rows_keep_their_choices_in_the_words_that_an_adapter_has_learned(tmp_path):
    rows = [{"question": f"q{i}", "choices": ["x", f"y{i}"], "answer": i} for i in range(2)]
    trained = load(tmp_path, *rows)
    evaluated = load(tmp_path, *rows, like=trained.spec)
    assert rendered(evaluated) == [("q0", ["x", "y0"], 0), ("q1", ["x", "y1"], 1)]
    assert evaluated.columns == trained.columns
    assert evaluated.spec == trained.spec._replace(is_learned=True)


def test_rows_that_are_answered_otherwise_are_not_put_into_learned_words(tmp_path):
    row = {"question": "a", "choices": ["x", "y"]}
    learned = load(tmp_path, {**row, "answer": "y"}).spec
    task = load(tmp_path, {**row, "label": "y"}, like=learned)
    assert task.columns == "reads question, picks label among the row's choices"
    task = load(tmp_path, {"question": "a", "answer": "y"}, like=learned)
    assert task.columns == "reads question, writes answer"
    assert not any("learned" in note for note in task.notes)


def test_a_task_file_that_names_only_the_label_keeps_the_choices_of_the_rows(tmp_path):
    rows = [{"title": "a", "choices": ["x", "y"], "gold": word} for word in ("y", "x")]
    entry = {"label_field": "gold", "prompts": [{"text": "{title}?"}]}
    task = load_described(tmp_path, entry, *rows)
    assert rendered(task) == [("a?", ["x", "y"], 1), ("a?", ["x", "y"], 0)]
    assert task.columns == "reads title, picks gold among the row's choices"
    # If the task file says among what to pick, then the rows do not.
    task = load_described(tmp_path, {**entry, "labels": ["y", "x"]}, *rows)
    assert rendered(task) == [("a?", ["y", "x"], 0), ("a?", ["y", "x"], 1)]
    assert task.columns == "reads title, picks gold among y, x; ignores choices"
    words = {"labels": ["y", "x"], "choices": ["first", "second"]}
    task = load_described(tmp_path, {**entry, **words}, *rows)
    assert rendered(task) == [("a?", ["first", "second"], 0), ("a?", ["first", "second"], 1)]
    usual = [{"text": "a", "choices": ["x", "y"], "label": word} for word in ("y", "x")]
    prompts = [{"text": "{text}", "choices": ["X", "Y"]}]
    task = load_described(tmp_path, {"prompts": prompts}, *usual)
    assert rendered(task) == [("a", ["X", "Y"], 1), ("a", ["X", "Y"], 0)]
    task = load_described(tmp_path, {"labels": ["x", "y"]}, *usual)
    assert task.columns == "reads text, picks label among x, y; ignores choices"
    assert load(tmp_path, *usual, labels="x,y").columns == task.columns


@pytest.mark.parametrize("first", ["positive", "negative"])
def test_a_word_means_the_choice_that_is_spelled_like_it(first, tmp_path):
    texts = {"Positive": "I loved it", "Negative": "a waste"}
    rows = [{"text": text, "label": word} for word, text in texts.items()]
    if first == "negative":
        rows.reverse()
    other_words = {"text": "{text} Praise?", "choices": ["no", "yes"]}
    choices = ["negative", "positive"]
    entry = {"choices": choices, "prompts": [other_words, {"text": "{text}"}]}
    task = load_described(tmp_path, entry, *rows)
    assert task.spec.labels == ("Negative", "Positive")
    for row in task.train:
        for prompt, right in zip(task.prompts, (["no", "yes"], choices), strict=True):
            _, found, label = render(prompt, row)
            assert found[label] == right[row["text"] == "I loved it"]


def test_words_that_are_not_the_choices_need_labels_which_have_an_order(tmp_path):
    rows = [{"text": "a", "label": word} for word in ("pos", "neg")]
    for choices in (["negative", "positive"], ["{text}", "no"], ["neg", "neutral", "pos"]):
        entry = {"choices": choices, "prompts": [{"text": "{text}"}]}
        with pytest.raises(ValueError, match=r"the labels pos, neg, but .*: give 'labels' in the"):
            load_described(tmp_path, entry, *rows)
        task = load_described(tmp_path, entry, *rows, labels="neg,pos")
        assert rendered(task) == [("a", ["neg", "pos"], 1), ("a", ["neg", "pos"], 0)]


def test_words_of_a_flag_that_are_the_labels_of_a_task_file_stand_for_themselves(tmp_path):
    rows = [{"text": "a", "label": word} for word in ("pos", "neg")]
    entry = {"labels": ["neg", "pos"], "prompts": [{"text": "{text}", "choices": ["no", "yes"]}]}
    for asked in ("neg,pos", "pos,neg"):
        task = load_described(tmp_path, entry, *rows, labels=asked)
        assert rendered(task) == [("a", ["neg", "pos"], 1), ("a", ["neg", "pos"], 0)]


def test_words_of_a_flag_that_are_the_choices_of_a_task_keep_their_meaning_in_any_order(tmp_path):
    """The first of them stood for neg, which had the word no."""
    rows = [{"text": "a", "label": word} for word in ("pos", "neg")]
    entry = {"labels": ["neg", "pos"], "prompts": [{"text": "{text}", "choices": ["no", "yes"]}]}
    for asked in ("no,Yes", "Yes,no"):
        task = load_described(tmp_path, entry, *rows, labels=asked)
        assert rendered(task) == [("a", ["no", "Yes"], 1), ("a", ["no", "Yes"], 0)]
    learned = load_described(tmp_path, entry, *rows).spec
    for asked in ("no,yes", "yes,no"):
        assert with_flags(learned, ColumnFlags(labels=asked)) == learned
    changed = with_flags(learned, ColumnFlags(labels="yes,good"))
    assert changed.prompts[0].choices == ("yes", "good"), "other words are in the order of labels"


def test_words_of_a_flag_may_be_the_choices_of_any_prompt(tmp_path):
    rows = [{"text": "a", "label": word} for word in ("pos", "neg")]
    prompts = [{"text": "{text}", "choices": words} for words in (["no", "yes"], ["bad", "good"])]
    entry = {"labels": ["neg", "pos"], "prompts": prompts}
    task = load_described(tmp_path, entry, *rows, labels="good,bad")
    assert rendered(task) == [("a", ["bad", "good"], 1), ("a", ["bad", "good"], 0)]
    learned = load_described(tmp_path, entry, *rows).spec
    changed = with_flags(learned, ColumnFlags(labels="good,bad"))
    assert [prompt.choices for prompt in changed.prompts] == [("bad", "good")] * 2


@pytest.mark.parametrize("values", [(1, 0), (True, False)])
def test_integers_and_booleans_have_an_order_of_their_own(values, tmp_path):
    rows = [{"text": "a", "label": value} for value in values]
    entry = {"choices": ["no", "yes"], "prompts": [{"text": "{text}"}]}
    task = load_described(tmp_path, entry, *rows)
    assert [label for _, _, label in rendered(task)] == [1, 0]
    # But if the choices have the same words, they say it themselves.
    words = [str(value).lower() for value in values]
    entry = {"choices": words, "prompts": [{"text": "{text}"}]}
    task = load_described(tmp_path, entry, *rows)
    assert rendered(task) == [("a", words, 0), ("a", words, 1)]


def test_the_choices_of_a_prompt_come_before_a_column_that_could_be_written(tmp_path):
    rows = [{"q": "a", "target": "z", "label": label} for label in (1, 0)]
    task = load_described(tmp_path, {"prompts": [{"text": "{q}", "choices": ["no", "yes"]}]}, *rows)
    assert rendered(task) == [("a", ["no", "yes"], 1), ("a", ["no", "yes"], 0)]
    task = load_described(tmp_path, {"prompts": [{"text": "{q}"}]}, *rows)
    assert rendered(task) == [("a", ["z"], 0)] * 2


def test_a_target_that_no_prompt_names_is_a_text():
    row = normalize_row({"input": "a", "target": 3.0}, TaskSpec(), "train", 0)
    assert render(TaskSpec().prompts[0], row) == ("a", ["3"], 0)
    with pytest.raises(ValueError, match="'target' is ' ', expected a text that is not empty"):
        normalize_row({"input": "a", "target": " "}, TaskSpec(), "train", 0)


def test_columns_that_are_choices_are_not_ignored(tmp_path):
    rows = [{"text": "t", "a": "x", "B": "y", "c": "z", "label": label} for label in (0, 1)]
    entry = {"choices": ["{a}", "{b}."], "prompts": [{"text": "{text}"}]}
    task = load_described(tmp_path, entry, *rows)
    assert rendered(task) == [("t", ["x", "y."], 0), ("t", ["x", "y."], 1)]
    assert task.columns == "reads text, picks label among {a}, {b}.; ignores c"
    task = load_described(tmp_path, entry, *rows, target="{c}")
    assert task.columns == "reads text, writes c; ignores a, B, label"


def test_if_choices_are_numbers_the_label_is_an_index(tmp_path):
    row = {"input": "a", "choices": ["2", "1", "7"]}
    assert rendered(load(tmp_path, {**row, "label": "1"}))[0][2] == 1
    with pytest.raises(ValueError, match="'label' is '7', expected one of 0, 1, 2"):
        load(tmp_path, {**row, "label": "7"})


def test_conversations_stay_as_they_are(tmp_path):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    task = load(tmp_path, {"messages": messages, "id": 3})
    assert all(row["messages"] == messages for row in task.train)
    assert task.columns == "reads messages, writes what the assistant says; ignores id"
    assert (task.metric, task.answer) == ("inverse_perplexity", "messages")


SHAREGPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 1}]


@pytest.mark.parametrize("name", ["conversations", "Dialog", "messages"])
def test_a_conversation_is_found_whatever_its_column_is_called_and_read_from_sharegpt(
    name, tmp_path
):
    system = {"from": "system", "value": "s"}
    task = load(tmp_path, {"id": "a long text", name: [system, *SHAREGPT]})
    assert task.columns == f"reads {name}, writes what the assistant says; ignores id"
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: '{name}' is \[\], expected a list"):
        load(tmp_path, {name: SHAREGPT}, {name: []})
    for row in task.train:
        assert row["messages"] == [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", "weight": 1},
        ]


def test_messages_of_a_table_have_the_keys_of_both_forms_and_null_in_the_other(tmp_path):
    both = dict.fromkeys(("from", "value", "role", "content"))
    messages = [both | message for message in SHAREGPT]
    task = load(tmp_path, {"messages": [*messages, both | {"role": "user", "content": "c"}]})
    for row in task.train:
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant", "user"]
        assert [message["content"] for message in row["messages"]] == ["a", "b", "c"]


def test_an_adapter_of_conversations_reads_them_under_the_name_that_it_has_learned(tmp_path):
    spec = load(tmp_path, {"conversations": SHAREGPT}).spec
    for name in ("conversations", "messages"):
        row = normalize_row({name: SHAREGPT[:1]}, spec, PREDICTED, 0)
        assert row["messages"] == [{"role": "user", "content": "a"}]
        assert row["label"] == -1
        for messages, label in ((SHAREGPT[:1], -1), (SHAREGPT, 0)):
            assert normalize_row({name: messages}, spec, "test", 0)["label"] == label
    task = load_described(tmp_path, make_entry(spec), {"conversations": SHAREGPT})
    assert task.answer == "messages"


@pytest.mark.parametrize("system", ["system", "System", "system_prompt"])
@pytest.mark.parametrize("name", ["conversations", "messages"])
def test_the_system_message_of_a_conversation_may_have_a_column(name, system, tmp_path):
    empty = {name: SHAREGPT, system: " "}
    missing = {name: SHAREGPT, system: None}
    task = load(tmp_path, {name: SHAREGPT, system: "Be brief. "}, empty, missing, missing)
    assert task.columns == f"reads {system} and {name}, writes what the assistant says"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1}]
    rows = sorted([*task.train, *task.validation, *task.test], key=lambda row: row["idx"])
    first = {"role": "system", "content": "Be brief. "}
    assert [row["messages"] for row in rows] == [[first, *turns], turns, turns, turns] * 3
    asked = normalize_row({name: SHAREGPT[:1], system: "Shout."}, task.spec, PREDICTED, 0)
    assert asked["messages"] == [{"role": "system", "content": "Shout."}, turns[0]]


def test_a_conversation_with_a_system_message_keeps_it(tmp_path):
    for role in ("system", "developer"):
        messages = [{"role": role, "content": "s"}, {"role": "user", "content": "a"}]
        messages.append({"role": "assistant", "content": "b"})
        task = load(tmp_path, {"messages": messages, "system": "t"})
        assert task.columns.endswith(
            "reads messages, writes what the assistant says; ignores system"
        )
        assert all(row["messages"] == messages for row in task.train)


def test_a_system_message_is_a_text_of_the_first_column_that_has_one(tmp_path):
    both = {"messages": SHAREGPT, "system_prompt": "a", "system": "b"}
    other = {"messages": SHAREGPT, "system": 3, "system_prompt": "c"}
    task = load(tmp_path, both, other)
    assert task.columns.startswith("reads system and system_prompt and messages, writes")
    rows = sorted([*task.train, *task.validation, *task.test], key=lambda row: row["idx"])
    assert [row["messages"][0]["content"] for row in rows] == ["b", "c"] * 3
    task = load(tmp_path, {"messages": SHAREGPT, "system": 3})
    assert task.columns == "reads messages, writes what the assistant says; ignores system"
    assert all(row["messages"][0]["role"] == "user" for row in task.train)


def test_columns_with_the_usual_names_come_before_conversations(tmp_path):
    task = load(tmp_path, {"input": "a", "target": "b", "conversations": SHAREGPT})
    assert task.columns == "reads input, writes target; ignores conversations"
    with pytest.raises(ValueError, match="has the columns Q, conversations; expected columns"):
        load(tmp_path, {"Q": "a", "conversations": SHAREGPT}, target="{Q}")


def test_the_tools_of_a_conversation_are_found_whatever_their_case(tmp_path):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    tools = [{"type": "function"}]
    task = load(tmp_path, {"Messages": messages, "Tools": tools})
    assert task.columns == "reads Messages and Tools, writes what the assistant says"
    assert all(row["tools"] == tools for row in task.train)


def test_labels_for_conversations_are_refused(tmp_path):
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    rows = [{**chat, "text": "a", "label": label} for label in ("x", "y")]
    for refused in ([chat], rows):
        with pytest.raises(ValueError, match=r"rows\.jsonl has conversations .*: leave it out, or"):
            load(tmp_path, *refused, labels="x,y")
    assert rendered(load(tmp_path, *rows, labels="x,y", input="{text}"))[1] == ("a", ["x", "y"], 1)


def test_a_conversation_that_is_not_used_is_not_kept(tmp_path):
    row = {"messages": [{"role": "user", "content": "a"}], "text": "a"}
    task = load(tmp_path, {**row, "label": "x"}, {**row, "label": "y"}, input="{text}")
    assert all("messages" not in row for row in task.train), "or it would be encoded as one"
    assert task.columns == "reads text, picks label among x, y; ignores messages"
    row |= {"choices": ["x", "y"], "label": "y"}
    task = load(tmp_path, row, input="{text}?")
    assert rendered(task) == [("a?", ["x", "y"], 1)]
    assert task.answer == "choices"
    assert all("messages" not in row for row in task.train)
    assert task.columns == "reads text, picks label among the row's choices; ignores messages"


@pytest.mark.parametrize("name", ["messages", "Messages"])
def test_a_row_of_which_nothing_is_known_is_a_conversation_if_it_has_messages(name):
    file_row = {"text": "a", name: [{"role": "user", "content": "a"}]}
    spec = guess_task(file_row, ColumnFlags())
    row = normalize_row(file_row, spec, PREDICTED, 0)
    assert (spec.answer_of(row), "messages" in row) == ("messages", True)
    # What the user says comes first.
    asked = guess_task(file_row, ColumnFlags(input="{text}?"))
    row = normalize_row(file_row | {"choices": ["x", "y"]}, asked, PREDICTED, 0)
    assert (asked.answer_of(row), "messages" in row) == ("choices", False)
    labeled = guess_task(file_row, ColumnFlags(labels="x,y"))
    row = normalize_row(file_row, labeled, PREDICTED, 0)
    assert render(labeled.prompts[0], row)[:2] == ("a", ["x", "y"])
    # An adapter that was trained on conversations obeys the flag, too.
    learned = with_flags(TaskSpec(messages="messages"), ColumnFlags(input="{text}?"))
    assert learned.answer_of(normalize_row(file_row, learned, PREDICTED, 0)) == "target"
    same = with_flags(TaskSpec(messages="messages"), ColumnFlags())
    assert same.answer_of(normalize_row(file_row, same, PREDICTED, 0)) == "messages"


def test_a_row_of_which_nothing_is_known_may_hold_a_conversation_under_another_name():
    spec = guess_task({"id": 3, "chat": SHAREGPT}, ColumnFlags())
    row = normalize_row({"id": 3, "chat": SHAREGPT}, spec, PREDICTED, 0)
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
    spec = guess_task({"text": "a", "chat": SHAREGPT}, ColumnFlags())
    assert spec.answer_of({"text": "a"}) != "messages"


def test_an_input_is_what_the_model_reads_also_if_it_is_called_input(tmp_path):
    rows = [{"instruction": "a", "input": "b", "topic": topic} for topic in ("x", "y")]
    entry = {"label_field": "topic", "prompts": [{"text": "{input}"}]}
    task = load_described(tmp_path, entry, *rows)
    assert rendered(task) == [("b", ["x", "y"], 0), ("b", ["x", "y"], 1)]
    assert task.columns == "reads input, picks topic among x, y; ignores instruction"
    row = {"input": "b", "choices": ["x", "y"], "label": "y"}
    chat = {**row, "messages": [{"role": "user", "content": "a"}]}
    assert rendered(load(tmp_path, chat, input="{input}")) == [("b", ["x", "y"], 1)]
    asked = guess_task(chat, ColumnFlags(input="{input}"))
    assert asked.answer_of(normalize_row(chat, asked, PREDICTED, 0)) == "choices"
    # Rows of test are answered as those of train, whatever other columns they have.
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "train.jsonl").write_bytes(lines(row, row))
    (tmp_path / "both" / "test.jsonl").write_bytes(lines(chat, chat))
    task = load_task(tmp_path / "both")
    assert task.answer == "choices"
    assert [tuple(render(task.prompts[0], row)) for row in task.test] == [("b", ["x", "y"], 1)] * 2
    assert all("messages" not in row for row in task.test)


def test_every_set_of_the_table_is_taken_before_the_smaller_ones_that_it_contains():
    for i, column_set in enumerate(COLUMN_SETS):
        for earlier in COLUMN_SETS[:i]:
            assert not set(earlier.names) <= set(column_set.names)
    usual = [set(names.split(",")) for names in EXPECTED.split("; ")]
    known = [set(column_set.names) for column_set in COLUMN_SETS]
    assert all(any(names >= one for one in known) for names in usual)


def test_a_renamed_column_takes_the_place_of_one_that_has_its_new_name():
    for found in ("abc", "bac"):
        columns = ColumnNames(found, {"a": "b"})
        assert columns.names_in_task(()) == {"a": "b", "c": "c"}
        columns = ColumnNames(found, {"a": "b", "b": "a"})
        assert columns.names_in_task(()) == {"a": "b", "b": "a", "c": "c"}


def test_a_renamed_column_comes_before_one_that_has_its_new_name_in_another_case(tmp_path):
    """The line of the run named the renamed column, and the model read the other one."""
    (tmp_path / "rows.csv").write_text("body,TEXT,label\n" + "good,bad,x\nfine,worse,y\n" * 5)
    task_file = {"files": "rows.csv", "fields": {"body": "Text"}}
    (tmp_path / "task.json").write_text(json.dumps(task_file))
    task = load_task(tmp_path)
    assert task.columns == "reads body, picks label among x, y; ignores TEXT"
    assert {row["text"] for row in [*task.train, *task.validation, *task.test]} == {"good", "fine"}


def test_a_column_with_an_expected_name_is_not_taken_for_another_one():
    for found in (("TEXT", "text"), ("text", "TEXT")):
        columns = ColumnNames(found, {})
        assert columns.names_in_task(["Text", "text"]) == {"TEXT": "Text", "text": "text"}


def test_case_and_white_space_in_the_names_of_columns_make_no_difference(tmp_path):
    task = load(tmp_path, {"Text": "a", " LABEL": "x"}, {"Text": "b", " LABEL": "y"})
    assert rendered(task) == [("a", ["x", "y"], 0), ("b", ["x", "y"], 1)]
    assert task.columns == "reads Text, picks  LABEL among x, y"
    task = load(tmp_path, {"Premise": "a", "Answer": "z"}, input="{premise}!", target="{answer}")
    assert rendered(task) == [("a!", ["z"], 0)]


@pytest.mark.parametrize("names", [("Text", "text"), ("text", "Text")])
def test_of_columns_that_differ_in_case_the_one_with_the_exact_name_is_read(names, tmp_path):
    row = {name: f"in {name}" for name in names}
    labels = [{"label": 0, "Label": "zero"}, {"label": 1, "Label": "one"}]
    rows = [{**row, **label} for label in labels]
    task = load(tmp_path, *rows)
    assert rendered(task) == [("in text", ["0", "1"], 0), ("in text", ["0", "1"], 1)]
    assert task.columns.startswith("reads text, picks label among 0, 1 (")
    ignored = task.columns.split("; ignores ")[1].split(", ")
    assert sorted(ignored) == ["Label", "Text"]
    task = load(tmp_path, *rows, input="{Text} {text}", target="{Label}", labels="zero,one")
    assert rendered(task)[1] == ("in Text in text", ["zero", "one"], 1)
    task = load(tmp_path, *rows, input="{Label}? {label}", target="{text}")
    assert rendered(task) == [("zero? 0", ["in text"], 0), ("one? 1", ["in text"], 0)]
    task = load(tmp_path, *rows, input="{label}?", target="{Label}", labels="zero,one")
    assert rendered(task) == [("0?", ["zero", "one"], 0), ("1?", ["zero", "one"], 1)]


def test_each_row_may_spell_a_column_in_its_own_way(tmp_path):
    task = load(tmp_path, {"text": "a", "label": "x"}, {"Text": "b", "LABEL": "y"})
    assert rendered(task) == [("a", ["x", "y"], 0), ("b", ["x", "y"], 1)]
    assert task.columns == "reads text, picks label among x, y"


def test_a_column_beside_one_that_is_spelled_like_it_is_another_column(tmp_path):
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "y", "Label": "z"}]
    task = load(tmp_path, *rows)
    assert rendered(task) == [("a", ["x", "y"], 0), ("b", ["x", "y"], 1)]
    assert task.columns == "reads text, picks label among x, y; ignores Label"


def test_of_columns_that_are_both_spelled_otherwise_the_last_one_is_read(tmp_path):
    rows = [{"Text": "a", "TEXT": "b", "label": label} for label in ("x", "y")]
    task = load(tmp_path, *rows)
    assert [text for text, _, _ in rendered(task)] == ["b", "b"]
    assert task.columns == "reads TEXT, picks label among x, y; ignores Text"


def test_the_accents_of_a_column_are_the_same_in_both_of_their_forms(tmp_path):
    """An é is one character, or an e and U+0301. A keyboard writes the first."""
    rows = [{"Re\u0301ponse": label, "Crite\u0300re": "a"} for label in "xy"]
    task = load(tmp_path, *rows, input="{crit\u00e8re}", target="{R\u00e9ponse}")
    assert rendered(task) == [("a", ["x"], 0), ("a", ["y"], 0)]
    fields = {"R\u00e9ponse": "answer", "Crit\u00e8re": "question"}
    task = load_described(tmp_path, {"fields": fields}, *rows)
    assert rendered(task) == [("a", ["x"], 0), ("a", ["y"], 0)]


def test_the_answer_is_no_column_of_the_input_whatever_its_case(tmp_path):
    rows = [{"Question": "a", "Answer": "b", "label": label} for label in ("x", "y")]
    task = load(tmp_path, *rows, input="{Question} {Answer}")
    assert rendered(task) == [("a b", ["x", "y"], 0), ("a b", ["x", "y"], 1)]


def test_the_input_of_an_instruction_may_be_empty_or_missing(tmp_path):
    row = {"instruction": "a", "output": "z"}
    task = load(tmp_path, row, {**row, "input": ""}, {**row, "input": None}, {**row, "input": "b"})
    assert [text for text, _, _ in rendered(task)] == ["a", "a", "a", "a\nb"]
    assert len(task.notes) == 1, "only that the file is split"


def test_an_empty_column_of_several_is_a_note_and_the_only_one_is_an_error(tmp_path):
    good = {"premise": "a", "hypothesis": "b", "label": 0}
    task = load(tmp_path, good, {**good, "hypothesis": " ", "label": 1})
    assert "'hypothesis' is empty in 3 rows" in task.notes
    with pytest.raises(ValueError, match="'premise' is '', expected a text that is not empty"):
        load(tmp_path, good, {"premise": "", "hypothesis": None, "label": 1})


def test_numbers_are_texts_and_lists_are_not(tmp_path):
    assert rendered(load(tmp_path, {"question": 7, "answer": 4.0})) == [("7", ["4"], 0)]
    with pytest.raises(ValueError, match=r"'question' is \['a'\], expected a text"):
        load(tmp_path, {"question": ["a"], "answer": "b"})


def test_braces_in_texts_and_labels_are_not_fields(tmp_path):
    task = load(tmp_path, {"text": "{a} {", "label": "{x}"}, {"text": "}", "label": "}"})
    assert rendered(task) == [("{a} {", ["{x}", "}"], 0), ("}", ["{x}", "}"], 1)]


def test_double_braces_around_something_else_than_a_column_are_braces(tmp_path):
    row = {"text": "a", "label": "{text}"}
    task = load(tmp_path, row, row | {"label": "b"}, input='{{"said": "{text}", "{{x}}": {{}}}}')
    assert rendered(task)[0] == ('{"said": "a", "{x}": {}}', ["{text}", "b"], 0)
    task = load(tmp_path, row, row | {"label": "b"}, input="{text}: \\boxed{{label}}")
    assert rendered(task)[0] == ("a: \\boxed{label}", ["{text}", "b"], 0)


def test_braces_in_the_labels_of_a_task_file_are_not_fields(tmp_path):
    labels = ["f(x) {", "none"]
    rows = [{"text": "a", "label": label} for label in labels]
    task = load_described(tmp_path, {"labels": labels, "prompts": [{"text": "{text}?"}]}, *rows)
    assert rendered(task) == [("a?", labels, 0), ("a?", labels, 1)]
    assert task.columns == "reads text, picks label among f(x) {, none"


# What the user says


def test_input_and_target_put_any_columns_into_words(tmp_path):
    row = {"premise": "a", "hypothesis": "b", "why": "c", "id": 4}
    flags = {"input": "{premise}\\nQuestion: {hypothesis}", "target": "because {why}"}
    task = load(tmp_path, row, **flags)
    assert rendered(task) == [("a\nQuestion: b", ["because c"], 0)]
    assert task.columns == "reads premise and hypothesis, writes why; ignores id"


def test_an_input_alone_keeps_the_usual_answer(tmp_path):
    task = load(
        tmp_path, {"title": "a", "label": "x"}, {"title": "b", "label": "y"}, input="{title}:"
    )
    assert rendered(task) == [("a:", ["x", "y"], 0), ("b:", ["x", "y"], 1)]
    choices = {"title": "a", "choices": ["x", "y"], "label": 1}
    assert rendered(load(tmp_path, choices, input="{title}:")) == [("a:", ["x", "y"], 1)]
    # An answer that the input uses is none.
    row = {"question": "a", "answer": "b", "label": "x"}
    task = load(tmp_path, row, {**row, "label": "y"}, input="{question} {answer}")
    assert rendered(task)[0] == ("a b", ["x", "y"], 0)


@pytest.mark.parametrize("text", ["{text}", "{text}?", "{Text}", "{id} {text}"])
def test_an_input_of_the_usual_column_keeps_the_answer_that_belongs_to_it(text, tmp_path):
    """Prodigy's `answer`, which says whether the label is right, was learned in its place."""
    row = {"id": "n", "text": "a", "label": "x", "answer": "accept"}
    rows = [row, {**row, "label": "y"}]
    assert ", picks label among x, y; ignores " in load(tmp_path, *rows).columns
    assert ", picks label among x, y; ignores " in load(tmp_path, *rows, input=text).columns


def test_beside_choices_the_label_is_the_column_that_is_there(tmp_path):
    row = {"question": "a", "subject": "b", "choices": ["x", "y"], "answer": 1}
    flags = {"input": "{subject}: {question}"}
    assert rendered(load(tmp_path, row, **flags)) == [("b: a", ["x", "y"], 1)]
    # Beside both, the file means the same with and without --input.
    both = {**row, "label": 0}
    assert rendered(load(tmp_path, both)) == [("a", ["x", "y"], 1)]
    assert rendered(load(tmp_path, both, **flags)) == [("b: a", ["x", "y"], 1)]
    assert rendered(load(tmp_path, both, input="{subject}")) == [("b", ["x", "y"], 0)]
    del row["answer"]
    with pytest.raises(ValueError, match="'label' has no value, expected one of 0, 1"):
        load(tmp_path, row, **flags)


def test_a_target_alone_keeps_the_usual_input(tmp_path):
    row = {"instruction": "a", "input": "b", "reply": "z"}
    assert rendered(load(tmp_path, row, target="{reply}")) == [("a\nb", ["z"], 0)]


def test_items_of_lists_and_objects_can_be_named(tmp_path):
    row = {"translation": {"de": "Hund", "en": "dog"}, "tags": ["x", "y"]}
    task = load(tmp_path, row, input="{translation[en]} {tags[1]}", target="{translation[de]}")
    assert rendered(task) == [("dog y", ["Hund"], 0)]


def test_columns_with_the_names_of_our_own_fields_are_read_as_the_file_has_them(tmp_path):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    row = {"messages": messages, "Label": "z", "idx": "q7"}
    flags = {
        "input": "{messages[0][content]} {{{idx}}}",
        "target": "{label}: {messages[1][content]}",
    }
    task = load(tmp_path, row, **flags)
    assert rendered(task) == [("a {q7}", ["z: b"], 0)]
    assert task.columns == "reads messages and idx, writes Label and messages"
    row = {"text": "a", "label": "x"}
    flags = {"input": "{text} {label}", "target": "{label}", "labels": "x,y"}
    assert rendered(load(tmp_path, row, **flags)) == [("a x", ["x", "y"], 0)]
    with pytest.raises(ValueError, match=r'--input "\{text\}" --target "\{label\}"'):
        load(tmp_path, row, input="{text} {label}")


def test_a_choice_may_be_a_column_with_the_name_of_our_own_field(tmp_path):
    rows = [{"q": "w", "Label": "x", "alt": "y", "gold": gold} for gold in (0, 1)]
    prompts = [{"text": "{q}", "choices": ["{label}", "{alt}"]}]
    task = load_described(tmp_path, {"label_field": "gold", "prompts": prompts}, *rows)
    assert rendered(task) == [("w", ["x", "y"], 0), ("w", ["x", "y"], 1)]
    assert task.columns == "reads q, picks gold among {label}, {alt}"
    # The rows of another file have the words that were learned.
    row = normalize_row({"Q": "w", "label": "v", "alt": "z"}, task.spec, PREDICTED, 0)
    assert render(task.spec.prompts[0], row).choices == ["v", "z"]


def test_the_line_names_what_each_prompt_writes(tmp_path):
    # It named only what the first prompt writes, and said that the other column is ignored.
    row = {"text": "a", "title": "b", "topic": "c", "id": "7"}
    targets = [{"text": "{text}", "target": target} for target in ("{title}", "{topic}")]
    task = load_described(tmp_path, {"prompts": targets}, row)
    assert task.columns == "reads text, writes title and topic; ignores id"
    task = load_described(tmp_path, {"prompts": targets}, row, target="{id}")
    assert task.columns == "reads text, writes id; ignores title, topic"


def test_such_a_column_gets_a_name_that_no_other_column_has(tmp_path):
    row = {"text": "a", "label": "z", "label_text": "b"}
    task = load(tmp_path, row, target="{label}")
    assert rendered(task) == [("a", ["z"], 0)]
    assert task.columns == "reads text, writes label; ignores label_text"
    task = load(tmp_path, row, input="{text} {label_text}", target="{label}")
    assert rendered(task) == [("a b", ["z"], 0)]
    # A file that comes later may have a column of the name that was free.
    learned = load(tmp_path, {"text": "a", "label": "z"}, target="{label}").spec
    task = load(tmp_path, row, like=learned)
    assert rendered(task) == [("a", ["z"], 0)]
    assert task.columns == "reads text, writes label; ignores label_text"


def test_such_a_column_has_the_words_of_its_prompt(tmp_path):
    # The words of `label` were passed over, because the column had another name already.
    rows = [{"q": "w", "Label": number, "idx": number} for number in (0, 1)]
    words = {"Label": {"0": "no", "1": "yes"}, "idx": {"0": "first", "1": "second"}}
    prompts = [{"text": "{idx} {q}", "target": "{Label}", "words": words}]
    task = load_described(tmp_path, {"prompts": prompts}, *rows)
    assert rendered(task) == [("first w", ["no"], 0), ("second w", ["yes"], 0)]
    # Booleans, too, spelled as in JSON or as in Python.
    for words in ({"true": "spam", "false": "ham"}, {"True": "spam", "False": "ham"}):
        prompt = {"text": "{q}", "target": "{is_spam}", "words": {"is_spam": words}}
        rows = [{"q": "w", "is_spam": value} for value in (True, False)]
        booleans = load_described(tmp_path, {"prompts": [prompt]}, *rows)
        assert rendered(booleans) == [("w", ["spam"], 0), ("w", ["ham"], 0)]
    # A row that is to be answered has no label. It was refused, because the label has words.
    row = normalize_row({"q": "w", "idx": 1}, task.spec, PREDICTED, 0)
    assert render(without_target(task.spec.prompts[0], row), row).input == "second w"


def rows_with_texts(names):
    """Return two rows with these columns and a label. A text says in which column it is."""
    texts = {name: f"in {name}" for name in names}
    return [{**texts, "label": "x"}, {**texts, "label": "y"}]


@pytest.mark.parametrize("names", [("clean", "text"), ("text", "clean")])
def test_a_renamed_column_comes_before_a_column_that_has_the_name(names, tmp_path):
    rows = rows_with_texts(names)
    task = load_described(tmp_path, {"fields": {"clean": "text"}}, *rows)
    assert [text for text, _, _ in rendered(task)] == ["in clean"] * 2
    assert task.columns == "reads clean, picks label among x, y; ignores text"


@pytest.mark.parametrize("names", [("Utterance", "text"), ("text", "Utterance")])
def test_a_renamed_column_is_found_whatever_its_case(names, tmp_path):
    rows = rows_with_texts(names)
    task = load_described(tmp_path, {"fields": {"utterance": "text"}}, *rows)
    assert [text for text, _, _ in rendered(task)] == ["in Utterance"] * 2
    assert task.columns == "reads Utterance, picks label among x, y; ignores text"
    exact = [{**row, "utterance": "exact"} for row in rows]
    task = load_described(tmp_path, {"fields": {"utterance": "text"}}, *exact)
    assert [text for text, _, _ in rendered(task)] == ["exact"] * 2


def test_a_field_that_no_column_has_is_refused(tmp_path):
    rows = [{"Utterance": "a", "text": "b", "label": label} for label in ("x", "y")]
    message = "the task file's 'fields' names the column 'Uterance', .* did you mean 'Utterance'"
    with pytest.raises(ValueError, match=message):
        load_described(tmp_path, {"fields": {"Uterance": "text"}}, *rows)
    # What an adapter has learned suits rows that have the learned names already.
    learned = load_described(tmp_path, {"fields": {"Utterance": "words"}}, *rows, input="{words}?")
    task = load(tmp_path, *[{"words": "a", "label": label} for label in "xy"], like=learned.spec)
    assert rendered(task) == [("a?", ["x", "y"], 0), ("a?", ["x", "y"], 1)]


def test_a_flag_that_names_a_renamed_column_is_told_its_new_name(tmp_path):
    rows = [{"Utterance": "a", "label": label} for label in ("x", "y")]
    message = "--input names the column '{}', which the task file's 'fields' call 'text': use this"
    for name in ("Utterance", "utterance"):
        with pytest.raises(ValueError, match=message.format(name)):
            load_described(tmp_path, {"fields": {"Utterance": "text"}}, *rows, input=f"{{{name}}}!")


def test_with_labels_the_target_is_the_column_of_the_label(tmp_path):
    rows = [{"text": "a", "mood": "Bad"}, {"text": "b", "mood": "good"}]
    task = load(tmp_path, *rows, target="{mood}", labels="good,bad,none")
    assert [label for _, _, label in rendered(task)] == [1, 0]
    assert task.columns == "reads text, picks mood among good, bad, none"
    with pytest.raises(ValueError, match=r"--target is '{mood}!', expected a column in braces"):
        load(tmp_path, *rows, target="{mood}!", labels="good,bad")


@pytest.mark.parametrize("name", ["label", "Label", "_source"])
def test_with_labels_the_target_may_be_an_item_of_a_column(name, tmp_path):
    """The message for such files advised it, and then it was refused: 'label[0]' was None."""
    rows = [{"text": "a", name: ["good", "x"]}, {"text": "b", name: ["bad"]}]
    flags = {"input": "{text}", "target": f"{{{name.lower()}[0]}}", "labels": "bad,good"}
    task = load(tmp_path, *rows, **flags)
    assert rendered(task) == [("a", ["bad", "good"], 1), ("b", ["bad", "good"], 0)]
    assert task.columns == f"reads text, picks {name.lower()}[0] among bad, good"
    learned = read_entry(json.loads(json.dumps(make_entry(task.spec))), tmp_path)
    assert rendered(load(tmp_path, *rows, like=learned)) == rendered(task)
    entry = {"label_field": f"{name}[0]", "prompts": [{"text": "{text}"}]}
    assert rendered(load_described(tmp_path, entry, *rows)) == [
        ("a", ["good", "bad"], 0),
        ("b", ["good", "bad"], 1),
    ]
    message = r"rows.jsonl:3: 'label\[0\]' has no value, expected one of"
    with pytest.raises(ValueError, match=message):
        load(tmp_path, *rows, {"text": "c", "label": []}, target="{label[0]}", labels="bad,good")


@pytest.mark.parametrize("right", ["B", "y"])
def test_an_item_may_be_the_label_of_a_row_with_its_own_choices(right, tmp_path):
    """Such a label was not found: each row was refused, or unlabeled in a file to report on."""
    entry = {"label_field": "answers[0]", "prompts": [{"text": "{question}"}]}
    row = {"question": "a", "choices": ["x", "y"], "answers": ["y"]}
    lettered = {**row, "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answers": [right]}
    task = load_described(tmp_path, entry, row, lettered)
    assert rendered(task) == [("a", ["x", "y"], 1)] * 2
    assert normalize_row(dict(row), task.spec, "test", 0)["label"] == 1
    with pytest.raises(ValueError, match=r"'answers\[0\]' has no value, expected one of 0, 1 or"):
        load_described(tmp_path, entry, row, {**row, "answers": []})


def test_a_column_of_the_input_may_have_an_item_that_is_the_label(tmp_path):
    row = {"label": {"text": "a", "mood": 1}}
    flags = {"input": "{label[text]}", "target": "{label[mood]}", "labels": "bad,good"}
    task = load(tmp_path, row, **flags)
    assert rendered(task) == [("a", ["bad", "good"], 1)]
    assert task.columns == "reads label, picks label[mood] among bad (0), good (1)"


@pytest.mark.parametrize("labels", [None, "a,b"])
@pytest.mark.parametrize("text", ["{label[0]}", "{Label[0][0]}"])
def test_the_letters_of_a_text_are_not_its_items(text, labels, tmp_path):
    """A list in a .csv file is a text. The model learned to write its first letter, a bracket."""
    (tmp_path / "rows.csv").write_text("text,label\n" + "x,['a']\n" * 5)
    message = r"""'[lL]abel' is "\['a'\]", expected a list or an object, because an item of it is"""
    with pytest.raises(ValueError, match=message):
        load_task(tmp_path / "rows.csv", input="{text}", target=text, labels=labels)
    with pytest.raises(ValueError, match=message):
        load_task(tmp_path / "rows.csv", input=text, target="{text}")
    with pytest.raises(ValueError, match=message):
        load(tmp_path, {"text": "x", "label": "['a']"}, input="{text}", target=text)


def test_a_flag_replaces_what_it_names_and_the_rest_of_a_task_file_stays(tmp_path):
    prompts = [{"text": "{text}?", "choices": ["no", "yes"]}]
    entry = {"labels": ["0", "1"], "prompts": prompts}
    rows = [{"text": "a", "label": label, "reply": "z"} for label in (1, 0)]
    task = load_described(tmp_path, entry, *rows, input="<{text}>")
    assert rendered(task) == [("<a>", ["no", "yes"], 1), ("<a>", ["no", "yes"], 0)]
    task = load_described(tmp_path, entry, *rows, target="{reply}")
    assert rendered(task) == [("a?", ["z"], 0), ("a?", ["z"], 0)]


def test_a_metric_must_suit_the_rows(tmp_path):
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    assert load(tmp_path, *rows, metric="macro_f1").metric == "macro_f1"
    with pytest.raises(ValueError, match="rows: the metric is 'bleu', expected one of accuracy, "):
        load(tmp_path, *rows, metric="bleu")
    with pytest.raises(ValueError, match=r"expected one of exact_match, .*texts to write"):
        load(tmp_path, {"question": "a", "answer": "b"}, metric="accuracy")


# Mistakes


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            {"input": "{premis} Question: {hypothesis}"},
            "--input names the column 'premis', which .*rows.jsonl does not have; the columns are "
            "premise, hypothesis, label: did you mean 'premise'?",
        ),
        ({"target": "{lable}"}, "--target names the column 'lable', .* did you mean 'label'?"),
        ({"input": "{premise"}, "--input is '{premise': .*: write {{ and }} for braces that"),
        ({"input": "premise"}, "--input is 'premise', expected columns in braces"),
        (
            {"input": "{{premise}}\\n{hypothesis}"},
            "--input has {{premise}}, which is the text {premise}: single braces name the column",
        ),
        ({"input": "{premise} {{ Hypothesis }}"}, "--input has {{Hypothesis}}, which is the text"),
        ({"target": "{{label}}{premise}"}, "--target has {{label}}, which is the text {label}"),
        ({"input": "{}"}, "--input is '{}': {} is not a column"),
        ({"input": "{premise.upper}"}, "{premise.upper} is not a column"),
        (
            {"input": "{premise:>99999999999}"},
            "{premise} is not a column, or has more than letters",
        ),
        ({"labels": "x"}, "--labels is 'x', expected two words or more that differ"),
        ({"labels": "x,X"}, "--labels is 'x,X', expected two words or more that differ"),
        ({"labels": "[1, 2]"}, "--labels is '[1, 2]', expected two words"),
        ({"labels": "[POS],[NEG]"}, "--labels is '[POS],[NEG]', which begins with [ and so must"),
    ],
)
def test_a_wrong_flag_is_answered_in_one_line(flags, words, tmp_path):
    row = {"premise": "a", "hypothesis": "b", "label": "x"}
    with pytest.raises(ValueError, match=r"\A[^\n]*\Z") as error:
        load(tmp_path, row, **flags)
    for part in words.split(".*"):
        assert part in str(error.value)


def test_a_column_that_hardly_resembles_a_name_is_not_advised(tmp_path):
    row = {"input": "a", "choices": ["b", "c"], "label": 0}
    with pytest.raises(ValueError, match=r"the columns are input, choices, label\Z"):
        load(tmp_path, row, input="{Review}")


def test_a_column_with_few_different_values_is_advised_as_the_target(tmp_path):
    """The second text was, and the model would have learned to write it."""
    rows = [
        {"id": 1000 + i, "post": f"a long text {i}", "reply": f"text {i}", "fits": i % 2, "n": 1}
        for i in range(3)
    ]
    with pytest.raises(ValueError, match=r'--input "\{post\}" --target "\{fits\}", and add'):
        load(tmp_path, *rows)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.tsv", "text,label\nx,1\n", "'text,label' is one column: put tabs between the cells "),
        ("a.tsv", "text   label\nx 1\n", "'text   label' is one column: put tabs between"),
        ("a.csv", "text|label\nx|1\n", "is one column: put commas, semicolons or tabs between"),
        ("a.csv", "0,so bad\n4,so good\n0,bad\n", "write a header into the first line if it has"),
        (
            "a.tsv.gz",
            "so bad\tx\nso good\ty\nbad\tx\n",
            " ('x' is also a cell below); otherwise say ",
        ),
        ("a.csv", ",0,1\n7,bad,1\n8,good,0\n", "rename the column '0' (in braces"),
        ("a.csv", "0,1\nso bad,1\nso good,0\n", "rename the column '0' (in braces"),
        ("a.csv", 'talk\n"[{""role"": 1}]"\n', "('talk' is the text of a list or an object: a "),
        ("a.csv", "a b,mood\nx,good\n", 'with --input "{mood}" --target "{a b}", and'),
    ],
)
def test_a_file_without_columns_is_answered_with_what_its_cells_lack(name, text, words, tmp_path):
    """It was asked to add or rename columns."""
    content = gzip.compress(text.encode()) if name.endswith(".gz") else text.encode()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"\A[^\n]*\Z") as error:
        load_task(tmp_path / name)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("row", "flags", "line"),
    [
        # A response of some model stands beside the answer.
        ({"question": "a", "response": "b", "answer": "c"}, {"input": "Q: {question}"}, "answer"),
        ({"prompt": "a", "response": "b", "label": "c"}, {"input": "{prompt}"}, "label among c"),
        ({"instruction": "a", "context": "b", "response": "c"}, {}, "response"),
        # Labels of the words of a text stand beside the text to write (FLARE's NER).
        (
            {"query": "a", "answer": "b", "label": ["O"], "text": "c"},
            {"input": "{query}"},
            "answer; ignores label, text",
        ),
        # The position of the right choice stands beside its letter.
        (
            {"question": "a", "choices": ["b", "c"], "answerKey": "A", "label": 0},
            {},
            "label among the row's choices; ignores answerKey",
        ),
        # The text is made of the question and the passage.
        (
            {"text": "b a", "question": "a", "passage": "b", "label": "c"},
            {},
            "label among c; ignores question, passage",
        ),
    ],
)
def test_the_column_that_was_meant_as_the_answer_is_taken_and_no_other(row, flags, line, tmp_path):
    assert f"s {line}" in load(tmp_path, row, **flags).columns


@pytest.mark.parametrize("column", ["passage", "context", "sentence"])
def test_the_model_does_not_read_what_it_is_to_write(column, tmp_path):
    """It learned to copy, if the target is one of the usual columns of an input."""
    rows = {"question": "a", column: "b"}
    task = load(tmp_path, rows, target=f"{{{column}}}")
    assert task.columns == f"reads question, writes {column}"
    with pytest.raises(ValueError, match=r"say what the model reads with --input"):
        load(tmp_path, {"text": "a"}, target="{text}")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"instruction": "a", "response": "b"}, '--input "{instruction}" --target "{response}"'),
        ({"passage": "a b", "label": "c"}, '--input "{passage}" --target "{label}"'),
        # A column says where a row is from.
        ({"en": "a b", "de": "c", "domain": "news"}, '--input "{domain}" --target "{en}"'),
    ],
)
def test_no_column_of_the_input_is_asked_for_as_an_answer(row, words, tmp_path):
    with pytest.raises(ValueError, match=r"\A[^\n]*\Z") as error:
        load(tmp_path, row)
    assert words in str(error.value)


def test_a_renamed_column_whose_old_name_is_near_a_usual_one_is_no_key_error(tmp_path):
    entry = {"fields": {"labels": "mood"}, "prompts": [{"text": "{text}"}]}
    with pytest.raises(ValueError, match=r"the columns text, labels; expected columns such as "):
        load_described(tmp_path, entry, {"text": "a", "labels": "x"})


def test_a_column_with_brackets_in_its_name_is_a_label_of_its_own(tmp_path):
    entry = {"label_field": "Rating [1-5]", "prompts": [{"text": "{text}"}]}
    rows = [{"text": "a", "Rating [1-5]": 1}, {"text": "b", "Rating [1-5]": 5}]
    spec = load_described(tmp_path, entry, *rows).spec
    assert has_columns(rows, spec)
    assert not has_columns([{"text": "a"}], spec)


@pytest.mark.parametrize("right", ["2", " 2.0"])
def test_a_number_beside_choices_with_letters_is_no_position(right, tmp_path):
    """The choice C was learned. Whoever counts from 1 means B."""
    row = {"question": "q", "choices": {"text": ["x", "y", "z"], "label": ["A", "B", "C"]}}
    words = rf"'answerKey' is '{right}', expected the letter of a choice: A, B, C(;|$)"
    with pytest.raises(ValueError, match=words):
        load(tmp_path, {**row, "answerKey": right})
    task = load(tmp_path, {**row, "answerKey": "C"})
    asked = normalize_row({**row, "answerKey": right}, task.spec, PREDICTED, 0)
    assert asked["choices"] == ["x", "y", "z"], "answers of rows to predict do not matter"
    assert normalize_row({**row, "answerKey": "-1"}, task.spec, "test", 0)["label"] == -1


@pytest.mark.parametrize(
    ("letters", "right"), [([1, 2, 3], "1"), (["1", "2", "3"], 1), (["1", "2", "3"], 1.0)]
)
def test_numbers_that_stand_for_choices_are_no_positions(letters, right, tmp_path):
    row = {"question": "q", "choices": {"text": ["x", "y", "z"], "label": letters}}
    task = load(tmp_path, {**row, "answerKey": right})
    assert rendered(task) == [("q", ["x", "y", "z"], 0)]


TURN = [{"role": "assistant", "content": "b"}]  # an answer of a row for DPO


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"review": "a long text", "mood": "x"},
            'say which is which with --input "{review}" --target "{mood}", and add --labels',
        ),
        (
            {"text": "a", "lable": "x"},
            "did you mean 'label' by 'lable'? Otherwise say which is which with --input",
        ),
        (
            {"": 1_000_000_000, "review": "bad", "stars": 1},
            'say which is which with --input "{review}" --target "{stars}", and add --labels',
        ),
        ({"": 7, "review": "bad", "stars": 1}, "has the columns '', review, stars; expected"),
        ({"": 7, "instruction": "a", "input": "b"}, "add a column 'output' with the answers"),
        (
            {"Review.Text": "so bad", "Rating": 1},
            "rename the column 'Review.Text' (in braces, a name has none of . : ! [ ] { } and is "
            "not a number), and say which is which with --input and --target",
        ),
        ({"0": "so bad", "1": "x"}, "rename the column '0' (in braces"),
        (
            {"context": "so bad", "question": "x", "answers": {"text": ["a long text"]}},
            r'say which is which with --input "{context}\n{question}" --target '
            '"{answers[text][0]}", and add --labels WORD,WORD if the target is one of a few words',
        ),
        (
            {"sentence1": "a", "sentence2": "b", "label1": "x", "gold_label": "y"},
            r'messages: say which is which with --input "{sentence1}\n{sentence2}" --target '
            '"{gold_label}", and add --labels WORD,WORD if the target is one of a few words (or '
            "call the column 'gold_label' label); --input may name several columns",
        ),
        # Banking77
        (
            {"text": "a", "category": "x"},
            '--input "{text}" --target "{category}", and add --labels WORD,WORD if the target is '
            "one of a few words (or call the column 'category' label)",
        ),
        ({"text": "a", "created": "2022-01-01", "sentiment": "x"}, '--input "{text}" --target'),
        ({"text1": "a b", "text2": "b", "label": "x"}, "messages: say which is which with --input"),
        ({"message": "a", "label": "x"}, 'messages: say which is which with --input "{message}"'),
        ({"sentence_1": "a", "sentence_2": "b", "score": 1.5}, '--target "{score}"'),
        ({"prompt": "a", "response": "a long text"}, '--input "{prompt}" --target "{response}"'),
        ({"tokens": ["a", "b"], "tags": [0, 1]}, "(a prompt can name the items of 'tokens', "),
        ({"id": "x", "parts": {"n": {"a": "b"}}}, "'parts', as in {parts[n]}, and not"),
        ({"text": "so bad", "id": "a1b2", "target": 1}, '--input "{text}" --target "{target}"'),
        (
            {"translation": {"de": "schlecht", "en": "bad", "a.b": "a long text"}},
            '--input "{translation[de]}" --target "{translation[en]}"',
        ),
        (
            {"chosen": [{"role": "user", "content": "a"}], "rejected": [{"from": "", "value": ""}]},
            "'chosen' and 'rejected' hold conversations: call the one to learn from 'messages'",
        ),
        (
            {"prompt": [{"role": "user", "content": "a"}], "chosen": TURN, "rejected": TURN},
            "'prompt' and 'chosen' and 'rejected' hold conversations: write the turns of the "
            "prompt and of the chosen answer into a column 'messages'",
        ),
        (
            {"prompt": "a", "chosen": "long", "rejected": "longer"},
            'say which is which with --input "{prompt}" --target "{chosen}", and add --labels '
            "WORD,WORD if the target is one of a few words; to learn from both answers, write rows "
            'such as {"input": PROMPT, "choices": [REJECTED, CHOSEN], "label": CHOSEN}, with the '
            "choices in random order",
        ),
        (
            {"Chosen": "a long text", "Rejected": "a"},
            "put the prompts into a column of their own; to learn from both answers, write rows",
        ),
        ({"prompt": "a", "responses": ["b"]}, '--input "{prompt}" --target "{responses[0]}", and'),
        ({"prompt": "a", "answer_choices": ["b"]}, "add a column with the answers"),
        ({"prompt": "a", "chosen": "b", "rejected": ["c"]}, '--target "{chosen}"'),
        ({"text": "a"}, "has the columns text; expected columns such as text,label; "),
        ({"text": "a"}, "add a column with the answers"),
        ({"instruction": "a", "input": "b"}, "add a column 'output' with the answers"),
        ({"premise": "a", "hypothesis": "b"}, "add a column 'label' with the answers"),
        ({}, "has the columns ; expected"),
    ],
)
def test_columns_that_say_too_little_are_answered_with_what_would_do(row, words, tmp_path):
    with pytest.raises(ValueError, match=r"rows\.jsonl has the columns [^\n]*\Z") as error:
        load(tmp_path, row)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("row", "source", "target"),
    [
        # GoEmotions
        ({"text": "so bad", "labels": [27], "id": "eebbqej"}, "{text}", "{labels[0]}"),
        # HellaSwag
        (
            {"activity_label": "Removing ice", "ctx": "a man sits. he", "endings": ["x"]}
            | {"source_id": "activitynet~v_-1IBHYS3L-Y", "split_type": "indomain", "label": "3"},
            "{ctx}",
            "{label}",
        ),
        # SWAG
        (
            {"video-id": "anetv_jkn6", "startphrase": "a man sits. he", "sent2": "he"}
            | {"gold-source": "gold", "ending0": "x", "label": 0},
            "{startphrase}",
            "{label}",
        ),
        # MATH
        (
            {"problem": "what is 1 + 1?", "level": "Level 5", "type": "Algebra"}
            | {"solution": "it is 2, because 1 + 1 = 2"},
            "{problem}",
            "{solution}",
        ),
        # The function calls of xlam
        (
            {"id": 1, "query": "how warm?", "answers": "[{name: warmth}]", "tools": "a long text"},
            "{query}",
            "{answers}",
        ),
        # MBPP
        (
            {"task_id": 1, "text": "add one", "code": "def f(a):\n    return a + 1"}
            | {"test_list": ["assert f(1) == 2"], "test_setup_code": "import math, functools"},
            "{text}",
            "{code}",
        ),
        # HumanEval
        (
            {"task_id": "HumanEval/0", "prompt": "def f(a):", "canonical_solution": " return a"}
            | {"test": "def check(f): assert f(1) == 1", "entry_point": "f"},
            "{prompt}",
            "{canonical_solution}",
        ),
        # Label Studio
        (
            {"text": "so bad", "id": 1, "mood": "bad", "annotator": 1, "annotation_id": 1}
            | {"created_at": "2023-01-01T10:00:00.000000Z", "lead_time": 1.25},
            "{text}",
            "{mood}",
        ),
        # A number of stars, beside a text that is longer, and a query.
        ({"user": "a long name", "text": "so bad", "rating": 5}, "{text}", "{rating}"),
        ({"text": "stop it", "intent": "stop", "user": "a name"}, "{text}", "{intent}"),
        # A name may have a word of answers and still be that of a time or an id.
        ({"text": "a", "response_time": 12, "sentiment": "b"}, "{text}", "{sentiment}"),
        ({"title": "a", "accepted_answer_id": 5, "answer_text": "b"}, "{title}", "{answer_text}"),
        ({"text": "a", "label_id": 3, "user": "b"}, "{text}", "{label_id}"),
        # The usual input is found first, also if it is shorter.
        ({"text": "dog", "hound": "a long text", "id": 7}, "{text}", "{hound}"),
        ({"review": "a b", "uuid": "1b4e28ba-2fa1", "fit": "x"}, "{review}", "{fit}"),
    ],
)
def test_the_columns_that_are_advised_are_an_input_and_its_answer(row, source, target, tmp_path):
    """Ids and dates were advised as answers, and a label of something else."""
    with pytest.raises(ValueError, match=r"\A[^\n]*\Z") as error:
        load(tmp_path, row)
    assert f'with --input "{source}" --target "{target}", and add' in str(error.value)
    load(tmp_path, row, input=source, target=target)


def test_to_call_a_column_label_is_advised_only_if_it_helps(tmp_path):
    task = load(tmp_path, {"text": "a", "label": "x"})
    assert task.columns == "reads text, picks label among x"
    for row in (
        {"post": "a b", "category": "x"},  # there is no usual name for what is read
        {"text": "a", "tags": {"category": "x"}},  # only a part of the column is meant
        {"prompt": "a", "reply": "b"},  # nothing is picked
        {"text1": "a", "label": "x"},  # there is such a column
    ):
        with pytest.raises(ValueError, match="which is which") as error:
            load(tmp_path, row)
        assert "or call the column" not in str(error.value)


def test_what_is_advised_for_pairs_of_answers_works(tmp_path):
    """The rejected answers were advised as the texts to write."""
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    task = load(tmp_path, pair, input="{prompt}", target="{chosen}")
    assert rendered(task) == [("a", ["b"], 0)]
    assert task.columns == "reads prompt, writes chosen; ignores rejected"
    task = load(tmp_path, {"input": "a", "choices": ["c", "b"], "label": "b"})
    assert rendered(task) == [("a", ["c", "b"], 1)]
    task = load(tmp_path, {"messages": [{"role": "user", "content": "a"}, *TURN]})
    assert task.train[0]["messages"][1:] == TURN


def numbered(name, *numbers):
    return {f"{name}{number}": f"choice {number}" for number in numbers}


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"question": "a", "A": "x", "B": "y", "C": "z", "answer": "B"}, "A, B, C"),
        (
            {"text": "a", "option_a": 1, "option_b": 2, "option_c": 3, "option_d": 4, "label": 2},
            "option_a, option_b, option_c, option_d",
        ),
        ({"question": "a", "Options": ["x", "y"], "answer": "y"}, "Options"),
        # Cosmos QA
        (
            {"context": "a", "question": "b", **numbered("answer", 0, 1, 2, 3), "label": 1},
            "answer0, answer1, answer2, answer3",
        ),
        # SWAG, with the names of HellaSwag
        (
            {"sentence": "a", **numbered("ending", 0, 1, 2, 3), "label": 1},
            "ending0, ending1, ending2, ending3",
        ),
        # COPA, WinoGrande and PIQA, with a usual name for what is read
        ({"sentence": "a", **numbered("choice", 1, 2), "label": 1}, "choice1, choice2"),
        ({"question": "a", **numbered("option", 1, 2), "answer": "2"}, "option1, option2"),
        ({"sentence": "a", **numbered("sol", 1, 2), "label": 1}, "sol1, sol2"),
        ({"question": "a", **numbered("Option_", 1, 2), "answer": "2"}, "Option_1, Option_2"),
        # HellaSwag
        ({"text": "a", "endings": ["x", "y"], "label": "1"}, "endings"),
        ({"text": "a", "candidates": ["x", "y"], "label": 1}, "candidates"),
        # DREAM
        ({"dialogue": ["a"], "question": "b", "choice": ["x", "y"], "answer": "y"}, "choice"),
        ({"question": "b", "choice": "x", "answer": "y"}, ""),
        ({"text": "a", "": 1, "source_a": "x", "source_b": "y", "c": 1, "label": "x"}, ""),
        ({"text": "a", "sentence1": "x", "sentence2": "y", "label": 1}, ""),
        ({"text": "a", "answer2": "x", "option7": "y", "label": 1}, ""),
        ({"question": "a", "choices": ["x", "y"], "answer": "y", "options": 1}, ""),
        ({"messages": [{"role": "user", "content": "b"}, *TURN], "options": 1}, ""),
    ],
)
def test_choices_that_the_model_does_not_read_are_noted(row, found, tmp_path):
    """The model learned to write the letter, or the number, of an answer that it had not seen."""
    notes = load(tmp_path, row).notes
    found_notes = [note for note in notes if "does not read" in note]
    expected = f"the model does not read {found}: if these are choices, name them in --input"
    assert found_notes == ([expected] if found else [])


def test_labels_that_prodigy_marks_as_wrong_are_not_learned_unnoticed(tmp_path):
    """They were learned as if they had been accepted."""
    rows = [{"text": "a", "label": "x", "answer": "accept"}, {"text": "b", "label": "y"}]
    message = r"rows.jsonl has labels, and its column 'Answer' is 'reject' or 'ignore' for some of"
    for answer in ("reject", "ignore"):
        with pytest.raises(ValueError, match=message.replace("Answer", "answer")):
            load(tmp_path, *rows, {**rows[0], "answer": answer})
        with pytest.raises(ValueError, match=message):
            load(tmp_path, {"text": "a", "label": "x", "Answer": answer})
    flags = {"target": "{label}", "labels": "x,y"}
    assert load(tmp_path, {**rows[0], "answer": "reject"}, **flags).columns.endswith(
        "ignores answer"
    )
    assert load(tmp_path, *rows).columns == "reads text, picks label among x, y; ignores answer"
    for other in ("maybe", None):
        task = load(tmp_path, {**rows[0], "answer": other}, rows[1])
        assert task.columns == "reads text, picks label among x, y; ignores answer"


@pytest.mark.parametrize(("good", "bad"), [(True, False), (1, 0)])
@pytest.mark.parametrize("name", ["messages", "conversations"])
def test_a_note_says_if_conversations_may_be_labeled_as_bad(name, good, bad, tmp_path):
    """It is no error, because the label may mean something else, and no flag could say so."""
    user = {"role": "user", "content": "a"}
    rows = [{name: [user, {**TURN[0], "content": text}], "label": good} for text in "bcd"]
    start = f"'label' is {str(bad).lower()} for some conversations, which are learned like the "
    for labels, is_noted in [((good,) * 3, False), ((bad,) * 3, False), ((good, bad, good), True)]:
        task = load(tmp_path, *({**rows[i], "label": labels[i]} for i in range(3)))
        assert task.columns.endswith("writes what the assistant says; ignores label")
        assert any(note.startswith(start) for note in task.notes) == is_noted


@pytest.mark.parametrize("bad", [0, 0.0, "0"])
def test_answers_with_a_zero_as_their_label_are_not_learned_unnoticed(bad, tmp_path):
    """In WikiQA, most answers are wrong, and were learned as if they were right."""
    rows = [
        {"question": "a", "answer": "b", "label": 1},
        {"question": "a", "answer": "c", "label": bad},
        {"question": "a", "answer": "d", "label": bad},
    ]
    message = (
        r"rows\.jsonl has answers to write, and its column 'label' is 0 for some of them: "
        r'leave those rows out, or learn all answers with --target "\{answer\}", or learn to judge '
        r'them with --input "\{question\}\\n\{answer\}" --target "\{label\}" --labels no,yes\Z'
    )
    with pytest.raises(ValueError, match=message):
        load(tmp_path, *rows)
    judged = load(tmp_path, *rows, input=r"{question}\n{answer}", target="{label}", labels="no,yes")
    assert judged.columns == "reads question and answer, picks label among no (0), yes (1)"
    assert rendered(judged)[:2] == [("a\nb", ["no", "yes"], 1), ("a\nc", ["no", "yes"], 0)]
    assert load(tmp_path, *rows, target="{answer}").columns == (
        "reads question, writes answer; ignores label"
    )
    # Two answers may be the words of two labels. And other numbers say nothing about the answers.
    assert load(tmp_path, *rows[:2]).columns == "reads question, writes answer; ignores label"
    assert load(tmp_path, *rows, {**rows[0], "label": 2}).columns.endswith("ignores label")


@pytest.mark.parametrize(("good", "bad"), [(True, False), ("True", "False")])
def test_answers_that_are_labeled_as_bad_are_not_learned_unnoticed(good, bad, tmp_path):
    """They were learned as if they were wanted, as the label was ignored."""
    rows = [
        {"prompt": "a", "completion": "b", "Label": good},
        {"prompt": "a", "completion": "c", "Label": bad},
    ]
    message = (
        r"rows\.jsonl has answers to write, and its column 'Label' is false for some of them: "
        r'leave those rows out, or learn all answers with --target "\{completion\}", or learn to '
        r'judge them with --input "\{prompt\}\\n\{completion\}" --target "\{Label\}" --labels no,y'
    )
    with pytest.raises(ValueError, match=message):
        load(tmp_path, *rows)
    judged = load(tmp_path, *rows, input="{prompt} {completion}", target="{Label}", labels="no,yes")
    assert rendered(judged) == [("a b", ["no", "yes"], 1), ("a c", ["no", "yes"], 0)]
    assert rendered(load(tmp_path, rows[0])) == [("a", ["b"], 0)]
    assert rendered(load(tmp_path, *rows, target="{completion}")) == [
        ("a", ["b"], 0),
        ("a", ["c"], 0),
    ]
    picked = load(tmp_path, *rows, labels="b,c").columns
    assert picked.startswith("reads prompt, picks completion among b, c;")
    rows[0]["Label"] = "a name"  # so the column says nothing about the texts
    assert load(tmp_path, *rows).columns.endswith("writes completion; ignores Label")


def test_a_column_that_is_null_in_every_row_of_json_is_none(tmp_path):
    """pandas writes it for files of several kinds, and no row could be read."""
    row = {"input": "a", "target": "b", "choices": None, "messages": None}
    task = load(tmp_path, row)
    assert task.columns == "reads input, writes target; ignores choices, messages"
    assert len(task.notes) == 1, "only that the file is split"
    assert rendered(task) == [("a", ["b"], 0)]
    row = {"input": "a", "choices": ["x", "y"], "label": 1, "target": None}
    assert rendered(load(tmp_path, row)) == [("a", ["x", "y"], 1)]
    row = {"input": None, "sentence": "a", "choices": None, "label": "x"}
    task = load(tmp_path, row, {**row, "label": "y"})
    assert rendered(task) == [("a", ["x", "y"], 0), ("a", ["x", "y"], 1)]
    entry = {"label_field": "mood", "prompts": [{"text": "{text}"}]}
    task = load_described(tmp_path, entry, {"text": "a", "mood": "x", "choices": None})
    assert rendered(task) == [("a", ["x"], 0)]
    file_row = {"input": None, "text": "a", "messages": None}
    spec = guess_task(file_row, ColumnFlags())
    assert normalize_row(file_row, spec, PREDICTED, 0)["text"] == "a"
    assert spec.prompts[0].text == "{text}"
    # What a task needs is missed as before.
    with pytest.raises(ValueError, match="'label' is empty in every row, expected labels"):
        load(tmp_path, {"text": "a", "label": None})
    task = load(tmp_path, {"a": "x", "b": None, "c": "z"}, input="{a} {b}", target="{c}")
    assert rendered(task) == [("x", ["z"], 0)]


def test_the_choices_of_a_row_may_be_null_beside_a_target_and_the_other_way_round(tmp_path):
    rows = [
        {"input": "a", "choices": ["x", "y"], "label": 1, "target": None},
        {"input": "b", "choices": None, "label": None, "target": "z"},
    ]
    with pytest.raises(ValueError, match="3 rows have 'target', the others 'choices': expected"):
        load(tmp_path, *rows)
    assert rendered(load(tmp_path, rows[0], rows[0])) == [("a", ["x", "y"], 1)] * 2


@pytest.mark.parametrize(
    ("flags", "advice"),
    [
        ({"input": "{review}"}, 'say which column is the answer with --target "{COLUMN}", and add'),
        ({"target": "{mood}"}, 'say what the model reads with --input "{COLUMN}"'),
    ],
)
def test_what_the_user_has_said_is_not_asked_for_again(flags, advice, tmp_path):
    with pytest.raises(ValueError, match=r"rows\.jsonl has the columns review, mood; ") as error:
        load(tmp_path, {"review": "so", "mood": "a long text"}, **flags)
    assert f": {advice}" in str(error.value)
    assert "which is which" not in str(error.value)


def test_a_column_without_a_name_is_ignored_in_every_kind_of_task(tmp_path):
    """pandas writes it. The line named it only beside labels."""
    row = {"": 1, "input": "a", "target": "b"}
    assert load(tmp_path, row).columns == "reads input, writes target; ignores ''"
    assert load(tmp_path, row, labels="b,c").columns.endswith("among b, c; ignores ''")


def test_a_line_stays_a_line_whatever_the_names_are(tmp_path):
    rows = [{"text": "a", "label": "x\ny", "a\nb": 1}, {"text": "b", "label": "z"}]
    assert load(tmp_path, *rows).columns == (
        "reads text, picks label among 'x\\ny', z; ignores 'a\\nb'"
    )
    rows = [{"": i, "text": "a", "label": label} for i, label in enumerate("xy")]
    assert load(tmp_path, *rows).columns == "reads text, picks label among x, y; ignores ''"
    with pytest.raises(ValueError, match=r"\A[^\n]*\Z"):
        load(tmp_path, {"a\nb": "c", "d\ne": "f"})


def test_a_row_of_other_columns_is_an_error_with_its_line(tmp_path):
    good = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
    with pytest.raises(
        ValueError, match=r"jsonl:3: 'text' has no value.*the columns are txt, label"
    ):
        load(tmp_path, *good, {"txt": "c", "label": "x"})


def test_a_known_task_takes_an_input_and_words_but_no_target(tmp_path):
    folder = tmp_path / "rte"
    folder.mkdir()
    row = {"premise": "a", "hypothesis": "b", "label": "entailment"}
    for name in ("train", "val"):
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    flags = {"input": "{hypothesis} <- {premise}", "labels": "so,not so"}
    task = load_task("rte", tmp_path, **flags)
    assert render(task.prompts[0], task.train[0]) == ("b <- a", ["so", "not so"], 0)
    assert len(task.prompts) == 1
    with pytest.raises(ValueError, match=r"3 choices .* for 2 labels"):
        load_task("rte", tmp_path, labels="a,b,c")
    with pytest.raises(ValueError, match="--target is for rows of your own"):
        load_task("rte", tmp_path, target="{hypothesis}")
    with pytest.raises(ValueError, match=r"no field 'premis', .* did you mean 'premise'"):
        load_task("rte", tmp_path, input="{premis}")


@pytest.mark.parametrize("spec", [TaskSpec(), TaskSpec(fields={"Brand": "label"})])
def test_rows_to_be_answered_keep_a_column_with_the_name_of_our_own_field(spec):
    spec = with_flags(spec, ColumnFlags(input="Brand: {label}. {text} {idx} {messages[0]}"))
    file_row = {"Text": "good", "idx": "q7", "messages": ["hi"]}
    brand = "Brand" if spec.fields.get("Brand") else "Label"
    row = normalize_row({**file_row, brand: "Nikon"}, spec, PREDICTED, 0)
    prompt = spec.prompts[0]._replace(choices=("yes", "no"))
    assert render(prompt, row).input == "Brand: Nikon. good q7 hi"


def test_the_labels_of_a_task_file_without_prompts_are_choices(tmp_path):
    (tmp_path / "task.json").write_text('{"labels": ["good", "bad"], "label_field": "mood"}')
    spec = read_task_file(tmp_path / "task.json")
    for flags in (ColumnFlags(), ColumnFlags(input="{text}!")):
        changed = with_flags(spec, flags)
        assert [prompt.choices for prompt in changed.prompts] == [("good", "bad")]
        assert changed.labels == ("good", "bad")
    words = with_flags(spec, ColumnFlags(labels="yes,no"))
    assert words.prompts[0].choices == ("yes", "no")
    assert words.labels == ("good", "bad")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{premise.upper}", "is '{premise.upper}': {premise.upper} is not a column"),
        ("premise", "is 'premise', expected columns in braces"),
    ],
)
def test_an_input_for_a_known_task_is_checked_before_its_files_are_read(text, words, tmp_path):
    with pytest.raises(ValueError, match=rf"\A--input {re.escape(words)}"):
        load_task("rte", tmp_path, input=text)
