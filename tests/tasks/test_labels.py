"""A label is a word, an integer or a boolean, and means one of the choices."""

import json
import math

import pytest
from task_files import lines

from minia3.tasks.column_flags import ColumnFlags, with_flags
from minia3.tasks.labels import (
    Labels,
    find_choice,
    find_label,
    find_user_label,
    label_text,
    name_labels,
    split_words,
    words_of,
)
from minia3.tasks.prompts import Prompt, render
from minia3.tasks.splits import load_task
from minia3.tasks.task import TaskSpec


def load(tmp_path, values, **flags):
    rows = [{"text": f"t{i}", "label": label} for i, label in enumerate(values)]
    (tmp_path / "rows.jsonl").write_bytes(lines(*rows))
    return load_task(tmp_path / "rows.jsonl", **flags)


def found_labels(task):
    rows = sorted([*task.train, *task.validation, *task.test], key=lambda row: row["idx"])
    return [row["label"] for row in rows]


@pytest.mark.parametrize(
    ("values", "asked", "words", "found"),
    [
        # words, in the order of their first appearance; case and white space make no difference
        (["neg", "pos", " Neg", "POS"], None, ("neg", "pos"), [0, 1, 0, 1]),
        (["b", "a", "none", "b"], None, ("b", "a", "none"), [0, 1, 2, 0]),
        (["pos", "neg", "pos"], "neg,pos", ("neg", "pos"), [1, 0, 1]),
        # integers, in their own order
        ([1, 0, 1], None, ("0", "1"), [1, 0, 1]),
        (["1", "0.0", 1.0], None, ("0", "1"), [1, 0, 1]),
        (["1.00", "0.00", "1.00"], "neg,pos", ("neg", "pos"), [1, 0, 1]),
        ([5, 1, 3], None, ("1", "3", "5"), [2, 0, 1]),
        ([1, 0, 1], "neg,pos", ("neg", "pos"), [1, 0, 1]),
        ([2, 0, 2], "a,b,c", ("a", "b", "c"), [2, 0, 2]),
        ([5, 1, 5], "bad,good", ("bad", "good"), [1, 0, 1]),
        ([-1, 1, -1], "bad,good", ("bad", "good"), [0, 1, 0]),
        # booleans, false first
        ([True, False, True], None, ("false", "true"), [1, 0, 1]),
        (["True", "False", "True"], None, ("False", "True"), [1, 0, 1]),
        ([True, True, True, False], "no,yes", ("no", "yes"), [1, 1, 1, 0]),
        # words beside integers are words
        (["1", "2", "many"], None, ("1", "2", "many"), [0, 1, 2]),
        # and so are codes with zeros in front
        (["02", "01", "02"], None, ("02", "01"), [0, 1, 0]),
        ([1, 0, 1], '["a, b", "c"]', ("a, b", "c"), [1, 0, 1]),
    ],
)
def test_the_labels_of_a_column_are_found(values, asked, words, found, tmp_path):
    task = load(tmp_path, values, labels=asked)
    assert task.prompts[0].choices == words
    assert found_labels(task) == found


@pytest.mark.parametrize(
    ("values", "asked"),
    [
        ([1, 2, 3], "1,2,3,4"),
        ([1, 1, 1], "1,2"),
        ([1, 0, 1], "1,0"),
        ([True, False, True], "true,false"),
        (["False", "True", "True"], "TRUE,FALSE,none"),
    ],
)
def test_words_that_are_the_labels_themselves_stand_for_themselves(values, asked, tmp_path):
    task = load(tmp_path, values, labels=asked)
    choices = task.prompts[0].choices
    assert choices == tuple(asked.split(","))
    picked = [choices[label] for label in found_labels(task)]
    assert [word.lower() for word in picked] == [str(value).lower() for value in values]


