"""Lines of the table: from nothing to a model, adapters in, the merged model out."""

import shutil

import torch

import minia3
from minia3.load import name_table
from minia3.state import check_start
from tests.benchmarks.measure import child


def start(bench, pair):
    """A process from nothing to a model that is ready to train; both give the same loss, which is not timed."""
    folder, device = str(pair.folder), pair.device
    ours = f"import minia3; m = minia3.load_model({folder!r}, device={device!r}); minia3.freeze(m); m.train()"
    kind, task = ("Seq2SeqLM", "SEQ_2_SEQ_LM") if pair.is_t5 else ("CausalLM", "CAUSAL_LM")
    theirs = (
        f"import peft, transformers; from transformers import AutoModelFor{kind} as M; "
        f"m = M.from_pretrained({folder!r}, dtype='auto').to({device!r}); "
        f"peft.get_peft_model(m, peft.IA3Config(task_type='{task}')).train()"
    )
    data = f"; import torch; s = torch.arange(2, 18, device={device!r}).view(2, 8); t = s[:, :4].contiguous()"
    given = "s, labels=t" if pair.is_t5 else "torch.cat((s, t), 1), labels=torch.cat((0 * s - 100, t), 1)"
    losses = "-minia3.logprobs(m, m.start(s), t).mean()", f"m({given}).loss"
    sides = zip((ours, theirs), losses, strict=True)
    found = (child(f"{code}{data}; print(float({loss}))").split()[-1] for code, loss in sides)
    pair.same(*(torch.tensor(float(loss)) for loss in found), rtol=2**-7)
    yield "process start to ready to train", bench.time(lambda: child(ours), lambda: child(theirs))


def adapters(bench, pair):
    ours, theirs = pair.ours(n_adapters=2), pair.theirs()

    def reload():
        theirs.load_adapter(pair.adapter, "other")
        theirs.delete_adapter("other")

    yield "load an adapter from disk", bench.time(lambda: minia3.load_adapter(ours, pair.adapter, 1), reload)
    theirs.load_adapter(pair.adapter, "other")
    names, source_BM = ["default", "other"], torch.zeros(8, 1, dtype=torch.long, device=pair.device)

    def switch_theirs():
        names.reverse()
        theirs.set_adapter(names[0])

    # Ours is an argument of `start`: this is what it does with it.
    yield "switch to another adapter", bench.time(lambda: check_start(source_BM, None, 1, 2), switch_theirs)


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
