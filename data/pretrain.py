"""Make what ships in this folder: a tiny T5, and a task which it has not seen. One command, no network.

    python data/pretrain.py

The language: two facts ("anna has a red ball in the garden . in the hall there is a red cup of tom ."), then a question
about them. The four details of the facts (person, thing, colour, place) are alike or not by independent fair coins. The
base learns every question of `QUESTIONS`. Held out is the form without a question: the two facts alone, to be answered
"yes" if one detail (`SHIPPED`) is alike and "no" if not. Nothing in the input says so: only training on the task can.

Shapes: B batch, M source length, L target length, N rows, C choices.
"""

import argparse
import json
import sys
import time
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
FACTS = (
    "{person} has a {colour} {thing} in the {place} .",
    "in the {place} {person} has a {colour} {thing} .",
    "in the {place} there is a {colour} {thing} of {person} .",
    "the {colour} {thing} of {person} is in the {place} .",
)
ANSWERS = ("no", "yes")  # by label
PAD, EOS = "<pad>", "</s>"

# The held-out task

SHIPPED = "colour"
ROWS = {"train": 512, "validation": 128, "test": 1024}  # multiples of 16, see `held_out`


def draw(rng, alike):
    """Two facts as text, and their details: `alike` says which details of the second are those of the first."""
    first, second = {}, {}
    for name, values in DETAILS.items():
        i = rng.randint(len(values))
        j = i if alike[name] else (i + rng.randint(1, len(values))) % len(values)
        first[name], second[name] = values[i], values[j]
    forms = rng.randint(len(FACTS), size=2)
    return FACTS[forms[0]].format(**first) + " " + FACTS[forms[1]].format(**second), first, second


# A kind of question: (rng, which details are alike, the facts' details) -> (question, answer)


def ask_one(rng, alike, first, second):
    name, same = list(DETAILS)[rng.randint(len(DETAILS))], rng.randint(2)
    return f"{('different', 'same')[same]} {name} ?", ANSWERS[alike[name] == same]


def ask_list(rng, alike, first, second):
    names = [list(DETAILS)[i] for i in rng.permutation(len(DETAILS))]
    return "compare .", " ".join(f"{name} {ANSWERS[alike[name]]}" for name in names)


def ask_count(rng, alike, first, second):
    return "how many are the same ?", str(sum(alike.values()))


def ask_value(rng, alike, first, second):
    name = list(DETAILS)[rng.randint(len(DETAILS))]
    which = rng.randint(2)
    return f"{name} of the {('first', 'second')[which]} ?", (first, second)[which][name]


QUESTIONS = {
    ask_one: 0.4,
    ask_list: 0.3,
    ask_count: 0.1,
    ask_value: 0.2,
}  # with their shares of the training


def example(rng, ask):
    """(source, target) of one question about two facts."""
    alike = dict(zip(DETAILS, rng.randint(2, size=len(DETAILS)).tolist(), strict=True))
    facts, *details = draw(rng, alike)
    question, target = ask(rng, alike, *details)
    return f"{facts} {question}", target


def held_out(detail=SHIPPED):
    """Split -> rows {"input", "choices", "label"} of the held-out task.

    Each of the 16 ways in which details can be alike comes equally often in each split: the labels are balanced, and no
    other detail says anything about them. No input comes twice. The rows are the same at every call and on every
    machine: RandomState's stream is frozen.
    """
    rng, seen, splits = np.random.RandomState(0), set(), {}
    for split, n in ROWS.items():
        rows = []
        while len(rows) < n:
            ways = len(rows) % 2 ** len(DETAILS)
            alike = {name: ways >> bit & 1 for bit, name in enumerate(DETAILS)}
            text = draw(rng, alike)[0]
            if text not in seen:
                seen.add(text)
                rows.append({"input": text, "choices": list(ANSWERS), "label": alike[detail]})
        splits[split] = [rows[i] for i in rng.permutation(n)]
    return splits


def write_held_out(folder, detail=SHIPPED):
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in held_out(detail).items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8", newline="\n")


# The model


def make_tokenizer():
    """A token for each word of the language, and one for each byte: every UTF-8 text comes back."""
    words = " ".join(
        [*FACTS, *ANSWERS, *(" ".join([name, *values]) for name, values in DETAILS.items())]
    )
    words += " ? different same compare . how many are the same of the first second 0 1 2 3 4"
    tokens = [PAD, EOS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += ["Ġ" + word for word in dict.fromkeys(words.split()) if "{" not in word]
    # BPE without merges: with ignore_merges, a word that is a token is taken whole, and any other byte by byte.
    backend = Backend(
        models.BPE({token: i for i, token in enumerate(tokens)}, [], ignore_merges=True)
    )
    backend.normalizer = normalizers.Prepend(" ")  # the first word as every other
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens([PAD, EOS])
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, 1)]
    )
    return Tokenizer(backend, {"pad_token": PAD, "eos_token": EOS})


