"""Which rows a run reports on."""

import pytest

from minia3.tasks.task import Task


def make_task(validation, test):
    return Task("t", [], validation, test, "accuracy", {}, [])


@pytest.mark.parametrize(
    ("labels", "split"), [([0, 1], "test"), ([0, -1], "validation"), ([], "validation")]
)
def test_a_run_reports_on_test_only_if_all_its_rows_are_labeled(labels, split):
    test = [{"label": label} for label in labels]
    validation = [{"label": 0}]
    task = make_task(validation, test)
    assert task.evaluation == (split, {"test": test, "validation": validation}[split])


@pytest.mark.parametrize("train", [[], [{"label": 0}]])
@pytest.mark.parametrize("test", [[], [{"label": 0}, {"label": -1}]])
def test_a_task_with_nothing_to_report_on_says_what_to_add(test, train):
    task = make_task([], test)._replace(train=train)
    words = (
        "t: no labeled rows to report on: add a validation file, or label all rows of the test "
        rf"file \({len(test) // 2} of {len(test)} have no label\)"
    )
    words += ", or give the file of train alone, which" if train else r"\Z"
    with pytest.raises(ValueError, match=words):
        _ = task.evaluation
    with pytest.raises(ValueError, match=words):
        task.check_evaluation()
