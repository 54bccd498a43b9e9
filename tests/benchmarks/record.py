"""The JSON of a run of the table. It is written after every row, so that a run can be continued."""

import json
import time
from datetime import datetime

from minia3.files.write import replacing
from tests.benchmarks.machine import load_average
from tests.benchmarks.measure import Row

# A row was disturbed if, on average, more threads of other processes than this wanted a core,
MOST_BUSY = 0.5
# or if the roof was lower than this part of the best one of its run.
LEAST_ROOF = 0.9


class Record:
    """What a run has measured so far, and on what.

    about: what the JSON says about the run as a whole. Its `lines` are those that are complete.
    rows: title to Row.
    """

    def __init__(self, about, rows, path=None):
        self.about = about
        self.rows = rows
        self.path = path
        self.last_time = time.monotonic()

    def add(self, title, row):
        """Add a row. Of two with one title, the one stays beside which the machine was calmer."""
        old = self.rows.get(title)
        if old is None or self.is_calmer(row, old):
            self.rows[title] = row
        self.write()

    def complete(self, line):
        """Say that a line has all its rows."""
        if line not in self.about["lines"]:
            self.about["lines"].append(line)
        self.write()

    def has(self, line):
        """Whether a line has all its rows, and none of them was disturbed."""
        rows = [row for row in self.rows.values() if row.line == line]
        return line in self.about["lines"] and not any(map(self.is_disturbed, rows))

    def is_disturbed(self, row):
        """Whether other work kept the machine busy while a Row was measured."""
        if row.others_busy is not None and row.others_busy > MOST_BUSY:
            return True
        return row.peak_flops is not None and row.peak_flops < LEAST_ROOF * self.best_roof

    def is_calmer(self, row, other):
        """Whether other work kept the machine less busy beside a Row than beside another."""
        if self.is_disturbed(row) != self.is_disturbed(other):
            return self.is_disturbed(other)
        return (row.peak_flops or 0) > (other.peak_flops or 0)

    def write(self):
        now = time.monotonic()
        self.about["seconds"] += now - self.last_time
        self.last_time = now
        self.about["load"]["end"] = load_average()
        if self.path is None:
            return
        rows = {title: row.published() for title, row in self.rows.items()}
        with replacing(self.path) as temporary:
            temporary.write_text(json.dumps({**self.about, "rows": rows}, indent=2) + "\n")

    @property
    def best_roof(self):
        """The most FLOP/s that the roof reached beside any row, or None."""
        roofs = [row.peak_flops for row in self.rows.values() if row.peak_flops is not None]
        return max(roofs, default=None)


def read_record(path):
    """Return the Record in a file."""
    about = json.loads(path.read_text())
    rows = {title: Row.read(fields) for title, fields in about.pop("rows").items()}
    return Record(about, rows, path)


def begin_or_continue(settings, path=None):
    """Return the Record of a new run, or of the run in the file `path`, if there is one.

    settings: a dict that says what is measured and on what. Raise ValueError if those of the file
    are others, because its lines would not belong to the same table.
    """
    if path is None or not path.exists():
        load = load_average()
        begun = {
            "date": f"{datetime.now():%Y-%m-%d %H:%M}",
            "seconds": 0.0,
            "load": {"start": load, "end": load},
        }
        return Record({**begun, **settings, "lines": []}, {}, path)

    record = read_record(path)
    for name, value in settings.items():
        found = record.about.get(name)
        if found != value:
            raise ValueError(
                f"{path} was measured with {name} = {found}, and now it is {value}: give another "
                "file, or remove this one"
            )
    return record
