"""A task has the splits that its files have; few-shot splits are T-Few's; whatever is not a task is refused."""

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

# Real files


@needs_real_data
@pytest.mark.parametrize(
    ("name", "sizes", "labels"),
    [
        ("rte", (2490, 277, 3000), ({0: 1249, 1: 1241}, {0: 146, 1: 131})),
        ("cb", (250, 56, 250), ({0: 115, 1: 119, 2: 16}, {0: 23, 1: 28, 2: 5})),
        ("copa", (400, 100, 500), ({0: 195, 1: 205}, {0: 55, 1: 45})),
    ],
)
def test_the_real_files_are_read_whole(name, sizes, labels):
    folder = Path(REAL, "data")
    task = load_task(name, folder)
    parts = (task.train, task.validation, task.test)
    assert tuple(map(len, parts)) == sizes
    assert tuple(Counter(row["label"] for row in part) for part in parts) == (
        *labels,
        {-1: sizes[2]},
    )
    assert all([row["idx"] for row in part] == list(range(len(part))) for part in parts)
    assert task.evaluation == ("validation", task.validation)
    assert (task.name, task.metric, task.prompts, task.seen) == (
        name,
        "accuracy",
        known_tasks()[name].prompts,
        known_tasks()[name].seen,
    )
    names = ("train.jsonl", "val.jsonl", "test.jsonl")
    sums = {file: hashlib.sha256((folder / name / file).read_bytes()).hexdigest() for file in names}
    assert task.checksums == sums
    assert task.notes == [
        f"{sizes[2]} of {sizes[2]} test rows have no label: results are on validation"
    ]
    for prompt in task.prompts:
        for row in (row for part in parts for row in part):
            rendered = render(prompt, row)
            assert len(set(rendered.choices)) == len(rendered.choices) > rendered.label
            assert rendered.input == rendered.input.rstrip()


# Folder of the published splits -> the task, and how many rows its train file has. Where the file is not to be had, the
# published idx are still those of the shuffle.
SPLITS = {
    **{
        "rte": ("rte", 2490),
        "cb": ("cb", 250),
        "copa": ("copa", 400),
        "wsc": ("wsc", 554),
        "wic": ("wic", 5428),
    },
    **{"boolq": ("boolq", 9427), "anli-r1": ("anli-r1", 16946), "anli-r2": ("anli-r2", 45460)},
    **{
        "anli-r3": ("anli-r3", 100459),
        "h-swag": ("hellaswag", 39905),
        "winogrande": ("winogrande", 40398),
    },
    **{"storycloze": ("storycloze", 1871), "sst2": ("sst2", 67349)},
}
SST2 = (29780, 37569)  # rows of each class


def published():
    for folder, (task, n) in SPLITS.items() if REAL else ():
        for file in sorted(Path(REAL, "data", "few_shot", folder).glob("*_shot/*_seed.jsonl")):
            shots, seed = (
                int(file.parent.name.removesuffix("_shot")),
                int(file.stem.removesuffix("_seed")),
            )
            yield pytest.param(task, n, shots, seed, file, id=f"{task}-{shots}-{seed}")


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(
        "minia3.tasks.download.urlopen",
        lambda *args, **options: (_ for _ in ()).throw(OSError("no network")),
    )


@needs_real_data
def test_all_published_splits_are_looked_at():
    assert {path.name for path in Path(REAL, "data", "few_shot").iterdir()} == set(SPLITS)
    assert (
        len(list(published())) == len(list(Path(REAL, "data", "few_shot").rglob("*.jsonl"))) >= 65
    )


@needs_real_data
@pytest.mark.parametrize(("name", "n", "shots", "seed", "file"), list(published()))
def test_few_shot_splits_are_the_published_ones(name, n, shots, seed, file, offline):
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    task = load_task(name, Path(REAL, "data"), shots=shots, seed=seed)
    assert task.train == rows, "order, idx, label and texts"
    assert known_tasks()[name].shots == shots
    whole = Path(REAL, "data", name, "train.jsonl").exists()
    assert len(load_task(name, Path(REAL, "data"), seed=seed).train) == (n if whole else len(rows))
    assert whole == (not any("published split" in note for note in task.notes))
    split, others = task.evaluation
    assert split == ("validation" if whole else "T-Few's other splits")
    if not whole:
        assert not {row["idx"] for row in others} & {row["idx"] for row in rows}
        assert len({row["idx"] for row in others}) == len(others) > 2 * len(rows)
    for part in (task.train, others):
        for prompt in task.prompts:
            for row in part:
                rendered = render(prompt, row)
                assert len(set(rendered.choices)) == len(rendered.choices) > rendered.label >= 0
                assert rendered.input == rendered.input.strip()


