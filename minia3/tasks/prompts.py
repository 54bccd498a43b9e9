"""Turn a row into text: the input that a model reads, and the choices among which it answers.

A prompt is a format string, such as "{premise}\\nQuestion: {hypothesis} True or False?\\nAnswer:",
with a choice for each label. `render` fills in the row's fields. `fit` does the same within a limit
of tokens: it takes words out of the middle of the row's longest field, and leaves the words of the
prompt alone.

The prompts of known tasks (tasks.json) are ours, except for the forms on which T5 v1.0 was
pre-trained. T-Few's prompts are those of P3.
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from minia3.tasks.format_strings import (
    escape,
    field_names,
    fill,
    fill_field,
    final_field,
    value_of,
)
from minia3.tasks.names import list_names

# A user's text may have no spaces (Chinese has none), so 20 characters of anything count as a word.
WORD = re.compile(r"\s*\S{1,20}")


class Prompt(NamedTuple):
    """How to put a row into words. `text` and `choices` are format strings with its fields."""

    text: str
    # In the order of the labels. None: the row has choices or a target of its own.
    choices: tuple[str, ...] | None
    # Field -> value -> the words of this prompt in place of the value.
    words: dict[str, dict[str, str]] | None = None
    # The family of models that was pre-trained on this form. Other models do not get the prompt.
    for_model: str | None = None
    # The text to write, as a format string. "": the row has choices, or a target of its own.
    target: str = ""

    @property
    def templates(self) -> list[str]:
        """All format strings of the prompt."""
        return [self.text, self.target, *(self.choices or ())]


# A user's rows are prompts already.
OWN_PROMPTS = (Prompt("{input}", None),)


class Rendered(NamedTuple):
    """A row in the words of a prompt."""

    input: str
    choices: list[str]  # only the target, if the row has a target
    label: int  # index of the right choice; -1: unlabeled


class Fitted(NamedTuple):
    """A row in the words of a prompt, within a number of tokens."""

    rendered: Rendered
    ids: list[int]  # of the input
    was_cut: bool


def for_family(prompts: tuple[Prompt, ...], family: str | None) -> tuple[Prompt, ...]:
    """Return the prompts that the family was pre-trained on, or else the prompts for all models.

    Raise ValueError if all prompts are for other families.
    """
    familiar = tuple(prompt for prompt in prompts if prompt.for_model == family)
    chosen = familiar or tuple(prompt for prompt in prompts if prompt.for_model is None)
    if not chosen:
        families = list_names(dict.fromkeys(prompt.for_model for prompt in prompts))
        found = f"is {family}" if family else "has no known family"
        raise ValueError(
            f"all prompts are for other models ('for_model' is {families:.80}), and this model "
            f"{found}: take 'for_model' out of a prompt"
        )
    return chosen


def render(prompt: Prompt, row: dict) -> Rendered:
    """Return a row in a prompt's words. Raise ValueError if the row lacks a field of the prompt."""
    fields = row | values_in_words(prompt, row)
    if prompt.choices:
        # In COPA, some choices end in a space.
        choices = [fill(choice, fields).strip() for choice in prompt.choices]
    elif prompt.target:
        # The tokenizer puts a space before the target, and some files have it already.
        choices = [fill(prompt.target, fields).strip()]
    elif "choices" in row:
        choices = [choice.strip() for choice in row["choices"]]
    else:
        choices = [fill("{target}", fields)]
    text = fill(prompt.text, fields)
    if text[-1:].isspace() and ends_in_empty_field(prompt, fields):
        text = text.rstrip()  # of an instruction without an input, for example
    return Rendered(text, choices, row["label"])


def values_in_words(prompt: Prompt, row: dict) -> dict[str, str]:
    """Return the fields that the prompt puts into words: "cause" may become "This is because".

    A row that is to be answered lacks the fields of the target.
    """
    replaced = {}
    for name, words in (prompt.words or {}).items():
        if not any(name in field_names(text) for text in prompt.templates):
            continue
        value = fill(f"{{{name}}}", row)
        if value in ("true", "false") and value not in words:
            value = value.capitalize()  # a task file may spell them as Python does
        if value not in words:
            raise ValueError(f"{name!r} is {value!r:.40}, expected one of {', '.join(words)}")
        replaced[name] = words[value]
    return replaced


