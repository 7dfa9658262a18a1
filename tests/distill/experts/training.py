"""Shared by the tests of experts: a small problem, settings, hooks, and methods that do little."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from tad_plugin import attach
from tad_plugin.core.callback import Callback
from tad_plugin.core.hook.hook import Hook
from tad_plugin.core.state import SampleState
from tad_plugin.data.real import RealData
from tad_plugin.distill.experts.buffer import buffer_files, read_buffer
from tad_plugin.distill.experts.trainer import ExpertConfig
from tests.problems import blobs, flip

SMALL: dict[str, Any] = {
    "experts": 3, "epochs": 3, "width": 4, "batch_train": 16, "lr": 0.1, "augment": "crop_rotate", "pilots": 1,
    "experts_per_file": 2,
}  # fmt: skip


def config(**changes: Any) -> ExpertConfig:
    return ExpertConfig(**{**SMALL, **changes})


def data() -> RealData:
    images, labels = blobs()
    return RealData(images, flip(labels, 3, 0.3), 3, labels)


def all_of(folder: Path) -> list[Any]:
    return [expert for path in buffer_files(folder) for expert in read_buffer(path)]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


class Even(Callback):
    """Changes nothing."""

    name: ClassVar[str] = "even"


class Term(Callback):
    """Adds the mean squared logit of the samples it sees, and records them."""

    name: ClassVar[str] = "term"

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.again: list[Tensor] = []

    def on_scorer_batch(self, *, state: SampleState, indices: Tensor, logits: Tensor, loss: Tensor) -> Tensor:
        self.seen.append(indices)
        return loss + 0.1 * logits.square().sum(1).mean()

    def on_scorer_again(self, *, state: SampleState, indices: Tensor, logits: Tensor, loss: Tensor) -> Tensor:
        self.again.append(indices)
        return loss + 0.1 * logits.square().sum(1).mean()


def plain(real: RealData) -> Hook:
    """A hook without methods."""
    return attach("none", labels=real.labels, data=real.images, num_classes=real.num_classes, trains_on_real=True)


def hook_of(real: RealData, *callbacks: Callback) -> Hook:
    return Hook(SampleState(real.labels, 3), real, callbacks, method="test", trains_on_real=True).start()
