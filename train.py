"""Chapter 9. Train (IA)^3 vectors for a task on a frozen T5 or LLaMA, and measure before and after.

    python train.py                                               the embedded model and task, in a minute on a CPU
    python train.py --model t5-base --task rte                    T-Few's recipe on a real model and a real task
    python train.py --model path/to/model --task path/to/rows.jsonl
    python train.py --model t5-base --task rte,cb --seed 0,1,32   six adapters side by side, in one run
    python train.py --resume runs/t5-base-rte-ia3-0               goes on where a run was stopped

What the loop calls (minia3/generation.py) is two hops from the equations: a model (t5.py, llama.py), and its blocks.
"""

import os
import shlex
import sys
import time
import warnings
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

import minia3
from minia3.adapters.lora import add_lora, load_lora, lora_parameters, save_lora
from minia3.inference.evaluation import evaluate, over_prompts
from minia3.inference.scoring import choice_logprobs
from minia3.model.more_vectors import SITE_NAMES, LINEARS, choose_vectors
from minia3.tasks.batches import collate
from minia3.training.cell import draw_examples, make_cells
from minia3.training.checkpoint import (
    all_finite,
    copy_values,
    random_state,
    save_checkpoint,
    save_last_checkpoint,
    set_random_state,
    set_values,
)
from minia3.training.device import choose_device, peak_memory
from minia3.training.flags import check_flags, flag, option, parse_flags
from minia3.training.losses import LOSSES, counts, total_loss
from minia3.training.model_card import write_card
from minia3.training.optimizer import Adafactor, learning_rate
from minia3.training.prepare import prepare_model
from minia3.training.report import describe, report
from minia3.training.run_folder import Metrics, discard_run, open_run, record_data
from minia3.training.signals import Failed, Signals, Stopped

LOG_EVERY = 10  # steps from one line of metrics.jsonl to the next
METHODS = ("ia3", "lora", "full", "none", "icl")
ALONE = ("lora", "full")  # of a grid's cells each trains by itself, one after the other
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
CHOICE = {
    "sites": "ia3",
    "layers": "ia3",
    "no_cross": "ia3",
    "rank": "lora",
    "alpha": "lora",
    "where": "lora",
}


