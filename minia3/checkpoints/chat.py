"""Render a conversation with the chat template of a checkpoint.

A model that was tuned to chat has seen conversations in one exact form, for example

    <|im_start|>user
    What is (IA)^3?<|im_end|>
    <|im_start|>assistant

The form is a template in the language of jinja2. Everything here follows transformers'
apply_chat_template (transformers/utils/chat_template_utils.py), because templates are written for
it. A template is a program that strangers wrote, so it runs in a separate process, within limits
of time and memory (template_worker.py).
"""

import atexit
import copy
import json
import os
import re
import subprocess
import sys
import threading
from contextlib import suppress
from functools import cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from minia3.checkpoints import template_worker
from minia3.checkpoints.layout import CHAT_TEMPLATE_FILE, OTHER_TEMPLATES
from minia3.files.read import reading

# Names under which people store what a model thought before its answer. Templates read the first,
# and those of gpt-oss the second.
THINKING = ("reasoning_content", "thinking", "reasoning")

# DeepSeek's templates ask whether the content of a message `is none`, which it is beside the calls
# of tools.
ASKS_FOR_NULL = re.compile(r"content\W{0,5}(is|==|!=)\s*(not\s+)?none", re.IGNORECASE)


class ChatText(NamedTuple):
    """The text of a conversation, and the parts of it that the assistant wrote."""

    text: str
    spans: list[tuple[int, int]]  # (first character, end) of each part


class EncodedChat(NamedTuple):
    """A conversation as token ids."""

    ids: list[int]
    is_scored: list[bool]  # whether the assistant wrote the token


def check_turns(messages):
    """Raise ValueError unless these are a list of messages that have a role.

    A template may write a single text or message as if it were several empty ones.
    """
    expected = "expected a list of {'role': 'user', 'content': 'a text'}"
    if not isinstance(messages, list | tuple):
        raise ValueError(f"messages is {messages!r:.60}, {expected}")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"a message is {message!r:.60}, {expected}")


def by_name(templates):
    """Return the chat templates that the files hold: nothing (None), one template, or a dict.

    templates: None, one template, a dict, or a list of {"name": ..., "template": ...}.
    """
    if not isinstance(templates, list):
        return templates
    return {entry["name"]: entry["template"] for entry in templates}


def read_template_files(folder):
    """Return the chat templates that have files of their own: None, one, or a dict by name.

    transformers 5 writes them. If there are any, those in tokenizer_config.json do not count.
    """
    paths = {}
    if (folder / CHAT_TEMPLATE_FILE).is_file():
        paths["default"] = folder / CHAT_TEMPLATE_FILE
    for path in sorted(folder.glob(OTHER_TEMPLATES)):
        paths[path.stem] = path
    templates = {}
    for name, path in paths.items():
        with reading(path):
            templates[name] = path.read_text(encoding="utf-8")
    if templates.keys() == {"default"}:
        return templates["default"]
    return templates or None


def choose_template(templates, tools):
    """Return the template for a conversation, or None. templates: see `by_name`.

    As in transformers, one that is named "tool_use" is for conversations with tools.
    """
    if not isinstance(templates, dict):
        return templates
    if tools is not None and "tool_use" in templates:
        return templates["tool_use"]
    return templates.get("default")


def read_template(path):
    """Return the chat template in a file. Raise ValueError if there is no text in it."""
    path = Path(path)
    with reading(path):
        template = path.read_text(encoding="utf-8-sig")  # editors of Windows put a mark before it
        if not template.strip():
            raise ValueError("the file is empty, expected a chat template")
        return template


def render_chat(template, messages, special_tokens, tools=None, ends_with_prompt=True):
    """Return the text of a conversation, and the spans of the template's {% generation %} blocks.

    messages: [{"role": "user", "content": "Hello"}, ...]
    special_tokens: {"bos_token": "<s>", ...}. A template may use them by these names.
    tools: descriptions of functions, as JSON schemas, for templates that offer them to the model.
    ends_with_prompt: True ends the text with what comes before an answer.

    OpenAI's files have texts of JSON as the arguments of calls. Most templates expect objects, and
    would quote the texts, or fail. Such a template gets objects; another one gets the texts.

    Raise ValueError if the template fails, refuses the messages or goes beyond the limits of
    template_worker.py, and ImportError if jinja2 is not installed.
    """
    if not isinstance(template, str):
        raise ValueError(f"expected a text, found {type(template).__name__}")
    variables = {
        **special_tokens,
        "messages": [template_message(message, template) for message in messages],
        "tools": tools,
        "documents": None,
        "add_generation_prompt": ends_with_prompt,
    }
    request = {"template": template, "variables": variables}
    reply = worker(os.getpid()).ask(request)
    if needs_objects(reply, variables["messages"]):
        variables["messages"] = list(map(with_objects, variables["messages"]))
        other_reply = worker(os.getpid()).ask(request)
        if "text" in other_reply:
            reply = other_reply
    if "text" in reply:
        return ChatText(reply["text"], [tuple(span) for span in reply["spans"]])
    name = reply["error"]
    message = reply["message"]
    if name == "ModuleNotFoundError":
        raise ImportError(message)
    if name != "ValueError":  # which a template raises on purpose, in its author's words
        message = f"{name}: {message}"
    raise ValueError(message)


