"""A task file says what a user's rows mean. The same file beside an adapter says how to use it."""

import json

import pytest
from task_files import YES_OR_NO, lines, needs_real_data

from minia3.tasks.known_tasks import known_tasks
from minia3.tasks.prompts import OWN_PROMPTS, Prompt, render
from minia3.tasks.splits import load_task
from minia3.tasks.task import TaskSpec
from minia3.tasks.task_file import (
    TASK_FILE,
    find_task_file,
    make_entry,
    read_task_file,
    read_tasks,
    write_task_file,
)

ROWS = [
    {"Title": "a", "body": "b", "topic": "0"},
    {"Title": "c", "body": "d", "topic": "1"},
    {"Title": "e", "body": "f", "topic": "1"},
]
ENTRY = {
    "files": {"test": "b.jsonl", "train": ["a.jsonl", "b.jsonl"]},
    "fields": {"Title": "title"},
    "label_field": "topic",
    "labels": ["0", "1"],
    "choices": ["sports", "arts"],
    "metric": "macro_f1",
    "prompts": [
        {"text": "{title}\n{body}\nTopic:"},
        {"text": "{body}\nIs this about arts?", "choices": ["no", "yes"]},
    ],
}


def write(folder, entry, name=TASK_FILE):
    folder.mkdir(exist_ok=True)
    for file in ("a.jsonl", "b.jsonl", "train.jsonl"):
        (folder / file).write_bytes(lines(*ROWS))
    (folder / name).write_text(json.dumps(entry))
    return folder / name


@pytest.mark.parametrize("name", ["task.json", "mine.json"])
def test_a_task_file_has_files_fields_labels_prompts_and_a_metric(name, tmp_path):
    task = load_task(write(tmp_path / "news", ENTRY, name))
    assert (len(task.train), len(task.validation), len(task.test)) == (6, 0, 3)
    assert [row["label"] for row in task.test] == [0, 1, 1]
    assert task.metric == "macro_f1"
    assert render(task.prompts[0], task.test[0]) == ("a\nb\nTopic:", ["sports", "arts"], 0)
    assert render(task.prompts[1], task.test[1])[:2] == ("d\nIs this about arts?", ["no", "yes"])
    assert task.name == ("news" if name == TASK_FILE else "mine")
    assert set(task.checksums) == {"a.jsonl", "b.jsonl", name}
    assert task.columns == "reads Title and body, picks topic among sports (0), arts (1)"


def test_the_folder_of_a_task_file_is_the_task(tmp_path):
    entry = {key: value for key, value in ENTRY.items() if key != "files"}
    path = write(tmp_path / "news", entry)
    task = load_task(path.parent)
    assert [len(task.train), len(task.validation), len(task.test)] == [1, 1, 1]
    assert load_task(path).train == task.train
    write(
        tmp_path / "news",
        {"labels": ["1", "0"], "label_field": "topic", "fields": {"body": "text"}},
    )
    assert load_task(tmp_path / "news").prompts == (Prompt("{text}", ("1", "0")),)
    single = write(tmp_path / "news", {**entry, "files": "b.jsonl"})
    assert load_task(single).train == task.train


