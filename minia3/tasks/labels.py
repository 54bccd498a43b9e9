"""Labels: what a user's file has in place of an answer, and which choice it means.

A file spells its labels as words, integers or booleans. The model reads words. `name_labels` finds
both, and `find_user_label` finds the choice of a row.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from minia3.tasks.format_strings import field_names
from minia3.tasks.json_rows import parse_json
from minia3.tasks.names import fold_case, list_names, name_value
from minia3.tasks.prompts import Prompt, choices_of

# A column with more labels than this, and fewer rows per label, probably holds texts to write, if
# most of them occur once. (Banking77 with four rows of each intent is few, too.)
MANY_LABELS = 50
FEW_ROWS = 5  # per label
N_SHOWN = 20  # labels in a line
# "01" is a word, because its zero would be lost.
INTEGER = re.compile(r"0|-?[1-9][0-9]*")
BOOLEANS = ("false", "true")  # in their own order
# Nobody means false by one of the first words, and true by one of the others. (But in a column such
# as has_error, false may be "correct".)
YES = ("yes", "true")
NO = ("no", "false")
# As pandas writes an integer beside an empty cell, and a database a decimal (1.00).
INTEGER_AS_FLOAT = re.compile(r"(-?\d+)\.0+")
DECIMAL = re.compile(r"-?\d*\.\d*[1-9]\d*")  # and no integer
# Labels of test rows that stand for "no label". (SNLI has "-", and its copy on the hub -1.)
HIDDEN = ("-1", "-", "none", "null", "nan")
DOUBTFUL = (*HIDDEN, "na", "n/a", "?")  # in train, they may mean that, or be labels like others

# What to do about a label that is not known, if an adapter has learned the others.
LEARNED_LABELS = (
    "leave the row out, or give --input and --labels in place of the learned prompt and words "
    "(task.json)"
)


class Labels(NamedTuple):
    """The labels of a file, in the order of the choices."""

    spelled: tuple[str, ...]  # as the file has them
    words: tuple[str, ...]  # as the model reads them

    @property
    def are_digits(self) -> bool:
        return all(INTEGER.fullmatch(word) for word in self.words)

    @property
    def are_booleans(self) -> bool:
        return {word.lower() for word in self.words} == set(BOOLEANS)

    def describe(self) -> str:
        """Return the labels as a text: "negative, positive", or "negative (0), positive (1)"."""
        texts = []
        for spelled, word in zip(self.spelled, self.words, strict=True):
            is_word = fold_case(spelled) == fold_case(word)
            text = word if is_word else f"{word} ({spelled})"
            texts.append(text)
        return list_names(texts, N_SHOWN)


def label_text(value) -> str | None:
    """Return a label as a text: "1" for 1, 1.0 and "1.0", "true" for True. None: no label.

    Raise ValueError if it is something else, such as a list of labels.
    """
    is_nan = isinstance(value, float) and math.isnan(value)
    if value is None or is_nan:
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str | int | float):
        raise ValueError("expected a label: a word, a number, true or false")
    text = str(value).strip()
    integral = INTEGER_AS_FLOAT.fullmatch(text)
    text = integral[1] if integral else text
    if text == "-0":  # a float has two zeros
        text = "0"
    return text or None


def label_key(value) -> str | None:
    """Return what two spellings of a label have in common. None: no label."""
    text = label_text(value)
    return text and fold_case(text)


def split_words(given: str | Sequence[str]) -> tuple[str, ...]:
    """Return the words of --labels: with commas between them, or a JSON list. In Python, they may
    be in a sequence.

    Raise ValueError unless there are at least two words, and they differ.
    """
    words = given
    if isinstance(given, str):
        words = parse_label_list(given) if given.startswith("[") else given.split(",")
    are_texts = all(isinstance(word, str) for word in words)
    words = tuple(word.strip() for word in words) if are_texts else ()
    n_different = len(set(map(fold_case, words)))
    if not all(words) or n_different < len(words) or n_different < 2:
        raise ValueError(
            f"--labels is {given!r:.80}, expected two words or more that differ, "
            "with commas between them, or a JSON list of them"
        )
    return words


def parse_label_list(given: str):
    """Return what a --labels that begins with a bracket means as JSON. Raise ValueError if it has
    no meaning.
    """
    try:
        return parse_json(given)
    except ValueError as error:
        raise ValueError(
            f"--labels is {given!r:.80}, which begins with [ and so must be a JSON list: {error}: "
            'labels with brackets are written as in ["[yes]", "[no]"]'
        ) from None


def doubtful_labels(labels: Labels) -> list[str]:
    """Return the labels of a file that may stand for "no label". Beside 1 alone, -1 is a label."""
    found = [word for word in labels.spelled if fold_case(word) in DOUBTFUL]
    return [word for word in found if word != "-1" or "0" in labels.spelled]


# Finding the labels of a file


def name_labels(
    values: Iterable,
    field: str,
    asked: Sequence[str] = (),
    names: Sequence[str] = (),
) -> Labels:
    """Return the labels of the values of a column.

    asked: the words of --labels. Either they are the labels themselves (some may occur only in
        test), or, if the file has integers or booleans, they are the words for these, in order.
    names: the names that the data set gives to the integers 0, 1, ... A word of --labels that is
        such a name stands for its integer.

    Words that the file itself has come in the order in which they first appear, and integers in
    their own order. Raise ValueError if the values do not show what the labels are.
    """
    values = list(values)
    counts, spellings = count_labels(values)
    if not counts and not asked:
        raise ValueError(f"{field!r} is {describe_no_labels(values, field)}")
    asked_keys = set(map(label_key, asked))
    # A name comes before a label that is spelled like it, because a data set may call its 0 "1".
    has_name = not asked_keys.isdisjoint(map(label_key, names))
    if asked and not has_name and counts.keys() <= asked_keys:
        return Labels(tuple(asked), tuple(asked))  # the labels themselves, in the order of the flag
    if all(INTEGER.fullmatch(key) for key in counts):
        if not asked and not names:
            check_label_count(counts, field)
        found = sorted(map(int, counts))
        if has_name:
            return find_names(found, field, asked, names)
        return name_integers(found, field, asked, names)
    if counts.keys() <= set(BOOLEANS):
        return name_booleans(spellings, field, asked)
    words = tuple(spellings[key] for key in counts)
    if asked:
        check_asked_words(words, field, asked)
        return Labels(tuple(asked), tuple(asked))
    check_label_count(counts, field)
    return Labels(words, words)


def words_of(
    labels: Sequence[str], asked: Sequence[str], *choices: Sequence[str]
) -> tuple[str, ...]:
    """Return the words of --labels, one for each of the labels that a task has.

    They are in the order of the labels. But if they are the labels themselves, in any order, or the
    words that a prompt of the task has for them, then each keeps its meaning. choices: the words of
    each prompt. Raise ValueError for yes and no in place of false and true.
    """
    word_of_key = {label_key(word): word for word in asked}
    for words in (labels, *choices):
        keys = list(map(label_key, words))
        if word_of_key.keys() == set(keys):
            return tuple(word_of_key[key] for key in keys)
    check_booleans(labels, asked)
    return tuple(asked)


def count_labels(values: Iterable) -> tuple[Counter, dict[str, str]]:
    """Return how often each label occurs, and its first spelling. Case makes no difference.

    A value that is not a label is left out, because its row is an error of its own.
    """
    counts = Counter()
    spellings = {}
    for value in values:
        try:
            text = label_text(value)
        except ValueError:
            continue
        if text is not None:
            key = fold_case(text)
            counts[key] += 1
            # Beside 1.5, a 1.0 is a word. (If all keys are integers, the spellings play no part.)
            is_boolean = isinstance(value, bool)
            spelled = text if is_boolean else str(value).strip()
            spellings.setdefault(key, spelled)
    return counts, spellings


def describe_no_labels(values: Iterable, field: str) -> str:
    """Explain why there are no labels in a column: it is empty, or the first value is not one."""
    for value in values:
        try:
            label_text(value)
        except ValueError as error:
            advice = ""
            if isinstance(value, list):  # of several labels, or doccano's of one
                advice = f'; --target "{{{field}[0]}}" takes the first of a list, with --labels'
            return f"{value!r:.40}, {error}{advice}"
    return "empty in every row, expected labels"


def name_integers(
    found: list[int], field: str, asked: Sequence[str], names: Sequence[str]
) -> Labels:
    """Return the labels of a column of integers."""
    if names and not asked:
        return Labels(tuple(map(str, range(len(names)))), tuple(names))
    n_words = len(asked)
    if not asked:
        digits = tuple(map(str, found))
        return Labels(digits, digits)
    if all(0 <= number < n_words for number in found):
        if not names:
            check_counting(found, field, n_words)
        return Labels(tuple(map(str, range(n_words))), tuple(asked))
    if len(found) == n_words:  # such as 1 to 5, or -1 and 1
        return Labels(tuple(map(str, found)), tuple(asked))
    shown = ", ".join(map(str, found[:N_SHOWN]))
    advice = "; if -1 stands for no label, leave these rows out" if -1 in found else ""
    raise ValueError(
        f"--labels has {n_words} words, but {field!r} has the labels {shown}: "
        f"expected as many words as labels{advice}"
    )


def find_names(
    found: Sequence[int], field: str, asked: Sequence[str], names: Sequence[str]
) -> Labels:
    """Return the labels of a column whose integers have names, if --labels gives some of the names.

    A name stands for its integer, wherever it is in the flag. Raise ValueError if it is unclear
    what a word that is no name stands for, or if an integer of the column has no word.
    """
    number_of_key = {label_key(name): number for number, name in enumerate(names)}
    word_of_number = {}
    for place, word in enumerate(asked):
        word_of_number[number_of_key.get(label_key(word), place)] = word
    in_order = dict(enumerate(asked))
    are_names = all(label_key(word) in number_of_key for word in asked)
    # A word that is no name stands for the integer of its place, if all names are at their places.
    if not are_names and (word_of_number != in_order or len(asked) != len(names)):
        raise ValueError(
            f"--labels has names of the integers in {field!r}, and other words: give only such "
            f"names, or a word for each of {list_names(names, N_SHOWN):.200}, in this order"
        )
    unnamed = [number for number in found if number not in word_of_number]
    if unnamed:
        shown = list_names([describe_integer(number, names) for number in unnamed], N_SHOWN)
        raise ValueError(
            f"{field!r} has the labels {shown:.200}, which --labels does not name: name them, or "
            "leave their rows out"
        )
    numbers = sorted(word_of_number)
    words = [word_of_number[number] for number in numbers]
    return Labels(tuple(map(str, numbers)), tuple(words))


def describe_integer(number: int, names: Sequence[str]) -> str:
    """Return an integer as a text, after its name if it has one."""
    return f"{names[number]} ({number})" if 0 <= number < len(names) else str(number)


def check_counting(found: Sequence[int], field: str, n_words: int):
    """Raise ValueError if words for 0, 1, ... could also be words for 1, 2, ...

    found: the integers of a column, which are less than n_words. Two words are for 0 and 1, because
    a file that counts from 1 would have a 2.
    """
    if 0 in found or n_words == 2:
        return
    shown = list_names(map(str, found), N_SHOWN)
    raise ValueError(
        f"--labels has {n_words} words, but {field!r} has the labels {shown}, so its first word "
        "may stand for 0 or for 1: give 'labels' in a task file, with the integer of each word"
    )


def name_booleans(spellings: dict[str, str], field: str, asked: Sequence[str]) -> Labels:
    """Return the labels of a column of booleans. spellings: see `count_labels`."""
    spelled = tuple(spellings.get(value, value) for value in BOOLEANS)
    if asked and len(asked) != len(spelled):
        raise ValueError(
            f"--labels has {len(asked)} words, but {field!r} has the labels {list_names(spelled)}: "
            "expected as many words as labels"
        )
    check_booleans(spelled, asked)
    return Labels(spelled, tuple(asked) or spelled)


def check_booleans(labels: Sequence[str], words: Sequence[str]):
    """Raise ValueError if words such as yes and no stand for false and true. (Of the integers,
    either may be the yes: in RTE, it is 0.)

    labels: as a file spells them, each with its word.
    """
    word_of_label = dict(zip(map(fold_case, labels), words, strict=False))
    word_of_false = word_of_label.get("false", "")
    word_of_true = word_of_label.get("true", "")
    if fold_case(word_of_false) in YES and fold_case(word_of_true) in NO:
        raise ValueError(
            f"{word_of_false!r} would stand for false, and {word_of_true!r} for true: expected "
            f"{word_of_true},{word_of_false} (or a task file with 'labels', in the order of its "
            "'choices')"
        )


def order_like_choices(labels: Labels, choices: Sequence[Sequence[str]], field: str) -> Labels:
    """Return the labels of a column in the order of the choices that prompts have for them.

    choices: format strings, of each prompt that has its own. The order in which words appear in a
    file does not say which choices they mean, so the words must be the choices of a prompt.
    Integers and booleans have an order of their own. Raise ValueError for other words, and for yes
    and no in place of false and true.
    """
    keys = list(map(fold_case, choices_of(labels.words)))
    for choices_of_prompt in choices:
        ordered_keys = list(map(fold_case, choices_of_prompt))
        if set(keys) == set(ordered_keys):
            places = sorted(range(len(keys)), key=lambda place: ordered_keys.index(keys[place]))
            spelled = tuple(labels.spelled[place] for place in places)
            words = tuple(labels.words[place] for place in places)
            return Labels(spelled, words)
    has_order = labels.are_digits or labels.are_booleans or labels.words != labels.spelled
    if choices and not has_order:
        raise ValueError(
            f"{field!r} has the labels {list_names(labels.spelled):.80}, but the choices are "
            f"{list_names(choices[0]):.80}: give 'labels' in the task file, in the order of the "
            "choices"
        )
    for choices_of_prompt in choices:
        check_booleans(labels.spelled, choices_of_prompt)
    return labels


def check_asked_words(words: Sequence[str], field: str, asked: Sequence[str]):
    """Raise ValueError if --labels names none of the words that a column has.

    They may be meant to stand for these words, but words have no order that says which for which.
    """
    asked_keys = set(map(label_key, asked))
    # In test rows, a word may say that there is no label.
    found = [word for word in words if fold_case(word) not in HIDDEN]
    if found and not any(fold_case(word) in asked_keys for word in found):
        raise ValueError(
            f"{field!r} has the labels {list_names(found, N_SHOWN):.200}, and --labels names none "
            "of them: if its words stand for these labels, say in a task file which word stands "
            "for which, with 'labels', 'choices' and 'prompts'"
        )


def check_label_count(counts: Counter, field: str):
    """Raise ValueError if there are so many labels that they are probably texts to write."""
    n_rows = counts.total()
    n_single = sum(count == 1 for count in counts.values())
    has_few_rows = len(counts) > MANY_LABELS and n_rows < FEW_ROWS * len(counts)
    if has_few_rows and n_single > len(counts) / 2:
        raise ValueError(
            f"{field!r} has {len(counts)} different labels in {n_rows} rows, which is probably not "
            f'a classification: to write them, give --target "{{{field}}}"; '
            "to pick one of them, name all with --labels"
        )


# Finding the label of a row


def find_label(value, labels: Sequence[str], field: str, may_be_hidden: bool) -> int:
    """Return the index of a known task's label, or -1 if it is hidden.

    Raise ValueError if it is neither.
    """
    lower_labels = [label.lower() for label in labels]
    text = str(value).lower()  # files have 1, true, "true" and "True"
    if text in lower_labels:
        return lower_labels.index(text)
    if type(value) is int and 0 <= value < len(labels):  # T-Few's published splits hold the index
        return value
    if may_be_hidden and text in ("none", "-1", ""):
        return -1
    raise ValueError(f"{name_value(field, value, 40)}, expected one of {', '.join(labels):.80}")


def find_user_label(
    value,
    labels: Sequence[str],
    prompt: Prompt,
    field: str,
    may_be_hidden: bool,
    advice: str = "",
) -> int:
    """Return the choice that a label means, as an index, or -1 if it is hidden.

    labels: as the files spell them. A word of the prompt is a label, too. advice: what to do about
        a label that is none of them; by default, what `advise_new_label` says.

    Raise ValueError if there is no such choice.
    """
    try:
        key = label_key(value)
    except ValueError as error:
        raise ValueError(f"{field!r} is {value!r:.40}, {error}") from None
    places = label_places(tuple(labels), prompt.choices)
    if key in places:
        return places[key]
    is_hidden = key is None or key in HIDDEN
    if is_hidden and may_be_hidden:
        return -1
    advice = advice or advise_new_label(labels, prompt, field)
    if is_hidden:
        advice = "leave the row out if it has no label"
    expected = f"expected one of {list_names(labels):.80}"
    raise ValueError(f"{name_value(field, value, 40)}, {expected}: {advice}")


def advise_new_label(labels: Sequence[str], prompt: Prompt, field: str) -> str:
    """Return what the user can do about a label that is none of those that are known."""
    if any(map(DECIMAL.fullmatch, labels)):  # such as the 3.8 of STS-B
        return f'if these are scores, write them with --target "{{{field}}}"'
    if prompt.choices != choices_of(labels):
        # One more word of --labels could shift what the others stand for.
        return "add it to train, or to 'labels' in a task file"
    return "add it to train, or to --labels"


@lru_cache(maxsize=64)
def label_places(labels: tuple[str, ...], choices: tuple[str, ...]) -> dict[str, int]:
    """Return the index of each label, by its key, and of each choice without fields."""
    places = {}
    for index, choice in enumerate(choices):
        if not field_names(choice):
            places[label_key(choice.format())] = index
    for index, label in enumerate(labels):  # a label comes before a word that is spelled like it
        places[label_key(label)] = index
    places.pop(None, None)  # an empty text is not a label
    return places


def find_choice(value, choices: Sequence[str], field: str, may_be_hidden: bool) -> int:
    """Return the index of the row's choice that a label means, or -1 if it is hidden.

    The label is the index, counted from 0, or a word: one of the choices. If the choices are
    numbers, the label is always the index, because a word would look like one.

    Raise ValueError if there is no such choice, or if a text is the index of one choice and the
    words of another.
    """
    indices = [str(index) for index in range(len(choices))]
    is_scalar = value is None or isinstance(value, str | int | float)
    text = label_text(value) if is_scalar else ""
    words = [label_text(choice) for choice in choices]
    are_numbers = all(map(INTEGER.fullmatch, words))
    if text in indices and not isinstance(value, bool):
        index = int(text)
        if isinstance(value, str) and not are_numbers and text in words:
            check_position(text, index, words, field)
        return index
    if text and not are_numbers:
        keys = list(map(fold_case, words))
        if text in words:
            return words.index(text)
        if fold_case(text) in keys:
            return keys.index(fold_case(text))
    if may_be_hidden and (text is None or text.lower() in HIDDEN):
        return -1
    expected = f"expected one of {', '.join(indices)}"
    if are_numbers:
        expected += ", the position of the right choice, because the choices are numbers"
    else:
        expected += " or one of the choices"
    raise ValueError(f"{name_value(field, value, 40)}, {expected}")


def check_position(text: str, index: int, words: Sequence[str], field: str):
    """Raise ValueError if a text is the position of one choice, and also another choice."""
    place = words.index(text)
    if place != index:
        raise ValueError(
            f"{field!r} is {text!r}, the position of {words[index]!r:.40}, and also the choice at "
            f"position {place}: give the position of the right choice as a number, without quotes, "
            "in a .jsonl file"
        )
