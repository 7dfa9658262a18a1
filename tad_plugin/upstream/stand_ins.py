"""Stand-ins for what public codebases find missing on a current machine.

Each context manager here is on while a script runs and leaves nothing behind. The table
:mod:`tad_plugin.upstream.switches` says which script needs which.
"""

from __future__ import annotations

import functools
import os
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from tad_plugin.errors import PatchError, explain

__all__ = [
    "ClassErrorMeter",
    "any_checksum",
    "capped_topk",
    "cpu_copies",
    "cpu_only",
    "error_meters",
    "folder",
    "imported",
    "no_efficientnet",
    "old_numpy",
    "old_scipy",
    "overlapping_assignment",
    "silent_wandb",
]


# -- torch -----------------------------------------------------------------------------------------
def _is_cuda(value: Any) -> bool:
    return str(value).startswith("cuda") if isinstance(value, str | torch.device) else False


#: functions of torch that make a tensor on a device
_MAKERS = (
    *("arange", "as_tensor", "empty", "empty_like", "eye", "full", "full_like", "linspace", "logspace", "ones"),
    *("ones_like", "rand", "rand_like", "randint", "randint_like", "randn", "randn_like", "randperm", "tensor"),
    *("zeros", "zeros_like"),
)


def _on_cpu(original: Any) -> Any:
    """The function, which takes ``device="cuda"`` for the CPU."""

    @functools.wraps(original)
    def made(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return original(*args, **kwargs)

    return made


@contextmanager
def cpu_only() -> Iterator[None]:
    """``.cuda()``, ``.to("cuda")`` and ``device="cuda"`` leave tensors and modules on the CPU."""

    def stay(self: Any, *_args: Any, **_kwargs: Any) -> Any:
        return self

    def move(original: Any) -> Any:
        def to(self: Any, *args: Any, **kwargs: Any) -> Any:
            args = tuple("cpu" if _is_cuda(a) else a for a in args)
            kwargs = {k: "cpu" if _is_cuda(v) else v for k, v in kwargs.items()}
            return original(self, *args, **kwargs)

        return to

    # torch compiles its rules for forward-mode derivatives on first use, from the functions that are replaced below.
    torch.func.jvp(torch.sin, (torch.zeros(1),), (torch.ones(1),))
    with ExitStack() as stack:
        for name in _MAKERS:
            stack.enter_context(mock.patch.object(torch, name, _on_cpu(getattr(torch, name))))
        for owner in (torch.Tensor, torch.nn.Module):
            stack.enter_context(mock.patch.object(owner, "cuda", stay))
            stack.enter_context(mock.patch.object(owner, "to", move(owner.to)))
        yield


@contextmanager
def cpu_copies() -> Iterator[None]:
    """``.cpu()`` always returns a copy, as it does for a tensor on a GPU."""
    original = torch.Tensor.cpu

    def cpu(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        moved = original(self, *args, **kwargs)
        return moved.clone() if moved.data_ptr() == self.data_ptr() else moved

    with mock.patch.object(torch.Tensor, "cpu", cpu):
        yield


@contextmanager
def overlapping_assignment() -> Iterator[None]:
    """``t[index] = value`` copies ``value`` first if it is a view of ``t``."""
    original = torch.Tensor.__setitem__

    def setitem(self: Tensor, index: Any, value: Any) -> None:
        base = self if self._base is None else self._base
        if isinstance(value, Tensor) and value._base is base:
            value = value.clone()
        original(self, index, value)

    with mock.patch.object(torch.Tensor, "__setitem__", setitem):
        yield


@contextmanager
def capped_topk() -> Iterator[None]:
    """``torch.topk`` returns all values if more are requested than there are."""
    original = torch.topk

    def topk(values: Tensor, k: int, dim: int = -1, *args: Any, **kwargs: Any) -> Any:
        return original(values, min(k, values.shape[dim]), dim, *args, **kwargs)

    with mock.patch.object(torch, "topk", topk):
        yield


# -- packages --------------------------------------------------------------------------------------
@contextmanager
def imported(modules: Mapping[str, types.ModuleType]) -> Iterator[None]:
    """The given modules can be imported by name.

    Other modules that the script imports stay loaded, because some cannot be loaded twice.
    """
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, old in before.items():
            sys.modules.pop(name, None)
            if old is not None:
                sys.modules[name] = old


class ClassErrorMeter:
    """Top-k classification error, with the interface of torchnet's meter of that name.

    Args:
        topk: values of k.
        accuracy: if True, :meth:`value` returns the accuracy instead of the error.
    """

    def __init__(self, topk: Sequence[int] = (1,), accuracy: bool = False) -> None:
        self.topk = sorted(topk)
        self.accuracy = accuracy
        self.reset()

    def reset(self) -> None:
        """Sets all counts to zero."""
        self.n = 0
        self._errors = dict.fromkeys(self.topk, 0)

    def add(self, output: Any, target: Any) -> None:
        """Adds a batch: scores [B,K] (or [K]) and true classes, integers [B] (or one)."""
        scores = torch.as_tensor(output).detach()
        scores = scores if scores.ndim == 2 else scores.reshape(1, -1)
        wanted = torch.as_tensor(target, device=scores.device).reshape(-1, 1)
        hits = scores.topk(self.topk[-1], 1).indices == wanted
        for k in self.topk:
            self._errors[k] += len(hits) - int(hits[:, :k].sum())
        self.n += len(hits)

    def value(self, k: int = -1) -> float | list[float]:
        """Returns the error (or accuracy) for ``k`` in percent; a list for all values of k if ``k`` is -1."""
        if k == -1:
            return [self._percent(k) for k in self.topk]
        return self._percent(k)

    def _percent(self, k: int) -> float:
        share = self._errors[k] / self.n if self.n else 0.0
        return (1.0 - share) * 100.0 if self.accuracy else share * 100.0


@contextmanager
def error_meters() -> Iterator[None]:
    """``import torchnet`` gives a module with ``meter.ClassErrorMeter``."""
    package, meter = types.ModuleType("torchnet"), types.ModuleType("torchnet.meter")
    vars(meter)["ClassErrorMeter"] = ClassErrorMeter
    vars(package)["meter"] = meter
    with imported({"torchnet": package, "torchnet.meter": meter}):
        yield


@contextmanager
def old_scipy() -> Iterator[None]:
    """``scipy.ndimage.interpolation`` is an alias of ``scipy.ndimage``."""
    import scipy.ndimage

    name = "scipy.ndimage.interpolation"
    alias = types.ModuleType(name)
    vars(alias).update({k: v for k, v in vars(scipy.ndimage).items() if not k.startswith("__")})
    with imported({name: alias}):
        yield


@contextmanager
def silent_wandb(name: str) -> Iterator[None]:
    """``import wandb`` gives a module that keeps its configuration and logs nothing.

    Args:
        name: name of the run, ``wandb.run.name``.
    """
    module = types.ModuleType("wandb")
    config, run = types.SimpleNamespace(_items={}), types.SimpleNamespace(name=name)

    def init(config: Any = None, **_more: Any) -> Any:
        given = config if isinstance(config, Mapping) else vars(config or types.SimpleNamespace())
        module.config._items.update(given)
        return run

    def nothing(*_args: Any, **_more: Any) -> None:
        return None

    vars(module).update(config=config, run=run, init=init)
    vars(module).update(dict.fromkeys(("log", "finish", "watch", "save", "Histogram", "Image"), nothing))
    with imported({"wandb": module}):
        yield


@contextmanager
def old_numpy() -> Iterator[None]:
    """``numpy.int``, ``numpy.float`` and ``numpy.bool`` are the types of Python again."""
    with ExitStack() as stack:
        for name, kind in (("int", int), ("float", float), ("bool", bool)):
            if name not in vars(np):
                stack.enter_context(mock.patch.object(np, name, kind, create=True))
        yield


@contextmanager
def no_efficientnet() -> Iterator[None]:
    """``import efficientnet_pytorch`` works; making its EfficientNet is a PatchError."""

    class EfficientNet:
        @classmethod
        def from_name(cls, *_args: Any, **_more: Any) -> Any:
            do = "Install efficientnet_pytorch, or choose another network"
            raise PatchError(explain("efficientnet_pytorch for an EfficientNet", "none", do))

    module = types.ModuleType("efficientnet_pytorch")
    vars(module)["EfficientNet"] = EfficientNet
    with imported({"efficientnet_pytorch": module}):
        yield


# -- files -----------------------------------------------------------------------------------------
@contextmanager
def folder(place: Path) -> Iterator[None]:
    """The folder ``place`` exists. If it was made here and is empty at the end, it is removed again."""
    made = not place.exists()
    place.mkdir(exist_ok=True)
    try:
        yield
    finally:
        if made and place.is_dir() and not any(place.iterdir()):
            place.rmdir()


@contextmanager
def any_checksum() -> Iterator[None]:
    """torchvision's CIFAR classes accept files that exist, with any checksum."""
    with mock.patch("torchvision.datasets.cifar.check_integrity", lambda path, _md5=None: os.path.isfile(path)):
        yield
