"""Checks of what is written into a SampleState. All of them return tensors on the state's device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tad_plugin.errors import EmptyClassError, InvalidInputError, explain
from tad_plugin.utils.arguments import holds_values

__all__ = ["check_classes", "check_factor", "check_field", "check_rows"]

_NARROW = torch.finfo(torch.float32)


def check_classes(labels: Tensor, num_classes: int, do: str) -> None:
    """Raises EmptyClassError, which names the classes, if ``labels`` (int64 [M]) lack one of ``num_classes``."""
    counts = torch.bincount(labels, minlength=num_classes)
    if bool((counts == 0).any()):
        missing = (counts == 0).nonzero().flatten().tolist()
        named = ", ".join(map(str, missing[:10])) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
        expected = f"at least one sample in each of {num_classes} classes"
        raise EmptyClassError(explain(expected, f"no sample of class {named}", do))


def check_field(
    name: str,
    values: Any,
    dtype: torch.dtype,
    high: float,
    length: int,
    device: torch.device,
    error: type[Exception] = InvalidInputError,
) -> Tensor:
    """``values`` as ``dtype`` [N], after a check of shape, kind and range [0, high]. NaN fails.

    Args:
        name: the field, for messages.
        values: one value per sample.
        dtype: bool (only 0 and 1 pass), int64 (only integers pass), float32 or float64.
        high: the largest value.
        length: N.
        device: where the result goes.
        error: what is raised.
    """
    given = _tensor(name, values, device, error)
    if given.shape != (length,):
        raise error(explain(f"`{name}` of shape [{length}]", f"shape {list(given.shape)}", "Pass one value per sample"))
    whole = dtype == torch.int64
    if given.is_complex() or (whole and (given.is_floating_point() or given.dtype == torch.bool)):
        expected = f"integer `{name}`" if whole else f"real numbers for `{name}`"
        raise error(explain(expected, f"dtype {given.dtype}", "Convert with .long() or .float()"))
    wide = given if given.dtype in (dtype, torch.float64) else given.to(dtype if dtype != torch.bool else torch.float64)
    flags = dtype == torch.bool
    right = (wide == 0) | (wide == 1) if flags else (wide >= 0) & (wide <= high)
    if not bool(right.all()):
        place = int((~right).nonzero()[0])
        expected = f"`{name}` of True and False" if flags else f"`{name}` in [0, {high}]"
        got = f"{wide[place].item()} at position {place}"
        raise error(explain(expected, got, "Check the method that computed it"))
    return wide.to(dtype)


def check_factor(name: str, values: Any, length: int, device: torch.device) -> Tensor:
    """A copy of a factor of the weights, finite and >= 0: float32 [N], or float64 if float32 would lose its range."""
    exact = check_field(name, values, torch.float64, torch.finfo(torch.float64).max, length, device)
    fits = (exact <= _NARROW.max) & ((exact == 0) | (exact >= _NARROW.tiny * _NARROW.eps))
    return exact.to(torch.float32, copy=True) if bool(fits.all()) else exact.clone()


def check_rows(name: str, values: Any, length: int, device: torch.device) -> Tensor:
    """A copy of a tensor with first dimension N. Raises InvalidInputError for another shape."""
    given = _tensor(name, values, device, InvalidInputError)
    if given.ndim == 0 or given.shape[0] != length:
        expected, got = f"`{name}` with first dimension {length}", f"shape {list(given.shape)}"
        raise InvalidInputError(explain(expected, got, "Pass one row per sample"))
    return given.clone()


def _tensor(name: str, values: Any, device: torch.device, error: type[Exception]) -> Tensor:
    try:
        given = torch.as_tensor(values).detach()
        if not holds_values(given):
            raise TypeError(f"{given.layout} on {given.device}")
        return given.to(device)
    except (TypeError, ValueError, RuntimeError, OverflowError) as reason:
        got = f"{type(values).__name__}: {str(reason).partition(chr(10))[0]}"
        raise error(explain(f"numbers for `{name}`", got, "Pass a tensor with one row per sample")) from reason
