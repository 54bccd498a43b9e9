"""Guards minia3/checkpoints/protobuf.py: messages are read by fields, and damage is refused."""

from dataclasses import dataclass

import pytest
from small_tokenizers import field, varint

from minia3.checkpoints.protobuf import numbered, parse_message, read_fields, read_varint


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (0, b"\x00"),
        (127, b"\x7f"),
        (128, b"\x80\x01"),
        (150, b"\x96\x01"),  # the documentation's example
        (2**64 - 1, b"\xff" * 9 + b"\x01"),
    ],
)
def test_a_varint_is_read_with_the_position_after_it(value, encoded):
    assert read_varint(encoded, 0) == (value, len(encoded))
    assert read_varint(b"xx" + encoded + b"\x05", 2) == (value, 2 + len(encoded))


@pytest.mark.parametrize("encoded", [b"", b"\x80", b"\x96\x96", b"\xff" * 10 + b"\x01"])
def test_a_varint_that_does_not_end_is_refused(encoded):
    with pytest.raises(ValueError, match=r"^damaged or cut short: a number does not end$"):
        read_varint(encoded, 0)


def test_fields_of_all_wire_types_are_read_in_order():
    fixed64 = varint(4 << 3 | 1) + b"8 bytes."
    data = field(1, 150) + field(2, b"testing") + field(16, 1.5) + fixed64 + field(1, 3)
    expected = [(1, 150), (2, b"testing"), (16, b"\0\0\xc0\x3f"), (4, b"8 bytes."), (1, 3)]
    assert list(read_fields(data)) == expected
    assert list(read_fields(b"")) == []


@pytest.mark.parametrize("last", [field(2, b"testing"), field(16, 1.5), field(1, 150)])
def test_a_message_that_is_cut_inside_a_field_is_refused(last):
    whole = field(3, b"x")
    for n in range(1, len(last)):
        with pytest.raises(ValueError, match="cut short"):
            list(read_fields(whole + last[:n]))


@pytest.mark.parametrize(
    "wire_type", [3, 4, 6, 7]
)  # 3 and 4 are groups, which nobody uses any more
def test_another_wire_type_is_refused(wire_type):
    with pytest.raises(ValueError, match=f"wire type {wire_type}, expected 0, 1, 2 or 5"):
        list(read_fields(bytes([1 << 3 | wire_type]) + bytes(9)))


@dataclass
class Message:
    name: bytes = numbered(2)
    count: int = numbered(41, -1)


def test_a_message_has_defaults_skips_other_fields_and_takes_the_last_of_two():
    assert parse_message(Message, field(2, b"a")) == Message(b"a", -1)
    data = field(41, 7) + field(2, b"a") + field(9, b"other") + field(41, 8)
    assert parse_message(Message, data) == Message(b"a", 8)
    with pytest.raises(TypeError, match="name"):
        parse_message(Message, field(41, 7))
