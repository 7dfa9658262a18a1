"""Callback: the events at which a method may act, and the loops that fire them.

Scorer: the plugin's own, an expert of MTT or DATM, or a network that IDM trains on real data::

    on_start(state, data)                                     # once, before any draw
    on_scorer_start(state)                                    # before each of several experts
    for epoch in range(epochs):
        for indices, images in loader:
            logits = network(images)
            w = state.training_weights(indices)
            loss = weighted_cross_entropy(logits, state.targets(indices), w)
            loss = on_scorer_batch(state, indices, logits, loss)       # TAD: + consistency term
            loss.backward(); optimiser.step()                 # sharpness-aware: a second pass, on_scorer_again
        on_scorer_epoch(state, network, data)                 # TAD: divide, then recalibrate

Distribution matching (DM, IDM)::

    on_start(state, data)
    for iteration in range(iterations):
        network = fresh_network()                             # IDM: one of a queue of trained networks
        for c in range(num_classes):
            indices = state.sample(c, batch_real)
            real = augment(images[indices]); syn = augment(synthetic[c])      # same augmentation draw
            w = state.weights(indices)
            loss += ||mean(w * embed(real)) - mean(embed(syn))||^2
        on_match(state, match(loss, w, indices, synthetic, network))   # IWD: explicit influence
        loss.backward(); optimiser.step()
    on_end(state)

Gradient matching (DC, DSA)::

    for iteration in range(iterations):
        network = fresh_network()
        for outer in range(outer_loops):
            for c in range(num_classes):
                w = state.weights(indices)
                g_real = grad(mean(w * cross_entropy(network(real), targets)))
                g_syn = grad(mean(cross_entropy(network(syn), c)))
                loss += distance(g_syn, g_real)
            on_match(state, match)                            # IWD: explicit influence
            loss.backward(); optimiser.step()
            train(network, synthetic)

Trajectory matching (MTT, DATM)::

    experts = [train_scorer(events above) for _ in range(num_experts)]
    for iteration in range(iterations):
        start, target = segment_of(random expert)
        student = start
        for step in range(syn_steps):
            student -= lr * grad(cross_entropy(student(synthetic)))
        loss = ||student - target||^2 / ||start - target||^2
        on_segment(state, segment(loss, start, target, ...))  # IWD: implicit influence
        loss.backward(); optimiser.step()

Every event takes keyword arguments. A method subclasses :class:`Callback` and overrides the events that it needs.
An :class:`tad_plugin.Observer` only watches and cannot write the state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from tad_plugin.core.events import Match, Segment
from tad_plugin.core.state import SampleState
from tad_plugin.data.real import RealData
from tad_plugin.errors import ConfigError, explain
from tad_plugin.utils.seeds import seeded_generator
from tad_plugin.utils.settings import build_config

__all__ = ["Callback", "ClassMixtureLike"]


class ClassMixtureLike(Protocol):
    """A two-component mixture of losses, fitted for each class, as pictures need it."""

    def density(self, index: int, grid: Tensor) -> Tensor:
        """Computes both components' densities of class ``index`` at ``grid`` [G], times their proportions: [G, 2]."""
        ...


