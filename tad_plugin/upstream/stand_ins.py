"""What the public codebases find missing on a current machine, stood in for while a script of theirs runs.

Each function here is a context for a switch of :mod:`tad_plugin.upstream.switches`; nothing of it outlives the script.
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

__all__ = ["ClassErrorMeter", "any_checksum", "capped_topk", "error_meters", "folder", "imported", "silent_wandb"]


class ClassErrorMeter:
    """Counts how often the right class is not among the likeliest, as the meter of that name in torchnet does.

    Args:
        topk: numbers of likeliest classes to look at.
        accuracy: whether :meth:`value` gives hits instead of errors.
    """

    def __init__(self, topk: Sequence[int] = (1,), accuracy: bool = False) -> None:
        self.topk = sorted(topk)
        self.accuracy = accuracy
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.n = 0
        self._errors = dict.fromkeys(self.topk, 0)

    def add(self, output: Any, target: Any) -> None:
        """Adds scores [B,K] (or [K]) and the right classes, integers [B] (or one)."""
        scores = torch.as_tensor(output).detach()
        scores = scores if scores.ndim == 2 else scores.reshape(1, -1)
        wanted = torch.as_tensor(target, device=scores.device).reshape(-1, 1)
        hits = scores.topk(self.topk[-1], 1).indices == wanted
        for k in self.topk:
            self._errors[k] += len(hits) - int(hits[:, :k].sum())
        self.n += len(hits)

    def value(self, k: int = -1) -> float | list[float]:
        """Errors (or hits) in percent for ``k``, or a list of them for every k."""
        if k == -1:
            return [self._percent(k) for k in self.topk]
        return self._percent(k)

    def _percent(self, k: int) -> float:
        share = self._errors[k] / self.n if self.n else 0.0
        return (1.0 - share) * 100.0 if self.accuracy else share * 100.0


@contextmanager
def imported(modules: Mapping[str, types.ModuleType]) -> Iterator[None]:
    """The modules count as imported; whatever the script imports besides stays so, since not all can load twice."""
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, old in before.items():
            sys.modules.pop(name, None)
            if old is not None:
                sys.modules[name] = old


@contextmanager
def error_meters() -> Iterator[None]:
    """``import torchnet`` gives a module with ``meter.ClassErrorMeter``."""
    package, meter = types.ModuleType("torchnet"), types.ModuleType("torchnet.meter")
    vars(meter)["ClassErrorMeter"] = ClassErrorMeter
    vars(package)["meter"] = meter
    with imported({"torchnet": package, "torchnet.meter": meter}):
        yield


@contextmanager
def capped_topk() -> Iterator[None]:
    """``torch.topk`` gives all there are where more are asked for."""
    original = torch.topk

    def topk(values: Tensor, k: int, dim: int = -1, *args: Any, **kwargs: Any) -> Any:
        return original(values, min(k, values.shape[dim]), dim, *args, **kwargs)

    with patch.object(torch, "topk", topk):
        yield


@contextmanager
def folder(place: Path) -> Iterator[None]:
    """``place`` exists; it is taken away again if the script has left nothing in it."""
    made = not place.exists()
    place.mkdir(exist_ok=True)
    try:
        yield
    finally:
        if made and place.is_dir() and not any(place.iterdir()):
            place.rmdir()


@contextmanager
def any_checksum() -> Iterator[None]:
    """torchvision's CIFAR classes take files that exist, whatever their checksum."""
    with patch("torchvision.datasets.cifar.check_integrity", lambda path, _md5=None: os.path.isfile(path)):
        yield


@contextmanager
def silent_wandb(name: str) -> Iterator[None]:
    """``import wandb`` gives a module that keeps the configuration it is given and logs nothing.

    Args:
        name: of the run, ``wandb.run.name``.
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
