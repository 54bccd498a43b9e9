"""Runs in several processes, which torchrun starts.

Starting them takes seconds, so `run_together` does several runs in the same processes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def command(n_processes, *arguments):
    """Return the command line that starts a script, or `-m` a module, in several processes."""
    return [*TORCHRUN, str(n_processes), *map(str, arguments)]


def environment(**variables):
    """Return the environment of such processes: one thread each, and nothing of a GPU."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}


def start(n_processes, *arguments, **options):
    """Start a script in several processes, and return torchrun's process."""
    return subprocess.Popen(
        command(n_processes, *arguments),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def call(n_processes, *arguments, **options):
    """Call a script in several processes, and return (exit code of torchrun, stdout, stderr)."""
    process = start(n_processes, *arguments, **options)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def run_together(n_processes, command_lines, folder):
    """Run train.py with several command lines, one after the other, in the same processes."""
    file = folder / f"runs-{n_processes}.json"
    file.write_text(json.dumps([[str(word) for word in words] for words in command_lines]))
    code, out, err = call(n_processes, __file__, file)
    assert code == 0, err
    return out, err


if __name__ == "__main__":  # torchrun has started this file
    sys.path.insert(0, str(ROOT))
    import train
    from minia3.files.processes import leave
    from minia3.training.command_line import read_command_line
    from minia3.training.command_lines import SCRIPT
    from minia3.training.start import run_config

    # Not `train.main`, at whose end the processes leave each other.
    for words in json.loads(Path(sys.argv[1]).read_text()):
        run_config(read_command_line(words, SCRIPT), train.run_grid, SCRIPT, is_program=True)
    sys.exit(leave())
