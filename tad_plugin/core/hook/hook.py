"""Hook: the object that connects a distillation loop with the methods.

A script asks the hook which samples to draw, and with which weights and targets. The hook asks the methods.
Without a method every handle is an identity and draws no random number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tad_plugin.core.callback import Callback
from tad_plugin.core.dispatch import CallbackList
from tad_plugin.core.events import Learning, Match, Segment
from tad_plugin.core.hook.batches import Batches
from tad_plugin.core.hook.checks import check_needs, new_methods, warn_undecided
from tad_plugin.core.hook.loader import RealTraining, TrustedCriterion
from tad_plugin.core.hook.segments import Segments
from tad_plugin.core.observer import Observer
from tad_plugin.core.scorer import Scorer, ScorerConfig
from tad_plugin.core.state import SampleState
from tad_plugin.core.state_file import read_state_file
from tad_plugin.data.real import RealData
from tad_plugin.errors import ConfigError, explain
from tad_plugin.utils.arguments import named_errors
from tad_plugin.utils.progress import bar
from tad_plugin.utils.seeds import scorer_seed, seeded_generator
from tad_plugin.utils.torch_modes import default_modes

__all__ = ["Hook"]

C = TypeVar("C")


class Hook:
    """Connects a loop with the methods. Made by :func:`tad_plugin.attach`.

    Attributes:
        state: the SampleState.
        data: the real data, or None without images (``images`` of shape [N,0] stand for "labels only").
        callbacks: the methods.
        enabled: False for ``attach("none")``.
        generator: CPU generator of the hook's own draws.
        iteration: updates of the synthetic set so far.
        scoring_seconds: seconds spent in scoring and in the methods' decisions so far.
        batches: what was drawn since the last update.
        segments: the trajectory segment that a script is reporting.
        training: wrappers for a loop that trains networks on the real data.
    """

    def __init__(
        self,
        state: SampleState,
        data: RealData | None,
        callbacks: Sequence[Callback],
        *,
        method: str = "none",
        seed: int = 0,
        trains_on_real: bool = False,
        scorer: ScorerConfig | None = None,
        observers: Sequence[Observer] = (),
        log: Callable[[dict[str, Any]], None] | None = None,
        state_path: str | Path | None = None,
        corrupted: bool = False,
    ) -> None:
        self.state = state
        if data is None:
            data = RealData(torch.zeros(len(state), 0), state.observed.cpu(), state.num_classes)
        self.data = data if data.images.numel() else None
        # on_start gets labels, ipc and noise rate even without images.
        self._known = data
        self.method = method
        self.callbacks = list(callbacks)
        self.enabled = bool(callbacks)
        self.generator = seeded_generator(seed)
        self.events = CallbackList(self.callbacks, list(observers), log)
        self.trains_on_real = trains_on_real
        self.scorer_config = scorer or ScorerConfig()
        self.scorer: Scorer | None = None
        self.scoring_seconds = 0.0
        self.state_path = state_path
        self.iteration, self._expert, self._seed = 0, -1, seed
        self.batches = Batches(state, self.enabled, self.wants_graph)
        self.segments = Segments(self.data, self.wants_graph)
        # Labels that attach() corrupted must reach a training loop with and without a method.
        given = data.true_labels if corrupted else state.observed
        self.training = RealTraining(state, given, active=self.enabled or corrupted)
        self._started = self._decided = False
        for callback in self.callbacks:
            check_needs(callback, data, trains_on_real)

    @contextmanager
    def _scoring(self) -> Iterator[None]:
        began = perf_counter()
        with default_modes():
            yield
        self.scoring_seconds += perf_counter() - began

    # -- starting ----------------------------------------------------------------------------------
    def start(
        self, *, progress: bool = False, checkpoint: Callable[[], None] | None = None, epochs: int | None = None
    ) -> Hook:
        """Fires on_start. If a method needs a scorer and the loop trains none, trains the plugin's own.

        :func:`attach` calls it. A loop that resumes calls ``attach(..., start=False)``, loads, then starts.

        Args:
            progress: show a progress bar (needs tqdm).
            checkpoint: called after on_start and after each scorer epoch.
            epochs: scorer epochs, by default ``scorer.epochs``.
        """
        if not self.enabled:
            return self
        if not self._started:
            with self._scoring():
                self.events.start(self.state, self._known)
            self._started = True
            if checkpoint is not None:
                checkpoint()
        if not (self.trains_on_real or self._decided) and any(c.needs_scorer for c in self.callbacks):
            if self.scorer is None:
                self.scorer = self._make_scorer()
            remaining = (self.scorer_config.epochs if epochs is None else epochs) - self.scorer.epoch
            for _ in bar(range(max(0, remaining)), "scorer", progress):
                self._scorer_epoch(self.scorer)
                if checkpoint is not None:
                    checkpoint()
        return self

    @default_modes()
    def _make_scorer(self) -> Scorer:
        return Scorer(self._images(), self.scorer_config, seed=scorer_seed(self._seed))

    def _images(self) -> RealData:
        if self.data is None:
            raise ConfigError(explain("`data` for scoring with a network", "none", "Pass data=images to attach()"))
        return self.data

    def _scorer_epoch(self, scorer: Scorer) -> None:
        with self._scoring():
            scorer.run_epoch(self.state, self.events)

    def adopt(self, path: str | Path) -> None:
        """Takes over a saved state. Its methods have decided already, so they are not started and nothing is scored.

        A method that the file does not know starts on the loaded state. Raises FileFormatError, StateMismatchError or
        ConfigError for a file that does not fit (:func:`new_methods`).
        """
        header, saved = read_state_file(path)
        new = new_methods(header["configs"], self.callbacks, self.method, path)
        self.state.load_state_dict(saved, source=f"the file {path}")
        if header["configs"]:
            for callback in new:
                callback.on_start(state=self.state, data=self._known)
            self._started = self._decided = True

    # -- which samples -----------------------------------------------------------------------------
    def sample(self, c: int, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Up to n indices (int64) of usable samples of class c, without replacement. See :meth:`SampleState.sample`.

        ``generator`` is a CPU generator of the loop, by default the hook's own, seeded by ``attach(seed=...)``.
        """
        return self.state.sample(c, n, self.generator if generator is None else generator)

    def pool(self, c: int) -> Tensor:
        """Indices (int64) of usable samples with target c, ascending."""
        return self.state.pool(c)

    def pools(self) -> list[list[int]]:
        """Usable indices of each class, for ``indices_class`` of the public codebases. See :meth:`Batches.pools`."""
        return self.batches.pools()

    def drawn(self, indices: Tensor | Sequence[int]) -> None:
        """Notes a draw [B] for handles that are called without indices. See :meth:`Batches.drawn`."""
        self.batches.drawn(indices)

    def kept(self, rows: Tensor | Sequence[int]) -> None:
        """Reduces the latest noted draw to these rows (positions or a bool mask)."""
        self.batches.kept(rows)

    # -- which label, which weight -------------------------------------------------------------------
    def targets(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Target labels int64 [B]. Raises InvalidInputError for bad indices."""
        return self.state.targets(indices)

    def weights(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Matching weights float32 [B], mean 1 per class; the one line in a loop. See :meth:`Batches.weights`."""
        return self.batches.weights(indices)

    def reweight(self, rows: Tensor, indices: Tensor | Sequence[int] | None = None) -> Tensor:
        """Rows [B,...] times their matching weights, for a plain mean. See :meth:`Batches.reweight`."""
        return self.batches.reweight(rows, indices)

    def weighted_loss(
        self, loss: Tensor, logits: Tensor, labels: Tensor, indices: Tensor | Sequence[int] | None = None
    ) -> Tensor:
        """Mean cross-entropy with matching weights, a scalar. See :meth:`Batches.weighted_loss`."""
        return self.batches.weighted_loss(loss, logits, labels, indices)

    def matched_gradient(
        self,
        gradient: Sequence[Tensor],
        network: nn.Module,
        images: Tensor,
        labels: Tensor,
        indices: Tensor | Sequence[int] | None = None,
    ) -> list[Tensor]:
        """``gradient``, with a graph in the matching weights where needed. See :meth:`Batches.matched_gradient`."""
        return self.batches.matched_gradient(gradient, network, images, labels, indices)

    # -- a loop that trains networks on the real data ------------------------------------------------
    def loader(self, loader: DataLoader[Any]) -> Any:
        """The loader, which now notes the sample indices of each batch; the same object without a method."""
        return self.training.loader(loader)

    def criterion(self, criterion: C) -> C | TrustedCriterion:
        """Criterion with targets and training weights on batches of :meth:`loader`. See :class:`TrustedCriterion`."""
        # After a file has decided, only its weights and targets enter.
        return self.training.criterion(criterion, CallbackList() if self._decided else self.events)

    def begin_expert(self) -> None:
        """Call before training each expert. Resets per-network state and keeps decisions.

        If attach() got a state path, the state so far is written there, so that an interrupted run leaves it.
        """
        if self.enabled and not self._decided:
            if self._expert >= 0 and self.state_path is not None:
                self.save_state(self.state_path)
            self._expert += 1
            self.events.position(expert=self._expert)
            self.events.scorer_start(self.state)

    def epoch_end(self, network: nn.Module) -> None:
        """Call after each epoch of a network that the loop trains on the real data. No effect if :attr:`decided`."""
        if self.enabled and not self._decided:
            with self._scoring():
                self.events.scorer_epoch(self.state, _inner(network), self._images())

    @property
    def decided(self) -> bool:
        """True if the scoring methods will not decide again: the state came from a file, or :meth:`settle` ran."""
        return self._decided

    def settle(self) -> None:
        """Call when the loop's training on the real data is over. From then on :meth:`epoch_end` has no effect."""
        self._decided = True

    # -- before the synthetic set is updated ---------------------------------------------------------
    def wants_graph(self) -> bool:
        """Whether this iteration's weights (or segment target) carry a graph for a method."""
        return self.enabled and self.events.wants_graph(self.iteration)

    def before_update(
        self,
        loss: Tensor,
        synthetic: Tensor | Sequence[Tensor],
        network: nn.Module,
        *,
        labels: Tensor | None = None,
        kind: str = "distribution",
        fresh_network: Callable[[torch.Generator], nn.Module] | None = None,
        expand: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        last: bool = True,
        distance: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor] | None = None,
        learning: Learning | None = None,
    ) -> None:
        """Call after the matching loss is built and before ``backward``. Fires on_match and refreshes the scorer.

        Args:
            loss: scalar matching loss, with its graph where :meth:`wants_graph` is true.
            synthetic: the tensors that the loss updates, images first.
            network: the network of this match.
            labels: labels of the synthetic images, int64 [M] or soft [M,K].
            kind, fresh_network, expand, last, distance, learning: see :class:`tad_plugin.Match`.
        """
        if not self.enabled:
            return
        self.events.position(iteration=self.iteration)
        batches, tensors = self.batches, (synthetic,) if isinstance(synthetic, Tensor) else tuple(synthetic)
        about = (self.iteration, kind, fresh_network, self.data, expand, last, distance, learning)
        match = Match(loss, batches.leaf(), batches.positions(), tensors, labels, _inner(network), *about)
        with self._scoring():
            self.events.match(self.state, match)
        batches.forget()
        if last:
            self._next_iteration()

    def _next_iteration(self) -> None:
        self.batches.forget()
        self.iteration += 1
        every = self.scorer_config.refresh_every
        if self.scorer is not None and every and self.iteration % every == 0:
            self._scorer_epoch(self.scorer)

    def before_segment_update(self, segment: Segment) -> None:
        """As :meth:`before_update`, for trajectory matching. Sets the segment's ``iteration`` and ``data``."""
        if self.enabled:
            segment.iteration, segment.data = self.iteration, self.data
            self.events.position(iteration=self.iteration)
            with self._scoring():
                self.events.segment(self.state, segment)
            self._next_iteration()

    # -- handles for scripts that report a segment step by step --------------------------------------
    def student(self, network: nn.Module) -> None:
        """Call with the student's network before it is made functional. See :meth:`Segments.student`."""
        self.segments.student(network)

    def begin_segment(
        self,
        images: Tensor,
        labels: Tensor,
        start: Tensor,
        target: Tensor,
        trajectory: Sequence[Sequence[Tensor]],
        start_epoch: int,
        epochs: int,
        *,
        logits: bool = False,
    ) -> Tensor:
        """Call when a segment has been drawn; returns the target to use from here on. See :meth:`Segments.begin`."""
        segment = (images, labels, start, target, trajectory, start_epoch, epochs)
        return self.segments.begin(*segment, iteration=self.iteration, logits=logits)

    def segment_term(self, term: Tensor, images: Tensor, indices: Tensor) -> None:
        """Call for each term of a loss that is differentiated term by term, before its graph is freed (TESLA).

        Args:
            term: a scalar whose gradient in ``images`` is part of the loss's.
            images: [B,C,H,W], rows of the synthetic images before augmentation.
            indices: int64 [B], which rows.
        """
        segment = self.segments.current
        if segment is not None:
            with self._scoring():
                self.events.segment_term(self.state, segment, term, images, indices.to(images.device))

    def end_segment(self, loss: Tensor) -> None:
        """Call when the segment's loss is computed and before it is differentiated. Counts the iteration."""
        segment = self.segments.end(loss)
        if segment is not None:
            self.before_segment_update(segment)
        elif self.enabled:
            self._next_iteration()

    # -- end, files and resume -----------------------------------------------------------------------
    def finish(self) -> None:
        """Fires on_end. If attach() got a state path, writes the state there.

        Warns (TadPluginWarning) if the loop's networks were to divide the data and none was trained long enough.
        """
        if self.enabled:
            self.events.end(self.state)
            if self.trains_on_real and not self._decided and self.state.untouched():
                warn_undecided(self.callbacks)
        if self.state_path is not None:
            self.save_state(self.state_path)

    def save_state(self, path: str | Path) -> None:
        """Writes the SampleState with the methods' settings in its header (atomic)."""
        self.state.save(path, configs={c.name: c.settings() for c in self.callbacks})

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to continue with the same bits."""
        return {
            "state": self.state.state_dict(),
            "callbacks": self.events.state_dict(),
            "position": dict(self.events.fields),
            "scorer": self.scorer.state_dict() if self.scorer is not None else None,
            "generator": self.generator.get_state(),
            "iteration": self.iteration,
            "started": self._started,
            "decided": self._decided,
            "scoring_seconds": self.scoring_seconds,
        }

    @named_errors
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`, of any device. Raises StateMismatchError, ConfigError: other data, methods."""
        self.state.load_state_dict(state["state"])
        self.events.load_state_dict(state["callbacks"], self.state.device)
        self.events.position(**state["position"])
        if state["scorer"] is not None:
            self.scorer = self._make_scorer()
            self.scorer.load_state_dict(state["scorer"])
        self.generator.set_state(state["generator"].cpu())
        self.iteration = int(state["iteration"])
        self._started, self._decided = bool(state["started"]), bool(state["decided"])
        self.scoring_seconds = float(state["scoring_seconds"])


def _inner(network: nn.Module) -> nn.Module:
    return network.module if isinstance(network, nn.DataParallel) else network
