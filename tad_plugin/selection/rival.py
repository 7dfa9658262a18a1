"""Rival: the base class of the rival methods."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from tad_plugin.core.callback import Callback
from tad_plugin.core.state import SampleState

__all__ = ["Rival"]


class Rival(Callback):
    """A method that decides once, before distillation, which samples take part. Labels stay as observed."""

    rival: ClassVar[bool] = True

    def network_seed(self, number: int) -> int:
        """Seed of the ``number``-th network that this method trains."""
        return int(self.generator.initial_seed()) + 101 * number

    def keep(self, state: SampleState, kept: Tensor, *, trust: Tensor | None = None, **logged: Any) -> None:
        """Trusts the kept samples, gives the others weight 0, and reports the division.

        Args:
            state: the state to write.
            kept: bool [N].
            trust: float [N] in [0, 1]; None leaves it.
            logged: further values of the log record.
        """
        state.update(trusted=kept, trust=trust)
        state.set_weights(self.name, kept.float())
        self.report("division", trusted=int(kept.sum()), untrusted=int((~kept).sum()), **logged)
