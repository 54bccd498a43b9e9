"""Train (IA)^3 vectors for a task on a frozen T5 or LLaMA, and evaluate the model before and after.

    python train.py                                             the small model and task in data/
    python train.py --model t5-base --task rte                  a real model and a real task
    python train.py --model path/to/model --task path/to/rows.jsonl
    python train.py --model t5-base --task rte,cb --seed 0,1    four adapters, trained together
    python train.py --resume runs/t5-base-rte-ia3-0             continue a run that was stopped

The loop is `train`, and the functions after it prepare and call it. The loop runs the model through
`choice_logprobs` (minia3/inference/scoring.py). The model is in minia3/model/, and the README says
in which order to read all of this.

Shapes: B examples, C choices, L tokens of a choice, A adapters, one per cell.
"""

import gc
import sys

from minia3.files.program import begin, end
from minia3.training.command_line import exit_on_mistakes
from minia3.training.shown_commands import SCRIPT

if __name__ == "__main__":
    # Handle Ctrl-C, --help and mistakes in the flags before torch is imported, which takes seconds.
    begin("train.py")
    exit_on_mistakes(sys.argv[1:], SCRIPT)

from minia3.files.processes import first_goes_first, is_first
from minia3.inference.scoring import choice_logprobs
from minia3.training.announce import (
    announce_device,
    announce_extension,
    announce_finished,
    announce_group,
    announce_processes,
)
from minia3.training.choices import TRAINED_ALONE
from minia3.training.config import Config
from minia3.training.device import (
    check_same_device,
    choose_device,
    choose_dtype,
    use_deterministic_kernels,
)
from minia3.training.evaluation_memory import plan_evaluation_memory
from minia3.training.grid import make_cells, set_steps
from minia3.training.group import Group
from minia3.training.methods import save_trained
from minia3.training.model_card import write_card
from minia3.training.optimizer import learning_rate
from minia3.training.prepare import check_model
from minia3.training.report import report
from minia3.training.results import Baselines, evaluate_after, evaluate_before
from minia3.training.run import Run
from minia3.training.start import run_command_line
from minia3.training.step_memory import plan_step_memory


def train(run, group, config):
    """Train all cells of a group at once. A cell is one adapter: a row of the model's vectors.

    Each cell has its own data order, loss, clipping, optimizer state and early stop, as if it
    trained alone. The cells share only the passes, forward and backward, and the draws of dropout.
    A signal stops the run at once, except within `run.uninterrupted()`. Outside these blocks the
    state of the group can always be saved. `log` counts the steps (`end_step`), and says what is
    due after each.
    """
    model = group.model
    log = group.log
    with log.progress_bar(), run.checkpointing(group):
        while True:
            # From time to time, evaluate on held-out rows. Each cell keeps its best parameters.
            if log.evaluation_is_due():
                results = group.evaluate_active()  # cell -> its results
                with run.uninterrupted():
                    for cell, cell_results in results.items():
                        cell.keep_if_best(cell_results)
                    log.write_evaluations(results)

            # A cell that has failed or run out of patience is no longer active.
            if log.step == config.steps or not group.active_cells:
                with run.uninterrupted():
                    log.write_rest()
                break

            with run.uninterrupted():
                log.start_step()
                model.train()
                # Forward and backward, in parts if the examples are many. Nothing is updated yet,
                # so a second Ctrl-C gives up this step, and nothing else.
                with run.step_may_be_abandoned(group):
                    batch = group.next_batch()
                    for micro_batch in batch.split(group.micro_batch_size):
                        logp_BCL = choice_logprobs(model, micro_batch.inputs, micro_batch.row_B)
                        loss_A = micro_batch.losses(logp_BCL)  # per cell, from its examples here
                        loss_A.sum().backward(group.loss_scale)
                        log.add_losses(loss_A)
                    run.sum_over_processes(group)  # if torchrun has started several

                # Undo the loss scale, which only float16 has. Clip each cell's gradient by its own
                # norm, and update each cell at its own rate.
                group.unscale_gradients()
                group.optimizer.clip(config.clip)
                group.update({cell: learning_rate(log.step, cell.config) for cell in batch.cells})
                model.zero_grad()
                model.eval()  # because only a step has dropout
                log.end_step(batch)

                if log.line_is_due():
                    log.fail_bad_cells()
                    log.write_training(batch.cells)
                if log.checkpoint_is_due():
                    run.save(group)

    for cell in group.cells:
        cell.take_best()