def test_a_label_that_only_test_has_can_be_named_as_the_message_says(tmp_path):
    for name, values in (("train", [1, 2, 3]), ("test", [4, 1])):
        rows = [{"text": "a", "label": value} for value in values]
        (tmp_path / f"{name}.jsonl").write_bytes(lines(*rows))
    with pytest.raises(ValueError, match="is 4, expected one of 1, 2, 3: add it to train, or to"):
        load_task(tmp_path)
    task = load_task(tmp_path, labels="1,2,3,4")
    assert [task.prompts[0].choices[row["label"]] for row in task.test] == ["4", "1"]


FIVE = ("one", "two", "three", "four", "five")


def test_words_that_could_count_from_0_or_from_1_are_refused():
    """A fifth word, for a 5 that only test has, shifted the other four by one."""
    assert name_labels([1, 2, 3, 4], "label", FIVE[:4]) == Labels(tuple("1234"), FIVE[:4])
    words = (
        r"--labels has 5 words, but 'label' has the labels 1, 2, 3, 4, so its first word may stand "
        r"for 0 or for 1: give 'labels' in a task file, with the integer of each word\Z"
    )
    with pytest.raises(ValueError, match=words):
        name_labels([4, 1, 2, 3], "label", FIVE)
    with pytest.raises(ValueError, match="may stand for 0 or for 1: give"):
        name_labels([2, 3], "label", FIVE)
    # If a 0 is there, or if the data set says what the integers stand for, nothing is unclear.
    assert name_labels([0, 1, 3], "label", FIVE).spelled == tuple("01234")
    assert name_labels([1, 2, 3], "label", FIVE, tuple("abcde")).words == FIVE
    assert name_labels([1, 1], "label", FIVE[:2]).spelled == ("0", "1")
    assert name_labels([1, 2], "label", ("1", "2", "3")).words == ("1", "2", "3")


def test_a_word_for_an_integer_that_only_test_has_is_given_in_a_task_file(tmp_path):
    """To add it to --labels, as the message said, changed what the other words stand for."""
    for name, values in (("train", [1, 2, 3, 4]), ("test", [5, 1])):
        rows = [{"text": "a", "label": value} for value in values]
        (tmp_path / f"{name}.jsonl").write_bytes(lines(*rows))
    words = r"is 5, expected one of 1, 2, 3, 4: add it to train, or to 'labels' in a task file\Z"
    with pytest.raises(ValueError, match=words):
        load_task(tmp_path, labels=",".join(FIVE[:4]))
    (tmp_path / "task.json").write_text(json.dumps({"labels": list("12345")}))
    task = load_task(tmp_path, labels=",".join(FIVE))
    assert [task.prompts[0].choices[row["label"]] for row in task.test] == ["five", "one"]


@pytest.mark.parametrize("asked", [("pos", "NEG"), ("NEG", "pos")])
def test_the_words_of_a_task_s_own_labels_stand_for_themselves(asked):
    assert words_of(("neg", "pos"), asked) == ("NEG", "pos")
    names = name_labels([1, 0], "label", asked, ("neg", "pos"))
    assert names == Labels(("0", "1"), ("NEG", "pos"))
    prompts = (Prompt("{text}", ("no", "yes")),)
    spec = with_flags(TaskSpec(prompts, labels=("neg", "pos")), ColumnFlags(labels=asked))
    assert (spec.labels, spec.prompts[0].choices) == (("neg", "pos"), ("NEG", "pos"))


NLI = ("entailment", "neutral", "contradiction")


@pytest.mark.parametrize(
    "asked", [("contradiction", "Entailment"), ("Entailment", "contradiction")]
)
def test_a_word_that_is_the_name_of_an_integer_stands_for_it_also_if_not_all_are_given(asked):
    """SNLI without its neutral rows: 0, entailment, became contradiction."""
    expected = Labels(("0", "2"), ("Entailment", "contradiction"))
    assert name_labels([0, 2, 0], "label", asked, NLI) == expected
    assert name_labels([2, 2], "label", asked, NLI) == expected
    for found, shown in (([0, 1, 2], r"neutral \(1\)"), ([0, 7, -1], "-1, 7")):
        words = f"^'label' has the labels {shown}, which --labels does not name: name them, or"
        with pytest.raises(ValueError, match=words):
            name_labels(found, "label", asked, NLI)


