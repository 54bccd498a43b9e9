"""What a task is: TaskSpec says how to load one, and Task holds its rows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from minia3.tasks.prompts import OWN_PROMPTS, Prompt

# How rows are answered -> the metrics that suit such rows. The first is the default.
METRICS = {
    "choices": ("accuracy", "macro_f1"),  # one of several texts is picked
    "target": ("exact_match", "f1", "rouge_l", "bleu", "inverse_perplexity"),  # a text is written
    "messages": ("inverse_perplexity",),  # what the assistant says in a conversation
}


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

    A published data set has `sources`. Every other task is a user's: understanding.py makes its
    TaskSpec from the columns of its files, or completes what a task file says. Until then,
    `TaskSpec()` says nothing.
    """

    prompts: tuple[Prompt, ...] = OWN_PROMPTS
    sources: Sequence[Source] = ()
    # The labels as the files spell them, in the order of the prompts' choices. Without labels,
    # rows have choices of their own, or a text to write.
    labels: Sequence[str] = ()
    # The field that holds the label.
    label_field: str = "label"
    # Name of a field in the file -> its name in our rows, if the two differ.
    fields: Mapping[str, str] = {}
    # The field that holds a conversation, if the rows are conversations.
    messages: str = ""
    # For WSC: the field that holds the two spans.
    span_field: str = ""
    # For MRPC: its validation file holds only these fields, and they name rows of train.
    dev_id_fields: Sequence[str] = ()
    # One of METRICS; "": the first one for the kind of the rows.
    metric: str = ""
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
    # Of a task file: split -> its files, or the path of a file or a folder that has all splits.
    files: Mapping[str, Sequence[Path]] = {}
    path: Path | None = None
    # The template of conversations, if it is not the checkpoint's own.
    chat_template: str | None = None
    # Whether an adapter has learned this prompt and these labels, from other rows.
    is_learned: bool = False

    @property
    def is_published(self) -> bool:
        """Return whether this is a published data set, and not a user's rows."""
        return bool(self.sources)

    def answer_of(self, row: dict) -> str:
        """Return how a row is answered, which is a key of METRICS."""
        prompt = self.prompts[0]
        if prompt.choices:
            return "choices"
        if prompt.target:
            return "target"
        if self.messages:
            return "messages"
        return "choices" if "choices" in row else "target"


class Task(NamedTuple):
    """A task. Its rows hold the fields of a file, and the integers `label` (-1: unlabeled) and
    `idx`.
    """

    name: str
    train: list[dict]
    validation: list[dict]
    test: list[dict]
    # One of METRICS.
    metric: str
    # File name -> sha256.
    checksums: dict[str, str]
    # What a run should tell its user about these rows, one note per line.
    notes: list[str]
    # The name of `validation` in a report.
    split: str = "validation"
    # How the rows are answered: a key of METRICS.
    answer: str = "choices"
    # How the columns of a user's file were understood, in a line. "": there was nothing to say.
    columns: str = ""
    # What it takes to put further rows into words: see task_file.py.
    spec: TaskSpec = TaskSpec()
    # Whether the three splits are parts of a single file, or of a data set with a single split.
    is_divided: bool = False
    # Whether the seed decides which rows are trained on, and which are reported on.
    depends_on_seed: bool = False

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        return self.spec.prompts

    @property
    def has_labeled_test(self) -> bool:
        """Return whether there are test rows and all of them are labeled."""
        return bool(self.test) and all(row["label"] >= 0 for row in self.test)

    def check_evaluation(self):
        """Raise ValueError if there are no labeled rows to report on."""
        if self.has_labeled_test or self.validation:
            return
        n_hidden = sum(row["label"] < 0 for row in self.test)
        remedy = (
            "add a validation file, or label all rows of the test file "
            f"({n_hidden} of {len(self.test)} have no label)"
        )
        if self.train:
            remedy += ", or give the file of train alone, which is then split in three"
        if self.spec.is_published:  # RAFT
            remedy = "all of them are shots, so give fewer --shots"
        raise ValueError(f"{self.name}: no labeled rows to report on: {remedy}")

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
