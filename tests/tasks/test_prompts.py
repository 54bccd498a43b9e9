"""A row is rendered in the words of a prompt. An input that is too long loses words from the middle
of the row's texts, and none of the prompt's words.
"""

import re
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from task_files import REAL, needs_real_data

from minia3.tasks.format_strings import can_name
from minia3.tasks.known_tasks import known_tasks
from minia3.tasks.prompts import OWN_PROMPTS, Prompt, fit, for_family, render
from minia3.tasks.rows import are_choices
from minia3.tasks.splits import load_task

COPA = {
    "premise": "I fell.",
    "choice1": "I was ill.",
    "choice2": "I sang. ",
    "question": "cause",
    "label": 0,
    "idx": 7,
}


def n_words(text):
    return len(text.split())


# Rendering


def test_a_prompt_puts_the_question_of_copa_into_words():
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
    user_row = {"input": "{input} {y}", "choices": ["{z}", "{input}"], "label": 1}
    assert render(OWN_PROMPTS[0], user_row) == ("{input} {y}", ["{z}", "{input}"], 1)


def test_a_target_is_rendered_as_the_only_choice():
    assert render(OWN_PROMPTS[0], {"input": "2 + 2 =", "target": "4", "label": 0}) == (
        "2 + 2 =",
        ["4"],
        0,
    )


@pytest.mark.parametrize(
    ("text", "filled", "empty"),
    [
        (
            "{instruction}\n{input}\n\n### Response:\n",
            "a\nb\n\n### Response:\n",
            "a\n\n\n### Response:\n",
        ),
        ("{instruction}\n{input}\n", "a\nb\n", "a\n\n"),
        ("{instruction}\n{input}", "a\nb", "a"),
        ("{input} {instruction}\n{input}", "b a\nb", " a"),
    ],
)
def test_white_space_before_an_empty_field_at_the_end_is_left_out_and_no_other(text, filled, empty):
    prompt = Prompt(text, ("x", "y"))
    row = {"instruction": "a", "input": "b", "label": 0}
    assert render(prompt, row).input == filled
    assert render(prompt, row | {"input": ""}).input == empty
    assert render(prompt, row | {"input": "b "}).input == filled.replace("b", "b ")


def test_the_choices_of_a_row_have_no_spaces_at_their_ends_as_those_of_a_csv_file_have_none():
    """A space at the end is a token, so the same choices had other scores in a file of JSON."""
    row = {"input": "a", "choices": ["It rained ", " It snowed"], "label": 0}
    assert render(OWN_PROMPTS[0], row).choices == ["It rained", "It snowed"]
    assert not are_choices(["It rained", "It rained "])


def test_an_unlabeled_row_stays_unlabeled():
    assert render(OWN_PROMPTS[0], {"input": "a", "choices": ["b", "c"], "label": -1}).label == -1


@pytest.mark.parametrize(
    ("prompt", "missing"),
    [
        (Prompt("{premise} {hypothesis}", ("a",)), "'hypothesis'"),
        (Prompt("{premise}", ("{choice1}",)), "'choice1'"),
        (Prompt("{premise} {question}", ("a",), {"question": {"cause": "because"}}), "'question'"),
        (Prompt("{premise}", ("a",), {"premise": {"cause": "because"}}), "'It rains.', expected"),
        (OWN_PROMPTS[0]._replace(text="{premise}"), "'target'"),
    ],
)
def test_the_error_names_the_field_that_a_row_lacks(prompt, missing):
    row = {"premise": "It rains.", "label": 0}
    with pytest.raises(ValueError, match=missing):
        render(prompt, row)


@pytest.mark.parametrize(
    ("answers", "found"),
    [
        ({"text": []}, "list index out of range"),
        ({"texts": ["b"]}, "there is no 'text'"),
        ("b", "string ind.*"),
    ],
)
def test_the_error_names_the_text_whose_item_a_row_lacks(answers, found):
    """It named the input if an item of the target was missing, as it is in SQuAD 2."""
    row = {"question": "a", "answers": answers, "label": 0}
    prompt = Prompt("{question}", None, target="{answers[text][0]}")
    words = rf"the row has no such item as '{{answers\[text\]\[0\]}}' needs \({found}\)"
    with pytest.raises(ValueError, match=words):
        render(prompt, row)


