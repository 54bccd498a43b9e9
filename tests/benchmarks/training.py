"""Lines of the table: steps of training, and the memory that they take.

Both sides must compute the same before they are timed.

Shapes: B batch, M source length, C choices, L target length, N = B * C, V vocabulary, T tokens that
have a loss.
"""

import torch

from minia3.checkpoints.known_models import KNOWN_MODELS
from minia3.inference.scoring import choice_logprobs
from minia3.model.llama import Llama
from minia3.model.t5 import T5
from minia3.training.losses import total_loss
from minia3.training.prepare import prepare_model
from tests.benchmarks.measure import compare, kept_for_backward, run_program, summarize
from tests.benchmarks.pairs import IGNORED
from train import Config

PEERS = {  # title: method of Pair
    "(IA)^3": "theirs",
    "LoRA r8 (q, v)": "their_lora",
    "our LoRA r8 (q, v)": "our_lora",
    "our full fine-tuning": "our_full",
}
# title: whether the sources have lengths like RTE's
LENGTHS = {"no padding": False, "RTE-like lengths": True}


def is_ours(model):
    return isinstance(model, T5 | Llama)


def loss_of(pair, model, batch, adapter=None):
    """Return a function that computes the loss of either side's model on a batch.

    Each example has one target.
    """
    if is_ours(model):
        return lambda: total_loss(
            choice_logprobs(model, batch, adapter), batch.target_mask_BCL, batch.label_B, ("lm",)
        )
    inputs = pair.their_inputs(batch, batch.target_BCL[:, 0])
    return lambda: model(**inputs).loss


@torch.no_grad()
def logprobs_of_targets(pair, model, batch, adapter=None):
    """Return (T,): the log-probability that either side's model gives each token of the targets."""
    if is_ours(model):
        return choice_logprobs(model, batch, adapter)[batch.target_mask_BCL]
    inputs = pair.their_inputs(batch, batch.target_BCL[:, 0])
    logits_BLV = model(**inputs).logits
    labels_BL = inputs["labels"]
    if not pair.is_t5:  # the token before predicts
        logits_BLV = logits_BLV[:, :-1]
        labels_BL = labels_BL[:, 1:]
    is_target_BL = labels_BL != IGNORED
    logp_TV = logits_BLV[is_target_BL].float().log_softmax(-1)
    return logp_TV.gather(-1, labels_BL[is_target_BL].unsqueeze(1)).squeeze(1)


def check_same_targets(pair, batch, ours, theirs, adapter=None):
    """Raise AssertionError unless both models give the targets the same probabilities."""
    found = logprobs_of_targets(pair, ours, batch, adapter)
    pair.check_same(found, logprobs_of_targets(pair, theirs, batch, adapter))


def training_step(loss, parameters, adamw=torch.optim.AdamW):
    """Return a function that makes a step of AdamW over the parameters that train."""
    trained = [p for p in parameters if p.requires_grad]
    optimizer = adamw(trained, lr=1e-9)

    def step():
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def time_steps(bench, pair, ours, theirs, batch, with_kernels=False):
    """Return the Row of a step of either model. with_kernels: see `Bench.time_below_roof`."""
    our_step = training_step(loss_of(pair, ours, batch), ours.parameters())
    their_step = training_step(loss_of(pair, theirs, batch), theirs.parameters())
    return bench.time_below_roof(our_step, their_step, count_tokens(batch), with_kernels)


def compare_kept(pair, ours, theirs, batch):
    """Return the Row of the bytes that either model keeps for the backward pass."""
    our_bytes = kept_for_backward(loss_of(pair, ours, batch), ours)
    their_bytes = kept_for_backward(loss_of(pair, theirs, batch), theirs)
    return compare(our_bytes, their_bytes, "B")


def count_tokens(batch):
    """Return how many real tokens of a batch are read and written."""
    return int(batch.mask_BM.sum() + batch.target_mask_BCL.sum())


# Lines


def steps(bench, pair):
    """Compare with PEFT's (IA)^3, padded as PEFT needs it, and with other methods, unpadded."""
    ours = pair.ours().train()
    for title, like_rte in LENGTHS.items():
        theirs = pair.theirs().train()
        batch = pair.batch(pair.lengths(like_rte))
        check_same_targets(pair, batch, ours, theirs)
        row = time_steps(bench, pair, ours, theirs, batch, with_kernels=True)
        yield f"training step, {title}", row

    batch = pair.batch()
    for peer, method in PEERS.items():
        if method != "theirs":
            theirs = None  # frees one model before the next one is made
            theirs = getattr(pair, method)().train()
            if "lora" not in method:  # a LoRA is another model
                check_same_targets(pair, batch, ours, theirs)
            title = f"training step, against {peer}"
            yield title, time_steps(bench, pair, ours, theirs, batch)


