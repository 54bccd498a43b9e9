"""What ships in data/ is what data/README.md says: data/pretrain.py makes it, pre-training never
shows the held-out task, no word gives its labels away, the base cannot do it, and trained vectors
can. The controls cannot.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from itertools import chain
from math import log
from pathlib import Path

import numpy as np
import pytest
import running
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import minia3

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "data" / "tiny-t5"
TASK = ROOT / "data" / "same-colour"
SPLITS = ("train", "validation", "test")

spec = importlib.util.spec_from_file_location("pretrain", ROOT / "data" / "pretrain.py")
pretrain = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pretrain)

COLOUR = re.compile(r"\b(" + "|".join(pretrain.DETAILS["colour"]) + r")\b")
ANY = {name: f"(?:{'|'.join(values)})" for name, values in pretrain.DETAILS.items()}
FACT = "(?:" + "|".join(fact.replace(".", r"\.").format(**ANY) for fact in pretrain.FACTS) + ")"
TWO_FACTS = re.compile(f"{FACT} {FACT}")


def read(split):
    text = (TASK / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


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
        made = (tmp_path / f"{split}.jsonl").read_bytes()
        assert made == (TASK / f"{split}.jsonl").read_bytes(), split


def test_the_shipped_tokenizer_is_what_the_script_makes(tmp_path):
    pretrain.make_tokenizer().save(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        made = json.loads((tmp_path / name).read_text())
        assert made == json.loads((MODEL / name).read_text()), name


def test_the_model_and_its_adapter_have_the_sizes_in_the_readme_of_the_data(base):
    model, _ = base
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 2_000_000
    n_trained = sum(vector[0].numel() for vector in minia3.vectors(model).values())
    n_base = sum(p.numel() for p in model.parameters()) - n_trained
    assert (n_trained, n_base) == (1_536, 218_112)


@pytest.mark.slow
def test_transformers_reads_the_model_and_its_tokenizer_to_the_same_logits(base, rows):
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
    for ask in pretrain.QUESTIONS:
        for _ in range(200):
            texts += pretrain.draw_example(rng, ask)
    for text in texts:
        assert len(tokenizer.encode(text)) == len(text.split()) + 1, text


# The held-out task


def test_labels_say_whether_the_colours_agree(rows):
    for row in chain.from_iterable(rows.values()):
        first, second = COLOUR.findall(row["input"])
        assert row["choices"] == ["no", "yes"]
        assert row["label"] == (first == second), row


def test_splits_are_balanced_and_no_input_comes_twice(rows):
    assert [len(rows[split]) for split in SPLITS] == [512, 128, 1024]
    for split in SPLITS:
        assert sum(row["label"] for row in rows[split]) == len(rows[split]) / 2
    inputs = [row["input"] for row in chain.from_iterable(rows.values())]
    assert len(set(inputs)) == len(inputs)


def test_the_form_without_a_question_never_occurs_in_pretraining(rows):
    for row in chain.from_iterable(rows.values()):
        assert TWO_FACTS.fullmatch(row["input"])
    rng = np.random.RandomState(1)
    for ask in pretrain.QUESTIONS:
        for _ in range(500):
            source, _ = pretrain.draw_example(rng, ask)
            facts = TWO_FACTS.match(source)
            assert facts, source
            assert re.search(r"\w", source[facts.end() :]), source  # words follow the facts


def naive_bayes_accuracy(train, test, features):
    """Return the accuracy on `test` of a naive Bayes classifier that is fitted to `train`.

    `features` is a function from the words of an input to its features.
    """
    counts = defaultdict(Counter)  # feature -> label -> count
    for row in train:
        for feature in features(row["input"].split()):
            counts[feature][row["label"]] += 1
    n_right = 0
    for row in test:
        score = 0.0
        for feature in features(row["input"].split()):
            if feature in counts:
                score += log((counts[feature][1] + 1) / (counts[feature][0] + 1))
        n_right += (score > 0) == row["label"]
    return n_right / len(test)


def how_often_each_word_occurs(words):
    return words


def each_word_at_its_place(words):
    return list(enumerate(words))


def number_of_words(words):
    return [len(words)]


def everything_except_colours(words):
    return [" ".join(word for word in words if not COLOUR.fullmatch(word))]


@pytest.mark.parametrize(
    "features",
    [
        how_often_each_word_occurs,
        each_word_at_its_place,
        number_of_words,
        everything_except_colours,
    ],
)
def test_neither_words_nor_their_places_give_the_label_away(rows, features):
    assert 0.45 <= naive_bayes_accuracy(rows["train"], rows["test"], features) <= 0.55


def test_no_other_detail_says_anything_about_the_label(rows):
    for name in ("person", "thing", "place"):
        counts = Counter()
        for row in rows["test"]:
            words = row["input"].split()
            first, second = (word for word in words if word in pretrain.DETAILS[name])
            counts[first == second, row["label"]] += 1
        assert len(counts) == 4
        assert len(set(counts.values())) == 1, (name, counts)


# Pre-training


def test_a_new_model_has_the_initialisation_of_t5():
    model = pretrain.new_model(pretrain.make_tokenizer(), seed=0)
    config = model.config
    block = model.decoder.blocks[0]
    widths = {
        model.embed: 1,
        block.attn.q: config.d_model * config.d_head,
        block.cross.k: config.d_model,
        block.cross.v: config.d_model,
        block.attn.o: config.n_heads * config.d_head,
        block.ffn.gate: config.d_model,
        block.ffn.down: config.d_ff,
        model.encoder.bias_tables[0]: config.d_model,
    }
    for module, width in widths.items():
        # The standard deviation of n normal numbers is off by about 1 / sqrt(2 n).
        tolerance = 5 / (2 * module.weight.numel()) ** 0.5
        std = module.weight.std().item()
        assert std * width**0.5 == pytest.approx(1, abs=tolerance), module
    for vector in minia3.vectors(model).values():
        assert torch.equal(vector, torch.ones_like(vector))


def test_pretraining_twice_gives_the_same_bits_and_leaves_the_vectors_at_one():
    model, tokenizer = pretrain.pretrain(seed=3, steps=3)
    repeated_model, _ = pretrain.pretrain(seed=3, steps=3)
    start = pretrain.new_model(tokenizer, seed=3).state_dict()
    repeated = repeated_model.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, repeated[name]), name
        assert torch.equal(tensor, start[name]) == name.endswith(".scale"), name


def test_the_base_answers_the_questions_it_was_trained_on(base):
    shares = pretrain.evaluate(*base, n_examples=128)
    assert shares["ask_one"] >= 0.95
    assert shares["ask_list"] >= 0.95
    assert all(share >= 0.6 for share in shares.values()), shares


# The demonstration, through train.py as a newcomer runs it


@pytest.fixture
def default_run(tmp_path):
    """The folder of `python train.py`: MINIA3_DEFAULT_RUN, if it has just run, as in .ci/run."""
    if "MINIA3_DEFAULT_RUN" in os.environ:
        return Path(os.environ["MINIA3_DEFAULT_RUN"])
    command = [sys.executable, "train.py", "--device", "cpu", "--out", str(tmp_path / "run")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return tmp_path / "run"


@pytest.mark.slow
def test_the_default_run_learns_what_the_base_cannot_do(default_run):
    (result,) = running.events(default_run, "final")
    assert result["rows"] == 1024
    assert result["accuracy_before"] <= 0.6
    # Neither another threshold nor the opposite answers would make the base better.
    assert 0.4 <= result["auc_before"] <= 0.6
    assert result["accuracy"] >= 0.97


# The controls: other rows, and another base. Each of them runs in this process.

# At ten times T-Few's rate, 60 steps with the true rows teach the base nine tenths of the task, and
# a run takes less time. So does an evaluation on a quarter of the test rows.
CONTROL_STEPS = 60
CONTROL_RATE = 3e-2
N_CONTROL_ROWS = 256


def train_control(folder, **flags):
    """Run train.py with other defaults. Return the accuracy of each adapter."""
    words = ["--device", "cpu", "--steps", CONTROL_STEPS, "--lr", CONTROL_RATE, "--out", folder]
    for name, value in flags.items():
        words += [f"--{name}", value]
    assert running.run(words) == 0
    return [result["accuracy"] for result in running.events(folder, "final")]


def with_fewer_to_test(rows):
    return {**rows, "test": rows["test"][:N_CONTROL_ROWS]}


@pytest.mark.slow
def test_shuffled_labels_teach_nothing_in_steps_that_teach_the_task(tmp_path, rows):
    fewer_rows = with_fewer_to_test(rows)
    tasks = [running.write(tmp_path / "true", **fewer_rows)]
    labels = [row["label"] for row in rows["train"]]
    for seed in range(3):
        shuffled_labels = np.random.RandomState(seed).permutation(labels).tolist()
        train = []
        for row, label in zip(rows["train"], shuffled_labels, strict=True):
            train.append({**row, "label": label})
        tasks.append(running.write(tmp_path / f"shuffled-{seed}", **{**fewer_rows, "train": train}))
    true_accuracy, *accuracies = train_control(tmp_path / "run", task=",".join(map(str, tasks)))
    assert true_accuracy >= 0.8
    assert len(accuracies) == 3
    # On both sides: a model that is always wrong would have learned the task, too.
    assert 0.4 <= np.mean(accuracies) <= 0.6, accuracies


@pytest.mark.slow
def test_an_untrained_base_learns_nothing(tmp_path, rows):
    tokenizer = pretrain.make_tokenizer()
    minia3.save_model(pretrain.new_model(tokenizer, seed=0), tmp_path / "untrained", tokenizer)
    task = running.write(tmp_path / "task", **with_fewer_to_test(rows))
    (accuracy,) = train_control(tmp_path / "run", model=tmp_path / "untrained", task=task)
    assert accuracy <= 0.6
