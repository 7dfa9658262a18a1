"""Callback: the events at which a method may act, and the loops in which they fire.

Scorer (the plugin's own, an MTT/DATM expert, or a network that IDM trains on real data)::

    on_start(state, data)                                     # once, before anything is drawn
    for epoch in range(epochs):
        for indices, images in loader:
            logits = network(images)
            loss = weighted_cross_entropy(logits, state.targets(indices), state.weight[indices])
            loss = on_scorer_batch(state, indices, logits, loss)       # TAD: + consistency term
            loss.backward(); optimiser.step()
        on_scorer_epoch(state, network, data)                 # TAD: divide, then recalibrate

Distribution matching (DM, IDM)::

    on_start(state, data)
    for iteration in range(iterations):
        network = fresh_network()                             # IDM: one of a queue of trained ones
        for c in range(num_classes):
            indices = state.sample(c, batch_real)
            real = augment(images[indices]); syn = augment(synthetic[c])      # one shared draw
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

Every event takes keyword arguments by name. A method subclasses :class:`Callback` and overrides
only what it needs; a watcher subclasses :class:`Observer` and cannot write the state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from tad_plugin.errors import ConfigError, explain
from tad_plugin.state import SampleState

if TYPE_CHECKING:
    from tad_plugin.scorer import RealData

__all__ = ["Callback", "CallbackList", "Match", "Observer", "Segment", "StateView"]


@dataclass
class Match:
    """What :meth:`Callback.on_match` sees of one matching step.

    Attributes:
        loss: the matching loss, a scalar with its graph.
        weights: float32 [B], the weights that entered the loss; a leaf that requires grad if a callback asked for it.
        indices: int64 [B], positions of the real samples.
        synthetic: the tensors that the loss updates (images [M,C,H,W] first).
        synthetic_labels: int64 [M] or soft float [M,K].
        network: the network on which the statistic was matched.
        iteration: 0-based.
        kind: "distribution" (class means of embeddings) or "gradient" (class gradients).
        fresh_network: makes another network of the same kind from a CPU generator, or None where the loop cannot.
    """

    loss: Tensor
    weights: Tensor
    indices: Tensor
    synthetic: tuple[Tensor, ...]
    synthetic_labels: Tensor | None
    network: nn.Module
    iteration: int
    kind: str = "distribution"
    fresh_network: Callable[[torch.Generator], nn.Module] | None = None


@dataclass
class Segment:
    """What :meth:`Callback.on_segment` sees of one trajectory-matching step.

    Attributes:
        loss: the matching loss, a scalar with its graph.
        start: float32 [P], flat parameters at which the student starts.
        target: float32 [P], flat parameters of the expert; a leaf that requires grad if a callback asked for it.
        synthetic: the tensors that the loss updates (images first; learning rate and soft labels after it).
        synthetic_labels: int64 [M] or soft float [M,K].
        network: the architecture, for functional calls.
        expert: index of the expert.
        start_epoch: the epoch at which the segment starts.
        epochs: its length.
        iteration: 0-based.
        expert_lr: learning rate of the expert along the segment, or None if unknown.
        checkpoints: flat parameters [epochs+1, P] along the segment, where the loop has them.
    """

    loss: Tensor
    start: Tensor
    target: Tensor
    synthetic: tuple[Tensor, ...]
    synthetic_labels: Tensor | None
    network: nn.Module
    expert: int
    start_epoch: int
    epochs: int
    iteration: int
    expert_lr: float | None = None
    checkpoints: Tensor | None = None


def build_config(cls: type, values: Mapping[str, Any] | None, owner: str) -> Any:
    """An instance of the settings dataclass ``cls`` from a mapping; unknown keys raise ConfigError, naming the known ones."""
    values = dict(values or {})
    known = {f.name for f in dataclasses.fields(cls) if f.init}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(
            explain(
                f"settings of {owner} out of {', '.join(sorted(known))}",
                ", ".join(unknown),
                "Remove or rename the unknown ones",
            )
        )
    return cls(**values)


class Callback:
    """A method: decides from what it sees which real samples count, with what label and how much.

    Class attributes:
        name: the name in ``attach("name")`` and in the entry-point group ``tad_plugin.methods``.
        Config: a dataclass of settings, each with a default.
        needs_scorer: wants ``on_scorer_*``; where the loop trains nothing on real data, the hook trains a scorer.
        needs_graph: may want ``match.weights`` (or ``segment.target``) as a leaf; see :meth:`wants_graph`.
        needs_true_labels: cannot run without the true labels (an oracle).
    """

    name: ClassVar[str] = "callback"
    Config: ClassVar[type | None] = None
    needs_scorer: ClassVar[bool] = False
    needs_graph: ClassVar[bool] = False
    needs_true_labels: ClassVar[bool] = False

    def __init__(self, config: Any = None, *, seed: int = 0) -> None:
        if config is None and self.Config is not None:
            config = self.Config()
        self.config = config
        #: every draw of a callback comes from here; part of its checkpoint
        self.generator = torch.Generator().manual_seed(seed)
        #: where :meth:`report` sends records; the hook sets it
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

    # -- events ------------------------------------------------------------------------------------
    def on_start(self, *, state: SampleState, data: RealData) -> None:
        """Once, before anything is drawn; not again on resume, where ``load_state_dict`` restores what it set up."""

    def on_scorer_batch(self, *, state: SampleState, indices: Tensor, logits: Tensor, loss: Tensor) -> Tensor:
        """Inside the training of an expert or scorer. ``logits`` [B,K], ``loss`` a scalar; returns the loss to minimise."""
        return loss

    def on_scorer_epoch(self, *, state: SampleState, network: nn.Module, data: RealData) -> None:
        """After each epoch of an expert or scorer."""

    def wants_graph(self, iteration: int) -> bool:
        """Whether the weights of this iteration must be a leaf with a graph. Asked only if ``needs_graph``."""
        return self.needs_graph

    def on_match(self, *, state: SampleState, match: Match) -> None:
        """After the matching loss is built, before the synthetic set is updated (DM, IDM, DC)."""

    def on_segment(self, *, state: SampleState, segment: Segment) -> None:
        """After a segment's loss, before the update (MTT, DATM)."""

    def on_end(self, *, state: SampleState) -> None:
        """Once, after the last update."""

    # -- resume ------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to go on with the same bits; tensors and plain values only."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.generator.set_state(state["generator"].cpu())