def test_a_word_that_is_no_name_takes_the_place_of_one_only_if_the_others_stand_at_theirs():
    asked = ("entailment", "unclear", "contradiction")
    assert name_labels([0, 1, 2], "label", asked, NLI) == Labels(("0", "1", "2"), asked)
    words = (
        r"^--labels has names of the integers in 'label', and other words: give only such names, "
        r"or a word for each of entailment, neutral, contradiction, in this order$"
    )
    for asked in (("contradiction", "unclear", "entailment"), ("entailment", "no"), ("no", *NLI)):
        with pytest.raises(ValueError, match=words):
            name_labels([0, 1], "label", asked, NLI)


def test_a_name_comes_before_a_label_that_is_spelled_like_it():
    """The words 0 and 1 were taken for the integers, and the names say otherwise."""
    assert name_labels([0, 1], "label", ("0", "1"), ("1", "0")) == Labels(("0", "1"), ("1", "0"))
    assert name_labels([0, 1], "label", ("1", "0"), ("no", "yes")).spelled == ("1", "0")


def test_what_is_correct_may_be_false(tmp_path):
    """As in a column `has_error`."""
    task = load(tmp_path, (True, False) * 2, labels="correct,incorrect")
    assert found_labels(task) == [1, 0, 1, 0]


@pytest.mark.parametrize("values", [(True, False), ("TRUE", "False")])
@pytest.mark.parametrize("asked", ["yes,no", "True,No", "Yes,false"])
def test_yes_does_not_stand_for_false(values, asked, tmp_path):
    """Each label was the other one: yes and no were the words of false and true."""
    yes, no = asked.split(",")
    words = f"{yes!r} would stand for false, and {no!r} for true: expected {no},{yes} .or a task fi"
    with pytest.raises(ValueError, match=words):
        load(tmp_path, values * 2, labels=asked)
    assert found_labels(load(tmp_path, values * 2, labels=f"{no},{yes}")) == [1, 0, 1, 0]
    choices = [yes, no]
    entry = {"files": "rows.jsonl", "choices": choices, "prompts": [{"text": "{text}"}]}
    (tmp_path / "task.json").write_text(json.dumps(entry))
    with pytest.raises(ValueError, match=words):
        load_task(tmp_path / "task.json")
    (tmp_path / "task.json").write_text(json.dumps({**entry, "labels": ["false", "true"]}))
    assert load_task(tmp_path / "task.json").prompts[0].choices == tuple(choices), "it was said"

    learned = TaskSpec((Prompt("{text}", ("bad", "good")),), labels=("false", "true"))
    with pytest.raises(ValueError, match=words):
        with_flags(learned, ColumnFlags(labels=asked))


def test_of_integers_either_may_be_the_yes(tmp_path):
    """In RTE, 0 is entailment."""
    assert found_labels(load(tmp_path, [1, 0, 1], labels="yes,no")) == [1, 0, 1]


def test_the_line_shows_the_words_and_what_they_stand_for(tmp_path):
    line = "reads text, picks label among "
    assert load(tmp_path, [0, 1, 0], labels="neg,pos").columns == line + "neg (0), pos (1)"
    assert load(tmp_path, [0, 1, 0]).columns.endswith("0, 1 (--labels WORD,WORD gives them words)")
    assert load(tmp_path, ["01", "02", "01"]).columns == line + "01, 02"
    assert load(tmp_path, ["x", "y", "x"]).columns == line + "x, y"
    many = [f"w{i % 25}" for i in range(250)]
    assert load(tmp_path, many).columns.endswith("w18, w19 and 5 more")


def test_a_data_set_s_own_names_are_the_words(tmp_path):
    assert name_labels([1, 0, -1], "label", (), ("neg", "pos")) == Labels(
        ("0", "1"), ("neg", "pos")
    )
    assert name_labels([1, 0], "label", ("a", "b"), ("neg", "pos")).words == ("a", "b")
    with pytest.raises(
        ValueError, match="--labels has 2 words, but 'label' has the labels 0, 1, 2"
    ):
        name_labels([0, 1, 2], "label", ("a", "b"), ("x", "y", "z"))
    # Many names are what the data set says.
    names = tuple(f"w{i}" for i in range(60))
    assert name_labels(range(60), "label", (), names).words == names


