"""Chapter 7, part two: what a task is, and the table of them. To add a task, add a row (and its prompts in prompts.py).

Which split a run reports on is no column of the table: the test split where the file has labels, else validation.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from minia3 import prompts
from minia3.prompts import Prompt


class Archive(NamedTuple):
    """A zip to download, of which only `members` are taken out."""

    address: str
    size: int  # bytes
    sha256: str
    members: dict[str, str]  # train, val, test -> name inside the zip


@dataclass(frozen=True)
class Spec:
    """A row of the table. It has an `archive` and `labels`, or it is `shipped`: own rows, such as a user brings."""

    prompts: tuple[Prompt, ...]
    archive: Archive | None = None
    labels: tuple[str, ...] = ()  # as they stand in the file, str(...).lower(), in the order of the prompts' choices
    shipped: str = ""  # folder below SHIPPED
    metric: str = "accuracy"  # own rows with targets have "exact_match"
    seen: tuple[str, ...] = ()  # families whose pre-training had the task's labels: their numbers are not few-shot


@dataclass
class Task:
    """What `load_task` gives. Rows have their file's fields, and as integers `label` (-1: unlabelled) and `idx`."""

    name: str
    train: list[dict]
    validation: list[dict]
    test: list[dict]
    prompts: tuple[Prompt, ...]
    metric: str  # "accuracy" | "exact_match"
    seen: tuple[str, ...]
    checksums: dict[str, str]  # file name -> sha256
    notes: list[str]  # lines that a run should print

    @property
    def evaluation(self) -> tuple[str, list[dict]]:
        """Name and rows of the split to report on: test where every row of it has a label, else validation."""
        labelled = self.test and all(row["label"] >= 0 for row in self.test)
        return ("test", self.test) if labelled else ("validation", self.validation)


SHIPPED = Path(__file__).resolve().parent.parent / "data"  # what comes with the repository, whatever --data-dir says


def _superglue(name: str, size: int, sha256: str) -> Archive:
    members = {split: f"{name}/{split}.jsonl" for split in ("train", "val", "test")}
    return Archive(f"https://dl.fbaipublicfiles.com/glue/superglue/data/v2/{name}.zip", size, sha256, members)


TASKS = {
    "same-colour": Spec(prompts=prompts.OWN, shipped="same-colour"),  # the embedded one: see data/README.md
    "rte": Spec(
        prompts=prompts.RTE,
        archive=_superglue("RTE", 750920, "6310aab3f000424c9d0318a1ff20692e07c7f4aa15e8f17a5972ea0a35c398b9"),
        labels=("entailment", "not_entailment"),
        seen=("t5-v1.0", "flan-t5"),
    ),
    "cb": Spec(
        prompts=prompts.CB,
        archive=_superglue("CB", 75482, "8d641383298d54554066ba1c93f56ae7410af75df621b90c63028806bbbbb535"),
        labels=("entailment", "contradiction", "neutral"),
        seen=("t5-v1.0", "flan-t5"),
    ),
    "copa": Spec(
        prompts=prompts.COPA,
        archive=_superglue("COPA", 43986, "405906cddac74bc1e1ce8220f1107d1025b66a25ef10149d91b10bb30651125f"),
        labels=("0", "1"),
        seen=("t5-v1.0", "flan-t5"),
    ),
}
