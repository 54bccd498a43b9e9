"""Guards what a run reports. Accuracy, AUC and exact match are what their definitions say, over the
texts that fit."""

import copy
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from chat_model import save as save_chat_model
from test_metrics import share_of_pairs
from words import N_IDS, word_tokenizer

import minia3
from minia3.checkpoints.tokenizer import Tokenizer
from minia3.inference.evaluation import evaluate, over_prompts
from minia3.inference.metrics import TEXT_METRICS
from minia3.inference.scoring import total_logprobs
from minia3.tasks.examples import Example, encode_rows
from minia3.tasks.limits import written_target
from minia3.tasks.prompts import OWN_PROMPTS, Prompt, in_context
from minia3.training.doubts import notes_on_texts

PROMPT = Prompt("w7 {input} w8", None)


@dataclass
class Ours:
    is_t5: bool
    model: Any
    tokenizer: Any

    @property
    def n_ends(self):
        """How many end tokens a text has."""
        return 1 if self.is_t5 else 0


@pytest.fixture(scope="module", params=["t5-v1.1", "llama-gqa"])
def ours(request, loaded):
    is_t5 = request.param.startswith("t5")
    model = loaded(request.param, n_adapters=2, seed=0)
    return Ours(is_t5, model, word_tokenizer(is_t5))


def words(rng, least, most):
    return " ".join(f"w{i}" for i in rng.integers(4, N_IDS, rng.integers(least, most + 1)))


def rows_of(n, n_choices, seed=0):
    """Return rows with as many different choices as `n_choices` says in turn, and any label."""
    rng = np.random.default_rng(seed)
    rows = []
    for idx in range(n):
        choices = []
        while len(choices) < n_choices[idx % len(n_choices)]:
            choices = list(dict.fromkeys([*choices, words(rng, 1, 4)]))
        label = int(rng.integers(len(choices)))
        rows.append({"input": words(rng, 1, 9), "choices": choices, "label": label, "idx": idx})
    return rows


def ranks(ours, rows, **options):
    return minia3.rank(
        ours.model,
        ours.tokenizer,
        [f"w7 {row['input']} w8" for row in rows],
        [row["choices"] for row in rows],
        **options,
    )


def tokens(ours, rows):
    """Return how many tokens a row in its prompt and all of its choices have, on average."""
    n_tokens = []
    for row in rows:
        texts = [f"w7 {row['input']} w8", *row["choices"]]
        n_tokens.append(sum(len(text.split()) + ours.n_ends for text in texts))
    return pytest.approx(np.mean(n_tokens))


@pytest.mark.parametrize("adapter", [None, 1])
def test_accuracy_is_the_share_of_rows_whose_right_choice_has_the_best_mean(ours, adapter):
    rows = rows_of(40, (3, 1, 2, 4))
    scores = ranks(ours, rows, adapter=adapter)
    assert (
        scores.argmax(1).tolist()
        != ranks(ours, rows, adapter=adapter, length_norm=False).argmax(1).tolist()
    )
    for i, row in enumerate(rows):
        n_choices = len(row["choices"])
        row["label"] = (scores[i, :n_choices].argmax().item() + (i % 5 == 0)) % n_choices
    found = evaluate(
        ours.model, ours.tokenizer, rows, PROMPT, metric="accuracy", adapter=adapter, batch_size=7
    )
    n_wrong = sum(i % 5 == 0 and len(row["choices"]) > 1 for i, row in enumerate(rows))
    commonest = max(Counter(row["label"] for row in rows).values())
    assert found == {
        "accuracy": pytest.approx(1 - n_wrong / 40),
        "auc": None,
        "commonest": commonest / 40,
        "n_equal": 0,
        "n_tied": 0,
        "n_single": 10,
        "n": 40,
        "n_cut": 0,
        "tokens": tokens(ours, rows),
    }


def test_auc_ranks_rows_with_two_choices_by_the_difference_of_their_scores(ours):
    rows = rows_of(40, (2,), seed=2)
    scores = ranks(ours, rows).double()
    difference = (scores[:, 1] - scores[:, 0]).tolist()
    positive, negative = (
        [d for d, row in zip(difference, rows, strict=True) if row["label"] == k] for k in (1, 0)
    )
    found = evaluate(ours.model, ours.tokenizer, rows, PROMPT, metric="accuracy")
    assert found["auc"] == pytest.approx(share_of_pairs(positive, negative), abs=1e-3)
    assert abs(found["auc"] - 0.5) > 0.01  # the other way round would be seen


