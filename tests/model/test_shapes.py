"""Guards the shape suffixes of names (x_BLD).

While models run, a trace hook looks at the package at every call and return, so what a name holds
only in between is not seen. Each argument and local with a suffix must have as many axes as
letters, each letter must have one size within a function, and a 1 must be 1. A field of a dataclass
that such a function has must have as many axes as letters, too. (Attributes of other classes are
not looked at.) Each letter of an argument or a local must be in the legend of its file.
"""

import ast
import importlib.util
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import running
import torch
from conftest import tokens
from words import texts, word_tokenizer

import minia3
import train
from minia3.adapters.mix import MIX, mix
from minia3.adapters.peft_files import read_adapter, write_adapter
from minia3.checkpoints.config import to_hf
from minia3.checkpoints.known_models import KNOWN_MODELS
from minia3.inference import decoding
from minia3.inference.decoding import decode_tokens
from minia3.inference.evaluation import evaluate
from minia3.inference.metrics import INVERSE_PERPLEXITY
from minia3.model import attend, packing, target_logprobs
from minia3.model.llama import rotation_frequencies
from minia3.model.more_vectors import choose_vectors
from minia3.model.quantized import NF4_BLOCK, NF4Linear, bitsandbytes_functions
from minia3.model.sequence_state import Context, State
from minia3.model.static_state import StaticState
from minia3.tasks.batches import collate
from minia3.tasks.examples import Example
from minia3.tasks.prompts import OWN_PROMPTS
from minia3.training.losses import total_loss
from minia3.training.memory_plan import StepShape, planned_memory
from minia3.training.optimizer import Adafactor, AdamW
from minia3.training.replicas import sum_step
from minia3.training.step_memory import peaks_of_step

PACKAGE = Path(minia3.__file__).parent
SUFFIXED = re.compile(r"[a-z][a-z0-9_]*_([A-Z1]*[A-Z][A-Z1]*)")

# Axes that may be 1 although their letter is more: what all share is made once and broadcast.
BROADCAST = {
    "adapter_B": "B",  # one row of vectors serves the whole batch
    "l_BD": "B",
    "l_BF": "B",
    "l_B1F": "B",
    "grad_l_BF": "B",
    # T5's biases are the same for all rows. Padding is the same for all heads, and that of the
    # memory is the same for all queries.
    "bias_BHLM": "BHL",
    "position_BM": "B",  # all rows are at the same position, if there is no padding
    "position_BL": "B",
    "distance_BLM": "B",
    "is_seen_BLM": "B",
    "angle_BLP": "B",
    "cos_B1LP": "B",
    "sin_B1LP": "B",
    "cos_B1LK": "B",
    "sin_B1LK": "B",
    # The keys and values of a T5's sources may lie end to end, in a single row (packing.py).
    "k_BGMK": "B",
    "v_BGMK": "B",
}


# Of functions that call bitsandbytes, which is optional
NAMES_OF_NF4 = {
    ("model/quantized.dequantize", "codes_OC"),
    ("model/quantized.dequantize", "scale_ON"),
}


# The hook


def short_name(path):
    """Return the folder and the stem of a file."""
    return f"{Path(path).parent.name}/{Path(path).stem}"


class Shapes:
    """The sizes that the letters have in one call of a function."""

    def __init__(self):
        self.sizes = {}  # letter: (the first name that has it, its size)

    def fault(self, name, value):
        """Return what is wrong with the shape of a value, or None."""
        letters = SUFFIXED.fullmatch(name)[1]
        shape = getattr(value, "shape", None)
        if shape is None:
            return f"{name} is {type(value).__name__} {value!r:.20}"
        if len(letters) != len(shape):
            return f"{name} {tuple(shape)}"
        for letter, size in zip(letters, shape, strict=True):
            is_broadcast = size == 1 and letter in BROADCAST.get(name, "")
            if is_broadcast:
                continue
            if letter == "1" and size != 1:
                return f"{name} {tuple(shape)}: 1 is 1"
            first, expected = self.sizes.setdefault(letter, (name, size))
            if size != expected:
                return f"{name} {tuple(shape)}: {letter} is {expected} by {first}"
        return None


