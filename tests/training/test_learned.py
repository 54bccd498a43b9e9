"""What was learned is the task.json of the adapter, and without an adapter that of the model."""

import pytest
from running import train

from minia3.tasks.task import TaskSpec
from minia3.tasks.task_file import write_task_file
from minia3.training.grid import learned_task
from minia3.training.learned import learned_tasks


def test_an_adapter_comes_before_the_model_and_a_name_has_learned_nothing(tmp_path):
    for name in ("model", "adapter"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
        write_task_file(tmp_path / name, [("", TaskSpec(chat_template=name))])
    (of_model,) = learned_tasks(tmp_path / "model").values()
    (of_adapter,) = learned_tasks(tmp_path / "model", tmp_path / "adapter").values()
    assert (of_model.chat_template, of_adapter.chat_template) == ("model", "adapter")
    assert learned_tasks("t5-base") == {}
    # The task.json beside a file is the user's, who keeps models and rows in one folder.
    (tmp_path / "model" / "model.gguf").write_text("")
    assert learned_tasks(tmp_path / "model" / "model.gguf") == {}
    # A killed process has written this folder, and not yet moved the files to their places.
    (tmp_path / "killed").mkdir()
    (tmp_path / "model").rename(tmp_path / "killed" / ".written")
    (finished,) = learned_tasks(tmp_path / "killed").values()
    assert finished.chat_template == "model"
    with pytest.raises(ValueError, match="nowhere: not found"):
        learned_tasks(tmp_path / "killed", "nowhere")


def test_what_was_learned_counts_for_rows_that_are_evaluated_and_not_trained_on(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    spec = TaskSpec(label_field="mood")
    write_task_file(tmp_path, [("", spec)])
    config = train.Config(adapter=str(tmp_path), eval_only=True)
    assert learned_task("rows.csv", config).label_field == "mood"
    assert learned_task("rows.csv", train.Config(adapter=str(tmp_path))) is None
    write_task_file(tmp_path, [("a", TaskSpec()), ("rows", spec)])
    assert learned_task("data/rows.csv", config).label_field == "mood"
    assert learned_task("other.csv", config) is None
