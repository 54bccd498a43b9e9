"""Understand the columns of a user's file: which of them is the input, and which is the answer.

`understand` makes a TaskSpec, as a known task has one, and a line that says how the file was
understood. What the user says (column_flags.py, or a task file) comes before the usual names of
columns (COLUMN_SETS in columns.py).
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

from minia3.tasks.column_advice import explain, explain_rejected, explain_verdicts
from minia3.tasks.column_flags import (
    ColumnFlags,
    choice_words,
    read_flags,
    rename_reserved,
    with_choices,
    with_conversation,
    with_flags,
    with_input,
    with_target,
)
from minia3.tasks.columns import (
    CHOICE_LISTS,
    N_FIRST_ROWS,
    ColumnNames,
    Columns,
    ColumnSet,
    find_bad_verdict,
    find_conversation,
    find_set,
    has_rejected,
)
from minia3.tasks.format_strings import column_of, field_names, roots_of
from minia3.tasks.labels import (
    MANY_LABELS,
    Labels,
    doubtful_labels,
    name_labels,
    order_like_choices,
    words_of,
)
from minia3.tasks.messages import SYSTEM_COLUMNS, find_system_column
from minia3.tasks.names import fold_case, list_names
from minia3.tasks.prompts import OWN_PROMPTS, Prompt
from minia3.tasks.task import TaskSpec

# Columns that are used under these names, whatever the others are.
SPECIAL = ("idx", "adapter")
# Columns that, with a number, probably hold one of the choices.
NUMBERED_CHOICES = (
    *("option", "opt", "choice", "answer", "ending", "sol", "solution"),
    *("candidate", "alternative"),
)


class Understanding(NamedTuple):
    """How a user's file was understood."""

    spec: TaskSpec
    line: str
    notes: list[str]


class ColumnRoles(NamedTuple):
    """Which columns are the input, and which are the answer."""

    prompts: tuple[Prompt, ...]
    target: str = ""  # the text to write
    label: str = ""  # the column of the label
    has_row_choices: bool = False  # and not the same labels in each row
    messages: str = ""  # the column of a conversation

    @property
    def answer_columns(self) -> list[str]:
        """The columns that the answers use: in the texts to write, or in the choices."""
        if self.target:
            return roots_of(prompt.target for prompt in self.prompts)
        return roots_of(chain.from_iterable(prompt.choices or () for prompt in self.prompts))


def understand(
    rows: Sequence[dict],
    spec: TaskSpec,
    flags: ColumnFlags,
    label_names: Mapping[str, Sequence[str]],
    origin: str,
) -> Understanding:
    """Return how the rows of a user's files are to be read.

    rows: the rows of a split as the file has them: of train, if there is such a file. spec: what a
    task file says, or TaskSpec(). label_names: column -> the names that the data set gives to its
    integers. origin: the name of the file, for messages.

    Raise ValueError, in one line, if the columns say too little, or lack a name that the user gave.
    """
    flags = read_flags(flags)
    columns = Columns(rows, spec.fields, origin)
    columns.check_texts([flags.input or ""], "--input")
    columns.check_texts([flags.target or ""], "--target")
    columns.check_braces([flags.input or ""], "--input")
    columns.check_braces([flags.target or ""], "--target")

    given = spec
    roles = assign_roles(columns, spec, flags)
    prompts = roles.prompts
    labels = Labels((), ())
    if roles.label and not roles.has_row_choices:
        labels = find_labels(columns, roles, spec, flags, label_names)
        prompts = with_choices(prompts, labels, is_given=bool(flags.labels))
    elif roles.target:
        prompts = with_target(prompts, roles.target, is_given=bool(flags.target))
    spec = spec._replace(
        prompts=prompts,
        labels=labels.spelled,
        label_field=roles.label or "label",
        metric=flags.metric or spec.metric,
    )
    if roles.messages:
        spec = with_conversation(spec, roles.messages)
    elif not spec.span_field:  # WSC's spans become fields later
        templates = chain.from_iterable(prompt.templates for prompt in prompts)
        columns.check_texts(templates, "a prompt")
        for prompt in prompts:  # but not its choices, because labels may be any words
            columns.check_braces([prompt.text, prompt.target], "a prompt")
    spec = rename_reserved(spec, columns)
    roles = roles._replace(prompts=prompts)
    notes = notes_on_labels(roles, labels) + notes_on_integers(roles, columns, label_names)
    if not flags.labels and not given.labels:
        notes += notes_on_doubtful_labels(labels) + notes_on_lists(roles, labels)
    if roles.messages:
        notes += notes_on_verdicts(columns, roles.messages)
    elif not roles.has_row_choices:
        notes += notes_on_choices(columns, roles)
    return Understanding(spec, describe(columns, roles, labels), notes)


