"""TAD as a callback: trust-aware diversion (arXiv 2502.05027). The functions that it calls are beside this file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tad_plugin.core.callback import Callback
from tad_plugin.core.distributed import ranks
from tad_plugin.core.scorer import Scores, score_all
from tad_plugin.core.state import SampleState
from tad_plugin.data.real import RealData
from tad_plugin.errors import NonFiniteError, explain
from tad_plugin.tad.calibration import RECALL_PRECISION, _calibrate_threshold
from tad_plugin.tad.consistency import TemporalEnsemble, consistency_loss, ramp_up
from tad_plugin.tad.feature_model import Projected, _seen
from tad_plugin.tad.geometry import CHUNK, MAX_DIM, check_features
from tad_plugin.tad.mixture import ClassMixture, _fit_class_mixture, _posterior, fit_class_mixture
from tad_plugin.tad.proposals import _propose_untrusted
from tad_plugin.tad.threshold import THRESHOLD, _divide
from tad_plugin.tad.top_predictions import TopEnsemble
from tad_plugin.utils.settings import Settings, setting
from tad_plugin.utils.transfers import read, upload

__all__ = ["TAD", "TADConfig"]

# Smallest soft weight of a sample that takes part. Samples that only fill up a class would otherwise weigh nothing.
_LEAST_WEIGHT = 0.05


@dataclass
class TADConfig(Settings):
    """Settings of TAD. The numbers in brackets are sections of this folder's README.md. All defaults are [ours].

    Attributes:
        warmup: rounds (scorer epochs) before the first division [1.2].
        history: losses are averaged over this many last rounds [1.2].
        threshold: posterior above which a sample is trusted [1.2].
        min_per_class: fewest trusted samples of a class; IPC if that is larger [1.2].
        weighting: "hard" (1) or "soft" (posterior or reliability) [1.2].
        consistency: largest weight of the consistency term. 0 disables it and its N x K memory [1.3].
        consistency_beta: decay of the running mean of predictions [1.3].
        consistency_rounds: rounds until the term has its full weight [1.3].
        consistency_top: keeps the means of this many most likely classes of a sample only. 0 keeps all [1.3].
        recall: True relabels and recalls untrusted samples [1.4].
        recall_precision: estimated precision that recalled labels must reach [1.4].
        max_dim: wider features are projected to this many dimensions [1.4].
    """

    prefix: ClassVar[str] = "tad."

    warmup: int = setting(3, at_least=0)
    history: int = setting(3, at_least=1)
    threshold: float = setting(THRESHOLD, above=0, below=1)
    min_per_class: int = setting(1, at_least=1)
    weighting: str = setting("soft", one_of=("hard", "soft"))
    consistency: float = setting(1.0, at_least=0)
    consistency_beta: float = setting(0.7, at_least=0, below=1)
    consistency_rounds: int = setting(5, at_least=1)
    consistency_top: int = setting(0, at_least=0)
    recall: bool = True
    recall_precision: float = setting(RECALL_PRECISION, above=0, at_most=1)
    max_dim: int = setting(MAX_DIM, at_least=1)


class _Recall(NamedTuple):
    """The inner loop's decision: ``chosen`` bool [N], ``proposal`` int64 [N], ``score`` float32 [N], and its log."""

    chosen: Tensor
    proposal: Tensor
    score: Tensor
    log: dict[str, float]


class _Scored(NamedTuple):
    """What a round needs of the scoring network's output: no [N, K] tensor.

    ``losses`` and ``target_losses`` float32 [N], on the observed labels and on the current targets; ``predicted``
    int64 [N]; ``features`` float32 [N, D].
    """

    losses: Tensor
    target_losses: Tensor
    predicted: Tensor
    features: Tensor

    @classmethod
    def of(cls, scores: Scores, state: SampleState) -> _Scored:
        # Written in place: parts in a list would lie between the chunks and keep their memory from being used again.
        losses, target_losses = torch.empty_like(state.weight), torch.empty_like(state.weight)
        predicted = torch.empty_like(state.target)
        for start in range(0, len(state), CHUNK):
            rows = slice(start, start + CHUNK)
            logits = scores.logits[rows]
            losses[rows] = F.cross_entropy(logits, state.observed[rows], reduction="none")
            target_losses[rows] = F.cross_entropy(logits, state.target[rows], reduction="none")
            predicted[rows] = logits.argmax(1)
        return cls(losses, target_losses, predicted, scores.features)


