"""A task has the splits of its files, few-shot splits are T-Few's, and whatever is not a task is
refused.
"""

import hashlib
import json
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from task_files import REAL, choice, lines, needs_real_data, target

from minia3.tasks.known_tasks import known_tasks
from minia3.tasks.prompts import OWN_PROMPTS, render
from minia3.tasks.splits import Splits, draw_shots, load_task
from minia3.tasks.task import TaskSpec

DATA = Path(REAL or "", "data")
FEW_SHOT = DATA / "few_shot"

# Real files


@needs_real_data
@pytest.mark.parametrize(
    ("name", "sizes", "train_labels", "validation_labels"),
    [
        ("rte", (2490, 277, 3000), {0: 1249, 1: 1241}, {0: 146, 1: 131}),
        ("cb", (250, 56, 250), {0: 115, 1: 119, 2: 16}, {0: 23, 1: 28, 2: 5}),
        ("copa", (400, 100, 500), {0: 195, 1: 205}, {0: 55, 1: 45}),
    ],
)
def test_real_files_are_read_whole(name, sizes, train_labels, validation_labels):
    task = load_task(name, DATA)
    n_test = sizes[2]
    splits = (task.train, task.validation, task.test)
    label_counts = (train_labels, validation_labels, {-1: n_test})
    for rows, size, labels in zip(splits, sizes, label_counts, strict=True):
        assert [row["idx"] for row in rows] == list(range(size))
        assert Counter(row["label"] for row in rows) == labels
    assert task.evaluation == ("validation", task.validation)
    spec = known_tasks()[name]
    assert (task.name, task.metric) == (name, "accuracy")
    assert task.prompts == spec.prompts
    for file in ("train.jsonl", "val.jsonl", "test.jsonl"):
        digest = hashlib.sha256((DATA / name / file).read_bytes()).hexdigest()
        assert task.checksums.pop(file) == digest
    assert not task.checksums
    assert task.notes == [
        f"{n_test} of {n_test} test rows have no label: results are on validation"
    ]
    for prompt in task.prompts:
        for row in chain(*splits):
            rendered = render(prompt, row)
            assert len(set(rendered.choices)) == len(rendered.choices) > rendered.label
            assert rendered.input == rendered.input.rstrip()


@needs_real_data
@pytest.mark.parametrize("name", [name for name in known_tasks() if name.startswith("raft/")])
def test_five_consecutive_seeds_hold_out_each_row_of_raft_once(name):
    spec = known_tasks()[name]
    seeds = range(7, 12)
    tasks = [load_task(name, DATA, seed=seed) for seed in seeds]
    held_out = chain.from_iterable(task.validation for task in tasks)
    assert sorted(row["idx"] for row in held_out) == list(range(50))
    for seed, task in zip(seeds, tasks, strict=True):
        assert (task.name, task.metric) == (name, "macro_f1")
        assert (len(task.train), len(task.validation)) == (40, 10)
        assert sorted(row["idx"] for row in task.train + task.validation) == list(range(50))
        assert task.evaluation == ("the held-out fold", task.validation)
        fold = f"fold {seed % 5 + 1} of 5"
        note = f"{fold} is held out: 5 consecutive seeds report on each row once"
        assert task.notes[0] == note
    task = tasks[0]
    assert load_task(name, DATA, seed=2).validation == task.validation
    assert all(spec.labels[row["label"]] == row["Label"] for row in task.train)
    # The leaderboard wants these ids.
    assert [row["ID"] for row in task.test] == [str(50 + i) for i in range(len(task.test))]
    assert {row["label"] for row in task.test} == {-1}
    for prompt in task.prompts:
        for row in [*task.train, *task.test[::10]]:
            rendered = render(prompt, row)
            assert len(set(rendered.choices)) == len(rendered.choices) == len(spec.labels)


