"""The columns of a file: their names in the file and in the task, and the usual names.

COLUMN_SETS is the table of the usual names. `find_set` finds the first set of them in a file.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

from minia3.tasks.format_strings import column_of, field_names, label_of, names_in_text, roots_of
from minia3.tasks.names import fold_case, nearest_of

N_FIRST_ROWS = 20  # enough to see what the columns hold


class ColumnNames:
    """The names of a file's columns, and those that a task gives to them."""

    def __init__(self, found: Iterable[str], fields: Mapping[str, str]):
        """found: the names in the file. fields: name in the file -> the name in the task."""
        self.found = list(dict.fromkeys(found))
        self.renamed = find_renamed(self.found, fields)
        # A column that is renamed takes the place of a column that has the new name in the file.
        kept = [name for name in self.found if name not in self.renamed]
        self.exact = {name: name for name in kept}  # name in the task -> name in the file
        self.exact |= {new_name: name for name, new_name in self.renamed.items()}
        self.folded = {fold_case(name): found for name, found in self.exact.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.exact or fold_case(name) in self.folded

    def name_in_file(self, name: str) -> str:
        """Return a column's name as the file spells it. Case makes no difference, unless there are
        columns that differ in nothing else.
        """
        return self.exact.get(name) or self.folded.get(fold_case(name), name)

    def column_of(self, field: str) -> str:
        """Return the column of a label: label, for an item such as label[0]."""
        return field if field in self else column_of(field)

    def free_name(self, name: str) -> str:
        """Return a name that no column has: this one, or a longer one."""
        while name in self:
            name += "_text"
        return name

    def names_in_task(self, expected: Iterable[str]) -> dict[str, str]:
        """Return the columns that a task keeps: name in the file -> name in the task.

        expected: the names that the task uses. If no column has exactly such a name, the last one
        of the other columns that differs from it only in case or in white space gets that name.
        """
        names = {column: name for name, column in self.exact.items()}
        unused = {
            fold_case(names[column]): column for column in names if names[column] not in expected
        }
        for name in expected:
            if name not in self.exact and fold_case(name) in unused:
                names[unused.pop(fold_case(name))] = name
        return names


def find_renamed(names: Iterable[str], fields: Mapping[str, str]) -> dict[str, str]:
    """Return the columns of a file that a task renames: name in the file -> name in the task.

    If no column has just the name that `fields` has, then case makes no difference.
    """
    if not fields:
        return {}
    spelled = {fold_case(name): name for name in names}
    spelled |= {name: name for name in names}
    found = {}
    for name, new_name in fields.items():
        column = spelled.get(name, spelled.get(fold_case(name)))
        if column is not None:
            found[column] = new_name
    return found


@lru_cache(maxsize=16)  # the rows of a file have the same columns, most of the time
def names_in_task(
    found: tuple[str, ...], fields: tuple[tuple[str, str], ...], expected: tuple[str, ...]
) -> dict[str, str]:
    """Return `ColumnNames.names_in_task`, for many rows. fields: the items of the dict."""
    return ColumnNames(found, dict(fields)).names_in_task(expected)


class Columns(ColumnNames):
    """The columns of a file: their names, and the values in the rows that were read."""

    def __init__(self, rows: Sequence[dict], fields: Mapping[str, str], origin: str):
        """fields: see ColumnNames. origin: the name of the file, for messages."""
        super().__init__(chain.from_iterable(rows), fields)
        self.rows = rows
        self.fields = fields
        self.origin = origin

    def filled(self) -> ColumnNames:
        """Return the columns that have a value in any row. In JSON, a column may be null in all."""
        lacking = set(self.found)
        for row in self.rows:
            if not lacking:
                break
            lacking = {name for name in lacking if row.get(name) is None}
        return ColumnNames([name for name in self.found if name not in lacking], self.fields)

    def spellings(self, name: str) -> list[str]:
        """Return the names of a column in the file: several if rows spell it differently.

        Names that stand side by side in a row are those of different columns.
        """
        column = self.name_in_file(name)
        similar = [found for found in self.found if fold_case(found) == fold_case(column)]
        if len(similar) > 1 and any(len(row.keys() & similar) > 1 for row in self.rows):
            return [column]
        return similar

    def values(self, name: str) -> Iterable:
        """Return the values of a column, or of an item of it."""
        root = self.column_of(name)
        item = name[len(root) :]
        column = self.name_in_file(root)
        spellings = self.spellings(root)
        for row in self.rows:
            found = next(filter(row.__contains__, spellings), column)
            yield label_of(row, found + item)

    def check_name(self, name: str, origin: str):
        """Raise ValueError, with the nearest name, if there is no such column.

        origin: what names the column, for the message.
        """
        if name in self:
            return
        new_names = {fold_case(renamed): new_name for renamed, new_name in self.renamed.items()}
        new_name = new_names.get(fold_case(name))
        if new_name is not None:
            raise ValueError(
                f"{origin} names the column {name!r}, which the task file's 'fields' call "
                f"{new_name!r}: use this name"
            )
        found = nearest_of(name, self.exact)
        raise ValueError(
            f"{origin} names the column {name!r}, which {self.origin} does not have{found}"
        )

    def check_texts(self, texts: Iterable[str], origin: str):
        """Raise ValueError if a format string names a column that is not there."""
        for name in roots_of(texts):
            self.check_name(name, origin)

    def check_braces(self, texts: Iterable[str], origin: str):
        """Raise ValueError if a format string has a column in double braces, which name none."""
        for name in chain.from_iterable(map(names_in_text, texts)):
            if name in self:
                raise ValueError(
                    f"{origin} has {{{{{name}}}}}, which is the text {{{name}}}: single braces "
                    "name the column"
                )

    def conversations(self) -> list[str]:
        """Return the columns with lists of objects that look like messages."""
        rows = self.rows[:N_FIRST_ROWS]
        return [name for name in self.found if any(is_conversation(row.get(name)) for row in rows)]


def is_conversation(cell) -> bool:
    """Return whether a cell is a list of messages, under OpenAI's names or under ShareGPT's."""
    if not isinstance(cell, list) or not cell or not isinstance(cell[0], dict):
        return False
    return {"role", "content"} <= cell[0].keys() or {"from", "value"} <= cell[0].keys()


# The usual names


class ColumnSet(NamedTuple):
    """Columns with the usual names, and what they mean."""

    names: tuple[str, ...]
    # The text of a prompt.
    input: str
    # How a row is answered: a text to write ("{answer}"), or the name of the column with the label.
    target: str = ""
    label: str = ""

    @property
    def is_conversation(self) -> bool:
        """Whether the column holds the input and the answer in one."""
        return not self.input


# The first set whose columns are all there is taken, so a larger set mostly comes before a smaller.
COLUMN_SETS = (
    ColumnSet(("messages",), ""),  # a conversation, which a chat template puts into words
    # Rows with choices of their own. The label is the index of a choice, or its words.
    ColumnSet(("input", "choices"), "{input}", label="label"),
    ColumnSet(("text", "choices"), "{text}", label="label"),
    ColumnSet(("question", "choices", "answer"), "{question}", label="answer"),
    ColumnSet(("question", "choices", "label"), "{question}", label="label"),
    ColumnSet(("question", "choices", "answerKey"), "{question}", label="answerKey"),  # ARC
    ColumnSet(("question", "choices"), "{question}", label="label"),
    # Texts to write.
    ColumnSet(("input", "target"), "{input}", "{target}"),
    ColumnSet(("instruction", "input", "output"), "{instruction}\n{input}", "{output}"),
    ColumnSet(("instruction", "output"), "{instruction}", "{output}"),
    ColumnSet(("prompt", "completion"), "{prompt}", "{completion}"),
    ColumnSet(("question", "context", "answer"), "{context}\n{question}", "{answer}"),
    ColumnSet(("question", "passage", "answer"), "{passage}\n{question}", "{answer}"),
    ColumnSet(("question", "answer"), "{question}", "{answer}"),
    ColumnSet(("input", "output"), "{input}", "{output}"),
    # Labels, which are the same for all rows: words, integers or booleans.
    ColumnSet(("premise", "hypothesis", "label"), "{premise}\n{hypothesis}", label="label"),
    ColumnSet(("sentence1", "sentence2", "label"), "{sentence1}\n{sentence2}", label="label"),
    ColumnSet(("text", "label"), "{text}", label="label"),  # a text may be made of the next columns
    ColumnSet(("question", "sentence", "label"), "{question}\n{sentence}", label="label"),  # QNLI
    ColumnSet(("question", "context", "label"), "{context}\n{question}", label="label"),
    ColumnSet(("question", "passage", "label"), "{passage}\n{question}", label="label"),  # BoolQ
    ColumnSet(("sentence", "label"), "{sentence}", label="label"),
    ColumnSet(("question", "label"), "{question}", label="label"),
    ColumnSet(("input", "label"), "{input}", label="label"),
    # At the end, because a `response` may be what a model has said, beside an answer or a label.
    ColumnSet(("instruction", "context", "response"), "{instruction}\n{context}", "{response}"),
)
# Columns that probably hold a list of choices.
CHOICE_LISTS = ("options", "choices", "endings", "candidates", "answer_choices")
# What a message shows of the table.
EXPECTED = "text,label; premise,hypothesis,label; input,target; instruction,input,output; messages"


def find_set(
    columns: ColumnNames,
    needs_input: bool,
    needs_answer: bool,
    used: Sequence[str] = (),
    picks: bool = False,
) -> ColumnSet | None:
    """Return the first set whose columns are there: those of the input, the answer, or both.

    used: columns of the input or the answer that the user chose, which are not the other one.
    picks: whether the user gave choices, so that the answer is picked and not written.
    """
    used_keys = {name.lower() for name in used}
    for column_set in ordered_sets(columns, needs_input, needs_answer, used_keys):
        inputs = set(field_names(column_set.input))
        answers = set(column_set.names) - inputs
        if column_set.is_conversation and not (needs_input and needs_answer):
            continue
        if picks and column_set.target:
            continue
        needed = set()
        if needs_input:
            needed |= inputs
        if needs_answer:
            needed |= answers
        if used_keys.isdisjoint(map(str.lower, needed)) and all(name in columns for name in needed):
            return column_set
    return None


def ordered_sets(
    columns: ColumnNames, needs_input: bool, needs_answer: bool, used_keys: set[str]
) -> Sequence[ColumnSet]:
    """Return the sets in the order in which they are tried. used_keys: the columns that the user
    chose, in lower case.
    """

    def n_inputs(column_set):
        return len(field_names(column_set.input))

    def lacks_label(column_set):
        return column_set.label != "" and column_set.label not in columns

    def reads_others(column_set):
        return not used_keys.issuperset(map(str.lower, field_names(column_set.input)))

    if not needs_answer:
        # No answer decides between the sets, so those with the most input columns come first.
        return sorted(COLUMN_SETS, key=n_inputs, reverse=True)
    if not needs_input:
        # A set that reads only what the user reads comes first: beside "{text}?", a label is the
        # answer, as beside "{text}", also if the file has an `answer` that some question needs.
        # Some sets with `choices` differ only in the column of the label, so try one that exists.
        return sorted(COLUMN_SETS, key=lambda each: (reads_others(each), lacks_label(each)))
    return COLUMN_SETS


def find_bad_verdict(columns: Columns, answer: str) -> str:
    """Return "false" or "0" if the column `label` says with it that some answers are bad, or "".

    In files for KTO it says so, and in WikiQA. But if there are only two answers, 0 and 1 may stand
    for them. answer: the column of the answers.
    """
    if "label" not in columns:
        return ""
    verdicts = {str(value).lower() for value in columns.values("label") if value is not None}
    if verdicts == {"true", "false"}:
        return "false"
    if {verdict.removesuffix(".0") for verdict in verdicts} != {"0", "1"}:
        return ""
    n_answers = len(set(map(str, columns.values(answer))))
    return "0" if n_answers > 2 else ""


def has_rejected(columns: Columns) -> bool:
    """Return whether the column `answer` says, as Prodigy does, that some labels are wrong."""
    if "answer" not in columns:
        return False
    verdicts = {str(value) for value in columns.values("answer") if value is not None}
    return verdicts <= {"accept", "reject", "ignore"} and not verdicts <= {"accept"}


def find_conversation(columns: Columns) -> ColumnSet | None:
    """Return the set of the only column with conversations, whatever its name is.

    Several are none: in files of preferences, one of two is not to be learned.
    """
    names = columns.conversations()
    return ColumnSet(tuple(names), "") if len(names) == 1 else None
