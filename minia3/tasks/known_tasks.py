"""To be written."""

import json
from functools import cache
from pathlib import Path

from minia3.tasks.prompts import OWN_PROMPTS, Prompt
from minia3.tasks.task import Source, TaskSpec

TABLE = Path(__file__).with_name("tasks.json")
SHIPPED = (
    Path(__file__).resolve().parents[2] / "data"
)  # what comes with the repository, whatever --data-dir says


@cache
def known_tasks(path=TABLE):
    """Name -> Spec of a file such as tasks.json. Raises ValueError, in one line, for a key that no task has."""
    rows, tasks = json.loads(Path(path).read_text("utf-8")), {}
    for name, row in rows.items():
        try:
            row = (rows[row.pop("like")] if "like" in row else {}) | row
            choices, texts = row.pop("choices", row.get("labels")), row.pop("prompts", [])
            prompts = (
                tuple(
                    Prompt(**text | {"choices": tuple(text.get("choices", choices))})
                    for text in texts
                )
                or OWN_PROMPTS
            )
            tasks[name] = TaskSpec(
                prompts, [Source(**source) for source in row.pop("sources", [])], **row
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: {name}: {error}") from None
    return tasks
