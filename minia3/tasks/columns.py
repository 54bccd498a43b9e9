"""Understand the columns of a user's file: which of them is the input, and which is the answer.

`understand` makes a TaskSpec, as a known task has one, and a line that says how the file was
understood. COLUMN_SETS is the table of the usual names. What the user says (--input, --target,
--labels, --metric, or a task file) comes before the table.
"""

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

from minia3.tasks.labels import (
    MANY_LABELS,
    Labels,
    choices_of,
    name_labels,
    order_like_choices,
    split_words,
    words_of,
)
from minia3.tasks.prompts import (
    OWN_PROMPTS,
    Prompt,
    can_name,
    check_choices,
    check_template,
    field_names,
    fold,
    list_names,
    nearest_of,
    rename_field,
    root_of,
)
from minia3.tasks.row_files import ChoicesCell
from minia3.tasks.rows import find_renamed
from minia3.tasks.task import TaskSpec


class ColumnSet(NamedTuple):
    """Columns with the usual names, and what they mean."""

    names: tuple[str, ...]
    # The text of a prompt.
    input: str
    # How a row is answered: a text to write ("{answer}"), or the name of the column with the label.
    target: str = ""
    label: str = ""


# The first set whose columns are all there is taken, so larger sets come first.
COLUMN_SETS = (
    ColumnSet(("messages",), ""),  # a conversation, which a chat template puts into words
    # Rows with choices of their own. The label is the index of a choice, or its words.
    ColumnSet(("input", "choices"), "{input}", label="label"),
    ColumnSet(("text", "choices"), "{text}", label="label"),
    ColumnSet(("question", "choices", "answer"), "{question}", label="answer"),
    ColumnSet(("question", "choices"), "{question}", label="label"),
    # Texts to write.
    ColumnSet(("input", "target"), "{input}", "{target}"),
    ColumnSet(("instruction", "input", "output"), "{instruction}\n{input}", "{output}"),
    ColumnSet(("instruction", "output"), "{instruction}", "{output}"),
    ColumnSet(("prompt", "completion"), "{prompt}", "{completion}"),
    ColumnSet(("question", "context", "answer"), "{context}\n{question}", "{answer}"),
    ColumnSet(("question", "answer"), "{question}", "{answer}"),
    ColumnSet(("input", "output"), "{input}", "{output}"),
    # Labels, which are the same for all rows: words, integers or booleans.
    ColumnSet(("premise", "hypothesis", "label"), "{premise}\n{hypothesis}", label="label"),
    ColumnSet(("sentence1", "sentence2", "label"), "{sentence1}\n{sentence2}", label="label"),
    ColumnSet(("text", "label"), "{text}", label="label"),
    ColumnSet(("sentence", "label"), "{sentence}", label="label"),
    ColumnSet(("question", "label"), "{question}", label="label"),
    ColumnSet(("input", "label"), "{input}", label="label"),
)
# What a message shows of the table.
EXPECTED = "text,label; premise,hypothesis,label; input,target; instruction,input,output; messages"
# Columns that are used under these names, whatever the others are.
SPECIAL = ("idx", "adapter")
# What the names of columns with answers often contain, the likeliest first.
ANSWER_WORDS = (
    "answer",
    "response",
    "output",
    "completion",
    "target",
    "tgt",
    "label",
    "sentiment",
    "category",
    "class",
    "summary",
)
N_FIRST_ROWS = 20  # at which a message looks, to say what the columns hold
# Names that our rows have for something else than a text. If a prompt uses such a column, then the
# column gets another name.
RESERVED = ("label", "idx", "messages")


