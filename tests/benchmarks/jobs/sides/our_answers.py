"""Answer prompts that arrive one by one, each with the adapter that it names: our side.

All prompts that wait are answered in one batch, whichever adapters they name.
"""

import argparse
import json
import time
from pathlib import Path

import minia3


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
    model = minia3.load_model(args.model)
    tokenizer = minia3.load_tokenizer(args.model)
    adapters = minia3.Adapters(model)
    adapters.load_folder(args.adapters)
    prompts = [json.loads(line) for line in Path(args.prompts).read_text().splitlines()]

    begin = time.perf_counter()
    arrivals = [begin + i * args.interval for i in range(len(prompts))]
    texts = [None] * len(prompts)
    latencies = [None] * len(prompts)
    open_places = list(range(len(prompts)))
    while open_places:
        time.sleep(max(0.0, arrivals[open_places[0]] - time.perf_counter()))
        now = time.perf_counter()
        waiting = [place for place in open_places if arrivals[place] <= now]
        chosen = waiting[: args.max_batch]
        answers = minia3.generate(
            model,
            tokenizer,
            [prompts[place]["input"] for place in chosen],
            adapter=adapters.rows(prompts[place]["adapter"] for place in chosen),
            max_new_tokens=args.max_new_tokens,
            batch_size=args.max_batch,
        )
        for place, text in zip(chosen, answers, strict=True):
            texts[place] = text
            latencies[place] = time.perf_counter() - arrivals[place]
        open_places = open_places[len(chosen) :]
    result = {"texts": texts, "latencies": latencies, "seconds": time.perf_counter() - begin}
    Path(args.out).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
