"""Find the home folder of a path that begins with ~."""

import os


def expand_home(value):
    """Return a path, or several in a tuple, with the home folder in place of a first ~.

    A shell expands `--out ~/x`, but neither `--out=~/x` nor the second path of `~/a,~/b`, and no
    shell reads the paths of Python and of files. Whatever is not such a path stays as it is.
    """
    if isinstance(value, tuple):
        return tuple(map(expand_home, value))
    if isinstance(value, str | os.PathLike):
        first, *_ = os.fspath(value).split("/")
        if first == "~":
            return os.path.expanduser(value)
    return value
