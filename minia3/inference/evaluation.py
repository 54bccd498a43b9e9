"""Evaluation: how well does a model answer the rows of a task?

The result of an evaluation is a dictionary, because it becomes part of a line of metrics.jsonl:

    accuracy   the value of the metric from 0 to 1, whichever metric it is
    auc        how well the scores tell two labels apart (`choice_auc`), or None
    commonest  the metric of always giving the commonest answer, if there are choices
    perplexity the perplexity of the targets, if the metric is inverse_perplexity
    n          how many rows
    n_cut      how many rows have an input that was too long and lost words
    n_equal    how many rows have two choices with the same tokens, if there are choices
    n_tied     how many rows have a best score that choices with different tokens share
    n_single   how many rows have a single choice, which is always right
    n_lossy    how many targets the tokenizer cannot write exactly, if the metric is exact_match
    n_too_long how many targets have more tokens than are generated, if texts are generated
    n_wordless how many targets rouge_l finds no words in, if the metric is rouge_l
    n_ends_cut how many targets lost their end, if the metric is inverse_perplexity
    tokens     how many tokens a row and its choices have, on average
    n_shots    how many shots come before a row, on average, if there are shots

Shapes: N examples, C choices.
"""

import numpy as np

from minia3.inference.decoding import generate
from minia3.inference.metrics import (
    CHOICE_METRICS,
    INVERSE_PERPLEXITY,
    TEXT_METRICS,
    area_under_curve,
    check_metric,
    has_rouge_words,
    inverse_perplexity,
    perplexity,
)
from minia3.inference.scoring import (
    as_list,
    check_examples,
    naming_rows,
    score_examples,
    total_logprobs,
)
from minia3.tasks.examples import encode_rows
from minia3.tasks.limits import equal_choices, fit_all_targets, loses_characters, written_target
from minia3.tasks.prompts import Prompt, count_fitting, in_context, render
from minia3.tasks.rows import are_choices

# What a message says of rows that are made by hand.
EXPECTED_ROW = (
    "a dict with the columns of the prompt, and with 'label', the place of the right choice: "
    '{"input": "2 + 2 =", "choices": ["3", "4"], "label": 1}, or '
    '{"input": "2 + 2 =", "target": "4", "label": 0}'
)
EXPECTED_CHOICES = 'a list of different texts that are not empty, such as ["3", "4"]'
# These may differ from prompt to prompt.
COUNTS = (
    *("n_cut", "n_equal", "n_tied", "n_single"),
    *("n_lossy", "n_too_long", "n_wordless", "n_ends_cut"),
)


def evaluate(  # noqa: PLR0913 (what is evaluated, by which metric, and the limits of a run)
    model,
    tokenizer,
    rows,
    prompt,
    *,
    metric,
    shots=(),
    max_length=512,
    max_target_length=None,
    max_new_tokens=64,
    adapter=None,
    batch_size=16,
):
    """Return the result, a dict, of a model on rows that are put into the words of one prompt.

    `help("minia3.inference.evaluation")` explains its keys. rows: those of a task, or dicts such as
    {"input": "2 + 2 =", "choices": ["3", "4"], "label": 1}.
    prompt: such as one of `minia3.prompts_for(model, task)`.
    metric: one of those in metrics.py. Choices are ranked by their mean log-probability per token.
    Texts of at most `max_new_tokens` are generated, and compared with the target. The inverse
    perplexity scores the target.
    shots: rows that come before each row with their answers, as many as fit into `max_length`
    tokens (in-context learning, Brown et al. 2020, 2005.14165; see `fit` in tasks/prompts.py).

    Raise ValueError if there is no such metric, if `prompt` is not a Prompt, and, with the `idx` of
    the row, if a row has no label or equal choices, does not suit the metric or does not fit into
    `max_length`, if a choice has over `max_target_length` tokens, if the model has no embedding for
    a token, or if a score is not finite.
    """
    check_metric(metric)
    rows = checked_rows(rows, prompt)
    if not rows:
        return {"accuracy": None, "auc": None, "n": 0, "n_cut": 0, "tokens": None}

    shots = list(shots)  # they are read several times, and may come from a generator
    pairs, n_shots = with_shots(rows, prompt, shots, tokenizer, max_length)
    rendered, examples, n_cut, n_ends_cut = encode_and_check(
        model, tokenizer, pairs, prompt, metric, max_length, max_target_length
    )
    options = {"adapter": adapter, "batch_size": batch_size}
    with naming_rows(rows):
        if metric in TEXT_METRICS:
            texts = write_answers(model, tokenizer, examples, shots, max_new_tokens, options)
            result = text_result(metric, texts, rendered, tokenizer)
            result["n_too_long"] = count_too_long(examples, max_new_tokens)
        elif metric == INVERSE_PERPLEXITY:
            result = perplexity_result(*total_logprobs(model, examples, **options), n_ends_cut)
        else:
            scores_NC = score_examples(model, examples, **options).double().numpy()
            result = choice_result(metric, scores_NC, rendered, examples)

    result |= {"n": len(rows), "n_cut": n_cut, "tokens": mean_tokens(examples)}
    if shots:
        result["n_shots"] = float(np.mean(n_shots))
    return result


