"""Guards the table of tasks and the words of their prompts: what every row must hold, how a row of data is rendered,
and that cutting an input takes words from the middle of the row's own texts and never one of the prompt's."""

import re
import subprocess
import sys
from collections import Counter
from string import Formatter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minia3.prompts import OWN, Prompt, fit, for_family, render
from minia3.tasks import TASKS, Task

ROWS = {
    "rte": {"premise": "It rains {0}.", "hypothesis": "It is wet.", "label": 1, "idx": 7},
    "cb": {"premise": "A: Is it so? B: I think so.", "hypothesis": "it is so", "label": 2, "idx": 7},
    "copa": {
        **{"premise": "I fell.", "choice1": "I was ill.", "choice2": "I sang. ", "question": "cause"},
        **{"label": 0, "idx": 7},
    },
}
PROMPTS = [pytest.param(task, p, id=f"{task}-{n}") for task, row in TASKS.items() for n, p in enumerate(row.prompts)]


def n_words(text):
    return len(text.split())


# The table


@pytest.mark.parametrize("name", TASKS)
def test_a_row_says_where_its_files_are_and_what_they_must_be(name):
    row = TASKS[name]
    assert (row.archive is None) == bool(row.shipped) == (not row.labels)
    if row.archive:
        assert re.fullmatch(r"https://\S+\.zip", row.archive.address)
        assert re.fullmatch(r"[0-9a-f]{64}", row.archive.sha256)
        assert row.archive.size > 0
        assert {"train", "val"} <= set(row.archive.members) <= {"train", "val", "test"}
        assert len(set(row.archive.members.values())) == len(row.archive.members)
        assert all(label == label.lower() for label in row.labels), "labels are compared in lower case"


@pytest.mark.parametrize("name", [name for name, row in TASKS.items() if row.archive])
def test_a_task_has_five_different_prompts_for_every_model(name):
    prompts = for_family(TASKS[name].prompts, None)
    assert len({prompt.text for prompt in prompts}) == len(prompts) >= 5


@pytest.mark.parametrize("prompt", [param.values[1] for param in PROMPTS])
def test_no_prompt_ends_in_white_space_and_no_choice_has_any_around_it(prompt):
    assert prompt.text == prompt.text.rstrip()
    for choice in prompt.choices or ():
        assert choice == choice.strip() != ""


@pytest.mark.parametrize(("task", "prompt"), [p for p in PROMPTS if p.values[0] in ROWS])
def test_a_prompt_uses_only_fields_of_its_task_and_has_a_different_choice_for_each_label(task, prompt):
    rendered = render(prompt, ROWS[task])
    assert len(set(rendered.choices)) == len(rendered.choices) == len(TASKS[task].labels)
    assert "premise" in {name for _, name, _, _ in Formatter().parse(prompt.text)}
    assert ROWS[task]["premise"] in rendered.input


def test_the_answers_are_of_several_kinds():
    answers = Counter(prompt.choices for prompt in TASKS["rte"].prompts if prompt.for_model is None)
    assert answers[("Yes", "No")] >= 2
    assert answers[("True", "False")] >= 2
    assert answers[("entailment", "not entailment")] == 1


def test_the_first_prompt_of_rte_is_the_one_that_published_figures_are_about():
    text = "{premise}\nQuestion: {hypothesis} True or False?\nAnswer:"
    assert TASKS["rte"].prompts[0] == Prompt(text, ("True", "False"))


def test_only_t5_v1_0_gets_the_form_that_it_was_trained_on():
    prompts = TASKS["rte"].prompts
    (form,) = for_family(prompts, "t5-v1.0")
    row = {"premise": "It rains.", "hypothesis": "It is wet.", "label": 1, "idx": 0}
    rendered = ("rte sentence1: It rains. sentence2: It is wet.", ["entailment", "not_entailment"], 1)
    assert render(form, row) == rendered
    for family in ("t5-v1.1", "t0", "flan-t5", "llama", None):
        assert for_family(prompts, family) == tuple(prompt for prompt in prompts if prompt != form)
    assert for_family(TASKS["cb"].prompts, "t5-v1.0") == TASKS["cb"].prompts


@pytest.mark.parametrize("name", ["rte", "cb", "copa"])
def test_t5_v1_0_and_flan_t5_have_seen_superglue_and_t5_v1_1_and_t0_have_not(name):
    assert set(TASKS[name].seen) == {"t5-v1.0", "flan-t5"}


