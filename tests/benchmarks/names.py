"""Names on a command line: one that does not exist is refused before anything slow begins."""

import argparse


def some_of(known):
    """Return a function that reads comma-separated names into a list, for argparse."""

    def names(text):
        found = text.split(",")
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(
                    f"{name!r} is unknown, expected some of {', '.join(known)}"
                )
        return found

    return names
