"""What makes a result doubtful: said before training, and again beside the result.

A run that ends without a word looks like a success. These are the ways to fail that a run can
notice by itself.
"""

import math

import numpy as np

from minia3.files.messages import part_of
from minia3.inference.evaluation import have_same_choices
from minia3.inference.metrics import area_under_curve
from minia3.tasks.prompts import render
from minia3.tasks.rows import expected_names
from minia3.training.losses import UNLIKELY_EPS

LEAST_LINES = 3  # in a third of the lines, before their order says anything
CERTAIN = 0.9  # share of pairs of lines, an early and a late one, whose loss is higher at the end
BLOWN_UP = 2  # times the highest loss at the beginning
MOST_DIGITS = 15  # after the point of a share, which has no more
NEAR_ZERO = 0.001  # a lower loss is good, whatever it was before

# Before training


def doubts_about_rows(assignment, config):
    """Return what is doubtful about the rows of a task, one text each."""
    doubts = []
    answer = assignment.task.answer
    doubts_about_answers = {"choices": doubts_about_labels, "target": doubts_about_targets}
    find_doubts = doubts_about_answers.get(answer)
    if find_doubts and config.is_training:
        doubts += find_doubts(assignment.train_rows, assignment.prompts[0], "to train on")
    if find_doubts:
        doubts += find_doubts(assignment.report_rows, assignment.eval_prompts[0], "to report on")
    if not assignment.report_rows:
        doubts.append(
            "nothing is evaluated on held-out rows: the quality of the adapter is unknown"
        )
    if config.is_training:
        doubts += doubts_about_known(assignment, assignment.train_rows, "trained on")
    # Vectors that are the best on rows to report on look better than they are.
    use = "among those that choose the best vectors"
    doubts += doubts_about_known(assignment, assignment.held_out_rows, use)
    # Which of the shots fit before a row is known only later, so all of them count.
    doubts += doubts_about_known(assignment, assignment.shots, "among the shots")
    return doubts


def doubts_about_known(assignment, rows, use):
    """Return a text in a list if rows to report on are among `rows`, or an empty list.

    rows: those whose answers the model sees, or that choose its vectors. use: what they are for.
    """
    names = names_of_words(assignment.task.spec)
    n_known = count_repeated(rows, assignment.report_rows, names)
    if not n_known:
        return []
    text = part_of(n_known, len(assignment.report_rows), "row")
    verb = "is" if n_known == 1 else "are"
    return [f"{text} to report on {verb} also {use}"]


def doubts_about_family(task, family):
    """Return a text in a list if a model is no newcomer to a task, or an empty list.

    family: of a known model, or None.
    """
    if family not in task.spec.seen:
        return []
    return [f"{family} saw this task's labels in its pre-training: these results are not few-shot"]


def part_having(n, n_all, noun):
    """Return the beginning of a sentence: "3 of 5 rows have"."""
    return f"{part_of(n, n_all, noun)} {'has' if n == 1 else 'have'}"


def doubts_about_labels(rows, prompt, use):
    """Return a text in a list if all rows have the same answer, or else an empty list."""
    if len(rows) < 2:
        return []
    if prompt.choices and len({row["label"] for row in rows}) > 1:
        return []  # at once: the choices of these rows have one order
    answers = set(right_answers([render(prompt, row) for row in rows]))
    if len(answers) > 1:
        return []
    (answer,) = answers
    text = f"all {len(rows)} rows {use} have the same answer, {answer!r:.40}"
    if len(prompt.choices or ()) == 1:
        text += ", and there is no other label to pick: name all of them with --labels"
    return [text]


def doubts_about_targets(rows, prompt, use):
    """Return a text in a list if all rows have the same text to write, or else an empty list.

    A model that ignores its input would match all of them.
    """
    if len(rows) < 2:
        return []
    target = target_of(rows[0], prompt)
    if any(target_of(row, prompt) != target for row in rows):
        return []
    return [f"all {len(rows)} rows {use} have the same answer, {target!r:.40}"]


def target_of(row, prompt):
    (target,) = render(prompt, row).choices
    return target


def right_answers(rendered):
    """Return the right answer of each row: its text, or its place if the rows' choices differ."""
    if have_same_choices(rendered):
        return [row.choices[row.label] for row in rendered]
    return [row.label for row in rendered]


def names_of_words(spec):
    """Return the fields of a row that are put into words, and its answer.

    Other columns do not matter: two rows with the same words may have different ids.
    """
    names = set(expected_names(spec)) - {spec.label_field}  # which files may spell differently
    return sorted(names | {"label"})


def count_repeated(train_rows, report_rows, names):
    """Return how many rows to report on are also among the rows to train on, or the shots.

    names: the fields in which such rows are equal.
    """

    def row_key(row):
        return repr([row.get(name) for name in names])

    n_of_keys = {}
    for row in report_rows:
        key = row_key(row)
        n_of_keys[key] = n_of_keys.get(key, 0) + 1
    n_repeated = 0
    for row in train_rows:
        n_repeated += n_of_keys.pop(row_key(row), 0)
    return n_repeated