@pytest.mark.parametrize(
    ("column", "is_name"),
    [
        ("Review Text", True),
        ("größe_2", True),
        ("{x", False),
        ("a}{b", False),
        ("a.b", False),
        ("a:b", False),
        ("a!r", False),
        ("a[0]", False),
        ("12", False),
        ("", False),
    ],
)
def test_a_column_that_can_be_named_is_read_as_its_name_says(column, is_name):
    assert can_name(column) == is_name
    if is_name:
        row = {column: "x", "label": 0}
        assert render(Prompt(f"{{{column}}}", ("a",)), row).input == "x"


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


def test_an_input_that_fits_is_not_touched():
    row = row_of(3, 2, premise="  p0\n\np1  p2 ")
    rendered = render(PAIR, row)
    assert fit(PAIR, row, str.split, 10) == (rendered, rendered.input.split(), False)
    assert fit(PAIR, row, str.split, 9).was_cut


def test_the_longest_field_loses_its_middle_and_the_rest_remains():
    row = row_of(10, 3)
    before = dict(row)
    cut, _, was_cut = fit(PAIR, row, str.split, 13)
    assert was_cut
    assert cut.input == "p0 p1 p2 p8 p9\nQuestion: h0 h1 h2 True or False?\nAnswer:"
    assert cut.choices == ["True", row["premise"]], "choices are never cut"
    assert row == before


def test_the_longest_field_is_found_by_length_and_not_by_place():
    cut, *_ = fit(PAIR, row_of(3, 10), str.split, 12)
    assert cut.input == "p0 p1 p2\nQuestion: h0 h1 h8 h9 True or False?\nAnswer:"


def test_items_of_objects_and_lists_are_cut_as_columns_are():
    columns = row_of(9, 6, note="a {b} c d")
    items = {
        "pair": {"premise": columns["premise"], "more": [1, {"hypothesis": columns["hypothesis"]}]},
        "notes": ["", columns["note"]],
        "label": 0,
        "idx": 5,
    }
    texts = (
        "{premise} or {hypothesis} {{}} {note} and {note}",
        ("{pair[premise]} or {pair[more][1][hypothesis]} {{}} {notes[1]} and {notes[1]}"),
    )
    of_columns, of_items = (Prompt(text, ("yes", "no")) for text in texts)
    for length in range(7, 30):
        cut = fit(of_items, items, str.split, length)
        assert cut == fit(of_columns, columns, str.split, length)
        assert cut.was_cut == (length < 26)
    with pytest.raises(ValueError, match="row 5 does not fit into max_length 6"):
        fit(of_items, items, str.split, 6)


def test_the_first_field_by_name_is_cut_if_several_are_equally_long():
    row = {name: "a b c" for name in "zyxwvutsrqponm"}
    prompt = Prompt(" ".join(f"{name}: {{{name}}}" for name in row), ("yes", "no"))
    cut, *_ = fit(prompt, row | {"label": 0, "idx": 0}, str.split, 4 * len(row) - 1)
    assert cut.input == render(prompt, row | {"m": "a c", "label": 0}).input


def test_the_next_longest_field_is_cut_when_the_longest_has_one_word_left():
    cut, *_ = fit(PAIR, row_of(9, 6), str.split, 9)
    assert cut.input == "p0\nQuestion: h0 h1 h5 True or False?\nAnswer:"
    cut, *_ = fit(PAIR, row_of(9, 6), str.split, 7)
    assert cut.input == "p0\nQuestion: h0 True or False?\nAnswer:"


def test_a_row_that_cannot_fit_is_an_error_that_names_the_row():
    with pytest.raises(ValueError, match=r"row 5 .* 6\b"):
        fit(PAIR, row_of(9, 6), str.split, 6)


