"""Check and shorten conversations: rows with `messages`.

    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]}
    {"messages": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi."}]}

A checkpoint's chat template turns them into text (checkpoints/chat.py).
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from minia3.tasks.json_rows import parse_json

INSTRUCTIONS = ("system", "developer")  # roles of messages that come before the first turn

# Columns whose text is the system message of the conversation beside them. The first one counts.
SYSTEM_COLUMNS = ("system", "system_prompt")

# What files in ShareGPT's form call the roles. Others, such as system, have the same names.
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}

# How a message calls a tool. Older forms say it otherwise, and no template writes them.
CALLS = "'tool_calls': [{'type': 'function', 'function': {'name': ..., 'arguments': ...}}]"


def in_openai_form(message):
    """Return {"role": "user", "content": "Hi"} for {"from": "human", "value": "Hi"}.

    Whatever is not in ShareGPT's form stays as it is.
    """
    if not isinstance(message, dict) or not isinstance(message.get("from"), str):
        return message
    # Others are a weight, or null: in a table, all messages have the keys of both forms.
    kept = {name: value for name, value in message.items() if value is not None}
    name = kept.pop("from")
    role = SHAREGPT_ROLES.get(name, name)
    content = kept.pop("value", None)
    return {"role": role, "content": content, **kept}


def find_system_column(row: Mapping, messages) -> str:
    """Return the column of a row with the system message of its conversation, or "" if it has none,
    or if the conversation has one of its own.
    """
    first = messages[0] if isinstance(messages, list) and messages else None
    first = in_openai_form(first)
    if isinstance(first, dict) and first.get("role") in INSTRUCTIONS:
        return ""
    for name in SYSTEM_COLUMNS:
        text = row.get(name)
        if isinstance(text, str) and text.strip():
            return name
    return ""


def check_messages(row: dict, needs_answer: bool = True):
    """Raise ValueError if a row's `messages` are not a conversation.

    Which roles there are, and in which order, is the template's business. Other keys of a message,
    such as tool_calls, are passed on to the template. Older forms of calls, which no template
    writes, are refused.

    needs_answer: whether there must be a message of the assistant to learn.
    """
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        advice = ""
        if isinstance(messages, str):
            advice = ", and not its text (a .csv keeps no lists, but .jsonl and .parquet do)"
        raise ValueError(
            f"'messages' is {messages!r:.60}, expected a list of {{'role': ..., 'content': ...}}"
            f"{advice}"
        )
    for i, message in enumerate(messages):
        check_message(message, i)
    check_tools(row)
    if needs_answer and not has_answer(messages):
        if any(message["role"] == "assistant" for message in messages):
            raise ValueError(
                "all messages of the role 'assistant' have weight 0, so there is nothing to learn"
            )
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
        raise ValueError(
            f"no message of the role 'assistant', so there is nothing to learn: found {roles:.60}"
        )


def check_message(message, i: int):
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(
            f"message {i} is {message!r:.60}, expected {{'role': 'user', 'content': 'a text'}}"
        )
    if message["role"] == "function_call":  # ShareGPT's, whose value is the text of a call
        raise ValueError(
            f"message {i} has the role 'function_call': write it as a message of the role "
            f"'assistant' with {CALLS}"
        )
    if message.get("function_call"):  # some files have an empty one in all other messages
        raise ValueError(
            f"message {i} has the older 'function_call': write it as {CALLS}, and the role "
            "'function' as 'tool'"
        )
    content = message.get("content")
    is_call = content is None and bool(message.get("tool_calls"))  # it may say nothing besides
    if not isinstance(content, str) and not is_call:
        raise ValueError(f"the content of message {i} is {content!r:.60}, expected a text")
    weight = message.get("weight")
    if message["role"] == "assistant" and weight not in (None, 0, 1):
        raise ValueError(f"the weight of message {i} is {weight!r:.60}, expected 0 or 1")


def check_tools(row: dict):
    tools = row.get("tools")
    is_list = isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    if tools is not None and not is_list:
        raise ValueError(f"'tools' is {tools!r:.60}, expected a list of JSON objects")


def parse_tools(tools):
    """Return the list that a text of JSON spells. Whatever is something else stays as it is.

    Data sets in .parquet have such texts, because the schemas of different tools have different
    keys. An empty text means that there are no tools.
    """
    if not isinstance(tools, str):
        return tools
    if not tools.strip():
        return None
    try:
        value = parse_json(tools)
    except ValueError:
        return tools
    return value if isinstance(value, list) else tools


def has_answer(messages: list[dict]) -> bool:
    return any(map(is_learned, messages))


def is_learned(message: dict) -> bool:
    """Return whether a message is to be learned. In OpenAI's files, 0 as its weight says no."""
    return message["role"] == "assistant" and message.get("weight") != 0


