"""Guards the table of tasks and the words of their prompts: what every row must hold, how a row of data is rendered,
and that cutting an input takes words from the middle of the row's own texts and never one of the prompt's."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from string import Formatter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minia3.tasks import known_tasks as known_tasks_module
from minia3.tasks.download import HUB
from minia3.tasks.known_tasks import known_tasks
from minia3.tasks.prompts import OWN_PROMPTS, Prompt, fit, for_family, render
from minia3.tasks.task import Source, Task, TaskSpec

COPA = {
    **{"premise": "I fell.", "choice1": "I was ill.", "choice2": "I sang. ", "question": "cause"},
    **{"label": 0, "idx": 7},
}
PROMPTS = [
    pytest.param(task, p, id=f"{task}-{n}")
    for task, row in known_tasks().items()
    for n, p in enumerate(row.prompts)
]


def n_words(text):
    return len(text.split())


# The table

T_FEW = {  # task -> its shots, and the splits of its files
    **dict.fromkeys(("rte", "cb", "copa", "wic", "wsc", "boolq"), (32, {"train", "val", "test"})),
    **dict.fromkeys(
        ("anli-r1", "anli-r2", "anli-r3", "winogrande"), (50, {"train", "dev", "test"})
    ),
    "hellaswag": (20, {"train", "val", "test"}),
    "storycloze": (
        70,
        {f"cloze_test_{x}__spring2016 - cloze_test_ALL_{x}" for x in ("val", "test")},
    ),
    "sst2": (16, {"train", "dev", "test"}),
    "mrpc": (32, {"train", "dev", "test"}),
}
RAFT = {
    *(
        "ade_corpus_v2",
        "banking_77",
        "neurips_impact_statement_risks",
        "one_stop_english",
        "overruling",
    ),
    *(
        "semiconductor_org_types",
        "systematic_review_inclusion",
        "tai_safety_research",
        "terms_of_service",
    ),
    *("tweet_eval_hate", "twitter_complaints"),
}
LABELS = {
    "rte": ["entailment", "not_entailment"],
    "cb": ["entailment", "contradiction", "neutral"],
    **{name: ["e", "n", "c"] for name in ("anli-r1", "anli-r2", "anli-r3")},
    **{name: ["false", "true"] for name in ("wic", "wsc", "boolq")},
    **{name: ["0", "1"] for name in ("copa", "sst2", "mrpc")},
    **{name: ["1", "2"] for name in ("winogrande", "storycloze")},
    "hellaswag": ["0", "1", "2", "3"],
}
KNOWN = [name for name, row in known_tasks().items() if row.sources]
TABLE = Path(known_tasks_module.__file__).with_name("tasks.json")


class Named(dict):
    """A row that has whatever field is asked for: its own name, or of `endings` four."""

    def __missing__(self, name):
        return [f"<{name} {i}>" for i in range(4)] if name == "endings" else f"<{name}>"

    def __or__(self, other):
        return Named({**self, **other})


def fields(*texts):
    return {
        name.partition("[")[0]
        for text in texts
        for _, name, _, _ in Formatter().parse(text)
        if name
    }


def test_the_table_has_all_tasks_of_t_few_and_raft_and_their_shots():
    assert set(known_tasks()) == {*T_FEW, *(f"raft/{name}" for name in RAFT), "same-colour"}
    for name, (shots, files) in T_FEW.items():
        assert known_tasks()[name].shots == shots
        assert {
            Path(file).stem for source in known_tasks()[name].sources for file in source.files
        } == files
        assert known_tasks()[name].metric == "accuracy"
        assert known_tasks()[name].labels == LABELS[name]
    assert [name for name, row in known_tasks().items() if row.per_class] == ["sst2"]
    for name in RAFT:
        row = known_tasks()[f"raft/{name}"]
        assert (row.shots, row.metric, row.label) == (50, "macro_f1", "Label")
        files = {file: f"data/{name}/{file}" for file in ("train.csv", "test_unlabeled.csv")}
        assert row.sources == [Source("https://huggingface.co/datasets/ought/raft", files)]


@pytest.mark.skipif(
    "MINIA3_TEST_DATA" not in os.environ, reason="MINIA3_TEST_DATA is not set: no real data sets"
)
@pytest.mark.parametrize("name", sorted(RAFT))
def test_raft_has_the_labels_of_its_own_files_in_their_order_and_spelling(name):
    file = Path(os.environ["MINIA3_TEST_DATA"], "data", "raft", name, "task.json")
    assert (
        known_tasks()[f"raft/{name}"].labels
        == json.loads(file.read_text("utf-8"))["label_columns"]["Label"]
    )


@pytest.mark.parametrize("name", known_tasks())
def test_a_row_says_where_its_files_are_and_what_they_must_be(name):
    row = known_tasks()[name]
    assert (not row.sources) == bool(row.shipped) == (not row.labels)
    assert len({label.lower() for label in row.labels}) == len(row.labels), (
        "they are compared in lower case"
    )
    files = [file for source in row.sources for file in source.files]
    assert len(set(files)) == len(files)
    assert len({Path(file).suffix for file in files}) == bool(files)
    for source in row.sources:
        assert source.address.startswith("https://")
        on_request = name == "storycloze" or name.startswith("raft/")
        assert re.fullmatch("" if on_request else r"[0-9a-f]{64}", source.sha256)
        assert (source.bytes == 0) == on_request
        members = list(source.files.values())
        if source.address.endswith(".zip"):
            assert len(set(members)) == len(members) == 3
        elif not source.address.startswith(HUB):
            assert members == [""] * len(members)


@pytest.mark.parametrize("name", KNOWN)
def test_a_task_has_five_different_prompts_for_every_model(name):
    prompts = for_family(known_tasks()[name].prompts, None)
    assert len({prompt.text for prompt in prompts}) == len(prompts) >= 5


@pytest.mark.parametrize("name", KNOWN)
def test_answers_are_of_several_kinds_and_of_banking_77_of_its_many(name):
    n_kinds = len({prompt.choices for prompt in for_family(known_tasks()[name].prompts, None)})
    row_has_choices = name in ("hellaswag", "storycloze", "winogrande", "copa")
    assert n_kinds >= (
        1 if row_has_choices or name in ("raft/banking_77", "raft/semiconductor_org_types") else 2
    )


@pytest.mark.parametrize("prompt", [param.values[1] for param in PROMPTS])
def test_no_prompt_ends_in_white_space_and_no_choice_has_any_around_it(prompt):
    assert prompt.text == prompt.text.strip()
    assert "  " not in prompt.text
    for choice in prompt.choices or ():
        assert choice == choice.strip() != ""


@pytest.mark.parametrize("name", KNOWN)
def test_every_prompt_renders_has_a_different_choice_for_each_label_and_asks_about_what_its_task_is_about(
    name,
):
    """check_row renders the first prompt to see whether a row has its fields: it has all that any prompt has."""
    first = known_tasks()[name].prompts[0]
    all_fields = fields(first.text, *first.choices)
    main = {
        "rte": {"premise", "hypothesis"},
        "cb": {"premise", "hypothesis"},
        "copa": {"premise", "question"},
    }
    main |= {"wic": {"word", "sentence1", "sentence2"}, "wsc": {"text", "span1_text", "span2_text"}}
    main |= {"hellaswag": {"ctx", "endings"}, "winogrande": {"sentence", "option1", "option2"}}
    main |= {
        "storycloze": {
            *(f"input_sentence_{i}" for i in (1, 2, 3, 4)),
            "sentence_quiz1",
            "sentence_quiz2",
        }
    }
    main |= {
        "boolq": {"passage", "question"},
        "sst2": {"sentence"},
        "mrpc": {"sentence1", "sentence2"},
    }
    main |= {name: {"premise", "hypothesis"} for name in ("anli-r1", "anli-r2", "anli-r3")}
    for prompt in known_tasks()[name].prompts:
        row = Named(label=0, question="cause") if prompt.words else Named(label=0)
        rendered = render(prompt, row)
        assert (
            len(set(rendered.choices)) == len(rendered.choices) == len(known_tasks()[name].labels)
        )
        used = fields(prompt.text, *prompt.choices)
        assert main.get(name, set()) <= used <= all_fields
        assert used
        for field in fields(prompt.text) - {"question"}:
            assert f"<{field}>" in rendered.input


def test_yes_is_the_answer_of_the_label_that_says_yes():
    """Yes, True and their like stand for the same label in every prompt of a task, and No and its like never do."""
    good, bad = {"yes", "true", "right", "the same"}, {"no", "false", "wrong", "different"}
    yes = {"boolq": 1, "wic": 1, "wsc": 1, "mrpc": 1, "sst2": 1, "rte": 0, "cb": 0}
    yes |= dict.fromkeys(("anli-r1", "anli-r2", "anli-r3"), 0)
    labels = {"overruling": 1, "terms_of_service": 1, "neurips_impact_statement_risks": 1} | {
        **dict.fromkeys(("ade_corpus_v2", "systematic_review_inclusion", "tai_safety_research"), 0),
        **dict.fromkeys(("tweet_eval_hate", "twitter_complaints"), 0),
    }
    yes |= {f"raft/{name}": label for name, label in labels.items()}
    seen = 0
    for name, label in yes.items():
        for prompt in known_tasks()[name].prompts:
            for i, choice in enumerate(prompt.choices):
                if choice.lower() in good | bad:
                    assert (choice.lower() in good) == (i == label), (name, prompt)
                    seen += 1
    assert seen > 100


def test_the_words_of_a_prompt_and_its_answers_are_the_same_words():
    """A prompt that names the answers ("Yes or No?", "1 or 2") has these and no others."""
    for name in KNOWN:
        for prompt in known_tasks()[name].prompts:
            for pair in (("Yes", "No"), ("True", "False"), ("yes", "no")):
                if re.search(rf"\b{pair[0]}(, {pair[1]}\b|,? or {pair[1]}\b)", prompt.text):
                    assert set(pair) <= set(prompt.choices), prompt


def test_the_table_is_sorted_and_has_each_prompt_on_a_line_of_its_own():
    def unique(pairs):
        assert len(dict(pairs)) == len(pairs), "no key twice"
        return dict(pairs)

    text = TABLE.read_text("utf-8")
    table = json.loads(text, object_pairs_hook=unique)
    assert list(table) == sorted(table)
    lines = {line.strip().removesuffix(",") for line in text.splitlines()}
    for row in table.values():
        assert {
            json.dumps(prompt, ensure_ascii=False) for prompt in row.get("prompts", ())
        } <= lines


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"promts": []}, "rte: .*unexpected keyword argument 'promts'"),
        (
            {"prompts": [{"text": "a", "choice": ["b", "c"]}]},
            "rte: .*unexpected keyword argument 'choice'",
        ),
        (
            {"sources": [{"address": "a", "files": {}, "sha": ""}]},
            "rte: .*unexpected keyword argument 'sha'",
        ),
        ({"like": "rtee"}, "rte: 'rtee'"),
    ],
)
def test_a_key_that_no_task_has_is_an_error(tmp_path, change, words):
    row = {"sources": [], "labels": ["x", "y"], "prompts": [{"text": "{a}"}]}
    (tmp_path / "t.json").write_text(json.dumps({"cb": row, "rte": {**row, **change}}))
    with pytest.raises(ValueError, match=rf"t\.json: {words}"):
        known_tasks(tmp_path / "t.json")


def test_a_row_that_is_like_another_says_only_what_differs_and_choices_of_the_task_are_those_of_its_prompts(
    tmp_path,
):
    one = {
        "labels": ["x", "y"],
        "metric": "m",
        "prompts": [{"text": "{a}"}, {"text": "b", "choices": ["c", "d"]}],
    }
    (tmp_path / "t.json").write_text(
        json.dumps({"a": {"like": "b", "choices": ["z", "{w}"]}, "b": one})
    )
    found = known_tasks(tmp_path / "t.json")
    assert found["b"] == TaskSpec(
        (Prompt("{a}", ("x", "y")), Prompt("b", ("c", "d"))), [], ["x", "y"], metric="m"
    )
    assert found["a"] == found["b"]._replace(
        prompts=(Prompt("{a}", ("z", "{w}")), found["b"].prompts[1])
    )


def test_the_table_is_read_when_it_is_first_asked_for_and_only_once():
    code = (
        "from pathlib import Path; from minia3 import data, tasks; assert not tasks.table.cache_info().misses\n"
        "first = tasks.table(); Path.read_text = None; assert tasks.table() is first and 'rte' in first"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_answers_are_of_several_kinds():
    answers = Counter(
        prompt.choices for prompt in known_tasks()["rte"].prompts if prompt.for_model is None
    )
    assert answers[("Yes", "No")] >= 2
    assert answers[("True", "False")] >= 2
    assert answers[("entailment", "not entailment")] == 1


def test_the_first_prompt_of_rte_is_the_one_that_published_figures_are_about():
    text = "{premise}\nQuestion: {hypothesis} True or False?\nAnswer:"
    assert known_tasks()["rte"].prompts[0] == Prompt(text, ("True", "False"))


def test_only_t5_v1_0_gets_the_form_that_it_was_trained_on():
    prompts = known_tasks()["rte"].prompts
    (form,) = for_family(prompts, "t5-v1.0")
    row = {"premise": "It rains.", "hypothesis": "It is wet.", "label": 1, "idx": 0}
    rendered = (
        "rte sentence1: It rains. sentence2: It is wet.",
        ["entailment", "not_entailment"],
        1,
    )
    assert render(form, row) == rendered
    for family in ("t5-v1.1", "t0", "flan-t5", "llama", None):
        assert for_family(prompts, family) == tuple(prompt for prompt in prompts if prompt != form)
    assert for_family(known_tasks()["cb"].prompts, "t5-v1.0") == known_tasks()["cb"].prompts


def test_the_families_that_saw_a_task_are_named():
    superglue = ("rte", "cb", "copa", "boolq", "wic", "wsc")
    assert all(set(known_tasks()[name].seen) == {"t5-v1.0", "flan-t5"} for name in superglue), (
        "not T5 v1.1, not T0"
    )
    assert all(
        set(known_tasks()[name].seen) == {"t5-v1.0", "flan-t5", "t0"} for name in ("sst2", "mrpc")
    )
    others = ("anli-r1", "anli-r2", "anli-r3", "hellaswag", "winogrande", "storycloze")
    assert all(known_tasks()[name].seen == ["flan-t5"] for name in others)


def test_known_families_are_those_of_the_table_of_models():
    from minia3.checkpoints.known_models import known_models

    families = {model.family for model in known_models().values()}
    for row in known_tasks().values():
        assert {
            *row.seen,
            *(prompt.for_model for prompt in row.prompts if prompt.for_model),
        } <= families


@pytest.mark.parametrize(
    ("labels", "split"), [([0, 1], "test"), ([0, -1], "validation"), ([], "validation")]
)
def test_a_run_reports_on_test_only_if_all_of_it_is_labelled(labels, split):
    test = [{"label": label} for label in labels]
    validation = [{"label": 0}]
    task = Task("t", [], validation, test, OWN_PROMPTS, "accuracy", (), {}, [])
    assert task.evaluation == (split, {"test": test, "validation": validation}[split])


def test_the_tables_do_not_import_torch():
    code = "import sys, minia3.tasks; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Rendering


def test_copas_question_is_put_into_the_words_of_the_prompt():
    cause, effect = ({**COPA, "question": question} for question in ("cause", "effect"))
    prompt = Prompt(
        "{premise} {question}:",
        ("{choice1}", "{choice2}"),
        {"question": {"cause": "because", "effect": "so"}},
    )
    assert render(prompt, cause) == ("I fell. because:", ["I was ill.", "I sang."], 0)
    assert render(prompt, effect).input == "I fell. so:"
    assert cause["question"] == "cause", "the row itself stays as it is"
    assert render(prompt._replace(words=None), cause).input == "I fell. cause:"


def test_braces_in_a_value_are_not_formatted_again():
    row = {"premise": "{hypothesis} {0} {", "hypothesis": "}{x}", "label": 0, "idx": 0}
    assert render(Prompt("{premise}|{hypothesis}|", ("{hypothesis}", "b")), row) == (
        "{hypothesis} {0} {|}{x}|",
        ["}{x}", "b"],
        0,
    )
    own = {"input": "{input} {y}", "choices": ["{z}", "{input}"], "label": 1}
    assert render(OWN_PROMPTS[0], own) == ("{input} {y}", ["{z}", "{input}"], 1)


def test_a_row_with_a_target_is_a_row_with_one_choice():
    assert render(OWN_PROMPTS[0], {"input": "2 + 2 =", "target": "4", "label": 0}) == (
        "2 + 2 =",
        ["4"],
        0,
    )


def test_an_unlabelled_row_stays_unlabelled():
    assert render(OWN_PROMPTS[0], {"input": "a", "choices": ["b", "c"], "label": -1}).label == -1


@pytest.mark.parametrize(
    ("prompt", "missing"),
    [
        (Prompt("{premise} {hypothesis}", ("a",)), "'hypothesis'"),
        (Prompt("{premise}", ("{choice1}",)), "'choice1'"),
        (Prompt("{premise} {question}", ("a",), {"question": {"cause": "because"}}), "'question'"),
        (Prompt("{premise}", ("a",), {"premise": {"cause": "because"}}), "'It rains.'"),
        (OWN_PROMPTS[0]._replace(text="{premise}"), "'target'"),
    ],
)
def test_what_a_row_lacks_is_named(prompt, missing):
    with pytest.raises(ValueError, match=missing):
        render(prompt, {"premise": "It rains.", "label": 0})


# Cutting

PAIR = Prompt("{premise}\nQuestion: {hypothesis} True or False?\nAnswer:", ("True", "{premise}"))


def row_of(n_premise, n_hypothesis, **more):
    premise = " ".join(f"p{i}" for i in range(n_premise))
    return {
        "premise": premise,
        "hypothesis": " ".join(f"h{i}" for i in range(n_hypothesis)),
        "label": 0,
        "idx": 5,
        **more,
    }


def test_what_fits_is_not_touched():
    row = row_of(3, 2, premise="  p0\n\np1  p2 ")
    assert fit(PAIR, row, n_words, 10) == (render(PAIR, row), False)
    assert fit(PAIR, row, n_words, 9)[1]


def test_the_longest_field_loses_its_middle_and_the_rest_remains():
    row = row_of(10, 3)
    before = dict(row)
    cut, was_cut = fit(PAIR, row, n_words, 13)
    assert was_cut
    assert cut.input == "p0 p1 p2 p8 p9\nQuestion: h0 h1 h2 True or False?\nAnswer:"
    assert cut.choices == ["True", row["premise"]], "choices are never cut"
    assert row == before


def test_the_longest_field_is_found_by_its_length_and_not_its_place():
    cut, _ = fit(PAIR, row_of(3, 10), n_words, 12)
    assert cut.input == "p0 p1 p2\nQuestion: h0 h1 h8 h9 True or False?\nAnswer:"


def test_of_fields_of_one_length_the_first_by_name_is_cut():
    row = {name: "a b c" for name in "zyxwvutsrqponm"}
    prompt = Prompt(" ".join(f"{name}: {{{name}}}" for name in row), ("yes", "no"))
    cut, _ = fit(prompt, row | {"label": 0, "idx": 0}, n_words, 4 * len(row) - 1)
    assert cut.input == render(prompt, row | {"m": "a c", "label": 0}).input


def test_the_next_longest_is_cut_when_one_word_is_left_of_the_longest():
    cut, _ = fit(PAIR, row_of(9, 6), n_words, 9)
    assert cut.input == "p0\nQuestion: h0 h1 h5 True or False?\nAnswer:"
    cut, _ = fit(PAIR, row_of(9, 6), n_words, 7)
    assert cut.input == "p0\nQuestion: h0 True or False?\nAnswer:"


def test_a_prompt_that_cannot_fit_is_an_error_which_names_the_row():
    with pytest.raises(ValueError, match=r"row 5 .* 6\b"):
        fit(PAIR, row_of(9, 6), n_words, 6)


def test_of_own_input_the_head_and_the_tail_remain_with_their_line_breaks():
    row = {
        "input": "Translate:\n" + " ".join("x" * 50) + "\n\nAnswer in French:",
        "target": "y",
        "label": 0,
        "idx": 0,
    }
    cut, was_cut = fit(OWN_PROMPTS[0], row, n_words, 8)
    assert (cut.input, was_cut) == ("Translate:\nx x x x\n\nAnswer in French:", True)


def test_text_without_spaces_can_be_cut_too():
    text = "".join(chr(0x4E00 + i) for i in range(200))
    cut, _ = fit(OWN_PROMPTS[0], {"input": text, "target": "y", "label": 0, "idx": 0}, len, 100)
    head, tail = cut.input.split(" ")
    assert text.startswith(head)
    assert text.endswith(tail)
    assert 60 < len(head + tail) < 100


def test_words_that_stand_for_a_value_belong_to_the_prompt():
    prompt = Prompt(
        "{premise} {question}",
        ("a",),
        {"question": {"the cause": "which was so because of what follows"}},
    )
    row = {"premise": "a b c d", "question": "the cause", "label": 0, "idx": 0}
    assert fit(prompt, row, n_words, 9)[0].input == "a d which was so because of what follows"
    with pytest.raises(ValueError, match="does not fit"):
        fit(prompt, row, n_words, 7)


WORDS = st.lists(st.text("abäß{}.", min_size=1, max_size=4), min_size=1, max_size=40).map(" ".join)


@settings(deadline=None, max_examples=150)
@given(premise=WORDS, hypothesis=WORDS, length=st.integers(1, 90))
def test_a_cut_input_fits_keeps_the_prompts_words_and_loses_no_more_than_it_must(
    premise, hypothesis, length
):
    row = {"premise": premise, "hypothesis": hypothesis, "label": 0, "idx": 0}
    whole = n_words(render(PAIR, row).input)
    if length < 7:  # the prompt's own five words, and one of each field
        with pytest.raises(ValueError, match="does not fit"):
            fit(PAIR, row, n_words, length)
        return
    cut, was_cut = fit(PAIR, row, n_words, length)
    assert was_cut == (whole > length)
    assert n_words(cut.input) == min(whole, length)
    kept = re.fullmatch(r"(.+)\nQuestion: (.+) True or False\?\nAnswer:", cut.input).groups()
    for part, text in zip(kept, (premise, hypothesis), strict=True):
        part, text = part.split(), text.split()
        n_head, n_tail = (len(part) + 1) // 2, len(part) // 2
        assert part == text[:n_head] + text[len(text) - n_tail :]
