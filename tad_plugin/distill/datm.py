"""DATM: difficulty-aligned trajectory matching (Guo, Wang, Cazenavette, Li, Zhang & You, ICLR 2024).

MTT with three changes:

- Segments start in a range of epochs that suits the size of the set. Early epochs are easy, late ones hard. The upper
  bound of the range may grow during the run.
- The initial images are real images that an expert classifies correctly.
- Labels are soft. They are initialised with the experts' predictions and learned with the images.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tad_plugin.core.hook.hook import Hook
from tad_plugin.data.real import RealData
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.distill.baseline import BaselineConfig, fresh_network, initial_images
from tad_plugin.distill.experts.source import Experts
from tad_plugin.distill.mtt import MTT, MTTConfig
from tad_plugin.errors import InvalidInputError, NotEnoughSamplesError, explain
from tad_plugin.nn.passes import embed_in_passes, forward_size
from tad_plugin.utils.image_store import Images, image_rows
from tad_plugin.utils.settings import setting

__all__ = ["DATM", "PRESETS", "DATMConfig", "correctly_predicted", "initial_logits", "upper_bound"]

# Smallest probability; the logarithm of 0 would be minus infinity.
_LEAST = torch.finfo(torch.float32).tiny


@dataclass
class DATMConfig(MTTConfig):
    """Settings of DATM, in addition to those of MTT. The published ones are in ``PRESETS``.

    Attributes:
        lr_img: learning rate of the images.
        init: "correct" (real images that an expert classifies as their class), "real" or "noise".
        min_start_epoch: segments start at this epoch or later.
        current_max_start_epoch: initial upper bound of the start epoch; 0 takes ``max_start_epoch``.
        expansion_end_epoch: iteration at which the upper bound reaches ``max_start_epoch``.
        lr_y: learning rate of the label logits.
        momentum_y: momentum of the label logits' SGD.
        threshold: segments with a larger matching loss are skipped.
        label_epoch: epoch of the experts whose logits initialise the labels; -1 is the last.
        ema_decay: decay of the exponential moving average of the iterates that is returned as the result; 0 returns
            the last iterate.
    """

    lr_img: float = 100.0
    init: str = setting("correct", one_of=("correct", "real", "noise"))
    syn_steps: int = 80
    expert_epochs: int = 2
    min_start_epoch: int = setting(0, at_least=0)
    current_max_start_epoch: int = setting(0, at_least=0)
    expansion_end_epoch: int = setting(3000, at_least=1)
    lr_y: float = setting(2.0, at_least=0)
    momentum_y: float = setting(0.9, at_least=0, below=1)
    threshold: float = setting(1.0, above=0)
    label_epoch: int = setting(-1, at_least=-1)
    ema_decay: float = setting(0.0, at_least=0, below=1)

    #: experts with flat trajectories (FTD), with the settings of its public code
    expert_defaults: ClassVar[Mapping[str, Any]] = {"rho": 0.01, "alpha": 0.3}

    @property
    def first_bound(self) -> int:
        """Upper bound of the start epoch in the first iteration."""
        return self.current_max_start_epoch or self.max_start_epoch

    def check(self) -> None:
        """See :class:`Settings`."""
        super().check()
        first, last = self.first_bound, self.max_start_epoch
        self.require(first <= last, f"current_max_start_epoch of at most max_start_epoch = {last}", first)
        self.require(self.min_start_epoch < first, f"min_start_epoch below {first}", self.min_start_epoch)


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
"""Settings of the published configuration files, as fields of RunConfig; ``--loop.preset cifar10 --ipc 10`` selects
them."""


_FEW = 0.05
"""Share of accepted segments up to which :meth:`DATM.doubt` speaks [ours]."""


def upper_bound(iteration: int, current: int, largest: int, end: int) -> int:
    """Upper bound of the start epoch. It grows linearly from ``current`` at iteration 0 to ``largest`` at ``end``."""
    return min(largest, current + (largest - current) * iteration // end)


def correctly_predicted(pool: Tensor, predictions: Sequence[Tensor], c: int, count: int) -> Tensor:
    """The first ``count`` samples of a pool that some expert classifies as class c.

    Samples of the first expert come first, then those that only later experts classify correctly.

    Args:
        pool: int64 [n], sample indices in order of preference.
        predictions: predicted classes int64 [n] of the samples of the pool, one tensor per expert.
        c: the class.
        count: number of samples wanted.

    Raises:
        NotEnoughSamplesError: the experts classify fewer samples correctly.
    """
    right = torch.stack([p == c for p in predictions])  # [experts, n]
    some = right.any(0)
    if int(some.sum()) < count:
        got = f"{int(some.sum())} of {len(pool)} usable ones by {len(predictions)} experts"
        do = "Train the experts for longer, lower --ipc, or start from --loop.init real"
        raise NotEnoughSamplesError(
            explain(f"{count} samples of class {c} that an expert classifies correctly", got, do)
        )
    # Sorted by the first expert that is right, then by position.
    first = right.int().argmax(0).where(some, torch.full_like(pool, len(predictions)))
    return pool[first.argsort(stable=True)[:count]]


def initial_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean logits [M,K] of each image over the experts that classify it correctly.

    Args:
        logits: float [E,M,K], of E experts.
        labels: int64 [M].

    Raises:
        InvalidInputError: no expert classifies some image correctly, so its label would be 0/0.
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
    """Difficulty-aligned trajectory matching. The label logits are learned; the set holds their softmax.

    Args and errors as :class:`tad_plugin.distill.mtt.MTT`.
    """

    name: ClassVar[str] = "datm"
    Config: ClassVar[type[BaselineConfig]] = DATMConfig
    preset: ClassVar[Mapping[str, Any]] = {"lr_img": DATMConfig.lr_img}
    presets: ClassVar[Mapping[str, Mapping[int, Mapping[str, Any]]]] = PRESETS
    evaluation: ClassVar[Mapping[str, Any]] = {"batch_size": 128}
    config: DATMConfig

    def __init__(
        self,
        config: DATMConfig,
        data: RealData,
        hook: Hook,
        synthetic: SyntheticSet,
        generator: torch.Generator,
        prepared: Experts | None = None,
    ) -> None:
        super().__init__(config, data, hook, synthetic, generator, prepared)
        self.logits: Tensor | None = None
        if synthetic.labels.is_floating_point():
            # The experts' logits up to a constant per row. Losses and updates do not depend on the constant.
            self.logits = synthetic.labels.detach().clamp_min(_LEAST).log().requires_grad_()
            self.optimizers.append(torch.optim.SGD([self.logits], lr=config.lr_y, momentum=config.momentum_y))
        self._averages: list[Tensor] = [torch.zeros_like(t) for t in self._learned()] if config.ema_decay else []
        self._averaged = 0
        self._segments, self._kept, self._least = 0, 0, math.inf

    @classmethod
    def initial_images(
        cls, config: Any, data: RealData, hook: Hook, generator: torch.Generator, prepared: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Images that experts classify correctly, and their soft labels [M,K]; hard labels without experts.

        Raises:
            NotEnoughSamplesError: the experts classify too few samples of a class correctly.
            InvalidInputError: no expert classifies some image correctly, or the experts have too few epochs.
        """
        if prepared is None:
            plain = config if config.init != "correct" else dataclasses.replace(config, init="real")
            return initial_images(plain, data, hook, generator)
        network = fresh_network(config, data, torch.Generator().manual_seed(0)).eval()
        if config.init != "correct":
            images, labels = initial_images(config, data, hook, generator)
            # As in the public code: the last epoch of one expert, whether its prediction is right or not.
            found = _logits(network, prepared.read(0)[0][-1], images)
            return images, found.softmax(1)
        experts = _labellers(config, prepared)
        chosen = []
        for c in range(data.num_classes):
            pool = hook.pool(c)
            pool = pool[torch.randperm(len(pool), generator=generator).to(pool.device)]
            predictions: list[Tensor] = []
            right = torch.zeros(len(pool), dtype=torch.bool, device=pool.device)
            for parameters in experts:
                predictions.append(_logits(network, parameters, image_rows(data.images, pool)).argmax(1))
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
        """See :class:`MTT`. The upper bound grows."""
        config = self.config
        high = upper_bound(iteration, config.first_bound, config.max_start_epoch, config.expansion_end_epoch)
        return config.min_start_epoch, high

    def training_labels(self) -> Tensor:
        """Label logits [M,K]; see :class:`MTT`."""
        return self.synthetic.labels if self.logits is None else self.logits

    def accepts(self, loss: float) -> bool:
        """True if the loss is at most the threshold."""
        kept = loss <= self.config.threshold
        self._segments, self._kept, self._least = self._segments + 1, self._kept + kept, min(self._least, loss)
        return kept

    def doubt(self) -> str | None:
        """A message if the threshold refused nearly all segments, so that the set is nearly as it began."""
        if self._kept > _FEW * self._segments or not self._segments:
            return None
        limit = f"threshold = {self.config.threshold:g}"
        got = f"{self._kept} of {self._segments} (the least loss: {self._least:.3g}), so the set is nearly as it began"
        do = f"Set --loop.threshold above {self._least:.3g}, or train experts that move more"
        return explain(f"updates from segments with a matching loss of at most {limit}", got, do)

    def _update(self, iteration: int) -> float:
        rate = super()._update(iteration)
        decay = self.config.ema_decay
        if decay:
            self._averaged += 1
            for average, value in zip(self._averages, self._learned(), strict=True):
                average.mul_(decay).add_(value.detach(), alpha=1 - decay)
        return rate

    def _learned(self) -> list[Tensor]:
        return [self.synthetic.images, self.rate, *([] if self.logits is None else [self.logits])]

    # -- results and resume --------------------------------------------------------------------------
    def result(self) -> SyntheticSet:
        """See :class:`MTT`. Labels are soft; with ``ema_decay``, everything is averaged over the iterates."""
        found = super().result()
        images, rate, *logits = [t.detach() for t in self._learned()]
        if self._averaged:
            # The average starts at zero; the division removes that bias.
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
            "accepted": [self._segments, self._kept, self._least],
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
        self._segments, self._kept, self._least = state.get("accepted", (0, 0, math.inf))  # new in 0.1


def _labellers(config: DATMConfig, experts: Experts) -> list[list[Tensor]]:
    """Parameters of each expert in use, at epoch ``label_epoch``."""
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
def _logits(network: nn.Module, parameters: Sequence[Tensor], images: Images) -> Tensor:
    """Logits [n,K] of images; copies an expert's parameters into the network first."""
    for own, given in zip(network.parameters(), parameters, strict=True):
        own.copy_(given)
    return embed_in_passes(network, images, forward_size(images, network))
