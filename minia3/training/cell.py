"""To be written."""

from functools import lru_cache
from pathlib import Path

import numpy as np

from minia3.checkpoints.known_models import base_of, known_model
from minia3.tasks.batches import order
from minia3.tasks.examples import encode_rows
from minia3.tasks.prompts import for_family
from minia3.tasks.splits import load_task
from minia3.training.flags import expand_grid


class Part:
    """A task of a cell: its rows to train on, to choose by (held out) and to report on, and its prompts.

    Raises ValueError where there is nothing to train or to report on, or no such prompt.
    """

    def __init__(self, config, task, trains):
        self.task, self.said = task, [*task.notes]
        if not task.validation and any(row["label"] < 0 for row in task.test) and trains:
            self.split, self.rows = "test", []
            self.said.append("no rows are labelled but those to train on: nothing is measured")
        else:
            self.split, self.rows = task.evaluation
        self.train_rows, self.held_out = task.train, []
        shuffled = np.random.RandomState([config.seed, 4]).permutation(
            len(task.train)
        )  # SST-2's shots are by class
        shuffled = [task.train[i] for i in shuffled]
        if trains and config.eval_every and self.split == "test" and task.validation:
            self.held_out = task.validation
        elif trains and config.eval_every:  # never the split that is reported
            n = max(1, len(task.train) // 5)
            self.train_rows, self.held_out = shuffled[:-n], shuffled[-n:]
        if (trains or config.method == "icl") and not self.train_rows:
            kept = " beside those which --eval-every holds out" if self.held_out else ""
            raise ValueError(
                f"{task.name}: no rows to train on{kept}: expected more in train.jsonl"
            )
        if trains and task.metric == "exact_match" and "lm" not in config.losses.split(","):
            raise ValueError(
                f"{task.name}: a target has no other choices beside it: --losses {config.losses} lacks lm"
            )
        self.shots = shuffled if config.method == "icl" else ()
        row = known_model(base_of(config.model))
        family = row and row.family
        self.prompts = for_family(task.prompts, family)
        numbers = {str(i): prompt for i, prompt in enumerate(self.prompts)}
        asked = (
            [*numbers]
            if config.eval_prompt == "all"
            else [*dict.fromkeys(str(config.eval_prompt).split(","))]
        )
        if not {*asked} <= numbers.keys():
            expected = (
                f"all, or some of 0 to {len(numbers) - 1} for {task.name}, commas between them"
            )
            raise ValueError(f"--eval-prompt is {config.eval_prompt}, expected {expected}")
        self.measured = [numbers[number] for number in asked]
        if n := len(self.held_out):
            self.said.append(
                f"the best vectors are chosen on {n} rows that are neither trained nor reported on"
            )
        if family in task.seen:
            self.said.append(
                f"{family} saw this task's labels in its pre-training: these results are not few-shot"
            )
        what = "put before each" if config.method == "icl" else "train on"
        counts = (
            f"{len(self.train_rows)} rows to {what}, {len(self.rows)} of {self.split} to report on"
        )
        self.said = [f"task     {task.name}: {counts}", *(f"note     {note}" for note in self.said)]


class Cell:
    """One adapter of a run, a cell of its grid, with its tasks: one, or with --adapters one all that mix.

    config: the run's flags, but of what the grid's axes hold one value; these name the cell.
    """

    def __init__(self, config, parts, axes):
        self.config, self.parts = config, parts
        names = {"task": parts[0].task.name, "seed": f"s{config.seed}", "lr": f"lr{config.lr}"}
        self.name = "-".join(
            (names | {"warmup_ratio": f"w{config.warmup_ratio}"})[axis] for axis in axes
        )
        self.title, self.key = (
            "",
            {},
        )  # what a line of output begins with, and a line of metrics has
        self.folder = Path("model" if config.method == "full" else "adapter")
        if axes:
            self.title, self.folder = (
                f"{self.name}: ",
                Path("adapters", self.name.replace("/", "-")),
            )
            self.key = {"adapter": self.name} | {
                axis: getattr(config, axis) for axis in ("seed", "lr", *axes)
            }
        for part in parts:
            part.title = self.title + f"{part.task.name}: " * (len(parts) > 1)
            part.key = self.key | {"task": part.task.name}

    @property
    def checksums(self):
        several = self.key or len(self.parts) > 1
        digests = [
            (part.task.name, *item) for part in self.parts for item in part.task.checksums.items()
        ]
        return {f"{task}/{file}" if several else file: digest for task, file, digest in digests}


def make_cells(config, trains):
    """The cells of the grid that the flags' commas make. ValueError: two adapters, or tasks of one, are named alike."""
    axes, configs = expand_grid(config, ["task"] * (config.adapters == "one"))
    found, tasks = [], {}
    for one in configs:
        names = one.task if isinstance(one.task, tuple) else (one.task,)
        for name in names:
            if (name, one.seed) not in tasks:
                tasks[name, one.seed] = load_task(name, config.data_dir, config.shots, one.seed)
        found.append(Cell(one, [Part(one, tasks[name, one.seed], trains) for name in names], axes))
    for names in [
        [cell.name for cell in found],
        *([part.task.name for part in cell.parts] for cell in found),
    ]:
        if len(set(names)) < len(names):
            raise ValueError(
                f"expected a name for each adapter, and each task of a mixture, found {names!r:.200}"
            )
    return found


def draw_examples(cell, tokenizer):
    """-> the examples of each step. Each time that a row comes, its prompt is drawn anew, as in T-Few.

    Where tasks mix, an example is of each in proportion to its rows, of which at most `--cap` count (as in T5's
    mixtures: arXiv 1910.10683, section 3.5.2).
    """
    config, parts, rows_of, plan = cell.config, cell.parts, [], []
    for part in parts:
        rows_of.append(lru_cache(1)(order(len(part.train_rows), config.batch_size, config.seed)))
    size, drawn = np.minimum([len(part.train_rows) for part in parts], config.cap), [0] * len(parts)
    for step in range(config.steps):  # for each example of a step: task, row and prompt
        rng, rng_of_prompt = (
            np.random.RandomState([config.seed, stream, step]) for stream in (3, 1)
        )
        task = rng.choice(len(parts), config.batch_size, p=size / size.sum()).tolist()
        prompt = rng_of_prompt.randint([len(parts[i].prompts) for i in task]).tolist()
        plan.append([])
        for i, p in zip(task, prompt, strict=True):
            nth, place = divmod(drawn[i], config.batch_size)
            plan[-1].append((i, rows_of[i](nth)[place], p))
            drawn[i] += 1
    examples, n_cut = {}, 0
    for i, part in enumerate(parts):
        wanted, end = (
            sorted({x for step in plan for x in step if x[0] == i}),
            part.task.metric == "exact_match",
        )
        texts = [(part.train_rows[row], part.prompts[p]) for _, row, p in wanted]
        _, encoded, cut = encode_rows(texts, tokenizer, config.max_length, end)
        examples |= dict(zip(wanted, encoded, strict=True))
        n_cut += cut
    if n_cut:
        print(
            f"note     {n_cut} of {len(examples)} training inputs are cut to {config.max_length} tokens (--max-length)"
        )
    return [[examples[x] for x in step] for step in plan]
