"""python -m tests.benchmarks: minia3 against transformers and peft, every pair in alternation, as JSON and as a table.

python -m tests.benchmarks --json bench.json              all lines; about an hour on one core (--threads 1)
python -m tests.benchmarks --only steps,kept
python -m tests.benchmarks --device cuda --models t5-large,t0-3b,llama-3.2-1b,llama-2-7b
python -m tests.benchmarks --quick                        every line once on tiny models: does it work

Training: 8 sources of 128 tokens, or of lengths like RTE's, with targets of 8. Generation: 32 tokens after 128.
The last column is our FLOP/s as a part of what a 4096 x 4096 x 4096 matrix product reaches in the same rounds; for
generation it is our time and theirs, over that of the same matrix products alone.
"""

import argparse
import json
import platform
import tempfile
from pathlib import Path

import torch

from minia3.checkpoints.known_models import known_models
from tests.benchmarks.lines import GOALS, LINES
from tests.benchmarks.measure import Bench, Roof
from tests.benchmarks.pairs import Pair

HEAD = """
| line | ours | theirs | theirs / ours (middle half of the rounds) | goal | of the roof |
|---|---|---|---|---|---|"""


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help="tiny models, one round")
    parser.add_argument(
        "--models", default="t5-base,smollm2-135m", help=f"some of {', '.join(known_models())}"
    )
    parser.add_argument("--only", help=f"some of {','.join(LINES)}")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each pair (default: 7)")
    parser.add_argument("--threads", type=int, help="of torch (default: torch's own choice)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, help="file for the result")
    args = parser.parse_args(argv)
    import peft
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    result = {
        "machine": machine(args.device),
        "device": args.device,
        "threads": torch.get_num_threads(),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft)},
        "dtype": args.dtype,
        "rows": {},
    }
    print(", ".join(f"{name}: {value}" for name, value in result.items() if value), flush=True)
    print(HEAD, flush=True)
    bench = Bench(
        args.quick,
        1 if args.quick else args.rounds,
        Roof(dtype, 256 if args.quick else 4096, args.device),
    )
    for model in args.models.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            pair = Pair(model, Path(scratch), args.quick, dtype, args.device)
            for name in args.only.split(",") if args.only else LINES:
                try:
                    for what, row in LINES[name](bench, pair):
                        row["goal"] = GOALS.get(what, (None, None))[0 if pair.is_t5 else 1]
                        result["rows"][f"{model}, {what}"] = row
                        print(table_row(f"{model}, {what}", row), flush=True)
                except torch.OutOfMemoryError:  # a GPU's
                    print(f"| {model}, {name}: out of memory |||||", flush=True)
        if args.json:  # so far
            args.json.write_text(json.dumps(result, indent=2) + "\n")


def machine(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def table_row(line, row):
    ours, theirs = (amount(row[side], row["unit"]) for side in ("ours", "theirs"))
    ratio = f"{row['ratio']:.2f}" + (
        " ({:.2f} to {:.2f})".format(*row["spread"]) if "spread" in row else ""
    )
    roof = f"{row['roof']:.0%}" if "roof" in row else ""
    if "products" in row:
        roof = f"{row['ours_over_products']:.2f} x, theirs {row['theirs_over_products']:.2f} x"
    goal = "" if row["goal"] is None else f"{row['goal']:g}"
    return f"| {line} | {ours} | {theirs} | {ratio} | {goal} | {roof} |"


def amount(x, unit):
    if unit == "B":
        return f"{x / 1e6:,.0f} MB" if x >= 1e7 else f"{x / 1e6:.3g} MB"
    return f"{x:.2f} s" if x >= 1 else f"{x * 1e3:.3g} ms"


if __name__ == "__main__":
    main()