def question(messages: list[dict]) -> list[dict]:
    """Return the messages without the answer at their end, if there is one."""
    if messages[-1]["role"] == "assistant":
        return messages[:-1]
    return messages


def fit_chat(row: dict, tokenizer, max_length: int):
    """Return (ids, which of them the assistant wrote), and whether the conversation was cut.

    A conversation of more than `max_length` tokens loses the messages after the last one that is
    learned, which no loss counts, and as few of its oldest turns as possible, because a model that
    answers sees the newest ones. Only lost turns count as a cut. No turn loses a part of its text.

    Raise ValueError if the last exchange that is learned does not fit either, or if the template
    cannot be trained on or leaves something out.
    """
    messages = row["messages"]
    tools = row.get("tools")
    tokenizer.template_to_train_on(tools)  # its errors are not about this row

    def count_tokens(part):
        with naming_row(row, part):
            return tokenizer.count_chat(part, tools)

    last_answer = max(i for i, message in enumerate(messages) if is_learned(message))
    has_more = last_answer < len(messages) - 1
    if has_more and count_tokens(messages) > max_length:
        messages = messages[: last_answer + 1]
    fitted = shorten(messages, last_answer, count_tokens, max_length)
    n_tokens = count_tokens(fitted)
    if n_tokens > max_length:
        raise ValueError(
            f"row {row['idx']} does not fit into max_length {max_length}: "
            f"its last learned exchange alone has {n_tokens} tokens: raise max_length"
        )
    with naming_row(row, fitted):
        encoded = tokenizer.conversation(fitted, tools)
    if not any(encoded.is_scored):
        raise ValueError(f"row {row['idx']}: the chat template leaves out what the assistant wrote")
    return encoded, fitted is not messages


@contextmanager
def naming_row(row: dict, part: list[dict]) -> Iterator[None]:
    """Let a message of the chat template say which row it is about.

    part: the messages that the template is given, and which its message may count.
    """
    try:
        yield
    except ValueError as error:
        turns = "" if len(part) == len(row["messages"]) else ", the turns that fit into max_length"
        raise ValueError(f"row {row['idx']}{turns}: {error}") from None


def fit_question(row: dict, tokenizer, max_length: int) -> tuple[list[int], bool]:
    """Return the ids of a conversation up to the place where its last answer begins, and whether it
    was cut.

    A conversation of more than `max_length` tokens loses as few of its oldest turns as possible.
    Raise ValueError if the last question does not fit.
    """
    messages = question(row["messages"])
    tools = row.get("tools")
    if not messages:
        raise ValueError("'messages' holds only an answer, expected a question before it")

    def count_tokens(part):
        return len(tokenizer.chat(part, tools))

    fitted = shorten(messages, len(messages) - 1, count_tokens, max_length)
    ids = tokenizer.chat(fitted, tools)
    if len(ids) > max_length:
        raise ValueError(
            f"the last question has {len(ids)} tokens and does not fit into max_length "
            f"{max_length}: raise max_length"
        )
    return ids, len(fitted) < len(messages)


def shorten(messages: list[dict], kept: int, count_tokens: Callable, max_length: int) -> list[dict]:
    """Return a conversation without as few of its oldest turns as make it fit into `max_length`.

    Instructions at the beginning stay, and then a message of the user follows. If nothing fits,
    return the shortest conversation. kept: the index of a message that stays.
    """
    if count_tokens(messages) <= max_length:
        return messages
    n_instructions = 0
    while messages[n_instructions]["role"] in INSTRUCTIONS and n_instructions < kept:
        n_instructions += 1
    later = range(n_instructions + 1, kept + 1)
    starts = [i for i in later if messages[i]["role"] == "user"]
    if not starts:
        return messages

    def from_start(i):
        return messages[:n_instructions] + messages[i:]

    def fits(i):
        return count_tokens(from_start(i)) <= max_length

    first_that_fits = bisect_left(starts, True, key=fits)
    return from_start(starts[min(first_that_fits, len(starts) - 1)])