@needs_real_data
def test_with_50_shots_of_raft_no_row_is_left_to_report_on():
    task = load_task("raft/ade_corpus_v2", DATA, shots=50, seed=3)
    assert sorted(row["idx"] for row in task.train) == list(range(50))
    with pytest.raises(ValueError, match=r"no labeled rows .*: all of them are shots, so"):
        _ = task.evaluation
    assert len(load_task("raft/ade_corpus_v2", DATA, shots=40, seed=3).train) == 40
    with pytest.raises(ValueError, match="1 to 40 shots, found 45"):
        load_task("raft/ade_corpus_v2", DATA, shots=45)


@needs_real_data
def test_wscs_spans_occur_in_their_texts():
    task = load_task("wsc", DATA)
    assert (len(task.train), len(task.validation), len(task.test)) == (554, 104, 146)
    rows = [*task.train, *task.validation, *task.test]
    missing = []
    for row in rows:
        assert "target" not in row
        for name in ("span1_text", "span2_text"):
            if row[name] not in row["text"]:
                missing.append(row["idx"])
    assert missing == [80, 82], "Kamenev and Zinoviev: two names with other words between them"
    assert task.train[16]["span1_text"] == "the demonstrators"


# Few shots

# Folder of the published splits -> the task, and the number of rows in its train file. The
# published idx must equal the idx of our shuffle even if the file is not here.
PUBLISHED = {
    "rte": ("rte", 2490),
    "cb": ("cb", 250),
    "copa": ("copa", 400),
    "wsc": ("wsc", 554),
    "wic": ("wic", 5428),
    "boolq": ("boolq", 9427),
    "anli-r1": ("anli-r1", 16946),
    "anli-r2": ("anli-r2", 45460),
    "anli-r3": ("anli-r3", 100459),
    "h-swag": ("hellaswag", 39905),
    "winogrande": ("winogrande", 40398),
    "storycloze": ("storycloze", 1871),
    "sst2": ("sst2", 67349),
}
SST2_NEGATIVE = 29780  # rows of its train file with the label 0


def published_splits():
    found = []
    for folder, (name, n_rows) in PUBLISHED.items():
        for file in sorted((FEW_SHOT / folder).glob("*_shot/*_seed.jsonl")):
            shots = int(file.parent.name.removesuffix("_shot"))
            seed = int(file.stem.removesuffix("_seed"))
            found.append(pytest.param(name, n_rows, shots, seed, file, id=f"{name}-{shots}-{seed}"))
    return found


def read_json_lines(file):
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr("minia3.tasks.download.urlopen", refuse)


@needs_real_data
def test_every_published_split_is_compared():
    assert {path.name for path in FEW_SHOT.iterdir()} == set(PUBLISHED)
    assert len(published_splits()) == len(list(FEW_SHOT.rglob("*.jsonl"))) >= 65


@needs_real_data
@pytest.mark.parametrize(("name", "n_rows", "shots", "seed", "file"), published_splits())
def test_few_shot_splits_equal_the_published_ones(name, n_rows, shots, seed, file, offline):
    rows = read_json_lines(file)
    task = load_task(name, DATA, shots=shots, seed=seed)
    assert task.train == rows, "order, idx, label and texts"
    assert known_tasks()[name].shots == shots
    has_train_file = (DATA / name / "train.jsonl").exists()
    n_train = n_rows if has_train_file else len(rows)
    assert len(load_task(name, DATA, seed=seed).train) == n_train
    has_note = any("published split" in note for note in task.notes)
    assert has_note == task.depends_on_seed == (not has_train_file)
    split, other_rows = task.evaluation
    if has_train_file:
        assert split == "validation"
    else:
        assert split == "T-Few's other splits"
        other_ids = {row["idx"] for row in other_rows}
        assert not other_ids & {row["idx"] for row in rows}
        assert len(other_ids) == len(other_rows) > 2 * len(rows)
    for prompt in task.prompts:
        for row in [*task.train, *other_rows]:
            rendered = render(prompt, row)
            assert len(set(rendered.choices)) == len(rendered.choices) > rendered.label >= 0
            assert rendered.input == rendered.input.strip()


