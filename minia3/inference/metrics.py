"""Metrics: what a task's result is, from 0 to 1, and higher is better.

    CHOICE_METRICS        for choices: is the choice with the best score the right one?
    TEXT_METRICS          for targets: how much is a generated text like the target?
    inverse_perplexity    for targets and conversations: how likely does the model find the text?

Shapes: N examples.
"""

import math
import re
import string
from collections import Counter

import numpy as np

from minia3.files.read import reading

# Metrics of choices


def accuracy(found_N, label_N):
    """Return the share of examples whose label was found."""
    return np.mean(found_N == label_N)


def macro_f1(found_N, label_N):
    """Return the F1 of each label, averaged over the labels that were found or are right.

    The F1 of a label is 2 (found and right) / (found + right). A label that is neither found nor
    right has none, and does not count, as in sklearn's f1_score(average="macro").
    """
    scores = []
    for label in np.union1d(found_N, label_N):
        is_found_N = found_N == label
        is_right_N = label_N == label
        n_hits = (is_found_N & is_right_N).sum()
        scores.append(2 * n_hits / (is_found_N.sum() + is_right_N.sum()))
    return np.mean(scores)


CHOICE_METRICS = {"accuracy": accuracy, "macro_f1": macro_f1}


def area_under_curve(positive, negative):
    """Return the chance that one of `positive` is larger than one of `negative`.

    This is the area under the ROC curve (Mann & Whitney 1947). A tie counts as a half.
    positive, negative: arrays with at least one number each.
    """
    in_order = np.sort(negative)
    n_below = np.searchsorted(in_order, positive, side="left")
    n_not_above = np.searchsorted(in_order, positive, side="right")
    # The sum counts a smaller negative twice, and a tie once.
    n_halves = n_below + n_not_above
    return float(n_halves.mean() / (2 * len(negative)))


# Metrics of texts. Each takes N texts and the N targets.


def exact_match(texts, targets):
    """Return the share of texts that are their target, apart from white space at the ends."""
    is_right = []
    for text, target in zip(texts, targets, strict=True):
        is_right.append(text.strip() == target.strip())
    return np.mean(is_right)


def token_f1(texts, targets):
    """Return the mean F1 of the words that a text shares with its target, as SQuAD defines it.

    Rajpurkar et al. 2016, arXiv 1606.05250. If one of the two has no words, the F1 is 1 if the
    other has none either, as in the script of SQuAD 2.0.
    """
    scores = []
    for text, target in zip(texts, targets, strict=True):
        scores.append(f1_of_words(squad_words(text), squad_words(target)))
    return np.mean(scores)


def f1_of_words(words, target_words):
    if not words or not target_words:
        return float(words == target_words)
    n_shared = (Counter(words) & Counter(target_words)).total()
    return 2 * n_shared / (len(words) + len(target_words))


def squad_words(text):
    """Return the words of a text in lower case, without punctuation and without articles."""
    letters = [letter for letter in text.lower() if letter not in string.punctuation]
    return re.sub(r"\b(a|an|the)\b", " ", "".join(letters)).split()


def rouge_l(texts, targets):
    """Return the mean ROUGE-L (Lin 2004): the F1 of the longest common subsequence of words.

    The package rouge-score computes it, without stemming. See `has_rouge_words`.
    """
    scorer = load_rouge().RougeScorer(["rougeL"], use_stemmer=False)
    scores = []
    for text, target in zip(texts, targets, strict=True):
        scores.append(scorer.score(target, text)["rougeL"].fmeasure)
    return np.mean(scores)


def has_rouge_words(text):
    """Return whether rouge-score finds words in a text: letters from a to z, or digits 0 to 9."""
    return re.search("[a-z0-9]", text.lower()) is not None


def bleu(texts, targets):
    """Return the BLEU of all texts together (Papineni et al. 2002), divided by 100.

    The package sacrebleu computes it, with its own tokenizer of words (13a).
    """
    score = load_bleu().corpus_bleu(texts, [targets]).score
    return min(score / 100, 1.0)  # of equal texts, the score is 100.00000000000004


def load_rouge():
    with reading("rouge_l", extra="metrics"):
        from rouge_score import rouge_scorer
    return rouge_scorer


def load_bleu():
    with reading("bleu", extra="metrics"):
        import sacrebleu
    return sacrebleu


TEXT_METRICS = {"exact_match": exact_match, "f1": token_f1, "rouge_l": rouge_l, "bleu": bleu}
PACKAGES = {"rouge_l": load_rouge, "bleu": load_bleu}  # metrics that need a package of an extra

# The metric of likelihoods

INVERSE_PERPLEXITY = "inverse_perplexity"


def perplexity(value):
    """Return the perplexity, 1 or more, for an inverse perplexity; None for 0, which has none."""
    if not value:
        return None
    return 1 / value


def inverse_perplexity(logp_N, n_tokens_N):
    """Return exp(mean log p): the inverse of the perplexity, so that higher is better.

    The mean is over all scored tokens of all examples. logp_N: the sum of each example's
    log-probabilities. n_tokens_N: how many tokens it has.
    """
    return math.exp(float(logp_N.sum() / n_tokens_N.sum()))


def check_metric(metric):
    """Raise ValueError if there is no such metric."""
    names = (*CHOICE_METRICS, *TEXT_METRICS, INVERSE_PERPLEXITY)
    if metric not in names:
        raise ValueError(f"metric is {metric!r:.40}, expected one of {', '.join(names)}")


def check_package(metric):
    """Raise ValueError, with the extra of minia3, if a metric needs a package that is missing."""
    if metric in PACKAGES:
        PACKAGES[metric]()
