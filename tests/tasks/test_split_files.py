"""A folder has the files of its splits, a file that is almost a split is named, and so is the
nearest path to one that does not exist.
"""

import os
import re
from pathlib import Path

import pytest
from task_files import lines, target

from minia3.tasks.row_files import SUFFIXES
from minia3.tasks.split_files import (
    check_names,
    describe_missing_path,
    find_split_files,
    looks_like_path,
    resembled_split,
    short_name,
)
from minia3.tasks.splits import load_task


def fill(folder, *names):
    """Make files of three rows, which are different in each file."""
    folder.mkdir(parents=True, exist_ok=True)
    for k, name in enumerate(names):
        rows = (target(3 * k + n) for n in range(3))
        (folder / name).write_bytes(lines(*rows))
    return folder


def found(folder):
    """Return the names of the files of each split, and the notes."""
    files, notes = find_split_files(folder)
    return {split: [path.name for path in paths] for split, paths in files.items()}, notes


def refused(folder):
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as error:
        find_split_files(folder)
    return str(error.value)


# Names


@pytest.mark.parametrize("validation", ["validation", "val", "dev", "valid", "Validation", "DEV"])
@pytest.mark.parametrize("suffix", [*SUFFIXES, ".jsonl.gz", ".csv.gz", ".JSONL"])
def test_files_are_splits_by_their_names(tmp_path, validation, suffix):
    fill(tmp_path, f"train{suffix}", f"{validation}.csv", "test.json")
    expected = {
        "train": [f"train{suffix}"],
        "validation": [f"{validation}.csv"],
        "test": ["test.json"],
    }
    assert found(tmp_path) == (expected, [])


def test_the_parts_of_a_split_are_read_in_order(tmp_path):
    names = [f"train-0000{k}-of-00003.jsonl" for k in range(3)]
    fill(tmp_path, *names, "test-00000-of-00001.jsonl")
    task = load_task(tmp_path)
    assert [row["input"] for row in task.train] == [f"question {n}" for n in range(9)]
    assert [row["idx"] for row in task.train] == list(range(9))
    assert list(task.checksums) == [*names, "test-00000-of-00001.jsonl"]


def test_the_parts_of_a_split_may_have_hashes(tmp_path):
    # As `push_to_hub` named them until 2023. They were not known as parts of a split.
    names = [
        "train-00000-of-00002-f42a775f407cee45.jsonl",
        "train-00001-of-00002-042a775f407cee45.jsonl",
    ]
    fill(tmp_path, *names, "test-00000-of-00001-b42a775f407cee45.jsonl")
    task = load_task(tmp_path)
    assert [row["input"] for row in task.train] == [f"question {n}" for n in range(6)]
    assert len(task.test) == 3
    (tmp_path / names[1]).rename(tmp_path / "train-00000-of-00002-042a775f407cee45.jsonl")
    assert "has a part of train twice, from two uploads: train-00000-of-00002-0" in refused(
        tmp_path
    )


def test_a_bad_row_of_a_part_is_reported_with_the_name_of_the_part(tmp_path):
    fill(tmp_path, "train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "val.jsonl")
    (tmp_path / "train-00001-of-00002.jsonl").write_bytes(lines(target(0), {"input": "a"}))
    with pytest.raises(ValueError, match=r"train-00001-of-00002\.jsonl:2: "):
        load_task(tmp_path)


def test_a_part_that_is_missing_is_an_error(tmp_path):
    fill(tmp_path, "train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl")
    assert refused(tmp_path) == (
        f"{tmp_path}: expected 3 files of train, found 2: "
        "train-00000-of-00003.jsonl, train-00002-of-00003.jsonl"
    )


@pytest.mark.parametrize(
    "names",
    [
        ("train.csv", "train.jsonl"),
        ("train.jsonl", "train.jsonl.gz"),
        ("dev.jsonl", "val.jsonl"),
        ("train-00000-of-00001.jsonl", "train.jsonl"),
        ("train-00000-of-00001.jsonl", "train-00000-of-00002.jsonl"),
    ],
)
def test_two_files_for_one_split_are_an_error(tmp_path, names):
    fill(tmp_path, *names)
    assert f"has {names[0]} and {names[1]}: keep one of them as " in refused(tmp_path)


# Almost a split


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("tests.jsonl", "test"),
        ("test_data.csv", "test"),
        ("Testing.csv", "test"),
        ("my-test.jsonl", "test"),
        ("test2.jsonl", "test"),
        ("validatoin.csv", "validation"),
        ("dev_set.csv", "validation"),
        ("eval.jsonl", "validation"),
        ("evaluation.jsonl", "validation"),
        ("validate.csv", "validation"),
        ("devtest.csv", "test"),
        ("holdout.csv", "test"),
        ("train_data.csv", "train"),
        ("training.jsonl", "train"),
        ("train.0.jsonl", "train"),
        ("test.jsonl.bak", "test"),
        ("latest.jsonl", None),
        ("device.csv", None),
        ("labels.jsonl", None),
        ("README.md", None),
        ("constraints.csv", None),
    ],
)
def test_a_name_may_resemble_a_split(tmp_path, name, split):
    assert resembled_split(tmp_path / name) == split


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("tests.jsonl", "name it test.jsonl"),
        ("test_data.csv.gz", "name it test.csv.gz"),
        ("test.xlsx", "save the sheet as .csv, in UTF-8"),
        ("test.zip", "unpack it"),
        ("test", "if it holds rows, name it test.csv, or as its format is called"),
        ("test.dat", "if it holds rows, name it test.csv, or as its format is called"),
    ],
)
def test_a_file_that_is_almost_the_missing_split_is_an_error(tmp_path, name, advice):
    fill(tmp_path, "train.jsonl", "val.jsonl", name)
    assert refused(tmp_path) == (
        f"{tmp_path / name}: not the name of a split, and there is no file of test: "
        f"{advice}, or move it elsewhere"
    )