@needs_real_data
@pytest.mark.parametrize(("name", "n_rows", "shots", "seed", "file"), published_splits())
def test_the_published_indices_equal_the_indices_of_our_shuffle(name, n_rows, shots, seed, file):
    """In SST-2 each class is shuffled by itself, and idx counts all rows, so only the order of idx
    can be compared.
    """
    spec = known_tasks()[name]
    first_positive = SST2_NEGATIVE if spec.per_class else n_rows
    rows = [{"idx": i, "label": int(i >= first_positive)} for i in range(n_rows)]
    ours = [row["idx"] for row in draw_shots(Splits(name, [], rows), spec, shots, seed)]
    theirs = [row["idx"] for row in read_json_lines(file)]
    if not spec.per_class:
        assert ours == theirs
    assert np.argsort(ours[:shots]).tolist() == np.argsort(theirs[:shots]).tolist()
    assert np.argsort(ours[shots:]).tolist() == np.argsort(theirs[shots:]).tolist()


@needs_real_data
def test_a_failed_download_is_a_note_and_a_seed_that_was_not_published_is_an_error(offline):
    seeds = r"\[0, 1, 32, 42, 100, 1024\]"
    words = rf"WiC\.zip: no network; or put .*; T-Few published splits for the seeds {seeds}"
    with pytest.raises(ValueError, match=words):
        load_task("wic", DATA, shots=32, seed=7)
    (note,) = load_task("wic", DATA, shots=8).notes
    assert "WiC.zip: no network; or put" in note
    assert note.endswith("so T-Few's published split is used, with the other seeds as validation")
    with pytest.raises(ValueError, match="1 to 32 shots"):
        load_task("wic", DATA, shots=33)


