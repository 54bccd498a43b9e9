"""What to say about columns that are not understood: how to name them, or which flags help."""

import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from minia3.tasks.columns import (
    CHOICE_LISTS,
    COLUMN_SETS,
    EXPECTED,
    N_FIRST_ROWS,
    Columns,
    ColumnSet,
    find_set,
)
from minia3.tasks.csv_rows import ChoicesCell
from minia3.tasks.format_strings import can_name, field_names
from minia3.tasks.names import fold_case, list_names
from minia3.tasks.row_files import CELLS, rows_suffix

# What columns with answers are often called, the likeliest first. (A "code" is often the text to
# write, and a "country_code" hardly ever.)
ANSWER_NAMES = (
    *("chosen", "answer", "response", "output", "completion", "target", "label", "gold"),
    *("solution", "code", "intent", "choice"),
)
# What their names contain, if no column has such a name.
ANSWER_WORDS = (
    "chosen",
    "answer",
    "response",
    "output",
    "completion",
    "target",
    "tgt",
    "gold",  # SNLI has a gold_label beside those of each annotator
    "label",
    "solution",
    "intent",
    "sentiment",
    "category",
    "class",
    "summary",
    "score",
    "rating",
)

# What a column that the model reads is often called, beyond the names in COLUMN_SETS.
INPUT_NAMES = ("query", "prompt", "problem")

MANY_ROWS = 1000  # enough to see that values repeat
# Columns of few values that say where a row is from.
ORIGINS = ("split", "source", "dataset", "domain", "lang", "language", "type")
# Columns that number rows, or say when they were made: created_at, lead_time, annotation_id.
RECORDS = re.compile("(.*[_ -])?(id|idx|index|uuid|url|date|time|timestamp|at)")


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


def explain_verdicts(columns: Columns, source: str, target: str, verdict: str) -> str:
    """Return the message for a file that says of some answers that they are bad, as for KTO, or
    MultiRC, whose task is to say so.

    source, target: the texts of the input and of the answer.
    """
    label = columns.name_in_file("label")
    judged = f"{source}\n{target}".replace("\n", "\\n")
    return (
        f"{columns.origin} has answers to write, and its column {label!r} is {verdict} for some of "
        f'them: leave those rows out, or learn all answers with --target "{target}", or learn to '
        f'judge them with --input "{judged}" --target "{{{label}}}" --labels no,yes'
    )


def explain_rejected(columns: Columns) -> str:
    """Return the message for a file of Prodigy that says of some labels that they are wrong."""
    answer = columns.name_in_file("answer")
    return (
        f"{columns.origin} has labels, and its column {answer!r} is 'reject' or 'ignore' for some "
        "of them: leave those rows out, or say what to learn with --target and --labels"
    )


def advise(columns: Columns) -> str:
    """Return what the user can do if no known set matches: rename a column, or give flags."""
    conversations = columns.conversations()
    if len(conversations) > 1:
        return advise_conversations(conversations)
    if "chosen" in columns and "rejected" in columns:
        return advise_pairs(columns)
    if rows_suffix(Path(columns.origin)) in CELLS:
        wrong_cells = advise_cells(columns)
        if wrong_cells:
            return wrong_cells
    named = list(filter(None, columns.folded))
    for column_set in COLUMN_SETS:
        missing = [name for name in column_set.names if name not in columns]
        unknown = [name for name in named if name not in column_set.names]
        not_answers = [*field_names(column_set.input), "choices"]
        lacks_answer = len(missing) == 1 and missing[0] not in not_answers
        if lacks_answer and len(column_set.names) > 2 and not unknown:
            return f"add a column {missing[0]!r} with the answers"
        near = find_near(missing, columns, column_set)
        if near:
            return f"did you mean {missing[0]!r} by {near!r}? Otherwise {advise_flags(columns)}"
    return advise_flags(columns)


