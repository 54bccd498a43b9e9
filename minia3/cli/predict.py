"""`predict`: label the rows of a file, or continue them, each with the adapter that it names."""

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from minia3.cli.arguments import add_device_options, add_max_new_tokens, add_model, load_model
from minia3.cli.terminal import show

TITLE = "Label the rows of a file, or continue them"
EXAMPLE = "python -m minia3 predict tiny-t5 data/same-colour/test.jsonl"


def add_arguments(parser):
    add_model(parser)
    parser.add_argument(
        "file",
        help=".jsonl, .json, .csv, .tsv or .parquet file, or .gz of it; a row has an `input`, and "
        "may have `choices` and the name of an `adapter`",
    )
    parser.add_argument(
        "--adapter",
        help="folder, file or hub id of an adapter for all rows, or a folder of adapters for "
        "rows that name them",
    )
    parser.add_argument(
        "--task",
        help="rows have the fields of this known task (rte ...): use its prompt and its choices",
    )
    parser.add_argument(
        "--prompt",
        type=int,
        default=0,
        help="number of the task's prompt to use (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        help="file of results, .jsonl or .csv (default: print them); an incomplete file "
        "is continued",
    )
    parser.add_argument(
        "--columns",
        help="columns of results: NAME or NAME=FIELD, with commas between, as in ID,Label=word; "
        "a field is one of the row's, or idx, label, choice, scores, output, or word (the label as "
        "the task's file spells it)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=16, help="rows per forward pass (default: %(default)s)"
    )
    parser.add_argument(
        "--max-length",
        type=int,
        default=512,
        help="most tokens of an input; a longer input loses its middle (default: %(default)s)",
    )
    add_max_new_tokens(parser)
    add_device_options(parser)


def run(args):
    from minia3.checkpoints.tokenizer import load_tokenizer
    from minia3.inference.prediction import write_results

    spec, prompt = choose_prompt(args)
    model = load_model(args)
    adapters, default_adapter = load_adapters(model, args.adapter)
    prediction = Prediction(
        args, model, load_tokenizer(args.model), spec, prompt, adapters, default_adapter
    )
    if args.out is None:
        for line in prediction.lines():
            show(line, end="")
    else:
        write_results(Path(args.out), prediction.lines, prediction.is_csv)
        show(f"{args.out} is finished")


def choose_prompt(args):
    """Return the TaskSpec and the Prompt that rows are put into."""
    from minia3.checkpoints.known_models import base_of, known_model
    from minia3.tasks.known_tasks import known_tasks
    from minia3.tasks.prompts import for_family
    from minia3.tasks.task import TaskSpec

    spec = TaskSpec()
    if args.task is not None:
        if args.task not in known_tasks():
            raise ValueError(f"--task is {args.task!r}, expected one of {', '.join(known_tasks())}")
        spec = known_tasks()[args.task]
    known = known_model(base_of(args.model))
    family = known.family if known else None
    prompts = for_family(spec.prompts, family)
    if not 0 <= args.prompt < len(prompts):
        raise ValueError(f"--prompt is {args.prompt}, expected 0 to {len(prompts) - 1}")
    return spec, prompts[args.prompt]


def load_adapters(model, path):
    """Return the adapters that rows can name, and the adapter of rows that name none."""
    from minia3.adapters.lora import is_lora, load_lora
    from minia3.adapters.named_rows import Adapters

    adapters = Adapters(model)
    if not path:
        return adapters, None
    if Path(path).is_dir() and not Path(path, "adapter_config.json").exists():
        adapters.load_folder(path)
        return adapters, None
    if is_lora(path):  # it changes the weights, so it has no row and no name
        load_lora(model, path)
        return adapters, None
    adapters.load(path, path)
    return adapters, path


@dataclass
class Prediction:
    """All that it takes to make lines of results out of rows."""

    args: Any  # of the command line
    model: Any
    tokenizer: Any
    spec: Any  # TaskSpec
    prompt: Any
    adapters: Any  # Adapters
    default_adapter: str | None

    @property
    def is_csv(self):
        return self.args.out is not None and self.args.out.endswith(".csv")

    @property
    def columns(self):
        """A dict from the name of each column to its field, or empty: all fields of the result."""
        from minia3.inference.prediction import COLUMNS

        names = []
        if self.args.columns:
            names = self.args.columns.split(",")
        elif self.is_csv:
            names = COLUMNS
        columns = {}
        for text in names:
            name, _, field = text.partition("=")
            columns[name] = field or name
        return columns

    def lines(self, first_row=0):
        """Yield the lines of results from a row on; before the first row, the header of a csv."""
        from minia3.inference.prediction import csv_line, predict, read_inputs

        columns = self.columns
        if self.is_csv and first_row == 0:
            yield csv_line(columns)
        rows = read_inputs(
            self.args.file,
            self.tokenizer,
            self.spec,
            self.prompt,
            self.adapters,
            self.default_adapter,
            self.args.max_length,
        )
        results = predict(
            self.model,
            self.tokenizer,
            islice(rows, first_row, None),
            self.adapters,
            batch_size=self.args.batch_size,
            max_new_tokens=self.args.max_new_tokens,
        )
        for row, result in results:
            values = self.select(row, result, columns)
            if self.is_csv:
                yield csv_line(values.values())
            else:
                yield json.dumps(values) + "\n"

    def select(self, row, result, columns):
        """Return a dict from the name of each column to its value for a row."""
        from minia3.inference.prediction import COLUMNS

        if self.spec.labels:
            result["word"] = self.spec.labels[result["label"]]
        if not columns:
            return result
        fields = row | dict.fromkeys(COLUMNS) | result
        for field in columns.values():
            if field not in fields:
                found = ", ".join(fields)
                raise ValueError(f"--columns: {field!r} is not in row {row['idx']}; it has {found}")
        return {name: fields[field] for name, field in columns.items()}
