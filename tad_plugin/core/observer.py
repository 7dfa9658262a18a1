"""Observer: watches a run through a read-only view of the state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tad_plugin.core.state import SampleState
from tad_plugin.data.real import RealData
from tad_plugin.errors import explain

__all__ = ["Observer", "StateView"]


class StateView:
    """A read-only view of a SampleState. Every tensor that it returns is a copy."""

    def __init__(self, state: SampleState) -> None:
        self._state = state

    def __getitem__(self, name: str) -> Tensor:
        return self._state[name].clone()

    def has(self, name: str) -> bool:
        """Whether the state has a tensor of that name."""
        return name in self._state

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in self._state:
            return self._state[name].clone()
        do = "An observer can read tensors and summary(), and cannot write"
        raise AttributeError(explain("the name of a tensor of the state", repr(name), do))

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "_state":
            do = "Make it a Callback if it must write the state"
            raise AttributeError(explain("reading only", f"an assignment to {name!r}", do))
        super().__setattr__(name, value)

    def summary(self) -> dict[str, Any]:
        """See :meth:`SampleState.summary`."""
        return self._state.summary()


class Observer:
    """Sees log records and a read-only state. It cannot change a run: it draws nothing and writes nothing."""

    def on_log(self, *, record: Mapping[str, Any]) -> None:
        """For each log record of a callback or loop."""

    def on_scorer_epoch(self, *, state: StateView, data: RealData) -> Mapping[str, Any] | None:
        """After the callbacks' event of the same name. The result is logged."""
        return None

    def on_refresh(self, *, state: StateView, data: RealData) -> Mapping[str, Any] | None:
        """After a matching step in which a callback sent a report. The result is logged."""
        return None

    def on_end(self, *, state: StateView) -> None:
        """After the last update."""