@needs_real_data
@pytest.mark.parametrize(("name", "n", "shots", "seed", "file"), list(published()))
def test_the_published_indices_are_those_of_our_shuffle(
    name, n, shots, seed, file, tmp_path, monkeypatch
):
    """Of SST-2 it is each class that is shuffled: only that its places are in the order of the idx can be seen here."""
    n_rows, per_class = (sum(SST2), True) if name == "sst2" else (n, False)
    monkeypatch.setattr(
        "minia3.tasks.splits.find_files", lambda *_: {"train": tmp_path, "validation": tmp_path}
    )
    monkeypatch.setattr(
        "minia3.tasks.splits.read_splits",
        lambda *_: {"train": [dict(row) for row in rows], "validation": rows[:1]},
    )
    monkeypatch.setattr(Path, "read_bytes", lambda _: b"")
    monkeypatch.setitem(
        known_tasks(), "served", TaskSpec(labels=["no", "yes"], per_class=per_class)
    )
    rows = [{"label": int(per_class and i >= SST2[0]), "idx": i} for i in range(n_rows)]
    ours = [row["idx"] for row in load_task("served", shots=shots, seed=seed).train]
    theirs = [json.loads(line)["idx"] for line in file.read_text("utf-8").splitlines()]
    if not per_class:
        assert ours == theirs
    for one, other in ((ours[:shots], theirs[:shots]), (ours[shots:], theirs[shots:])):
        assert np.argsort(one).tolist() == np.argsort(other).tolist()


@needs_real_data
@pytest.mark.parametrize("name", [name for name in known_tasks() if name.startswith("raft/")])
def test_every_row_of_raft_is_held_out_by_one_of_five_seeds_in_a_row(name):
    folds = [load_task(name, Path(REAL, "data"), seed=seed) for seed in range(7, 12)]
    assert sorted(row["idx"] for task in folds for row in task.validation) == list(range(50))
    for seed, task in enumerate(folds, 7):
        assert (len(task.train), len(task.validation), task.metric, task.name) == (
            40,
            10,
            "macro_f1",
            name,
        )
        assert sorted(row["idx"] for row in task.train + task.validation) == list(range(50))
        assert task.evaluation == ("validation", task.validation)
        assert (
            task.notes[0]
            == f"fold {seed % 5 + 1} of 5 is held out: 5 seeds in a row report on each row once"
        )
    assert load_task(name, Path(REAL, "data"), seed=2).validation == folds[0].validation
    task = folds[0]
    assert all(known_tasks()[name].labels[row["label"]] == row["Label"] for row in task.train)
    assert [row["ID"] for row in task.test] == [str(50 + i) for i in range(len(task.test))], (
        "what the leaderboard wants"
    )
    assert {row["label"] for row in task.test} == {-1}
    for prompt in task.prompts:
        for row in [*task.train, *task.test[::10]]:
            rendered = render(prompt, row)
            assert (
                len(set(rendered.choices))
                == len(rendered.choices)
                == len(known_tasks()[name].labels)
            )


@needs_real_data
def test_all_rows_of_raft_can_be_trained_on_and_then_there_are_none_to_report_on():
    task = load_task("raft/ade_corpus_v2", Path(REAL, "data"), shots=50, seed=3)
    assert sorted(row["idx"] for row in task.train) == list(range(50))
    with pytest.raises(ValueError, match="raft/ade_corpus_v2: no labelled rows to report on"):
        _ = task.evaluation
    assert len(load_task("raft/ade_corpus_v2", Path(REAL, "data"), shots=40, seed=3).train) == 40
    with pytest.raises(ValueError, match="1 to 40 shots, found 45"):
        load_task("raft/ade_corpus_v2", Path(REAL, "data"), shots=45)