def test_auc_is_none_if_all_labels_are_alike_or_a_row_does_not_have_two_choices(ours):
    one_label = [{**row, "label": 1} for row in rows_of(6, (2,))]
    three = [{**row, "label": row["idx"] % 2} for row in rows_of(6, (3,))]
    for rows in (one_label, three, rows_of(6, (2, 1)), rows_of(6, (2, 3)), rows_of(6, (1,))):
        assert evaluate(ours.model, ours.tokenizer, rows, PROMPT, metric="accuracy")["auc"] is None


def test_auc_sees_knowledge_that_a_biased_threshold_hides(ours):
    rows = rows_of(40, (2,))
    scores = ranks(ours, rows)
    difference = scores[:, 1] - scores[:, 0]
    rows = [
        {**row, "label": int(d > difference.median())}
        for row, d in zip(rows, difference, strict=True)
    ]
    found = evaluate(ours.model, ours.tokenizer, rows, PROMPT, metric="accuracy")
    assert found["auc"] == 1.0


def test_auc_is_that_of_texts_if_their_order_differs_from_row_to_row(ours):
    # By their places, a preference for one text hid the knowledge.
    rows = rows_of(40, (2,), seed=2)
    for row in rows:
        row["choices"] = ["w4", "w5"]
    swapped = []
    for i, row in enumerate(rows):
        if i % 3 == 1:
            row = {**row, "choices": row["choices"][::-1], "label": 1 - row["label"]}
        swapped.append(row)
    options = {"prompt": PROMPT, "metric": "accuracy"}
    expected = evaluate(ours.model, ours.tokenizer, rows, **options)["auc"]
    found = evaluate(ours.model, ours.tokenizer, swapped, **options)["auc"]
    assert found == pytest.approx(expected, abs=1e-3)


def test_exact_match_is_the_share_of_texts_that_equal_the_target_except_for_spaces_at_the_ends(
    ours, monkeypatch
):
    decode = ours.tokenizer.decode
    # The first word that a byte-level tokenizer decodes has a space before it.
    monkeypatch.setattr(ours.tokenizer, "decode", lambda ids: f" {decode(ids)}")
    rows = rows_of(20, (1,))
    prompts = [f"w7 {row['input']} w8" for row in rows]
    texts = minia3.generate(ours.model, ours.tokenizer, prompts, max_new_tokens=5)
    for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
        del row["choices"]
        row |= {"target": f"{text.strip()} \n" if i % 4 == 0 else f"{text} w4", "label": 0}
    found = evaluate(
        ours.model,
        ours.tokenizer,
        rows,
        PROMPT,
        metric="exact_match",
        max_new_tokens=5,
        batch_size=6,
    )
    ending = "" if ours.is_t5 else " </s>"  # as a text to be written has it
    ended = [row | {"choices": [row["target"] + ending]} for row in rows]
    assert found == {
        "accuracy": 0.25,
        "auc": None,
        "n_lossy": 0,
        "n_too_long": sum(len(row["target"].split()) > 5 for row in rows),
        "n": 20,
        "n_cut": 0,
        "tokens": tokens(ours, ended),
    }
    longer = evaluate(
        ours.model, ours.tokenizer, rows, PROMPT, metric="exact_match", max_new_tokens=6
    )
    assert longer["accuracy"] < 0.25
    other = evaluate(
        ours.model, ours.tokenizer, rows, PROMPT, metric="exact_match", max_new_tokens=5, adapter=1
    )
    assert other["accuracy"] < 0.25


def test_inputs_beyond_max_length_are_cut_counted_and_scored_as_cut(ours):
    rows = rows_of(30, (2,))
    most = 8
    extra = 2 + ours.n_ends  # w7, w8, and T5's </s>
    lengths = [len(row["input"].split()) + extra for row in rows]
    found = evaluate(ours.model, ours.tokenizer, rows, PROMPT, metric="accuracy", max_length=most)
    assert found["n_cut"] == sum(length > most for length in lengths) > 3
    rendered, examples, n_cut = encode_rows(
        [(row, PROMPT) for row in rows], ours.tokenizer, most, end=False
    )
    assert n_cut == found["n_cut"]
    assert [len(e.source) for e in examples] == [min(length, most) for length in lengths]
    assert all(text.input.startswith("w7 ") and text.input.endswith(" w8") for text in rendered)
    cut = [row | {"input": text.input} for row, text in zip(rows, rendered, strict=True)]
    assert found | {"n_cut": 0} == evaluate(
        ours.model, ours.tokenizer, cut, OWN_PROMPTS[0], metric="accuracy"
    )