@pytest.mark.parametrize("values", [["1.0", "1.5", "2.00", "1"], [1.0, 1.5, "2.00", 1.0]])
def test_numbers_that_are_words_stay_as_the_file_spells_them(tmp_path, values):
    # The model read 1, 1.5 and 2, and `predict` wrote these as the file's spelling.
    task = load(tmp_path, values)
    assert task.prompts[0].choices == task.spec.labels == ("1.0", "1.5", "2.00")
    assert found_labels(task) == [0, 1, 2, 0]


@pytest.mark.slow
def test_the_names_of_a_class_label_are_the_words(tmp_path):
    datasets = pytest.importorskip("datasets")
    texts = {"text": [f"t{i}" for i in range(12)], "label": [i % 3 for i in range(12)]}
    names = datasets.ClassLabel(names=["bad", "so so", "good"])
    rows = datasets.Dataset.from_dict(texts).cast_column("label", names)
    rows.to_parquet(tmp_path / "rows.parquet")
    rows.save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "rows.parquet", tmp_path / "saved"):
        task = load_task(path)
        assert task.prompts[0].choices == ("bad", "so so", "good")
        assert found_labels(task) == texts["label"]
    written = load_task(tmp_path / "rows.parquet", input="{text}", target="{label}")
    note = "the model sees the integers of 'label', and not their names (bad, so so, good)"
    assert note in written.notes
    assert note not in task.notes
    named = load_task(tmp_path / "rows.parquet", labels="x,y,z")
    assert named.columns == "reads text, picks label among x (0), y (1), z (2)"


@pytest.mark.parametrize(
    ("values", "choices", "shown"),
    [
        (["0", "1"], ["no", "yes"], "no (0), yes (1)"),
        (["true", "false"], ["bad", "good"], "bad (false), good (true)"),
        (["no", "yes"], ["no", "yes"], "no, yes"),
    ],
)
def test_the_words_of_a_task_file_are_shown_beside_the_labels_that_they_stand_for(
    values, choices, shown, tmp_path
):
    """The line showed the labels alone, and so hid words in the wrong order."""
    entry = {"choices": choices, "prompts": [{"text": "{text}"}]}
    (tmp_path / "task.json").write_text(json.dumps(entry))
    rows = "".join(f"w{n},{values[n % 2]}\n" for n in range(6))
    (tmp_path / "train.csv").write_text(f"text,label\n{rows}")
    (tmp_path / "test.csv").write_text(f"text,label\n{rows}")
    assert load_task(tmp_path).columns == f"reads text, picks label among {shown}"


def test_a_label_that_train_has_not_is_an_error_with_its_line(tmp_path):
    for name, words in (("train", "xyx"), ("validation", "xz"), ("test", "y")):
        rows = [{"text": "a", "label": word} for word in words]
        (tmp_path / f"{name}.jsonl").write_bytes(lines(*rows))
    words = r"validation\.jsonl:2: 'label' is 'z', expected one of x, y: add it to train, or to"
    with pytest.raises(ValueError, match=words):
        load_task(tmp_path)
    assert load_task(tmp_path, labels="x,y,z").validation[1]["label"] == 2


def test_scores_that_are_no_labels_are_to_be_written(tmp_path):
    """A score that train has not was to be added to train, or to --labels."""
    for name, values in (("train", [0.5, 1, 0.5, 1]), ("test", [3.8])):
        rows = [{"sentence1": "a", "sentence2": "b", "label": value} for value in values]
        (tmp_path / f"{name}.jsonl").write_bytes(lines(*rows))
    words = r"expected one of 0.5, 1: if these are scores, write them with --target .{label}.\Z"
    with pytest.raises(ValueError, match=words):
        load_task(tmp_path)
    task = load_task(tmp_path, target="{label}")
    assert task.columns == "reads sentence1 and sentence2, writes label"
    assert render(task.prompts[0], task.test[0]).choices == ["3.8"]


