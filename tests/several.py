"""Runs in several processes, which torchrun starts.

Starting them takes seconds, so `run_together` does several runs in the same processes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = ("-m", "torch.distributed.run")
OURS = ("-m", "minia3", "torchrun")  # which ends as the processes do
SECONDS = 120  # that a run of these tests may take


def start(n_processes, *arguments, torchrun=OURS, cwd=ROOT, machines=("--standalone",)):
    """Start a script, or `-m` a module, in several processes, and return torchrun's process.

    machines: flags of torchrun that say which machines there are, and which one this is.
    """
    count = [*map(str, machines), "--nproc-per-node", str(n_processes)]
    return subprocess.Popen(
        [sys.executable, *torchrun, *count, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """Wait for the end, and return (exit code, what was printed, errors)."""
    out, err = process.communicate(timeout=SECONDS)
    return process.returncode, out, err


def call(n_processes, *arguments, **options):
    return finish(start(n_processes, *arguments, **options))


def wait_for(process, text):
    """Read what the run prints until a line has the text."""
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"{text!r} was not printed: {process.stderr.read()}")


def process_of_rank(process, rank):
    """Return the number that the system gives to the process with this rank (Linux only)."""
    pid = process.pid
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
            return int(child)
    raise AssertionError(f"there is no process of rank {rank}")


def run_together(n_processes, command_lines, folder):
    """Run train.py with several command lines, one after the other, in the same processes."""
    file = folder / f"runs-{n_processes}.json"
    file.write_text(json.dumps([[str(word) for word in words] for words in command_lines]))
    code, out, err = call(n_processes, __file__, file)
    assert (code, err) == (0, ""), err
    return out


if __name__ == "__main__":  # torchrun has started this file
    sys.path.insert(0, str(ROOT))
    import train

    for words in json.loads(Path(sys.argv[1]).read_text()):
        exit_code = train.main(words)
        if exit_code:
            sys.exit(exit_code)
