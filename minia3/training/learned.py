"""What an adapter has learned, or a model that was trained or merged as a whole.

If a model is a hub id, `find` must have downloaded it before (without weights is enough).
"""

from pathlib import Path

from minia3.checkpoints.hub import find_adapter, local_path
from minia3.checkpoints.known_models import known_base
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
    path = Path(local_path(model))
    if path.is_file():
        return {}
    finish_writing(path)
    return read_tasks_beside(path)


def family_of(model):
    """Return the family of a known model, or of the model that a saved one or a copy came from; or
    None.
    """
    known = known_base(local_path(model))
    return known.family if known else None
