"""Indices of samples: one check for every handle that takes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tad_plugin.errors import InvalidInputError, explain
from tad_plugin.utils.arguments import holds_values

__all__ = ["check_indices", "known_indices", "on_host"]

_WAY_OUT = "Pass the positions of the samples in the dataset, as integers or as a bool mask of all samples"


def known_indices(indices: Tensor, length: int, host: Tensor | None = None) -> Tensor:
    """Notes that indices lie in [0, length), so that :func:`check_indices` need not wait for their device.

    The note holds for this tensor while nothing is written into it. Returns the tensor.

    Args:
        indices: int64 [B] on any device.
        length: number of samples.
        host: the same on the CPU, if it is at hand; see :func:`on_host`.
    """
    if host is indices:  # no circle of references
        host = None
    indices._tad_known = (length, indices._version, host)  # type: ignore[attr-defined]
    return indices


def on_host(indices: Tensor) -> Tensor:
    """The indices on the CPU, without a transfer if :func:`known_indices` was given them."""
    _, version, host = getattr(indices, "_tad_known", (0, 0, None))
    return indices.cpu() if host is None or version != indices._version else host


def _is_known(indices: Tensor, length: int | None) -> bool:
    most, version, _ = getattr(indices, "_tad_known", (None, 0, None))
    return most is not None and most == length and version == indices._version


def check_indices(
    indices: Tensor | Sequence[int],
    length: int | None,
    device: torch.device | str = "cpu",
    *,
    count: int | None = None,
    name: str = "indices",
) -> Tensor:
    """Checks positions of samples and returns them as int64 [B] on ``device``.

    They are checked where they are, so those of a list or of the CPU wait for no accelerator.

    Args:
        indices: integers [B] in [0, length), B at least 1, as a tensor, array or list; or a bool mask [length].
        length: number of samples; None if it is not known, then no upper bound is checked.
        device: where the result goes.
        count: the expected B, or None for any.
        name: what they are, for messages.

    Raises:
        InvalidInputError: another type, shape or number, none at all, or one out of range.
    """
    device = torch.device(device)
    if isinstance(indices, Tensor) and _is_known(indices, length) and count in (None, len(indices)):
        return indices if indices.device.type == device.type else indices.to(device)
    try:
        given = torch.as_tensor(indices).detach()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        got = f"{type(indices).__name__}: {error}"
        raise InvalidInputError(explain(f"`{name}` as integers [B]", got, _WAY_OUT)) from error
    if not holds_values(given):
        raise InvalidInputError(explain(f"`{name}` as a dense tensor", f"{given.layout} on {given.device}", _WAY_OUT))
    if given.ndim != 1 or len(given) == 0:
        raise InvalidInputError(explain(f"`{name}` of shape [B], at least one", f"shape {list(given.shape)}", _WAY_OUT))
    if given.dtype == torch.bool:
        if length is not None and len(given) != length:
            raise InvalidInputError(explain(f"a bool mask `{name}` of length {length}", str(len(given)), _WAY_OUT))
        given = given.nonzero().flatten()
        if len(given) == 0:
            raise InvalidInputError(explain(f"a bool mask `{name}` that chooses a sample", "no True", _WAY_OUT))
    # PyTorch takes uint8 for a mask, and NumPy takes it for positions.
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.uint8:
        raise InvalidInputError(explain(f"integer `{name}`", f"dtype {given.dtype}", _WAY_OUT))
    given = given.to(torch.int64)
    if count is not None and len(given) != count:
        do = "Pass the indices of exactly these rows"
        raise InvalidInputError(explain(f"{count} {name}", str(len(given)), do))
    wrong = given < 0 if length is None else (given < 0) | (given >= length)
    if bool(wrong.any()):
        place = int(wrong.nonzero()[0])
        expected = f"`{name}` of at least 0" if length is None else f"`{name}` in [0, {length})"
        raise InvalidInputError(explain(expected, f"{int(given[place])} at position {place}", _WAY_OUT))
    return given.to(device)
