"""Answer prompts that arrive one by one, each with the adapter that it names: the other side.

PEFT has no mixed batches for (IA)^3. So the adapter of the prompt that has waited longest is set,
and all waiting prompts of this adapter are answered in one batch. Those that arrive meanwhile join
the next batch of their adapter.
"""

import torch
from arrivals import make_parser, serve
from their_labels import load


def main():
    args = make_parser(__doc__.splitlines()[0]).parse_args()
    model, tokenizer = load(args.model, args.adapters)

    def has_same_adapter(first, other):
        return first["adapter"] == other["adapter"]

    @torch.inference_mode()
    def answer(prompts):
        model.set_adapter(prompts[0]["adapter"])
        texts = [prompt["input"] for prompt in prompts]
        inputs = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
        if not model.config.is_encoder_decoder:
            ids = ids[:, inputs["input_ids"].shape[1] :]
        return tokenizer.batch_decode(ids, skip_special_tokens=True)

    serve(args, answer, has_same_adapter)


if __name__ == "__main__":
    main()
