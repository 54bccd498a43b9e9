"""train: what train.py does, wherever minia3 is installed."""

from minia3.files.processes import has_several_processes
from minia3.files.streams import print_error
from minia3.training import command_line
from minia3.training.shown_commands import COMMAND

TITLE = command_line.TITLE
EXAMPLE = "minia3 train --model t5-base --task rte"


def add_arguments(parser):
    command_line.add_arguments(parser)


def main(words, is_program=False):
    """Return the exit code of `minia3 train` with these flags. is_program: see train.py."""
    try:
        if not has_several_processes():
            # Find mistakes before torch is imported.
            command_line.read_command_line(words, COMMAND)
        from minia3.training.loop import load_loop
        from minia3.training.start import run_command_line

        loop = load_loop()
    except ValueError as error:
        print_error(command_line.error_line(COMMAND, error))
        return 2
    return run_command_line(words, loop.run_grid, COMMAND, is_program)