@pytest.mark.parametrize("name", ["news.json", "test-task.json", "test.json"])
def test_a_task_file_beside_its_rows_is_no_file_of_rows(name, tmp_path):
    path = write(tmp_path, {"prompts": [{"text": "{body}"}], "label_field": "topic"}, name)
    (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
    task = load_task(path)
    assert task.notes[0] == "not used, because not named like a split: b.jsonl"
    assert "is split into train, validation and test" in task.notes[1]


def test_a_task_json_of_another_kind_is_not_used_and_a_note_says_so(tmp_path):
    path = write(tmp_path, {"name": "overruling", "instructions": "..."})
    (tmp_path / "train.jsonl").write_bytes(lines(*[{"input": "a", "target": "b"}] * 3))
    task = load_task(tmp_path)
    assert f"{path} has no key of a task file: not used" in task.notes
    path.unlink()
    assert not any("task file" in note for note in load_task(tmp_path).notes)


def test_labels_may_be_left_to_the_file(tmp_path):
    path = write(tmp_path, {"prompts": [{"text": "{body}"}], "label_field": "topic"})
    task = load_task(path)
    assert task.prompts == (Prompt("{body}", ("0", "1")),)
    assert load_task(path, labels="sports,arts").prompts[0].choices == ("sports", "arts")


def test_a_prompt_may_be_the_same_for_all_rows_if_their_answers_are_not(tmp_path):
    entry = {"prompts": [{"text": "Write a {{short}} title:"}], "target": "{title}"}
    with pytest.raises(ValueError, match="expected columns in single braces"):
        load_task(write(tmp_path, entry))
    entry["prompts"][0]["text"] = "Write a title:"
    task = load_task(write(tmp_path, entry))
    assert render(task.prompts[0], task.train[0]).input == "Write a title:"
    entry = {"prompts": [{"text": "Which is a title?"}], "label_field": "topic"}
    assert load_task(write(tmp_path, entry)).prompts == (Prompt("Which is a title?", ("0", "1")),)


def test_a_target_is_a_text_to_write(tmp_path):
    entry = {"prompts": [{"text": "{body}"}, {"text": "{body}?"}], "target": "{title}!"}
    task = load_task(write(tmp_path, entry))
    assert render(task.prompts[1], task.train[0]).choices[0] in ("a!", "c!", "e!")
    assert (task.metric, task.answer) == ("exact_match", "target")
    assert load_task(tmp_path, target="{body}").prompts[1] == Prompt(
        "{body}?", None, target="{body}"
    )
    own = {"prompts": [{"text": "{body}", "target": "{title}"}, {"text": "{title}", "target": "x"}]}
    assert [prompt.target for prompt in load_task(write(tmp_path, own)).prompts] == ["{title}", "x"]
    write(tmp_path, entry)
    assert load_task(tmp_path, input="<{body}>").prompts == (
        Prompt("<{body}>", None, target="{title}!"),
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"promts": []}, "unknown key 'promts': did you mean 'prompts'"),
        ({"prompts": [{"txt": "{a}"}]}, "unknown key 'txt': did you mean 'text'"),
        ({"prompts": [{}]}, "a prompt has no 'text'"),
        ({"prompts": ["{body}"]}, "'prompts' is ['{body}'], expected a list of objects"),
        ({"prompts": [{"text": "{body"}]}, "expected '}' before end of string"),
        ({"prompts": [{"text": "{body.x}"}]}, "{body.x} is not a column"),
        ({"prompts": [{"text": "{bdy}"}]}, "a prompt names the column 'bdy'"),
        (
            {"prompts": [{"text": "{body}"}, {"text": "{{ body }}: good?"}]},
            "'text' is '{{ body }}: good?', expected columns in single braces: {text}",
        ),
        (
            {"prompts": [{"text": "{{ Body }}{title}"}]},
            "a prompt has {{Body}}, which is the text {Body}: single braces name the column",
        ),
        ({"prompts": [{"text": "{a[b]}", "words": {"a[b]": {}}}]}, "'words' is about {a[b]}"),
        ({"labels": [0, 1]}, "'labels' is [0, 1], expected a list of texts"),
        ({"labels": ["0", "1", "2"]}, "2 choices (sports, arts) for 3 labels (0, 1, 2)"),
        ({"labels": ["0", "0.0"]}, "'labels' is ['0', '0.0'], expected labels that differ"),
        ({"labels": ["x", "X"]}, "'labels' is ['x', 'X'], expected labels that differ"),
        (
            {"choices": ["No", "{title}", "No "]},
            "'choices' is ['No', '{title}', 'No'], expected texts",
        ),
        (
            {"labels": [], "choices": [], "prompts": [{"text": "{body}", "choices": ["a", "a"]}]},
            "'choices' is ['a', 'a'], expected texts that differ",
        ),
        ({"label_field": "topics"}, "'label_field' (default: label) names the column 'topics'"),
        ({"fields": {"Titel": "title"}}, "'fields' names the column 'Titel'"),
        ({"files": {"dev": "a.jsonl"}}, "the split 'dev', expected train, validation, test"),
        ({"files": {"train": 1}}, "'files' is {'train': 1}, expected a path, or an object"),
        ({"files": {"train": [0]}}, "'files' has [0] for train, expected paths"),
        ({"prompts": [{"text": None}]}, "a prompt has no 'text'"),
        ({"prompts": []}, "'choices' needs prompts"),
        ({"choices": [], "prompts": [], "target": "{title}"}, "'target' needs prompts"),
        ({"files": "none.jsonl"}, "none.jsonl"),
        ({"files": {"train": [], "test": []}}, "'files' has [] for train, expected paths"),
        ({"files": {}}, "'files' is empty, expected paths for train, validation, test"),
        ({"choices": ["{text:>999999999}", "b"]}, "task.json: {text} is not a column"),
        ({"target": "{answer"}, "task.json: expected '}' before end of string"),
        ({"target": "{title}"}, "there is a 'target' to write, and there are 'choices' or"),
        ({"metric": "bleu"}, "the metric is 'bleu', expected one of accuracy, macro_f1"),
        ({"metric": 1}, "'metric' is 1, expected a text"),
        ({"messages": "body"}, "'messages' is 'body', expected 'messages': 'fields' gives"),
    ],
)
def test_a_mistake_in_a_task_file_is_one_line(change, words, tmp_path):
    with pytest.raises(ValueError, match=r"\A[^\n]*\Z") as error:
        load_task(write(tmp_path, ENTRY | change))
    assert words in str(error.value)