@pytest.mark.parametrize(
    ("values", "is_noted"),
    [
        (["['joy', 'anger']", "[27]", "[]"], True),
        (["joy", "[27]", "[1]"], False),
        (["[joy", "x]", "[y"], False),
    ],
)
def test_labels_that_are_the_texts_of_lists_are_noted(values, is_noted, tmp_path):
    """pandas writes them into a .csv, and each list was learned as a label, without a word."""
    rows = "".join(f'w{i},"{value}"\n' for i, value in enumerate(values))
    (tmp_path / "rows.csv").write_text(f"text,label\n{rows}")
    notes = [note for note in load_task(tmp_path / "rows.csv").notes if "of a list" in note]
    expected = (
        "each label is the text of a list, such as \"['joy', 'anger']\", and is learned as a "
        'whole: in a .jsonl file, --target "{label[0]}" takes the first item'
    )
    assert notes == ([expected] if is_noted else [])


def test_words_for_words_are_refused_once_and_not_in_each_row(tmp_path):
    # "add it to train, or to --labels" stood behind each row, and the words are in train.
    words = (
        r"rows\.jsonl: 'label' has the labels e, n, c, and --labels names none of them: .* which "
        "word stands for which, with 'labels', 'choices' and 'prompts'"
    )
    with pytest.raises(ValueError, match=rf"\A[^;\n]*{words}\Z"):
        load(tmp_path, ["e", "n", "c"] * 2, labels="entailment,neutral,contradiction")
    entry = {"prompts": [{"text": "{text}"}], "labels": ["e", "n", "c"]}
    entry["choices"] = ["entailment", "neutral", "contradiction"]
    (tmp_path / "task.json").write_text(json.dumps({"files": "rows.jsonl", **entry}))
    task = load_task(tmp_path / "task.json")
    assert task.prompts[0].choices == tuple(entry["choices"])
    assert found_labels(task) == [0, 1, 2] * 2
    # If one of them is a label, the others may be labels that only test has.
    with pytest.raises(
        ValueError, match=r"rows\.jsonl:2: 'label' is 'n', expected one of e, x: add"
    ):
        load(tmp_path, ["e", "n", "c"], labels="e,x")
    # A word that stands for no label does not count.
    assert name_labels(["-", "None", None], "label", ("x", "y")).words == ("x", "y")


def test_a_label_that_an_adapter_has_not_learned_is_not_to_be_added_to_train(tmp_path):
    """`--eval-only` has no train, and another train would not change what was learned."""
    learned = load(tmp_path, ["x", "y", "x"], input="{text}?").spec
    (tmp_path / "rows").mkdir()
    rows = [{"text": "a", "label": word} for word in "xz"]
    (tmp_path / "rows" / "test.jsonl").write_bytes(lines(*rows))
    words = (
        r"test\.jsonl:2: 'label' is 'z', expected one of x, y: leave the row out, or give --input"
    )
    with pytest.raises(ValueError, match=words):
        load_task(tmp_path / "rows", like=learned)
    task = load_task(tmp_path / "rows", like=learned, input="{text}?", labels="x,y,z")
    assert task.prompts == (Prompt("{text}?", ("x", "y", "z")),)
    assert [row["label"] for row in task.test] == [0, 2]


@pytest.mark.parametrize(("values", "word"), [(["x", "X", "x"], "x"), ([3, 3, 3], "3")])
def test_a_file_with_one_label_has_one_choice(values, word, tmp_path):
    """Training on it says that there is nothing to pick: see doubts.py."""
    task = load(tmp_path, values)
    assert task.prompts[0].choices == (word,)
    assert {row["label"] for row in task.train} == {0}


