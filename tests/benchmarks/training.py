"""Lines of the table: steps of training, and the memory that they take. What a pair computes is compared first.

Shapes: B batch, M source length, C choices, L target length, N all choices of all rows.
"""

import torch

from minia3.checkpoints.known_models import known_models
from minia3.inference.scoring import choice_logprobs
from minia3.model.llama import Llama
from minia3.model.t5 import T5
from minia3.training.losses import total_loss
from minia3.training.prepare import prepare_model
from tests.benchmarks.measure import child, compare, kept_for_backward
from tests.benchmarks.pairs import IGNORED
from train import Config

PEERS = {  # name -> method of Pair
    "(IA)^3": "theirs",
    "LoRA r8 (q, v)": "lora",
    "our LoRA r8 (q, v)": "our_lora",
    "our full fine-tuning": "full",
}


def loss_of(pair, model, batch, adapter=None):
    """A function that gives either side's loss of a batch with one target for each row."""
    if isinstance(model, T5 | Llama):
        mask, label = batch.target_mask_BCL, batch.label_B
        return lambda: total_loss(choice_logprobs(model, batch, adapter), mask, label, ("lm",))
    inputs = pair.their_inputs(batch, batch.target_BCL[:, 0])
    return lambda: model(**inputs).loss


@torch.no_grad()
def same_targets(pair, batch, *models, adapter=None):
    """Both sides give each token of the targets the same log-probability."""

    def logp(model):
        if isinstance(model, T5 | Llama):
            return choice_logprobs(model, batch, adapter)[batch.target_mask_BCL]
        inputs = pair.their_inputs(batch, batch.target_BCL[:, 0])
        logits, labels = model(**inputs).logits, inputs["labels"]
        if not pair.is_t5:  # the token before predicts
            logits, labels = logits[:, :-1], labels[:, 1:]
        label_T1 = labels[labels != IGNORED].unsqueeze(1)
        return logits[labels != IGNORED].float().log_softmax(-1).gather(-1, label_T1).squeeze(1)

    pair.same(*map(logp, models))


def training_step(loss, parameters):
    """A step of AdamW over those of `parameters` that are trained."""
    adam = torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=1e-9)

    def step():
        loss().backward()
        adam.step()
        adam.zero_grad()

    return step


def n_tokens(batch):
    """Real tokens of a batch, read and written."""
    return int(batch.mask_BM.sum() + batch.target_mask_BCL.sum())


def steps(bench, pair):
    """Against PEFT's (IA)^3, padded as it wants it; and without padding against other ways to train."""
    ours = pair.ours().train()
    for what, method in PEERS.items():
        theirs = getattr(pair, method)().train()
        shapes = (
            {"no padding": False, "RTE-like lengths": True}
            if method == "theirs"
            else {f"against {what}": False}
        )
        for how, like_rte in shapes.items():
            batch = pair.batch(pair.lengths(like_rte))
            if "lora" not in method:
                same_targets(pair, batch, ours, theirs)
            losses = [loss_of(pair, model, batch) for model in (ours, theirs)]
            sides = (
                training_step(loss, m.parameters())
                for loss, m in zip(losses, (ours, theirs), strict=True)
            )
            yield f"training step, {how}", bench.time(*sides, tokens=n_tokens(batch))
        del theirs, losses, sides  # before there is another


def dropout(bench, pair):
    """The steps with T5's own dropout, for which a CPU has no fused attention. (LLaMA has none; elsewhere it is 0.)"""
    p = known_models()[pair.name].config.dropout
    if p == 0:
        return
    sides = pair.ours().train(), pair.theirs().train()
    for module in (*sides[0].modules(), *sides[1].modules()):
        if isinstance(module, torch.nn.Dropout):
            module.p = p
        elif isinstance(getattr(module, "dropout", None), float):  # an attention's
            module.dropout = p
    for how, like_rte in {"no padding": False, "RTE-like lengths": True}.items():
        batch = pair.batch(pair.lengths(like_rte))
        losses = [loss_of(pair, model, batch) for model in sides]
        steps = (training_step(loss, m.parameters()) for loss, m in zip(losses, sides, strict=True))
        yield f"training step, {how}, dropout {p}", bench.time(*steps, tokens=n_tokens(batch))
        found = [kept_for_backward(loss, m) for loss, m in zip(losses, sides, strict=True)]
        yield f"bytes kept for backward, {how}, dropout {p}", compare(*found, "B")


def flags(bench, pair):
    """What train.py's --recompute and --compile cost and save: ours, against ours with the flag."""
    batch, plain = pair.batch(pair.lengths(like_rte=True)), pair.ours().train()
    for flag in ("checkpoint", "compile"):  # this takes a minute at first
        model = pair.ours().train()
        prepare_model(model, Config(**{flag: True}))
        same_targets(pair, batch, plain, model)
        sides = [loss_of(pair, m, batch) for m in (plain, model)]
        found, other = (
            kept_for_backward(loss, m) for loss, m in zip(sides, (plain, model), strict=True)
        )
        yield f"bytes kept for backward, against --{flag} (ours)", compare(found, other, "B")
        steps = (
            training_step(loss, m.parameters())
            for loss, m in zip(sides, (plain, model), strict=True)
        )
        yield (
            f"RTE-like lengths, against --{flag} (ours)",
            bench.time(*steps, tokens=n_tokens(batch)),
        )


