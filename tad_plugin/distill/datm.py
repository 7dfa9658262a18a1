"""DATM: difficulty-aligned trajectory matching (Guo, Wang, Cazenavette, Li, Zhang & You, ICLR 2024).

MTT with three changes: segments come from a range of epochs that suits the size of the set (early ones are easy, late
ones hard) and whose upper bound may grow; the initial images are ones that an expert classifies correctly; and the
labels are soft, start as the experts' and are learned like the images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tad_plugin.core.hook.hook import Hook
from tad_plugin.data.real import RealData
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.distill.baseline import BaselineConfig, class_pool, fresh_network, initial_images
from tad_plugin.distill.experts.source import Experts
from tad_plugin.distill.mtt import MTT, MTTConfig
from tad_plugin.errors import ConfigError, InvalidInputError, NotEnoughSamplesError, explain
from tad_plugin.nn.passes import chunk_size

__all__ = ["DATM", "PRESETS", "DATMConfig", "correctly_predicted", "initial_logits", "upper_bound"]

# Below it the logarithm of a probability, which stands for the logit, would be minus infinity.
_LEAST = torch.finfo(torch.float32).tiny


@dataclass
class DATMConfig(MTTConfig):
    """Settings of DATM: MTT's, and its own. Published ones are in ``PRESETS``.

    Attributes:
        init: "correct" (real images that an expert classifies as their class), "real" or "noise".
        min_start_epoch: segments start at this epoch or later.
        current_max_start_epoch: and below this one at first; 0 takes ``max_start_epoch`` from the start.
        expansion_end_epoch: iteration at which that bound has grown to ``max_start_epoch``.
        lr_y: learning rate of the label logits.
        momentum_y: its momentum.
        threshold: segments with a matching loss above it update nothing.
        label_epoch: epoch of the experts whose logits the labels start from; -1 is the last.
        ema_decay: the result is an average of the iterates with this decay, in [0, 1); 0 takes the last iterate.
    """

    init: str = "correct"
    syn_steps: int = 80
    expert_epochs: int = 2
    max_start_epoch: int = 25
    min_start_epoch: int = 0
    current_max_start_epoch: int = 0
    expansion_end_epoch: int = 3000
    lr_y: float = 2.0
    momentum_y: float = 0.9
    threshold: float = 1.0
    label_epoch: int = -1
    ema_decay: float = 0.0

    inits: ClassVar[tuple[str, ...]] = ("correct", "real", "noise")
    #: experts of flat trajectories (FTD), as its codebase trains them
    expert_defaults: ClassVar[Mapping[str, Any]] = {"rho": 0.01, "alpha": 0.3}

    def __post_init__(self) -> None:
        super().__post_init__()
        first = self.current_max_start_epoch or self.max_start_epoch
        checks = [
            (0 <= self.min_start_epoch < first, f"min_start_epoch in [0, {first})", "min_start_epoch"),
            (first <= self.max_start_epoch, "current_max_start_epoch up to max_start_epoch", "current_max_start_epoch"),
            (self.expansion_end_epoch >= 1, "expansion_end_epoch of at least 1", "expansion_end_epoch"),
            (self.lr_y >= 0, "lr_y of at least 0", "lr_y"),
            (0 <= self.momentum_y < 1, "momentum_y in [0, 1)", "momentum_y"),
            (self.threshold > 0, "threshold above 0", "threshold"),
            (self.label_epoch >= -1, "label_epoch of at least -1", "label_epoch"),
            (0 <= self.ema_decay < 1, "ema_decay in [0, 1)", "ema_decay"),
        ]
        for good, expected, name in checks:
            if not good:
                raise ConfigError(explain(expected, repr(getattr(self, name)), "Correct the setting"))


def _published(
    ipc: int, steps: int, starts: tuple[int, int, int, int], batch_syn: int, lr_img: float, **own: Any
) -> dict[str, Any]:
    low, current, high, end = starts
    loop = {
        "syn_steps": steps,
        "min_start_epoch": low,
        "current_max_start_epoch": current,
        "max_start_epoch": high,
        "expansion_end_epoch": end,
        "batch_syn": batch_syn,
        "expert_epochs": 2,
        "lr_teacher": 0.01,
        "lr_lr": 1e-5,
        "lr_y": 10.0,
        "threshold": 1.0,
        "ema_decay": 0.9995,
    }
    shared = {"ipc": ipc, "iterations": 10_000, "width": 128, "zca": True, "lr_img": lr_img}
    return {**shared, "loop": {**loop, **own}}


_TINY: dict[str, Any] = {"lr_lr": 1e-4, "depth": 4}
PRESETS: dict[str, dict[int, dict[str, Any]]] = {
    "cifar10": {
        1: _published(1, 80, (0, 0, 4, 1), 10, 100, lr_y=5.0, threshold=1.1, lr_lr=1e-7, ema_decay=0.995),
        10: _published(10, 80, (0, 10, 20, 1000), 100, 100, lr_y=2.0),
        50: _published(50, 80, (0, 20, 40, 2000), 500, 1000, lr_y=2.0, ema_decay=0.995),
    },
    "cifar100": {
        1: _published(1, 40, (0, 10, 20, 1000), 1000, 1000, expert_epochs=3),
        10: _published(10, 80, (0, 30, 50, 2000), 1000, 1000),
        50: _published(50, 80, (20, 0, 70, 1), 1000, 1000, init="real"),
    },
    "tinyimagenet": {
        1: _published(1, 40, (0, 15, 20, 2000), 1000, 10_000, **_TINY),
        10: _published(10, 40, (10, 0, 50, 1), 500, 100, **_TINY),
        50: _published(50, 20, (40, 0, 70, 1), 1000, 100, ema_decay=0.995, **_TINY),
    },
}
"""Settings of the published configuration files, as fields of RunConfig: ``--loop.preset cifar10 --ipc 10``."""


def upper_bound(iteration: int, current: int, largest: int, end: int) -> int:
    """The bound below which segments start: from ``current`` at iteration 0 to ``largest`` at iteration ``end``."""
    return min(largest, current + (largest - current) * iteration // end)


def correctly_predicted(pool: Tensor, predictions: Sequence[Tensor], c: int, count: int) -> Tensor:
    """The first ``count`` samples of a pool that an expert classifies as class c: the first expert's, then the next's.

    Args:
        pool: int64 [n], samples in the order in which they are looked at.
        predictions: for each expert its class int64 [n] of each sample of the pool.
        c: the class.
        count: how many are wanted.

    Raises:
        NotEnoughSamplesError: all experts together classify fewer correctly.
    """
    right = torch.stack([p == c for p in predictions])  # [experts, n]
    some = right.any(0)
    if int(some.sum()) < count:
        got = f"{int(some.sum())} of {len(pool)} usable ones by {len(predictions)} experts"
        do = "Train the experts for longer, lower --ipc, or start from --loop.init real"
        raise NotEnoughSamplesError(
            explain(f"{count} samples of class {c} that an expert classifies correctly", got, do)
        )
    # Sorted by the first expert that is right, and among those by place.
    first = right.int().argmax(0).where(some, torch.full_like(pool, len(predictions)))
    return pool[first.argsort(stable=True)[:count]]


def initial_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean logits [M,K] of each image over the experts that classify it correctly.

    Args:
        logits: [E,M,K] of E experts.
        labels: int64 [M].

    Raises:
        InvalidInputError: an image that no expert classifies correctly, whose label would be 0/0.
    """
    right = (logits.argmax(2) == labels).to(logits.dtype)
    count = right.sum(0)
    if not bool((count > 0).all()):
        wrong = (count == 0).nonzero().flatten()
        got = f"none for {len(wrong)} of {len(labels)} images (the first: image {int(wrong[0])})"
        do = "Train the experts for longer, or start from --loop.init real, whose labels come from one expert"
        raise InvalidInputError(explain("an expert that classifies each initial image correctly", got, do))
    return (logits * right[..., None]).sum(0) / count[:, None]


