"""IDM: improved distribution matching (Zhao, Li, Qin & Yu, CVPR 2023).

Class means of embeddings are matched as in DM, with three changes:

- Each synthetic image is a mosaic of F x F small images (``data/mosaic.py``).
- The networks come from a queue. They train on the real data, and a new one is added at regular intervals.
- A cross-entropy on the synthetic images keeps the classes apart. It is weighted by the network's training accuracy.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tad_plugin.core.events import Learning
from tad_plugin.core.hook.hook import Hook
from tad_plugin.core.indices import known_indices
from tad_plugin.data.mosaic import check_factor, decode, expand, mosaic
from tad_plugin.data.real import RealData
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.distill.baseline import BaselineConfig
from tad_plugin.distill.class_means import MeanMatching, classes_per_graph
from tad_plugin.distill.dm import distribution_losses
from tad_plugin.distill.learner import Learner
from tad_plugin.errors import NonFiniteError, explain
from tad_plugin.nn.augment import Draw
from tad_plugin.nn.passes import embed_in_passes, pass_size
from tad_plugin.utils.image_store import Images
from tad_plugin.utils.settings import setting

__all__ = ["IDM", "PRESETS", "IDMConfig"]


@dataclass
class IDMConfig(BaselineConfig):
    """Settings of IDM. Except for ``iterations`` the defaults are those published for CIFAR-10 at IPC 10.

    Attributes:
        lr_img: learning rate of the images.
        momentum: momentum of the images' SGD.
        factor: F: each synthetic image is a mosaic of F x F small images; 1 switches partitioning off.
        mosaic: True builds each initial image from F x F shrunk real images; False takes one whole real image.
        batch_real: real images per class and update; a smaller class gives all its samples.
        ce_weight: weight of the cross-entropy on the synthetic images. It is multiplied by the network's running
            training accuracy in percent.
        accuracy_window: iterations after which the running training accuracies are reset.
        start_networks: networks in the queue at the start; another one is added in the first iteration.
        max_networks: capacity of the queue; a new network then replaces the oldest.
        network_interval: iterations between new networks.
        matched_networks: networks, drawn from the queue, on which the images are matched in each iteration.
        trained_networks: networks, drawn from the queue, that train on real data in each iteration.
        train_steps: training steps of each of them.
        batch_train: real images per training step.
        lr_net: learning rate of the networks' SGD.
        net_momentum: momentum of the networks' SGD.
        net_weight_decay: L2 penalty of the networks' SGD.
        easiest: only with IPC 1 and factor 1. Match this many real images, those of lowest loss, and leave images that
            the network classifies correctly out of the cross-entropy. 0 switches both off.
        observed_labels: rank these images by the observed labels of the class's first images, as the public code
            does, instead of by the targets of the images drawn. For comparisons only.
        score_every: iterations between scoring rounds of the methods on the oldest network of the queue. 0: never; the
            decisions of the plugin's own scorer before the first iteration are then final.
    """

    lr_img: float = 0.2
    momentum: float = setting(0.5, at_least=0, below=1)
    factor: int = setting(2, at_least=1)
    mosaic: bool = True
    batch_real: int = setting(256, at_least=1)
    ce_weight: float = setting(0.5, at_least=0)
    accuracy_window: int = setting(100, at_least=1)
    start_networks: int = setting(3, at_least=0)
    max_networks: int = setting(100, at_least=1)
    network_interval: int = setting(30, at_least=1)
    matched_networks: int = setting(1, at_least=1)
    trained_networks: int = setting(2, at_least=0)
    train_steps: int = setting(10, at_least=0)
    batch_train: int = setting(256, at_least=1)
    lr_net: float = setting(0.01, above=0)
    net_momentum: float = setting(0.9, at_least=0, below=1)
    net_weight_decay: float = setting(5e-4, at_least=0)
    easiest: int = setting(2560, at_least=0)
    observed_labels: bool = False
    score_every: int = setting(0, at_least=0)

    def check(self) -> None:
        """See :class:`Settings`."""
        fits = self.start_networks <= self.max_networks
        self.require(fits, f"start_networks of at most max_networks = {self.max_networks}", self.start_networks)

    @property
    def narrowed(self) -> bool:
        """True if the rules for a single whole image per class apply (see ``easiest``)."""
        return self.ipc == 1 and self.factor == 1 and self.easiest > 0


def _published(ce_weight: float, **own: Any) -> dict[str, Any]:
    loop = {"ce_weight": ce_weight, "factor": 2, "batch_real": IDMConfig.batch_real, **own}
    return {"iterations": 20_000, "lr_img": IDMConfig.lr_img, "width": IDMConfig.width, "loop": loop}


_ONE: dict[str, Any] = {"batch_real": 5000, "network_interval": 5}
PRESETS: dict[str, dict[int, dict[str, Any]]] = {
    "cifar10": {
        1: _published(0.5, **_ONE),
        10: _published(0.5),
        50: _published(0.1, accuracy_window=500),
    },
    "cifar100": {
        1: _published(0.5, **_ONE),
        10: _published(0.1, train_steps=50),
        50: _published(0.1, accuracy_window=500),
    },
    # The script for this dataset starts from whole images; the others start from mosaics.
    "tinyimagenet": {
        1: _published(0.5, mosaic=False),
        10: _published(0.5, mosaic=False, accuracy_window=500),
        50: _published(0.8, mosaic=False, accuracy_window=1000, train_steps=50),
    },
}
"""Published settings by dataset and IPC, as fields of RunConfig; ``--loop.preset cifar10`` selects them."""


class IDM(MeanMatching):
    """Improved distribution matching. The whole queue of networks is part of the resume state.

    The public code takes one step of momentum SGD over *all* images for each class. So in the steps of other classes,
    the images of a class move by momentum alone. This is kept, in closed form, so that the classes can share passes.
    """

    name: ClassVar[str] = "idm"
    compiles: ClassVar[bool] = True
    Config: ClassVar[type[BaselineConfig]] = IDMConfig
    preset: ClassVar[Mapping[str, Any]] = {"lr_img": IDMConfig.lr_img}
    presets: ClassVar[Mapping[str, Mapping[int, Mapping[str, Any]]]] = PRESETS

    def __init__(
        self, config: IDMConfig, data: RealData, hook: Hook, synthetic: SyntheticSet, generator: torch.Generator
    ) -> None:
        self.check_images(config, data.images)
        if config.factor > 1:
            synthetic = replace(synthetic, decode=f"partition:{config.factor}")
        super().__init__(config, data, hook, synthetic, generator)
        self.velocity = torch.zeros_like(synthetic.images, requires_grad=False)
        self._compiled = False
        self.queue = [self._learner(generator) for _ in range(config.start_networks)]
        # On a CPU, small groups of classes keep the graph in the cache. A mosaic counts as several images.
        self.passes, tiles = pass_size(data.images, config.width), config.ipc * config.factor**2
        cached = max(1, self.passes // tiles)
        self.classes = min(
            data.num_classes,
            cached if data.images.device.type == "cpu" else classes_per_graph(tiles, data.images, config.width),
        )

    @classmethod
    def check_images(cls, config: IDMConfig, images: Images) -> None:
        """Raises ConfigError if height or width is not divisible by the partition factor."""
        check_factor((int(images.shape[-2]), int(images.shape[-1])), config.factor)

    @classmethod
    def initial_images(
        cls, config: IDMConfig, data: RealData, hook: Hook, generator: torch.Generator, prepared: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Mosaics of independently drawn tiles; see :class:`Baseline`."""
        tiles = config.factor**2 if config.mosaic and config.init == "real" else 1
        parts = [super(IDM, cls).initial_images(config, data, hook, generator) for _ in range(tiles)]
        return mosaic([images for images, _ in parts], config.factor) if tiles > 1 else parts[0][0], parts[0][1]

    def compile(self) -> None:
        """See :class:`Baseline`. Networks that join the queue later are compiled too."""
        self._compiled = True
        for learner in self.queue:
            learner.network.features.compile()  # type: ignore[operator, union-attr]

    def step(self, iteration: int) -> Mapping[str, Any]:
        """Updates the images on each matched network, then trains networks of the queue; see :class:`Baseline`.

        Raises:
            EmptyClassError, NotEnoughSamplesError: see :meth:`Baseline.draw`.
            NonFiniteError: the matching loss or the loss of a network is NaN or infinite.
        """
        config, steps = self.config, self.config.train_steps
        if iteration and iteration % config.accuracy_window == 0:
            for learner in self.queue:
                learner.reset()
        if iteration % config.network_interval == 0:
            if len(self.queue) == config.max_networks:
                self.queue.pop(0)
            self.queue.append(self._learner(self.generator))
        chosen = self._some(config.matched_networks)
        losses = [self._update(learner, iteration, last=learner is chosen[-1]) for learner in chosen]
        trained = [self._learn(n, iteration) for n in self._some(config.trained_networks) for _ in range(steps)]
        if trained and trained[0].device.type != "cpu":
            # An accelerator is asked once for all networks, about their accuracies too.
            (total,) = Learner.count(self.queue, torch.stack(trained).sum())
            _check_learning(total, iteration)
        if config.score_every and (iteration + 1) % config.score_every == 0:
            self.hook.epoch_end(self.queue[0].network)
        return {"loss": sum(losses) / len(losses), "networks": len(self.queue), "accuracy": self.queue[0].accuracy}

    # -- the images ----------------------------------------------------------------------------------
    def _update(self, learner: Learner, iteration: int, last: bool = True) -> float:
        """Updates all images on one network and returns the loss, summed over classes.

        ``last`` is False if another network follows in the same iteration.
        """
        config, images, classes = self.config, self.synthetic.images, self.data.num_classes
        turns = torch.arange(classes, device=images.device).repeat_interleave(config.ipc).view(-1, 1, 1, 1)
        self._drift(turns)
        loss = self.match(
            learner.matching(),
            iteration,
            partial(self._class_losses, learner.network, config.ce_weight * learner.accuracy),
            fresh_network=self.fresh_network,
            expand=partial(decode, factor=config.factor),
            learning=Learning(config.lr_net / (1 - config.net_momentum), config.batch_train, self._one_of_the_queue),
            last=last,
        )
        self.velocity.mul_(config.momentum).add_(images.grad)  # type: ignore[arg-type]
        with torch.no_grad():
            images.sub_(self.velocity, alpha=config.lr_img)
        self._drift(classes - 1 - turns)
        return loss

    @torch.no_grad()
    def _drift(self, turns: Tensor) -> None:
        """Moves each image by momentum alone for t = ``turns`` steps: v -> m^t v, x -> x - lr (m + ... + m^t) v."""
        m = self.config.momentum
        if m:
            left = torch.pow(m, turns.to(self.velocity.dtype))
            self.synthetic.images.sub_(self.velocity * ((1 - left) * (m / (1 - m))), alpha=self.config.lr_img)
            self.velocity.mul_(left)

    def picked(self, network: Any, c: int, rows: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The samples of lowest loss, if each class has a single whole image (see ``easiest``)."""
        if not self.config.narrowed:
            return rows, indices
        labels = torch.full_like(indices, c)
        if self.config.observed_labels:
            labels = self.data.labels[self.hook.pool(c)[: len(indices)]]
        losses = F.cross_entropy(network.classifier(rows), labels, reduction="none")
        kept = losses.topk(min(self.config.easiest, len(losses)), largest=False).indices
        return rows[kept], known_indices(indices[kept], len(self.hook.state))

    def _class_losses(
        self, network: Any, weight: float, own: Tensor, means: Tensor, draws: list[Draw | None], first: int
    ) -> Tensor:
        """See :meth:`MeanMatching.match`; ``weight`` is the weight of the cross-entropy."""
        k, config = len(own), self.config
        tiles = expand(own.flatten(0, 1), config.factor).unflatten(0, (-1, k, config.ipc)).transpose(0, 1).flatten(1, 2)
        shown = torch.cat([self.augmented(x, draw) for x, draw in zip(tiles, draws, strict=True)])
        features = embed_in_passes(network.embed, shown, self.passes)
        losses = distribution_losses(means, features.unflatten(0, (k, -1)))
        if weight:
            logits = network.classifier(features)
            labels = torch.arange(first, first + k, device=own.device).repeat_interleave(tiles.shape[1])
            rows = F.cross_entropy(logits, labels, reduction="none")
            if config.narrowed:
                rows = rows * (logits.argmax(1) != labels)
            losses = losses + weight * rows.unflatten(0, (k, -1)).mean(1)
        return losses

    # -- the networks --------------------------------------------------------------------------------
    def _learner(self, generator: torch.Generator) -> Learner:
        config, network = self.config, self.fresh_network(generator)
        if self._compiled:
            network.features.compile()  # type: ignore[operator, union-attr]
        return Learner(network, config.lr_net, config.net_momentum, config.net_weight_decay)

    def _some(self, count: int) -> list[Learner]:
        order = torch.randperm(len(self.queue), generator=self.generator)
        return [self.queue[int(i)] for i in order[:count]]

    def _one_of_the_queue(self, generator: torch.Generator) -> nn.Module:
        """A copy of a random network of the queue."""
        chosen = self.queue[int(torch.randint(len(self.queue), (1,), generator=generator))]
        return copy.deepcopy(chosen.network).requires_grad_(True)

    def _learn(self, learner: Learner, iteration: int) -> Tensor:
        """Takes one training step on real images, with the targets and weights of the hook. Returns the loss."""
        network, state = learner.learning(), self.hook.state
        (indices,) = state.placed([state.draw_any(self.config.batch_train, self.generator)])
        images = self.data.images[indices]
        targets = self.hook.targets(indices)
        # Batch norm needs the whole batch in one pass for its statistics.
        whole = any(isinstance(m, _BatchNorm) for m in network.modules())
        logits = network(images) if whole else embed_in_passes(network, images, self.passes)
        loss = F.cross_entropy(logits, targets)
        loss = self.hook.batches.reduced(loss, logits, targets, indices)
        # Methods follow the oldest network only: running means of predictions must not mix networks.
        if self.hook.enabled and self.config.score_every and learner is self.queue[0] and not self.hook.decided:
            loss = self.hook.events.scorer_batch(self.hook.state, indices, logits, loss)
        if loss.device.type == "cpu":
            _check_learning(float(loss.detach()), iteration)
        learner.step(loss, logits, targets)
        return loss.detach()

    # -- resume --------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """See :class:`Baseline`; adds the velocity of the images and every network of the queue."""
        return {
            **super().state_dict(),
            "velocity": self.velocity,
            "queue": [learner.state_dict() for learner in self.queue],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :class:`Baseline`."""
        super().load_state_dict(state)
        self.velocity.copy_(state["velocity"])
        self.queue = []
        for saved in state["queue"]:
            learner = self._learner(torch.Generator().manual_seed(0))
            learner.load_state_dict(saved)
            self.queue.append(learner)


def _check_learning(loss: float, iteration: int) -> None:
    """Raises NonFiniteError if a loss on real data is NaN or infinite."""
    if not math.isfinite(loss):
        got = f"{loss} at iteration {iteration}"
        raise NonFiniteError(explain("a finite loss of a network on real data", got, "Lower lr_net"))
