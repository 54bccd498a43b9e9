"""The table of tasks: every entry is complete, and the words of a prompt agree with its answers."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from string import Formatter

import pytest
from task_files import REAL, needs_real_data

from minia3.tasks import known_tasks as known_tasks_module
from minia3.tasks.download import HUB, file_names
from minia3.tasks.known_tasks import known_tasks, make_spec, with_inherited
from minia3.tasks.prompts import Prompt, for_family, render
from minia3.tasks.task import Source, TaskSpec

TABLE = Path(known_tasks_module.__file__).with_name("tasks.json")
DOWNLOADED = [name for name, spec in known_tasks().items() if spec.sources]

SUPERGLUE = ("rte", "cb", "copa", "wic", "wsc", "boolq")
ANLI = ("anli-r1", "anli-r2", "anli-r3")
RAFT = (
    "ade_corpus_v2",
    "banking_77",
    "neurips_impact_statement_risks",
    "one_stop_english",
    "overruling",
    "semiconductor_org_types",
    "systematic_review_inclusion",
    "tai_safety_research",
    "terms_of_service",
    "tweet_eval_hate",
    "twitter_complaints",
)
T_FEW_SHOTS = {
    **dict.fromkeys(SUPERGLUE, 32),
    **dict.fromkeys(ANLI, 50),
    "winogrande": 50,
    "hellaswag": 20,
    "storycloze": 70,
    "sst2": 16,
    "mrpc": 32,
}
FILE_NAMES = {
    **{name: {"train", "val", "test"} for name in (*SUPERGLUE, "hellaswag")},
    **{name: {"train", "dev", "test"} for name in (*ANLI, "winogrande", "sst2", "mrpc")},
    "storycloze": {
        "cloze_test_val__spring2016 - cloze_test_ALL_val",
        "cloze_test_test__spring2016 - cloze_test_ALL_test",
    },
}
LABELS = {
    "rte": ["entailment", "not_entailment"],
    "cb": ["entailment", "contradiction", "neutral"],
    **{name: ["e", "n", "c"] for name in ANLI},
    **{name: ["false", "true"] for name in ("wic", "wsc", "boolq")},
    **{name: ["0", "1"] for name in ("copa", "sst2", "mrpc")},
    **{name: ["1", "2"] for name in ("winogrande", "storycloze")},
    "hellaswag": ["0", "1", "2", "3"],
}
# The fields that every prompt of a task must use.
MAIN_FIELDS = {
    **{name: {"premise", "hypothesis"} for name in ("rte", "cb", *ANLI)},
    "copa": {"premise", "question"},
    "wic": {"word", "sentence1", "sentence2"},
    "wsc": {"text", "span1_text", "span2_text"},
    "boolq": {"passage", "question"},
    "sst2": {"sentence"},
    "mrpc": {"sentence1", "sentence2"},
    "hellaswag": {"ctx", "endings"},
    "winogrande": {"sentence", "option1", "option2"},
    "storycloze": {
        "input_sentence_1",
        "input_sentence_2",
        "input_sentence_3",
        "input_sentence_4",
        "sentence_quiz1",
        "sentence_quiz2",
    },
}


class RowOfNames(dict):
    """A row that has every field: the value is the field's name in brackets, and `endings` has four
    values.
    """

    def __missing__(self, name):
        if name == "endings":
            return [f"<endings {i}>" for i in range(4)]
        return f"<{name}>"

    def __or__(self, other):
        return RowOfNames({**self, **other})


def fields_of(*texts):
    """Return the names of the fields in format strings."""
    names = set()
    for text in texts:
        for _, name, _, _ in Formatter().parse(text):
            if name:
                names.add(name.partition("[")[0])
    return names


def all_prompts():
    for name, spec in known_tasks().items():
        for i, prompt in enumerate(spec.prompts):
            yield pytest.param(prompt, id=f"{name}-{i}")


def test_the_table_has_the_tasks_of_t_few_and_raft():
    raft_names = [f"raft/{name}" for name in RAFT]
    assert set(known_tasks()) == {*T_FEW_SHOTS, *raft_names, "same-colour"}


@pytest.mark.parametrize("name", T_FEW_SHOTS)
def test_a_task_has_t_fews_shots_and_its_authors_labels_and_files(name):
    spec = known_tasks()[name]
    assert spec.shots == T_FEW_SHOTS[name]
    assert spec.metric == "", "the first metric for rows with choices, which is the accuracy"
    assert spec.labels == LABELS[name]
    assert spec.per_class == (name == "sst2")
    assert {Path(file).stem for file in file_names(spec.sources)} == FILE_NAMES[name]


@pytest.mark.parametrize("name", RAFT)
def test_a_task_of_raft_comes_from_the_hub_and_has_50_shots(name):
    spec = known_tasks()[f"raft/{name}"]
    assert (spec.shots, spec.metric, spec.label_field) == (50, "macro_f1", "Label")
    assert not spec.per_class
    files = {file: f"data/{name}/{file}" for file in ("train.csv", "test_unlabeled.csv")}
    assert spec.sources == [Source("https://huggingface.co/datasets/ought/raft", files)]


@needs_real_data
@pytest.mark.parametrize("name", RAFT)
def test_raft_has_its_authors_labels_in_their_order_and_spelling(name):
    file = Path(REAL, "data", "raft", name, "task.json")
    columns = json.loads(file.read_text("utf-8"))["label_columns"]
    assert known_tasks()[f"raft/{name}"].labels == columns["Label"]


@pytest.mark.parametrize("name", known_tasks())
def test_an_entry_says_where_its_files_are_and_what_they_must_be(name):
    spec = known_tasks()[name]
    assert (not spec.sources) == bool(spec.shipped) == (not spec.labels)
    lower_labels = {label.lower() for label in spec.labels}
    assert len(lower_labels) == len(spec.labels), "they are compared in lower case"
    files = file_names(spec.sources)
    assert len(set(files)) == len(files)
    assert len({Path(file).suffix for file in files}) == bool(files)
    is_on_request = name == "storycloze" or name.startswith("raft/")
    for source in spec.sources:
        assert source.address.startswith("https://")
        assert (source.n_bytes == 0) == is_on_request
        assert is_on_request or re.fullmatch(r"[0-9a-f]{64}", source.sha256)
        assert (source.sha256 == "") == is_on_request
        members = list(source.files.values())
        if source.address.endswith(".zip"):
            assert len(set(members)) == len(members) == 3
        elif not source.address.startswith(HUB):
            assert members == [""] * len(members)


@pytest.mark.parametrize("name", DOWNLOADED)
def test_a_task_has_five_different_prompts_for_every_model(name):
    prompts = for_family(known_tasks()[name].prompts, None)
    assert len({prompt.text for prompt in prompts}) == len(prompts) >= 5


@pytest.mark.parametrize("name", DOWNLOADED)
def test_the_prompts_of_a_task_ask_for_several_kinds_of_answers(name):
    prompts = for_family(known_tasks()[name].prompts, None)
    n_kinds = len({prompt.choices for prompt in prompts})
    has_choices_of_the_row = name in ("hellaswag", "storycloze", "winogrande", "copa")
    has_many_labels = name in ("raft/banking_77", "raft/semiconductor_org_types")
    assert n_kinds >= 2 or has_choices_of_the_row or has_many_labels


@pytest.mark.parametrize("prompt", list(all_prompts()))
def test_no_prompt_ends_in_white_space_and_no_choice_has_any_around_it(prompt):
    assert prompt.text == prompt.text.strip()
    assert "  " not in prompt.text
    for choice in prompt.choices or ():
        assert choice == choice.strip() != ""


@pytest.mark.parametrize("name", DOWNLOADED)
def test_every_prompt_has_a_different_choice_for_each_label(name):
    spec = known_tasks()[name]
    for prompt in spec.prompts:
        row = RowOfNames(label=0, question="cause") if prompt.words else RowOfNames(label=0)
        rendered = render(prompt, row)
        assert len(set(rendered.choices)) == len(rendered.choices) == len(spec.labels)
        for field in fields_of(prompt.text) - {"question"}:
            assert f"<{field}>" in rendered.input


@pytest.mark.parametrize("name", DOWNLOADED)
def test_every_prompt_uses_the_main_fields_of_its_task_and_no_field_that_the_first_prompt_lacks(
    name,
):
    """So normalize_row looks at the first prompt alone, to see whether a row has all fields."""
    first = known_tasks()[name].prompts[0]
    for prompt in known_tasks()[name].prompts:
        used = fields_of(prompt.text, *prompt.choices)
        assert used
        assert MAIN_FIELDS.get(name, set()) <= used <= fields_of(first.text, *first.choices)


def test_yes_is_the_answer_of_the_label_that_means_yes():
    """In every prompt of a task, words such as Yes and True stand for this label, and words such as
    No never do.
    """
    positive = {"yes", "true", "right", "the same"}
    negative = {"no", "false", "wrong", "different"}
    label_of_yes = {
        **dict.fromkeys(("boolq", "wic", "wsc", "mrpc", "sst2"), 1),
        **dict.fromkeys(("rte", "cb", *ANLI), 0),
        "raft/overruling": 1,
        "raft/terms_of_service": 1,
        "raft/neurips_impact_statement_risks": 1,
        "raft/ade_corpus_v2": 0,
        "raft/systematic_review_inclusion": 0,
        "raft/tai_safety_research": 0,
        "raft/tweet_eval_hate": 0,
        "raft/twitter_complaints": 0,
    }
    n_seen = 0
    for name, label in label_of_yes.items():
        for prompt in known_tasks()[name].prompts:
            for i, choice in enumerate(prompt.choices):
                if choice.lower() in positive | negative:
                    assert (choice.lower() in positive) == (i == label), (name, prompt)
                    n_seen += 1
    assert n_seen > 100


@pytest.mark.parametrize("name", DOWNLOADED)
def test_a_prompt_that_names_its_answers_has_these_choices(name):
    """A prompt that says "Yes or No?" has the choices Yes and No."""
    for prompt in known_tasks()[name].prompts:
        for yes, no in (("Yes", "No"), ("True", "False"), ("yes", "no")):
            if re.search(rf"\b{yes}(, {no}\b|,? or {no}\b)", prompt.text):
                assert {yes, no} <= set(prompt.choices), prompt


def test_the_table_is_sorted_and_has_each_prompt_on_a_line():
    def without_repeats(pairs):
        assert len(dict(pairs)) == len(pairs), "a key comes twice"
        return dict(pairs)

    text = TABLE.read_text("utf-8")
    table = json.loads(text, object_pairs_hook=without_repeats)
    assert list(table) == sorted(table)
    lines = {line.strip().removesuffix(",") for line in text.splitlines()}
    for entry in table.values():
        for prompt in entry.get("prompts", ()):
            assert json.dumps(prompt, ensure_ascii=False) in lines


def test_an_entry_takes_what_it_leaves_out_from_the_entry_that_it_is_like():
    parent = {
        "labels": ["x", "y"],
        "metric": "m",
        "prompts": [{"text": "{a}"}, {"text": "b", "choices": ["c", "d"]}],
    }
    table = {"a": {"like": "b", "choices": ["z", "{w}"]}, "b": parent}
    found = {name: make_spec(with_inherited(table, name)) for name in table}
    prompts = (Prompt("{a}", ("x", "y")), Prompt("b", ("c", "d")))
    assert found["b"] == TaskSpec(prompts, [], ["x", "y"], metric="m")
    # The choices of an entry apply to the prompts that name none.
    changed_prompts = (Prompt("{a}", ("z", "{w}")), prompts[1])
    assert found["a"] == found["b"]._replace(prompts=changed_prompts)


@pytest.mark.slow
def test_the_table_is_read_once_and_only_when_it_is_needed():
    code = (
        "from pathlib import Path\n"
        "import minia3.tasks.splits\n"
        "from minia3.tasks.known_tasks import known_tasks\n"
        "assert not known_tasks.cache_info().misses\n"
        "first = known_tasks()\n"
        "Path.read_text = None\n"
        "assert known_tasks() is first and 'rte' in first"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_answers_to_rte_are_of_several_kinds():
    prompts = for_family(known_tasks()["rte"].prompts, None)
    n_prompts = Counter(prompt.choices for prompt in prompts)
    assert n_prompts[("Yes", "No")] >= 2
    assert n_prompts[("True", "False")] >= 2
    assert n_prompts[("entailment", "not entailment")] == 1


def test_the_first_prompt_of_rte_is_the_prompt_of_published_figures():
    text = "{premise}\nQuestion: {hypothesis} True or False?\nAnswer:"
    assert known_tasks()["rte"].prompts[0] == Prompt(text, ("True", "False"))


def test_only_t5_v1_0_gets_the_form_that_it_was_pre_trained_on():
    prompts = known_tasks()["rte"].prompts
    (form,) = for_family(prompts, "t5-v1.0")
    row = {"premise": "It rains.", "hypothesis": "It is wet.", "label": 1, "idx": 0}
    text = "rte sentence1: It rains. sentence2: It is wet."
    assert render(form, row) == (text, ["entailment", "not_entailment"], 1)
    for family in ("t5-v1.1", "t0", "flan-t5", "llama", None):
        assert for_family(prompts, family) == tuple(prompt for prompt in prompts if prompt != form)
    assert for_family(known_tasks()["cb"].prompts, "t5-v1.0") == known_tasks()["cb"].prompts


def test_the_families_that_saw_a_task_are_named():
    """T5 v1.1 saw none of them, and T0 saw no task of SuperGLUE. T0p and T0pp saw more than T0."""
    for name in ("rte", "cb"):
        assert set(known_tasks()[name].seen) == {"t5-v1.0", "flan-t5"}
    for name in set(SUPERGLUE) - {"rte", "cb"}:
        assert set(known_tasks()[name].seen) == {"t5-v1.0", "flan-t5", "t0pp"}
    for name in ("sst2", "mrpc"):
        assert set(known_tasks()[name].seen) == {"t5-v1.0", "flan-t5", "t0", "t0p", "t0pp"}
    assert set(known_tasks()["hellaswag"].seen) == {"flan-t5", "t0p", "t0pp"}
    for name in (*ANLI, "winogrande", "storycloze"):
        assert known_tasks()[name].seen == ["flan-t5"]


def test_families_are_those_of_the_table_of_models():
    from minia3.checkpoints.known_models import KNOWN_MODELS

    families = {model.family for model in KNOWN_MODELS.values()}
    for spec in known_tasks().values():
        assert set(spec.seen) <= families
        for prompt in spec.prompts:
            assert prompt.for_model in {None, *families}


@pytest.mark.slow
def test_the_table_imports_neither_torch_nor_numpy():
    code = (
        "import sys, minia3.tasks.known_tasks\n"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