def run_group(run, group, config, baselines):
    """Evaluate the cells of a group, train them, evaluate them again, and save the result."""
    run.restore(group)  # a resumed run has done a part of what follows
    for cell in group.cells:
        baselines.add(cell)  # what was evaluated before this run was resumed
        evaluate_before(run, group, cell, baselines)
    if config.is_training:
        train(run, group, config)
    for cell in group.cells:
        if cell.progress.is_reported:  # before this run was resumed
            continue
        finals = []  # a cell that has failed has none
        if cell.progress.failure is None:
            finals = evaluate_after(group, cell)
        if config.is_training and finals and is_first():
            run.check_folder()
            folder = run.folder / cell.folder
            save_trained(group, cell, folder)
            write_card(folder, cell.config, finals, cell.checksums)
        run.finish_cell(cell, finals)
        if cell is not group.cells[-1]:  # after the last one, `finish_group` saves
            run.save(group)


def run_grid(run: Run, config: Config):
    """Run the cells that are not done yet, one group after the other, and print the report."""
    if run.is_finished:
        run.send_to_new_trackers(config)
        announce_finished(run, config)
        return

    with first_goes_first():  # because this downloads
        check_model(config.model)  # before the cells, which depend on what it has learned
        cells = make_cells(config)
    config = set_steps(config, cells)  # --epochs
    device, reason = choose_device(config.device)
    dtype = choose_dtype(config, device)
    check_same_device(device, dtype)
    run.dtype = str(dtype).removeprefix("torch.")
    announce_device(device, reason, run.dtype, run.saved.dtype)
    announce_processes(run.saved.n_processes, config)
    if run.extended_from is not None:
        announce_extension(run.extended_from, config)
    if config.deterministic:
        use_deterministic_kernels()
    n_cells = len(cells)
    run.start_writing(cells, config)

    # The cells of (IA)^3 share a model. Other methods change the model for all of its examples, so
    # each cell loads its own.
    is_alone = config.is_training and config.method in TRAINED_ALONE
    group_size = 1 if is_alone else n_cells
    baselines = Baselines()
    del cells[: run.n_done]  # a resumed run has trained them
    while cells:
        group = Group(run, cells[:group_size], config, device, dtype)
        announce_group(group, is_first=run.n_done == 0)
        if config.is_training:
            group.draw_batches(cells)
            run.suggested_micro_batch_size = plan_step_memory(run, group)
        run.suggested_eval_batch_size = plan_evaluation_memory(run, group)
        run_group(run, group, config, baselines)
        del cells[:group_size]  # in place, because a cell holds parameters of its model
        run.finish_group(group, is_last=not cells)
        # Free the model before another one is loaded. Only the garbage collector frees a cycle, and
        # --recompute and --compile give a block a forward that holds the block; with --offload, the
        # hooks of FSDP hold each other.
        del group
        if cells:
            gc.collect()

    reported = {final.get("adapter") for final in run.finals}  # {None} if there is a single cell
    report(config, run.folder, run.finals, n_failed=n_cells - len(reported))


def main(words=None, is_program=False):
    """Return the exit code: 0, 2 for a user's mistake, 1 for a failure, 128 + n for signal n.

    is_program: whether this process does nothing else, so that a signal may end it at any time.
    """
    words = sys.argv[1:] if words is None else words
    return run_command_line(words, run_grid, SCRIPT, is_program)


if __name__ == "__main__":
    code = main(is_program=True)
    end()
    sys.exit(code)