class Watch:
    """The trace hook: looks at arguments of a call, and at all locals of a return.

    It looks into the functions of the files of `folder` that have such a name. Of all others Python
    tells it no more than the call.
    """

    def __init__(self, folder):
        self.folder = str(folder)
        self.names_of_code = {}
        self.faults = {}  # (function, name): what is wrong
        self.seen = set()  # (function, name)

    def __call__(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(self.folder):
            return None
        names = self.names_of(frame.f_code)
        if not names:
            return None
        frame.f_trace_lines = False
        if event in ("call", "return"):
            self.look(frame, names)
        return self

    def names_of(self, code):
        """Return the arguments and locals that have a suffix."""
        if code not in self.names_of_code:
            every_name = code.co_varnames + code.co_cellvars + code.co_freevars
            names = [name for name in every_name if SUFFIXED.fullmatch(name)]
            self.names_of_code[code] = names
        return self.names_of_code[code]

    def look(self, frame, names):
        code = frame.f_code
        function = f"{short_name(code.co_filename)}.{code.co_name}"
        shapes = Shapes()
        values = frame.f_locals
        for name in names:
            value = values.get(name)
            if value is not None:
                self.seen.add((function, name))
                fault = shapes.fault(name, value)
                if fault:
                    self.faults.setdefault((function, name), fault)
        for value in values.values():
            self.look_at_fields(value)

    def look_at_fields(self, value):
        kind = type(value)
        for name in suffixed_fields(kind):
            tensor = getattr(value, name)
            if tensor is not None:
                self.seen.add((kind.__name__, name))
                # Each field by itself: the memory (M) of one is the source, of another the text.
                fault = Shapes().fault(name, tensor)
                if fault:
                    self.faults.setdefault((kind.__name__, name), fault)


@cache
def suffixed_fields(kind):
    """Return the names with a suffix among the fields of a class, if it is a dataclass."""
    if not is_dataclass(kind):
        return []
    return [field.name for field in fields(kind) if SUFFIXED.fullmatch(field.name)]


@contextmanager
def watched(folder):
    watch = Watch(folder)
    before = sys.gettrace()
    sys.settrace(watch)
    try:
        yield watch
    finally:
        sys.settrace(before)


# The names in the package


def suffixed_names(path):
    """Return the set of (function, name): all arguments and locals with a suffix in a file.

    Variables of comprehensions are left out, because they are no locals of their function.
    """
    found = set()

    def visit(node, function):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.comprehension):
                continue
            name = bound_name(child)
            if name and function and SUFFIXED.fullmatch(name):
                found.add((f"{short_name(path)}.{function}", name))
            inner = child.name if isinstance(child, ast.FunctionDef) else function
            visit(child, inner)

    text = path.read_text(encoding="utf-8")
    if SUFFIXED.search(text):  # most files have no such name, and need not be parsed
        visit(ast.parse(text), None)
    return found


def bound_name(node):
    if isinstance(node, ast.arg):
        return node.arg
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return node.id
    return None


def names_by_file():
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        names = suffixed_names(path)
        if names:
            found[path] = names
    return found


NAMES = names_by_file()


# Everything that the package does with a model, in sizes that differ from one another

N_ROWS = 5
N_SOURCE = 7
N_TARGET = 9
N_CHOICES = 2
SOURCE = tokens(N_ROWS, N_SOURCE)
TARGET = tokens(N_ROWS, N_TARGET)
MASK = torch.arange(N_SOURCE) < torch.tensor([[7], [3], [1], [6], [2]])
ADAPTER = torch.tensor([0, 2, 1, 2, 0])
# From long to short, so that the first batch has more choices than the second.
PROMPTS = sorted(texts(6), key=len, reverse=True)
ADAPTER_OF_PROMPTS = torch.tensor([0, 2, 1, 2, 0, 1])
WAYS_TO_WRITE = [
    {},
    {"beams": 2},
    {"temperature": 1.0, "samples": 2, "top_k": 40, "top_p": 0.9, "seed": 0},
]


