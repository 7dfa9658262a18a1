"""Flat vectors of parameters, per-sample losses, forward-mode derivatives, and a check for NaN."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tad_plugin.errors import InvalidInputError, NonFiniteError, explain

__all__ = [
    "LossFunction",
    "Tensors",
    "as_tuple",
    "cross_entropy",
    "flatten",
    "pushed_forward",
    "require_finite",
    "unflatten",
]

Tensors = Tensor | Sequence[Tensor]
"""One tensor, or several that form one long vector."""

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""Per-sample loss: (logits [B, K], labels [B] or [B, K]) -> [B]."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each sample, [B]; the default :data:`LossFunction`.

    Args:
        logits: [B, K].
        labels: int64 [B], or probabilities [B, K] (soft labels).
    """
    return F.cross_entropy(logits, labels, reduction="none")


def as_tuple(tensors: Tensors) -> tuple[Tensor, ...]:
    """A tuple of the tensors."""
    return (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)


def flatten(tensors: Tensors | Mapping[str, Tensor]) -> Tensor:
    """Concatenates all entries into one vector [P], in the order of the sequence or mapping."""
    parts = tuple(tensors.values()) if isinstance(tensors, Mapping) else as_tuple(tensors)
    return torch.cat([part.reshape(-1) for part in parts])


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Splits a vector [P] into views with the shapes of ``like``; the inverse of :func:`flatten`.

    Raises:
        InvalidInputError: the vector is not 1-D, or has another number of entries.
    """
    sizes = [tensor.numel() for tensor in like]
    if vector.ndim != 1 or vector.numel() != sum(sizes):
        raise InvalidInputError(
            explain(
                f"a vector of {sum(sizes)} entries",
                f"shape {list(vector.shape)}",
                "Pass one entry per parameter, flattened in the parameters' order",
            )
        )
    return tuple(part.reshape(tensor.shape) for part, tensor in zip(vector.split(sizes), like, strict=True))


def require_finite(values: Tensor, name: str, do: str) -> Tensor:
    """Checks that all entries are finite; returns ``values`` unchanged.

    Args:
        values: any shape.
        name: name of the values, for the message.
        do: advice, for the message.

    Raises:
        NonFiniteError: an entry is NaN or infinite. The message has their number and the first flat position.
    """
    bad = ~torch.isfinite(values)
    if bool(bad.any()):
        where = int(bad.reshape(-1).nonzero()[0])
        got = f"{int(bad.sum())} of {values.numel()} NaN or infinite (first at position {where})"
        raise NonFiniteError(explain(f"finite {name}", got, do))
    return values


def pushed_forward(function: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
    """Computes the directional derivative of ``function`` at ``primals`` along ``tangents`` in forward mode."""
    with warnings.catch_warnings():
        # torch's forward mode uses torch.jit and warns about it; users cannot act on that.
        warnings.filterwarnings("ignore", message=".*torch.jit.script.*")
        return torch.func.jvp(function, primals, tangents)[1]