def long_targets(bench, pair):
    """Compare the steps with targets as long as the sources, as in conversations: many logits."""
    n_target = pair.lengths()[0]
    batch = pair.batch(n_target=n_target)
    ours = pair.ours().train()
    theirs = pair.theirs().train()
    check_same_targets(pair, batch, ours, theirs)
    title = f"targets of {n_target} tokens"
    yield f"training step, {title}", time_steps(bench, pair, ours, theirs, batch)
    yield f"bytes kept for backward, {title}", compare_kept(pair, ours, theirs, batch)


def dropout(bench, pair):
    """Compare the steps with T5's own dropout, which is 0 in all other lines. LLaMA has none.

    PyTorch has no fused attention with dropout for a CPU.
    """
    p = KNOWN_MODELS[pair.name].config.dropout
    if p == 0:
        return
    ours = pair.ours().train()
    theirs = pair.theirs().train()
    for model in (ours, theirs):
        set_dropout(model, p)
    for lengths, like_rte in LENGTHS.items():
        batch = pair.batch(pair.lengths(like_rte))
        title = f"{lengths}, dropout {p}"
        yield f"training step, {title}", time_steps(bench, pair, ours, theirs, batch)
        yield f"bytes kept for backward, {title}", compare_kept(pair, ours, theirs, batch)


def set_dropout(model, p):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = p
        elif isinstance(getattr(module, "dropout", None), float):  # transformers' attention
            module.dropout = p


def flags(bench, pair):
    """Compare our step with our step under two flags of train.py, which cost or save something."""
    batch = pair.batch(pair.lengths(like_rte=True))
    plain = pair.ours().train()
    for flag in ("recompute", "compile"):
        model = pair.ours().train()
        prepare_model(model, Config(**{flag: True}))
        check_same_targets(pair, batch, plain, model)  # compiles, which takes a minute
        title = f"against --{flag} (ours)"
        yield f"bytes kept for backward, {title}", compare_kept(pair, plain, model, batch)
        yield f"RTE-like lengths, {title}", time_steps(bench, pair, plain, model, batch)


def choices(bench, pair):
    """Compare T-Few's three losses over four choices.

    Their side repeats the inputs for each choice, or, with T5, the encoder's output.
    """
    n_choices = 4
    ours = pair.ours().train()
    theirs = pair.theirs().train()
    batch = pair.batch(n_choices=n_choices)

    def our_logp():
        return choice_logprobs(ours, batch)

    def tfew_step(logp, model):
        mask_BCL = batch.target_mask_BCL
        return training_step(
            lambda: total_loss(logp(), mask_BCL, batch.label_B), model.parameters()
        )

    our_step = tfew_step(our_logp, ours)
    for way, their_logp in their_scorers(pair, theirs, batch).items():
        with torch.no_grad():
            pair.check_same(our_logp(), their_logp())
        their_step = tfew_step(their_logp, theirs)
        row = bench.time_below_roof(our_step, their_step, count_tokens(batch))
        yield f"T-Few's loss, {n_choices} choices, against {way}", row


def their_scorers(pair, model, batch):
    """Return the functions by which their users may score choices. Each returns (B, C, L)."""
    target_NL = batch.target_BCL.flatten(0, 1)
    n_tokens = target_NL.shape[1]
    repeated = pair.their_inputs(batch, target_NL)
    if not pair.is_t5:
        del repeated["labels"]
        repeated["logits_to_keep"] = n_tokens + 1  # the token before predicts

    def score(**inputs):
        logits_NLV = model(**inputs).logits[:, :n_tokens]
        logp_NLV = logits_NLV.float().log_softmax(-1)
        return logp_NLV.gather(-1, target_NL[..., None]).view(batch.target_BCL.shape)

    def score_repeated():
        return score(**repeated)

    def score_encoded_once():
        encoder = model.base_model.model.encoder
        output = encoder(input_ids=batch.source_BM, attention_mask=batch.mask_BM.long())
        memory = output.last_hidden_state.repeat_interleave(batch.target_BCL.shape[1], dim=0)
        mask = repeated["attention_mask"]
        return score(encoder_outputs=(memory,), attention_mask=mask, labels=target_NL)

    scorers = {"repeated inputs": score_repeated}
    if pair.is_t5:
        scorers["one encoding"] = score_encoded_once
    return scorers