def test_a_source_is_encoded_once(ours, monkeypatch):
    encode = ours.tokenizer.encode
    seen = []
    monkeypatch.setattr(
        ours.tokenizer, "encode", lambda text, **opts: seen.append(text) or encode(text, **opts)
    )
    rendered, _, _ = encode_rows(
        [(row, PROMPT) for row in rows_of(9, (2,))], ours.tokenizer, 512, end=False
    )
    assert [text for text in seen if text.startswith("w7 ")] == [text.input for text in rendered]


def test_rows_are_encoded_in_the_words_of_their_prompt_and_targets_end_if_asked(ours):
    rows = [{"input": "w9", "target": "w5 w6", "label": 0, "idx": 0}] * 2
    pairs = list(zip(rows, (PROMPT, OWN_PROMPTS[0]), strict=True))
    for end in (False, True):
        _, examples, _ = encode_rows(pairs, ours.tokenizer, 512, end)
        tail = [1] if ours.is_t5 else []
        assert [e.source for e in examples] == [[7, 9, 8, *tail], [9, *tail]]
        assert [e.targets for e in examples] == [[[5, 6, *([1] if ours.is_t5 or end else [])]]] * 2


def test_evaluate_reports_macro_f1_for_a_task_that_asks_for_it(ours, monkeypatch):
    scores = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    monkeypatch.setattr(
        "minia3.inference.evaluation.score_examples", lambda *args, **options: scores
    )
    rows = [
        {"input": "w3", "choices": ["w4", "w5"], "label": label, "idx": 0} for label in (1, 0, 0, 1)
    ]
    found = evaluate(ours.model, ours.tokenizer, rows, OWN_PROMPTS[0], metric="macro_f1")
    assert found["accuracy"] == pytest.approx((2 * 2 / (3 + 2) + 2 * 1 / (1 + 2)) / 2)
    found = evaluate(ours.model, ours.tokenizer, rows, OWN_PROMPTS[0], metric="accuracy")
    assert found["accuracy"] == 0.75


# Rows whose answer says little


def test_rows_with_two_best_choices_and_rows_with_one_choice_are_counted(ours, monkeypatch):
    """In bfloat16, two logits are often equal, and the first choice was taken without a word."""
    cases = [
        (["w4", "w5"], [1, 1]),
        (["w4", "w5"], [0, 1]),
        (["w4\nw5", "w4 w5"], [1, 1]),  # one text to the tokenizer, which `n_equal` counts
        (["w4", "w5", "w6"], [0, 1, 1]),
        (["w4", "w5", "w6"], [1, 0, 0]),
        (["w4"], [0]),
    ]
    rows = []
    scores_NC = torch.full((len(cases), 3), -torch.inf)
    for idx, (choices, scores) in enumerate(cases):
        rows.append({"input": "w9", "choices": choices, "label": 0, "idx": idx})
        scores_NC[idx, : len(scores)] = torch.tensor(scores)
    monkeypatch.setattr("minia3.inference.evaluation.score_examples", lambda *_, **__: scores_NC)
    found = evaluate(ours.model, ours.tokenizer, rows, PROMPT, metric="accuracy")
    assert (found["n_equal"], found["n_tied"], found["n_single"]) == (1, 2, 1)


# The commonest answer


def test_the_commonest_answer_is_counted_as_a_text_if_all_rows_have_the_same_choices(ours):
    rows = rows_of(10, (2,))
    for i, row in enumerate(rows):
        # The answer is "w4" in 7 rows, and the first choice in 5 rows.
        row["choices"] = ["w4", "w5"] if i % 2 else ["w5", "w4"]
        row["label"] = row["choices"].index("w4" if i < 7 else "w5")
    options = {"prompt": PROMPT, "metric": "accuracy"}
    found = evaluate(ours.model, ours.tokenizer, rows, **options)
    assert found["commonest"] == 0.7
    rows[0] = {**rows[0], "choices": ["w6", "w4"]}  # now choices are told apart by their place
    places = Counter(row["label"] for row in rows)
    found = evaluate(ours.model, ours.tokenizer, rows, **options)
    assert found["commonest"] == max(places.values()) / 10


def test_a_choice_that_a_row_has_twice_is_right_only_at_its_own_place(ours):
    """Both places had one number, so the first was counted as right wherever the label was."""
    prompt = Prompt("w7 {input} w8", ("w4", "{other}"))
    rows = [{"input": "w9", "other": "w4", "label": label, "idx": label} for label in (0, 1)]
    found = evaluate(ours.model, ours.tokenizer, rows, prompt, metric="accuracy")
    assert (found["accuracy"], found["commonest"], found["n_equal"]) == (0.5, 0.5, 2)