def run(model, tokenizer, folder):
    train_and_write(model, tokenizer)
    evaluate_rows(model, tokenizer)
    use_adapters(model, tokenizer, folder)


def train_and_write(model, tokenizer):
    train_steps(model)
    model.eval()
    rank_and_write(model, tokenizer)


def train_steps(model):
    model.train()
    label = torch.tensor([0, 1, 1, 0, 1])
    for mask in (None, MASK, MASK.flip(1)):
        state = model.start(SOURCE, mask, ADAPTER)
        targets = TARGET.repeat_interleave(N_CHOICES, 0)
        logp = minia3.logprobs(model, state.repeat(N_CHOICES), targets)
        logp = logp.view(N_ROWS, N_CHOICES, N_TARGET)
        total_loss(logp, torch.ones_like(logp, dtype=torch.bool), label).backward()
        tables = minia3.vectors(model).values()
        sum_step(tables, torch.ones(3), 1, None)
        for optimizer in (AdamW(tables), Adafactor(tables)):
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
        optimizer.zero_grad()
        model.step(TARGET[:, :4], state)  # on an empty cache
        model.step(TARGET[:, 4:5], state)  # one token
        model.step(TARGET[:, 5:8], state)  # several tokens on a cache
    model.start(SOURCE[:, :1])  # a source of one token


def rank_and_write(model, tokenizer):
    choices = [["w3", "w4 w5", "w6"], *[["w7", "w8"]] * 5]
    minia3.rank(model, tokenizer, PROMPTS, choices, adapter=ADAPTER_OF_PROMPTS, batch_size=4)
    with mock.patch.object(target_logprobs, "MAX_LOGITS_ON_CPU", 100):  # logits in parts
        minia3.rank(model, tokenizer, PROMPTS, ["w3", "w4 w5"])
    state = model.start(SOURCE, MASK, ADAPTER)
    list(decode_tokens(model, state, 3, {0}))  # a row whose text ends is dropped
    for options in WAYS_TO_WRITE:
        minia3.generate(
            model,
            tokenizer,
            PROMPTS,
            adapter=ADAPTER_OF_PROMPTS,
            max_new_tokens=3,
            batch_size=4,
            **options,
        )
    # Decoding with static shapes, but not compiled.
    with mock.patch.object(decoding, "compile_step", lambda model, state: model.step):
        minia3.generate(model, tokenizer, PROMPTS[:1], max_new_tokens=3, compile=True)


def evaluate_rows(model, tokenizer):
    rows = []
    for i, prompt in enumerate(PROMPTS):
        rows.append({"input": prompt, "choices": ["w9 w3", "w4"], "label": i % 2, "idx": i})
    for metric in ("accuracy", "macro_f1"):
        evaluate(model, tokenizer, rows, OWN_PROMPTS[0], metric=metric, batch_size=4)
    rows = [{"input": prompt, "target": "w9 w3", "label": 0} for prompt in PROMPTS]
    evaluate(model, tokenizer, rows, OWN_PROMPTS[0], metric=INVERSE_PERPLEXITY, batch_size=4)
    collate([Example([3, 4], [[5, 6, 7]], 0, is_scored=[False, True, True])])