@dataclass
class Config:
    # what
    model: str = flag(
        "tiny-t5",
        "known name (t5-base ...), hub id, folder in the Hugging Face layout, or .gguf file",
    )
    task: str | tuple = flag(
        "same-colour", "known task (rte ...), .jsonl or .csv file, or folder; commas: several"
    )
    method: str = flag(
        "ia3",
        "what trains: ia3, lora, full, none; icl: none, but --shots before each row",
        one_of=METHODS,
    )
    sites: str = flag(
        "k,v,ff",
        "which vectors are trained; for more room q,o,up,gate too (sites.py)",
        some_of=SITE_NAMES,
    )
    layers: str = flag(
        "0-", "of which layers, such as 0-5,20- (of T5, in the encoder and in the decoder)"
    )
    no_cross: bool = flag(False, "leave cross-attention's vectors at one")
    rank: int = flag(8, "of lora", at_least=1)
    alpha: int = flag(16, "of lora, which adds alpha / rank B A to a weight", at_least=1)
    where: str = flag(
        "q,v", "the weights that lora adds to, of q,k,v,o,gate,up,down", some_of=LINEARS
    )
    shots: int | None = flag(
        None, "train on T-Few's few-shot split of this size (default: all rows)", at_least=1
    )
    adapters: str = flag(
        "each", "of several tasks, an adapter each; one: for their mixture", one_of=("each", "one")
    )
    cap: int = flag(2**16, "rows of a task that count in a mixture, at the most", at_least=1)
    seed: int | tuple = flag(
        0, "of shots, order, prompts, dropout; commas: several", at_least=0, below=2**32
    )
    adapter: str | None = flag(
        None, "start from this PEFT adapter, or measure it (default: ones)", also=["--init"]
    )
    eval_only: bool = flag(
        False, "measure once and stop; no folder is written unless --out is given"
    )
    # where
    data_dir: str = flag("data", "folder of tasks; what is not there is downloaded to it")
    out: str | None = flag(None, "folder of the run (default: runs/<model>-<task>-<method>-<seed>)")
    resume: str | None = flag(
        None, "go on with the run in this folder, by its config.json (default: a new run)"
    )
    device: str | None = flag(
        None, "cpu, cuda, cuda:1 ... (default: CUDA where there is a GPU, else the CPU)"
    )
    dtype: str | None = flag(
        None, "bfloat16 (default: on CUDA, not for full), float32, float64", one_of=tuple(DTYPES)
    )
    compile: bool = flag(
        False, "compile the blocks (torch.compile): minutes at first, then faster steps"
    )
    checkpoint: bool = flag(
        False, "keep the blocks' inputs alone for the backward: less memory, slower steps"
    )
    deterministic: bool = flag(
        False, "deterministic CUDA kernels: a resumed run then has the same bits there too"
    )
    # the recipe: T-Few's
    steps: int = flag(1000, "steps of the optimiser", at_least=1)
    batch_size: int = flag(8, "examples per step, and adapter", at_least=1)
    similar_lengths: bool = flag(False, "batches of rows of similar lengths, in place of any rows")
    micro_batch_size: int | None = flag(
        None, "examples per forward pass, to save memory (default: all)", at_least=1
    )
    optimizer: str | None = flag(
        None, "adafactor (default: for ia3), or adamw", one_of=("adafactor", "adamw")
    )
    lr: float | tuple = flag(
        3e-3, "peak learning rate; Adafactor: times a vector's RMS; commas", above=0, below=1e32
    )
    warmup_ratio: float | tuple = flag(
        0.06, "share of steps of linear warm-up, before the decay", at_least=0, below=1
    )
    clip: float = flag(1.0, "largest norm of the gradient", above=0)
    weight_decay: float = flag(
        0.0, "of adamw; it pulls vectors towards 0, which is not the identity", at_least=0
    )
    losses: str = flag(
        "lm,ul,ln", "T-Few's: likelihood, unlikelihood, length-normalised", some_of=tuple(LOSSES)
    )
    dropout: float | None = flag(
        None, "in training (default: as in the model's config)", at_least=0, below=1
    )
    # measuring
    max_length: int = flag(
        512, "tokens of a source; of a longer one, the longest field loses its middle", at_least=1
    )
    max_new_tokens: int = flag(64, "tokens generated for rows with a target", at_least=1)
    eval_prompt: str | int = flag(
        "0", "which prompts measure: 0, or 0,1,2, or all; results are the median over them"
    )
    eval_batch_size: int = flag(16, "rows per forward pass when measuring", at_least=1)
    eval_every: int = flag(
        0, "steps between measurements on held-out rows; the best vectors win (0: none)", at_least=0
    )
    patience: int = flag(
        0, "stop after so many of these without a better one (0: never)", at_least=0
    )
    save_every: int = flag(100, "steps between checkpoints", at_least=1)

    @property
    def trains(self):
        return self.method in ("ia3", *ALONE) and not self.eval_only


def check(config):
    """Raise ValueError for a value that is out of its limits, or does not go with another."""
    check_flags(config)
    if config.patience and not config.eval_every:
        raise ValueError("--patience counts measurements: give --eval-every too")
    if config.cap != Config.cap and config.adapters != "one":
        raise ValueError("--cap counts the rows of a mixture's tasks: give --adapters one too")
    for name, method in CHOICE.items():
        given = getattr(config, name) != getattr(Config, name)
        if given and method != config.method:
            raise ValueError(
                f"{option(name)} is for --method {method}, found --method {config.method}"
            )
        if given and method == "lora" and config.adapter:
            raise ValueError(
                f"{option(name)} is of a new LoRA, and --adapter brings its own: leave it out"
            )
    if config.method == "icl" and config.shots is None:
        raise ValueError("--method icl puts rows before each row: say how many with --shots")
    if (
        config.method in ALONE and config.optimizer == "adafactor"
    ):  # ours does not factor a matrix's moment, either
        raise ValueError(
            "--optimizer adafactor steps in proportion to a parameter; lora's B begins at 0: use adamw"
        )
    if config.method == "full" and config.adapter:
        raise ValueError("--method full goes on from a model: give it as --model, and no --adapter")