class TAD(Callback):
    """Divides the real data into a trusted and an untrusted space each round, and recalls relabelled samples.

    Outer loop [paper]: a mixture per class on the losses. Inner loop [paper]: the Mahalanobis distance and the cosine
    to class anchors. The formulas are [ours]: README.md, section 1.
    """

    name: ClassVar[str] = "tad"
    Config: ClassVar[type] = TADConfig
    needs_scorer: ClassVar[bool] = True
    acts_when: ClassVar[str] = (
        "Train each network for more epochs than tad.warmup and call hook.epoch_end(network) after each, or lower"
        " tad.warmup"
    )
    config: TADConfig

    def __init__(self, config: TADConfig | None = None, *, seed: int = 0) -> None:
        super().__init__(config, seed=seed)
        self.round = 0
        self.history: list[Tensor] = []
        self.ensemble: TemporalEnsemble | None = None
        # Running means of the last batch, before it was added: what `on_scorer_again` compares with.
        self._mean: Tensor | None = None

    @classmethod
    def loss_division(cls, state: SampleState) -> tuple[Tensor, ClassMixture]:
        """The mean losses of the last rounds, and the class-wise mixture fitted to them."""
        losses = state["tad_loss"]
        return losses, fit_class_mixture(losses, state.observed, state.num_classes)

    @classmethod
    def judge(cls, probabilities: Tensor, observed: Tensor, num_classes: int) -> Tensor:
        """See :class:`Callback`: the posterior of the low-loss component of the sample's class.

        A class without two groups keeps the share that the others keep, by lowest loss; its trust is 1 or 0 there.
        """
        own = probabilities.double().gather(1, observed[:, None]).flatten()
        losses = -own.clamp_min(1e-12).log()
        mixture = _fit_class_mixture(losses, observed, num_classes)
        trust = _posterior(mixture, losses, observed, monotone=True)
        division = _divide(losses, observed, mixture, trust, THRESHOLD, 1)
        return torch.where(division.replaced[observed], division.trusted.float(), trust.float())

    def acted(self, *, state: SampleState) -> bool:
        """After the first round that divided the data."""
        return bool((state.trust < 1).any())

    # -- events ------------------------------------------------------------------------------------
    def on_start(self, *, state: SampleState, data: RealData) -> None:
        """Registers ``tad_loss`` (mean of the last rounds) and ``recall_score`` (0 if not recalled), float32 [N]."""
        state.register("tad_loss", torch.zeros(len(state), device=state.device))
        state.register("recall_score", torch.zeros(len(state), device=state.device))

    def on_scorer_batch(self, *, state: SampleState, indices: Tensor, logits: Tensor, loss: Tensor) -> Tensor:
        """Adds the consistency term over all samples of the batch, trusted or not."""
        if not self.config.consistency:
            return loss
        if self.ensemble is None:
            self.ensemble = self._make_ensemble(len(state), state.num_classes, state.device)
        self._mean = self.ensemble._ensemble(indices)
        loss = self._consistent(logits, loss, self._mean)
        self.ensemble._update(indices, logits.detach().softmax(1))
        return loss

    def on_scorer_again(self, *, state: SampleState, indices: Tensor, logits: Tensor, loss: Tensor) -> Tensor:
        """Adds the same term against the same running means. They do not take in this prediction."""
        return loss if self._mean is None else self._consistent(logits, loss, self._mean)

    def _consistent(self, logits: Tensor, loss: Tensor, mean: Tensor) -> Tensor:
        weight = ramp_up(self.round, self.config.consistency_rounds, self.config.consistency)
        return loss + weight * consistency_loss(logits, mean)

    def on_scorer_start(self, *, state: SampleState) -> None:
        """Resets warm-up, loss history and running means for the next expert. The division stays."""
        self.round, self.history, self.ensemble, self._mean = 0, [], None, None

    def on_scorer_epoch(self, *, state: SampleState, network: nn.Module, data: RealData) -> None:
        """Runs one round: the outer loop, then the inner loop.

        Raises:
            NonFiniteError: the network gives NaN or infinite losses or features.
        """
        self.round += 1
        if self.ensemble is not None:
            self.ensemble.merge()
        # The logits [N, K] end here.
        scored = _Scored.of(score_all(network, data, ranks()), state)
        losses = scored.losses
        bad = ~torch.isfinite(losses)
        if bool(bad.any()):
            got = f"{int(bad.sum())} non-finite, the first at sample {int(bad.nonzero()[0])}"
            do = "Lower its learning rate, and check that image for NaN"
            raise NonFiniteError(explain("finite losses of the scoring network", got, do))
        self.history = [*self.history, losses][-self.config.history :]
        mean = torch.stack(self.history).mean(0)
        state["tad_loss"].copy_(mean)
        if self.round <= self.config.warmup:
            self.report("round", round=self.round, warmup=True, trusted=len(state), untrusted=0, recalled=0, returned=0)
            return
        self._divide_and_recall(state, data, scored, mean.double())

    # -- one round ---------------------------------------------------------------------------------
    # Everything below comes from the state or was checked above, so the unchecked forms are called.
    def _divide_and_recall(self, state: SampleState, data: RealData, scored: _Scored, losses: Tensor) -> None:
        config, observed = self.config, state.observed
        # On the CPU: a few numbers per sample, and EM asks after each step which classes are done.
        own, labels = losses.cpu(), observed.cpu()
        mixture = _fit_class_mixture(own, labels, state.num_classes)
        # The plain posterior would distrust the very lowest losses of a narrow low component.
        trust = _posterior(mixture, own, labels, monotone=True)
        minimum = max(config.min_per_class, data.ipc or 1)
        division = _divide(own, labels, mixture, trust, config.threshold, minimum)
        standing = _posterior(mixture, scored.target_losses, state.target, monotone=True) > config.threshold
        # The posterior of a class whose mixture was set aside is no weight.
        plain = division.replaced[labels]
        trust, trusted, standing, plain = upload([trust, division.trusted, standing, plain], state.device)
        weight = torch.where(plain, torch.ones_like(trust), trust)
        weight = torch.where(trusted, weight.clamp_min(_LEAST_WEIGHT), weight)

        # Samples recalled before must pass the division with the loss on their target. Otherwise they return.
        earned = state["recall_score"]
        before = earned > 0
        kept = before & standing & ~trusted
        target = torch.where(kept, state.target, observed)
        weight = torch.where(kept, earned, weight)

        recall = self._recall(state, scored, target, trusted, kept)
        recalled = recall.chosen
        target = torch.where(recalled, recall.proposal, target)
        weight = torch.where(recalled, recall.score, weight)
        earned = torch.where(recalled, recall.score, torch.where(kept, earned, torch.zeros_like(earned)))
        state["recall_score"].copy_(earned)
        space = trusted | kept | recalled
        state.update(target=target, trusted=space, trust=trust)
        state.set_weights(self.name, weight if config.weighting == "soft" else torch.ones_like(weight))
        counted = (space, recalled, before & ~kept & ~recalled, target != observed)
        counts = [int(count) for count in read(*(mask.sum() for mask in counted))]
        self.report(
            "round",
            round=self.round,
            warmup=False,
            trusted=counts[0],
            untrusted=len(state) - counts[0],
            recalled=counts[1],
            returned=counts[2],
            relabelled=counts[3],
            **recall.log,
            kept_share=division.kept_share.tolist(),
            unimodal=division.replaced.nonzero().flatten().tolist(),
            separation=mixture.separation.tolist(),
        )

    def _recall(self, state: SampleState, scored: _Scored, target: Tensor, trusted: Tensor, kept: Tensor) -> _Recall:
        """Chooses untrusted samples to recall, given the current targets and who is trusted or stays recalled."""
        config, observed, k = self.config, state.observed, state.num_classes
        if not config.recall:
            noise_rate = 1.0 - float(trusted.float().mean())
            log = {"rho": float("inf"), "rho_agree": float("inf"), "noise_rate": noise_rate}
            return _Recall(torch.zeros_like(trusted), observed, torch.zeros_like(state.trust), log)
        predicted, space = scored.predicted, trusted | kept
        seen = Projected.on_leading_axes(check_features(scored.features), space, config.max_dim)
        calibration = _calibrate_threshold(
            seen,
            target,
            space,
            predicted,
            observed,
            k,
            generator=self.generator,
            recall_precision=config.recall_precision,
        )
        # A class with one trusted sample has no anchor here, and its sample must not enter the projection.
        if bool((torch.bincount(target[space], minlength=k) == 1).any()):
            seen = _seen(seen.features, target, space, k, config.max_dim, None)
        score, proposal = _propose_untrusted(seen, target, space, predicted, k, calibration.temperature)
        limit = torch.where(proposal == observed, calibration.threshold_agree, calibration.threshold)
        chosen = ~space & (proposal >= 0) & (score >= limit)
        log = {
            "rho": calibration.threshold,
            "rho_agree": calibration.threshold_agree,
            "noise_rate": calibration.noise_rate,
        }
        return _Recall(chosen, proposal, score.clamp_min(_LEAST_WEIGHT), log)

    # -- resume ------------------------------------------------------------------------------------
    def _make_ensemble(self, n: int, k: int, device: torch.device) -> TemporalEnsemble:
        config = self.config
        if 0 < config.consistency_top < k:
            return TopEnsemble(n, k, config.consistency_beta, top=config.consistency_top, device=device)
        return TemporalEnsemble(n, k, config.consistency_beta, device=device)

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
            k = int(state["ensemble"].get("num_classes", mean.shape[1]))  # older checkpoints keep all classes
            self.ensemble = self._make_ensemble(len(mean), k, mean.device)
            self.ensemble.load_state_dict(state["ensemble"])
