"""Guards what ships in data/, and what is claimed of it: the files are those of data/pretrain.py; the held-out task is
neither leaked nor to be guessed; the base cannot do it, and with trained vectors it can; the controls cannot.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from math import log
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import minia3

ROOT = Path(__file__).resolve().parent.parent
MODEL, TASK = ROOT / "data" / "tiny-t5", ROOT / "data" / "same-colour"
SPLITS = ("train", "validation", "test")

spec = importlib.util.spec_from_file_location("pretrain", ROOT / "data" / "pretrain.py")
pretrain = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pretrain)

COLOUR = re.compile(r"\b(" + "|".join(pretrain.DETAILS["colour"]) + r")\b")
ANY = {name: f"(?:{'|'.join(values)})" for name, values in pretrain.DETAILS.items()}
FACT = "(?:" + "|".join(fact.replace(".", r"\.").format(**ANY) for fact in pretrain.FACTS) + ")"
TWO_FACTS = re.compile(f"{FACT} {FACT}")


def read(split):
    return [
        json.loads(line)
        for line in (TASK / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


@pytest.fixture(scope="module")
def rows():
    return {split: read(split) for split in SPLITS}


@pytest.fixture(scope="module")
def base():
    return minia3.load_model(MODEL), minia3.load_tokenizer(MODEL)


# What is shipped


def test_the_shipped_rows_are_what_the_script_makes_byte_for_byte(tmp_path):
    pretrain.write_held_out(tmp_path)
    for split in SPLITS:
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (
            TASK / f"{split}.jsonl"
        ).read_bytes(), split


def test_the_shipped_tokenizer_is_what_the_script_makes(tmp_path):
    pretrain.make_tokenizer().save(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads(
            (MODEL / name).read_text()
        ), name


def test_the_model_is_small_and_its_adapter_under_two_percent_of_it(base):
    model, _ = base
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 2_000_000
    trained = sum(vector[0].numel() for vector in minia3.vectors(model).values())
    total = sum(p.numel() for p in model.parameters()) - trained
    assert (trained, total) == (1_536, 218_112)
    assert trained / total < 0.02


def test_transformers_reads_the_model_and_its_tokenizer_to_the_same_numbers(base, rows):
    transformers = pytest.importorskip("transformers")
    model, tokenizer = base
    theirs, info = transformers.T5ForConditionalGeneration.from_pretrained(
        MODEL, output_loading_info=True
    )
    assert not any(info.values())
    text = rows["test"][0]["input"] + " same colour ?"
    source_BM = torch.tensor([tokenizer.encode(text)])
    assert (
        transformers.AutoTokenizer.from_pretrained(MODEL)(text)["input_ids"]
        == source_BM[0].tolist()
    )
    target_BL = torch.tensor([[0, *tokenizer.encode("yes")]])
    with torch.no_grad():
        expected = theirs.eval()(input_ids=source_BM, decoder_input_ids=target_BL).logits
        found = model.step(target_BL, model.start(source_BM))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@settings(deadline=None, max_examples=200)
@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_any_text_survives_the_tokenizer(base, text):
    _, tokenizer = base
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_each_word_of_the_language_is_one_token(base, rows):
    _, tokenizer = base
    rng = np.random.RandomState(0)
    texts = [row["input"] for row in rows["train"]]
    texts += [
        text
        for ask in pretrain.QUESTIONS
        for _ in range(200)
        for text in pretrain.example(rng, ask)
    ]
    for text in texts:
        assert len(tokenizer.encode(text)) == len(text.split()) + 1, text


# The held-out task


def test_labels_say_whether_the_colours_agree(rows):
    for row in (row for split in SPLITS for row in rows[split]):
        first, second = COLOUR.findall(row["input"])
        assert row["choices"] == ["no", "yes"]
        assert row["label"] == (first == second), row


def test_splits_are_balanced_and_no_input_comes_twice(rows):
    assert [len(rows[split]) for split in SPLITS] == [512, 128, 1024]
    for split in SPLITS:
        assert sum(row["label"] for row in rows[split]) == len(rows[split]) / 2
    inputs = [row["input"] for split in SPLITS for row in rows[split]]
    assert len(set(inputs)) == len(inputs)


def test_the_form_without_a_question_never_occurs_in_pretraining(rows):
    assert all(TWO_FACTS.fullmatch(row["input"]) for split in SPLITS for row in rows[split])
    rng = np.random.RandomState(1)
    for ask in pretrain.QUESTIONS:
        for _ in range(500):
            source, _ = pretrain.example(rng, ask)
            facts = TWO_FACTS.match(source)
            assert facts, source
            assert re.search(r"\w", source[facts.end() :]), source  # words follow the facts


def guess(train, test, features):
    """Accuracy on `test` of a naive Bayes classifier with the given features of a row's words, fitted to `train`."""
    seen = defaultdict(Counter)
    for row in train:
        for feature in features(row["input"].split()):
            seen[feature][row["label"]] += 1
    right = 0
    for row in test:
        ratios = [
            log((seen[f][1] + 1) / (seen[f][0] + 1))
            for f in features(row["input"].split())
            if f in seen
        ]
        right += (sum(ratios) > 0) == row["label"]
    return right / len(test)


