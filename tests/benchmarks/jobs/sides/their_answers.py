"""Answer prompts that arrive one by one, each with the adapter that it names: the other side.

PEFT has no mixed batches for (IA)^3. So the adapter of the prompt that has waited longest is set,
and all waiting prompts of this adapter are answered in one batch. Those that arrive meanwhile join
the next batch of their adapter.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from their_labels import load


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--adapters", required=True, help="folder of adapters")
    parser.add_argument("--prompts", required=True, help="rows with an input and an adapter")
    parser.add_argument("--out", required=True, help="file of texts and latencies, .json")
    parser.add_argument("--interval", type=float, required=True, help="seconds between prompts")
    parser.add_argument("--max-new-tokens", type=int, required=True)
    parser.add_argument("--max-batch", type=int, required=True, help="most prompts in a batch")
    return parser


def main():
    args = make_parser().parse_args()
    model, tokenizer = load(args.model, args.adapters)
    prompts = [json.loads(line) for line in Path(args.prompts).read_text().splitlines()]

    @torch.inference_mode()
    def answer(texts, adapter):
        model.set_adapter(adapter)
        inputs = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
        if not model.config.is_encoder_decoder:
            ids = ids[:, inputs["input_ids"].shape[1] :]
        return tokenizer.batch_decode(ids, skip_special_tokens=True)

    begin = time.perf_counter()
    arrivals = [begin + i * args.interval for i in range(len(prompts))]
    texts = [None] * len(prompts)
    latencies = [None] * len(prompts)
    open_places = list(range(len(prompts)))
    while open_places:
        time.sleep(max(0.0, arrivals[open_places[0]] - time.perf_counter()))
        now = time.perf_counter()
        waiting = [place for place in open_places if arrivals[place] <= now]
        adapter = prompts[waiting[0]]["adapter"]
        chosen = [place for place in waiting if prompts[place]["adapter"] == adapter]
        chosen = chosen[: args.max_batch]
        answers = answer([prompts[place]["input"] for place in chosen], adapter)
        for place, text in zip(chosen, answers, strict=True):
            texts[place] = text
            latencies[place] = time.perf_counter() - arrivals[place]
            open_places.remove(place)
    result = {"texts": texts, "latencies": latencies, "seconds": time.perf_counter() - begin}
    Path(args.out).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
