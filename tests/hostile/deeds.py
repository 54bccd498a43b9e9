"""The deeds of minia3 that write: training of all kinds, and the commands and functions that save.

A deed gets two folders: `inputs`, which `make_inputs` has filled once and nothing changes, and
`folder`, which is empty. kills.py kills deeds, and faults.py takes their disk away.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass

import running
import torch
from task_files import FILES, PARTS, YES_OR_NO, Server, zipped
from words import word_tokenizer

import minia3
import train
from minia3.adapters.lora import add_lora, save_lora
from minia3.checkpoints import save as save_module
from minia3.cli.main import main
from minia3.tasks.known_tasks import known_tasks
from minia3.tasks.splits import load_task
from minia3.tasks.task import Source, TaskSpec
from tests.hostile.processes import start_process

SHARD_BYTES = 8_000  # so that the small models have several files


@dataclass(frozen=True)
class Deed:
    """What is done, and what is done again after it was killed."""

    run: Callable  # (inputs, folder) -> the exit code, or None
    again: Callable | None = None  # None: the same command
    begin: Callable | None = None  # (inputs, folder): write what was there before


# What the deeds read


def make_inputs(inputs):
    """Fill a folder with models, adapters, tasks and rows."""
    for name in ("t5", "llama"):
        shutil.copytree(running.model(name), inputs / name)
    made = running.rows(16)
    for i in range(2):
        splits = {"train": made[i : i + 6], "validation": made[6:9], "test": made[9:12]}
        running.write(inputs / f"task{i}", **splits)
    running.write(inputs, rows=running.rows(11, seed=1))
    for seed in range(2):
        model = randomized(inputs / "t5", seed)
        minia3.save_adapter(model, inputs / f"adapter{seed}")
    task = {"prompts": [{"text": "{input}", "choices": ["w4", "w5"]}]}
    (inputs / "adapter0" / "task.json").write_text(json.dumps(task))
    make_tfew_file(inputs)
    make_lora(inputs)
    save_module.SHARD_BYTES = SHARD_BYTES
    minia3.save_model(minia3.load_model(inputs / "llama"), inputs / "shards", word_tokenizer(False))
    minia3.save_adapter(randomized(inputs / "llama", 2), inputs / "llama-adapter")
    (inputs / "T.zip").write_bytes(zipped(FILES))


def randomized(folder, seed):
    model = minia3.load_model(folder)
    torch.manual_seed(seed)
    with torch.no_grad():
        for vector in minia3.vectors(model).values():
            vector.normal_(1.0, 0.2)
    return model


def make_tfew_file(inputs):
    """Write T-Few's file for a T5 v1.0, which has no vectors of feed-forwards."""
    config = running.CONFIGS["t5"]
    width = config.n_heads * config.d_head
    stacks = {"encoder": ["SelfAttention"], "decoder": ["SelfAttention", "EncDecAttention"]}
    vectors = {}
    for stack, attentions in stacks.items():
        for i in range(config.n_layers):
            for j, attention in enumerate(attentions):
                for site in "kv":
                    name = f"{stack}.block.{i}.layer.{j}.{attention}.{site}.multi_lora_b"
                    vectors[name] = torch.rand(width, 1)
    torch.save(vectors, inputs / "finish.pt")


