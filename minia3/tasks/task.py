"""What a task is: TaskSpec says how to load one, and Task holds its rows."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from minia3.tasks.prompts import OWN_PROMPTS, Prompt


class Source(NamedTuple):
    """Where some files of a task come from.

    The address leads to a zip archive, to a single file, to a data set on the Hugging Face hub (see
    `HUB` in download.py), or to a page where the authors give the files away on request.
    """

    address: str
    # Name in the task's folder -> name in the archive or data set. Only these files are taken.
    files: dict[str, str]
    # The size and the checksum of the download. Data sets on the hub and files on request have
    # neither.
    n_bytes: int = 0
    sha256: str = ""


class TaskSpec(NamedTuple):
    """How to load a task.

    A published data set has `sources` and `labels`. Every other task has rows in the form of a
    user's rows (see `load_task`), and `TaskSpec()` describes a user's task.
    """

    prompts: tuple[Prompt, ...] = OWN_PROMPTS
    sources: Sequence[Source] = ()
    # The labels as the files spell them, in the order of the prompts' choices.
    labels: Sequence[str] = ()
    # The field that holds the label.
    label_field: str = "label"
    # Name of a field in the file -> its name in our rows, if the two differ.
    fields: Mapping[str, str] = {}
    # For WSC: the field that holds the two spans.
    span_field: str = ""
    # For MRPC: its validation file holds only these fields, and they name rows of train.
    dev_id_fields: Sequence[str] = ()
    # "accuracy" or "macro_f1".
    metric: str = "accuracy"
    # The number of shots in T-Few's paper.
    shots: int | None = None
    # Whether the shots are drawn from each label, and not from all rows together.
    per_class: bool = False
    # The folder of T-Few's published splits, if its name is not the task's.
    few_shot: str = ""
    # The families of models that saw the task's labels in pre-training. Their results are not
    # few-shot.
    seen: Sequence[str] = ()
    # The folder in the repository's data/, if the task comes with the repository.
    shipped: str = ""

    @property
    def has_user_rows(self) -> bool:
        """Return whether rows have "input" and "target", or "input", "choices" and "label"."""
        return not self.labels


class Task(NamedTuple):
    """A task. Its rows hold the fields of a file, and the integers `label` (-1: unlabeled) and
    `idx`.
    """

    name: str
    train: list[dict]
    validation: list[dict]
    test: list[dict]
    prompts: tuple[Prompt, ...]
    # "accuracy" or "macro_f1", or "exact_match" if a user's rows have targets.
    metric: str
    # See TaskSpec.
    seen: Sequence[str]
    # File name -> sha256.
    checksums: dict[str, str]
    # What a run should tell its user about these rows, one note per line.
    notes: list[str]
    # The name of `validation` in a report.
    split: str = "validation"

    @property
    def has_labeled_test(self) -> bool:
        """Return whether there are test rows and all of them are labeled."""
        return bool(self.test) and all(row["label"] >= 0 for row in self.test)

    def check_evaluation(self):
        """Raise ValueError if there are no labeled rows to report on."""
        if not self.has_labeled_test and not self.validation:
            raise ValueError(
                f"{self.name}: no labeled rows to report on: "
                "add a validation file, or label all rows of the test file"
            )

    @property
    def members(self) -> "list[Task]":
        """The tasks that are evaluated one by one: this task. A Mixture has several members."""
        return [self]

    @property
    def evaluation(self) -> tuple[str, list[dict]]:
        """Return the name and the rows of the split to report on.

        This is test if all of its rows are labeled, and otherwise validation. Raise ValueError if
        there are no such rows.
        """
        self.check_evaluation()
        if self.has_labeled_test:
            return "test", self.test
        return self.split, self.validation
