"""Data sets of the `datasets` library are read as the library itself reads them: from folders of
`save_to_disk`, from folders by `hf:`, and from a hub on 127.0.0.1.

A child process asks the hub, because huggingface_hub reads its environment when it is imported.
"""

import io
import json
import os
import re
import subprocess
import sys
import textwrap

import pytest
from data_hub import serving
from task_files import lines, target

from minia3.tasks.library_data import find_saved_files
from minia3.tasks.row_files import read_label_names
from minia3.tasks.splits import load_task

datasets = pytest.importorskip("datasets", reason="the extra [data] is not installed")

CHILD = """
    import json, sys, time
    waits = []
    time.sleep = waits.append  # huggingface_hub waits longer and longer between its tries
    from minia3.tasks.splits import load_task

    def outcome(name):
        try:
            task = load_task(name)
        except ValueError as error:
            return str(error)
        return [task.name, task.train, task.validation, task.test, task.notes, len(task.checksums)]

    print(json.dumps([outcome(name) for name in sys.argv[1:]]))
    assert sum(waits) < 1, waits
"""


@pytest.fixture(autouse=True)
def without_bars():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def data_set(n=12, first=0):
    """Return rows with choices. Their labels have names."""
    rows = []
    for i in range(first, first + n):
        rows.append({"input": f"q {i}", "choices": ["a", "b"], "label": i % 2})
    made = datasets.Dataset.from_list(rows)
    return made.cast_column("label", datasets.ClassLabel(names=["bad", "good"]))


def checked(rows):
    """Return the rows of a data set as a task has them."""
    return [{**row, "idx": n} for n, row in enumerate(rows)]


# save_to_disk


def test_a_saved_data_set_is_split_like_a_file(tmp_path):
    data_set(20).save_to_disk(tmp_path / "mine")
    task = load_task(tmp_path / "mine")
    assert (task.name, len(task.train), len(task.validation), len(task.test)) == ("mine", 16, 2, 2)
    rows = sorted([*task.train, *task.validation, *task.test], key=lambda row: row["idx"])
    assert rows == checked(data_set(20))
    assert task.notes[0].startswith(f"{tmp_path / 'mine'} is split into train, validation and test")


@pytest.mark.parametrize("n_files", [1, 3])
def test_a_saved_dict_has_its_splits_in_order(tmp_path, n_files):
    splits = {"train": data_set(9), "dev": data_set(3, 9), "test": data_set(3, 12)}
    shares = {"train": n_files, "dev": 1, "test": 1}
    datasets.DatasetDict(splits).save_to_disk(tmp_path, num_shards=shares)
    task = load_task(tmp_path)
    assert task.train == checked(splits["train"])
    assert task.validation == checked(splits["dev"])
    assert task.test == checked(splits["test"])
    assert len(task.checksums) == n_files + 2, "files of one name in two folders are two files"
    assert "dev/data-00000-of-00001.arrow" in task.checksums


def test_the_saved_order_counts_and_the_names_of_labels_are_there(tmp_path):
    shuffled = data_set(12).shuffle(seed=3)
    datasets.DatasetDict(train=shuffled, test=data_set(3)).save_to_disk(tmp_path)
    assert load_task(tmp_path).train == checked(shuffled)
    (path,) = find_saved_files(tmp_path).files["train"]
    assert read_label_names(path) == {"label": ["bad", "good"]}


def test_splits_that_are_not_used_are_named(tmp_path):
    extra = {"unsupervised": data_set(3), "valid": data_set(3), "val": data_set(3)}
    datasets.DatasetDict(train=data_set(), **extra).save_to_disk(tmp_path)
    assert load_task(tmp_path).notes == [
        f"splits of {tmp_path} that are not used: unsupervised, valid"
    ]


