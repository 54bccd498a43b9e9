"""Render a conversation with the chat template of a checkpoint.

A model that was tuned to chat has seen conversations in one exact form, for example

    <|im_start|>user
    What is (IA)^3?<|im_end|>
    <|im_start|>assistant

The form is a template in the language of jinja2. A template is a program that strangers wrote, so
it runs in jinja2's sandbox. Everything here follows transformers' apply_chat_template
(transformers/utils/chat_template_utils.py), because templates are written for it.
"""

import json
from datetime import datetime
from functools import partial


def default_template(templates):
    """Return the template to use, or None.

    templates: what the files hold. That is nothing (None), one template, or a list of {"name": ...,
    "template": ...}, from which the template named "default" is used.
    """
    if not isinstance(templates, list):
        return templates
    by_name = {entry["name"]: entry["template"] for entry in templates}
    return by_name.get("default")


def render_chat(template, messages, special_tokens):
    """Return the text of a conversation up to the place where the answer begins.

    messages: [{"role": "user", "content": "Hello"}, ...]
    special_tokens: {"bos_token": "<s>", ...}. A template may use them by these names.

    Raise ValueError if the template refuses the messages, ImportError if jinja2 is not installed,
    and whatever jinja2 raises.
    """
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    # jinja2's own tojson escapes characters for HTML, which templates do not expect.
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    return environment.from_string(template).render(
        **special_tokens,
        messages=messages,
        add_generation_prompt=True,
        tools=None,
        documents=None,
        raise_exception=refuse,
        strftime_now=datetime.now().strftime,
    )


def refuse(message):
    """Raise ValueError for a template. (jinja2 has no statement that raises.)"""
    raise ValueError(message)
