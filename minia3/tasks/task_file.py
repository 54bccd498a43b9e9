"""task.json: what it takes to put rows into words.

A user writes such a file to describe a task, and gives it as --task. It has the form of an entry of
tasks.json, without addresses:

    files        split -> file (or list of files), or a file or folder; relative to the task file
                 (default: the folder of the task file)
    fields       name in the files -> name in the prompts, if the two differ
    label_field  the column of the label
    labels       the labels as the files spell them
    choices      the words of the labels, if the two differ
    target       the text to write, in place of labels: "{answer}"
    prompts      a list of {"text": "{title}: {body}"}; each may have its own "choices" or "target"
    metric       see METRICS in task.py

A run writes the same file beside its adapter, so that `predict` labels rows that have only the
input. PEFT ignores it. An adapter of several tasks has {"tasks": {name: entry}}.
"""

import difflib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from minia3.files.read import read_json
from minia3.files.write import replacing, write_json
from minia3.tasks.format_strings import can_name, check_template, names_in_text, roots_of
from minia3.tasks.known_tasks import make_spec
from minia3.tasks.labels import label_key
from minia3.tasks.prompts import Prompt, check_choices
from minia3.tasks.split_files import SPLITS, TASK_FILE
from minia3.tasks.task import TaskSpec

MAX_BYTES = 1 << 20  # a larger .json file holds rows

PATHS = "a path, or an object of paths"
# What a value is -> its type, and that of what it holds.
CONTAINERS = {
    "a list of texts": (list, str),
    "a list of objects": (list, dict),
    "an object of texts": (dict, str),
    "an object of objects": (dict, dict),
    PATHS: (dict, str | list),
}
# Key -> what its value is, in a message. A file has no other keys.
KEYS = {
    "files": PATHS,
    "fields": "an object of texts",
    "label_field": "a text",
    "labels": "a list of texts",
    "choices": "a list of texts",
    "target": "a text",
    "prompts": "a list of objects",
    "metric": "a text",
    "messages": "a text",
    "span_field": "a text",
    "chat_template": "a text",
}
SIGNS = {"prompts", "files", "tasks"}  # keys that no other .json file has, in all likelihood
PROMPT_KEYS = {
    "text": "a text",
    "choices": "a list of texts",
    "target": "a text",
    "words": "an object of objects",
    "for_model": "a text",
}
SAVED = ("fields", "label_field", "labels", "metric", "messages", "span_field", "chat_template")


# Finding and reading


def find_task_file(name: str) -> Path | None:
    """Return the task file that --task names, directly or by its folder, or None."""
    with suppress(ValueError, OSError):  # a name may be too long, or hold a null byte
        path = Path(name)
        if path.is_dir():
            beside = path / TASK_FILE
            # The folders of other data sets (RAFT's) may have a task.json of another kind.
            return beside if beside.is_file() and describes_task(beside) else None
        is_named = path.name == TASK_FILE
        if path.suffix == ".json" and path.is_file() and (is_named or describes_task(path)):
            return path
    return None


def describes_task(path: Path) -> bool:
    """Return whether a .json file describes a task, and does not hold rows."""
    is_named = path.name == TASK_FILE
    if path.stat().st_size > MAX_BYTES:
        return False
    try:
        content = read_json(path)
    except ValueError:
        return is_named  # whatever mistakes are in a task.json, it is one
    has_a_sign = not SIGNS.isdisjoint(content)
    if is_named:
        # Some other keys may be typos. RAFT's task.json has no key of ours.
        return has_a_sign or not KEYS.keys().isdisjoint(content)
    has_only_our_keys = bool(content) and content.keys() <= KEYS.keys()
    return (has_only_our_keys or has_a_sign) and not holds_rows(content)


def holds_rows(content: dict) -> bool:
    """Return whether an object has a list of objects that are not prompts: these are rows."""
    for key, value in content.items():
        are_objects = bool(value) and is_kind(value, "a list of objects")
        are_prompts = key == "prompts" and are_objects and "text" in value[0]
        if are_objects and not are_prompts:
            return True
    return False


def read_task_file(path: Path) -> TaskSpec:
    """Return the task of a file. Raise ValueError, in one line, if it is not such a file."""
    tasks = read_tasks(path)
    if len(tasks) > 1:
        raise ValueError(f"{path} holds {len(tasks)} tasks ({', '.join(tasks)}), expected one")
    return next(iter(tasks.values()))


