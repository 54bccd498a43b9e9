"""Render chat templates in a separate process, within limits that a template cannot get around.

A chat template is a program that strangers wrote. jinja2's sandbox keeps it from files and from the
interpreter, but not from running forever or from filling the memory: `{{ 'a' * 10**10 }}`. No check
of expressions finds every such program, so the bounds are those of the operating system:

    time     a thread of faulthandler, which is written in C, ends the process after MAX_SECONDS,
             even if a single operation never comes back to the interpreter
    memory   the system refuses to give the process more than MAX_BYTES (Linux; macOS refuses the
             limit, and Windows has none, so there the time is the only bound)
    text     more than MAX_CHARACTERS are refused as they come

The process that asks (chat.py) reads GREETING, writes one JSON object per line, and reads one line
back. If there is no greeting, it is not the template's fault that this process ended. Besides,
a template has only the functions in the tables below, which real templates use.

This file runs as a script in an isolated interpreter, so it imports nothing of minia3.
"""

import faulthandler
import json
import os
import re
import sys
from contextlib import suppress
from datetime import datetime
from functools import lru_cache

MAX_SECONDS = 10.0
MAX_BYTES = 1 << 30
MAX_CHARACTERS = 1 << 22  # a million tokens
MAX_MESSAGE = 300  # characters of an error
GREETING = "ready"

# jinja2 has more, such as `lipsum`, `center` and `urlize`.
GLOBALS = ("range", "dict", "namespace")
FILTERS = (
    *("abs", "batch", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first"),
    *("float", "groupby", "indent", "int", "items", "join", "last", "length", "list", "lower"),
    *("map", "max", "min", "reject", "rejectattr", "replace", "reverse", "round", "safe", "select"),
    *("selectattr", "sort", "string", "sum", "title", "trim", "unique", "upper"),
)
TEXT_METHODS = (
    *("capitalize", "count", "endswith", "find", "index", "isalnum", "isalpha", "isdigit"),
    *("islower", "isnumeric", "isspace", "isupper", "join", "lower", "lstrip", "partition"),
    *("removeprefix", "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit"),
    *("rstrip", "split", "splitlines", "startswith", "strip", "title", "upper"),
)
# Letters after %, perhaps with a - between. The C library pads "%999999999d" to this width.
DATE_FORMAT = re.compile(r"([^%]|%-?[a-zA-Z]|%%){0,100}")


def make_environment():
    """Return the sandbox of jinja2 in which templates run."""
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %}: the block is the text of the assistant."""

        tags = frozenset(["generation"])

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("note_block", [nodes.ContextReference()])
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def note_block(self, context, caller):
            text = caller()
            context["note_block"](text)
            return text

    class Environment(ImmutableSandboxedEnvironment):
        """The sandbox, without what a real template does not do."""

        intercepted_binops = frozenset(["*", "**", "%"])

        def is_safe_attribute(self, obj, attr, value):
            if isinstance(obj, str) and attr not in TEXT_METHODS:
                return False
            return super().is_safe_attribute(obj, attr, value)

        def wrap_str_format(self, value):
            return None  # there is no str.format, safe or not

        def call_binop(self, context, operator, left, right):
            are_numbers = isinstance(left, int | float) and isinstance(right, int | float)
            if operator == "**" or not are_numbers:
                raise SecurityError(f"{operator} is only for numbers, and ** is for nothing")
            return super().call_binop(context, operator, left, right)

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.globals = {name: environment.globals[name] for name in GLOBALS}
    environment.filters = {name: environment.filters[name] for name in FILTERS}
    environment.filters["tojson"] = to_json
    return environment


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """Return JSON. (jinja2's own filter escapes characters for HTML.)"""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def strftime_now(date_format):
    """Return the date or the time of day, as the format says."""
    if not DATE_FORMAT.fullmatch(date_format):
        raise ValueError(f"{date_format!r:.40} is not a short date format such as '%d %b %Y'")
    return datetime.now().strftime(date_format)


def raise_exception(message):
    """Raise ValueError for a template. (jinja2 has no statement that raises.)"""
    raise ValueError(message)


@lru_cache(1)
def compiled(template):
    """Return a template that is ready to run. A conversation renders the same one many times."""
    return make_environment().from_string(template)


def render(template, variables):
    """Return the text of a template, and the spans of the blocks {% generation %} in it.

    A span is [first character, end]. Raise ValueError if the text is too long, or if such a block
    does not go straight into the text.
    """
    pieces = []
    spans = []
    n_written = 0

    def note_block(text):
        spans.append([n_written, n_written + len(text)])
        blocks.append(text)

    blocks = []
    functions = {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "note_block": note_block,
    }
    for piece in compiled(template).generate({**variables, **functions}):
        n_written += len(piece)
        if n_written > MAX_CHARACTERS:
            raise ValueError(f"the template writes more than {MAX_CHARACTERS} characters")
        pieces.append(piece)
    text = "".join(pieces)
    for (first, end), block in zip(spans, blocks, strict=True):
        if text[first:end] != block:
            raise ValueError("{% generation %} in a macro or in {% set %}, expected it outside")
    return text, spans


def answer(request):
    """Return the reply to a request: the text and the spans, or an error by name and message."""
    try:
        text, spans = render(request["template"], request["variables"])
        return {"text": text, "spans": spans}
    except MemoryError:
        return {"error": "ValueError", "message": f"the template needs more than {MAX_BYTES} bytes"}
    except Exception as error:
        message = " ".join(str(error).split())[:MAX_MESSAGE]
        return {"error": type(error).__name__, "message": message}


def limit_memory():
    """Let the system refuse more than MAX_BYTES, if it can."""
    try:
        import resource
    except ImportError:  # Windows
        return
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    if most == resource.RLIM_INFINITY or most > MAX_BYTES:  # only root may raise a lower limit
        # macOS refuses each limit that is below the addresses a process has taken already.
        with suppress(ValueError):
            resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))


def main(import_path):
    """Answer the requests of standard input until it is closed."""
    sys.path = import_path
    limit_memory()
    nowhere = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)
    print(GREETING, flush=True)
    for line in sys.stdin:
        faulthandler.dump_traceback_later(MAX_SECONDS, exit=True, file=nowhere)
        reply = json.dumps(answer(json.loads(line)))
        faulthandler.cancel_dump_traceback_later()
        print(reply, flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
