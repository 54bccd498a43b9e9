"""Turn a row into text: the input that a model reads, and the choices among which it answers.

A prompt is a format string, such as "{premise}\\nQuestion: {hypothesis} True or False?\\nAnswer:",
with a choice for each label. `render` fills in the row's fields. `fit` does the same within a limit
of tokens: it takes words out of the middle of the row's longest field, and leaves the words of the
prompt alone.
"""

import difflib
import re
import string
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

# A user's text may have no spaces (Chinese has none), so 20 characters of anything count as a word.
WORD = re.compile(r"\s*\S{1,20}")


class Prompt(NamedTuple):
    """How to put a row into words. `text` and `choices` are format strings with its fields."""

    text: str
    # In the order of the labels. None: the row has choices or a target of its own.
    choices: tuple[str, ...] | None
    # Field -> value -> the words of this prompt in place of the value.
    words: dict[str, dict[str, str]] | None = None
    # The family of models that was pre-trained on this form. Other models do not get the prompt.
    for_model: str | None = None
    # The text to write, as a format string. "": the row has choices, or a target of its own.
    target: str = ""

    @property
    def templates(self) -> list[str]:
        """All format strings of the prompt."""
        return [self.text, self.target, *(self.choices or ())]


class Rendered(NamedTuple):
    """A row in the words of a prompt."""

    input: str
    choices: list[str]  # only the target, if the row has a target
    label: int  # index of the right choice; -1: unlabeled


class Fitted(NamedTuple):
    """A row in the words of a prompt, within a number of tokens."""

    rendered: Rendered
    ids: list[int]  # of the input
    was_cut: bool


def for_family(prompts: tuple[Prompt, ...], family: str | None) -> tuple[Prompt, ...]:
    """Return the prompts that the family was pre-trained on, or else the prompts for all models.

    Raise ValueError if all prompts are for other families.
    """
    familiar = tuple(prompt for prompt in prompts if prompt.for_model == family)
    chosen = familiar or tuple(prompt for prompt in prompts if prompt.for_model is None)
    if not chosen:
        families = list_names(dict.fromkeys(prompt.for_model for prompt in prompts))
        found = f"is {family}" if family else "has no known family"
        raise ValueError(
            f"all prompts are for other models ('for_model' is {families:.80}), and this model "
            f"{found}: take 'for_model' out of a prompt"
        )
    return chosen


def render(prompt: Prompt, row: dict) -> Rendered:
    """Return a row in a prompt's words. Raise ValueError if the row lacks a field of the prompt."""
    fields = row | values_in_words(prompt, row)
    if prompt.choices:
        # In COPA, some choices end in a space.
        choices = [fill(choice, fields).strip() for choice in prompt.choices]
    elif prompt.target:
        # The tokenizer puts a space before the target, and some files have it already.
        choices = [fill(prompt.target, fields).strip()]
    elif "choices" in row:
        choices = row["choices"]
    else:
        choices = [fill("{target}", fields)]
    text = fill(prompt.text, fields)
    if text[-1:].isspace() and ends_in_empty_field(prompt, fields):
        text = text.rstrip()  # of an instruction without an input, for example
    return Rendered(text, choices, row["label"])


def fill(text: str, row: dict) -> str:
    """Return a format string with the fields of a row. Raise ValueError if the row lacks some."""
    try:
        return text.format_map(row)
    except KeyError as error:
        (name,) = error.args
        if name in map(root_of, field_names(text)):
            raise ValueError(
                f"the row has no field {name!r}, which {text!r:.60} needs{nearest_of(name, row)}"
            ) from error
        found = f"there is no {name!r}"  # in an object, for {translation[english]}
    except (LookupError, TypeError) as error:  # {endings[3]}, of a list of two, or of a number
        found = str(error)
    raise ValueError(f"the row has no such item as {text!r:.60} needs ({found})")


def fold(name: str) -> str:
    """Return what the spellings of a name have in common, whatever their case and the form of their
    accents: macOS and some spreadsheets write the two characters e and U+0301 for an é.
    """
    return unicodedata.normalize("NFC", name.strip().lower())


