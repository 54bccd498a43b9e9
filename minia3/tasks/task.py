"""What a task is: TaskSpec says how to load one, and Task holds its rows."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from minia3.tasks.prompts import OWN_PROMPTS, Prompt


class Source(NamedTuple):
    """Where some files of a task come from.

    The address is that of a zip archive, of a single file, of a data set of the Hugging Face hub
    (see `HUB` in download.py), or of a page on which the authors give the files away on request.
    """

    address: str
    # Name in the task's folder -> name in the archive or data set. Only these files are taken.
    files: dict[str, str]
    # Of the download. They are empty for a data set of the hub, and for files on request.
    n_bytes: int = 0
    sha256: str = ""


class TaskSpec(NamedTuple):
    """How to load a task.

    A published data set has `sources` and `labels`. Every other task has rows in the form of a
    user's rows (see `load_task`), and `TaskSpec()` describes a user's task.
    """

    prompts: tuple[Prompt, ...] = OWN_PROMPTS
    sources: Sequence[Source] = ()
    # As the files spell them, in the order of the prompts' choices.
    labels: Sequence[str] = ()
    # The field that holds the label.
    label_field: str = "label"
    # Column of the file -> name of the field in our rows, if it is another.
    fields: Mapping[str, str] = {}
    # For WSC: the field that holds the two spans.
    span_field: str = ""
    # For MRPC: its validation file holds these fields of some rows of train, and nothing else.
    dev_id_fields: Sequence[str] = ()
    # "accuracy" or "macro_f1".
    metric: str = "accuracy"
    # The number of shots in T-Few's paper.
    shots: int | None = None
    # Whether that number is drawn from each label, instead of from all rows together.
    per_class: bool = False
    # The folder of T-Few's published splits, if it is not called like the task.
    few_shot: str = ""
    # Families whose pre-training had the task's labels, so that their results are not few-shot.
    seen: Sequence[str] = ()
    # The folder in the repository's data/, if the task comes with the repository.
    shipped: str = ""

    @property
    def has_user_rows(self) -> bool:
        """Whether rows have a user's form: "input", and "target" or "choices" and "label"."""
        return not self.labels


class Task(NamedTuple):
    """A task's rows: a file's fields, and the integers `label` (-1: unlabelled) and `idx`."""

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
    # What a run should tell its user about these rows, a line each.
    notes: list[str]
    # What a report calls the rows of `validation`.
    split: str = "validation"

    @property
    def has_labelled_test(self) -> bool:
        """Whether there are test rows and all of them are labelled."""
        return bool(self.test) and all(row["label"] >= 0 for row in self.test)

    def check_evaluation(self):
        """Raise ValueError if there are no labelled rows to report on."""
        if not self.has_labelled_test and not self.validation:
            raise ValueError(
                f"{self.name}: no labelled rows to report on: "
                "add a validation file, or label all rows of the test file"
            )

    @property
    def members(self) -> "list[Task]":
        """The tasks that are evaluated one by one: this one. A Mixture has several (see mixture.py)."""
        return [self]

    @property
    def evaluation(self) -> tuple[str, list[dict]]:
        """The name and the rows of the split to report on.

        That is test if all of it is labelled, and else validation. Raise ValueError if there are no
        such rows.
        """
        self.check_evaluation()
        if self.has_labelled_test:
            return "test", self.test
        return self.split, self.validation
