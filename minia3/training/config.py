"""The flags of a run: one dataclass, from which train.py makes its command line.

Importing this needs no torch, so that a mistake in the flags is answered at once.
"""

from dataclasses import dataclass
from itertools import chain

from minia3.model.site_names import LINEARS, SITE_NAMES
from minia3.tasks.task import METRICS
from minia3.training.choices import (
    DTYPES,
    LOSSES,
    METHODS,
    OPTIMIZERS,
    QUANTIZED,
    TRACKERS,
    TRAINED,
)
from minia3.training.flags import flag

GROUPS = {  # the first field of each group of --help -> the title of the group
    "model": "what is trained, and on what",
    "data_dir": "files and folders",
    "device": "the device, and how it computes",
    "steps": "the recipe, with T-Few's values",
    "max_length": "evaluation and checkpoints",
}

# What other programs call these flags, with - or with _ between the words -> what to say.
ADVICE = {
    "--learning-rate": "did you mean --lr?",
    "--num-epochs": "did you mean --epochs?",
    "--num-train-epochs": "did you mean --epochs?",
    "--max-steps": "did you mean --steps?",
    "--per-device-train-batch-size": "did you mean --batch-size?",
    "--gradient-checkpointing": "did you mean --recompute?",
    "--model-name": "did you mean --model?",
    "--model-name-or-path": "did you mean --model?",
    "--data": "did you mean --task?",
    "--dataset": "did you mean --task?",
    "--train-file": "did you mean --task?",
    "--output-dir": "did you mean --out?",
    "--max-seq-length": "did you mean --max-length?",
    "--bf16": "did you mean --dtype bfloat16?",
    "--fp16": "did you mean --dtype bfloat16, or float16 (not for T5)?",
    "--checkpoint": "did you mean --recompute (its name since 0.2), or, to continue a run, "
    "--resume {run}?",
    "--resume-from-checkpoint": "did you mean --resume?",
}


