"""python -m tests.benchmarks: minia3 against transformers and peft, every pair in alternation, as JSON and as a table.

python -m tests.benchmarks --json bench.json              all lines; about half an hour on two cores
python -m tests.benchmarks --only steps,kept
python -m tests.benchmarks --quick                        every line once on tiny models: does it work
"""

import argparse
import json
import platform
import tempfile
from pathlib import Path

import torch

from tests.benchmarks.lines import LINES, Bench
from tests.benchmarks.measure import peak_flops
from tests.benchmarks.pairs import Pair


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help="tiny models, one round")
    parser.add_argument("--only", help=f"some of {','.join(LINES)}")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each pair (default: 7)")
    parser.add_argument("--threads", type=int, help="of torch (default: torch's own choice)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--json", type=Path, help="file for the result")
    args = parser.parse_args(argv)
    import peft
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    machine = {
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft)},
        "dtype": args.dtype,
        "peak_flops": peak_flops(dtype, 256 if args.quick else 4096),
    }
    print(", ".join(f"{name}: {value}" for name, value in machine.items()), flush=True)
    print("\n| line | ours | theirs | theirs / ours | middle half |\n|---|---|---|---|---|", flush=True)
    rows = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        pairs = [Pair(kind, folder, args.quick, dtype) for kind in ("t5", "llama")]
        bench = Bench(*pairs, folder, args.quick, 1 if args.quick else args.rounds)
        for name in args.only.split(",") if args.only else LINES:
            for line, row in LINES[name](bench):
                rows[line] = row
                print(table_row(line, row), flush=True)
    if args.json:
        args.json.write_text(json.dumps(machine | {"rows": rows}, indent=2) + "\n")


def table_row(line, row):
    if row["unit"] == "B":
        ours, theirs = (f"{row[side] / 1e6:,.0f} MB" for side in ("ours", "theirs"))
    else:
        ours, theirs = (f"{row[side] * 1e3:,.3g} ms" for side in ("ours", "theirs"))
    spread = "{:.2f} to {:.2f}".format(*row["spread"]) if "spread" in row else ""
    return f"| {line} | {ours} | {theirs} | {row['ratio']:.2f} | {spread} |"


if __name__ == "__main__":
    main()
