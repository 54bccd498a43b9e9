"""Turn texts into token ids: a rendered row becomes an Example."""

from collections.abc import Iterable
from typing import NamedTuple

from minia3.tasks.messages import fit_chat, fit_question
from minia3.tasks.prompts import Prompt, Rendered, fit


class Example(NamedTuple):
    """A rendered row as token ids."""

    source: list[int]
    targets: list[list[int]]  # the ids of each choice
    label: int  # index of the right choice; -1: unlabeled
    # Whether each token of the target counts, if it is the only one (a conversation: only the
    # assistant's turns count). None: all of them do.
    is_scored: list[bool] | None = None

    @property
    def n_tokens(self) -> int:
        """How many tokens a model reads or scores."""
        return len(self.source) + sum(map(len, self.targets))


def encode_example(
    rendered: Rendered, tokenizer, end: bool, source: list[int] | None = None
) -> Example:
    """Return the ids of a rendered row's texts.

    end: whether the targets of a LLaMA end in the end token, as they must if the model is to
    generate them. The targets of a T5 always end in it.
    source: the ids of the input, if they are already known.
    """
    if source is None:
        source = tokenizer.encode_prompt(rendered.input)
    targets = [tokenizer.encode_target(choice, end=end) for choice in rendered.choices]
    return Example(source, targets, rendered.label)


def encode_rows(
    pairs: Iterable[tuple[dict, Prompt]], tokenizer, max_length: int, end: bool
) -> tuple[list[Rendered], list[Example], int]:
    """Render and encode each row in the words of the prompt that it is paired with.

    Return the rendered rows, their examples, and the number of inputs that were cut to `max_length`
    tokens (see `fit`, and `fit_chat` for rows of messages, which have no prompt).
    """
    rendered_rows = []
    examples = []
    n_cut = 0
    for row, prompt in pairs:
        if "messages" in row:
            rendered, example, was_cut = encode_chat(row, tokenizer, max_length)
        else:
            rendered, source, was_cut = fit(prompt, row, tokenizer.encode_prompt, max_length)
            example = encode_example(rendered, tokenizer, end, source)
        rendered_rows.append(rendered)
        examples.append(example)
        n_cut += was_cut
    return rendered_rows, examples, n_cut


def encode_question(row: dict, tokenizer, max_length: int) -> tuple[Rendered, Example, bool]:
    """Encode a row of messages as a source that is to be answered, within `max_length` tokens.

    An answer at the end is left out. There are no choices and no targets. The bool says whether the
    conversation was cut.
    """
    ids, was_cut = fit_question(row, tokenizer, max_length)
    return Rendered(tokenizer.decode(ids), [], -1), Example(ids, [], -1), was_cut


def encode_chat(row: dict, tokenizer, max_length: int) -> tuple[Rendered, Example, bool]:
    """Encode a row of messages within `max_length` tokens, and return whether it was cut.

    The source is everything before the first turn of the assistant, and the target is what follows,
    up to the last token of the assistant. In it, only turns of the assistant are scored. So the
    model reads the whole conversation once.

    Raise ValueError if the conversation does not fit, or the template does not allow it.
    """
    (ids, is_scored), was_cut = fit_chat(row, tokenizer, max_length)
    first = max(is_scored.index(True), 1)  # nothing comes before the very first token to predict it
    n_after_last = is_scored[::-1].index(True)
    end = len(ids) - n_after_last
    example = Example(ids[:first], [ids[first:end]], 0, is_scored[first:end])
    rendered = Rendered(tokenizer.decode(example.source), [tokenizer.decode(ids[first:end])], 0)
    return rendered, example, was_cut
