"""Where a run writes, and how it is stopped and continued."""

import dataclasses
import sys
import threading
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from tqdm import tqdm

from minia3.files.lock import is_lock_of, lock_folder
from minia3.files.processes import (
    PeerGone,
    computing_together,
    first_goes_first,
    from_first,
    has_first_word,
    is_first,
    n_processes,
)
from minia3.files.read import reading
from minia3.training.announce import announce_code, announce_start_over
from minia3.training.checkpoint import (
    DAMAGED,
    DAMAGED_STATE,
    STATES,
    Checkpoint,
    checkpoint_of_results,
    forget_states,
    keep_state,
    load_checkpoint,
    load_state_to_extend,
    random_state,
    save_checkpoint,
)
from minia3.training.extension import extend, keep_last_state, steps_done
from minia3.training.metrics_file import Metrics, read_metrics
from minia3.training.outcomes import outcomes_of
from minia3.training.replicas import state_from_first
from minia3.training.run_folder import (
    FoundFiles,
    begin_default_run,
    begin_run,
    check_data,
    check_same_adapter,
    check_same_files,
    check_same_weights,
    checksums_of_adapter,
    checksums_of_run,
    clean_run,
    digest_weights,
    discard_run,
    environment,
    read_run_config,
    record_run,
    record_trackers,
)
from minia3.training.shown_commands import SCRIPT, resume_command, unrecorded_flags
from minia3.training.signals import Stopped
from minia3.training.trackers import close_trackers, hand_over, start_trackers

CLOSING = 2.0  # seconds for the trackers of a process that another thread ends


class Failed(RuntimeError):
    """A run that cannot continue. The message says why, and what to try."""


def parameter_names(state):
    """Return the names of the parameters in the state of a group, which may be None."""
    parameters = (state or {}).get("parameters")
    return list(parameters) if isinstance(parameters, dict) else []  # a damaged state has none


