"""Find what the assistant wrote in the text of a conversation.

A template with {% generation %} blocks says it. Most published templates have none, so there are
two other ways, for each turn:

1. Compare the text before the turn, and the text up to its end, with the whole text. If each begins
   the next one, then the turn is what the second adds to the first.
2. Some templates rewrite earlier turns when the conversation goes on: Qwen3's drops their thinking,
   and Mistral's moves the system message to the last question. So replace the content of a message
   by other words: what stays the same around it belongs to the template. The turn begins after what
   the template writes between the message before it and an answer, and ends with what it writes
   after the answer. Each piece is taken from the conversation cut off there, and must occur in the
   whole conversation exactly as it does there. The contents of all earlier messages must come
   before the turn. Otherwise the model would be trained without something that it reads when it
   answers, and the conversation is refused.

What the template leaves out everywhere is found by chat_contents.py.
"""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from typing import NamedTuple

from minia3.checkpoints.chat import ChatText, render_chat

BLOCKS = "a template with {% generation %} blocks (--chat-template FILE)"

# Two texts that replace a message's content. Their first characters differ, and so do their last
# ones, so any content differs from at least one of them at each end.
PROBES = ("Alpha.", "omega!")


@dataclass
class Conversation:
    """A conversation whose beginnings are rendered, with or without other words in a message."""

    template: str
    messages: list[dict]
    special_tokens: dict
    tools: list | None
    rendered: dict = field(default_factory=dict)  # arguments of `render` -> its result

    def render(self, n_messages, ends_with_prompt, place=None, probe=None):
        """Return the ChatText of the first messages. probe: the content of the message `place`."""
        key = (n_messages, ends_with_prompt, place, probe)
        if key not in self.rendered:
            part = list(self.messages[:n_messages])
            if place is not None:
                part[place] = part[place] | {"content": probe}
            self.rendered[key] = render_chat(
                self.template, part, self.special_tokens, self.tools, ends_with_prompt
            )
        return self.rendered[key]

    def find_content(self, place, n_messages, ends_with_prompt=False):
        """Return the Place of a message's content in the text of the first messages."""
        text = self.render(n_messages, ends_with_prompt).text
        n_before = n_after = len(text)
        for probe in PROBES:
            other = self.render(n_messages, ends_with_prompt, place, probe).text
            n_before = min(n_before, count_same(text, other))
            n_after = min(n_after, count_same(text[::-1], other[::-1]))
        return Place(n_before, len(text) - n_after, text)


class Place(NamedTuple):
    """Where the content of a message is in a text: all that changes if it changes."""

    first: int
    end: int
    text: str

    @property
    def after(self):
        return self.text[self.end :]


def render_conversation(template, messages, special_tokens, tools=None):
    """Return the whole text of a conversation, with a span for each turn of the assistant.

    A message with the weight 0, as in OpenAI's files, has no span: it is not learned.

    Raise ValueError if a turn cannot be found as the docstring of the module says, and whatever
    `render_chat` raises.
    """
    conversation = Conversation(template, messages, special_tokens, tools)
    whole = conversation.render(len(messages), ends_with_prompt=False)
    if whole.spans:
        return whole._replace(spans=learned_spans(whole.spans, messages))
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or message.get("weight") == 0:
            continue
        if i == 0:
            raise ValueError(
                "the conversation begins with the assistant: expected a message of the user or "
                f"the system first, or {BLOCKS}"
            )
        spans.append(find_turn(conversation, i, whole.text))
    return ChatText(whole.text, spans)


def learned_spans(spans, messages):
    """Return the spans of a template's blocks, without those of messages that have the weight 0."""
    weights = [message.get("weight") for message in messages if message["role"] == "assistant"]
    if 0 not in weights:
        return spans
    if len(spans) != len(weights):
        raise ValueError(
            f"a message has the weight 0, but the template has {len(spans)} {{% generation %}} "
            f"blocks for {len(weights)} messages of the assistant: expected one for each"
        )
    return [span for span, weight in zip(spans, weights, strict=True) if weight != 0]