def test_test_rows_may_hide_their_labels_and_others_may_not(tmp_path):
    rows = [{"text": "a", "label": word} for word in "xyxy"]
    (tmp_path / "train.jsonl").write_bytes(lines(*rows))
    (tmp_path / "validation.jsonl").write_bytes(lines(*rows))
    hidden = [{"text": "a"}, *({"text": "a", "label": value} for value in (None, -1, "", "y"))]
    (tmp_path / "test.jsonl").write_bytes(lines(*hidden))
    task = load_task(tmp_path)
    assert [row["label"] for row in task.test] == [-1, -1, -1, -1, 1]
    assert task.evaluation[0] == "validation"
    (tmp_path / "validation.jsonl").write_bytes(lines(*hidden))
    with pytest.raises(ValueError, match=r"validation\.jsonl:1: 'label' has no value"):
        load_task(tmp_path)


@pytest.mark.parametrize("prefix", ["w", ""], ids=["words", "integers"])
def test_many_labels_are_a_note_and_labels_that_hardly_repeat_an_error(prefix, tmp_path):
    many = [f"{prefix}{i % 60}" for i in range(300)]
    for n_rows in (300, 90):  # of each label five, or of half of them two and of the others one
        notes = load(tmp_path, many[:n_rows]).notes
        assert any(note.startswith("60 labels, and each row is scored with all") for note in notes)
    words = (
        "'label' has 60 different labels in 89 rows, which is probably not a classification: "
        'to write them, give --target "{label}"'
    )
    with pytest.raises(ValueError, match=words):
        load(tmp_path, many[:89])
    with pytest.raises(ValueError, match="60 different labels in 60 rows"):
        load(tmp_path, many[:60])
    task = load(tmp_path, many[:89], target="{label}")
    assert (task.answer, task.metric) == ("target", "exact_match")
    assert render(task.prompts[0], task.train[5]).choices == [many[task.train[5]["idx"]]]
    named = ",".join(f"{prefix}{i}" for i in range(60))
    assert len(load(tmp_path, many[:89], labels=named).prompts[0].choices) == 60


def test_a_few_rows_of_each_of_many_labels_are_a_classification(tmp_path):
    """Banking77 with four rows of each of its 77 intents was refused."""
    for n_each in (4, 2):
        task = load(tmp_path, [f"w{i % 77}" for i in range(77 * n_each)])
        assert len(task.prompts[0].choices) == 77
    # A column with some frequent texts among many single ones is one, if it is long enough.
    tail = [f"w{i}" for i in range(60)]
    assert len(load(tmp_path, [*tail, *["x"] * 245]).prompts[0].choices) == 61
    with pytest.raises(ValueError, match="61 different labels in 304 rows"):
        load(tmp_path, [*tail, *["x"] * 244])


def test_labels_are_not_to_be_written_if_the_column_does_not_have_their_words(tmp_path):
    many = [i % 60 for i in range(300)]
    advice = ': if they are texts to write, give --target "{label}"'
    note = "60 labels, and each row is scored with all of them"
    assert note + advice in load(tmp_path, many).notes
    assert note in load(tmp_path, many, labels=",".join(f"w{i}" for i in range(60))).notes


@pytest.mark.parametrize(
    ("values", "flags", "words"),
    [
        ([None, "", None], {}, "'label' is empty in every row, expected labels"),
        ([None, ["x", "y"], []], {}, r"'label' is \['x', 'y'\], expected a label: a word, a"),
        ([{"0": "x"}] * 3, {}, r"'label' is {'0': 'x'}, expected a label: a word, a number"),
        ([0, 1, 2], {"labels": "a,b"}, r"'label' has the labels 0, 1, 2: .* words as labels\Z"),
        ([-1, 0, 1], {"labels": "a,b"}, "-1, 0, 1: .*; if -1 stands for no label, leave these ro"),
        ([True, False, True], {"labels": "a,b,c"}, "--labels has 3 words, but .* false, true"),
        (["x", "y", ["x", "y"]], {}, r":3: 'label' is \['x', 'y'\], expected a label: a word, a"),
    ],
)
def test_labels_that_cannot_be_told_are_an_error(values, flags, words, tmp_path):
    with pytest.raises(ValueError, match=words) as error:
        load(tmp_path, values, **flags)
    assert str(error.value).startswith(f"{tmp_path}/")  # a grid has several files


