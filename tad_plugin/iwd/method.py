"""IWD: influence-weighted distillation (arXiv 2510.27253) as a callback, made of the functions beside this file."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from time import perf_counter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tad_plugin.core.callback import Callback
from tad_plugin.core.events import Match, Segment
from tad_plugin.core.state import SampleState
from tad_plugin.data.real import RealData
from tad_plugin.errors import ConfigError, DisconnectedGraphError, explain
from tad_plugin.iwd.config import DEFAULT_EVERY, IWDConfig
from tad_plugin.iwd.explicit import explicit_influence
from tad_plugin.iwd.implicit_segment import add_term, segment_influence, synthetic_gradient
from tad_plugin.iwd.scoring import held_out_folds, score_on_network, target_gradient
from tad_plugin.iwd.targets import Fold
from tad_plugin.iwd.weighting import RunningScore, fit_temperature, saturate, softmax_weights, standardise
from tad_plugin.nn.networks import reinitialise
from tad_plugin.nn.passes import chunk_size

__all__ = ["DEFAULT_EVERY", "IWD", "IWDConfig"]


class IWD(Callback):
    """Weights real samples by their influence on the distillation objective.

    [paper]: influence functions on the objective, an explicit and an implicit term, a softmax with a temperature.
    [ours]: the target, held-out cross-fitting, scoring of all samples at once, the temperature by effective
    sample size, the refresh schedule.

    It keeps in the state: ``influence`` (float32 [N], mean standardised influence, slightly shrunk, negative =
    helpful), ``influence_count`` (int64 [N], how often the sample was scored) and ``influence_weight`` (float32 [N],
    its factor of the weight). Only usable samples (``trusted``) are held out or scored, with ``target`` as label, so
    after TAD V is drawn from the trusted space and the weights multiply TAD's. Who knows some labels to be right names
    them with ``state.register("held_out", mask)`` (bool [N]) before the first refresh: V is then drawn from those only.
    """

    name: ClassVar[str] = "iwd"
    Config: ClassVar[type] = IWDConfig
    needs_graph: ClassVar[bool] = True
    needs_images: ClassVar[bool] = True
    decides_late: ClassVar[bool] = True
    config: IWDConfig

    def __init__(self, config: IWDConfig | None = None, *, seed: int = 0) -> None:
        super().__init__(config, seed=seed)
        #: refreshes made so far
        self.refreshes = 0
        self._running: RunningScore | None = None
        self._scored_as: Tensor | None = None
        self._seen_match = False
        self._spent = 0.0
        # What on_segment_term and on_segment of one iteration share: who is held out, and the gradient in S.
        self._terms: tuple[Fold, Tensor] | None = None

    # -- when --------------------------------------------------------------------------------------
    def due(self, iteration: int) -> bool:
        """Whether scores are refreshed in this iteration."""
        config = self.config
        every = config.every or DEFAULT_EVERY[config.mode]
        if iteration % every == 0:
            return True
        if config.mode != "all" or not config.early or iteration >= every or iteration % config.early:
            return False
        times = iteration // config.early
        return times & (times - 1) == 0

    def wants_graph(self, iteration: int) -> bool:
        """See :class:`Callback`. Mode "all" differentiates nothing of the loop, except a trajectory's target."""
        batch = self.config.mode == "batch"
        trajectory = self.config.implicit and not self._seen_match
        return (batch or trajectory) and self.due(iteration)

    # -- events ------------------------------------------------------------------------------------
    def on_start(self, *, state: SampleState, data: RealData) -> None:
        """Registers the score store."""
        self._store(state)

    def on_match(self, *, state: SampleState, match: Match) -> None:
        """Scores (if this iteration is due) and, after the warm-up, sets the weights.

        Raises:
            ConfigError: the explicit path is switched off in a loop that has no other, no data, or mode "all" in
                a loop that does not match class means.
            DisconnectedGraphError: mode "batch" in a loop whose loss does not contain the weights.
            NoHeldOutError: too few usable samples to hold any out.
            NonFiniteError: a loss, gradient or influence is NaN or infinite.
        """
        self._seen_match = True
        config = self.config
        if not (config.explicit or (config.learned and config.mode == "all" and match.learning is not None)):
            raise ConfigError(
                explain(
                    "iwd.explicit=True in a loop that matches real samples directly",
                    "False, and nothing else: such a loop has no implicit influence, or IWD is not to take it",
                    'Switch explicit on; in a loop that trains networks on real data (IDM), learned in mode "all"',
                )
            )
        if not self.due(match.iteration) or (config.mode == "all" and not match.last):
            return
        data, labels = self._data(match.data), match.synthetic_labels
        if labels is None:
            raise ConfigError(
                explain("labels of the synthetic images", "none", "Pass labels=... to hook.before_update()")
            )
        began = perf_counter() - self._spent
        values = (self._all if config.mode == "all" else self._batch)(state, match, data, labels)
        self._spent = 0.0 if match.last else perf_counter() - began
        if not match.last:
            return  # the other classes of this iteration follow
        self._finish(state, began, sum(values) / len(values))

    def on_segment_term(
        self, *, state: SampleState, segment: Segment, term: Tensor, images: Tensor, indices: Tensor
    ) -> None:
        """Sums the direction of the target "validation" over the terms; for "matching" the loss itself is enough."""
        config = self.config
        if not (config.implicit and config.target == "validation" and self.due(segment.iteration)):
            return
        if self._terms is None:
            fold, data = self._folds(state)[0], self._data(segment.data)
            held_out = (data.images[fold.held_out], state.target[fold.held_out])
            gradient = synthetic_gradient(segment, held_out, alpha=config.alpha, steps=config.steps)
            self._terms = (fold, gradient)
        add_term(segment, term, images, self._terms[1][indices])

    def on_segment(self, *, state: SampleState, segment: Segment) -> None:
        """The same for trajectory matching: all usable samples by the implicit path.

        Raises:
            ConfigError: the implicit path is switched off, or no data. Others as :func:`segment_influence`.
        """
        config = self.config
        if not config.implicit:
            raise ConfigError(
                explain(
                    "iwd.implicit=True in a trajectory-matching loop",
                    "False, and there no real sample enters the loss directly, so the explicit influence is zero",
                    "Switch implicit on",
                )
            )
        if not self.due(segment.iteration):
            return
        data = self._data(segment.data)
        began = perf_counter()
        fold = self._folds(state)[0] if self._terms is None else self._terms[0]
        self._terms = None
        found = segment_influence(
            segment,
            data.images[fold.scored],
            state.target[fold.scored],
            (data.images[fold.held_out], state.target[fold.held_out]),
            target=config.target,
            weights=state.weight[fold.scored],
            alpha=config.alpha,
            steps=config.steps,
            memory_budget=config.memory_budget,
        )
        self._add(state, fold.scored, standardise(found, state.target[fold.scored], state.num_classes))
        self._finish(state, began, float("nan"))

    # -- scoring -----------------------------------------------------------------------------------
    def _all(self, state: SampleState, match: Match, data: RealData, labels: Tensor) -> list[float]:
        config = self.config
        through_loop = config.statistic == "loop"
        if through_loop and match.kind != "distribution" and match.distance is None:
            raise ConfigError(
                explain(
                    'a loop that matches class means, or tells the distance of its gradients, for iwd.statistic="loop"',
                    f"kind {match.kind!r} without a distance",
                    'Pass distance=... to hook.before_update(), or set iwd.statistic="means"',
                )
            )
        folds = self._folds(state)
        learning = match.learning if config.learned else None
        values = []
        for number in range(config.networks):
            found = score_on_network(
                self._fresh(match) if learning is None else learning.network(self.generator),
                data.images,
                state.target,
                folds[number % len(folds)],
                match.synthetic[0].detach(),
                labels.detach(),
                state.num_classes,
                target=config.target,
                weights=state.weight,
                alpha=config.alpha,
                steps=config.steps,
                chunk_size=config.chunk_size or chunk_size(data.images.device),
                expand=match.expand,
                distance=match.distance if through_loop else None,
                explicit=config.explicit,
                learning=learning,
            )
            self._add(state, found.indices, found.standardised)
            values.append(found.target)
        return values

    def _batch(self, state: SampleState, match: Match, data: RealData, labels: Tensor) -> list[float]:
        config = self.config
        if not match.weights.requires_grad or not len(match.indices):
            raise DisconnectedGraphError(
                explain(
                    "a loss that contains the samples' weights",
                    "one for which hook.weights() or hook.reweight() was not called in this iteration",
                    'Weight the real samples with it, or set iwd.mode="all"',
                )
            )
        fold = self._folds(state)[0]
        # M on another network than the one just matched on: there the loss is at its own minimum.
        networks = [self._fresh(match)] if config.target == "matching" else [match.network]
        value, gradient = target_gradient(
            config.target,
            networks,
            match.synthetic[0].detach(),
            labels.detach(),
            data.images[fold.held_out],
            state.target[fold.held_out],
            state.num_classes,
            alpha=config.alpha,
            steps=config.steps,
            chunk_size=config.chunk_size or chunk_size(data.images.device),
            expand=match.expand,
        )
        found = explicit_influence(match.loss, match.weights, match.synthetic[0], gradient)
        drawn = match.indices.unique()
        drawn = drawn[torch.isin(drawn, fold.scored)]
        self._add(state, drawn, standardise(found[drawn], state.target[drawn], state.num_classes))
        return [value]

    def _folds(self, state: SampleState) -> list[Fold]:
        vouched = state["held_out"].bool() if "held_out" in state else None
        return held_out_folds(
            state.target,
            state.num_classes,
            self.config.held_out,
            state.trusted,
            vouched=vouched,
            generator=self.generator,
        )

    def _fresh(self, match: Match) -> nn.Module:
        if match.fresh_network is not None:
            return match.fresh_network(self.generator)
        made = copy.deepcopy(match.network)
        reinitialise(made, self.generator)
        return made

    def _data(self, data: RealData | None) -> RealData:
        if data is None or data.images.ndim < 4:
            raise ConfigError(explain("`data` to score", "none", "Pass data=images [N,C,H,W] to attach()"))
        return data

    # -- scores and weights ------------------------------------------------------------------------
    def _store(self, state: SampleState) -> RunningScore:
        """The running scores, made or (after a state file was loaded) taken up from the state."""
        state.register("influence", torch.zeros(len(state), device=state.device))
        state.register("influence_count", torch.zeros(len(state), dtype=torch.int64, device=state.device))
        state.register("influence_weight", torch.ones(len(state), device=state.device))
        if self._running is None:
            self._running = RunningScore(len(state), decay=self.config.decay or None, device=state.device)
            self._running.restore(state["influence"], state["influence_count"])
            self._scored_as = state.target.clone()
        return self._running

    def _add(self, state: SampleState, indices: Tensor, scores: Tensor) -> None:
        running = self._store(state)
        if self._scored_as is not None:
            # A relabelled sample's old scores belong to another class.
            running.forget(self._scored_as != state.target)
        self._scored_as = state.target.clone()
        running.add(indices, scores)

    def _finish(self, state: SampleState, began: float, target: float) -> None:
        config, running = self.config, self._store(state)
        self.refreshes += 1
        state["influence"].copy_(running.estimate)
        state["influence_count"].copy_(running.counts)
        active = self.refreshes > config.warmup and config.ess < 1
        record: dict[str, Any] = {"ess": 1.0, "temperature": None}
        if active:
            inside = running.seen & state.trusted
            scores = config.sign * running.estimate
            scores = saturate(scores, state.target, state.num_classes, config.saturate, inside)
            fitted = fit_temperature(scores, state.target, state.num_classes, self._ess(state), inside)
            found = softmax_weights(scores, state.target, state.num_classes, fitted.temperature, inside)
            # A sample that was not scored yet counts as the average of its class.
            weights = torch.where(inside, found, torch.ones_like(found)).float()
            state["influence_weight"].copy_(weights)
            state.set_weights(self.name, weights)
            present = fitted.ess > 0
            record = {
                "ess": float(fitted.ess[present].mean()),
                "ess_smallest": float(fitted.ess[present].min()),
                "temperature": [float(fitted.temperature[present].min()), float(fitted.temperature[present].max())],
            }
        self.report(
            "influence",
            refresh=self.refreshes,
            active=active,
            scored=int(running.seen.sum()),
            target=target,
            seconds=perf_counter() - began,
            **record,
        )

    def _ess(self, state: SampleState) -> Tensor:
        """Float64 [K]: what is left of ``ess`` where a method before this one has already set samples aside."""
        k = state.num_classes
        every = torch.bincount(state.observed, minlength=k).double()
        kept = torch.bincount(state.target[state.trusted], minlength=k).double().clamp_min(1)
        return (self.config.ess * every / kept).clamp(max=1.0).clamp_min(self.config.ess)

    # -- resume ------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """See :class:`Callback`."""
        return {
            **super().state_dict(),
            "refreshes": self.refreshes,
            "running": self._running.state_dict() if self._running is not None else None,
            "scored_as": self._scored_as,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :class:`Callback`."""
        super().load_state_dict(state)
        self.refreshes = int(state["refreshes"])
        self._running = self._scored_as = None
        if state["running"] is not None:
            total = state["running"]["total"]
            self._running = RunningScore(len(total), decay=self.config.decay or None, device=total.device)
            self._running.load_state_dict(state["running"])
            self._scored_as = state["scored_as"].clone()
