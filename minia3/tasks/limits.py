"""What a model cannot take: ids without an embedding, and targets that are too long.

Texts have become ids when these functions look at them, and no model has read them yet.
"""

from minia3.tasks.examples import Example


def check_ids(example: Example, n_ids: int, tokenizer):
    """Raise ValueError if the model has no embedding for an id of the example.

    n_ids: how many rows the model's embedding has. A tokenizer may have more tokens: people add a
    `<pad>` to LLaMA-2's and forget the embedding.
    """
    texts = [ids for ids in (example.source, *example.targets) if ids]
    largest = max(map(max, texts), default=0)
    if largest >= n_ids:
        token = tokenizer.backend.id_to_token(largest)
        raise ValueError(
            f"the tokenizer has the token {token!r} with the id {largest}, but the model's "
            f"embedding ends at {n_ids - 1}: remove the token from the text or the tokenizer"
        )


def fit_targets(
    example: Example, max_length: int | None, are_choices: bool
) -> tuple[Example, bool]:
    """Return an example whose target has at most `max_length` tokens, and whether it was cut.

    max_length: None is any length. are_choices: whether the answer is picked among the targets,
    even if there is only one.

    A cut target keeps its beginning and has no end token, because a model should not learn to stop
    in the middle of a text. A conversation stays as it is: `fit_chat` has shortened it. Raise
    ValueError if a choice is too long: without its end, it may be another one.
    """
    longest = max(map(len, example.targets))
    is_conversation = example.is_scored is not None
    if max_length is None or longest <= max_length or is_conversation:
        return example, False
    if are_choices:
        raise ValueError(
            f"a choice has {longest:,} tokens, expected at most {max_length:,}: "
            "shorten it, or raise --max-target-length"
        )
    return example._replace(targets=[example.targets[0][:max_length]]), True


def fit_all_targets(
    rows: list[dict], examples: list[Example], max_length: int | None, are_choices: bool
) -> tuple[list[Example], int]:
    """Return `fit_targets` of all examples, and the number of targets that were cut.

    Raise ValueError, with the row's `idx`, if a choice is too long.
    """
    fitted = []
    n_cut = 0
    for row, example in zip(rows, examples, strict=True):
        try:
            example, was_cut = fit_targets(example, max_length, are_choices)
        except ValueError as error:
            raise ValueError(f"row {row['idx']}: {error}") from None
        fitted.append(example)
        n_cut += was_cut
    return fitted, n_cut


def equal_choices(example: Example) -> tuple[int, int] | None:
    """Return the places of two choices that have the same ids, or None.

    T5's tokenizer takes "a\\nb" and "a b" for one text. Such choices have the same score, so the
    first would always win.
    """
    first_places = {}
    for place, target in enumerate(example.targets):
        first = first_places.setdefault(tuple(target), place)
        if first != place:
            return first, place
    return None


def written_target(text: str, tokenizer) -> str:
    """Return a target as the tokenizer can write it, without white space at its ends.

    T5's tokenizer has no newline, no `{` and no `~`, and writes other forms of some letters. A
    model that has learned such a target perfectly writes this text, and not the target. If nothing
    is left of the target (T5 has no Chinese), return the target: writing nothing must not match it.
    """
    written = tokenizer.decode(tokenizer.encode_target(text, end=False)).strip()
    return written or text.strip()


def loses_characters(text: str, tokenizer) -> bool:
    """Return whether a target, written by the tokenizer, is another text."""
    written = tokenizer.decode(tokenizer.encode_target(text, end=False))
    return written.strip() != text.strip()