def test_for_macro_f1_the_commonest_answer_has_its_macro_f1(ours):
    rows = [
        {"input": "w9", "choices": ["w4", "w5"], "label": int(i < 6), "idx": i} for i in range(8)
    ]
    found = evaluate(ours.model, ours.tokenizer, rows, PROMPT, metric="macro_f1")
    assert found["commonest"] == pytest.approx((2 * 6 / (8 + 6) + 0) / 2)


def test_for_macro_f1_answers_are_texts_if_their_order_differs_from_row_to_row(ours, monkeypatch):
    rows = []
    for i in range(10):
        choices = ["w4", "w5"] if i < 5 else ["w5", "w4"]
        right = "w4" if i % 5 < (4 if i < 5 else 3) else "w5"
        rows.append({"input": "w9", "choices": choices, "label": choices.index(right), "idx": i})
    # A model that always answers "w4", which is right in 7 rows.
    scores = torch.tensor([[1.0, 0.0]] * 5 + [[0.0, 1.0]] * 5)
    monkeypatch.setattr("minia3.inference.evaluation.score_examples", lambda *_, **__: scores)
    found = evaluate(ours.model, ours.tokenizer, rows, PROMPT, metric="macro_f1")
    assert found["accuracy"] == found["commonest"] == pytest.approx((2 * 7 / (7 + 10) + 0) / 2)


# Texts


@pytest.mark.parametrize("metric", sorted(TEXT_METRICS))
def test_a_target_that_the_model_does_not_read_may_be_of_any_length(metric, ours, monkeypatch):
    monkeypatch.setattr("minia3.model.sequence_state.MAX_BIAS", 4 * 20 * 20)
    rows = targets("w4 w5 " * 50)
    options = {"max_new_tokens": 3, "max_target_length": 5, "metric": metric}
    found = evaluate(ours.model, ours.tokenizer, rows, PROMPT, **options)
    assert found["n"] == 1
    assert found["n_too_long"] == 1


def test_an_answer_may_end_at_the_eos_of_the_tokenizer(ours):
    """Targets are trained with it. The files of a model may name another end token."""
    options = {"metric": "exact_match", "max_new_tokens": 6}
    prompt = PROMPT.text.format(input="w9")
    model = copy.copy(ours.model)
    model.config = replace(model.config, eos_ids=())
    (text,) = minia3.generate(model, ours.tokenizer, [prompt], max_new_tokens=6)
    written = text.split()
    end = next(word for word in written if word != written[0])
    rows = targets(" ".join(written[: written.index(end)]))
    settings = {"eos_token": end, "is_encoder_decoder": ours.is_t5}
    tokenizer = Tokenizer(word_tokenizer(ours.is_t5).backend, settings)
    assert evaluate(model, tokenizer, rows, PROMPT, **options)["accuracy"] == 1.0


def texts_of(ours, monkeypatch, texts):
    """Let the model write these texts."""
    monkeypatch.setattr(
        "minia3.inference.evaluation.generate", lambda *args, **options: list(texts)
    )


def targets(*texts):
    return [{"input": "w9", "target": text, "label": 0, "idx": i} for i, text in enumerate(texts)]


def test_exact_match_compares_with_the_target_as_the_tokenizer_writes_it(ours, monkeypatch):
    """The tokenizer of words has no newlines, no tabs and no double spaces, as T5's has none."""
    texts_of(ours, monkeypatch, ["w4 w5", "w4 w5 w6", "w4", "w7"])
    rows = targets("w4\nw5", "w4  w5\tw6", "w4", "w8\nw8")
    found = evaluate(ours.model, ours.tokenizer, rows, PROMPT, metric="exact_match")
    assert found["accuracy"] == 0.75


def test_writing_nothing_does_not_match_a_target_of_which_the_tokenizer_has_nothing(
    ours, monkeypatch
):
    texts_of(ours, monkeypatch, ["", ""])
    rows = targets("<pad>", "w4")
    assert ours.tokenizer.decode(ours.tokenizer.encode("<pad>")) == ""
    found = evaluate(ours.model, ours.tokenizer, rows, PROMPT, metric="exact_match")
    assert found["accuracy"] == 0


