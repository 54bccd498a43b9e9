"""Train (IA)^3 vectors for a task on a frozen T5 or LLaMA, and evaluate the model before and after.

    python train.py                                             the small model and task in data/
    python train.py --model t5-base --task rte                  a real model and a real task
    python train.py --model path/to/model --task path/to/rows.jsonl
    python train.py --model t5-base --task rte,cb --seed 0,1    four adapters, trained together
    python train.py --resume runs/t5-base-rte-ia3-0             continue a run that was stopped

The loop is `train`, and the functions after it call it. It runs the model through `choice_logprobs`
(minia3/inference/scoring.py). The model is in minia3/model/t5.py or llama.py, and the method is in
minia3/model/ia3.py.
"""

import sys
from dataclasses import dataclass

from minia3.files.program import begin

if __name__ == "__main__":
    begin("train.py")  # before torch is imported, which takes seconds

from minia3.files.messages import message_of
from minia3.files.streams import lasting_output, use_utf8
from minia3.inference.scoring import choice_logprobs
from minia3.model.more_vectors import LINEARS, SITE_NAMES
from minia3.training.announce import announce_device, announce_group
from minia3.training.device import (
    DTYPES,
    choose_device,
    choose_dtype,
    use_deterministic_kernels,
)
from minia3.training.flags import flag, parse_flags
from minia3.training.grid import make_cells
from minia3.training.group import Group
from minia3.training.losses import LOSSES
from minia3.training.methods import METHODS, TRAINED, TRAINED_ALONE, save_trained
from minia3.training.model_card import write_card
from minia3.training.optimizer import OPTIMIZERS, learning_rate
from minia3.training.report import report
from minia3.training.results import Baselines, evaluate_after, evaluate_before
from minia3.training.rules import check_config
from minia3.training.run import Failed, Run, stop_message
from minia3.training.run_folder import restore_flags
from minia3.training.signals import Signals, Stopped
from minia3.training.step_memory import check_memory, is_out_of_memory, out_of_memory_message