def new_model(tokenizer, seed, d_model=64):
    """A T5 (v1.0 form) with T5's own initialisation: standard deviations as in Mesh TensorFlow's, factor 1."""
    vocab_size = (
        -(-tokenizer.backend.get_vocab_size() // 16) * 16
    )  # a multiple of 16; the last rows are no token's
    c = T5Config(
        d_model, d_model // 4, 3 * d_model, 2, 2, n_heads=4, vocab_size=vocab_size, dropout=0.0
    )
    torch.manual_seed(seed)
    model = T5(c)
    widths = [
        (model.embed, 1),
        (model.encoder.position, c.d_model),
        (model.decoder.position, c.d_model),
    ]
    for module in model.modules():
        if isinstance(
            module, Attention
        ):  # q's holds the 1 / sqrt(d_head) that T5's scores do without
            widths += [
                (module.q, c.d_model * c.d_head),
                (module.k, c.d_model),
                (module.v, c.d_model),
            ]
            widths += [(module.o, c.n_heads * c.d_head)]
        elif isinstance(module, FeedForward):
            widths += [(module.gate, c.d_model), (module.down, c.d_ff)]
    for module, width in widths:
        torch.nn.init.normal_(module.weight, std=width**-0.5)
    return model


def padded(texts, tokenizer):
    """(ids (B, M), mask (B, M)) of texts."""
    rows = [torch.tensor(tokenizer.encode(text)) for text in texts]
    ids_BM = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_id)
    return ids_BM, ids_BM != tokenizer.pad_id


def pretrain(seed, steps, d_model=64, lr=2e-3, batch_size=64):
    """-> (model, tokenizer), trained on fresh examples at every step: nothing comes twice but by chance."""
    tokenizer = make_tokenizer()
    model = new_model(tokenizer, seed, d_model)
    weights = [
        p for name, p in model.named_parameters() if not name.endswith(".scale")
    ]  # (IA)^3 stays at one
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.01)
    rng, asks, shares = np.random.RandomState(seed), list(QUESTIONS), list(QUESTIONS.values())
    begin = time.time()
    for step in range(steps):
        batch = [example(rng, asks[i]) for i in rng.choice(len(asks), size=batch_size, p=shares)]
        source_BM, mask_BM = padded([source for source, _ in batch], tokenizer)
        target_BL, real_BL = padded([target for _, target in batch], tokenizer)
        loss = -minia3.logprobs(model, model.start(source_BM, mask_BM), target_BL)[real_BL].mean()
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / 100, 1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if step % 250 == 0 or step + 1 == steps:
            print(
                f"step {step:5d}  loss {loss.item():.4f}  {time.time() - begin:.0f} s", flush=True
            )
    return model.eval().requires_grad_(False), tokenizer


# What it can do


def right(answer, target):
    """Is a generated answer the target? A list's details may come in any order."""
    pairs = [
        sorted(zip(words[::2], words[1::2], strict=False))
        for words in (answer.split(), target.split())
    ]
    return answer == target or (len(target.split()) == 2 * len(DETAILS) and pairs[0] == pairs[1])


def measure(model, tokenizer, n=512):
    """Kind of question -> share of right answers to `n` new examples of it."""
    rng, shares = np.random.RandomState(2**31), {}
    for ask in QUESTIONS:
        examples = [example(rng, ask) for _ in range(n)]
        answers = minia3.generate(
            model, tokenizer, [source for source, _ in examples], max_new_tokens=9, batch_size=64
        )
        shares[ask.__name__] = np.mean(
            [right(a, target) for a, (_, target) in zip(answers, examples, strict=True)]
        )
    return shares


def measure_held_out(model, tokenizer, rows):
    """(accuracy, AUC) of the score of "yes" minus the score of "no" on rows of the held-out task."""
    scores_NC = minia3.rank(
        model, tokenizer, [row["input"] for row in rows], list(ANSWERS), batch_size=64
    )
    label_N = torch.tensor([row["label"] for row in rows])
    difference_N = scores_NC[:, 1] - scores_NC[:, 0]
    accuracy = ((difference_N > 0) == (label_N == 1)).double().mean().item()
    return accuracy, area_under_curve(
        difference_N[label_N == 1].numpy(), difference_N[label_N == 0].numpy()
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=HERE,
        help="where tiny-t5/ and the held-out task go (default: here)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=4,
        help="of the weights and of the training examples (default 4)",
    )
    parser.add_argument("--steps", type=int, default=3000, help="of pre-training (default 3000)")
    parser.add_argument(
        "--d-model", type=int, default=64, help="width, a multiple of 8 (default 64)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="20 steps: to see that it runs, not to make a model"
    )
    parser.add_argument(
        "--details", nargs="+", choices=DETAILS, default=[SHIPPED], help="held-out tasks to write"
    )
    args = parser.parse_args()
    if args.quick and args.out.resolve() == HERE:
        parser.error("--quick would write over the shipped model: give an --out")

    torch.set_num_threads(1)  # the model is small, and the same machine gives the same bits
    model, tokenizer = pretrain(args.seed, 20 if args.quick else args.steps, args.d_model)
    minia3.save_model(model, args.out / "tiny-t5", tokenizer)
    for detail in args.details:
        write_held_out(args.out / f"same-{detail}", detail)
    print("pre-training, right answers to new examples")
    for name, share in measure(model, tokenizer).items():
        print(f"  {name:12} {share:6.1%}")
    print("held out (no question), before any training on it")
    for detail in DETAILS:
        accuracy, auc = measure_held_out(model, tokenizer, held_out(detail)["test"])
        print(
            f"  same-{detail:7} {accuracy:6.1%}  AUC {auc:.2f}{'  (shipped)' if detail == SHIPPED else ''}"
        )


if __name__ == "__main__":
    main()
