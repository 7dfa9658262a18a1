"""Observer: a watcher that sees a read-only view of the state and cannot change a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tad_plugin.core.state import SampleState
from tad_plugin.errors import explain

if TYPE_CHECKING:
    from tad_plugin.data.real import RealData

__all__ = ["Observer", "StateView"]


class StateView:
    """A read-only look at a SampleState: every tensor that it returns is a copy."""

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

    def on_refresh(self, *, state: StateView, data: RealData) -> Mapping[str, Any] | None:
        """After a matching step in which a callback reported something; what it returns is logged."""
        return None

    def on_end(self, *, state: StateView) -> None:
        """After the last update."""