def test_shots_are_drawn_as_by_numpys_global_generator_which_stays_untouched(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(lines(*(target(n) for n in range(57))))
    (tmp_path / "val.jsonl").write_bytes(lines(target(0)))
    for seed in (0, 1, 100, 2**32 - 1):
        rows = load_task(str(tmp_path)).train
        np.random.seed(seed)
        np.random.shuffle(rows)
        np.random.seed(12345)
        before = np.random.get_state()
        for shots in (1, 9):
            assert load_task(str(tmp_path), shots=shots, seed=seed).train == rows[:shots]
        assert load_task(str(tmp_path), shots=57, seed=seed).train == rows
        after = np.random.get_state()
        assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert [row["idx"] for row in load_task(str(tmp_path)).train] == list(range(57))


@pytest.mark.parametrize("shots", [-1, 0, 4])
def test_a_number_of_shots_that_cannot_be_drawn_is_an_error(tmp_path, shots):
    (tmp_path / "train.jsonl").write_bytes(lines(*(target(n) for n in range(3))))
    (tmp_path / "val.jsonl").write_bytes(lines(target(0)))
    with pytest.raises(ValueError, match=rf"1 to 3 shots.* found {shots}$"):
        load_task(str(tmp_path), shots=shots)


# A user's rows, and the task that comes with the repository


def test_a_shipped_task_has_a_users_rows_and_a_name(tmp_path, monkeypatch):
    (tmp_path / "colours").mkdir()
    for split in ("train", "val", "test"):
        (tmp_path / "colours" / f"{split}.jsonl").write_bytes(lines(choice(1), choice(2, label=1)))
    monkeypatch.setattr("minia3.tasks.user_rows.SHIPPED", tmp_path)
    monkeypatch.setitem(known_tasks(), "colour", TaskSpec(OWN_PROMPTS, shipped="colours"))
    task = load_task("colour", tmp_path / "elsewhere")
    assert (task.name, task.metric, task.evaluation) == ("colour", "accuracy", ("test", task.test))
    assert render(task.prompts[0], task.train[1]) == ("question 2", ["yes", "no"], 1)


def test_a_shipped_task_does_not_look_into_a_folder_of_its_name(tmp_path, monkeypatch):
    """The task file of such a folder was taken for a file of the task."""
    expected = load_task("same-colour")
    (tmp_path / "same-colour").mkdir()
    (tmp_path / "same-colour" / "task.json").write_text('{"files": "rows.csv"}')
    monkeypatch.chdir(tmp_path)
    task = load_task("same-colour")
    assert (task.checksums, task.notes) == (expected.checksums, expected.notes)


def test_the_files_of_a_users_folder_are_read_as_its_splits(tmp_path):
    mine = tmp_path / "mine.v1"
    mine.mkdir()
    (mine / "train.jsonl").write_bytes(
        lines(choice(0, extra=[1]), choice(1, label=1, idx=70), choice(2, idx=True))
    )
    three = {"input": "x", "choices": ["a", "b", "c"], "label": 2, "idx": "k"}
    (mine / "dev.jsonl").write_bytes(lines(three))
    (mine / "test.jsonl").write_bytes(
        lines({"input": "x", "choices": ["a"]}, {**three, "label": -1})
    )
    task = load_task(mine)
    assert task.train == [choice(0, extra=[1], idx=0), choice(1, label=1, idx=70), choice(2, idx=2)]
    assert task.validation == [{**three, "idx": 0}]
    assert [row["label"] for row in task.test] == [-1, -1]
    assert task.evaluation == ("validation", task.validation)
    assert (task.name, task.metric) == ("mine.v1", "accuracy")
    assert task.prompts == OWN_PROMPTS
    assert set(task.checksums) == {"train.jsonl", "dev.jsonl", "test.jsonl"}
    assert task.notes == ["2 of 2 test rows have no label: results are on validation"]


def test_rows_with_targets_have_the_metric_exact_match_and_the_label_0(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(lines(target(0, label="x"), target(1)))
    (tmp_path / "test.jsonl").write_bytes(lines(target(2)))
    task = load_task(str(tmp_path))
    assert task.metric == "exact_match"
    assert task.train == [target(0, label=0, idx=0), target(1, label=0, idx=1)]
    assert task.evaluation == ("test", task.test)


def test_a_folder_may_hold_test_rows_only(tmp_path):
    (tmp_path / "test.jsonl").write_bytes(lines(target(2)))
    task = load_task(str(tmp_path))
    assert (task.train, task.validation, len(task.test)) == ([], [], 1)


@pytest.mark.parametrize(
    ("n", "sizes"), [(3, (1, 1, 1)), (9, (7, 1, 1)), (20, (16, 2, 2)), (109, (89, 10, 10))]
)
def test_a_file_is_split_80_10_10_the_same_way_for_every_seed(tmp_path, n, sizes):
    file = tmp_path / "mine.jsonl"
    file.write_bytes(lines(*(target(i) for i in range(n))))
    task = load_task(str(file))
    parts = (task.train, task.validation, task.test)
    indices = [[row["idx"] for row in part] for part in parts]
    assert tuple(map(len, parts)) == sizes
    assert sorted(chain(*indices)) == list(range(n))
    assert all(part == sorted(part) for part in indices), "in the order of the file"
    assert load_task(str(file), seed=5) == task
    assert task.notes == [
        f"{file} is split into train, validation and test, the same way each time"
    ]
    assert (task.name, list(task.checksums)) == ("mine", ["mine.jsonl"])


def test_the_split_does_not_depend_on_the_machine_or_the_version(tmp_path):
    (tmp_path / "mine.jsonl").write_bytes(lines(*(target(i) for i in range(20))))
    task = load_task(str(tmp_path / "mine.jsonl"))
    assert [row["idx"] for row in task.validation] == [1, 18]
    assert [row["idx"] for row in task.test] == [8, 19]


def test_a_folder_with_only_a_train_file_is_split_like_a_file(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(lines(*(target(i) for i in range(20))))
    assert len(load_task(str(tmp_path)).validation) == 2


def test_without_rows_to_train_on_there_are_no_shots(tmp_path):
    """The message expected 1 to 0 shots."""
    (tmp_path / "test.jsonl").write_bytes(lines(*(target(i) for i in range(3))))
    words = rf"{tmp_path.name}: there are no rows of train to draw --shots 4 from\Z"
    with pytest.raises(ValueError, match=words):
        load_task(tmp_path, shots=4)


def test_two_rows_cannot_be_split(tmp_path):
    (tmp_path / "mine.jsonl").write_bytes(lines(target(0), target(1)))
    with pytest.raises(ValueError, match=r"too few rows to split \(2\): give a folder"):
        load_task(str(tmp_path / "mine.jsonl"))


def test_cells_in_quotes_are_counted_in_a_tsv_file(tmp_path):
    """pandas writes a cell with quotes like this. The model read all of the quotes, and no note
    said so."""
    rows = ['"He said ""hi"""\tgood', '"A ""b"" c"\t"a ""good"" one"', '"so"\tgood', 'a""b\tgood']
    content = "text\tlabel\n" + "".join(row + "\n" for row in rows)
    (tmp_path / "train.tsv").write_text(content)
    (tmp_path / "test.tsv").write_text(content)
    task = load_task(tmp_path)
    assert task.train[0]["text"] == '"He said ""hi"""'
    assert task.notes == [
        "6 cells of .tsv files are in quotes, with each quote inside doubled. The model reads all "
        "of these quotes: name the file .csv to leave them out"
    ]
    (tmp_path / "test.tsv").write_text("text\tlabel\na\tgood\n")
    (tmp_path / "train.tsv").write_text(f"text\tlabel\n{rows[0]}\nb\tgood\n")
    assert load_task(tmp_path).notes[0].startswith("1 cell of .tsv files is in quotes, ")
    (tmp_path / "test.tsv").write_text("text\tlabel\na\n")
    with pytest.raises(ValueError, match=r"test\.tsv:2: expected 2 cells, as in the header"):
        load_task(tmp_path)
    for name in ("train", "test"):
        (tmp_path / f"{name}.tsv").write_text(content)
    for name in ("train", "test"):
        (tmp_path / f"{name}.tsv").rename(tmp_path / f"{name}.csv")
    task = load_task(tmp_path)
    assert task.notes == []
    assert [row["text"] for row in task.train[:3]] == ['He said "hi"', 'A "b" c', "so"]


@pytest.mark.parametrize(
    ("texts", "n_cells"),
    [
        (['"so, so"', "good", '"well, no"'], 2),
        (['"so, so"', "good", '"He said ""no, no"""'], 1),
        (['"so, so"', "a, b", "good"], 0),  # a comma without quotes
        (['"so, so"', '"no"', "good"], 0),  # quotes without a comma
        (["so", "no", '"'], 0),
    ],
)
def test_cells_that_excel_puts_into_quotes_are_counted_in_a_tsv_file(texts, n_cells, tmp_path):
    """Its tab-delimited text has quotes around cells with a comma. The model learned to read
    them, and no note said so."""
    rows = "".join(f"{text}\tgood\n" for text in texts)
    (tmp_path / "rows.tsv").write_text(f"text\tlabel\n{rows}")
    found = [note for note in load_task(tmp_path / "rows.tsv").notes if "Excel" in note]
    are_quoted = "cell of .tsv files is" if n_cells == 1 else "cells of .tsv files are"
    expected = (
        f"{n_cells} {are_quoted} in quotes, as Excel puts cells that have a comma. The model reads "
        "all of these quotes: name the file .csv to leave them out"
    )
    assert found == ([expected] if n_cells else [])
    (tmp_path / "rows.tsv").rename(tmp_path / "rows.csv")
    if n_cells:
        assert "so, so" in {row["text"] for row in load_task(tmp_path / "rows.csv").train}


def test_inputs_that_end_in_white_space_are_counted(tmp_path):
    (tmp_path / "val.jsonl").write_bytes(
        lines(target(0), {**target(1), "input": "Answer: "}, {**target(2), "input": "a\n"})
    )
    assert load_task(str(tmp_path)).notes == [
        "2 inputs end in white space: leave it out, "
        "because the tokenizer puts a space before the answer"
    ]


def test_a_folder_without_a_file_of_a_split_is_an_error(tmp_path):
    (tmp_path / "data.jsonl").write_bytes(lines(target(0)))
    with pytest.raises(
        ValueError, match=r"expected files named train, .*; found data\.jsonl; a single"
    ):
        load_task(str(tmp_path))


def test_a_folder_with_two_files_for_one_split_is_an_error(tmp_path):
    (tmp_path / "val.jsonl").write_bytes(lines(target(0)))
    (tmp_path / "dev.jsonl").write_bytes(lines(target(0)))
    with pytest.raises(ValueError, match=r"has dev\.jsonl and val\.jsonl: keep one"):
        load_task(str(tmp_path))


def test_a_folder_with_nothing_to_report_on_is_an_error(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(lines(choice(0)))
    (tmp_path / "test.jsonl").write_bytes(lines({"input": "a", "choices": ["b"]}, choice(0)))
    with pytest.raises(ValueError, match="no labeled rows to report on"):
        load_task(str(tmp_path))


@pytest.mark.parametrize("name", ["mine.xlsx", "mine.txt", "mine"])
def test_an_unknown_suffix_is_an_error(tmp_path, name):
    (tmp_path / name).write_bytes(lines(target(0)))
    with pytest.raises(
        ValueError, match=r"(is not read|no suffix).*; expected \.jsonl, .* with \.gz"
    ):
        load_task(str(tmp_path / name))


@pytest.mark.parametrize("name", ["rtee", "RTE"])
def test_an_unknown_name_is_an_error_with_the_nearest_name(name):
    words = rf"'{name}' .*did you mean 'rte'\?$"
    with pytest.raises(ValueError, match=words):
        load_task(name)


@pytest.mark.parametrize("name", ["", "zzzzzz", "x" * 5000, "a\0b"])
def test_a_name_like_no_other_is_an_error_with_all_names(name):
    words = r"is not a known task, a file or a folder\. Known tasks: .*, cb, .*, rte, .*, raft/...$"
    with pytest.raises(ValueError, match=words):
        load_task(name)


@pytest.mark.parametrize("rows", [[{"text": "a", "label": "b"}], {"text": ["a"]}, None, 3])
def test_rows_in_place_of_their_file_are_refused(rows):
    kind = type(rows).__name__
    message = f"^expected the name of a task or a path, found an object of the kind {kind}: write"
    with pytest.raises(ValueError, match=message):
        load_task(rows)


def test_numbers_that_are_no_integers_are_refused():
    for flags in ({"shots": 4.0}, {"shots": "4"}, {"shots": 4, "seed": 1.0}, {"seed": None}):
        *_, (name, value) = flags.items()
        with pytest.raises(ValueError, match=f"^{name} is {value!r}, expected an integer$"):
            load_task("same-colour", **flags)
    drawn = load_task("same-colour", shots=np.int64(4), seed=np.int64(1)).train
    assert drawn == load_task("same-colour", shots=4, seed=1).train


def test_a_folder_may_hold_csv_files_but_only_one_file_for_each_split(tmp_path):
    (tmp_path / "train.csv").write_text("input,target\na,b\n")
    (tmp_path / "dev.jsonl").write_bytes(lines(target(0)))
    task = load_task(tmp_path)
    assert task.train == [{"input": "a", "target": "b", "label": 0, "idx": 0}]
    assert list(task.checksums) == ["train.csv", "dev.jsonl"]
    (tmp_path / "train.jsonl").write_bytes(lines(target(0)))
    with pytest.raises(ValueError, match=r"has train\.csv and train\.jsonl: keep one"):
        load_task(tmp_path)


def write_encoded(path, texts, labels, names):
    """Write a .parquet whose labels are integers with names, as the `datasets` library does."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"text": list(texts), "Label": labels})
    features = {"Label": {"names": names, "_type": "ClassLabel"}}
    description = json.dumps({"info": {"features": features}})
    parquet.write_table(table.replace_schema_metadata({"huggingface": description}), path)


@pytest.fixture
def rte(tmp_path):
    """Return a data folder with a few rows in the form of RTE's."""
    rows = []
    for i, label in enumerate(("entailment", "not_entailment") * 3):
        rows.append({"premise": f"a{i}", "hypothesis": f"b{i}", "label": label})
    (tmp_path / "rte").mkdir()
    for name in ("train", "val"):
        lines = [json.dumps(row) + "\n" for row in rows]
        (tmp_path / "rte" / f"{name}.jsonl").write_text("".join(lines))
    return tmp_path


@pytest.mark.parametrize(
    "said",
    [
        {"labels": "yes,no"},
        {"input": "{premise} So {hypothesis}?"},
        {"input": "{hypothesis}?", "labels": "yes,no", "metric": "macro_f1"},
    ],
)
def test_a_known_task_is_evaluated_in_the_words_that_were_learned(rte, said):
    """An adapter that had learned yes and no was evaluated on True and False, without a word."""
    learned = load_task("rte", rte, **said)
    task = load_task("rte", rte, like=learned.spec)
    assert (task.prompts, task.metric) == (learned.prompts, learned.metric)
    assert task.notes[-1] == "the rows get the learned prompt and words (task.json)"
    own = load_task("rte", rte, like=learned.spec, labels="True,False")  # as the user says
    assert own.prompts == load_task("rte", rte, labels="True,False").prompts
    assert load_task("rte", rte, like=learned.spec, metric="accuracy").metric == "accuracy"


def test_a_known_task_keeps_its_words_if_others_were_learned_for_other_rows(rte):
    own = load_task("rte", rte)
    assert load_task("rte", rte, like=own.spec) == own
    other_columns = own.prompts[0]._replace(text="{text}?")
    other_words = own.prompts[0]._replace(text="{premise} So {hypothesis}?")
    for changed in (
        {"prompts": (other_words,), "labels": ("a", "b")},
        {"prompts": (other_words,), "label_field": "gold"},
        {"prompts": (other_columns,)},
    ):
        assert load_task("rte", rte, like=own.spec._replace(**changed)) == own


def test_files_whose_labels_are_encoded_differently_are_refused(tmp_path):
    # test was encoded by itself, and has no a: its 0 is b. It was read as a.
    write_encoded(tmp_path / "train.parquet", "tuv", [0, 1, 2], ["a", "b", "c"])
    write_encoded(tmp_path / "test.parquet", "xy", [0, 1], ["b", "c"])
    for labels in (None, "c,b,a", "x,y,z"):
        with pytest.raises(ValueError, match=r"stand for a, b, c in .*train.parquet, and for b, c"):
            load_task(tmp_path, labels=labels)

    assert load_task(tmp_path, input="{text}", target="{Label}").answer == "target"
    write_encoded(tmp_path / "test.parquet", "xy", [0, 1], ["a", "b"])  # it does without the c
    assert [row["label"] for row in load_task(tmp_path).test] == [0, 1]


@pytest.mark.parametrize(("named", "plain"), [("train", "test"), ("test", "train")])
def test_an_integer_that_is_also_the_name_of_another_one_is_refused(named, plain, tmp_path):
    """The 1 of a .csv was the integer of "2": four of five labels were read as the next one."""
    names = ["1", "2", "3", "4", "5"]
    write_encoded(tmp_path / f"{named}.parquet", "tuvwx", [0, 1, 2, 3, 4], names)
    (tmp_path / f"{plain}.csv").write_text("text,label\nx,4\ny,5\n")
    words = (
        rf"^'label' is 4 in \S*{plain}.csv, which may be an integer that stands for one of the "
        rf"names 1, 2, 3, 4, 5 of \S*{named}.parquet, or one of these names: save the rows of all "
    )
    with pytest.raises(ValueError, match=words):
        load_task(tmp_path)


def test_a_file_without_names_may_lack_labels_or_have_names_that_are_no_integers(tmp_path):
    write_encoded(tmp_path / "train.parquet", "tu", [0, 1], ["1", "2"])
    write_encoded(tmp_path / "dev.parquet", "tu", [0, 1], ["1", "2"])
    (tmp_path / "test.csv").write_text("text\nx\n")
    assert [row["label"] for row in load_task(tmp_path).test] == [-1]
    for name in ("train", "dev"):
        write_encoded(tmp_path / f"{name}.parquet", "tu", [0, 1], ["bad", "good"])
    (tmp_path / "test.csv").write_text("text,label\nx,1\ny,bad\n")
    assert [row["label"] for row in load_task(tmp_path).test] == [1, 0]


def test_integers_with_names_are_the_words_that_an_adapter_has_learned(tmp_path):
    # Words were refused, and for an adapter of 0 and 1 each label was the other one.
    write_encoded(tmp_path / "new.parquet", "xyz", [0, 1, 0], ["{POS}", "neg"])
    (tmp_path / "words.csv").write_text("text,label\na,neg\nb,{pos}\nc,neg\n")
    (tmp_path / "numbers.csv").write_text("text,label\na,0\nb,1\nc,0\n")
    for name, labels in (("words.csv", None), ("numbers.csv", "neg,{pos}")):
        learned = load_task(tmp_path / name, labels=labels).spec
        task = load_task(tmp_path / "new.parquet", like=learned)
        assert task.prompts == learned.prompts
        rows = [*task.train, *task.validation, *task.test]
        assert {row["text"]: row["label"] for row in rows} == {"x": 1, "y": 0, "z": 1}
        assert task.columns == "reads text, picks Label among neg (1), {pos} (0)"
    # Names that are no words of the adapter say nothing about its labels.
    write_encoded(tmp_path / "new.parquet", "xyz", [0, 1, 0], ["good", "bad"])
    task = load_task(tmp_path / "new.parquet", like=learned)
    assert task.columns == "reads text, picks Label among neg (0), {pos} (1)"


def test_integers_with_names_are_the_labels_of_an_adapter_that_has_other_words(tmp_path):
    """Each row was refused: 'label' is 0, expected one of neg, {pos}."""
    (tmp_path / "words.csv").write_text("text,label\na,neg\nb,{pos}\nc,neg\n")
    entry = {"files": "words.csv", "labels": ["neg", "{pos}"]}
    entry["prompts"] = [{"text": "{text} It was", "choices": ["terrible", "great"]}]
    (tmp_path / "task.json").write_text(json.dumps(entry))
    learned = load_task(tmp_path / "task.json").spec
    write_encoded(tmp_path / "new.parquet", "xyz", [0, 2, 0], ["{POS}", "other", "Neg"])
    task = load_task(tmp_path / "new.parquet", like=learned)
    rows = [*task.train, *task.validation, *task.test]
    assert {row["text"]: row["label"] for row in rows} == {"x": 1, "y": 0, "z": 1}
    assert task.columns == "reads text, picks Label among terrible (2), great (0)"


def test_labels_that_were_integers_with_names_stay_integers(tmp_path):
    # The names are in the order of texts, as `class_encode_column` writes them.
    names = sorted(map(str, range(12)))
    write_encoded(tmp_path / "train.parquet", "abcdefghijkl", list(range(12)), names)
    words = [f"word {name}" for name in names]
    trained = load_task(tmp_path / "train.parquet", labels=words)
    evaluated = load_task(tmp_path / "train.parquet", like=trained.spec)
    assert (evaluated.test, evaluated.prompts) == (trained.test, trained.prompts)
    assert evaluated.columns == trained.columns