def read_tasks(path: Path) -> dict[str, TaskSpec]:
    """Return the tasks of a file by name. The name of a single task is "".

    Raise ValueError, in one line, if it is not such a file.
    """
    content = read_json(path)
    entries = {"": content}
    if content.keys() == {"tasks"} and isinstance(content["tasks"], dict):
        entries = content["tasks"]
    tasks = {}
    for name, entry in entries.items():
        try:
            tasks[name] = read_entry(entry, path.parent)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    if not tasks:
        raise ValueError(f"{path}: expected a task, found none")
    return tasks


def read_tasks_beside(path: Path) -> dict[str, TaskSpec]:
    """Return the tasks in the task.json of an adapter or a model: name to TaskSpec.

    path: its folder, or a file in its folder.
    """
    folder = path.parent if path.is_file() else path
    task_file = folder / TASK_FILE
    return read_tasks(task_file) if task_file.is_file() else {}


def read_entry(entry: Mapping, folder: Path) -> TaskSpec:
    """Return the TaskSpec of an entry. folder: which the paths of `files` are relative to."""
    check_values(entry, KEYS)
    entry = without_nulls(entry)
    entry["prompts"] = [read_prompt(prompt) for prompt in entry.get("prompts", ())]
    for key in ("choices", "target"):
        if entry.get(key) and not entry.get("prompts"):
            raise ValueError(f"{key!r} needs prompts, which say the text of the input")
    if entry.get("messages", "messages") != "messages":
        raise ValueError(
            f"'messages' is {entry['messages']!r:.60}, expected 'messages': 'fields' gives the "
            "column of the conversations this name"
        )
    check_answers(entry)
    files = entry.pop("files", ".")
    target = entry.pop("target", "")
    if target:
        entry["prompts"] = [{"target": target, **prompt} for prompt in entry["prompts"]]
    spec = make_spec(entry)
    for prompt in spec.prompts:
        check_reads_columns(prompt)
        check_choices_differ(prompt)
        if prompt.choices and spec.labels:
            check_choices(prompt, spec.labels)
    spec = spec._replace(labels=tuple(spec.labels))
    if isinstance(files, str):
        return spec._replace(path=folder / files)
    return spec._replace(files=find_files(files, folder))


def check_answers(entry: Mapping):
    """Raise ValueError if an answer is not a format string, or if prompts are answered in two ways.

    All rows of a task are of one kind: a target to write, or choices to pick from.
    """
    for text in (entry.get("target", ""), *entry.get("choices", ())):
        check_template(text)
    labels = entry.get("labels", ())
    if len(set(map(label_key, labels))) < len(labels):
        raise ValueError(
            f"'labels' is {labels!r:.80}, expected labels that differ, not in case only"
        )
    prompts = entry["prompts"]
    targets = [(entry | prompt).get("target") for prompt in prompts]
    n_targets = len(list(filter(None, targets)))
    has_choices = any(entry.get(key) for key in ("choices", "labels"))
    has_choices |= any(prompt.get("choices") for prompt in prompts)
    if n_targets and has_choices:
        raise ValueError(
            "there is a 'target' to write, and there are 'choices' or 'labels' to pick from: "
            "expected only one of the two"
        )
    if 0 < n_targets < len(prompts):
        raise ValueError(
            f"{n_targets} of {len(prompts)} prompts have a 'target': expected one in each, or one "
            "beside 'prompts' for all of them"
        )


def read_prompt(prompt: Mapping) -> dict:
    """Return the entry of a prompt. Raise ValueError if a key or a value is wrong."""
    check_values(prompt, PROMPT_KEYS)
    prompt = without_nulls(prompt)
    if "text" not in prompt:
        raise ValueError("a prompt has no 'text'")
    for text in (prompt["text"], prompt.get("target", ""), *prompt.get("choices", ())):
        check_template(text)
    for name in prompt.get("words", ()):
        if not can_name(name):
            raise ValueError(
                f"'words' is about {{{name}}}, expected a column, and not an item of it"
            )
    return prompt


