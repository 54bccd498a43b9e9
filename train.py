"""Chapter 9. Train (IA)^3 vectors for a task on a frozen T5 or LLaMA, and measure before and after.

    python train.py                                               the embedded model and task, in a minute on a CPU
    python train.py --model t5-base --task rte                    T-Few's recipe on a real model and a real task
    python train.py --model google/flan-t5-small --task cb --shots 32 --seed 1
    python train.py --model path/to/model --task path/to/rows.jsonl
    python train.py --resume runs/t5-base-rte-ia3-0               goes on where a run was stopped

Two hops lead to the equations: the loop below calls a model (minia3/t5.py, llama.py), a model its blocks (blocks.py).
"""

import dataclasses
import os
import shlex
import sys
import time
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import minia3
from minia3 import flags, runs
from minia3.backward import checkpointed
from minia3.blocks import Attention, Block
from minia3.card import card
from minia3.data import collate, order
from minia3.evaluate import encode_rows, evaluate
from minia3.flags import flag
from minia3.generation import choice_logprobs
from minia3.losses import LOSSES, counts, total_loss
from minia3.models import known
from minia3.optim import Adafactor
from minia3.prompts import for_family

LOG_EVERY = 10  # steps from one line of metrics.jsonl to the next
MEASURING = ("data_dir", "dtype", "max_length", "max_new_tokens", "eval_prompt")  # flags that a result depends on
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass
class Config:
    # what
    model: str = flag("tiny-t5", "known name (t5-base ...), hub id, folder in the Hugging Face layout, or .gguf file")
    task: str = flag("same-colour", "known task (rte ...), .jsonl file, or folder of train/validation/test.jsonl")
    method: str = flag("ia3", "ia3: train the vectors; none: measure the base alone", one_of=("ia3", "none"))
    shots: int | None = flag(None, "train on T-Few's few-shot split of this size (default: all rows)", at_least=1)
    seed: int = flag(0, "of the few-shot split, the order of rows, the drawn prompts, dropout", at_least=0, below=2**32)
    adapter: str | None = flag(None, "start from this PEFT adapter; with --eval-only, measure it (default: all ones)")
    eval_only: bool = flag(False, "measure once and stop; no folder is written unless --out is given")
    # where
    data_dir: str = flag("data", "folder of tasks; what is not there is downloaded to it")
    out: str | None = flag(None, "folder of the run (default: runs/<model>-<task>-<method>-<seed>)")
    resume: str | None = flag(None, "go on with the run in this folder, by its config.json (default: a new run)")
    device: str | None = flag(None, "cpu, cuda, cuda:1 ... (default: CUDA where there is a GPU, else the CPU)")
    dtype: str | None = flag(None, "float32 (default: on the CPU), bfloat16 (on CUDA), float64", one_of=tuple(DTYPES))
    compile: bool = flag(False, "compile the blocks (torch.compile): minutes at first, then faster steps")
    checkpoint: bool = flag(False, "keep the blocks' inputs alone for the backward: less memory, slower steps")
    deterministic: bool = flag(False, "deterministic CUDA kernels: a resumed run then has the same bits there too")
    # the recipe: T-Few's
    steps: int = flag(1000, "steps of the optimiser", at_least=1)
    batch_size: int = flag(8, "examples per step", at_least=1)
    micro_batch_size: int | None = flag(None, "examples per forward pass, to save memory (default: all)", at_least=1)
    optimizer: str = flag("adafactor", "adafactor (T-Few's) or adamw", one_of=("adafactor", "adamw"))
    lr: float = flag(3e-3, "peak learning rate; Adafactor multiplies it by the RMS of each vector", above=0)
    warmup_ratio: float = flag(0.06, "share of steps of linear warm-up; then linear decay to 0", at_least=0, below=1)
    clip: float = flag(1.0, "largest norm of the gradient", above=0)
    weight_decay: float = flag(0.0, "of adamw; it pulls vectors towards 0, which is not the identity", at_least=0)
    losses: str = flag("lm,ul,ln", "which of T-Few's: likelihood, unlikelihood, length-normalised")
    dropout: float | None = flag(None, "in training (default: as in the model's config)", at_least=0, below=1)
    # measuring
    max_length: int = flag(512, "tokens of a source; of a longer one, the longest field loses its middle", at_least=1)
    max_new_tokens: int = flag(64, "tokens generated for rows with a target", at_least=1)
    eval_prompt: int = flag(0, "which of the task's prompts measures; training draws from all of them", at_least=0)
    eval_batch_size: int = flag(16, "rows per forward pass when measuring", at_least=1)
    eval_every: int = flag(0, "steps between measurements on held-out rows; the best vectors win (0: none)", at_least=0)
    patience: int = flag(0, "stop after so many of these without a better one (0: never)", at_least=0)
    save_every: int = flag(100, "steps between checkpoints", at_least=1)


