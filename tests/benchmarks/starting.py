"""Lines of the table: from nothing to a model, adapters in, the merged model out."""

import json
import shutil

import torch
from safetensors.torch import load_file

import minia3
from minia3.adapters.fold import fold
from minia3.adapters.rows import row_of
from minia3.checkpoints.load import build_model
from minia3.checkpoints.tensor_names import name_table
from minia3.model.sequence_state import check_start
from tests.benchmarks.floors import copy_file
from tests.benchmarks.measure import run_program
from tests.benchmarks.pairs import no_warnings
from tests.benchmarks.training import check_same_targets

OUR_START = """
import minia3
model = minia3.load_model({folder!r}, device={device!r})
minia3.freeze(model)
model.train()
"""
# The least that a process needs for this: torch, and the file of the weights.
LEAST_START = """
import torch
from safetensors.torch import load_file
weights = load_file({file!r})
"""
# The layers are built once, on the device where parameters take no memory.
LAYERS = """
from pathlib import Path
from minia3.checkpoints.load import build_model, read_checkpoint
config, _ = read_checkpoint(Path({folder!r}), weights=False)
model = build_model(config)
"""
THEIR_START = """
import peft, transformers
model = transformers.{model_class}.from_pretrained({folder!r}, dtype="auto").to({device!r})
peft.get_peft_model(model, peft.IA3Config(task_type={task_type!r})).train()
"""
SOURCE = """
import torch
source = torch.arange(2, 18, device={device!r}).view(2, 8)
"""
OUR_LOGITS = """
state = model.start(source)
logits = model.step(state.start, state)
"""
THEIR_T5_LOGITS = """
logits = model(source, labels=source[:, :1]).logits
"""
THEIR_LLAMA_LOGITS = """
logits = model(source).logits
"""
PRINT = """
print(logits[:, -1, :100].tolist())
"""


def start(bench, pair):
    """Compare processes, from nothing to a model that is ready to train.

    Both models give the same logits, which is not timed.
    """
    names = {"folder": str(pair.folder), "device": pair.device}
    if pair.is_t5:
        kind = {"model_class": "AutoModelForSeq2SeqLM", "task_type": "SEQ_2_SEQ_LM"}
        their_logits = THEIR_T5_LOGITS
    else:
        kind = {"model_class": "AutoModelForCausalLM", "task_type": "CAUSAL_LM"}
        their_logits = THEIR_LLAMA_LOGITS
    ours = OUR_START.format(**names)
    theirs = THEIR_START.format(**names, **kind)
    source = SOURCE.format(**names)
    least = LEAST_START.format(file=str(pair.folder / "model.safetensors"))
    least_with_layers = least + LAYERS.format(**names)

    def logits_of(program):
        return torch.tensor(json.loads(run_program(program).splitlines()[-1]))

    found = logits_of(ours + source + OUR_LOGITS + PRINT)
    pair.check_same(found, logits_of(theirs + source + their_logits + PRINT))
    row = bench.time(
        lambda: run_program(ours),
        lambda: run_program(theirs),
        alone=lambda: run_program(least_with_layers),
        floor=lambda: run_program(least),
    )
    row.floor_of = "import of torch, mapping the weights"
    row.alone_of = "the same, building the layers"
    yield "process start to ready to train", row


def adapters(bench, pair):
    """Compare loading an adapter, and switching between the base and the adapter.

    The floor of loading is to read the tensors of the file. The floor of switching is to make the
    tensor that tells the model which row of the vectors to use.
    """
    import peft

    ours = minia3.load_model(pair.folder, n_adapters=2, device=pair.device)
    with no_warnings():
        config = peft.PeftConfig.from_pretrained(pair.adapter)
        theirs = peft.get_peft_model(pair.their_base(), config, "base")

    def load_ours():
        minia3.load_adapter(ours, pair.adapter, 1)

    def load_theirs():
        theirs.load_adapter(pair.adapter, "other")
        theirs.delete_adapter("other")

    file = pair.adapter / "adapter_model.safetensors"
    row = bench.time(load_ours, load_theirs, floor=lambda: load_file(file))
    row.floor_of = "reading the tensors"
    yield "load an adapter from disk", row

    theirs.load_adapter(pair.adapter, "other")
    names = ["base", "other"]
    for row, name in enumerate(names):
        theirs.set_adapter(name)
        check_same_targets(pair, pair.batch(), ours, theirs, adapter=row)
    source_BM = torch.zeros(8, 1, dtype=torch.long, device=pair.device)

    def switch_ours():
        # The adapter is an argument of `start`, which does this with it.
        check_start(source_BM, None, 1, ours)

    def switch_theirs():
        names.reverse()
        theirs.set_adapter(names[0])

    row = bench.time(
        switch_ours,
        switch_theirs,
        floor=lambda: torch.tensor([1], device=pair.device),
    )
    row.floor_of = "making a tensor"
    yield "switch to another adapter", row


def export(bench, pair):
    """Compare loading a model and an adapter, merging them, and writing the result.

    The floor is to read the files of the weights and to write them again. They come from the memory
    of the system, and no side waits for them to reach the disk. Alone, the layers are built once,
    the weights are mapped and folded, and then they are written: `merge` returns a model that holds
    them all, so all of them need memory at once.
    """
    merged = minia3.merge(pair.ours())
    expected = pair.theirs().merge_and_unload().state_dict()
    for theirs, ours in name_table(merged).items():
        if ours is not None:
            pair.check_same(merged.get_parameter(ours), expected[theirs])

    def export_ours():
        minia3.save_model(minia3.merge(pair.ours()), pair.scratch / "ours")
        shutil.rmtree(pair.scratch / "ours")

    def export_theirs():
        pair.theirs().merge_and_unload().save_pretrained(pair.scratch / "theirs")
        shutil.rmtree(pair.scratch / "theirs")

    def copy_files():
        for path in pair.folder.glob("*.safetensors"):
            copy_file(path, pair.scratch / "copy")

    vectors = row_of(pair.ours(), 0)
    names = {ours: theirs for theirs, ours in name_table(merged).items() if ours is not None}

    def build_fold_and_write():
        build_model(merged.config)
        stored = load_file(pair.folder / "model.safetensors")
        weights = [fold(ours, stored[theirs], vectors) for ours, theirs in names.items()]
        path = pair.scratch / "folded"
        with path.open("wb", buffering=0) as file:
            for weight in weights:
                file.write(weight.cpu().view(torch.uint8).numpy())
        path.unlink()

    row = bench.time(export_ours, export_theirs, alone=build_fold_and_write, floor=copy_files)
    row.floor_of = "copying the files"
    row.alone_of = "building, folding and writing"
    yield "load, merge and export", row
