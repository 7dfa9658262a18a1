"""Oracle: only the samples whose observed label is the true one. What no method without the true labels can know."""

from __future__ import annotations

from typing import ClassVar

from tad_plugin.callback import Callback
from tad_plugin.scorer import RealData
from tad_plugin.state import SampleState

__all__ = ["Oracle"]


class Oracle(Callback):
    """Trusts exactly the correctly labelled samples. Needs the true labels."""

    name: ClassVar[str] = "oracle"
    needs_true_labels: ClassVar[bool] = True

    def on_start(self, *, state: SampleState, data: RealData) -> None:
        """Sets ``trusted`` and ``trust``."""
        right = state.observed.eq(data.true_labels)  # type: ignore[arg-type]
        state.update(trusted=right, trust=right.float())
        state.set_weights(self.name, right.float())
        self.report("division", trusted=int(right.sum()), untrusted=int((~right).sum()))
