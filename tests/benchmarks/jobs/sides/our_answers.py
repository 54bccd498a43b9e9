"""Answer prompts that arrive one by one, each with the adapter that it names: our side.

All prompts that wait are answered in one batch, whichever adapters they name.
"""

from arrivals import make_parser, serve

import minia3
from minia3.files.program import keep_freed_memory


def main():
    args = make_parser(__doc__.splitlines()[0]).parse_args()
    keep_freed_memory()
    model = minia3.load_model(args.model)
    tokenizer = minia3.load_tokenizer(args.model)
    adapters = minia3.Adapters(model)
    adapters.load_folder(args.adapters)

    def answer(prompts):
        return minia3.generate(
            model,
            tokenizer,
            [prompt["input"] for prompt in prompts],
            adapter=adapters.rows(prompt["adapter"] for prompt in prompts),
            max_new_tokens=args.max_new_tokens,
            batch_size=args.max_batch,
        )

    serve(args, answer)


if __name__ == "__main__":
    main()
