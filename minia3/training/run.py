"""Where a run writes, and how it is stopped and continued."""

import dataclasses
from contextlib import ExitStack, contextmanager
from pathlib import Path

from minia3.files.lock import lock_folder
from minia3.files.read import reading
from minia3.files.write import remove_leftovers
from minia3.training.checkpoint import DAMAGED, Checkpoint, load_checkpoint, save_checkpoint
from minia3.training.run_folder import Metrics, begin_run, default_folder, discard_run, record_data
from minia3.training.signals import Stopped


class Failed(Exception):
    """A run that cannot continue. The message says why, and what to try."""


class Run:
    """A run: its folder, its last checkpoint, and the signals that stop it.

    A run trains its cells in groups. A checkpoint holds the results of the groups that are done,
    and the state of the group that trains.
    """

    def __init__(self, config, signals):
        """Create the folder of a new run, or open the folder of --resume.

        Raise ValueError if the folder cannot be used.
        """
        self.signals = signals
        self.resources = ExitStack()  # the lock of the folder
        self.folder = None  # nothing is written
        self.is_new = config.resume is None
        saved = None
        if config.resume is not None:
            self.folder = Path(config.resume)
            self.resources.enter_context(lock_folder(self.folder))
            remove_leftovers(self.folder)
            saved = load_checkpoint(self.folder)
        elif config.out is not None or not config.eval_only:
            folder = Path(config.out or default_folder(config))
            recorded = dataclasses.replace(config, out=str(folder))
            self.resources.enter_context(begin_run(folder, recorded))
            self.folder = folder

        self.saved = saved or Checkpoint()
        self.finals = self.saved.finals
        self.n_done = self.saved.n_done
        self.failure = self.saved.failure
        self.n_bytes = self.saved.n_bytes
        self.metrics = None  # see `start_writing`

    @property
    def is_finished(self):
        return self.saved.is_finished

    def start_writing(self, cells):
        """Check that the data are the same as when the run began, and open metrics.jsonl.

        Raise ValueError if the data have changed. Until this call, a resumed run changes no file.
        """
        if self.folder:
            checksums = {}
            for cell in cells:
                checksums |= cell.checksums
            record_data(self.folder, checksums)
        self.metrics = Metrics(self.folder, self.n_bytes)

    def write(self, event, **values):
        """Add a line to metrics.jsonl."""
        self.n_bytes = self.metrics.write(event=event, **values)

    def uninterrupted(self):
        """Return a context in which signals wait, because the group cannot be saved within it."""
        return self.signals.uninterrupted()

    @contextmanager
    def checkpointing(self, group):
        """Save a checkpoint at the end of the block, and also if a signal stops it."""
        try:
            yield
        except Stopped:
            self.save(group)
            raise
        self.save(group)

    def save(self, group):
        self.write_checkpoint(group.state_dict())

    def restore(self, group):
        """Put the group into its state in the last checkpoint, if there is one."""
        if self.saved.group is not None:
            with reading(self.folder / "checkpoint.pt", DAMAGED):
                group.load_state_dict(self.saved.group)
            self.saved.group = None

    def write_checkpoint(self, group_state, is_finished=False):
        checkpoint = Checkpoint(
            is_finished, self.n_done, self.finals, self.failure, self.n_bytes, group_state
        )
        save_checkpoint(self.folder, checkpoint)

    def finish_cell(self, cell, finals):
        """Write the results of a cell, or why it failed."""
        for final in finals:
            self.write("final", step=cell.progress.n_steps, **final)
        if cell.progress.failure:
            self.failure = cell.progress.failure
            self.write("failed", step=cell.progress.n_steps, reason=self.failure, **cell.key)
        self.finals += finals
        cell.progress.is_reported = True

    def finish_group(self, group, is_last):
        """Save the results of a group's cells. Raise Failed if all cells of the run have failed."""
        self.n_done += len(group.cells)
        if not is_last:
            self.write_checkpoint(None)
            return
        if not self.finals:
            raise Failed(self.failure)
        # Leave out what only a resumed run needs. A whole model is in the folder already.
        parameters = {} if group.config.method == "full" else group.state_dict()["parameters"]
        self.write_checkpoint({"parameters": parameters}, is_finished=True)

    def discard_if_new(self):
        if self.folder and self.is_new:
            discard_run(self.folder)

    def close(self):
        """Unlock the folder, so that other processes may write into it."""
        self.resources.close()