def within_spans(offsets, spans):
    """Return for each token of a text whether a part of it is in a span.

    offsets: (first character, end) of each token. They may be equal: some tokenizers say that a
        token of white space has no characters.
    spans: in the order of the text.

    As in transformers, a token counts that begins before the end of a span and ends after its
    beginning.
    """
    ends = [end for _, end in spans]
    is_within = []
    for first, end in offsets:
        place = bisect_right(ends, first)  # of the first span that ends after the token begins
        is_within.append(place < len(spans) and spans[place][0] < end)
    return is_within


def find_end_of_turn(template, special_tokens):
    """Return what the template writes after the content of an answer, without white space.

    It is empty if there is no such text. Raise ValueError as `render_conversation` does.
    """
    messages = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello!"}]
    text, spans = render_conversation(template, messages, special_tokens)
    first, end = spans[-1]
    content = Conversation(template, messages, special_tokens, None).find_content(1, 2)
    return text[max(first, content.end) : end].strip()


def find_turn(conversation, i, whole):
    """Return the span of message i in the whole text. Raise ValueError if it cannot be found."""
    before = conversation.render(i, ends_with_prompt=True).text
    after = conversation.render(i + 1, ends_with_prompt=False).text
    if after.startswith(before) and whole.startswith(after):
        turn = without_tail(after[len(before) :], conversation, i)
        return (len(before), len(before) + len(turn))
    span = probe_turn(conversation, i)
    if span is None:
        change = describe_change(before, after, whole)
        advice = how_to_train(before, after, conversation.messages)
        raise ValueError(
            f"message {i}, or the text before it, changes when the conversation goes on "
            f"({change}), so it cannot be trained on: {advice}"
        )
    return span


def without_tail(turn, conversation, i):
    """Return the text of turn i without white space after its end token, such as ChatML's line
    break. Generation has ended before it.
    """
    content = (conversation.messages[i].get("content") or "").strip()
    if content and turn.count(content) == 1:
        ending = turn.partition(content)[2]
    else:  # such as "A" in "Assistant: A"
        ending = conversation.find_content(i, i + 1).after
    if not ending.strip():
        return turn  # there is no end token, so the white space is all that ends the turn
    return turn.rstrip()


def probe_turn(conversation, i):
    """Return the span of message i, found by replacing contents, or None."""
    n_messages = len(conversation.messages)
    question = conversation.find_content(i - 1, n_messages)
    prompt_end = conversation.find_content(i - 1, i, ends_with_prompt=True).after
    answer = conversation.find_content(i, n_messages)
    turn_end = conversation.find_content(i, i + 1).after
    if turn_end.strip():
        turn_end = turn_end.rstrip()  # as in `without_tail`
    first = question.end + len(prompt_end)
    is_same = question.after.startswith(prompt_end) and answer.after.startswith(turn_end)
    is_last = all(conversation.find_content(j, n_messages).first < first for j in range(i))
    if not is_same or not is_last or first > answer.first:
        return None
    return (first, answer.end + len(turn_end))


def describe_change(before, after, whole):
    """Return what changes in the text of a conversation when it goes on."""
    text = before
    longer = after
    if after.startswith(before):
        text = after
        longer = whole
    n_same = count_same(text, longer)
    return f"{text[n_same:][:20]!r} becomes {longer[n_same:][:20]!r}"


def how_to_train(before, after, messages):
    """Return what to do about a template that changes what it has written."""
    if after.startswith(before):  # the last answer of a conversation follows its prompt
        return f"give conversations with one answer at their end, or {BLOCKS}"
    for message in messages:
        content = message.get("content")
        if message["role"] == "system" and isinstance(content, str):
            text = content.strip()
            # The template has moved or dropped it.
            if text and before.count(text) > after.count(text):
                return f"put the system message into the question, or give {BLOCKS}"
    return f"give a template whose prompt the conversation repeats, or {BLOCKS}"


def count_same(text, other):
    """Return how many characters two texts have in common at their beginning."""
    # By halving, because comparing slices is far faster than comparing characters in Python.
    lengths = range(1, min(len(text), len(other)) + 1)
    return bisect_left(lengths, True, key=lambda length: text[:length] != other[:length])
