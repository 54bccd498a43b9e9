"""Read JSON: one value, or the rows of a file that holds a list of objects.

A .json file is read piece by piece, so it takes no more memory than the same rows in a .jsonl file.
"""

import codecs
import json
import re
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from typing import BinaryIO

from minia3.tasks.text_lines import MAX_ROW_BYTES, LineReader, explain_bytes, number_rows

CHUNK = 1 << 16  # bytes of a .json file that are read at a time
# So near to the end of a text, an error may come from a symbol that is cut short: true, \u00e9.
LONGEST_SYMBOL = 16
WHITE_SPACE = re.compile(r"[ \t\n\r]*")


def make_object(pairs: list[tuple]) -> dict:
    """Return the dict of a JSON object. Raise ValueError if it has a key twice.

    All rows share the texts of their keys, because a million copies of "input" would take 50 MB.
    """
    row = {sys.intern(name): value for name, value in pairs}
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {repeated!r:.40} occurs twice")
    return row


DECODER = json.JSONDecoder(object_pairs_hook=make_object)


def parse_json(text: str):
    """Return the value that a text spells. Raise ValueError if it spells none, or more."""
    try:
        value = DECODER.decode(text)
        check_characters(value, text)
    except (ValueError, RecursionError) as error:
        raise not_json(error, text) from None
    return value


def check_characters(value, text: str):
    """Raise ValueError if JSON spells half a surrogate pair ("\\ud83d"), which is not a character,
    and which no tokenizer accepts.
    """
    if "\\u" in text:  # it can be spelled in no other way, because `text` was read as UTF-8
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a surrogate without its pair is not a character") from None


def not_json(error: Exception, text: str) -> ValueError:
    reason = getattr(error, "msg", error)
    return ValueError(f"not JSON: {reason}: {text[:40]!r}")


def as_row(value) -> dict | ValueError:
    """Return a value if it is an object, and otherwise an error."""
    if isinstance(value, dict):
        return value
    return ValueError(f"expected a JSON object, found {json.dumps(value)[:40]!r}")


# Lines


def read_json_lines(file: BinaryIO) -> Iterator[tuple[int, dict | ValueError]]:
    """Yield (line number, row or error) for each line of a .jsonl file."""
    lines = LineReader(file)
    yield from number_rows(lines, iter(lines), parse_line)


def parse_line(line: str) -> dict | None:
    """Return a row, or None if there is nothing in the line."""
    if not line.strip():
        return None
    row = as_row(parse_json(line))
    if isinstance(row, ValueError):
        raise ValueError(f"{row}; a file with a list of objects is named .json")
    return row


# A list in one file


