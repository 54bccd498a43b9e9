"""Label rows, each with the adapter that it names, with transformers and peft.

This is the other side of the job "label". PEFT has no mixed batches for (IA)^3, so the rows are
sorted by adapter, and within an adapter by length, so that little is padded. `set_adapter` changes
to the next adapter. Each choice is scored as a text of its own, as the models' `labels` have it.

With --encode-once a T5 reads each source once, and not once per choice.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
)
from transformers.modeling_outputs import BaseModelOutput

IGNORED = -100


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--adapters", required=True, help="folder of adapters")
    parser.add_argument("--rows", required=True, help="rows with an input, choices, an adapter")
    parser.add_argument("--out", required=True, help="file of results, .jsonl")
    parser.add_argument("--batch-size", type=int, default=16, help="rows per forward pass")
    parser.add_argument("--encode-once", action="store_true", help="a T5 reads each source once")
    return parser


def load(model_folder, adapters_folder):
    """Return the model with all adapters, and its tokenizer."""
    names = sorted(path.name for path in Path(adapters_folder).iterdir())
    is_seq2seq = AutoConfig.from_pretrained(model_folder).is_encoder_decoder
    model_class = AutoModelForSeq2SeqLM if is_seq2seq else AutoModelForCausalLM
    base = model_class.from_pretrained(model_folder, dtype="auto")
    model = PeftModel.from_pretrained(base, f"{adapters_folder}/{names[0]}", names[0])
    for name in names[1:]:
        model.load_adapter(f"{adapters_folder}/{name}", name)
    return model.eval(), AutoTokenizer.from_pretrained(model_folder)


def score_seq2seq(model, tokenizer, rows, encode_once):
    """Return the mean log-probability of each choice: (rows, choices)."""
    n_choices = len(rows[0]["choices"])
    inputs = tokenizer([row["input"] for row in rows], padding=True, return_tensors="pt")
    answers = [choice for row in rows for choice in row["choices"]]
    targets = tokenizer(text_target=answers, padding=True, return_tensors="pt")
    is_target = targets["attention_mask"].bool()
    labels = targets["input_ids"].masked_fill(~is_target, IGNORED)
    mask = inputs["attention_mask"].repeat_interleave(n_choices, dim=0)
    if encode_once:
        encoded = model.get_encoder()(**inputs).last_hidden_state
        encoded = BaseModelOutput(encoded.repeat_interleave(n_choices, dim=0))
        logits = model(encoder_outputs=encoded, attention_mask=mask, labels=labels).logits
    else:
        ids = inputs["input_ids"].repeat_interleave(n_choices, dim=0)
        logits = model(input_ids=ids, attention_mask=mask, labels=labels).logits
    return mean_logprob(logits, labels).view(len(rows), n_choices)


def score_causal(model, tokenizer, rows):
    """Return the mean log-probability of each choice: (rows, choices).

    Padding is on the left, so that the choices end together, and only their logits are computed.
    """
    n_choices = len(rows[0]["choices"])
    sources = [row["input"] for row in rows for _ in row["choices"]]
    answers = [" " + choice for row in rows for choice in row["choices"]]
    source_ids = tokenizer(sources)["input_ids"]
    answer_ids = tokenizer(answers, add_special_tokens=False)["input_ids"]
    texts = []
    labels = []
    for source, answer in zip(source_ids, answer_ids, strict=True):
        texts.append({"input_ids": source + answer})
        labels.append(torch.tensor([IGNORED] * len(source) + answer))
    inputs = tokenizer.pad(texts, padding_side="left", return_tensors="pt")
    labels = torch.nn.utils.rnn.pad_sequence(labels, True, IGNORED, "left")
    n_last = max(map(len, answer_ids))
    logits = model(**inputs, logits_to_keep=n_last + 1).logits[:, :-1]  # the token before predicts
    return mean_logprob(logits, labels[:, -n_last:]).view(len(rows), n_choices)


def mean_logprob(logits, labels):
    logp = -F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
    return logp.sum(-1) / (labels != IGNORED).sum(-1)


@torch.inference_mode()
def main():
    args = make_parser().parse_args()
    model, tokenizer = load(args.model, args.adapters)
    rows = [json.loads(line) for line in Path(args.rows).read_text().splitlines()]
    by_adapter = {}
    for place, row in enumerate(rows):
        by_adapter.setdefault(row["adapter"], []).append(place)
    results = [None] * len(rows)
    for name, places in by_adapter.items():
        model.set_adapter(name)
        places.sort(key=lambda place: -len(rows[place]["input"]))
        for first in range(0, len(places), args.batch_size):
            chosen = places[first : first + args.batch_size]
            batch = [rows[place] for place in chosen]
            if model.config.is_encoder_decoder:
                scores = score_seq2seq(model, tokenizer, batch, args.encode_once)
            else:
                scores = score_causal(model, tokenizer, batch)
            for place, row_scores in zip(chosen, scores.tolist(), strict=True):
                label = row_scores.index(max(row_scores))
                results[place] = {"label": label, "scores": row_scores}
    with open(args.out, "w") as file:
        for result in results:
            file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
