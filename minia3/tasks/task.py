"""To be written."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from minia3.tasks.prompts import OWN_PROMPTS, Prompt


class Source(NamedTuple):
    """Where files of a task come from. Without a sha256 it is a data set of the hub, or where to ask for them."""

    address: str
    files: dict[
        str, str
    ]  # all that is taken: name in the task's folder -> name in the zip or data set, if it is one
    bytes: int = 0
    sha256: str = ""


class TaskSpec(NamedTuple):
    """A row of the table. It has `sources` and `labels`, or it is `shipped`: own rows, such as a user brings."""

    prompts: tuple[Prompt, ...] = OWN_PROMPTS
    sources: Sequence[Source] = ()
    labels: Sequence[str] = ()  # as they stand in the file, in the order of the prompts' choices
    label: str = "label"  # the field of them
    fields: Mapping[str, str] = {}  # column of the file -> what it is called here
    spans: str = ""  # of WSC: the field that holds its spans
    dev_ids: Sequence[
        str
    ] = ()  # of MRPC: the file for validation has these fields, unnamed, of some rows of train
    metric: str = "accuracy"
    shots: int | None = None  # T-Few's
    per_class: bool = False  # shots are so many of each label
    few_shot: str = ""  # folder of T-Few's published splits, where it has another name
    seen: Sequence[
        str
    ] = ()  # families whose pre-training had the task's labels: their numbers are not few-shot
    shipped: str = ""  # folder below SHIPPED


class Task(NamedTuple):
    """What `load_task` gives. Rows have their file's fields, and as integers `label` (-1: unlabelled) and `idx`."""

    name: str
    train: list[dict]
    validation: list[dict]
    test: list[dict]
    prompts: tuple[Prompt, ...]
    metric: str  # "accuracy", "macro_f1", or of own rows with targets "exact_match"
    seen: Sequence[str]
    checksums: dict[str, str]  # file name -> sha256
    notes: list[str]  # lines that a run should print
    split: str = "validation"  # what `validation` is

    @property
    def members(self) -> "list[Task]":
        """The tasks that are evaluated one by one: this one. A Mixture has several (see mixture.py)."""
        return [self]

    @property
    def evaluation(self) -> tuple[str, list[dict]]:
        """Name and rows of the split to report on: test if all of it is labelled, else validation. ValueError: none."""
        if self.test and all(row["label"] >= 0 for row in self.test):
            return "test", self.test
        if not self.validation:
            raise ValueError(
                f"{self.name}: no labelled rows to report on: add a validation file, or labels to test's"
            )
        return self.split, self.validation
