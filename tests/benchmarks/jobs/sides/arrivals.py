"""What both sides of the answers share: prompts that arrive one by one, and what is written."""

import argparse
import json
import time
from pathlib import Path


def make_parser(description):
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--adapters", required=True, help="folder of adapters")
    parser.add_argument("--prompts", required=True, help="rows with an input and an adapter")
    parser.add_argument("--out", required=True, help="file of texts and latencies, .json")
    parser.add_argument("--interval", type=float, required=True, help="seconds between prompts")
    parser.add_argument("--max-new-tokens", type=int, required=True)
    parser.add_argument("--max-batch", type=int, required=True, help="most prompts in a batch")
    return parser


def serve(args, answer, is_together=lambda first, other: True):
    """Answer all prompts as they arrive, and write their texts and latencies.

    answer: a function from a batch of prompts to their texts. is_together: whether a prompt may be
    in one batch with the prompt that has waited longest.
    """
    prompts = [json.loads(line) for line in Path(args.prompts).read_text().splitlines()]
    begin = time.perf_counter()
    arrivals = [begin + i * args.interval for i in range(len(prompts))]
    texts = [None] * len(prompts)
    latencies = [None] * len(prompts)
    open_places = list(range(len(prompts)))
    while open_places:
        first = open_places[0]
        time.sleep(max(0.0, arrivals[first] - time.perf_counter()))
        now = time.perf_counter()
        waiting = [place for place in open_places if arrivals[place] <= now]
        chosen = [place for place in waiting if is_together(prompts[first], prompts[place])]
        chosen = chosen[: args.max_batch]
        answers = answer([prompts[place] for place in chosen])
        for place, text in zip(chosen, answers, strict=True):
            texts[place] = text
            latencies[place] = time.perf_counter() - arrivals[place]
            open_places.remove(place)
    result = {"texts": texts, "latencies": latencies, "seconds": time.perf_counter() - begin}
    Path(args.out).write_text(json.dumps(result))
