"""Prune by loss, then distil: train on the observed labels, keep the samples of lowest loss (small-loss selection)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

from tad_plugin.callback import Callback, build_config
from tad_plugin.errors import ConfigError, explain
from tad_plugin.scorer import RealData, ScorerConfig
from tad_plugin.selection.ranking import check_share, keep_lowest, mean_losses, train_logits
from tad_plugin.state import SampleState

__all__ = ["LossPruning", "LossPruningConfig"]


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
