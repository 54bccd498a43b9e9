"""Format strings, such as "{premise} Question: {hypothesis}", whose fields are columns of a row.

A field is a column, or an item of one: {answers[text][0]}. The column of an item is its root.
"""

import re
import string
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import chain

from minia3.tasks.names import nearest_of

# After a letter, as in \boxed{answer}, they are LaTeX.
IN_BRACES = re.compile(r"(?<!\w)\{\s*([^{}]+?)\s*\}")


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


# The fields


@lru_cache(maxsize=4096)  # a task may have a thousand labels, which each row is scored with
def field_names(text: str) -> tuple[str, ...]:
    """Return the fields of a format string, each once: premise, or endings[3].

    Raise ValueError if the text is not a format string.
    """
    names = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
    return tuple(dict.fromkeys(names))


@lru_cache(maxsize=1024)
def root_of(name: str) -> str:
    """Return the column to which a field belongs: endings, for endings[3]."""
    return re.split(r"[.\[]", name)[0]


def roots_of(texts: Iterable[str]) -> list[str]:
    """Return the columns that format strings use, each once."""
    names = chain.from_iterable(map(field_names, texts))
    return list(dict.fromkeys(map(root_of, names)))


def plain_names(text: str) -> list[str]:
    """Return the fields that are whole columns: {answer}, and not {answers[0]}."""
    return [name for name in field_names(text) if root_of(name) == name]


def names_in_text(text: str) -> list[str]:
    """Return what stands in braces that are text: text, for "{{ text }}", and nothing for "{text}".

    The braces of fields stay, so that a field is not taken for a part of such a name.
    """
    parts = []
    for literal, field, _, _ in string.Formatter().parse(text):
        parts.append(literal)
        if field is not None:
            parts.append("{}")
    return IN_BRACES.findall("".join(parts))


def final_field(text: str) -> str | None:
    """Return the field in which a format string ends, or None if it ends in other text."""
    names = [name for _, name, _, _ in string.Formatter().parse(text)]
    return names[-1] if names else None


# Filling in a row


def value_of(row: dict, name: str):
    """Return what a field stands for in a row."""
    value, _ = string.Formatter().get_field(name, (), row)
    return value


def check_items(row: dict, name: str):
    """Raise ValueError if a field names an item of a text, which would be one of its letters."""
    for match in re.finditer(r"\[", name):
        holder = name[: match.start()]
        value = value_of(row, holder)
        if isinstance(value, str):
            raise ValueError(
                f"{holder!r} is {value!r:.40}, expected a list or an object, because an item of it "
                "is named (a .csv keeps no lists, but .jsonl and .parquet do)"
            )


def label_of(row: dict, field: str):
    """Return the value of a label's column, or of an item of it, or None if the row has none."""
    if field in row or column_of(field) == field:
        return row.get(field)
    try:
        check_items(row, field)
        return value_of(row, field)
    except (LookupError, TypeError):
        return None


def column_of(field: str) -> str:
    """Return the column of a label: label, for label[0]. (Its name may have a dot.)"""
    return field.partition("[")[0] if field.endswith("]") else field


def fill(text: str, row: dict) -> str:
    """Return a format string with the fields of a row. Raise ValueError if the row lacks some."""
    try:
        return text.format_map(row)
    except KeyError as error:
        (name,) = error.args
        if name in roots_of([text]):
            raise ValueError(
                f"the row has no field {name!r}, which {text!r:.60} needs{nearest_of(name, row)}"
            ) from error
        found = f"there is no {name!r}"  # in an object, for {translation[english]}
    except (LookupError, TypeError) as error:  # {endings[3]}, of a list of two, or of a number
        found = str(error)
    raise ValueError(f"the row has no such item as {text!r:.60} needs ({found})")


# Making other format strings


def escape(text: str) -> str:
    """Return a format string that makes `text`."""
    return text.replace("{", "{{").replace("}", "}}")


def rename_field(text: str, names: Iterable[str], new_name: str) -> str:
    """Return a format string with another name for a column. names: spellings of its old name."""

    def renamed(field):
        root = root_of(field)
        items = field[len(root) :]
        column = new_name if root in names else root
        return f"{{{column}{items}}}"

    return replace_fields(text, renamed)


def fill_field(text: str, name: str, value: str) -> str:
    """Return a format string with `value` in place of one of its fields."""

    def filled(field):
        return escape(value) if field == name else f"{{{field}}}"

    return replace_fields(text, filled)


def replace_fields(text: str, replacement: Callable[[str], str]) -> str:
    """Return a format string with the `replacement` of each field, which is a format string."""
    parts = []
    for literal, field, _, _ in string.Formatter().parse(text):
        parts.append(escape(literal))
        if field is not None:
            parts.append(replacement(field))
    return "".join(parts)
