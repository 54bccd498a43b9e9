"""Read the table of known tasks, tasks.json.

An entry of the file holds the fields of a TaskSpec by name, and may have two more keys. `choices`
are the choices of every prompt that names none (default: the labels). `like` names another entry,
from which this entry takes whatever it leaves out.
"""

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from minia3.files.shipped import find_shipped
from minia3.tasks.prompts import OWN_PROMPTS, Prompt, choices_of
from minia3.tasks.task import Source, TaskSpec

TABLE = Path(__file__).with_name("tasks.json")

# The data that comes with minia3. It is found here whatever --data-dir says.
SHIPPED = find_shipped("data")


@cache
def known_tasks(path: str | Path = TABLE) -> dict[str, TaskSpec]:
    """Return the TaskSpec of each task in a file such as tasks.json, by name.

    Raise ValueError, in one line, if an entry has an unknown key, lacks a key, or is like an entry
    that does not exist.
    """
    table = json.loads(Path(path).read_text("utf-8"))
    tasks = {}
    for name in table:
        try:
            tasks[name] = make_spec(with_inherited(table, name))
        except ValueError as error:
            raise ValueError(f"{path}: {name}: {error}") from None
    return tasks


def list_known_tasks() -> str:
    """Return the names of the known tasks. Of a group such as raft/, only the group is named."""
    groups = dict.fromkeys(name.split("/")[0] for name in known_tasks() if "/" in name)
    names = [name for name in known_tasks() if "/" not in name]
    return ", ".join([*names, *(f"{group}/..." for group in groups)])


def with_inherited(table: dict[str, dict], name: str) -> dict:
    """Return an entry without its `like`, completed by the entry that `like` names."""
    entry = dict(table[name])
    parent_name = entry.pop("like", None)
    if parent_name is None:
        return entry
    if parent_name not in table:
        expected = ", ".join(other for other in table if other != name)
        raise ValueError(f"'like' is {parent_name!r}, expected one of {expected}")
    parent = table[parent_name]
    # One step is enough for our table, and it spares the reader a chain of entries.
    if "like" in parent:
        raise ValueError(f"'like' is {parent_name!r}, expected a task without 'like'")
    return parent | entry


def make_spec(entry: dict) -> TaskSpec:
    """Return the TaskSpec of an entry without `like`."""
    check_keys(entry, TaskSpec, extra=("choices",))
    entry = dict(entry)
    choices = entry.pop("choices", choices_of(entry.get("labels", ())))
    entry["sources"] = [make_source(fields) for fields in entry.get("sources", ())]
    prompts = [make_prompt(fields, choices) for fields in entry.get("prompts", ())]
    entry["prompts"] = tuple(prompts) or OWN_PROMPTS
    return TaskSpec(**entry)


def make_source(fields: dict) -> Source:
    check_keys(fields, Source)
    return Source(**fields)


def make_prompt(fields: dict, default_choices: Iterable[str]) -> Prompt:
    choices = fields.get("choices", default_choices)
    fields = fields | {"choices": tuple(choices) or None}
    check_keys(fields, Prompt)
    return Prompt(**fields)


def check_keys(fields: dict, kind: type, extra: Iterable[str] = ()):
    """Raise ValueError if `fields` has a key that is unknown to `kind`, or lacks a required key."""
    known = [*kind._fields, *extra]
    for key in fields:
        if key not in known:
            raise ValueError(
                f"{kind.__name__} has no key {key!r}, expected one of {', '.join(known)}"
            )
    for key in kind._fields:
        if key not in fields and key not in kind._field_defaults:
            raise ValueError(f"{kind.__name__} lacks the key {key!r}")