def use_adapters(model, tokenizer, folder):
    minia3.save_adapter(model, folder / "one" / "adapter")
    vectors = read_adapter(folder / "one" / "adapter").vectors
    for equation in MIX:
        mixed = mix([(vectors, 0.5), (vectors, 0.25)], equation)
        write_adapter(folder / equation, mixed)
    adapters = minia3.Adapters(model)
    adapters.load_folder(folder / "one")
    for name in ("two", "three"):  # which is one row more than the model has
        adapters.load(name, folder / "average")
    adapters.rows(["adapter", None, "two", "three"])
    merged = minia3.merge(model, 1).bfloat16()
    minia3.generate(merged, tokenizer, PROMPTS, max_new_tokens=3)
    choose_vectors(model, "k,v,ff,q,o", "0-", True)
    minia3.rank(model, tokenizer, PROMPTS, ["w3", "w4 w5"], adapter=ADAPTER_OF_PROMPTS)


def run_elsewhere(model):
    """Score targets on another device than the CPU, without values."""
    model.to("meta")
    for mask in (MASK, None):
        state = model.start(SOURCE.to("meta"), mask).repeat(N_CHOICES)
        minia3.logprobs(model, state, TARGET.repeat_interleave(N_CHOICES, 0).to("meta"))


def plan(model):
    planned_memory(model.config, torch.float32, N_ROWS, N_SOURCE, True)
    step_shape = StepShape(N_ROWS, N_SOURCE, N_CHOICES, N_TARGET)
    peaks_of_step(model.config, torch.float32, step_shape, train.Config())


def use_quantized(model):
    model.start(SOURCE, MASK)
    minia3.merge(model)
    if has_bitsandbytes():
        NF4Linear.from_weight(torch.randn(N_ROWS, 2 * NF4_BLOCK)).to_linear(torch.float32)


def has_bitsandbytes():
    return importlib.util.find_spec("bitsandbytes") is not None


def write_rope_factors():
    """Write the config of a GGUF file of Llama 3.1, which has factors instead of a scaling."""
    config = KNOWN_MODELS["llama-3.1-8b"].config
    unscaled = rotation_frequencies(replace(config, rope_scaling=None))
    factors = unscaled / rotation_frequencies(config)
    config = replace(config, rope_scaling=None, rope_factors=tuple(factors.tolist()))
    to_hf(config, torch.bfloat16)


WHOLE = ("t5-v1.0", "t5-deep-decoder", "llama-gqa")
OTHER_LLAMAS = ("llama3", "mistral", "qwen3")  # they differ from llama-gqa in `model/` only


@pytest.fixture(scope="module")
def watch(peer, loaded, tmp_path_factory):
    # The hook would make what other packages do here take twice as long.
    for name in (*WHOLE, *OTHER_LLAMAS):
        peer(name)
    if has_bitsandbytes():
        bitsandbytes_functions()
    short_rows_too = mock.patch.object(packing, "LEAST_COLUMNS", 1)  # for `attend_within_rows`
    without_tiles = mock.patch.object(attend, "HAS_TILES", False)  # for `attend_with_one_query`
    with watched(PACKAGE) as watch, short_rows_too, without_tiles:
        for name in WHOLE:
            tokenizer = word_tokenizer(ends=name.startswith("t5"))
            run(loaded(name, n_adapters=3), tokenizer, tmp_path_factory.mktemp(name))
        for name in OTHER_LLAMAS:
            train_and_write(loaded(name, n_adapters=3), word_tokenizer(ends=False))
        for name in ("t5-v1.0", "llama-gqa"):
            train_steps(loaded(name, n_adapters=3, dtype=torch.bfloat16))  # for plain_attention.py
        plan(loaded("llama-gqa"))  # which runs as above, on tensors without values
        for name in ("t5-v1.0", "llama-gqa"):
            run_elsewhere(loaded(name))
        use_quantized(loaded("t5-v1.0", quantize="int8"))
        out = tmp_path_factory.mktemp("run")
        assert running.run(running.words(out, steps=1)) == 0
        write_rope_factors()
    return watch


@pytest.mark.slow
def test_no_name_lies_about_its_shape(watch):
    lines = [f"{function}: {fault}" for (function, _), fault in watch.faults.items()]
    assert not lines, "\n".join(lines)