def test_a_list_as_a_label_is_answered_with_how_to_take_its_first_item(tmp_path):
    """doccano writes one label as a list, too."""
    rows = [["pos"], ["neg"], ["neg", "pos"]]
    advice = r'true or false; --target "\{label\[0\]\}" takes the first of a list, with --labels\Z'
    with pytest.raises(ValueError, match=advice):
        load(tmp_path, rows)
    task = load(tmp_path, rows, input="{text}", target="{label[0]}", labels="neg,pos")
    assert found_labels(task) == [1, 0, 0]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((1, "1"), (1.0, "1"), ("1.0", "1"), ("2.00", "2"), (1.5, "1.5"), ("1.05", "1.05")),
        *((" a ", "a"), (True, "true"), ("", None)),
        *((-0.0, "0"), ("-0.0", "0"), ("-0", "0"), (-1.0, "-1"), (-0.5, "-0.5")),
    ],
)
def test_a_label_is_a_text(value, text):
    assert label_text(value) == text
    assert label_text(math.nan) is label_text(None) is None


@pytest.mark.parametrize("value", [-1, "-1", None, "", "nan"])
def test_a_row_to_train_on_that_hides_its_label_is_to_be_left_out(value):
    message = r"expected one of 0, 1: leave the row out if it has no label\Z"
    with pytest.raises(ValueError, match=message):
        find_user_label(value, ("0", "1"), Prompt("{text}", ("no", "yes")), "label", False)


@pytest.mark.parametrize("value", [1, 1.0, "1", "1.0"])
def test_a_task_file_may_spell_its_labels_like_the_rows_or_shorter(value):
    prompt = Prompt("{text}", ("no", "yes"))
    for labels in (("0", "1"), ("0.0", "1.0")):
        assert find_user_label(value, labels, prompt, "label", may_be_hidden=False) == 1
    numbers = Prompt("{text}", ("0.0", "1.0"))
    assert find_user_label(value, ("a", "b"), numbers, "label", may_be_hidden=False) == 1


def test_an_empty_label_of_a_task_file_is_not_that_of_rows_without_a_label():
    prompt = Prompt("{text}", ("no", "yes"))
    assert find_user_label(None, ("", "1"), prompt, "label", may_be_hidden=True) == -1


def test_accents_are_the_same_in_both_of_their_forms(tmp_path):
    """An é is one character, or an e and U+0301. Both look the same, so they are the same label."""
    task = load(tmp_path, ["caf\u00e9", "bar", "cafe\u0301", "CAFE\u0301"])
    assert task.columns == "reads text, picks label among caf\u00e9, bar"
    assert found_labels(task) == [0, 1, 0, 0]
    task = load(tmp_path, ["cafe\u0301", "bar", "bar"], labels="bar,caf\u00e9")
    assert found_labels(task) == [1, 0, 0]
    assert find_choice("cafe\u0301", ["bar", "Caf\u00e9"], "label", False) == 1


def test_a_choice_is_found_by_its_own_spelling_first():
    assert find_choice("us", ["US", "us"], "label", may_be_hidden=False) == 1
    assert find_choice("Us", ["US", "us"], "label", may_be_hidden=False) == 0
    assert find_choice(True, ["false", "true"], "label", may_be_hidden=False) == 1
    assert find_choice("-1", ["a"], "label", may_be_hidden=True) == -1
    assert find_choice("02", ["02", "01"], "label", may_be_hidden=False) == 0
    assert split_words(" a ,b") == ("a", "b")


@pytest.mark.parametrize("labels", [["a"], ["a", "A"], ("a", " "), [0, 1], []])
def test_words_that_python_gives_are_checked_like_those_of_the_flag(labels, tmp_path):
    with pytest.raises(ValueError, match=r"--labels is .*, expected two words or more that differ"):
        load(tmp_path, [0, 1, 0], labels=labels)


