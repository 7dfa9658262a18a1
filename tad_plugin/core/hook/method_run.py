"""MethodRun: the methods of a hook, from their start to the end of the loop: started, scored, saved, resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import nn

from tad_plugin.core.callback import Callback
from tad_plugin.core.dispatch import CallbackList
from tad_plugin.core.distributed import agree, barrier, ranks, share_state
from tad_plugin.core.hook.batches import Batches
from tad_plugin.core.hook.checks import check_needs, finish_lines, new_methods
from tad_plugin.core.hook.indexed_training import IndexedTraining
from tad_plugin.core.hook.loader import RealTraining
from tad_plugin.core.hook.segments import Segments
from tad_plugin.core.hook.usage import Usage
from tad_plugin.core.hook.wiring import WiringCheck, check_wiring
from tad_plugin.core.observer import Observer
from tad_plugin.core.scorer import Scorer, ScorerConfig
from tad_plugin.core.state import SampleState
from tad_plugin.core.state_file import read_state_file
from tad_plugin.data.real import RealData
from tad_plugin.errors import ConfigError, explain
from tad_plugin.nn.training import inner_network
from tad_plugin.utils.arguments import named_errors
from tad_plugin.utils.progress import bar
from tad_plugin.utils.seeds import scorer_seed, seeded_generator
from tad_plugin.utils.torch_modes import default_modes

__all__ = ["MethodRun"]

Self = TypeVar("Self", bound="MethodRun")


class MethodRun:
    """Runs the methods of a loop. :class:`tad_plugin.Hook` adds the handles that the loop calls in each iteration.

    Attributes:
        state: the SampleState.
        callbacks: the methods.
        enabled: False for ``attach("none")``.
        generator: CPU generator of the hook's own draws.
        iteration: updates of the synthetic set so far.
        scoring_seconds: seconds spent in scoring and in the methods' decisions so far.
        batches: what was drawn since the last update.
        segments: the trajectory segment that a script is reporting.
        training: wrappers for a loop that trains networks on the real data.
        indexed: datasets that carry indices, and their losses.
        usage: how often the loop asked each handle.
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
        draw: str = "uniform",
        iterations: int | None = None,
        source: Any = None,
        scoring_transform: Callable[[Any], Any] | None = None,
        announce: bool = False,
    ) -> None:
        self.state = state
        if data is None:
            data = RealData(torch.zeros(len(state), 0), state.observed.cpu(), state.num_classes)
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
        self.check = next((c for c in self.callbacks if isinstance(c, WiringCheck)), None)
        self.usage = Usage(watching=self.check is not None)
        self.by_weight = self.enabled and draw == "weighted"
        self._announce = announce
        self.batches = Batches(state, self.enabled, self.wants_graph, drawn=self.by_weight)
        self.segments = Segments(data if data.images.numel() else None, self.wants_graph)
        # Labels that attach() corrupted must reach a training loop with and without a method.
        given = data.true_labels if corrupted else state.observed
        active, usage = self.enabled or corrupted, self.usage
        self.training = RealTraining(state, given, usage, active=active)
        self.indexed = IndexedTraining(
            state, data, source, state.observed if given is None else given,
            active=active, drawn=self.by_weight, usage=usage, transform=scoring_transform, seed=seed,
        )  # fmt: skip
        self._started = self._decided = False
        self._waits = ""
        for callback in self.callbacks:
            callback.iterations = iterations
            check_needs(callback, data, trains_on_real)

    @property
    def data(self) -> RealData | None:
        """The real data, or None without images."""
        return self.indexed.data

    @contextmanager
    def _scoring(self) -> Iterator[None]:
        began, version = perf_counter(), self.state.version
        with default_modes():
            yield
            if self.state.version != version:
                share_state(self.state)
        self.scoring_seconds += perf_counter() - began
        self.indexed.refresh()

    # -- starting ----------------------------------------------------------------------------------
    def start(
        self: Self, *, progress: bool = False, checkpoint: Callable[[], None] | None = None, epochs: int | None = None
    ) -> Self:
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
            given = f"labels {self.state.digest[:16]}, method {self.method}, seed {self._seed}"
            agree("labels, method and seed", given)
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
        self.indexed.refresh()

    # -- a loop that trains networks on the real data ------------------------------------------------
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
        """Call after each epoch of a network that the loop trains on the real data. No effect if :attr:`decided`.

        The methods score this network on the images of attach(), else on those of the wrapped dataset. Without
        either they take the logits that went through :meth:`loss`, as soon as every sample has some.
        """
        self.usage.note("epoch_end")
        if self.enabled and not self._decided and self.check is None:
            with self._scoring():
                found = self.indexed.scored(inner_network(network))
                self._waits = found if isinstance(found, str) else ""
                if not isinstance(found, str):
                    self.events.scorer_epoch(self.state, *found)

    @property
    def decided(self) -> bool:
        """True if the scoring methods will not decide again: the state came from a file, or :meth:`settle` ran."""
        return self._decided

    def settle(self) -> None:
        """Call when the loop's training on the real data is over. From then on :meth:`epoch_end` has no effect."""
        self._decided = True

    # -- iterations ----------------------------------------------------------------------------------
    def wants_graph(self) -> bool:
        """Whether this iteration's weights (or segment target) carry a graph for a method."""
        return self.enabled and self.events.wants_graph(self.iteration)

    def _next_iteration(self) -> None:
        self.batches.forget()
        self.iteration += 1
        every = self.scorer_config.refresh_every
        if self.scorer is not None and every and self.iteration % every == 0:
            self._scorer_epoch(self.scorer)

    # -- end, files and resume -----------------------------------------------------------------------
    def finish(self) -> None:
        """Fires on_end. If attach() got a state path, writes the state there.

        Prints a line for each method: what it decided and how often the loop asked. ``attach("check")`` prints its
        table and raises WiringError if something is missing. Warns (TadPluginWarning) of a method that never acted.
        """
        if self.enabled:
            self.events.end(self.state)
        if self.state_path is not None:
            self.save_state(self.state_path)
        if self.check is not None:
            if self.indexed.reads is not None:
                self.usage.samples["dataset reads"] = int(self.indexed.reads.sum())
            check_wiring(self.usage, self.check, trains_on_real=self.trains_on_real, iteration=self.iteration)
        elif self.enabled:
            text = finish_lines(self.callbacks, self.state, self.usage, decided=self._decided, waits=self._waits)
            if self._announce:
                print(text)

    def save_state(self, path: str | Path) -> None:
        """Writes the SampleState with the methods' settings in its header (atomic); under torchrun on rank 0 only."""
        if ranks().first:
            self.state.save(path, configs={c.name: c.settings() for c in self.callbacks})
        barrier()

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
