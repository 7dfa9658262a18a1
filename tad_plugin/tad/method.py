"""TAD: trust-aware diversion (arXiv 2502.05027) as a callback. The functions it is made of stand beside this file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tad_plugin.core.callback import Callback
from tad_plugin.core.scorer import score_all
from tad_plugin.core.state import SampleState
from tad_plugin.data.real import RealData
from tad_plugin.errors import ConfigError, NonFiniteError, explain
from tad_plugin.tad.calibration import Calibration, calibrate_threshold
from tad_plugin.tad.consistency import TemporalEnsemble, consistency_loss, ramp_up
from tad_plugin.tad.mixture import ClassMixture, fit_class_mixture
from tad_plugin.tad.proposals import reliability
from tad_plugin.tad.threshold import divide

__all__ = ["TAD", "TADConfig"]


@dataclass
class TADConfig:
    """Settings of TAD. METHODS section in brackets; all defaults are ours.

    Attributes:
        warmup: rounds (scorer epochs) before the first division [1.2].
        history: losses are averaged over that many last rounds [1.2.1].
        threshold: posterior above which a sample is trusted [1.2.3].
        min_per_class: trusted samples that a class keeps at least (or IPC, whichever is larger) [1.2.4].
        weighting: "hard" (1) or "soft" (posterior, reliability) [1.2.5].
        consistency: largest weight of the consistency term; 0 switches it off, and its N x K memory [1.3].
        consistency_beta: decay of the running mean of predictions, in [0, 1) [1.3].
        consistency_rounds: rounds until the term has its full weight [1.3].
        recall: whether untrusted samples are relabelled and recalled [1.4].
        recall_precision: precision that the recall threshold must reach on trusted samples [1.4.4].
        max_dim: features are projected to at most that many dimensions [1.4.1].
    """

    warmup: int = 3
    history: int = 3
    threshold: float = 0.5
    min_per_class: int = 1
    weighting: str = "soft"
    consistency: float = 1.0
    consistency_beta: float = 0.7
    consistency_rounds: int = 5
    recall: bool = True
    recall_precision: float = 0.9
    max_dim: int = 128

    def __post_init__(self) -> None:
        checks = [
            (self.warmup >= 0, "warmup of at least 0", self.warmup),
            (self.history >= 1, "history of at least 1", self.history),
            (0 < self.threshold < 1, "threshold in (0, 1)", self.threshold),
            (self.min_per_class >= 1, "min_per_class of at least 1", self.min_per_class),
            (self.weighting in ("hard", "soft"), 'weighting "hard" or "soft"', self.weighting),
            (self.consistency >= 0, "consistency of at least 0", self.consistency),
            (0 <= self.consistency_beta < 1, "consistency_beta in [0, 1)", self.consistency_beta),
            (self.consistency_rounds >= 1, "consistency_rounds of at least 1", self.consistency_rounds),
            (0 < self.recall_precision <= 1, "recall_precision in (0, 1]", self.recall_precision),
            (self.max_dim >= 1, "max_dim of at least 1", self.max_dim),
        ]
        for good, expected, got in checks:
            if not good:
                raise ConfigError(explain(f"tad.{expected}", repr(got), "Correct the setting"))


class TAD(Callback):
    """Divides the real data into a trusted and an untrusted space each round, and recalls what it can relabel.

    Outer loop [paper]: per-class mixture on the losses. Inner loop [paper]: Mahalanobis distance and cosine
    to class anchors. Every formula between is [ours]; see METHODS in the package's README.
    """

    name: ClassVar[str] = "tad"
    Config: ClassVar[type] = TADConfig
    needs_scorer: ClassVar[bool] = True
    config: TADConfig

    def __init__(self, config: TADConfig | None = None, *, seed: int = 0) -> None:
        super().__init__(config, seed=seed)
        self.round = 0
        self.history: list[Tensor] = []
        self.ensemble: TemporalEnsemble | None = None
        self._mean: Tensor | None = None
        #: the last division's mixture, for pictures
        self.mixture: ClassMixture | None = None

    @classmethod
    def loss_division(cls, state: SampleState) -> tuple[Tensor, ClassMixture]:
        """The mean losses of the last rounds, and the class-wise mixture fitted to them."""
        losses = state["tad_loss"]
        return losses, fit_class_mixture(losses, state.observed, state.num_classes)

    # -- events ------------------------------------------------------------------------------------
    def on_start(self, *, state: SampleState, data: RealData) -> None:
        """Registers, float32 [N], ``tad_loss`` (mean of the last rounds) and ``recall_score`` (0 if not recalled)."""
        state.register("tad_loss", torch.zeros(len(state), device=state.device))
        state.register("recall_score", torch.zeros(len(state), device=state.device))

    def on_scorer_batch(self, *, state: SampleState, indices: Tensor, logits: Tensor, loss: Tensor) -> Tensor:
        """Adds the consistency term over all samples of the batch, trusted or not."""
        if not self.config.consistency:
            return loss
        if self.ensemble is None:
            self.ensemble = self._make_ensemble(len(state), state.num_classes, state.device)
        self._mean = self.ensemble.ensemble(indices)
        loss = self._consistent(logits, loss, self._mean)
        self.ensemble.update(indices, logits.detach().softmax(1))
        return loss

    def on_scorer_again(self, *, state: SampleState, indices: Tensor, logits: Tensor, loss: Tensor) -> Tensor:
        """The same term against the same running means, which this prediction does not enter."""
        return loss if self._mean is None else self._consistent(logits, loss, self._mean)

    def _consistent(self, logits: Tensor, loss: Tensor, mean: Tensor) -> Tensor:
        weight = ramp_up(self.round, self.config.consistency_rounds, self.config.consistency)
        return loss + weight * consistency_loss(logits, mean)

    def on_scorer_start(self, *, state: SampleState) -> None:
        """Another expert: warm-up, loss history and running means begin anew; the division so far stands meanwhile."""
        self.round, self.history, self.ensemble, self._mean = 0, [], None, None

    def on_scorer_epoch(self, *, state: SampleState, network: nn.Module, data: RealData) -> None:
        """One round: outer loop, then inner loop.

        Raises:
            NonFiniteError: the network gives NaN or infinite losses.
        """
        config = self.config
        self.round += 1
        scores = score_all(network, data)
        losses = F.cross_entropy(scores.logits, state.observed, reduction="none")
        if not bool(torch.isfinite(losses).all()):
            bad = (~torch.isfinite(losses)).nonzero().flatten()
            raise NonFiniteError(
                explain(
                    "finite losses of the scoring network",
                    f"{len(bad)} that are not, the first at sample {int(bad[0])}",
                    "Lower its learning rate, and check that image for NaN",
                )
            )
        self.history = [*self.history, losses][-config.history :]
        mean = torch.stack(self.history).mean(0)
        state["tad_loss"].copy_(mean)
        if self.round <= config.warmup:
            self.report("round", round=self.round, warmup=True, trusted=len(state), untrusted=0, recalled=0, returned=0)
            return
        self._divide_and_recall(state, data, scores.logits, scores.features, mean)

    # -- one round ---------------------------------------------------------------------------------
    def _divide_and_recall(
        self, state: SampleState, data: RealData, logits: Tensor, features: Tensor, mean: Tensor
    ) -> None:
        config = self.config
        minimum = max(config.min_per_class, data.ipc or 1)
        mixture = fit_class_mixture(mean, state.observed, state.num_classes)
        division = divide(
            mean, state.observed, mixture, state.num_classes, threshold=config.threshold, min_per_class=minimum
        )
        self.mixture = mixture
        # Flat in the tails: the plain posterior would distrust the very lowest losses of a narrow low component.
        trust = mixture.posterior(mean, state.observed, monotone=True)
        trusted, target, weight = division.trusted.clone(), state.observed.clone(), trust.clone()
        # A class whose mixture was set aside has no posterior worth weighting by.
        weight = torch.where(division.replaced[state.observed], torch.ones_like(weight), weight)
        # Samples kept only to fill up a class would otherwise weigh next to nothing.
        weight = torch.where(trusted, weight.clamp_min(0.05), weight)

        # Recalled samples stand the division on their target's loss; one that fails returns.
        earned = state["recall_score"].clone()
        before = earned > 0
        target_loss = F.cross_entropy(logits, state.target, reduction="none")
        standing = mixture.posterior(target_loss, state.target, monotone=True) > config.threshold
        kept = before & standing & ~trusted
        target[kept] = state.target[kept]
        weight[kept] = earned[kept]

        score = torch.zeros(len(state), device=state.device)
        rho = rho_agree = float("inf")
        noise_rate, recalled = 1.0 - float(trusted.float().mean()), torch.zeros_like(trusted)
        if config.recall:
            space = trusted | kept
            calibration, score, proposal = self._reliability(state, features, logits, target, space)
            limit = torch.where(proposal == state.observed, calibration.threshold_agree, calibration.threshold)
            recalled = ~space & (proposal >= 0) & (score >= limit)
            rho, rho_agree, noise_rate = calibration.threshold, calibration.threshold_agree, calibration.noise_rate
            target = torch.where(recalled, proposal, target)
            score = score.clamp_min(0.05)
            weight = torch.where(recalled, score, weight)
        state["recall_score"].copy_(torch.where(recalled, score, torch.where(kept, earned, torch.zeros_like(earned))))
        space = trusted | kept | recalled
        state.update(target=target, trusted=space, trust=trust.clamp(0, 1))
        state.set_weights(self.name, weight if config.weighting == "soft" else torch.ones_like(weight))
        self.report(
            "round",
            round=self.round,
            warmup=False,
            trusted=int(space.sum()),
            untrusted=int((~space).sum()),
            recalled=int(recalled.sum()),
            returned=int((before & ~kept & ~recalled).sum()),
            relabelled=int((state.target != state.observed).sum()),
            rho=rho,
            rho_agree=rho_agree,
            noise_rate=noise_rate,
            kept_share=division.kept_share.tolist(),
            unimodal=division.replaced.nonzero().flatten().tolist(),
            separation=mixture.separation.tolist(),
        )

    def _reliability(
        self, state: SampleState, features: Tensor, logits: Tensor, target: Tensor, space: Tensor
    ) -> tuple[Calibration, Tensor, Tensor]:
        config = self.config
        calibration = calibrate_threshold(
            features,
            target,
            space,
            logits,
            state.num_classes,
            generator=self.generator,
            recall_precision=config.recall_precision,
            observed=state.observed,
            max_dim=config.max_dim,
        )
        found = reliability(
            features,
            target,
            space,
            logits,
            state.num_classes,
            temperature=calibration.temperature,
            max_dim=config.max_dim,
        )
        return calibration, found.score, found.proposal

    # -- resume ------------------------------------------------------------------------------------
    def _make_ensemble(self, n: int, k: int, device: torch.device) -> TemporalEnsemble:
        return TemporalEnsemble(n, k, self.config.consistency_beta, device=device)

    def state_dict(self) -> dict[str, Any]:
        """See :class:`Callback`."""
        return {
            **super().state_dict(),
            "round": self.round,
            "history": list(self.history),
            "ensemble": self.ensemble.state_dict() if self.ensemble is not None else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :class:`Callback`."""
        super().load_state_dict(state)
        self.round = int(state["round"])
        self.history = [t.clone() for t in state["history"]]
        if state["ensemble"] is not None:
            mean = state["ensemble"]["mean"]
            self.ensemble = self._make_ensemble(len(mean), mean.shape[1], mean.device)
            self.ensemble.load_state_dict(state["ensemble"])
