"""Turn texts into token ids: a rendered row becomes an Example."""

from collections.abc import Iterable
from typing import NamedTuple

from minia3.tasks.prompts import Prompt, Rendered, fit


class Example(NamedTuple):
    """A rendered row as token ids."""

    source: list[int]
    targets: list[list[int]]  # the ids of each choice
    label: int  # index of the right choice; -1: unlabeled


def encode_example(
    rendered: Rendered, tokenizer, end: bool, source: list[int] | None = None
) -> Example:
    """Return the ids of a rendered row's texts.

    end: whether the targets of a LLaMA end in the end token, as they must if the model is to
    generate them. The targets of a T5 always end in it.
    source: the ids of the input, if they are already known.
    """
    if source is None:
        source = tokenizer.encode(rendered.input)
    targets = [tokenizer.encode_target(choice, end=end) for choice in rendered.choices]
    return Example(source, targets, rendered.label)


def encode_rows(
    pairs: Iterable[tuple[dict, Prompt]], tokenizer, max_length: int, end: bool
) -> tuple[list[Rendered], list[Example], int]:
    """Render and encode each row in the words of the prompt that it is paired with.

    Return the rendered rows, their examples, and the number of inputs that were cut to `max_length`
    tokens (see `fit`).
    """
    rendered_rows = []
    examples = []
    n_cut = 0
    for row, prompt in pairs:
        rendered, source, was_cut = fit(prompt, row, tokenizer.encode, max_length)
        rendered_rows.append(rendered)
        examples.append(encode_example(rendered, tokenizer, end, source))
        n_cut += was_cut
    return rendered_rows, examples, n_cut