def run(config, folder, saved, signals):
    if saved and saved["finished"]:
        print(f"{folder} is finished; its final lines of metrics.jsonl are the results")
        return

    # Where it runs, what, and on which data.
    device, why = choose_device(config.device)
    half = (
        device.type == "cuda" and config.method != "full"
    )  # bfloat16 weights lose an optimiser's small steps
    dtype = DTYPES[config.dtype or ("bfloat16" if half else "float32")]
    print(f"device   {device} ({why}), {str(dtype).removeprefix('torch.')}")
    if config.deterministic:
        torch.use_deterministic_algorithms(True)
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # without it cuBLAS is not, and torch refuses
    cells = make_cells(config, config.trains)
    if folder:
        record_data(
            folder, {name: digest for cell in cells for name, digest in cell.checksums.items()}
        )
    metrics = Metrics(
        folder, saved["metrics"] if saved else 0
    )  # what a refused --resume leaves as it is
    saved, measured = saved or {"done": 0, "finals": [], "metrics": 0, "finished": False}, {}
    while True:
        on = cells[saved["done"] :][: 1 if config.method in ALONE and config.trains else None]
        run_cells(config, on, device, dtype, measured, folder, metrics, saved, signals)
        saved["done"] += len(on)
        if saved["done"] == len(cells):
            break
        for name in saved.keys() - {
            "done",
            "finals",
            "failed",
            "metrics",
            "finished",
        }:  # these are the whole run's
            del saved[name]
        save_checkpoint(folder, saved)
    if not saved["finals"]:
        raise Failed(saved["failed"])
    save_last_checkpoint(folder, saved, config.method == "full")
    report(
        config,
        folder,
        saved["finals"],
        len(cells) - len({final.get("adapter") for final in saved["finals"]}),
    )