@pytest.mark.slow
def test_every_name_with_a_suffix_was_looked_at(watch):
    names = set.union(*NAMES.values())
    unseen = names - watch.seen
    if not has_bitsandbytes():
        unseen -= NAMES_OF_NF4
    assert unseen == set()
    assert BROADCAST.keys() <= {name for _, name in names}  # the package still has all of them
    for kind in (Context, State, StaticState):
        assert {(kind.__name__, name) for name in suffixed_fields(kind)} <= watch.seen


@pytest.mark.parametrize("path", NAMES, ids=short_name)
def test_every_letter_is_in_the_legend_of_its_file(path):
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    legend = re.search(r"^Shapes: (.*?)(?:\n\n|\Z)", text, re.M | re.S)
    explained = set()
    if legend:
        explained = set(re.findall(r"\b[A-Z]\b", legend[1]))
    used = set()
    for _, name in NAMES[path]:
        used |= set(SUFFIXED.fullmatch(name)[1])
    used.discard("1")
    assert used <= explained, f"{path.name}: no legend for {sorted(used - explained)}"


# The hook itself: each of these functions lies in one way


def swapped_letters(x_BL):
    y_LB = x_BL  # noqa: F841


def missing_axis(x_BL):
    total_BL = x_BL.sum(1)  # noqa: F841


def wrong_letter(x_BL):
    y_BD = x_BL.repeat(1, 2)
    z_DB = y_BD  # noqa: F841


def another_size_than_1(x_BL):
    y_B1 = x_BL  # noqa: F841


def an_axis_of_1_that_is_not_broadcast(x_BL):
    y_BL = x_BL[:1]  # noqa: F841


def an_argument_that_is_bound_again(x_BL, y_BL):
    y_BL = x_BL  # noqa: F841


def a_number(x_BL):
    first_BL = 0  # noqa: F841


@dataclass
class Holder:
    mask_BM: torch.Tensor


def a_field(x_BL):
    holder = Holder(x_BL.sum(1))  # noqa: F841


MISTAKES = {
    swapped_letters: "y_LB (2, 3): L is 3 by x_BL",
    missing_axis: "total_BL (2,)",
    wrong_letter: "z_DB (2, 6): D is 6 by y_BD",
    another_size_than_1: "y_B1 (2, 3): 1 is 1",
    an_axis_of_1_that_is_not_broadcast: "y_BL (1, 3): B is 2 by x_BL",
    an_argument_that_is_bound_again: "y_BL (5, 3): B is 2 by x_BL",
    a_number: "first_BL is int 0",
    a_field: "mask_BM (2,)",
}


@pytest.mark.parametrize("function", MISTAKES, ids=lambda function: function.__name__)
def test_a_planted_mistake_is_seen(function):
    arguments = [torch.zeros(2, 3), torch.zeros(5, 3)]
    with watched(Path(__file__)) as watch:
        function(*arguments[: function.__code__.co_argcount])
    assert MISTAKES[function] in watch.faults.values()


def honest(x_BL, position_BL):
    none_B = None  # noqa: F841
    y_B1L = x_BL[:, None]  # noqa: F841
    z_LL = x_BL.T @ x_BL  # noqa: F841
    X_BD = x_BL.T  # noqa: F841 (the name of a class, not of a shape)
    PAIR_BD = x_BL.T  # noqa: F841 (a constant)
    for x_B in x_BL.T:  # noqa: B007
        pass
    holder = Holder(x_BL[:, 1:])  # noqa: F841 (another M than that of any other name)


def test_right_names_are_not_called_wrong():
    with watched(Path(__file__)) as watch:
        honest(torch.zeros(2, 3), torch.zeros(1, 3))
    assert not watch.faults
    expected = {"x_BL", "position_BL", "y_B1L", "z_LL", "x_B", "mask_BM"}
    assert {name for _, name in watch.seen} == expected
