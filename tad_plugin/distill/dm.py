"""DM: distribution matching (Zhao & Bilen, WACV 2023).

Each iteration draws a fresh random network and matches, class by class, the mean embedding of a batch
of real images with that of the synthetic ones, under one shared augmentation draw per class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tad_plugin.core.hook.hook import Hook
from tad_plugin.data.real import RealData
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.distill.baseline import BaselineConfig
from tad_plugin.distill.class_means import MeanMatching
from tad_plugin.errors import ConfigError, explain
from tad_plugin.nn.augment import Draw
from tad_plugin.nn.networks import reinitialise

__all__ = ["DM", "DMConfig", "distribution_losses"]


@dataclass
class DMConfig(BaselineConfig):
    """Settings of DM; published: 20,000 iterations, batch_real 256, lr_img 1 (10 at IPC 50: scaled with IPC).

    Attributes:
        batch_real: real images per class and iteration.
        momentum: of the images' SGD.
    """

    batch_real: int = 256
    momentum: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_real < 1:
            raise ConfigError(explain("batch_real of at least 1", str(self.batch_real), "Correct the setting"))


def distribution_losses(real: Tensor, synthetic: Tensor) -> Tensor:
    """|| mean of real embeddings - mean of synthetic embeddings ||^2 of each class, [k].

    Args:
        real: (weighted) mean embedding of each class [k,D].
        synthetic: embeddings of its synthetic images [k,M,D].
    """
    return (real - synthetic.mean(1)).square().sum(1)


class DM(MeanMatching):
    """Distribution matching. All classes of an iteration go through the network together."""

    name: ClassVar[str] = "dm"
    Config: ClassVar[type[BaselineConfig]] = DMConfig

    def __init__(
        self, config: DMConfig, data: RealData, hook: Hook | None, synthetic: SyntheticSet, generator: torch.Generator
    ) -> None:
        super().__init__(config, data, hook, synthetic, generator)
        self.optimizer = torch.optim.SGD([synthetic.images], lr=config.lr_img, momentum=config.momentum)
        # One module whose parameters are redrawn is cheaper than a new one per iteration, and has the same bits.
        self.network = self.fresh_network(torch.Generator().manual_seed(0)).train().requires_grad_(False)

    def step(self, iteration: int) -> Mapping[str, Any]:
        """See :class:`Baseline`; errors as :meth:`MeanMatching.match`."""
        reinitialise(self.network, self.generator)
        loss = self.match(self.network, iteration, self._class_losses, fresh_network=self.fresh_network)
        self.optimizer.step()
        return {"loss": loss}

    def _class_losses(self, own: Tensor, means: Tensor, draws: list[Draw | None], first: int) -> Tensor:
        shown = torch.cat([self.augmented(x, draw) for x, draw in zip(own, draws, strict=True)])
        rows = self.network.embed(shown)  # type: ignore[operator]
        return distribution_losses(means, rows.unflatten(0, (len(own), -1)))

    def state_dict(self) -> dict[str, Any]:
        """See :class:`Baseline`."""
        return {**super().state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :class:`Baseline`."""
        super().load_state_dict(state)
        self.optimizer.load_state_dict(state["optimizer"])
