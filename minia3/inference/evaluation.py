"""To be written."""

from bisect import bisect_left

import numpy as np

from minia3.inference.decoding import generate
from minia3.inference.metrics import area_under_curve, macro_f1
from minia3.inference.scoring import score_examples
from minia3.tasks.examples import encode_rows
from minia3.tasks.prompts import in_context, render


def most_shots(row, prompts, tokenizer, max_length):
    """How many shots of `in_context`'s prompts go before the row: the first ones, as many as fit."""
    return bisect_left(
        range(1, len(prompts)),
        True,
        key=lambda n: len(tokenizer.encode(render(prompts[n], row).input)) > max_length,
    )


def evaluate(model, tokenizer, rows, prompt, *, metric, shots=(), max_length=512, max_new_tokens=64, adapter=None,
             batch_size=16):  # fmt: skip
    """Score N rows with one prompt -> {"accuracy", "auc", "n", "n_cut", "tokens"}, the last a row's in the mean.

    shots: rows with their answers, which stand before each row as far as they fit into `max_length` tokens: in-context
    learning (Brown et al. 2020, arXiv 2005.14165); their number, in the mean, is "n_shots".

    metric "accuracy": the share of rows whose right choice has the highest mean log-probability per token; `auc`, where
    all rows have two choices and both labels occur, is the chance that a row of label 1 has a larger score difference
    between its second and its first choice than a row of label 0: it sees knowledge which a biased threshold hides.
    metric "macro_f1": of the same choices, the F1 of each label, averaged.
    metric "exact_match": the share of rows whose generated text is the target, white space at the ends aside; no auc.
    """
    if not rows:
        return {"accuracy": None, "auc": None, "n": 0, "n_cut": 0, "tokens": None}
    generated, auc, options = (
        metric == "exact_match",
        None,
        {"adapter": adapter, "batch_size": batch_size},
    )
    prompts = in_context(prompt, shots[:max_length])  # each has a token or more
    n_shots = [most_shots(row, prompts, tokenizer, max_length) for row in rows]
    pairs = [(row, prompts[n]) for row, n in zip(rows, n_shots, strict=True)]
    rendered, examples, n_cut = encode_rows(pairs, tokenizer, max_length, end=generated)
    if generated:
        inputs = [example.source for example in examples]
        stop = ("\n\n",) * bool(shots)  # as the shots' answers end
        texts = generate(
            model, tokenizer, inputs, max_new_tokens=max_new_tokens, stop=stop, **options
        )
        value = np.mean(
            [
                text.strip() == row.choices[0].strip()
                for text, row in zip(texts, rendered, strict=True)
            ]
        )
    else:
        scores_NC = score_examples(model, examples, **options).double().numpy()
        label_N = np.array([example.label for example in examples])
        best_N = scores_NC.argmax(axis=1)
        value = macro_f1(best_N, label_N) if metric == "macro_f1" else np.mean(best_N == label_N)
        if scores_NC.shape[1] == 2 and np.isfinite(scores_NC).all() and set(label_N) == {0, 1}:
            difference_N = scores_NC[:, 1] - scores_NC[:, 0]
            auc = area_under_curve(difference_N[label_N == 1], difference_N[label_N == 0])
    n_tokens = np.mean(
        [len(example.source) + sum(map(len, example.targets)) for example in examples]
    )
    result = {
        "accuracy": float(value),
        "auc": auc,
        "n": len(rows),
        "n_cut": n_cut,
        "tokens": float(n_tokens),
    }
    return result | ({"n_shots": float(np.mean(n_shots))} if shots else {})


def over_prompts(results):
    """Of one result of `evaluate` that one; of several, one for each prompt, the medians, and all "accuracies"."""
    if len(results) == 1:
        return results[0]
    all_of = {key: [result[key] for result in results] for key in results[0]}
    middle = {
        key: None if None in values else float(np.median(values)) for key, values in all_of.items()
    }
    counts = {"n": results[0]["n"], "n_cut": max(all_of["n_cut"])}
    return middle | counts | {"accuracies": all_of["accuracy"]}