def nearest_of(name: str, names: Iterable[str]) -> str:
    """Return what a message says after an unknown name: which names there are, and the nearest."""
    near = difflib.get_close_matches(name.lower(), names, n=1)
    hint = f": did you mean {near[0]!r}?" if near else ""
    return f"; the columns are {list_names(names):.200}{hint}"


def list_names(names: Iterable[str]) -> str:
    """Return names in one line, with commas between them, whatever characters they have."""
    shown = []
    for name in names:
        is_visible = name.isprintable() and bool(name.strip())
        text = name if is_visible else repr(name)
        shown.append(text)
    return ", ".join(shown)


def check_template(text: str):
    """Raise ValueError unless a text is a format string with nothing but columns and their items.

    A format string can do more, and a file from outside should not: {a.b} reads an attribute, and
    {a:>999999999} fills the memory.
    """
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"{error}: write {{{{ and }}}} for braces that are not a column") from None
    for _, name, spec, conversion in parts:
        is_column = name is None or not (name == "" or name.isdigit() or "." in name)
        if not is_column or spec or conversion:
            raise ValueError(
                f"{{{name}}} is not a column, or has more than letters, spaces and [items] in its "
                "name: rename it"
            )


def can_name(column: str) -> bool:
    """Return whether a format string can name a column: {text}, but not {a.b}, {1} or {}."""
    text = f"{{{column}}}"
    try:
        check_template(text)
    except ValueError:
        return False
    return field_names(text) == (column,) and root_of(column) == column


@lru_cache(maxsize=256)
def field_names(text: str) -> tuple[str, ...]:
    """Return the fields of a format string, each once: premise, or endings[3].

    Raise ValueError if the text is not a format string.
    """
    names = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
    return tuple(dict.fromkeys(names))


@lru_cache(maxsize=1024)
def root_of(name: str) -> str:
    """Return the field of the row to which an item belongs: endings, for endings[3]."""
    return re.split(r"[.\[]", name)[0]


def value_of(row: dict, name: str):
    """Return what a field of a format string stands for: a field of the row, or an item of one."""
    value, _ = string.Formatter().get_field(name, (), row)
    return value


def check_choices(prompt: Prompt, labels: Sequence[str]):
    """Raise ValueError if a prompt has more or fewer choices than there are labels."""
    if len(prompt.choices) != len(labels):
        raise ValueError(
            f"{len(prompt.choices)} choices ({list_names(prompt.choices):.80}) for "
            f"{len(labels)} labels ({list_names(labels):.80}): expected as many choices as labels"
        )


def rename_field(text: str, names: Iterable[str], new_name: str) -> str:
    """Return a format string with another name for a field. names: spellings of its old name."""
    parts = []
    for literal, found, _, _ in string.Formatter().parse(text):
        parts.append(escape(literal))
        if found is not None:
            root = root_of(found)
            items = found[len(root) :]
            field = new_name if root in names else root
            parts.append(f"{{{field}{items}}}")
    return "".join(parts)


def fill_field(text: str, name: str, value: str) -> str:
    """Return a format string with `value` in place of a field, or of an item of one."""
    parts = []
    for literal, found, _, _ in string.Formatter().parse(text):
        parts.append(escape(literal))
        if found == name:
            parts.append(escape(value))
        elif found is not None:
            parts.append(f"{{{found}}}")
    return "".join(parts)


def escape(text: str) -> str:
    """Return a format string that makes `text`."""
    return text.replace("{", "{{").replace("}", "}}")


def ends_in_empty_field(prompt: Prompt, fields: dict) -> bool:
    """Return whether the prompt's text ends in a field, and this field is empty in this row."""
    name = final_field(prompt.text)
    return name is not None and fields.get(name) == ""


def final_field(text: str) -> str | None:
    """Return the field in which a format string ends, or None if it ends in other text."""
    names = [name for _, name, _, _ in string.Formatter().parse(text)]
    return names[-1] if names else None


def check_fields(prompt: Prompt, row: dict):
    """Raise ValueError if the row lacks a field that the prompt uses."""
    render(prompt, row)