def check_evaluation(
    model, tokenizer, rows, prompt, *, metric, max_length=512, max_target_length=None
):
    """Raise the ValueError that `evaluate` would raise for a row, without running the model.

    The arguments are those of `evaluate`, without shots.
    """
    if not rows:
        return
    pairs = [(row, prompt) for row in checked_rows(rows, prompt)]
    encode_and_check(model, tokenizer, pairs, prompt, metric, max_length, max_target_length)


def encode_and_check(model, tokenizer, pairs, prompt, metric, max_length, max_target_length):
    """Return the rendered rows, their examples, and how many inputs and targets were cut.

    pairs: of a row and its prompt, which is `prompt` with the shots of the row. Raise ValueError,
    with the `idx` of the row, if a row does not suit the metric, the limits or the model.
    """
    rows = [row for row, _ in pairs]
    is_ranked = metric in CHOICE_METRICS
    rendered, examples, n_cut = encode_rows(pairs, tokenizer, max_length, end=not is_ranked)
    check_answers(metric, rows, prompt, rendered)
    if metric in TEXT_METRICS:
        sources = [example._replace(targets=[]) for example in examples]
        check_examples(rows, sources, model, tokenizer)  # the model does not read the targets
        return rendered, examples, n_cut, 0
    examples, n_ends_cut = fit_all_targets(rows, examples, max_target_length, is_ranked)
    check_examples(rows, examples, model, tokenizer)
    return rendered, examples, n_cut, n_ends_cut


def checked_rows(rows, prompt, kind="row"):
    """Return a list of the rows with an `idx`, which is their place if they have none.

    kind: what a message calls a row. Raise ValueError if something is not a row, or has no label or
    no choices to pick from.
    """
    if not isinstance(prompt, Prompt):
        raise ValueError(
            f"the prompt is {prompt!r:.60}, expected a Prompt such as task.prompts[0], or "
            'Prompt("{input}", None) of minia3.tasks.prompts'
        )
    checked = []
    for place, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{kind} {place} is {row!r:.60}, expected {EXPECTED_ROW}")
        row = {**row, "idx": row.get("idx", place)}
        name = f"{kind} {row['idx']}"
        choices = prompt.choices
        if not choices and not prompt.target and "choices" in row:
            choices = as_list(row["choices"])
            if not are_choices(choices):
                found = f"{name} has the choices {row['choices']!r:.60}"
                raise ValueError(f"{found}, expected {EXPECTED_CHOICES}")
        if "messages" not in row:
            check_label(name, row, n_choices=len(choices or ("the target",)))
        checked.append(row)
    return checked


