"""Hook: the seam between a loop and the methods.

A script asks the hook which samples to draw, with what weights and targets; the hook asks the methods.
With no method every handle is an identity that draws no random number.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tad_plugin.core.callback import Callback
from tad_plugin.core.dispatch import CallbackList
from tad_plugin.core.events import Learning, Match, Segment
from tad_plugin.core.hook.batches import BatchHandles
from tad_plugin.core.hook.loader import BatchIndex, IndexedLoader, TrustedCriterion
from tad_plugin.core.hook.segments import SegmentHandles
from tad_plugin.core.observer import Observer
from tad_plugin.core.scorer import Scorer, ScorerConfig
from tad_plugin.core.state import SampleState
from tad_plugin.data.real import RealData
from tad_plugin.errors import ConfigError, StateMismatchError, TadPluginWarning, explain
from tad_plugin.utils.progress import bar
from tad_plugin.utils.seeds import scorer_seed

__all__ = ["Hook"]

C = TypeVar("C")


class Hook(BatchHandles, SegmentHandles):
    """The seam between a loop and the methods. Made by :func:`tad_plugin.attach`.

    Attributes:
        state: the SampleState.
        data: the real data, or None where there are no images (``images`` of shape [N,0] stand for "labels only").
        callbacks: the methods.
        enabled: False for ``attach("none")``.
        generator: CPU generator of the hook's own draws.
        iteration: updates of the synthetic set so far.
        scoring_seconds: seconds spent in scoring and in the methods' decisions so far.
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
        # What on_start sees: labels, ipc and noise rate are there even where the images are not.
        self._known = data
        self.method = method
        self.callbacks = list(callbacks)
        self.enabled = bool(callbacks)
        self.generator = torch.Generator().manual_seed(seed)
        self.events = CallbackList(self.callbacks, list(observers), log)
        self.trains_on_real = trains_on_real
        self.scorer_config = scorer or ScorerConfig()
        self.scorer: Scorer | None = None
        self.scoring_seconds = 0.0
        self.state_path = state_path
        self.iteration = 0
        self._seed = seed
        self._started = False
        self._decided = False
        self._corrupted = corrupted
        # Labels that attach() corrupted must reach a training loop with and without a method.
        self._wraps = self.enabled or corrupted
        self._index = BatchIndex()
        self._expert = -1
        self._student: nn.Module | None = None
        self._segment: Segment | None = None
        self._offset: Tensor | None = None
        self._drawn: list[Tensor] = []
        self._noted: list[Any] = []
        self._ones = torch.ones(1, device=state.device)
        for callback in self.callbacks:
            self._check_needs(callback)

    def _check_needs(self, callback: Callback) -> None:
        if self.data is None and (callback.needs_images or (callback.needs_scorer and not self.trains_on_real)):
            do = "Pass data=images [N,C,H,W]"
            if not callback.needs_images:
                do += (
                    ", or trains_on_real=True if your loop trains a network through hook.loader and hook.criterion"
                    " and calls hook.epoch_end"
                )
            got = "labels only"
            raise ConfigError(
                explain(f"`data` for the method {callback.name!r}, which looks at the real images", got, do)
            )
        if callback.needs_true_labels and self._known.true_labels is None:
            do = "Pass true_labels=..., or use a method that needs none"
            raise ConfigError(explain(f"true_labels for the method {callback.name!r}", "none", do))

    # -- starting ----------------------------------------------------------------------------------
    def start(
        self, *, progress: bool = False, checkpoint: Callable[[], None] | None = None, epochs: int | None = None
    ) -> Hook:
        """Fires on_start and, for methods that need a scorer where the loop trains none, trains the plugin's own.

        :func:`attach` calls it; a loop that resumes calls ``attach(..., start=False)``, loads, then starts.

        Args:
            progress: show a progress bar (needs tqdm).
            checkpoint: called after each scorer epoch.
            epochs: scorer epochs, by default ``scorer.epochs``.
        """
        if not self.enabled:
            return self
        if not self._started:
            began = perf_counter()
            self.events.start(self.state, self._known)
            self.scoring_seconds += perf_counter() - began
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

    def _make_scorer(self) -> Scorer:
        if self.data is None:
            raise ConfigError(explain("`data` for a scorer", "none", "Pass data=images to attach()"))
        return Scorer(self.data, self.scorer_config, seed=scorer_seed(self._seed))

    def _scorer_epoch(self, scorer: Scorer) -> None:
        began = perf_counter()
        scorer.run_epoch(self.state, self.events)
        self.scoring_seconds += perf_counter() - began

    def adopt(self, path: str | Path) -> None:
        """Takes over a saved state: its methods have decided already, so they are not started and nothing is scored.

        A method that the file knows nothing of (IWD on top of a saved TAD state) starts on what the others left.

        Raises:
            FileFormatError: not a state file.
            StateMismatchError: of other data, of methods that are not attached, or written with other settings.
            ConfigError: a method that the file does not know needs a scorer.
        """
        header = SampleState.read_header(path)
        theirs = header["configs"]
        way_out = f"Attach what the file was written with, or delete {path} to compute it anew"
        foreign = sorted(set(theirs) - {c.name for c in self.callbacks})
        if foreign:
            got = f"one that {', '.join(foreign)} wrote, in {path}"
            raise StateMismatchError(explain(f"a state of the method {self.method!r}", got, way_out))
        late = [c for c in self.callbacks if c.name not in theirs]
        for callback in self.callbacks:
            mine = json.loads(json.dumps(callback.settings(), default=str))
            old = theirs.get(callback.name, mine)
            if old != mine:
                keys = sorted(k for k in {*old, *mine} if old.get(k) != mine.get(k))
                got = "; ".join(f"{k}: {old.get(k)!r} in the file, {mine.get(k)!r} now" for k in keys)
                expected = f"a state written with the same settings of {callback.name!r}"
                raise StateMismatchError(explain(expected, got, way_out))
        if theirs and any(c.needs_scorer for c in late):
            names = ", ".join(c.name for c in late if c.needs_scorer)
            raise ConfigError(explain(f"a state file that {names} had a part in", f"{path} without it", way_out))
        self.state.load_state_dict(SampleState.load(path, self.state.observed).state_dict())
        if not theirs:
            return
        for callback in late:
            callback.on_start(state=self.state, data=self._known)
        self._started = self._decided = True

    # -- a loop that trains networks on the real data ------------------------------------------------
    def loader(self, loader: DataLoader[Any]) -> Any:
        """The loader, made to note which samples each batch holds; the same object when no method is on."""
        return IndexedLoader(loader, self._index, len(self.state)) if self._wraps else loader

    def criterion(self, criterion: C) -> C | TrustedCriterion:
        """The criterion, made weighted and relabelled on batches of :meth:`loader`; the same object with no method on.

        See :class:`tad_plugin.core.hook.loader.TrustedCriterion` for what it may be.
        """
        if not self._wraps:
            return criterion
        labels = self._known.true_labels if self._corrupted else None
        # Where a file has decided already, its weights and targets are all that enters.
        events = CallbackList() if self._decided else self.events
        return TrustedCriterion(criterion, self.state, self._index, events, labels)

    def begin_expert(self) -> None:
        """Call it before each of several networks that the loop trains on the real data in turn (MTT's experts).

        What methods learned of the one before begins anew, what they decided stands until they decide again, and the
        state so far is written where attach() got a path, so that a run that is stopped leaves it.
        """
        if self.enabled and not self._decided:
            if self._expert >= 0 and self.state_path is not None:
                self.save_state(self.state_path)
            self._expert += 1
            self.events.position(expert=self._expert)
            self.events.scorer_start(self.state)

    def epoch_end(self, network: nn.Module) -> None:
        """Call it after each epoch of a network that the loop trains on the real data.

        Where the methods have decided already (see :attr:`decided`) it does nothing.
        """
        if self.enabled and not self._decided:
            if self.data is None:
                raise ConfigError(explain("`data` to score with this network", "none", "Pass data=images to attach()"))
            if isinstance(network, nn.DataParallel):
                network = network.module
            began = perf_counter()
            self.events.scorer_epoch(self.state, network, self.data)
            self.scoring_seconds += perf_counter() - began

    @property
    def decided(self) -> bool:
        """Whether the methods that score have decided for good: the state came from a file, or :meth:`settle`."""
        return self._decided

    def settle(self) -> None:
        """Call it when the loop's training on the real data is over: from then on :meth:`epoch_end` does nothing."""
        self._decided = True

    # -- before the synthetic set is updated ---------------------------------------------------------
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
        """Call it after the matching loss is built and before ``backward``; fires on_match and refreshes the scorer.

        Args:
            loss: scalar matching loss, with its graph where :meth:`wants_graph` says so.
            synthetic: the tensors that the loss updates, images first.
            network: the network of this match.
            labels: labels of the synthetic images, int64 [M] or soft [M,K].
            kind: "distribution" or "gradient".
            fresh_network: generator -> another network of this kind.
            expand: (images, labels) -> those that the network sees, where the loop expands its images (IDM).
            last: False where further updates of the same iteration follow (a loop that goes class by class).
            distance: of the kind "gradient": (synthetic gradients, real gradients) of all parameters -> scalar. IWD's
                mode "all" needs it there.
            learning: how the loop trains its networks on the real data, where it does.
        """
        if not self.enabled:
            return
        if isinstance(network, nn.DataParallel):
            network = network.module
        self.events.position(iteration=self.iteration)
        tensors = (synthetic,) if isinstance(synthetic, Tensor) else tuple(synthetic)
        empty = torch.zeros(0, dtype=torch.int64, device=self.state.device)
        indices = torch.cat(self._drawn) if self._drawn else empty
        offset = self._offset if self._offset is not None else torch.zeros(len(self.state), device=self.state.device)
        context = (self.iteration, kind, fresh_network, self.data, expand, last, distance, learning)
        match = Match(loss, offset, indices, tensors, labels, network, *context)
        began = perf_counter()
        self.events.match(self.state, match)
        self.scoring_seconds += perf_counter() - began
        if last:
            self._next_iteration()
        else:
            self._forget_batch()

    def _forget_batch(self) -> None:
        self._offset = None
        self._drawn, self._noted = [], []

    def _next_iteration(self) -> None:
        self._forget_batch()
        super()._next_iteration()
        every = self.scorer_config.refresh_every
        if self.scorer is not None and every and self.iteration % every == 0:
            self._scorer_epoch(self.scorer)

    def finish(self) -> None:
        """Fires on_end and, if attach() got a state path, writes the state there.

        Warns (TadPluginWarning) where the loop's networks were to divide the data and none was trained long enough.
        """
        if self.enabled:
            self.events.end(self.state)
            state, scorers = self.state, [c.name for c in self.callbacks if c.needs_scorer]
            untouched = state.trusted & (state.weight == 1) & (state.target == state.observed)
            if scorers and self.trains_on_real and not self._decided and bool(untouched.all()):
                do = "Train each network for more epochs than the method's warm-up takes, or lower that"
                got = "none: every sample is trusted with its label and weight 1"
                warnings.warn(explain(f"decisions of {', '.join(scorers)}", got, do), TadPluginWarning, stacklevel=2)
        if self.state_path is not None:
            self.save_state(self.state_path)

    # -- files and resume ----------------------------------------------------------------------------
    def save_state(self, path: str | Path) -> None:
        """Writes the SampleState with the methods' settings in its header (atomic)."""
        self.state.save(path, configs={c.name: c.settings() for c in self.callbacks})

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to go on with the same bits."""
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

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`; call it before :meth:`start`.

        Raises:
            StateMismatchError: other data. ConfigError: other methods.
        """
        self.state.load_state_dict(state["state"])
        self.events.load_state_dict(state["callbacks"])
        self.events.position(**state["position"])
        if state["scorer"] is not None:
            self.scorer = self._make_scorer()
            self.scorer.load_state_dict(state["scorer"])
        self.generator.set_state(state["generator"].cpu())
        self.iteration = int(state["iteration"])
        self._started = bool(state["started"])
        self._decided = bool(state["decided"])
        self.scoring_seconds = float(state["scoring_seconds"])
