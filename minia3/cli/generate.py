"""`generate`: continue texts from the command line, from a pipe, or in a conversation."""

import json
import math
import re
import sys
from contextlib import suppress
from itertools import islice

from minia3.cli.arguments import (
    add_adapter_option,
    add_device_options,
    add_max_new_tokens,
    add_model,
    add_quantize,
    add_shard,
    load_any_adapter,
    load_model,
    positive,
    warn_if_endless,
)
from minia3.cli.terminal import show
from minia3.files.home import expand_home
from minia3.files.processes import dividing, from_first, is_first, n_processes
from minia3.files.program import forget_interrupt, was_interrupted
from minia3.files.read import reading
from minia3.files.streams import is_terminal
from minia3.inference.options import Options
from minia3.tasks.json_rows import parse_json
from minia3.tasks.messages import fit_question
from minia3.tasks.text_lines import decode

TITLE = "Continue a text, answer a prompt, or chat"
EXAMPLE = "minia3 generate tiny-t5 'anna has a red ball . same colour ?'"

BEGINS_ROW = re.compile(r'\s*\{\s*"(messages|conversations)"\s*:')
COMMAND = re.compile(r"/[a-z]+")  # what is typed to the program and not to the model
HELP = """\
/reset   forget what was said so far
/help    show these commands
/exit    leave (as Ctrl-D does)
Ctrl-C   end the answer"""


def add_arguments(parser):
    add_model(parser)
    parser.add_argument(
        "prompts",
        nargs="*",
        help="texts (default: the lines of standard input that are not blank; on a terminal, a "
        "conversation)",
    )
    add_adapter_option(parser)
    add_chat_options(parser)
    add_drawing_options(parser)
    parser.add_argument(
        "--samples", type=positive(int), default=1, help="outputs per prompt (default: %(default)s)"
    )
    parser.add_argument(
        "--beams",
        type=positive(int),
        default=1,
        help="width of the beam search (default: %(default)s, no beam search)",
    )
    parser.add_argument(
        "--length-penalty",
        type=float,
        default=1.0,
        help="larger values make a beam search prefer longer outputs (default: %(default)s)",
    )
    parser.add_argument(
        "--stop",
        action="append",
        type=with_line_breaks,
        default=[],
        help="end an output before this text, in which \\n is a line break; may be given several "
        "times",
    )
    parser.add_argument("--seed", type=int, help="seed of the drawn tokens (default: a new one)")
    parser.add_argument(
        "--batch-size",
        type=positive(int),
        default=16,
        help="prompts that are answered at once; of several samples or beams, each counts "
        "(default: %(default)s)",
    )
    add_max_new_tokens(parser)
    add_device_options(parser)
    add_quantize(parser)
    add_shard(parser)
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile a step of the model, so that a GPU replays it (takes a minute)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object per prompt, for programs"
    )


def with_line_breaks(text):
    """Return a text of a command line with line breaks in place of \\n, as in --input."""
    return text.replace("\\n", "\n")


def add_drawing_options(parser):
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="draw tokens at this temperature (default: 0, which takes the most likely token)",
    )
    parser.add_argument(
        "--top-k",
        type=int,
        default=0,
        help="draw from this many of the most likely tokens (default: 0, from all)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="draw from the most likely tokens that together have this probability "
        "(default: %(default)s)",
    )


def add_chat_options(parser):
    parser.add_argument(
        "--chat",
        action="store_true",
        help="put prompts into the chat template of the model, as messages; a prompt that is JSON "
        "with `messages` is a conversation",
    )
    parser.add_argument(
        "--chat-template",
        type=expand_home,
        metavar="FILE",
        help="chat template for --chat (default: the adapter's, or else the model's own)",
    )


def run(args):
    if args.chat_template and not args.chat:
        raise ValueError("--chat-template is the form of a conversation: give --chat, too")
    Options(**options_of(args)).check()  # before torch is imported
    from minia3.checkpoints.tokenizer import load_tokenizer
    from minia3.model.huge_pages import move_to_huge_pages

    model = load_model(args)
    if gains_from_huge_pages(model):
        move_to_huge_pages(model)
    tokenizer = load_tokenizer(args.model)
    if args.adapter:
        load_any_adapter(model, args.adapter)
        warn_if_endless(args, args.adapter, tokenizer)
    if args.chat:
        prepare_chat(model, tokenizer, args)
    generator = Generator(model, tokenizer, args)
    if args.prompts:
        numbered = [(f"prompt {i}", text) for i, text in enumerate(args.prompts)]
        generator.answer_all(numbered)
    elif from_first(is_terminal(sys.stdin)):
        if n_processes() > 1:
            raise ValueError("a conversation takes one process: give prompts, or pipe them")
        generator.converse()
    else:
        lines = () if sys.stdin is None else sys.stdin.buffer  # it is None if it is closed
        generator.answer_all(prompts_of(lines))


