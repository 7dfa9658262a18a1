"""CallbackList: sends each event to the callbacks, then to the observers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tad_plugin.core.callback import Callback
from tad_plugin.core.events import Match, Segment
from tad_plugin.core.observer import Observer, StateView
from tad_plugin.core.state import SampleState
from tad_plugin.data.real import RealData
from tad_plugin.errors import ConfigError, explain
from tad_plugin.utils.checkpoints import moved

__all__ = ["CallbackList"]


@dataclass
class CallbackList:
    """Sends each event to the callbacks in the order given, then to the observers.

    Attributes:
        callbacks: the methods.
        observers: read-only watchers.
        log: receives each log record.
        fields: added to each log record; see :meth:`position`.
    """

    callbacks: Sequence[Callback] = ()
    observers: Sequence[Observer] = ()
    log: Callable[[dict[str, Any]], None] | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    _reports: int = 0

    def __post_init__(self) -> None:
        for callback in self.callbacks:
            callback.sink = self.record

    def record(self, record: dict[str, Any]) -> None:
        """Adds the current position (iteration, scorer epoch) to a record. Sends it to the log and the observers."""
        self._reports += 1
        record = {**self.fields, **record}
        if self.log is not None:
            self.log(record)
        for observer in self.observers:
            observer.on_log(record=record)

    def position(self, **fields: Any) -> None:
        """Sets fields of every later record (iteration=..., scorer_epoch=...)."""
        self.fields.update(fields)

    def start(self, state: SampleState, data: RealData) -> None:
        """Fires on_start."""
        for callback in self.callbacks:
            callback.on_start(state=state, data=data)

    def scorer_batch(self, state: SampleState, indices: Tensor, logits: Tensor, loss: Tensor) -> Tensor:
        """Fires on_scorer_batch. Each callback gets the loss that the previous one returned."""
        for callback in self.callbacks:
            loss = callback.on_scorer_batch(state=state, indices=indices, logits=logits, loss=loss)
        return loss

    def scorer_again(self, state: SampleState, indices: Tensor, logits: Tensor, loss: Tensor) -> Tensor:
        """Fires on_scorer_again. Each callback gets the loss that the previous one returned."""
        for callback in self.callbacks:
            loss = callback.on_scorer_again(state=state, indices=indices, logits=logits, loss=loss)
        return loss

    def scorer_start(self, state: SampleState) -> None:
        """Fires on_scorer_start."""
        for callback in self.callbacks:
            callback.on_scorer_start(state=state)

    def scorer_epoch(self, state: SampleState, network: nn.Module, data: RealData) -> None:
        """Fires on_scorer_epoch of the callbacks, then of the observers. Logs the observers' results."""
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
        """Fires on_match, then on_refresh of the observers if a callback sent a report."""
        before = self._reports
        for callback in self.callbacks:
            callback.on_match(state=state, match=match)
        self._refreshed(state, match.data, before)

    def segment_term(self, state: SampleState, segment: Segment, term: Tensor, images: Tensor, indices: Tensor) -> None:
        """Fires on_segment_term."""
        for callback in self.callbacks:
            callback.on_segment_term(state=state, segment=segment, term=term, images=images, indices=indices)

    def segment(self, state: SampleState, segment: Segment) -> None:
        """Fires on_segment, then on_refresh of the observers if a callback sent a report."""
        before = self._reports
        for callback in self.callbacks:
            callback.on_segment(state=state, segment=segment)
        self._refreshed(state, segment.data, before)

    def _refreshed(self, state: SampleState, data: RealData | None, before: int) -> None:
        if data is None or self._reports == before:
            return
        for observer in self.observers:
            values = observer.on_refresh(state=StateView(state), data=data)
            if values:
                self.record(dict(values))

    def end(self, state: SampleState) -> None:
        """Fires on_end."""
        for callback in self.callbacks:
            callback.on_end(state=state)
        for observer in self.observers:
            observer.on_end(state=StateView(state))

    def state_dict(self) -> dict[str, Any]:
        """Checkpoint of every callback, by position and name."""
        return {f"{i}:{c.name}": c.state_dict() for i, c in enumerate(self.callbacks)}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restores :meth:`state_dict`; its tensors move to ``device`` first. Raises ConfigError for other callbacks."""
        mine = [f"{i}:{c.name}" for i, c in enumerate(self.callbacks)]
        if sorted(mine) != sorted(state):
            do = "Attach the same methods in the same order"
            raise ConfigError(explain(f"a checkpoint of {mine}", f"one of {sorted(state)}", do))
        for key, callback in zip(mine, self.callbacks, strict=True):
            callback.load_state_dict(moved(state[key], device))
