"""Prune by loss, then distil: train on the observed labels, keep the samples of lowest loss (small-loss selection)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F

from tad_plugin.core.callback import Callback
from tad_plugin.core.scorer import ScorerConfig
from tad_plugin.core.state import SampleState
from tad_plugin.data.real import RealData
from tad_plugin.errors import ConfigError, explain
from tad_plugin.selection.ranking import check_share, keep_lowest, mean_losses, train_logits
from tad_plugin.utils.settings import build_config

__all__ = ["EL2N", "EL2NConfig", "LossPruning", "LossPruningConfig", "Oracle", "RandomSubset", "RandomSubsetConfig"]


@dataclass
class LossPruningConfig:
    """Settings of loss pruning.

    Attributes:
        keep: share of each class that is kept; 0 takes 1 - the nominal noise rate where the experiment set one
            (which favours this rival: a user would have to guess it), else 0.7.
        history: the loss is averaged over that many last epochs.
        scorer: settings of the network that is trained.
    """

    keep: float = 0.0
    history: int = 3
    scorer: ScorerConfig = field(default_factory=ScorerConfig)

    def __post_init__(self) -> None:
        if isinstance(self.scorer, dict):
            self.scorer = build_config(ScorerConfig, self.scorer, "the networks")
        if self.keep:
            check_share("keep", self.keep)
        if not 1 <= self.history <= self.scorer.epochs:
            raise ConfigError(
                explain(f"history in [1, {self.scorer.epochs}]", str(self.history), "Lower it or train longer")
            )


class LossPruning(Callback):
    """Keeps in each class the samples of lowest cross-entropy against the observed label."""

    name: ClassVar[str] = "loss-prune"
    rival: ClassVar[bool] = True
    Config: ClassVar[type] = LossPruningConfig
    needs_images: ClassVar[bool] = True

    def on_start(self, *, state: SampleState, data: RealData) -> None:
        """Trains one network and prunes."""
        config: LossPruningConfig = self.config
        keep = config.keep or (1.0 - data.noise_rate if data.noise_rate is not None else 0.7)
        seed = int(self.generator.initial_seed())
        logits = train_logits(data, dataclasses.replace(config.scorer), seed=seed, average_last=config.history)
        losses = mean_losses(logits, state.observed)
        kept = keep_lowest(losses, state.observed, state.num_classes, keep, minimum=data.ipc or 1)
        state.update(trusted=kept)
        state.set_weights(self.name, kept.float())
        self.report("division", trusted=int(kept.sum()), untrusted=int((~kept).sum()), keep=keep)


@dataclass
class EL2NConfig:
    """Settings of EL2N pruning.

    Attributes:
        keep: share of each class that is kept; 0 takes 1 - the nominal noise rate where the experiment set one, else
            0.7.
        networks: over how many networks the score is averaged (10 in the paper; here 3).
        hardest: keep the largest scores (the paper, on clean data) instead of the smallest (noisy data).
        epochs: of each network; few, since the score is an early one.
        scorer: settings of the networks; its ``epochs`` are replaced by the ones above.
    """

    keep: float = 0.0
    networks: int = 3
    hardest: bool = False
    epochs: int = 5
    scorer: ScorerConfig = field(default_factory=ScorerConfig)

    def __post_init__(self) -> None:
        if isinstance(self.scorer, dict):
            self.scorer = build_config(ScorerConfig, self.scorer, "the networks")
        self.scorer = dataclasses.replace(self.scorer, epochs=self.epochs)
        if self.keep:
            check_share("keep", self.keep)
        if self.networks < 1:
            raise ConfigError(explain("at least 1 network", str(self.networks), "Correct the setting"))


class EL2N(Callback):
    """Keeps in each class the samples with the smallest (or largest) ||softmax - onehot||."""

    name: ClassVar[str] = "el2n"
    rival: ClassVar[bool] = True
    Config: ClassVar[type] = EL2NConfig
    needs_images: ClassVar[bool] = True

    def on_start(self, *, state: SampleState, data: RealData) -> None:
        """Trains the networks and prunes."""
        config: EL2NConfig = self.config
        keep = config.keep or (1.0 - data.noise_rate if data.noise_rate is not None else 0.7)
        onehot = F.one_hot(state.observed, state.num_classes).float()
        seed = int(self.generator.initial_seed())
        score = torch.zeros(len(state), device=state.device)
        for k in range(config.networks):
            logits = train_logits(data, dataclasses.replace(config.scorer), seed=seed + 101 * k)[-1]
            score += (logits.softmax(1) - onehot).norm(dim=1) / config.networks
        kept = keep_lowest(-score if config.hardest else score, state.observed, state.num_classes, keep, data.ipc or 1)
        state.update(trusted=kept)
        state.set_weights(self.name, kept.float())
        self.report("division", trusted=int(kept.sum()), untrusted=int((~kept).sum()), keep=keep)


class Oracle(Callback):
    """Trusts exactly the correctly labelled samples. Needs the true labels."""

    name: ClassVar[str] = "oracle"
    rival: ClassVar[bool] = True
    needs_true_labels: ClassVar[bool] = True

    def on_start(self, *, state: SampleState, data: RealData) -> None:
        """Sets ``trusted`` and ``trust``."""
        right = state.observed.eq(data.true_labels)  # type: ignore[arg-type]
        state.update(trusted=right, trust=right.float())
        state.set_weights(self.name, right.float())
        self.report("division", trusted=int(right.sum()), untrusted=int((~right).sum()))


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
    rival: ClassVar[bool] = True
    Config: ClassVar[type] = RandomSubsetConfig

    def on_start(self, *, state: SampleState, data: RealData) -> None:
        """Draws the subset."""
        scores = torch.rand(len(state), generator=self.generator).to(state.device)
        kept = keep_lowest(scores, state.observed, state.num_classes, self.config.keep, minimum=data.ipc or 1)
        state.update(trusted=kept)
        state.set_weights(self.name, kept.float())
        self.report("division", trusted=int(kept.sum()), untrusted=int((~kept).sum()))