class ColumnFlags(NamedTuple):
    """What the user says about the columns: the flags of the same names."""

    input: str | None = None  # the text of a prompt
    target: str | None = None  # the text to write; with `labels`, the column of the label
    labels: str | Sequence[str] | None = None  # words, with commas between them
    metric: str | None = None  # one of METRICS


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
    columns.check_names(flags.input or "", "--input")
    columns.check_names(flags.target or "", "--target")

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
    if not roles.messages and not spec.span_field:  # WSC's spans become fields later
        columns.check_prompts(prompts)
    spec = rename_reserved(spec, columns)
    roles = roles._replace(prompts=prompts)
    notes = notes_on(roles, labels) + notes_on_integers(roles, columns, label_names)
    return Understanding(spec, columns.describe(roles, labels), notes)


# What the user says


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


# Choosing columns


def assign_roles(columns: "Columns", spec: TaskSpec, flags: ColumnFlags) -> ColumnRoles:
    """Return which columns are the input and the answer. Raise ValueError if that is unclear."""
    roles = given_roles(spec, flags)
    if roles.label:
        columns.check_name(roles.label, "the task file's 'label_field' (default: label)")
        roles = roles._replace(has_row_choices="choices" in columns)
    needs_input = not roles.prompts
    needs_answer = not roles.target and not roles.label
    used = roots_of(prompt.text for prompt in roles.prompts)
    picks = any(prompt.choices for prompt in roles.prompts)
    found = find_set(columns, needs_input, needs_answer, used, picks)
    if found is None and needs_input and needs_answer:
        found = columns.find_conversation()
    if found is None:
        raise ValueError(columns.explain(needs_answer, used))
    if found.names and not found.input:
        (conversation,) = found.names
        if flags.labels:
            raise ValueError(
                f"--labels says that answers are picked, but {columns.origin} has conversations "
                f"({conversation!r}): leave it out, or name the column to read with --input"
            )
        return ColumnRoles(OWN_PROMPTS, messages=conversation)
    if needs_input:
        roles = roles._replace(prompts=(Prompt(found.input, None),))
    if needs_answer:
        has_row_choices = "choices" in found.names
        roles = roles._replace(
            target=found.target, label=found.label, has_row_choices=has_row_choices
        )
    if flags.labels and roles.target:
        roles = roles._replace(target="", label=only_field(roles.target))
    if names_choices(spec, flags):
        roles = roles._replace(has_row_choices=False)
    return roles


def given_roles(spec: TaskSpec, flags: ColumnFlags) -> ColumnRoles:
    """Return what the flags or else a task file say. Whatever they do not say is empty."""
    # Not ==, because a task file may say the very text of the default.
    prompts = () if spec.prompts is OWN_PROMPTS else spec.prompts
    target = flags.target or "".join(prompt.target for prompt in prompts[:1])
    if flags.input:
        prompts = (spec.prompts[0]._replace(text=flags.input, for_model=None),)
    label = spec.label_field if has_label(spec) and not target else ""
    return ColumnRoles(prompts, target, label)


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
    """Return whether the flags or a task file say among what to pick, so that the rows do not."""
    has_labels = bool(flags.labels or spec.labels)
    return has_labels or any(prompt.choices for prompt in spec.prompts)


def find_set(
    columns: "Columns",
    needs_input: bool,
    needs_answer: bool,
    used: Sequence[str] = (),
    picks: bool = False,
) -> ColumnSet | None:
    """Return the first set whose columns are there: those of the input, the answer, or both.

    used: columns of the input that the user chose, which are not the answer. picks: whether the
    user gave choices, so that the answer is no text to write.
    """
    if not needs_input and not needs_answer:
        return ColumnSet((), "")
    used_keys = {name.lower() for name in used}
    for column_set in ordered_sets(columns, needs_input, needs_answer):
        is_conversation = not column_set.input  # input and answer in one
        inputs = set(field_names(column_set.input))
        answers = set(column_set.names) - inputs
        is_partial = not (needs_input and needs_answer)
        if (is_conversation and is_partial) or answers.intersection(used_keys):
            continue
        if picks and column_set.target:
            continue
        needed = set()
        if needs_input:
            needed |= inputs
        if needs_answer:
            needed |= answers
        if all(name in columns for name in needed):
            return column_set
    return None