def values_in_words(prompt: Prompt, row: dict) -> dict[str, str]:
    """Return the fields that the prompt puts into words: "cause" may become "This is because".

    A row that is to be answered lacks the fields of the target.
    """
    replaced = {}
    for name, words in (prompt.words or {}).items():
        if not any(name in field_names(text) for text in prompt.templates):
            continue
        value = fill(f"{{{name}}}", row)
        if value in ("true", "false") and value not in words:
            value = value.capitalize()  # a task file may spell them as Python does
        if value not in words:
            raise ValueError(f"{name!r} is {value!r:.40}, expected one of {', '.join(words)}")
        replaced[name] = words[value]
    return replaced


def fit(prompt: Prompt, row: dict, encode: Callable[[str], list[int]], max_length: int) -> Fitted:
    """Render a row so that its input has at most `max_length` tokens.

    If the input is too long, the row's longest field (in characters) loses as few words as possible
    from its middle, down to one word, and then the next longest field does. So the words of the
    prompt remain, and a user's input keeps its beginning (what to do) and its end (the question).
    Choices are never cut.

    Raise ValueError if the input is too long even with one word of each field.
    """
    rendered = render(prompt, row)
    ids = encode(rendered.input)
    if len(ids) <= max_length:
        return Fitted(rendered, ids, was_cut=False)
    for name in fields_to_cut(prompt, row):
        prompt = cut_field(prompt, row, name, encode, max_length)
        shorter = rendered._replace(input=render(prompt, row).input)
        ids = encode(shorter.input)
        if len(ids) <= max_length:
            return Fitted(shorter, ids, was_cut=True)
    raise ValueError(
        f"row {row['idx']} does not fit into max_length {max_length}, "
        "even with one word of each field: raise max_length"
    )


def fields_to_cut(prompt: Prompt, row: dict) -> list[str]:
    """Return the names of the row's texts in the prompt, the longest text first, then by name."""
    names = set(field_names(prompt.text)) - set(prompt.words or ())  # these words are the prompt's
    values = {name: value_of(row, name) for name in names}
    texts = [name for name in names if isinstance(values[name], str)]
    return sorted(texts, key=lambda name: (-len(values[name]), name))


def cut_field(
    prompt: Prompt, row: dict, name: str, encode: Callable[[str], list[int]], max_length: int
) -> Prompt:
    """Return a prompt with words of the field in its place: as many as fit, and at least one.

    The row stays as it is, because the field may be an item deep inside of a list.
    """
    words = WORD.findall(value_of(row, name))

    def cut_to(n_words):
        return prompt._replace(text=fill_field(prompt.text, name, keep_ends(words, n_words)))

    def is_too_long(n_words):
        return len(encode(render(cut_to(n_words), row).input)) > max_length

    n_fitting = count_fitting(len(words) - 1, is_too_long)
    return cut_to(max(n_fitting, 1))


def count_fitting(n_most: int, is_too_long: Callable[[int], bool]) -> int:
    """Return the largest n from 1 to `n_most` that is not too long, or 0 if all of them are.

    If an n is too long, so must be each larger one.
    """
    # In the range 1, 2, ... the index of the first n that is too long is the last n that fits.
    return bisect_left(range(1, n_most + 1), True, key=is_too_long)


def keep_ends(words: list[str], n_words: int) -> str:
    """Return the text of the first words and the last words, `n_words` in total."""
    n_tail = n_words // 2
    head = "".join(words[: n_words - n_tail]).strip()
    tail = "".join(words[len(words) - n_tail :]).strip()
    return f"{head} {tail}".strip()


def in_context(prompt: Prompt, rows: list[dict]) -> list[Prompt]:
    """Return the prompts of in-context learning with 0, 1, ..., len(rows) shots.

    Prompt n begins with the first n rows, each in the words of `prompt` and with its answer.
    """
    prompts = [prompt]
    shots = ""
    for row in rows:
        text, choices, label = render(prompt, row)
        shot = f"{text} {choices[label]}\n\n"
        shots += escape(shot)  # a prompt's text is a format string
        prompts.append(prompt._replace(text=shots + prompt.text))
    return prompts


# A user's rows are prompts already.
OWN_PROMPTS = (Prompt("{input}", None),)
