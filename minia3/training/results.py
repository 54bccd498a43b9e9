"""The results of a cell before and after training, as lines of metrics.jsonl."""

from minia3.inference.scoring import NotFiniteError
from minia3.training.device import peak_memory
from minia3.training.doubts import (
    doubts_about_dtypes,
    doubts_about_result,
    doubts_about_shots,
    notes_on_texts,
    notes_on_ties,
)
from minia3.training.report import describe

# A final line has these before training, too.
COMPARED = ("accuracy", "auc", "accuracies", "perplexity")
NOT_FINAL = ("n", "n_cut")  # a final line has these under other names


class Baselines:
    """Results before training.

    All cells start equal, so cells that report on the same rows share a result.
    """

    def __init__(self):
        self.results = {}  # (name of the task, idx of each row) -> result

    def find(self, group, cell, assignment):
        key = key_of_rows(assignment)
        if key not in self.results:
            self.results[key] = group.evaluate(cell, assignment, assignment.report_rows)
        return self.results[key]

    def has(self, assignment):
        """Return whether another cell has the result on these rows."""
        return key_of_rows(assignment) in self.results

    def add(self, cell):
        """Add the results that a cell has from before its run was resumed."""
        # A cell may have none, and a mixture that was stopped may have those of some members.
        results = cell.progress.before or []
        for assignment, result in zip(cell.assignments, results, strict=False):
            self.results[key_of_rows(assignment)] = result


def key_of_rows(assignment):
    """Return what is equal for cells that report on the same rows."""
    return (assignment.task.name, *(row["idx"] for row in assignment.report_rows))


def evaluate_before(run, group, cell, baselines):
    """Evaluate a cell before training, on each member of its task that has no result yet.

    The run is saved after each evaluation, because many tasks take long. After the last one,
    training saves.
    """
    if cell.progress.before is None:
        cell.progress.before = []
    results = cell.progress.before
    for assignment in cell.assignments[len(results) :]:
        task = assignment.task
        is_shared = baselines.has(assignment)
        result = baselines.find(group, cell, assignment)
        run.write("before", step=0, metric=task.metric, **cell.key_of(task), **result)
        print(f"before   {cell.title_of(task)}{describe(task.metric, result)}", flush=True)
        for note in notes_on_texts(task.metric, result, cell.config.max_new_tokens):
            print(f"note     {cell.title_of(task)}{note}", flush=True)
        show_ties(cell, task, result)
        results.append(result)
        trains_next = group.config.is_training and assignment is group.cells[-1].assignments[-1]
        if not is_shared and not trains_next:
            run.save(group)


def show_ties(cell, task, result):
    """Print how many rows have two best choices. This depends on the model, so say it each time."""
    for note in notes_on_ties(result, cell.progress.dtypes[-1]):
        print(f"note     {cell.title_of(task)}{note}", flush=True)


def evaluate_after(group, cell):
    """Return the final lines of a cell, one per member of its task.

    If its scores are not finite, the cell fails, and there are none.
    """
    finals = []
    for assignment, before in zip(cell.assignments, cell.progress.before, strict=True):
        after = before
        if group.config.is_training or assignment.shots:
            task = assignment.task
            try:
                after = group.evaluate(cell, assignment, assignment.report_rows, assignment.shots)
            except NotFiniteError as error:
                fail_after(cell, group.config.is_training, error.name)
                return []
            print(f"after    {cell.title_of(task)}{describe(task.metric, after)}", flush=True)
            show_ties(cell, task, after)
        finals.append(final_line(group, cell, assignment, before, after))
    return finals


def fail_after(cell, is_training, name):
    """Fail a cell whose scores after training, or with shots, are not finite. name: of the row."""
    if is_training:
        cell.fail(f"after training, the scores of {name} are not finite")
    else:
        cell.fail(f"with shots, the scores of {name} are not finite", "try --dtype float32")


def final_line(group, cell, assignment, before, after):
    final = {
        "model": group.config.model,
        "method": group.config.method,
        # The config's class, because a wrapper around the model would have another name.
        "architecture": type(group.model.config).__name__.removesuffix("Config"),
        "dtype": " then ".join(cell.progress.dtypes),  # of the base
        "total": group.n_base,
        "trainable": group.n_trained,
        "seconds": round(group.log.seconds, 3),  # of the steps: 0 if nothing was trained
        "metric": assignment.task.metric,
        "split": assignment.report_split,
        "rows": len(assignment.report_rows),
        **cell.key_of(assignment.task),
        "steps": cell.progress.n_steps,
        "rows_cut": after["n_cut"],
        "peak_memory_bytes": peak_memory(group.device),
    }
    for name in COMPARED:
        if name in before:
            final[f"{name}_before"] = before[name]
    for name, value in after.items():
        if name not in NOT_FINAL:
            final[name] = value
    if assignment.shots:
        final["n_shots_given"] = len(assignment.shots)  # `n_shots` of them fit, on average
    if cell.progress.best_step is not None:
        final["best_step"] = cell.progress.best_step  # the step of the parameters that are saved
    # An extension that was killed as it began, and is resumed without its --steps, does no step.
    extended_from = [step for step in cell.progress.extended_from if step < group.log.step]
    if extended_from:
        final["extended_from"] = extended_from
    final["answer"] = assignment.task.answer
    final["warnings"] = [
        *assignment.doubts,
        *doubts_about_dtypes(cell.progress.dtypes),
        *doubts_about_shots(final, cell.config.max_length),
        *doubts_about_result(final, cell.progress.losses),
    ]
    return final
