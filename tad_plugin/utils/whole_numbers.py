"""Whole numbers: one check of seeds, counts and class indices."""

from __future__ import annotations

import operator
from typing import Any

from tad_plugin.errors import InvalidInputError, explain

__all__ = ["check_whole"]


def check_whole(name: str, value: Any, low: int, high: int | None = None) -> int:
    """Checks a whole number in [low, high) and returns it as an int. True and False are none.

    Args:
        name: what it is, for the message.
        value: an int, or a number of NumPy or PyTorch of an integer type.
        low: the smallest value.
        high: one more than the largest; None for no limit.

    Raises:
        InvalidInputError: another type, or out of range.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        number = None
    if number is None or number < low or (high is not None and number >= high):
        limits = f"of at least {low}" if high is None else f"in [{low}, {high})"
        do = "Pass a whole number in this range"
        raise InvalidInputError(explain(f"{name} as a whole number {limits}", repr(value), do))
    return number