class Callback:
    """A method: decides which real samples count, with which label and which weight.

    Class attributes:
        name: the name in ``attach("name")`` and in the entry-point group ``tad_plugin.methods``.
        Config: the :class:`tad_plugin.utils.settings.Settings` of the method; every field has a default.
        needs_scorer: needs ``on_scorer_*``. If the loop trains nothing on real data, the hook trains a scorer.
        needs_images: needs the real images; labels alone are not enough.
        needs_graph: may need ``match.weights`` (or ``segment.target``) as a leaf; see :meth:`wants_graph`.
        needs_true_labels: cannot run without the true labels (an oracle).
        packages: import names of packages beyond those of tad_plugin that it needs; checked before anything runs.
        decides_late: True if the method changes nothing before the first update, so that experts can be shared.
        uses_ipc: False if the method's decisions are the same for every IPC, so that runs of all IPC can share them.
        rival: True if the method is only there to compare with; pictures draw it in another colour.
        told_rate: True if the method uses the nominal noise rate where the experiment knows it; tables mark it.
        acts_when: what a loop must do for the method to act, for the warning of a method that never did.
    """

    name: ClassVar[str] = "callback"
    Config: ClassVar[type | None] = None
    needs_scorer: ClassVar[bool] = False
    needs_images: ClassVar[bool] = False
    needs_graph: ClassVar[bool] = False
    needs_true_labels: ClassVar[bool] = False
    packages: ClassVar[tuple[str, ...]] = ()
    decides_late: ClassVar[bool] = False
    uses_ipc: ClassVar[bool] = True
    rival: ClassVar[bool] = False
    told_rate: ClassVar[bool] = False
    acts_when: ClassVar[str] = "See the method's documentation"

    def __init__(self, config: Any = None, *, seed: int = 0) -> None:
        if config is None and self.Config is not None:
            config = self.Config()
        self.config = config
        #: the source of every draw of the callback; part of its checkpoint
        self.generator = seeded_generator(seed)
        #: updates of the synthetic set that the loop announced, or None; the hook sets it
        self.iterations: int | None = None
        #: receives the records of :meth:`report`; the hook sets it
        self.sink: Callable[[dict[str, Any]], None] | None = None

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any] | None = None, *, seed: int = 0) -> Callback:
        """The callback with ``Config`` filled from a mapping. Raises ConfigError for unknown keys or bad values."""
        if cls.Config is None:
            if settings:
                raise ConfigError(explain(f"no settings for {cls.name!r}", ", ".join(settings), "Remove them"))
            return cls(seed=seed)
        return cls(build_config(cls.Config, settings, f"the method {cls.name!r}"), seed=seed)

    def settings(self) -> dict[str, Any]:
        """The settings as plain values, for run folders and state files."""
        return dataclasses.asdict(self.config) if dataclasses.is_dataclass(self.config) else {}  # type: ignore[arg-type]

    def report(self, event: str, **values: Any) -> None:
        """Sends one log record ``{"event": event, "method": name, **values}`` to the run's log and the observers."""
        if self.sink is not None:
            self.sink({"event": event, "method": self.name, **values})

    @classmethod
    def loss_division(cls, state: SampleState) -> tuple[Tensor, ClassMixtureLike] | None:
        """Returns the losses [N] by which the method divided the samples and their mixture; None if it did not.

        Pictures are drawn from it. ``state`` is the saved state of a finished run.
        """
        return None

    @classmethod
    def judge(cls, probabilities: Tensor, observed: Tensor, num_classes: int) -> Tensor | None:
        """The trust in observed labels from predictions of networks that did not train on these samples.

        Args:
            probabilities: float [N, K].
            observed: int64 [N] in [0, num_classes).
            num_classes: K.

        Returns:
            float32 [N] in [0, 1], above 1/2 for samples whose label it believes; None if the method has no such rule.
        """
        return None

    def acted(self, *, state: SampleState) -> bool:
        """Whether the method has decided so far. Without any write to the state it has not."""
        return state.version > 0

    def decision(self, *, state: SampleState) -> str:
        """What was decided, in words, for the line that ``hook.finish()`` prints."""
        s, weight = state.summary(), state.weight[state.trusted]
        span = f"{float(weight.min()):.2f} to {float(weight.max()):.2f}"
        return f"{s['trusted']:,} of {s['samples']:,} trusted, {s['relabelled']:,} relabelled, weights {span}"

    # -- events ------------------------------------------------------------------------------------
    def on_start(self, *, state: SampleState, data: RealData) -> None:
        """Once, before any draw. Not on resume: there ``load_state_dict`` restores the method."""

    def on_scorer_batch(self, *, state: SampleState, indices: Tensor, logits: Tensor, loss: Tensor) -> Tensor:
        """For each batch in the training of an expert or scorer. Returns the loss to minimise, a scalar.

        Args:
            state: the sample state.
            indices: int64 [B], positions of the samples.
            logits: [B,K], with a graph.
            loss: the scalar loss so far.
        """
        return loss

    def on_scorer_again(self, *, state: SampleState, indices: Tensor, logits: Tensor, loss: Tensor) -> Tensor:
        """When the batch of the last ``on_scorer_batch`` is evaluated again (sharpness-aware training).

        Return the same objective at the new parameters, and count nothing twice.
        """
        return loss

    def on_scorer_start(self, *, state: SampleState) -> None:
        """Before each of several experts that a loop trains in turn. Reset per-network state here."""

    def on_scorer_epoch(self, *, state: SampleState, network: nn.Module, data: RealData) -> None:
        """After each epoch of an expert or scorer."""

    def wants_graph(self, iteration: int) -> bool:
        """Whether the weights of this iteration must be a leaf with a graph. Asked only if ``needs_graph``."""
        return self.needs_graph

    def on_match(self, *, state: SampleState, match: Match) -> None:
        """After the matching loss is built, before the synthetic set is updated (DM, IDM, DC)."""

    def on_segment_term(
        self, *, state: SampleState, segment: Segment, term: Tensor, images: Tensor, indices: Tensor
    ) -> None:
        """Before ``on_segment``, in a loop that differentiates its loss term by term and keeps no graph (TESLA).

        Args:
            state: the sample state.
            segment: the segment; its ``loss`` is not known yet.
            term: a scalar whose gradient in ``images`` is part of the loss's. Its graph lasts for this event only.
            images: [B,C,H,W], rows of the synthetic images.
            indices: int64 [B], which rows.
        """

    def on_segment(self, *, state: SampleState, segment: Segment) -> None:
        """After a segment's loss, before the update (MTT, DATM)."""

    def on_end(self, *, state: SampleState) -> None:
        """Once, after the last update."""

    # -- resume ------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """All that is needed to continue with the same bits: tensors and plain values only."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`.

        The hook moves all tensors to the device of the sample state first. The state of a CPU generator moves along,
        so call ``.cpu()`` on it.
        """
        self.generator.set_state(state["generator"].cpu())
