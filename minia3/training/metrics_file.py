"""metrics.jsonl in the folder of a run: a line per event. No torch is needed."""

import json
import os

from minia3.files.read import reading
from minia3.files.write import naming_file, replacing


class Metrics:
    """The metrics.jsonl of a run that writes it. Without a folder, nothing is written.

    n_bytes: how much of the file counts. What follows was written after the last checkpoint, by a
        run that was killed.
    """

    def __init__(self, folder, n_bytes=0):
        self.path = folder / "metrics.jsonl" if folder else None
        self.n_bytes = n_bytes

    def cut(self):
        """Remove what does not count."""
        if self.path is not None and self.path.exists():
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

        A line that says why a cell failed is left out, because the run will write it again. Raise
        ValueError if the file is missing or damaged.
        """
        lines = []
        with reading(self.path):
            content = self.path.read_bytes()
            # If not, a killed call of this function has written the file.
            if content[: self.n_bytes].endswith(b"\n"):
                content = content[: self.n_bytes]
            for text in content.decode().splitlines():
                line = json.loads(text)
                if line["event"] == "final":
                    line["event"] = "extended"
                if line["event"] != "failed":
                    lines.append(json.dumps(line) + "\n")
        with replacing(self.path) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")
        self.n_bytes = self.path.stat().st_size


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
