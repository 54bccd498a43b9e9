"""The cells that share a model: with (IA)^3 the whole grid, otherwise one cell at a time."""

import functools
import warnings

import torch

from minia3.checkpoints.chat import read_template
from minia3.checkpoints.hub import find, find_adapter
from minia3.checkpoints.load import build_model, load_model
from minia3.checkpoints.tokenizer import load_tokenizer
from minia3.files.processes import dividing, first_goes_first
from minia3.files.progress import showing
from minia3.inference.evaluation import check_evaluation, evaluate, over_prompts
from minia3.inference.scoring import NotFiniteError
from minia3.model.ia3 import vectors
from minia3.model.shard import is_sharded, reset_passes
from minia3.training.batch import MixedBatch, choose_micro_batch_size
from minia3.training.checkpoint import random_state, set_random_state, set_values
from minia3.training.device import limit_threads
from minia3.training.drawing import draw_batches, print_notes
from minia3.training.learned import learned_tasks
from minia3.training.log import TrainingLog
from minia3.training.loss_scale import choose_loss_scale, unscale
from minia3.training.methods import trainable_parameters
from minia3.training.optimizer import make_optimizer
from minia3.training.prepare import forget_peak_memory, prepare_model
from minia3.training.replicas import seed_dropout, sum_step
from minia3.training.shards import choose_shards


def template_of_run(config, cells):
    """Return the chat template that replaces the model's own, or None.

    It is that of --chat-template, or else that of the task files and of what --adapter or --model
    has learned. Raise ValueError if these differ.
    """
    if config.chat_template is not None:
        return read_template(config.chat_template)
    specs = []
    for cell in cells:
        specs += [task.spec for task in cell.task.members]
    if not any(spec.messages for spec in specs):
        return None
    specs += learned_tasks(config.model, config.adapter).values()
    stated = {spec.chat_template for spec in specs}
    stated.discard(None)
    if len(stated) > 1:
        raise ValueError(
            "the tasks, or a task and what was learned before, have different chat templates: "
            "train them in separate runs, or choose one with --chat-template"
        )
    return next(iter(stated), None)


def tokenizer_with(model_name, template):
    """Return the tokenizer of a model, with a template from `template_of_run`."""
    tokenizer = load_tokenizer(model_name)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


