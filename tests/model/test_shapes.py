"""Guards the shape suffixes (x_BLD): while models run, at every call and return inside of the package, each name with a
suffix has as many axes as letters, each letter has one size, and a 1 is 1. And each letter is in its file's legend."""

import ast
import re
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import tokens
from words import texts, word_tokenizer

import minia3
from minia3.adapters.mix import MIX, mix
from minia3.adapters.peft_files import read_adapter, write_adapter
from minia3.inference.decoding import decode_tokens
from minia3.inference.evaluation import evaluate
from minia3.model.llama import inverse_frequencies
from minia3.model.more_vectors import choose_vectors
from minia3.tasks.prompts import OWN_PROMPTS
from minia3.training.losses import total_loss
from minia3.training.optimizer import Adafactor

PACKAGE = Path(minia3.__file__).parent
SUFFIXED = re.compile(r"[a-z][a-z0-9_]*_([A-Z1]*[A-Z][A-Z1]*)")

# Names of which an axis may be 1 where its letter is more: what is the same for all is made once and broadcast.
BROADCAST = {
    "adapter_B": "B",  # one row of vectors serves the whole batch
    "l_BD": "B",
    "bias_BHLM": "BHL",  # T5's positions are the same for all rows, padding for all heads (and, of the memory, queries)
    "bias_BHMM": "B",  # T5's relative positions are the same for all rows: without padding there is nothing else
    "position_BL": "B",  # without padding, all rows are at the same position
    "angle_BLP": "B",
    "angle_B1LK": "B",
    "cos_B1LK": "B",
    "sin_B1LK": "B",
}


def place(path):
    """Return a short name of a file: its folder and its stem."""
    return f"{Path(path).parent.name}/{Path(path).stem}"


def lies(names):
    """What is wrong with the shapes of `names` (name -> value), as lines; and the names that were looked at."""
    sizes, wrong, seen = {}, [], set()
    for name, value in names.items():
        match = SUFFIXED.fullmatch(name)
        if not match or value is None:
            continue
        seen.add(name)
        letters, shape = match[1], getattr(value, "shape", None)
        if shape is None:
            wrong.append(f"{name} is {type(value).__name__} {value!r:.20}")
            continue
        if len(letters) != len(shape):
            wrong.append(f"{name} {tuple(shape)}")
            continue
        for letter, size in zip(letters, shape, strict=True):
            if size == 1 and letter in BROADCAST.get(name, ""):
                continue
            first, expected = sizes.setdefault(letter, (name, 1 if letter == "1" else size))
            if size != expected:
                wrong.append(
                    f"{name} {tuple(shape)}: {letter} is {expected}"
                    + f" by {first}" * (letter != "1")
                )
    return wrong, seen


class Watch:
    """The profile hook: looks at the arguments of a call and at all locals of a return, in the files of `folder`."""

    def __init__(self, folder):
        self.folder, self.wrong, self.seen = str(folder), {}, set()

    def __call__(self, frame, event, argument):
        code = frame.f_code
        if event in ("call", "return") and code.co_filename.startswith(self.folder):
            where = f"{place(code.co_filename)}.{code.co_name}"
            wrong, seen = lies(frame.f_locals)
            for line in wrong:
                self.wrong.setdefault((where, line.split()[0]), line)
            self.seen |= {(where, name) for name in seen}


@contextmanager
def watched(folder):
    watch, before = Watch(folder), sys.getprofile()
    sys.setprofile(watch)
    try:
        yield watch
    finally:
        sys.setprofile(before)


def suffixed_names(path):
    """(function, name) of every argument and local with a suffix that `path` defines."""
    found = set()

    def visit(node, function):
        for child in ast.iter_child_nodes(node):
            name = child.arg if isinstance(child, ast.arg) else None
            if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
                name = child.id
            inner = child.name if isinstance(child, ast.FunctionDef) else function
            if name and function and SUFFIXED.fullmatch(name):
                found.add((f"{place(path)}.{function}", name))
            visit(child, inner)

    visit(ast.parse(path.read_text()), None)
    return found


NAMES = {path: names for path in sorted(PACKAGE.rglob("*.py")) if (names := suffixed_names(path))}