def gains_from_huge_pages(model):
    """Return whether to copy the weights: they are bfloat16, and fit into half of the free memory.

    In float32 and with a quantized base, generation is hardly faster.
    """
    from torch import bfloat16

    from minia3.model.quantized import quantized_linears
    from minia3.training.device import free_memory_of_system

    if model.embed.weight.dtype != bfloat16 or quantized_linears(model):
        return False

    n_free = free_memory_of_system()
    n_bytes = sum(weight.nbytes for weight in model.parameters())
    return n_free is not None and 2 * n_bytes < n_free


def options_of(args):
    """Return the options of `minia3.generate` that the flags say."""
    return {
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "beams": args.beams,
        "length_penalty": args.length_penalty,
        "samples": args.samples,
        "stop": args.stop,
        "seed": args.seed,
        "max_new_tokens": args.max_new_tokens,
        "compile": args.compile,
        "batch_size": math.ceil(args.batch_size / n_processes()),  # of each process
    }


def prompts_of(file):
    """Yield (what names a line in a message, text) for the lines of a binary file, without their
    ends. Blank lines are skipped.

    The text is UTF-8 whatever the locale is. A byte order mark and Windows line ends are ignored,
    as in a file of rows. Raise ValueError if a line is not UTF-8.
    """
    for number, line in enumerate(file, start=1):
        origin = f"standard input, line {number}"
        with reading(origin):
            text = decode(line, is_first=number == 1)
        if text.strip():
            yield origin, text.removesuffix("\n").removesuffix("\r")


def prepare_chat(model, tokenizer, args):
    """Choose the chat template, and let its end of a turn end an answer."""
    from minia3.checkpoints.chat import read_template
    from minia3.inference.turns import end_answers

    if args.chat_template:
        tokenizer.chat_template = read_template(args.chat_template)
    else:
        tokenizer.chat_template = trained_template(args) or tokenizer.chat_template
    tokenizer.template_for()  # raises ValueError if there is none
    args.stop += end_answers(model, tokenizer)


def trained_template(args):
    """Return the chat template that the adapter was trained with, if it is not the model's own.

    The task.json beside an adapter says it, or beside a model into which an adapter is merged.
    """
    from minia3.training.learned import learned_tasks

    for spec in learned_tasks(args.model, args.adapter).values():
        if spec.chat_template:
            return spec.chat_template
    return None


def read_conversation(text):
    """Return the row with messages that a text of JSON spells, as `predict` reads it, or None.

    Any other text, and also any other JSON, is a message of the user. Raise ValueError if the
    messages are not a conversation, or if a text begins like such a row and is not JSON.
    """
    from minia3.tasks.column_flags import ColumnFlags
    from minia3.tasks.rows import PREDICTED, normalize_row
    from minia3.tasks.understanding import guess_task

    try:
        row = parse_json(text)
    except ValueError:
        if BEGINS_ROW.match(text):  # it is cut short, or an item of a list with a comma after it
            raise
        return None
    if not isinstance(row, dict):
        return None
    spec = guess_task(row, ColumnFlags())
    if not spec.messages:
        return None
    return normalize_row(row, spec, PREDICTED, number=0)