def ordered_sets(columns: "Columns", needs_input: bool, needs_answer: bool) -> Sequence[ColumnSet]:
    """Return the sets in the order in which they are tried."""

    def n_inputs(column_set):
        return len(field_names(column_set.input))

    def lacks_label(column_set):
        return column_set.label != "" and column_set.label not in columns

    if not needs_answer:
        # No answer decides between the sets, so those with the most input columns come first.
        return sorted(COLUMN_SETS, key=n_inputs, reverse=True)
    if not needs_input:
        # Some sets with `choices` differ only in the column of the label, so try one that exists.
        return sorted(COLUMN_SETS, key=lacks_label)
    return COLUMN_SETS


# The labels, and the prompts that follow from them


def find_labels(
    columns: "Columns",
    roles: ColumnRoles,
    spec: TaskSpec,
    flags: ColumnFlags,
    label_names: Mapping[str, Sequence[str]],
) -> Labels:
    """Return the labels: of the task file, of the flags, or as the column has them.

    Raise ValueError, with the name of the file, if the labels cannot be told from its values.
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


def choice_words(prompt: Prompt) -> list[str]:
    """Return the choices of a prompt, or an empty list if there are columns among them."""
    choices = prompt.choices or ()
    return [] if roots_of(choices) else [choice.format() for choice in choices]


def with_choices(prompts: Iterable[Prompt], labels: Labels, is_given: bool) -> tuple[Prompt, ...]:
    """Return the prompts with the words of the labels as their choices.

    is_given: whether --labels gives the words. Otherwise a prompt's own choices stay. Raise
    ValueError if there are more or fewer choices than labels.
    """
    changed = []
    for prompt in prompts:
        if is_given or not prompt.choices:
            prompt = prompt._replace(choices=choices_of(labels.words))
        check_choices(prompt, labels.spelled)
        changed.append(prompt)
    return tuple(changed)


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


def rename_reserved(spec: TaskSpec, columns: "Columns") -> TaskSpec:
    """Return the task with other names for the columns of RESERVED that its prompts use."""
    prompts = list(spec.prompts)
    fields = dict(spec.fields)
    label_field = spec.label_field
    used = roots_of(chain.from_iterable(prompt.templates for prompt in prompts))
    for name in RESERVED:
        column = columns.name_in_file(name)
        # If there are columns of both spellings, then {Label} is none of our names.
        same = [root for root in used if columns.name_in_file(root) == column]
        spellings = [root for root in same if root.lower() == name]
        if spellings:
            new_name = columns.free_name(f"{name}_text")
            prompts = [rename_in_prompt(prompt, spellings, new_name) for prompt in prompts]
            fields[column] = new_name
            if columns.name_in_file(label_field) == column:
                label_field = new_name
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


def notes_on(roles: ColumnRoles, labels: Labels) -> list[str]:
    n_labels = len(labels.words)
    if n_labels <= MANY_LABELS:
        return []
    note = f"{n_labels} labels, and each row is scored with all of them"
    if labels.words == labels.spelled:  # otherwise, the column does not have the words
        advice = f'if they are texts to write, give --target "{{{roles.label}}}"'
        note = f"{note}: {advice}"
    return [note]


def notes_on_integers(
    roles: ColumnRoles, columns: "Columns", label_names: Mapping[str, Sequence[str]]
) -> list[str]:
    """Return a note for each column whose integers have names, and that is no label."""
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


class Columns:
    """The columns of a file: their names, and the values in the rows that were read."""

    def __init__(self, rows: Sequence[dict], fields: Mapping[str, str], origin: str):
        """fields: name in the file -> the name that a task file gives to it."""
        self.rows = rows
        self.origin = origin
        self.found = dict.fromkeys(chain.from_iterable(rows))  # the names in the file
        self.renamed = find_renamed(self.found, fields)
        # A column that is renamed comes before a column that has the new name already.
        kept = [name for name in self.found if name not in self.renamed]
        self.exact = {name: name for name in kept}  # name -> the name in the file
        self.exact |= {new_name: name for name, new_name in self.renamed.items()}
        self.folded = {fold(name): found for name, found in self.exact.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.exact or fold(name) in self.folded

    def name_in_file(self, name: str) -> str:
        """Return a column's name as the file spells it. Case makes no difference, unless there are
        columns that differ in nothing else.
        """
        return self.exact.get(name) or self.folded.get(fold(name), name)

    def free_name(self, name: str) -> str:
        """Return a name that no column has: this one, or a longer one."""
        while name in self:
            name += "_text"
        return name

    def values(self, name: str) -> Iterable:
        column = self.name_in_file(name)
        return (row.get(column) for row in self.rows)

    # Checks

    def check_names(self, text: str, origin: str):
        """Raise ValueError if a format string names a column that is not there."""
        for name in roots_of([text]):
            self.check_name(name, origin)

    def check_name(self, name: str, origin: str):
        """Raise ValueError, with the nearest name, if there is no such column."""
        if name in self:
            return
        new_names = {fold(renamed): new_name for renamed, new_name in self.renamed.items()}
        new_name = new_names.get(fold(name))
        if new_name is not None:
            raise ValueError(
                f"{origin} names the column {name!r}, which the task file's 'fields' call "
                f"{new_name!r}: use this name"
            )
        found = nearest_of(name, self.exact)
        raise ValueError(
            f"{origin} names the column {name!r}, which {self.origin} does not have{found}"
        )

    def check_prompts(self, prompts: Iterable[Prompt]):
        """Raise ValueError if a prompt names a column that is not there."""
        for prompt in prompts:
            for text in prompt.templates:
                self.check_names(text, "a prompt")

    # Messages

    def describe(self, roles: ColumnRoles, labels: Labels) -> str:
        """Return how the file was understood: what is read, what is answered, what is ignored."""
        if roles.messages:
            used = [roles.messages]
            used += ["tools"] if "tools" in self else []
            answer = "writes what the assistant says"
        else:
            used = roots_of(prompt.text for prompt in roles.prompts)
            answer = self.describe_answer(roles, labels)
        text = f"reads {self.list_in_file(used)}, {answer}"
        known = {*used, *roles.answer_columns, roles.label, *SPECIAL}
        if roles.has_row_choices:
            known |= {"choices", "target"}
        known = {self.name_in_file(name) for name in known}
        ignored = [name for name in self.found if name not in known]
        return f"{text}; ignores {list_names(ignored):.200}" if ignored else text

    def describe_answer(self, roles: ColumnRoles, labels: Labels) -> str:
        if roles.has_row_choices:
            return f"picks {self.list_in_file([roles.label])} among the row's choices"
        if roles.target:
            return f"writes {self.list_in_file(roles.answer_columns)}"
        own_choices = roles.prompts[0].choices or ()
        if roots_of(own_choices):
            return f"picks {self.list_in_file([roles.label])} among {list_names(own_choices)}"
        text = f"picks {self.list_in_file([roles.label])} among {labels.describe()}"
        if labels.are_digits:
            text += " (--labels WORD,WORD gives them words)"
        return text

    def list_in_file(self, names: Iterable[str]) -> str:
        return " and ".join(list_names([self.name_in_file(name)]) for name in names)

    def explain(self, needs_answer: bool, used: Sequence[str]) -> str:
        """Return the message for columns that match no known set.

        needs_answer: whether the user has not said what is answered. used: the columns of the
        input, if the user has said what is read.
        """
        found = list_names(self.exact.values())
        advice = self.advise()
        columns_used = set(map(self.name_in_file, used))
        if not needs_answer:
            advice = 'say what the model reads with --input "{COLUMN}"'
        elif used and not columns_used.issuperset(self.found):
            advice = (
                'say which column is the answer with --target "{COLUMN}", and add --labels '
                "WORD,WORD if it is one of a few words"
            )
        return (
            f"{self.origin} has the columns {found:.200}; expected columns such as {EXPECTED}: "
            f"{advice}"
        )

    def advise(self) -> str:
        """Return what the user can do if no known set matches: rename a column, or give flags."""
        hint = ""
        # pandas and R write the number of a row into a column without a name.
        named = [name for name in self.folded if name]
        conversations = self.conversations()
        if len(conversations) > 1:
            names = " and ".join(map(repr, conversations))
            return f"{names} hold conversations: call the one to learn from 'messages'"
        for column_set in COLUMN_SETS:
            missing = [name for name in column_set.names if name not in self]
            unknown = [name for name in named if name not in column_set.names]
            near = []
            if len(missing) == 1:
                near = difflib.get_close_matches(missing[0], unknown, n=1, cutoff=0.7)
            if len(missing) == 1 and len(column_set.names) > 2 and not unknown:
                return f"add a column {missing[0]!r} with the answers"
            if near:
                hint = f"did you mean {missing[0]!r} by {self.folded[near[0]]!r}? Otherwise "
                break
        return hint + self.advise_flags([self.folded[name] for name in named])

    def advise_flags(self, columns: Sequence[str]) -> str:
        """Return the flags that say which columns are the input and the target."""
        lengths = self.text_lengths(columns)
        # The longest texts are the input, most of the time.
        longest = sorted(lengths, key=lengths.get, reverse=True)
        if len(longest) < 2:
            return "add a column with the answers"
        target = find_answer(lengths) or longest[1]
        source = next(place for place in longest if place != target)
        for column in (source[0], target[0]):
            if not can_name(column):
                return (
                    f"rename the column {column!r} (in braces, a name has none of . : ! [ ] {{ }} "
                    "and is not a number), and say which is which with --input and --target"
                )
        source_text, target_text = (repr("".join(place))[1:-1] for place in (source, target))
        return (
            f'say which is which with --input "{{{source_text}}}" --target "{{{target_text}}}", '
            "and add --labels WORD,WORD if the target is one of a few words"
        )

    def text_lengths(self, columns: Sequence[str]) -> dict[tuple[str, str], int]:
        """Return how long the texts and numbers of each column are, in the first rows.

        The keys are a column and nothing, or a column with objects and the place of an item in
        brackets. Lists count nothing, because a prompt can name only their items.
        """
        lengths = Counter()
        for row in self.rows[:N_FIRST_ROWS]:
            for column in columns:
                for item, value in cell_items(row.get(column)):
                    lengths[column, item] += len(str(value))
        return {place: length for place, length in lengths.items() if length > 0}

    def conversations(self) -> list[str]:
        """Return the columns with lists of objects that look like messages."""
        rows = self.rows[:N_FIRST_ROWS]
        return [name for name in self.found if any(is_conversation(row.get(name)) for row in rows)]

    def find_conversation(self) -> ColumnSet | None:
        """Return the set of the only column with conversations, whatever its name is.

        Several are none: in files of preferences, one of two is not to be learned.
        """
        names = self.conversations()
        return ColumnSet(tuple(names), "") if len(names) == 1 else None


def cell_items(cell) -> list[tuple[str, object]]:
    """Return the texts and numbers of a cell, each after its place: "", or "[de]" in an object."""
    items = [("", cell)]
    if isinstance(cell, dict):
        items = [(f"[{key}]", value) for key, value in cell.items() if can_name(key)]
    return [
        (place, value)
        for place, value in items
        if isinstance(value, str | int | float) and not isinstance(value, ChoicesCell)
    ]


def is_conversation(cell) -> bool:
    """Return whether a cell is a list of messages, under OpenAI's names or under ShareGPT's."""
    if not isinstance(cell, list) or not cell or not isinstance(cell[0], dict):
        return False
    return {"role", "content"} <= cell[0].keys() or {"from", "value"} <= cell[0].keys()


def find_answer(places: Iterable[tuple[str, str]]) -> tuple[str, str] | None:
    """Return the first place whose name is one that answers have, or None."""
    for word in ANSWER_WORDS:
        for column, item in places:
            if word in fold(column + item):
                return column, item
    return None


def roots_of(texts: Iterable[str]) -> list[str]:
    """Return the columns that format strings use, each once."""
    names = chain.from_iterable(field_names(text) for text in texts)
    return list(dict.fromkeys(map(root_of, names)))


# For tasks that are known already, and for single rows


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
        prompts = (prompts[0]._replace(text=flags.input, for_model=None),)
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
        names = dict.fromkeys([*spec.fields, *roots_of([flags.input])])
        spec = rename_reserved(spec, Columns([names], spec.fields, ""))
    return spec


def guess_task(row: dict, flags: ColumnFlags, columns: Iterable[str] = ()) -> TaskSpec:
    """Return the task of a row about which nothing is known but its columns, and the flags.

    columns: those of the row's file, if it is a table. The row lacks the columns in which its cells
    are empty. If there are no flags, a row with messages is a conversation.
    """
    columns_of_row = Columns([row], {}, "")
    if "messages" in columns_of_row and not flags.input and not flags.labels:
        return TaskSpec(messages="messages")
    columns_of_file = Columns([dict.fromkeys(columns)], {}, "")
    found = find_inputs(columns_of_row) or find_inputs(columns_of_file)
    conversation = columns_of_row.find_conversation()
    if found is None and conversation is not None and not flags.input and not flags.labels:
        return with_conversation(TaskSpec(), *conversation.names)
    prompts = OWN_PROMPTS if found is None else (Prompt(found.input, None),)
    return with_flags(TaskSpec(prompts), flags)


def with_conversation(spec: TaskSpec, column: str) -> TaskSpec:
    """Return the task whose rows are the conversations in a column of the file."""
    fields = dict(spec.fields)
    if fold(column) != "messages":
        fields[column] = "messages"
    return spec._replace(messages="messages", fields=fields)


def find_inputs(columns: "Columns") -> ColumnSet | None:
    return find_set(columns, needs_input=True, needs_answer=False)


def has_columns(rows: Sequence[dict], spec: TaskSpec) -> bool:
    """Return whether rows have all the columns that a task reads."""
    names = [spec.label_field] if has_label(spec) else []
    for prompt in spec.prompts:
        names += roots_of(prompt.templates)
        if not prompt.choices and not prompt.target:
            names.append("choices")
    columns = Columns(rows, spec.fields, "")
    return all(name in columns for name in names)


def with_label_names(spec: TaskSpec, names: Sequence[str]) -> TaskSpec:
    """Return the task of an adapter for rows whose labels are integers with names.

    names: of the integers 0, 1, ... If the choices of a prompt, or else the labels on which the
    adapter was trained, are such names, then the rows' integers stand for them.
    """
    number = {fold(choice): str(i) for i, choice in enumerate(choices_of(names))}
    candidates = [prompt.choices or () for prompt in spec.prompts]
    # Labels 0, 1, ... were integers of a data set, too, which may have had names such as "1", "0".
    if tuple(spec.labels) != tuple(map(str, range(len(spec.labels)))):
        candidates.append(choices_of(spec.labels))
    for words in candidates:
        keys = list(map(fold, words))
        if keys and all(key in number for key in keys):
            return spec._replace(labels=tuple(number[key] for key in keys))
    return spec


def check_fields(rows: Sequence[dict], fields: Mapping[str, str], origin: str):
    """Raise ValueError, with the nearest name, if a task file's fields name no column."""
    columns = Columns(rows, {}, origin)
    for name in fields:
        columns.check_name(name, "the task file's 'fields'")
