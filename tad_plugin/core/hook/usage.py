"""Usage: how often a loop asked each handle of the hook. The wiring check and the lines of finish() read it."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

__all__ = ["Usage"]


class Usage:
    """Counts of calls, and, in the wiring check, whether what the hook returned reached a loss.

    Attributes:
        calls: handle -> number of calls.
        samples: handle -> number of samples in them.
        watching: the wiring check is on.
        watched: tensors that the hook returned with a graph.
        used: how many of them a backward pass came through.
        largest: samples of the largest batch.
        late_pools: calls of ``pool`` and ``pools`` after the first update of the synthetic set.
    """

    def __init__(self, *, watching: bool = False) -> None:
        self.calls: Counter[str] = Counter()
        self.samples: Counter[str] = Counter()
        self.watching = watching
        self.watched = self.used = self.largest = self.late_pools = 0

    def note(self, handle: str, samples: int = 0) -> None:
        """Counts one call, with this number of samples."""
        self.calls[handle] += 1
        self.samples[handle] += samples
        self.largest = max(self.largest, samples)

    def watch(self, tensor: Tensor) -> Tensor:
        """Notes whether a backward pass comes through ``tensor``; the same object."""
        if self.watching and tensor.requires_grad and torch.is_grad_enabled():
            self.watched += 1
            seen: list[bool] = []

            def came(_gradient: Tensor) -> None:
                if not seen:
                    seen.append(True)
                    self.used += 1

            tensor.register_hook(came)
        return tensor

    def text(self) -> str:
        """Counts as text: "sample 300, reweight 300"; "never" without any."""
        return ", ".join(f"{name} {count:,}" for name, count in self.calls.items()) or "never"
