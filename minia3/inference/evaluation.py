"""Evaluation: how many rows of a task does a model answer correctly?

The result of an evaluation is a dictionary, because it becomes part of a line of metrics.jsonl:

    accuracy   the value of the metric from 0 to 1, whichever metric it is
    auc        how well the scores tell two labels apart (`choice_auc`), or None
    n          rows
    n_cut      rows whose input was too long and lost words
    tokens     mean tokens of a row and its choices
    n_shots    mean shots of a row, if there are shots

Shapes: N examples, C choices.
"""

from bisect import bisect_left

import numpy as np

from minia3.inference.decoding import generate
from minia3.inference.metrics import area_under_curve, macro_f1
from minia3.inference.scoring import score_examples
from minia3.tasks.examples import encode_rows
from minia3.tasks.prompts import in_context, render


def evaluate(  # noqa: PLR0913 (what is evaluated, by which metric, and the limits of a run)
    model,
    tokenizer,
    rows,
    prompt,
    *,
    metric,
    shots=(),
    max_length=512,
    max_new_tokens=64,
    adapter=None,
    batch_size=16,
):
    """Return the result (see above) of a model on rows that are put into the words of one prompt.

    metric "accuracy"     the share of rows whose right choice has the best score, which is the mean
                          log-probability per token
    metric "macro_f1"     the mean of the labels' F1 scores, for the same choices
    metric "exact_match"  the share of rows whose generated text is the target, apart from white
                          space at the ends

    shots: rows that come before each row with their answers, as many as fit into `max_length`
    tokens: in-context learning (Brown et al. 2020, arXiv 2005.14165). Inputs that are too long
    without any shot lose words from their middle (`fit` in tasks/prompts.py).
    """
    if not rows:
        return {"accuracy": None, "auc": None, "n": 0, "n_cut": 0, "tokens": None}
    is_generated = metric == "exact_match"

    # A shot has at least one token, so more than max_length shots never fit.
    prompts = in_context(prompt, shots[:max_length])
    n_shots = [most_shots(row, prompts, tokenizer, max_length) for row in rows]
    pairs = [(row, prompts[n]) for row, n in zip(rows, n_shots, strict=True)]
    rendered, examples, n_cut = encode_rows(pairs, tokenizer, max_length, end=is_generated)

    options = {"adapter": adapter, "batch_size": batch_size}
    auc = None
    if is_generated:
        sources = [example.source for example in examples]
        options["max_new_tokens"] = max_new_tokens
        options["stop"] = ("\n\n",) if shots else ()  # this ends the answers of the shots, too
        value = exact_match(generate(model, tokenizer, sources, **options), rendered)
    else:
        scores = score_examples(model, examples, **options)
        scores_NC = scores.double().numpy()
        label_N = np.array([example.label for example in examples])
        value = choice_metric(metric, scores_NC, label_N)
        auc = choice_auc(scores_NC, label_N)

    n_tokens = [count_tokens(example) for example in examples]
    result = {
        "accuracy": float(value),
        "auc": auc,
        "n": len(rows),
        "n_cut": n_cut,
        "tokens": float(np.mean(n_tokens)),
    }
    if shots:
        result["n_shots"] = float(np.mean(n_shots))
    return result


def most_shots(row, prompts, tokenizer, max_length):
    """Return how many shots fit before the row.

    prompts: from `in_context`: the first has no shots, the next has one, and so on.
    """

    def is_too_long(n):
        return len(tokenizer.encode(render(prompts[n], row).input)) > max_length

    # The position of the first number (1, 2, ...) that is too long is the number of shots that fit.
    return bisect_left(range(1, len(prompts)), True, key=is_too_long)


def exact_match(texts, rendered):
    """Return the share of texts that are the row's target, apart from white space at the ends."""
    is_right = []
    for text, row in zip(texts, rendered, strict=True):
        is_right.append(text.strip() == row.choices[0].strip())
    return np.mean(is_right)


def choice_metric(metric, scores_NC, label_N):
    """Return the accuracy or the macro F1 of taking the choice with the best score."""
    best_N = scores_NC.argmax(axis=1)
    if metric == "macro_f1":
        return macro_f1(best_N, label_N)
    return np.mean(best_N == label_N)


def choice_auc(scores_NC, label_N):
    """Return how well the scores of two choices tell the labels apart, whatever the threshold.

    It is the chance that a row of label 1 has a larger difference between its second and its first
    score than a row of label 0. A model that prefers one of the choices may have an accuracy of one
    half and still know the answers; this shows it. Return None unless all rows have two choices and
    both labels occur.
    """
    has_two_choices = scores_NC.shape[1] == 2 and np.isfinite(scores_NC).all()
    if not has_two_choices or set(label_N) != {0, 1}:
        return None
    difference_N = scores_NC[:, 1] - scores_NC[:, 0]
    return area_under_curve(difference_N[label_N == 1], difference_N[label_N == 0])


def count_tokens(example):
    """Return how many tokens of an example a model reads or scores."""
    return len(example.source) + sum(len(target) for target in example.targets)


def over_prompts(results):
    """Return one result for the `results` of several prompts: their medians, and all accuracies.

    The result of a single prompt stays as it is.
    """
    first = results[0]
    if len(results) == 1:
        return first
    combined = {}
    for key in first:
        values = [result[key] for result in results]
        combined[key] = None if None in values else float(np.median(values))
    combined["n"] = first["n"]
    combined["n_cut"] = max(result["n_cut"] for result in results)
    combined["accuracies"] = [result["accuracy"] for result in results]
    return combined