@dataclass
class Config:
    """The flags of a run. `python train.py --help` prints these texts."""

    # What is trained, and on what
    model: str = flag("tiny-t5", "known name (t5-base ...), hub id, model folder, or .gguf file")
    task: str | tuple = flag(
        "same-colour",
        "known task (rte ...), file of rows, folder, task file (task.json), or data set of the hub "
        "(hf:user/name); commas separate several tasks",
    )
    input: str | None = flag(
        None,
        'what the model reads: columns in braces, as in "{premise} Question: {hypothesis}" '
        "(default: the columns with the usual names)",
    )
    target: str | None = flag(
        None,
        'text to write, as in "{answer}"; with --labels, the column of the label (default: the '
        "columns with the usual names)",
    )
    labels: str | None = flag(
        None,
        "names for the labels, in the order of the integers, as in negative,positive; if the "
        "labels are words, these words (default: the labels as the file spells them)",
        has_parts=True,
    )
    metric: str | None = flag(
        None,
        "accuracy or macro_f1 for labels; exact_match, f1, rouge_l, bleu or inverse_perplexity for "
        "texts to write (default: accuracy, exact_match, and inverse_perplexity for conversations)",
        one_of=tuple(dict.fromkeys(chain.from_iterable(METRICS.values()))),
    )
    chat_template: str | None = flag(
        None, "file of the chat template for rows of messages (default: the model's own)"
    )
    method: str = flag(
        "ia3", "ia3, lora, full, none, or icl (--shots examples before each input)", one_of=METHODS
    )
    sites: str = flag(
        "k,v,ff",
        "vectors to train: some of k,v,ff, and of q,o,up,gate, which are not in the paper",
        some_of=SITE_NAMES,
    )
    layers: str = flag(
        "0-",
        "layers whose vectors train, such as 0-5,20-; for T5, in the encoder and in the decoder",
        has_parts=True,
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
    cap: int = flag(
        2**16, "draw a larger task of a mixture as if it had this many rows", at_least=1
    )
    seed: int | tuple = flag(
        0,
        "seed of shots, order, prompts, dropout, held-out rows, RAFT's fold and the start of LoRA; "
        "commas separate several seeds",
        at_least=0,
        below=2**32,
    )
    adapter: str | None = flag(
        None,
        "PEFT adapter to start from, or to evaluate (default: none, so all vectors start at 1)",
        also=["--init"],
    )
    eval_only: bool = flag(False, "evaluate and stop; nothing is written unless --out is given")

    # Where the data, the run and the model are
    data_dir: str = flag("data", "folder of tasks; missing files are downloaded into it")
    out: str | None = flag(None, "folder of the run (default: runs/<model>-<task>-<method>-<seed>)")
    resume: str | None = flag(
        None,
        "continue the run in this folder, with its flags; --steps extends it, and --device, "
        "--data-dir, --log-to, --micro-batch-size, --eval-batch-size, --shard and --offload may "
        "differ; --shard without --offload keeps the base on the devices (default: a new run)",
    )
    or_resume: bool = flag(
        False, "if --out holds a run with these flags already, continue it, as --resume does"
    )
    config: str | None = flag(
        None,
        "take flags from the config.json of a run or from a .toml file; flags of the "
        "command line win (default: none)",
    )
    log_to: str | None = flag(
        None,
        "also send metrics to some of tensorboard,wandb,mlflow (default: only metrics.jsonl; in a "
        "resumed run, none stops sending them)",
        some_of=(*TRACKERS, "none"),
    )
    device: str | None = flag(
        None,
        "cpu, cuda, cuda:1, mps, xpu ... (default: a GPU if PyTorch finds one)",
    )
    dtype: str | None = flag(
        None,
        "float32, bfloat16, float16 (not for T5) or float64 weights (default: bfloat16 on a GPU "
        "that computes in it, but float32 for full and on a CPU)",
        one_of=DTYPES,
    )
    quantize: str | None = flag(
        None,
        "int8 or nf4 keeps the weights of the blocks in 8 or 4 bits (default: neither)",
        one_of=QUANTIZED,
    )
    shard: int | None = flag(
        None,
        "divide the frozen base among this many processes, or, without a number, among all of them "
        "(default: among all if the model does not fit on one device; 1: never)",
        alone=0,
        at_least=0,
    )
    offload: bool = flag(
        False, "keep the weights of the blocks in the memory of the CPU until they are needed: slow"
    )
    check_weights: bool = flag(False, "look for NaN and infinite numbers in the weights first")
    compile: bool = flag(
        False,
        "compile the blocks (torch.compile), for GPUs: slow to start; on a CPU, steps over texts "
        "of different lengths get slower",
    )
    recompute: bool = flag(
        False, "recompute blocks in the backward pass: less memory, slower steps"
    )
    deterministic: bool = flag(
        False, "use deterministic kernels: on a GPU, too, equal runs give equal bits"
    )

    # The recipe, with T-Few's values
    steps: int = flag(1000, "steps of the optimizer", at_least=1)
    epochs: float | None = flag(
        None, "passes over the rows to train on, in place of --steps (default: --steps)", above=0
    )
    batch_size: int = flag(8, "examples per step and adapter", at_least=1)
    micro_batch_size: int | None = flag(
        None,
        "examples per forward pass, to save memory (default: all of a step; on a CPU, a large grid "
        "takes several passes)",
        at_least=1,
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
    clip: float = flag(1.0, "maximum norm of an adapter's gradient", above=0)
    weight_decay: float = flag(
        0.0,
        "weight decay of adamw; it pulls vectors toward 0, although 1 is the identity",
        at_least=0,
    )
    losses: str = flag(
        "lm,ul,ln",
        "losses to add up: lm (likelihood), ul (unlikelihood of wrong choices), ln "
        "(length-normalized likelihood)",
        some_of=LOSSES,
    )
    dropout: float | None = flag(
        None, "dropout in training (default: as the model's config says)", at_least=0, below=1
    )

    # Evaluation and checkpoints
    max_length: int = flag(  # T-Few's code has 256
        512, "maximum tokens of an input; a longer input loses words from its middle", at_least=1
    )
    max_target_length: int = flag(
        512,
        "maximum tokens of a target; a longer target loses its end, and a longer choice is an "
        "error",
        at_least=1,
    )
    max_new_tokens: int = flag(64, "maximum tokens to generate for a row with a target", at_least=1)
    eval_prompt: str | int = flag(
        "0",
        "prompts to evaluate with: 0, or 0,1,2, or all; the result is the median",
        has_parts=True,
    )
    eval_batch_size: int = flag(16, "rows per forward pass in evaluation", at_least=1)
    eval_every: int = flag(
        0,
        "evaluate on held-out rows after every so many steps and after the last one, and keep the "
        "best vectors (0: never)",
        at_least=0,
    )
    patience: int = flag(
        0,
        "stop after this many evaluations in a row without an improvement (0: never)",
        at_least=0,
    )
    save_every: int = flag(100, "steps between checkpoints", at_least=1)

    @property
    def is_training(self):
        return self.method in TRAINED and not self.eval_only

    @property
    def is_mixture(self):
        """Whether one adapter is trained on several tasks."""
        return self.adapters == "one" and isinstance(self.task, tuple)

    @property
    def axes(self):
        """The names of the flags that have several values, and so make a grid of adapters."""
        names = [name for name, value in vars(self).items() if isinstance(value, tuple)]
        if self.is_mixture:
            names.remove("task")
        return names
