"""How much memory the rows of a task take, in each format: the peak of a process that loads them.

python -m tests.benchmarks.rows                 a million rows, three minutes
python -m tests.benchmarks.rows --rows 1000     does every line work?

A row has a text of about a hundred characters and a label in words. The process has loaded
everything that it takes to load a task, but not torch. The peak is the kernel's figure (Linux).
"""

import argparse
import csv
import gzip
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

LOAD = """
import re, sys, time
from pathlib import Path
from minia3.tasks.splits import load_task
began = time.perf_counter()
task = load_task(sys.argv[1])
n_rows = len(task.train) + len(task.validation) + len(task.test)
# Not getrusage, whose peak includes that of the process that started this one.
kilobytes = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]
print(n_rows, int(kilobytes) // 1000, round(time.perf_counter() - began))
"""
WORDS = [f"word{n}" for n in range(5000)]


def make_rows(n_rows):
    """Yield rows, the same at every call."""
    rng = random.Random(0)
    for _ in range(n_rows):
        text = " ".join(rng.choices(WORDS, k=12))
        yield {"text": text, "label": rng.choice(["negative", "positive"])}


def write_csv(path, n_rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(make_rows(n_rows))


def write_jsonl(path, n_rows):
    with path.open("w") as file:
        for row in make_rows(n_rows):
            file.write(json.dumps(row) + "\n")


def write_gzip(path, n_rows):
    with gzip.open(path, "wt", compresslevel=1) as file:
        for row in make_rows(n_rows):
            file.write(json.dumps(row) + "\n")


def write_json(path, n_rows):
    path.write_text(json.dumps(list(make_rows(n_rows))))


def write_parquet(path, n_rows):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(list(make_rows(n_rows))), path)


FORMATS = {
    "rows.csv": write_csv,
    "rows.jsonl": write_jsonl,
    "rows.jsonl.gz": write_gzip,
    "rows.json": write_json,
    "rows.parquet": write_parquet,
}


def measure(path):
    """Return the rows, the peak in MB and the seconds of a process that loads a file."""
    command = [sys.executable, "-c", LOAD, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows (default: %(default)s)")
    n_rows = parser.parse_args(arguments).rows
    print(f"{'file':15}{'on disk':>10}{'peak':>10}{'time':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for name, write in FORMATS.items():
            path = Path(folder, name)
            write(path, n_rows)
            n_loaded, peak, n_seconds = measure(path)
            assert n_loaded == n_rows
            n_megabytes = path.stat().st_size // 1_000_000
            print(f"{name:15}{n_megabytes:>7} MB{peak:>7} MB{n_seconds:>6} s", flush=True)
            path.unlink()


if __name__ == "__main__":
    main()