def make_lora(inputs):
    model = minia3.load_model(inputs / "t5")
    torch.manual_seed(0)
    for parameter in add_lora(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    save_lora(model, inputs / "lora")


# Runs


def trains(model="t5", tasks=("task0",), **flags):
    """Return a deed that trains for four steps, with a checkpoint every two."""
    values = {"steps": 4, "batch_size": 2, "save_every": 2, "eval_batch_size": 8, "device": "cpu"}

    def words_for(inputs, folder):
        paths = ",".join(str(inputs / task) for task in tasks)
        words = ["--model", inputs / model, "--task", paths, "--out", folder / "run"]
        for name, value in (values | flags).items():
            words.append(f"--{name.replace('_', '-')}")
            if value is not True:
                words.append(str(value).replace("@", f"{inputs}/"))
        return [str(word) for word in words]

    def run(inputs, folder):
        return train.main(words_for(inputs, folder), is_program=True)

    def again(inputs, folder):
        """Resume, if the killed run came as far as to say what it is."""
        if not (folder / "run" / "config.json").exists():
            return run(inputs, folder)
        return train.main(["--resume", str(folder / "run")], is_program=True)

    return Deed(run, again)


def make_finished_run(inputs, folder):
    code = trains().run(inputs, folder)
    assert code == 0


def extend(inputs, folder):
    return train.main(["--resume", str(folder / "run"), "--steps", "6"], is_program=True)


# Commands


def command(*words, begin=None):
    """Return a deed of the command line. A word that begins with @ is in `inputs`, with = in
    `folder`.
    """

    def run(inputs, folder):
        typed = []
        for word in words:
            typed.append(word.replace("@", f"{inputs}/").replace("=", f"{folder}/"))
        return main(typed)

    return Deed(run, begin=begin)


# Functions


def as_program(act):
    """Return a deed's function that prints the errors of a user as the command line does."""

    def run(inputs, folder):
        try:
            act(inputs, folder)
            return 0
        except (OSError, ValueError, KeyboardInterrupt) as error:
            print(f"minia3: {str(error) or type(error).__name__}", file=sys.stderr)
            return 2 if isinstance(error, ValueError) else 1

    return run


def save_new_model(inputs, folder):
    save_module.SHARD_BYTES = SHARD_BYTES
    minia3.save_model(minia3.load_model(inputs / "llama"), folder / "out", word_tokenizer(False))


def save_old_model(inputs, folder):
    """Another architecture, in one file."""
    minia3.save_model(minia3.load_model(inputs / "t5"), folder / "out", word_tokenizer(True))


def save_new_adapter(inputs, folder):
    minia3.save_adapter(randomized(inputs / "t5", 1), folder / "out")


def save_old_adapter(inputs, folder):
    shutil.copytree(inputs / "lora", folder / "out")


# Downloads


def serve_archive(inputs):
    """Start a server of T.zip in another process. Return its id and the address."""
    server = Server()
    server.content = (inputs / "T.zip").read_bytes()
    pid = start_process(server.serve_forever)
    server.server_close()
    return pid, f"http://127.0.0.1:{server.server_port}/T.zip"


def know_task(inputs, address=None):
    """Add the task `served` to the table. Without an address, it is downloaded from a file."""
    content = (inputs / "T.zip").read_bytes()
    address = address or (inputs / "T.zip").as_uri()
    source = Source(address, PARTS, len(content), hashlib.sha256(content).hexdigest())
    known_tasks()["served"] = TaskSpec(YES_OR_NO, [source], labels=("no", "yes"))


def download(inputs, folder):
    know_task(inputs, (inputs / "address").read_text())
    load_task("served", folder / "data")


DEEDS = {
    "run": trains(),
    "grid": trains(tasks=("task0", "task1"), seed="0,1", save_every=1),
    "mixture": trains(tasks=("task0", "task1"), adapters="one"),
    "best of run": trains(eval_every=1, patience=3),
    "LoRA run": trains("llama", method="lora"),
    "full run": trains(method="full"),
    "evaluation": trains(method="none"),
    "eval only": trains(eval_only=True, adapter="@adapter0"),
    "longer run": Deed(extend, begin=make_finished_run),
    "merge": command("merge", "@t5", "@adapter0", "=out"),
    "merge shards": command("merge", "@shards", "@llama-adapter", "=out"),
    "merge LoRA": command("merge", "@t5", "@lora", "=out"),
    "convert": command("convert", "@finish.pt", "=out"),
    "convert model": command("convert", "@shards", "=out"),
    "mix": command("mix", "=out", "@adapter0:0.5", "@adapter1:0.25"),
    "predict": command(
        *("predict", "@t5", "@rows.jsonl", "--batch-size", "3"),
        *("--adapter", "@adapter0", "--out", "=out.jsonl"),
    ),
    "save model": Deed(as_program(save_new_model), begin=save_old_model),
    "save adapter": Deed(as_program(save_new_adapter), begin=save_old_adapter),
    "download": Deed(as_program(download)),
}
