"""What goes into the next line of metrics.jsonl, and onto the console, while a group trains.

Shapes: S steps, A adapters: the cells of the group.
"""

import math
import sys
import time
from contextlib import contextmanager

import numpy as np
import torch
from tqdm import tqdm

from minia3.files.progress import progress_bar
from minia3.inference.evaluation import no_answers
from minia3.training.device import peak_memory
from minia3.training.optimizer import learning_rate
from minia3.training.report import describe

FIRST_ADVICE = "look for it with --check-weights, or try --dtype float32"
LOG_EVERY = 10  # steps between two lines
REFRESH = 1.0  # seconds between two losses in the progress bar


class TrainingLog:
    """Counts steps, and collects what the next line says about the steps since the last one."""

    SAVED = ("step", "evaluated_at", "seconds", "logged_seconds", "n_tokens")

    def __init__(self, run, cells, config):
        self.run = run
        self.cells = cells
        self.config = config
        self.bar = None
        self.step = 0  # how many steps are done
        self.evaluated_at = 0  # the step of the last evaluation on held-out rows
        self.seconds = 0.0  # spent in steps, and not in evaluation
        self.started = 0.0  # when the current step started
        self.shown_at = 0.0  # when the bar got its last loss
        self.shown_tenths = 0  # tenths of the run that have a line on the terminal
        # Since the last line:
        self.logged_seconds = 0.0  # the value of `seconds` then
        self.n_tokens = 0
        self.losses_of_steps = []  # one dict per step: a cell's row -> its loss
        self.unread = []  # further steps: the rows that trained, and a tensor of all losses (A,)
        # In the current step:
        self.loss_A = None  # what the micro-batches so far add to the loss of each cell
        self.n_parts = 0  # micro-batches that this process has read

    def state_dict(self):
        state = {name: getattr(self, name) for name in self.SAVED}
        return {**state, "losses": self.read_losses()}

    def load_state_dict(self, state):
        for name in self.SAVED:
            setattr(self, name, state[name])
        self.losses_of_steps = state["losses"]

    @contextmanager
    def progress_bar(self):
        """Show a progress bar in a terminal, and print about ten lines that stay.

        Elsewhere, print a line for each line that training adds to metrics.jsonl.
        """
        options = {"total": self.config.steps, "initial": self.step, "unit": "step"}
        with progress_bar(**options) as self.bar:
            yield

    # When something is due

    def evaluation_is_due(self):
        every = self.config.eval_every
        if every == 0 or self.step == self.evaluated_at:
            return False
        # Also after the last step, or what the lowest rates have trained could not be the best.
        return self.step % every == 0 or self.step == self.config.steps

    def checkpoint_is_due(self):
        return self.step % self.config.save_every == 0

    def line_is_due(self):
        is_first_or_last = self.step in (1, self.config.steps)
        return self.step % LOG_EVERY == 0 or self.checkpoint_is_due() or is_first_or_last

    # A step

    def start_step(self):
        self.started = time.perf_counter()
        self.loss_A = None
        self.n_parts = 0

    def add_losses(self, loss_A):
        """Add what a micro-batch adds to the loss of each cell."""
        loss_A = loss_A.detach()
        if self.loss_A is None:
            self.loss_A = loss_A.clone()  # because `sum_step` changes it in place
        else:
            self.loss_A = self.loss_A + loss_A
        self.n_parts += 1

    def end_step(self, batch):
        self.unread.append(([cell.row for cell in batch.cells], self.loss_A))
        self.n_tokens += batch.n_tokens
        self.step += 1
        self.bar.update()
        if self.line_is_due():
            self.losses_of_steps = self.read_losses()
            self.unread = []
        now = time.perf_counter()
        self.seconds += now - self.started
        if not self.bar.disable and now - self.shown_at > REFRESH:
            self.show_loss(now)

    def show_loss(self, now):
        """Show the loss of the last step in the bar, because the next line may be minutes away."""
        loss_of_row = self.read_losses()[-1]
        self.bar.set_postfix_str(f"loss {np.mean([*loss_of_row.values()]):.3f}")
        self.shown_at = now

    def read_losses(self):
        """Return the losses since the last line: one dict per step, a cell's row -> its loss.

        This waits for a GPU, so call it only if a line is due, or once a second for the bar.
        """
        steps = list(self.losses_of_steps)
        if self.unread:
            loss_SA = torch.stack([loss_A for _, loss_A in self.unread])
            for (rows, _), losses in zip(self.unread, loss_SA.tolist(), strict=True):
                steps.append({row: losses[row] for row in rows})
        return steps

    # Lines

    def fail_bad_cells(self):
        """Fail each cell that had a loss that is not finite in a step since the last line.

        A cell that ran out of patience before this line is left alone, because its training is
        over, as it would be if the cell had trained alone.
        """
        first_step = self.step - len(self.losses_of_steps) + 1
        for step, loss_of_row in enumerate(self.losses_of_steps, first_step):
            for row, loss in loss_of_row.items():
                cell = self.cells[row]
                if not math.isfinite(loss) and cell.is_active:
                    fail_cell(cell, step, loss)

    def write_training(self, cells):
        """Write a line about the steps since the last line. cells: they took the last step."""
        means = self.mean_losses()
        if means:  # there are none if all cells have failed
            for cell in self.cells:
                if cell.name in means:
                    cell.progress.losses.append(float(means[cell.name]))
            line = self.training_line(means, cells)
            self.run.write("train", step=self.step, **line)
            self.show_training(line)
        self.losses_of_steps = []
        self.n_tokens = 0
        self.logged_seconds = self.seconds

    def write_rest(self):
        """Write a line about the steps since the last line, if an early stop has left some."""
        self.losses_of_steps = self.read_losses()
        self.unread = []
        if self.losses_of_steps:
            last_step = self.losses_of_steps[-1]
            self.write_training([cell for row, cell in enumerate(self.cells) if row in last_step])

    def training_line(self, means, cells):
        """Return the values of a line. means: from `mean_losses`."""
        n_steps = sum(map(len, self.losses_of_steps))  # of all cells
        n_examples = self.config.batch_size * n_steps
        seconds = self.seconds - self.logged_seconds
        line = {
            "loss": sum(means.values()) / len(means),
            "lr": max(learning_rate(self.step - 1, cell.config) for cell in cells),
            "examples_per_second": n_examples / seconds,
            "tokens_per_second": self.n_tokens / seconds,
            "memory_bytes": peak_memory(next(iter(cells[0].parameters.values())).device),
        }
        if self.cells[0].name:
            line["losses"] = means
        return line

    def mean_losses(self):
        """Return the mean loss of each cell that has trained since the last line: name -> mean.

        A cell that has failed has none, and neither has one that has run out of patience after a
        loss that is not finite.
        """
        means = {}
        for row, cell in enumerate(self.cells):
            steps = [loss_of_row for loss_of_row in self.losses_of_steps if row in loss_of_row]
            cell_losses = [loss_of_row[row] for loss_of_row in steps]
            if cell.progress.failure is None and cell_losses and np.isfinite(cell_losses).all():
                means[cell.name] = np.mean(cell_losses)
        return means

    def show_training(self, line):
        text = (
            f"loss {line['loss']:.3f}  lr {line['lr']:.1e}"
            f"  {line['examples_per_second']:.1f} examples/s"
            f"  {line['tokens_per_second']:.0f} tokens/s  {line['memory_bytes'] / 1e6:.0f} MB"
        )
        self.bar.set_postfix_str(f"loss {line['loss']:.3f}")
        tenth = 10 * self.step // self.config.steps
        if self.bar.disable or tenth > self.shown_tenths or self.step == 1:
            tqdm.write(f"step {self.step:>6}  {text}", file=sys.stdout)
            sys.stdout.flush()
        self.shown_tenths = tenth

    def write_evaluations(self, results):
        """Write results on held-out rows.

        results: a dict from each cell to its results, one per member of its task. None: its scores
        were not finite, so it has answered nothing.
        """
        for cell, cell_results in results.items():
            is_finite = cell_results is not None
            if not is_finite:
                cell_results = [no_answers(len(part.held_out_rows)) for part in cell.assignments]
            for assignment, result in zip(cell.assignments, cell_results, strict=True):
                self.write_evaluation(cell, assignment.task, result, is_finite)
        self.evaluated_at = self.step

    def write_evaluation(self, cell, task, result, is_finite):
        key = cell.key_of(task)
        self.run.write("eval", step=self.step, metric=task.metric, **key, **result)
        text = describe(task.metric, result) if is_finite else "the scores are not finite"
        text = f"{cell.title_of(task)}{text}, held out"
        tqdm.write(f"step {self.step:>6}  {text}", file=sys.stdout)


def fail_cell(cell, step, loss):
    """Fail a cell whose loss is not finite. In the first step, training is not the reason."""
    if step > 1:
        cell.fail(f"the loss of step {step} is {loss}")
        return
    reason = "before anything was trained: the weights or the adapter may hold NaN"
    cell.fail(f"the loss of step 1 is {loss}, {reason}", FIRST_ADVICE)