def run_cells(config, cells, device, dtype, measured, folder, metrics, saved, signals):
    """Measure, train and measure cells that share a model. measured: what it was before training, by the rows."""
    model = minia3.load_model(config.model, dtype=dtype, device=device, n_adapters=len(cells))
    tokenizer = minia3.load_tokenizer(config.model)
    total = sum(p.numel() for p in model.parameters()) - sum(
        v.numel() for v in minia3.vectors(model).values()
    )
    with warnings.catch_warnings(record=True) as warned:
        trained = parameters(model, cells[0].config)
    if dtype == torch.float64:
        model.double()  # the vectors too, which are float32 otherwise
    prepare_model(model, config)
    trainable = sum(p.numel() for p in trained.values()) // len(cells) if config.trains else 0
    if total < 10**7:
        torch.set_num_threads(1)  # operations this small cost more to share among cores than to do
    if saved["done"] == 0:
        print(
            f"model    {config.model}: {total:,} numbers, and {trainable:,} that train ({trainable / total:.3%})"
        )
    said = [line for cell in cells for part in cell.parts for line in part.said]
    for line in dict.fromkeys(said + [f"note     {warning.message}" for warning in warned]):
        print(line)

    def measure(i, part, rows, shots=()):
        limits = {
            "max_length": config.max_length,
            "max_new_tokens": config.max_new_tokens,
            "adapter": i,
        }
        limits |= {"batch_size": config.eval_batch_size, "metric": part.task.metric, "shots": shots}
        return over_prompts(
            [evaluate(model, tokenizer, rows, prompt=prompt, **limits) for prompt in part.measured]
        )

    batches = [draw_examples(cell, tokenizer) for cell in cells] if config.trains else []
    if "step" not in saved:
        saved["before"] = [[] for _ in cells]
        for i, cell in enumerate(cells):
            for part in (
                cell.parts
            ):  # all begin alike: one measurement serves those that report on the same rows
                same = part.task.name, *(row["idx"] for row in part.rows)
                before = measured[same] = (
                    measured[same] if same in measured else measure(i, part, part.rows)
                )
                size = metrics.write(
                    event="before", step=0, metric=part.task.metric, **part.key, **before
                )
                print(f"before   {part.title}{describe(part.task.metric, before)}", flush=True)
                saved["before"][i].append(before)
        fresh = [
            {"steps": 0, "best": None, "misses": 0, "failed": None, "reported": False}
            for _ in cells
        ]
        saved.update(
            step=0, seconds=0.0, evaluated=0, active=[*range(len(cells))], cells=fresh, metrics=size
        )
        saved.update(
            losses=[], tokens=0, logged=0.0
        )  # since the last line of metrics.jsonl, at "logged" seconds
    if config.trains:
        train(config, model, cells, trained, batches, measure, folder, metrics, saved, signals)

    shared = {
        "model": config.model,
        "method": config.method,
        "architecture": type(model).__name__,
        "total": total,
    }
    shared |= {"trainable": trainable, "seconds": round(saved["seconds"], 3)}
    for i, (cell, results, own) in enumerate(
        zip(cells, saved["before"], saved["cells"], strict=True)
    ):
        if own["reported"]:
            continue
        finals = []
        for part, before in zip(cell.parts, results, strict=True) if not own["failed"] else ():
            after = (
                measure(i, part, part.rows, part.shots) if config.trains or part.shots else before
            )
            if config.trains or part.shots:
                print(f"after    {part.title}{describe(part.task.metric, after)}", flush=True)
            final = (
                shared
                | {"metric": part.task.metric, "split": part.split, "rows": len(part.rows)}
                | part.key
            )
            final |= {
                "steps": own["steps"],
                "rows_cut": after["n_cut"],
                "peak_memory_bytes": peak_memory(device),
            }
            final |= {
                f"{name}_before": x
                for name, x in before.items()
                if name in ("accuracy", "auc", "accuracies")
            }
            finals.append(
                final | {name: x for name, x in after.items() if name not in ("n", "n_cut")}
            )
        if config.trains and finals:
            if config.method == "ia3":
                minia3.save_adapter(model, folder / cell.folder, i)
            elif config.method == "lora":
                save_lora(model, folder / cell.folder, config.model)
            else:
                minia3.save_model(model, folder / cell.folder, tokenizer)
            write_card(folder / cell.folder, cell.config, finals, cell.checksums)
        for final in finals:
            saved["metrics"] = metrics.write(event="final", step=own["steps"], **final)
        if own["failed"]:
            saved["failed"] = own["failed"]
            saved["metrics"] = metrics.write(
                event="failed", step=own["steps"], reason=own["failed"], **cell.key
            )
        saved["finals"] += finals
        own["reported"] = True
        if cell is not cells[-1]:
            save_checkpoint(folder, saved)


def parameters(model, config):
    """Freeze all that the flags do not train: -> name -> parameter of the rest. Reads --adapter into every row."""
    if config.method == "lora" and config.adapter is None:
        return add_lora(model, config.rank, config.alpha, config.where.split(","), config.seed)
    if config.method == "lora":
        load_lora(model, config.adapter)
        return lora_parameters(model)
    minia3.freeze(model)
    if config.method == "full":
        for p in model.parameters():
            p.requires_grad_(not p.requires_grad)
        return {name: p for name, p in model.named_parameters() if p.requires_grad}
    for i in range(model.n_adapters if config.adapter is not None else 0):
        minia3.load_adapter(model, config.adapter, i)
    return choose_vectors(model, config.sites, config.layers, not config.no_cross)


