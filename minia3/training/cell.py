"""One adapter of a run, and how far its training is."""

import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from minia3.inference.scoring import NotFiniteError
from minia3.training.assignment import assign_rows
from minia3.training.checkpoint import all_finite, copy_values, set_values

ADVICE = "try a lower --lr or --dtype float32"


@dataclass
class Progress:
    """How far the training of a cell is.

    A checkpoint holds this for each cell, together with the parameters and the optimizer of all.
    """

    before: list | None = None  # the results before training, so far: one per member of the task
    n_steps: int = 0
    losses: list = field(default_factory=list)  # the training loss of each line of metrics.jsonl
    best_accuracy: float | None = None  # on the held-out rows
    best_parameters: dict = field(default_factory=dict)  # name to tensor; until `take_best`
    best_step: int | None = None  # after which they were the best; None: of an older version
    last_parameters: dict = field(default_factory=dict)  # of the last step, if not the best
    n_misses: int = 0  # evaluations in a row that were not better
    failure: str | None = None  # why the cell failed, if it did
    divergence: str | None = None  # why its training ended early with the best parameters so far
    is_reported: bool = False
    extended_from: list = field(default_factory=list)  # the steps at which it was made longer
    dtypes: list = field(default_factory=list)  # of the base, in order


class Cell:
    """A cell of the grid: one adapter in training, with its flags and its task."""

    def __init__(self, config, task, name="", axes=()):
        """config: the run's flags, with one value for each axis of the grid. axes: their names."""
        self.config = config
        self.task = task  # a task, whose only member is itself, or a mixture with several
        self.assignments = [assign_rows(member, config) for member in task.members]
        self.name = name
        self.progress = Progress()
        self.key = {}  # what tells this cell apart in lines of metrics.jsonl
        kind = "model" if config.method == "full" else "adapter"
        self.folder = Path(kind)  # in the folder of the run
        if axes:
            self.key["adapter"] = name
            for axis in ("seed", "lr", *axes):
                self.key[axis] = getattr(config, axis)
            if "task" in axes:
                self.key["task"] = task.name  # the flag may be a path
            self.folder = Path("adapters", name.replace("/", "-"))

        # `attach` sets the rest, once there is a model.
        self.row = 0  # of the tables of vectors
        self.parameters = {}  # name to what this cell trains: for (IA)^3, its row of the table
        self.batches = []  # the examples of each step
        self.is_checked = False  # whether all of its rows can be trained on and evaluated

    @property
    def title(self):
        """The prefix of console lines about this cell. It is empty if the run has only one cell."""
        return f"{self.name}: " if self.name else ""

    def title_of(self, member):
        """Return the title of a line about one member of a mixture."""
        if len(self.task.members) == 1:
            return self.title
        return f"{self.title}{member.name}: "

    @contextmanager
    def naming_task(self, member):
        """Return a context. A message about a row of a member of the task begins with its title.

        Messages name a row by its `idx`, which rows of several tasks have.
        """
        try:
            yield
        except NotFiniteError:  # this is about the model, and not about the row
            raise
        except ValueError as error:
            raise ValueError(f"{self.title_of(member)}{error}") from None

    def key_of(self, member):
        """Return what tells this cell and a member of its task apart in lines of metrics.jsonl."""
        return {**self.key, "task": member.name}

    @property
    def checksums(self):
        """The checksums of the task's files: name to sha256."""
        # In a grid or a mixture, the files of two tasks may have one name.
        has_task_names = bool(self.key) or len(self.task.members) > 1
        found = {}
        for member in self.task.members:
            for file, digest in member.checksums.items():
                name = f"{member.name}/{file}" if has_task_names else file
                found[name] = digest
        return found

    @property
    def is_active(self):
        """Whether the cell still trains: it has neither failed nor diverged, and has patience."""
        progress = self.progress
        is_out_of_patience = 0 < self.config.patience <= progress.n_misses
        has_ended = progress.failure is not None or progress.divergence is not None
        return not has_ended and not is_out_of_patience

    def attach(self, trained, row):
        """Choose what this cell trains.

        For (IA)^3 it is one row of the tables `trained`, for LoRA and full fine-tuning all of them.
        """
        self.row = row
        self.parameters = trained
        if self.config.method == "ia3":
            self.parameters = {}
            for name, table in trained.items():
                self.parameters[name] = table.data[row : row + 1]

    def note_dtype(self, dtype):
        """Note the dtype of the base. It may change if a run continues on another device."""
        if self.progress.dtypes[-1:] != [dtype]:
            self.progress.dtypes.append(dtype)

    def keep_if_best(self, results):
        """Keep the parameters if these held-out results (one per member) are the best so far.

        A result that is not better counts as a miss, for --patience, and so does None: the scores
        were not finite.
        """
        progress = self.progress
        if results is None:
            progress.n_misses += 1
            return
        accuracy = sum(result["accuracy"] for result in results) / len(results)
        is_first = progress.best_accuracy is None
        is_better = is_first or accuracy > progress.best_accuracy
        is_as_good = is_first or accuracy >= progress.best_accuracy
        progress.n_misses = 0 if is_better else progress.n_misses + 1
        if is_as_good and all_finite(self.parameters):  # if results are equal, keep the later ones
            progress.best_accuracy = accuracy
            progress.best_step = progress.n_steps
            progress.best_parameters = copy_values(self.parameters)

    def take_best(self):
        """Restore the best parameters, if an evaluation kept any.

        Otherwise keep the last ones, and fail the cell if they are not finite. If it became NaN
        after such an evaluation, its final lines warn of it.
        """
        has_ended = self.progress.failure is not None or self.progress.divergence is not None
        if not has_ended and not all_finite(self.parameters):
            self.fail("the parameters are not finite after the last step")
        if self.progress.best_parameters:
            if self.progress.divergence is None:  # or else nothing can continue from the last ones
                self.progress.last_parameters = copy_values(self.parameters)  # to extend the run
            set_values(self.parameters, self.progress.best_parameters)
            self.progress.best_parameters = {}  # so that a checkpoint has them only once
        if self.progress.divergence is not None:
            for assignment in self.assignments:
                assignment.doubts.append(self.progress.divergence)

    def take_last(self):
        """Go back from the best parameters to those of the last step: undo `take_best`."""
        if self.progress.last_parameters:
            self.progress.best_parameters = copy_values(self.parameters)
            set_values(self.parameters, self.progress.last_parameters)
            self.progress.last_parameters = {}

    def fail(self, reason, advice=ADVICE):
        """End the training of this cell. The other cells continue.

        If an evaluation has kept its best parameters, they are its result, and it has not failed.
        """
        if self.progress.best_parameters:
            kept = f"{reason}, so the best parameters from before are kept"
            self.progress.divergence = f"{kept}: {advice}"
            tqdm.write(f"ended    {self.title}{self.progress.divergence}", file=sys.stdout)
            return
        self.progress.failure = f"{self.title}{reason}: {advice}"
        if self.title:
            tqdm.write(f"failed   {self.progress.failure}", file=sys.stdout)

    def state_dict(self):
        return {"progress": dict(vars(self.progress))}

    def load_state_dict(self, state):
        self.progress = Progress(**state["progress"])
