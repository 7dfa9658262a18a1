"""Four rivals that keep a part of each class: the oracle, loss pruning, EL2N and a random subset."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F

from tad_plugin.core.scorer import ScorerConfig, train_logits
from tad_plugin.core.state import SampleState
from tad_plugin.data.real import RealData
from tad_plugin.selection.ranking import keep_lowest, mean_losses
from tad_plugin.selection.rival import Rival
from tad_plugin.utils.settings import Settings, setting

__all__ = ["EL2N", "EL2NConfig", "LossPruning", "LossPruningConfig", "Oracle", "RandomSubset", "RandomSubsetConfig"]

# Share of each class that is kept where neither the user nor the noise gives one.
_DEFAULT_SHARE = 0.7


class Oracle(Rival):
    """Trusts exactly the correctly labelled samples. Needs the true labels."""

    name: ClassVar[str] = "oracle"
    needs_true_labels: ClassVar[bool] = True
    uses_ipc: ClassVar[bool] = False

    def on_start(self, *, state: SampleState, data: RealData) -> None:
        """Compares the observed labels with the true ones."""
        right = state.observed.eq(data.true_labels)  # type: ignore[arg-type]
        self.keep(state, right, trust=right.float())


@dataclass
class RandomSubsetConfig(Settings):
    """Settings of the random subset.

    Attributes:
        keep: share of each class that is kept.
    """

    prefix: ClassVar[str] = "random."

    keep: float = setting(0.6, above=0, at_most=1)


class RandomSubset(Rival):
    """Keeps a random share of each observed class: the method ``random``.

    It selects real samples, and the loop distils those. The arm of the command line that runs it is ``random-subset``.
    The arm ``random`` is another thing: random real images without distillation.
    """

    name: ClassVar[str] = "random"
    Config: ClassVar[type] = RandomSubsetConfig
    config: RandomSubsetConfig

    def on_start(self, *, state: SampleState, data: RealData) -> None:
        """Draws the subset."""
        scores = torch.rand(len(state), generator=self.generator).to(state.device)
        kept = keep_lowest(scores, state.observed, state.num_classes, self.config.keep, data.ipc or 1)
        self.keep(state, kept)


@dataclass
class _PruningConfig(Settings):
    """What loss pruning and EL2N share."""

    keep: float = setting(0.0, at_least=0, at_most=1)
    scorer: ScorerConfig = field(default_factory=ScorerConfig)

    def share(self, noise_rate: float | None) -> float:
        """The share of each class to keep, given the nominal noise rate where it is known."""
        return self.keep or (_DEFAULT_SHARE if noise_rate is None else 1.0 - noise_rate)


@dataclass
class LossPruningConfig(_PruningConfig):
    """Settings of loss pruning.

    Attributes:
        keep: share of each class that is kept. 0 takes 1 - the nominal noise rate if the experiment set one, else 0.7.
            Knowing the rate favours this rival: a user would have to guess it.
        scorer: settings of the network that is trained.
        history: the loss is averaged over this many last epochs.
    """

    prefix: ClassVar[str] = "loss-prune."

    history: int = setting(3, at_least=1)

    def check(self) -> None:
        """Checks that the network is trained for ``history`` epochs."""
        super().check()
        epochs = self.scorer.epochs
        self.require(self.history <= epochs, f"history of at most scorer.epochs ({epochs})", self.history)


class LossPruning(Rival):
    """Keeps the samples of each class with the lowest cross-entropy against the observed label."""

    name: ClassVar[str] = "loss-prune"
    Config: ClassVar[type] = LossPruningConfig
    needs_images: ClassVar[bool] = True
    told_rate: ClassVar[bool] = True
    config: LossPruningConfig

    def on_start(self, *, state: SampleState, data: RealData) -> None:
        """Trains one network and prunes."""
        config, share = self.config, self.config.share(data.noise_rate)
        logits = train_logits(data, config.scorer, seed=self.network_seed(0), average_last=config.history)
        losses = mean_losses(logits, state.observed)
        self.keep(state, keep_lowest(losses, state.observed, state.num_classes, share, data.ipc or 1), keep=share)


@dataclass
class EL2NConfig(_PruningConfig):
    """Settings of EL2N pruning.

    Attributes:
        keep: share of each class that is kept. 0 takes 1 - the nominal noise rate if the experiment set one, else 0.7.
        scorer: settings of the networks; its ``epochs`` are not used.
        networks: the score is averaged over this many networks (10 in the paper of EL2N).
        hardest: True keeps the largest scores (that paper, on clean data), False the smallest (noisy data).
        epochs: of each network; few, since EL2N is measured early in training.
    """

    prefix: ClassVar[str] = "el2n."

    networks: int = setting(3, at_least=1)
    hardest: bool = False
    epochs: int = setting(5, at_least=1)


class EL2N(Rival):
    """Keeps the samples of each class with the smallest (or largest) ||softmax - onehot||."""

    name: ClassVar[str] = "el2n"
    Config: ClassVar[type] = EL2NConfig
    needs_images: ClassVar[bool] = True
    told_rate: ClassVar[bool] = True
    config: EL2NConfig

    def on_start(self, *, state: SampleState, data: RealData) -> None:
        """Trains the networks and prunes."""
        config, share = self.config, self.config.share(data.noise_rate)
        scorer = dataclasses.replace(config.scorer, epochs=config.epochs)
        onehot = F.one_hot(state.observed, state.num_classes).float()
        score = torch.zeros(len(state), device=state.device)
        for k in range(config.networks):
            logits = train_logits(data, scorer, seed=self.network_seed(k))[-1]
            score += (logits.softmax(1) - onehot).norm(dim=1) / config.networks
        score = -score if config.hardest else score
        self.keep(state, keep_lowest(score, state.observed, state.num_classes, share, data.ipc or 1), keep=share)
