"""Which row of the vectors a number means, and whether the row still belongs to the same adapter.

A server gives the row of a removed adapter to the next one (minia3.Adapters). Whoever still held
the number of the row would then get the answers of another adapter. So the number of a row has a
second part, its generation: how many adapters had the row before.

    number = row + GENERATION * generation

In a model whose adapters never leave, all generations are 0, and a number is just a row.
"""

import torch

GENERATION = 2**32

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def number_of(row, model):
    """Return the number that now means a row, and note that it was handed out."""
    return row + GENERATION * model.row_generations.setdefault(row, 0)


def give_up(row, model):
    """Begin the next generation of a row. Numbers that were handed out before become invalid."""
    model.row_generations[row] = model.row_generations.get(row, 0) + 1


def give_up_all(model):
    """Give up each row whose number was handed out."""
    for row in model.row_generations:
        give_up(row, model)


def find_rows(numbers, model):
    """Return the row that each number means. The errors are those of `find_row`."""
    return [find_row(number, model) for number in numbers]


def find_row(number, model):
    """Return the row that a number means.

    Raise ValueError if there is no such row, or if its adapter was removed or replaced since.
    """
    generation, row = divmod(number, GENERATION)
    if generation < 0 or row >= model.n_adapters:
        expected = f"the model has rows 0 to {model.n_adapters - 1}"
        raise ValueError(f"adapter {number!r} is out of range: {expected}")
    if generation != model.row_generations.get(row, 0):
        raise ValueError(
            f"adapter {number!r}: the adapter of row {row} was removed or replaced, and the row "
            "may belong to another one: ask for the rows again, with Adapters.rows"
        )
    return row


def adapter_numbers(adapter, n_examples):
    """Return the argument `adapter` of `start` as a list: one number, or one for each example.

    Raise ValueError if it is anything but None, an int or (n_examples,) long.
    """
    if adapter is None:
        return [0]
    if type(adapter) is int:
        return [adapter]  # without a tensor, which would take most of the time of `check_start`
    numbers = as_numbers(adapter)
    if numbers.shape == (0,):
        numbers = numbers.long()  # because torch makes floats of an empty list
    if numbers.dtype not in INTEGERS or numbers.shape not in ((), (n_examples,)):
        expected = f"adapter must be None, an int or {(n_examples,)} long"
        raise ValueError(f"{expected}, found {adapter!r}")
    return numbers.flatten().tolist()


def as_numbers(adapter):
    """Return the argument `adapter` of `start` as a tensor.

    Raise ValueError if there is anything but numbers in it.
    """
    if hasattr(adapter, "to_numpy"):
        # A column of pandas, in which torch would look up labels.
        adapter = adapter.to_numpy().tolist()
    try:
        return torch.as_tensor(adapter, device="cpu")
    except (TypeError, ValueError, RuntimeError):  # such as the names of adapters
        expected = "expected rows of the model (Adapters.rows returns the rows of names)"
        raise ValueError(f"adapter is {adapter!r:.80}, {expected}") from None
