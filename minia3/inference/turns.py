"""Let the token or text that ends a turn in a chat template end an answer, too.

`generate` also ends a text at the tokenizer's eos (`end_ids_of` in decoding.py).
"""

import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from minia3.files.read import reading
from minia3.tasks.task import TaskSpec


def end_answers(model, tokenizer) -> tuple[str, ...]:
    """Add the end token of a turn to the end tokens of the model, or return the text that ends one.

    A base model that was tuned to chat ends its answers with the template's token, which its config
    does not name. Some templates end a turn with plain text ("###"), which `generate` takes as
    `stop`.
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


def answer_as_learned(model, tokenizer, specs: Iterable[TaskSpec]):
    """Let a model and its tokenizer, which are to be saved, answer as the model has learned to.

    specs: the tasks that the model has learned. Programs that do not know task.json take the chat
    template from the tokenizer's files, and the end tokens from generation_config.json. Without
    these they would ask in another form, and an answer would not end. A text that ends a turn, but
    is not a token, has no place there. (`save_model` adds the tokenizer's eos, which ends targets.)

    Raise ValueError if jinja2 is missing, without which nobody knows what ends a turn.
    """
    if tokenizer is None:
        return
    for spec in specs:
        if spec.messages:
            with reading("chat_template", extra="chat"):
                importlib.import_module("jinja2")
            tokenizer.chat_template = spec.chat_template or tokenizer.chat_template
            end_answers(model, tokenizer)