def advise_cells(columns: Columns) -> str:
    """Return what is wrong with the cells of a .csv or .tsv file, if its columns show it, or ""."""
    if len(columns.found) == 1 and re.search(r"[,;|]|  ", columns.found[0]):
        delimiters = "commas, semicolons or tabs"
        advice = ""
        if rows_suffix(Path(columns.origin)) == ".tsv":
            delimiters = "tabs"
            advice = " (name the file .csv if it has commas or semicolons)"
        return f"{columns.found[0]!r} is one column: put {delimiters} between the cells{advice}"
    names = list(filter(None, columns.found))
    if names == list(map(str, range(len(names)))):  # pandas writes such a header
        return ""
    for name in names:
        if name in map(str, columns.values(name)):
            return (
                f"write a header into the first line if it has none ({name!r} is also a cell "
                f"below); otherwise {advise_flags(columns)}"
            )
    return ""


def find_near(missing: Sequence[str], columns: Columns, column_set: ColumnSet) -> str:
    """Return the column that was probably meant by the missing one of a set, or ""."""
    if len(missing) != 1 or column_set.is_conversation:  # a conversation needs no name
        return ""
    lengths = text_lengths(columns)
    texts = {fold_case(column): column for column, item in lengths if not item}
    unknown = [name for name in texts if name not in column_set.names]
    near = difflib.get_close_matches(missing[0], unknown, n=2, cutoff=0.7)
    if len(near) != 1:  # of text1 and text2, neither is the text
        return ""
    column = texts[near[0]]
    is_input = missing[0] in field_names(column_set.input)
    answer = None if is_input else find_answer(lengths)
    return "" if answer and answer[0] != column else column


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
    def rank(place):
        is_usual = fold_case(place[0]) in INPUT_NAMES
        return is_record(place), not is_usual, -lengths[place]

    longest = sorted(lengths, key=rank)
    target = find_answer(lengths) or find_answer(list_items(columns))
    sources = find_usual_inputs(columns, target)
    candidates = [place for place in longest if place not in sources]
    target = target or find_repeated(columns, candidates)
    if not target:
        n_read = 0 if sources else 1  # without usual names, the longest text is read
        target = next(iter(candidates[n_read:]), None)
    if not sources:
        sources = [place for place in longest if place != target][:1]
    if not target or not sources:
        return f"add a column with the answers{describe_lists(columns)}"
    for column, _ in (*sources, target):
        if not can_name(column):
            return (
                f"rename the column {column!r} (in braces, a name has none of . : ! [ ] {{ }} "
                "and is not a number), and say which is which with --input and --target"
            )
    source_text = "\\n".join(map(in_braces, sources))
    has_more = any(place not in (*sources, target) for place in longest)
    more = "; --input may name several columns" if has_more else ""
    return (
        f'say which is which with --input "{source_text}" --target "{in_braces(target)}", '
        f"and add --labels WORD,WORD if the target is one of a few words"
        f"{advise_label(columns, sources, target)}{more}"
    )


def advise_label(
    columns: Columns, sources: Sequence[tuple[str, str]], target: tuple[str, str]
) -> str:
    """Return what to do in place of flags if the target is all that lacks a usual name, or ""."""
    column, item = target
    inputs = {fold_case("".join(place)) for place in sources}
    usual = [set(field_names(each.input)) for each in COLUMN_SETS if each.names[-1] == "label"]
    if item or "label" in columns or inputs not in usual:
        return ""
    return f" (or call the column {column!r} label)"


def in_braces(place: tuple[str, str]) -> str:
    return f"{{{repr(''.join(place))[1:-1]}}}"


def describe_lists(columns: Columns) -> str:
    """Return how a prompt can name what the columns of lists and objects hold, or ""."""
    row = next(iter(columns.rows), {})
    for name, value in row.items():
        if isinstance(value, str) and value.startswith(("[{", "['", '["', "{'", '{"')):
            return f" ({name!r} is the text of a list or an object: a .csv keeps none)"
    names = [name for name, value in row.items() if isinstance(value, list | dict)]
    if not names:
        return ""
    item = next(iter(row[names[0]]), "") if isinstance(row[names[0]], dict) else 0
    return (
        f" (a prompt can name the items of {list_names(map(repr, names)):.80}, as in "
        f"{{{names[0]}[{item}]}}, and not the whole)"
    )