class StateView:
    """A read-only look at a SampleState: every tensor that it returns is a copy."""

    def __init__(self, state: SampleState) -> None:
        self._state = state

    def __getitem__(self, name: str) -> Tensor:
        return self._state[name].clone()

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in self._state:
            return self._state[name].clone()
        raise AttributeError(
            explain(
                "the name of a tensor of the state",
                repr(name),
                "An observer can read tensors and summary(), and cannot write",
            )
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "_state":
            raise AttributeError(
                explain("reading only", f"an assignment to {name!r}", "Make it a Callback if it must write the state")
            )
        super().__setattr__(name, value)

    def summary(self) -> dict[str, Any]:
        """As :meth:`SampleState.summary`."""
        return self._state.summary()


class Observer:
    """A watcher: sees records and a read-only state, and cannot change a run (no draw, no write)."""

    def on_log(self, *, record: Mapping[str, Any]) -> None:
        """For each log record of a callback or loop."""

    def on_scorer_epoch(self, *, state: StateView, data: RealData) -> Mapping[str, Any] | None:
        """After the callbacks' event of the same name; what it returns is logged."""
        return None

    def on_end(self, *, state: StateView) -> None:
        """After the last update."""


@dataclass
class CallbackList:
    """Dispatches each event to the callbacks in the order given, then to the observers."""

    callbacks: Sequence[Callback] = ()
    observers: Sequence[Observer] = ()
    log: Callable[[dict[str, Any]], None] | None = None
    _fields: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for callback in self.callbacks:
            callback.sink = self.record

    def record(self, record: dict[str, Any]) -> None:
        """Adds the current position (iteration, scorer epoch) to a record and hands it to the log and the observers."""
        record = {**self._fields, **record}
        if self.log is not None:
            self.log(record)
        for observer in self.observers:
            observer.on_log(record=record)

    def position(self, **fields: Any) -> None:
        """Fields that every later record carries (iteration=..., scorer_epoch=...)."""
        self._fields.update(fields)

    def start(self, state: SampleState, data: RealData) -> None:
        """Fires on_start."""
        for callback in self.callbacks:
            callback.on_start(state=state, data=data)

    def scorer_batch(self, state: SampleState, indices: Tensor, logits: Tensor, loss: Tensor) -> Tensor:
        """Fires on_scorer_batch, passing each callback the loss of the one before."""
        for callback in self.callbacks:
            loss = callback.on_scorer_batch(state=state, indices=indices, logits=logits, loss=loss)
        return loss

    def scorer_epoch(self, state: SampleState, network: nn.Module, data: RealData) -> None:
        """Fires on_scorer_epoch, then the observers' one, and logs what those return."""
        for callback in self.callbacks:
            callback.on_scorer_epoch(state=state, network=network, data=data)
        for observer in self.observers:
            values = observer.on_scorer_epoch(state=StateView(state), data=data)
            if values:
                self.record(dict(values))

    def wants_graph(self, iteration: int) -> bool:
        """Whether a callback wants the weights of this iteration as a leaf."""
        return any(c.needs_graph and c.wants_graph(iteration) for c in self.callbacks)

    def match(self, state: SampleState, match: Match) -> None:
        """Fires on_match."""
        for callback in self.callbacks:
            callback.on_match(state=state, match=match)

    def segment(self, state: SampleState, segment: Segment) -> None:
        """Fires on_segment."""
        for callback in self.callbacks:
            callback.on_segment(state=state, segment=segment)

    def end(self, state: SampleState) -> None:
        """Fires on_end."""
        for callback in self.callbacks:
            callback.on_end(state=state)
        for observer in self.observers:
            observer.on_end(state=StateView(state))

    def state_dict(self) -> dict[str, Any]:
        """Checkpoint of every callback, by position and name."""
        return {f"{i}:{c.name}": c.state_dict() for i, c in enumerate(self.callbacks)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`. Raises ConfigError if the callbacks differ."""
        mine = [f"{i}:{c.name}" for i, c in enumerate(self.callbacks)]
        if sorted(mine) != sorted(state):
            raise ConfigError(
                explain(
                    f"a checkpoint of {mine}", f"one of {sorted(state)}", "Attach the same methods in the same order"
                )
            )
        for key, callback in zip(mine, self.callbacks, strict=True):
            callback.load_state_dict(state[key])
