"""What a program prints: counts in words, and errors as one line of bounded length.

Some errors quote a whole file, name thousands of tensors, or hold several lines. Programs print
errors through `message_of`, so a message is bounded here, once, and not wherever one is made.
"""

MOST_CHARACTERS = 1000


def message_of(error):
    """Return the message of an exception as one line, or its type if the message is empty."""
    words = " ".join(str(error).split())
    return shorten(words) or type(error).__name__


def plural(n, noun):
    """Return a noun as it stands after a number: "row" after 1, and "rows" after all others."""
    return noun if n == 1 else f"{noun}s"


def part_of(n, n_all, noun):
    """Return a part in words: "3 of 5 rows", or "the only row"."""
    return f"the only {noun}" if n_all == 1 else f"{n} of {n_all} {noun}s"


def shorten(text, most=MOST_CHARACTERS):
    """Return a text of at most `most` characters. A longer one loses its middle.

    A message begins with what was found and ends with what to do, so both ends must stay.
    """
    printable = "".join(map(visible, text))
    if len(printable) <= most:
        return printable
    dots = " ... "
    n_head = (most - len(dots)) * 2 // 3
    n_tail = most - len(dots) - n_head
    return printable[:n_head] + dots + printable[-n_tail:]


def visible(character):
    """Return a character, or "?" in place of one that would move the cursor or color the line."""
    return character if character.isprintable() else "?"