class Group:
    """A model, and the cells that train in it at the same time."""

    def __init__(self, run, cells, config, device, dtype):
        """Load the model with a row of vectors per cell. config: the run's flags."""
        self.cells = cells
        self.config = config
        first_config = cells[0].config  # has one seed and one rate; in a grid, `config` has several
        forget_peak_memory(device)
        with first_goes_first():
            download(config, run)
            self.chat_template = template_of_run(config, cells)  # which may download --adapter
        shards = choose_shards(config, device, dtype)
        with showing("loading"):
            self.model = load_model(
                config.model,
                dtype=dtype,
                device=device,
                n_adapters=len(cells),
                quantize=config.quantize,
                check_finite=config.check_weights,
                shards=shards,
            )
        self.tokenizer = tokenizer_with(config.model, self.chat_template)
        self.n_base = count_base(self.model.config)  # parameters without the vectors

        with warnings.catch_warnings(record=True) as caught:
            trained = trainable_parameters(self.model, first_config, run.saved_names)
        self.warnings = [str(warning.message) for warning in caught]
        if dtype == torch.float64:
            self.model.double()  # so that the vectors are not float32
        prepare_model(self.model, config)
        limit_threads(self.n_base)

        self.n_trained = 0  # parameters of one cell
        self.parameters = {}  # what a checkpoint holds
        self.optimizer = None
        self.loss_scale = choose_loss_scale(dtype, device)
        self.micro_batch_size = None  # examples of a forward pass: see `draw_batches`
        if config.is_training:
            self.optimizer = make_optimizer(trained.values(), first_config)
            self.n_trained = count_entries(trained) // len(cells)
            # Vectors that do not train are saved, too: they may come from --adapter, which may have
            # changed or gone when the run is resumed.
            self.parameters = vectors(self.model) | trained
        for row, cell in enumerate(cells):
            cell.attach(trained, row)
        self.log = TrainingLog(run, cells, config)
        # Dropout is drawn from torch's global generator, and nothing else is.
        torch.manual_seed(first_config.seed)

    @property
    def active_cells(self):
        return [cell for cell in self.cells if cell.is_active]

    @property
    def device(self):
        return self.model.embed.weight.device

    def draw_batches(self, cells):
        """Draw the examples of all steps, and choose how many of them a forward pass reads.

        cells: those of this group and of all that follow, so that a row is refused before anything
        trains. The examples of later cells are drawn again by their group, because all together
        they could fill the memory. Raise ValueError if a row cannot be trained on, or cannot be
        evaluated later.
        """
        for cell in cells:
            is_here = cell in self.cells
            if cell.is_checked and not is_here:  # by an earlier group
                continue
            tokenizer = self.tokenizer
            if not is_here:
                template = template_of_run(self.config, [cell])
                tokenizer = tokenizer_with(self.config.model, template)
            batches = draw_batches(cell, tokenizer, self.model)
            if is_here:
                cell.batches = batches
            if not cell.is_checked:
                self.check_rows(cell, tokenizer)
                cell.is_checked = True
        print_notes(self.cells)
        self.micro_batch_size = choose_micro_batch_size(self)

    def check_rows(self, cell, tokenizer):
        """Raise ValueError if a row that is evaluated after the first step cannot be evaluated."""
        for assignment in cell.assignments:
            rows = list(assignment.held_out_rows)
            if cell not in self.cells:  # those of this group are evaluated before the first step
                rows += assignment.report_rows
            for prompt in assignment.eval_prompts:
                with cell.naming_task(assignment.task):
                    check_evaluation(
                        self.model,
                        tokenizer,
                        rows,
                        prompt=prompt,
                        metric=assignment.task.metric,
                        max_length=self.config.max_length,
                        max_target_length=self.config.max_target_length,
                    )

    def next_batch(self):
        """Return the examples of the next step, for all cells that still train.

        Also prepare the model: seed the dropout of this step, and let the copies of a sharded model
        agree on their number of passes.
        """
        seed_dropout(self.cells[0].config.seed, self.log.step)
        if is_sharded(self.model):
            reset_passes(self.model)  # because the copies need not have made equally many so far
        return MixedBatch(self.active_cells, self.log.step, n_rows=len(self.cells))

    def update(self, rates):
        """Take a step of the optimizer for each cell. rates: a dict from a cell to its rate."""
        self.optimizer.step({cell.row: rate for cell, rate in rates.items()})
        for cell in rates:
            cell.progress.n_steps += 1

    def unscale_gradients(self):
        """Undo what `loss_scale` has done to the gradients of this step."""
        if self.loss_scale is not None:
            unscale(self.parameters.values())

    def sum_over_processes(self, signal):
        """Add up the gradients and the losses of this step over all processes.

        signal: the number of the signal that this process has got, or None. Return the number that
        any process has got, or None. Raise the errors of `sum_step`.
        """
        if is_sharded(self.model):
            # The processes of one copy must have made equally many passes through its stacks. Those
            # of another copy may have made others: a LLaMA reads choices in two passes, and single
            # targets in one. All processes have read equally many parts of the batch, though.
            reset_passes(self.model)
        parameters = self.parameters.values()  # also those that do not train
        return sum_step(parameters, self.log.loss_A, self.log.n_parts, signal)

    def evaluate(self, cell, assignment, rows, shots=()):
        """Return the result of a cell on `rows`: the median over the prompts of --eval-prompt.

        This follows the paper (section 3.1). T-Few's code draws a prompt for each row instead.
        """
        results = []
        title = f"{cell.title_of(assignment.task)}evaluating"
        for prompt in assignment.eval_prompts:
            with cell.naming_task(assignment.task), showing(title), dividing():
                results.append(self.evaluate_prompt(cell, assignment, rows, prompt, shots))
        return over_prompts(results)

    def evaluate_prompt(self, cell, assignment, rows, prompt, shots):
        """Return the result of a cell on `rows`, in the words of one prompt."""
        return evaluate(
            self.model,
            self.tokenizer,
            rows,
            prompt=prompt,
            metric=assignment.task.metric,
            shots=shots,
            adapter=cell.row,
            max_length=self.config.max_length,
            max_target_length=self.config.max_target_length,
            max_new_tokens=self.config.max_new_tokens,
            batch_size=self.config.eval_batch_size,
        )

    def evaluate_held_out(self, cell):
        """Return the results of a cell on its held-out rows, one per member of its task."""
        results = []
        for assignment in cell.assignments:
            results.append(self.evaluate(cell, assignment, assignment.held_out_rows))
        return results

    def evaluate_active(self):
        """Return a dict from each cell that still trains to its results on held-out rows.

        A cell whose scores are not finite has None. It still has its best parameters so far.
        """
        results = {}
        for cell in self.active_cells:
            try:
                results[cell] = self.evaluate_held_out(cell)
            except NotFiniteError:
                results[cell] = None
        return results

    def state_dict(self):
        """Return all that a resumed run needs. Its tensors are those that train, and no copies."""
        return {
            "cells": [cell.state_dict() for cell in self.cells],
            "log": self.log.state_dict(),
            "optimizer": self.optimizer.state_dict() if self.optimizer else None,
            "parameters": self.parameters,
            "random": random_state(self.device),
        }

    def undo_step(self, rng_state):
        """Go back to where the current step began. Its gradients exist, but it has updated nothing.

        rng_state: the `random_state` before its forward pass.
        """
        set_random_state(rng_state, self.device)
        self.model.zero_grad()
        self.model.eval()

    def state_before_step(self, rng_state):
        """Return the `state_dict` that `undo_step` would lead to, and change nothing."""
        return self.state_dict() | {"random": rng_state}

    def load_state_dict(self, state):
        """Continue from what `state_dict` has returned."""
        for cell, cell_state in zip(self.cells, state["cells"], strict=True):
            cell.load_state_dict(cell_state)
        self.log.load_state_dict(state["log"])
        adapter = self.config.adapter
        if adapter is not None and shapes(state["parameters"]) != shapes(self.parameters):
            raise ValueError(
                f"it has other parameters than --adapter {adapter}, which was replaced: restore "
                "the adapter with which the run began"
            )
        set_values(self.parameters, state["parameters"])
        if self.optimizer:
            self.optimizer.load_state_dict(state["optimizer"])
        for cell in self.cells:
            cell.take_last()  # a run that is made longer continues from its last step
        set_random_state(state["random"], self.device)


def download(config, run):
    """Download the files of --model and --adapter, if they are needed and not on this machine."""
    find(config.model)
    if run.reads_adapter(config):
        find_adapter(config.adapter)


def shapes(parameters):
    """Return a dict from the name of each parameter to its shape."""
    return {name: parameter.shape for name, parameter in parameters.items()}


@functools.lru_cache(maxsize=1)  # all groups of a run have the same base
def count_base(model_config):
    """Return how many parameters a model has without vectors."""
    model = build_model(model_config)  # a new one, because a quantized model has codes instead
    return count_entries(dict(model.named_parameters())) - count_entries(vectors(model))


def count_entries(parameters):
    return sum(parameter.numel() for parameter in parameters.values())