def check(config):
    """Raise ValueError for a value that is out of its limits, or does not go with another."""
    flags.check(config)
    if not set(config.losses.split(",")) <= LOSSES.keys():
        raise ValueError(f"--losses is {config.losses!r}, expected some of {','.join(LOSSES)}, commas between them")
    if config.patience and not config.eval_every:
        raise ValueError("--patience counts measurements: give --eval-every too")


def open_run(config):
    """-> config, the run's folder (None: nothing is written), its last checkpoint (None: there is none), its lock."""
    if config.resume is not None:
        if config != Config(resume=config.resume):
            raise ValueError("--resume goes alone: all other flags come from the config.json of its folder")
        folder = Path(config.resume)
        raw = runs.read_config(folder)
        config = Config(**{f.name: raw[f.name] for f in dataclasses.fields(Config) if f.name in raw})
        check(config)
        lock = runs.lock(folder)
        return config, folder, runs.load_checkpoint(folder), lock
    check(config)
    if config.out is None and config.eval_only:
        return config, None, None, None
    if config.out is None:
        names = (Path(config.model).name, Path(config.task).stem, config.method, config.seed)
        config.out = str(Path("runs", "-".join(map(str, names))))
    folder = Path(config.out)
    return config, folder, None, runs.begin(folder, dataclasses.asdict(config))


