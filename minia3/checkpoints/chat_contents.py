"""Find what a chat template leaves out of a conversation.

Many templates pass over what they do not know, and say nothing. Qwen2.5's writes no message of the
role `developer` or `observation`, and Llama 3's writes no calls of tools: a model would learn to
answer nothing where it should call one. So a text is compared with that of the same conversation
with other words in a message, or without a call. If it is the same text, then the template does
not write them.

Turns of the user and of the assistant are not checked here. Some templates are meant for the last
question only. Others write the calls of a turn, and not the words beside them (Llama 3.1's).
chat_spans.py refuses what cannot be trained on.
"""

import warnings
from typing import NamedTuple

from minia3.checkpoints.chat import render_chat
from minia3.checkpoints.chat_spans import PROBES

UNCHECKED_ROLES = ("user", "assistant")  # see above


class Rendering(NamedTuple):
    """What a template makes a text of."""

    template: str
    messages: list[dict]
    special_tokens: dict
    tools: list | None
    ends_with_prompt: bool

    def is_same(self, text):
        """Return whether this makes the same text. A template may refuse to make one."""
        try:
            return render_chat(*self).text == text
        except ValueError:
            return False

    def writes_content(self, i, text):
        """Return whether the content of message i is in the text that this makes.

        Its words may stand elsewhere, too, so other words must make another text.
        """
        return not all(self.with_message(i, content=probe).is_same(text) for probe in PROBES)

    def with_message(self, i, **changed):
        """Return a rendering that has other values in message i."""
        messages = list(self.messages)
        messages[i] = messages[i] | changed
        return self._replace(messages=messages)


def check_contents(text, template, messages, special_tokens, tools=None, ends_with_prompt=True):
    """Raise ValueError if the text of a conversation lacks a message or a call of a tool.

    Warn if it lacks the tools that are offered, or a message that it had before a tool was called.
    text: what `render_chat` returns for the other arguments.
    """
    rendering = Rendering(template, messages, special_tokens, tools, ends_with_prompt)
    for i, message in enumerate(messages):
        if message["role"] not in UNCHECKED_ROLES:
            check_message(rendering, i, text)
        if isinstance(message.get("tool_calls"), list):
            check_calls(rendering, i, text)
    if tools and rendering._replace(tools=None).is_same(text):
        # From a single place, whoever asks, so that it is not shown for each row.
        warnings.warn(
            "the chat template does not write the tools of a conversation, so the model does not "
            "read them: use a model whose template does, or give one (--chat-template FILE)",
            stacklevel=2,
        )


def check_message(rendering, i, text):
    """Raise ValueError if the template does not write the content of message i."""
    message = rendering.messages[i]
    content = message.get("content")
    is_empty = not isinstance(content, str) or not content.strip()
    if is_empty or rendering.writes_content(i, text):
        return
    if rendering.ends_with_prompt and is_read_before_tools(rendering, i):
        warnings.warn(
            f"the chat template does not write the {message['role']} message after the result "
            "of a tool, so the model does not read it: put it into the user's message",
            stacklevel=2,
        )
        return
    raise ValueError(
        f"message {i} (role {message['role']!r:.40}) is not in the text that the template "
        "writes: give it a role that the template writes, or give another template "
        "(--chat-template FILE)"
    )


def is_read_before_tools(rendering, i):
    """Return whether the template writes message i if the conversation ends with the question.

    Mistral's templates write the system message before the last message only, and only if that is
    the user's. A model that has called a tool has read it then.
    """
    roles = [message["role"] for message in rendering.messages]
    if "user" not in roles[i:]:
        return False
    last_question = len(roles) - 1 - roles[::-1].index("user")
    earlier = rendering._replace(messages=rendering.messages[: last_question + 1])
    return earlier.writes_content(i, render_chat(*earlier).text)


def check_calls(rendering, i, text):
    """Raise ValueError if the template does not write all calls of tools in message i."""
    calls = rendering.messages[i]["tool_calls"]
    for place, call in enumerate(calls):
        other_calls = calls[:place] + calls[place + 1 :]
        if rendering.with_message(i, tool_calls=other_calls).is_same(text):
            function = call.get("function", call) if isinstance(call, dict) else call
            raise ValueError(
                f"message {i} calls a tool, and the template does not write the call "
                f"({function!r:.60}): give its message no content (null), use a model whose "
                "template writes calls, or give such a template (--chat-template FILE)"
            )