def test_a_split_that_is_meant_for_the_results_is_not_replaced_by_rows_of_train(tmp_path):
    """A run on MNLI reported on a tenth of train."""
    matched = {"validation_matched": data_set(3), "test_matched": data_set(3)}
    datasets.DatasetDict(train=data_set(), **matched).save_to_disk(tmp_path / "mnli")
    words = r"expected splits named validation or test .*; found validation_matched, test_matched: "
    with pytest.raises(ValueError, match=rf"\A{tmp_path}/mnli: {words}[^\n]*save_to_disk[^\n]*\Z"):
        load_task(tmp_path / "mnli")
    datasets.DatasetDict(train=data_set(), test=data_set(3), **matched).save_to_disk(tmp_path / "m")
    assert load_task(tmp_path / "m").notes == [
        f"splits of {tmp_path / 'm'} that are not used: validation_matched, test_matched"
    ]
    for name in ("devtest", "validate", "holdout"):
        splits = {"train": data_set(), name: data_set(3)}
        datasets.DatasetDict(splits).save_to_disk(tmp_path / name)
        with pytest.raises(ValueError, match=f"test beside train; found {name}: save those"):
            load_task(tmp_path / name)
    datasets.DatasetDict(train=data_set(), training=data_set()).save_to_disk(tmp_path / "two")
    assert len(load_task(tmp_path / "two").train) == 10


def test_files_of_rows_beside_a_saved_data_set_are_named(tmp_path):
    datasets.DatasetDict(train=data_set(), val=data_set()).save_to_disk(tmp_path)
    (tmp_path / "test.csv").write_text("text,label\na,0\n")
    (tmp_path / "cache-1f.arrow").write_bytes(b"of the library")
    note = f"not used, because {tmp_path} is a data set of `save_to_disk`: test.csv"
    assert load_task(tmp_path).notes == [note]


def test_a_single_split_of_another_name_is_train(tmp_path):
    datasets.DatasetDict(everything=data_set()).save_to_disk(tmp_path)
    assert len(load_task(tmp_path).train) == 10


def test_several_splits_of_other_names_are_an_error(tmp_path):
    datasets.DatasetDict(one=data_set(), two=data_set()).save_to_disk(tmp_path)
    words = "expected splits named train, validation and test; found one, two"
    with pytest.raises(ValueError, match=words):
        load_task(tmp_path)


@pytest.mark.parametrize("content", ["", "[", "[]", '{"splits": 3}', "{}", '{"splits": ["no"]}'])
def test_a_damaged_index_is_one_line(tmp_path, content):
    (tmp_path / "dataset_dict.json").write_text(content)
    with pytest.raises(ValueError, match=rf"\A{tmp_path}/[^\n]*\Z"):
        load_task(tmp_path)


@pytest.mark.parametrize("content", ["", "{}", '{"_data_files": [{}]}', '{"_data_files": 3}'])
def test_a_damaged_state_is_one_line(tmp_path, content):
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(ValueError, match=rf"\A{tmp_path}/state\.json: [^\n]*\Z"):
        load_task(tmp_path)


def test_a_file_that_is_missing_or_damaged_is_one_line(tmp_path):
    data_set().save_to_disk(tmp_path)
    (path,) = tmp_path.glob("*.arrow")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"\A{path}: damaged or cut short: [^\n]*\Z"):
        load_task(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=rf"\A{path}: not found\Z"):
        load_task(tmp_path)


# hf:


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".json"])
def test_a_folder_is_read_as_the_library_reads_it(tmp_path, monkeypatch, suffix, capfd):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "mine"
    folder.mkdir()
    datasets.enable_progress_bars()
    for split, n in {"train": 9, "test": 3}.items():
        rows = datasets.Dataset.from_list([target(i) for i in range(n)])
        getattr(rows, f"to_{suffix[1:]}")(folder / f"{split}{suffix}")
    capfd.readouterr()
    task = load_task(f"hf:{folder}")
    assert [row["input"] for row in task.train] == [f"question {i}" for i in range(9)]
    assert (len(task.train), len(task.test), task.metric) == (9, 3, "exact_match")
    assert capfd.readouterr().err == "", "no bars where there is no terminal"
    assert not datasets.are_progress_bars_disabled(), "and as it was before"


def call_of(name, **arguments):
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}