@pytest.mark.parametrize("metric", ["f1", "rouge_l", "bleu"])
def test_other_metrics_of_texts_are_those_of_their_packages_on_the_targets_themselves(
    metric, ours, monkeypatch
):
    """Also if the tokenizer lacks a word of them, so that the model cannot write it."""
    texts = ["w4 w5 w6 w7", "w9 w4 w5 w6 w7"]
    rows = targets("w4 w5 w6 w7 zz", "w9 w4 w5  w6 w3")
    assert written_target("w4 zz", ours.tokenizer) == "w4"
    texts_of(ours, monkeypatch, texts)
    found = evaluate(ours.model, ours.tokenizer, rows, PROMPT, metric=metric)
    expected = TEXT_METRICS[metric](texts, [row["target"] for row in rows])
    assert found["accuracy"] == pytest.approx(float(expected))
    assert 0 < found["accuracy"] < 1
    assert found["auc"] is None
    assert "commonest" not in found


@pytest.mark.parametrize(("metric", "n_wordless"), [("rouge_l", 2), ("f1", None)])
def test_targets_in_which_rouge_finds_no_words_are_counted(metric, n_wordless, ours, monkeypatch):
    texts_of(ours, monkeypatch, ["w4", "w5", "w6"])
    rows = targets("w4", "слово", "...")
    found = evaluate(ours.model, ours.tokenizer, rows, PROMPT, metric=metric)
    assert found.get("n_wordless") == n_wordless


