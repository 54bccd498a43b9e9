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
def known_tasks() -> dict[str, TaskSpec]:
    """Return the TaskSpec of each task in tasks.json, by name."""
    table = json.loads(TABLE.read_text("utf-8"))
    return {name: make_spec(with_inherited(table, name)) for name in table}


def list_known_tasks() -> str:
    """Return the names of the known tasks. Of a group such as raft/, only the group is named."""
    groups = dict.fromkeys(name.split("/")[0] for name in known_tasks() if "/" in name)
    names = [name for name in known_tasks() if "/" not in name]
    return ", ".join([*names, *(f"{group}/..." for group in groups)])


def with_inherited(table: dict[str, dict], name: str) -> dict:
    """Return an entry without its `like`, completed by the entry that `like` names.

    That entry has no `like`. One step is enough for our table, and spares readers a chain.
    """
    entry = dict(table[name])
    parent = entry.pop("like", None)
    return entry if parent is None else table[parent] | entry


def make_spec(entry: dict) -> TaskSpec:
    """Return the TaskSpec of an entry without `like`."""
    entry = dict(entry)
    choices = entry.pop("choices", choices_of(entry.get("labels", ())))
    entry["sources"] = [Source(**fields) for fields in entry.get("sources", ())]
    prompts = [make_prompt(fields, choices) for fields in entry.get("prompts", ())]
    entry["prompts"] = tuple(prompts) or OWN_PROMPTS
    return TaskSpec(**entry)


def make_prompt(fields: dict, default_choices: Iterable[str]) -> Prompt:
    choices = fields.get("choices", default_choices)
    return Prompt(**fields | {"choices": tuple(choices) or None})