QUESTION = {"role": "user", "content": "Weather in Paris?"}
ANSWER = {"role": "assistant", "content": "It is sunny."}
# Rows that do not fit into a table: the library stores their values as texts of JSON.
UNEVEN_ROWS = {
    "answers of several types": [
        {"question": "capital?", "answer": "Paris"},
        {"question": "sum?", "answer": 42},
        {"question": "true?", "answer": True},
        {"question": "quoted?", "answer": 'He said "no"'},
    ],
    "arguments of several tools": [
        {"messages": [QUESTION, call_of("weather", city="Paris", days=[1, 2]), ANSWER]},
        {"messages": [QUESTION, call_of("note", place={"name": "x"}, mood=None), ANSWER]},
    ],
    "messages with other keys": [
        {"messages": [QUESTION, {**ANSWER, "weight": 1}]},
        {"messages": [{**QUESTION, "name": "Ann"}, {**ANSWER, "thinking": "It shines."}]},
    ],
}


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="this release has no type for JSON")
@pytest.mark.parametrize("rows", UNEVEN_ROWS.values(), ids=UNEVEN_ROWS)
def test_values_that_the_library_keeps_as_json_are_the_values(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folders = {name: tmp_path / name for name in ("lines", "saved", "parquet")}
    for name in ("lines", "parquet"):
        folders[name].mkdir()
    (folders["lines"] / "train.jsonl").write_bytes(lines(*rows * 5))
    loaded = datasets.load_dataset(str(folders["lines"]))["train"]
    assert "Json" in str(loaded.features), "otherwise, this test shows nothing"
    loaded.save_to_disk(folders["saved"])
    loaded.to_parquet(folders["parquet"] / "train.parquet")
    expected = load_task(folders["lines"])
    for name in (f"hf:{folders['lines']}", folders["saved"], folders["parquet"]):
        task = load_task(name)
        for split in ("train", "validation", "test"):
            assert getattr(task, split) == getattr(expected, split)


def anli(folder):
    """Write a data set with the names of ANLI's splits, and one more. Return split -> its rows."""
    splits = {}
    for n, name in enumerate(("train_r1", "dev_r1", "test_r1", "train_r2", "dev_r2", "test")):
        splits[name] = data_set(4 + n, 10 * n)
        (folder / "data").mkdir(exist_ok=True)
        splits[name].to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    entries = [f"  - split: {name}\n    path: data/{name}-*\n" for name in splits]
    card = "---\nconfigs:\n- config_name: plain\n  data_files:\n"
    (folder / "README.md").write_text(f"{card}{''.join(entries)}---\n")
    return splits


def test_splits_are_chosen_by_their_names(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    splits = anli(tmp_path)
    task = load_task(f"hf:{tmp_path}:plain:train=train_r1+train_r2:validation=dev_r1")
    both = datasets.concatenate_datasets([splits["train_r1"], splits["train_r2"]])
    assert task.train == checked(both)
    assert task.validation == checked(splits["dev_r1"])
    assert task.test == checked(splits["test"]), "the usual name"
    assert task.name == f"{tmp_path.name}-plain-train_r1+train_r2-dev_r1"
    assert task.notes == [
        f"splits of hf:{tmp_path}:plain:train=train_r1+train_r2:validation=dev_r1 that are not "
        "used: test_r1, dev_r2"
    ]
    # A split that is chosen has no second place because of its name.
    task = load_task(f"hf:{tmp_path}:train=train_r1:validation=test")
    assert (task.validation, task.test) == (checked(splits["test"]), [])


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (":train=train_r3", "there is no split 'train_r3'; there are train_r1, .*, dev_r2, test"),
        (":train=train_r1+", "there is no split ''; there are train_r1, dev_r1, "),
        (":val=dev_r1", "expected :train=, :validation= or :test=, .*; found 'val=dev_r1'"),
        (":test=test_r1:test=test", "expected .* each at most once .*; found 'test=test'"),
        (":train=train_r1+train_r1", "the split 'train_r1' is chosen twice, expected it once"),
        (":train=train_r1:test=train_r1", "the split 'train_r1' is chosen twice, expected it once"),
        (":plain:train=train_r1:other", "expected hf:user/name or hf:user/name:config"),
    ],
)
def test_a_mistake_in_a_choice_of_splits_is_one_line(tmp_path, monkeypatch, choice, words):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    anli(tmp_path)
    with pytest.raises(ValueError, match=rf"\Ahf:{tmp_path}{re.escape(choice)}: {words}[^\n]*\Z"):
        load_task(f"hf:{tmp_path}{choice}")