@pytest.mark.parametrize(
    "features",
    [
        lambda words: words,  # how often each word occurs
        lambda words: list(enumerate(words)),  # which word stands where
        lambda words: [len(words)],
        lambda words: [
            " ".join(w for w in words if not COLOUR.fullmatch(w))
        ],  # all but the colours
    ],
    ids=["words", "positions", "length", "the rest"],
)
def test_neither_words_nor_their_places_give_the_label_away(rows, features):
    assert 0.45 <= guess(rows["train"], rows["test"], features) <= 0.55


def test_no_other_detail_says_anything_about_the_label(rows):
    for name in ("person", "thing", "place"):
        agree = Counter()
        for row in rows["test"]:
            first, second = (w for w in row["input"].split() if w in pretrain.DETAILS[name])
            agree[first == second, row["label"]] += 1
        assert len(set(agree.values())) == 1, (name, agree)


# Pre-training


def test_a_new_model_has_the_initialisation_of_t5():
    model = pretrain.new_model(pretrain.make_tokenizer(), seed=0)
    d_model, d_head, d_ff = model.config.d_model, model.config.d_head, model.config.d_ff
    inner = model.config.n_heads * d_head
    block = model.decoder.blocks[0]
    widths = {
        model.embed: 1,
        block.attn.q: d_model * d_head,
        block.cross.k: d_model,
        block.cross.v: d_model,
        block.attn.o: inner,
        block.ffn.gate: d_model,
        block.ffn.down: d_ff,
        model.encoder.position: d_model,
    }
    for module, width in widths.items():
        n = module.weight.numel()
        assert module.weight.std().item() * width**0.5 == pytest.approx(
            1, abs=5 / (2 * n) ** 0.5
        ), module
    assert all(
        torch.equal(vector, torch.ones_like(vector)) for vector in minia3.vectors(model).values()
    )


def test_pretraining_twice_gives_the_same_bits_and_leaves_the_vectors_at_one():
    (first, tokenizer), (second, _) = (pretrain.pretrain(seed=3, steps=3) for _ in range(2))
    start = pretrain.new_model(tokenizer, seed=3).state_dict()
    second = second.state_dict()
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second[name]), name
        assert torch.equal(tensor, start[name]) == name.endswith(".scale"), name


def test_the_base_answers_the_questions_it_was_trained_on(base):
    shares = pretrain.measure(*base, n=128)
    assert shares["ask_one"] >= 0.95
    assert shares["ask_list"] >= 0.95
    assert all(share >= 0.6 for share in shares.values()), shares


# The demonstration, through train.py as a newcomer runs it


def final(folder, **flags):
    """Run train.py into `folder` with `flags`: -> the last line of its metrics."""
    args = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "train.py", "--device", "cpu", "--out", str(folder), *args]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


def test_the_default_run_learns_what_the_base_cannot_do(tmp_path):
    result = final(tmp_path / "run")
    assert result["rows"] == 1024
    assert result["accuracy_before"] <= 0.6
    assert (
        0.4 <= result["auc_before"] <= 0.6
    )  # nor does it know with another threshold, or the other way round
    assert result["accuracy"] >= 0.97


def test_shuffled_labels_teach_nothing(tmp_path, rows):
    accuracies = []
    for seed in range(3):
        task = tmp_path / f"shuffled-{seed}"
        task.mkdir()
        labels = (
            np.random.RandomState(seed)
            .permutation([row["label"] for row in rows["train"]])
            .tolist()
        )
        shuffled = [
            {**row, "label": label} for row, label in zip(rows["train"], labels, strict=True)
        ]
        for split, part in {**rows, "train": shuffled}.items():
            (task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        accuracies.append(final(tmp_path / f"run-{seed}", task=task, seed=seed)["accuracy"])
    assert 0.4 <= np.mean(accuracies) <= 0.6, (
        accuracies
    )  # two-sided: knowing it upside down is knowing it


def test_an_untrained_base_learns_nothing(tmp_path):
    tokenizer = pretrain.make_tokenizer()
    minia3.save_model(pretrain.new_model(tokenizer, seed=0), tmp_path / "untrained", tokenizer)
    assert final(tmp_path / "run", model=tmp_path / "untrained")["accuracy"] <= 0.6