def is_record(place: tuple[str, str]) -> bool:
    """Return whether a column's name says that it only records something about the row."""
    return RECORDS.fullmatch(fold_case(place[0])) is not None


def find_usual_inputs(columns: Columns, target: tuple[str, str] | None) -> list[tuple[str, str]]:
    """Return the columns with the usual names that a model reads, or an empty list.

    They are none if the target is one of them, or if no text is left that could be the target.
    """
    found = find_set(columns, needs_input=True, needs_answer=False)
    names = [] if found is None else field_names(found.input)
    places = [(columns.name_in_file(name), "") for name in names]
    lengths = text_lengths(columns)
    are_texts = all(place in lengths and place != target for place in places)
    has_target = target is not None or len(lengths) > len(places)
    return places if are_texts and has_target else []


def find_repeated(columns: Columns, places: Iterable[tuple[str, str]]) -> tuple[str, str] | None:
    """Return the place with the fewest different values, if it has few of them, or None.

    It is probably a label whose name says nothing.
    """
    rows = columns.rows[:MANY_ROWS]
    n_values = {}
    values = defaultdict(set)
    for row in rows:
        for column in columns.found:
            for item, value in cell_items(row.get(column)):
                values[column, item].add(str(value))
    for place in places:
        says_little = fold_case(place[0]) in ORIGINS or is_record(place)
        if not says_little and 1 < len(values[place]) <= len(rows) / 3:
            n_values[place] = len(values[place])
    return min(n_values, key=n_values.get, default=None)


def text_lengths(columns: Columns) -> dict[tuple[str, str], int]:
    """Return how long the texts and numbers of each column are, in the first rows.

    The keys are a column and nothing, or a column with objects and the place of an item in
    brackets. A column of lists counts nothing, because a prompt can name only their items.
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
    """Return the texts and numbers of a cell, each after its place: "", or "[de]" in an object, or
    "[text][0]" if the object has lists.
    """
    items = [("", cell)]
    if isinstance(cell, dict):
        items = [(f"[{key}]", value) for key, value in cell.items() if can_name(key)]
    plain = []
    for place, value in items:
        if place and isinstance(value, list) and value:
            # SQuAD has {"text": ["Denver"], "answer_start": [177]}.
            plain.append((f"{place}[0]", value[0]))
        elif not isinstance(value, ChoicesCell):
            plain.append((place, value))
    return [(place, value) for place, value in plain if isinstance(value, str | int | float)]


def list_items(columns: Columns) -> list[tuple[str, str]]:
    """Return the places of the first items in the columns of lists of texts or numbers, such as the
    `labels` of rows that may have several labels.
    """
    found = []
    for row in columns.rows[:N_FIRST_ROWS]:
        for name, cell in row.items():
            is_list = isinstance(cell, list) and not isinstance(cell, ChoicesCell)
            is_usable = is_list and fold_case(name) not in (*CHOICE_LISTS, "rejected")
            if is_usable and cell and isinstance(cell[0], str | int | float):
                found.append((name, "[0]"))
    return list(dict.fromkeys(found))


def find_answer(places: Iterable[tuple[str, str]]) -> tuple[str, str] | None:
    """Return the first place whose name is one that answers have, or None."""
    names = {place: fold_case("".join(place)) for place in places}
    for answer_name in ANSWER_NAMES:
        for place, name in names.items():
            if name == answer_name:
                return place
    for word in ANSWER_WORDS:
        for place, name in names.items():
            if word in name and not is_record(place):
                return place
    # A label_id is the answer if nothing else is.
    for word in ANSWER_WORDS:
        for place, name in names.items():
            if word in name:
                return place
    return None