def many_tasks(bench, pair):
    """Compare one pass over a batch with an example of each task with a pass for each adapter."""
    n_tasks = len(pair.lengths())
    our_step, their_step, batch = steps_of_tasks(pair, n_tasks)
    row = bench.time_below_roof(our_step, their_step, count_tokens(batch), with_kernels=True)
    yield f"{n_tasks} tasks in one batch of {n_tasks}, trained in one pass", row


def steps_of_tasks(pair, n_tasks):
    """Return the steps of both sides on a batch with an example of each task, and the batch.

    Ours makes one pass, and theirs a pass for each adapter.
    """
    batch = pair.batch((pair.lengths()[0],) * n_tasks)
    adapter = torch.arange(n_tasks)
    names = ["default", *(f"task{i}" for i in range(1, n_tasks))]
    ours = pair.ours(n_adapters=n_tasks).train()
    theirs = pair.theirs().train()
    for name in names[1:]:
        theirs.load_adapter(pair.adapter, name, is_trainable=True)
    check_same_targets(pair, batch, ours, theirs, adapter)

    theirs.requires_grad_(False)
    for name in names:
        theirs.set_adapter(name)  # lets its vectors train
    vectors = [p for name, p in theirs.named_parameters() if "ia3_l" in name]
    optimizer = torch.optim.AdamW(vectors, lr=1e-9)
    inputs = pair.their_inputs(batch, batch.target_BCL[:, 0])

    def their_step():
        for i, name in enumerate(names):
            theirs.set_adapter(name)
            example = {key: x[i : i + 1] for key, x in inputs.items()}
            theirs(**example).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    our_step = training_step(loss_of(pair, ours, batch, adapter), ours.parameters())
    return our_step, their_step, batch


def kept(bench, pair):
    """Compare the bytes that autograd keeps of a forward pass, without the weights."""
    batch = pair.batch()

    def bytes_of(method):
        model = getattr(pair, method)().train()
        return kept_for_backward(loss_of(pair, model, batch), model)

    ours = bytes_of("ours")
    for peer, method in PEERS.items():
        yield f"bytes kept for backward, against {peer}", compare(ours, bytes_of(method), "B")


OUR_ADAMW = "minia3.training.optimizer.AdamW"  # of tables of vectors
THEIR_ADAMW = "torch.optim.AdamW"

TRAINING = """
import warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch
import minia3.training.optimizer
from tests.benchmarks.measure import peak_memory
from tests.benchmarks.pairs import Pair
from tests.benchmarks.training import loss_of, training_step
torch.set_num_threads({threads})
pair = Pair({name!r}, Path({folder!r}), {quick}, {dtype}, {device!r})
model = pair.{method}().train()
loss = loss_of(pair, model, pair.batch())
step = training_step(loss, model.parameters(), {adamw})
step()
step()
print(peak_memory({device!r}))
"""

# The least that a process needs to train.
STEP_OF_ONE_NUMBER = """
import torch
from minia3.training.optimizer import AdamW
from tests.benchmarks.measure import peak_memory
number = torch.ones(1, 1, device={device!r}, requires_grad=True)
number.sum().backward()
AdamW([number]).step()
print(peak_memory({device!r}))
"""


def peak(bench, pair):
    """Compare the peak memory of processes that train.

    On a CPU it includes the mapped weights. malloc leaves more unused memory in one process than in
    the next, so each peer has several. Our vectors are trained by the AdamW of train.py, and all
    else by torch's, which loads torch's compiler. The floor is what is there when the forward pass
    of a second step ends: torch, the weights, and what autograd keeps.
    """

    def bytes_of(method):
        program = TRAINING.format(
            threads=torch.get_num_threads(),
            name=pair.name,
            folder=str(pair.scratch),
            quick=pair.quick,
            dtype=pair.dtype,
            device=pair.device,
            method=method,
            adamw=OUR_ADAMW if method == "ours" else THEIR_ADAMW,
        )
        return int(run_program(program))

    processes = range(bench.n_processes)
    ours = [bytes_of("ours") for _ in processes]
    floor = least_bytes(pair)
    for peer, method in PEERS.items():
        row = summarize(ours, [bytes_of(method) for _ in processes], "B")
        row.floor = floor
        row.floor_of = "torch, weights, kept for backward"
        yield f"peak memory of training, against {peer}", row


def least_bytes(pair):
    """Return the bytes of torch, of our weights, and of what autograd keeps of our forward pass."""
    n_bytes = int(run_program(STEP_OF_ONE_NUMBER.format(device=pair.device)))
    model = pair.ours().train()
    n_bytes += sum(parameter.nbytes for parameter in model.parameters())
    return n_bytes + kept_for_backward(loss_of(pair, model, pair.batch()), model)
