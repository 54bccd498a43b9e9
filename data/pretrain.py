"""Make what this folder ships: a tiny T5, and a task that it has not seen. This needs no network.

    python data/pretrain.py

An input begins with two facts, such as "anna has a red ball in the garden . in the hall there is a
red cup of tom .". For each of their four details (person, thing, colour, place), a fair coin
decides whether it is the same in both facts or different. In pre-training, a question about the
facts follows. Its kind is one of `QUESTIONS`.

The held-out task has no question: its input is only the two facts. The answer is "yes" if one
detail (`SHIPPED`) is the same and "no" if it is different. Nothing in the input says which detail
is meant, so a model can only learn that from the task's rows.

Shapes: B batch, M source length, L target length, N rows, C choices.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # so that the command works without an installation

import minia3  # noqa: E402
from minia3.checkpoints.tokenizer import Tokenizer  # noqa: E402
from minia3.inference.metrics import area_under_curve  # noqa: E402
from minia3.model.blocks import Attention, FeedForward  # noqa: E402
from minia3.model.t5 import T5, T5Config  # noqa: E402

# The language

DETAILS = {
    "person": ("anna", "tom", "ben", "clara", "david", "emma", "felix", "greta"),
    "thing": ("ball", "cup", "book", "hat", "lamp", "key", "box", "coat"),
    "colour": ("red", "blue", "green", "yellow", "black", "white"),
    "place": ("garden", "hall", "kitchen", "park", "school", "shop"),
}
NAMES = tuple(DETAILS)
FACTS = (
    "{person} has a {colour} {thing} in the {place} .",
    "in the {place} {person} has a {colour} {thing} .",
    "in the {place} there is a {colour} {thing} of {person} .",
    "the {colour} {thing} of {person} is in the {place} .",
)
ANSWERS = ("no", "yes")  # by label
QUESTION_WORDS = "? different same compare . how many are the same of the first second 0 1 2 3 4"
PAD = "<pad>"
EOS = "</s>"

# The held-out task

SHIPPED = "colour"
N_ROWS = {"train": 512, "validation": 128, "test": 1024}  # multiples of 16: see `held_out`

# The model

D_MODEL = 64
N_LAYERS = 2
N_HEADS = 4
VOCAB_MULTIPLE = 16  # the rows of the embedding; the last rows belong to no token

# Facts and questions


def draw_facts(rng, is_same):
    """Return two facts as text, and the details of each. They share the details in `is_same`."""
    first = {}
    second = {}
    for name, values in DETAILS.items():
        i = rng.randint(len(values))
        j = i
        if not is_same[name]:
            j = (i + rng.randint(1, len(values))) % len(values)
        first[name] = values[i]
        second[name] = values[j]
    forms = rng.randint(len(FACTS), size=2)
    text = f"{FACTS[forms[0]].format(**first)} {FACTS[forms[1]].format(**second)}"
    return text, first, second


# Each kind of question is a function that returns a question and its answer. Its arguments are the
# random numbers, a dict from each detail to whether it is the same, and the details of both facts.


def ask_one(rng, is_same, first, second):
    name = NAMES[rng.randint(len(NAMES))]
    asks_for_same = rng.randint(2)
    word = "same" if asks_for_same else "different"
    return f"{word} {name} ?", ANSWERS[is_same[name] == asks_for_same]


def ask_list(rng, is_same, first, second):
    names = [NAMES[i] for i in rng.permutation(len(NAMES))]
    return "compare .", " ".join(f"{name} {ANSWERS[is_same[name]]}" for name in names)


def ask_count(rng, is_same, first, second):
    return "how many are the same ?", str(sum(is_same.values()))


def ask_value(rng, is_same, first, second):
    name = NAMES[rng.randint(len(NAMES))]
    asks_for_second = rng.randint(2)
    if asks_for_second:
        return f"{name} of the second ?", second[name]
    return f"{name} of the first ?", first[name]


# Kind -> its share of the training examples.
QUESTIONS = {ask_one: 0.4, ask_list: 0.3, ask_count: 0.1, ask_value: 0.2}


def draw_example(rng, ask):
    """Return the source and the target of one question about two facts."""
    coins = rng.randint(2, size=len(NAMES)).tolist()
    is_same = dict(zip(NAMES, coins, strict=True))
    facts, first, second = draw_facts(rng, is_same)
    question, target = ask(rng, is_same, first, second)
    return f"{facts} {question}", target


def held_out(detail=SHIPPED):
    """Return the rows {"input", "choices", "label"} of each split of the held-out task.

    There are 16 ways in which the details can be the same or different. Each way comes equally
    often in a split, so the labels are balanced, and no other detail says anything about them. No
    input comes twice. The rows are the same at every call and on every machine, because NumPy
    guarantees the stream of RandomState.
    """
    rng = np.random.RandomState(0)
    seen = set()
    splits = {}
    for split, n_rows in N_ROWS.items():
        rows = list(draw_held_out_rows(rng, n_rows, detail, seen))
        splits[split] = [rows[i] for i in rng.permutation(n_rows)]
    return splits


def draw_held_out_rows(rng, n_rows, detail, seen) -> Iterator[dict]:
    """Yield rows whose inputs are not in `seen`, and add their inputs to it."""
    for i in range(n_rows):
        is_same = {name: i >> bit & 1 for bit, name in enumerate(NAMES)}  # the bits of i mod 16
        text = None
        while text is None or text in seen:
            text, _, _ = draw_facts(rng, is_same)
        seen.add(text)
        yield {"input": text, "choices": list(ANSWERS), "label": is_same[detail]}


def write_held_out(folder, detail=SHIPPED):
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in held_out(detail).items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8", newline="\n")


# The model


def list_words():
    """Return the words of the language without repeats."""
    texts = [*FACTS, *ANSWERS]
    for name, values in DETAILS.items():
        texts += [name, *values]
    words = " ".join([*texts, QUESTION_WORDS]).split()
    return [word for word in dict.fromkeys(words) if not word.startswith("{")]


def make_tokenizer():
    """Return a tokenizer with a token for each word of the language, and a token for each byte.

    So a word of the language is one token, and any other UTF-8 text can still be encoded and
    decoded.
    """
    bytes_as_letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["Ġ" + word for word in list_words()]  # Ġ stands for the space before a word
    tokens = [PAD, EOS, *bytes_as_letters, *words]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    # A BPE without merges. With ignore_merges, a word that is a token stays whole. Other words are
    # encoded byte by byte.
    backend = Backend(models.BPE(vocabulary, [], ignore_merges=True))
    backend.normalizer = normalizers.Prepend(" ")  # makes the first word like all other words
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens([PAD, EOS])
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, vocabulary[EOS])]
    )
    return Tokenizer(backend, {"pad_token": PAD, "eos_token": EOS})


def new_model(tokenizer, seed, d_model=D_MODEL):
    """Return a T5 (v1.0 form) with the initialization of Mesh TensorFlow, with factor 1."""
    n_tokens = tokenizer.backend.get_vocab_size()
    n_multiples = -(-n_tokens // VOCAB_MULTIPLE)  # rounded up
    config = T5Config(
        d_model,
        d_model // N_HEADS,
        3 * d_model,
        N_LAYERS,
        N_LAYERS,
        n_heads=N_HEADS,
        vocab_size=n_multiples * VOCAB_MULTIPLE,
        dropout=0.0,
    )
    torch.manual_seed(seed)
    model = T5(config)
    for module, width in initial_widths(model):
        torch.nn.init.normal_(module.weight, std=width**-0.5)
    return model


def initial_widths(model):
    """Return (module, width) pairs. The standard deviation of the weights will be width ** -0.5."""
    config = model.config
    widths = [
        (model.embed, 1),
        (model.encoder.bias_tables[0], config.d_model),
        (model.decoder.bias_tables[0], config.d_model),
    ]
    for module in model.modules():
        if isinstance(module, Attention):
            widths += [
                # T5 does not divide its scores by sqrt(d_head), so the weights of q do.
                (module.q, config.d_model * config.d_head),
                (module.k, config.d_model),
                (module.v, config.d_model),
                (module.o, config.n_heads * config.d_head),
            ]
        elif isinstance(module, FeedForward):
            widths += [(module.gate, config.d_model), (module.down, config.d_ff)]
    return widths


# Pre-training


def encode_batch(texts, tokenizer):
    """Return the ids of texts (B, M), padded on the right, and the mask of real tokens (B, M)."""
    ids = [torch.tensor(tokenizer.encode(text)) for text in texts]
    ids_BM = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_id)
    return ids_BM, ids_BM != tokenizer.pad_id


def pretrain(seed, steps, d_model=D_MODEL, lr=2e-3, batch_size=64):
    """Return a trained model and its tokenizer. Every step draws new examples."""
    tokenizer = make_tokenizer()
    model = new_model(tokenizer, seed, d_model)
    vectors = {id(vector) for vector in minia3.vectors(model).values()}
    weights = [p for p in model.parameters() if id(p) not in vectors]  # the vectors stay at one
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.01)
    rng = np.random.RandomState(seed)
    kinds = list(QUESTIONS)
    shares = list(QUESTIONS.values())
    began = time.time()
    for step in range(steps):
        chosen = rng.choice(len(kinds), size=batch_size, p=shares)
        examples = [draw_example(rng, kinds[i]) for i in chosen]
        source_BM, mask_BM = encode_batch([source for source, _ in examples], tokenizer)
        target_BL, is_real_BL = encode_batch([target for _, target in examples], tokenizer)
        state = model.start(source_BM, mask_BM)
        loss = -minia3.logprobs(model, state, target_BL)[is_real_BL].mean()
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / 100, 1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if step % 250 == 0 or step + 1 == steps:
            seconds = time.time() - began
            print(f"step {step:5d}  loss {loss.item():.4f}  {seconds:.0f} s", flush=True)
    return model.eval().requires_grad_(False), tokenizer


# Evaluation


def is_right(answer, target):
    """Return whether an answer is the target. The details of a list may come in any order."""
    is_list = len(target.split()) == 2 * len(NAMES)
    return answer == target or (is_list and sorted_pairs(answer) == sorted_pairs(target))


def sorted_pairs(text):
    words = text.split()
    return sorted(zip(words[::2], words[1::2], strict=False))


def evaluate(model, tokenizer, n_examples):
    """Return a dict from each kind of question to the share of right answers to new examples."""
    rng = np.random.RandomState(2**31)
    shares = {}
    for ask in QUESTIONS:
        examples = [draw_example(rng, ask) for _ in range(n_examples)]
        sources = [source for source, _ in examples]
        answers = minia3.generate(model, tokenizer, sources, max_new_tokens=9, batch_size=64)
        n_right = 0
        for answer, (_, target) in zip(answers, examples, strict=True):
            n_right += is_right(answer, target)
        shares[ask.__name__] = n_right / n_examples
    return shares


def evaluate_held_out(model, tokenizer, rows):
    """Return the accuracy and the AUC on rows of the held-out task. Both compare the score of "yes"
    with the score of "no".
    """
    inputs = [row["input"] for row in rows]
    scores_NC = minia3.rank(model, tokenizer, inputs, list(ANSWERS), batch_size=64)
    difference_N = scores_NC[:, 1] - scores_NC[:, 0]
    is_yes_N = torch.tensor([row["label"] == 1 for row in rows])
    accuracy = ((difference_N > 0) == is_yes_N).double().mean().item()
    auc = area_under_curve(difference_N[is_yes_N].numpy(), difference_N[~is_yes_N].numpy())
    return accuracy, auc


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=HERE, help="folder to write to (default: the script's)")
    add("--seed", type=int, default=4, help="seed of weights and examples (default: 4)")
    add("--steps", type=int, default=3000, help="steps of pre-training (default: 3000)")
    add(
        "--d-model",
        type=int,
        default=D_MODEL,
        help=f"width of the model, a multiple of 8 (default: {D_MODEL})",
    )
    add("--quick", action="store_true", help="20 steps and few examples, to see that it runs")
    add(
        "--details",
        nargs="+",
        choices=DETAILS,
        default=[SHIPPED],
        help=f"write the held-out tasks of these details (default: {SHIPPED})",
    )
    arguments = parser.parse_args()
    if arguments.quick and arguments.out.resolve() == HERE:
        parser.error("--quick would overwrite the shipped model: give another folder as --out")
    return arguments


def main():
    arguments = parse_arguments()
    n_steps = 20 if arguments.quick else arguments.steps
    n_examples = 16 if arguments.quick else 512  # of each kind, to evaluate on
    n_rows = 64 if arguments.quick else 1024  # of each held-out task, to evaluate on
    torch.set_num_threads(1)  # enough for a small model, and every run has the same bits
    model, tokenizer = pretrain(arguments.seed, n_steps, arguments.d_model)
    minia3.save_model(model, arguments.out / "tiny-t5", tokenizer)
    for detail in arguments.details:
        write_held_out(arguments.out / f"same-{detail}", detail)
    print("pre-training: right answers to new examples")
    for name, share in evaluate(model, tokenizer, n_examples).items():
        print(f"  {name:12} {share:6.1%}")
    print("held out (no question), before any training on it")
    for detail in DETAILS:
        rows = held_out(detail)["test"][:n_rows]
        accuracy, auc = evaluate_held_out(model, tokenizer, rows)
        mark = "  (shipped)" if detail == SHIPPED else ""
        print(f"  same-{detail:7} {accuracy:6.1%}  AUC {auc:.2f}{mark}")


if __name__ == "__main__":
    main()