def run(config, folder, saved, signals):
    if saved and saved["finished"]:
        print(f"{folder} is finished; its last line of metrics.jsonl is the result")
        return
    metrics = runs.Metrics(folder, saved["metrics"] if saved else 0)

    # Where it runs, what, and on which data.
    device, why = runs.choose_device(config.device)
    dtype = DTYPES[config.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    print(f"device   {device} ({why}), {str(dtype).removeprefix('torch.')}")
    torch.use_deterministic_algorithms(config.deterministic)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not, and torch refuses
    task = minia3.load_task(config.task, config.data_dir, config.shots, config.seed)
    notes = list(task.notes)
    if folder:
        runs.record_data(folder, task.checksums)
    model = minia3.load_model(config.model, dtype=dtype, device=device)
    tokenizer = minia3.load_tokenizer(config.model)
    if dtype == torch.float64:
        model.double()  # the vectors too, which are float32 otherwise
    minia3.freeze(model)
    prepare(model, config)
    if config.adapter is not None:
        with warnings.catch_warnings(record=True) as warned:
            minia3.load_adapter(model, config.adapter)
        notes += [str(warning.message) for warning in warned]
    trainable = sum(vector[0].numel() for vector in minia3.vectors(model).values())
    total = sum(p.numel() for p in model.parameters()) - trainable
    if total < 10**7:
        torch.set_num_threads(1)  # operations this small cost more to share among cores than to do
    print(f"model    {config.model}: {total:,} numbers, and {trainable:,} in an adapter ({trainable / total:.3%})")

    split, rows = task.evaluation
    train_rows, held_out = task.train, []
    if config.eval_every and split == "test" and task.validation:
        held_out = task.validation
    elif config.eval_every:  # never the split that is reported
        n = max(1, len(task.train) // 5)
        train_rows, held_out = task.train[:-n], task.train[-n:]
    trains = config.method == "ia3" and not config.eval_only
    if trains and not train_rows:
        kept = " beside those which --eval-every holds out" if held_out else ""
        raise ValueError(f"{task.name}: no rows to train on{kept}: expected more in train.jsonl")
    print(f"task     {task.name}: {len(train_rows)} rows to train on, {len(rows)} of {split} to report on")
    family = known(config.model).family if known(config.model) else None
    prompts = for_family(task.prompts, family)
    if config.eval_prompt >= len(prompts):
        raise ValueError(f"--eval-prompt is {config.eval_prompt}, expected 0 to {len(prompts) - 1} for {task.name}")
    if held_out:
        notes.append(f"the best vectors are chosen on {len(held_out)} rows that are neither trained nor reported on")
    if family in task.seen:
        notes.append(f"{family} saw this task's labels in its pre-training: these results are not few-shot")
    for note in notes:
        print(f"note     {note}")

    limits = {name: getattr(config, name) for name in ("max_length", "max_new_tokens")}
    limits |= {"batch_size": config.eval_batch_size, "metric": task.metric}
    measure = partial(evaluate, model, tokenizer, prompt=prompts[config.eval_prompt], **limits)
    batches = draw(config, task, train_rows, prompts, tokenizer) if trains else []
    begun = {"step": 0, "seconds": 0.0, "evaluated": 0, "best": None, "misses": 0, "metrics": 0, "finished": False}
    unlogged = {"losses": [], "tokens": 0, "logged": 0.0}  # since the last line of metrics.jsonl, at "logged" seconds
    saved = saved or begun | unlogged
    if "before" not in saved:
        saved["before"] = measure(rows)
        saved["metrics"] = metrics.write(event="before", step=0, metric=task.metric, **saved["before"])
    before = after = saved["before"]
    print(f"before   {describe(task.metric, before)}", flush=True)
    if trains:
        train(config, model, tokenizer.pad_id, task, batches, held_out, measure, folder, metrics, saved, signals)
        after = measure(rows)
        print(f"after    {describe(task.metric, after)}")

    final = {"model": config.model, "task": task.name, "method": config.method, "metric": task.metric}
    final |= {"split": split, "rows": len(rows), "rows_cut": before["n_cut"]}
    final |= {f"{name}_before": before[name] for name in ("accuracy", "auc")}
    final |= {name: after[name] for name in ("accuracy", "auc")}
    final |= {"trainable": trainable if trains else 0, "total": total, "steps": saved["step"]}
    final |= {"seconds": round(saved["seconds"], 3), "peak_memory_bytes": runs.peak_memory(device)}
    if trains:
        about = {"data": task.checksums, "architecture": type(model).__name__}
        minia3.save_adapter(model, folder / "adapter", card=card(config, final | about))
    metrics.write(event="final", step=saved["step"], **final)
    if folder:
        runs.save_checkpoint(folder, saved | {"finished": True})
    report(config, folder, final)


def draw(config, task, rows, prompts, tokenizer):
    """-> the examples of each step. Each time that a row comes, its prompt is drawn anew, as in T-Few."""
    rows_of = order(len(rows), config.batch_size, config.seed)
    plan = []  # for each step, a row and a prompt for each example
    for step in range(config.steps):
        drawn = np.random.RandomState([config.seed, 1, step]).randint(len(prompts), size=config.batch_size)
        plan.append(list(zip(rows_of(step), drawn.tolist(), strict=True)))
    pairs = sorted({pair for step in plan for pair in step})
    texts = [(rows[row], prompts[prompt]) for row, prompt in pairs]
    _, examples, n_cut = encode_rows(texts, tokenizer, config.max_length, end=task.metric == "exact_match")
    examples = dict(zip(pairs, examples, strict=True))
    if n_cut:
        print(f"note     {n_cut} of {len(pairs)} training inputs are cut to {config.max_length} tokens (--max-length)")
    return [[examples[pair] for pair in step] for step in plan]


def train(config, model, pad_id, task, batches, held_out, measure, folder, metrics, saved, signals):
    """The loop. `saved` is where the run stands, and what a checkpoint holds; its "step" counts the steps done."""
    device, vectors = model.embed.weight.device, minia3.vectors(model)
    if config.optimizer == "adafactor":
        optimizer = Adafactor(vectors.values(), lr=config.lr)
    else:
        optimizer = torch.optim.AdamW(vectors.values(), lr=config.lr, weight_decay=config.weight_decay)
    torch.manual_seed(config.seed)  # dropout's
    if "vectors" in saved:
        set_values(vectors, saved["vectors"])
        optimizer.load_state_dict(saved["optimizer"])
        runs.set_random_state(saved["random"])

    def checkpoint():
        saved.update(vectors=values(vectors), optimizer=optimizer.state_dict(), random=runs.random_state())
        saved["losses"] = [float(loss) for loss in saved["losses"]]
        runs.save_checkpoint(folder, saved)

    bar = tqdm(total=config.steps, initial=saved["step"], unit="step", disable=not sys.stderr.isatty())
    try:
        while True:
            step = saved["step"]
            if config.eval_every and step % config.eval_every == 0 and step > saved["evaluated"]:
                result, best = measure(held_out), saved["best"]
                bar.write(f"step {step:>6}  {describe(task.metric, result)}, held out", file=sys.stdout)
                misses = 0 if best is None or result["accuracy"] > best["accuracy"] else saved["misses"] + 1
                if best is None or result["accuracy"] >= best["accuracy"]:  # of equals, the one that trained longer
                    best = {"step": step, "accuracy": result["accuracy"], "vectors": values(vectors)}
                size = metrics.write(event="eval", step=step, metric=task.metric, **result)
                # in one call: a signal comes before it or after
                saved.update(evaluated=step, best=best, misses=misses, metrics=size)
            if step == config.steps or (config.patience and saved["misses"] >= config.patience):
                checkpoint()
                break

            began, signals.in_step = time.perf_counter(), True
            model.train()
            batch = batches[step]
            whole = collate(batch, pad_id)
            n = counts(whole.target_mask_BCL, whole.label_B)
            micro = config.micro_batch_size or len(batch)
            step_loss = 0.0
            for first in range(0, len(batch), micro):
                part = collate(batch[first : first + micro], pad_id)
                logp_BCL = choice_logprobs(model, part)
                loss = total_loss(logp_BCL, part.target_mask_BCL, part.label_B, config.losses.split(","), n)
                loss.backward()
                step_loss += loss.detach()
            torch.nn.utils.clip_grad_norm_(vectors.values(), config.clip)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            optimizer.step()
            optimizer.zero_grad()
            model.eval()
            saved["losses"].append(step_loss)
            saved["tokens"] += sum(len(e.source) + sum(map(len, e.targets)) for e in batch)
            saved["step"] = step = step + 1
            bar.update()

            logs = step % LOG_EVERY == 0 or step % config.save_every == 0 or step in (1, config.steps)
            numbers = [float(loss) for loss in saved["losses"]] if logs else []  # waits for the device
            saved["seconds"] += time.perf_counter() - began
            for i, number in enumerate(numbers, step - len(numbers) + 1):
                if not np.isfinite(number):
                    raise runs.Failed(f"the loss of step {i} is {number}: try a lower --lr or --dtype float32")
            if logs:
                seconds = saved["seconds"] - saved["logged"]
                line = {
                    "loss": sum(numbers) / len(numbers),
                    "lr": learning_rate(step - 1, config),
                    "examples_per_second": len(numbers) * config.batch_size / seconds,
                    "tokens_per_second": saved["tokens"] / seconds,
                    "memory_bytes": runs.peak_memory(device),
                }
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
    except runs.Stopped:
        checkpoint()
        raise
    finally:
        bar.close()
    if saved["best"]:
        set_values(vectors, saved["best"]["vectors"])


def learning_rate(step, config):
    """Linear from 0 to the peak, then linear to 0. As in T-Few, whose first step therefore changes nothing."""
    warmup = round(config.warmup_ratio * config.steps)
    if step < warmup:
        return config.lr * step / warmup
    return config.lr * (config.steps - step) / (config.steps - warmup)


def values(vectors):
    return {name: vector.detach().cpu().clone() for name, vector in vectors.items()}


def set_values(vectors, saved):
    for name, vector in vectors.items():
        vector.data.copy_(saved[name])


def prepare(model, config):
    """How the model's modules are to train, as the flags say."""
    if config.compile:
        torch._dynamo.config.recompile_limit = 64  # graphs of a block: first or last, padded or not, training or not
    for module in model.modules():
        if config.dropout is not None and isinstance(module, torch.nn.Dropout):
            module.p = config.dropout
        elif config.dropout is not None and isinstance(module, Attention):
            module.dropout = config.dropout
        if config.checkpoint and isinstance(module, Block):
            module.forward = checkpointed(module.forward)
        if config.compile and isinstance(module, Block):
            module.compile(dynamic=True)


def describe(metric, result):
    auc = "" if result["auc"] is None else f", AUC {result['auc']:.2f}"
    return f"{metric} {result['accuracy']:.1%}{auc}"


def report(config, folder, final):
    """Print what came out of a run: a line for each figure, and the command that measures its adapter again."""
    trained, total = final["trainable"], final["total"]

    def figure(name, form):
        return f"{final[f'{name}_before']:{form}}" + (f" before, {final[name]:{form}} after" if trained else "")

    cut = f", {final['rows_cut']} of them cut to {config.max_length} tokens" if final["rows_cut"] else ""
    lines = [(final["metric"], figure("accuracy", ".1%"))]
    lines += [("AUC", figure("auc", ".2f"))] if final["auc"] is not None else []
    lines += [("memory", f"{final['peak_memory_bytes'] / 1e6:,.0f} MB at the most")]
    if trained:
        names = ["model", "task", *(name for name in MEASURING if getattr(config, name) != getattr(type(config), name))]
        words = [*flags.words(config, names), "--adapter", str(folder / "adapter"), "--eval-only"]
        lines += [
            ("trained", f"{trained:,} of {total:,} numbers ({trained / total:.3%})"),
            ("time", f"{final['seconds']:.0f} s for {final['steps']} steps"),
            ("adapter", folder / "adapter"),
            ("use it", f"python train.py {shlex.join(words)}"),
        ]
    print(f"\n{final['task']}: {final['rows']} rows of {final['split']}{cut}")
    for title, text in lines:
        print(f"  {title:<12}{text}")


def main(argv=None):
    """-> the exit code: 0, 2 for a mistake in what was given, 1 for a run that failed, 130 or 143 if it was stopped."""
    asked, folder, signals = None, None, runs.Signals()
    try:
        asked = flags.parse(Config, argv, __doc__)
        config, folder, saved, _lock = open_run(asked)
        run(config, folder, saved, signals)
        return 0
    except runs.Stopped as stop:
        how = f"; to go on: python train.py --resume {shlex.quote(str(folder))}" if folder else ""
        print(f"stopped{how}", file=sys.stderr)
        return 128 + stop.args[0]
    except (torch.OutOfMemoryError, runs.Failed, OSError, ValueError) as error:
        text = " ".join(str(error).split())
        if isinstance(error, torch.OutOfMemoryError):
            text = f"{text:.200}: lower --micro-batch-size or --eval-batch-size"
        print(f"train.py: {text}", file=sys.stderr)
        if folder and asked.resume is None:
            runs.discard(folder)
        return 2 if isinstance(error, ValueError) else 1


if __name__ == "__main__":
    sys.exit(main())