def test_a_text_that_is_a_position_and_another_choice_is_refused():
    choices = ["2", "3", "None of these"]
    message = "'label' is '2', the position of 'None of these', and also the choice at position 0: "
    for value in ("2", " 2.0"):
        with pytest.raises(ValueError, match=f"{message}give the position .* as a number"):
            find_choice(value, choices, "label", may_be_hidden=False)
    # What has one meaning is found.
    for value, expected in ((2, 2), (0, 0), ("0", 0), ("3", 1), ("None of these", 2)):
        assert find_choice(value, choices, "label", may_be_hidden=False) == expected
    assert find_choice("1", ["0", "1", "many"], "label", may_be_hidden=False) == 1
    assert find_choice("2", ["2", "3", "4"], "label", may_be_hidden=False) == 2, "all are numbers"


@pytest.mark.parametrize("value", ["None", "NULL", "nan", "-1", "", None])
def test_a_hidden_label_is_hidden_whatever_its_case(value):
    assert find_choice(value, ["a", "b"], "label", may_be_hidden=True) == -1
    assert find_choice("None", ["a", "none"], "label", may_be_hidden=True) == 1


@pytest.mark.parametrize("choices", [["3", "4"], ["3.0", "4.0"]])
def test_if_choices_are_numbers_the_message_does_not_ask_for_them(choices):
    message = r"is '{}', expected one of 0, 1, the position of the right choice, because .*"
    with pytest.raises(ValueError, match=message.format(choices[1])) as error:
        find_choice(choices[1], choices, "label", may_be_hidden=False)
    assert "or one of the choices" not in str(error.value)
    assert find_choice("1", choices, "label", may_be_hidden=False) == 1


@pytest.mark.parametrize(
    ("labels", "doubtful"),
    [
        (["neutral", "-", "entailment"], "'-'"),  # SNLI
        ([0, -1, 1, 2], "'-1'"),  # SNLI on the hub
        (["pos", "NaN", "n/a"], "'NaN', 'n/a'"),
        (["pos", "None"], "'None'"),
        ([-1, 1], ""),
        (["favor", "against"], ""),
    ],
)
def test_labels_that_may_stand_for_no_label_are_named(labels, doubtful, tmp_path):
    """They were learned like others. With the right labels, test rows with them were an error that
    advised to add them to train.
    """
    rows = [{"text": f"a {i}", "label": label} for i, label in enumerate(labels)] * 3
    path = tmp_path / "train.jsonl"
    path.write_bytes(lines(*rows))
    notes = [note for note in load_task(path).notes if note.startswith("labels that may")]
    expected = f"labels that may stand for no label: {doubtful}; leave their rows out if that is so"
    assert notes == ([expected] if doubtful else [])
    given = ",".join(map(str, labels))
    assert not any("may stand for" in note for note in load_task(path, labels=given).notes)


def test_a_dash_is_no_label_unless_train_has_it(tmp_path):
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
    (tmp_path / "train.jsonl").write_bytes(lines(*rows))
    (tmp_path / "test.jsonl").write_bytes(lines(*rows, {"text": "c", "label": "-"}))
    with pytest.raises(ValueError, match=r"label all rows of the test file \(1 of 3 have no label"):
        load_task(tmp_path)
    (tmp_path / "dev.jsonl").write_bytes(lines(*rows, {"text": "c", "label": "-"}))
    with pytest.raises(ValueError, match=r"dev.jsonl:3: 'label' is '-', .*: leave the row out"):
        load_task(tmp_path)


def test_a_label_that_looks_like_no_label_is_one_if_the_task_has_it():
    prompt = Prompt("{text}", ("worse", "better"))
    assert find_user_label(-1, ("-1", "1"), prompt, "label", may_be_hidden=True) == 0


def test_a_boolean_is_not_the_index_of_a_known_task_s_label():
    labels = ("entailment", "not_entailment")
    assert find_label(1, labels, "label", may_be_hidden=False) == 1
    with pytest.raises(ValueError, match="'label' is True, expected one of entailment, not_ent"):
        find_label(True, labels, "label", may_be_hidden=False)
