"""metrics.jsonl in the folder of a run: a line per event. No torch is needed."""

import json
import os

from minia3.files.read import reading
from minia3.files.write import naming_file, replacing


class Metrics:
    """The metrics.jsonl of a run that writes it. Without a folder, nothing is written.

    n_bytes: how much of the file counts. What follows was written after the last checkpoint, by a
        run that was killed.
    reopened: the text to put in its place, from the last checkpoint, or None.
    """

    def __init__(self, folder, n_bytes=0, reopened=None):
        self.path = folder / "metrics.jsonl" if folder else None
        self.n_bytes = n_bytes
        self.reopened = reopened

    def cut(self):
        """Remove what does not count, and put the reopened text in its place, if there is one."""
        if self.path is None:
            return
        if self.reopened is not None:
            with replacing(self.path) as temporary:
                temporary.write_bytes(self.reopened.encode())
            self.reopened = None
        elif self.path.exists():
            os.truncate(self.path, min(self.n_bytes, self.path.stat().st_size))

    def write(self, **values):
        """Add a line."""
        if self.path is None:
            return
        # Closed after each line, so that others can read it, and a kill does not lose it.
        with naming_file(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        self.n_bytes = self.path.stat().st_size

    def sync(self):
        """Wait until the lines are on the disk.

        A checkpoint says how many bytes of them count, and must still be right after a power
        failure.
        """
        if self.path is None:
            return
        with self.path.open("ab") as file:  # Windows syncs only what may be written
            os.fsync(file.fileno())

    def reopen(self):
        """Turn the final lines into lines of the event "extended".

        A line that says why a cell failed is left out, because the run will write it again. The
        file stays as it was until `cut`. The checkpoint comes first, because until it is written
        the run is finished, and its results must be there. Raise ValueError if the file is missing
        or damaged.
        """
        lines = []
        with reading(self.path):
            text = self.reopened  # of a call that was killed before the run had read its data
            if text is None:
                text = self.path.read_bytes()[: self.n_bytes].decode()
            for text_line in text.splitlines():
                line = json.loads(text_line)
                if line["event"] == "final":
                    line["event"] = "extended"
                if line["event"] != "failed":
                    lines.append(json.dumps(line) + "\n")
        self.reopened = "".join(lines)
        self.n_bytes = len(self.reopened.encode())


def read_metrics(path):
    """Return the lines of metrics.jsonl. The last one is left out if it is not complete."""
    if not path.exists():
        return []
    complete_text, _, _ = path.read_text("utf-8").rpartition("\n")
    lines = []
    for number, text in enumerate(complete_text.splitlines(), 1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path.name}, line {number}: {error.msg}") from None
        if not isinstance(line, dict):
            found = type(line).__name__
            raise ValueError(f"{path.name}, line {number}: expected a JSON object, found {found}")
        lines.append(line)
    return lines
