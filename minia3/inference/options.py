"""How texts are written: the options of `generate` and `stream`, and the checks of their values.

Importing this needs no torch, so that a mistake in the flags is answered at once.
"""

import operator
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from math import inf
from numbers import Integral, Real

from minia3.files.read import one_line

INTEGERS = ("max_new_tokens", "beams", "samples", "batch_size", "top_k")
NUMBERS = ("temperature", "top_p", "length_penalty")


@dataclass(frozen=True)
class Options:
    """How texts are written. `generate` explains all options but the last.

    first_prompt: the index of the first prompt, if others of the same list were answered before.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    beams: int = 1
    length_penalty: float = 1.0
    samples: int = 1
    stop: str | tuple = ()
    seed: int | None = None
    batch_size: int = 16
    compile: bool = False
    first_prompt: int = 0

    def __post_init__(self):
        """Replace numbers of NumPy and torch by Python's, whose sums and products are exact."""
        for name in (*INTEGERS, *NUMBERS, "seed"):
            object.__setattr__(self, name, as_python_number(getattr(self, name)))

    @property
    def stops(self):
        """The stop texts as a tuple. The user may give a single text."""
        if isinstance(self.stop, str):
            return (self.stop,)
        return tuple(self.stop)

    def check(self):
        """Raise ValueError if an option is out of its range, or does not go with another."""
        self.check_types()
        for name in ("max_new_tokens", "beams", "samples", "batch_size"):
            value = getattr(self, name)
            expect(value >= 1, name, value, "1 or more")
        self.check_drawing()
        self.check_search()

    def warn_of_idle(self):
        """Warn of options that have no effect without another one. They have passed `check`."""
        if self.temperature == 0 and (self.top_k != 0 or self.top_p != 1):
            warnings.warn(
                "top_k and top_p have no effect at temperature 0, which always takes the most "
                "likely token: give a temperature above 0",
                stacklevel=1,
            )
        if self.beams == 1 and self.length_penalty != 1:
            warnings.warn(
                "length_penalty has no effect without a beam search: give 2 beams or more",
                stacklevel=1,
            )

    def check_types(self):
        for name in INTEGERS:
            value = getattr(self, name)
            expect(is_integer(value), name, value, "an integer")
        for name in NUMBERS:
            value = getattr(self, name)
            expect(is_number(value), name, value, "a number")
        are_texts = isinstance(self.stop, Collection) and all(map(is_stop, self.stops))
        expect(are_texts, "stop", self.stop, "texts that are not empty")

    def check_drawing(self):
        is_finite = 0 <= self.temperature < inf
        expect(is_finite, "temperature", self.temperature, "0 or more, and finite")
        expect(self.top_k >= 0, "top_k", self.top_k, "0 or more")
        expect(0 < self.top_p <= 1, "top_p", self.top_p, "above 0, and at most 1")
        if self.seed is not None:
            # NumPy seeds its streams with 32-bit numbers. A bool is an int, but it is not a seed.
            is_number = isinstance(self.seed, Integral) and not isinstance(self.seed, bool)
            is_seed = is_number and 0 <= self.seed < 2**32
            expect(is_seed, "seed", self.seed, "an integer from 0 to 2**32 - 1")

    def check_search(self):
        is_moderate = abs(self.length_penalty) <= 10  # length ** penalty must not overflow
        expect(is_moderate, "length_penalty", self.length_penalty, "-10 to 10")
        if self.beams > 1 and self.temperature > 0:
            found = f"beams is {self.beams} at temperature {self.temperature}"
            raise ValueError(f"{found}, expected temperature 0: a beam search draws nothing")
        if self.beams > 1 and self.compile:
            raise ValueError(f"beams is {self.beams}, expected 1: a beam search is not compiled")
        if self.samples > self.beams and self.temperature == 0:
            reason = "otherwise all samples would be the same"
            raise ValueError(
                f"samples is {self.samples}, expected a temperature above 0 or as many beams: "
                f"{reason}"
            )


def is_integer(value):
    """Return whether a value is an integer, also one of NumPy or torch."""
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def is_number(value):
    """Return whether a value is a number, also in a tensor or an array that holds only this one."""
    return isinstance(value, Real) or getattr(value, "ndim", None) == 0


def as_python_number(value):
    """Return a number as an int or a float, and everything else, such as True, as it is."""
    if is_integer(value) and not isinstance(value, bool):
        return operator.index(value)
    if is_number(value) and not isinstance(value, bool):
        return float(value)
    return value


def is_stop(text):
    return isinstance(text, str) and text != ""


def expect(is_right, name, value, expected):
    """Raise ValueError unless `is_right`."""
    if not is_right:
        found = one_line(repr(value))  # a table has several
        raise ValueError(f"{name} is {found:.40}, expected {expected}")
