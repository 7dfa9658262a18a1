"""A random part of each class: the control that tells what fewer samples alone do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tad_plugin.callback import Callback
from tad_plugin.scorer import RealData
from tad_plugin.selection.ranking import check_share, keep_lowest
from tad_plugin.state import SampleState

__all__ = ["RandomSubset", "RandomSubsetConfig"]


@dataclass
class RandomSubsetConfig:
    """Settings of the random subset.

    Attributes:
        keep: share of each class that is kept, in (0, 1].
    """

    keep: float = 0.6

    def __post_init__(self) -> None:
        check_share("keep", self.keep)


class RandomSubset(Callback):
    """Keeps a random share of each observed class."""

    name: ClassVar[str] = "random"
    Config: ClassVar[type] = RandomSubsetConfig

    def on_start(self, *, state: SampleState, data: RealData) -> None:
        """Draws the subset."""
        scores = torch.rand(len(state), generator=self.generator).to(state.device)
        kept = keep_lowest(scores, state.observed, state.num_classes, self.config.keep, minimum=data.ipc or 1)
        state.update(trusted=kept)
        state.set_weights(self.name, kept.float())
        self.report("division", trusted=int(kept.sum()), untrusted=int((~kept).sum()))