def check_label(name, row, n_choices):
    """Raise ValueError if a row has no label, or if it is not the place of a choice.

    -1 would be taken for the last choice. name: of the row, for messages. n_choices: 1 for a
    target.
    """
    if "label" not in row:
        raise ValueError(f"{name} has no 'label', expected {EXPECTED_ROW}")
    label = row["label"]
    is_index = hasattr(label, "__index__") and not isinstance(label, bool)
    if not is_index:
        raise ValueError(f"{name} has the label {label!r:.40}, expected {EXPECTED_ROW}")
    if label < 0:
        raise ValueError(
            f"{name} has no label, expected rows with their answers, such as those of "
            "task.evaluation"
        )
    if label >= n_choices:
        found = f"{name} has the label {label}, and the number of its choices is {n_choices}"
        raise ValueError(f"{found}, expected {EXPECTED_ROW}")


def check_answers(metric, rows, prompt, rendered):
    """Raise ValueError if a metric of choices is given for a row with a target, or the other way.

    The target would be the only choice, and always right. The first choice would be the target.
    """
    for row, texts in zip(rows, rendered, strict=True):
        if metric in CHOICE_METRICS:
            has_own_choices = not prompt.target and "choices" in row
            if not prompt.choices and not has_own_choices:
                metrics = " or ".join((*TEXT_METRICS, INVERSE_PERPLEXITY))
                raise ValueError(
                    f"row {row['idx']} has a target, expected choices for the metric {metric}: "
                    f"give {metrics}, or rows with choices"
                )
            continue
        n_choices = len(texts.choices)
        if n_choices > 1:
            raise ValueError(
                f"row {row['idx']} has {n_choices} choices, expected a single target for the "
                f"metric {metric}: give {' or '.join(CHOICE_METRICS)}, or a prompt with a target"
            )


# Results, by the kind of the metric


def no_answers(n_rows):
    """Return the result of a model whose scores are not finite."""
    return {"accuracy": 0.0, "auc": None, "perplexity": None, "n": n_rows, "n_cut": 0}


def text_result(metric, texts, rendered, tokenizer):
    """Return the result for texts that were generated.

    Exact match compares with the target as the tokenizer writes it, because a model cannot write
    anything else. The other metrics are those of the public packages, so they compare with the
    target itself.
    """
    targets = [row.choices[0] for row in rendered]
    counts = {}
    if metric == "exact_match":
        counts["n_lossy"] = sum(loses_characters(target, tokenizer) for target in targets)
        targets = [written_target(target, tokenizer) for target in targets]
    if metric == "rouge_l":
        counts["n_wordless"] = len(targets) - sum(map(has_rouge_words, targets))
    value = float(TEXT_METRICS[metric](texts, targets))
    return {"accuracy": value, "auc": None, **counts}


def count_too_long(examples, max_new_tokens):
    """Return how many targets are longer than any text that is generated."""
    is_too_long = []
    for example in examples:
        n_to_write = len(example.targets[0]) - 1  # the end token need not be written
        is_too_long.append(n_to_write > max_new_tokens)
    return sum(is_too_long)


def perplexity_result(logp_N, n_tokens_N, n_ends_cut):
    """Return the result for targets that were scored: see `inverse_perplexity`."""
    value = inverse_perplexity(logp_N, n_tokens_N)
    values = {"accuracy": value, "auc": None, "perplexity": perplexity(value)}
    return values | {"n_ends_cut": n_ends_cut}


def choice_result(metric, scores_NC, rendered, examples):
    """Return the result of taking the choice with the best score for each row."""
    label_N = np.array([row.label for row in rendered])
    number_NC = number_choices(rendered, n_choices=scores_NC.shape[1])
    row_N = np.arange(len(rendered))
    found_N = number_NC[row_N, scores_NC.argmax(axis=1)]
    right_N = number_NC[row_N, label_N]
    return {
        "accuracy": float(CHOICE_METRICS[metric](found_N, right_N)),
        "auc": choice_auc(in_order_of_numbers(scores_NC, number_NC), right_N),
        "commonest": commonest_share(metric, right_N),
        "n_equal": sum(equal_choices(example) is not None for example in examples),
        "n_tied": count_tied(scores_NC, examples),
        "n_single": sum(len(example.targets) == 1 for example in examples),
    }


