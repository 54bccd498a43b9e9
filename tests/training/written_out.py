"""The recipe written out: the batches and the losses that a run of train.py must have."""

import json
import shlex
import tempfile
from pathlib import Path

import numpy as np
import torch
from running import home, write
from safetensors.torch import load_file

import minia3
from minia3.cli.main import main

KINDS = {"choices": (2,), "mixed choices": (2, 3, 1), "targets": (0,)}
LABELS = ("entailment", "not_entailment")


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def adapter(folder):
    """Return the tensors of a run's adapter, by PEFT's names."""
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def relabeled(rows):
    """Return rows with two choices, each with the other label."""
    return [{**row, "label": 1 - row["label"]} for row in rows]


def batches(n_rows, batch_size, seed):
    """Return the indices of the rows of each step: permutations, one after the other."""
    stream = []
    for epoch in range(100):
        stream += np.random.RandomState([seed, epoch]).permutation(n_rows).tolist()
    return [stream[i : i + batch_size] for i in range(0, len(stream), batch_size)]


def expected_loss(model, tokenizer, batch, names):
    """Return T-Few's loss of some rows, computed one choice at a time: no padding, no batch."""
    likely = []
    unlikely = []
    row_losses = []
    for row in batch:
        choices = row.get("choices", [row.get("target")])
        label = row.get("label", 0)
        source = torch.tensor([tokenizer.encode(row["input"])])
        logps = []
        for choice in choices:
            target = torch.tensor([tokenizer.encode_target(choice, end="target" in row)])
            logps.append(minia3.logprobs(model, model.start(source), target)[0])
        likely.append(logps[label])
        unlikely += [torch.log(1 - p.exp() + 0.01) for k, p in enumerate(logps) if k != label]
        row_losses.append(-torch.stack([p.mean() for p in logps]).log_softmax(0)[label])
    parts = {"lm": -torch.cat(likely).mean(), "ln": torch.stack(row_losses).mean()}
    parts["ul"] = -torch.cat(unlikely).mean() if unlikely else torch.zeros(())
    return sum(parts[name] for name in names.split(","))


def rte_flags(folder, n=10):
    """Write a data folder with n rows in the form of RTE's, and return the flags that use it."""
    made = []
    for i in range(n):
        row = {"premise": "w5 w6 w7", "hypothesis": f"w{8 + i}", "label": LABELS[i % 2]}
        made.append(row)
    write(folder / "data" / "rte", train=made, val=made[:7])
    return {"task": "rte", "data_dir": folder / "data"}


def results_by_hand(monkeypatch, accuracy_of):
    """Replace the accuracy on held-out rows by `accuracy_of(group, cell)`.

    So what a run chooses does not depend on the rounding of a processor. The evaluation itself
    takes place, and its real results are collected in the list that this returns: (step, name of
    the cell, result).
    """
    from minia3.training.group import Group

    original = Group.evaluate_held_out
    collected = []

    def evaluate_held_out(group, cell):
        results = original(group, cell)
        for result in results:
            collected.append((group.log.step, cell.name, dict(result)))
            result["accuracy"] = accuracy_of(group, cell)
        return results

    monkeypatch.setattr(Group, "evaluate_held_out", evaluate_held_out)
    return collected


def used(shown, rows, capsys, name="", task=""):
    """Run the command that a report shows after "use it" on rows without their answers.

    Return the share of rows that it answers rightly. shown: what the run printed. name, task: of a
    grid or a mixture, in place of NAME and TASK.
    """
    (line,) = (line for line in shown.splitlines() if line.startswith("  use it"))
    program, *words = shlex.split(line.partition("use it")[2].replace("NAME", name))
    words = [task if word == "TASK" else word for word in words]
    assert program == "minia3"
    questions = []
    for row in rows:
        questions.append({key: row[key] for key in ("input", "choices") if key in row})
    folder = write(Path(tempfile.mkdtemp(dir=home().name)), new=questions)
    words[words.index("new.csv")] = str(folder / "new.jsonl")
    capsys.readouterr()
    assert main([*words, "--device", "cpu"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    is_right = []
    for answer, row in zip(answers, rows, strict=True):
        if "target" in row:
            is_right.append(answer["output"] == row["target"])
        else:
            is_right.append(answer["label"] == row["label"])
    return np.mean(is_right)
