"""Render a conversation with the chat template that a checkpoint brings.

A model that was tuned to chat has seen conversations in one exact form, for example

    <|im_start|>user
    What is (IA)^3?<|im_end|>
    <|im_start|>assistant

The form is a template in the language of jinja2. A template is a program of strangers, so it runs
in jinja2's sandbox. Everything here follows transformers' apply_chat_template
(transformers/utils/chat_template_utils.py), because templates are written for it.
"""

import json
from datetime import datetime
from functools import partial


def default_template(templates):
    """Return the template to use, or None.

    templates: what the files say, which is nothing (None), one template, or a list of {"name": ...,
    "template": ...}, of which the one with the name "default" is used.
    """
    if not isinstance(templates, list):
        return templates
    by_name = {entry["name"]: entry["template"] for entry in templates}
    return by_name.get("default")


def render_chat(template, messages, special_tokens):
    """Return the text of a conversation, up to the place at which the answer begins.

    messages: [{"role": "user", "content": "Hello"}, ...]
    special_tokens: {"bos_token": "<s>", ...}, which a template may use by these names.

    Raise whatever jinja2 raises (ImportError if it is not installed), or ValueError if the template
    refuses the messages.
    """
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    # jinja2's own tojson escapes characters for HTML, and templates do not expect it.
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
    """Raise the ValueError that a template asks for. (jinja2 has no such statement.)"""
    raise ValueError(message)