@pytest.mark.parametrize("name", ["t5-v1.1", "llama-gqa"])
def test_the_perplexity_is_that_of_transformers_loss(name, peer, loaded):
    """Their loss is the mean over a row's tokens, so a row counts by its number of tokens."""
    is_t5 = name.startswith("t5")
    tokenizer = word_tokenizer(is_t5)
    rows = targets("w4", "w5 w6 w7", "w8 w9 w10 w11 w12 w13")
    total = n_tokens = 0
    for row in rows:
        source = [7, 9, 8]
        target = [int(word[1:]) for word in row["target"].split()] + [1]  # both end in </s>
        if is_t5:
            inputs = {"input_ids": [[*source, 1]], "labels": [target]}
        else:
            inputs = {"input_ids": [source + target], "labels": [[-100] * 3 + target]}
        tensors = {key: torch.tensor(ids) for key, ids in inputs.items()}
        with torch.no_grad():
            total += peer(name).model(**tensors).loss.double() * len(target)
        n_tokens += len(target)
    model = loaded(name)
    found = evaluate(model, tokenizer, rows, PROMPT, metric="inverse_perplexity", batch_size=2)
    expected = float(torch.exp(total / n_tokens))
    assert found["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert found["accuracy"] == pytest.approx(1 / expected, rel=1e-5)
    both = over_prompts([found, {**found, "accuracy": found["accuracy"] / 3}])
    assert both["perplexity"] == pytest.approx(1 / both["accuracy"])


# Rows that a model cannot take


def test_a_choice_that_is_too_long_is_an_error_that_names_the_row_and_the_flag(ours):
    rows = rows_of(5, (2,))
    rows[3] |= {"choices": ["w4", " ".join(["w5"] * 9)], "idx": 33}
    options = {"metric": "accuracy", "max_target_length": 8}
    message = r"^row 33: a choice has \d+ tokens, expected at most 8: .* --max-target-length$"
    with pytest.raises(ValueError, match=message):
        evaluate(ours.model, ours.tokenizer, rows, PROMPT, **options)
    only = [rows[3] | {"choices": rows[3]["choices"][1:], "label": 0}]
    with pytest.raises(ValueError, match=message):
        evaluate(ours.model, ours.tokenizer, only, PROMPT, **options)


def test_for_the_perplexity_a_target_that_is_too_long_is_cut_and_counted(ours):
    options = {"metric": "inverse_perplexity", "prompt": PROMPT}
    found = evaluate(
        ours.model, ours.tokenizer, targets("w4 w5 w6 w7 w8"), max_target_length=3, **options
    )
    both = targets("w4 w5 w6 w7 w8", "w4")
    options_of_both = {"max_target_length": 3, **options}
    of_both = evaluate(ours.model, ours.tokenizer, both, **options_of_both)
    uncut = evaluate(ours.model, ours.tokenizer, both, **options)
    assert [result["n_ends_cut"] for result in (found, of_both, uncut)] == [1, 1, 0]
    example = Example([7, 9, 8, *[1] * ours.n_ends], [[4, 5, 6]], 0)
    total_N, n_tokens_N = total_logprobs(ours.model, [example])
    assert n_tokens_N.tolist() == [3]
    assert found["accuracy"] == pytest.approx(float(torch.exp(total_N / 3)))


def test_a_token_without_an_embedding_is_an_error_that_names_the_row_and_the_token(ours):
    rows = rows_of(4, (2,))
    ours.tokenizer.backend.add_special_tokens(["<new>"])
    try:
        rows[2] |= {"choices": ["w4", "w5 <new>"], "idx": 22}
        message = (
            f"^row 22: the tokenizer has the token '<new>' with the id {N_IDS}, .* ends at 60:"
        )
        with pytest.raises(ValueError, match=message):
            evaluate(ours.model, ours.tokenizer, rows, PROMPT, metric="accuracy")
        row = {**targets("w4")[0], "input": "w4 <new>"}
        with pytest.raises(ValueError, match=r"^row 0: the tokenizer has the token '<new>'"):
            evaluate(ours.model, ours.tokenizer, [row], PROMPT, metric="exact_match")
    finally:
        ours.tokenizer.backend = word_tokenizer(ours.is_t5).backend


@pytest.mark.parametrize("metric", ["accuracy", "inverse_perplexity", "exact_match"])
def test_scores_that_are_not_finite_are_an_error_that_names_the_row(metric, ours, loaded):
    model = loaded("t5-v1.1" if ours.is_t5 else "llama-gqa")
    model.embed.weight.data[33] = float("nan")  # only the third row has this word
    rows = rows_of(5, (2,)) if metric == "accuracy" else targets(*["w4"] * 5)
    for row in rows:
        row["input"] = "w9 w10"
        if metric == "accuracy":
            row["choices"] = ["w4", "w5"]
    rows[2] |= {"input": "w9 w33 w10", "idx": 22}
    if metric == "accuracy":
        rows[3]["choices"] = ["w4", "w5", "w6"]  # -inf stands for the missing choices of others
    with pytest.raises(ValueError, match=r"^row 22: the model's scores are not finite: "):
        evaluate(model, ours.tokenizer, rows, PROMPT, metric=metric)


@pytest.mark.parametrize("n_choices", [2, 0])
def test_a_row_without_a_label_is_refused(ours, n_choices):
    rows = rows_of(3, (2,)) if n_choices else targets("w4", "w5", "w6")
    metric = "accuracy" if n_choices else "inverse_perplexity"
    rows[1] |= {"label": -1, "idx": 17}
    with pytest.raises(ValueError, match=r"^row 17 has no label, expected rows with their answers"):
        evaluate(ours.model, ours.tokenizer, rows, PROMPT, metric=metric)


CHOICES = {"input": "w4", "choices": ["w5", "w6"]}
NOT_ROWS = [
    # a row, and the message about it: most were a KeyError, a TypeError or an IndexError
    ("w4", "row 2 is 'w4', expected a dict with the columns of the prompt, and with 'label', the "),
    ([CHOICES], r"row 2 is \[\{'input': 'w4', 'choices': \['w5', 'w6'\]\}\], expected a dict"),
    (CHOICES, r'row 2 has no .label., expected a dict .*: \{.*"label": 1\}, or \{.*"label": 0\}$'),
    ({**CHOICES, "idx": 7}, "row 7 has no 'label', expected a dict"),
    ({**CHOICES, "label": None}, "row 2 has the label None, expected a dict"),
    ({**CHOICES, "label": "w5"}, "row 2 has the label 'w5', expected a dict"),
    ({**CHOICES, "label": 1.0}, r"row 2 has the label 1\.0, expected a dict"),
    ({**CHOICES, "label": True}, "row 2 has the label True, expected a dict"),
    ({**CHOICES, "label": 2}, "row 2 has the label 2, and the number of its choices is 2, expe"),
    ({**CHOICES, "label": -1}, "row 2 has no label, expected rows with their answers"),
    (
        {"input": "w4", "target": "w5", "label": 1},
        "row 2 has the label 1, and the number of its choices is 1",
    ),
    ({"input": "w4", "choices": "w5", "label": 0}, "row 2 has the choices 'w5', expected a list"),
    ({"input": "w4", "choices": None, "label": 0}, "row 2 has the choices None, expected a list"),
    (
        {"input": "w4", "choices": ["w5", "w6", "w6"], "label": 0},
        r"row 2 has the choices \['w5', 'w6', 'w6'\], expected a list of different texts",
    ),
    ({"choices": ["w5"], "label": 0}, "the row has no field 'input'"),
    ({"input": "w4", "label": 0}, "the row has no field 'target'"),
]


@pytest.mark.parametrize(("row", "message"), NOT_ROWS)
def test_rows_that_are_made_by_hand_are_checked(ours, row, message):
    good = [{**CHOICES, "label": np.int64(1)}, {**CHOICES, "label": 0}]
    found = evaluate(ours.model, ours.tokenizer, good, PROMPT, metric="accuracy")
    assert found == evaluate(ours.model, ours.tokenizer, numbered(good), PROMPT, metric="accuracy")
    with pytest.raises(ValueError, match=f"^{message}"):
        evaluate(ours.model, ours.tokenizer, [*good, row], PROMPT, metric="accuracy")
    message = re.sub("^row", "shot", message)
    with pytest.raises(ValueError, match=f"^{message}"):
        evaluate(ours.model, ours.tokenizer, good, PROMPT, metric="accuracy", shots=[*good, row])


@pytest.mark.parametrize("prompt", ["w7 {input}", (PROMPT,), None])
def test_something_else_in_place_of_a_prompt_is_refused(ours, prompt):
    with pytest.raises(ValueError, match=r"^the prompt is .*, expected a Prompt such as task.pro"):
        evaluate(ours.model, ours.tokenizer, rows_of(1, (2,)), prompt, metric="accuracy")


def numbered(rows):
    return [{**row, "idx": idx} for idx, row in enumerate(rows)]


@pytest.mark.parametrize("metric", ["perplexity", "Accuracy", "", None])
def test_a_metric_that_there_is_not_is_refused(ours, metric):
    message = r"^metric is .*, expected one of accuracy, macro_f1, exact_match, .*, inverse_perpl"
    with pytest.raises(ValueError, match=message):
        evaluate(ours.model, ours.tokenizer, rows_of(2, (2,)), PROMPT, metric=metric)


@pytest.mark.parametrize("metric", ["exact_match", "inverse_perplexity"])
def test_a_metric_of_targets_refuses_rows_with_choices(ours, metric):
    rows = rows_of(3, (1, 3))
    message = f"^row 1 has 3 choices, expected a single target for the metric {metric}: give accur"
    with pytest.raises(ValueError, match=message):
        evaluate(ours.model, ours.tokenizer, rows, PROMPT, metric=metric)


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_a_metric_of_choices_refuses_rows_with_a_target(ours, metric):
    """The target was the only choice, and so it was always right."""
    (row,) = numbered(rows_of(1, (2,)))
    written = {"input": row["input"], "target": "w8", "label": 0}
    message = f"^row 1 has a target, expected choices for the metric {metric}: give exact_match or "
    with pytest.raises(ValueError, match=message):
        evaluate(ours.model, ours.tokenizer, [row, written], PROMPT, metric=metric)
    with_target = PROMPT._replace(target="{input}")
    with pytest.raises(ValueError, match=r"^row 0 has a target, "):
        evaluate(ours.model, ours.tokenizer, [row | {"label": 0}], with_target, metric=metric)


# In-context learning


def test_as_many_shots_as_fit_come_before_the_row_with_their_answers_and_in_order(ours):
    rows = rows_of(30, (2,))
    shots = rows_of(4, (2,), seed=5)
    most = 30
    heads = [f"w7 {shot['input']} w8 {shot['choices'][shot['label']]}\n\n" for shot in shots]
    texts = []
    n_shots = []
    for row in rows:
        with_shots = ["".join(heads[:n]) + f"w7 {row['input']} w8" for n in range(5)]
        n_words = [len(text.split()) for text in with_shots]
        n_fitting = max(n for n in range(5) if n_words[n] + ours.n_ends <= most)
        n_shots.append(n_fitting)
        texts.append(with_shots[n_fitting])
    assert len(set(n_shots)) > 1
    scores = minia3.rank(ours.model, ours.tokenizer, texts, [row["choices"] for row in rows])
    options = {"metric": "accuracy", "shots": shots, "max_length": most}
    found = evaluate(ours.model, ours.tokenizer, rows, PROMPT, **options)
    assert found["accuracy"] == pytest.approx(
        np.mean(scores.argmax(1).numpy() == [row["label"] for row in rows])
    )
    assert found["n_shots"] == pytest.approx(np.mean(n_shots))
    assert found["n_cut"] == 0
    options["shots"] = iter(shots)
    assert evaluate(ours.model, ours.tokenizer, rows, PROMPT, **options) == found
    assert (
        found["tokens"]
        > evaluate(ours.model, ours.tokenizer, rows, PROMPT, metric="accuracy")["tokens"]
    )


def test_a_written_answer_ends_as_the_answers_of_the_shots_end(ours, monkeypatch):
    """The model would go on with a new question."""
    rows = [{"input": "w9", "target": "w4", "label": 0, "idx": 0}]
    decode = ours.tokenizer.decode

    def go_on(ids):
        target = ours.tokenizer.encode_target("w4", end=False)
        is_written = ids not in ([], target)
        return "w4\n\nw9" if is_written else decode(ids)

    monkeypatch.setattr(ours.tokenizer, "decode", go_on)
    options = {"metric": "exact_match", "max_new_tokens": 2}
    with_shots = evaluate(ours.model, ours.tokenizer, rows, PROMPT, shots=rows, **options)
    without_shots = evaluate(ours.model, ours.tokenizer, rows, PROMPT, **options)
    assert (with_shots["accuracy"], without_shots["accuracy"]) == (1.0, 0.0)


def test_the_answer_of_a_shot_with_a_target_is_the_target_and_braces_stay():
    shots = [{"input": "{x} {", "target": "}y", "label": 0, "idx": 0}]
    without_shot, with_shot = in_context(Prompt("{input} ->", None), shots)
    row = {"input": "{z}", "target": "t", "label": 0, "idx": 1}
    assert without_shot.text.format_map(row) == "{z} ->"
    assert with_shot.text.format_map(row) == "{x} { -> }y\n\n{z} ->"


def test_a_row_that_does_not_fit_is_cut_only_after_all_shots_are_left_out(ours):
    rows = [{"input": " ".join(["w5"] * 20), "choices": ["w4", "w6"], "label": 0, "idx": 0}]
    found = evaluate(
        ours.model,
        ours.tokenizer,
        rows,
        PROMPT,
        metric="accuracy",
        shots=rows_of(2, (2,)),
        max_length=9,
    )
    assert (found["n_cut"], found["n_shots"]) == (1, 0)


# Several prompts, and no rows


def test_the_result_over_several_prompts_is_the_median_with_all_accuracies():
    def result(accuracy, auc, n_cut=0):
        tokens = 20 * accuracy
        return {"accuracy": accuracy, "auc": auc, "n": 10, "n_cut": n_cut, "tokens": tokens}

    results = [result(0.5, 0.25), result(0.75, 0.5), result(0.875, 0.375)]
    assert over_prompts(results) == {
        "accuracy": 0.75,
        "auc": 0.375,
        "n": 10,
        "n_cut": 0,
        "tokens": 15,
        "accuracies": [0.5, 0.75, 0.875],
    }
    assert over_prompts(results[:1]) == results[0]
    for auc in (None, 0.5):
        assert over_prompts([result(0.5, auc), result(0.75, None)])["auc"] is None
    assert over_prompts([result(0.5, 0.25), result(0.75, 0.5, n_cut=3)])["n_cut"] == 3


def test_the_counts_over_several_prompts_stay_whole_numbers():
    counts = {"n": 5, "n_cut": 0, "n_lossy": 1, "n_too_long": 3, "n_equal": 2, "n_ends_cut": 4}
    counts |= {"n_tied": 1, "n_single": 2, "n_wordless": 3}
    first = {"accuracy": 0.5, **counts}
    combined = over_prompts([first, {**first, "n_lossy": 2}])
    assert {key: combined[key] for key in counts} == {**counts, "n_lossy": 2}
    notes = notes_on_texts("exact_match", combined, 64)
    assert notes[1].startswith("3 of 5 targets have more than 64 tokens")


def test_rows_may_come_from_a_generator(ours):
    rows = rows_of(5, (2,))
    expected = evaluate(ours.model, ours.tokenizer, rows, PROMPT, metric="accuracy")
    assert evaluate(ours.model, ours.tokenizer, iter(rows), PROMPT, metric="accuracy") == expected


def test_without_rows_a_result_has_no_values(ours):
    found = evaluate(ours.model, ours.tokenizer, [], PROMPT, metric="macro_f1")
    assert found == {"accuracy": None, "auc": None, "n": 0, "n_cut": 0, "tokens": None}


def test_a_conversation_has_no_label_and_needs_none(tmp_path):
    save_chat_model(tmp_path)
    model = minia3.load_model(tmp_path)
    tokenizer = minia3.load_tokenizer(tmp_path)
    messages = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]
    found = []
    for row in ({"messages": messages}, {"messages": messages, "label": 0, "idx": 0}):
        found.append(evaluate(model, tokenizer, [row], OWN_PROMPTS[0], metric="inverse_perplexity"))
    assert found[0] == found[1]
    assert found[0]["n"] == 1
