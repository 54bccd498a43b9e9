"""The pages that a visitor reads, and the fenced blocks in them.

The word after ```sh says what a block of commands is:

    ```sh               runs on the embedded model; a test runs it
    ```sh ci            the two commands of the README; .ci/run runs them
    ```sh fails         its last command fails with the message in the ```text block below it
    ```text prints      the commands of the block above it print these lines, among others
    ```sh needs=NEED    needs what a test does not have (NEEDS); its flags and names are checked

A test executes ```python blocks, except for ```python excerpt=FILE, which quotes lines of a file.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "data" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
NEEDS = {
    "network": "downloads something",
    "no-network": "shows what happens without a network",
    "gpu": "needs a GPU",
    "time": "takes minutes or hours",
    "weights": "needs published weights",
    "data": "needs the data sets that MINIA3_TEST_DATA names",
    "files": "needs a file that the reader brings",
}

FENCE = re.compile(r"^```(\w*) ?(.*)\n((?:.*\n)*?)```$", re.MULTILINE)


@dataclass
class Block:
    page: Path
    language: str
    mark: str
    text: str

    @property
    def commands(self):
        """The lines, with continued lines joined, without comments and empty lines."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line for line in lines if line.split("#")[0].strip()]


def blocks_of(page, language=None):
    """Return the fenced blocks of a page, in order: all of them, or those in one language."""
    found = [Block(page, *match) for match in FENCE.findall(page.read_text(encoding="utf-8"))]
    return [block for block in found if language in (None, block.language)]


def simple_commands(block):
    """Return each command of a block as words, with loops unrolled once and variables filled in.

    `for s in 0 1 2; do A --seed $s; done` gives A --seed 0. The variable $GGUF, whose value is the
    output of a command, becomes the name of a file that need not exist.
    """
    variables = {"GGUF": "weights.gguf"}
    found = []
    for line in block.commands:
        if line.startswith("GGUF="):
            continue
        for words in split_line(line):
            if words[0] == "do":
                words = words[1:]
            if not words or words[0] == "done":
                continue
            if words[0] == "for":
                variables[words[1]] = words[3]
            else:
                found.append([fill_in(word, variables) for word in words])
    return found


def split_line(line):
    """Return the commands of a line, separated by ; or &&, as words."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&")
    lexer.whitespace_split = True
    commands = [[]]
    for word in lexer:
        if word in (";", "&&"):
            commands.append([])
        else:
            commands[-1].append(word)
    return [words for words in commands if words]


def fill_in(word, variables):
    """Replace the variables in a word."""
    for name, value in variables.items():
        word = word.replace(f"${name}", value)
    return word


def headings(page):
    """Return the anchors of a page, as GitHub makes them: lower case, dashes, no punctuation."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