# Choosing columns


def assign_roles(columns: Columns, spec: TaskSpec, flags: ColumnFlags) -> ColumnRoles:
    """Return which columns are the input and the answer. Raise ValueError if that is unclear."""
    given = given_roles(spec, flags)
    if given.label:
        label = columns.column_of(given.label)
        columns.check_name(label, "the task file's 'label_field' (default: label)")
        given = given._replace(has_row_choices="choices" in columns.filled())
    roles = with_usual_columns(given, columns)
    if roles.messages:
        if flags.labels:
            raise ValueError(
                f"--labels says that answers are picked, but {columns.origin} has conversations "
                f"({roles.messages!r}): leave it out, or name the column to read with --input"
            )
        check_verdicts(columns, roles, given)
        return roles
    if flags.labels and roles.target:
        roles = roles._replace(target="", label=only_field(roles.target))
    check_verdicts(columns, roles, given)
    if names_choices(spec, flags):
        roles = roles._replace(has_row_choices=False)
    return roles


def check_verdicts(columns: Columns, roles: ColumnRoles, given: ColumnRoles):
    """Raise ValueError if a column says of some answers or labels that they are wrong, and nobody
    has said that all of them are to be learned. (Of conversations, `notes_on_verdicts` says it.)
    """
    if given.target or given.label:
        return
    if roles.target:
        verdict = find_bad_verdict(columns, roots_of([roles.target])[0])
        if verdict:
            source = roles.prompts[0].text
            raise ValueError(explain_verdicts(columns, source, roles.target, verdict))
    elif roles.label and fold_case(roles.label) != "answer" and has_rejected(columns):
        raise ValueError(explain_rejected(columns))


def given_roles(spec: TaskSpec, flags: ColumnFlags) -> ColumnRoles:
    """Return what the flags or else a task file say. Whatever they do not say is empty."""
    # Not ==, because a task file may say the very text of the default.
    prompts = () if spec.prompts is OWN_PROMPTS else spec.prompts
    target = flags.target or "".join(prompt.target for prompt in prompts[:1])
    if flags.input:
        prompts = with_input(spec.prompts, flags.input)
    label = spec.label_field if has_label(spec) and not target else ""
    return ColumnRoles(prompts, target, label)


def with_usual_columns(roles: ColumnRoles, columns: Columns) -> ColumnRoles:
    """Return the roles, and for whatever nobody has said, the columns with the usual names.

    Raise ValueError if there are none.
    """
    needs_input = not roles.prompts
    needs_answer = not roles.target and not roles.label
    if not needs_input and not needs_answer:
        return roles
    used = roots_of([*(prompt.text for prompt in roles.prompts), roles.target])
    if roles.label:
        used.append(columns.column_of(roles.label))
    picks = any(prompt.choices for prompt in roles.prompts)
    found = find_set(columns.filled(), needs_input, needs_answer, used, picks)
    if found is None and needs_input and needs_answer:
        found = find_conversation(columns)
    if found is None:  # a column that is null in all rows is an error of its own
        found = find_set(columns, needs_input, needs_answer, used, picks)
    if found is None:
        raise ValueError(explain(columns, needs_answer, used))
    if found.is_conversation:
        return ColumnRoles(OWN_PROMPTS, messages=found.names[0])
    if needs_input:
        roles = roles._replace(prompts=(Prompt(found.input, None),))
    if needs_answer:
        has_row_choices = "choices" in found.names
        roles = roles._replace(
            target=found.target, label=found.label, has_row_choices=has_row_choices
        )
    return roles


def has_label(spec: TaskSpec) -> bool:
    """Return whether a task file says that there is a label."""
    return bool(spec.labels) or spec.label_field != "label"


def only_field(target: str) -> str:
    """Return the column that --target names. Raise ValueError if it names more than a column."""
    names = field_names(target)
    if len(names) != 1 or target.strip() != f"{{{names[0]}}}":
        raise ValueError(
            f"--target is {target!r:.60}, expected a column in braces, because --labels "
            "says that its words are labels"
        )
    return names[0]


def names_choices(spec: TaskSpec, flags: ColumnFlags) -> bool:
    """Return whether flags or a task file list the choices. Then those of the rows do not count."""
    has_labels = bool(flags.labels or spec.labels)
    return has_labels or any(prompt.choices for prompt in spec.prompts)


# The labels


