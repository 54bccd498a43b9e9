"""What a user says about columns (--input, --target, --labels), and how it changes a task.

`read_flags` checks what the user says. Functions named with_... return another TaskSpec, or other
prompts of one.
"""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

from minia3.tasks.columns import ColumnNames
from minia3.tasks.format_strings import (
    check_template,
    field_names,
    rename_field,
    roots_of,
)
from minia3.tasks.labels import Labels, split_words, words_of
from minia3.tasks.names import fold_case
from minia3.tasks.prompts import Prompt, check_choices, choices_of
from minia3.tasks.task import TaskSpec

# Names that our rows have for something else than a text. If a prompt uses such a column, then the
# column gets another name.
RESERVED = ("label", "idx", "messages")


class ColumnFlags(NamedTuple):
    """What the user says about the columns: the flags of the same names."""

    input: str | None = None  # the text of a prompt
    target: str | None = None  # the text to write; with `labels`, the column of the label
    labels: str | Sequence[str] | None = None  # words, with commas between them
    metric: str | None = None  # one of METRICS


def read_flags(flags: ColumnFlags) -> ColumnFlags:
    """Return the flags with line breaks in place of \\n, and with the words of --labels.

    Raise ValueError if a text is not a format string with columns, or if there are no such words.
    """
    values = flags._asdict()
    for name in ("input", "target"):
        if values[name] is not None:
            # A shell hands over a backslash and an n.
            values[name] = values[name].replace("\\n", "\n")
            check_flag(values[name], f"--{name}")
    if flags.labels is not None:
        values["labels"] = split_words(flags.labels)
    return ColumnFlags(**values)


def check_flag(text: str, flag: str):
    """Raise ValueError unless the text of a flag is a format string with columns."""
    try:
        check_template(text)
    except ValueError as error:
        raise ValueError(f"{flag} is {text!r:.60}: {error}") from None
    if not field_names(text):
        raise ValueError(f"{flag} is {text!r:.60}, expected columns in braces: {{text}}")


def with_flags(spec: TaskSpec, flags: ColumnFlags) -> TaskSpec:
    """Return a known task, or the task of an adapter, as the flags change it.

    --input replaces its prompts, and --labels the words of its choices. With either flag, rows are
    not conversations. Raise ValueError if a flag is wrong, or does not suit the task.
    """
    flags = read_flags(flags)
    if flags.target:
        raise ValueError("--target is for rows of your own: this task says itself how they end")
    prompts = spec.prompts
    if flags.input:
        prompts = with_input(prompts, flags.input)
    labels = tuple(spec.labels)
    if flags.labels:
        labels = labels or tuple(flags.labels)
        words = words_of(labels, flags.labels, *map(choice_words, spec.prompts))
        prompts = with_choices(prompts, Labels(labels, words), is_given=True)
    elif labels:  # a task file may have labels, and no prompt that would have choices
        prompts = with_choices(prompts, Labels(labels, labels), is_given=False)
    spec = spec._replace(prompts=prompts, labels=labels, metric=flags.metric or spec.metric)
    if flags.input or flags.labels:
        spec = spec._replace(messages="")
    if flags.input:
        names = [*spec.fields, *roots_of([flags.input])]
        spec = rename_reserved(spec, ColumnNames(names, spec.fields))
    return spec


# Changes of prompts


def with_input(prompts: Sequence[Prompt], text: str) -> tuple[Prompt]:
    """Return a single prompt with this text of --input. The answers are those of the first one."""
    return (prompts[0]._replace(text=text, for_model=None),)


def with_choices(prompts: Iterable[Prompt], labels: Labels, is_given: bool) -> tuple[Prompt, ...]:
    """Return the prompts with the words of the labels as their choices, in place of a target.

    is_given: whether --labels gives the words. Otherwise a prompt's own choices stay. Raise
    ValueError if there are more or fewer choices than labels.
    """
    changed = []
    for prompt in prompts:
        if is_given or not prompt.choices:
            prompt = prompt._replace(choices=choices_of(labels.words), target="")
        check_choices(prompt, labels.spelled)
        changed.append(prompt)
    return tuple(changed)


def choice_words(prompt: Prompt) -> list[str]:
    """Return the choices of a prompt, or an empty list if there are columns among them."""
    choices = prompt.choices or ()
    return [] if roots_of(choices) else [choice.format() for choice in choices]


def with_target(prompts: Iterable[Prompt], target: str, is_given: bool) -> tuple[Prompt, ...]:
    """Return the prompts with a text to write in place of choices.

    is_given: whether --target gives the text. Otherwise a prompt's own target stays.
    """
    changed = []
    for prompt in prompts:
        if is_given or not prompt.target:
            prompt = prompt._replace(target=target)
        changed.append(prompt._replace(choices=None))
    return tuple(changed)


# Changes of tasks


def with_conversation(spec: TaskSpec, column: str) -> TaskSpec:
    """Return the task whose rows are the conversations in a column of the file."""
    fields = dict(spec.fields)
    if fold_case(column) != "messages":
        fields[column] = "messages"
    return spec._replace(messages="messages", fields=fields)


def with_label_names(spec: TaskSpec, names: Sequence[str]) -> TaskSpec:
    """Return the task of an adapter for rows whose labels are integers with names.

    names: of the integers 0, 1, ... If the choices of a prompt, or else the labels on which the
    adapter was trained, are such names, then the rows' integers stand for them.
    """
    number = {fold_case(choice): str(i) for i, choice in enumerate(choices_of(names))}
    candidates = [prompt.choices or () for prompt in spec.prompts]
    # Labels 0, 1, ... were integers of a data set, too, which may have had names such as "1", "0".
    if tuple(spec.labels) != tuple(map(str, range(len(spec.labels)))):
        candidates.append(choices_of(spec.labels))
    for words in candidates:
        keys = list(map(fold_case, words))
        if keys and all(key in number for key in keys):
            return spec._replace(labels=tuple(number[key] for key in keys))
    return spec


def rename_reserved(spec: TaskSpec, columns: ColumnNames) -> TaskSpec:
    """Return the task with other names for the columns of RESERVED that its prompts use."""
    prompts = list(spec.prompts)
    fields = dict(spec.fields)
    label_field = spec.label_field
    used = roots_of(chain.from_iterable(prompt.templates for prompt in prompts))
    for name in RESERVED:
        column = columns.name_in_file(name)
        # If a file has the columns "label" and "Label", {Label} is not the reserved one.
        same = [root for root in used if columns.name_in_file(root) == column]
        spellings = [root for root in same if root.lower() == name]
        if spellings:
            new_name = columns.free_name(f"{name}_text")
            prompts = [rename_in_prompt(prompt, spellings, new_name) for prompt in prompts]
            fields[column] = new_name
            label_column = columns.column_of(label_field)
            if columns.name_in_file(label_column) == column:
                label_field = new_name + label_field.removeprefix(label_column)
    return spec._replace(prompts=tuple(prompts), fields=fields, label_field=label_field)


def rename_in_prompt(prompt: Prompt, names: Iterable[str], new_name: str) -> Prompt:
    text = rename_field(prompt.text, names, new_name)
    target = rename_field(prompt.target, names, new_name)
    choices = [rename_field(choice, names, new_name) for choice in prompt.choices or ()]
    words = dict(prompt.words or {})
    for name in names:
        if name in words:
            words[new_name] = words.pop(name)
    return prompt._replace(
        text=text, target=target, choices=tuple(choices) or None, words=words or None
    )