def ends_in_empty_field(prompt: Prompt, fields: dict) -> bool:
    """Return whether the prompt's text ends in a field, and this field is empty in this row."""
    name = final_field(prompt.text)
    return name is not None and fields.get(name) == ""


def fit(prompt: Prompt, row: dict, encode: Callable[[str], list[int]], max_length: int) -> Fitted:
    """Render a row so that its input has at most `max_length` tokens.

    If the input is too long, the row's longest field (in characters) loses as few words as possible
    from its middle, down to one word, and then the next longest field does. So the words of the
    prompt remain, and a user's input keeps its beginning (what to do) and its end (the question).
    Choices are never cut. T-Few's code cuts tokens off the end of the input instead.

    Raise ValueError if the input is too long even with one word of each field.
    """
    rendered = render(prompt, row)
    ids = encode(rendered.input)
    if len(ids) <= max_length:
        return Fitted(rendered, ids, was_cut=False)
    for name in fields_to_cut(prompt, row):
        prompt = cut_field(prompt, row, name, encode, max_length)
        shorter = rendered._replace(input=render(prompt, row).input)
        ids = encode(shorter.input)
        if len(ids) <= max_length:
            return Fitted(shorter, ids, was_cut=True)
    raise ValueError(
        f"row {row['idx']} does not fit into max_length {max_length}, "
        "even with one word of each field: raise max_length"
    )


def fields_to_cut(prompt: Prompt, row: dict) -> list[str]:
    """Return the names of the row's texts in the prompt, the longest text first, then by name."""
    names = set(field_names(prompt.text)) - set(prompt.words or ())  # these words are the prompt's
    values = {name: value_of(row, name) for name in names}
    texts = [name for name in names if isinstance(values[name], str)]
    return sorted(texts, key=lambda name: (-len(values[name]), name))


def cut_field(
    prompt: Prompt, row: dict, name: str, encode: Callable[[str], list[int]], max_length: int
) -> Prompt:
    """Return a prompt with words of the field in its place: as many as fit, and at least one.

    The row stays as it is, because the field may be an item deep inside of a list.
    """
    words = WORD.findall(value_of(row, name))

    def cut_to(n_words):
        return prompt._replace(text=fill_field(prompt.text, name, keep_ends(words, n_words)))

    def is_too_long(n_words):
        return len(encode(render(cut_to(n_words), row).input)) > max_length

    n_fitting = count_fitting(len(words) - 1, is_too_long)
    return cut_to(max(n_fitting, 1))


def count_fitting(n_most: int, is_too_long: Callable[[int], bool]) -> int:
    """Return the largest n from 1 to `n_most` that is not too long, or 0 if all of them are.

    If an n is too long, so must be each larger one.
    """
    # In the range 1, 2, ... the index of the first n that is too long is the last n that fits.
    return bisect_left(range(1, n_most + 1), True, key=is_too_long)


def keep_ends(words: list[str], n_words: int) -> str:
    """Return the text of the first words and the last words, `n_words` in total."""
    n_tail = n_words // 2
    head = "".join(words[: n_words - n_tail]).strip()
    tail = "".join(words[len(words) - n_tail :]).strip()
    return f"{head} {tail}".strip()


def in_context(prompt: Prompt, rows: list[dict]) -> list[Prompt]:
    """Return the prompts of in-context learning with 0, 1, ..., len(rows) shots.

    Prompt n begins with the first n rows, each in the words of `prompt` and with its answer.
    """
    prompts = [prompt]
    shots = ""
    for row in rows:
        text, choices, label = render(prompt, row)
        shot = f"{text} {choices[label]}\n\n"
        shots += escape(shot)  # a prompt's text is a format string
        prompts.append(prompt._replace(text=shots + prompt.text))
    return prompts


def choices_of(words: Iterable[str]) -> tuple[str, ...]:
    """Return the choices of a prompt for these words: format strings."""
    return tuple(map(escape, words))


def check_choices(prompt: Prompt, labels: Sequence[str]):
    """Raise ValueError if a prompt has more or fewer choices than there are labels."""
    if len(prompt.choices) != len(labels):
        raise ValueError(
            f"{len(prompt.choices)} choices ({list_names(prompt.choices):.80}) for "
            f"{len(labels)} labels ({list_names(labels):.80}): expected as many choices as labels"
        )
