"""Train (IA)^3 on rows that have choices, and evaluate before and after, with Trainer and peft.

This is the other side of the jobs "train" and "grid". It follows the guides of transformers (for
summarization and for causal language modeling) and of peft (for IA3): tokenize with `map`, pad each
batch to its longest text, train on the right choice. To rank choices, each one becomes an example
of its own, as `predict` takes it, and the examples are sorted by length, so that little is padded.

The optimizer and the learning rate are T-Few's, and the batches are given, so that both sides of
the job train in the same way.
"""

import argparse
import json

import torch
import torch.nn.functional as F
from datasets import load_dataset
from peft import IA3Config, get_peft_model
from transformers import (
    Adafactor,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)

IGNORED = -100  # the label of a position that has no loss


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--train", required=True, help="rows in the order of training, .jsonl")
    parser.add_argument("--test", required=True, help="rows to evaluate on, .jsonl")
    parser.add_argument("--out", required=True, help="folder for the adapter and the result")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--warmup-steps", type=int, required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--eval-batch-size", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--sampling", default="sequential", help="Trainer's sampling strategy")
    return parser


def main():
    args = make_parser().parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    is_seq2seq = AutoConfig.from_pretrained(args.model).is_encoder_decoder
    data = load_dataset("json", data_files={"train": args.train, "test": args.test})
    if is_seq2seq:
        model = AutoModelForSeq2SeqLM.from_pretrained(
            args.model, dtype="auto", dropout_rate=args.dropout
        )
        peft_config = IA3Config(task_type="SEQ_2_SEQ_LM")
        trainer_class = Seq2SeqTrainer
        arguments_class = Seq2SeqTrainingArguments
    else:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
        peft_config = IA3Config(task_type="CAUSAL_LM")
        trainer_class = Trainer
        arguments_class = TrainingArguments

    def encode(prompt, answer):
        if is_seq2seq:
            features = tokenizer(prompt)
            features["labels"] = tokenizer(text_target=answer)["input_ids"]
            return features
        source = tokenizer(prompt)["input_ids"]
        target = tokenizer(" " + answer, add_special_tokens=False)["input_ids"]
        return {
            "input_ids": source + target,
            "attention_mask": [1] * len(source + target),
            "labels": [IGNORED] * len(source) + target,
        }

    def encode_right_choice(row):
        return encode(row["input"], row["choices"][row["label"]])

    def encode_choices(rows):
        pairs = {"input_ids": [], "attention_mask": [], "labels": [], "length": [], "place": []}
        for i, prompt in enumerate(rows["input"]):
            for c, choice in enumerate(rows["choices"][i]):
                features = encode(prompt, choice)
                features["length"] = len(features["input_ids"])
                features["place"] = [rows["idx"][i], c]
                for name, values in pairs.items():
                    values.append(features[name])
        return pairs

    def mean_logprob(logits, labels):
        """Reduce the logits of a batch to the score of each text: (texts,)."""
        if isinstance(logits, tuple):  # T5 also returns what its encoder has made
            logits = logits[0]
        if not is_seq2seq:
            logits = logits[:, :-1]
            labels = labels[:, 1:]
        is_target = labels != IGNORED
        logp = torch.zeros(labels.shape)
        logp[is_target] = -F.cross_entropy(
            logits[is_target].float(), labels[is_target], reduction="none"
        )
        return logp.sum(-1) / is_target.sum(-1)

    columns = data["train"].column_names
    train_set = data["train"].map(encode_right_choice, remove_columns=columns)
    pairs = data["test"].map(encode_choices, batched=True, remove_columns=columns).sort("length")
    labels = torch.tensor(data["test"]["label"])

    model = get_peft_model(model, peft_config)
    model.print_trainable_parameters()
    vectors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = Adafactor(
        vectors, lr=args.lr, scale_parameter=True, relative_step=False, warmup_init=False
    )
    scheduler = get_linear_schedule_with_warmup(optimizer, args.warmup_steps, args.steps)
    trainer = trainer_class(
        model=model,
        args=arguments_class(
            output_dir=args.out,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.eval_batch_size,
            train_sampling_strategy=args.sampling,
            max_grad_norm=1.0,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            label_names=["labels"],
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=train_set,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        preprocess_logits_for_metrics=mean_logprob,
        optimizers=(optimizer, scheduler),
    )

    def evaluate():
        """Return the score of each choice: (rows, choices)."""
        scores = torch.zeros(len(labels), len(data["test"][0]["choices"]))
        found = torch.tensor(trainer.predict(pairs).predictions)
        row_N, choice_N = torch.tensor(pairs["place"]).unbind(-1)
        scores[row_N, choice_N] = found
        return scores

    before = evaluate()
    trainer.train()
    after = evaluate()
    model.save_pretrained(args.out)
    result = {
        "accuracy_before": (before.argmax(-1) == labels).float().mean().item(),
        "accuracy": (after.argmax(-1) == labels).float().mean().item(),
        "scores": after.tolist(),
    }
    with open(f"{args.out}/result.json", "w") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main()