class Run:
    """A run: its folder, its last checkpoint, and the signals that stop it.

    A run trains its cells in groups. A checkpoint holds the results of the groups that are done,
    and the state of the group that trains.
    """

    def __init__(self, config, signals, program=SCRIPT):
        """Create the folder of a new run, or open the folder of --resume.

        program: how the run was started, for advice. Raise ValueError if the folder cannot be used.
        """
        self.signals = signals
        self.program = program
        self.resources = ExitStack()  # the lock of the folder, and a limit of memory
        self.folder = None  # None: the run leaves nothing
        self.lock = None  # of the folder, in the process that writes
        self.is_new = config.resume is None
        self.unrecorded = {}  # see `unrecorded_flags`
        self.saved = Checkpoint(n_processes=n_processes())
        # Of a run that --steps makes longer:
        self.saved_before_extension = None  # its Checkpoint
        self.extended_from = None  # the steps that it had done
        try:
            if is_first():
                self.open_folder(config)
            saved = dataclasses.replace(self.saved, group=None)  # which `restore` sends
            opened = from_first((self.folder, saved, self.extended_from, self.unrecorded))
            self.saved_names = from_first(parameter_names(self.saved.group))
            if not is_first():
                self.folder, self.saved, self.extended_from, self.unrecorded = opened
        except BaseException:
            # A notebook keeps the traceback of the last error, which would keep the lock.
            self.resources.close()
            raise
        # What this process writes to: the first one writes for all.
        self.written_folder = self.folder if is_first() else None
        self.finals = self.saved.finals
        self.n_done = self.saved.n_done
        self.failure = self.saved.failure
        self.failed_message = None  # see `describe_failures`
        self.metrics = Metrics(self.written_folder, self.saved.n_bytes, self.saved.reopened)
        self.dtype = None  # of the base, for the checkpoints
        self.undo_step = None  # a function, while a step computes: see `step_may_be_abandoned`
        self.trackers = []
        self.unsent = []  # lines that the trackers have not got yet
        self.has_results = False  # metrics.jsonl has a line of this process, or of the first one
        # What to advise if memory runs out; 0: no size is smaller. Planning it (memory_fit.py) may
        # lead to better sizes.
        self.suggested_micro_batch_size = 0
        if config.is_training:
            self.suggested_micro_batch_size = (config.micro_batch_size or config.batch_size) // 2
        self.suggested_eval_batch_size = config.eval_batch_size // 2
        self.is_offloaded = config.offload

    def open_folder(self, config):
        """Lock the folder of the run, and read its checkpoint if there is one."""
        if config.resume is not None:
            self.folder = Path(config.resume)
            self.lock = self.resources.enter_context(lock_folder(self.folder))
            clean_run(self.folder)
            saved = load_checkpoint(self.folder)
            self.unrecorded = unrecorded_flags(config, read_run_config(self.folder))
            # --resume alone starts over. A run that is made longer must not lose its results.
            if saved is None and (config.or_resume or "steps" in self.unrecorded):
                saved = checkpoint_of_results(self.folder)
            if saved and "steps" in self.unrecorded:
                self.saved_before_extension = saved
                self.extended_from = steps_done(saved, config)
                saved = extend(saved, config, self.extended_from)
            self.saved = saved or self.saved
        elif config.out:
            folder = Path(config.out)
            recorded = dataclasses.replace(config, out=str(folder))
            self.lock = begin_run(folder, recorded, environment(), self.resources)
            self.folder = folder
        elif not config.eval_only:  # an evaluation may leave nothing
            self.folder, self.lock = begin_default_run(config, self.resources)

    @property
    def continuation(self):
        """The command that continues this run."""
        return resume_command(self.program, self.folder, self.unrecorded)

    @property
    def stop_message(self):
        """What a run that was stopped says."""
        if self.folder is None:
            return "stopped"
        return f"stopped; to continue: {self.continuation}"

    def with_continuation(self, message):
        """Return the message of an error, and how to continue the run if that is possible."""
        if self.folder is None or not self.can_continue():
            return message
        return f"{message}; to continue: {self.continuation}"

    def can_continue(self):
        """Return whether the run has left its folder, although another process may have ended.

        A process on a machine without the folder knows that a run with results leaves it.
        """
        is_elsewhere = not is_first() and (self.has_results or not self.is_new)
        return is_elsewhere or (self.folder / "config.json").exists()

    @property
    def is_finished(self):
        return self.saved.is_finished

    def reads_adapter(self, config):
        """Return whether --adapter is read. It is not if a checkpoint has the values of all vectors
        (see `trainable_parameters`).
        """
        has_vectors = config.method == "ia3" and len(self.saved_names) > 0
        return config.adapter is not None and not has_vectors

    def find_files(self, cells, config):
        """Return the FoundFiles of this run. Raise ValueError if one cannot be read."""
        adapter_files = None
        if self.reads_adapter(config):
            with first_goes_first():  # because a process may have to finish what a kill left
                adapter_files = checksums_of_adapter(config)
        return FoundFiles(checksums_of_run(cells, config), digest_weights(config), adapter_files)

    def start_writing(self, cells, config):
        """Check that no data, chat template, weights or adapter have changed, and begin to write.

        Raise ValueError if one has changed, or differs on another machine of this run. Until this
        call, a resumed run changes no file, except that it removes temporary files of a killed one.
        """
        files = self.find_files(cells, config)
        check_same_files(files, config)
        if self.written_folder:
            check_data(self.folder, files.data)
            check_same_weights(self.folder, files.weights, config)
            check_same_adapter(self.folder, files.adapter_files, config)
            if not (self.folder / "checkpoint.pt").exists():
                announce_start_over(self.folder)
                forget_states(self.folder)
            # A signal waits, because `continuation` names flags until config.json has them.
            with self.uninterrupted():
                self.record_start(files, config)
        self.unrecorded = {}
        self.metrics.cut()
        self.trackers = start_trackers(config, self.written_folder)

    def record_start(self, files, config):
        """Change the files of a run that is extended, and write the flags into config.json.

        The checkpoint comes first, because it is large: if the disk is full, the run keeps its
        results. config.json comes last, so after a kill the run can be extended again.
        """
        if self.saved_before_extension is not None:
            keep_last_state(self.saved_before_extension, config)
            self.saved_before_extension = None
            self.metrics.reopen()
            self.write_checkpoint(self.saved.group)
            self.metrics.cut()
        changes = record_run(self.folder, files, config)
        announce_code(changes)
        self.unrecorded = {}

    def write(self, event, **values):
        """Add a line to metrics.jsonl, and hand it to the trackers of --log-to.

        Raise Failed if the folder of the run is gone.
        """
        self.check_folder()
        self.metrics.write(event=event, **values)
        self.has_results = True
        self.unsent.append({"event": event, **values})
        if not self.signals.is_held:
            self.send_lines()

    def send_to_new_trackers(self, config):
        """Hand a finished run to the trackers of --log-to, unless config.json has the same ones."""
        if "log_to" not in self.unrecorded:
            return
        self.trackers = start_trackers(config, self.written_folder)
        if self.trackers:
            record_trackers(self.folder, config)
            print(f"note     the lines of {self.folder} were sent to {config.log_to}")

    def send_lines(self):
        """Hand over the lines that the trackers have not got yet.

        A service may not answer, and then a signal stops the run within this call. So call it only
        when the state of the group can be saved. The line is not tried again.
        """
        while self.unsent:
            line = self.unsent.pop(0)
            self.trackers = hand_over(line, self.trackers)

    @contextmanager
    def uninterrupted(self):
        """Return a context in which signals wait, because the group's state is inconsistent."""
        with self.signals.uninterrupted():
            yield
        self.send_lines()

    @contextmanager
    def step_may_be_abandoned(self, group):
        """Return a context for the part of a step that computes, and changes no parameter.

        A second Ctrl-C, or SIGTERM, stops the run within it at once, and so does the end of another
        process. The step is then undone, so that the checkpoint is the one from before the step.
        `checkpointing` does this, because a signal may also come between the block's last line and
        its end, and then Python does not return to this function.
        """
        rng_state = random_state(group.device)  # dropout is drawn from it
        self.undo_step = partial(group.undo_step, rng_state)
        save_and_report = partial(self.save_and_report, group, rng_state)
        with self.signals.urgent(save_and_report), computing_together():
            yield
        self.undo_step = None

    def sum_over_processes(self, group):
        """Add up the gradients and the losses of all processes, if there are several.

        If a process has got a signal, all of them stop at the end of this step.
        """
        if n_processes() > 1:
            signal = group.sum_over_processes(self.signals.pending)
            if signal is not None:
                self.signals.pending = signal

    def save_and_report(self, group, rng_state, signal_number):
        """Save the state before the current step, say how to continue, and close the trackers.

        This runs in another thread, while the main thread is in a long operation.
        """
        if self.written_folder is not None:
            self.write_checkpoint(group.state_before_step(rng_state))
        sys.stdout.flush()  # because the process ends without cleaning up
        if has_first_word(128 + signal_number):
            tqdm.write(self.stop_message, file=sys.stderr)
        sys.stderr.flush()
        # In a thread, because a service may not answer, and by now the state is safe.
        arguments = (self.trackers, "stopped")
        closing = threading.Thread(target=close_trackers, args=arguments, daemon=True)
        closing.start()
        closing.join(CLOSING)

    @contextmanager
    def checkpointing(self, group):
        """Save a checkpoint at the end of the block, and also if it is stopped or a step fails."""
        try:
            signals = self.signals
            with signals.ignored_after(PeerGone), signals.arriving(), computing_together():
                yield
                self.save(group)  # here, because a signal may come now, too
        except (Stopped, PeerGone):
            if self.undo_step is not None:
                self.undo_step()
            self.save(group)
            raise
        except Exception:  # such as memory that has run out
            if self.undo_step is not None:  # or else the step may be half done
                # Other processes may end by the same error, and torchrun then stops this one.
                self.signals.is_stopping = n_processes() > 1
                with suppress(Exception):  # because the first error says what is wrong
                    self.undo_step()
                    self.save(group)
            raise

    def save(self, group):
        """Write a checkpoint from which `restore` continues the group."""
        # Only the process that writes needs the state.
        if self.written_folder is not None:
            self.write_checkpoint(group.state_dict())

    def restore(self, group):
        """Restore the group from the last checkpoint or, in an extended run, from states/.

        Without such a state, the group begins.
        """
        state = self.saved.group
        origin = "checkpoint.pt"
        damage = DAMAGED
        # Only the first process has read it, because others may be on machines without the folder.
        if from_first(state is None):
            state = load_state_to_extend(self.written_folder, self.n_done)
            origin = f"{STATES}/{self.n_done}.pt"
            damage = DAMAGED_STATE
        state = state_from_first(state)
        if state is not None:
            with reading(self.folder / origin, damage, is_bounded=True):
                group.load_state_dict(state)
            self.saved.group = None
        for cell in group.cells:
            cell.note_dtype(self.dtype)

    def has_folder(self):
        """Return whether the folder in which this process writes is still that of this run."""
        folder = self.written_folder
        return (folder / "config.json").exists() and is_lock_of(self.lock, folder)

    def check_folder(self):
        """Raise Failed if somebody has deleted the folder: a new one would hold half a run."""
        if self.written_folder is not None and not self.has_folder():
            raise Failed(
                f"{self.folder}: the folder of this run was deleted or moved while it trained, "
                "so its results have no place: begin a new run"
            )

    def write_checkpoint(self, group_state, is_finished=False):
        """Replace the checkpoint. group_state: None between two groups.

        Raise Failed if the folder of the run is gone.
        """
        self.check_folder()
        checkpoint = Checkpoint(
            is_finished=is_finished,
            n_done=self.n_done,
            finals=self.finals,
            failure=self.failure,
            n_bytes=self.metrics.n_bytes,
            reopened=self.metrics.reopened,
            group=group_state,
            n_processes=n_processes(),
            dtype=self.dtype,
        )
        self.metrics.sync()
        save_checkpoint(self.written_folder, checkpoint)

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
        state = None
        if self.written_folder is not None:
            state = group.state_dict()  # from which the run can be made longer
            if not is_last:
                self.check_folder()
                keep_state(self.written_folder, self.n_done, state)
        self.n_done += len(group.cells)
        if not is_last:
            self.write_checkpoint(None)
            return
        if not self.finals:
            raise Failed(self.failure)
        self.write_checkpoint(state, is_finished=True)

    @property
    def ending(self):
        """How a run has ended that was neither stopped nor raised an error."""
        return "finished" if self.failure is None else "failed"

    def describe_failures(self):
        """Return which adapters of a grid have failed, and which have results, or None.

        A run that was finished before has said so.
        """
        if self.written_folder is None or self.is_finished:
            return None
        names = {"final": [], "failed": []}
        for name, event in outcomes_of(read_metrics(self.folder / "metrics.jsonl")).items():
            names[event].append(name)
        if not names["failed"]:
            return None
        n_failed = len(names["failed"])
        return (
            f"{n_failed} of {n_failed + len(names['final'])} adapters failed, as "
            f"{self.folder / 'metrics.jsonl'} says: {', '.join(names['failed']):.300}; the others "
            f"have their results: {', '.join(names['final']):.300}"
        )

    def discard_if_new(self):
        """Remove what a new run has written, if it has no results yet, because it has failed."""
        if self.written_folder and self.is_new and self.has_folder():
            self.send_lines()
            close_trackers(self.trackers, "failed")  # because they write into the folder
            self.trackers = []
            discard_run(self.written_folder)

    def close(self, ending):
        """Unlock the folder, so that other processes may write into it.

        ending: how the run has ended, "finished", "stopped" or "failed".
        """
        with self.resources:  # which unlocks it also if a tracker is interrupted
            self.send_lines()  # those of the step that was the last one because of a signal
            close_trackers(self.trackers, ending)
