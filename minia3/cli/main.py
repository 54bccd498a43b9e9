"""To be written."""

import argparse
import json
import os
import sys
import warnings
from contextlib import suppress
from itertools import islice
from pathlib import Path

from minia3.training.flags import Parser


def show(text="", end="\n"):
    """Print at once. Where the reader has gone (`| head`), end without a word, as SIGPIPE would."""
    try:
        print(text, end=end, flush=True)
    except OSError as error:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # or it fails again when Python ends
        raise SystemExit(141) if isinstance(error, BrokenPipeError) else error from None


def load(args, load_words=None):
    import torch

    from minia3.checkpoints.hub import find
    from minia3.checkpoints.load import load_model
    from minia3.checkpoints.tokenizer import load_tokenizer
    from minia3.training.device import choose_device

    device, dtype = choose_device(args.device)[0], getattr(torch, args.dtype or "", args.dtype)
    model = load_model(args.model, dtype=dtype, device=device)
    return model, (load_words or load_tokenizer)(find(args.model, weights=False))


def info(args):
    """What a model is, and what it takes to run it: python -m minia3 info t5-base"""
    from minia3.cli.info import info

    lines = info(args.model, args.batch, args.length)
    for line in (
        [json.dumps({title: text for title, text in lines if title})] if args.json else lines
    ):
        show(line if args.json else "{:<18}{}".format(*line))


def generate(args):
    """Continue a text, answer, or chat: python -m minia3 generate tiny-t5 'anna has a red ball . same colour ?'"""
    from minia3.adapters.lora import is_lora, load_lora
    from minia3.adapters.rows import load_adapter
    from minia3.inference.decoding import generate, stream

    def typed():
        with suppress(EOFError):
            while True:
                yield input("> " if sys.stdout.isatty() else "")

    model, tokenizer = load(args)
    if args.adapter:
        (load_lora if is_lora(args.adapter) else load_adapter)(model, args.adapter)
    drawn = {
        key: vars(args)[key]
        for key in ("temperature", "top_k", "top_p", "stop", "seed", "max_new_tokens")
    }
    several = {key: vars(args)[key] for key in ("beams", "length_penalty", "samples")}
    stdin, messages = sys.stdin or (), []  # None: it is closed
    talks = not args.prompts and bool(stdin) and stdin.isatty()
    lines = (
        iter(args.prompts)
        if args.prompts
        else filter(None, map(str.strip, typed() if talks else stdin))
    )
    while texts := list(islice(lines, 1 if talks else 16)):
        prompts = texts
        if args.chat:
            prompts = [
                tokenizer.chat([*messages, {"role": "user", "content": text}]) for text in texts
            ]
        if len(texts) == args.beams == args.samples == 1 and not args.json:
            outputs = [""]
            for piece in stream(model, tokenizer, prompts[0], **drawn):
                outputs[0] += piece
                show(piece, end="")
            show()
        else:
            outputs = generate(model, tokenizer, prompts, **drawn, **several)
            for i, text in enumerate(texts):
                own = outputs[i * args.samples : (i + 1) * args.samples]
                answer = {"output": own[0]} if args.samples == 1 else {"outputs": own}
                show(json.dumps({"prompt": text, **answer}) if args.json else "\n".join(own))
        if talks:
            messages += [
                {"role": "user", "content": texts[0]},
                {"role": "assistant", "content": outputs[0]},
            ]


def predict(args):
    """Label the rows of a file, or continue them: python -m minia3 predict tiny-t5 data/same-colour/test.jsonl"""
    from minia3.adapters.lora import is_lora, load_lora
    from minia3.adapters.named_rows import Adapters
    from minia3.checkpoints.known_models import base_of, known_model
    from minia3.inference.prediction import COLUMNS, csv_line, predict, read_inputs, write_results
    from minia3.tasks.known_tasks import known_tasks
    from minia3.tasks.prompts import for_family
    from minia3.tasks.task import TaskSpec

    if args.task not in (None, *known_tasks()):
        raise ValueError(f"--task is {args.task!r}, expected one of {', '.join(known_tasks())}")
    spec, row = known_tasks().get(args.task, TaskSpec()), known_model(base_of(args.model))
    worded = for_family(spec.prompts, row and row.family)
    if not 0 <= args.prompt < len(worded):
        raise ValueError(f"--prompt is {args.prompt}, expected 0 to {len(worded) - 1}")
    model, tokenizer = load(args)
    names, default = Adapters(model), args.adapter
    if default and Path(default).is_dir() and not Path(default, "adapter_config.json").exists():
        names.load_folder(default)
        default = None
    elif default and is_lora(default):
        load_lora(model, default)
        default = None
    elif default:
        names.load(default, default)
    to_csv = (args.out or "").endswith(".csv")
    columns = args.columns.split(",") if args.columns else COLUMNS if to_csv else ()
    columns = {
        name: field or name for name, _, field in (column.partition("=") for column in columns)
    }

    def lines(first=0):
        if to_csv and first == 0:
            yield csv_line(columns)
        rows = read_inputs(
            args.file, tokenizer, spec, worded[args.prompt], names, default, args.max_length
        )
        options = {"batch_size": args.batch_size, "max_new_tokens": args.max_new_tokens}
        for row, result in predict(model, tokenizer, islice(rows, first, None), names, **options):
            result |= {"word": spec.labels[result["label"]]} if spec.labels else {}
            values = row | dict.fromkeys(COLUMNS) | result
            if missing := [field for field in columns.values() if field not in values]:
                raise ValueError(
                    f"--columns: {missing[0]!r} is not in row {row['idx']}; it has {', '.join(values)}"
                )
            cells = {name: values[field] for name, field in columns.items()} or result
            yield csv_line(cells.values()) if to_csv else json.dumps(cells) + "\n"

    if args.out is None:
        for line in lines():
            show(line, end="")
    else:
        write_results(Path(args.out), lines, to_csv)
        show(f"{args.out} is finished")


