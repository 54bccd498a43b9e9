"""What to say about columns that are not understood: how to name them, or which flags help."""

import difflib
from collections import Counter
from collections.abc import Iterable, Sequence

from minia3.tasks.columns import COLUMN_SETS, EXPECTED, N_FIRST_ROWS, Columns
from minia3.tasks.csv_rows import ChoicesCell
from minia3.tasks.format_strings import can_name
from minia3.tasks.names import fold_case, list_names

# What the names of columns with answers often contain, the likeliest first.
ANSWER_WORDS = (
    "chosen",
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


def explain(columns: Columns, needs_answer: bool, used: Sequence[str]) -> str:
    """Return the message for columns that match no known set.

    needs_answer: whether the user has not said what is answered. used: the columns of the input, if
    the user has said what is read.
    """
    found = list_names(columns.exact.values())
    advice = advise(columns)
    columns_used = set(map(columns.name_in_file, used))
    if not needs_answer:
        advice = 'say what the model reads with --input "{COLUMN}"'
    elif used and not columns_used.issuperset(columns.found):
        advice = (
            'say which column is the answer with --target "{COLUMN}", and add --labels '
            "WORD,WORD if it is one of a few words"
        )
    return (
        f"{columns.origin} has the columns {found:.200}; expected columns such as {EXPECTED}: "
        f"{advice}"
    )


def explain_verdicts(columns: Columns, target: str, verdict: str) -> str:
    """Return the message for a file that says of some answers that they are bad, as for KTO."""
    label = columns.name_in_file("label")
    return (
        f"{columns.origin} has answers to write, and its column {label!r} is {verdict} for some of "
        f'them: leave those rows out, or learn all answers with --target "{target}"'
    )


def advise(columns: Columns) -> str:
    """Return what the user can do if no known set matches: rename a column, or give flags."""
    conversations = columns.conversations()
    if len(conversations) > 1:
        return advise_conversations(conversations)
    if "chosen" in columns and "rejected" in columns:
        return advise_pairs(columns)
    named = list(filter(None, columns.folded))
    for column_set in COLUMN_SETS:
        missing = [name for name in column_set.names if name not in columns]
        unknown = [name for name in named if name not in column_set.names]
        near = []
        if len(missing) == 1:
            near = difflib.get_close_matches(missing[0], unknown, n=1, cutoff=0.7)
        if len(missing) == 1 and len(column_set.names) > 2 and not unknown:
            return f"add a column {missing[0]!r} with the answers"
        if near:
            found = columns.folded[near[0]]
            return f"did you mean {missing[0]!r} by {found!r}? Otherwise {advise_flags(columns)}"
    return advise_flags(columns)


def advise_conversations(names: Sequence[str]) -> str:
    """Return what the user can do with several columns of conversations."""
    advice = "call the one to learn from 'messages'"
    if {"prompt", "chosen"} <= set(map(fold_case, names)):
        advice = "write the turns of the prompt and of the chosen answer into a column 'messages'"
    return f"{' and '.join(map(repr, names))} hold conversations: {advice}"


def advise_pairs(columns: Columns) -> str:
    """Return what the user can do with texts that were chosen and rejected, as for DPO."""
    advice = advise_flags(columns)
    if len(text_lengths(columns)) < 2:
        advice = "put the prompts into a column of their own"
    return (
        f"{advice}; to learn from both answers, write rows such as "
        '{"input": PROMPT, "choices": [REJECTED, CHOSEN], "label": CHOSEN}, with the choices in '
        "random order"
    )


def advise_flags(columns: Columns) -> str:
    """Return the flags that say which columns are the input and the target."""
    lengths = text_lengths(columns)
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


def text_lengths(columns: Columns) -> dict[tuple[str, str], int]:
    """Return how long the texts and numbers of each column are, in the first rows.

    The keys are a column and nothing, or a column with objects and the place of an item in
    brackets. Lists count nothing, because a prompt can name only their items.
    """
    # pandas and R write the number of a row into a column without a name. And nobody wants to learn
    # what was rejected.
    named = [column for name, column in columns.folded.items() if name not in ("", "rejected")]
    lengths = Counter()
    for row in columns.rows[:N_FIRST_ROWS]:
        for column in named:
            for item, value in cell_items(row.get(column)):
                lengths[column, item] += len(str(value))
    return {place: length for place, length in lengths.items() if length > 0}


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


def find_answer(places: Iterable[tuple[str, str]]) -> tuple[str, str] | None:
    """Return the first place whose name is one that answers have, or None."""
    for word in ANSWER_WORDS:
        for column, item in places:
            if word in fold_case(column + item):
                return column, item
    return None