class Generator:
    """Answers prompts as the arguments say, and prints the answers."""

    def __init__(self, model, tokenizer, args):
        self.model = model
        self.tokenizer = tokenizer
        self.args = args
        self.is_conversation = False
        self.n_prompts = 0  # so far
        self.options = options_of(args)

    def answer_all(self, texts):
        """Answer texts, a batch at a time. texts: pairs (what names a text in a message, text)."""
        if not is_first():
            texts = ()
        remaining = iter(texts)
        while batch := from_first(list(islice(remaining, self.args.batch_size))):
            prompts = [self.encode(origin, text) for origin, text in batch]
            self.answer([text for _, text in batch], prompts)

    def encode(self, origin, text):
        """Return the prompt for a text: the text itself, or the ids of a chat.

        origin: what names the text in a message.
        """
        if not self.args.chat:
            return text
        with reading(origin):
            row = read_conversation(text)
            if row is None:
                return self.encode_message(text)
            ids, _ = fit_question(row, self.tokenizer, math.inf)
            return ids

    def encode_message(self, text, messages=()):
        """Return the prompt for a message of the user. messages: what was said before it."""
        if not self.args.chat:
            return text
        return self.tokenizer.chat([*messages, {"role": "user", "content": text}])

    def converse(self):
        """Answer what is typed on a terminal, until Ctrl-D. A chat remembers what was said."""
        with suppress(ImportError):  # Windows has no readline
            import readline  # noqa: F401 (arrow keys then edit what is typed)
        self.is_conversation = True
        self.options["batch_size"] = 1  # --compile would fill a batch up
        subject = "a conversation" if self.args.chat else "every line is a new prompt"
        notice(f"({subject}; /help shows the commands, Ctrl-D leaves)")
        messages = []
        for text in typed_lines():
            if text == "/exit":
                return
            if text == "/reset":
                messages.clear()
                notice("(what was said is forgotten)")
            elif COMMAND.fullmatch(text):
                notice(HELP)
            else:
                self.reply(text, messages)

    def reply(self, text, messages):
        """Answer a message, and add both to `messages`.

        If the message cannot be answered, say why, and forget it.
        """
        forget_interrupt()
        try:
            output = self.answer([text], [self.encode_message(text, messages)])
        except (KeyboardInterrupt, Exception) as reason:
            if isinstance(reason, KeyboardInterrupt) or was_interrupted():
                reason = "stopped"
            elif not isinstance(reason, ValueError):
                raise
            show(f"[{reason}]")
            return
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": output})

    def answer(self, texts, prompts):
        """Print the answers to some texts, and return the first one. prompts: of the texts."""
        # With --seed, what is drawn depends on the prompt's place among all prompts.
        options = Options(**self.options, first_prompt=self.n_prompts)
        self.n_prompts += len(texts)
        is_single = len(texts) == self.args.beams == self.args.samples == 1
        if is_single and not self.args.json:
            return self.stream(prompts[0], options)
        return self.print_answers(texts, prompts, options)

    def stream(self, prompt, options):
        """Print an output piece by piece, as its tokens come, and return it.

        In a conversation, Ctrl-C ends the output and not the program.
        """
        from minia3.inference.decoding import generate_pieces

        output = ""
        cut = set()
        pieces = generate_pieces(self.model, self.tokenizer, [prompt], None, options, cut)
        try:
            for _, piece in pieces:
                output += piece
                if piece:
                    show(piece, end="")
            if cut:
                notice(f" [cut after {options.max_new_tokens} tokens: --max-new-tokens]", end="")
        except KeyboardInterrupt:
            if not self.is_conversation:
                raise
            notice(" [stopped]", end="")
        show()
        return output

    def print_answers(self, texts, prompts, options):
        from minia3.inference.decoding import generate_texts

        with dividing():
            outputs = iter(generate_texts(self.model, self.tokenizer, prompts, None, options))
        first_output = None
        for text in texts:
            samples = list(islice(outputs, self.args.samples))
            if first_output is None:
                first_output = samples[0]
            if not self.args.json:
                show("\n".join(samples))
            elif len(samples) == 1:
                show(json.dumps({"prompt": text, "output": samples[0]}))
            else:
                show(json.dumps({"prompt": text, "outputs": samples}))
        return first_output


def notice(text, end="\n"):
    """Print what only a person needs to read, on a terminal."""
    if is_terminal(sys.stdout):
        show(text, end=end)


def typed_lines():
    """Yield the lines that are typed, without empty ones, until Ctrl-D."""
    prompt = "> " if is_terminal(sys.stdout) else ""
    while True:
        try:
            text = input(prompt).strip()
        except EOFError:
            notice("")
            return
        except KeyboardInterrupt:
            notice("\n(Ctrl-D leaves)")
            continue
        except UnicodeDecodeError:
            notice("(this line is not UTF-8: type it again)")
            continue
        if text:
            yield text