def count_tied(scores_NC, examples):
    """Return how many rows have a best score that choices with different tokens share.

    `argmax` then takes the first of them. In float32 this is rare. But logits in bfloat16 from 16
    to 32 are multiples of 1/8, so choices of one token often tie.
    """
    is_best_NC = scores_NC == scores_NC.max(axis=1, keepdims=True)
    n_tied = 0
    for is_best_C, example in zip(is_best_NC, examples, strict=True):
        best = {tuple(example.targets[place]) for place in np.flatnonzero(is_best_C)}
        n_tied += len(best) > 1
    return n_tied


def number_choices(rendered, n_choices):
    """Return (N, C): a number for each choice of each row, to compare the answers of rows.

    If all rows have the same choices, in any order, then each text has one number: its place in the
    first row. Otherwise the places are the numbers. n_choices: of the row that has the most.
    """
    if not have_same_choices(rendered):
        return np.tile(np.arange(n_choices), (len(rendered), 1))
    number = {text: i for i, text in enumerate(rendered[0].choices)}
    return np.array([[number[text] for text in row.choices] for row in rendered])


def in_order_of_numbers(scores_NC, number_NC):
    """Return the scores of each row in the order of its choices' numbers."""
    ordered_NC = np.full_like(scores_NC, -np.inf)  # a number that a row does not have stays so
    np.put_along_axis(ordered_NC, number_NC, scores_NC, axis=1)
    return ordered_NC


def have_same_choices(rendered):
    """Return whether all rows have the same choices, in any order, and each of them only once."""
    first = set(rendered[0].choices)
    return all(set(row.choices) == first and len(row.choices) == len(first) for row in rendered)


def commonest_share(metric, right_N):
    """Return the metric of a model that always gives the commonest answer.

    For the accuracy, this is the share of the commonest label. right_N: numbers of the answers.
    """
    commonest = np.bincount(right_N).argmax()
    return float(CHOICE_METRICS[metric](np.full_like(right_N, commonest), right_N))


# Shots, answers and averages


def with_shots(rows, prompt, shots, tokenizer, max_length):
    """Return a list of (row, prompt that begins with the shots that fit), and how many they are.

    The second result is a list, too: the number of shots of each row.
    """
    # A shot has at least one token, so more than max_length shots never fit.
    prompts = in_context(prompt, checked_rows(shots[:max_length], prompt, "shot"))
    n_shots = [most_shots(row, prompts, tokenizer, max_length) for row in rows]
    pairs = [(row, prompts[n]) for row, n in zip(rows, n_shots, strict=True)]
    return pairs, n_shots


def most_shots(row, prompts, tokenizer, max_length):
    """Return how many shots fit before the row.

    prompts: from `in_context`: the first has no shots, the next has one, and so on.
    """

    def is_too_long(n):
        return len(tokenizer.encode_prompt(render(prompts[n], row).input)) > max_length

    return count_fitting(len(prompts) - 1, is_too_long)


def write_answers(model, tokenizer, examples, shots, max_new_tokens, options):
    """Return the text that the model writes after each source. options: those of `generate`."""
    stop = ()
    if shots:
        stop = ("\n\n",)  # this ends the answers of the shots, too
    sources = [example.source for example in examples]
    return generate(model, tokenizer, sources, max_new_tokens=max_new_tokens, stop=stop, **options)


def choice_auc(scores_NC, label_N):
    """Return how well the scores of two choices tell the labels apart, whatever the threshold.

    scores_NC, label_N: with the choices in one order, if all rows have the same ones.

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


def mean_tokens(examples):
    """Return how many tokens of an example a model reads or scores, on average."""
    return float(np.mean([example.n_tokens for example in examples]))


def over_prompts(results):
    """Return one result for the `results` of several prompts: their medians, and all accuracies.

    A count of rows is the largest one. The result of a single prompt stays as it is.
    """
    first = results[0]
    if len(results) == 1:
        return first
    combined = {}
    for key in first:
        values = [result[key] for result in results]
        combined[key] = None if None in values else float(np.median(values))
    if "perplexity" in first:
        combined["perplexity"] = perplexity(combined["accuracy"])
    combined["n"] = first["n"]
    for key in COUNTS:
        if key in first:
            combined[key] = max(result[key] for result in results)
    combined["accuracies"] = [result["accuracy"] for result in results]
    return combined
