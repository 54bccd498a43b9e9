"""Let the token or text that ends a turn in a chat template end an answer, too."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace


def end_answers(model, tokenizer) -> tuple[str, ...]:
    """Add the end token of a turn to the end tokens of the model, or return the text that ends one.

    The model's files may name another end token: a base model that has learned to chat ends its
    answers in the token of the template. A template may also end its turns in a text that is no
    token of its own ("###"). `generate` takes this text as `stop`.
    """
    ending = tokenizer.end_of_turn()
    if not ending:
        return ()
    end_id = tokenizer.encode(ending, special=False)[0]
    if end_id not in tokenizer.backend.get_added_tokens_decoder():
        return (ending,)
    if end_id not in model.config.eos_ids:
        model.config = replace(model.config, eos_ids=(*model.config.eos_ids, end_id))
    return ()


@contextmanager
def ending_answers(model, tokenizer) -> Iterator[tuple[str, ...]]:
    """Yield what `end_answers` returns. At the end, the model has its own end tokens again.

    Otherwise the text of a plain row would depend on whether a conversation came before it.
    """
    config = model.config
    try:
        yield end_answers(model, tokenizer)
    finally:
        model.config = config