def check_reads_columns(prompt: Prompt):
    """Raise ValueError if the model would read the same text for all rows, and pick from the same
    choices. (It may always write after the same words, or pick from the choices of a row.)

    Also raise it if only double braces stand in the text. Templates in other languages have them,
    but here they are braces of the text.
    """
    is_constant = not roots_of([prompt.text, *(prompt.choices or ())])
    if is_constant and (prompt.choices or names_in_text(prompt.text)):
        raise ValueError(
            f"'text' is {prompt.text!r:.60}, expected columns in single braces: {{text}}"
        )


def check_choices_differ(prompt: Prompt):
    """Raise ValueError if two choices of a prompt are the same text in every row.

    Their scores would be equal, so the second of them would never be the answer.
    """
    choices = [choice.strip() for choice in prompt.choices or ()]
    if len(set(choices)) < len(choices):
        raise ValueError(f"'choices' is {choices!r:.80}, expected texts that differ")


def without_nulls(entry: Mapping) -> dict:
    """Return an entry without its nulls, which say no more than a key that is not there."""
    return {key: value for key, value in entry.items() if value is not None}


def find_files(names: Mapping[str, str | list[str]], folder: Path) -> dict[str, list[Path]]:
    """Return the files of each split, in the order of SPLITS."""
    if not names:
        raise ValueError(f"'files' is empty, expected paths for {', '.join(SPLITS)}")
    for split in names:
        if split not in SPLITS:
            raise ValueError(f"'files' has the split {split!r}, expected {', '.join(SPLITS)}")
    files = {}
    for split in SPLITS:
        if split in names:
            listed = names[split]
            if isinstance(listed, str):
                listed = [listed]
            if not listed or not is_kind(listed, "a list of texts"):
                raise ValueError(f"'files' has {listed!r:.60} for {split}, expected paths")
            files[split] = [folder / name for name in listed]
    return files


def check_values(entry: Mapping, kinds: Mapping[str, str]):
    """Raise ValueError if an entry has an unknown key, or a value of another kind."""
    if not isinstance(entry, dict):
        raise ValueError(f"expected an object, found {entry!r:.60}")
    for key, value in entry.items():
        if key not in kinds:
            (nearest,) = difflib.get_close_matches(key, kinds, n=1, cutoff=0)
            raise ValueError(
                f"unknown key {key!r}: did you mean {nearest!r}? Known keys: {', '.join(kinds)}"
            )
        if not is_kind(value, kinds[key]):
            raise ValueError(f"{key!r} is {value!r:.60}, expected {kinds[key]}")


def is_kind(value, kind: str) -> bool:
    """Return whether a value is what KEYS says. A text may be null: see `without_nulls`."""
    if kind == "a text":
        return value is None or isinstance(value, str)
    if kind == PATHS and isinstance(value, str):
        return True
    container, item_type = CONTAINERS[kind]
    if not isinstance(value, container):
        return False
    items = value.values() if container is dict else value
    return all(isinstance(item, item_type) for item in items)


# Writing


def write_task_file(folder: Path, tasks: Iterable[tuple[str, TaskSpec]]):
    """Write task.json into an adapter's folder. tasks: (name, spec) of each task it has learned."""
    entries = {name: make_entry(spec) for name, spec in tasks}
    content = {"tasks": entries}
    if len(entries) == 1:
        (content,) = entries.values()
    write_json(Path(folder, TASK_FILE), content)


def copy_task_file(sources: Iterable[Path], folder: Path):
    """Copy the task.json of adapters or a model to what was made of them, if all have the same."""
    contents = set()
    for source in sources:
        beside = source if source.is_dir() else source.parent
        path = beside / TASK_FILE
        content = path.read_bytes() if path.is_file() else None
        contents.add(content)
    if len(contents) == 1 and None not in contents:
        with replacing(Path(folder, TASK_FILE)) as temporary:
            temporary.write_bytes(contents.pop())


def make_entry(spec: TaskSpec) -> dict:
    """Return the entry of a task, as `read_entry` reads it. Only its files are not in it."""
    entry = only_changed(spec, SAVED)
    if not spec.messages:  # a conversation is put into words by the chat template
        entry["prompts"] = [only_changed(prompt, Prompt._fields) for prompt in spec.prompts]
    return entry


def only_changed(fields: TaskSpec | Prompt, names: Iterable[str]) -> dict:
    """Return the fields that differ from their defaults."""
    changed = {}
    for name in names:
        value = getattr(fields, name)
        default = fields._field_defaults.get(name)
        if value != default and value not in ((), []):
            changed[name] = value
    return changed
