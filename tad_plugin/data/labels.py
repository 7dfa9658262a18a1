"""Hard labels: checks, numbers from text, and the hash that identifies a labelled dataset."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tad_plugin.errors import InvalidLabelsError, explain
from tad_plugin.utils.arguments import holds_values
from tad_plugin.utils.whole_numbers import check_whole

__all__ = ["check_labels", "check_num_classes", "integers_of", "label_digest", "whole_number"]

_MOST_CLASSES = 2**20


def check_labels(
    labels: Tensor | Sequence[int], num_classes: int, length: int | None = None, name: str = "labels"
) -> Tensor:
    """Checks hard labels and returns them as a contiguous int64 tensor on their device.

    Args:
        labels: integer class labels, shape [N], values in [0, num_classes).
        num_classes: number of classes K, at least 1.
        length: the expected N, or None for any.
        name: the argument's name in messages.

    Raises:
        InvalidLabelsError: not 1-D, not integer, out of range, or of another length.
        InvalidInputError: ``num_classes`` is no whole number in [1, 2^20].
    """
    labels, num_classes = integers_of(labels, name), check_num_classes(num_classes)
    if length is not None and len(labels) != length:
        raise InvalidLabelsError(
            explain(
                f"`{name}` of length {length}",
                f"length {len(labels)}",
                "Pass one label per sample, in the dataset's order",
            )
        )
    if len(labels) == 0:
        raise InvalidLabelsError(
            explain(f"at least one label in `{name}`", "none", "Check that the dataset was loaded")
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        bad = int(((labels < 0) | (labels >= num_classes)).nonzero()[0])
        raise InvalidLabelsError(
            explain(
                f"`{name}` in [0, {num_classes})",
                f"values from {low} to {high} (first at position {bad})",
                "Map the labels to 0..K-1 or pass the right num_classes",
            )
        )
    return labels.to(torch.int64).contiguous()


def integers_of(labels: Any, name: str = "labels") -> Tensor:
    """Labels as an int64 tensor [N] on their device. Ranges are not checked.

    Args:
        labels: a tensor, array or list of integers of any width.
        name: the argument's name in messages.

    Raises:
        InvalidLabelsError: not integers (text, fractions, True and False), or not 1-D.
    """
    try:
        # PyTorch before 2.3 knows no uint16, and indexes nothing with it after.
        array = not isinstance(labels, Tensor) and np.asarray(labels)
        if array is not False and array.dtype.kind == "u":
            labels = array.astype(np.int64)
        given = torch.as_tensor(labels).detach()
        if not holds_values(given):
            raise TypeError(f"{given.layout} on {given.device}")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        got = f"{type(labels).__name__}: {str(error).partition(chr(10))[0]}"
        do = "Number the classes from 0 and pass one integer per sample"
        raise InvalidLabelsError(explain(f"integer `{name}`", got, do)) from error
    if given.ndim != 1:
        do = "Pass hard labels, one integer per sample"
        raise InvalidLabelsError(explain(f"`{name}` of shape [N]", f"shape {list(given.shape)}", do))
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        do = "Convert with .long() if the values are class indices"
        raise InvalidLabelsError(explain(f"integer `{name}`", f"dtype {given.dtype}", do))
    return given.to(torch.int64)


def check_num_classes(num_classes: Any) -> int:
    """Checks a number of classes and returns it as an int.

    Raises:
        InvalidInputError: no whole number in [1, 2^20].
    """
    return check_whole("num_classes", num_classes, 1, _MOST_CLASSES + 1)


def label_digest(labels: Tensor) -> str:
    """Sha256 (hex) of labels as int64 bytes; it identifies a labelled dataset. ``labels``: integers, shape [N]."""
    data = labels.detach().to("cpu", torch.int64).contiguous().numpy().tobytes()
    return hashlib.sha256(data).hexdigest()


def whole_number(text: str) -> int | None:
    """The number that ``text`` writes in digits, or None. More than 18 digits are no number, but a hash."""
    return int(text) if text.isdecimal() and text.isascii() and len(text) <= 18 else None