def test_known_families_are_those_of_the_table_of_models():
    from minia3.models import KNOWN

    families = {model.family for model in KNOWN.values()}
    for row in TASKS.values():
        assert {*row.seen, *(prompt.for_model for prompt in row.prompts if prompt.for_model)} <= families


@pytest.mark.parametrize(("labels", "split"), [([0, 1], "test"), ([0, -1], "validation"), ([], "validation")])
def test_a_run_reports_on_test_only_if_all_of_it_is_labelled(labels, split):
    test = [{"label": label} for label in labels]
    validation = [{"label": 0}]
    task = Task("t", [], validation, test, OWN, "accuracy", (), {}, [])
    assert task.evaluation == (split, {"test": test, "validation": validation}[split])


def test_the_tables_do_not_import_torch():
    code = "import sys, minia3.tasks; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Rendering


def test_copas_question_is_put_into_the_words_of_the_prompt():
    cause, effect = ({**ROWS["copa"], "question": question} for question in ("cause", "effect"))
    prompt = Prompt(
        "{premise} {question}:", ("{choice1}", "{choice2}"), {"question": {"cause": "because", "effect": "so"}}
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
    assert render(OWN[0], own) == ("{input} {y}", ["{z}", "{input}"], 1)


def test_a_row_with_a_target_is_a_row_with_one_choice():
    assert render(OWN[0], {"input": "2 + 2 =", "target": "4", "label": 0}) == ("2 + 2 =", ["4"], 0)


def test_an_unlabelled_row_stays_unlabelled():
    assert render(OWN[0], {"input": "a", "choices": ["b", "c"], "label": -1}).label == -1


@pytest.mark.parametrize(
    ("prompt", "missing"),
    [
        (Prompt("{premise} {hypothesis}", ("a",)), "'hypothesis'"),
        (Prompt("{premise}", ("{choice1}",)), "'choice1'"),
        (Prompt("{premise} {question}", ("a",), {"question": {"cause": "because"}}), "'question'"),
        (Prompt("{premise}", ("a",), {"premise": {"cause": "because"}}), "'It rains.'"),
        (OWN[0]._replace(text="{premise}"), "'target'"),
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


def test_the_next_longest_is_cut_when_one_word_is_left_of_the_longest():
    cut, _ = fit(PAIR, row_of(9, 6), n_words, 9)
    assert cut.input == "p0\nQuestion: h0 h1 h5 True or False?\nAnswer:"
    cut, _ = fit(PAIR, row_of(9, 6), n_words, 7)
    assert cut.input == "p0\nQuestion: h0 True or False?\nAnswer:"


def test_a_prompt_that_cannot_fit_is_an_error_which_names_the_row():
    with pytest.raises(ValueError, match=r"row 5 .* 6\b"):
        fit(PAIR, row_of(9, 6), n_words, 6)


def test_of_own_input_the_head_and_the_tail_remain_with_their_line_breaks():
    row = {"input": "Translate:\n" + " ".join("x" * 50) + "\n\nAnswer in French:", "target": "y", "label": 0, "idx": 0}
    cut, was_cut = fit(OWN[0], row, n_words, 8)
    assert (cut.input, was_cut) == ("Translate:\nx x x x\n\nAnswer in French:", True)


def test_text_without_spaces_can_be_cut_too():
    text = "".join(chr(0x4E00 + i) for i in range(200))
    cut, _ = fit(OWN[0], {"input": text, "target": "y", "label": 0, "idx": 0}, len, 100)
    head, tail = cut.input.split(" ")
    assert text.startswith(head)
    assert text.endswith(tail)
    assert 60 < len(head + tail) < 100


def test_words_that_stand_for_a_value_belong_to_the_prompt():
    prompt = Prompt("{premise} {question}", ("a",), {"question": {"the cause": "which was so because of what follows"}})
    row = {"premise": "a b c d", "question": "the cause", "label": 0, "idx": 0}
    assert fit(prompt, row, n_words, 9)[0].input == "a d which was so because of what follows"
    with pytest.raises(ValueError, match="does not fit"):
        fit(prompt, row, n_words, 7)


WORDS = st.lists(st.text("abäß{}.", min_size=1, max_size=4), min_size=1, max_size=40).map(" ".join)


@settings(deadline=None, max_examples=150)
@given(premise=WORDS, hypothesis=WORDS, length=st.integers(1, 90))
def test_a_cut_input_fits_keeps_the_prompts_words_and_loses_no_more_than_it_must(premise, hypothesis, length):
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