def run(model, tokenizer, folder):
    """Everything that the package does with a model, in sizes that differ from one another."""
    n_rows, n_source, n_target, n_choices = 5, 7, 9, 2
    source, target = tokens(n_rows, n_source), tokens(n_rows, n_target)
    mask = torch.arange(n_source) < torch.tensor([[7], [3], [1], [6], [2]])
    adapter = torch.tensor([0, 2, 1, 2, 0])
    model.train()
    for source_mask in (None, mask, mask.flip(1)):
        state = model.start(source, source_mask, adapter)
        logp = minia3.logprobs(
            model, state.repeat(n_choices), target.repeat_interleave(n_choices, 0)
        )
        logp = logp.view(n_rows, n_choices, n_target)
        total_loss(
            logp, torch.ones_like(logp, dtype=torch.bool), torch.tensor([0, 1, 1, 0, 1])
        ).backward()
        Adafactor(minia3.vectors(model).values(), lr=1e-3).step()
        for first, last in (
            (0, 4),
            (4, 5),
            (5, 8),
        ):  # on an empty cache; one token; some tokens on a cache
            model.step(target[:, first:last], state)
    model.start(source[:, :1])  # one token
    model.eval()
    prompts = sorted(
        texts(6), key=len, reverse=True
    )  # so the first batch has more choices than the second
    adapters = torch.tensor([0, 2, 1, 2, 0, 1])
    minia3.rank(
        model,
        tokenizer,
        prompts,
        [["w3", "w4 w5", "w6"], *[["w7", "w8"]] * 5],
        adapter=adapters,
        batch_size=4,
    )
    with mock.patch("minia3.inference.scoring.MAX_LOGITS", 100):  # logits in parts of the vocabulary
        minia3.rank(model, tokenizer, prompts, ["w3", "w4 w5"])
    list(
        decode_tokens(model, model.start(source, mask, adapter), 3, {0})
    )  # a row that is dropped
    for how in (
        {},
        {"beams": 2},
        {"temperature": 1.0, "samples": 2, "top_k": 40, "top_p": 0.9, "seed": 0},
    ):
        minia3.generate(
            model, tokenizer, prompts, adapter=adapters, max_new_tokens=3, batch_size=4, **how
        )
    rows = [
        {"input": p, "choices": ["w9 w3", "w4"], "label": i % 2, "idx": i}
        for i, p in enumerate(prompts)
    ]
    for metric in ("accuracy", "macro_f1"):
        evaluate(model, tokenizer, rows, OWN_PROMPTS[0], metric=metric, batch_size=4)
    minia3.save_adapter(model, folder / "one" / "adapter")
    vectors = read_adapter(folder / "one" / "adapter").vectors
    for equation in MIX:
        mixed = mix([(vectors, 0.5), (vectors, 0.25)], equation)
    write_adapter(folder / "mixed", mixed)
    names = minia3.Adapters(model)
    names.load_folder(folder / "one")
    for name in ("two", "three"):  # the third is a row more than there are
        names.load(name, folder / "mixed")
    names.rows(["adapter", None, "two", "three"])
    minia3.generate(minia3.merge(model, 1).bfloat16(), tokenizer, prompts, max_new_tokens=3)
    choose_vectors(model, "k,v,ff,q,o", "0-", True)  # and more, from outside
    minia3.rank(model, tokenizer, prompts, ["w3", "w4 w5"], adapter=adapters)


@pytest.fixture(scope="module")
def watch(loaded, tmp_path_factory):
    with watched(PACKAGE) as watch:
        for name in ("t5-v1.0", "t5-deep-decoder", "llama-gqa", "llama3"):
            model = loaded(name, n_adapters=3)
            run(model, word_tokenizer(ends=name.startswith("t5")), tmp_path_factory.mktemp(name))
        inverse_frequencies(replace(model.config, rope_factors=(1.0,) * (model.config.d_head // 2)))
    return watch


def test_no_name_lies_about_its_shape(watch):
    assert not watch.wrong, "\n".join(
        f"{where}: {line}" for (where, _), line in watch.wrong.items()
    )


def test_every_name_with_a_suffix_was_looked_at(watch):
    names = set.union(*NAMES.values())
    assert names - watch.seen == set()
    assert BROADCAST.keys() <= {name for _, name in names}  # none of them has gone


@pytest.mark.parametrize("path", NAMES, ids=place)
def test_every_letter_is_in_the_legend_of_its_file(path):
    legend = re.search(
        r"^Shapes: (.*?)(?:\n\n|\Z)", ast.get_docstring(ast.parse(path.read_text())), re.M | re.S
    )
    defined = set(re.findall(r"\b[A-Z]\b", legend[1])) if legend else set()
    used = set("".join(SUFFIXED.fullmatch(name)[1] for _, name in NAMES[path])) - {"1"}
    assert used <= defined, f"{path.name}: no legend for {sorted(used - defined)}"


# The hook itself: each of these lies in one way.


def swapped(x_BL):
    y_LB = x_BL  # noqa: F841


def missing_axis(x_BL):
    total_BL = x_BL.sum(1)  # noqa: F841


def wrong_letter(x_BL):
    y_BD = x_BL.repeat(1, 2)
    z_DB = y_BD  # noqa: F841


def no_one(x_BL):
    y_B1 = x_BL  # noqa: F841


def not_broadcast(x_BL):
    y_BL = x_BL[:1]  # noqa: F841


def of_an_argument(x_BL, y_BL):
    y_BL = x_BL  # noqa: F841


def of_a_number(x_BL):
    first_BL = 0  # noqa: F841


def honest(x_BL, position_BL):
    none_B, y_B1L, z_LL = None, x_BL[:, None], x_BL.T @ x_BL  # noqa: F841
    X_BD = PAIR_BD = x_BL.T  # noqa: F841  # not names of shapes: a class's and a constant's
    for x_B in x_BL.T:  # noqa: B007
        pass


MISTAKES = {
    swapped: "y_LB (2, 3): L is 3 by x_BL",
    missing_axis: "total_BL (2,)",
    wrong_letter: "z_DB (2, 6): D is 6 by y_BD",
    no_one: "y_B1 (2, 3): 1 is 1",
    not_broadcast: "y_BL (1, 3): B is 2 by x_BL",
    of_an_argument: "y_BL (5, 3): B is 2 by x_BL",
    of_a_number: "first_BL is int 0",
}


@pytest.mark.parametrize("function", MISTAKES, ids=lambda function: function.__name__)
def test_a_planted_mistake_is_seen(function):
    with watched(Path(__file__)) as watch:
        function(*[torch.zeros(2, 3), torch.zeros(5, 3)][: function.__code__.co_argcount])
    assert MISTAKES[function] in watch.wrong.values()


def test_names_that_are_right_are_not_called_wrong():
    with watched(Path(__file__)) as watch:
        honest(torch.zeros(2, 3), torch.zeros(1, 3))
    assert not watch.wrong
    assert {name for _, name in watch.seen} == {"x_BL", "position_BL", "y_B1L", "z_LL", "x_B"}
