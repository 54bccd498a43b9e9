"""What an adapter has learned, or a model that was trained or merged as a whole."""

from pathlib import Path

from minia3.checkpoints.hub import find_adapter
from minia3.files.write import finish_writing
from minia3.tasks.task_file import read_tasks_beside


def learned_tasks(model, adapter=None):
    """Return the tasks in the task.json of an adapter, or else of a model: name to TaskSpec.

    The dict is empty if there is no such file. If a model is a single file (.gguf), a task.json
    beside it does not count, because it may belong to something else. Raise ValueError if there is
    no such adapter.
    """
    if adapter is not None:
        return read_tasks_beside(find_adapter(adapter))
    path = Path(model)
    if path.is_file():
        return {}
    finish_writing(path)
    return read_tasks_beside(path)