def test_the_column_of_the_conversations_may_have_another_name(tmp_path):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "train.jsonl").write_bytes(lines(*[{"chat": chat}] * 10))
    entry = {"messages": "messages", "fields": {"chat": "messages"}, "chat_template": "{{ 1 }}"}
    (tmp_path / TASK_FILE).write_text(json.dumps(entry))
    task = load_task(tmp_path)
    assert task.columns == "reads chat, writes what the assistant says"
    assert [row["messages"] for row in task.test] == [chat]
    assert task.spec.chat_template == "{{ 1 }}"


def test_a_text_without_columns_asks_about_choices_that_have_some(tmp_path):
    prompt = {"text": "Which of the two?", "choices": ["{title}", "{body}"]}
    entry = {"prompts": [prompt], "label_field": "topic", "labels": ["0", "1"]}
    task = load_task(write(tmp_path / "own", entry))
    assert render(task.prompts[0], task.test[0])[0] == "Which of the two?"
    entry["prompts"] = [{"text": "Which of the two?"}]
    entry["choices"] = prompt["choices"]
    assert load_task(write(tmp_path / "all", entry)).prompts == task.prompts


def test_labels_in_place_of_a_target_are_written_as_they_are_read(tmp_path):
    """The target stayed, and no command could read the file beside the adapter."""
    entry = {"prompts": [{"text": "{body}"}, {"text": "{body}?"}], "target": "{topic}"}
    task = load_task(write(tmp_path / "news", entry), labels="sports,arts")
    assert task.answer == "choices"
    write_task_file(tmp_path, [("", task.spec)])
    read = read_task_file(tmp_path / TASK_FILE)
    assert read._replace(path=None) == task.spec._replace(path=None)
    assert read.prompts[1] == Prompt("{body}?", ("sports", "arts"))


WRITES = {"text": "{body}", "target": "{title}"}
PICKS = {"text": "{body}", "choices": ["a", "b"]}


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"prompts": [WRITES, PICKS]}, "there is a 'target' to write, and"),
        ({"prompts": [PICKS, WRITES]}, "there is a 'target' to write, and"),
        ({"prompts": [WRITES], "labels": ["0", "1"]}, "there is a 'target' to write, and"),
        ({"prompts": [WRITES, {"text": "{body}"}]}, "1 of 2 prompts have a 'target'"),
        ({"prompts": [{"text": "{body}"}, WRITES]}, "1 of 2 prompts have a 'target'"),
    ],
)
def test_prompts_that_are_answered_in_two_ways_are_refused(entry, words, tmp_path):
    with pytest.raises(ValueError, match=rf"task\.json: {words}"):
        load_task(write(tmp_path, entry))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"label_field": "topic", "labels": ["0", "1"],}', "damaged or cut short"),
        ('{"label_field": "topic", "label": ["0", "1"]}', "unknown key 'label': did you mean"),
        ("[]", "expected a JSON object, found list"),
    ],
)
def test_a_mistake_in_the_task_file_of_a_folder_is_not_passed_over(text, words, tmp_path):
    write(tmp_path / "news", {})
    (tmp_path / "news" / TASK_FILE).write_text(text)
    for name in (tmp_path / "news", tmp_path / "news" / TASK_FILE):
        with pytest.raises(ValueError, match=rf"task\.json: [^\n]*{words}"):
            load_task(name)


def test_a_text_that_is_null_is_not_there(tmp_path):
    prompt = {"text": "{body}", "target": None, "for_model": None, "choices": ["x", "y"]}
    nulls = {"label_field": None, "target": None, "metric": None, "chat_template": None}
    usual = {"prompts": [{"text": "{body}", "choices": ["x", "y"]}], "labels": ["0", "1"]}
    (tmp_path / TASK_FILE).write_text(json.dumps({**usual, "prompts": [prompt], **nulls}))
    read = read_task_file(tmp_path / TASK_FILE)
    (tmp_path / TASK_FILE).write_text(json.dumps(usual))
    assert read == read_task_file(tmp_path / TASK_FILE)
    entry = {"prompts": [{"text": "{body}", "target": None}], "target": "{title}"}
    task = load_task(write(tmp_path / "news", entry))
    assert task.prompts == (Prompt("{body}", None, target="{title}"),)


def test_a_task_file_with_too_few_labels_is_refused_before_it_is_used(tmp_path):
    entry = {"labels": ["0"], "prompts": [{"text": "{a}", "choices": ["x", "y"]}]}
    (tmp_path / TASK_FILE).write_text(json.dumps(entry))
    with pytest.raises(ValueError, match=r"task\.json: 2 choices \(x, y\) for 1 labels \(0\)"):
        read_tasks(tmp_path / TASK_FILE)


