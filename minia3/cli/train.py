"""train: what train.py does, wherever minia3 is installed."""

from minia3.training import command_line
from minia3.training.command_lines import COMMAND

TITLE = command_line.TITLE
EXAMPLE = "minia3 train --model t5-base --task rte"


def add_arguments(parser):
    command_line.add_arguments(parser)


def main(words):
    """Return the exit code of `minia3 train` with these flags."""
    command_line.answer_mistakes(words, COMMAND)
    # These import torch.
    from minia3.training.loop import load_loop
    from minia3.training.start import run_command_line

    return run_command_line(words, load_loop().run_grid, COMMAND)