def find_labels(
    columns: Columns,
    roles: ColumnRoles,
    spec: TaskSpec,
    flags: ColumnFlags,
    label_names: Mapping[str, Sequence[str]],
) -> Labels:
    """Return the labels: of the task file, of the flags, or as the column has them.

    Raise ValueError, with the name of the file, if its values do not show what the labels are.
    """
    if spec.labels:
        choices = list(map(choice_words, roles.prompts))
        words = choices[0] or spec.labels
        if flags.labels:
            words = words_of(spec.labels, flags.labels, *choices)
        return Labels(tuple(spec.labels), tuple(words))
    values = columns.values(roles.label)
    names = label_names.get(columns.name_in_file(roles.label), ())
    choices = [prompt.choices for prompt in roles.prompts if prompt.choices]
    try:
        found = name_labels(values, roles.label, flags.labels or (), names)
        if flags.labels:  # which become the choices
            return found
        return order_like_choices(found, choices, roles.label)
    except ValueError as error:
        raise ValueError(f"{columns.origin}: {error}") from None


# What a run tells its user


def describe(columns: Columns, roles: ColumnRoles, labels: Labels) -> str:
    """Return how the file was understood: what is read, what is answered, what is ignored."""
    if roles.messages:
        used = conversation_columns(columns, roles.messages)
        answer = "writes what the assistant says"
    else:
        used = roots_of(prompt.text for prompt in roles.prompts)
        answer = describe_answer(columns, roles, labels)
    ignored = ignored_columns(columns, roles)
    text = f"reads {list_in_file(columns, used)}, {answer}"
    return f"{text}; ignores {list_names(ignored):.200}" if ignored else text


def conversation_columns(columns: Columns, messages: str) -> list[str]:
    """Return the columns that conversations are made of. messages: the column with their turns."""
    found = set()
    for row in columns.rows:
        cells = {name: row.get(columns.name_in_file(name)) for name in (*SYSTEM_COLUMNS, messages)}
        found.add(find_system_column(cells, cells[messages]))
    names = [name for name in SYSTEM_COLUMNS if name in found]
    names.append(messages)
    return [*names, "tools"] if "tools" in columns else names


def ignored_columns(columns: Columns, roles: ColumnRoles) -> list[str]:
    """Return the columns that are neither read nor learned, as the file spells them."""
    used = roots_of(prompt.text for prompt in roles.prompts)
    if roles.messages:
        used = conversation_columns(columns, roles.messages)
    known = {*used, *roles.answer_columns, roles.label, column_of(roles.label), *SPECIAL}
    if roles.has_row_choices:
        known |= {"choices", "target"}
    known = set(chain.from_iterable(columns.spellings(name) for name in known if name))
    return [name for name in columns.found if name not in known]


def describe_answer(columns: Columns, roles: ColumnRoles, labels: Labels) -> str:
    if roles.has_row_choices:
        return f"picks {list_in_file(columns, [roles.label])} among the row's choices"
    if roles.target:
        return f"writes {list_in_file(columns, roles.answer_columns)}"
    own_choices = roles.prompts[0].choices or ()
    if roots_of(own_choices):
        return f"picks {list_in_file(columns, [roles.label])} among {list_names(own_choices)}"
    words = choice_words(roles.prompts[0])  # a task file's own, if it has some
    if len(words) == len(labels.words):
        labels = labels._replace(words=tuple(words))
    text = f"picks {list_in_file(columns, [roles.label])} among {labels.describe()}"
    if labels.are_digits:
        text += " (--labels WORD,WORD gives them words)"
    return text


def list_in_file(columns: Columns, names: Iterable[str]) -> str:
    return " and ".join(list_names([columns.name_in_file(name)]) for name in names)


def notes_on_labels(roles: ColumnRoles, labels: Labels) -> list[str]:
    """Return a note if there are so many labels that scoring all of them takes long."""
    n_labels = len(labels.words)
    if n_labels <= MANY_LABELS:
        return []
    note = f"{n_labels} labels, and each row is scored with all of them"
    if labels.words == labels.spelled:  # otherwise, the column does not have the words
        advice = f'if they are texts to write, give --target "{{{roles.label}}}"'
        note = f"{note}: {advice}"
    return [note]


def notes_on_doubtful_labels(labels: Labels) -> list[str]:
    """Return a note on labels that may say that a row has none. They would be learned like any."""
    found = doubtful_labels(labels)
    if not found:
        return []
    return [
        f"labels that may stand for no label: {list_names(map(repr, found))}; "
        "leave their rows out if that is so"
    ]