def template_message(message, template):
    """Return a message as the template gets it: without nulls, and with the thinking it looks for.

    Exports of chats write "content": null and "tool_calls": null. A template would write "None", or
    take the null for calls. transformers removes these keys, too. But a template that asks whether
    the content is none then fails, so it gets the null.
    """
    if not isinstance(message, dict):
        return message  # the template fails, and says why
    kept = {key: value for key, value in message.items() if value is not None}
    is_null = message.get("content", "") is None
    if is_null and ASKS_FOR_NULL.search(template):
        kept["content"] = None
    names = [name for name in THINKING if name in kept]
    if names:
        thinking = kept[names[0]]
        kept["reasoning_content"] = thinking
        if not (kept.get("content") and kept.get("tool_calls")):  # gpt-oss refuses all three
            kept.setdefault("thinking", thinking)
    return kept


def calls_of(message):
    """Return the calls of tools in a message, with or without {"function": ...} around them."""
    calls = message.get("tool_calls") if isinstance(message, dict) else None
    if not isinstance(calls, list):
        return []
    calls = [call for call in calls if isinstance(call, dict)]
    functions = [call.get("function") for call in calls]
    return calls + [function for function in functions if isinstance(function, dict)]


def spelled_object(text):
    """Return the object that a text of JSON spells, or None if it spells none."""
    if not isinstance(text, str):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def needs_objects(reply, messages):
    """Return whether a template that was given texts of JSON as arguments of calls expects objects:
    it has failed, or it has written a text in quotes, as a string of JSON.
    """
    texts = []
    for call in chain.from_iterable(map(calls_of, messages)):
        arguments = call.get("arguments")
        if spelled_object(arguments) is not None:
            texts += [json.dumps(arguments), json.dumps(arguments, ensure_ascii=False)]
    if "text" in reply:
        return any(text in reply["text"] for text in texts)
    return bool(texts)


def with_objects(message):
    """Return a message in which the arguments of calls are objects, if texts of JSON spell them."""
    if not calls_of(message):
        return message
    copied = copy.deepcopy(message)
    for call in calls_of(copied):
        arguments = spelled_object(call.get("arguments"))
        if arguments is not None:
            call["arguments"] = arguments
    return copied


class Worker:
    """A process that renders templates. It starts with the first one, and again after it died."""

    def __init__(self):
        self.process = None
        self.owner = os.getpid()
        self.lock = threading.Lock()
        atexit.register(self.close)

    def ask(self, request):
        """Return the reply to a request.

        Raise ValueError if it is not JSON, if the process does not start, or if it dies, as it does
        if it goes beyond its limits.
        """
        try:
            line = json.dumps(request).encode() + b"\n"
        except TypeError as error:
            raise ValueError(
                f"the messages have a value that JSON does not have: {error}"
            ) from None
        with self.lock:
            try:
                self.start_if_needed()
                reply = self.exchange(line)
            except BaseException:
                # A signal came in between. The reply to this request must not answer the next one.
                self.close()
                raise
            if not reply:
                self.close()
        if not reply:
            raise ValueError(
                f"the template takes more than {template_worker.MAX_SECONDS:.0f} seconds "
                f"or {template_worker.MAX_BYTES >> 20} MB"
            )
        return json.loads(reply)

    def exchange(self, line):
        """Send a line, and return the reply. It is empty if the process has died."""
        try:
            self.process.stdin.write(line)
            self.process.stdin.flush()
            return self.process.stdout.readline()
        except BrokenPipeError:
            return b""

    def start_if_needed(self):
        if self.process is not None and self.process.poll() is None:
            return
        self.close()
        # Isolated (-I), so that no file of the working folder is imported in place of a package.
        # Python skips entries of its path that are not strings.
        import_path = [folder for folder in sys.path if isinstance(folder, str) and folder]
        self.process = subprocess.Popen(
            [sys.executable, "-I", template_worker.__file__, json.dumps(import_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # Ctrl-C is for this process, and does not reach the other one.
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
        if self.process.stdout.readline().strip() != template_worker.GREETING.encode():
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(template_worker.MAX_SECONDS)
            code = self.process.returncode
            raise ValueError(
                f"the process that renders templates did not start (exit code {code}): "
                f"sys.executable is {sys.executable}, expected Python with enough memory to start"
            )

    def close(self):
        """End the process."""
        if self.process is None or self.owner != os.getpid():  # a fork must not end it
            return
        process = self.process
        self.process = None
        process.kill()
        process.wait()
        process.stdout.close()
        with suppress(OSError):  # the request may not have been sent
            process.stdin.close()


@cache
def worker(process_id):
    """Return the Worker of this process. A forked process does not share that of its parent."""
    return Worker()
