"""Train, describe, run, merge and convert models and adapters, and compare runs."""

import argparse
import difflib
import sys
import warnings

from minia3 import __version__
from minia3.cli import (
    convert,
    generate,
    info,
    merge,
    mix,
    plot,
    predict,
    study,
    table,
    torchrun,
    train,
)
from minia3.cli.terminal import show
from minia3.files.messages import message_of
from minia3.files.processes import (
    computing_together,
    has_first_word,
    is_alone_or_first,
    is_first,
    join,
    leave,
)
from minia3.files.program import was_interrupted
from minia3.files.streams import print_error, print_last, use_utf8
from minia3.training.flags import Parser

COMMANDS = {
    "train": train,
    "info": info,
    "generate": generate,
    "predict": predict,
    "merge": merge,
    "convert": convert,
    "mix": mix,
    "study": study,
    "table": table,
    "plot": plot,
    "torchrun": torchrun,
}

DIVIDED = ("generate", "predict")  # what several processes do together; other commands need one

# PyTorch's errors about memory are RuntimeErrors.
EXPECTED_ERRORS = (ValueError, OSError, MemoryError, RuntimeError)
USER_ERRORS = (  # what a user can correct; the other errors are failures of disk, memory or network
    ValueError,
    FileExistsError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)


def main(argv=None):
    """Return the exit code: 0, 2 for a user's mistake, 1 for a failure, 130 for Ctrl-C."""
    use_utf8()
    words = sys.argv[1:] if argv is None else argv
    try:
        try:
            if words and words[0] == "train":
                return train.main(words[1:], is_program=argv is None)  # with its own exit codes
            if not takes_part(words):
                return 0
            with warnings.catch_warnings(), computing_together():
                warnings.showwarning = print_warning
                args = parse(words)
                code = args.run(args) or 0  # only torchrun returns one: that of its processes
        finally:
            show(end="")  # --help leaves text in the buffer: fail here rather than as Python exits
        return leave(code)
    except (KeyboardInterrupt, Exception) as error:
        if isinstance(error, KeyboardInterrupt) or was_interrupted():
            has_first_word(130)
            return leave(130)
        if not isinstance(error, EXPECTED_ERRORS):
            raise
        code = 2 if isinstance(error, USER_ERRORS) else 1
        if has_first_word(code):
            print_last(f"minia3: {message_of(error)}")
        return leave(code)


def takes_part(words):
    """Return whether this process has something to do. It is one of several if torchrun says so."""
    if words and words[0] in DIVIDED:
        join()
        return True
    return is_alone_or_first()


def parse(words):
    """Return the arguments, with the name of the `command` and its function `run`.

    Without words, print the help. Raise ValueError if the words are not a valid command line.
    """
    parser = make_parser(Parser, "minia3", __doc__, "minia3 info t5-base")
    parser.add_argument("--version", action="version", version=f"minia3 {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    parsers = {}
    for name, command in COMMANDS.items():
        parsers[name] = make_parser(
            subparsers.add_parser, name, command.TITLE, command.EXAMPLE, help=command.TITLE
        )
        parsers[name].set_defaults(command=name, run=getattr(command, "run", None))
        command.add_arguments(parsers[name])
    if not words:
        return parser.parse_args(["--help"])
    if words[0] in parsers:
        # Only a parser without commands can mix prompts and flags in any order.
        if words[0] == "torchrun" and words[1:] != ["--help"]:
            return parsers["torchrun"].parse_args(["--", *words[1:]])  # torchrun's flags
        return parsers[words[0]].parse_words(words[1:])
    if not words[0].startswith("-"):
        parser.error(f"there is no command {words[0]!r}{nearest_command(words[0])}")
    return parser.parse_args(words)


def nearest_command(word):
    """Return the command that is meant, or all there are."""
    similar = difflib.get_close_matches(word, COMMANDS, n=1)
    if similar:
        return f": did you mean {similar[0]}?"
    return f", expected one of {', '.join(COMMANDS)}"


def make_parser(create, name, description, example, **options):
    return create(
        name,
        description=description,
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        **options,
    )


def print_warning(message, *_):
    from tqdm import tqdm

    if is_first():
        with tqdm.external_write_mode(file=sys.stderr):  # where a progress bar may be
            print_error(f"minia3: {message}")
