"""DM: distribution matching (Zhao & Bilen, WACV 2023).

In each iteration a network is initialised at random. For each class, the mean embedding of the synthetic images is
matched to that of a batch of real images. Both are augmented with the same draw.
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
from tad_plugin.nn.augment import Draw
from tad_plugin.nn.networks import reinitialise
from tad_plugin.utils.settings import setting

__all__ = ["DM", "DMConfig", "distribution_losses"]


@dataclass
class DMConfig(BaselineConfig):
    """Settings of DM. Published: 20,000 iterations, batch_real 256, lr_img 1 (10 at IPC 50: scaled with IPC).

    Attributes:
        batch_real: real images per class and iteration.
        momentum: momentum of the images' SGD.
    """

    batch_real: int = setting(256, at_least=1)
    momentum: float = setting(0.5, at_least=0, below=1)


def distribution_losses(real: Tensor, synthetic: Tensor) -> Tensor:
    """Squared Euclidean distance between the mean real and the mean synthetic embedding of each class, [k].

    Args:
        real: (weighted) mean embedding of the real images of each class, [k,D].
        synthetic: embeddings of its M synthetic images, [k,M,D].
    """
    return (real - synthetic.mean(1)).square().sum(1)


class DM(MeanMatching):
    """Distribution matching."""

    name: ClassVar[str] = "dm"
    compiles: ClassVar[bool] = True
    Config: ClassVar[type[BaselineConfig]] = DMConfig

    def __init__(
        self, config: DMConfig, data: RealData, hook: Hook, synthetic: SyntheticSet, generator: torch.Generator
    ) -> None:
        super().__init__(config, data, hook, synthetic, generator)
        self.optimizer = torch.optim.SGD([synthetic.images], lr=config.lr_img, momentum=config.momentum)
        # Redrawing the parameters of one module is cheaper than building a new module, and gives the same bits.
        self.network = self.fresh_network(torch.Generator().manual_seed(0)).train().requires_grad_(False)

    def compile(self) -> None:
        """See :class:`Baseline`."""
        self.network.features.compile()  # type: ignore[operator, union-attr]

    def step(self, iteration: int) -> Mapping[str, Any]:
        """See :class:`Baseline`. Raises the errors of :meth:`MeanMatching.match`."""
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