@pytest.mark.parametrize("ending", [".ipynb", ".py", ".sh", ".md", ".log", ".PNG", ".yaml"])
def test_a_file_that_cannot_hold_rows_is_no_split_whatever_its_name(tmp_path, ending):
    """A notebook that tests a model stopped the run."""
    fill(tmp_path, "train.jsonl", f"test{ending}", f"train_model{ending}")
    task = load_task(tmp_path)
    assert task.is_divided
    assert not any("not used" in note for note in task.notes)


def test_a_folder_that_is_almost_the_missing_split_is_an_error(tmp_path):
    fill(tmp_path, "train.jsonl", "val.jsonl")
    (tmp_path / "test").mkdir()
    assert refused(tmp_path) == (
        f"{tmp_path / 'test'}: not the name of a split, and there is no file of test: "
        "put its rows into a file test.csv, or move it elsewhere"
    )


def test_a_file_that_is_almost_a_split_that_is_there_is_named_in_a_note(tmp_path):
    fill(tmp_path, "train.jsonl", "val.jsonl", "test.jsonl", "train_data.csv", "tests.json", "x.md")
    task = load_task(tmp_path)
    assert task.notes == ["not used, because not named like a split: tests.json, train_data.csv"]
    (tmp_path / "train2").mkdir()  # which may hold rows, unlike a folder of any other name
    (tmp_path / "images").mkdir()
    assert load_task(tmp_path).notes[0].endswith(": tests.json, train2, train_data.csv")
    assert (len(task.train), len(task.validation), len(task.test)) == (3, 3, 3)


def test_every_file_of_rows_that_is_not_used_is_named(tmp_path):
    fill(
        tmp_path, "train.jsonl", *(f"{letter}.jsonl" for letter in "abcdefg"), "task.json", ".a.csv"
    )
    (note,) = found(tmp_path)[1]
    assert note.endswith(": a.jsonl, b.jsonl, c.jsonl, d.jsonl, e.jsonl and 2 more")


@pytest.mark.parametrize("name", ["extra.jsonl.zst", "extra.ndjson", "extra.xlsx", "extra.tsv.gz"])
def test_a_file_that_may_hold_rows_in_another_format_is_named(tmp_path, name):
    fill(tmp_path, "train.jsonl", "val.jsonl", "test.jsonl", name, "LICENSE.txt", "more.png")
    assert found(tmp_path)[1] == [f"not used, because not named like a split: {name}"]


def test_a_folder_that_has_files_of_rows_is_named(tmp_path):
    fill(tmp_path, "train.jsonl", "val.jsonl", "test.jsonl")
    fill(tmp_path / "more", "a.csv")
    fill(tmp_path / "packed", "a.zip")
    fill(tmp_path / "pictures", "a.png", "dataset_info.json", ".b.csv", "c.txt")
    (tmp_path / "empty").mkdir()
    assert found(tmp_path)[1] == ["not used, because not named like a split: more, packed"]


# Folders without splits


def test_an_empty_folder_is_called_empty(tmp_path):
    message = refused(tmp_path)
    assert message.startswith(f"{tmp_path}: the folder is empty; expected files named train, ")
    (tmp_path / ".hidden").touch()
    assert refused(tmp_path) == message


def test_a_folder_of_other_files_names_them(tmp_path):
    fill(tmp_path, "a.csv", "b.md")
    assert refused(tmp_path).endswith("found a.csv, b.md; a single file is given by its path")
    (tmp_path / "a.csv").unlink()
    assert refused(tmp_path).endswith("found b.md")


def test_a_folder_inside_that_has_the_splits_is_named(tmp_path):
    fill(tmp_path / "data", "train-00000-of-00001.jsonl")
    fill(tmp_path, "README.md")
    assert refused(tmp_path).endswith(f"found README.md, data; {tmp_path / 'data'} has such files")