def choices(bench, pair):
    """T-Few's three losses over four choices; theirs with the inputs repeated, or (T5) the encoder's output."""
    ours, theirs, n = pair.ours().train(), pair.theirs().train(), 4
    batch = pair.batch(n_choices=n)
    target_NL = batch.target_BCL.flatten(0, 1)
    repeated = pair.their_inputs(batch, target_NL)
    if not pair.is_t5:  # the tokens before the targets' predict them
        repeated = {key: x for key, x in repeated.items() if key != "labels"}
        repeated["logits_to_keep"] = target_NL.shape[1] + 1

    def their_logp(**inputs):
        logits_NLV = theirs(**inputs).logits[:, : target_NL.shape[1]]
        return (
            logits_NLV.float()
            .log_softmax(-1)
            .gather(-1, target_NL[..., None])
            .view(batch.target_BCL.shape)
        )

    def encoded_once():
        source = {"input_ids": batch.source_BM, "attention_mask": batch.mask_BM.long()}
        memory = theirs.base_model.model.encoder(**source).last_hidden_state.repeat_interleave(
            n, dim=0
        )
        return their_logp(
            encoder_outputs=(memory,),
            **{key: repeated[key] for key in ("attention_mask", "labels")},
        )

    def our_logp():
        return choice_logprobs(ours, batch)

    def step(logp_BCL, model):
        mask, label = batch.target_mask_BCL, batch.label_B
        return training_step(lambda: total_loss(logp_BCL(), mask, label), model.parameters())

    ways = {"repeated inputs": lambda: their_logp(**repeated)} | (
        {"one encoding": encoded_once} if pair.is_t5 else {}
    )
    for what, their_way in ways.items():
        with torch.no_grad():
            pair.same(our_logp(), their_way())
        sides = step(our_logp, ours), step(their_way, theirs)
        yield (
            f"T-Few's loss, {n} choices, against {what}",
            bench.time(*sides, tokens=n_tokens(batch)),
        )


def many_tasks(bench, pair):
    """A batch of one example for each of its tasks: one pass, against a pass for each adapter."""
    batch, n = pair.batch(), len(pair.lengths())
    ours, theirs = pair.ours(n_adapters=n).train(), pair.theirs().train()
    names = ["default"] + [f"task{i}" for i in range(1, n)]
    for name in names[1:]:
        theirs.load_adapter(pair.adapter, name, is_trainable=True)
    same_targets(pair, batch, ours, theirs, adapter=torch.arange(n))
    inputs = pair.their_inputs(batch, batch.target_BCL[:, 0])
    for p in theirs.parameters():
        p.requires_grad_(False)
    for name in names:
        theirs.set_adapter(name)
    adam = torch.optim.AdamW([p for n, p in theirs.named_parameters() if "ia3_l" in n], lr=1e-9)

    def theirs_step():
        for i, name in enumerate(names):
            theirs.set_adapter(name)
            theirs(**{key: x[i : i + 1] for key, x in inputs.items()}).loss.backward()
        adam.step()
        adam.zero_grad()

    our_step = training_step(loss_of(pair, ours, batch, torch.arange(n)), ours.parameters())
    yield (
        f"{n} tasks in one batch of {n}, trained in one pass",
        bench.time(our_step, theirs_step, n_tokens(batch)),
    )


def kept(bench, pair):
    """What autograd keeps of a forward pass, weights aside."""
    batch, found = pair.batch(), {}
    for method in ("ours", *PEERS.values()):
        model = getattr(pair, method)().train()
        found[method] = kept_for_backward(loss_of(pair, model, batch), model)
    for what, method in PEERS.items():
        yield f"bytes kept for backward, against {what}", compare(found["ours"], found[method], "B")


PEAK = """
import warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch
from tests.benchmarks.measure import peak_memory
from tests.benchmarks.pairs import Pair
from tests.benchmarks.training import loss_of, training_step
torch.set_num_threads({threads})
pair = Pair({name!r}, Path({folder!r}), {quick}, {dtype}, {device!r})
model = pair.{method}().train()
step = training_step(loss_of(pair, model, pair.batch()), model.parameters())
step(), step()
print(peak_memory({device!r}))
"""


def peak(bench, pair):
    """The most memory of a process that trains (on the CPU, mapped weights are in it)."""
    given = {name: getattr(pair, name) for name in ("name", "quick", "dtype", "device")}
    given |= {"folder": str(pair.scratch), "threads": torch.get_num_threads()}
    ours = int(child(PEAK.format(method="ours", **given)))
    for what, method in PEERS.items():  # a process each, and PEFT's begin slowly
        theirs = int(child(PEAK.format(method=method, **given)))
        yield f"peak memory of training, against {what}", compare(ours, theirs, "B")