def notes_on_texts(metric, result, max_new_tokens):
    """Return what an evaluation has noticed about the texts of its rows."""
    notes = []
    n_rows = result["n"]
    if result.get("n_lossy"):
        notes.append(
            f"{part_having(result['n_lossy'], n_rows, 'target')} characters that the tokenizer "
            "cannot write: exact match compares with the target as it writes it"
        )
    if result.get("n_too_long"):
        effect = ": the texts that are compared with them end there"
        if metric == "exact_match":
            effect = ", which cannot be matched"
        notes.append(
            f"{part_having(result['n_too_long'], n_rows, 'target')} more than {max_new_tokens} "
            f"tokens (--max-new-tokens){effect}"
        )
    if result.get("n_wordless"):
        notes.append(
            f"{part_having(result['n_wordless'], n_rows, 'target')} no letter from a to z and no "
            "digit, and rouge_l finds no other words: their score is 0"
        )
    if result.get("n_ends_cut"):
        notes.append(
            f"{part_having(result['n_ends_cut'], n_rows, 'target')} more tokens than "
            "--max-target-length: the perplexity is that of the beginning"
        )
    if result.get("n_equal"):
        notes.append(
            f"{part_having(result['n_equal'], n_rows, 'row')} two choices that are the same text "
            "to the tokenizer: their scores are equal, and the first always wins"
        )
    if result.get("n_single"):
        notes.append(
            f"{part_having(result['n_single'], n_rows, 'row')} a single choice, which is always "
            "right"
        )
    return notes


def notes_on_ties(result, dtype):
    """Return a text in a list if different choices have one best score, or an empty list.

    dtype: the name of the base's dtype.
    """
    if not result.get("n_tied"):
        return []
    advice = ""
    if dtype in ("bfloat16", "float16"):
        advice = ": --dtype float32 tells them apart"
    subject = part_having(result["n_tied"], result["n"], "row")
    return [f"{subject} two best choices with equal scores, and the first counts{advice}"]


# After training


def doubts_about_result(final, losses):
    """Return what is doubtful about the result of an adapter, one text each.

    final: its final line of metrics.jsonl. losses: the training loss of each line so far.
    """
    doubts = []
    value = final["accuracy"]
    if value is None:
        value = math.inf  # nothing was evaluated, and `doubts_about_rows` says so
    commonest = final.get("commonest")
    if commonest is not None and value < commonest:
        shown, compared = different_texts(value, commonest)
        doubts.append(
            f"the {final['metric']} ({shown}) is below that of always giving the commonest label "
            f"({compared})"
        )
    before = final["accuracy_before"]
    if final["trainable"] and before is not None and value < before:
        doubts.append("the result is worse than before training")
    rise = rise_of(losses)
    if rise:
        lower, higher = rise
        doubts.append(f"the training loss rose, from {lower:.3f} to {higher:.3f}: try a lower --lr")
    return doubts


def different_texts(share, other):
    """Return two different shares as texts, with as many digits as it takes to tell them apart."""
    n_digits = 1
    while f"{share:.{n_digits}%}" == f"{other:.{n_digits}%}" and n_digits < MOST_DIGITS:
        n_digits += 1
    return f"{share:.{n_digits}%}", f"{other:.{n_digits}%}"


def doubts_about_dtypes(dtypes):
    """Return a text in a list if the base had several dtypes, one after the other."""
    if len(dtypes) < 2:
        return []
    found = " then ".join(dtypes)
    return [f"the weights were {found}, because there was no --dtype: results differ by rounding"]


def doubts_about_shots(final, max_length):
    """Return a text in a list if not all shots fit before each row, or an empty list.

    Otherwise the result of a few shots would be taken for that of all.
    """
    n_given = final.get("n_shots_given", 0)
    n_fitting = final.get("n_shots", n_given)
    if n_fitting == n_given:
        return []
    shown = math.floor(10 * n_fitting) / 10  # 31.98 of 32 are not all of them
    return [
        f"on average {shown:.1f} of {n_given} shots fit into {max_length} tokens (--max-length)"
    ]


def rise_of(losses):
    """Return from which loss to which the losses of the lines have risen, or None.

    Losses of single batches vary, so nearly all pairs of a line of the first third and a line of
    the last third must say so, and then the medians of these thirds are returned: the first line
    may still be the highest one. Or the last loss must be far above all early ones.
    """
    n_third = max(1, len(losses) // 3)
    early = np.array(losses[:n_third])
    late = np.array(losses[-n_third:])
    if len(losses) < 2 or losses[-1] < NEAR_ZERO:
        return None
    if losses[-1] > BLOWN_UP * max(early.max(), 0.0):
        return np.median(early), losses[-1]
    if n_third >= LEAST_LINES and area_under_curve(late, early) > CERTAIN:
        return np.median(early), np.median(late)
    return None


def loss_notes(assignment, config):
    """Return a text in a list if the loss of a task is a sum, and an empty list otherwise."""
    names = config.losses.split(",")
    if assignment.task.answer != "choices" or len(names) == 1:
        return []
    note = f"the loss is the sum of {', '.join(names[:-1])} and {names[-1]} (--losses)"
    if "ul" in names:
        lowest = -math.log(1 + UNLIKELY_EPS)
        note += f"; ul, and so the sum, may be slightly below 0 (at least {lowest:.4f})"
    return [note]