def test_a_json_file_with_rows_is_not_a_task_file(tmp_path):
    for content in ("[]", '{"data": []}', "{", '"prompts"', "{}"):
        (tmp_path / "rows.json").write_text(content)
        assert find_task_file(str(tmp_path / "rows.json")) is None
    assert find_task_file(str(tmp_path)) is None
    (tmp_path / TASK_FILE).write_text('{"name": "overruling", "instructions": "..."}')  # RAFT's
    assert find_task_file(str(tmp_path)) is None
    assert find_task_file(str(tmp_path / TASK_FILE)) == tmp_path / TASK_FILE
    assert find_task_file("x" * 5000) is find_task_file("a\0b") is None


@pytest.mark.parametrize("name", ["prompts", "tasks", "files", "messages", "rows"])
def test_rows_are_rows_whatever_their_list_is_called(tmp_path, name):
    rows = [{"prompt": "a", "completion": "b"}] * 3
    (tmp_path / "mine.json").write_text(json.dumps({name: rows}))
    assert find_task_file(str(tmp_path / "mine.json")) is None
    assert load_task(tmp_path / "mine.json").columns == "reads prompt, writes completion"
    # Under this name, it is a mistake in a task file.
    (tmp_path / TASK_FILE).write_text(json.dumps({"prompts": rows}))
    assert find_task_file(str(tmp_path)) == tmp_path / TASK_FILE


def test_a_task_file_may_have_nothing_but_prompts(tmp_path):
    prompts = [{"text": "{a}", "target": "{b}"}, {"text": "{a}?", "target": "{b}"}]
    (tmp_path / "mine.json").write_text(json.dumps({"prompts": prompts}))
    assert find_task_file(str(tmp_path / "mine.json")) == tmp_path / "mine.json"
    (tmp_path / "mine.json").write_text('{"prompts": []}')  # which is a mistake in it
    assert find_task_file(str(tmp_path / "mine.json")) == tmp_path / "mine.json"


# Beside an adapter


@pytest.mark.parametrize(
    "spec",
    [
        TaskSpec(),
        TaskSpec(YES_OR_NO, labels=("0", "1"), label_field="y", metric="macro_f1"),
        TaskSpec((Prompt("{a}", None, target="{b}"),), fields={"A": "a"}),
        TaskSpec(OWN_PROMPTS, messages="messages", chat_template="{{ messages }}"),
    ],
)
def test_what_is_written_is_read(spec, tmp_path):
    write_task_file(tmp_path, [("", spec)])
    assert read_task_file(tmp_path / TASK_FILE)._replace(path=None, sources=()) == spec


def test_every_known_task_can_be_used_without_its_table(tmp_path):
    for name, spec in known_tasks().items():
        write_task_file(tmp_path, [(name, spec)])
        read = read_task_file(tmp_path / TASK_FILE)
        assert read.prompts == spec.prompts
        assert (read.labels, read.label_field) == (tuple(spec.labels), spec.label_field)
        assert (dict(read.fields), read.span_field) == (dict(spec.fields), spec.span_field)
        assert not read.is_published
        assert "address" not in json.dumps(make_entry(spec))


def test_an_adapter_of_several_tasks_has_all_of_them(tmp_path):
    specs = [("a", TaskSpec()), ("b", TaskSpec(YES_OR_NO, labels=("0", "1")))]
    write_task_file(tmp_path, specs)
    found = read_tasks(tmp_path / TASK_FILE)
    assert list(found) == ["a", "b"]
    assert found["b"].labels == ("0", "1")
    with pytest.raises(ValueError, match=r"task\.json holds 2 tasks \(a, b\), expected one"):
        read_task_file(tmp_path / TASK_FILE)
    (tmp_path / TASK_FILE).write_text('{"tasks": {}}')
    with pytest.raises(ValueError, match="expected a task, found none"):
        read_tasks(tmp_path / TASK_FILE)


@needs_real_data
def test_the_task_of_wsc_reads_rows_as_the_known_task_does(tmp_path):
    from task_files import REAL

    known = load_task("wsc", f"{REAL}/data")
    write_task_file(tmp_path, [("wsc", known.spec)])
    entry = json.loads((tmp_path / TASK_FILE).read_text())
    entry["files"] = {"train": f"{REAL}/data/wsc/train.jsonl", "test": f"{REAL}/data/wsc/val.jsonl"}
    (tmp_path / TASK_FILE).write_text(json.dumps(entry))
    mine = load_task(tmp_path)
    assert mine.train == known.train
    assert [row["label"] for row in mine.test] == [row["label"] for row in known.validation]