def merge(args):
    """Fold an adapter into a model: python -m minia3 merge tiny-t5 adapter merged"""
    from minia3.adapters.lora import is_lora, load_lora
    from minia3.adapters.merge import merge, merge_files
    from minia3.checkpoints.hub import find
    from minia3.checkpoints.load import load_model
    from minia3.checkpoints.save import save_model
    from minia3.checkpoints.tokenizer import find_tokenizer

    if is_lora(args.adapter):
        model, words = load_model(args.model), find_tokenizer(find(args.model))
        load_lora(model, args.adapter)
        save_model(merge(model), args.out, words)
    else:
        merge_files(args.model, args.adapter, args.out)


def convert(args):
    """An adapter to PEFT's form, or a model to Hugging Face's: python -m minia3 convert finish.pt adapter"""
    from minia3.adapters.peft_files import read_adapter, write_adapter
    from minia3.checkpoints.save import save_model
    from minia3.checkpoints.tokenizer import find_tokenizer

    path = Path(args.model)
    if (path.is_file() and path.suffix != ".gguf") or (path / "adapter_config.json").exists():
        write_adapter(args.out, *read_adapter(path))
    else:
        model, words = load(args, find_tokenizer)
        save_model(model, args.out, words)


def mix(args):
    """Make one adapter of several: python -m minia3 mix mixed one/adapter:0.5 other/adapter:0.5"""
    from minia3.adapters.mix import mix
    from minia3.adapters.peft_files import read_adapter, write_adapter
    from minia3.checkpoints.known_models import hub_name

    parts = [(read_adapter(name), weight) for name, weight in vars(args)["adapter:weight"]]
    vectors = mix([(part.vectors, weight) for part, weight in parts], args.how)
    bases = {hub_name(part.base) for part, _ in parts}
    if len(bases) > 1:
        warnings.warn(
            f"trained on different models, {', '.join(map(str, bases))}: the mixture names none"
        )  # noqa: B028
    write_adapter(args.out, vectors, bases.pop() if len(bases) == 1 else None)


def table(args):
    """Make the paper's table of runs: python -m minia3 table runs"""
    from minia3.cli.table import table_rows, table_text

    rows, note = table_rows(args.runs)
    show(table_text(rows, args.csv), end="")
    if note and args.csv:
        warnings.warn(note)  # noqa: B028
    elif note:
        show(f"\n{note}")


def plot(args):
    """Draw runs, and what their adapters learned: python -m minia3 plot runs --out pictures"""
    from minia3.cli.plot import plot

    for line in plot(args.runs, args.out):
        show(line)


def weighted(word):
    name, _, weight = word.rpartition(":")
    with suppress(ValueError):
        return name, float(weight)
    raise argparse.ArgumentTypeError(
        f"{word!r}, expected ADAPTER:WEIGHT, as in path/to/adapter:0.5"
    )


def new(out):
    if os.path.isfile(out) or (
        os.path.isdir(out) and any(name[0] != "." for name in os.listdir(out))
    ):
        raise argparse.ArgumentTypeError(f"{out} exists and is not empty: give a new folder")
    return out


COMMANDS = (info, generate, predict, merge, convert, mix, table, plot)


def parse(words):
    """-> the arguments, and the command's function as `run`. Raises ValueError for what is no command line."""
    given = json.loads(
        Path(__file__).with_name("commands.json").read_text("utf-8")
    )  # in argparse's own words
    form = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    example = "example: python -m minia3 info t5-base"
    parser = Parser(prog="python -m minia3", description=__doc__, epilog=example, **form)
    commands = parser.add_subparsers(dest="command", required=True)
    for run in COMMANDS:
        title, _, example = run.__doc__.partition(": ")
        command = commands.add_parser(
            run.__name__, help=title, description=title, epilog=f"example: {example}", **form
        )
        command.set_defaults(run=run)
        for kind in (int, float, new, weighted):
            command.register("type", kind.__name__, kind)
        for name in given["commands"][run.__name__].split():
            command.add_argument(
                name, **given["arguments"][name] | given["own"].get(f"{run.__name__} {name}", {})
            )
    if words and words[0] in commands.choices:  # so that prompts may stand behind flags too
        return commands.choices[words[0]].parse_intermixed_args(words[1:])
    return parser.parse_args(words)


def main(argv=None):
    """-> the exit code: 0; 2 for a mistake in what was given; 1 for what failed (disk, memory); 130 for Ctrl-C."""
    try:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *_: print(
                    f"minia3: {message}", file=sys.stderr
                )
                args = parse(sys.argv[1:] if argv is None else argv)
                args.run(args)
        finally:
            show(end="")  # fails here rather than when Python ends
        return 0
    except KeyboardInterrupt:
        return 130
    except (
        ValueError,
        OSError,
        MemoryError,
        RuntimeError,
    ) as error:  # torch's for memory is a RuntimeError
        print(f"minia3: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        mistakes = (
            ValueError,
            FileExistsError,
            FileNotFoundError,
            IsADirectoryError,
            NotADirectoryError,
            PermissionError,
        )
        return 2 if isinstance(error, mistakes) else 1