class DATM(MTT):
    """Difficulty-aligned trajectory matching. Its set has soft labels, the softmax of what is learned."""

    name: ClassVar[str] = "datm"
    Config: ClassVar[type[BaselineConfig]] = DATMConfig
    preset: ClassVar[Mapping[str, Any]] = {"lr_img": 100.0}
    presets: ClassVar[Mapping[str, Mapping[int, Mapping[str, Any]]]] = PRESETS
    evaluation: ClassVar[Mapping[str, Any]] = {"batch_size": 128}
    config: DATMConfig

    def __init__(
        self,
        config: DATMConfig,
        data: RealData,
        hook: Hook | None,
        synthetic: SyntheticSet,
        generator: torch.Generator,
        prepared: Experts | None = None,
    ) -> None:
        super().__init__(config, data, hook, synthetic, generator, prepared)
        self.logits: Tensor | None = None
        if synthetic.labels.is_floating_point():
            # Equal to the experts' logits up to a constant in each row, which no loss and no step depends on.
            self.logits = synthetic.labels.detach().clamp_min(_LEAST).log().requires_grad_()
            self.optimizers.append(torch.optim.SGD([self.logits], lr=config.lr_y, momentum=config.momentum_y))
        self._averages: list[Tensor] = [torch.zeros_like(t) for t in self._learned()] if config.ema_decay else []
        self._averaged = 0

    @classmethod
    def initial_images(
        cls, config: Any, data: RealData, hook: Hook | None, generator: torch.Generator, prepared: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Images that experts classify correctly, with the experts' soft labels [M,K]; hard labels without experts.

        Raises:
            NotEnoughSamplesError: too few of a class are classified correctly. InvalidInputError: none for some image.
        """
        if prepared is None:
            plain = config if config.init != "correct" else dataclasses.replace(config, init="real")
            return initial_images(plain, data, hook, generator)
        network = fresh_network(config, data, torch.Generator().manual_seed(0)).eval()
        if config.init != "correct":
            images, labels = initial_images(config, data, hook, generator)
            # As published: the last epoch of a single expert, whether it is right or not.
            found = _logits(network, prepared.read(0)[0][-1], images)
            return images, found.softmax(1)
        experts = _labellers(config, prepared)
        chosen = []
        for c in range(data.num_classes):
            pool = class_pool(hook, data, c)
            pool = pool[torch.randperm(len(pool), generator=generator).to(pool.device)]
            predictions: list[Tensor] = []
            right = torch.zeros(len(pool), dtype=torch.bool, device=pool.device)
            for parameters in experts:
                predictions.append(_logits(network, parameters, data.images[pool]).argmax(1))
                right |= predictions[-1] == c
                if int(right.sum()) >= config.ipc:
                    break
            chosen.append(correctly_predicted(pool, predictions, c, config.ipc))
        images = data.images[torch.cat(chosen)].clone()
        labels = torch.arange(data.num_classes, device=images.device).repeat_interleave(config.ipc)
        logits = torch.stack([_logits(network, parameters, images) for parameters in experts])
        return images, initial_logits(logits, labels).softmax(1)

    # -- one update ----------------------------------------------------------------------------------
    def start_range(self, iteration: int) -> tuple[int, int]:
        """See :class:`MTT`; the upper bound grows."""
        config = self.config
        current = config.current_max_start_epoch or config.max_start_epoch
        return config.min_start_epoch, upper_bound(
            iteration, current, config.max_start_epoch, config.expansion_end_epoch
        )

    def training_labels(self) -> Tensor:
        """Label logits [M,K]; see :class:`MTT`."""
        return self.synthetic.labels if self.logits is None else self.logits

    def accepts(self, loss: float) -> bool:
        """Whether the loss is within the threshold."""
        return loss <= self.config.threshold

    def _update(self, iteration: int) -> None:
        super()._update(iteration)
        decay = self.config.ema_decay
        if decay:
            self._averaged += 1
            for average, value in zip(self._averages, self._learned(), strict=True):
                average.mul_(decay).add_(value.detach(), alpha=1 - decay)

    def _learned(self) -> list[Tensor]:
        return [self.synthetic.images, self.rate, *([] if self.logits is None else [self.logits])]

    # -- results and resume --------------------------------------------------------------------------
    def result(self) -> SyntheticSet:
        """See :class:`MTT`; soft labels, and averages of all iterates so far where ``ema_decay`` is set."""
        found = super().result()
        images, rate, *logits = [t.detach() for t in self._learned()]
        if self._averaged:
            # The average starts at zero; the division makes it one of the iterates alone.
            share = 1 - self.config.ema_decay**self._averaged
            images, rate, *logits = [t / share for t in self._averages]
        found.images = images.clone()
        if found.learning_rate is not None:
            found.learning_rate = float(rate)
        if logits:
            found.labels = logits[0].softmax(1)
        return found

    def state_dict(self) -> dict[str, Any]:
        """See :class:`Baseline`."""
        return {
            **super().state_dict(),
            "logits": None if self.logits is None else self.logits.detach(),
            "averages": list(self._averages),
            "averaged": self._averaged,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :class:`Baseline`."""
        super().load_state_dict(state)
        with torch.no_grad():
            if self.logits is not None:
                self.logits.copy_(state["logits"])
            for average, saved in zip(self._averages, state["averages"], strict=True):
                average.copy_(saved)
        self._averaged = int(state["averaged"])


def _labellers(config: DATMConfig, experts: Experts) -> list[list[Tensor]]:
    """Parameters of each expert that is used, at the epoch that the labels come from."""
    found = []
    for file in range(min(config.max_files or len(experts.files), len(experts.files))):
        trajectories = experts.read(file)
        for trajectory in trajectories[: config.max_experts or len(trajectories)]:
            if config.label_epoch >= len(trajectory):
                got, do = f"{len(trajectory) - 1}", "Lower label_epoch, or train the experts for longer"
                raise InvalidInputError(
                    explain(f"experts of at least label_epoch = {config.label_epoch} epochs", got, do)
                )
            found.append(trajectory[config.label_epoch])
    return found


@torch.no_grad()
def _logits(network: nn.Module, parameters: Sequence[Tensor], images: Tensor) -> Tensor:
    """Logits [n,K] of images under an expert's parameters, which are put into the network."""
    for own, given in zip(network.parameters(), parameters, strict=True):
        own.copy_(given)
    return torch.cat([network(part) for part in images.split(chunk_size(images.device))])