def notes_on_lists(roles: ColumnRoles, labels: Labels) -> list[str]:
    """Return a note if the labels are the texts of lists, as pandas writes them into a .csv."""
    are_lists = [word.startswith("[") and word.endswith("]") for word in labels.spelled]
    if not are_lists or not all(are_lists):
        return []
    return [
        f"each label is the text of a list, such as {labels.spelled[0]!r:.40}, and is learned as a "
        f'whole: in a .jsonl file, --target "{{{roles.label}[0]}}" takes the first item'
    ]


def notes_on_verdicts(columns: Columns, messages: str) -> list[str]:
    """Return a note if a column may say of some conversations that they are bad.

    It is no error, because no flag could say that the column means something else.
    """
    verdict = find_bad_verdict(columns, messages)
    if not verdict:
        return []
    return [
        f"{columns.name_in_file('label')!r} is {verdict} for some conversations, which are learned "
        "like the others: leave them out if they are bad"
    ]


def notes_on_choices(columns: Columns, roles: ColumnRoles) -> list[str]:
    """Return a note if the choices of a question stand in columns that the model does not read:
    `options`, or A, B, C, or option_a, option_b, option_c, or choice1, choice2, or a list `choice`
    (a text of this name may say what somebody chose).
    """
    filled = columns.filled().found
    ignored = [name for name in ignored_columns(columns, roles) if name in filled]
    found = [name for name in ignored if fold_case(name) in CHOICE_LISTS]
    groups = defaultdict(list)
    for name in ignored:
        groups[name[:-1]].append(name)
    for stem, names in groups.items():
        marks = "".join(name[-1:] for name in names).lower()
        # Any columns may have numbers, such as sentence1 and sentence2.
        is_numbered = marks.startswith(("01", "12"))
        is_choice = fold_case(stem).rstrip("_") in NUMBERED_CHOICES
        if marks.startswith("abc") or (is_numbered and is_choice):
            found += names
    rows = columns.rows[:N_FIRST_ROWS]
    for name in ignored:
        if fold_case(name) == "choice" and any(isinstance(row.get(name), list) for row in rows):
            found.append(name)
    if not found:
        return []
    return [
        f"the model does not read {list_names(found)}: if these are choices, name them in --input"
    ]


def notes_on_integers(
    roles: ColumnRoles, columns: Columns, label_names: Mapping[str, Sequence[str]]
) -> list[str]:
    """Return a note for each column whose integers have names, unless it is a label."""
    used = roots_of(prompt.text for prompt in roles.prompts) + roles.answer_columns
    notes = []
    for name in dict.fromkeys(used):
        names = label_names.get(columns.name_in_file(name), ())
        if names:
            notes.append(
                f"the model sees the integers of {name!r}, and not their names "
                f"({list_names(names):.80})"
            )
    return notes


# Rows about which something is known, or nothing


def has_columns(rows: Sequence[dict], spec: TaskSpec) -> bool:
    """Return whether rows have all the columns that a task reads."""
    columns = Columns(rows, spec.fields, "")
    names = [columns.column_of(spec.label_field)] if has_label(spec) else []
    for prompt in spec.prompts:
        names += roots_of(prompt.templates)
        if not prompt.choices and not prompt.target:
            names.append("choices")
    return all(name in columns for name in names)


def check_fields(rows: Sequence[dict], fields: Mapping[str, str], origin: str):
    """Raise ValueError, with the nearest name, if a task file's fields name no column."""
    columns = Columns(rows, {}, origin)
    for name in fields:
        columns.check_name(name, "the task file's 'fields'")


def guess_task(row: dict, flags: ColumnFlags, columns: Iterable[str] = ()) -> TaskSpec:
    """Return the task of a row about which nothing is known but its columns, and the flags.

    columns: those of the row's file, if it is a table. The row lacks the columns in which its cells
    are empty. If there are no flags, a row with messages is a conversation.
    """
    is_said = bool(flags.input or flags.labels)
    columns_of_row = Columns([row], {}, "")
    filled = columns_of_row.filled()
    if "messages" in filled and not is_said:
        return TaskSpec(messages="messages")
    found = find_inputs(filled) or find_inputs(columns_of_row)
    found = found or find_inputs(ColumnNames(columns, {}))
    conversation = find_conversation(columns_of_row)
    if found is None and conversation is not None and not is_said:
        return with_conversation(TaskSpec(), conversation.names[0])
    prompts = OWN_PROMPTS if found is None else (Prompt(found.input, None),)
    return with_flags(TaskSpec(prompts), flags)


def find_inputs(columns: ColumnNames) -> ColumnSet | None:
    return find_set(columns, needs_input=True, needs_answer=False)
