"""Hard labels: checks, numbers from text, and the hash that identifies a labelled dataset."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from tad_plugin.errors import InvalidInputError, InvalidLabelsError, explain

__all__ = ["check_labels", "label_digest", "whole_number"]


def check_labels(labels: Tensor, num_classes: int, length: int | None = None, name: str = "labels") -> Tensor:
    """Checks hard labels and returns them as a contiguous int64 tensor on their device.

    Args:
        labels: integer class labels, shape [N], values in [0, num_classes).
        num_classes: number of classes K, at least 1.
        length: the expected N, or None for any.
        name: the argument's name in messages.

    Raises:
        InvalidLabelsError: not 1-D, not integer, out of range, or of another length.
    """
    labels = torch.as_tensor(labels)
    if num_classes < 1:
        raise InvalidInputError(explain("num_classes of at least 1", str(num_classes), "Pass the number of classes"))
    if labels.ndim != 1:
        raise InvalidLabelsError(
            explain(f"`{name}` of shape [N]", f"shape {list(labels.shape)}", "Pass hard labels, one integer per sample")
        )
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise InvalidLabelsError(
            explain(
                f"integer `{name}`", f"dtype {labels.dtype}", "Convert with .long() if the values are class indices"
            )
        )
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


def label_digest(labels: Tensor) -> str:
    """Sha256 (hex) of labels as int64 bytes; it identifies a labelled dataset. ``labels``: integers, shape [N]."""
    data = labels.detach().to("cpu", torch.int64).contiguous().numpy().tobytes()
    return hashlib.sha256(data).hexdigest()


def whole_number(text: str) -> int | None:
    """The number that ``text`` writes in digits, or None. More than 18 digits are no number, but a hash."""
    return int(text) if text.isdecimal() and text.isascii() and len(text) <= 18 else None