class JsonText:
    """The text of a JSON file. Only the part that is being read is in memory."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.is_first = True
        self.text = ""
        self.position = 0  # in `text`

    @property
    def n_left(self) -> int:
        return len(self.text) - self.position

    def read_more(self) -> bool:
        """Read as much as is left, and at least a chunk. Return whether there was more."""
        # Twice as much each time, so a long value is not parsed again and again.
        content = self.file.read(max(CHUNK, self.n_left))
        try:
            more = self.decoder.decode(content, final=not content)
        except UnicodeDecodeError as error:
            # The decoder may have kept some bytes of the chunk before.
            message = explain_bytes(error.object, self.is_first, error)
            raise ValueError(message) from None
        self.is_first = False
        self.text = self.text[self.position :] + more
        self.position = 0
        return bool(content)

    def peek(self) -> str:
        """Return the next character that is not white space, or "" at the end of the file."""
        while True:
            self.position = WHITE_SPACE.match(self.text, self.position).end()
            if self.n_left:
                return self.text[self.position]
            if not self.read_more():
                return ""

    def take(self, character: str) -> bool:
        """Return whether this character comes next. If it does, move on."""
        is_next = self.peek() == character
        if is_next:
            self.position += 1
        return is_next

    def expect(self, character: str):
        if not self.take(character):
            raise ValueError(f"not JSON: expected {character!r}, found {self.show()}")

    def show(self) -> str:
        """Return the beginning of what comes next, for a message."""
        if not self.peek():
            return "the end of the file"
        return repr(self.text[self.position : self.position + 40])

    def value(self):
        """Return the next value, and move on. Raise ValueError if there is none."""
        if not self.peek():
            raise ValueError("not JSON: the file ends before the list does")
        while True:
            is_too_long = self.n_left > MAX_ROW_BYTES
            try:
                value, end = DECODER.raw_decode(self.text, self.position)
            except (ValueError, RecursionError) as error:
                if is_unfinished(error, self.text):
                    if is_too_long:
                        raise ValueError(f"a row of more than {MAX_ROW_BYTES} bytes") from None
                    if self.read_more():
                        continue
                raise not_json(error, self.text[self.position :]) from None
            n_characters = end - self.position
            # A value near the end of the text may continue, as the number 1 of 12 or 1e-7 does.
            if self.n_left - n_characters <= len("e-") and self.read_more():
                continue
            start = self.position  # which `read_more` changes
            self.position += n_characters
            check_characters(value, self.text[start : self.position])
            return value


def is_unfinished(error: Exception, text: str) -> bool:
    """Return whether more text could mend an error, because the text ends within a value."""
    if not isinstance(error, json.JSONDecodeError):
        return False  # a key occurs twice, or a value is too deep or has too many digits
    is_open = error.msg.startswith("Unterminated string")  # its position is where the string begins
    return is_open or error.pos > len(text) - LONGEST_SYMBOL


def read_json_rows(file: BinaryIO) -> Iterator[tuple[int, dict | ValueError]]:
    """Yield (number of the row, dict or ValueError) for a list of objects, or for the list of
    objects in an object. If something is not JSON, it is the last row.

    Raise ValueError if the file has no such list.
    """
    number = 0
    try:
        for value in values_of_file(JsonText(file)):
            number += 1
            yield number, as_row(value)
    except ValueError as error:
        if number == 0:
            raise
        yield number + 1, error


def values_of_file(text: JsonText) -> Iterator:
    """Yield the values of the list in a file. Raise ValueError if something else is in it."""
    if text.take("["):
        yield from values_of_list(text)
    elif text.take("{"):
        yield from values_of_object(text)
    else:
        raise ValueError(f"expected a list of objects, found {text.show()}")
    if text.peek():
        raise ValueError(f"not JSON: expected the end of the file, found {text.show()}")


def values_of_list(text: JsonText) -> Iterator:
    """Yield the values of a list whose bracket was taken."""
    if text.take("]"):
        return
    yield text.value()
    while not text.take("]"):
        text.expect(",")
        yield text.value()


def values_of_object(text: JsonText) -> Iterator:
    """Yield the values of the list of objects in an object whose brace was taken."""
    names = []
    list_name = None
    is_over = text.take("}")
    while not is_over:
        name = text.value()
        if not isinstance(name, str):
            raise ValueError(f"not JSON: expected a text, found {name!r:.40}")
        names.append(name)
        text.expect(":")
        if not text.take("["):
            text.value()
        elif text.peek() != "{":
            for _ in values_of_list(text):
                pass  # a list of something else
        elif list_name is None:
            list_name = name
            yield from rows_of_list(values_of_list(text), name)
        else:
            raise ValueError(
                f"two lists of objects, {list_name!r:.40} and {name!r:.40}: keep one of them, or "
                "give a folder with a file for each split"
            )
        is_over = text.take("}")
        if not is_over:
            text.expect(",")
    if list_name is None and text.peek() == "{":
        raise ValueError(
            "several objects, each in several lines: write each into a line of a .jsonl file, as "
            "`jq -c . OLD > NEW` does"
        )
    if list_name is None:
        raise ValueError(
            "expected a list of objects, or an object with such a list; "
            f"found an object with {', '.join(map(repr, names)) or 'nothing':.80} "
            "(pandas writes such a list with orient='records')"
        )


def rows_of_list(values: Iterable, name: str) -> Iterator:
    """Yield the values. Raise ValueError if they are the messages of a single conversation.

    name: of the list.
    """
    for number, value in enumerate(values):
        if number == 0 and is_message(value):
            raise ValueError(
                f"{name!r:.40} is a conversation, not a list of rows: write [ before the object "
                "and ] after it, or put it into a line of a .jsonl file"
            )
        yield value


def is_message(value: dict) -> bool:
    """Return whether an object is a message of a conversation, in either form (messages.py).

    An object that has something else, too, may be a row.
    """
    return set(value) in ({"role", "content"}, {"from", "value"})


def is_json_lines(file: BinaryIO) -> bool:
    """Return whether a file holds an object on each line, as a .jsonl file does.

    Only the first two lines are read, without blank ones. The reader of one object and the reader
    of lines would take the first line of such a file in different ways. A single line is a row
    unless its object holds rows, or has nothing but lists, which may be columns.
    """
    all_lines = iter(partial(file.readline, MAX_ROW_BYTES), b"")
    lines = filter(None, map(without_space, all_lines))
    first = next(lines, b"")
    second = next(lines, b"")
    is_single = not second
    if not first.startswith(b"{") or not (is_single or second.startswith(b"{")):
        return False
    try:
        row = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return not is_single or may_be_row(row)


def without_space(line: bytes) -> bytes:
    return line.removeprefix(codecs.BOM_UTF8).strip()


def may_be_row(value: dict) -> bool:
    lists = [entry for entry in value.values() if isinstance(entry, list)]
    holds_rows = any(not entry or isinstance(entry[0], dict) for entry in lists)
    return len(lists) < len(value) and not holds_rows and not are_columns(value)


def are_columns(value: dict) -> bool:
    """Return whether an object has columns by the numbers of rows: {"text": {"0": "a", "1": "b"}}.
    This is what pandas writes if it is not asked for anything else. Or it has rows by their
    numbers: {"0": {"text": "a"}, "1": {"text": "b"}}.
    """
    if not all(isinstance(entry, dict) for entry in value.values()):
        return False
    return all(map(are_numbers, value.values())) or are_numbers(value)


def are_numbers(names: Iterable[str]) -> bool:
    return all(map(str.isdigit, names))