def test_folders_that_are_named_like_splits_are_called_folders(tmp_path):
    """The message expected files named train and test, and had found train and test."""
    fill(tmp_path / "Train", "a.jsonl")
    fill(tmp_path / "test", "b.jsonl")
    message = refused(tmp_path)
    end = "found Train, test; Train is a folder: put its rows into a file train.csv"
    assert message.endswith(end)
    fill(tmp_path / "Train", "train.jsonl")
    assert refused(tmp_path) == message


def test_a_folder_that_cannot_be_listed_is_one_line(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "iterdir", refuse)
    assert refused(tmp_path) == f"{tmp_path}: Permission denied"


# Paths that do not exist


@pytest.mark.parametrize(
    ("name", "is_path"),
    [
        ("rows.jsonl", True),
        ("rows.CSV.gz", True),
        ("sheet.xlsx", True),
        ("a/b", True),
        ("./a", True),
        ("rte", False),
        ("mine.v1", False),
        ("", False),
    ],
)
def test_a_path_has_a_slash_or_the_suffix_of_a_file_with_data(name, is_path):
    assert looks_like_path(name) is is_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("row.jsonl", "row.jsonl: no such file or folder; did you mean rows.jsonl?"),
        ("./row.jsonl", "./row.jsonl: no such file or folder; did you mean rows.jsonl?"),
        ("zzz.csv", "zzz.csv: no such file or folder"),
        ("my_dta/train.csv", "because there is no my_dta; did you mean my_data/train.csv?"),
        ("my_dta/trai.csv", "because there is no my_dta; did you mean my_data?"),
        ("my_data/trian.csv", "no such file or folder; did you mean my_data/train.csv?"),
        ("no/such/folder/x.csv", "no such file or folder, because there is no no"),
        ("rows.jsonl/x", "rows.jsonl/x: no such file or folder"),
        ("user/name", "because there is no user (a data set of the hub is hf:user/name)"),
    ],
)
def test_the_nearest_path_that_exists_is_named_and_no_known_task(
    tmp_path, monkeypatch, name, message
):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path, "rows.jsonl")
    fill(tmp_path / "my_data", "train.csv")
    assert describe_missing_path(name).endswith(message)
    with pytest.raises(ValueError, match="no such file or folder") as error:
        load_task(name)
    assert "Known tasks" not in str(error.value)
    assert str(error.value) == describe_missing_path(name)


def test_each_wrong_name_of_several_is_named(tmp_path, monkeypatch):
    """The message about --task missing,x.jsonl was about "missing" alone."""
    monkeypatch.chdir(tmp_path)
    fill(tmp_path, "rows.csv")
    words = (
        r"^2 of the 3 tasks of --task cannot be found \(commas divide them\): 'missing' is not a "
        r"known task, .*; x.jsonl: no such file or folder$"
    )
    with pytest.raises(ValueError, match=words):
        check_names(["missing", "rows.csv", "x.jsonl"])
    check_names(["rte", "rows.csv", "hf:user/name"])
    check_names(["missing"])  # which is an error of its own


def test_an_absolute_path_that_leads_nowhere_ends_at_the_root():
    name = os.path.join(os.path.abspath(os.sep), "no-such-folder", "a", "b.csv")
    assert "because there is no" in describe_missing_path(name)


def test_a_name_without_a_slash_may_be_a_folder_with_a_typo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "reviews", "train.csv")
    with pytest.raises(ValueError, match="did you mean 'reviews'"):
        load_task("reviws")
    with pytest.raises(ValueError, match="did you mean 'raft/overruling'"):
        load_task("raft/overrulin")


@pytest.mark.parametrize("name", ["rows.csv", "rows", "rows/train.csv", "../here/rows"])
def test_a_broken_link_is_named_as_such_and_not_as_the_nearest_name(tmp_path, monkeypatch, name):
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    link = Path(name.removesuffix("/train.csv"))
    link.symlink_to("/not/mounted")
    message = f"{name}: no such file or folder, because {link} is a broken link to /not/mounted"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load_task(name)


def test_a_broken_link_with_the_name_of_a_split_is_an_error(tmp_path):
    fill(tmp_path, "test.csv")
    (tmp_path / "train.csv").symlink_to("../blobs/1")
    with pytest.raises(ValueError, match=r"train\.csv: a broken link to \.\./blobs/1$"):
        find_split_files(tmp_path)


def test_a_pattern_is_named_as_such(tmp_path):
    fill(tmp_path, "a.jsonl", "b.jsonl")
    message = describe_missing_path(f"{tmp_path}/*.jsonl")
    assert "* is no pattern here: give a folder whose files are named like splits" in message


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("clients/reviews.csv.gz", "reviews"),
        ("hf:user/name:config", "user/name-config"),
        ("hf:/home/me/clients/acme", "acme"),
    ],
)
def test_a_task_has_a_name_without_its_place(name, expected):
    assert short_name(name) == expected
