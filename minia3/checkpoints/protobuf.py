"""Decode messages of protocol buffers (https://protobuf.dev/programming-guides/encoding).

sentencepiece stores its models in this format, and we need only four dataclasses of known fields.
The package protobuf would be one more dependency, with generated code.

A message is a sequence of fields. Each field begins with a key: the number of the field in the
.proto file times 8, plus the wire type, which says how the value is stored:

    0  a varint
    1  8 bytes
    2  a varint, and as many bytes as it says (a text, or a message inside the message)
    5  4 bytes

A varint is an integer in groups of 7 bits, the lowest group first. The high bit of each byte says
whether another byte follows.
"""

import dataclasses
import functools

VARINT = 0
LENGTH_PREFIXED = 2
FIXED_LENGTHS = {1: 8, 5: 4}  # wire type -> bytes
MAX_VARINT_BYTES = 10  # enough for 64 bits


def numbered(number, default=dataclasses.MISSING):
    """Return a dataclass field with its number and default in the .proto file."""
    return dataclasses.field(default=default, metadata={"number": number})


def parse_message(kind, data):
    """Return the message in `data` as an instance of `kind`, a dataclass of `numbered` fields.

    Fields with other numbers are skipped. If a field occurs twice, the last value counts.
    """
    names = names_by_number(kind)
    values = {}
    for number, value in read_fields(data):
        if number in names:
            values[names[number]] = value
    return kind(**values)


@functools.cache
def names_by_number(kind):
    return {field.metadata["number"]: field.name for field in dataclasses.fields(kind)}


def read_fields(data):
    """Yield (number, value) for each field of a message: an int for a varint, else bytes.

    Raise ValueError if the message is damaged or cut short.
    """
    position = 0
    while position < len(data):
        key, position = read_varint(data, position)
        number, wire_type = divmod(key, 8)
        if wire_type == VARINT:
            value, position = read_varint(data, position)
            yield number, value
            continue
        if wire_type == LENGTH_PREFIXED:
            length, position = read_varint(data, position)
        elif wire_type in FIXED_LENGTHS:
            length = FIXED_LENGTHS[wire_type]
        else:
            raise ValueError(
                f"damaged: a field of the wire type {wire_type}, expected 0, 1, 2 or 5"
            )
        end = position + length
        if end > len(data):
            raise ValueError("damaged or cut short: a field is longer than the rest of the file")
        yield number, data[position:end]
        position = end


def read_varint(data, start):
    """Return the integer that begins at `start`, and the position after it.

    Raise ValueError if the integer does not end.
    """
    value = 0
    for n_read, byte in enumerate(data[start : start + MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << (7 * n_read)
        is_last = byte < 0x80
        if is_last:
            return value, start + n_read + 1
    raise ValueError("damaged or cut short: a number does not end")
