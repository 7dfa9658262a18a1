"""A device for tests without a GPU: tensors that report another device than the CPU, but compute on it.

Inside :func:`emulated_device`, ``x.to(DEVICE)`` and ``torch.zeros(3, device=DEVICE)`` give such tensors. As on a real
device, an operation on tensors of both devices raises MixedDevicesError, and so does a draw on the device with a CPU
generator. A CPU tensor without dimensions may take part, and CPU indices may select from a tensor on the device.
The device is called ``meta``: for ``cuda``, a CUDA build of torch asks the driver even where it computes nothing.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

__all__ = ["DEVICE", "MixedDevicesError", "Transfers", "counted", "emulated_device"]

DEVICE = torch.device("meta")

# Operations whose later arguments may be CPU indices.
_INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index")
# Operations in which even a CPU tensor without dimensions is refused.
_STRICT = ("aten::cat", "aten::stack", "aten::mm", "aten::addmm", "aten::bmm", "aten::index_add", "aten::index_add_")


@dataclass(eq=False)
class Transfers:
    """Counts by operation and place in the package.

    Attributes:
        waiting: what makes Python wait for the device: copies to it or from it, and values that are read.
        queued: copies to the device that do not wait (``non_blocking``).
        kernels: operations that compute on the device.
    """

    waiting: Counter[str] = field(default_factory=Counter)
    queued: Counter[str] = field(default_factory=Counter)
    kernels: int = 0


class MixedDevicesError(RuntimeError):
    """An operation that a real device would refuse."""


# Where operations are noted, inside :func:`counted`.
_NOTES: list[Transfers] = []

# Operations whose result has a size that depends on values, so that a device must finish first.
_SIZED_BY_VALUES = ("nonzero", "bincount", "_unique2", "unique_dim", "unique_consecutive", "masked_select", "equal")
# Operations that compute nothing.
_VIEWS = {
    *(
        "view",
        "_unsafe_view",
        "t",
        "transpose",
        "permute",
        "expand",
        "select",
        "slice",
        "unsqueeze",
        "squeeze",
        "alias",
    ),
    *("detach", "detach_", "as_strided", "split", "split_with_sizes", "unbind", "reshape", "_reshape_alias"),
    *(
        "unfold",
        "diagonal",
        "lift_fresh",
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
        "movedim",
    ),
}


def _note(kind: str, *, waits: bool = True) -> None:
    if not _NOTES:
        return
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and "/tad_plugin/" not in frame.f_code.co_filename:
        frame = frame.f_back
    place = "elsewhere"
    if frame is not None:
        place = f"{frame.f_code.co_filename.rpartition('/tad_plugin/')[2]}:{frame.f_lineno}"
    for notes in _NOTES:
        (notes.waiting if waits else notes.queued)[f"{kind} at {place}"] += 1


class _There(Tensor):
    """A tensor that reports the device; ``raw`` holds its values on the CPU."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> _There:
        found: _There = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=DEVICE,
        )
        found.raw = raw
        return found

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})

    def __int__(self) -> int:
        _note("read")
        return int(self.raw)

    def __float__(self) -> float:
        _note("read")
        return float(self.raw)

    def __index__(self) -> int:
        _note("read")
        return self.raw.__index__()

    def tolist(self) -> Any:
        _note("read")
        return self.raw.tolist()

    def numpy(self, **_: Any) -> Any:  # type: ignore[override]
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() first")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{self.raw!r} on {DEVICE}"


class _Mode(TorchDispatchMode):
    """Sends every operation, also on CPU tensors alone, through :func:`_compute`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


def _raw(value: Any) -> Any:
    return value.raw if isinstance(value, _There) else value


def _compute(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Computes one operation on the CPU and gives its result the right device."""
    name = func._schema.name
    given = kwargs.get("device")
    asked = given is not None and torch.device(given).type == DEVICE.type
    if name == "aten::_to_copy":
        kept = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory", "non_blocking")}
        found = func(_raw(args[0]), **kept)
        up, down = asked and not isinstance(args[0], _There), given is not None and isinstance(args[0], _There)
        if up or (down and not asked):
            _note("copy up" if up else "copy down", waits=not (up and kwargs.get("non_blocking")))
        return _There(found) if asked or (given is None and isinstance(args[0], _There)) else found
    if name == "aten::copy_":
        func(_raw(args[0]), _raw(args[1]))
        if isinstance(args[0], _There) != isinstance(args[1], _There) and (args[1].ndim or isinstance(args[1], _There)):
            _note("copy up" if isinstance(args[0], _There) else "copy down")
        return args[0]
    if name == "aten::_local_scalar_dense":
        if isinstance(args[0], _There):
            _note("read")
        return func(_raw(args[0]))
    if name == "aten::_efficientzerotensor" and asked:  # the tangent of a constant
        return _There(torch.zeros(args[0], dtype=kwargs.get("dtype")))
    flat, form = tree_flatten((args, dict(kwargs)))
    on_device = asked or any(isinstance(x, _There) for x in flat)
    if on_device:
        _check(name, args, flat)
        _count(name, args)
    values, more = tree_unflatten([_raw(x) for x in flat], form)
    if asked:
        more["device"] = "cpu"
    more.pop("pin_memory", None)
    found = func(*values, **more)
    if not on_device:
        return found
    # An operation in place returns the tensor that it was given.
    known = {id(x.raw): x for x in flat if isinstance(x, _There)}
    return tree_map(lambda x: known.get(id(x), _There(x)) if isinstance(x, Tensor) else x, found)


def _count(name: str, args: tuple[Any, ...]) -> None:
    short = name.removeprefix("aten::")
    if _NOTES and short not in _VIEWS:
        for notes in _NOTES:
            notes.kernels += 1
    if short in _SIZED_BY_VALUES:
        _note(short)
    if name in _INDEXING:
        indices = [i for i in tree_flatten(args[1])[0] if isinstance(i, Tensor)]
        if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
            _note("choice by a mask")
        if isinstance(args[0], _There) and not all(isinstance(i, _There) for i in indices):
            _note("copy up")


def _check(name: str, args: tuple[Any, ...], flat: list[Any]) -> None:
    if any(isinstance(x, torch.Generator) and x.device.type == "cpu" for x in flat):
        raise MixedDevicesError(f"{name}: a draw on {DEVICE} with a CPU generator")
    here = [x for x in flat if isinstance(x, Tensor) and not isinstance(x, _There)]
    if name in _INDEXING and isinstance(args[0], _There):
        indices = {id(x) for x in tree_flatten(args[1])[0]}
        here = [x for x in here if id(x) not in indices]
    if name not in _STRICT:
        here = [x for x in here if x.ndim]
    if here:
        raise MixedDevicesError(f"{name}: tensors on {DEVICE} and CPU tensors {[list(x.shape) for x in here]}")


@contextlib.contextmanager
def counted() -> Iterator[Transfers]:
    """Context that counts what goes between the host and the emulated device, and what runs on it."""
    notes = Transfers()
    _NOTES.append(notes)
    try:
        yield notes
    finally:
        _NOTES.remove(notes)


@contextlib.contextmanager
def emulated_device() -> Iterator[None]:
    """Context in which the device exists."""
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    lift = torch._C._only_lift_cpu_tensors()
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # Copying into these tensors is no no-op.
        warnings.filterwarnings("ignore", message="for .*: copying from a non-meta parameter")
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrite)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        # torch.tensor(value, device=DEVICE) makes a CPU tensor first.
        stack.callback(torch._C._set_only_lift_cpu_tensors, lift)
        torch._C._set_only_lift_cpu_tensors(True)
        stack.enter_context(_Mode())
        yield
