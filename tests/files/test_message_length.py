"""Whatever an error says, its message is one line of bounded length, and keeps both of its ends."""

from minia3.files.messages import MOST_CHARACTERS, message_of, shorten


def test_a_message_is_one_line():
    assert message_of(ValueError("found this,\n  expected\tthat")) == "found this, expected that"
    assert message_of(MemoryError()) == "MemoryError"


def test_a_message_of_thousands_of_characters_keeps_its_beginning_and_its_end():
    text = "the file: " + "x" * 9000 + ": what to do"
    message = message_of(ValueError(text))
    assert len(message) == MOST_CHARACTERS
    assert message.startswith("the file: xxx")
    assert message.endswith("xxx: what to do")
    assert shorten("x" * MOST_CHARACTERS) == "x" * MOST_CHARACTERS


def test_a_message_does_not_move_the_cursor():
    assert shorten("a\x1b[2Jb\x07") == "a?[2Jb?"
    assert shorten("Übermaß 中文") == "Übermaß 中文"
