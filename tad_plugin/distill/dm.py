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

from tad_plugin.distill.loop import Baseline, BaselineConfig, check_loss, draw_class
from tad_plugin.errors import ConfigError, explain
from tad_plugin.hook import Hook
from tad_plugin.nn.augment import Augmentation
from tad_plugin.nn.networks import reinitialise
from tad_plugin.scorer import RealData, chunk_size
from tad_plugin.synthetic import SyntheticSet

__all__ = ["DM", "DMConfig", "distribution_loss"]


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


def distribution_loss(real: list[Tensor], synthetic: list[Tensor]) -> Tensor:
    """sum over classes of || mean of real embeddings - mean of synthetic embeddings ||^2.

    Args:
        real: for each class, (weighted) embeddings [B_c,D].
        synthetic: for each class, embeddings [M_c,D].
    """
    losses = [(r.mean(0) - s.mean(0)).square().sum() for r, s in zip(real, synthetic, strict=True)]
    return torch.stack(losses).sum()


class DM(Baseline):
    """Distribution matching. All classes of an iteration go through the network together."""

    name: ClassVar[str] = "dm"
    Config: ClassVar[type[BaselineConfig]] = DMConfig

    def __init__(
        self, config: DMConfig, data: RealData, hook: Hook | None, synthetic: SyntheticSet, generator: torch.Generator
    ) -> None:
        super().__init__(config, data, hook, synthetic, generator)
        synthetic.images.requires_grad_(True)
        self.optimizer = torch.optim.SGD([synthetic.images], lr=config.lr_img, momentum=config.momentum)
        self.augmentation = Augmentation.configured(config.augment, data.dataset)
        # One module whose parameters are redrawn is cheaper than a new one per iteration, and has the same bits.
        self.network = self.fresh_network(torch.Generator().manual_seed(0)).train()
        for parameter in self.network.parameters():
            parameter.requires_grad_(False)

    def step(self, iteration: int) -> Mapping[str, Any]:
        """See :class:`Baseline`."""
        config, images = self.config, self.synthetic.images
        reinitialise(self.network, self.generator)
        real, fake, drawn = [], [], []
        for c in range(self.data.num_classes):
            indices = draw_class(self.hook, self.data, c, config.batch_real, self.generator)
            batch, own = self.data.images[indices], images[c * config.ipc : (c + 1) * config.ipc]
            if self.augmentation.strategies:
                size = (batch.shape[-2], batch.shape[-1])
                draw = self.augmentation.draw(
                    len(batch), size, generator=self.generator, siamese=True, device=batch.device
                )
                batch, own = self.augmentation.apply(batch, draw), self.augmentation.apply(own, draw)
            drawn.append(indices)
            real.append(batch)
            fake.append(own)
        with torch.no_grad():
            # Chunks that fit the cache: on a CPU twice as fast as one pass over all classes, with the same rows.
            chunk = chunk_size(images.device)
            embedded = torch.cat([self.network.embed(b) for part in real for b in part.split(chunk)])  # type: ignore[operator]
        if self.hook is not None:
            embedded = self.hook.reweight(embedded, torch.cat(drawn))
        rows = list(embedded.split([len(i) for i in drawn]))
        own_rows = list(self.network.embed(torch.cat(fake)).split([len(f) for f in fake]))  # type: ignore[operator]
        loss = distribution_loss(rows, own_rows)
        check_loss(loss.detach(), iteration)
        if self.hook is not None:
            self.hook.before_update(
                loss, images, self.network, labels=self.synthetic.labels, fresh_network=self.fresh_network
            )
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return {"loss": float(loss.detach())}

    def state_dict(self) -> dict[str, Any]:
        """See :class:`Baseline`."""
        return {**super().state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :class:`Baseline`."""
        super().load_state_dict(state)
        self.optimizer.load_state_dict(state["optimizer"])