@dataclass
class Config:
    """The flags of a run. `python train.py --help` prints these texts."""

    # What is trained, and on what
    model: str = flag("tiny-t5", "known name (t5-base ...), hub id, model folder, or .gguf file")
    task: str | tuple = flag(
        "same-colour",
        "known task (rte ...), .jsonl or .csv file, or folder; commas separate several tasks",
    )
    method: str = flag(
        "ia3", "ia3, lora, full, none, or icl (--shots examples before each input)", one_of=METHODS
    )
    sites: str = flag(
        "k,v,ff", "vectors that train; q,o,up,gate are not in the paper", some_of=SITE_NAMES
    )
    layers: str = flag(
        "0-", "layers whose vectors train, such as 0-5,20-; for T5, of the encoder and the decoder"
    )
    no_cross: bool = flag(False, "do not train the vectors of cross-attention")
    rank: int = flag(8, "rank of LoRA", at_least=1)
    alpha: int = flag(16, "scale of LoRA, which adds alpha / rank * B A to a weight", at_least=1)
    where: str = flag(
        "q,v", "weights that LoRA is added to: some of q,k,v,o,gate,up,down", some_of=LINEARS
    )
    shots: int | None = flag(
        None, "train on T-Few's few-shot split of this size (default: all rows)", at_least=1
    )
    adapters: str = flag(
        "each",
        "for several tasks: each (an adapter per task) or one (an adapter for their mixture)",
        one_of=("each", "one"),
    )
    cap: int = flag(2**16, "a mixture draws a larger task as if it had this many rows", at_least=1)
    seed: int | tuple = flag(
        0,
        "seed of shots, order, prompts and dropout; commas separate several seeds",
        at_least=0,
        below=2**32,
    )
    adapter: str | None = flag(
        None,
        "PEFT adapter to start from, or to evaluate (default: none, so all vectors are one)",
        also=["--init"],
    )
    eval_only: bool = flag(False, "evaluate and stop; nothing is written unless --out is given")

    # Where the data, the run and the model are
    data_dir: str = flag("data", "folder of tasks; missing files are downloaded into it")
    out: str | None = flag(None, "folder of the run (default: runs/<model>-<task>-<method>-<seed>)")
    resume: str | None = flag(
        None, "continue the run in this folder, with its flags (default: a new run)"
    )
    device: str | None = flag(
        None, "cpu, cuda, cuda:1, mps, xpu ... (default: the first of cuda, mps, xpu that there is)"
    )
    dtype: str | None = flag(
        None,
        "float32, bfloat16, float16 (not for T5) or float64 weights (default: bfloat16 on a GPU, "
        "but float32 for full and on a CPU)",
        one_of=tuple(DTYPES),
    )
    compile: bool = flag(False, "compile the blocks (torch.compile): slow to start, then faster")
    recompute: bool = flag(
        False, "recompute blocks in the backward pass: less memory, slower steps"
    )
    deterministic: bool = flag(
        False, "use deterministic kernels: on a GPU, too, equal runs give equal bits"
    )

    # The recipe, with T-Few's values
    steps: int = flag(1000, "steps of the optimizer", at_least=1)
    batch_size: int = flag(8, "examples per step and adapter", at_least=1)
    micro_batch_size: int | None = flag(
        None, "examples per forward pass, to save memory (default: the whole batch)", at_least=1
    )
    optimizer: str | None = flag(
        None,
        "adafactor or adamw (default: adafactor for ia3, adamw for lora and full)",
        one_of=OPTIMIZERS,
    )
    lr: float | tuple = flag(
        3e-3,
        "peak learning rate; with adafactor, relative to a vector's RMS; commas separate several",
        above=0,
        below=1e32,
    )
    warmup_ratio: float | tuple = flag(
        0.06,
        "share of the steps in which the learning rate rises; commas separate several",
        at_least=0,
        below=1,
    )
    clip: float = flag(1.0, "largest norm of an adapter's gradient", above=0)
    weight_decay: float = flag(
        0.0,
        "weight decay of adamw; it pulls vectors toward 0, although 1 is the identity",
        at_least=0,
    )
    losses: str = flag(
        "lm,ul,ln",
        "losses to add up: lm likelihood, ul unlikelihood, ln length-normalised",
        some_of=tuple(LOSSES),
    )
    dropout: float | None = flag(
        None, "dropout in training (default: as the model's config says)", at_least=0, below=1
    )

    # Evaluation and checkpoints
    max_length: int = flag(
        512, "most tokens of an input; a longer input loses words from its middle", at_least=1
    )
    max_new_tokens: int = flag(64, "most tokens to generate for a row with a target", at_least=1)
    eval_prompt: str | int = flag(
        "0", "prompts to evaluate with: 0, or 0,1,2, or all; the result is the median"
    )
    eval_batch_size: int = flag(16, "rows per forward pass in evaluation", at_least=1)
    eval_every: int = flag(
        0,
        "steps between evaluations on held-out rows, which choose the best vectors (0: never)",
        at_least=0,
    )
    patience: int = flag(
        0,
        "stop after this many evaluations in a row without a better one (0: never)",
        at_least=0,
    )
    save_every: int = flag(100, "steps between checkpoints", at_least=1)

    @property
    def is_training(self):
        return self.method in TRAINED and not self.eval_only


