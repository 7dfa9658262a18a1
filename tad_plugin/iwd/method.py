"""IWD: influence-weighted distillation (arXiv 2510.27253) as a callback."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from time import perf_counter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tad_plugin.core.callback import Callback
from tad_plugin.core.distributed import ranks
from tad_plugin.core.events import Match, Segment
from tad_plugin.core.state import SampleState
from tad_plugin.data.real import RealData
from tad_plugin.errors import ConfigError, DisconnectedGraphError, explain
from tad_plugin.iwd.config import DEFAULT_EVERY, IWDConfig
from tad_plugin.iwd.explicit import explicit_influence
from tad_plugin.iwd.implicit_segment import add_term, segment_influence, synthetic_gradient
from tad_plugin.iwd.running_score import RunningScore
from tad_plugin.iwd.scoring import Fold, Refresh, draw_folds, gather_scores
from tad_plugin.iwd.weighting import Classes
from tad_plugin.nn.networks import reinitialise
from tad_plugin.nn.passes import batch_statistics, forward_size, with_fixed_statistics
from tad_plugin.utils.image_store import image_rows
from tad_plugin.utils.transfers import download

__all__ = ["IWD"]

# In an announced run the first early refresh comes before this part of it is over.
_EARLY_SHARE = 20
# Real images, at most, from which the statistics of a batch norm are taken for scoring.
_STATISTICS = 1024


class IWD(Callback):
    """Weights real samples by their influence on the distillation objective.

    [paper]: influence functions on the objective, an explicit and an implicit term, a softmax with a temperature.
    [ours]: the target, held-out cross-fitting, scoring of all samples at once, the temperature by effective
    sample size, the refresh schedule. README.md in this folder has the definitions.

    A refresh scores samples (negative = helpful) and turns the running scores into weights. In the state it keeps:

    - ``influence``: float32 [N], mean standardised influence, slightly shrunk.
    - ``influence_count``: int64 [N], number of scores.
    - ``influence_weight``: float32 [N], IWD's factor of the weight.

    Only usable samples (``trusted``) are held out or scored, with ``target`` as label. So after TAD, V comes from the
    trusted samples, and IWD's weights multiply TAD's. Register known-correct labels before the first refresh with
    ``state.register("held_out", mask)`` (bool [N]); then V is drawn from those samples only.
    """

    name: ClassVar[str] = "iwd"
    Config: ClassVar[type] = IWDConfig
    needs_graph: ClassVar[bool] = True
    needs_images: ClassVar[bool] = True
    decides_late: ClassVar[bool] = True
    acts_when: ClassVar[str] = (
        "Call hook.before_update(loss, synthetic, network, labels=...) in each iteration, and announce short runs with"
        " attach(iterations=...), so that more refreshes than iwd.warmup fit"
    )
    config: IWDConfig

    def __init__(self, config: IWDConfig | None = None, *, seed: int = 0) -> None:
        super().__init__(config, seed=seed)
        #: refreshes made so far
        self.refreshes = 0
        self._running: RunningScore | None = None
        # Target labels at the last score. A relabelled sample starts anew.
        self._scored_as: Tensor | None = None
        self._seen_match = False
        # Seconds of the matches of this iteration, in a loop that goes class by class.
        self._spent = 0.0
        # Shared by on_segment_term and on_segment of one iteration: the fold, and the gradient in S.
        self._terms: tuple[Fold, Tensor] | None = None

    def acted(self, *, state: SampleState) -> bool:
        """After the first refresh that set weights; always with ``ess=1``, which never does."""
        return self.refreshes > self.config.warmup or self.config.ess == 1

    # -- when --------------------------------------------------------------------------------------
    def due(self, iteration: int) -> bool:
        """True if scores are refreshed in this iteration."""
        config = self.config
        every, early = config.every or DEFAULT_EVERY[config.mode], config.early
        if iteration % every == 0:
            return True
        if self.iterations is not None:
            early = min(early, max(1, self.iterations // _EARLY_SHARE))
        if config.mode != "all" or not early or iteration >= every or iteration % early:
            return False
        times = iteration // early
        return times & (times - 1) == 0

    def wants_graph(self, iteration: int) -> bool:
        """See :class:`Callback`. Mode "all" differentiates nothing of the loop, except the target of a trajectory."""
        batch = self.config.mode == "batch"
        trajectory = self.config.implicit and not self._seen_match
        return (batch or trajectory) and self.due(iteration)

    # -- events ------------------------------------------------------------------------------------
    def on_start(self, *, state: SampleState, data: RealData) -> None:
        """Registers the scores in the state."""
        self._store(state)

    def on_match(self, *, state: SampleState, match: Match) -> None:
        """Scores if this iteration is due. Sets the weights after the warm-up.

        Raises:
            ConfigError: the loop has no path that is switched on, no data, no labels of S, or no distance for
                ``statistic="loop"``.
            DisconnectedGraphError: mode "batch", and the loss does not contain the weights.
            NoHeldOutError: too few usable samples to hold any out.
            NonFiniteError: a loss, gradient or influence is NaN or infinite.
        """
        self._seen_match = True
        self._check_paths(match)
        if not self.due(match.iteration) or (self.config.mode == "all" and not match.last):
            return
        refresh = self._refresh(state, match)
        began = perf_counter() - self._spent
        if self.config.mode == "all":
            level = self._score_all(state, match, refresh)
        else:
            level = self._score_batch(state, match, refresh)
        if match.last:
            self._spent = 0.0
            self._finish(state, began, level)
        else:  # the other classes of this iteration follow
            self._spent = perf_counter() - began

    def on_segment_term(
        self, *, state: SampleState, segment: Segment, term: Tensor, images: Tensor, indices: Tensor
    ) -> None:
        """Adds the term's share of the direction for "validation". The target "matching" needs the loss only."""
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
        """Scores all usable samples by the implicit path if this iteration is due. Then as :meth:`on_match`.

        Raises:
            ConfigError: the implicit path is switched off, or there is no data. Others as :func:`segment_influence`.
        """
        config = self.config
        if not config.implicit:
            expected = "iwd.implicit=True in a trajectory-matching loop"
            got = "False; no real sample enters the loss directly there, so the explicit influence is zero"
            raise ConfigError(explain(expected, got, "Switch implicit on"))
        if not self.due(segment.iteration):
            return
        data = self._data(segment.data)
        began = perf_counter()
        fold = self._folds(state)[0] if self._terms is None else self._terms[0]
        self._terms = None
        found = segment_influence(
            segment,
            image_rows(data.images, fold.scored),
            state.target[fold.scored],
            (data.images[fold.held_out], state.target[fold.held_out]),
            target=config.target,
            weights=state.weight[fold.scored],
            alpha=config.alpha,
            steps=config.steps,
            memory_budget=config.memory_budget,
        )
        self._add(state, fold.scored, _z_scores(state, fold.scored, found))
        self._finish(state, began, float("nan"))

    # -- what is scored ----------------------------------------------------------------------------
    def _score_all(self, state: SampleState, match: Match, refresh: Refresh) -> float:
        """Scores all usable samples on several networks. Returns the mean of the target."""
        folds, levels = self._folds(state), []
        for number in range(self.config.networks):
            learning = refresh.learning
            network = self._fresh(match) if learning is None else learning.network(self.generator)
            network = self._fixed(network, state, refresh)
            found = refresh.score_shared(network, folds[number % len(folds)], ranks())
            self._add(state, found.indices, found.standardised)
            levels.append(found.target)
        return sum(levels) / len(levels)

    def _score_batch(self, state: SampleState, match: Match, refresh: Refresh) -> float:
        """Scores the samples of the batch through the graph of the loop's loss. Returns the target."""
        if not match.weights.requires_grad or not len(match.indices):
            got = "one for which hook.weights() or hook.reweight() was not called in this iteration"
            do = 'Weight the real samples with it, or set iwd.mode="all"'
            raise DisconnectedGraphError(explain("a loss that contains the samples' weights", got, do))
        fold = self._folds(state)[0]
        # "matching" needs another network than the one just matched on: there the loss is small already.
        network = self._fresh(match) if self.config.target == "matching" else match.network
        level, gradient = refresh.target_gradient(self._fixed(network, state, refresh), fold)
        found = explicit_influence(match.loss, match.weights, match.synthetic[0], gradient)
        drawn = match.indices.unique()
        drawn = drawn[torch.isin(drawn, fold.scored)]
        self._add(state, *gather_scores(drawn, _z_scores(state, drawn, found[drawn])))
        return level

    @staticmethod
    def _fixed(network: nn.Module, state: SampleState, refresh: Refresh) -> nn.Module:
        """The network, with the batch statistics of usable samples of every class: samples are scored one by one."""
        if not batch_statistics(network):
            return network
        usable = torch.cat(state.pools())
        return with_fixed_statistics(network, refresh.images[usable[:: math.ceil(len(usable) / _STATISTICS)]])

    def _refresh(self, state: SampleState, match: Match) -> Refresh:
        config, data = self.config, self._data(match.data)
        if match.synthetic_labels is None:
            do = "Pass labels=... to hook.before_update()"
            raise ConfigError(explain("labels of the synthetic images", "none", do))
        through_loop = config.statistic == "loop"
        if config.mode == "all" and through_loop and match.kind != "distribution" and match.distance is None:
            expected = 'class means, or a distance between gradients, for iwd.statistic="loop"'
            do = 'Pass distance=... to hook.before_update(), or set iwd.statistic="means"'
            raise ConfigError(explain(expected, f"kind {match.kind!r} without a distance", do))
        return Refresh(
            images=data.images,
            targets=state.target,
            synthetic=match.synthetic[0].detach(),
            synthetic_labels=match.synthetic_labels.detach(),
            num_classes=state.num_classes,
            target=config.target,
            weights=state.weight,
            alpha=config.alpha,
            steps=config.steps,
            chunk_size=config.chunk_size or forward_size(data.images, match.network),
            expand=match.expand,
            distance=match.distance if through_loop else None,
            explicit=config.explicit,
            learning=match.learning if config.learned else None,
        )

    def _check_paths(self, match: Match) -> None:
        config = self.config
        if not (config.explicit or (config.learned and config.mode == "all" and match.learning is not None)):
            raise ConfigError(
                explain(
                    "iwd.explicit=True in a loop that matches real samples directly",
                    "False, and no implicit path that is switched on",
                    'Switch explicit on, or, in a loop that trains networks on real data (IDM), learned in mode "all"',
                )
            )

    def _data(self, data: RealData | None) -> RealData:
        if data is None or data.images.ndim < 4:
            raise ConfigError(explain("`data` to score", "none", "Pass data=images [N,C,H,W] to attach()"))
        return data

    def _folds(self, state: SampleState) -> list[Fold]:
        vouched = state["held_out"].bool() if "held_out" in state else None
        size, usable = self.config.held_out, state.trusted
        return draw_folds(state.target, state.num_classes, size, usable, vouched, self.generator)

    def _fresh(self, match: Match) -> nn.Module:
        if match.fresh_network is not None:
            return match.fresh_network(self.generator)
        made = copy.deepcopy(match.network)
        reinitialise(made, self.generator)
        return made

    # -- how scores become weights -----------------------------------------------------------------
    def _finish(self, state: SampleState, began: float, target: float) -> None:
        """Ends a refresh: writes the scores to the state, sets the weights after the warm-up, reports."""
        running = self._store(state)
        self.refreshes += 1
        state["influence"].copy_(running.estimate)
        state["influence_count"].copy_(running.counts)
        active = self.refreshes > self.config.warmup and self.config.ess < 1
        record: dict[str, Any] = {"ess": 1.0, "temperature": None}
        record = self._weigh(state, running) if active else {**record, "scored": int(running.seen.sum())}
        self.report(
            "influence",
            refresh=self.refreshes,
            active=active,
            target=target,
            seconds=perf_counter() - began,
            **record,
        )

    def _weigh(self, state: SampleState, running: RunningScore) -> dict[str, Any]:
        """Sets the weights from the running scores. Returns what is logged of the temperatures."""
        config, inside = self.config, running.seen & state.trusted
        classes = Classes(state.target, state.num_classes, inside)
        z = classes.z_scores(classes.saturated(config.sign * running.estimate, config.saturate))
        fitted = classes.fit(z, self._ess(state))
        # A sample without a score counts as the average of its class.
        weights = torch.where(inside, classes.softmax(z, fitted.temperature).float(), 1.0)
        state["influence_weight"].copy_(weights)
        state.set_weights(self.name, weights)
        ess, temperature, scored = download([fitted.ess, fitted.temperature, running.seen.sum()])
        present = ess > 0
        return {
            "ess": float(ess[present].mean()),
            "ess_smallest": float(ess[present].min()),
            "scored": int(scored),
            "temperature": [float(temperature[present].min()), float(temperature[present].max())],
        }

    def _ess(self, state: SampleState) -> Tensor:
        """Float64 [K]: ``ess`` as a share of the trusted samples; larger if an earlier method removed some."""
        k = state.num_classes
        every = Classes(state.observed, k, torch.ones_like(state.trusted)).count
        kept = Classes(state.target, k, state.trusted).count.clamp_min(1)
        return (self.config.ess * every / kept).clamp(max=1.0).clamp_min(self.config.ess)

    # -- running scores ----------------------------------------------------------------------------
    def _store(self, state: SampleState) -> RunningScore:
        """The running scores; made from the state if there are none, for example after a state file was loaded."""
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
        running._add(indices, scores)

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


def _z_scores(state: SampleState, indices: Tensor, scores: Tensor) -> Tensor:
    """Scores [B] of the samples ``indices`` as z-scores inside each class, float64."""
    every = torch.ones_like(indices, dtype=torch.bool)
    return Classes(state.target[indices], state.num_classes, every).z_scores(scores)
