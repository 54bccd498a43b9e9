"""Lines of the table: from nothing to a model, adapters in, the merged model out."""

import json
import shutil

import torch

import minia3
from minia3.checkpoints.tensor_names import name_table
from minia3.model.sequence_state import check_start
from tests.benchmarks.measure import child
from tests.benchmarks.pairs import quiet
from tests.benchmarks.training import same_targets


def start(bench, pair):
    """A process from nothing to a model that is ready to train; both give the same logits, which are not timed."""
    folder, device = str(pair.folder), pair.device
    ours = f"import minia3; m = minia3.load_model({folder!r}, device={device!r}); minia3.freeze(m); m.train()"
    kind, task = ("Seq2SeqLM", "SEQ_2_SEQ_LM") if pair.is_t5 else ("CausalLM", "CAUSAL_LM")
    theirs = (
        f"import peft, transformers; from transformers import AutoModelFor{kind} as M; "
        f"m = M.from_pretrained({folder!r}, dtype='auto').to({device!r}); "
        f"peft.get_peft_model(m, peft.IA3Config(task_type='{task}')).train()"
    )
    source = f"; import torch; s = torch.arange(2, 18, device={device!r}).view(2, 8); "
    logits = (
        "t = m.start(s); x = m.step(t.start, t)",
        f"x = m(s{', labels=s[:, :1]' if pair.is_t5 else ''}).logits",
    )
    sides = zip((ours, theirs), logits, strict=True)
    found = (
        child(f"{code}{source}{made}; print(x[:, -1, :100].tolist())").splitlines()[-1]
        for code, made in sides
    )
    pair.same(*(torch.tensor(json.loads(x)) for x in found))
    yield "process start to ready to train", bench.time(lambda: child(ours), lambda: child(theirs))


def adapters(bench, pair):
    """Of two adapters, of which the first is the base: both sides say the same with each."""
    import peft

    ours = minia3.load_model(pair.folder, n_adapters=2, device=pair.device)
    with quiet():
        theirs = peft.get_peft_model(
            pair.base(), peft.PeftConfig.from_pretrained(pair.adapter), "base"
        )

    def reload():
        theirs.load_adapter(pair.adapter, "other")
        theirs.delete_adapter("other")

    yield (
        "load an adapter from disk",
        bench.time(lambda: minia3.load_adapter(ours, pair.adapter, 1), reload),
    )
    theirs.load_adapter(pair.adapter, "other")
    names, source_BM = ["base", "other"], torch.zeros(8, 1, dtype=torch.long, device=pair.device)
    for row, name in enumerate(names):
        theirs.set_adapter(name)
        same_targets(pair, pair.batch(), ours, theirs, adapter=row)

    def switch_theirs():
        names.reverse()
        theirs.set_adapter(names[0])

    # Ours is an argument of `start`: this is what it does with it.
    yield (
        "switch to another adapter",
        bench.time(lambda: check_start(source_BM, None, 1, 2), switch_theirs),
    )


def export(bench, pair):
    def ours():
        minia3.save_model(minia3.merge(pair.ours()), pair.scratch / "ours")
        shutil.rmtree(pair.scratch / "ours")

    def theirs():
        pair.theirs().merge_and_unload().save_pretrained(pair.scratch / "theirs")
        shutil.rmtree(pair.scratch / "theirs")

    merged, folded = minia3.merge(pair.ours()), pair.theirs().merge_and_unload().state_dict()
    for name, parameter in name_table(merged).items():
        if parameter is not None:
            pair.same(merged.get_parameter(parameter), folded[name])
    yield "load, merge and export", bench.time(ours, theirs)
