"""`mix`: make one (IA)^3 adapter out of several."""

import argparse
import os
import warnings
from contextlib import suppress
from itertools import combinations

from minia3.cli.arguments import add_new_folder, describe_folder
from minia3.cli.terminal import show
from minia3.files.messages import plural
from minia3.files.write import writing_new_folder

TITLE = "Mix several adapters into one"
EXAMPLE = "minia3 mix mixed one/adapter:0.5 other/adapter:0.5"


def add_arguments(parser):
    add_new_folder(parser)
    parser.add_argument(
        "adapters",
        metavar="adapter:weight",
        nargs="+",
        type=weighted_adapter,
        help="an adapter and its weight, as in path/to/adapter:0.5",
    )
    parser.add_argument(
        "--how",
        choices=("average", "product", "power"),
        default="average",
        help="average: 1 + sum of w (l - 1); product: product of 1 + w (l - 1); "
        "power: product of l ** w (default: %(default)s)",
    )


def weighted_adapter(text):
    """Return an adapter and its weight from "ADAPTER:WEIGHT", for argparse."""
    adapter, _, weight = text.rpartition(":")
    with suppress(ValueError):
        if adapter:  # Path("") is the current folder
            return adapter, float(weight)
    expected = "expected ADAPTER:WEIGHT, as in path/to/adapter:0.5"
    raise argparse.ArgumentTypeError(f"found {text!r}, {expected}")


def check_out(path):
    """Raise ValueError if the folder to write was forgotten: the first adapter is taken for it."""
    with suppress(argparse.ArgumentTypeError):
        weighted_adapter(path)
        if not os.path.exists(path):
            raise ValueError(
                f"found an adapter and its weight, {path}, expected the folder to write first, as "
                f"in {EXAMPLE}"
            )


def run(args):
    check_out(args.out)
    from minia3.adapters.mix import mix
    from minia3.adapters.peft_files import read_adapter, write_adapter
    from minia3.checkpoints.hub import find_adapter
    from minia3.tasks.task_file import copy_task_file

    weighted_vectors = []
    bases = []
    for name, weight in args.adapters:
        adapter = read_adapter(name)
        weighted_vectors.append((adapter.vectors, weight))
        bases.append(adapter.base)
    vectors = mix(weighted_vectors, args.how)
    base = common_base(bases)
    with writing_new_folder(args.out) as folder:
        write_adapter(folder, vectors, base)
        copy_task_file([find_adapter(name) for name, _ in args.adapters], folder)
    n_adapters = len(args.adapters)
    show(f"mixed {n_adapters} {plural(n_adapters, 'adapter')}: {describe_folder(args.out)}")


def common_base(bases):
    """Return the model that all adapters name, or None.

    bases: what the file of each adapter names, or None. Warn if these may be different models.
    """
    from minia3.adapters.rows import is_same_base

    known = [base for base in bases if base is not None]
    if not known:
        return None
    has_unknown = len(known) < len(bases)
    if not has_unknown and all(is_same_base(*pair) for pair in combinations(known, 2)):
        return known[0]
    names = list(dict.fromkeys(known))
    if has_unknown:
        names.append("an unknown model")
    found = f"the adapters may be of different models ({', '.join(names)})"
    warnings.warn(f"{found}, so the mixture names none", stacklevel=1)
    return None