def test_the_advice_for_other_names_of_splits_works(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split in ("train", "validation_matched", "validation_mismatched"):
        data_set(3).to_parquet(tmp_path / f"{split}.parquet")
    entries = [f"  - split: {path.stem}\n    path: {path.name}\n" for path in tmp_path.glob("*.p*")]
    (tmp_path / "README.md").write_text(
        f"---\nconfigs:\n- config_name: default\n  data_files:\n{''.join(entries)}---\n"
    )
    with pytest.raises(ValueError, match="expected splits named validation or test") as error:
        load_task(f"hf:{tmp_path}")
    _, _, advised = str(error.value).partition(": choose those that you mean, as in ")
    assert advised.startswith(f"hf:{tmp_path}:validation=validation_")
    assert len(load_task(advised).validation) == 3


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hf:", "hf:: expected hf:user/name or hf:user/name:config"),
        ("hf:{folder}:odd", "'odd' not found"),
        ("hf:{folder}/empty", "hf:.*/empty: "),
    ],
)
def test_what_the_library_refuses_is_one_line(tmp_path, monkeypatch, name, words):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "train.jsonl").write_bytes(lines(target(0)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=rf"\A[^\n]*{words}[^\n]*\Z"):
        load_task(name.format(folder=tmp_path))


def test_without_the_library_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"hf:user/name: .*pip install 'minia3\[data\]'\Z"):
        load_task("hf:user/name")


# The hub


def ask(cache, endpoint, *names, **more):
    """Load tasks in a child process. Return each as a list, or the message of a ValueError."""
    settings = {"HF_HOME": str(cache), "HF_ENDPOINT": endpoint, "HF_TOKEN": ""}
    inherited = {}
    for name, value in os.environ.items():
        if "PROXY" not in name.upper() and not name.startswith("HF_"):
            inherited[name] = value
    child = [sys.executable, "-c", textwrap.dedent(CHILD), *names]
    environment = inherited | settings | more
    done = subprocess.run(child, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "neither retries nor progress bars"
    return json.loads(done.stdout)


def as_parquet(rows):
    file = io.BytesIO()
    rows.to_parquet(file)
    return file.getvalue()


CARD = b"""---
configs:
- config_name: long
  data_files:
  - split: train
    path: long/*.parquet
- config_name: short
  data_files:
  - split: train
    path: short/*.parquet
---
"""


@pytest.mark.slow
def test_data_sets_of_the_hub_are_read_and_found_again_without_a_network(tmp_path):
    train = data_set(12)
    parts = {
        "README.md": b"# A data set\n",
        "data/train-00000-of-00002.parquet": as_parquet(train.select(range(6))),
        "data/train-00001-of-00002.parquet": as_parquet(train.select(range(6, 12))),
        "data/validation-00000-of-00001.parquet": as_parquet(data_set(3, 12)),
    }
    configs = {
        "README.md": CARD,
        "long/a.parquet": as_parquet(data_set(30)),
        "short/a.parquet": as_parquet(data_set(20)),
    }
    repositories = {"user/parts": parts, "user/configs": configs, "user/gated": None}
    with serving(repositories) as hub:
        names = ["hf:user/parts", "hf:user/configs:short", "hf:user/configs"]
        found = ask(tmp_path, hub.address, *names, "hf:user/gated", "hf:user/nowhere")
        endpoint = hub.address
    name, train_rows, validation_rows, test_rows, notes, n_files = found[0]
    assert (name, n_files, notes) == ("user/parts", 2, [])
    assert train_rows == checked(train)
    assert validation_rows == checked(data_set(3, 12))
    assert test_rows == []
    assert found[1][0] == "user/configs-short"
    assert len(found[1][1]) == 16
    assert "Config name is missing" in found[2]
    assert "gated" in found[3]
    assert "doesn't exist on the Hub or cannot be accessed" in found[4]

    again = ask(tmp_path, endpoint, names[0], "hf:user/other")  # the server is gone
    assert again[0] == found[0]
    assert again[1].startswith("hf:user/other: not in the cache, and the hub cannot be reached (")
    assert again[1].endswith("). Without a network, give the path of a folder")
    offline = ask(tmp_path, endpoint, names[0], "hf:user/other", HF_HUB_OFFLINE="1")
    assert offline[0] == found[0]
    assert "offline mode is enabled" in offline[1]
    for message in [*found[2:], again[1], offline[1]]:
        assert "\n" not in message