def train(run, group, config):
    """Train all cells of a group at once. A cell is one adapter: a row of the model's vectors.

    Each cell has its own data order, loss, clipping, optimizer and early stop, as if it trained
    alone. The cells share only the forward pass. A signal stops the run at once, except within
    `run.uninterrupted()`. Outside these blocks the state of the group can always be saved.
    """
    model = group.model
    log = group.log
    with log.progress_bar(), run.checkpointing(group):
        while True:
            # From time to time, evaluate on held-out rows. Each cell keeps its best vectors.
            if log.evaluation_is_due():
                results = {cell: group.evaluate_held_out(cell) for cell in group.active_cells}
                with run.uninterrupted():
                    for cell, cell_results in results.items():
                        cell.keep_if_best(cell_results)
                    log.write_evaluations(results)

            # A cell that has failed or run out of patience is no longer active.
            if log.step == config.steps or not group.active_cells:
                break

            with run.uninterrupted():
                log.start_step()
                model.train()
                batch = group.next_batch()
                # Forward and backward, in parts if --micro-batch-size says so. Nothing is updated
                # yet, so who presses Ctrl-C twice gives up this step, and nothing else.
                with run.giving_up(group):
                    for part in batch.split(config.micro_batch_size):
                        logp_BCL = choice_logprobs(model, part.batch, part.row_B)
                        losses = part.losses(logp_BCL)  # cell -> the loss of its examples here
                        sum(losses.values()).backward()
                        log.add_losses(losses)

                # Each cell clips its own gradient and updates its own parameters.
                for cell in batch.cells:
                    cell.clip_gradient()
                    cell.update(learning_rate(log.step, cell.config))
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
        if cell.progress.before is None:
            cell.progress.before = evaluate_before(run, group, cell, baselines)
    if config.is_training:
        train(run, group, config)
    for cell in group.cells:
        if not cell.progress.is_reported:
            finals = []
            if cell.progress.failure is None:
                finals = evaluate_after(group, cell)
            if config.is_training and finals:
                folder = run.folder / cell.folder
                save_trained(group, cell, folder)
                write_card(folder, cell.config, finals, cell.checksums)
            run.finish_cell(cell, finals)
            if cell is not group.cells[-1]:  # after the last one, `finish_group` saves
                run.save(group)


def run_grid(run, config):
    """Run the cells that are not done yet, one group after the other, and print the report."""
    if run.is_finished:
        print(f"{run.folder} is finished: the final lines of its metrics.jsonl are the results")
        return

    device, reason = choose_device(config.device)
    dtype = choose_dtype(config, device)
    announce_device(device, reason, dtype)
    if config.deterministic:
        use_deterministic_kernels()
    cells = make_cells(config)
    n_cells = len(cells)
    run.start_writing(cells)

    # The cells of (IA)^3 share a model. Other methods change its weights, so each cell loads it.
    is_alone = config.is_training and config.method in TRAINED_ALONE
    group_size = 1 if is_alone else n_cells
    baselines = Baselines()
    del cells[: run.n_done]  # a resumed run has trained them
    while cells:
        group = Group(run, cells[:group_size], config, device, dtype)
        announce_group(group, is_first=run.n_done == 0)
        if config.is_training:
            group.draw_batches()
            run.micro_batch_size = check_memory(run, group)
        run_group(run, group, config, baselines)
        del cells[:group_size]
        run.finish_group(group, is_last=not cells)
        del group  # before the next model is loaded

    with_result = {final.get("adapter") for final in run.finals}
    report(config, run.folder, run.finals, n_failed=n_cells - len(with_result))


def main(argv=None, is_program=False):
    """Run a command line. Return the exit code: see `run_command`.

    is_program: whether this process does nothing else, so that a signal may end it at any time.
    """
    use_utf8()
    with lasting_output(), Signals(is_program) as signals:
        return run_command(argv, signals)


def run_command(argv, signals):
    """Return the exit code: 0, 2 for a user's mistake, 1 for a failure, 128 + n for signal n."""
    run = None
    try:
        config = parse_flags(Config, argv, __doc__)
        if config.resume is not None:
            config = restore_flags(config)
        check_config(config)
        run = Run(config, signals)
        run_grid(run, config)
        return 0
    except Stopped as stop:
        print(stop_message(run and run.folder), file=sys.stderr)
        return 128 + stop.number
    except (Failed, MemoryError, OSError, RuntimeError, ValueError) as error:
        message = message_of(error)
        if is_out_of_memory(error):
            message = out_of_memory_message(error, run)
        elif isinstance(error, RuntimeError):
            raise  # a bug of ours
        print(f"train.py: {message}", file=sys.stderr)
        if run:
            run.discard_if_new()
        return 2 if isinstance(error, ValueError) else 1
    finally:
        if run:
            run.close()


if __name__ == "__main__":
    sys.exit(main(is_program=True))