def test_a_users_input_keeps_its_beginning_and_its_end_with_their_line_breaks():
    row = {
        "input": "Translate:\n" + " ".join("x" * 50) + "\n\nAnswer in French:",
        "target": "y",
        "label": 0,
        "idx": 0,
    }
    cut, _, was_cut = fit(OWN_PROMPTS[0], row, str.split, 8)
    assert (cut.input, was_cut) == ("Translate:\nx x x x\n\nAnswer in French:", True)


def test_a_text_without_spaces_can_be_cut():
    text = "".join(chr(0x4E00 + i) for i in range(200))
    cut, *_ = fit(OWN_PROMPTS[0], {"input": text, "target": "y", "label": 0, "idx": 0}, list, 100)
    head, tail = cut.input.split(" ")
    assert text.startswith(head)
    assert text.endswith(tail)
    assert 60 < len(head + tail) < 100


def test_words_in_place_of_a_value_belong_to_the_prompt_and_are_not_cut():
    prompt = Prompt(
        "{premise} {question}",
        ("a",),
        {"question": {"the cause": "which was so because of what follows"}},
    )
    row = {"premise": "a b c d", "question": "the cause", "label": 0, "idx": 0}
    assert fit(prompt, row, str.split, 9)[0].input == "a d which was so because of what follows"
    with pytest.raises(ValueError, match="does not fit"):
        fit(prompt, row, str.split, 7)


WORDS = st.lists(st.text("abäß{}.", min_size=1, max_size=4), min_size=1, max_size=40).map(" ".join)


@settings(deadline=None, max_examples=150)
@given(premise=WORDS, hypothesis=WORDS, length=st.integers(1, 90))
def test_a_cut_input_fits_and_keeps_as_many_words_as_it_can(premise, hypothesis, length):
    row = {"premise": premise, "hypothesis": hypothesis, "label": 0, "idx": 0}
    whole = n_words(render(PAIR, row).input)
    if length < 7:  # the prompt's own five words, and one of each field
        with pytest.raises(ValueError, match="does not fit"):
            fit(PAIR, row, str.split, length)
        return
    cut, ids, was_cut = fit(PAIR, row, str.split, length)
    assert was_cut == (whole > length)
    assert ids == cut.input.split()
    assert len(ids) == min(whole, length)
    kept = re.fullmatch(r"(.+)\nQuestion: (.+) True or False\?\nAnswer:", cut.input).groups()
    for kept_text, text in zip(kept, (premise, hypothesis), strict=True):
        kept_words = kept_text.split()
        words = text.split()
        n_tail = len(kept_words) // 2
        n_head = len(kept_words) - n_tail
        assert kept_words == words[:n_head] + words[len(words) - n_tail :]


@needs_real_data
@pytest.mark.parametrize("name", ["t5-base-hf", "llama2-hf"])
def test_long_real_rows_fit_with_a_real_tokenizer_and_keep_their_question(name):
    tokenizer = tokenizers.Tokenizer.from_file(
        str(Path(REAL, "tokenizers", name, "tokenizer.json"))
    )

    def encode(text):
        return tokenizer.encode(text).ids

    rows = load_task("rte", Path(REAL, "data")).train
    longest_rows = sorted(rows, key=lambda row: -len(row["premise"]))[:40]
    for prompt in known_tasks()["rte"].prompts:
        for row in longest_rows:
            cut, ids, was_cut = fit(prompt, row, encode, 100)
            assert was_cut
            assert ids == encode(cut.input)
            assert 80 < len(ids) <= 100
            before, after = prompt.text.split("{premise}")
            assert cut.input.startswith(before + row["premise"].split()[0])
            assert cut.input.endswith(row["premise"].split()[-1] + after.format_map(row))


def test_prompts_that_are_all_for_other_models_are_refused():
    prompts = (Prompt("a", None, for_model="t5-v1.0"), Prompt("b", None, for_model="llama"))
    assert for_family(prompts, "llama") == prompts[1:]
    for family, found in (("t0", "is t0"), (None, "has no known family")):
        with pytest.raises(ValueError, match=f"is t5-v1.0, llama.*, and this model {found}: take"):
            for_family(prompts, family)