def train(config, model, cells, trained, batches, measure, folder, metrics, saved, signals):
    """The loop. `saved` is where the run stands, and what a checkpoint holds; its "step" counts the steps done.

    Each cell trains its row of `trained`, by its own loss, clipping and optimiser, as it would alone: all that cells
    share is the forward pass.
    """
    device, several = model.embed.weight.device, len(cells) > 1
    rows = [trained]
    if several:  # views: of all that the optimisers do, a row sees nothing of the others
        rows = [
            {name: torch.nn.Parameter(x.data[i : i + 1]) for name, x in trained.items()}
            for i in range(len(cells))
        ]
    name = config.optimizer or ("adafactor" if config.method == "ia3" else "adamw")
    make = {
        "adafactor": Adafactor,
        "adamw": partial(torch.optim.AdamW, weight_decay=config.weight_decay),
    }[name]
    optimizers = [
        make(row.values(), lr=cell.config.lr) for row, cell in zip(rows, cells, strict=True)
    ]
    torch.manual_seed(cells[0].config.seed)  # dropout's
    everything = (
        minia3.vectors(model) | trained
    )  # what does not train came from --adapter, which may change
    if "vectors" in saved:
        set_values(everything, saved["vectors"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        set_random_state(saved["random"])

    def checkpoint():
        saved["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
        saved.update(vectors=copy_values(everything), random=random_state())
        saved["losses"] = [
            {i: float(loss) for i, loss in losses.items()} for losses in saved["losses"]
        ]
        save_checkpoint(folder, saved)

    def fail(i, why):
        saved["cells"][i]["failed"] = why = (
            f"{cells[i].title}{why}: try a lower --lr or --dtype float32"
        )
        saved["active"] = [j for j in saved["active"] if j != i]
        if cells[i].title:
            bar.write(f"failed   {why}", file=sys.stdout)

    bar = tqdm(
        total=config.steps, initial=saved["step"], unit="step", disable=not sys.stderr.isatty()
    )
    try:
        while True:
            step = saved["step"]
            if config.eval_every and step % config.eval_every == 0 and step > saved["evaluated"]:
                standing = [*saved["cells"]]
                for i in saved["active"]:
                    own, best, results = standing[i], standing[i]["best"], []
                    for part in cells[i].parts:
                        results.append(measure(i, part, part.held_out))
                        size = metrics.write(
                            event="eval",
                            step=step,
                            metric=part.task.metric,
                            **part.key,
                            **results[-1],
                        )
                        said = f"{part.title}{describe(part.task.metric, results[-1])}, held out"
                        bar.write(f"step {step:>6}  {said}", file=sys.stdout)
                    mean = sum(result["accuracy"] for result in results) / len(results)
                    misses = 0 if best is None or mean > best["accuracy"] else own["misses"] + 1
                    if all_finite(rows[i]) and (
                        best is None or mean >= best["accuracy"]
                    ):  # of equals, the later
                        best = {"step": step, "accuracy": mean, "vectors": copy_values(rows[i])}
                    standing[i] = own | {"best": best, "misses": misses}
                active = [
                    i for i in saved["active"] if not 0 < config.patience <= standing[i]["misses"]
                ]
                # in one call: a signal comes before it or after
                saved.update(evaluated=step, active=active, cells=standing, metrics=size)
            active = saved["active"]
            if step == config.steps or not active:
                checkpoint()
                break

            began, signals.in_step = time.perf_counter(), True
            model.train()
            whole = {i: collate(batches[i][step]) for i in active}
            n = {i: counts(batch.target_mask_BCL, batch.label_B) for i, batch in whole.items()}
            mixed = [(i, example) for i in active for example in batches[i][step]]
            micro = config.micro_batch_size or len(mixed)
            step_losses = dict.fromkeys(active, 0.0)
            for first in range(0, len(mixed), micro):
                owners, examples = zip(*mixed[first : first + micro], strict=True)
                part = collate(examples)
                logp_BCL = choice_logprobs(model, part, torch.tensor(owners) if several else None)
                loss = 0.0
                for i in dict.fromkeys(owners):
                    own = slice(owners.index(i), owners.index(i) + owners.count(i))
                    masks = part.target_mask_BCL[own], part.label_B[own]
                    of_cell = total_loss(logp_BCL[own], *masks, config.losses.split(","), n[i])
                    step_losses[i] += of_cell.detach()
                    loss = loss + of_cell
                loss.backward()
            for i in active:
                for name, p in rows[i].items() if several else ():
                    p.grad = trained[name].grad[i : i + 1]
                torch.nn.utils.clip_grad_norm_(rows[i].values(), config.clip)
                for group in optimizers[i].param_groups:
                    group["lr"] = learning_rate(step, cells[i].config)
                optimizers[i].step()
                saved["cells"][i]["steps"] = step + 1
            model.zero_grad()
            model.eval()
            saved["losses"].append(step_losses)
            saved["tokens"] += sum(len(e.source) + sum(map(len, e.targets)) for _, e in mixed)
            saved["step"] = step = step + 1
            bar.update()

            logs = (
                step % LOG_EVERY == 0 or step % config.save_every == 0 or step in (1, config.steps)
            )
            numbers = (
                [{i: float(x) for i, x in of.items()} for of in saved["losses"]] if logs else []
            )  # GPU: waits
            saved["seconds"] += time.perf_counter() - began
            for of, losses in enumerate(numbers, step - len(numbers) + 1):
                for i in [i for i in saved["active"] if not np.isfinite(losses.get(i, 0))]:
                    fail(i, f"the loss of step {of} is {losses[i]}")
            if logs and saved["active"]:
                seconds = saved["seconds"] - saved["logged"]
                going = [i for i in numbers[0] if not saved["cells"][i]["failed"]]
                means = {
                    cells[i].name: np.mean([losses[i] for losses in numbers if i in losses])
                    for i in going
                }
                line = {
                    "loss": sum(means.values()) / len(means),
                    "lr": max(learning_rate(step - 1, cells[i].config) for i in active),
                    "examples_per_second": sum(map(len, numbers)) * config.batch_size / seconds,
                    "tokens_per_second": saved["tokens"] / seconds,
                    "memory_bytes": peak_memory(device),
                } | ({"losses": means} if cells[0].name else {})
                saved["metrics"] = metrics.write(event="train", step=step, **line)
                saved.update(losses=[], tokens=0, logged=saved["seconds"])
                text = f"loss {line['loss']:.3f}  lr {line['lr']:.1e}  {line['examples_per_second']:.1f} examples/s"
                text += f"  {line['tokens_per_second']:.0f} tokens/s  {line['memory_bytes'] / 1e6:.0f} MB"
                bar.set_postfix_str(text)
                if bar.disable:
                    print(f"step {step:>6}  {text}", flush=True)
            if step % config.save_every == 0:
                checkpoint()
            signals.in_step = False
            signals.check()
    except Stopped:
        checkpoint()
        raise
    finally:
        bar.close()
    for i, (row, own) in enumerate(zip(rows, saved["cells"], strict=True)):
        set_values(row, own["best"]["vectors"] if own["best"] else {})
        if not (own["failed"] or all_finite(row)):
            fail(i, "the last step led to what is no number")


def main(argv=None):
    """-> the exit code: 0, 2 for a mistake in what was given, 1 for a run that failed, 130 or 143 if it was stopped."""
    asked, folder, signals = None, None, Signals()
    try:
        asked = parse_flags(Config, argv, __doc__)
        config, folder, saved, _lock = open_run(asked, check)
        run(config, folder, saved, signals)
        return 0
    except Stopped as stop:
        how = f"; to go on: python train.py --resume {shlex.quote(str(folder))}" if folder else ""
        print(f"stopped{how}", file=sys.stderr)
        return 128 + stop.args[0]
    except (torch.OutOfMemoryError, Failed, OSError, ValueError) as error:
        text = " ".join(str(error).split())
        if isinstance(error, torch.OutOfMemoryError):
            text = f"{text:.200}: lower --micro-batch-size or --eval-batch-size"
        print(f"train.py: {text}", file=sys.stderr)
        if folder and asked.resume is None:
            discard_run(folder)
        return 2 if isinstance(error, ValueError) else 1


if __name__ == "__main__":
    sys.exit(main())