@needs_real_data
def test_each_span_of_wsc_stands_in_its_text():
    task = load_task("wsc", Path(REAL, "data"))
    assert tuple(map(len, (task.train, task.validation, task.test))) == (554, 104, 146)
    rows = [*task.train, *task.validation, *task.test]
    gaps = [row["idx"] for row in rows for n in (1, 2) if row[f"span{n}_text"] not in row["text"]]
    assert gaps == [80, 82], "Kamenev and Zinoviev: two names with other words between them"
    assert all("target" not in row for row in rows)
    assert task.train[16]["span1_text"] == "the demonstrators"


@needs_real_data
def test_a_seed_that_was_not_published_is_an_error_and_a_failed_download_is_a_note(offline):
    with pytest.raises(
        ValueError,
        match=r"WiC\.zip: no network; or put .* published are seeds \[0, 1, 32, 42, 100, 1024\]",
    ):
        load_task("wic", Path(REAL, "data"), shots=32, seed=7)
    (note,) = load_task("wic", Path(REAL, "data"), shots=8).notes
    assert "WiC.zip: no network; or put" in note
    assert note.endswith(
        "so this is T-Few's published split, evaluated on those of the other seeds"
    )
    with pytest.raises(ValueError, match="1 to 32 shots"):
        load_task("wic", Path(REAL, "data"), shots=33)


# Few shots


