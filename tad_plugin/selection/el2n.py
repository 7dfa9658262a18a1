"""EL2N pruning (Paul et al., NeurIPS 2021): keep samples by the norm of the early error vector, over networks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F

from tad_plugin.callback import Callback, build_config
from tad_plugin.errors import ConfigError, explain
from tad_plugin.scorer import RealData, ScorerConfig
from tad_plugin.selection.ranking import check_share, keep_lowest, train_logits
from tad_plugin.state import SampleState

__all__ = ["EL2N", "EL2NConfig"]


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
