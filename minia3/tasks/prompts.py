"""To be written."""

import re
import string
from bisect import bisect_left
from collections.abc import Callable
from typing import NamedTuple


class Prompt(NamedTuple):
    text: str
    choices: (
        tuple[str, ...] | None
    )  # format strings, in the labels' order; None: the row's own choices, or its target
    words: dict[str, dict[str, str]] | None = (
        None  # field -> value -> what stands for that value in this prompt
    )
    for_model: str | None = (
        None  # the family that was trained on this form; other models do not see it
    )


class Rendered(NamedTuple):
    input: str
    choices: list[str]  # just one, where the row has a target
    label: int


def for_family(prompts: tuple[Prompt, ...], family: str | None) -> tuple[Prompt, ...]:
    """The prompts to draw from for a model: those its family was trained on; where there are none, those for all."""
    own = tuple(prompt for prompt in prompts if prompt.for_model == family)
    return own or tuple(prompt for prompt in prompts if prompt.for_model is None)


def render(prompt: Prompt, row: dict) -> Rendered:
    """A row in a prompt's words. Raises ValueError where the row lacks a field of the prompt."""
    try:
        fields = row | {name: words[str(row[name])] for name, words in (prompt.words or {}).items()}
        if prompt.choices:
            choices = [
                choice.format_map(fields).strip() for choice in prompt.choices
            ]  # some of COPA's end in a space
        else:
            choices = row["choices"] if "choices" in row else [row["target"]]
        return Rendered(prompt.text.format_map(fields), choices, row["label"])
    except (LookupError, TypeError) as error:  # TypeError: an item is asked for of what has none
        lacks = error if isinstance(error, KeyError) else f"such item ({error})"
        raise ValueError(f"no {lacks} in the row, but in the prompt {prompt.text!r:.60}") from error


def fit(
    prompt: Prompt, row: dict, n_tokens: Callable[[str], int], max_length: int
) -> tuple[Rendered, bool]:
    """`render`, with the input cut to `max_length` tokens where it is longer, and whether it was cut.

    The row's longest field (in characters) loses words from its middle, as few as need be, then the next longest: so
    the prompt's own words remain, and of a user's input the head (what to do) and the tail (the question). Choices are
    never cut. Raises ValueError where even one word of each field is too much.
    """
    rendered, row = render(prompt, row), dict(row)
    if n_tokens(rendered.input) <= max_length:
        return rendered, False

    def cut(n):  # n words are left of the field `name`
        head, tail = words[: (n + 1) // 2], words[len(words) - n // 2 :]
        row[name] = f"{''.join(head).strip()} {''.join(tail).strip()}".strip()
        return rendered._replace(input=render(prompt, row).input)

    used = {
        name
        for _, name, _, _ in string.Formatter().parse(prompt.text)
        if isinstance(row.get(name), str)
    }
    for name in sorted(used - set(prompt.words or ()), key=lambda name: (-len(row[name]), name)):
        words = re.findall(
            r"\s*\S{1,20}", row[name]
        )  # Chinese has no spaces: 20 characters of anything are a word
        most = bisect_left(
            range(1, len(words)), True, key=lambda n: n_tokens(cut(n).input) > max_length
        )
        if n_tokens((shorter := cut(most or 1)).input) <= max_length:
            return shorter, True
    raise ValueError(
        f"row {row['idx']} does not fit into max_length {max_length}, even with one word of each field"
    )


def in_context(prompt: Prompt, rows: list[dict]) -> list[Prompt]:
    """`prompt` behind none, the first, the first two ... of `rows`, each in the prompt's words and answered."""
    heads = [""]
    for text, choices, label in (render(prompt, row) for row in rows):
        heads.append(f"{heads[-1]}{text} {choices[label]}\n\n")
    return [
        prompt._replace(text=head.replace("{", "{{").replace("}", "}}") + prompt.text)
        for head in heads
    ]


OWN_PROMPTS = (Prompt("{input}", None),)  # a user's rows are prompts already