def test_the_few_shot_stream_is_that_of_numpys_global_generator_which_stays_untouched(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(lines(*(target(n) for n in range(57))))
    (tmp_path / "val.jsonl").write_bytes(lines(target(0)))
    for seed in (0, 1, 100, 2**32 - 1):
        rows = load_task(str(tmp_path)).train
        np.random.seed(seed)
        np.random.shuffle(rows)
        np.random.seed(12345)
        before = np.random.get_state()
        assert load_task(str(tmp_path), shots=9, seed=seed).train == rows[:9]
        assert load_task(str(tmp_path), shots=57, seed=seed).train == rows
        after = np.random.get_state()
        assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert [row["idx"] for row in load_task(str(tmp_path)).train] == list(range(57))


@pytest.mark.parametrize("shots", [-1, 0, 4])
def test_shots_that_cannot_be_drawn_are_an_error(tmp_path, shots):
    (tmp_path / "train.jsonl").write_bytes(lines(*(target(n) for n in range(3))))
    (tmp_path / "val.jsonl").write_bytes(lines(target(0)))
    with pytest.raises(ValueError, match=rf"1 to 3 shots.* found {shots}$"):
        load_task(str(tmp_path), shots=shots)


def test_a_shipped_task_is_own_rows_under_a_name(tmp_path, monkeypatch):
    (tmp_path / "colours").mkdir()
    for split in ("train", "val", "test"):
        (tmp_path / "colours" / f"{split}.jsonl").write_bytes(lines(choice(1), choice(2, label=1)))
    monkeypatch.setattr("minia3.tasks.splits.SHIPPED", tmp_path)
    monkeypatch.setitem(known_tasks(), "colour", TaskSpec(OWN_PROMPTS, shipped="colours"))
    task = load_task("colour", tmp_path / "elsewhere")
    assert (task.name, task.metric, task.evaluation) == ("colour", "accuracy", ("test", task.test))
    assert render(task.prompts[0], task.train[1]) == ("question 2", ["yes", "no"], 1)


# Own rows


def test_a_folder_of_own_rows(tmp_path):
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
    assert (task.name, task.metric, task.prompts, task.seen) == (
        "mine.v1",
        "accuracy",
        OWN_PROMPTS,
        (),
    )
    assert set(task.checksums) == {"train.jsonl", "dev.jsonl", "test.jsonl"}
    assert task.notes == ["2 of 2 test rows have no label: results are on validation"]


def test_rows_with_targets_are_matched_exactly_and_have_label_0(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(lines(target(0, label="x"), target(1)))
    (tmp_path / "test.jsonl").write_bytes(lines(target(2)))
    task = load_task(str(tmp_path))
    assert task.metric == "exact_match"
    assert task.train == [target(0, label=0, idx=0), target(1, label=0, idx=1)]
    assert task.evaluation == ("test", task.test)


def test_a_folder_may_hold_what_is_to_be_evaluated_alone(tmp_path):
    (tmp_path / "test.jsonl").write_bytes(lines(target(2)))
    task = load_task(str(tmp_path))
    assert (task.train, task.validation, len(task.test)) == ([], [], 1)


@pytest.mark.parametrize(
    ("n", "sizes"), [(3, (1, 1, 1)), (9, (7, 1, 1)), (20, (16, 2, 2)), (109, (89, 10, 10))]
)
def test_one_file_is_split_80_10_10_the_same_way_whatever_the_seed(tmp_path, n, sizes):
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
    assert [[row["idx"] for row in part] for part in (task.validation, task.test)] == [
        [1, 18],
        [8, 19],
    ]


def test_a_folder_with_train_alone_is_split_like_a_file(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(lines(*(target(i) for i in range(20))))
    assert len(load_task(str(tmp_path)).validation) == 2


def test_two_rows_cannot_be_split(tmp_path):
    (tmp_path / "mine.jsonl").write_bytes(lines(target(0), target(1)))
    with pytest.raises(ValueError, match=r"too few rows to split \(2\): give a folder"):
        load_task(str(tmp_path / "mine.jsonl"))


def test_inputs_that_end_in_white_space_are_counted(tmp_path):
    (tmp_path / "val.jsonl").write_bytes(
        lines(target(0), {**target(1), "input": "Answer: "}, {**target(2), "input": "a\n"})
    )
    assert load_task(str(tmp_path)).notes == [
        "2 inputs end in white space: leave it out, the tokenizer puts a space before the answer"
    ]


def test_a_folder_with_no_known_file(tmp_path):
    (tmp_path / "data.jsonl").write_bytes(lines(target(0)))
    with pytest.raises(ValueError, match=r"a folder of train, validation \(val, dev\) and test\Z"):
        load_task(str(tmp_path))


def test_a_folder_with_two_files_for_one_split(tmp_path):
    (tmp_path / "val.jsonl").write_bytes(lines(target(0)))
    (tmp_path / "dev.jsonl").write_bytes(lines(target(0)))
    with pytest.raises(ValueError, match=r"has val\.jsonl and dev\.jsonl: keep one"):
        load_task(str(tmp_path))


def test_a_folder_with_nothing_to_report_on(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(lines(choice(0)))
    (tmp_path / "test.jsonl").write_bytes(lines({"input": "a", "choices": ["b"]}, choice(0)))
    with pytest.raises(ValueError, match="no labelled rows to report on"):
        load_task(str(tmp_path))


@pytest.mark.parametrize("name", ["mine.CSV", "mine.json", "mine"])
def test_an_unknown_suffix(tmp_path, name):
    (tmp_path / name).write_bytes(lines(target(0)))
    with pytest.raises(ValueError, match=r"expected a \.jsonl or \.csv file, or a folder"):
        load_task(str(tmp_path / name))


def test_an_unknown_name_gets_the_nearest_one_and_the_list():
    for name in ("rtee", "RTE"):
        with pytest.raises(
            ValueError, match=rf"'{name}' .*did you mean 'rte'\? Known tasks: .*cb, .*copa, .*rte"
        ):
            load_task(name)
    for name in ("no/such/file.jsonl", "", "zzzzzz", "x" * 5000, "a\0b"):
        with pytest.raises(ValueError, match="is no task, file or folder: Known tasks: "):
            load_task(name)


def test_a_folder_may_hold_csv_files_but_one_file_for_a_split(tmp_path):
    (tmp_path / "train.csv").write_text("input,target\na,b\n")
    (tmp_path / "dev.jsonl").write_bytes(lines(target(0)))
    task = load_task(tmp_path)
    assert task.train == [{"input": "a", "target": "b", "label": 0, "idx": 0}]
    assert list(task.checksums) == ["train.csv", "dev.jsonl"]
    (tmp_path / "train.jsonl").write_bytes(lines(target(0)))
    with pytest.raises(ValueError, match=r"has train\.jsonl and train\.csv: keep one"):
        load_task(tmp_path)
